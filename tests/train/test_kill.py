"""No moment to die costs a run more than the steps since its last finished checkpoint, nor changes its outcome."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from safetensors import SafetensorError

import train.saving
from tests.train.killing import main
from tests.train.test_checkpoint import Trained
from train.checkpoint import CheckpointError, latest_checkpoint, verify_checkpoint


def test_killed_at_any_moment_the_run_comes_to_the_same():
    kills = main(["--moments", "3"])
    assert sum(kill.half_written for kill in kills) >= 2 and kills[-1].continued > 0


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


def full(*arguments: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def full_safetensors(*arguments: object, **options: object) -> None:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def full_tokenizers(*arguments: object, **options: object) -> None:
    raise Exception("No space left on device (os error 28)")


PLACES: dict[str, tuple[object, str, Callable[..., None]]] = {
    "directory": (Path, "mkdir", full),
    "config": (transformers.PreTrainedConfig, "save_pretrained", full),
    "tokenizer": (train.saving.PreTrainedTokenizerBase, "save_pretrained", full_tokenizers),
    "configuration": (train.saving, "save_run_config", full),
    "tensors": (train.saving, "save_file", full_safetensors),
    "json": (train.saving, "_write_json", full),
    "checksums": (train.saving, "file_sha256", full),
    "sync": (os, "fsync", full),
    "rename": (Path, "rename", full),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_full_in_any_place(place: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    previous = trained.save(tmp_path, 3)
    owner, name, refuse = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        with pytest.raises(CheckpointError, match=r"step_00000006: could not be written .*No space left.*--resume"):
            trained.save(tmp_path, 6)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000003"]
    verify_checkpoint(previous)
    assert latest_checkpoint(tmp_path) == previous
    assert latest_checkpoint(trained.save(tmp_path, 6).parents[1]).name == "step_00000006"  # once there is room


def test_a_disk_full_after_the_checkpoint(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is refused when old ones are deleted does not cost the new one."""
    trained.save(tmp_path, 3, keep=1)
    monkeypatch.setattr(train.saving.shutil, "rmtree", full)
    with pytest.raises(OSError, match="No space left"):
        trained.save(tmp_path, 6, keep=1)
    assert latest_checkpoint(tmp_path).name == "step_00000006"
