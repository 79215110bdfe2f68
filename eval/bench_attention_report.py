"""What `eval/bench_attention.py` says about its rows: bars, tables and the figure, from rows alone."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eval.bench import (
    PALETTE,
    Bar,
    Row,
    bars_table,
    find,
    finish,
    markdown_table,
    record_lines,
    worst,
)
from train.utilisation import PEAK_FLOPS

LABELS = {
    "replicated_fa2": "replication, torch varlen FA2",
    "replicated_flash_attn": "replication, flash-attn",
    "replicated_fa3": "replication, FA3 through torch",
    "replicated_fa4_torch": "replication, FA4 through torch",
    "replicated_fa4": "replication, flash-attn-4",
    "flex": "FlexAttention, with mask build",
    "flex_static": "FlexAttention for one S, with mask build",
    "ragged": "ragged",
}
PREPARED_LABELS = {
    "flex": "FlexAttention, mask given",
    "flex_static": "FlexAttention for one S, mask given",
    "ragged": "ragged, geometry given",
}
FLEX = ("flex", "flex_static")
PARTS = ("errors", "times")
RESULTS = ("out", "dq", "dk", "dv")
LARGE = 8192  # tokens from which on the granularity of the allocator, 2 MB, is nothing beside what is measured
NOISE = 0.1  # of a dtype's epsilon: errors below it are the rounding of a last sum, equal for any purpose


class Setting(NamedTuple):
    """What a table or a curve over lengths has in common."""

    boundaries: str
    ratio: int
    head_dim: int

    @classmethod
    def of(cls, row: Row) -> "Setting":
        return cls(row["boundaries"], row["ratio"], row["head_dim"])


USUAL = Setting("random", 4, 64)


def merge_rows(sources: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of several calls; what a later one measured again replaces what the earlier ones had."""
    names = ("path", "length", "boundaries", "ratio", "head_dim", "input", "dtype", "weighting")
    return list({tuple(row.get(name) for name in names): row for rows in sources for row in rows}.values())


def speedup(rows: Sequence[Row], ours: Row, path: str, column: str) -> float | None:
    """How many times faster, forward and backward, ragged with its geometry is than a path by the given column."""
    if not ours:
        return None
    theirs = find(rows, path=path, length=ours["length"], **Setting.of(ours)._asdict())
    own, other = ours.get("forward_backward_ms"), theirs.get(f"forward_backward_{column}")
    return other / own if own and other else None


# Bars


def must_show(rows: Sequence[Row], errors: Sequence[Row]) -> dict[str, Bar]:
    """The bars. Speed-ups are those of forward and backward, with ragged's geometry in its time."""
    bars: dict[str, Bar] = {}
    for head_dim in (64, 128):
        setting = USUAL._replace(head_dim=head_dim)
        for length, paths, column, target, over in (
            (2048, ("replicated_fa2",), "ms", 2.5, "replication + torch varlen FA2"),
            (8192, ("replicated_fa2",), "ms", 3.5, "replication + torch varlen FA2"),
            (16384, ("replicated_fa2",), "ms", 3.5, "replication + torch varlen FA2"),
            (8192, FLEX, "prepared_ms", 1.3, "the faster FlexAttention, mask given"),
            (16384, FLEX, "prepared_ms", 1.3, "the faster FlexAttention, mask given"),
        ):
            ours = find(rows, path="ragged", length=length, **setting._asdict())
            name = f"speed-up over {over}, R = 4, {length:,} tokens, head dimension {head_dim}"
            bars[name] = Bar(worst(speedup(rows, ours, path, column) for path in paths), target)
    of_ragged = [row for row in rows if row["path"] == "ragged"]
    with_build = [
        speedup(rows, row, path, "ms")
        for row in of_ragged
        for path in FLEX
        if path == FLEX[0] or find(rows, path=path, length=row["length"], **Setting.of(row)._asdict())
    ]
    bars["speed-up over FlexAttention with its mask build, least of all cases"] = Bar(worst(with_build), 2.0)
    bars[f"extra bytes per token and slot, most over least, {LARGE:,} tokens and more"] = Bar(
        memory_spread([row for row in of_ragged if row["length"] >= LARGE]), 1.5, at_most=True
    )
    of_fa2 = [row for row in errors if row["path"] == "replicated_fa2"]
    bars["error over that of replication + torch varlen FA2, most of all inputs"] = Bar(
        worst((error_ratio(errors, row) for row in of_fa2), at_most=True), 1.5, at_most=True
    )
    return bars


def memory_spread(of_ragged: Sequence[Row]) -> float | None:
    """Extra memory per token and slot, the most over the least: bounded where memory is O(L + M).

    O(L) alone gives up to 4 / 3 over R = 2 to 8; O(L R) would give 3 and more.
    """
    if not of_ragged or any("extra_bytes" not in row for row in of_ragged):
        return None
    rates = [row["extra_bytes"] / (row["length"] + row["slots"]) for row in of_ragged]
    return max(rates) / min(rates)


def error_ratio(errors: Sequence[Row], theirs: Row) -> float | None:
    """The largest of ragged's errors over a path's on the same input; below `NOISE`, errors count as that much."""
    same = {key: theirs[key] for key in ("input", "head_dim", "dtype", "weighting")}
    ours = find(errors, path="ragged", **same)
    if any(name not in row for name in RESULTS for row in (ours, theirs)):
        return None
    floor = NOISE * torch.finfo(getattr(torch, theirs["dtype"])).eps
    return max(max(ours[name], floor) / max(theirs[name], floor) for name in RESULTS)


# Tables


def page(recorded: dict[str, Any], bars: dict[str, Bar], rows: Sequence[Row], errors: Sequence[Row]) -> str:
    """The results as markdown."""
    parts = [
        "# Attention from tokens to concepts",
        record_lines(recorded),
        "Written by `eval/bench_attention.py`, whose docstring says how times are taken. One document, 32 heads, bf16. "
        "Building ragged's geometry is part of its time, in speed-ups too, unless a column says that it is given.",
        "## Bars",
        bars_table(bars),
        "![Times and speed-ups by length](attention.png)",
    ]
    for setting in dict.fromkeys(map(Setting.of, rows)):
        of_setting = [row for row in rows if Setting.of(row) == setting]
        kind = (
            "random boundaries" if setting.boundaries == "random" else "regular boundaries, as in the paper's Table 6"
        )
        parts += [
            f"## R = {setting.ratio}, {kind}, head dimension {setting.head_dim}",
            "Forward / forward and backward, ms:",
            times_table(of_setting),
            "Forward and backward, times faster:",
            speedups_table(of_setting),
        ]
    usual = [row for row in rows if Setting.of(row) == USUAL]
    parts += [
        "## TFLOP/s",
        "Of the function's FLOPs, preparation left out, forward / forward and backward. "
        f"The datasheet's peak of an H100, dense bf16, is {PEAK_FLOPS['H100'] / 1e12:.0f}.",
        rates_table(rows),
        "## With launches",
        "From the call to the end of the last kernel, preparation included, R = 4, head dimension 64, ms:",
        by_length_table(usual, lambda row: pair(row, "eager_ms")),
        "## Extra memory",
        "The most held at once in forward and backward beyond inputs, output and gradients, R = 4, head dim 64, MB:",
        by_length_table(usual, lambda row: f"{row['extra_bytes'] / 1e6:,.1f}" if "extra_bytes" in row else None),
        "## Errors against float64",
        "Relative, out / dQ / dK / dV, 8 heads. Where a gradient is exactly zero (one concept: dQ and dK), relative to "
        f"the gradient of the output. For the ratio, errors below {NOISE:g} epsilon count as that much.",
        errors_table(errors),
        "## What did not run",
        notes_table([*rows, *errors]),
    ]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Row], errors: Sequence[Row], bars: dict[str, Bar]) -> str:
    """A few tables for the terminal."""
    usual = [row for row in rows if Setting.of(row) == USUAL]
    return "\n\n".join(
        [
            errors_table(errors),
            rates_table(rows),
            times_table(usual),
            speedups_table(usual),
            notes_table([*rows, *errors]),
            bars_table(bars),
        ]
    )


def paths_in(rows: Sequence[Row]) -> list[str]:
    """Paths with at least one time."""
    timed = {row["path"] for row in rows if "forward_ms" in row}
    return [name for name in LABELS if name in timed]


def lengths_in(rows: Sequence[Row]) -> list[int]:
    return sorted({row["length"] for row in rows})


def pair(row: Row, column: str) -> str | None:
    """Forward / forward and backward."""
    values = [row.get(f"{which}_{column}") for which in ("forward", "forward_backward")]
    return None if None in values else " / ".join(f"{value:.3g}" for value in values)


def times_table(rows: Sequence[Row]) -> str:
    """By length; what prepares something, with and without it."""
    columns = [
        (name, column, labels[name])
        for name in paths_in(rows)
        for column, labels in (("prepared_ms", PREPARED_LABELS), ("ms", LABELS))
        if name in labels
    ]
    return markdown_table(
        ("tokens", *(label for *_, label in columns)),
        (
            (f"{length:,}", *(pair(find(rows, path=name, length=length), column) for name, column, _ in columns))
            for length in lengths_in(rows)
        ),
    )


def speedups_table(rows: Sequence[Row]) -> str:
    """Ragged over every other path, and, as in the paper, replication over FlexAttention."""
    others = [(name, "ms", LABELS[name]) for name in paths_in(rows) if name != "ragged"]
    others += [(name, "prepared_ms", PREPARED_LABELS[name]) for name, *_ in others if name in PREPARED_LABELS]

    def line(length: int) -> Iterator[str | None]:
        yield f"{length:,}"
        ours = find(rows, path="ragged", length=length)
        for name, column, _ in others:
            value = speedup(rows, ours, name, column)
            yield None if value is None else f"{value:.2f}"
        replicated, by_flex = (find(rows, path=name, length=length) for name in ("replicated_fa2", "flex"))
        for column in ("prepared_ms", "ms"):
            own, other = replicated.get("forward_backward_ms"), by_flex.get(f"forward_backward_{column}")
            yield f"{other / own:.2f}" if own and other else None

    header = ["tokens", *(f"ragged over {label}" for *_, label in others)]
    header += [f"replication, torch varlen FA2 over {labels['flex']}" for labels in (PREPARED_LABELS, LABELS)]
    return markdown_table(header, (list(line(length)) for length in lengths_in(rows)))


def rates_table(rows: Sequence[Row]) -> str:
    names = paths_in(rows)
    return markdown_table(
        ("case", *(PREPARED_LABELS.get(name, LABELS[name]) for name in names)),
        (
            (
                f"{length:,} tokens, R = {setting.ratio} {setting.boundaries}, head dimension {setting.head_dim}",
                *(pair(find(rows, path=name, length=length, **setting._asdict()), "tflops") for name in names),
            )
            for setting in dict.fromkeys(map(Setting.of, rows))
            for length in lengths_in(rows)
        ),
    )


def by_length_table(rows: Sequence[Row], cell: Any) -> str:
    """A line for each path, a column for each length that has anything to say."""
    names = paths_in(rows)
    cells = {length: [cell(find(rows, path=name, length=length)) for name in names] for length in lengths_in(rows)}
    told = {length: column for length, column in cells.items() if any(column)}
    return markdown_table(
        ("path", *(f"{length:,}" for length in told)),
        ((LABELS[name], *(column[index] for column in told.values())) for index, name in enumerate(names)),
    )


def errors_table(errors: Sequence[Row]) -> str:
    def cell(row: Row) -> str | None:
        return " / ".join(f"{row[name]:.1e}" for name in RESULTS) if "out" in row else row.get("note")

    def lines() -> Iterator[tuple[str | None, ...]]:
        for ours in (row for row in errors if row["path"] == "ragged"):
            key = {name: ours[name] for name in ("input", "head_dim", "dtype", "weighting")}
            theirs = find(errors, path="replicated_fa2", **key)
            ratio = error_ratio(errors, theirs) if theirs else None
            shown = None if ratio is None else f"{ratio:.2f}"
            yield ", ".join(map(str, key.values())), cell(ours), cell(theirs), shown

    header = ("input, head dimension, dtype, weighting", "ragged", LABELS["replicated_fa2"], "ratio")
    return markdown_table(header, lines())


def notes_table(rows: Sequence[Row]) -> str:
    """Each reason once, and in how many cases it was met."""
    met: dict[tuple[str, str], int] = {}
    for row in rows:
        if "note" in row:
            met[row["path"], row["note"]] = met.get((row["path"], row["note"]), 0) + 1
    return markdown_table(
        ("path", "why", "cases"), ((LABELS[name], note, count) for (name, note), count in met.items())
    )


# Figure


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Writes a PNG: times at R = 4 on the left; speed-ups over replication and over FlexAttention beside them."""
    figure = Figure(figsize=(14, 4.4), dpi=150, layout="constrained")
    times, over_replication, over_flex = figure.subplots(1, 3)
    _draw_times(times, [row for row in rows if Setting.of(row) == USUAL])
    for colour, setting in zip(PALETTE, dict.fromkeys(map(Setting.of, rows)), strict=False):
        ours = [row for row in rows if row["path"] == "ragged" and Setting.of(row) == setting]
        label = f"R = {setting.ratio} {setting.boundaries}, head dim {setting.head_dim}"
        for axes, other, column, style in (
            (over_replication, "replicated_fa2", "ms", "-"),
            (over_flex, "flex", "prepared_ms", "-"),
            (over_flex, "flex_static", "prepared_ms", "--"),
        ):
            values = {row["length"]: speedup(rows, row, other, column) for row in ours}
            _draw(axes, values, colour, style, label if style == "-" else None)
    finish(times, "Forward and backward, R = 4, head dim 64", "tokens", "ms")
    finish(over_replication, "Ragged over replication (torch varlen FA2)", "tokens", "times faster")
    finish(over_flex, "Ragged over FlexAttention, mask given\n(dashed: compiled for one S)", "tokens", "times faster")
    for axes in (over_replication, over_flex):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(top=axes.get_ylim()[1] * 2.5)  # room for the legend
    times.set_ylim(top=times.get_ylim()[1] * 60)
    for axes in (times, over_replication, over_flex):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths_in(rows))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}K"))
        axes.xaxis.set_minor_locator(NullLocator())
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="upper left" if axes is times else "upper right")
    figure.savefig(path)


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yscale("log")
    for colour, name in zip(PALETTE, paths_in(rows), strict=False):
        of_path = [row for row in rows if row["path"] == name]
        for column, style, labels in (("ms", "-", LABELS), ("prepared_ms", "--", PREPARED_LABELS)):
            if name in labels:
                values = {row["length"]: row.get(f"forward_backward_{column}") for row in of_path}
                _draw(axes, values, colour, style, labels[name])


def _draw(axes: Axes, values: dict[int, float | None], colour: str, style: str, label: str | None) -> None:
    known = {length: value for length, value in values.items() if value is not None}
    if known:
        axes.plot(
            list(known), list(known.values()), color=colour, linestyle=style, marker="o", markersize=4, label=label
        )
