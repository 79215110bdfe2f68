"""Scaling laws of runs (see dlcm/scaling.py): constants, how far to believe them, and what to do with a budget.

    python -m eval.scaling RUN_DIR [RUN_DIR ...] [TABLE.csv ...] [--budget FLOPS ...] [--output DIR]
    python -m eval.scaling --synthetic DRAWS [--output docs/results]

A run directory gives its validation losses before the decay, and, with concepts, its decay. N counts its parameters
without embedding and head, P is the backbone's share of them, R its tokens per concept at the last validations. A table
has columns run, N, D, R, P, loss; baselines have no R and P. Without `run`, every (N, R, P) is one.

Prints constants with 90 % intervals, R^2, errors on runs that were left out, the best N, R and P for each budget of
training FLOPs, and FLOPs saved against the baseline's law at equal loss; writes scaling.json and plots.

`--synthetic` fits curves drawn from known constants instead and writes scaling_recovery.json: how far exponents and
predictions are off, and how often 90 % intervals cover the truth. Noise of 1 % is each point's own, which is what the
bars are about; for comparison it is also that of a whole run. A second law has offsets, which are fitted, or left at 0.
Some minutes on one core.
"""

import argparse
import csv
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dlcm.flops import TABLES, parameter_counts
from dlcm.scaling import (
    EXPONENT_NAMES,
    Array,
    BaselineLaw,
    ConceptLaw,
    DecayLaw,
    Decays,
    Fit,
    HeldOut,
    Law,
    Optimum,
    ScalingError,
    Term,
    Trajectories,
    approximate_flops_per_token,
    bootstrap,
    compute_multiplier,
    fit_baseline_law,
    fit_concept_law,
    fit_decay_law,
    held_out,
    interval,
    optimum,
    tail_sample,
)
from eval.bench import Bar, bars_table, markdown_table, record, write_json
from eval.loading import EvaluationError, checkpoint_directory, report_errors
from eval.scaling_report import Fitted, ForBudget, plot_budget, plot_curves, plot_fit, print_report
from train.config import build_model_config, load_run_config
from train.metrics import read_metrics
from train.schedule import decay_start

SKIPPED = 0.02  # of a run's tokens, at its beginning: warm-up, and what follows no power law yet
DRAWS = 200
FOLDS = 5  # of runs, each left out once
BETTER = 0.99
VALIDATIONS = 3  # whose tokens per concept are a run's R
DECAY_WINDOW = (0.90, 0.99)  # of a run's steps
NEAR = 0.01  # of a run's steps: those before a step whose mean loss counts as its own

Point = tuple[str, float, float, float, float, float]  # run, N, D, R, P, loss
Decay = tuple[float, float, float, float]  # stable loss, R, N, drop


# What is read


def read_table(path: Path) -> list[Point]:
    """Rows of a CSV.

    Raises:
        EvaluationError: a column is missing, or a cell no number; names the line.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("N", "D", "R", "P", "loss") if name not in (reader.fieldnames or ())]
        if missing:
            raise EvaluationError(f"{path}: has no column {', '.join(missing)}; the columns are run, N, D, R, P, loss")
        return [_point(row, path, reader.line_num) for row in reader]


def _point(row: Mapping[str, str], path: Path, line: int) -> Point:
    try:
        N, D, loss = (float(row[name]) for name in ("N", "D", "loss"))
        R, P = (float(row[name] or "nan") for name in ("R", "P"))
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{path}, line {line}: a cell is no number; mend it or leave out the line") from error
    if math.isnan(R) != math.isnan(P):
        raise EvaluationError(f"{path}, line {line}: give both R and P, or, for a baseline, neither")
    return (f"{path}:{row.get('run') or (N, row['R'], row['P'])}", N, D, R, P, loss)


def read_run(path: Path) -> tuple[list[Point], Decay | None]:
    """A run's validation losses before its decay, and what the decay took off, if it has concepts and got there.

    Eq. 23 is read so: L_stable is the loss at 90 % of the steps, or where the decay begins, if that is earlier; delta
    is what it loses from there to 99 %. Both are validation losses, or, where those are too rare, training losses.

    Raises:
        CheckpointError, ConfigError, MetricsError: it cannot be read.
        EvaluationError: no validation lies before the decay.
    """
    own = path / "run.yaml"
    run = load_run_config(own if own.exists() else checkpoint_directory(path) / "run.yaml")
    counts = parameter_counts(build_model_config(run))
    N = sum(count for stage, count in counts.items() if stage not in TABLES)
    lines = [line for line in read_metrics(path) if line.get("loss") is not None]
    validations = [line for line in lines if line["kind"] == "validation"]
    start = decay_start(run.schedule)
    stable = [line for line in validations if run.schedule.warmup_steps < line["step"] <= start]
    if not stable:
        raise EvaluationError(
            f"{path}: recorded no validation between warm-up and decay; go on with it, or lower evaluation.every"
        )
    R = P = math.nan
    if "backbone" in counts:
        R = statistics.fmean(line["tokens_per_concept"] for line in validations[-VALIDATIONS:])
        P = counts["backbone"] / N
    points = [(str(path), float(N), float(line["tokens"]), R, P, line["loss"]) for line in stable]
    if math.isnan(R) or start == run.schedule.steps:
        return points, None
    before, after = min(start, DECAY_WINDOW[0] * run.schedule.steps), DECAY_WINDOW[1] * run.schedule.steps
    for kind, key in (("validation", "loss"), ("train", "ce")):
        of_kind = [line for line in lines if line["kind"] == kind and line.get(key) is not None]
        losses = [
            [line[key] for line in of_kind if 0 <= step - line["step"] <= NEAR * run.schedule.steps]
            for step in (before, after)
        ]
        if all(losses):
            stable_loss, decayed = map(statistics.fmean, losses)
            return points, (stable_loss, R, float(N), stable_loss - decayed)
    return points, None


def trajectories(points: Sequence[Point]) -> Trajectories:
    """Points as curves, sampled for a fit."""
    names, *columns = zip(*points, strict=True)
    run = np.unique(names, return_inverse=True)[1]
    return tail_sample(Trajectories(run, *(np.array(column, dtype=float) for column in columns)), skip=SKIPPED)


# What is fitted


def fitted(points: Sequence[Point], fit_law: Callable[..., Fit], offsets: bool) -> Fitted:
    """A law, its intervals, and its errors on runs that were left out.

    Raises:
        ScalingError: the runs do not determine it.
    """

    def refit(some: Trajectories) -> Fit:
        return fit_law(some, offsets=offsets)

    data = trajectories(points)
    fit = refit(data)
    notes, laws = list(fit.remarks), []
    runs = np.unique(data.run)
    try:
        laws = bootstrap(fit, DRAWS)
    except ScalingError as error:
        notes.append(f"no intervals: {error}")
    shuffled = np.random.default_rng(0).permutation(runs)
    largest = np.unique(data.run[data.N.max() < 1.02 * data.N])  # widths are rounded to heads: N of one size differ
    groups = {f"each of {FOLDS} parts of the runs": np.array_split(shuffled, min(FOLDS, len(runs)))}
    groups["the largest N"] = [largest]
    left_out: dict[str, HeldOut] = {}
    for name, parts in groups.items():
        try:
            left_out[name] = held_out(data, parts, refit)
        except ScalingError as error:
            notes.append(f"not predicted without {name}: {error}")
    if not offsets and _offsets_predict_better(data, groups, left_out, fit_law):
        notes.append(
            "with offsets t the law predicts runs that were left out better: see --offsets, and trust that more"
        )
    return Fitted(fit, laws, _intervals(laws, len(runs)), left_out, tuple(notes))


def _offsets_predict_better(
    data: Trajectories,
    groups: Mapping[str, Sequence[Array]],
    left_out: Mapping[str, HeldOut],
    fit_law: Callable[..., Fit],
) -> bool:
    """Whether what was left out is predicted with at most `BETTER` of the error, which the points' noise is part of."""
    for name, errors in left_out.items():
        try:
            return held_out(data, groups[name], lambda some: fit_law(some, offsets=True)).mean < BETTER * errors.mean
        except ScalingError:
            continue
    return False


def _intervals(laws: Sequence[Law], runs: int) -> dict[str, tuple[float, float]]:
    if not laws:
        return {}
    drawn = [law.constants() for law in laws]
    return {name: interval([constants[name] for constants in drawn], runs) for name in drawn[0]}


def for_budget(flops: float, concept: Fitted, baseline: Fitted | None) -> ForBudget:
    """The best of a budget within the R and P of the runs, and how much more the baseline needs for the same loss."""
    data = concept.fit.trajectories
    ratios, shares = (float(data.R.min()), float(data.R.max())), (float(data.P.min()), float(data.P.max()))

    def multiplier(ours: Optimum, theirs: Law) -> float:
        assert isinstance(theirs, BaselineLaw)
        try:
            return compute_multiplier(theirs, ours)
        except ScalingError:
            return math.nan  # no budget of the baseline reaches that loss, or every one does

    best = optimum(concept.fit.law, flops, ratios, shares)
    drawn = [optimum(law, flops, ratios, shares) for law in concept.laws]
    values = {name: [getattr(one, name) for one in drawn] for name in ("N", "D", "R", "P", "loss")}
    gain = None
    if baseline is not None:
        gain = multiplier(best, baseline.fit.law)
        theirs = baseline.laws or [baseline.fit.law] * len(drawn)
        values["multiplier"] = [multiplier(one, law) for one, law in zip(drawn, theirs, strict=True)]
    runs = len(np.unique(data.run))
    found = {name: [value for value in each if not math.isnan(value)] for name, each in values.items()}
    # an interval of what many draws do not have would be that of the others
    intervals = {name: interval(found[name], runs) for name in found if drawn and len(found[name]) >= 0.95 * len(drawn)}
    return ForBudget(best, gain, intervals)


def largest_budget(data: Trajectories) -> float:
    """Training FLOPs of the run that had most."""
    return float((3 * approximate_flops_per_token(data.N, data.R, data.P) * data.D).max())


# Known constants

TRUTH = ConceptLaw(
    floor=1.7,
    token=Term(0.40 * 5e7**0.35, 0.35),
    concept=Term(0.25 * 5e7**0.40 / 4**0.5, 0.40, gamma=0.5),
    data=Term(0.25 * 1e10**0.30, 0.30),
)
WITH_OFFSETS = ConceptLaw(
    TRUTH.floor,
    dataclasses.replace(TRUTH.token, offset=3e6),
    dataclasses.replace(TRUTH.concept, offset=3e6),
    dataclasses.replace(TRUTH.data, offset=2e8),
)
TRUE_GRID = [(N, R, P) for N in (1e7, 3e7, 1e8, 3e8, 1e9) for R in (2.0, 4.0, 8.0) for P in (0.3, 0.5, 0.7)]
TRUE_D = np.arange(1, 1001) * 1e8  # validations
NOISE = 0.01
# Sizes between those of the runs, where the fitted law is asked to predict: N, D, R, P.
ASKED = np.stack(np.meshgrid([1.7e7, 1.7e8, 7e8], [1e9, 1e10, 9e10], [3.0, 6.0], [0.4, 0.6]), -1).reshape(-1, 4).T


def draw_curves(truth: ConceptLaw, generator: np.random.Generator, of_points: float, of_runs: float) -> Trajectories:
    """Curves of a law over the grid; relative noise is normal, of each point and of each run."""
    run = np.repeat(np.arange(len(TRUE_GRID)), len(TRUE_D))
    N, R, P = (np.repeat(column, len(TRUE_D)) for column in np.array(TRUE_GRID).T)
    D = np.tile(TRUE_D, len(TRUE_GRID))
    noise = of_points * generator.standard_normal(len(D)) + of_runs * generator.standard_normal(len(TRUE_GRID))[run]
    return tail_sample(Trajectories(run, N, D, R, P, truth.loss(N, D, R, P) * np.exp(noise)))


def recover(
    draws: int,
    of_points: float = 0.0,
    of_runs: float = 0.0,
    seed: int = 0,
    truth: ConceptLaw = TRUTH,
    offsets: bool = False,
    covers: bool = True,
) -> dict[str, Any]:
    """Fits drawn curves: errors of exponents and predictions relative to the truth, and coverage of 90 % intervals.

    Args:
        draws: of all curves.
        of_points, of_runs: relative noise.
        seed: of the draws.
        truth: the law they are drawn from.
        offsets: whether they are fitted.
        covers: whether intervals are computed, which is most of the time.
    """
    generator = np.random.default_rng(seed)
    constants = {name: value for name, value in truth.constants().items() if value}
    asked = truth.loss(*ASKED)
    exponents: dict[str, list[float]] = {name: [] for name in constants if name in EXPONENT_NAMES}
    covered: dict[str, list[Array]] = {name: [] for name in (*constants, "predictions") if covers}
    predictions = []
    for draw in range(draws):
        fit = fit_concept_law(draw_curves(truth, generator, of_points, of_runs), offsets=offsets)
        found = fit.law.constants()
        for name, errors in exponents.items():
            errors.append(abs(found[name] / constants[name] - 1))
        predictions.append(np.abs(fit.law.loss(*ASKED) / asked - 1))
        if not covers:
            continue
        laws = bootstrap(fit, DRAWS, seed=draw)
        for name, (low, high) in _intervals(laws, len(TRUE_GRID)).items():
            if name in constants:
                covered[name].append(np.array(low <= constants[name] <= high))
        of_draws = np.stack([law.loss(*ASKED) for law in laws], axis=1)
        bounds = np.array([interval(values, len(TRUE_GRID)) for values in of_draws]).T
        covered["predictions"].append((bounds[0] <= asked) & (asked <= bounds[1]))
    return {
        "noise_per_point": of_points,
        "noise_per_run": of_runs,
        "draws": draws,
        "truth": truth.constants(),
        "offsets_fitted": offsets,
        "exponent_error_worst": {name: max(errors) for name, errors in exponents.items()},
        "exponent_error_median": {name: statistics.median(errors) for name, errors in exponents.items()},
        "prediction_error_worst": float(np.max(predictions)),
        "prediction_error_median": float(np.median(predictions)),
        "coverage": {name: float(np.mean(each)) for name, each in covered.items()},
    }


def coverage(recovered: Mapping[str, Any]) -> float:
    """How often intervals of constants cover, all together."""
    return statistics.fmean(value for name, value in recovered["coverage"].items() if name != "predictions")


def synthetic(draws: int, output: Path) -> None:
    """Writes and prints how well known constants are recovered."""
    cases = {
        "noise_of_points": recover(draws, of_points=NOISE),
        "noise_of_runs": recover(draws, of_runs=NOISE, seed=1),
        "offsets_fitted": recover(draws, of_points=NOISE, seed=2, truth=WITH_OFFSETS, offsets=True, covers=False),
        "offsets_ignored": recover(draws, of_points=NOISE, seed=2, truth=WITH_OFFSETS, covers=False),
    }
    points, with_offsets = cases["noise_of_points"], cases["offsets_fitted"]
    bars = {
        "exponents, worst relative error": Bar(max(points["exponent_error_worst"].values()), 0.10, at_most=True),
        "predictions, worst relative error": Bar(points["prediction_error_worst"], 0.005, at_most=True),
        "constants, coverage of 90 % intervals, at least": Bar(coverage(points), 0.85),
        "constants, coverage of 90 % intervals, at most": Bar(coverage(points), 0.95, at_most=True),
        "predictions, coverage of 90 % intervals, at least": Bar(points["coverage"]["predictions"], 0.85),
        "predictions, coverage of 90 % intervals, at most": Bar(points["coverage"]["predictions"], 0.95, at_most=True),
        "exponents, offsets fitted too": Bar(max(with_offsets["exponent_error_worst"].values()), 0.10, at_most=True),
        "predictions, offsets fitted too": Bar(with_offsets["prediction_error_worst"], 0.005, at_most=True),
    }
    write_json(output / "scaling_recovery.json", record(), bars, runs=len(TRUE_GRID), bootstrap_draws=DRAWS, **cases)
    print(bars_table(bars), end="\n\n")
    header = ("1 % noise", *points["exponent_error_worst"], "predictions", "coverage", "of predictions")
    rows = [
        (
            name.replace("_", " "),
            *(f"{error:.1%}" for error in found["exponent_error_worst"].values()),
            f"{found['prediction_error_worst']:.2%}",
            *(
                (f"{coverage(found):.1%}", f"{found['coverage']['predictions']:.1%}")
                if found["coverage"]
                else (None, None)
            ),
        )
        for name, found in cases.items()
    ]
    print(f"Worst errors of {draws} draws, and coverage of 90 % intervals:\n\n{markdown_table(header, rows)}")


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.synthetic is not None:
        synthetic(options.synthetic, options.output or Path("docs/results"))
        return
    try:
        report(options)
    except ScalingError as error:
        raise EvaluationError(str(error)) from error


def report(options: argparse.Namespace) -> None:
    """Reads, fits, prints, writes."""
    points: list[Point] = []
    decays: list[Decay] = []
    for path in options.inputs:
        if path.is_dir():
            of_run, decay = read_run(path)
            points += of_run
            decays += [decay] if decay else []
        else:
            points += read_table(path)
    with_concepts = [point for point in points if not math.isnan(point[3])]
    without = [point for point in points if math.isnan(point[3])]
    if not with_concepts:
        raise EvaluationError("there are only baselines, or no rows; give runs of DLCMs")
    concept = fitted(with_concepts, fit_concept_law, options.offsets)
    baseline = _fitted_baseline(without, options.offsets) if without else None
    decay_law, decay_note = _decay_law(decays)
    budgets = options.budget or [largest_budget(concept.fit.trajectories)]
    best = [for_budget(flops, concept, baseline) for flops in budgets]

    output = options.output or options.inputs[0].parent / "scaling"
    plot_fit(output / "scaling_fit.png", concept, baseline)
    plot_curves(output / "scaling_curves.png", concept)
    plot_budget(output / "scaling_budget.png", budgets[-1], concept, baseline)
    laws = {"concept": concept} | ({"baseline": baseline} if baseline else {})
    write_json(
        output / "scaling.json",
        record(),
        {},
        laws={name: law.content() for name, law in laws.items()},
        decay=None if decay_law is None else dataclasses.asdict(decay_law),
        budgets=[one.content() for one in best],
    )
    print_report(concept, baseline, decay_law, decay_note, best)
    print(f"\nfiles are in {output}")


def _fitted_baseline(points: Sequence[Point], offsets: bool) -> Fitted:
    try:
        return fitted(points, fit_baseline_law, offsets)
    except ScalingError as error:
        raise ScalingError(f"the baseline: {error}; or leave its runs out") from error


def _decay_law(decays: Sequence[Decay]) -> tuple[DecayLaw | None, str]:
    """Eq. 23, or why there is none."""
    if not decays:
        return None, "no run directory with a finished decay was given"
    try:
        return fit_decay_law(Decays(*(np.array(column) for column in zip(*decays, strict=True)))), ""
    except ScalingError as error:
        return None, str(error)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.scaling", description="Fits scaling laws to runs.")
    parser.add_argument("inputs", nargs="*", type=Path, metavar="RUN_DIR | TABLE.csv", help="of DLCMs and baselines")
    parser.add_argument(
        "--budget", nargs="+", type=float, metavar="FLOPS", help="of training (default: the largest run's)"
    )
    parser.add_argument(
        "--offsets", action="store_true", help="fit the offsets t too, instead of 0 (N over two decades)"
    )
    parser.add_argument("--synthetic", type=int, metavar="DRAWS", help="recover known constants so many times instead")
    parser.add_argument("--output", type=Path, help="where to write (default: `scaling` beside the first input)")
    options = parser.parse_args(arguments)
    if bool(options.inputs) == (options.synthetic is not None):
        parser.error("give either runs and tables, or --synthetic DRAWS")
    if options.synthetic is not None and options.synthetic < 1:
        parser.error("--synthetic must be at least 1")
    if not all(0 < flops < math.inf for flops in options.budget or ()):
        parser.error("--budget must be above 0 and finite")
    return options


if __name__ == "__main__":
    sys.exit(main())
