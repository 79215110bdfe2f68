"""Do base learning rates carry over from a proxy to larger models (section 6.1)? What the sweeps of configs/mup show.

    python -m train.prepare YOUR_TEXT --output runs/mup/data --tokenizer bpe:4096
    python -m train.sweep configs/mup/{transfer,standard,rates,seeds}.yaml
    python -m eval.mup runs/mup [--output docs/results]

    transfer   loss against base rate, all rates alike, for token widths and concept widths that grow independently
    standard   the same in the standard parametrisation: the control
    rates      on the proxy, one rate at a time: of token matrices, concept matrices, boundary projections, the rest
    seeds      the same run under other seeds

Reads their results.jsonl, whatever of it there is. The best rate of a curve is the vertex of a parabola through its
lowest point and the two beside it, in the logarithm of the rate; distances are in steps of sqrt(2), the sweeps' grid.
Writes mup.json, mup.md and mup.png.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.bench import (
    PALETTE,
    Bar,
    bars_table,
    finish,
    markdown_table,
    record,
    record_lines,
    where_trained,
    worst,
    write_json,
)
from eval.loading import EvaluationError, report_errors
from train.sweep import RESULTS, read_lines

SWEEPS = ("transfer", "standard", "rates", "seeds")
PROXY = "t128-c2"
ONE_STEP, MOST_LOST, DRIFT = 1.0, 0.005, 2.0

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # lines of results.jsonl by sweep


@dataclass
class Curve:
    """Validation loss in nats per token against base learning rate; None where a run's loss was not finite."""

    losses: dict[float, float | None] = field(default_factory=dict)

    @property
    def points(self) -> list[tuple[float, float]]:
        return sorted((rate, loss) for rate, loss in self.losses.items() if loss is not None)

    @property
    def best(self) -> tuple[float, float] | None:
        """Rate and loss of the lowest point; None without points."""
        return min(self.points, key=lambda point: point[1], default=None)

    @property
    def is_bracketed(self) -> bool:
        """Whether there are points on both sides of the lowest, so that it is a minimum."""
        best = self.best
        return best is not None and min(self.losses) < best[0] < max(self.losses)

    @property
    def optimum(self) -> float | None:
        """The best rate, between points; the lowest point's own where it is the first or the last with a loss."""
        if self.best is None:
            return None
        points = self.points
        index = points.index(self.best)
        if index in (0, len(points) - 1):
            return self.best[0]
        (x0, y0), (x1, y1), (x2, y2) = ((math.log2(rate), loss) for rate, loss in points[index - 1 : index + 2])
        above = (x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)
        below = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
        return 2 ** (x1 - above / (2 * below)) if below else self.best[0]

    def flat(self, within: float) -> tuple[float, float] | None:
        """The rates, next to each other, around the best one whose losses are within so many nats of its."""
        if self.best is None:
            return None
        low = high = (points := self.points).index(self.best)
        while low > 0 and points[low - 1][1] <= self.best[1] + within:
            low -= 1
        while high + 1 < len(points) and points[high + 1][1] <= self.best[1] + within:
            high += 1
        return points[low][0], points[high][0]


def steps_between(one: float | None, other: float | None) -> float | None:
    """How many factors of sqrt(2) lie between two rates."""
    return None if one is None or other is None else abs(2 * math.log2(one / other))


# Reading


def read_results(directory: Path) -> Results:
    """What the sweeps have found so far.

    Raises:
        EvaluationError: there is nothing.
        ConfigError: a file that no sweep wrote.
    """
    paths = {sweep: directory / sweep / RESULTS for sweep in SWEEPS}
    found = {sweep: read_lines(path) for sweep, path in paths.items() if path.is_file()}
    if not any(found.values()):
        raise EvaluationError(f"{directory}: no results of {', '.join(SWEEPS)}; run train.sweep on configs/mup first")
    return found


def shape_of(label: str) -> tuple[int, int]:
    """t512-c3 is d_token = 512, and concepts three times as wide."""
    match = re.fullmatch(r"t(\d+)-c(\d+)", label)
    if match is None:
        raise EvaluationError(f"shape '{label}' is not like {PROXY}; use the sweeps of configs/mup")
    return int(match[1]), int(match[2])


def curves_by_shape(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Loss against rate, for each shape, smallest first."""
    curves: dict[str, Curve] = {}
    for line in lines:
        curve = curves.setdefault(line["labels"]["shape"], Curve())
        curve.losses[line["run"]["optimizer"]["lr_token"]] = line["validation"]["loss"]
    return dict(sorted(curves.items(), key=lambda item: shape_of(item[0])))


def curves_by_rate(lines: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """Loss against one rate of the proxy, for each of them."""
    curves: dict[str, Curve] = {}
    for line in lines:
        which = line["labels"]["which_rate"].partition("-")[0]
        curve = curves.setdefault(which, Curve())
        curve.losses[line["run"]["optimizer"][f"lr_{which}"]] = line["validation"]["loss"]
    return curves


def proxy_rates(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Where each rate of the proxy is while another moves: at the middle of its own axis."""
    middles = {}
    for line in lines:
        which, _, position = line["labels"]["which_rate"].partition("-")
        if position == "0":
            middles[which] = line["run"]["optimizer"][f"lr_{which}"]
    return middles


def spreads(results: Results) -> dict[str, tuple[float, int]]:
    """Standard deviation of the loss over seeds, at the rate they were run at, and their number, for each shape."""
    losses: dict[str, list[float]] = {}
    others = results.get("seeds", ())
    rates = {line["run"]["optimizer"]["lr_token"] for line in others}
    same = [line for line in results.get("transfer", ()) if line["run"]["optimizer"]["lr_token"] in rates]
    for line in (*same, *others):
        if line["validation"]["loss"] is not None:
            losses.setdefault(line["labels"]["shape"], []).append(line["validation"]["loss"])
    return {shape: (statistics.stdev(found), len(found)) for shape, found in losses.items() if len(found) > 1}


# What it shows


def loss_lost(curve: Curve | None, proxy: Curve | None) -> float | None:
    """Nats that the proxy's best rate costs against the curve's own."""
    if curve is None or proxy is None or proxy.best is None or curve.best is None:
        return None
    here = curve.losses.get(proxy.best[0])
    return None if here is None else here - curve.best[1]


def must_show(results: Results) -> dict[str, Bar]:
    """The bars; None where runs are missing."""
    transfer, standard = (curves_by_shape(results.get(sweep, ())) for sweep in ("transfer", "standard"))
    rates = curves_by_rate(results.get("rates", ()))
    proxy = transfer.get(PROXY)
    best = None if proxy is None else proxy.optimum
    farthest = worst((steps_between(curve.optimum, best) for curve in transfer.values()), at_most=True)
    largest = list(transfer)[-1] if transfer else "-"
    ends = [curve.optimum if curve.is_bracketed else None for curve in standard.values()]  # an edge is no minimum
    token, concept = (rates[which].optimum if which in rates else None for which in ("token", "concept"))
    unbracketed = sum(not curve.is_bracketed for curve in transfer.values()) if transfer else None
    return {
        f"muP: farthest best rate from the proxy's, of {len(transfer)} shapes, steps of sqrt 2": Bar(
            farthest, ONE_STEP, at_most=True
        ),
        "muP: shapes whose best rate is at the edge of the grid": Bar(unbracketed, 0, at_most=True),
        f"muP: loss lost by the proxy's best rate at the largest shape ({largest}), nats": Bar(
            loss_lost(transfer.get(largest), proxy), MOST_LOST, at_most=True
        ),
        "standard: best rate moves from the smallest to the largest, steps of sqrt 2": Bar(
            steps_between(ends[0], ends[-1]) if len(ends) > 1 else None, DRIFT
        ),
        "best rates of token and concept matrices on the proxy, steps of sqrt 2 apart": Bar(
            steps_between(token, concept), ONE_STEP, at_most=True
        ),
    }


def plot(path: Path, results: Results) -> None:
    """Writes a PNG: the curves under muP, in the standard parametrisation, and of single rates."""
    figure = Figure(figsize=(15, 4.8), dpi=140, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    transfer, standard = (curves_by_shape(results.get(sweep, ())) for sweep in ("transfer", "standard"))
    widths = sorted({shape_of(shape)[0] for shape in (*transfer, *standard)})
    colours = dict(zip(widths, PALETTE, strict=False))
    for axes, curves, title in ((left, transfer, "muP"), (middle, standard, "standard parametrisation")):
        for shape, curve in curves.items():
            width, times = shape_of(shape)
            style = {1: ":", 2: "-", 3: "--"}.get(times, "-.")
            _draw(axes, curve, f"{width:,} / {width * times:,}", colours[width], style)
        finish(axes, title, "base learning rate", "validation loss, nats per token")
    for colour, (which, curve) in zip(PALETTE, curves_by_rate(results.get("rates", ())).items(), strict=False):
        _draw(right, curve, which, colour, "-")
    finish(right, f"one rate at a time, on the proxy ({PROXY})", "base learning rate", "")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        if axes.lines:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.35 * (high - low))  # the legend stands above the curves
            legend = axes.legend(frameon=False, fontsize=7, loc="upper center", ncols=4 if axes is left else 3)
            legend.set_title(None if axes is right else "d_token / d_concept")
    figure.savefig(path)


def _draw(axes: Axes, curve: Curve, label: str, colour: str, style: str) -> None:
    if not curve.points:
        return
    rates, losses = zip(*curve.points, strict=True)
    axes.plot(rates, losses, style, color=colour, label=label, linewidth=1.4)
    assert curve.best is not None
    axes.plot(*curve.best, "o", color=colour, markersize=5)


def page(recorded: Mapping[str, Any], results: Results) -> str:
    """The results in markdown."""
    transfer, standard = (curves_by_shape(results.get(sweep, ())) for sweep in ("transfer", "standard"))
    proxy, spread = transfer.get(PROXY), spreads(results)
    rows = []
    for name, curves in (("muP", transfer), ("standard", standard)):
        for shape, curve in curves.items():
            width, times = shape_of(shape)
            if curve.best is None:
                continue
            lost = loss_lost(curve, proxy if name == "muP" else curves.get(PROXY))
            seeds = spread.get(shape) if name == "muP" else None
            rows.append(
                (
                    f"{name}, {width:,} / {width * times:,}",
                    len(curve.losses),
                    f"{curve.optimum:.2e}",
                    f"{curve.best[1]:.4f}",
                    None if lost is None else f"{lost:.4f}",
                    None if seeds is None else f"{seeds[0]:.4f} ({seeds[1]})",
                )
            )
    middles, noise = proxy_rates(results.get("rates", ())), spread.get(PROXY, (0.0, 0))[0]
    single = [
        (
            which,
            f"{curve.optimum:.2e}",
            None if (moved := steps_between(curve.optimum, middles.get(which))) is None else f"{moved:.2f}",
            f"{curve.best[1]:.4f}",
            " to ".join(f"{rate:.2e}" for rate in curve.flat(noise) or ()),
        )
        for which, curve in curves_by_rate(results.get("rates", ())).items()
        if curve.best is not None
    ]
    header = ("d_token / d_concept", "rates", "best rate", "loss", "lost by the proxy's rate", "seeds (number)")
    return f"""# Learning rates that carry over

{bars_table(must_show(results))}

Loss after {_tokens(results)} tokens against the base learning rate of section 6.1, for models that grow in token width,
in concept width, or both. The proxy is {PROXY}: d_token = 128, d_concept twice that. Bars that were not measured do not
hold. Whether activations keep their scale is in [coord_check.md](coord_check.md).

![loss against learning rate](mup.png)

{markdown_table(header, rows)}

One rate at a time on the proxy, the others at {", ".join(f"{rate:g} ({which})" for which, rate in middles.items())}:

{markdown_table(("rate of", "best", "steps of sqrt 2 from where it was", "loss", "as good, given the seeds"), single)}

As good: the rates around the best whose losses are above its by less than the standard deviation between seeds
({noise:.4f} nats).

Trained on {where_trained(line for lines in results.values() for line in lines)}.  
{record_lines(recorded)}
"""


def _tokens(results: Results) -> str:
    numbers = sorted({line["tokens"] for lines in results.values() for line in lines})
    return " or ".join(f"{number / 1e6:.1f} M" for number in numbers)


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.mup", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, help="where the sweeps of configs/mup wrote: runs/mup")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    options = parser.parse_args(arguments)
    results, recorded = read_results(options.runs), record(options.commit)
    bars = must_show(results)
    write_json(options.output / "mup.json", recorded, bars, results=results)
    (options.output / "mup.md").write_text(page(recorded, results), encoding="utf-8")
    plot(options.output / "mup.png", results)
    print(bars_table(bars))


if __name__ == "__main__":
    sys.exit(main())
