"""Is the DLCM better than LLaMA at equal tokens and equal forward FLOPs? What the sweeps of configs/headline show.

    python -m train.sweep configs/headline/{bytes,bpe}/SWEEP.yaml ...
    python -m eval.headline runs/headline [--output docs/results]

Reads results.jsonl of each sweep, and configuration and metrics of its runs, whatever of it there is. What is compared,
and what counts, is in docs/headline_protocol.md. A *setting* is a tokenizer, a size (d_token) and a number of training
tokens. Of several runs of one model, seed and setting, at other learning rates, the best counts, for the baseline as
for the others. FLOPs are at the tokens per concept that the last validation realised. Writes headline.json, headline.md
and headline.png.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from dlcm.flops import forward_flops, parameter_counts
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
from eval.knockout import KNOCKOUTS
from eval.loading import EvaluationError, report_errors
from eval.matching import TOLERANCE
from eval.mup import Curve
from train.config import build_model_config, load_run_config
from train.metrics import read_metrics
from train.sweep import RESULTS, read_lines

KINDS = ("bytes", "bpe")
PAPER = "paper"
BASELINES = {False: "llama", True: "llama-qk"}  # by whether queries and keys are normed, as the compared model's are
# No candidates: baselines, and a bound that is not matched.
REFERENCES = (*BASELINES.values(), "tokens", "plain", "llama-window")
REMOVED = [what for what in KNOCKOUTS if what != "whole"]
WIN, PARITY = -0.01, 0.0
SEEDS, SIZES, BUDGETS, TRAINING_FLOPS = 3, 3, 3, 4e17
FARTHEST = 1e15  # tokens; a crossover beyond is none
IDEAS = {
    "paper": "the paper's recipe, strictly causal",
    "tokens": "the token path alone: no concepts (not matched, a bound)",
    "interface": "every token a concept of its own width: the tax of the interface",
    "clean": "the paper's recipe with a clean start",
    "heavy": "most layers at token level, one width, a clean start",
    "anneal": "most layers at token level, R falling from 8 to 4 in training",
    "half": "R = 2, concepts sqrt(2) as wide, a clean start",
    "words": "boundaries at word ends, seen at once, a clean start",
    "warm": "without the clean start",
    "inject": "and the newest concept before every decoder layer",
    "cross": "and cross-attention before every decoder layer",
    "last": "concepts that are the state of their last token",
    "stale": "words seen from the next one on",
    "learned": "learned boundaries at the ratio of words",
    "stride": "a fixed stride at the ratio of words",
    "light": "without the clean start, a layer more at token level, a smaller backbone",
    "wide": "without the clean start, fewer concept layers, twice as wide",
    "early": "without the clean start, most token layers in the encoder",
    "late": "without the clean start, most token layers in the decoder",
    "late-newest": "`late`, and the newest concept before every decoder layer",
    "late-wide": "`late`, fewer concept layers, twice as wide",
    "late-wide-newest": "`late-wide`, and the newest concept before every decoder layer",
    "late-light": "`late`, a layer more at token level, a smaller backbone",
    "inner": "without the clean start, most layers in the backbone",
    "thin": "without the clean start, more concept layers of token width",
    "newest": "without the clean start, and the newest concept before every decoder layer",
    "drawn": "learned boundaries at the ratio of words, without the clean start",
    "late-qk": "`late`, queries and keys normed (against `llama-qk`)",
    "warm-qk": "`warm`, queries and keys normed (against `llama-qk`)",
    "closing": "no cross-attention: the last token of a segment passes through the backbone (against `llama-qk`)",
    "closing-wide": "`closing`, fewer concept layers, twice as wide (against `llama-qk`)",
    "closing-late": "`closing`, most token layers in the decoder (against `llama-qk`)",
    "window": "`closing`, token layers that see 256 tokens, and two more of them (against `llama-qk`)",
    "llama-window": "LLaMA, four of five layers see 256 tokens, two more of them (no candidate; against `llama-qk`)",
    "plain": "LLaMA in standard parametrisation, sigma = 0.02 (no candidate)",
}


class Setting(NamedTuple):
    """What is equal for the models that are compared: tokenizer, d_token, and training tokens."""

    kind: str
    size: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run has to say.

    Attributes:
        model: which of a setting's models.
        normed: whether its queries and keys are.
        rate: the base learning rate, in a sweep over them; else None.
        loss, bpb: of the last validation; None where it was not finite.
        tokens_per_concept: realised there; None for the baseline.
        forward: FLOPs per token at that ratio.
        flops: of training.
        speed: median of tokens per second; None where none was logged.
        curve: training tokens and bits per byte of each validation.
        trained: on what device, by what code.
    """

    setting: Setting
    model: str
    seed: int
    normed: bool
    rate: float | None
    parameters: int
    loss: float | None
    bpb: float | None
    tokens_per_concept: float | None
    forward: float
    flops: float
    speed: float | None
    curve: tuple[tuple[int, float], ...]
    trained: str


# Reading


def read_results(directory: Path) -> list[Result]:
    """Of all finished runs of all sweeps.

    Raises:
        EvaluationError: there is none.
        ConfigError, MetricsError: a file that no sweep wrote, or a run's files cannot be read.
    """
    found = [
        read_result(kind, path.parent, line)
        for kind in KINDS
        for path in sorted((directory / kind).glob(f"*/{RESULTS}"))
        for line in read_lines(path)
    ]
    if not found:
        raise EvaluationError(
            f"{directory}: no results of {' or '.join(KINDS)}; run train.sweep on configs/headline first"
        )
    return found


def read_result(kind: str, sweep: Path, line: Mapping[str, Any]) -> Result:
    """Of one run, from its line and what it recorded."""
    name, labels = line["name"], line["labels"]
    match = re.fullmatch(r"(.+)-(\d+)", labels.get("model", ""))
    if match is None:
        raise EvaluationError(
            f"{sweep / RESULTS}: run '{name}' has no model like llama-256; use the sweeps of configs/headline"
        )
    run = load_run_config(sweep / f"{name}.yaml", resolved=True)
    lines = read_metrics(sweep / name)
    validations = [line for line in lines if line["kind"] == "validation"]
    steps = [line for line in lines if line["kind"] == "train"]
    if not validations or not steps:
        raise EvaluationError(f"{sweep / name}: metrics of a finished run have steps and validations; run it again")
    last, config = validations[-1], build_model_config(run)
    ratio = last.get("tokens_per_concept")
    speeds = [line["tokens_per_second"] for line in steps if line.get("tokens_per_second")]
    return Result(
        setting=Setting(kind, int(match[2]), last["tokens"]),
        model=match[1],
        seed=run.seed,
        normed=config.qk_norm,
        rate=run.optimizer.lr_token if "rate" in labels else None,
        parameters=sum(parameter_counts(config).values()),
        loss=last["loss"],
        bpb=last["bpb"],
        tokens_per_concept=ratio,
        forward=forward_flops(config, run.data.sequence_length, ratio).total,
        flops=steps[-1]["flops"],
        speed=statistics.median(speeds) if speeds else None,
        curve=tuple((line["tokens"], line["bpb"]) for line in validations if line["bpb"] is not None),
        trained=where_trained([line]),
    )


class CutOff(NamedTuple):
    """A run that was not finished, at its last validation, which counts for nothing.

    Attributes:
        planned: the setting it was to reach.
        tokens: those of that validation.
        gap: to the baseline that had the same to do, at the same tokens; None where there is none.
    """

    planned: Setting
    model: str
    tokens: int
    bpb: float
    gap: float | None


def read_cut_off(directory: Path, results: Iterable[Result]) -> list[CutOff]:
    """Of all runs of all sweeps that have validations and no line of results."""
    curves = {(result.setting, result.model, result.seed): dict(result.curve) for result in results}
    found = []
    for kind in KINDS:
        lists = (directory / kind).glob(f"*/{RESULTS}")
        finished = {path.parent / line["name"] for path in lists for line in read_lines(path)}
        for path in sorted((directory / kind).glob("*/*.yaml")):
            run_dir = path.with_suffix("")
            match = re.match(r"(.+?)-(\d+)(?:_|$)", path.stem)
            if match is None or run_dir in finished or not run_dir.is_dir():
                continue
            validations = [line for line in read_metrics(run_dir) if line["kind"] == "validation"]
            if not validations or validations[-1]["bpb"] is None:
                continue
            run, last = load_run_config(path, resolved=True), validations[-1]
            planned = Setting(kind, int(match[2]), last["tokens"] // last["step"] * run.schedule.steps)
            like = BASELINES[build_model_config(run).qk_norm]
            baseline = curves.get((planned, like, run.seed), {}).get(last["tokens"])
            gap = None if baseline is None else last["bpb"] / baseline - 1
            found.append(CutOff(planned, match[1], last["tokens"], last["bpb"], gap))
    return found


def read_knockouts(directory: Path) -> list[dict[str, Any]]:
    """Of runs beside which eval.knockout wrote: nats a token of the whole model, and how many more without some."""
    found = []
    for path in sorted(directory.glob("*/*/*/knockout.json")):
        losses = {row["knockout"]: row for row in json.loads(path.read_text(encoding="utf-8"))["losses"]}
        row = {"kind": path.relative_to(directory).parts[0], "model": path.parent.name}
        found.append(row | {what: loss["loss" if what == "whole" else "difference"] for what, loss in losses.items()})
    return found


# Comparing


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against the baseline of its setting that is its like.

    Attributes:
        baseline: its model.
        runs: by seed.
        gaps: (model - baseline) / baseline in bits per byte, of the seeds that both have.
        flops_ratio: forward FLOPs per token over the baseline's, as realised.
    """

    setting: Setting
    model: str
    baseline: str
    runs: Mapping[int, Result]
    gaps: tuple[float, ...]
    flops_ratio: float | None

    @property
    def gap(self) -> float | None:
        return statistics.mean(self.gaps) if self.gaps else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None for fewer than `SEEDS`."""
        return statistics.stdev(self.gaps) if len(self.gaps) >= SEEDS else None

    @property
    def is_matched(self) -> bool:
        return self.flops_ratio is not None and abs(self.flops_ratio - 1) <= TOLERANCE

    @property
    def bpb(self) -> float:
        return statistics.mean(run.bpb for run in self.runs.values() if run.bpb is not None)

    @property
    def flops(self) -> float:
        return statistics.mean(run.flops for run in self.runs.values())


def compare(results: Iterable[Result]) -> dict[Setting, dict[str, Comparison]]:
    """Every model of every setting against its like among the baselines, where it was run."""
    best: dict[Setting, dict[str, dict[int, Result]]] = {}
    for result in results:
        if result.bpb is None:
            continue
        runs = best.setdefault(result.setting, {}).setdefault(result.model, {})
        other = runs.get(result.seed)
        if other is None or other.bpb is None or result.bpb < other.bpb:
            runs[result.seed] = result
    return {
        setting: {model: _against(setting, model, models) for model in sorted(models)}
        for setting, models in sorted(best.items())
    }


def _against(setting: Setting, model: str, models: Mapping[str, Mapping[int, Result]]) -> Comparison:
    runs = models[model]
    like = BASELINES[next(iter(runs.values())).normed]
    baseline = models.get(like, {})
    both = sorted(runs.keys() & baseline.keys())
    gaps = tuple(_value(runs[seed].bpb) / _value(baseline[seed].bpb) - 1 for seed in both)
    ratio = None
    if both:
        ratio = sum(runs[seed].forward for seed in both) / sum(baseline[seed].forward for seed in both)
    return Comparison(setting, model, like, runs, gaps, ratio)


def _value(number: float | None) -> float:
    assert number is not None  # runs without one are left out
    return number


Comparisons = Mapping[Setting, Mapping[str, Comparison]]


def largest_settings(comparisons: Comparisons, kind: str, model: str) -> dict[int, Comparison]:
    """Of each size, smallest first, the model's comparison at the most tokens that it has one for."""
    found: dict[int, Comparison] = {}
    for setting, models in comparisons.items():  # in order
        if setting.kind == kind and model in models and models[model].gap is not None:
            found[setting.size] = models[model]
    return found


def recipe(comparisons: Comparisons, kind: str) -> str | None:
    """The matched model with the smallest gap at the largest size where there is any; None without one.

    Models that were compared with the weaker of two baselines are out.
    """
    candidates = []
    for model in {model for models in comparisons.values() for model in models} - set(REFERENCES):
        matched = {
            size: comparison
            for size, comparison in largest_settings(comparisons, kind, model).items()
            if comparison.is_matched and comparison.baseline == best_baseline(comparisons[comparison.setting])
        }
        if matched:
            size = max(matched)
            candidates.append((-size, _value(matched[size].gap), model))
    return min(candidates)[2] if candidates else None


def best_baseline(models: Mapping[str, Comparison]) -> str:
    """Of a setting, the baseline of fewest bits per byte."""
    return min(BASELINES.values() & models.keys(), key=lambda name: models[name].bpb)


class Trend(NamedTuple):
    """How a model's gap moves with training tokens at one size."""

    kind: str
    size: int
    model: str
    budgets: int
    per_doubling: float | None  # slope of the gap; None for one budget
    crossover: float | None  # tokens at which the line through the gaps meets zero; None where it does not fall


def line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and level, by least squares."""
    x, y = np.array(points).T
    slope, level = np.polyfit(x, y, 1)
    return float(slope), float(level)


def trends(comparisons: Comparisons, kind: str, model: str) -> list[Trend]:
    """Straight lines through gaps against the logarithm of tokens."""
    by_size: dict[int, list[tuple[float, float]]] = {}
    for setting, models in comparisons.items():
        if setting.kind == kind and model in models and models[model].is_matched:
            point = math.log2(setting.tokens), _value(models[model].gap)
            by_size.setdefault(setting.size, []).append(point)
    found = []
    for size, points in by_size.items():
        slope = crossover = None
        if len(points) > 1:
            slope, level = line_through(points)
            if slope < 0 and -level / slope < math.log2(FARTHEST):
                crossover = 2 ** (-level / slope)
        found.append(Trend(kind, size, model, len(points), slope, crossover))
    return found


def flops_saved(comparisons: Comparisons, kind: str, model: str) -> dict[int, tuple[float, float | None, float | None]]:
    """Share of the baseline's training FLOPs that the model does without at equal bits per byte, and an interval.

    By size. The interval is that of the gap, two standard errors of its mean over seeds, where there are `SEEDS`.
    """
    found = {}
    for size, comparison in largest_settings(comparisons, kind, model).items():
        budgets = sorted(
            (models[comparison.baseline].flops, models[comparison.baseline].bpb)
            for setting, models in comparisons.items()
            if (setting.kind, setting.size) == (kind, size) and comparison.baseline in models
        )
        falling = all(bpb > better for (_, bpb), (_, better) in itertools.pairwise(budgets))
        if len(budgets) < 2 or not falling or not comparison.is_matched:
            continue

        def saved(bpb: float, comparison: Comparison = comparison, budgets: Sequence = budgets) -> float:
            return 1 - comparison.flops / flops_to_reach(bpb, budgets)

        low = high = None
        if comparison.spread is not None:
            error = 2 * comparison.spread / math.sqrt(len(comparison.gaps)) * comparison.bpb
            low, high = saved(comparison.bpb + error), saved(comparison.bpb - error)
        found[size] = saved(comparison.bpb), low, high
    return found


def flops_to_reach(bpb: float, budgets: Sequence[tuple[float, float]]) -> float:
    """Training FLOPs at which the baseline has these bits per byte: a power law between neighbouring budgets.

    One law through all of them would not do: it passes some below what was measured, and worse models would save.

    Args:
        budgets: two or more, FLOPs and bits per byte, these falling. Beyond the last, the last two's law holds.
    """
    after = next((i for i, (_, reached) in enumerate(budgets) if i > 0 and reached <= bpb), len(budgets) - 1)
    points = [(math.log(reached), math.log(flops)) for flops, reached in budgets[after - 1 : after + 1]]
    slope, level = line_through(points)
    return math.exp(level + slope * math.log(bpb))


def rate_curves(results: Iterable[Result]) -> dict[tuple[Setting, str], Curve]:
    """Loss against base learning rate, of the sweeps over rates."""
    curves: dict[tuple[Setting, str], Curve] = {}
    for result in results:
        if result.rate is not None:
            curves.setdefault((result.setting, result.model), Curve()).losses[result.rate] = result.loss
    return dict(sorted(curves.items()))


# What it shows


def must_show(results: Sequence[Result]) -> dict[str, Bar]:
    """The bars; None where runs are missing."""
    comparisons, curves = compare(results), rate_curves(results)
    of_bytes, of_bpe = (_decisive(comparisons, kind) for kind in KINDS)
    two = of_bytes[-2:]
    seeded = most_seeds(comparisons, "bytes") if len(two) == 2 else None
    last = of_bpe[-1] if of_bpe else None
    gap = None if last is None or not last.is_matched else last.gap
    sizes, budgets = len({c.setting.size for c in of_bpe}), _budgets(comparisons)
    percent = None if gap is None else 100 * gap
    return {
        "bytes: the recipe's worse gap of two sizes, %": Bar(
            worst((_percent(c) for c in two), at_most=True) if len(two) == 2 else None, 100 * WIN, at_most=True
        ),
        "bytes: its gap at the larger size over most seeds, %": Bar(
            None if seeded is None else _percent(seeded), 100 * WIN, at_most=True
        ),
        "bytes: these seeds": Bar(None if seeded is None else len(seeded.gaps), SEEDS),
        "BPE: the recipe's gap at the largest setting, %": Bar(percent, 100 * PARITY, at_most=True),
        "BPE: the same, the goal": Bar(percent, 100 * WIN, at_most=True),
        "BPE: training FLOPs of a model there": Bar(None if last is None else last.flops, TRAINING_FLOPS),
        "BPE: sizes": Bar(sizes or None, SIZES),
        "budgets at each size, of both": Bar(budgets, BUDGETS),
        "models tuned whose best rate is at the edge of the grid": Bar(
            sum(not curve.is_bracketed for curve in curves.values()) if curves else None, 0, at_most=True
        ),
        "rates tried of a DLCM and not of its baseline": Bar(_more_tuned(curves), 0, at_most=True),
    }


def _more_tuned(curves: Mapping[tuple[Setting, str], Curve]) -> int | None:
    """The most learning rates that any model was tried at beyond those of its baseline."""
    found = []
    for (setting, model), curve in curves.items():
        if model not in BASELINES.values():
            baseline = max(
                (curves.get((setting, name), Curve()) for name in BASELINES.values()), key=lambda x: len(x.losses)
            )
            found.append(len(curve.losses) - len(baseline.losses))
    return max(found, default=None)


def _decisive(comparisons: Comparisons, kind: str) -> list[Comparison]:
    """The recipe's comparisons, by size."""
    chosen = recipe(comparisons, kind)
    return [] if chosen is None else list(largest_settings(comparisons, kind, chosen).values())


def most_seeds(comparisons: Comparisons, kind: str) -> Comparison | None:
    """The recipe where it was run at its largest size with the most seeds, of several at the most tokens."""
    decisive = _decisive(comparisons, kind)
    if not decisive:
        return None
    last = decisive[-1]
    same_size = [
        models[last.model]
        for setting, models in comparisons.items()
        if (setting.kind, setting.size) == (kind, last.setting.size) and last.model in models
    ]
    return max(same_size, key=lambda comparison: (len(comparison.gaps), comparison.setting.tokens))


def _percent(comparison: Comparison) -> float | None:
    return None if comparison.gap is None or not comparison.is_matched else 100 * comparison.gap


def _budgets(comparisons: Comparisons) -> int | None:
    """The fewest at any size of either recipe."""
    numbers = []
    for kind in KINDS:
        chosen = recipe(comparisons, kind)
        numbers.append([] if chosen is None else [trend.budgets for trend in trends(comparisons, kind, chosen)])
    return min(map(min, numbers)) if all(numbers) else None


def gap_rows(comparisons: Comparisons) -> list[dict[str, Any]]:
    """Every model of every setting, flat."""
    rows = []
    for setting, models in comparisons.items():
        for model, comparison in models.items():
            runs = list(comparison.runs.values())
            ratios = [run.tokens_per_concept for run in runs if run.tokens_per_concept is not None]
            losses = [run.loss for run in runs if run.loss is not None]
            rows.append(
                {
                    **setting._asdict(),
                    "model": model,
                    "seeds": sorted(comparison.runs),
                    "loss": statistics.mean(losses),
                    "bpb": comparison.bpb,
                    "bpb_by_seed": [comparison.runs[seed].bpb for seed in sorted(comparison.runs)],
                    "baseline": comparison.baseline,
                    "gap": None if model == comparison.baseline else comparison.gap,
                    "gap_spread": None if model == comparison.baseline else comparison.spread,
                    "flops_ratio": comparison.flops_ratio,
                    "matched": comparison.is_matched,
                    "training_flops": comparison.flops,
                    "tokens_per_concept": statistics.mean(ratios) if ratios else None,
                    "parameters": runs[0].parameters,
                }
            )
    return rows


def ledger(comparisons: Comparisons) -> list[tuple[str, ...]]:
    """Every idea, and what came of it."""
    found: dict[tuple[str, str], list[str]] = {}
    for setting, models in comparisons.items():
        for model, comparison in models.items():
            if model not in BASELINES.values() and comparison.gap is not None:
                unmatched = "" if comparison.is_matched else " (not matched)"
                cell = f"{setting.size}, {_millions(setting.tokens)}: {100 * comparison.gap:+.2f} %{unmatched}"
                found.setdefault((setting.kind, model), []).append(cell)
    return [(kind, model, IDEAS.get(model, "-"), "; ".join(cells)) for (kind, model), cells in sorted(found.items())]


def closed_share(comparisons: Comparisons, kind: str) -> str:
    """How much of the paper recipe's gap the best recipe closes, in words."""
    chosen = recipe(comparisons, kind)
    if chosen is None:
        return f"{kind}: no matched model has been compared yet."
    papers = largest_settings(comparisons, kind, PAPER)
    sentences = []
    for size, comparison in largest_settings(comparisons, kind, chosen).items():
        gap = f"{100 * _value(comparison.gap):+.2f} %"
        of_paper = comparisons[comparison.setting].get(PAPER) if size in papers else None
        if of_paper is None or of_paper.baseline != comparison.baseline or not (of_paper.gap or 0) > 0:
            sentences.append(f"{gap} at d = {size}")
        else:
            of_paper_gap = _value(of_paper.gap)
            share = 1 - _value(comparison.gap) / of_paper_gap
            sentences.append(f"{gap} at d = {size} (the paper's {100 * of_paper_gap:+.2f} %: {share:.0%} of it closed)")
    return f"{kind}: the recipe is `{chosen}`, {IDEAS.get(chosen, '')}; its gap is {', '.join(sentences)}."


def _millions(tokens: float) -> str:
    return f"{tokens / 1e6:,.0f} M"


def plot(path: Path, comparisons: Comparisons) -> None:
    """Writes a PNG: bits per byte against tokens, FLOPs and wall-clock; baseline, paper and recipe at each size.

    All of a size in the recipe's largest setting there: a schedule that is longer is no better on its way.
    """
    figure = Figure(figsize=(15, 9), dpi=130, layout="constrained")
    grid = figure.subplots(2, 3)
    for row, kind in zip(grid, KINDS, strict=True):
        chosen = recipe(comparisons, kind)
        settings = [] if chosen is None else [c.setting for c in largest_settings(comparisons, kind, chosen).values()]
        drawn = dict.fromkeys((*BASELINES.values(), PAPER, chosen))
        for colour, model in zip(PALETTE, drawn, strict=False):
            for style, setting in zip(("-", "--", ":", "-."), settings, strict=False):
                comparison = comparisons[setting].get(str(model))
                if comparison is None:
                    continue
                run = comparison.runs[min(comparison.runs)]
                tokens, bpb = (np.array(x) for x in zip(*run.curve, strict=True))
                label = f"{model}, d = {setting.size}"
                scales = (1.0, run.flops / run.setting.tokens, None if run.speed is None else 1 / run.speed)
                for axes, scale in zip(row, scales, strict=True):
                    if scale is not None:
                        axes.plot(tokens * scale, bpb, style, color=colour, label=label, linewidth=1.4)
        for axes, x in zip(row, ("training tokens", "training FLOPs", "seconds, at the median speed"), strict=True):
            finish(axes, kind, x, "bits per byte")
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            if axes.lines:
                axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def page(
    recorded: Mapping[str, Any],
    results: Sequence[Result],
    cut_off: Sequence[CutOff],
    knockouts: Sequence[Mapping[str, Any]],
) -> str:
    """The results in markdown."""
    worth = [
        (f"{row['kind']}, {row['model']}", f"{row['whole']:.4f}", *(f"{row[what]:+.4f}" for what in REMOVED))
        for row in knockouts
    ]
    comparisons, curves = compare(results), rate_curves(results)
    gaps = [
        (
            f"{row['kind']}, {row['size']}, {_millions(row['tokens'])}, {row['model']}",
            f"{row['bpb']:.4f}",
            f"{row['loss']:.4f}",
            None if row["gap"] is None else f"{100 * row['gap']:+.2f} %",
            None if row["gap_spread"] is None else f"{100 * row['gap_spread']:.2f} %",
            len(row["seeds"]),
            None
            if row["flops_ratio"] is None
            else f"{row['flops_ratio']:.3f}{'' if row['matched'] else ' **not matched**'}",
            None if row["tokens_per_concept"] is None else f"{row['tokens_per_concept']:.2f}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['training_flops']:.2e}",
        )
        for row in gap_rows(comparisons)
    ]
    tuned = [
        (
            f"{setting.kind}, {setting.size}, {model}",
            len(curve.losses),
            f"{curve.optimum:.2e}",
            f"{curve.best[1]:.4f}",
            "yes" if curve.is_bracketed else "**no**",
        )
        for (setting, model), curve in curves.items()
        if curve.best is not None
    ]
    broken = [
        (
            f"{planned.kind}, {planned.size}, {_millions(planned.tokens)}, {model}",
            _millions(tokens),
            f"{bpb:.4f}",
            None if gap is None else f"{100 * gap:+.2f} %",
        )
        for planned, model, tokens, bpb, gap in cut_off
    ]
    chosen = {kind: recipe(comparisons, kind) for kind in KINDS}
    lines = [trend for kind, model in chosen.items() if model for trend in trends(comparisons, kind, model)]
    moving = [
        (
            f"{trend.kind}, {trend.size}, {trend.model}",
            trend.budgets,
            None if trend.per_doubling is None else f"{100 * trend.per_doubling:+.3f} %",
            None if trend.crossover is None else f"{trend.crossover:.2e}",
        )
        for trend in lines
    ]
    saved = [
        (f"{kind}, {size}, {model}", f"{value:+.1%}", "-" if low is None else f"{low:+.1%} to {high:+.1%}")
        for kind, model in chosen.items()
        if model
        for size, (value, low, high) in flops_saved(comparisons, kind, model).items()
    ]
    header = (
        "setting",
        "bits per byte",
        "nats per token",
        "gap",
        "spread",
        "seeds",
        "FLOPs",
        "R",
        "parameters",
        "training",
    )
    return f"""# DLCM against LLaMA at equal tokens and equal forward FLOPs

{bars_table(must_show(results))}

{" ".join(closed_share(comparisons, kind) for kind in KINDS)} A gap is (model - LLaMA) / LLaMA in bits per byte of
held-out text, below zero where the model is better. The LLaMA is the one that norms queries and keys where the model
does; a model that was compared with the weaker of the two is no candidate. The [protocol](../headline_protocol.md) was
written before the runs. Bars that were not measured do not hold. Seconds are of runs that may have shared a GPU.

![bits per byte against tokens, FLOPs and time](headline.png)

## Every model of every setting

{markdown_table(header, gaps)}

FLOPs are forward, per token, over LLaMA's, at the tokens per concept (R) of the last validation.

## Runs that were cut off

{markdown_table(("planned", "at", "bits per byte", "gap there"), broken)}

They count for nothing above. The gap is to the baseline of the same schedule at the same tokens, before the decay.

## What concepts are worth

{markdown_table(("model", "nats per token", *REMOVED), worth)}

Nats that a trained model loses without them: `unreasoned`, concepts as pooled; `strangers`, those of other places;
`mean`, one concept for all; `none`, nothing read (`eval.knockout`). Where `strangers` and `mean` cost nothing, tokens
read the same whatever the concepts say: the model has learned a constant.

## Learning rates

{markdown_table(("model", "rates", "best", "loss", "worse on both sides"), tuned)}

## Trend

{markdown_table(("recipe", "budgets", "gap per doubling of tokens", "crossover, tokens"), moving)}

## Training FLOPs saved at equal bits per byte

{markdown_table(("recipe", "saved", "interval"), saved)}

## Ledger

{markdown_table(("tokens", "model", "idea", "gap by size and tokens"), ledger(comparisons))}

Trained on {"; ".join(dict.fromkeys(result.trained for result in results))}.  
{record_lines(recorded)}
"""


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.headline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, help="where the sweeps of configs/headline wrote: runs/headline")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    options = parser.parse_args(arguments)
    results, recorded = read_results(options.runs), record(options.commit)
    cut_off, knockouts = read_cut_off(options.runs, results), read_knockouts(options.runs)
    bars, comparisons = must_show(results), compare(results)
    chosen = {kind: recipe(comparisons, kind) for kind in KINDS}
    write_json(
        options.output / "headline.json",
        recorded,
        bars,
        recipes=chosen,
        models=gap_rows(comparisons),
        rates=[
            {**setting._asdict(), "model": model, "losses": {str(rate): loss for rate, loss in curve.losses.items()}}
            for (setting, model), curve in rate_curves(results).items()
        ],
        cut_off=[broken._asdict() | {"planned": broken.planned._asdict()} for broken in cut_off],
        knockouts=knockouts,
        trends=[t._asdict() for kind, model in chosen.items() if model for t in trends(comparisons, kind, model)],
        flops_saved={
            kind: {str(size): saved for size, saved in flops_saved(comparisons, kind, model).items()}
            for kind, model in chosen.items()
            if model
        },
        curves=[
            {**result.setting._asdict(), "model": result.model, "seed": result.seed, "rate": result.rate}
            | {"flops_per_token": result.flops / result.setting.tokens, "speed": result.speed, "curve": result.curve}
            for result in results
        ],
    )
    (options.output / "headline.md").write_text(page(recorded, results, cut_off, knockouts), encoding="utf-8")
    plot(options.output / "headline.png", comparisons)
    print(bars_table(bars))


if __name__ == "__main__":
    sys.exit(main())
