"""Compares a DLCM with its LLaMA baseline: quality against cost, and what each of them says.

    python -m eval.compare RUN_DLCM RUN_LLAMA [--passages FILE] [--output DIR]

Prints a table, held-out passages cut into concepts and a continuation by each model; writes comparison.json and
comparison.png. Losses and speeds are those that the runs recorded; only passages and continuations run the models.
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.ticker import EngFormatter

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.flops import forward_flops
from eval.generate import continue_prompt
from eval.loading import EvaluationError, LoadedCheckpoint, load_checkpoint, report_errors, visible
from eval.passages import DOMAINS, held_out_passages, read_passages
from eval.plots import CompressionCurves, Curve, LossCurves, plot_comparison
from eval.segmentation import Segmentation, render, segment, summary
from train.metrics import read_metrics

PROMPT = "The first thing that he said to the people was"
CONTINUATION_TOKENS = 80
MATCHED_FLOPS = 0.05  # relative difference beyond which two models do not cost the same
SAME_COMPRESSION = 0.1  # relative difference beyond which inference is not what was trained


@dataclass(frozen=True, slots=True)
class Run:
    """A run's newest checkpoint and what the run recorded up to it."""

    name: str
    loaded: LoadedCheckpoint
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]

    def curve(self, kind: Literal["train", "validation"], key: str) -> Curve:
        """A recorded number against training tokens, without the steps where it was not finite."""
        lines = [line for line in getattr(self, kind) if line[key] is not None]
        return Curve([line["tokens"] for line in lines], [line[key] for line in lines])


@dataclass(frozen=True, slots=True)
class Measurements:
    """The numbers of one run; None where a model has no concepts or a loss was not finite."""

    validation_bits_per_byte: float | None
    validation_loss: float | None  # nats per token
    forward_flops_per_token: float  # at the tokens per concept of inference
    forward_flops_per_token_at_target: float
    parameters: int
    non_embedding_parameters: int  # without embedding and unembedding
    training_tokens: int
    training_tokens_per_second: float
    tokens_per_concept_in_training: float | None  # boundaries sampled
    tokens_per_concept_at_inference: float | None  # boundaries thresholded


TABLE: dict[str, tuple[str, Callable[[float], str]]] = {
    "validation_bits_per_byte": ("validation bits per byte", "{:.4f}".format),
    "validation_loss": ("validation loss, nats per token", "{:.4f}".format),
    "forward_flops_per_token": ("forward FLOPs per token, realised", EngFormatter(places=2)),
    "forward_flops_per_token_at_target": ("forward FLOPs per token, at target", EngFormatter(places=2)),
    "parameters": ("parameters", "{:,}".format),
    "non_embedding_parameters": ("parameters without embeddings", "{:,}".format),
    "training_tokens": ("training tokens", "{:,}".format),
    "training_tokens_per_second": ("training tokens per second", "{:,.0f}".format),
    "tokens_per_concept_in_training": ("tokens per concept in training", "{:.2f}".format),
    "tokens_per_concept_at_inference": ("tokens per concept at inference", "{:.2f}".format),
}


def load_run(path: Path, name: str, model_class: type) -> Run:
    """Opens a run directory.

    Raises:
        EvaluationError: it holds another kind of model, or recorded no validation yet.
        CheckpointError, MetricsError: it cannot be read.
    """
    loaded = load_checkpoint(path)
    if not isinstance(loaded.model, model_class):
        raise EvaluationError(f"{path}: holds no {name}; give the DLCM's run first and the baseline's second")
    lines = [line for line in read_metrics(path) if line["step"] <= loaded.state.step]
    run = Run(
        name,
        loaded,
        train=[line for line in lines if line["kind"] == "train"],
        validation=[line for line in lines if line["kind"] == "validation"],
    )
    if not run.train or not run.validation:
        raise EvaluationError(
            f"{path}: recorded no validation yet; continue the run with python -m train.pretrain --resume {path}"
        )
    if not run.curve("train", "ce").values:
        raise EvaluationError(f"{path}: recorded no finite loss; there is nothing to compare")
    return run


def measure(run: Run) -> Measurements:
    """The run's numbers; FLOPs are those of documents as long as the training sequences."""
    model, length = run.loaded.model, run.loaded.run.data.sequence_length
    last = run.validation[-1]
    at_inference = last.get("tokens_per_concept")
    embeddings = model.embed_tokens.weight.numel() + model.lm_head.weight.numel()
    return Measurements(
        validation_bits_per_byte=last["bpb"],
        validation_loss=last["loss"],
        forward_flops_per_token=forward_flops(model.config, length, at_inference).total,
        forward_flops_per_token_at_target=forward_flops(model.config, length).total,
        parameters=model.num_parameters(),
        non_embedding_parameters=model.num_parameters() - embeddings,
        training_tokens=run.loaded.state.tokens,
        training_tokens_per_second=statistics.median(line["tokens_per_second"] for line in run.train),
        tokens_per_concept_in_training=_recent_tokens_per_concept(run.train),
        tokens_per_concept_at_inference=at_inference,
    )


def _recent_tokens_per_concept(train: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per concept over the last tenth of training; None for a model without concepts."""
    if "tokens_per_concept" not in train[-1]:
        return None
    recent = train[-max(1, len(train) // 10) :]
    return statistics.harmonic_mean(line["tokens_per_concept"] for line in recent)  # every step has as many tokens


def caveats(dlcm: Run, baseline: Run, ours: Measurements, theirs: Measurements) -> list[str]:
    """What keeps the two runs from being a matched comparison, or the DLCM's inference from being what it learned."""
    found = []
    flops_ratio = ours.forward_flops_per_token / theirs.forward_flops_per_token
    if abs(flops_ratio - 1) > MATCHED_FLOPS:
        found.append(f"not matched in compute: the DLCM's forward FLOPs are {flops_ratio:.2f} times the baseline's")
    sampled, thresholded = ours.tokens_per_concept_in_training, ours.tokens_per_concept_at_inference
    if sampled and thresholded and abs(thresholded / sampled - 1) > SAME_COMPRESSION:
        found.append(f"thresholding makes concepts {thresholded / sampled:.2f} times as long as in training")
    if dlcm.loaded.state.data_fingerprint != baseline.loaded.state.data_fingerprint:
        found.append("the runs were trained and validated on different data")
    tokens = dlcm.loaded.state.tokens, baseline.loaded.state.tokens
    if tokens[0] != tokens[1]:
        found.append("the runs were trained on different numbers of tokens: {:,} and {:,}".format(*tokens))
    for run in (dlcm, baseline):
        step, steps = run.loaded.state.step, run.loaded.run.schedule.steps
        if step < steps:
            found.append(f"the {run.name} run is unfinished: step {step:,} of {steps:,}")
    return found


def format_table(dlcm: Measurements, baseline: Measurements) -> str:
    """Both runs side by side, and the ratio of their numbers."""
    lines = [f"{'':36}{'DLCM':>14}{'LLaMA':>14}{'DLCM / LLaMA':>16}"]
    for key, (label, form) in TABLE.items():
        values = getattr(dlcm, key), getattr(baseline, key)
        cells = ["-" if value is None else form(value) for value in values]
        ratio = "-" if None in values else f"{values[0] / values[1]:.3f}"
        lines.append(f"{label:36}{cells[0]:>14}{cells[1]:>14}{ratio:>16}")
    return "\n".join(lines)


def concepts(dlcm: Run, text: str) -> Segmentation:
    """How the DLCM cuts a text."""
    model = dlcm.loaded.model
    assert isinstance(model, DLCMForCausalLM)  # seen to by load_run
    return segment(model, dlcm.loaded.tokenizer, text)


def continuation(run: Run, prompt: str) -> str:
    """What the run's model says after the prompt."""
    loaded = run.loaded
    length = min(CONTINUATION_TOKENS, loaded.model.config.max_position_embeddings // 2)
    return continue_prompt(loaded.model, loaded.tokenizer, prompt, max_new_tokens=length)


def write_figure(path: Path, dlcm: Run, baseline: Run) -> None:
    """The runs' curves as a PNG."""
    losses = [
        LossCurves(run.name, run.curve("train", "ce"), run.curve("validation", "loss")) for run in (dlcm, baseline)
    ]
    compression = CompressionCurves(
        sampled=dlcm.curve("train", "tokens_per_concept"),
        thresholded=dlcm.curve("validation", "tokens_per_concept"),
        target=dlcm.loaded.model.config.target_ratio,
    )
    plot_comparison(path, losses, compression)


def print_passage(domain: str, cut: Segmentation) -> None:
    print(f"\n{DOMAINS.get(domain, domain).capitalize()} in concepts ({summary(cut)}):")
    print(render(cut.pieces, colour=sys.stdout.isatty()))


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    dlcm = load_run(options.dlcm, "DLCM", DLCMForCausalLM)
    baseline = load_run(options.baseline, "LLaMA", LlamaBaselineForCausalLM)

    # What can fail comes first: a report is written whole or not at all.
    measured = {run.name: measure(run) for run in (dlcm, baseline)}
    ours, theirs = measured.values()
    warnings = caveats(dlcm, baseline, ours, theirs)
    passages = read_passages(options.passages) if options.passages else held_out_passages(dlcm.loaded)
    cuts = [(passage.domain, concepts(dlcm, passage.text)) for passage in passages]
    continuations = {run.name: continuation(run, options.prompt) for run in (dlcm, baseline)}

    output = options.output or options.dlcm.parent / "comparison"
    output.mkdir(parents=True, exist_ok=True)
    numbers, figure = output / "comparison.json", output / "comparison.png"
    report = {
        "measurements": {name: dataclasses.asdict(values) for name, values in measured.items()},
        "checkpoints": {run.name: str(run.loaded.path) for run in (dlcm, baseline)},
        "caveats": warnings,
        "segmentations": [{"domain": domain, **dataclasses.asdict(cut)} for domain, cut in cuts],
        "prompt": options.prompt,
        "continuations": continuations,
    }
    numbers.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_figure(figure, dlcm, baseline)

    print(format_table(ours, theirs))
    for warning in warnings:
        print(f"! {warning}")
    for domain, cut in cuts:
        print_passage(domain, cut)
    for name, text in continuations.items():
        print(f"\n{name} continues {options.prompt!r}:\n...{visible(text)}")
    print("\nFiles:")
    for path in (dlcm.loaded.path, baseline.loaded.path, numbers, figure):
        print(f"  {path}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description="Compares a DLCM with its baseline.")
    parser.add_argument("dlcm", type=Path, metavar="RUN_DLCM")
    parser.add_argument("baseline", type=Path, metavar="RUN_LLAMA")
    parser.add_argument(
        "--passages",
        type=Path,
        help='JSON lines {"domain": ..., "text": ...} to cut into concepts (default: from the validation split)',
    )
    parser.add_argument("--prompt", default=PROMPT, help="continued by both models (default: %(default)r)")
    parser.add_argument("--output", type=Path, help="where to write (default: `comparison` beside RUN_DLCM)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
