"""A compressed tensor as bytes: what they mean, and what is refused before anything is allocated.

    header   magic, version, stream, depth, rotated, dtype, rank, offset, unit, sizes of tables and stream, shape
    tables   values kept exactly: of the tensor, then of the rotated one
    stream   the rest, in one of STREAMS
    crc32    of everything before it

Little-endian. A blob of n bytes stands for at most MOST_VALUES n values, so a header alone cannot ask for memory.
"""

import math
import struct
import zlib
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

MAGIC, VERSION = b"DLCT", 1
STREAMS = ("exact", "constant", "entropy", "h264", "hevc")
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
MOST_VALUES, MOST_DIMENSIONS = 1 << 12, 8
_HEAD = struct.Struct("<4sBBBBBBddIIQ")
_CRC = struct.Struct("<I")


class CodecError(ValueError):
    """A tensor that cannot be compressed as asked, or bytes that are no compressed tensor; the message says why."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A compressed tensor.

    Attributes:
        stream: how the payload is coded, one of STREAMS.
        shape, dtype: of the tensor that was compressed.
        depth: bits of a sample, of video alone.
        rotated: whether the payload is of the rotated tensor (see `dlcm.codec.rotation`).
        offset, unit: a sample s, counted from the middle of its range, stands for offset + unit s.
        exact, exact_rotated: tables of values that are not in the payload (see `dlcm.codec.outliers`).
        payload: the coded samples.
    """

    stream: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    depth: int = 0
    rotated: bool = False
    offset: float = 0.0
    unit: float = 0.0
    exact: bytes = b""
    exact_rotated: bytes = b""
    payload: bytes = b""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of `to_bytes`: everything counts."""
        sides = len(self.exact) + len(self.exact_rotated)
        return _HEAD.size + 8 * len(self.shape) + sides + len(self.payload) + _CRC.size

    @property
    def bits(self) -> float:
        """Bits per value, everything counted; 0 for a tensor of no values."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    @property
    def side_bits(self) -> float:
        """Bits per value of all but the payload."""
        return 8 * (self.nbytes - len(self.payload)) / self.numel if self.numel else 0.0

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            STREAMS.index(self.stream),
            self.depth,
            self.rotated,
            DTYPES.index(self.dtype),
            len(self.shape),
            self.offset,
            self.unit,
            len(self.exact),
            len(self.exact_rotated),
            len(self.payload),
        )
        dimensions = struct.pack(f"<{len(self.shape)}Q", *self.shape)
        body = b"".join((head, dimensions, self.exact, self.exact_rotated, self.payload))
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Blob":
        """The blob of `to_bytes`.

        Raises:
            CodecError: the bytes are damaged, cut short, or were never a blob.
        """
        if len(data) < _HEAD.size + _CRC.size or data[:4] != MAGIC:
            raise CodecError("no compressed tensor, or cut short; get the file again")
        if _CRC.unpack(data[-_CRC.size :])[0] != zlib.crc32(memoryview(data)[: -_CRC.size]):
            raise CodecError("a compressed tensor is damaged or cut short (its crc32 differs); get the file again")
        blob, start, (first, second) = cls.parse_header(data, len(data))
        tables = start + first, start + first + second
        return replace(
            blob,
            exact=data[start : tables[0]],
            exact_rotated=data[tables[0] : tables[1]],
            payload=data[tables[1] : -_CRC.size],
        )

    @classmethod
    def parse_header(cls, head: bytes, length: int) -> tuple["Blob", int, tuple[int, int]]:
        """The blob of `length` bytes that begins like this, without tables and payload; where these begin, and the
        bytes of each table.

        Raises:
            CodecError: the header says what cannot be.
        """
        try:
            magic, version, stream, depth, rotated, dtype, rank, offset, unit, *sizes = _HEAD.unpack_from(head)
            if magic != MAGIC or rank > MOST_DIMENSIONS:
                raise ValueError
            shape = struct.unpack_from(f"<{rank}Q", head, _HEAD.size)
            start = _HEAD.size + 8 * rank
            if start + sum(sizes) + _CRC.size != length or not (math.isfinite(offset) and math.isfinite(unit)):
                raise ValueError
            blob = cls(STREAMS[stream], shape, DTYPES[dtype], depth, bool(rotated), offset, unit)
        except (struct.error, ValueError, IndexError) as error:
            raise CodecError("the header of a compressed tensor makes no sense; get the file again") from error
        if version != VERSION:
            raise CodecError(f"a compressed tensor of version {version}, not {VERSION}; use a matching dlcm")
        if blob.numel > MOST_VALUES * length:
            raise CodecError(f"{length} bytes cannot be {blob.numel:,} values; get the file again")
        return blob, start, (sizes[0], sizes[1])


class BudgetUnused(CodecError):
    """A budget of more bits than a backend has use for.

    Attributes:
        finest: the blob of the most bits that it has use for.
    """

    def __init__(self, message: str, finest: Blob):
        super().__init__(message)
        self.finest = finest


def least_padding(blob: Blob) -> bytes:
    """Zeros that a payload needs for the blob to be long enough for its values."""
    return bytes(max(0, -(-blob.numel // MOST_VALUES) - blob.nbytes))


def raw_bytes(x: Tensor) -> bytes:
    """The values of a tensor as they are in memory, whatever its dtype."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def from_raw(data: bytes, dtype: torch.dtype) -> Tensor:
    """(n,) the values of `raw_bytes`."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype) if data else torch.empty(0, dtype=dtype)


def require(package: str) -> ModuleType:
    """The module of an optional package.

    Raises:
        CodecError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise CodecError(f"{package} is not installed: pip install 'dlcm[codec]'") from error
