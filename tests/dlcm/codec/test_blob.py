"""Bytes of a compressed tensor: what was damaged, cut short or made up is one error, and takes no memory."""

import random
import struct
import zlib

import numpy as np
import pytest
import torch

from dlcm.codec import Blob, CodecError, compress, decompress, store
from dlcm.codec.outliers import read_table, read_varints, write_table, write_varints
from dlcm.codec.video import ENCODERS, encode
from tests.dlcm.codec.test_tensor import gaussian
from tests.memory import little_memory


def sealed(data: bytes) -> bytes:
    """With the checksum that holds."""
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def blobs() -> dict[str, Blob]:
    x = gaussian(64, 64)
    x[0, 0] = 9.0
    made = {name: compress(x, bits=4, backend=name) for name in ("x264", "x265", "entropy")}  # type: ignore[arg-type]
    made["rotated"] = compress(x, bits=4, transform="hadamard", clip_sigma=3)
    return made | {"exact": store(x), "constant": compress(torch.zeros(64, 64), bits=4)}


@pytest.mark.parametrize("name", blobs())
def test_any_bit_that_flips_and_any_cut_is_noticed(name: str) -> None:
    data = blobs()[name].to_bytes()
    draw = random.Random(0)
    for position in {*range(60), *(draw.randrange(len(data)) for _ in range(60))} & set(range(len(data))):
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.randrange(8)
        with pytest.raises(CodecError, match="get the file again"):
            Blob.from_bytes(bytes(damaged))
    for length in (0, 3, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(CodecError, match="get the file again"):
            Blob.from_bytes(data[:length])
    with pytest.raises(CodecError, match="get the file again"):
        Blob.from_bytes(data + b"\0")


@pytest.mark.parametrize("name", blobs())
def test_what_someone_made_up_is_read_or_refused_in_little_memory(name: str) -> None:
    data, draw = blobs()[name].to_bytes(), random.Random(1)
    refused = 0
    for _ in range(60):
        made_up = bytearray(data)
        for _ in range(draw.choice((1, 1, 8))):
            made_up[draw.randrange(4, len(data) - 4)] = draw.randrange(256)
        with little_memory():
            try:
                decompress(Blob.from_bytes(sealed(bytes(made_up))))
            except CodecError:
                refused += 1
    assert refused or name in ("exact", "constant")


@pytest.mark.parametrize("name", blobs())
def test_a_header_alone_cannot_ask_for_memory(name: str) -> None:
    blob = blobs()[name]
    for shape in ((1 << 40,), (1 << 20, 1 << 20), (1 << 63, 1 << 63), (2,) * 9):
        head = bytearray(blob.to_bytes())
        made_up = bytes(head[:9]) + bytes([len(shape)]) + bytes(head[10:42]) + struct.pack(f"<{len(shape)}Q", *shape)
        with little_memory(), pytest.raises(CodecError):
            decompress(Blob.from_bytes(sealed(made_up + bytes(head[42 + 16 :]))))


@pytest.mark.parametrize("name", ("x264", "x265"))
def test_a_stream_of_larger_pictures_is_refused_before_they_are_decoded(name: str) -> None:
    small, large = blobs()[name], encode(ENCODERS[name], np.zeros((2048, 2048), np.float32), 1.0, 40, 10)
    made_up = Blob(small.stream, small.shape, small.dtype, small.depth, payload=large, unit=1.0)
    with little_memory(), pytest.raises(CodecError, match="get the file again"):
        decompress(made_up)


def test_a_long_table_or_a_far_position_is_refused() -> None:
    values = torch.tensor([1.0, 2.0])
    table = write_table(np.array([3, 700]), values)
    positions, again = read_table(table, torch.float32, 701)
    assert positions.tolist() == [3, 700] and torch.equal(again, values)
    assert write_table(np.empty(0, np.int64), values[:0]) == b""
    for data, numel in ((table, 700), (table[:-1], 701), (b"\xff\xff\xff\xff\x7f" + table, 701), (b"\x02", 701)):
        with pytest.raises(CodecError, match="get the file again"):
            read_table(data, torch.float32, numel)


def test_numbers_of_variable_length() -> None:
    numbers = np.array([0, 1, 127, 128, 16383, 16384, 2**32, 2**35 - 1])
    data = write_varints(numbers)
    again, used = read_varints(data + b"more", len(numbers))
    assert again.tolist() == numbers.tolist() and used == len(data) == 1 + 1 + 1 + 2 + 2 + 3 + 5 + 5
    for cut in (b"", data[:-1], b"\xff" * 40):
        with pytest.raises(CodecError):
            read_varints(cut, len(numbers))
