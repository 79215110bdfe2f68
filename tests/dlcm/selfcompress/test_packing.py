"""Packed files: what is unpacked equals what was trained, sizes are as predicted, and damage is refused."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dlcm.selfcompress.packing import (
    ARRAYS,
    PACKED,
    PackedError,
    file_size,
    load_packed,
    pack_matrix,
    predicted_size,
    save_packed,
    unpack_matrix,
)
from dlcm.selfcompress.quantiser import plain, quantised_linears
from tests.conftest import tiny_baseline, tiny_baseline_config, tiny_dlcm

BUILDERS = [tiny_dlcm, tiny_baseline]
TILES = {"quantiser_rows": 4, "quantiser_columns": 4}


def trained(builder: Any, **overrides: Any) -> Any:
    """A model of weights of 0 to 8 bits."""
    model = builder(**{"quantiser": "bits"} | overrides).float()
    generator = torch.Generator().manual_seed(0)
    for layer in quantised_linears(model).values():
        if hasattr(layer, "depth"):
            layer.fit_(3)
            layer.depth.data = torch.randint(0, 9, layer.depth.shape, generator=generator).float()
            layer.exponent.data += torch.randn(layer.exponent.shape, generator=generator)
    return model


# Matrices


@pytest.mark.parametrize(("rows", "columns"), [(1, 24), (2, 3), (16, 24), (4, 8)])
def test_whole_numbers_come_back(rows: int, columns: int):
    generator = torch.Generator().manual_seed(3)
    groups = 16 // rows, 24 // columns
    width = torch.randint(0, 9, groups, generator=generator)
    uniform = torch.rand(groups[0], rows, groups[1], columns, generator=generator)
    half = (2.0 ** (width - 1))[:, None, :, None]
    codes = ((2 * uniform - 1) * half).floor().clamp(-half, half - 1).round()
    codes[0, :, 0] = 0
    scale = torch.rand(groups, generator=generator) + 0.1
    packed = pack_matrix(codes, scale)
    weights = (codes * scale[:, None, :, None]).view(16, 24)
    assert torch.equal(unpack_matrix(packed, (16, 24), rows, columns), weights)
    assert packed.widths_G[0] == 0 and len(packed.scales_L) == int((packed.widths_G > 0).sum())
    assert len(packed.codes) == -(-int(packed.widths_G.sum()) * rows * columns // 8)
    assert bool((torch.from_numpy(packed.widths_G).view(groups) <= width).all())


@pytest.mark.parametrize(
    ("codes", "width"),
    [([0, 0, 0], 0), ([-1, -1, -1], 1), ([5, 5, 5], 3), ([-2, 1, 0], 2), ([-2, 2, 0], 3), ([-128, 127, 0], 8)],
)
def test_widths_are_those_of_the_range_that_holds_zero(codes: list[int], width: int):
    packed = pack_matrix(torch.tensor(codes).view(1, 1, 1, 3).float(), torch.ones(1, 1))
    assert packed.widths_G.tolist() == [width]
    assert unpack_matrix(packed, (1, 3), 1, 3).tolist() == [codes]


# Files


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("overrides", [{}, TILES, {"quantiser": "ternary"}], ids=["channels", "tiles", "ternary"])
def test_unpacked_weights_are_the_trained_ones_to_the_last_bit(builder: Any, overrides: dict, tmp_path: Path):
    model = trained(builder, **overrides)
    save_packed(model, tmp_path, "fp32")
    unpacked = load_packed(tmp_path, model.config)
    ours, theirs = unpacked.state_dict(), plain(model).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("rest", ["fp32", "bf16", "fp16"])
def test_the_file_is_as_large_as_predicted(rest: str, tmp_path: Path):
    model = trained(tiny_baseline, d_token=64, token_ffn=128)
    for layer in quantised_linears(model).values():
        depth = layer.depth.clone()
        layer.fit_(8)
        layer.depth.data = depth
        layer.exponent.data += 8 - depth  # just wide enough
    size, path = predicted_size(model, rest), save_packed(model, tmp_path, rest)
    parts = file_size(path)
    assert parts["file"] == path.stat().st_size
    assert sum(parts.values()) - parts["file"] <= parts["file"]
    assert 8 * parts["rest"] == size.rest_bits
    # The range that weights really take can be narrower than the depth allows, never wider.
    assert 0.9 * size.code_bits < 8 * parts["codes"] <= size.code_bits + 8 * len(quantised_linears(model))
    assert 8 * (parts["widths"] + parts["minimums"] + parts["scales"]) <= size.header_bits
    assert size.total == pytest.approx(8 * parts["file"], rel=0.05)


def test_a_plain_model_is_not_packed(tmp_path: Path):
    with pytest.raises(ValueError, match=r"compression\.method"):
        save_packed(tiny_baseline(), tmp_path, "fp16")


def refused(directory: Path, **changes: Any) -> str:
    config = tiny_baseline_config(**{"quantiser": "bits"} | changes)
    with pytest.raises(PackedError) as error:
        load_packed(directory, config)
    message = str(error.value)
    assert str(directory / PACKED) in message and "\n" not in message
    return message


def test_another_models_config_is_refused(tmp_path: Path):
    save_packed(trained(tiny_baseline), tmp_path, "fp16")
    for changes in ({"num_layers": 3}, {"token_ffn": 32}, {"d_token": 32}, {"quantiser_rows": 2}, {"vocab_size": 24}):
        refused(tmp_path, **changes)
    assert "numbers" in refused(tmp_path, num_layers=10**7)
    assert "numbers" in refused(tmp_path, token_ffn=4 * 10**9)
    none_left = {f"decoder.layers.{number}.ffn": [0] for number in range(2)}  # which would be unpacked to zeros
    assert "numbers" in refused(tmp_path, token_ffn=4 * 10**9, channels_left=none_left)
    refused(tmp_path, quantiser="none")


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "of another dtype"])
def test_arrays_that_do_not_fit_are_refused(name: str, change: str, tmp_path: Path):
    save_packed(trained(tiny_baseline), tmp_path, "fp16")
    tensors = load_file(tmp_path / PACKED)
    match change:
        case "shorter":
            tensors[name] = tensors[name][:-1].clone()
        case "longer":
            tensors[name] = torch.cat([tensors[name], tensors[name][-1:]])
        case "missing":
            del tensors[name]
        case _:
            tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, tmp_path / PACKED)
    refused(tmp_path)


def test_widths_beyond_a_byte_are_refused(tmp_path: Path):
    save_packed(trained(tiny_baseline), tmp_path, "fp16")
    tensors = load_file(tmp_path / PACKED)
    tensors["widths"][0] = 9
    save_file(tensors, tmp_path / PACKED)
    refused(tmp_path)


def test_whatever_is_done_to_the_bytes_is_read_or_refused(tmp_path: Path):
    model = trained(tiny_baseline)
    save_packed(model, tmp_path, "fp16")
    path, draw = tmp_path / PACKED, random.Random(0)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for number in range(120):
        data = bytearray(whole)
        if number % 4 == 0:
            data = data[: draw.randrange(len(data))]
        else:
            end = 8 + length if number % 2 else len(data)
            for _ in range(draw.randrange(1, 6)):
                data[draw.randrange(end)] = draw.randrange(256)
        path.write_bytes(data)
        try:
            unpacked = load_packed(tmp_path, model.config)
        except PackedError as error:
            assert str(path) in str(error)
        else:
            assert unpacked.num_parameters() == tiny_baseline().num_parameters()


def test_a_link_is_refused(tmp_path: Path):
    directory = tmp_path / "packed"
    directory.mkdir()
    save_packed(trained(tiny_baseline), directory, "fp16")
    (directory / PACKED).rename(tmp_path / "elsewhere")
    (directory / PACKED).symlink_to(tmp_path / "elsewhere")
    refused(directory)


def test_the_header_names_few_tensors(tmp_path: Path):
    """The header is part of the size: of the matrices it knows nothing but four arrays."""
    model = trained(tiny_dlcm)
    path = save_packed(model, tmp_path, "fp16")
    with path.open("rb") as file:
        header = json.loads(file.read(int(np.frombuffer(file.read(8), dtype="<u8")[0])))
    assert len(header) - 1 == len(ARRAYS) + len(model.state_dict()) - 3 * len(quantised_linears(model))
