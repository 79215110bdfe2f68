"""Loss against the size of the whole file, and where bits stay: what the sweeps of configs/selfcompress show.

    python -m train.sweep configs/selfcompress/frontier.yaml
    python -m train.sweep configs/selfcompress/stages.yaml
    python -m eval.selfcompress_report runs/selfcompress/frontier [--stages runs/selfcompress/stages]
        [--output docs/results] [--speed]

Reads the sweeps' results, metrics and checkpoints, packs every model of rounded weights and verifies the file (see
eval/selfcompress.py). A size is that of the file, embeddings, norms and head included, those in half precision; the
float model's is that of all its numbers in half precision. It is told in bits for each weight in the blocks of the
float model, also where a model has fewer. Loss is that of the last validation. `--speed` times the smaller models on
this machine's CPU, which should be idle. Writes self_compression.json, .md and .png, and a picture of masks.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dlcm.selfcompress.compact import block_weights
from dlcm.selfcompress.packing import load_packed
from dlcm.selfcompress.quantiser import plain, quantised_linears
from eval.bench import (
    PALETTE,
    Bar,
    Row,
    bars_table,
    finish,
    markdown_table,
    record,
    record_lines,
    tell,
    worst,
    write_json,
)
from eval.loading import EvaluationError, report_errors
from eval.selfcompress import TOLERANCE, export, inspection, speed, verification
from train.checkpoint import latest_checkpoint, load_model, load_model_config
from train.metrics import read_metrics
from train.sweep import RESULTS, read_lines

NAME = "self_compression"
FLOAT, TWO_BITS, TERNARY, LEARNED, NARROW = "float", "fixed-2", "ternary", "learned-", "narrow-"
LOW = "learned-0.6"  # where narrower models are the rivals, and whose masks are shown
MOST_BITS, LEAST_GAIN, SIZE_ERROR = 1.8, 0.05, 0.05
SAME_SIZE = 0.1  # files as large as each other, within
LEAST_SPEEDUP, FEW_WEIGHTS = 1.5, 0.25
BASE_3 = 1.6  # bits of a ternary weight, five to a byte; files here have 2


# Reading


def read_sweep(directory: Path) -> list[Row]:
    """A row for each finished run: its labels, loss and directory.

    Raises:
        EvaluationError: there are none, or of another sweep.
        ConfigError: no sweep wrote them.
    """
    path = directory / RESULTS
    rows = [
        {**line["labels"], "loss": line["validation"]["loss"], "run": str(directory / line["name"])}
        for line in read_lines(path)
    ]
    if not rows or any(row["loss"] is None or {"bits", "seed"} - row.keys() for row in rows):
        raise EvaluationError(
            f"{path}: no finished run, one whose loss is not finite, or none over bits and seeds; run train.sweep on "
            f"configs/selfcompress first"
        )
    return rows


def measured(row: Row, timed: bool) -> Row:
    """What the newest checkpoint of a run weighs, packed; and how the file compares with it."""
    checkpoint = latest_checkpoint(Path(row["run"]))
    model = load_model(checkpoint)
    if not quantised_linears(model):
        return row | {"weights": block_weights(model), "bytes": 2 * model.num_parameters()}
    with tempfile.TemporaryDirectory() as directory:
        packed = Path(directory) / "packed"
        predicted, sizes = export(checkpoint, packed, "fp16")
        found = verification(packed, checkpoint)
        size = {"weights": predicted.weights, "bytes": sizes["file"], "predicted_bytes": predicted.total / 8}
        if row["bits"] == TERNARY:
            size["bytes_in_base_3"] = sizes["file"] - sizes["codes"] + predicted.weights * BASE_3 / 8
        checks = asdict(found) | {"weights_left": found.kept / found.weights}
        if timed and found.kept <= FEW_WEIGHTS * found.weights:
            checks["speedup"] = speed(load_packed(packed, load_model_config(packed)), 32, 128, 1)["speedup"]
        bits = [(matrix["matrix"], matrix["bits"] / matrix["weights"]) for matrix in inspection(packed)]
    return row | checks | size | {"matrices": dict(bits)}


def means(rows: Sequence[Row]) -> dict[str, Row]:
    """Of each setting, means over seeds, and the deviation of losses (None: one seed)."""
    reference = max(row["weights"] for row in rows)
    found = {}
    for bits in dict.fromkeys(row["bits"] for row in rows):
        own = [row for row in rows if row["bits"] == bits]
        losses, size = [row["loss"] for row in own], statistics.mean(row["bytes"] for row in own)
        mean = {"bits": bits, "seeds": len(own), "loss": statistics.mean(losses), "bytes": size}
        mean["deviation"] = statistics.stdev(losses) if len(own) > 1 else None
        for key in ("weights_left", "bytes_in_base_3", "speedup"):
            values = [row[key] for row in own if key in row]
            mean[key] = statistics.mean(values) if values else None
        found[bits] = mean | {"file_bits": 8 * size / reference}
    return found


# Bars


def bars(rows: Sequence[Row]) -> dict[str, Bar]:
    """What must hold, from rows as `measured`."""
    mean, packed = means(rows), [row for row in rows if "mismatches" in row]
    low_enough = [x["loss"] for name, x in mean.items() if name.startswith(LEARNED) and x["file_bits"] <= MOST_BITS]
    against_two = min(low_enough) - mean[TWO_BITS]["loss"] if low_enough and TWO_BITS in mean else None
    gain = None
    if LOW in mean:
        near = [
            x["loss"]
            for name, x in mean.items()
            if name.startswith(NARROW) and abs(x["bytes"] / mean[LOW]["bytes"] - 1) <= SAME_SIZE
        ]
        gain = min(near) - mean[LOW]["loss"] if near else None
    return {
        f"loss of learned bits, at most {MOST_BITS} a weight in the file, above 2 fixed bits, nats": Bar(
            against_two, 0.0, at_most=True
        ),
        "loss of narrower models of fixed bits, of equal files, above 0.6 learned bits, nats": Bar(gain, LEAST_GAIN),
        "weights that differ once unpacked": Bar(worst((x["mismatches"] for x in packed), True), 0, at_most=True),
        "largest error of a logit once what is dead is removed": Bar(
            worst((x["logit_error"] for x in packed), True), TOLERANCE, at_most=True
        ),
        "tokens for which the same next one is likeliest, share": Bar(worst(x["argmax_share"] for x in packed), 0.9999),
        "file against prediction, share": Bar(
            worst((abs(x["bytes"] / x["predicted_bytes"] - 1) for x in packed), True), SIZE_ERROR, at_most=True
        ),
        f"speed-up on the CPU where at most {FEW_WEIGHTS:.0%} of weights are left": Bar(
            worst(x["speedup"] for x in packed if "speedup" in x), LEAST_SPEEDUP
        ),
    }


# Stages


def stage_rows(rows: Sequence[Row]) -> list[Row]:
    """Where the bits of a DLCM are: of each setting and stage, bits a weight at the end, the share of weights without
    any, and by which part of the run half of the first bits were gone; means over seeds, None where they never were.
    """
    found = []
    for bits in dict.fromkeys(row["bits"] for row in rows if row["bits"].startswith(LEARNED)):
        runs = [training_lines(row) for row in rows if row["bits"] == bits]
        for stage in [key.partition("/")[2] for key in runs[0][-1] if key.startswith("weight_bits/")]:
            key = f"weight_bits/{stage}"
            halved = [_first(lines, key, lines[0][key] / 2) for lines in runs]
            row = {"bits": bits, "stage": stage, "seeds": len(runs)}
            row["weight_bits"] = statistics.mean(lines[-1][key] for lines in runs)
            row["dead"] = statistics.mean(lines[-1][f"dead/{stage}"] for lines in runs)
            known = [part for part in halved if part is not None]
            row["halved_at"] = statistics.mean(known) if len(known) == len(runs) else None
            found.append(row)
    return found


def training_lines(row: Row) -> list[Row]:
    """What a run logged of training."""
    return [line for line in read_metrics(Path(row["run"])) if line["kind"] == "train"]


def _first(lines: Sequence[Row], key: str, below: float) -> float | None:
    return next((line["step"] / lines[-1]["step"] for line in lines if line[key] <= below), None)


def stage_lines(rows: Sequence[Row]) -> str:
    """What the stages' rows say."""
    table = markdown_table(
        ("target", "stage", "bits a weight", "weights without bits", "half gone at"),
        [
            (
                f"{row['bits']}, {row['stage']}",
                row["stage"],
                f"{row['weight_bits']:.3f}",
                f"{row['dead']:.1%}",
                None if row["halved_at"] is None else f"{row['halved_at']:.1%} of steps",
            )
            for row in rows
        ],
    )
    said = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        own = sorted((row for row in rows if row["bits"] == bits), key=lambda row: row["weight_bits"])
        order = ", ".join(f"{row['stage']} ({row['weight_bits']:.2f})" for row in own)
        said.append(f"At {bits.removeprefix(LEARNED)} bits, from fewest to most: {order}.")
    return "\n".join(["## Where a DLCM's bits are", "", table, "", *said])


# Writing


def frontier_table(mean: dict[str, Row]) -> str:
    lines = []
    for x in sorted(mean.values(), key=lambda x: -x["bytes"]):
        deviation = None if x["deviation"] is None else f"{x['deviation']:.4f}"
        left = None if x["weights_left"] is None else f"{x['weights_left']:.1%}"
        distance = f"{x['loss'] - mean[FLOAT]['loss']:+.4f}" if FLOAT in mean else None
        size = f"{x['bytes']:,.0f}"
        lines.append((x["bits"], size, f"{x['file_bits']:.3f}", f"{x['loss']:.4f}", deviation, distance, left))
    return markdown_table(
        ("bits", "bytes of the file", "bits a weight", "validation loss", "deviation", "above float", "weights left"),
        lines,
    )


def ternary_lines(mean: Row) -> list[str]:
    size = mean["bytes_in_base_3"]
    return [f"Ternary weights take 2 bits here; five to a byte, their file would have {size:,.0f} bytes."]


def figure(rows: Sequence[Row], stages: Sequence[Row], path: Path) -> None:
    """Frontier, bits and loss over training, bits by layer, codes, and a DLCM's stages where there are any."""
    drawing = Figure(figsize=(15, 8.4), dpi=130, layout="constrained")
    axes = drawing.subplots(2, 3).flatten()
    mean = means(rows)
    _draw_frontier(axes[0], mean)
    learned = [row for row in rows if row["bits"].startswith(LEARNED)]
    shown = [next(row for row in learned if row["bits"] == bits) for bits in dict.fromkeys(x["bits"] for x in learned)]
    for colour, row in zip(PALETTE * 2, shown, strict=False):
        lines = training_lines(row)
        steps = [line["step"] for line in lines]
        axes[1].plot(steps, [line["weight_bits"] for line in lines], color=colour, label=row["bits"])
        axes[2].plot(steps, [line["loss"] for line in lines], color=colour, label=row["bits"], linewidth=0.8)
    finish(axes[1], "Bits a weight over training, as depths allow", "step", "bits a weight")
    finish(axes[2], "Loss over training", "step", "nats per token")
    axes[1].legend(frameon=False)
    low = next((row for row in learned if row["bits"] == LOW), learned[-1] if learned else None)
    if low is not None:
        _draw_layers(axes[3], low)
        _draw_codes(axes[4], low)
    for row, style in zip(
        (x for x in stages if x["bits"].startswith(LEARNED) and x["seed"] == "s0"), "-:", strict=False
    ):
        lines = training_lines(row)
        for colour, key in zip(PALETTE, [key for key in lines[-1] if key.startswith("weight_bits/")], strict=False):
            label = f"{key.partition('/')[2]}, {row['bits']}"
            bits = [line[key] for line in lines]
            axes[5].plot([x["step"] for x in lines], bits, color=colour, linestyle=style, label=label)
    finish(axes[5], "A DLCM's stages" if stages else "A DLCM's stages: not run", "step", "bits a weight")
    if stages:
        axes[5].legend(frameon=False, fontsize=7)
    drawing.savefig(path)


def _draw_frontier(axes: Axes, mean: dict[str, Row]) -> None:
    for colour, kind in zip(PALETTE, (LEARNED, "fixed-", NARROW, TERNARY), strict=False):
        points = sorted((x["file_bits"], x["loss"], x["deviation"] or 0) for k, x in mean.items() if k.startswith(kind))
        if points:
            size, loss, deviation = zip(*points, strict=True)
            axes.errorbar(size, loss, deviation, color=colour, marker="o", capsize=2, label=kind.rstrip("-"))
    if FLOAT in mean:
        axes.axhline(mean[FLOAT]["loss"], color="black", linewidth=1, linestyle="--", label="float, at 16 bits")
    axes.legend(frameon=False)
    finish(axes, "Validation loss against the file's size", "bits a weight of the float model, all counted", "nats")


def _draw_layers(axes: Axes, row: Row) -> None:
    """Bits of each matrix: a block a row, a matrix a column."""
    names = [name for name in row["matrices"] if ".layers." in name]
    kinds = list(dict.fromkeys(name.rpartition(".")[2].removesuffix("_proj") for name in names))
    blocks = sorted({name.split(".layers.")[0] + "." + name.split(".")[2] for name in names})
    grid = np.full((len(blocks), len(kinds)), np.nan)
    for name in names:
        block = name.split(".layers.")[0] + "." + name.split(".")[2]
        kind = name.rpartition(".")[2].removesuffix("_proj")
        grid[blocks.index(block), kinds.index(kind)] = row["matrices"][name]
        axes.text(kinds.index(kind), blocks.index(block), f"{row['matrices'][name]:.2f}", ha="center", va="center")
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=2 * float(np.nanmax(grid)), aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_title(f"Bits a weight of each matrix, {row['bits']}")


def _draw_codes(axes: Axes, row: Row) -> None:
    """How often each whole number is a weight."""
    layers = quantised_linears(load_model(latest_checkpoint(Path(row["run"])))).values()
    codes = np.concatenate([layer.codes()[0].flatten().numpy() for layer in layers]).astype(int)
    numbers, counts = np.unique(codes, return_counts=True)
    axes.bar(numbers, counts / counts.sum(), color=PALETTE[0])
    axes.set_yscale("log")
    finish(axes, f"Weights as whole numbers, {row['bits']}", "level", "share")


def masks(row: Row, path: Path) -> None:
    """Which weights are not zero, in every block: the attention's output and the feed-forward's first matrix."""
    weights = plain(load_model(latest_checkpoint(Path(row["run"])))).state_dict()
    names = [name for name in weights if name.endswith(("o_proj.weight", "gate_proj.weight")) and ".layers." in name]
    columns = len(names) // 2
    drawing = Figure(figsize=(2.2 * columns, 6), dpi=130, layout="constrained")
    drawing.suptitle(f"Weights that are not zero, {row['bits']}: output of attention above, gate below, block by block")
    for kind, line in zip(("o_proj", "gate_proj"), drawing.subplots(2, columns, squeeze=False), strict=True):
        for axes, name in zip(line, (name for name in names if f".{kind}." in name), strict=True):
            alive = weights[name] != 0
            axes.imshow(alive.numpy(), cmap="Greys", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            axes.set_title(f"{name.split('.')[0]} {name.split('.')[2]}: {alive.float().mean():.1%}", fontsize=8)
            axes.set_axis_off()
    drawing.savefig(path)


def write(rows: Sequence[Row], stages: Sequence[Row], output: Path, commit: str | None) -> None:
    """Writes everything."""
    must_show, mean, recorded = bars(rows), means(rows), record(commit)
    by_stage = stage_rows(stages)
    written = [_without(row, "run") for row in rows]
    write_json(output / f"{NAME}.json", recorded, must_show, rows=written, means=list(mean.values()), stages=by_stage)
    parts = [
        "# Self-compression: loss against the size of the file",
        f"![Frontier, bits over training, layers and stages]({NAME}.png)",
        "## What must hold",
        bars_table(must_show),
        "## Frontier",
        f"Means over {max(x['seeds'] for x in mean.values())} seeds. A size is that of the whole file, also in bits "
        "for each weight in the float model's blocks.",
        frontier_table(mean),
        *(ternary_lines(mean[TERNARY]) if TERNARY in mean else []),
        *([stage_lines(by_stage)] if by_stage else []),
        f"![Masks]({NAME}_masks.png)",
        "## Conditions",
        record_lines(recorded),
    ]
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    figure(rows, stages, output / f"{NAME}.png")
    shown = [row for row in rows if row["bits"] == LOW] or [row for row in rows if row["bits"].startswith(LEARNED)]
    masks(shown[0], output / f"{NAME}_masks.png")


def _without(row: Row, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def report(frontier: Path, stages: Path | None, output: Path, timed: bool, commit: str | None) -> None:
    """Reads, measures, writes.

    Raises:
        EvaluationError, CheckpointError: no results, no checkpoint, or damaged ones.
    """
    found = read_sweep(frontier)
    if not any(row["bits"].startswith(LEARNED) for row in found):
        raise EvaluationError(f"{frontier}: no run of learned bits; run train.sweep first")
    of_stages = read_sweep(stages) if stages is not None else []
    rows = list(_measured(found, timed))
    write(rows, of_stages, output, commit)


def _measured(found: Iterable[Row], timed: bool) -> Iterable[Row]:
    for row in found:
        done = measured(row, timed)
        tell(_without(done, "run", "matrices"))
        yield done


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.selfcompress_report", description="Loss against size.")
    parser.add_argument("frontier", type=Path, help="output of the sweep frontier.yaml, or tiny.yaml")
    parser.add_argument("--stages", type=Path, help="output of the sweep stages.yaml")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="directory (%(default)s)")
    parser.add_argument("--speed", action="store_true", help="time the smaller models on this CPU")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    options = parser.parse_args(arguments)
    report(options.frontier, options.stages, options.output, options.speed, options.commit)


if __name__ == "__main__":
    sys.exit(main())
