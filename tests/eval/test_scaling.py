"""`python -m eval.scaling` reads tables and run directories, says what it found, and refuses what it cannot fit."""

import csv
import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dlcm.scaling
import eval.scaling
from dlcm.flops import parameter_counts
from dlcm.scaling import BaselineLaw, ConceptLaw, DecayLaw, Term, fit_concept_law
from eval.loading import EvaluationError
from eval.scaling import fitted, main, read_run, read_table, recover
from tests.eval.conftest import Trained
from tests.train.tiny import write_config
from train.config import build_model_config, load_run_config, save_run_config
from train.metrics import METRICS_FILE, read_metrics

LAW = ConceptLaw(1.8, Term(300.0, 0.38), Term(60.0, 0.33, gamma=0.4), Term(400.0, 0.32))
BASELINE = BaselineLaw(1.8, Term(620.0, 0.37), Term(400.0, 0.32))
STEPS, TOKENS = 1000, 10**7  # of a run, and per step


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval.scaling, "DRAWS", 12)
    monkeypatch.setattr(dlcm.scaling, "STARTS", 80)
    monkeypatch.setattr(dlcm.scaling, "REFINED", 3)


def write_table(
    path: Path,
    sizes: Sequence[float],
    ratios: Sequence[float],
    shares: Sequence[float],
    baseline: bool = True,
    law: ConceptLaw = LAW,
) -> Path:
    generator = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for N, D in itertools.product(sizes, np.geomspace(1e8, 1e11, 12)):
        for R, P in itertools.product(ratios, shares):
            rows.append({"run": f"{N} {R} {P}", "N": N, "D": D, "R": R, "P": P, "loss": law.loss(N, D, R, P)})
        if baseline:
            rows.append({"run": f"{N}", "N": N, "D": D, "R": "", "P": "", "loss": BASELINE.loss(N, D)})
    for row in rows:
        row["loss"] *= np.exp(0.002 * generator.standard_normal())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_is_fitted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "runs.csv", (1e7, 1e8, 3e8, 1e9), (2, 4, 8), (0.3, 0.5, 0.7))
    assert main([str(table), "--budget", "1e19", "1e20", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "from 36 runs" in out and "Baseline, from 4 runs" in out and "Eq. 23 was not fitted" in out
    assert "Without the largest N" in out and "90 % from" in out and "| 1e+20 |" in out
    for name in ("fit", "curves", "budget"):
        assert (tmp_path / "out" / f"scaling_{name}.png").read_bytes().startswith(b"\x89PNG")

    written = json.loads((tmp_path / "out" / "scaling.json").read_text(encoding="utf-8"))
    concept, baseline = written["laws"]["concept"], written["laws"]["baseline"]
    truth = LAW.constants()
    for name in ("d1", "d2", "gamma", "alpha"):
        assert concept["constants"][name] == pytest.approx(truth[name], rel=0.1)
        low, high = concept["intervals"][name]
        assert low < concept["constants"][name] < high
    assert concept["r_squared"] > 0.99 and concept["left_out"]["the largest N"]["runs"] == 9
    assert baseline["intervals"] == {} and "too few to draw from" in baseline["notes"][0]
    small, large = written["budgets"]
    assert small["flops"] == 1e19 and large["loss"] < small["loss"] and 2 <= small["R"] <= 8
    assert small["compute_multiplier"] > 1
    assert small["flops_saved"] == pytest.approx(1 - 1 / small["compute_multiplier"])
    assert "multiplier" in small["intervals"] and "take its law for certain" in out


def test_offsets_that_are_missed_are_missed_aloud(tmp_path: Path) -> None:
    law = dataclasses.replace(LAW, token=dataclasses.replace(LAW.token, offset=1e7))
    table = write_table(tmp_path / "runs.csv", (1e7, 1e8, 1e9), (2, 4, 8), (0.3, 0.7), baseline=False, law=law)
    without, with_offsets = (fitted(read_table(table), fit_concept_law, offsets) for offsets in (False, True))
    assert any("see --offsets" in note for note in without.notes)
    assert not any("see --offsets" in note for note in with_offsets.notes)
    assert with_offsets.fit.law.constants()["d1"] == pytest.approx(0.38, rel=0.15)


def test_without_a_baseline_or_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "runs.csv", (1e7, 1e8, 1e9), (2, 8), (0.3, 0.7), baseline=False)
    assert main([str(table)]) == 0
    assert "FLOPs saved are unknown" in capsys.readouterr().out
    written = json.loads((tmp_path / "scaling" / "scaling.json").read_text(encoding="utf-8"))
    assert written["budgets"][0]["flops"] == pytest.approx(6 * 1e9 * (0.7 + 0.3 / 2) * 1e11)  # the dearest run's


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("N,D,loss\n1,2,3\n", "no column R, P"),
        ("N,D,R,P,loss\n1e8,1e9,4,0.5,low\n", "line 2: a cell is no number"),
        ("N,D,R,P,loss\n1e8,1e9,4,0.5\n", "line 2: a cell is no number"),
        ("N,D,R,P,loss\n1e8,1e9,4,,2.5\n", "line 2: give both R and P"),
        ("N,D,R,P,loss\n1e8,1e9,,,2.5\n", "only baselines"),
        ("N,D,R,P,loss\n1e8,1e9,4,0.5,2.5\n1e8,1e10,4,0.5,2.4\n", "one N only"),
        ("N,D,R,P,loss\n1e8,1e9,4,0.5,-1\n", "loss must be above 0"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, text: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "runs.csv"
    table.write_text(text, encoding="utf-8")
    assert main([str(table)]) == 2
    captured = capsys.readouterr()
    assert problem in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == [table]


@pytest.mark.parametrize(
    ("ratios", "shares", "problem"), [((4,), (0.3, 0.5, 0.7), "one R only"), ((2, 4), (0.5,), "one P only")]
)
def test_what_cannot_be_identified_is_refused(
    tmp_path: Path,
    ratios: tuple[int, ...],
    shares: tuple[float, ...],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(write_table(tmp_path / "runs.csv", (1e7, 1e8, 1e9), ratios, shares))]) == 2
    error = capsys.readouterr().err
    assert problem in error and "give runs" in error and error.count("\n") == 1


def test_a_baseline_that_cannot_be_identified_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "runs.csv", (1e7, 1e9), (2, 4, 8), (0.3, 0.5, 0.7))
    assert main([str(table)]) == 2
    assert "the baseline: 2 different N" in capsys.readouterr().err


def test_rows_without_a_run_belong_to_their_model(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("N,D,R,P,loss\n1e8,1e9,4,0.5,2.5\n1e8,1e9,2,0.5,2.4\n1e8,2e9,4,0.5,2.3\n", encoding="utf-8")
    first, second, third = (point[0] for point in read_table(table))
    assert first == third != second


# Run directories


def write_run(directory: Path, decay: DecayLaw | None = None, **model: Any) -> Path:
    """A run that followed `LAW` to its decay, and then, at its very end, a decay law."""
    schedule = {"steps": STEPS, "warmup_steps": 20, "decay_fraction": 0.1}
    config = write_config(
        directory / "config.yaml", "dlcm", directory / "data", directory, model=model, schedule=schedule
    )
    run = load_run_config(config)
    save_run_config(run, directory / "run.yaml")
    N, P = size_and_share(directory)
    R = float(model["target_ratio"]) * 1.02
    lines = []
    for step in range(10, STEPS + 1, 10):
        loss = float(LAW.loss(N, step * TOKENS, R, P))
        if step > 0.9 * STEPS:
            stable = float(LAW.loss(N, 0.9 * STEPS * TOKENS, R, P))
            loss = stable - (float(decay.drop(stable, R, N)) if decay else 0.0)
        lines.append({"kind": "validation", "step": step, "tokens": step * TOKENS, "loss": loss})
        lines[-1]["tokens_per_concept"] = R
    lines.insert(3, lines[3] | {"loss": None})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / METRICS_FILE).write_text(text, encoding="utf-8")
    return directory


def size_and_share(directory: Path) -> tuple[float, float]:
    counts = parameter_counts(build_model_config(load_run_config(directory / "run.yaml")))
    N = sum(counts.values()) - counts["embedding"] - counts["head"]
    return float(N), counts["backbone"] / N


def test_run_directories_are_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decay = DecayLaw(0.02, 1.5, -0.1, 0.02, 1.0)
    runs = [
        write_run(
            tmp_path / f"{width}-{layers}-{ratio}",
            decay,
            d_token=width,
            d_concept=2 * width,
            token_ffn=2 * width,
            concept_ffn=3 * width,
            backbone_layers=layers,
            target_ratio=ratio,
        )
        for width in (32, 128, 512)
        for layers in (1, 4)
        for ratio in (2, 8)
    ]
    assert main([*map(str, runs), "--output", str(tmp_path / "fit")]) == 0
    assert "Eq. 23: delta = " in capsys.readouterr().out
    written = json.loads((tmp_path / "fit" / "scaling.json").read_text(encoding="utf-8"))
    assert written["laws"]["concept"]["constants"] == pytest.approx(LAW.constants(), rel=1e-2)
    assert written["laws"]["concept"]["runs"] == 12
    assert written["decay"]["a"] == pytest.approx(1.5, rel=0.05) and written["decay"]["r_squared"] > 0.999


def test_a_run_gives_its_stable_phase(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", DecayLaw(0.1, 0.0, 0.0, 0.0, 1.0), target_ratio=4)
    points, decay = read_run(directory)
    N, P = size_and_share(directory)
    assert [point[2] / TOKENS for point in points] == list(range(30, 901, 10))  # after warm-up, before decay
    assert all(point[1] == N and point[3] == pytest.approx(4.08) and point[4] == P for point in points)
    assert decay is not None
    stable, last = np.mean([point[5] for point in points[-2:]]), points[-1][5]
    assert decay == (pytest.approx(stable), pytest.approx(4.08), N, pytest.approx(stable - (last - 0.1)))
    (directory / METRICS_FILE).write_text("", encoding="utf-8")
    with pytest.raises(EvaluationError, match="recorded no validation between"):
        read_run(directory)


def test_trained_runs_are_read(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points, _ = read_run(trained.dlcm)
    validations = [line for line in read_metrics(trained.dlcm) if line["kind"] == "validation"]
    assert [(point[2], point[5]) for point in points] == [
        (line["tokens"], line["loss"]) for line in validations if 2 < line["step"] <= 6
    ]
    (baseline, *_), decay = read_run(trained.llama)
    assert np.isnan(baseline[3]) and np.isnan(baseline[4]) and decay is None
    without_record = shutil.copytree(trained.dlcm, tmp_path / "copy")
    (without_record / "run.yaml").unlink()
    assert [point[1:] for point in read_run(without_record)[0]] == [point[1:] for point in points]
    assert main([str(trained.dlcm), str(trained.llama)]) == 2
    assert "D is between 384 and 768" in capsys.readouterr().err


# Known constants


def test_known_constants_are_recovered() -> None:
    found = recover(1, of_points=0.01)
    assert max(found["exponent_error_worst"].values()) < 0.1 and found["prediction_error_worst"] < 0.005
    assert set(found["coverage"]) >= {"E0", "d1", "d2", "gamma", "alpha", "predictions"}


def test_recovery_is_written_with_its_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--synthetic", "1", "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "scaling_recovery.json").read_text(encoding="utf-8"))
    assert written["must_show"]["exponents, worst relative error"]["holds"]
    assert written["noise_of_points"]["noise_per_point"] == written["noise_of_runs"]["noise_per_run"] == 0.01
    assert "| noise of runs |" in capsys.readouterr().out
    with_them, without = (written[f"offsets_{how}"]["exponent_error_worst"]["alpha"] for how in ("fitted", "ignored"))
    assert with_them < 0.2 < without and written["offsets_fitted"]["coverage"] == {}


@pytest.mark.parametrize("arguments", [[], ["x.csv", "--synthetic", "1"], ["--synthetic", "0"], ["x", "--budget", "0"]])
def test_bad_commands_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
