"""Files of many tensors: lazy, checked, the same bytes every time; and budgets of whole state dicts."""

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dlcm.codec import CodecError, Container, compress_state, relative_mse, save, store
from tests.dlcm.codec.test_tensor import gaussian
from tests.memory import little_memory


def state() -> dict[str, Tensor]:
    return {
        "embed.weight": gaussian(200, 96, seed=1),
        "layer.weight": gaussian(96, 192, seed=2).bfloat16(),
        "norm.weight": torch.ones(96),
        "steps": torch.tensor(7),
    }


@pytest.mark.parametrize("backend", ("x264", "entropy"))
def test_a_state_dict_keeps_to_its_budget_and_comes_back(backend: str, tmp_path: Path) -> None:
    tensors, path = state(), tmp_path / "model.codec"
    save(path, compress_state(tensors, 4, backend=backend), {"of": "a test"})
    values = sum(tensor.numel() for tensor in tensors.values())
    assert 3.97 < 8 * path.stat().st_size / values <= 4
    container = Container(path)
    assert container.names() == sorted(tensors) and container.metadata == {"of": "a test"}
    container.verify()
    for name, tensor in tensors.items():
        again = container.read(name)
        assert again.dtype == tensor.dtype and again.shape == tensor.shape
        assert relative_mse(tensor, again) < (0.02 if tensor.ndim == 2 else 1e-30)
        assert container.header(name).shape == tensor.shape
    assert container.read("layer.weight", torch.float64).dtype == torch.float64


def test_the_same_bytes_whatever_the_order_and_the_number_of_workers(tmp_path: Path) -> None:
    tensors, files = state(), (tmp_path / "one", tmp_path / "two")
    save(files[0], compress_state(tensors, 4))
    save(files[1], compress_state(dict(reversed(tensors.items())), 4, workers=2))
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted(files)  # nothing half-written is left


def test_names_that_are_kept_are_exact_and_others_pay_for_them() -> None:
    tensors = state()
    blobs = compress_state(tensors, 20, keep=re.compile("^embed"))
    assert blobs["embed.weight"].stream == "exact" and blobs["layer.weight"].stream == "h264"
    with pytest.raises(CodecError, match="spent on what is kept exactly"):
        compress_state(tensors, 4, keep=re.compile("^embed"))
    tensors["layer.weight"][0, 0] = torch.nan
    with pytest.raises(CodecError, match=r"layer\.weight: 1 values are not finite"):
        compress_state(tensors, 4)


def test_one_tensor_is_read_where_another_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.codec"
    save(path, compress_state(state(), 4))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of "steps"
    path.write_bytes(data)
    container = Container(path)
    container.read("embed.weight")
    for attempt in (container.verify, lambda: container.read("steps")):
        with pytest.raises(CodecError, match=r"model\.codec: steps: .*damaged"):
            attempt()
    with pytest.raises(CodecError, match=r"no tensor 'norm\.weigt'; did you mean 'norm\.weight'"):
        container.read("norm.weigt")


def test_a_file_that_was_cut_or_changed_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "model.codec"
    save(path, compress_state(state(), 4))
    data = path.read_bytes()
    cuts = [data[:length] for length in (0, 5, 12, 60, len(data) // 2, len(data) - 1)]
    flips = [data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :] for i in (0, 3, 7, 8, 13, 50)]
    for damaged in [*cuts, *flips, data + b"\0", b"\xff" * 400]:
        path.write_bytes(damaged)
        with little_memory(), pytest.raises(CodecError, match=r"model\.codec: .*get the file again"):
            Container(path).verify()


@pytest.mark.parametrize(
    "changes",
    (
        {"version": 2},
        {"format": "pickle"},
        {"tensors": {"a": [0, 1 << 60]}},
        {"tensors": {"a": [-5, 10]}},
        {"tensors": {"a": [0, 4], "b": [2, 50]}},
        {"tensors": {"a": ["0", "50"]}},
        {"tensors": {"a": [0.0, 50.0]}},
        {"tensors": {"a": [0]}},
        {"tensors": ["a"]},
        {"tensors": {}},
        {"metadata": {"of": 3}},
        {"metadata": None},
    ),
    ids=str,
)
def test_a_header_that_lies_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path, blob = tmp_path / "model.codec", store(torch.ones(3)).to_bytes()
    content = {"format": "dlcm.codec", "version": 1, "metadata": {}, "tensors": {"a": [0, len(blob)]}}

    def write(content: dict[str, Any]) -> None:
        header = json.dumps(content).encode()
        path.write_bytes(struct.pack("<QI", len(header), zlib.crc32(header)) + header + blob)

    write(content)
    assert torch.equal(Container(path).read("a"), torch.ones(3))
    write(content | changes)
    with little_memory(), pytest.raises(CodecError, match="get the file again"):
        Container(path)
