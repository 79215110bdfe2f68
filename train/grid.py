"""A grid of small runs for the scaling law of section 6: N x P x R and a LLaMA baseline for each N.

    python -m train.grid GRID.yaml            runs what is not finished, one run after another, then fits the law
    python -m train.grid GRID.yaml --list     the points, and nothing else
    python -m train.grid GRID.yaml --print    writes the configurations and prints the commands, for a cluster

N is the number of parameters without embedding and unembedding, P the share of them in the backbone, R the target
tokens per concept. D is the same for all: every run takes the steps of the base run, and the law sees smaller D in the
validations on the way. GRID.yaml holds the fields of `GridConfig`.

Sizes follow from the base run's proportions. Widths are whole heads of its dimension, there are two encoder layers for
each decoder layer, d_concept is one to two d_token, and SwiGLU widths, up to `STRETCH` away from proportion, do the
rest. All points of one N have the same d_token, so that embedding and unembedding, which N leaves out, do not differ
where P does.

    OUTPUT/NAME.*, OUTPUT/NAME/    a run (see train/runs.py)
    OUTPUT/fit/                    the law, by eval.scaling
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from omegaconf import MISSING

from dlcm import DLCMConfig, LlamaBaselineConfig
from dlcm.config import changed
from dlcm.flops import TABLES, Config, forward_flops, parameter_counts
from train.config import ConfigError, RunConfig, build_model_config, load_run_config, validate
from train.runs import PlannedRun, add_instead_of_running, carry_out, columns, read_plan, report_errors

SIZE_TOLERANCE = 0.05  # of N, relative
SHARE_TOLERANCE = 0.03  # of P, absolute
ENCODER_PER_DECODER = 2  # layers
STRETCH = 1.5  # a SwiGLU width is at most so many times wider or narrower than the base run's proportions
# What is missing of a number of parameters counts so many times as much as the same deviation from a proportion.
EXACTNESS = 30


@dataclass
class GridConfig:
    """What GRID.yaml holds."""

    base: str = MISSING  # YAML of a DLCM run, relative to this file; its sizes give proportions, its output is not used
    output: str = MISSING
    sizes: list[float] = MISSING  # N
    shares: list[float] = MISSING  # P
    ratios: list[float] = MISSING  # R
    processes: int = 1  # of one run, data-parallel, by torchrun


@dataclass(frozen=True, slots=True)
class Point(PlannedRun):
    """One run of the grid, and its model."""

    config: Config


# Reading a grid


def load_grid(path: Path) -> GridConfig:
    """The grid that a YAML file describes, checked.

    Raises:
        ConfigError: not readable, an unknown key, a wrong type, or a value that no grid has.
    """
    grid = read_plan(path, GridConfig)
    ranges: tuple[tuple[str, Callable[[float], bool], str], ...] = (
        ("sizes", lambda size: 1 <= size < math.inf, "at least 1 parameter"),
        ("shares", lambda share: 0 < share < 1, "between 0 and 1, both excluded"),
        ("ratios", lambda ratio: 1 <= ratio < math.inf, "at least 1 token per concept"),
    )
    for key, holds, words in ranges:
        values = getattr(grid, key)
        if not values or not all(map(holds, values)):
            raise ConfigError(f"{path}: {key} is {values}, but must hold numbers, each {words}")
        if len(set(values)) < len(values):
            raise ConfigError(f"{path}: {key} is {values}; name each value once")
    return grid


def load_points(path: Path) -> list[Point]:
    """All runs of the grid in a YAML file: of each N the baseline first, then P by P, R by R.

    Raises:
        ConfigError: no grid, a base that is no DLCM run, or a point that no model comes near.
    """
    grid = load_grid(path)
    base = load_run_config(path.parent / grid.base, [f"output={json.dumps(grid.output)}"])
    template = build_model_config(base)
    if not isinstance(template, DLCMConfig):
        raise ConfigError(f"{path}: base {grid.base} is no DLCM, whose proportions the grid needs; name one that is")
    points = []
    for size in grid.sizes:
        try:
            baseline, *dlcms = sizes_of_models(template, size, grid.shares)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        points.append(baseline_point(base, baseline, f"llama_N{short(size)}", grid))
        for (share, sizes), ratio in itertools.product(zip(grid.shares, dlcms, strict=True), grid.ratios):
            name = f"dlcm_N{short(size)}_P{100 * share:g}_R{ratio:g}"
            model = base.model | sizes | {"target_ratio": ratio}
            points.append(make_point(dataclasses.replace(base, model=model), name, grid))
    return points


def baseline_point(base: RunConfig, sizes: dict[str, int], name: str, grid: GridConfig) -> Point:
    """The base run with a LLaMA in place of its DLCM, and nothing that concerns concepts."""
    shared = {field.name for field in dataclasses.fields(LlamaBaselineConfig)}
    model = {key: value for key, value in base.model.items() if key in shared}
    run = dataclasses.replace(
        base,
        model=model | sizes | {"architecture": "llama"},
        optimizer=dataclasses.replace(base.optimizer, lr_concept=None, lr_boundary=None),
        schedule=dataclasses.replace(base.schedule, sharpening_final=None),
    )
    return make_point(run, name, grid)


def make_point(run: RunConfig, name: str, grid: GridConfig) -> Point:
    """A run under its name.

    Raises:
        ConfigError: it cannot be run as it is.
    """
    run = dataclasses.replace(run, output=str(Path(grid.output) / name))
    try:
        validate(run)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return Point(name, run, grid.processes, build_model_config(run))


def short(number: float) -> str:
    """274000000 as 274M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:g}{letter}"
    return f"{number:g}"


# Finding the models


def size_and_share(config: Config) -> tuple[int, float]:
    """N, and P; a baseline's P is 0."""
    stages = {stage: count for stage, count in parameter_counts(config).items() if stage not in TABLES}
    number = sum(stages.values())
    return number, stages.get("backbone", 0) / number


class Stack(NamedTuple):
    """Blocks of one width, their number to be chosen."""

    width: int
    unit: int  # layers that come and go together
    bare: int  # parameters of a block without SwiGLU
    per_ffn: int  # and of each unit of its SwiGLU width
    besides: int  # of the stack, whatever its blocks
    proportion: float  # wished for: SwiGLU width over width
    aspect: float  # wished for: width over layers


class Filled(NamedTuple):
    """A stack with its blocks."""

    layers: int
    ffn: int
    parameters: int
    cost: float  # how far from what was wished for


class Candidate(NamedTuple):
    """A model for one point."""

    sizes: dict[str, int]
    number: int
    share: float
    miss: float  # of N or P, in tolerances; up to 1 it will do
    cost: float


def sizes_of_models(template: DLCMConfig, number: float, shares: Sequence[float]) -> list[dict[str, int]]:
    """What to change in the template for the baseline and, share by share, for the DLCMs of `number` parameters.

    Raises:
        ConfigError: some point has no model within the tolerances; names the nearest.
    """
    rows = [
        [best_baseline(template, d_token, number), *(best_dlcm(template, d_token, number, share) for share in shares)]
        for d_token in token_widths(template, number, max(shares))
    ]
    best = min(rows, key=lambda row: (sum(found.miss > 1 for found in row), sum(found.cost for found in row)))
    for found, share in zip(best, (0.0, *shares), strict=True):
        if found.miss > 1:
            what = f"DLCM with a share of {share:g} of them in the backbone" if share else "baseline"
            nearest = ", ".join(f"{name}={value}" for name, value in found.sizes.items())
            raise ConfigError(
                f"of {short(number)} parameters there is no {what}: the nearest has {found.number:,} and a share "
                f"of {found.share:.3f} ({nearest}); choose other sizes or shares, or a base with smaller heads"
            )
    return [found.sizes for found in best]


def token_widths(template: DLCMConfig, number: float, share: float) -> Iterator[int]:
    """Every d_token for which there is a d_concept, up to the first whose fewest blocks are too many."""
    step, concept_step = width_step(template, "token"), width_step(template, "concept")
    for d_token in itertools.count(step * math.ceil(concept_step / step / 2), step):
        yield d_token
        stack = token_stack(template, d_token)
        narrowest = stack.bare + stack.per_ffn * stack.proportion * d_token / STRETCH
        if stack.unit * narrowest > number * (1 - share):
            return


def best_baseline(template: DLCMConfig, d_token: int, number: float) -> Candidate:
    """The LLaMA of `number` parameters at a token width."""
    layers = template.encoder_layers + template.backbone_layers + template.decoder_layers
    stack = token_stack(template, d_token)._replace(unit=1, aspect=template.d_token / layers)
    filled = fill(stack, number)
    sizes = widths(template, "token", d_token) | {"token_ffn": filled.ffn, "num_layers": filled.layers}
    return Candidate(sizes, filled.parameters, 0.0, abs(filled.parameters / number - 1) / SIZE_TOLERANCE, filled.cost)


def best_dlcm(template: DLCMConfig, d_token: int, number: float, share: float) -> Candidate:
    """The DLCM of `number` parameters, `share` of them in the backbone, at a token width."""
    step = width_step(template, "concept")
    candidates = [
        dlcm_candidate(template, d_token, d_concept, number, share)
        for d_concept in range(step * math.ceil(d_token / step), 2 * d_token + 1, step)
    ]
    return min(candidates, key=lambda found: (max(found.miss, 1), found.cost))


def dlcm_candidate(template: DLCMConfig, d_token: int, d_concept: int, number: float, share: float) -> Candidate:
    """The DLCM of `number` parameters, `share` of them in the backbone, at both widths."""
    sizes = widths(template, "token", d_token) | widths(template, "concept", d_concept)
    sizes["d_scan"] = max(round(template.scan_width / template.d_token * d_token), 1)
    stages = parameter_counts(changed(template, sizes))
    between = stages["detector"] + stages["pooling"] + stages["cross_attention"]

    tokens = fill(token_stack(template, d_token), number * (1 - share) - between)
    concepts = fill(concept_stack(template, d_concept), number * share)
    decoder_layers = tokens.layers // (ENCODER_PER_DECODER + 1)
    sizes |= {"token_ffn": tokens.ffn, "concept_ffn": concepts.ffn, "encoder_layers": tokens.layers - decoder_layers}
    sizes |= {"backbone_layers": concepts.layers, "decoder_layers": decoder_layers}

    realised = tokens.parameters + between + concepts.parameters
    realised_share = concepts.parameters / realised
    misses = (abs(realised / number - 1) / SIZE_TOLERANCE, abs(realised_share - share) / SHARE_TOLERANCE)
    widening = abs(math.log(d_concept / d_token / (template.d_concept / template.d_token)))
    return Candidate(sizes, realised, realised_share, max(misses), tokens.cost + concepts.cost + widening)


def fill(stack: Stack, budget: float) -> Filled:
    """As many blocks, of such a SwiGLU width, as have `budget` parameters and the proportions wished for."""
    budget = max(budget - stack.besides, 1.0)
    proportional = stack.proportion * stack.width
    multiple = 64 if stack.width >= 512 else 8  # tensor cores like 64; a narrow block cannot afford it
    found: list[Filled] = []
    for layers in itertools.count(stack.unit, stack.unit):
        ideal = (budget / layers - stack.bare) / stack.per_ffn
        ideal = min(max(ideal, proportional / STRETCH), proportional * STRETCH)
        ffn = max(round(ideal / multiple), 1) * multiple
        parameters = layers * (stack.bare + stack.per_ffn * ffn)
        cost = EXACTNESS * abs(math.log(parameters / budget))
        cost += abs(math.log(ffn / proportional)) + abs(math.log(stack.width / layers / stack.aspect))
        found.append(Filled(layers, ffn, parameters + stack.besides, cost))
        if parameters > budget and ideal == proportional / STRETCH:  # more blocks are only further away
            break
    return min(found, key=lambda filled: filled.cost)


def token_stack(template: DLCMConfig, d_token: int) -> Stack:
    """Encoder and decoder at a width."""
    layers = template.encoder_layers + template.decoder_layers
    return stack_of(template, "token", "decoder", d_token, unit=ENCODER_PER_DECODER + 1, layers=layers)


def concept_stack(template: DLCMConfig, d_concept: int) -> Stack:
    """The backbone at a width."""
    return stack_of(template, "concept", "backbone", d_concept, unit=1, layers=template.backbone_layers)


def stack_of(template: DLCMConfig, level: str, stage: str, width: int, *, unit: int, layers: int) -> Stack:
    """A stage's blocks at another width, counted by how the stage's parameters grow with layers and SwiGLU width."""
    at_width = changed(template, widths(template, level, width))

    def count(layers: int, ffn: int) -> int:
        return parameter_counts(changed(at_width, {f"{stage}_layers": layers, f"{level}_ffn": ffn}))[stage]

    per_ffn = count(1, 2) - count(1, 1)
    block = count(2, 1) - count(1, 1)
    old_width, old_ffn = getattr(template, f"d_{level}"), getattr(template, f"{level}_ffn")
    return Stack(
        width,
        unit,
        block - per_ffn,
        per_ffn,
        count(1, 1) - block,
        proportion=old_ffn / old_width,
        aspect=old_width / layers,
    )


def width_step(template: DLCMConfig, level: str) -> int:
    """The width of the query heads that share a key-value head: what a width is a multiple of."""
    return getattr(template, f"d_{level}") // getattr(template, f"{level}_kv_heads")


def widths(template: DLCMConfig, level: str, width: int) -> dict[str, int]:
    """A width of tokens or concepts, in heads like the template's."""
    head_dim = getattr(template, f"d_{level}") // getattr(template, f"{level}_heads")
    kv_heads = width // width_step(template, level)
    return {f"d_{level}": width, f"{level}_heads": width // head_dim, f"{level}_kv_heads": kv_heads}


# What is shown


def table(points: Iterable[Point]) -> str:
    """The points, one a line: what they came out as."""
    rows = [("name", "N", "P", "R", "layers", "width", "SwiGLU", "MFLOP / token", "tokens")]
    for point in points:
        config, (number, share) = point.config, size_and_share(point.config)
        flops = forward_flops(config, point.run.data.sequence_length).total
        if isinstance(config, DLCMConfig):
            layers = f"{config.encoder_layers} + {config.backbone_layers} + {config.decoder_layers}"
            width, ffn = f"{config.d_token} / {config.d_concept}", f"{config.token_ffn} / {config.concept_ffn}"
            cells = (f"{share:.3f}", f"{config.target_ratio:g}", layers, width, ffn)
        else:
            cells = ("-", "-", str(config.num_layers), str(config.d_token), str(config.token_ffn))
        rows.append((point.name, f"{number:,}", *cells, f"{flops / 1e6:,.3f}", f"{point.tokens:,}"))
    return columns(rows)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.grid", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("grid", type=Path, metavar="GRID.yaml", help="sizes, shares and ratios of the runs")
    instead = add_instead_of_running(parser)
    instead.add_argument("--no-fit", action="store_true", help="run, but do not fit the law")
    return parser.parse_args(argv)


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 done, 2 an error, 128 + N stopped by signal N."""
    arguments = parse_arguments(argv)
    points = load_points(arguments.grid)
    status = carry_out(points, arguments, lambda: table(points))
    if status or arguments.list or arguments.print or arguments.no_fit:
        return status
    from eval.scaling import main as fit  # evaluation is not needed to train

    output = points[0].config_file.parent / "fit"
    return fit([*(point.run.output for point in points), "--output", str(output)])


if __name__ == "__main__":
    sys.exit(main())
