"""What models cost, stage by stage and side by side: parameters, FLOPs, bytes (see dlcm/flops.py).

    python -m eval.flops CONFIG [CONFIG ...] [--length L] [--ratio R] [--context N] [--batch B]
    python -m eval.flops CONFIG --checkpoint RUN ...
    python -m eval.flops CONFIG --match TEMPLATE --free depth
    python -m eval.flops CONFIG --sweep R=2,4,8 backbone_share=0.3,0.5,0.7 --output runs/sweep

CONFIG is the YAML of a run. `--checkpoint` takes a run directory or a checkpoint, and the tokens per concept that its
last validation really had. `--match` fits the second model to the first in forward FLOPs per token (eval/matching.py)
and says what to change. `--json` writes everything to a file.

`--sweep` asks what a DLCM's share of parameters in the backbone, P, and R are worth: both are varied with all of its
parameters but embedding and head, N, kept, by scaling the backbone and what is around it. FLOPs saved are those of a
forward pass, against N parameters that all work on every token, as in the paper's Fig. 6(b).
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dlcm import DLCMConfig
from dlcm.flops import (
    TABLES,
    ByStage,
    Config,
    cache_bytes_per_token,
    decode_bytes,
    decode_flops,
    forward_flops,
    parameter_counts,
    prefill_flops,
    training_flops,
    training_memory,
)
from eval.bench import PALETTE, finish, markdown_table
from eval.loading import EvaluationError, checkpoint_directory, positive, report_errors
from eval.matching import Free, match
from train.config import build_model_config, load_run_config
from train.metrics import read_metrics

SWEEPS = ("R", "backbone_share")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be counted."""

    name: str
    config: Config
    length: int  # tokens of a document
    micro_batch: int  # tokens
    accumulates: bool
    recompute: bool
    ratio: float | None  # tokens per concept; None for a model without concepts


@dataclass(frozen=True, slots=True)
class Costs:
    """What it costs; FLOPs and bytes are per token where not said otherwise."""

    parameters: ByStage
    forward: ByStage
    replicated: float
    training: ByStage
    prefill: float  # of the whole context
    decode: ByStage
    cache: ByStage
    decode_bytes: ByStage
    training_peak: float  # bytes on one device


def from_run(path: Path, length: int | None, ratio: float | None) -> Subject:
    """The model that a run's YAML describes, at its target ratio or another.

    Raises:
        ConfigError: no run configuration.
    """
    run = load_run_config(path)
    config = build_model_config(run)
    if isinstance(config, DLCMConfig):
        ratio = config.target_ratio if ratio is None else ratio
    return Subject(
        name=f"{path.parent.name}/{path.stem}",
        config=config,
        length=length or run.data.sequence_length,
        micro_batch=run.batch.rows * run.data.sequence_length,
        accumulates=run.batch.accumulation > 1,
        recompute=run.activation_checkpointing == "full",
        ratio=ratio if isinstance(config, DLCMConfig) else None,
    )


def from_checkpoint(path: Path, length: int | None) -> Subject:
    """The model of a run directory or checkpoint, at the tokens per concept of its last validation.

    Raises:
        CheckpointError: there is no good one.
        EvaluationError: it has concepts, but no validation counted them.
    """
    directory = checkpoint_directory(path)
    subject = from_run(directory / "run.yaml", length, None)
    ratio = None
    if isinstance(subject.config, DLCMConfig):
        run_dir = directory.parent.parent if directory.parent.name == "checkpoints" else directory
        counted = [line["tokens_per_concept"] for line in read_metrics(run_dir) if line["kind"] == "validation"]
        if not counted:
            raise EvaluationError(f"{run_dir}: no validation has counted tokens per concept; give --ratio and the YAML")
        ratio = counted[-1]
    return dataclasses.replace(subject, name=str(path), ratio=ratio)


def count(subject: Subject, context: int, batch: int) -> Costs:
    """Everything there is to know about one model.

    Args:
        subject: the model.
        context: tokens of the prompt, and before the decoded one.
        batch: rows that are decoded together.
    """
    config, length, ratio = subject.config, subject.length, subject.ratio
    return Costs(
        parameters=ByStage(dict(parameter_counts(config))),
        forward=forward_flops(config, length, ratio),
        replicated=forward_flops(config, length, ratio, replicated=True).total,
        training=training_flops(config, length, ratio, recompute=subject.recompute),
        prefill=prefill_flops(config, context, ratio).total,
        decode=decode_flops(config, context, ratio),
        cache=cache_bytes_per_token(config, ratio),
        decode_bytes=decode_bytes(config, context, batch, ratio),
        training_peak=training_memory(
            config, subject.micro_batch, ratio, recompute=subject.recompute, accumulates=subject.accumulates
        ).peak,
    )


def stage_table(subject: Subject, costs: Costs, context: int, batch: int) -> str:
    """One model, stage by stage."""
    header = ["stage", "parameters, M", "forward, MFLOP", "share", "training, MFLOP"]
    header += [f"decode at {context:,}, MFLOP", "cache, B", f"decode, MB at batch {batch}"]

    def line(name: str, *values: float) -> tuple[str, ...]:
        parameters, forward, training, decode, cache, moved = values
        share = forward / costs.forward.total
        numbers = (parameters / 1e6, forward / 1e6, 100 * share, training / 1e6, decode / 1e6, cache, moved / 1e6)
        forms = (",.2f", ",.2f", ".1f", ",.1f", ",.2f", ",.0f", ",.2f")
        shown = [f"{number:{form}}" for number, form in zip(numbers, forms, strict=True)]
        return name, *shown[:2], f"{shown[2]} %", *shown[3:]

    each = (costs.parameters, costs.forward, costs.training, costs.decode, costs.cache, costs.decode_bytes)
    lines = [line(stage, *(part.stages.get(stage, 0.0) for part in each)) for stage in costs.parameters.stages]
    return markdown_table(header, [*lines, line("all", *(part.total for part in each))])


def comparison_table(subjects: Sequence[Subject], counted: Sequence[Costs], context: int, batch: int) -> str:
    """Totals side by side, and over those of the last model."""

    def line(name: str, values: Sequence[float], form: str, unit: float) -> list[str]:
        return [name, *(f"{value / unit:{form}}" for value in values), *(f"{v / values[-1]:.3f}" for v in values[:-1])]

    rows = [
        line("parameters, M", [c.parameters.total for c in counted], ",.1f", 1e6),
        line("without embedding and head, M", [_body(c.parameters) for c in counted], ",.1f", 1e6),
        line("forward, MFLOP / token", [c.forward.total for c in counted], ",.1f", 1e6),
        line("forward with concepts replicated, MFLOP / token", [c.replicated for c in counted], ",.1f", 1e6),
        line("training, MFLOP / token", [c.training.total for c in counted], ",.1f", 1e6),
        line(f"prefill of {context:,} tokens, TFLOP", [c.prefill for c in counted], ",.2f", 1e12),
        line(f"decode at {context:,}, MFLOP / token", [c.decode.total for c in counted], ",.1f", 1e6),
        line("cache, KB / token", [c.cache.total for c in counted], ",.2f", 1e3),
        line(f"decode at {context:,}, batch {batch}, MB / token", [c.decode_bytes.total for c in counted], ",.1f", 1e6),
        line("training peak, one device, GB", [c.training_peak for c in counted], ",.1f", 1e9),
    ]
    names = [subject.name if s == 1 else f"{subject.name} ({s})" for s, subject in _numbered(subjects)]
    over = [f"{name} over {names[-1]}" for name in names[:-1]]
    return markdown_table(("total", *names, *over), rows)


def _numbered(subjects: Sequence[Subject]) -> list[tuple[int, Subject]]:
    seen: dict[str, int] = {}
    numbered = []
    for subject in subjects:
        seen[subject.name] = seen.get(subject.name, 0) + 1
        numbered.append((seen[subject.name], subject))
    return numbered


def _body(parts: ByStage) -> float:
    return sum(value for stage, value in parts.stages.items() if stage not in TABLES)


def conditions(subject: Subject) -> str:
    """One line on what was counted."""
    ratio = "" if subject.ratio is None else f", {subject.ratio:.3g} tokens per concept"
    recomputed = ", blocks recomputed" if subject.recompute else ""
    return f"{subject.name}: documents of {subject.length:,} tokens{ratio}{recomputed}"


# Sweeps


def sweep(subject: Subject, ratios: Sequence[float], shares: Sequence[float]) -> list[dict[str, float]]:
    """Forward FLOPs per token at N parameters for each P and R, and those saved against N at token level.

    Raises:
        EvaluationError: the model has no concepts, or a value makes no sense.
    """
    if not isinstance(subject.config, DLCMConfig):
        raise EvaluationError(f"{subject.name} has no concepts to sweep over: give a DLCM")
    if min(ratios) < 1 or not all(0 <= share < 1 for share in shares):
        raise EvaluationError("R must be at least 1, and backbone_share in [0, 1)")
    parameters = parameter_counts(subject.config)
    number = sum(count for stage, count in parameters.items() if stage not in TABLES)
    rows = []
    for share, ratio in itertools.product(shares, ratios):
        stages = forward_flops(subject.config, subject.length, ratio).stages

        def per_parameter(of_backbone: bool, stages: dict[str, float] = stages) -> float:
            chosen = [stage for stage in stages if stage not in TABLES and (stage == "backbone") == of_backbone]
            return sum(stages[stage] for stage in chosen) / sum(parameters[stage] for stage in chosen)

        at_token_level = number * per_parameter(False) + stages["head"]
        flops = number * ((1 - share) * per_parameter(False) + share * per_parameter(True)) + stages["head"]
        rows.append({"R": ratio, "backbone_share": share, "forward_flops": flops, "saved": 1 - flops / at_token_level})
    return rows


def plot_sweep(path: Path, name: str, rows: Sequence[dict[str, float]]) -> None:
    """Writes a PNG: FLOPs saved over R, a line for each share."""
    figure = Figure(figsize=(6.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    for colour, share in zip(itertools.cycle(PALETTE), sorted({row["backbone_share"] for row in rows}), strict=False):
        line = sorted((row["R"], 100 * row["saved"]) for row in rows if row["backbone_share"] == share)
        axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4, label=f"P = {share:.0%}")
    axes.legend(frameon=False, title="parameters in the backbone")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    finish(axes, f"Forward FLOPs saved at equal parameters\n{name}", "tokens per concept, R", "per cent")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse_sweeps(given: Sequence[str], config: Config) -> dict[str, list[float]]:
    """What to vary; the model's own value where a name is not given.

    Raises:
        EvaluationError: not NAME=NUMBER,NUMBER, or an unknown name.
    """
    parameters = parameter_counts(config)
    body = sum(count for stage, count in parameters.items() if stage not in TABLES)
    own = parameters.get("backbone", 0) / body
    sweeps = {"R": [getattr(config, "target_ratio", 1.0)], "backbone_share": [own]}
    for text in given:
        name, _, values = text.partition("=")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if name not in SWEEPS or not numbers:
            raise EvaluationError(f"--sweep {text}: give NAME=NUMBER,NUMBER,... with a NAME of {', '.join(SWEEPS)}")
        sweeps[name] = numbers
    return sweeps


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    subjects = [from_run(path, options.length, options.ratio) for path in options.configs]
    subjects += [from_checkpoint(path, options.length) for path in options.checkpoint]
    if not subjects:
        raise EvaluationError("nothing to count: give the YAML of a run, or --checkpoint RUN")
    content: dict[str, Any] = {}
    if options.match is not None:
        subjects.append(matched(subjects[0], from_run(options.match, subjects[0].length, options.ratio), options.free))
    if options.sweep:
        sweeps = parse_sweeps(options.sweep, subjects[0].config)
        rows = content["sweep"] = sweep(subjects[0], sweeps["R"], sweeps["backbone_share"])
        print(conditions(subjects[0]), end="\n\n")
        header = ("backbone share", "R", "forward, MFLOP / token", "saved")
        lines = [(f"{r['backbone_share']:.3f}", f"{r['R']:g}", f"{r['forward_flops'] / 1e6:,.1f}") for r in rows]
        saved = [f"{row['saved']:.1%}" for row in rows]
        print(markdown_table(header, [(*line, share) for line, share in zip(lines, saved, strict=True)]))
        plot_sweep(options.output / "flops_saved.png", subjects[0].name, rows)
        print(f"\nplot: {options.output / 'flops_saved.png'}")
    else:
        counted = [count(subject, options.context, options.batch) for subject in subjects]
        for subject, costs in zip(subjects, counted, strict=True):
            print(f"{conditions(subject)}\n\n{stage_table(subject, costs, options.context, options.batch)}\n")
            content[subject.name] = {
                name: value.stages | {"total": value.total} if isinstance(value, ByStage) else value
                for name, value in ((name, getattr(costs, name)) for name in Costs.__slots__)
            }
        if len(subjects) > 1:
            print(comparison_table(subjects, counted, options.context, options.batch))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def matched(wanted: Subject, template: Subject, free: Free) -> Subject:
    """The template, fitted to the forward FLOPs per token of another model; prints what to change."""
    flops = forward_flops(wanted.config, wanted.length, wanted.ratio).total
    found = match(template.config, flops, wanted.length, free, template.ratio)
    overrides = " ".join(f"model.{name}={value}" for name, value in found.changes.items()) or "nothing"
    print(
        f"{template.name} has {found.ratio:.4f} of the forward FLOPs of {wanted.name} "
        f"({flops / 1e6:,.1f} MFLOP / token) with\n    {overrides}\n"
    )
    return dataclasses.replace(template, name=f"{template.name}, matched", config=found.config, length=wanted.length)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.flops", description="Counts parameters, FLOPs and bytes of models, stage by stage."
    )
    parser.add_argument("configs", nargs="*", type=Path, metavar="CONFIG", help="YAML of a run")
    parser.add_argument("--checkpoint", nargs="+", type=Path, default=[], metavar="RUN", help="at its realised ratio")
    parser.add_argument("--length", type=positive, help="tokens of a document; default: the configuration's")
    parser.add_argument("--ratio", type=float, help="tokens per concept; default: the configuration's target")
    parser.add_argument("--context", type=positive, default=8192, help="tokens of prompt and cache (%(default)s)")
    parser.add_argument("--batch", type=positive, default=1, help="rows that are decoded together (%(default)s)")
    parser.add_argument("--match", type=Path, metavar="TEMPLATE", help="YAML of the run to fit to the first model")
    parser.add_argument("--free", choices=("depth", "width", "swiglu"), default="depth", help="what --match may change")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="NAME=VALUES", help="R=2,4,8 backbone_share=0.3,0.5")
    parser.add_argument("--output", type=Path, default=Path("runs/flops"), help="of the sweep's plot (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
