"""What `eval/bench_training.py` says about its rows: bars, tables and the figure, from rows alone."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eval.bench import PALETTE, Bar, Row, bars_table, find, finish, markdown_table, record_lines, worst

PARTS = ("throughput", "accumulation", "breakdown", "length")
PAIRS = ("small", "medium", "table3")
MODELS = {
    ("dlcm", "ragged"): "DLCM",
    ("dlcm", "replicated"): "DLCM, replication",
    ("llama", None): "LLaMA",
}
STAGES = (
    "embedding",
    "encoder",
    "segmentation and pooling",
    "backbone",
    "cross-attention",
    "decoder",
    "head and loss",
    "optimiser",
)
LONG = 8192  # tokens at and above which the DLCM's step is to be the faster one


def merge_rows(sources: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of several calls; what a later one measured again replaces what the earlier ones had."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for rows in sources:
        own: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            length = row.get("sequence_length") if row["part"] == "length" else None
            key = (row["part"], row["pair"], row["model"], row["cross_attention"], length, row["overrides"])
            own.setdefault(key, []).append(row)
        groups |= own
    return [row for group in groups.values() for row in group]


def as_configured(rows: Sequence[Row]) -> list[Row]:
    """Rows that no override tells apart from the configurations."""
    return [row for row in rows if not row["overrides"]]


def throughput(rows: Sequence[Row], pair: str, model: tuple[str, str | None], part: str = "throughput") -> Row:
    return find(as_configured(rows), part=part, pair=pair, model=model[0], cross_attention=model[1])


def at_length(rows: Sequence[Row], length: int, model: tuple[str, str | None]) -> Row:
    return find(as_configured(rows), part="length", sequence_length=length, model=model[0], cross_attention=model[1])


def ratio(ours: Row, theirs: Row, column: str) -> float | None:
    """None where one of them has no such number."""
    return ours[column] / theirs[column] if column in ours and column in theirs else None


DLCM, REPLICATED, LLAMA = MODELS


def must_show(rows: Sequence[Row]) -> dict[str, Bar]:
    """The bars, from rows alone; the DLCM's are those with the ragged kernel."""
    bars: dict[str, Bar] = {}
    for pair in PAIRS:
        ours, theirs = (throughput(rows, pair, model) for model in (DLCM, LLAMA))
        bars[f"achieved TFLOP/s, DLCM over LLaMA, {pair}"] = Bar(ratio(ours, theirs, "tflops"), 0.95)
    for pair in ("medium", "table3"):
        bars[f"MFU of the LLaMA, {pair}"] = Bar(throughput(rows, pair, LLAMA).get("mfu"), 0.45)
    ours, theirs = (throughput(rows, "table3", model) for model in (DLCM, LLAMA))
    bars["tokens per second, DLCM over LLaMA, table3, 8,192 tokens, one micro-batch a step"] = Bar(
        ratio(ours, theirs, "tokens_per_second"), 1.15
    )
    accumulated = tuple(throughput(rows, "table3", model, "accumulation") for model in (DLCM, LLAMA))
    bars["tokens per second, DLCM over LLaMA, table3, 8,192 tokens, micro-batches as configured"] = Bar(
        ratio(accumulated[0], accumulated[1], "tokens_per_second"), 1.15
    )
    lengths = [length for length in lengths_in(rows) if length >= LONG]
    bars["tokens per second, DLCM over LLaMA, table3, 8,192 tokens and more, blocks recomputed, least"] = Bar(
        worst(ratio(at_length(rows, n, DLCM), at_length(rows, n, LLAMA), "tokens_per_second") for n in lengths), 1.15
    )
    bars["GB at the peak, the larger of DLCM and LLaMA, table3, 8,192 tokens"] = Bar(
        worst((row.get("peak_gb") for row in (ours, theirs, *accumulated)), at_most=True), 80.0, at_most=True
    )
    return bars


def page(recorded: dict[str, Any], bars: dict[str, Bar], rows: Sequence[Row]) -> str:
    """The results as markdown."""
    parts = [
        "# Training steps",
        record_lines(recorded),
        "Written by `eval/bench_training.py`, whose docstring says what a step is. Random tokens, one document a row. "
        "TFLOP/s and MFU count what the models need at the realised tokens per concept, 3 forwards a step: not "
        "replication, nor empty room for concepts, nor passes run again for want of room (misses), nor recomputed "
        "blocks.",
        "## Bars",
        bars_table(bars),
        "![TFLOP/s by pair, time by stage, time by length](training.png)",
        "## Throughput",
        throughput_table(rows),
    ]
    if len(as_configured(rows)) < len(rows):
        parts += ["## Other settings", other_settings_table(rows)]
    for pair in PAIRS:
        if any(row["part"] == "breakdown" and row["pair"] == pair for row in rows):
            parts += [
                f"## A step by stage, {pair}",
                "Forward / backward, ms. Boundary detector, layout with its host synchronisation, and pooling are one "
                "stage; cross-attention includes norm and smoothing of the concepts before it; the head's gradients "
                "are computed with its loss, in the forward pass.",
                breakdown_table(rows, pair),
            ]
    parts += [
        "## Length of documents, Table 3 pair",
        "65,536 tokens in a step, as one document or many; blocks recomputed in the backward pass, for both models.",
        length_table(rows),
        "## What did not run",
        notes_table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """A few tables for the terminal."""
    pairs = [pair for pair in PAIRS if any(row["part"] == "breakdown" and row["pair"] == pair for row in rows)]
    tables = [breakdown_table(rows, pair) for pair in pairs]
    tables += [length_table(rows), notes_table(rows), other_settings_table(rows), throughput_table(rows)]
    return "\n\n".join(tables)


COLUMNS: dict[str, Callable[[Row], str | None]] = {
    "documents x tokens": lambda row: f"{row['documents']} x {row['sequence_length']:,}",
    "micro-batches": lambda row: str(row["micro_batches"]),
    "parameters": lambda row: f"{row['parameters'] / 1e6:,.0f} M",
    "R": lambda row: _shown(row["tokens_per_concept"], ".2f"),
    "GFLOP / token": lambda row: _shown(row["flops_per_token"] / 1e9, ".2f"),
    "tokens / s": lambda row: _shown(row["tokens_per_second"], ",.0f"),
    "ms / step": lambda row: _shown(row["step_ms"], ",.1f"),
    "TFLOP/s": lambda row: _shown(row["tflops"], ",.0f"),
    "MFU": lambda row: _shown(row["mfu"], ".1%"),
    "peak GB": lambda row: _shown(row["peak_gb"], ".1f"),
    "reserved GB": lambda row: _shown(row["reserved_gb"], ".1f"),
    "misses / steps": lambda row: f"{row['misses']} / {row['steps']}" if row["tokens_per_concept"] else None,
}


def throughput_table(rows: Sequence[Row]) -> str:
    return markdown_table(
        ("pair", "model", *COLUMNS),
        (
            (pair, MODELS[model], *(cell(row) for cell in COLUMNS.values()))
            for pair in PAIRS
            for part in ("throughput", "accumulation")
            for model in MODELS
            if "tflops" in (row := throughput(rows, pair, model, part))
        ),
    )


def other_settings_table(rows: Sequence[Row]) -> str:
    """Throughput under overrides; the last column compares with the pair's LLaMA as configured."""

    def over_llama(row: Row) -> str | None:
        return _shown(ratio(row, throughput(rows, row["pair"], LLAMA, row["part"]), "tokens_per_second"), ".3f")

    return markdown_table(
        ("pair", "model", "settings", *COLUMNS, "tokens / s over LLaMA as configured"),
        (
            (
                row["pair"],
                MODELS[row["model"], row["cross_attention"]],
                f"`{row['overrides']}`",
                *(cell(row) for cell in COLUMNS.values()),
                over_llama(row),
            )
            for row in rows
            if row["overrides"] and row["part"] in ("throughput", "accumulation") and "tflops" in row
        ),
    )


def breakdown_table(rows: Sequence[Row], pair: str) -> str:
    def cell(stage: str, model: tuple[str, str | None]) -> str | None:
        of_stage = stage_times(rows, pair, model).get(stage)
        return " / ".join(f"{ms:.2f}" for ms in of_stage.values()) if of_stage else None

    def total(model: tuple[str, str | None]) -> str:
        return f"{sum(sum(stage.values()) for stage in stage_times(rows, pair, model).values()):.1f}"

    return markdown_table(
        (f"stage, {pair}", *MODELS.values()),
        [
            *((stage, *(cell(stage, model) for model in MODELS)) for stage in STAGES),
            ("all", *(total(model) for model in MODELS)),
        ],
    )


def stage_times(rows: Sequence[Row], pair: str, model: tuple[str, str | None]) -> dict[str, dict[str, float]]:
    """Milliseconds of each stage, by pass."""
    times: dict[str, dict[str, float]] = {}
    for row in as_configured(rows):
        if (row["part"], row["pair"], row["model"], row["cross_attention"]) == (
            "breakdown",
            pair,
            *model,
        ) and "ms" in row:
            times.setdefault(row["stage"], {})[row["pass"]] = row["ms"]
    return times


def lengths_in(rows: Sequence[Row]) -> list[int]:
    return sorted({row["sequence_length"] for row in as_configured(rows) if row["part"] == "length"})


def length_table(rows: Sequence[Row]) -> str:
    def line(length: int) -> tuple[str | None, ...]:
        ours, theirs = (at_length(rows, length, model) for model in (DLCM, LLAMA))
        cells = [
            _shown(row.get(column), form)
            for column, form in (("step_ms", ",.0f"), ("tokens_per_second", ",.0f"), ("mfu", ".1%"), ("peak_gb", ".1f"))
            for row in (ours, theirs)
        ]
        return f"{length:,}", *cells, _shown(ratio(ours, theirs, "tokens_per_second"), ".2f")

    names = ("ms / step", "tokens / s", "MFU", "peak GB")
    return markdown_table(
        ("tokens", *(f"{name}, {model}" for name in names for model in ("DLCM", "LLaMA")), "DLCM over LLaMA"),
        (line(length) for length in lengths_in(rows)),
    )


def notes_table(rows: Sequence[Row]) -> str:
    return markdown_table(
        ("part", "pair", "model", "tokens", "why"),
        (
            (
                row["part"],
                row["pair"],
                MODELS[row["model"], row["cross_attention"]],
                _shown(row.get("sequence_length"), ","),
                row["note"],
            )
            for row in rows
            if "note" in row
        ),
    )


def _shown(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Writes a PNG: TFLOP/s of each pair, a step by stage of the largest pair that has one, and time by length."""
    figure = Figure(figsize=(15, 4.4), dpi=150, layout="constrained")
    rates, stages, lengths = figure.subplots(1, 3)
    _draw_rates(rates, rows)
    _draw_stages(stages, rows)
    _draw_lengths(lengths, rows)
    for axes in (rates, stages, lengths):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_rates(axes: Axes, rows: Sequence[Row]) -> None:
    width = 0.8 / len(MODELS)
    for offset, (colour, (model, label)) in enumerate(zip(PALETTE, MODELS.items(), strict=False)):
        values = [throughput(rows, pair, model).get("tflops", 0.0) for pair in PAIRS]
        bars = axes.bar([x + (offset - 1) * width for x in range(len(PAIRS))], values, width, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.0f}" if value else "" for value in values], fontsize=8)
    axes.set_xticks(range(len(PAIRS)), PAIRS)
    axes.margins(y=0.25)
    finish(axes, "Achieved TFLOP/s, of what the model needs", "", "TFLOP/s")


def _draw_stages(axes: Axes, rows: Sequence[Row]) -> None:
    measured = [pair for pair in PAIRS if stage_times(rows, pair, DLCM)]
    if not measured:
        return finish(axes, "A step by stage", "ms", "")
    colours = dict(zip(STAGES, (*PALETTE, "#999999"), strict=True))
    left = dict.fromkeys(MODELS, 0.0)
    for stage in STAGES:
        widths = {
            model: sum(stage_times(rows, measured[-1], model).get(stage, {}).values()) for model in reversed(MODELS)
        }
        starts = [left[model] for model in widths]
        axes.barh(
            [MODELS[model] for model in widths], list(widths.values()), left=starts, color=colours[stage], label=stage
        )
        for model, width in widths.items():
            left[model] += width
    axes.set_xlim(right=1.75 * max(left.values()))  # room for the legend
    return finish(axes, f"A step by stage, {measured[-1]}", "ms, forward, backward and update", "")


def _draw_lengths(axes: Axes, rows: Sequence[Row]) -> None:
    for colour, model in zip((PALETTE[0], PALETTE[2]), (DLCM, LLAMA), strict=True):
        rates = {length: at_length(rows, length, model).get("tokens_per_second") for length in lengths_in(rows)}
        known = {length: 1e6 / rate for length, rate in rates.items() if rate}
        axes.plot(list(known), list(known.values()), color=colour, marker="o", markersize=4, label=MODELS[model])
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths_in(rows))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1024:g}K"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(bottom=0)
    finish(axes, "Table 3 pair, blocks recomputed", "tokens in a document", "µs per token")
