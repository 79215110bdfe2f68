"""Checkpoints are written beside the training: what they hold, who waits for whom, and what becomes of refusals."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import train.saving
from tests.train.test_checkpoint import Trained
from train.checkpoint import KINDS, CheckpointError, SavedTensors, TrainingState, latest_checkpoint, verify_checkpoint
from train.distributed import Ranks
from train.saving import CheckpointSaver, shared_out
from train.tokenizer import byte_tokenizer

PATIENCE = 60  # seconds


class Gate:
    """Holds up whoever writes tensors, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.reached, self.opened = threading.Event(), threading.Event()
        monkeypatch.setattr(train.saving, "save_file", self)

    def __call__(self, *arguments: Any) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE)
        save_file(*arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture
def trained() -> Trained:
    return Trained()


def saver_of(trained: Trained, run_dir: Path, **retention: Any) -> CheckpointSaver:
    run = trained.run(run_dir, **retention)
    return CheckpointSaver(run, trained.model, trained.optimizer, byte_tokenizer(), Ranks())


def state(step: int) -> TrainingState:
    return TrainingState("fingerprint", "hash", 1, step=step)


def saved_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: x for kind in KINDS for name, x in SavedTensors(checkpoint, kind).all().items()}


def test_what_is_written_is_of_its_step_though_training_went_on(trained: Trained, tmp_path: Path, gate: Gate):
    expected = {name: x.detach().clone() for name, x in trained.tensors().items()}
    progress = state(3)
    with saver_of(trained, tmp_path) as saver:
        checkpoint = saver.save(progress)
        assert gate.reached.wait(PATIENCE) and not checkpoint.exists()
        trained.update()
        progress.tokens += 1000
        assert not any(torch.equal(x, expected[name]) for name, x in trained.tensors().items())
        gate.opened.set()
    found = saved_tensors(checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in found.items())
    assert train.checkpoint.load_state(checkpoint).tokens == 0


def test_the_next_save_waits_and_holds_its_own_values(trained: Trained, tmp_path: Path, gate: Gate):
    with saver_of(trained, tmp_path) as saver:
        first = saver.save(state(3))
        before = {name: x.detach().clone() for name, x in trained.tensors().items()}
        trained.update()
        threading.Timer(0.3, gate.opened.set).start()
        second = saver.save(state(6))
        verify_checkpoint(first)
    assert all(torch.equal(x, before[name]) for name, x in saved_tensors(first).items())
    assert all(torch.equal(x, trained.tensors()[name]) for name, x in saved_tensors(second).items())


def refuse(*arguments: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("asks", ["wait", "save"])
def test_a_refusing_disk_is_told_to_whoever_asks_next(
    asks: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saver = saver_of(trained, tmp_path)
    saver.save(state(3))
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        saver.save(state(6))
        assert saver._thread is not None
        saver._thread.join()
    assert saver.failed
    with pytest.raises(CheckpointError, match=r"step_00000006: could not be written .*No space left on device"):
        saver.wait() if asks == "wait" else saver.save(state(9))
    assert not saver.failed
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000003"]
    saver.save(state(9))
    saver.wait()
    assert latest_checkpoint(tmp_path).name == "step_00000009"


def test_an_error_of_training_waits_for_what_is_written(trained: Trained, tmp_path: Path, gate: Gate):
    threading.Timer(0.3, gate.opened.set).start()
    with pytest.raises(ZeroDivisionError), saver_of(trained, tmp_path) as saver:
        saver.save(state(3))
        raise ZeroDivisionError
    assert latest_checkpoint(tmp_path).name == "step_00000003"


def test_an_error_of_training_comes_before_that_of_the_disk(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ZeroDivisionError), saver_of(trained, tmp_path) as saver:
        saver.save(state(3))
        raise ZeroDivisionError
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and "step_00000003: could not be written" in warning


def test_an_interrupt_waits_for_nothing(trained: Trained, tmp_path: Path, gate: Gate):
    with pytest.raises(KeyboardInterrupt), saver_of(trained, tmp_path) as saver:
        checkpoint = saver.save(state(3))
        raise KeyboardInterrupt
    assert not gate.opened.is_set() and not checkpoint.exists()


def test_milestones_are_kept(trained: Trained, tmp_path: Path):
    (tmp_path / "checkpoints" / "step_00000040").mkdir(parents=True)  # refused when the run was resumed
    with saver_of(trained, tmp_path, keep=2, milestone_every=6) as saver:
        for step in range(3, 22, 3):
            saver.save(state(step))
    steps = (6, 12, 18, 21)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"step_{step:08d}" for step in steps]


def test_ranks_share_bytes_evenly():
    sizes = [700, 300, 300, 200, 200, 100, 100, 50, 50]
    tensors = {f"t{number}": torch.empty(size) for number, size in enumerate(sizes)}
    owner = shared_out(tensors, 3)
    loads = [sum(x.numel() for name, x in tensors.items() if owner[name] == rank) for rank in range(3)]
    assert owner.keys() == tensors.keys() and max(loads) <= 700 and sum(loads) == sum(sizes)
    assert set(shared_out(dict(list(tensors.items())[:2]), 4).values()) == {0, 1}
