"""What `eval/bench_decode.py` says about its rows: bars, tables and the figure, from rows alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from eval.bench import PALETTE, Bar, Row, bars_table, find, finish, markdown_table, record_lines, worst

PAIRS = ("small", "medium", "table3")
MODELS = {"dlcm": "DLCM", "llama": "LLaMA"}
RATIO = 4.0  # that bars and figure look at
SHORT, LONG, LARGE_BATCH = 1024, 32768, 16
IDENTITY = ("part", "pair", "model", "ratio", "context", "batch", "compiled", "dtype", "reading")  # of a row


class Couple(NamedTuple):
    """The DLCM's row of a case and its LLaMA's; empty where there is none."""

    ours: Row
    theirs: Row

    @property
    def case(self) -> Row:
        return self.ours or self.theirs

    def ratio(self, column: str) -> float | None:
        """DLCM over LLaMA; None where one of them has no such number."""
        ours, theirs = self.ours.get(column), self.theirs.get(column)
        return ours / theirs if ours is not None and theirs else None


def merge_rows(sources: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of several calls; what a later one measured again replaces what the earlier ones had."""
    return list({tuple(row.get(name) for name in IDENTITY): row for rows in sources for row in rows}.values())


def couples(rows: Sequence[Row], part: str) -> Iterator[Couple]:
    """The cases of a part, by pair, R, context and batch."""
    of_part = [row for row in rows if row["part"] == part]
    cases = {(row["pair"], row["context"], row["batch"], row.get("compiled")) for row in of_part}
    for pair, context, batch, compiled in sorted(cases, key=lambda case: (_rank(case[0]), case[3] or False, *case[1:])):
        own = [row for row in of_part if (row["pair"], row["context"], row["batch"]) == (pair, context, batch)]
        own = [row for row in own if row.get("compiled") == compiled]
        theirs = find(own, model="llama")
        ours = sorted((row for row in own if row["model"] == "dlcm"), key=lambda row: row["ratio"])
        yield from (Couple(row, theirs) for row in ours or [{}])


def couple(rows: Sequence[Row], part: str, pair: str, context: int, batch: int) -> Couple:
    """One case, at the usual R, with blocks that are not compiled."""
    wanted: Row = {"part": part, "pair": pair, "context": context, "batch": batch}
    wanted |= {"compiled": False} if part == "prefill" else {}
    return Couple(find(rows, model="dlcm", ratio=RATIO, **wanted), find(rows, model="llama", **wanted))


def _rank(pair: str) -> tuple[int, str]:
    return PAIRS.index(pair) if pair in PAIRS else len(PAIRS), pair


def must_show(rows: Sequence[Row]) -> dict[str, Bar]:
    """The bars, from rows alone."""
    usual = [pair for pair in couples(rows, "decode") if pair.ours.get("ratio") == RATIO]
    of_table3 = [pair for pair in usual if pair.case["pair"] == "table3"]
    measured = [ratio for pair in of_table3 if (ratio := pair.ratio("kv_bytes_per_token")) is not None]
    long = {pair.case["batch"]: pair.ratio("tokens_per_second") for pair in of_table3 if pair.case["context"] == LONG}
    batch = max((b for b, ratio in long.items() if ratio is not None and b <= LARGE_BATCH), default=None)
    which = f"batch {LARGE_BATCH}"
    if batch != LARGE_BATCH:
        which += f", or the largest that fits both: {batch}" if batch else ", or the largest that fits both"
    rate = "tokens per second, DLCM over LLaMA, R = 4"
    short, of_medium, prefill = (
        couple(rows, *case).ratio("tokens_per_second")
        for case in (
            ("decode", "table3", SHORT, 1),
            ("decode", "medium", LONG, LARGE_BATCH),
            ("prefill", "table3", LONG, 1),
        )
    )
    return {
        "kv_bytes_table3_r4: bytes of keys and values per token of context, DLCM over LLaMA, R = 4": Bar(
            worst(measured, at_most=True), 0.5, at_most=True
        ),
        f"decode_table3_batch1_1k: {rate}, 1,024 tokens, batch 1": Bar(short, 1.0),
        f"decode_table3_batch16_32k: {rate}, 32,768 tokens, {which}": Bar(long[batch] if batch else None, 1.5),
        f"decode_medium_batch16_32k: {rate}, 32,768 tokens, batch 16": Bar(of_medium, 1.5),
        f"prefill_table3_32k: {rate}, a prompt of 32,768 tokens, batch 1, blocks not compiled": Bar(prefill, 1.2),
    }


def page(recorded: dict[str, Any], bars: dict[str, Bar], rows: Sequence[Row]) -> str:
    """The results as markdown."""
    measured = {row["part"] for row in rows}
    parts = [
        "# Decoding and prefill",
        record_lines(recorded),
        "Written by `eval/bench_decode.py`, whose docstring says what a step is. Weights and caches in bf16; on a GPU "
        "steps are CUDA graphs. R is tokens per concept.",
    ]
    if measured & {"decode", "prefill"}:
        parts += ["## Bars", bars_table(bars)]
    if "decode" in measured:
        parts += [
            "![Decoding speed by context and batch, bytes by token of context](decode.png)",
            "## Decoding, DLCM over LLaMA",
            "Tokens per second. `DLCM alone`: the LLaMA does not fit.",
            ratio_table(rows),
            "## Decoding",
            speed_table(rows, "decode"),
            "## What a step reads",
            "Weights and keys and values, by the closed form: what a step needs to read, and how fast it was read. A "
            "speed ratio is the ratio of bytes times the ratio of these rates. The backbone's weights are read in "
            "steps where a segment closes in some row, in the share of steps shown: at batch 1 in one of R, in a large "
            "batch in all.",
            bytes_read_table(rows),
            "## Bytes per token of context",
            "Of the entries that rows have, at the longest context measured. Whole: with encoder states, what the "
            "backbone made of each concept, counts and ends of slots.",
            context_bytes_table(rows),
        ]
    if "prefill" in measured:
        parts += [
            "## Prefill",
            "Prompts in one pass into a new cache, logits of the last token. TFLOP/s and MFU count what the models "
            "need.",
            prefill_table(rows),
        ]
    if "trained" in measured:
        parts += [
            "## Trained models on text",
            "Steps read the text, in windows that each model takes for one document; boundaries are the model's own.",
            speed_table(rows, "trained"),
        ]
    if "flips" in measured:
        parts += ["## Threshold flips", FLIPS, flips_table(rows)]
    parts += ["## What did not run", notes_table(rows)]
    return "\n\n".join(parts) + "\n"


FLIPS = (
    "A text is read by the parallel forward pass, and through a cache: token by token (steps), or in chunks. A flip "
    "is a token whose boundary decision differs between two arithmetically different but equal computations, because "
    "p lies within rounding of the threshold. The cache keeps the decision that was made when the token was read and "
    "never revises it, so everything later is consistent with it. Distance is |p - threshold| in the parallel pass; "
    "each flipped token's is in decode.json. Logits are compared at the positions before the first flip of each row."
)


def summary(rows: Sequence[Row]) -> str:
    """A few tables for the terminal."""
    tables = [flips_table(rows)] if any(row["part"] == "flips" for row in rows) else []
    return "\n\n".join([*tables, prefill_table(rows), notes_table(rows), ratio_table(rows)])


# Tables


def ratio_table(rows: Sequence[Row]) -> str:
    """Decoding speed, one line for each pair, R and batch."""
    found = list(couples(rows, "decode"))
    contexts = sorted({pair.case["context"] for pair in found})
    lines: dict[tuple[str, float | None, int], dict[int, str | None]] = {}
    for pair in found:
        line = lines.setdefault((pair.case["pair"], pair.ours.get("ratio"), pair.case["batch"]), {})
        line[pair.case["context"]] = _compared(pair)
    ordered = sorted(lines.items(), key=lambda item: (_rank(item[0][0]), item[0][1] or 0, item[0][2]))
    return markdown_table(
        ("pair", "R", "batch", *(f"{context:,} tokens" for context in contexts)),
        (
            (name, _shown(ratio, "g"), str(batch), *(line.get(context) for context in contexts))
            for (name, ratio, batch), line in ordered
        ),
    )


def _compared(pair: Couple) -> str | None:
    if (ratio := pair.ratio("tokens_per_second")) is not None:
        return f"{ratio:.2f}"
    return "DLCM alone" if "tokens_per_second" in pair.ours and "needs_gb" in pair.theirs else None


CASE: dict[str, Callable[[Couple], str | None]] = {
    "pair": lambda pair: pair.case["pair"],
    "R": lambda pair: _shown(pair.ours.get("tokens_per_concept"), ".2f"),
    "tokens of context": lambda pair: f"{pair.case['context']:,}",
    "batch": lambda pair: str(pair.case["batch"]),
}


def speed_table(rows: Sequence[Row], part: str) -> str:
    columns = (
        ("tokens / s", "tokens_per_second", ",.0f"),
        ("ms / step, mean", "mean_ms", ".3f"),
        ("ms / step, p50", "p50_ms", ".3f"),
        ("peak GB", "peak_gb", ".1f"),
    )
    return _side_by_side((pair for pair in couples(rows, part) if _measured(pair)), CASE, columns)


def prefill_table(rows: Sequence[Row]) -> str:
    case = CASE | {"blocks": lambda pair: "compiled" if pair.case["compiled"] else "as they are"}
    columns = (
        ("tokens / s", "tokens_per_second", ",.0f"),
        ("ms", "ms", ",.1f"),
        ("TFLOP/s", "tflops", ",.0f"),
        ("MFU", "mfu", ".1%"),
        ("peak GB", "peak_gb", ".1f"),
    )
    return _side_by_side((pair for pair in couples(rows, "prefill") if _measured(pair)), case, columns)


def _side_by_side(
    found: Iterable[Couple],
    case: dict[str, Callable[[Couple], str | None]],
    columns: Sequence[tuple[str, str, str]],
) -> str:
    names = [f"{name}, {model}" for name, *_ in columns for model in MODELS.values()]
    return markdown_table(
        (*case, *names, "DLCM over LLaMA"),
        (
            (
                *(cell(pair) for cell in case.values()),
                *(_shown(row.get(column), form) for _, column, form in columns for row in pair),
                _shown(pair.ratio("tokens_per_second"), ".2f"),
            )
            for pair in found
        ),
    )


def _measured(pair: Couple) -> bool:
    return any("tokens_per_second" in row for row in pair)


def bytes_read_table(rows: Sequence[Row]) -> str:
    """Bytes and rates of decoding, and what they say about its speed."""

    def read(row: Row) -> str | None:
        if "read_gb" not in row:
            return None
        return f"{row['read_weights_gb']:.3g} + {row['read_gb'] - row['read_weights_gb']:.3g}"

    def rate(row: Row) -> str | None:
        if "bandwidth_tbs" not in row:
            return None
        share = row["bandwidth_share"]
        return f"{row['bandwidth_tbs']:.2f}" + ("" if share is None else f" ({share:.0%})")

    models = MODELS.values()
    return markdown_table(
        (
            *CASE,
            "steps with backbone",
            *(f"GB / step, weights + cache, {model}" for model in models),
            "GB / step, LLaMA over DLCM",
            *(f"TB/s (share of the datasheet's), {model}" for model in models),
            "TB/s, DLCM over LLaMA",
            "tokens / s, DLCM over LLaMA",
            "why it loses",
        ),
        (
            (
                *(cell(pair) for cell in CASE.values()),
                _shown(pair.ours.get("reasoning_share"), ".0%"),
                *(read(row) for row in pair),
                _shown(_inverse(pair.ratio("read_gb")), ".2f"),
                *(rate(row) for row in pair),
                _shown(pair.ratio("bandwidth_tbs"), ".2f"),
                _shown(pair.ratio("tokens_per_second"), ".2f"),
                why_it_loses(pair),
            )
            for pair in couples(rows, "decode")
            if _measured(pair)
        ),
    )


def why_it_loses(pair: Couple) -> str | None:
    """What makes the DLCM's decoding the slower one; None where it is not."""
    speed, read, rate = (pair.ratio(column) for column in ("tokens_per_second", "read_gb", "bandwidth_tbs"))
    if speed is None or read is None or rate is None or speed >= 1:
        return None
    weights = [row["read_weights_gb"] for row in pair]
    reasons = []
    if read > 1:
        reasons.append(f"reads {read:.2f} times as much (weights {weights[0]:.3g} GB, not {weights[1]:.3g})")
    if rate < 1:
        reasons.append(f"reads at {rate:.2f} of the rate")
    return ", ".join(reasons)


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None


def context_bytes_table(rows: Sequence[Row]) -> str:
    def line(pair: Couple) -> tuple[str | None, ...]:
        cells = [
            _shown(row.get(column), ",.0f")
            for column in ("kv_bytes_per_token", "kv_bytes_per_token_closed_form", "cache_bytes_per_token")
            for row in pair
        ]
        ratios = (pair.ratio(column) for column in ("kv_bytes_per_token", "cache_bytes_per_token"))
        return pair.case["pair"], _shown(pair.ours.get("ratio"), "g"), *cells, *(_shown(x, ".3f") for x in ratios)

    names = ("keys and values", "by the closed form", "whole cache")
    return markdown_table(
        (
            "pair",
            "R",
            *(f"{name}, {model}" for name in names for model in MODELS.values()),
            "keys and values, DLCM over LLaMA",
            "whole cache, DLCM over LLaMA",
        ),
        map(line, longest_contexts(rows)),
    )


def longest_contexts(rows: Sequence[Row]) -> list[Couple]:
    """For each pair and R the longest context that was measured, of both models if there is one."""
    best: dict[tuple[str, float | None], Couple] = {}
    for pair in couples(rows, "decode"):
        key = pair.case["pair"], pair.ours.get("ratio")
        numbers = sum("kv_bytes_per_token" in row for row in pair)
        if numbers and (key not in best or numbers >= sum("kv_bytes_per_token" in row for row in best[key])):
            best[key] = pair
    return list(best.values())


def flips_table(rows: Sequence[Row]) -> str:
    names = (
        *("checkpoint", "dtype", "read in", "rows x tokens", "boundaries", "flips", "largest distance of one"),
        *("tokens as near", "largest difference of p", "positions before", "largest difference of logits"),
    )
    return markdown_table(
        names,
        (
            (
                row["pair"],
                row["dtype"],
                f"{row['reading']} of {row['piece']}" if row["reading"] == "chunks" else row["reading"],
                f"{row['batch']:,} x {row['context']:,}",
                f"{row['boundaries']:,}",
                f"{row['flips']:,} of {row['tokens']:,}",
                _shown(row["largest_distance"], ".1e"),
                f"{row['tokens_within']:,}",
                f"{row['largest_probability_difference']:.1e}",
                f"{row['tokens_before_flips']:,}",
                _shown(row["largest_logit_difference"], ".1e"),
            )
            for row in rows
            if row["part"] == "flips" and "flips" in row
        ),
    )


def notes_table(rows: Sequence[Row]) -> str:
    return markdown_table(
        ("part", "pair", "model", "R", "tokens of context", "batch", "why"),
        (
            (
                row["part"],
                row["pair"],
                MODELS[row["model"]],
                _shown(row["ratio"], "g"),
                f"{row['context']:,}",
                str(row["batch"]),
                row["note"],
            )
            for row in rows
            if "note" in row
        ),
    )


def _shown(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


# Figure


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Writes a PNG: decoding speed by context, a panel for each pair, a curve for each batch; and bytes per token."""
    usual = [pair for pair in couples(rows, "decode") if pair.ours.get("ratio") == RATIO]
    names = list(dict.fromkeys(pair.case["pair"] for pair in usual)) or list(PAIRS[-1:])
    figure = Figure(figsize=(4.2 * (len(names) + 1), 4.4), dpi=150, layout="constrained")
    *panels, last = figure.subplots(1, len(names) + 1)
    batches = sorted({pair.case["batch"] for pair in usual if pair.ratio("tokens_per_second") is not None})
    for name, axes in zip(names, panels, strict=True):
        _draw_ratios(axes, name, [pair for pair in usual if pair.case["pair"] == name], batches)
        axes.sharey(panels[0])
    panels[0].set_ylabel("tokens per second, DLCM over LLaMA")
    panels[0].set_ylim(bottom=0)
    _draw_bytes(last, [pair for pair in longest_contexts(rows) if pair.ours.get("ratio") == RATIO])
    for axes in (*panels, last):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _draw_ratios(axes: Axes, name: str, of_pair: Sequence[Couple], batches: Sequence[int]) -> None:
    axes.axhline(1, color="black", linewidth=1, linestyle="--")
    contexts = sorted({pair.case["context"] for pair in of_pair})
    for index, batch in enumerate(batches):
        points = {
            pair.case["context"]: (ratio, _inverse(pair.ratio("read_gb")))
            for pair in of_pair
            if pair.case["batch"] == batch and (ratio := pair.ratio("tokens_per_second")) is not None
        }
        if points:
            colour = PALETTE[index % len(PALETTE)]
            measured, by_bytes = zip(*points.values(), strict=True)
            axes.plot(list(points), measured, color=colour, marker="o", markersize=4, label=f"batch {batch}")
            axes.plot(list(points), by_bytes, color=colour, marker="x", markersize=4, linestyle=":", linewidth=1)
    if contexts:
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts)
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.plot([], [], color="grey", marker="x", markersize=4, linestyle=":", linewidth=1, label="by bytes alone")
    finish(axes, f"Decoding, {name}, R = {RATIO:g}", "tokens of context", "")


def _short(tokens: float, _: int | None = None) -> str:
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def _draw_bytes(axes: Axes, found: Sequence[Couple]) -> None:
    width, highest = 0.38, 1.0
    for offset, (colour, (model, label)) in enumerate(zip((PALETTE[0], PALETTE[2]), MODELS.items(), strict=True)):
        at = [index + (offset - 0.5) * width for index in range(len(found))]
        rows = [pair.ours if model == "dlcm" else pair.theirs for pair in found]
        kv, whole = (
            [row.get(column, 0.0) / 1024 for row in rows] for column in ("kv_bytes_per_token", "cache_bytes_per_token")
        )
        rest = [x - y for x, y in zip(whole, kv, strict=True)]
        highest = max([highest, *whole])
        axes.bar(at, kv, width, color=colour, label=f"{label}, keys and values")
        bars = axes.bar(at, rest, width, bottom=kv, color=colour, alpha=0.4)
        axes.bar_label(bars, [f"{x:.1f}" if x else "" for x in whole], fontsize=8)
    if found:
        axes.bar([0], [0], color="grey", alpha=0.4, label="states and bookkeeping")
    axes.set_xticks(range(len(found)), [pair.case["pair"] for pair in found])
    axes.set_ylim(0, 1.4 * highest)  # room for the legend
    finish(axes, f"Cache per token of context, R = {RATIO:g}", "", "KiB")
