"""Values that are kept exactly: a table of positions and values beside the stream.

Positions ascend and are written as differences in variable-length bytes (LEB128), then come the values as they are.
An outlier left in would stretch the range of all samples, or be clipped.
"""

import numpy as np
import torch
from torch import Tensor

from dlcm.codec.blob import CodecError, from_raw, raw_bytes


def write_table(positions: np.ndarray, values: Tensor) -> bytes:
    """Positions, ascending, and as many values; nothing at all for none."""
    if not len(positions):
        return b""
    gaps = np.diff(positions, prepend=0)
    return write_varints(np.concatenate(([len(positions)], gaps))) + raw_bytes(values)


def read_table(data: bytes, dtype: torch.dtype, numel: int) -> tuple[np.ndarray, Tensor]:
    """Positions and values of `write_table`.

    Raises:
        CodecError: they are not of a tensor of `numel` values.
    """
    if not data:
        return np.empty(0, np.int64), torch.empty(0, dtype=dtype)
    (count,), start = read_varints(data, 1)
    if not 0 < count <= min(numel, len(data) // (1 + dtype.itemsize)):
        raise CodecError("a table of exact values is longer than its bytes; get the file again")
    gaps, used = read_varints(data[start:], int(count))
    positions, values = np.cumsum(gaps), data[start + used :]
    if np.any(gaps[1:] <= 0) or positions[-1] >= numel or len(values) != count * dtype.itemsize:
        raise CodecError("a table of exact values points outside its tensor; get the file again")
    return positions, from_raw(values, dtype)


def write_varints(numbers: np.ndarray) -> bytes:
    """Numbers below 2^35, seven bits a byte, the lowest first; the last byte of each is below 128."""
    columns = [(numbers >> shift) & 127 for shift in range(0, 35, 7)]
    used = np.stack([numbers >> shift > 0 for shift in range(0, 35, 7)], 1)
    used[:, 0] = True
    more = np.pad(used[:, 1:], ((0, 0), (0, 1)))
    return (np.stack(columns, 1) | more * 128)[used].astype(np.uint8).tobytes()


def read_varints(data: bytes, count: int) -> tuple[np.ndarray, int]:
    """(count,) numbers, and how many bytes they took.

    Raises:
        CodecError: there are not as many.
    """
    head = np.frombuffer(data, np.uint8)[: 5 * count].astype(np.int64)
    ends = np.flatnonzero(head < 128)[:count]
    starts = np.concatenate(([0], ends[:-1] + 1))
    if len(ends) < count or np.any(ends - starts > 4):
        raise CodecError("a list of numbers is cut short; get the file again")
    used = int(ends[-1]) + 1 if count else 0
    index = np.arange(used) - np.repeat(starts, ends - starts + 1)
    return np.add.reduceat((head[:used] & 127) << 7 * index, starts), used
