"""Checkpoints come back bit for bit, alone, and are never lost to a crash, a full disk or a flipped bit."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlcm import DLCMForCausalLM
from tests.conftest import tiny_config
from train.checkpoint import (
    REQUIRED_FILES,
    CheckpointError,
    TrainingState,
    half_written,
    has_checkpoints,
    latest_checkpoint,
    load_state,
    optimizer_tensors,
    restore_checkpoint,
    verify_checkpoint,
)
from train.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    load_run_config,
)
from train.distributed import Ranks
from train.saving import CheckpointSaver
from train.tokenizer import byte_tokenizer

TRAINED = {"vocab_size": 258}


class Trained:
    """A model and an optimizer after some updates with random gradients."""

    def __init__(self, updates: int = 2, seed: int = 0, **overrides: object):
        torch.manual_seed(seed)
        self.model = DLCMForCausalLM(tiny_config(**TRAINED | overrides))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        for _ in range(updates):
            self.update()

    def update(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def run(self, run_dir: Path, **retention: int) -> RunConfig:
        return RunConfig(
            output=str(run_dir),
            model={"architecture": "dlcm", "vocab_size": 258},
            data=DataConfig(path="data", sequence_length=8),
            batch=BatchConfig(rows=1),
            optimizer=OptimizerConfig(lr_token=1e-3, lr_concept=1e-3, lr_boundary=1e-4, lr_other=1e-3),
            schedule=ScheduleConfig(steps=10),
            checkpoint=CheckpointConfig(every=3, **retention),
        )

    def save(self, run_dir: Path, step: int, keep: int = 2) -> Path:
        run = self.run(run_dir, keep=keep)
        state = TrainingState("fingerprint", "hash", 1, step=step, tokens=8 * step, flops=1.5)
        with CheckpointSaver(run, self.model, self.optimizer, byte_tokenizer(), Ranks()) as saver:
            return saver.save(state)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.model.named_parameters()) | optimizer_tensors(self.model, self.optimizer)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@pytest.fixture(scope="module")
def saved(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with checkpoints of steps 3 and 6; tests copy it."""
    run_dir = tmp_path_factory.mktemp("saved")
    trained.save(run_dir, 3)
    trained.save(run_dir, 6)
    return run_dir


@pytest.fixture
def run_dir(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_restores_parameters_optimizer_and_state_exactly(trained: Trained, run_dir: Path):
    other = Trained(updates=0, seed=1)
    state = restore_checkpoint(latest_checkpoint(run_dir), other.model, other.optimizer)
    assert state == TrainingState("fingerprint", "hash", 1, step=6, tokens=48, flops=1.5)
    expected, actual = trained.tensors(), other.tensors()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    for parameter in other.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.optimizer.step()
    assert float(other.optimizer.state[parameter]["step"]) == 3


def test_a_checkpoint_suffices_for_the_auto_classes(trained: Trained, run_dir: Path):
    checkpoint = latest_checkpoint(run_dir)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.model.parameters(), strict=True))
    text = "naïve 北京"
    assert AutoTokenizer.from_pretrained(checkpoint).encode(text) == list(text.encode())
    assert load_run_config(checkpoint / "run.yaml").data.sequence_length == 8


def test_state_json_says_what_produced_it(run_dir: Path):
    content = json.loads((latest_checkpoint(run_dir) / "state.json").read_text())
    assert content["versions"].keys() == {"python", "torch", "transformers"} and "commit" in content


def test_only_the_newest_are_kept(trained: Trained, run_dir: Path):
    (run_dir / "checkpoints" / "step_00000005.tmp").mkdir()  # a crash left it behind
    (run_dir / "checkpoints" / "step_00000099").mkdir()  # refused when the run was resumed
    trained.save(run_dir, 9)
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["step_00000006", "step_00000009"]
    trained.save(run_dir, 12, keep=1)
    assert os.listdir(run_dir / "checkpoints") == ["step_00000012"]


def test_nothing_but_safetensors_json_and_text(run_dir: Path):
    suffixes = {file.suffix for file in latest_checkpoint(run_dir).iterdir()}
    assert suffixes == {".safetensors", ".json", ".yaml"}


def test_every_file_is_under_a_checksum(run_dir: Path):
    checkpoint = latest_checkpoint(run_dir)
    listed = json.loads((checkpoint / "checksums.json").read_text()).keys()
    assert listed == {file.name for file in checkpoint.iterdir()} - {"checksums.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "run.yaml"])
def test_a_flipped_bit_falls_back_to_the_previous_checkpoint(
    run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    newest = latest_checkpoint(run_dir)
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 1
    (newest / name).write_bytes(content)
    assert latest_checkpoint(run_dir).name == "step_00000003"
    warning = capsys.readouterr().err
    assert f"{newest}: {name} is corrupt" in warning and "using step_00000003 instead" in warning
    assert warning.count("\n") == 1


def test_a_missing_file_and_half_written_directories_are_passed_over(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    (latest_checkpoint(run_dir) / "optimizer.safetensors").unlink()
    (run_dir / "checkpoints" / "step_00000009").mkdir()
    assert latest_checkpoint(run_dir).name == "step_00000003"
    warning = capsys.readouterr().err
    assert "optimizer.safetensors is missing" in warning and "step_00000009: is half-written" in warning


@pytest.mark.parametrize("name", ["step_00000009.tmp", "step_9"])
def test_only_final_names_count(run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]):
    newest = latest_checkpoint(run_dir)
    shutil.copytree(newest, newest.with_name(name))  # complete, but for its name
    assert latest_checkpoint(run_dir) == newest
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "model.safetensors", "optimizer.safetensors"])
def test_checksums_must_name_every_file_that_matters(run_dir: Path, name: str):
    newest = latest_checkpoint(run_dir)
    checksums = json.loads((newest / "checksums.json").read_text())
    del checksums[name]
    (newest / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(CheckpointError, match=rf"checksums\.json lacks {name}"):
        verify_checkpoint(newest)
    (newest / "checksums.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checksums\.json lacks config\.json"):
        verify_checkpoint(newest)


def test_checksums_of_files_elsewhere_are_refused(run_dir: Path):
    newest = latest_checkpoint(run_dir)
    checksums = json.loads((newest / "checksums.json").read_text())
    checksums["../step_00000003/state.json"] = "0"
    (newest / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(CheckpointError, match=r"names '\.\./step_00000003/state\.json', which is no plain file name"):
        verify_checkpoint(newest)


def test_an_interrupted_save_leaves_nothing_behind(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(descriptor: int) -> None:
        assert half_written(tmp_path)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained.save(tmp_path, 3)
    assert os.listdir(tmp_path / "checkpoints") == [] and not has_checkpoints(tmp_path)


def test_damaged_checksums(run_dir: Path):
    newest = latest_checkpoint(run_dir)
    (newest / "checksums.json").write_text('{"model.saf')
    with pytest.raises(CheckpointError, match=r"checksums\.json cannot be read"):
        verify_checkpoint(newest)


def test_no_good_checkpoint_is_an_error(run_dir: Path, tmp_path: Path):
    for checkpoint in (run_dir / "checkpoints").iterdir():
        (checkpoint / "checksums.json").unlink()
    assert has_checkpoints(run_dir)
    with pytest.raises(CheckpointError, match=r"step_00000006: is half-written.*step_00000003: is half-written"):
        latest_checkpoint(run_dir)
    assert not has_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here; start the run with its config"):
        latest_checkpoint(tmp_path)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """The operating system refuses to let a file grow beyond 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_refusing_disk_leaves_the_previous_checkpoint(trained: Trained, run_dir: Path, small_files_only: None):
    with pytest.raises(CheckpointError, match=r"step_00000009: could not be written .*File too large.*--resume"):
        trained.save(run_dir, 9)
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["step_00000003", "step_00000006"]
    assert latest_checkpoint(run_dir).name == "step_00000006"


def test_a_full_disk_while_syncing(trained: Trained, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are intact"):
        trained.save(run_dir, 9)
    assert latest_checkpoint(run_dir).name == "step_00000006"
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_a_repeated_step_replaces_its_checkpoint(run_dir: Path):
    other = Trained(seed=5)
    assert load_state(other.save(run_dir, 6)).step == 6
    restored = Trained(updates=0)
    restore_checkpoint(latest_checkpoint(run_dir), restored.model, restored.optimizer)
    assert torch.equal(restored.model.lm_head.weight, other.model.lm_head.weight)


def test_another_models_checkpoint_is_refused(run_dir: Path):
    other = Trained(updates=0, target_ratio=3.0)
    with pytest.raises(CheckpointError, match=r"another model config \(target_ratio 2\.5 != 3\.0\)"):
        restore_checkpoint(latest_checkpoint(run_dir), other.model, other.optimizer)


def test_state_of_an_unknown_parameter_is_refused(run_dir: Path):
    other = Trained(updates=0)
    optimizer = torch.optim.AdamW([other.model.lm_head.weight])
    with pytest.raises(
        CheckpointError, match=r"optimizer.safetensors: \S+ has shape .*, the model's None \(None: absent\)"
    ):
        restore_checkpoint(latest_checkpoint(run_dir), other.model, optimizer)


def test_state_of_another_version_is_refused(run_dir: Path):
    newest = latest_checkpoint(run_dir)
    (newest / "state.json").write_text('{"step": 6}')
    with pytest.raises(CheckpointError, match="'data_fingerprint'; it is of another version"):
        load_state(newest)
