"""Checkpoints come back as they were trained, from a run or a checkpoint directory; damaged ones are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dlcm import DLCMForCausalLM
from eval.loading import decode, encode_document, load_checkpoint, visible
from tests.conftest import tiny_config
from tests.eval.conftest import Trained
from train.checkpoint import CheckpointError, TrainingState, latest_checkpoint
from train.distributed import Ranks
from train.saving import CheckpointSaver
from train.tokenizer import byte_tokenizer, tokenizer_hash


@pytest.fixture
def run_dir(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the trained DLCM's run that a test may damage."""
    return Path(shutil.copytree(trained.dlcm, tmp_path / "run"))


def damage(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")


def test_run_and_checkpoint_directory_load_alike(trained: Trained) -> None:
    checkpoint = latest_checkpoint(trained.dlcm)
    saved = load_file(checkpoint / "model.safetensors")
    for path in (trained.dlcm, checkpoint):
        loaded = load_checkpoint(path)
        assert loaded.path == checkpoint
        assert not loaded.model.training
        assert all(
            torch.equal(saved[name].to(value.device), value) for name, value in loaded.model.state_dict().items()
        )
        assert tokenizer_hash(loaded.tokenizer) == loaded.state.tokenizer_hash
        assert loaded.state.step == loaded.run.schedule.steps == 8
        assert loaded.run.data.path == str(trained.data)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = latest_checkpoint(run_dir)
    shutil.copytree(newest, newest.with_name("step_00000009"))
    damage(newest.with_name("step_00000009"))
    assert load_checkpoint(run_dir).path == newest
    assert "step_00000009: model.safetensors is corrupt" in capsys.readouterr().err


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(run_dir: Path) -> None:
    checkpoint = latest_checkpoint(run_dir)
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt"):
        load_checkpoint(checkpoint)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path)


def test_a_backend_for_half_precision_does_not_keep_a_checkpoint_from_being_evaluated(
    trained: Trained, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    model = DLCMForCausalLM(tiny_config(vocab_size=len(tokenizer), attention_backend="torch_varlen"))
    run = load_checkpoint(trained.dlcm).run
    state = TrainingState("data", tokenizer_hash(tokenizer), world_size=1)
    run.output = str(tmp_path)
    with CheckpointSaver(run, model, torch.optim.AdamW(model.parameters()), tokenizer, Ranks()) as saver:
        saver.save(state)
    loaded = load_checkpoint(tmp_path)
    document = encode_document(loaded.tokenizer, "text")
    assert loaded.model(input_ids=document.input_ids_1T.to(loaded.model.device)).logits.isfinite().all()


def test_documents_begin_as_in_training(trained: Trained) -> None:
    document = encode_document(byte_tokenizer(), "é!")
    assert document.input_ids_1T.tolist() == [[256, 0xC3, 0xA9, 0x21]]
    assert document.end_T == [0, 1, 1, 2]


def test_decoding_drops_special_tokens_only() -> None:
    assert decode(byte_tokenizer(), torch.tensor([256, *b"n't , a  b .", 257])) == "n't , a  b ."


def test_control_characters_are_made_visible() -> None:
    assert visible("a\tb\nc\x00\x1b\x7f\x9b中") == "a\tb\nc␀␛␡�中"
