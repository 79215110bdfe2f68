"""The report on learning rates: optima where they were put, bars that can fail, results that may be incomplete."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval.loading import EvaluationError
from eval.mup import Curve, curves_by_rate, curves_by_shape, main, must_show, read_results, spreads, steps_between
from train.config import ConfigError
from train.sweep import SweptRun, load_sweep

ROOT = Path(__file__).parents[2]
WIDTHS = (128, 256, 512, 1024)


def valley(rate: float, optimum: float, depth: float = 2.0) -> float:
    """A loss that is quadratic in the logarithm of the rate."""
    return depth + 0.02 * math.log2(rate / optimum) ** 2


@functools.cache
def runs_of(name: str) -> list[SweptRun]:
    return load_sweep(ROOT / "configs" / "mup" / f"{name}.yaml")[1]


def results(moved: float = 0.0, concept: float = 4e-3) -> dict[str, list[dict[str, Any]]]:
    """What the sweeps of configs/mup would find if the best rate moved by so many steps with each doubling."""

    def lines(name: str, loss: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": run.name,
                "labels": run.labels,
                "tokens": run.tokens,
                "validation": {"loss": loss(run)},
                "run": {"optimizer": dataclasses.asdict(run.run.optimizer)},
            }
            for run in runs_of(name)
        ]

    def doublings(run: Any) -> float:
        return math.log2(run.run.model["d_token"] / 128)

    def single(run: Any) -> float:
        which = run.labels["which_rate"].partition("-")[0]
        best = {"concept": concept, "embedding": 4.5e-2, "boundary": 2e-4}.get(which, 4e-3)
        return valley(getattr(run.run.optimizer, f"lr_{which}"), best)

    return {
        "transfer": lines(
            "transfer", lambda run: valley(run.run.optimizer.lr_token, 4e-3 * 2 ** (moved * doublings(run) / 2))
        ),
        "standard": lines("standard", lambda run: valley(run.run.optimizer.lr_token, 4e-3 / 2 ** doublings(run))),
        "rates": lines("rates", single),
        "seeds": lines("seeds", lambda run: 2.0 + 0.001 * run.run.seed),
    }


def write(directory: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    for sweep, lines in found.items():
        (directory / sweep).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / sweep / "results.jsonl").write_text(text)


def test_the_optimum_is_where_it_was_put():
    for optimum in (2.1e-3, 3.7e-3, 5e-3):
        curve = Curve({2e-3 * 2 ** (k / 2): valley(2e-3 * 2 ** (k / 2), optimum) for k in range(-2, 6)})
        assert curve.optimum == pytest.approx(optimum) and curve.is_bracketed


def test_an_optimum_at_the_edge_is_no_minimum():
    curve = Curve({rate: valley(rate, 1e-5) for rate in (1e-3, 2e-3, 4e-3)})
    assert curve.optimum == 1e-3 and not curve.is_bracketed
    diverged = Curve({1e-3: 2.0, 2e-3: 1.9, 4e-3: None})
    assert diverged.optimum == 2e-3 and diverged.is_bracketed  # there is a worse rate on either side
    assert Curve({1e-3: None}).optimum is None


def test_rates_are_as_good_whose_losses_are_near_without_a_worse_one_between():
    curve = Curve({1.0: 2.0, 2.0: 2.2, 4.0: 2.04, 8.0: 2.0, 16.0: 2.05, 32.0: None})
    assert curve.flat(0.0) == (1.0, 1.0) and Curve({1.0: None}).flat(1.0) is None
    curve.losses[8.0] = 1.99
    assert curve.flat(0.055) == (4.0, 8.0) and curve.flat(0.1) == (4.0, 16.0) and curve.flat(1.0) == (1.0, 16.0)


def test_steps_are_factors_of_sqrt_2():
    assert steps_between(1e-3, 2e-3) == pytest.approx(2) and steps_between(2e-3, 2e-3) == 0
    assert steps_between(None, 1e-3) is None


def test_bars_hold_where_rates_carry_over_and_not_where_they_move():
    assert [bar.holds for bar in must_show(results()).values()] == [True] * 5
    moved = list(must_show(results(moved=0.8)).values())
    assert [bar.holds for bar in moved] == [False, True, False, True, True]
    assert moved[0].value == pytest.approx(2.4, rel=0.01)  # labels are rounded
    apart = list(must_show(results(concept=8e-3)).values())
    assert [bar.holds for bar in apart] == [True, True, True, True, False]
    assert apart[4].value == pytest.approx(2, rel=0.01)


def test_the_control_fails_where_nothing_moves():
    found = results()
    found["standard"] = [line | {"labels": line["labels"]} for line in found["standard"]]
    for line in found["standard"]:
        line["validation"]["loss"] = valley(line["run"]["optimizer"]["lr_token"], 2e-3)
    assert not list(must_show(found).values())[3].holds


def test_what_was_not_measured_does_not_hold():
    assert not any(bar.holds for bar in must_show({"seeds": results()["seeds"]}).values())


def test_curves_have_the_points_of_the_sweeps():
    found = results()
    transfer = curves_by_shape(found["transfer"])
    assert list(transfer) == [f"t{width}-c{times}" for width in WIDTHS for times in (1, 2, 3)]
    assert all(len(curve.losses) == 7 for curve in transfer.values())
    rates = curves_by_rate(found["rates"])
    assert {which: len(curve.losses) for which, curve in rates.items()} == dict.fromkeys(
        ("token", "concept", "other", "embedding", "boundary"), 9
    )
    assert {shape: number for shape, (_, number) in spreads(found).items()} == {f"t{w}-c2": 4 for w in WIDTHS}


def test_command_writes_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = results()
    write(tmp_path / "runs", {"transfer": found["transfer"][:30]})
    assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    assert "| **no** |" in capsys.readouterr().out
    write(tmp_path / "whole", found)
    assert main([str(tmp_path / "whole"), "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "mup.json").read_text())
    assert all(bar["holds"] for bar in written["must_show"].values()) and len(written["must_show"]) == 5
    page = (tmp_path / "out" / "mup.md").read_text()
    assert "after 4.9 M tokens" in page and "| muP, 1,024 / 3,072 | 7 | 4.00e-03 | 2.0000 | 0.0000 | - |" in page
    assert (tmp_path / "out" / "mup.png").stat().st_size > 10_000


def test_nothing_to_report(tmp_path: Path):
    with pytest.raises(EvaluationError, match="no results of transfer, standard"):
        read_results(tmp_path)
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "results.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="no results of a sweep"):
        read_results(tmp_path)
