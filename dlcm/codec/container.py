"""Many compressed tensors in one file, laid out like safetensors: a JSON header of byte ranges, then the blobs.

    u64 length of the header, u32 its crc32, header, blobs one after the other in the order of their names

The header is {"format", "version", "metadata": {str: str}, "tensors": {name: [begin, end]}}; ranges cover the rest of
the file without gaps. Everything about a tensor is in its blob, which has its own checksum: tensors are read one by
one. The same tensors give the same bytes.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlcm.codec.blob import Blob, CodecError
from dlcm.codec.tensor import decompress

FORMAT, VERSION = "dlcm.codec", 1
MOST_HEADER = 100_000_000  # bytes, as in safetensors
MOST_BLOB_HEADER = 256
_PREFIX = struct.Struct("<QI")


def save(path: Path, blobs: Mapping[str, Blob], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file of compressed tensors; until it is whole it is beside its name."""
    begin, ranges, parts = 0, {}, []
    for name in sorted(blobs):
        part = blobs[name].to_bytes()
        ranges[name] = [begin, begin + len(part)]
        begin += len(part)
        parts.append(part)
    content = {"format": FORMAT, "version": VERSION, "metadata": dict(metadata or {}), "tensors": ranges}
    header = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            file.write(_PREFIX.pack(len(header), zlib.crc32(header)) + header)
            file.writelines(parts)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def most_header_bytes(names: Iterable[str]) -> int:
    """What a file takes beside its blobs, at most, without metadata."""
    ranges = {name: [10**12, 10**12] for name in names}
    content = {"format": FORMAT, "version": VERSION, "metadata": {}, "tensors": ranges}
    return _PREFIX.size + len(json.dumps(content, separators=(",", ":")))


class Container:
    """A file of `save`, of which only the header is read until a tensor is asked for.

    Attributes:
        metadata: as it was saved.

    Raises:
        CodecError: the file is damaged, cut short, or something else. Of hostile files too: nothing larger than the
            file is allocated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(_PREFIX.size)
            length, checksum = _PREFIX.unpack(prefix) if len(prefix) == _PREFIX.size else (size, 0)
            if length > min(MOST_HEADER, size - _PREFIX.size):
                raise self._error("no file of compressed tensors, or cut short")
            header = file.read(length)
        if zlib.crc32(header) != checksum:
            raise self._error("its header is damaged")
        self._start = _PREFIX.size + length
        self.metadata, self._ranges = self._parsed(header, size - self._start)

    def names(self) -> list[str]:
        """Of all tensors, in order."""
        return list(self._ranges)

    def header(self, name: str) -> Blob:
        """What is known of a tensor without reading its tables and payload, which are empty here."""
        begin, end = self._range(name)
        with self._naming(name):
            return Blob.parse_header(self._bytes(begin, min(end, begin + MOST_BLOB_HEADER)), end - begin)[0]

    def nbytes(self, name: str) -> int:
        """Of a tensor's blob."""
        begin, end = self._range(name)
        return end - begin

    def blob(self, name: str) -> Blob:
        """A tensor as it was saved; its checksum holds."""
        with self._naming(name):
            return Blob.from_bytes(self._bytes(*self._range(name)))

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor, decompressed."""
        blob = self.blob(name)
        with self._naming(name):
            return decompress(blob, dtype, device)

    def verify(self) -> None:
        """Raises CodecError, which names the first one, unless all checksums hold."""
        for name in self.names():
            self.blob(name)

    def _range(self, name: str) -> tuple[int, int]:
        if name not in self._ranges:
            near = get_close_matches(name, self._ranges, n=1)
            raise CodecError(f"{self.path}: no tensor {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return self._ranges[name]

    def _bytes(self, begin: int, end: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._start + begin)
            return file.read(end - begin)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Errors say which tensor of which file they are about."""
        try:
            yield
        except CodecError as error:
            raise CodecError(f"{self.path}: {name}: {error}") from error

    def _parsed(self, header: bytes, size: int) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
        """Metadata and ranges; the ranges fill `size` bytes, one after the other."""
        try:
            content: Any = json.loads(header)
            if content["format"] != FORMAT or content["version"] != VERSION:
                raise self._error(f"its format is {content['format']!r:.40} {content['version']!r:.40}")
            metadata, ranges, last = dict(content["metadata"]), {}, 0
            for name, (begin, end) in content["tensors"].items():
                if type(begin) is not int or type(end) is not int or begin != last or end <= begin:
                    raise ValueError
                ranges[name] = (begin, end)
                last = end
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, CodecError):
                raise
            raise self._error("its header makes no sense") from error
        if last != size or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("its header is not of the bytes that follow, so it is cut short or damaged")
        return metadata, ranges

    def _error(self, reason: str) -> CodecError:
        return CodecError(f"{self.path}: {reason}; get the file again, or pack it with this version of dlcm")
