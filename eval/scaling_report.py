"""What is said about fitted scaling laws: tables, and plots like the paper's Fig. 4-6 (see eval/scaling.py)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from dlcm.scaling import (
    BaselineLaw,
    DecayLaw,
    Fit,
    HeldOut,
    Law,
    Optimum,
    ScalingError,
    Trajectories,
    compute_multiplier,
    optimum,
)
from eval.bench import PALETTE, finish, markdown_table

LEVELS = 4  # curves of a panel at most
SAME = 0.15  # relative difference of N, R or P below which runs count as of one: realised R differ a little
FAR = 1e3  # farther than any run is from the middle
SHARES, RATIOS = 25, 3  # points over P, curves over R

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A law and how far to believe it: laws of the bootstrap, 90 % intervals, errors on runs left out, and notes."""

    fit: Fit
    laws: list[Law]
    intervals: dict[str, Interval]
    left_out: dict[str, HeldOut]
    notes: tuple[str, ...]

    def content(self) -> dict[str, Any]:
        """For a file."""
        data = self.fit.trajectories
        return {
            "constants": self.fit.law.constants(),
            "intervals": self.intervals,
            "r_squared": self.fit.r_squared,
            "noise": self.fit.noise,
            "agreeing_starts": self.fit.agreeing_starts,
            "runs": len(np.unique(data.run)),
            "points": len(data),
            "left_out": {name: asdict(errors) for name, errors in self.left_out.items()},
            "notes": self.notes,
        }


@dataclass(frozen=True, slots=True)
class ForBudget:
    """The best of a budget, how many times its FLOPs the baseline needs for the same loss, and intervals of both."""

    best: Optimum
    multiplier: float | None
    intervals: dict[str, Interval]

    def content(self) -> dict[str, Any]:
        """For a file."""
        saved = None if self.multiplier is None else 1 - 1 / self.multiplier
        return asdict(self.best) | {
            "compute_multiplier": self.multiplier,
            "flops_saved": saved,
            "intervals": self.intervals,
        }


# Tables


def print_report(
    concept: Fitted, baseline: Fitted | None, decay: DecayLaw | None, decay_note: str, budgets: Sequence[ForBudget]
) -> None:
    for title, law in (("Eq. 22", concept), ("Baseline", baseline)):
        if law is not None:
            print(f"{law_section(title, law)}\n")
    print(decay_section(decay, decay_note), end="\n\n")
    print(budget_section(budgets, concept.fit.trajectories, baseline is None or bool(baseline.laws)))


def law_section(title: str, fitted: Fitted) -> str:
    """Constants, R^2, errors of prediction and notes."""
    fit = fitted.fit
    rows = [
        (name, f"{value:.4g}", *_two(fitted.intervals.get(name) if value else None))
        for name, value in fit.law.constants().items()
    ]
    lines = [
        f"{title}, from {len(np.unique(fit.trajectories.run))} runs, {len(fit.trajectories)} points",
        "",
        markdown_table(("constant", "value", "90 % from", "to"), rows),
        "",
        f"R^2 {fit.r_squared:.4f}; points scatter by {fit.noise:.2%}; {fit.agreeing_starts} of the best starts agree",
    ]
    lines += [
        f"Without {name}: mean error {errors.mean:.2%}, worst run {errors.worst_run:.2%}; runs predicted: {errors.runs}"
        for name, errors in fitted.left_out.items()
    ]
    return "\n".join([*lines, *(f"! {note}" for note in fitted.notes)])


def decay_section(decay: DecayLaw | None, note: str) -> str:
    """Eq. 23 in one line."""
    if decay is None:
        return f"Eq. 23 was not fitted: {note}"
    return (
        f"Eq. 23: delta = {decay.k:.3g} L_stable^{decay.a:.3g} R^{decay.b:.3g} N^{decay.c:.3g}, "
        f"R^2 {decay.r_squared:.3f}"
    )


def budget_section(budgets: Sequence[ForBudget], data: Trajectories, intervals_whole: bool) -> str:
    """The best N, R and P of each budget, and FLOPs saved.

    Args:
        budgets: what was found.
        data: of the runs, whose sizes it may lie beyond.
        intervals_whole: whether those of the multiplier know how uncertain the baseline's law is.
    """
    largest = {"N": data.N.max(), "D": data.D.max()}

    def cell(one: ForBudget, name: str, form: str) -> str:
        value = one.multiplier if name == "multiplier" else getattr(one.best, name)
        if value is None or np.isnan(value):
            return "-"
        spread = one.intervals.get(name)
        shown = f"{value:{form}}" + "*" * (name in one.best.at_limits) + "^" * bool(value > largest.get(name, np.inf))
        return shown if spread is None else f"{shown} ({spread[0]:{form}} to {spread[1]:{form}})"

    names = {"N": ".3g", "D": ".3g", "R": ".2f", "P": ".2f", "loss": ".3f", "multiplier": ".2f"}
    rows = []
    for one in budgets:
        saved = "-" if one.multiplier is None or np.isnan(one.multiplier) else f"{1 - 1 / one.multiplier:.1%}"
        rows.append((f"{one.best.flops:.3g}", *(cell(one, name, form) for name, form in names.items()), saved))
    header = ("training FLOPs", "N", "D", "R", "P", "loss", "baseline's FLOPs for that loss, times", "saved")
    lines = [markdown_table(header, rows), "", "FLOPs: 6 N D (1 - P + P / R), without attention and head."]
    if any(one.best.at_limits for one in budgets):
        lines.append("* at the limit of what the runs have: the optimum lies there or beyond.")
    if any(getattr(one.best, name) > most for one in budgets for name, most in largest.items()):
        lines.append("^ beyond the largest of the runs: an extrapolation.")
    if not intervals_whole:
        lines.append("Intervals of the baseline's FLOPs take its law for certain: it has too few runs for more.")
    if all(one.multiplier is None for one in budgets):
        lines.append("No runs of a baseline were given: FLOPs saved are unknown.")
    elif any(one.multiplier is None or np.isnan(one.multiplier) for one in budgets):
        lines.append("-: the baseline's law reaches that loss at no budget.")
    return "\n".join(lines)


def _two(interval: Interval | None) -> tuple[str | None, str | None]:
    return (None, None) if interval is None else (f"{interval[0]:.4g}", f"{interval[1]:.4g}")


# Plots


def plot_fit(path: Path, concept: Fitted, baseline: Fitted | None) -> None:
    """Writes a PNG: observed loss against predicted, and what is left over against D."""
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    shown = [("DLCM", concept)] + ([("LLaMA", baseline)] if baseline else [])
    ends: list[float] = []
    for colour, marker, (name, fitted) in zip(PALETTE, "os", shown, strict=False):
        data, law = fitted.fit.trajectories, fitted.fit.law
        predicted = law.loss(data.N, data.D, data.R, data.P)
        style: dict[str, Any] = dict(color=colour, marker=marker, markersize=3, linestyle="none", alpha=0.35, mew=0)
        left.plot(predicted, data.loss, label=f"{name}, R² = {fitted.fit.r_squared:.4f}", **style)
        right.plot(data.D, 100 * (data.loss / predicted - 1), label=name, **style)
        ends += [predicted.min(), predicted.max()]
    left.plot([min(ends), max(ends)], [min(ends), max(ends)], color="black", linewidth=0.8)
    right.axhline(0, color="black", linewidth=0.8)
    _log_tokens(right)
    finish(left, "Observed and predicted", "predicted loss, nats per token", "observed loss")
    finish(right, "What the law leaves over", "training tokens", "observed over predicted, per cent")
    for axes in (left, right):
        for handle in axes.legend(frameon=False).legend_handles:
            handle.set_alpha(1)
    _save(figure, path)


def plot_curves(path: Path, concept: Fitted) -> None:
    """Writes a PNG: loss against D and the fitted law, by N, by R and by P, of runs middling in the other two."""
    data, law = concept.fit.trajectories, concept.fit.law
    runs = np.unique(data.run, return_index=True)[1]  # a point of each
    sizes = {name: getattr(data, name)[runs] for name in "NRP"}
    middle = {name: (levels := _levels(values))[len(levels) // 2] for name, values in sizes.items()}
    figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, varied in zip(panels, "NRP", strict=True):
        others = "NRP".replace(varied, "")
        for colour, level in zip(PALETTE, _spread_out(_levels(sizes[varied])), strict=False):
            away = sum(np.abs(np.log(sizes[name] / middle[name])) for name in others)
            away = away + FAR * (np.abs(sizes[varied] / level - 1) > SAME)
            curve = data.take(data.run == data.run[runs[np.argmin(away)]])
            D = np.geomspace(curve.D.min(), curve.D.max(), 100)
            N, R, P = (float(getattr(curve, name)[0]) for name in "NRP")
            label = f"{varied} = {_number(varied, float(getattr(curve, varied)[0]))}"
            axes.plot(curve.D, curve.loss, ".", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
            axes.plot(D, law.loss(N, D, R, P), color=colour, label=label)
        _log_tokens(axes)
        axes.legend(frameon=False)
        near = " and ".join(f"{name} near {_number(name, middle[name])}" for name in others)
        finish(axes, f"By {varied}, {near}", "training tokens", "")
    panels[0].set_ylabel("loss, nats per token")
    _save(figure, path)


def plot_budget(path: Path, flops: float, concept: Fitted, baseline: Fitted | None) -> None:
    """Writes a PNG: for a budget, loss over P at several R with the best N, and FLOPs saved at that loss."""
    data, law = concept.fit.trajectories, concept.fit.law
    shares = np.linspace(data.P.min(), data.P.max(), SHARES)
    figure = Figure(figsize=(11 if baseline else 6, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2 if baseline else 1, squeeze=False)[0]
    for colour, ratio in zip(PALETTE, np.geomspace(data.R.min(), data.R.max(), RATIOS), strict=False):
        best = [optimum(law, flops, (ratio, ratio), (share, share)) for share in shares]
        panels[0].plot(shares, [one.loss for one in best], color=colour, label=f"R = {_number('R', ratio)}")
        if baseline is not None:
            saved = [_saved(baseline.fit.law, one) for one in best]
            panels[1].plot(shares, saved, color=colour, label=f"R = {_number('R', ratio)}")
    if baseline is not None:
        theirs = optimum(baseline.fit.law, flops)
        panels[0].axhline(theirs.loss, color="black", linestyle="--", linewidth=1, label="LLaMA")
        panels[1].axhline(0, color="black", linewidth=0.8)
        finish(panels[1], "FLOPs saved at that loss", "share of parameters in the backbone, P", "per cent")
    for axes in panels:
        axes.legend(frameon=False)
    finish(
        panels[0],
        f"Loss for {flops:.2g} training FLOPs, N the best",
        "share of parameters in the backbone, P",
        "loss, nats per token",
    )
    _save(figure, path)


def _saved(baseline: Law, reached: Optimum) -> float:
    assert isinstance(baseline, BaselineLaw)
    try:
        return 100 * (1 - 1 / compute_multiplier(baseline, reached))
    except ScalingError:
        return float("nan")


def _levels(values: np.ndarray) -> list[float]:
    """Values that differ by more than `SAME`, each the mean of those around it, rising."""
    found: list[list[float]] = []
    for value in np.sort(values):
        if found and value / found[-1][0] - 1 < SAME:
            found[-1].append(float(value))
        else:
            found.append([float(value)])
    return [sum(group) / len(group) for group in found]


def _spread_out(levels: Sequence[float]) -> list[float]:
    """At most `LEVELS` of them, the first and the last included."""
    if len(levels) <= LEVELS:
        return list(levels)
    return [levels[round(place)] for place in np.linspace(0, len(levels) - 1, LEVELS)]


def _number(name: str, value: float) -> str:
    return EngFormatter(places=0, sep="")(value) if name == "N" else f"{value:.2g}"


def _log_tokens(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # less than a decade has labels too
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
