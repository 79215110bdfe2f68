"""Sweeps: every combination is a run, run once; results say what the runs have recorded."""

import copy
import dataclasses
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.train.conftest import Done
from tests.train.tiny import prepare_tiny, write_config
from train.config import ConfigError, load_run_config
from train.pretrain import main as pretrain
from train.sweep import load_sweep, main, read_results

AXES = {
    "rate": {"r1": {"optimizer.lr_token": 1e-3}, "r2": {"optimizer.lr_token": 2e-3, "optimizer.lr_other": 2e-3}},
    "seed": {"s0": {"seed": 0}, "s1": {"seed": 1}},
}
NAMES = ["r1_s0", "r1_s1", "r2_s0", "r2_s1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("data"))


@pytest.fixture
def sweep(data: Path, tmp_path: Path) -> Path:
    return write_sweep(tmp_path, data)


def write_sweep(directory: Path, data: Path, **changes: Any) -> Path:
    write_config(directory / "base.yaml", "llama", data, directory / "unused")
    content = {"base": "base.yaml", "output": str(directory / "sweep"), "axes": AXES}
    path = directory / "sweep.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


def results(sweep: Path) -> list[dict[str, Any]]:
    lines = (sweep.parent / "sweep" / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_runs_are_all_combinations(sweep: Path):
    _, runs = load_sweep(sweep)
    assert [run.name for run in runs] == NAMES
    assert [run.labels for run in runs][1] == {"rate": "r1", "seed": "s1"}
    last = runs[-1].run
    assert (last.seed, last.optimizer.lr_token, last.optimizer.lr_other) == (1, 2e-3, 2e-3)
    assert last.output.endswith("sweep/r2_s1")


def test_points_may_have_bases_of_their_own(data: Path, tmp_path: Path):
    write_config(tmp_path / "dlcm.yaml", "dlcm", data, tmp_path / "unused")
    models = {"a": {}, "b": {"base": "dlcm.yaml"}}
    _, runs = load_sweep(write_sweep(tmp_path, data, axes={"model": models, "seed": AXES["seed"]}))
    assert [run.run.model["architecture"] for run in runs] == ["llama", "llama", "dlcm", "dlcm"]
    assert [run.run.seed for run in runs] == [0, 1, 0, 1] and runs[-1].run.output.endswith("sweep/b_s1")
    twice = {"one": {"x": models["b"]}, "two": {"y": models["b"]}}
    for axes, base in (({"model": models}, None), (twice, "base.yaml")):
        with pytest.raises(ConfigError, match="no base, or several"):
            load_sweep(write_sweep(tmp_path, data, axes=axes, base=base))


def test_each_run_is_run_once_and_results_are_those_of_runs(
    sweep: Path, launched: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([str(sweep)]) == 0
    assert launched == NAMES and "[4/4] r2_s1: validation loss" in capsys.readouterr().out
    first = results(sweep)
    assert [line["name"] for line in first] == NAMES
    assert first[2]["labels"] == {"rate": "r2", "seed": "s0"} and first[0]["tokens"] == 1024
    losses = [line["validation"]["loss"] for line in first]
    assert len(set(losses)) == 4 and all(2 < loss < 7 for loss in losses)
    assert first[0]["device"] == (platform.processor() or platform.machine()) and "commit" in first[0]
    (sweep.parent / "sweep" / "results.jsonl").unlink()
    assert main([str(sweep)]) == 0
    assert launched == NAMES and results(sweep) == first
    for directory in (sweep.parent / "sweep").iterdir():
        if directory.is_dir():
            shutil.rmtree(directory)  # as on another machine: results are enough
    assert main([str(sweep)]) == 0
    assert launched == NAMES and results(sweep) == first


def test_sweeps_share_a_queue(data: Path, tmp_path: Path, launched: list[str], capsys: pytest.CaptureFixture[str]):
    """Even where their runs have the same names."""
    seeds, paths = {"seed": AXES["seed"]}, []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(str(write_sweep(tmp_path / name, data, axes=seeds)))
    assert main(paths) == 0 and launched == ["s0", "s1"] * 2
    assert "[4/4] s1: validation loss" in capsys.readouterr().out
    assert all([line["name"] for line in results(Path(path))] == ["s0", "s1"] for path in paths)
    assert main(paths) == 0 and len(launched) == 4
    assert "4 of 4 runs were finished before" in capsys.readouterr().err
    assert main([paths[0], paths[0]]) == 2
    assert "2 sweeps have the output" in capsys.readouterr().err


def test_results_of_other_configurations_do_not_count(sweep: Path):
    _, runs = load_sweep(sweep)
    path = sweep.parent / "results.jsonl"
    wanted = dataclasses.asdict(runs[0].run)
    del wanted["output"], wanted["spikes"]  # a line from before there was such an option
    other = copy.deepcopy(wanted)
    other["optimizer"]["lr_other"] *= 2
    line = {"name": runs[0].name, "labels": {}, "validation": {"loss": 1.0}}
    for run, counts in ((wanted, True), (other, False), (wanted | {"gone": 1}, False)):
        path.write_text(json.dumps(line | {"run": run}) + "\n")
        assert bool(read_results(runs, path)) == counts
    for text in ("{", '{"name": "r1_s0"}\n', "[]\n", json.dumps(line | {"name": "../r1_s0", "run": {}})):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no results of a sweep"):
            read_results(runs, path)


def test_checkpoints_of_finished_runs_may_go(data: Path, tmp_path: Path, launched: list[str]):
    sweep = write_sweep(tmp_path, data, keep_checkpoints=False)
    assert main([str(sweep)]) == 0
    assert len(results(sweep)) == 4 and not list(tmp_path.glob("sweep/*/checkpoints"))
    assert main([str(sweep)]) == 0
    assert launched == NAMES and len(results(sweep)) == 4


def test_a_run_that_saves_its_last_checkpoint_is_not_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It has validated, and has no checkpoint yet; meanwhile another run ends."""

    class Saving:
        def __init__(self, run_dir: Path) -> None:
            self.looks, (self.whole,) = 5, (run_dir / "checkpoints").glob("step_*")
            self.unfinished = self.whole.rename(f"{self.whole}.tmp")

        def poll(self) -> int | None:
            self.looks -= 1
            if self.looks >= 0:
                return None
            if self.unfinished.is_dir():
                self.unfinished.rename(self.whole)
            return 0 if self.whole.is_dir() else 1

    def here(command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> Any:
        status = pretrain(command[3:])
        return Saving(log_file.with_suffix("")) if log_file.stem == "s0" else Done(status)

    monkeypatch.setattr("train.runs.start", here)
    sweep = write_sweep(tmp_path, data, keep_checkpoints=False, at_once=2, axes={"seed": AXES["seed"]})
    assert main([str(sweep)]) == 0 and len(results(sweep)) == 2
    assert not list(tmp_path.glob("sweep/*/checkpoints"))


def test_listing_and_printing_run_nothing(sweep: Path, launched: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([str(sweep), "--list"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "parameters", "MFLOP", "/", "token", "tokens"]
    assert [line.split()[0] for line in lines] == NAMES and not (sweep.parent / "sweep").exists()
    assert main([str(sweep), "--print"]) == 0
    output = sweep.parent / "sweep"
    assert capsys.readouterr().out.splitlines() == [f"python -m train.pretrain {output / n}.yaml" for n in NAMES]
    assert load_run_config(output / f"{NAMES[0]}.yaml").optimizer.lr_token == 1e-3 and launched == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis": {}}, "unknown key 'axis'; did you mean 'axes'"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": {"rate": {}}}, "axes.rate must hold points"),
        ({"axes": {"rate": [1, 2]}}, "axes.rate must hold points"),
        ({"axes": {"rate": {0.1: {"seed": 1}}}}, "reads the label 0.1 as a float; put it in quotes"),
        ({"axes": {"rate": {"fast": 1}}}, "axes.rate.fast is 1; give the keys"),
        ({"axes": {"rate": {"a/b": {"seed": 1}}}}, "axes.rate: 'a/b' will be part of a file name"),
        ({"axes": {"rate": {"fast": {"optimizer.lr_tokens": 1}}}}, "fast: .*lr_tokens.*did you mean"),
        ({"axes": {"rate": {"fast": {"optimizer.lr_token": -1}}}}, "fast: .*lr_token.*above 0"),
        ({"at_once": 0}, "at_once is 0, but must be at least 1"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_what_is_no_sweep(changes: dict[str, Any], message: str, data: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        load_sweep(write_sweep(tmp_path, data, **changes))


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
