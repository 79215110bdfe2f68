"""What `eval/bench_codec.py` says about its rows: bars, tables and the figure, from rows alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dlcm.codec.tensor import Backend
from eval.bench import PALETTE, Bar, Row, bars_table, find, finish, markdown_table, record_lines, worst
from eval.codec_gradients import table as gradients_table
from eval.codec_methods import CLIPPED, ROTATED, ROUNDERS, ROUNDING, SHUFFLED
from eval.codec_report import LEVELS, comparison_table, gap_bits, totals

CODEC: Backend = "x264"
GAINS = dict(zip(LEVELS, (1.6, 2.0, 2.5), strict=True))  # over rounding, in relative MSE, by its bits
MISSES = {1_000_000: 0.01, 1 << 16: 0.05}  # bits, by least number of values

Results = dict[str, dict[str, list[Row]]]  # rows by section and checkpoint


# Bars


def must_show(results: Results) -> dict[str, Bar]:
    """Bars of the codec on weights; each of the checkpoint that does worst."""
    weights, bars = results.get("weights", {}), {}
    for level, target in GAINS.items():
        bars[f"relative MSE of RTN g128 at {level} bits, over the codec's at as many in all"] = Bar(
            worst(_gain(rows, level, ROUNDING) for rows in weights.values()), target
        )
        bars[f"the same, of RTN g128 with clip search at {level} bits"] = Bar(
            worst(_gain(rows, level, CLIPPED) for rows in weights.values()), 1.0
        )
    for values, most in MISSES.items():
        misses = [miss for rows in weights.values() for miss in _misses(rows, values)]
        bars[f"bits by which a tensor of {values:,} values or more misses its budget"] = Bar(
            worst(misses, at_most=True), most, at_most=True
        )
    return bars


def _gain(rows: Sequence[Row], level: int, method: str) -> float | None:
    found = {row["method"]: row["rel_mse"] for row in totals(rows) if row["level"] == level}
    return found[method] / found[CODEC] if found.get(CODEC) else None


def _misses(rows: Sequence[Row], values: int) -> list[float]:
    budgets = {(row["tensor"], row["level"]): row["bits"] for row in rows if row["method"] == ROUNDING}
    large = [row for row in rows if row["values"] >= values and row["method"] not in ROUNDERS]
    return [abs(budgets[row["tensor"], row["level"]] - row["bits"]) for row in large]


# Tables


def page(recorded: Mapping[str, Any], bars: Mapping[str, Bar], settings: Mapping[str, Any], results: Results) -> str:
    """The results in markdown; of sections that have not run, nothing."""
    parts = [
        "# The tensor codec",
        record_lines(recorded),
        "Written by `eval/bench_codec.py`, whose docstring says how all is measured. Bits are those of all bytes, "
        "headers, scales and exact outliers included. What `entropy`, which has no codec, or `shuffled`, which has "
        "nothing to predict, does as well is no merit of a video codec.",
        bars_table(bars),
        "![Errors and bits per byte against bits a value](codec.png)",
    ]
    for section, title, table in (
        ("weights", "Errors of weights at equal bits", _weights_part),
        ("models", "Bits per byte with all matrices compressed", _models_part),
        ("stages", f"Bits per byte with one stage compressed, by {CODEC}", _stages_part),
        ("past", "Bits per byte with old keys and values compressed", _past_part),
    ):
        for label, rows in results.get(section, {}).items():
            parts += [f"## {title}: {label}", table(rows)]
    for section, title, table in (
        ("gradients", "Training with compressed gradients", _gradients_part),
        ("speed", "Speed on one thread", _speed_part),
    ):
        parts += [part for rows in results.get(section, {}).values() for part in (f"## {title}", table(rows))]
    parts.append(
        f"Text: {', '.join(settings['text']) or 'validation split'}, {settings['limit']:,} characters at most."
    )
    return "\n\n".join(parts) + "\n"


def _weights_part(rows: Sequence[Row]) -> str:
    methods = {row["method"] for row in rows}
    count, values = len({row["tensor"] for row in rows}), sum({row["tensor"]: row["values"] for row in rows}.values())
    parts = [f"{count} matrices, {values:,} values. {_gaps(rows, methods)}", comparison_table(rows)]
    if any("output_rel_mse" in row for row in rows):
        parts += ["Of what linear layers put out on the calibration text, on average over them:"]
        parts.append(comparison_table(rows, "output_rel_mse"))
    return "\n\n".join(parts)


def _gaps(rows: Sequence[Row], methods: set[str]) -> str:
    videos = [method for method in sorted(methods) if method in ("x264", "x265", "nvenc")]
    if "entropy" not in methods or not videos:
        return "No video codec was set against the entropy coder alone."
    gaps = "; ".join(f"{video} takes {gap_bits(rows, video):+.2f} bits a value" for video in videos)
    return f"Against the entropy coder alone, at the level where it does worst, {gaps}."


def _models_part(rows: Sequence[Row]) -> str:
    """A method a line, a budget a column: bits per byte, what that is more than uncompressed, and bits where others."""
    exact = find(rows, method=None)["bits_per_byte"]
    coded = [row for row in rows if row["method"] is not None]
    budgets = list(dict.fromkeys(row["budget"] for row in coded))

    def cell(row: Row) -> str | None:
        if not row:
            return None
        bits = f" at {row['bits']:.2f}" if row["method"] in ROUNDERS else ""
        return f"{row['bits_per_byte']:.4f} ({row['bits_per_byte'] - exact:+.4f}){bits}"

    cases = dict.fromkeys((row["method"], row["mode"]) for row in coded)
    lines = []
    for method, mode in sorted(cases, key=lambda case: case[1] != "uniform"):
        label = method if mode == "uniform" else f"{method}, bits by {mode}"
        lines.append((label, *(cell(find(coded, method=method, mode=mode, budget=budget)) for budget in budgets)))
    parts = [
        f"Uncompressed: {exact:.4f}. In brackets, how much more.",
        markdown_table(("method", *_bits(budgets)), lines),
    ]
    parts += [
        f"{CODEC} less the entropy coder alone, bits per byte: "
        + ", ".join(
            f"{budget:g} bits {ours['bits_per_byte'] - control['bits_per_byte']:+.4f}"
            for budget in budgets
            if (ours := find(coded, method=CODEC, mode="uniform", budget=budget))
            and (control := find(coded, method="entropy", mode="uniform", budget=budget))
        )
        + "."
    ]
    return "\n\n".join(parts)


def _stages_part(rows: Sequence[Row]) -> str:
    exact = find(rows, method=None)["bits_per_byte"]
    coded = [row for row in rows if row["method"] is not None]
    budgets = list(dict.fromkeys(row["budget"] for row in coded))
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in coded):
        own = [find(coded, stage=stage, budget=budget) for budget in budgets]
        harms = [f"{row['bits_per_byte'] - exact:+.4f}" for row in own]
        millions = own[-1]["values"] / 1e6
        per_million = f"{(own[-1]['bits_per_byte'] - exact) / millions:+.4f}"
        lines.append((stage, f"{millions:.3f}", *harms, per_million))
    least = max(dict.fromkeys(row["stage"] for row in coded), key=lambda stage: _harm(coded, stage, budgets[-1]))
    header = ("stage", "M values", *_bits(budgets), f"per M values at {budgets[-1]:g} bits")
    return (
        f"More bits per byte than uncompressed, {exact:.4f}:\n\n{markdown_table(header, lines)}\n\n"
        f"At {budgets[-1]:g} bits {least} costs most."
    )


def _harm(rows: Sequence[Row], stage: str, budget: float) -> float:
    harm: float = find(rows, stage=stage, budget=budget)["bits_per_byte"]
    return harm


def _past_part(rows: Sequence[Row]) -> str:
    exact = find(rows, method=None)
    coded = [row for row in rows if row["method"] is not None and row["bits"] is not None]
    if not coded:
        return "No text was long enough for a block of its past to grow old."
    levels = list(dict.fromkeys(row["level"] for row in coded))
    lines = []
    for method in dict.fromkeys(row["method"] for row in coded):
        own = [find(coded, method=method, level=level) for level in levels]
        cells = [
            f"{row['bits_per_byte']:.4f} ({row['bits_per_byte'] - exact['bits_per_byte']:+.4f}) at {row['bits']:.2f}"
            for row in own
        ]
        lines.append((method, *cells, f"{own[-1]['mvalues_per_second']:.2f}"))
    header = ("method", *(f"as RTN to {level} bits" for level in levels), "M values a second, both ways")
    return (
        f"With all of its past exact: {exact['bits_per_byte']:.4f}, over {exact['tokens']:,} tokens. In brackets, how "
        "much more; then bits of what was compressed. What comes back lies in the cache: no memory is saved, and no "
        "time.\n\n"
        f"{markdown_table(header, lines)}"
    )


def _gradients_part(rows: Sequence[Row]) -> str:
    return (
        f"{rows[0]['steps']} steps of a small DLCM on bytes (`eval/codec_gradients.py`), one seed; by the range coder, "
        f"since a gradient is no picture. Bits include what is sent exactly.\n\n{gradients_table(rows)}"
    )


def _speed_part(rows: Sequence[Row]) -> str:
    columns = ("encode_mvalues_per_second", "decode_mvalues_per_second")
    lines = [(row["backend"], f"{row['bits']:.2f}", *(f"{row[column]:.1f}" for column in columns)) for row in rows]
    return markdown_table(("backend", "bits", "M values a second, encoding once", "decoding"), lines)


def _bits(budgets: Sequence[float]) -> list[str]:
    return [f"{budget:g} bits" for budget in budgets]


# Figure


def plot(path: Path, results: Results) -> None:
    """Writes a PNG: relative MSE of weights, then bits per byte of compressed models, by method; what was not measured
    has no panel.
    """
    sections = [section for section in ("weights", "models") if results.get(section)]
    labels = list(dict.fromkeys(label for section in sections for label in results[section]))
    if not labels:
        return
    figure = Figure(figsize=(5.5 * len(sections), 4.0 * len(labels)), dpi=150, layout="constrained")
    panels = figure.subplots(len(labels), len(sections), squeeze=False)
    for line, label in zip(panels, labels, strict=True):
        for axes, section in zip(line, sections, strict=True):
            rows = results[section].get(label, [])
            if section == "weights":
                _draw(axes, totals(rows), "rel_mse")
                title, y = f"Weights: {label}", "relative MSE"
            else:
                rows = [row for row in rows if row["mode"] == "uniform"]
                _draw(axes, [row for row in rows if row["method"] is not None], "bits_per_byte")
                for row in rows:
                    if row["method"] is None:
                        loss = row["bits_per_byte"]
                        axes.axhline(loss, color="black", linewidth=0.8, linestyle="--", label="uncompressed")
                title, y = f"Matrices compressed: {label}", "bits per byte"
            finish(axes, title, "bits a value, all included", y)
            if axes.has_data():
                axes.set_yscale("log")
                axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw(axes: Any, rows: Sequence[Row], column: str) -> None:
    shown = [method for method in dict.fromkeys(row["method"] for row in rows) if not method.endswith(ROTATED)]
    for colour, method in zip(PALETTE * math.ceil(len(shown) / len(PALETTE)), shown, strict=False):
        own = sorted((row["bits"], row[column]) for row in rows if row["method"] == method)
        style = ":" if method.endswith(SHUFFLED) else "-"
        axes.plot(*zip(*own, strict=True), color=colour, marker="o", markersize=3, linestyle=style, label=method)
