"""The command line over packed models, on runs that were really trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlcm.selfcompress.packing import PACKED, load_packed
from eval.selfcompress import compacted, main, speed, verification
from tests.train.tiny import prepare_tiny, write_config
from train.checkpoint import latest_checkpoint, load_model, load_model_config
from train.pretrain import main as pretrain

COMPRESSIONS = {
    "dlcm": {"method": "learned", "target_bits": 0.7, "start": 0.0, "ramp": 0.4, "remove_every": 20},
    "llama": {"method": "learned", "target_bits": 0.7, "start": 0.0, "ramp": 0.4, "group_rows": 8, "group_columns": 8},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    data = prepare_tiny(directory / "data")
    for architecture, compression in COMPRESSIONS.items():
        sections: dict[str, Any] = {"compression": compression, "schedule": {"steps": 100}, "log_every": 100}
        sections["evaluation"] = {"every": 100}
        config = write_config(directory / "run.yaml", architecture, data, directory / architecture, **sections)
        assert pretrain([str(config)]) == 0
        assert main(["export", str(directory / architecture), str(directory / f"{architecture}.packed")]) == 0
    config = write_config(directory / "plain.yaml", "llama", data, directory / "plain", schedule={"steps": 2})
    assert pretrain([str(config)]) == 0
    return directory


def test_training_removed_channels_of_one_of_them(runs: Path):
    model = load_model(latest_checkpoint(runs / "dlcm"))
    assert model.config.channels_left
    for name in ("dlcm", "dlcm.packed"):
        directory = latest_checkpoint(runs / name) if name == "dlcm" else runs / name
        assert load_model_config(directory).channels_left == model.config.channels_left


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("architecture", COMPRESSIONS)
def test_a_trained_model_is_packed_and_verified(architecture: str, runs: Path, capsys: pytest.CaptureFixture[str]):
    packed, checkpoint = runs / f"{architecture}.packed", runs / architecture
    found = verification(packed, checkpoint)
    assert found.mismatches == 0 and found.tokens >= 4096
    assert found.logit_error < 1e-4 and found.argmax_share == 1 and found.kept < found.weights
    assert main(["verify", str(packed), str(checkpoint)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(packed)]) == 0
    out = capsys.readouterr().out
    size = (packed / PACKED).stat().st_size
    assert f"{size:,} bytes" in out
    stages = ["decoder"] if architecture == "llama" else ["encoder", "backbone", "cross_attention", "decoder"]
    assert re.findall(r"all of (\w+)", out) == stages


def test_what_export_says_is_the_size_of_the_file(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["export", str(runs / "dlcm"), str(tmp_path / "packed"), "--rest", "bf16"]) == 0
    (size,) = re.findall(r"([\d,]+) bytes", capsys.readouterr().out)
    assert int(size.replace(",", "")) == (tmp_path / "packed" / PACKED).stat().st_size
    assert (tmp_path / "packed" / "tokenizer.json").is_file()


@pytest.mark.parametrize("architecture", COMPRESSIONS)
def test_transformers_takes_what_is_unpacked(architecture: str, runs: Path, tmp_path: Path):
    packed = runs / f"{architecture}.packed"
    assert main(["unpack", str(packed), str(tmp_path / "plain")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = load_packed(packed, load_model_config(packed))(ids).logits
        assert torch.equal(model(ids).logits, expected)
        trained = load_model(latest_checkpoint(runs / architecture)).eval()(ids).logits
    torch.testing.assert_close(expected, trained, rtol=0, atol=0.05)  # embeddings and head are in half precision


def test_transformers_takes_the_checkpoint_itself(runs: Path):
    checkpoint = latest_checkpoint(runs / "dlcm")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours, theirs = load_model(checkpoint).eval(), AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_speed_is_of_the_same_function(runs: Path, capsys: pytest.CaptureFixture[str]):
    model = load_packed(runs / "llama.packed", load_model_config(runs / "llama.packed"))
    threads = torch.get_num_threads()
    row = speed(model, 2, 32, 1)
    assert torch.get_num_threads() == threads
    assert 0 < row["weights_left"] < 1 and row["speedup"] == row["dense_s"] / row["compact_s"]
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(compacted(model)(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    assert main(["speed", str(runs / "llama.packed"), "--rows", "1", "--length", "16"]) == 0
    assert "speedup" in capsys.readouterr().out


def test_a_weight_that_differs_is_found(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    packed = tmp_path / "packed"
    assert main(["export", str(runs / "llama"), str(packed)]) == 0
    tensors = load_file(packed / PACKED)
    tensors["scales"][0] *= 1.5
    save_file(tensors, packed / PACKED)
    assert verification(packed, runs / "llama").mismatches > 0
    assert "is not what was trained" in error_of(capsys, ["verify", str(packed), str(runs / "llama")])


def test_what_cannot_be_done_is_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    packed = str(runs / "llama.packed")
    assert "plain" in error_of(capsys, ["export", str(runs / "plain"), str(tmp_path / "packed")])
    assert "exists" in error_of(capsys, ["export", str(runs / "llama"), packed])
    assert "different models" in error_of(capsys, ["verify", packed, str(runs / "dlcm")])
    assert "model.packed" in error_of(capsys, ["inspect", str(runs / "plain" / "checkpoints" / "step_00000002")])
    assert not (tmp_path / "packed").exists() and not (tmp_path / "packed.tmp").exists()
