"""Concepts taken away from a trained model: the same as a model that never had what is taken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dlcm import DLCMForCausalLM
from eval.analysis import measure, validation_text
from eval.knockout import KNOCKOUTS, hooked, knockout_rows, main, scale_row
from eval.loading import LoadedCheckpoint, load_checkpoint
from tests.eval.conftest import prepare_labelled, train_tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("knockout")
    data = prepare_labelled(directory)
    return train_tiny(directory, "dlcm", data, model={"injection": "every"})


@pytest.fixture
def loaded(run_dir: Path) -> LoadedCheckpoint:
    loaded = load_checkpoint(run_dir)
    with torch.no_grad():  # after so few steps hardly anything is read: make it more
        model = loaded.model
        assert isinstance(model, DLCMForCausalLM) and model.injection is not None
        model.injection.gate.fill_(0.5)
        model.cross_attention.o_proj.weight.mul_(30)
    return loaded


def test_what_is_taken_away_is_what_a_model_without_it_lacks(loaded: LoadedCheckpoint):
    model, text = loaded.model, validation_text(loaded.run, loaded.state, 2500)
    assert isinstance(model, DLCMForCausalLM) and model.injection is not None
    found = {row["knockout"]: row for row in knockout_rows("a", loaded, text)}
    assert list(found) == list(KNOCKOUTS) and found["whole"]["difference"] == 0
    for what in ("unreasoned", "strangers", "mean", "none"):
        assert found[what]["difference"] != 0
        assert found[what]["low"] <= found[what]["difference"] <= found[what]["high"]
    scales = scale_row("a", loaded, text)
    assert min(scales[k] for k in ("encoder", "cross_attention", "injection")) > 0

    def loss() -> float:
        return float(np.nanmean(measure(loaded, text)[0]))

    assert loss() == pytest.approx(found["whole"]["loss"])  # hooks are gone
    with hooked(KNOCKOUTS["none"](model)):
        assert loss() == pytest.approx(found["none"]["loss"])
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for layer in model.backbone.layers:
            layer.attention.o_proj.weight.zero_()
            layer.ffn.down_proj.weight.zero_()
        assert loss() == pytest.approx(found["unreasoned"]["loss"], abs=1e-6)
        model.load_state_dict(kept)
        model.cross_attention.o_proj.weight.zero_()
        model.injection.gate.zero_()
        assert loss() == pytest.approx(found["none"]["loss"], abs=1e-6)
    silent = scale_row("a", loaded, text)
    assert silent["cross_attention"] == silent["injection"] == 0 and silent["encoder"] == scales["encoder"]


def test_the_command_writes_a_page(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(run_dir), "--max-tokens", "300", "--output", str(tmp_path)]) == 0
    assert "strangers" in capsys.readouterr().out
    written = json.loads((tmp_path / "knockout.json").read_text())
    assert [row["knockout"] for row in written["losses"]] == list(KNOCKOUTS)
    assert "| root mean square |" in (tmp_path / "knockout.md").read_text()
