"""Unequal numbers of concepts: counted as the model decides, dealt out as the loader does, charged as FLOPs say."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import eval.imbalance
from dlcm.flops import forward_flops
from eval.imbalance import boundaries, concepts_of_windows, dealt_out, main, measure, must_show
from eval.loading import load_checkpoint
from tests.eval.conftest import Trained
from tests.train.tiny import write_config
from train.config import SourceConfig, build_model_config, load_run_config
from train.data import TokenShards


@pytest.fixture
def family(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a family of which everything is tiny."""
    path = tmp_path / "configs" / "tiny" / "dlcm.yaml"
    batch = {"rows": 2, "accumulation": 3}
    write_config(path, "dlcm", trained.data, tmp_path / "run", batch=batch)
    monkeypatch.setattr(eval.imbalance, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(eval.imbalance, "FAMILIES", ("tiny",))
    return path


def test_windows_are_counted_as_they_open():
    boundary_T = np.array([1, 0, 1, 0, 0, 0, 1, 1, 1, 0], dtype=bool)
    assert concepts_of_windows(boundary_T, 4).tolist() == [2, 3]  # the second opens a concept anyway


def test_every_epoch_deals_out_every_window():
    windows_W = np.arange(1, 11)
    concepts = dealt_out(windows_W, (3, 1, 5, 2), seed=0)  # an epoch a step
    assert concepts.shape == (3, 1, 5) and concepts.sum(axis=(1, 2)).tolist() == [55] * 3
    assert not np.array_equal(concepts[0], concepts[1])


def test_boundaries_are_the_models(trained: Trained):
    loaded, shards = load_checkpoint(trained.dlcm), TokenShards(trained.data, "train")
    length = 64
    boundary_T = boundaries(loaded.model, shards, length, rows=3)
    assert len(boundary_T) == shards.num_tokens
    ids, opens = shards.window(length, length)
    alone = torch.tensor(ids)[None]
    starts = torch.tensor([0, *(place for place in opens if place), length], dtype=torch.int32)
    expected = loaded.model(alone, labels=alone, cu_seqlens=starts).boundaries[0].numpy().copy()
    expected[0] = 0 in opens
    assert np.array_equal(boundary_T[length : 2 * length], expected)


def test_what_is_uneven_is_charged_to_the_backbone(family: Path):
    """Windows of 32 tokens, half of them with 3 concepts and half with 9: 4 ranks with 2 each."""
    half = np.zeros(32, dtype=bool)
    few, many = half.copy(), half.copy()
    few[[0, 8, 16]], many[:9] = True, True
    rows = measure("tiny", np.concatenate([few, many] * 40), ranks=4, steps=300)
    lock_step, once = rows
    stages = forward_flops(build_model_config(load_run_config(family)), 32, 32 / 6).stages
    for row in rows:
        assert row["tokens_per_concept"] == pytest.approx(32 / 6)
        assert row["backbone_share"] == pytest.approx(stages["backbone"] / sum(stages.values()))
        assert row["cost"] == pytest.approx(row["backbone_share"] * (row["imbalance"] - 1))
        assert row["imbalance"] <= row["imbalance_95"] <= 18 / 6
    assert 1 < once["imbalance"] < lock_step["imbalance"]  # a step's micro-batches even each other out
    even = measure("tiny", np.tile(few, 80), ranks=4, steps=50)
    assert [row["cost"] for row in even] == [0, 0]
    assert [bar.holds for bar in must_show(even).values()] == [True]
    assert [bar.holds for bar in must_show([row | {"cost": 0.04} for row in even]).values()] == [False]


def test_the_command_writes_what_it_found(
    family: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(trained.dlcm), "--ranks", "2", "--steps", "20", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "concept_imbalance.json").read_text())
    assert [row["waits"] for row in written["rows"]] == ["lock step", "once"] and written["commit"]
    assert "| tiny, 2 x 32 | once in 3 |" in (tmp_path / "concept_imbalance.md").read_text()
    assert main([str(trained.dlcm), "--ranks", "999999"]) == 2
    assert main([str(trained.llama)]) == 2
    mixed = load_checkpoint(trained.dlcm)
    mixed.run.data.path, mixed.run.data.mixture = None, {"one": SourceConfig(str(trained.data), 1.0)}
    with mock.patch.object(eval.imbalance, "load_checkpoint", return_value=mixed):
        assert main([str(trained.dlcm)]) == 2
    errors = capsys.readouterr().err
    assert "was trained on a mixture; give a run of one data.path" in errors
    assert "give fewer --ranks" in errors and "has no concepts; give a run of a DLCM" in errors
