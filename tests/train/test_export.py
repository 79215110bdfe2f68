"""What was trained goes out as a plain directory, and comes in again as the beginning of another run."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train.pretrain as pretrain_module
from tests.train.tiny import prepare_tiny, split_tensors, write_config
from train.checkpoint import latest_checkpoint, load_model
from train.export import main as export
from train.pretrain import main
from train.step import forward_backward
from train.tokenizer import train_bpe

STEPS = 2


class Trained:
    """Prepared data, and a run of each architecture."""

    def __init__(self, directory: Path):
        self.directory, self.data = directory, prepare_tiny(directory)
        for architecture in ("dlcm", "llama"):
            assert main([str(self.config(architecture, self[architecture]))]) == 0

    def __getitem__(self, architecture: str) -> Path:
        return self.directory / architecture

    def config(self, architecture: str, run_dir: Path, **sections: Any) -> Path:
        short: dict[str, Any] = {"schedule": {"steps": STEPS, "warmup_steps": 0}, "evaluation": {"max_tokens": 64}}
        return write_config(run_dir.with_suffix(".yaml"), architecture, self.data, run_dir, **short | sections)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(60)[None]).logits


def assert_one_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in error


@pytest.mark.parametrize("files", ["one", "two"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["dlcm", "llama"])
def test_an_export_is_the_model_alone(architecture: str, dtype: str, files: str, trained: Trained, tmp_path: Path):
    checkpoint = Path(shutil.copytree(latest_checkpoint(trained[architecture]), tmp_path / "step_00000002"))
    if files == "two":
        split_tensors(checkpoint)
    assert export([str(checkpoint), str(tmp_path / "out"), "--dtype", dtype]) == 0
    expected = load_model(checkpoint).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == expected.dtype and torch.equal(logits(model), logits(expected))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("é") == [0xC3, 0xA9]
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(os.listdir(tmp_path / "out")) == names
    assert os.listdir(tmp_path).count("out.tmp") == 0


def test_what_cannot_be_exported(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_dir = trained["llama"]
    assert export([str(run_dir), str(run_dir)]) == 2
    assert_one_error(capsys, f"{run_dir}: exists; give another name")
    assert export([str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert_one_error(capsys, "nothing: no such directory; give a run directory or a checkpoint")

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", refuse)
    assert export([str(run_dir), str(tmp_path / "out")]) == 2
    assert_one_error(capsys, "could not be written ([Errno 28] No space left on device)")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def beginnings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The parameters with which the steps of runs begin."""
    found: list[dict[str, torch.Tensor]] = []

    def seen(run: Any, model: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        found.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return forward_backward(run, model, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(pretrain_module, "forward_backward", seen)
    return found


@pytest.mark.parametrize("source", ["checkpoint", "fp32", "bf16"])
@pytest.mark.parametrize("architecture", ["dlcm", "llama"])
def test_a_run_begins_with_weights(
    architecture: str,
    source: str,
    trained: Trained,
    tmp_path: Path,
    beginnings: list[dict[str, torch.Tensor]],
    capsys: pytest.CaptureFixture[str],
):
    given = latest_checkpoint(trained[architecture])
    if source != "checkpoint":
        assert export([str(given), str(tmp_path / "weights"), "--dtype", source]) == 0
        given = tmp_path / "weights"
    config = trained.config(architecture, tmp_path / "run", init_from=str(given))
    assert main([str(config)]) == 0
    assert f"from the weights of {given}" in capsys.readouterr().out
    expected = load_file(given / "model.safetensors")
    assert all(torch.equal(value, expected[name].float()) for name, value in beginnings[0].items())
    checkpoint = latest_checkpoint(tmp_path / "run")
    state = load_file(checkpoint / "optimizer.safetensors")
    assert {float(value) for name, value in state.items() if name.startswith("step.")} == {STEPS}
    assert any(not torch.equal(value, beginnings[0][name]) for name, value in beginnings[1].items())

    shutil.rmtree(tmp_path / "weights", ignore_errors=True)  # once begun, a run needs them no more
    assert main(["--resume", str(tmp_path / "run"), f"schedule.steps={STEPS + 1}"]) == 0


def test_a_model_may_change_what_leaves_its_tensors_alone(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = latest_checkpoint(trained["dlcm"])
    config = trained.config("dlcm", tmp_path / "run", init_from=str(given), model={"target_ratio": 5})
    assert main([str(config)]) == 0
    changes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert changes == ["changed  model.target_ratio from 3.0 to 5.0"]


@pytest.mark.parametrize(
    ("architecture", "model", "message"),
    [
        ("llama", {"num_layers": 3}, "does not fit a model that changes model.num_layers from 2 to 3"),
        ("llama", {"token_ffn": 48, "d_token": 32}, "does not fit a model that changes model.token_ffn from 64 to 48"),
        ("dlcm", {}, "does not fit a model that changes model.model_type from"),
    ],
)
def test_weights_of_another_model_are_refused(
    architecture: str,
    model: dict[str, Any],
    message: str,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(pretrain_module, "build_model", None)  # said before anything is built
    given = latest_checkpoint(trained["llama"])
    assert main([str(trained.config(architecture, tmp_path / "run", init_from=str(given), model=model))]) == 2
    assert_one_error(capsys, message)
    assert not (tmp_path / "run").exists()


def test_weights_that_cannot_be_used(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def said(given: Path, message: str) -> None:
        assert main([str(trained.config("llama", tmp_path / "run", init_from=str(given)))]) == 2
        assert_one_error(capsys, message)

    said(trained["llama"], "has no config.json; give a checkpoint (RUN_DIR/checkpoints/step_...)")
    said(tmp_path / "nowhere", "has no config.json")
    assert export([str(trained["llama"]), str(tmp_path / "weights")]) == 0
    weights = tmp_path / "weights" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    said(tmp_path / "weights", "model.safetensors: no safetensors")
    weights.unlink()
    said(tmp_path / "weights", "model.safetensors: missing")
    tensors = {
        name: value.to(torch.int32)
        for name, value in load_model(latest_checkpoint(trained["llama"])).state_dict().items()
    }
    save_file(tensors, weights, {"format": "pt"})
    said(tmp_path / "weights", "is I32, not F32 or BF16 or F16")
    weights.write_bytes(content)
    train_bpe(["other text"] * 9, 260).save_pretrained(tmp_path / "weights")
    said(tmp_path / "weights", f"has another tokenizer than {trained.data}; prepare the text with --tokenizer")

    checkpoint = Path(shutil.copytree(latest_checkpoint(trained["llama"]), tmp_path / "step_00000002"))
    (checkpoint / "model.safetensors").write_bytes(content[:-1] + b"\x7f")
    said(checkpoint, "model.safetensors is corrupt")


def test_a_resumed_run_has_begun(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_dir = Path(shutil.copytree(trained["llama"], tmp_path / "run"))
    assert main(["--resume", str(run_dir), "init_from=elsewhere"]) == 2
    assert_one_error(capsys, "init_from cannot change from None to elsewhere in a resumed run")
