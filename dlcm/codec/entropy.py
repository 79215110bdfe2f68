"""The control without a codec: a uniform quantiser, and a range coder with the frequencies of its own symbols.

Intra prediction and transforms earn their keep where they do better than this. The stream is the least symbol, the
number of symbols, how often each occurs, where in their step the values of the NEAR symbols about 0 lie on average
(which is what they are restored to: at few bits, not the middle), and the words of the coder.
"""

import numpy as np

from dlcm.codec.blob import CodecError, require
from dlcm.codec.outliers import read_varints, write_varints

MOST_SYMBOLS = 1 << 16
NEAR = 8  # on either side
SHARES = 254  # of a step, in which averages are kept: one byte each
FINEST, COARSEST = -12.0, 6.0  # log2 of the step over the deviation


def encode(values: np.ndarray, unit: float) -> bytes:
    """The stream of fp32 values, rounded to multiples of `unit`."""
    constriction = require("constriction")
    scaled = values.reshape(-1) / np.float32(unit)
    symbols = np.rint(scaled).astype(np.int32)
    least, most = int(symbols.min()), int(symbols.max())
    if most - least >= MOST_SYMBOLS:
        raise CodecError(f"the entropy backend codes at most {MOST_SYMBOLS:,} levels; ask for fewer bits")
    averages = _averages(scaled, symbols)
    symbols -= least
    counts = np.bincount(symbols, minlength=2)
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(symbols, _model(counts))
    sign_and_size = np.array([2 * abs(least) + (least < 0), len(counts)])
    words = coder.get_compressed().astype("<u4").tobytes()
    return write_varints(np.concatenate((sign_and_size, counts))) + averages.tobytes() + words


def decode(stream: bytes, numel: int, unit: float) -> np.ndarray:
    """(numel,) fp32 values of `encode`.

    Raises:
        CodecError: the stream is not of so many values.
    """
    constriction = require("constriction")
    (least, size), start = read_varints(stream, 2)
    if not 2 <= size <= MOST_SYMBOLS:
        raise CodecError("a stream of the range coder makes no sense; get the file again")
    counts, used = read_varints(stream[start:], int(size))
    averages, words = np.split(np.frombuffer(stream, np.uint8)[start + used :], [2 * NEAR + 1])
    words = words[: len(words) // 4 * 4]  # what is left over makes the blob as long as its values ask for
    if counts.sum() != numel or len(averages) != 2 * NEAR + 1:
        raise CodecError("a stream of the range coder is of another tensor; get the file again")
    try:
        coder = constriction.stream.queue.RangeDecoder(words.view("<u4").astype(np.uint32))
        symbols = coder.decode(_model(counts), numel)
    except (AssertionError, ValueError) as error:  # what constriction raises of words that no encoder wrote
        raise CodecError("a stream of the range coder is damaged; get the file again") from error
    levels = np.arange(int(size)) + int(least // 2 * (1 - 2 * (least % 2)))
    shifts = np.where(np.abs(levels) <= NEAR, averages.view(np.int8)[levels.clip(-NEAR, NEAR) + NEAR], 0) / SHARES
    return ((levels + shifts) * unit).astype(np.float32)[symbols]


def _averages(scaled: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """(2 NEAR + 1,) int8: by how many SHARES of a step the values of a symbol exceed it on average."""
    near = np.abs(symbols) <= NEAR
    index = symbols[near] + NEAR
    counts = np.bincount(index, minlength=2 * NEAR + 1)
    sums = np.bincount(index, weights=scaled[near] - symbols[near], minlength=2 * NEAR + 1)
    return np.rint(SHARES * np.clip(sums / np.maximum(counts, 1), -0.5, 0.5)).astype(np.int8)


def _model(counts: np.ndarray) -> object:
    """Frequencies as the coder takes them; what never occurs gets the least it knows."""
    return require("constriction").stream.model.Categorical(counts / counts.sum(), perfect=False)
