"""Grids: models of the parameters asked for, each run once, and what happens to those that fail or are stopped."""

import functools
import os
import shutil
import signal
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import train.grid as grid_module
from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineForCausalLM
from tests.train.conftest import Done
from tests.train.tiny import prepare_tiny, write_config
from train.config import RunConfig, load_run_config
from train.grid import Point, load_points, main, size_and_share

CONFIGS = Path(__file__).parents[2] / "configs" / "scaling"
MODELS = {"dlcm": DLCMForCausalLM, "llama": LlamaBaselineForCausalLM}
POINTS = ["llama_N60k", "dlcm_N60k_P40_R3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture
def grid(data: Path, tmp_path: Path) -> Path:
    """A grid of two runs of 8 steps."""
    return write_grid(tmp_path, data)


def write_grid(directory: Path, data: Path, run: dict[str, Any] | None = None, **changes: Any) -> Path:
    write_config(directory / "base.yaml", "dlcm", data, directory / "unused", **(run or {}))
    content = {
        "base": "base.yaml",
        "output": str(directory / "grid"),
        "sizes": [60_000],
        "shares": [0.4],
        "ratios": [3],
    }
    path = directory / "grid.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def assert_one_error(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


@functools.cache
def points_of(name: str) -> list[Point]:
    return load_points(CONFIGS / f"{name}.yaml")


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_models_have_the_parameters_asked_for(name: str):
    wanted, points = grid_module.load_grid(CONFIGS / f"{name}.yaml"), points_of(name)
    assert len(points) == len(wanted.sizes) * (1 + len(wanted.shares) * len(wanted.ratios))
    assert len({point.run.output for point in points}) == len(points)
    left = iter(points)
    for size in wanted.sizes:
        row = [next(left) for _ in range(1 + len(wanted.shares) * len(wanted.ratios))]
        assert [point.run.model["architecture"] for point in row] == ["llama"] + ["dlcm"] * (len(row) - 1)
        assert len({point.config.d_token for point in row}) == 1  # so that their embeddings are the same
        asked = [(share, ratio) for share in wanted.shares for ratio in wanted.ratios]
        for point, (share, ratio) in zip(row, [(0.0, None), *asked], strict=True):
            check_model(point, size, share, ratio)


def check_model(point: Point, size: float, share: float, ratio: float | None) -> None:
    config = point.config
    with torch.device("meta"):
        model = MODELS[point.run.model["architecture"]](config)
    body = {n: p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n and "lm_head" not in n}
    backbone = sum(count for name, count in body.items() if name.startswith(("backbone.", "model.backbone.")))
    number = sum(body.values())
    assert size_and_share(config)[0] == number == pytest.approx(size, rel=0.05)
    assert size_and_share(config)[1] == pytest.approx(share, abs=0.03)
    assert config.d_token % config.token_heads == 0
    if isinstance(config, DLCMConfig):
        assert backbone / number == pytest.approx(share, abs=0.03)
        assert config.target_ratio == ratio
        assert config.encoder_layers == 2 * config.decoder_layers
        assert config.d_token <= config.d_concept <= 2 * config.d_token


def test_the_papers_grid_reads_the_papers_tokens():
    assert all(point.tokens == pytest.approx(200e9, rel=1e-4) for point in points_of("paper"))


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_runs_evaluate_often_enough_before_the_decay(name: str):
    run = points_of(name)[0].run
    assert run.schedule.steps // run.evaluation.every >= 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": [0.4, 0.99]}, ["DLCM with a share of 0.99", "the nearest has", "d_concept="]),
        ({"sizes": [900]}, ["of 900 parameters there is no baseline", "the nearest has", "d_token="]),
        ({"sices": [60_000]}, ["unknown key 'sices'", "did you mean 'sizes'"]),
        ({"sizes": "many"}, ["sizes"]),
        ({"sizes": "???"}, ["sizes is missing"]),
        ({"sizes": []}, ["sizes", "must hold numbers"]),
        ({"shares": [1.5]}, ["shares", "between 0 and 1"]),
        ({"ratios": [2, 2]}, ["ratios", "name each value once"]),
        ({"ratios": [1]}, ["dlcm_N60k_P40_R1", "target_ratio=1"]),
        ({"processes": 0}, ["processes", "at least 1"]),
        ({"base": "bass.yaml"}, ["bass.yaml", "cannot be read"]),
    ],
)
def test_what_cannot_be_run_is_refused(
    changes: dict[str, Any], words: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_grid(tmp_path, data, **changes)
    assert main([str(path), "--list"]) == 2
    assert_one_error(capsys, *words)


def test_a_base_must_be_a_dlcm(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_grid(tmp_path, data)
    write_config(tmp_path / "base.yaml", "llama", data, tmp_path / "unused")
    assert main([str(path), "--list"]) == 2
    assert_one_error(capsys, "base.yaml is no DLCM")


def test_data_that_are_not_there_are_named_before_anything_runs(
    tmp_path: Path, launched: list[str], capsys: pytest.CaptureFixture[str]
):
    path = write_grid(tmp_path, tmp_path / "nowhere")
    assert main([str(path), "--no-fit"]) == 2
    assert_one_error(capsys, "train.prepare", "nowhere")
    assert launched == []


def test_listing_and_printing_run_nothing(grid: Path, launched: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([str(grid), "--list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["name", "N", "P", "R"] and [line.split()[0] for line in lines] == POINTS
    assert all(line.split()[-1] == "1,024" for line in lines)  # 8 steps of 4 rows of 32
    output = grid.parent / "grid"
    assert not output.exists()

    assert main([str(grid), "--print"]) == 0
    commands = [f"python -m train.pretrain {output / name}.yaml" for name in POINTS]
    assert capsys.readouterr().out.splitlines() == commands
    assert launched == [] and sorted(path.name for path in output.iterdir()) == sorted(f"{n}.yaml" for n in POINTS)
    for name, point in zip(POINTS, load_points(grid), strict=True):
        written: RunConfig = load_run_config(output / f"{name}.yaml")
        assert written == point.run and written.output == str(output / name)


def test_several_processes_are_launched_by_torchrun(data: Path, tmp_path: Path):
    one = load_points(write_grid(tmp_path, data))[0]
    two = load_points(write_grid(tmp_path, data, processes=2))[0]
    command = " ".join(two.command("python"))
    assert command.startswith("python -m torch.distributed.run --standalone --nproc-per-node 2 -m train.pretrain ")
    assert two.tokens == 2 * one.tokens


def test_each_run_is_run_once_and_goes_on_where_it_was(
    grid: Path, launched: list[str], capsys: pytest.CaptureFixture[str]
):
    llama, dlcm = (grid.parent / "grid" / name for name in POINTS)
    assert main([str(grid), "--no-fit"]) == 0
    assert launched == POINTS
    out = capsys.readouterr().out
    assert "[1/2] llama_N60k: validation loss" in out and "[2/2] dlcm_N60k_P40_R3: validation loss" in out
    assert main([str(grid), "--no-fit"]) == 0
    assert launched == POINTS
    assert capsys.readouterr().out.count("finished before") == 2

    shutil.rmtree(dlcm)
    metrics = (llama / "metrics.jsonl").read_text().splitlines(keepends=True)
    (llama / "metrics.jsonl").write_text("".join(metrics[:-1]))  # its last evaluation is missing
    assert main([str(grid), "--no-fit"]) == 0
    assert launched == 2 * POINTS
    assert "continued after step 8" in capsys.readouterr().out
    assert len((llama / "metrics.jsonl").read_text().splitlines()) == len(metrics)


def test_a_failed_run_is_named_and_does_not_stop_the_others(
    grid: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "eval.scaling", None)  # an incomplete grid must not be fitted
    broken = grid.parent / "grid" / POINTS[0]
    broken.parent.mkdir()
    broken.write_text("a file where the run directory should be")
    assert main([str(grid)]) == 2
    captured = capsys.readouterr()
    assert f"[1/2] {POINTS[0]}: failed" in captured.out and f"[2/2] {POINTS[1]}: validation loss" in captured.out
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: 1 of 2 runs failed") and f"{POINTS[0]} ({broken}.log)" in last
    assert POINTS[1] not in last

    broken.unlink()
    assert main([str(grid), "--no-fit"]) == 0
    assert launched == [*POINTS, POINTS[0]]


def test_a_changed_grid_does_not_touch_runs_of_the_old_one(
    data: Path, grid: Path, launched: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([str(grid), "--no-fit"]) == 0
    capsys.readouterr()
    write_grid(grid.parent, data, run={"seed": 2})
    assert main([str(grid), "--no-fit"]) == 2
    assert "holds a run with other values of seed" in capsys.readouterr().err


def test_a_stopped_run_stops_the_grid(grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stopped(command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> Done:
        os.kill(os.getpid(), signal.SIGTERM)
        return Done(128 + signal.SIGTERM)

    monkeypatch.setattr(Done, "send_signal", lambda process, number: None)
    monkeypatch.setattr("train.runs.start", stopped)
    assert main([str(grid)]) == 128 + signal.SIGTERM
    assert capsys.readouterr().out.count("stopped") == 1  # the second run was not begun


def test_the_law_is_fitted_to_all_runs(grid: Path, launched: list[str], monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def fit(arguments: Sequence[str]) -> int:
        asked.append(list(arguments))
        return 3

    scaling = types.ModuleType("eval.scaling")
    scaling.main = fit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eval.scaling", scaling)
    assert main([str(grid)]) == 3
    output = grid.parent / "grid"
    assert asked == [[*(str(output / name) for name in POINTS), "--output", str(output / "fit")]]
