"""Coordinate check of decoupled muP (section 6.1): do activations keep their scale when widths grow?

    python -m eval.coord_check [--widths 64 128 ...] [--steps 1 2 5 10] [--seeds 3] [--output docs/results]

Models of every width, of tokens, of concepts and of both, are trained for a few steps at one base learning rate, on the
text in data/; after each of `--steps` every module's output is looked at. If a module's scale is proportional to
width^a, a is 0 under muP and not under the standard parametrisation, where updates grow with the fan-in: the control.

Boundaries stand at a fixed stride, so that all models have the same concepts; their probabilities are learned. The
unembedding starts at zero: random logits shrink as 1 / sqrt(width), and would hide the learned ones.

Where one width grows alone, matrices between the two change their shape: what training changes of such a matrix's input
came about through its transpose, and is more than a random change to it. This *gain* is measured too.

Writes coord_check.json, coord_check.csv, coord_check.md and coord_check.png. Some ten minutes on two CPU cores.
"""

import argparse
import functools
import json
import lzma
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from dlcm import DLCMConfig, DLCMForCausalLM
from dlcm.boundary import LearnedDetector
from dlcm.layout import PackedLayout
from dlcm.mup import parameter_groups
from eval.bench import (
    PALETTE,
    Bar,
    Row,
    bars_table,
    finish,
    markdown_table,
    record,
    record_lines,
    worst,
    write_csv,
    write_json,
)
from eval.loading import EvaluationError, report_errors

TEXT = Path(__file__).parent.parent / "data" / "embedded.jsonl.xz"
WIDTHS = (64, 128, 256, 512, 1024)
STEPS = (1, 2, 5, 10)
BASE = 256  # d_base, and what the width that does not grow stays at
HEAD_DIM, STRIDE, ROWS, LENGTH, VOCABULARY = 32, 3, 8, 64, 256  # tokens are bytes
RATE = 1e-3
AXES = {"d_token": "token width", "d_concept": "concept width", "both": "both widths"}
PARAMETRISATIONS = {"muP": BASE, "standard": None}
FLAT, STEEP = 0.1, 0.3  # theory's slopes of the control are 0.5 and more

# What each name stands for: a module, and whether its input is meant rather than its output.
STAGES: dict[str, tuple[str, bool]] = {
    "encoder": ("encoder", False),
    "boundary queries": ("detector.q_proj", False),
    "boundary keys": ("detector.k_proj", False),
    "pooled concepts": ("pooling.up_proj", True),
    "up-projection": ("pooling.up_proj", False),
    "backbone": ("backbone", False),
    "cross-attention queries": ("cross_attention.q_proj", False),
    "cross-attention keys": ("cross_attention.k_proj", False),
    "cross-attention values": ("cross_attention.v_proj", False),
    "cross-attention output": ("cross_attention.o_proj", False),
    "decoder": ("decoder", False),
    "logits": ("lm_head", False),  # whose input carries the multiplier 1 / s_token
}
# Matrices from one width to the other, and whether fan-in is that of tokens.
MIXED = {"up-projection": ("pooling.up_proj", True), "cross-attention values": ("cross_attention.v_proj", False)}


class StrideDetector(LearnedDetector):
    """Learned probabilities, but boundaries that do not depend on width."""

    def decide(self, probability_T: Tensor, tokens: PackedLayout, generator: torch.Generator | None) -> Tensor:
        return tokens.position_T % STRIDE == 0


def model_of(d_token: int, d_concept: int, base: int | None) -> DLCMForCausalLM:
    """An untrained model of these widths, all else in proportion; without a d_base, in the standard parametrisation."""
    model = DLCMForCausalLM(
        DLCMConfig(
            vocab_size=VOCABULARY,
            d_token=d_token,
            token_heads=d_token // HEAD_DIM,
            token_ffn=2 * d_token,
            d_concept=d_concept,
            concept_heads=d_concept // HEAD_DIM,
            concept_ffn=2 * d_concept,
            encoder_layers=1,
            backbone_layers=1,
            decoder_layers=1,
            target_ratio=float(STRIDE),
            max_position_embeddings=LENGTH,
            mup_base_width=base,
            initializer_range=BASE**-0.5,  # in the control too, whatever the width
            aux_loss_weight=1.0,
        )
    )
    model.detector.__class__ = StrideDetector
    nn.init.zeros_(model.lm_head.weight)
    return model


@functools.cache
def batches(number: int) -> list[Tensor]:
    """So many batches of bytes of the text, (ROWS, LENGTH)."""
    with lzma.open(TEXT, "rt", encoding="utf-8") as lines:
        text = "".join(json.loads(line)["text"] for line in lines).encode()
    starts = torch.randint(len(text) - LENGTH, (number, ROWS), generator=torch.Generator().manual_seed(0))
    return [torch.tensor([list(text[start : start + LENGTH]) for start in row.tolist()]) for row in starts]


@torch.no_grad()
def activations(
    model: DLCMForCausalLM, ids_BL: Tensor, stages: Mapping[str, tuple[str, bool]] = STAGES
) -> dict[str, Tensor]:
    """What every stage gives out, or takes in."""
    seen: dict[str, Tensor] = {}

    def note(name: str, of_input: bool) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = inputs[0] if of_input else output

        return hook

    hooks = [
        model.get_submodule(module).register_forward_hook(note(name, of_input))
        for name, (module, of_input) in stages.items()
    ]
    model(ids_BL)
    for hook in hooks:
        hook.remove()
    return seen


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())


@torch.no_grad()
def gain(weight_OI: Tensor, change_TI: Tensor) -> float:
    """The scale of what a matrix makes of a change of its input, over that of the change: 1 for a random one."""
    return rms(change_TI @ weight_OI.T) / rms(change_TI)


def scales(d_token: int, d_concept: int, base: int | None, steps: Sequence[int], seed: int) -> Iterator[Row]:
    """After each of `steps` and for each stage: the scale of its output, and that of its change since the start.

    For the stages of `MIXED` also the gain of the matrix as it was at the start.
    """
    torch.manual_seed(seed)
    model = model_of(d_token, d_concept, base)
    rates = dict.fromkeys(("lr_token", "lr_concept", "lr_boundary", "lr_other"), RATE)
    optimizer = torch.optim.AdamW(parameter_groups(model, model.config, **rates, eps=1e-12, weight_decay=0.0))
    looked_at, *training = batches(1 + max(steps))
    inputs = {stage: (module, True) for stage, (module, _) in MIXED.items()}
    first = {stage: model.get_parameter(f"{module}.weight").detach().clone() for stage, (module, _) in MIXED.items()}
    start, taken = activations(model, looked_at), activations(model, looked_at, inputs)
    for step, ids_BL in enumerate(training, 1):
        optimizer.zero_grad()
        model(ids_BL, labels=ids_BL).loss.backward()
        optimizer.step()
        if step in steps:
            now, takes = activations(model, looked_at), activations(model, looked_at, inputs)
            for stage in STAGES:
                found = {"scale": rms(now[stage]), "change": rms(now[stage] - start[stage])}
                if stage in MIXED:
                    found["gain"] = gain(first[stage], takes[stage] - taken[stage])
                yield {"step": step, "stage": stage} | found


def measure(
    widths: Sequence[int],
    steps: Sequence[int],
    seeds: int,
    axes: Sequence[str] = tuple(AXES),
    parametrisations: Sequence[str] = tuple(PARAMETRISATIONS),
) -> list[Row]:
    """A row for each parametrisation, axis, width, step and stage, of geometric means over seeds: see `scales`."""
    rows: dict[tuple, Row] = {}
    cases = [(name, axis, width) for name in parametrisations for axis in axes for width in widths]
    for name, axis, width in tqdm(cases, desc="coordinate check", disable=None):
        sizes = {"d_token": (width, BASE), "d_concept": (BASE, width), "both": (width, width)}[axis]
        for seed in range(seeds):
            for found in scales(*sizes, PARAMETRISATIONS[name], steps, seed):
                key = {"parametrisation": name, "axis": axis, "width": width}
                key |= {what: found.pop(what) for what in ("step", "stage")}
                row = rows.setdefault(tuple(key.values()), key | dict.fromkeys(found, 1.0))
                for what, value in found.items():
                    row[what] *= value ** (1 / seeds)
    return list(rows.values())


def slope(widths: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of the power of width that fits best."""
    x = torch.tensor(widths).double().log()
    x -= x.mean()
    return float(x @ torch.tensor(values).double().log() / (x @ x))


def slopes(rows: Sequence[Row]) -> list[Row]:
    """A row for each parametrisation, axis, step and stage: exponents of `scale` and `change`."""
    series: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("parametrisation", "axis", "step", "stage"))
        series.setdefault(key, []).append(row)
    return [
        dict(zip(("parametrisation", "axis", "step", "stage"), key, strict=True))
        | {what: slope([row["width"] for row in group], [row[what] for row in group]) for what in ("scale", "change")}
        for key, group in series.items()
    ]


def steepest(found: Sequence[Row], parametrisation: str, axis: str, what: str = "scale") -> float | None:
    """The largest exponent of any stage, after any number of steps, whatever its sign."""
    mine = [row for row in found if row["parametrisation"] == parametrisation and row["axis"] == axis]
    return worst((abs(row[what]) for row in mine), at_most=True)


def gains(rows: Sequence[Row]) -> list[Row]:
    """Of each stage of `MIXED` and each fan-in over fan-out, under muP after the last step: the gain."""
    last = max(row["step"] for row in rows)
    found = []
    for row in rows:
        if row["stage"] in MIXED and (row["parametrisation"], row["step"]) == ("muP", last):
            larger = 1.0 if row["axis"] == "both" else row["width"] / BASE
            from_tokens = MIXED[row["stage"]][1]
            ratio = larger if (row["axis"] == "d_token") == from_tokens else 1 / larger
            found.append({"stage": row["stage"], "axis": row["axis"], "ratio": ratio, "gain": row["gain"]})
    return found


def must_show(found: Sequence[Row]) -> dict[str, Bar]:
    """Flat under muP in every stage; not under the standard parametrisation, or the check could not fail."""
    bars = {}
    for axis, words in AXES.items():
        bars[f"muP, {words}: steepest of all stages"] = Bar(steepest(found, "muP", axis), FLAT, at_most=True)
        bars[f"standard, {words}: steepest of all stages"] = Bar(steepest(found, "standard", axis), STEEP)
    return bars


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Writes a PNG: a panel for each stage, scale against width after the last step."""
    last = max(row["step"] for row in rows)
    figure = Figure(figsize=(14, 9.5), dpi=130, layout="constrained")
    panels = figure.subplots(3, 4, sharex=True).flatten()
    for axes, stage in zip(panels, STAGES, strict=True):
        for colour, (axis, words) in zip(PALETTE, AXES.items(), strict=False):
            for name, style in zip(PARAMETRISATIONS, ("-", ":"), strict=True):
                line = [
                    r
                    for r in rows
                    if (r["parametrisation"], r["axis"], r["step"], r["stage"]) == (name, axis, last, stage)
                ]
                label = f"{name}, {words} grows"
                axes.plot(
                    [r["width"] for r in line], [r["scale"] for r in line], style, color=colour, marker="o", label=label
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(*_a_decade_at_least(axes.get_ylim()))
        finish(axes, stage, "", "")
    figure.supxlabel("width")
    figure.supylabel(f"scale (root mean square) after {last} steps")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def _a_decade_at_least(limits: tuple[float, float]) -> tuple[float, float]:
    """So that noise does not look like a slope."""
    low, high = limits
    middle = math.sqrt(low * high)
    return min(low, middle / 10**0.5), max(high, middle * 10**0.5)


def page(recorded: dict[str, Any], rows: Sequence[Row], found: Sequence[Row]) -> str:
    """The results in markdown."""
    steps = sorted({row["step"] for row in found})
    by_key = {(r["parametrisation"], r["axis"], r["step"], r["stage"]): r for r in found}
    tables = []
    for axis, words in AXES.items():
        table = []
        for stage in STAGES:
            cells = [f"{by_key[name, axis, step, stage]['scale']:+.3f}" for name in PARAMETRISATIONS for step in steps]
            table.append([stage, *cells])
        header = ["exponent of the scale", *(f"{name}, {step}" for name in PARAMETRISATIONS for step in steps)]
        tables.append(f"### {words.capitalize()}\n\n{markdown_table(header, table)}\n")
    ratios = sorted({row["ratio"] for row in gains(rows)})
    grown = [
        [
            f"{stage}, {AXES[axis]}",
            *(
                " to ".join(f"{value:.2f}" for value in dict.fromkeys((min(here), max(here)))) if here else None
                for ratio in ratios
                for here in [
                    [g["gain"] for g in gains(rows) if (g["stage"], g["axis"], g["ratio"]) == (stage, axis, ratio)]
                ]
            ),
        ]
        for stage in MIXED
        for axis in AXES
    ]
    widths = ", ".join(str(width) for width in sorted({row["width"] for row in rows}))
    changes = [
        [words, *(f"{steepest(found, name, axis, 'change'):.3f}" for name in PARAMETRISATIONS)]
        for axis, words in AXES.items()
    ]
    return f"""# Coordinate check of decoupled muP

{bars_table(must_show(found))}

If the scale of a module's output is proportional to width^a, the tables give a after so many steps of AdamW, fitted
over widths {widths}; the width that does not grow stays at {BASE}, which is d_base. Under muP (section 6.1) a is 0.
`eval/coord_check.py` says how it is measured.

![scale against width](coord_check.png)

{chr(10).join(tables)}
### Change since the start

The largest exponent of the scale of what training has changed, over all stages and steps. No bar looks at it.

{markdown_table(("", *PARAMETRISATIONS), changes)}

### Where one width grows alone

What a matrix from one width to the other, as it was at the start, makes of the change of its input in training: the
scale of that over the change's own, after {max(steps)} steps under muP, by fan-in over fan-out. A random change has 1.

{markdown_table(("gain", *(f"{ratio:g}" for ratio in ratios)), grown)}

Gradients came to that input through the matrix's transpose, and point where it is large: a matrix that narrows gives
more of them back the more it narrows, one that widens gives 1. So what is not flat above follows the ratio of the two
widths, not their size: where both grow, there is none of it. Section 6.1 looks at fan-in alone.

{record_lines(recorded)}
"""


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.coord_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if len(set(options.widths)) < 2 or any(width < HEAD_DIM or width % HEAD_DIM for width in options.widths):
        raise EvaluationError(f"--widths {options.widths}: give at least two different multiples of {HEAD_DIM}")
    if min(options.steps) < 1 or options.seeds < 1:
        raise EvaluationError("--steps and --seeds must be at least 1")

    recorded = record()
    rows = measure(options.widths, options.steps, options.seeds)
    found = slopes(rows)
    bars = must_show(found)
    write_json(options.output / "coord_check.json", recorded, bars, slopes=found, gains=gains(rows))
    write_csv(options.output / "coord_check.csv", rows)
    plot(options.output / "coord_check.png", rows)
    (options.output / "coord_check.md").write_text(page(recorded, rows, found), encoding="utf-8")
    print(bars_table(bars))


if __name__ == "__main__":
    sys.exit(main())
