"""What `eval/analysis.py` says about its rows: a page, plots and files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from eval.bench import PALETTE, Row, finish, markdown_table, record, record_lines, write_csv, write_json
from eval.plots import SMOOTHED_SHARE, smooth
from eval.report import with_error, with_interval

NINETY_FIVE = 1.96  # standard errors on each side
MARKERS = "os^Dv<>"
GREY = "0.6"  # of legends that hold for all colours
FEW = 30  # tokens, of which fewer make no point of a plot


@dataclass(frozen=True, slots=True)
class Findings:
    """Rows of each section, checkpoint after checkpoint.

    Attributes:
        text: what was read, and how much.
        checkpoints: what was compared; last the baseline, if there is one.
        positions, content, lengths, surprisal, classes, compression: as in the CSV files of these names.
        length_numbers, correlations: one row a checkpoint.
    """

    text: Row
    checkpoints: list[Row]
    positions: list[Row]
    content: list[Row]
    lengths: list[Row]
    length_numbers: list[Row]
    surprisal: list[Row]
    correlations: list[Row]
    classes: list[Row]
    compression: list[Row]

    @property
    def names(self) -> list[str]:
        """The checkpoints that form concepts."""
        return [row["checkpoint"] for row in self.length_numbers]

    @property
    def baseline(self) -> str | None:
        """The checkpoint that they are compared with."""
        return self.checkpoints[-1]["checkpoint"] if len(self.checkpoints) > len(self.names) else None


TABLES = ("checkpoints", "positions", "content", "lengths", "surprisal", "classes", "compression")


def write_report(output: Path, found: Findings) -> None:
    """Writes report.md, report.json, the tables as CSV, and the plots; prints what was compared, and the files."""
    recorded = record()
    written = [output / name for name in ("report.md", "report.json")]
    write_json(written[1], recorded, {}, **asdict(found))
    for name in TABLES:
        if rows := getattr(found, name):
            written.append(output / f"{name}.csv")
            write_csv(written[-1], rows)
    for name, plot in PLOTS.items():
        if getattr(found, name):
            written.append(output / f"{name}.png")
            figure = plot(found)
            figure.savefig(written[-1])
    written[0].write_text(f"{page(found)}\n\n{record_lines(recorded)}\n", encoding="utf-8")
    print(checkpoints_table(found), "\n\nFiles:", *(f"\n  {path}" for path in written), sep="")


# Page


def page(found: Findings) -> str:
    """The report."""
    text, baseline = found.text, found.baseline
    parts = [
        "# Where loss and boundaries lie",
        f"Text: {text['name']}; {text['tokens']:,} tokens of {text['documents']:,} documents, read in windows of "
        f"{text['window']:,}, which make {text['parts']:,} parts that do not see each other. The first token of a part "
        f"is predicted by nothing and always a boundary; the other {text['scored']:,} are scored. Boundaries are "
        "thresholded, as at inference. Losses are in nats per token; ± is a standard error and [ ] a 95 % interval, "
        "both with documents as what varies: of few documents they say little.",
        checkpoints_table(found),
        *unequal_training(found),
        "## Loss by position in the concept",
        POSITION,
    ]
    for name in found.names:
        parts += [f"### {name}", positions_table(_of(found.positions, name), name, baseline)]
    parts += [
        "![](positions.png)",
        "## Tokens per concept by type of text",
        CONTENT,
        content_table(found),
        "## Lengths of concepts",
        LENGTHS,
        lengths_table(found.length_numbers),
        "![](lengths.png)",
        "## Boundaries and surprisal",
        f"p, and how often a token is a boundary, against the token's surprisal: "
        f"{f'the loss of {baseline}' if baseline else 'what it cost the DLCM itself'}. p is of the token itself, which "
        "the detector has seen. Bins hold equally many tokens.",
        surprisal_table(found),
        correlation_line(found),
        "![](surprisal.png)",
        "## Classes of tokens",
        CLASSES,
    ]
    for name in found.names:
        parts += [f"### {name}", classes_table(_of(found.classes, name), name, baseline)]
    parts += ["![](classes.png)", "## Compression over training", COMPRESSION]
    parts += ["![](compression.png)"] if found.compression else ["No metrics lie beside the checkpoints."]
    return "\n\n".join(parts)


POSITION = (
    "The paper's Fig. 7. A token's position is the number of tokens of its own concept that come before it, and its "
    "loss is what it cost to predict it. Under `closed` visibility a boundary opens a concept, and its token is at 0; "
    "under `inclusive` it ends one, and the token after it is at 0. The paper does not say what it counts: it has "
    "boundaries open segments and speaks of the tokens a concept begins with, so probably this, under `closed`. Had it "
    "counted the place of the token that predicts, its position i would, where the concept goes on, be i + 1 here. The "
    "DLCM decides about a boundary in sight of the token itself, so that different positions hold different tokens; "
    "the difference is of the same ones. Plots leave out what has fewer than 30 tokens."
)
CONTENT = (
    "The paper's Table 5. Types follow from the labels `domain` and `source` of the documents, by the table in "
    "`eval/analysis.py`: casual is running text that is not technical (novels, addresses, scripture, texts of games, "
    "Chinese poems), and what the labels do not place is other. A type without text is a dash."
)
LENGTHS = (
    "In tokens, each concept counting once. Geometric: if every token were a boundary with the same probability, that "
    "of as many concepts. Parts end concepts, too."
)
CLASSES = (
    "Classes follow from the text of the token and, for the start of a word, of the token before; tokens that share a "
    "character are of its class, and a token with letters and other characters is a word. A boundary is counted where "
    "it falls: under `closed` on the first token of a concept, under `inclusive` on the last. Special tokens are those "
    "that end a document; those that begin one are not scored."
)
COMPRESSION = (
    "The paper's Fig. 8. Tokens per concept as the runs recorded them: boundaries are sampled in training, and "
    "thresholded in validation."
)


def checkpoints_table(found: Findings) -> str:
    baseline = found.baseline
    header = ["checkpoint", "R", "visibility", "training tokens", "tokens per concept", "loss"]
    header += [] if baseline is None else [f"less {baseline}"]
    return markdown_table(
        header,
        (
            (
                row["checkpoint"],
                _shown(row.get("target_ratio"), "g"),
                row.get("visibility"),
                f"{row['training_tokens']:,}",
                with_error(row.get("tokens_per_concept"), row.get("tokens_per_concept_error"), 2),
                with_error(row["loss"], row["loss_error"], 4),
                *([] if baseline is None else [_difference(row, 4)]),
            )
            for row in found.checkpoints
        ),
    )


def unequal_training(found: Findings) -> list[str]:
    """What keeps a difference from being one of architecture, if anything does."""
    *dlcms, baseline = found.checkpoints
    if found.baseline is None:
        return []
    names = [row["checkpoint"] for row in dlcms if row["training_tokens"] != baseline["training_tokens"]]
    return [f"! Not trained on as many tokens as {found.baseline}: {', '.join(names)}."] if names else []


def positions_table(rows: Sequence[Row], name: str, baseline: str | None) -> str:
    return markdown_table(
        ("position", "tokens", *_loss_header(name, baseline)),
        ((row["position"], f"{row['tokens']:,}", *_loss_cells(row)) for row in rows),
    )


def classes_table(rows: Sequence[Row], name: str, baseline: str | None) -> str:
    return markdown_table(
        ("class", "tokens", "boundaries", "mean p", *_loss_header(name, baseline)),
        (
            (
                row["class"],
                f"{row['tokens']:,}",
                with_error(row["boundary_rate"], row["boundary_rate_error"], 3),
                with_error(row["probability"], row["probability_error"], 3),
                *_loss_cells(row),
            )
            for row in rows
        ),
    )


def content_table(found: Findings) -> str:
    """A line for each type of text: tokens per concept of all checkpoints side by side, then the paper's."""
    ratios = [f"R = {row['target_ratio']:g}: {row['checkpoint']}" for row in found.checkpoints if "target_ratio" in row]
    lines = []
    for rows in zip(*(_of(found.content, name) for name in found.names), strict=True):
        first = rows[0]
        own = (with_error(row["tokens_per_concept"], row["tokens_per_concept_error"], 2) for row in rows)
        paper = (_shown(first[f"paper_r{ratio}"], ".2f") for ratio in (2, 4, 8))
        size = (f"{first['documents']:,}", f"{first['tokens']:,}") if first["documents"] else (None, None)
        lines.append((first["content"], *size, *own, *paper, first["sources"] or None))
    header = ("text", "documents", "tokens", *ratios, *(f"paper, R = {ratio}" for ratio in (2, 4, 8)), "sources")
    return markdown_table(header, lines)


def lengths_table(rows: Sequence[Row]) -> str:
    return markdown_table(
        ("checkpoint", "concepts", "mean", "median", "geometric's", "99th percentile", "geometric's", "longest"),
        (
            (
                row["checkpoint"],
                f"{row['concepts']:,}",
                f"{row['mean']:.2f}",
                row["median"],
                row["geometric_median"],
                row["percentile_99"],
                row["geometric_percentile_99"],
                row["longest"],
            )
            for row in rows
        ),
    )


def surprisal_table(found: Findings) -> str:
    """A line for each bin: what is in it, then boundaries and p of all checkpoints side by side."""
    names, lines = found.names, []
    by_checkpoint = [_of(found.surprisal, name) for name in names]
    shared = found.baseline is not None  # bins are then those of all checkpoints
    for rows in zip(*by_checkpoint, strict=True):
        line: list[str | None] = [str(rows[0]["bin"]), f"{rows[0]['tokens']:,}"]
        for index, row in enumerate(rows):
            if index == 0 or not shared:
                line.append(f"{row['surprisal_from']:.2f} to {row['surprisal_to']:.2f}")
            line += [with_error(row[name], row[f"{name}_error"], 3) for name in ("boundary_rate", "probability")]
        lines.append(line)
    header = ["bin", "tokens"]
    for index, name in enumerate(names):
        if index == 0 or not shared:
            header.append("nats" if shared else f"{name}: nats")
        header += [f"{name}: boundaries", f"{name}: mean p"]
    return markdown_table(header, lines)


def correlation_line(found: Findings) -> str:
    shown = (
        f"{row['checkpoint']} {with_error(row['rank_correlation'], row['rank_correlation_error'], 3) or '-'}"
        for row in found.correlations
    )
    return f"Rank correlation of p and surprisal: {', '.join(shown)}."


def _loss_header(name: str, baseline: str | None) -> list[str]:
    return [f"loss, {name}"] if baseline is None else [f"loss, {name}", f"loss, {baseline}", "difference"]


def _loss_cells(row: Row) -> list[str | None]:
    cells = [with_error(row["loss"], row["loss_error"], 3)]
    if "difference" in row:
        cells += [with_error(row["baseline_loss"], row["baseline_loss_error"], 3), _difference(row, 3)]
    return cells


def _difference(row: Row, digits: int) -> str | None:
    """With its standard error and interval."""
    if row.get("difference") is None:
        return None
    shown = with_interval({"value": row["difference"], "low": row["low"], "high": row["high"]}, digits)
    error = row["difference_error"]
    return shown if error is None else shown.replace(" [", f" ± {error:.{digits}f} [")


def _shown(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _of(rows: Iterable[Row], name: str) -> list[Row]:
    return [row for row in rows if row["checkpoint"] == name]


# Plots


def plot_positions(found: Findings) -> Figure:
    """Loss by position, and on its right the difference to the baseline's, if there is one."""
    compared = found.baseline is not None
    figure, panels = _figure(2 if compared else 1)
    for style, rows in _styles(found, found.positions):
        rows = [row for row in rows if row["position"] != "all" and row["tokens"] >= FEW]
        x = np.array([int(row["position"].rstrip("+")) for row in rows])
        panels[0].plot(x, [row["loss"] for row in rows], linewidth=1.2, **style)
        if compared:
            theirs = [row["baseline_loss"] for row in rows]
            panels[0].plot(x, theirs, color=style["color"], linewidth=1, linestyle=":")
            _line(panels[1], x, rows, "difference", style)
    if compared:
        panels[0].plot([], [], color=GREY, linewidth=1, linestyle=":", label=f"{found.baseline}, same tokens")
    for axes in panels:
        last = max(int(row["position"].rstrip("+")) for row in found.positions if row["position"] != "all")
        axes.set_xticks(range(last + 1), [*map(str, range(last)), f"{last}+"])
        axes.legend(frameon=False)
    finish(panels[0], "Loss by position", "position in the concept", "nats per token")
    if compared:
        panels[1].axhline(0, color="black", linewidth=0.8)
        finish(panels[1], f"Less the loss of {found.baseline}", "position in the concept", "nats per token")
    return figure


def plot_lengths(found: Findings) -> Figure:
    """Histogram of lengths, and the geometric distribution of as many boundaries."""
    figure, (axes,) = _figure(1)
    for style, rows in _styles(found, found.lengths):
        lengths = np.array([row["length"] for row in rows])
        counts = np.array([row["concepts"] for row in rows])
        some = counts > 0
        axes.plot(lengths[some], counts[some], linestyle="none", **style)
        geometric = np.array([row["geometric"] for row in rows])
        shown = geometric >= 0.5  # concepts
        axes.plot(lengths[shown], geometric[shown], color=style["color"], linewidth=1)
    axes.plot([], [], color=GREY, linewidth=1, label="geometric, of as many concepts")
    axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    finish(axes, "Lengths of concepts", "tokens", "concepts")
    return figure


def plot_surprisal(found: Findings) -> Figure:
    """p and boundaries against surprisal."""
    figure, panels = _figure(2)
    for style, rows in _styles(found, found.surprisal):
        x = np.array([row["surprisal"] for row in rows])
        for axes, column in zip(panels, ("boundary_rate", "probability"), strict=True):
            _line(axes, x, rows, column, style)
    whose = found.baseline or "the DLCM itself"
    titles = ("Boundaries by surprisal", "share of tokens"), ("p by surprisal", "mean p")
    for axes, (title, y) in zip(panels, titles, strict=True):
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
        finish(axes, title, f"surprisal, nats, by {whose}", y)
    return figure


def plot_classes(found: Findings) -> Figure:
    """Boundaries by class of token, and loss: of the DLCM, or less the baseline's if there is one."""
    compared = found.baseline is not None
    figure, panels = _figure(2)
    names = list(dict.fromkeys(row["class"] for row in found.classes if row["tokens"] >= FEW))
    spread = 0.5 / len(found.names)
    for index, (style, rows) in enumerate(_styles(found, found.classes)):
        rows = [row for row in rows if row["tokens"] >= FEW]
        y = np.array([names.index(row["class"]) for row in rows]) + spread * (index - (len(found.names) - 1) / 2)
        columns = ("boundary_rate", "difference" if compared else "loss")
        for axes, column in zip(panels, columns, strict=True):
            x, low_high = _bars(rows, column)
            axes.errorbar(x, y, xerr=low_high, linestyle="none", elinewidth=1.2, capsize=2, **style)
    for axes in panels:
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.legend(frameon=False)
    finish(panels[0], "Boundaries by class of token", "share of tokens", "")
    if compared:
        panels[1].axvline(0, color="black", linewidth=0.8)
        finish(panels[1], f"Loss, less that of {found.baseline}", "nats per token", "")
    else:
        finish(panels[1], "Loss by class of token", "nats per token", "")
    return figure


def plot_compression(found: Findings) -> Figure:
    """Tokens per concept over training."""
    figure, (axes,) = _figure(1)
    targets = {row["checkpoint"]: row["target_ratio"] for row in found.checkpoints if "target_ratio" in row}
    for style, rows in _styles(found, found.compression):
        colour = style["color"]
        axes.axhline(targets[style["label"]], color=colour, linestyle="--", linewidth=0.8)
        tokens, sampled = _curve(rows, "sampled")
        axes.plot(tokens, sampled, color=colour, alpha=0.2, linewidth=0.8)
        if sampled:
            axes.plot(tokens, smooth(sampled, max(1, round(len(sampled) * SMOOTHED_SHARE))), color=colour)
        axes.plot(*_curve(rows, "thresholded"), linestyle="none", **style)
    for label, look in (("sampled in training", "-"), ("thresholded in validation", "o"), ("target", "--")):
        axes.plot([], [], look, color=GREY, markersize=4.5, label=label)
    axes.set_yscale("log", base=2)  # half and double are equally far
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(frameon=False)
    finish(axes, "Compression over training", "training tokens", "tokens per concept")
    return figure


def _curve(rows: Sequence[Row], boundaries: str) -> tuple[list[float], list[float]]:
    """Training tokens, and tokens per concept of such boundaries."""
    chosen = [row for row in rows if row["boundaries"] == boundaries]
    return [row["training_tokens"] for row in chosen], [row["tokens_per_concept"] for row in chosen]


PLOTS: dict[str, Callable[[Findings], Figure]] = {
    "positions": plot_positions,
    "lengths": plot_lengths,
    "surprisal": plot_surprisal,
    "classes": plot_classes,
    "compression": plot_compression,
}


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(11 if panels == 2 else 7, 4.4), dpi=150, layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _styles(found: Findings, rows: Sequence[Row]) -> Iterator[tuple[dict[str, Any], list[Row]]]:
    """Each checkpoint's colour, marker and label, and its rows."""
    for index, name in enumerate(found.names):
        marker, colour = MARKERS[index % len(MARKERS)], PALETTE[index % len(PALETTE)]
        style = {"color": colour, "marker": marker, "markersize": 4.5, "markeredgecolor": "white", "label": name}
        yield style | {"markeredgewidth": 0.5}, _of(rows, name)


def _bars(rows: Sequence[Row], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Values, and how far their intervals reach below and above; nowhere where nobody knows."""
    value = np.array([row[column] for row in rows], dtype=float)
    if column == "difference":
        ends = np.array([(row["low"], row["high"]) for row in rows], dtype=float).T
        return value, np.nan_to_num(np.abs(ends - value)).clip(0)
    error = np.nan_to_num(NINETY_FIVE * np.array([row[f"{column}_error"] for row in rows], dtype=float))
    most = np.inf if column == "loss" else 1 - value  # of shares and probabilities
    return value, np.stack([np.minimum(error, value), np.minimum(error, most)])


def _line(axes: Axes, x: np.ndarray, rows: Sequence[Row], column: str, style: dict[str, Any]) -> None:
    y, low_high = _bars(rows, column)
    axes.errorbar(x, y, yerr=low_high, capsize=2, linewidth=1.2, **style)
