"""What it costs that ranks have different numbers of concepts.

    python -m eval.imbalance RUN [--ranks 8] [--steps 500] [--output docs/results]

Tokens are the same in every micro-batch, concepts are not; and ranks wait for each other, with sharded parameters in
every block. While the rank that has most concepts runs its backbone, the others wait: a step takes

    1 + share * (max / mean - 1)

times as long as one whose concepts are spread evenly, where max and mean are of concepts over ranks, and share is the
backbone's share of FLOPs, at the tokens per concept that there are. In training it is `concept_imbalance` in the
metrics, over all micro-batches of a step; here it is simulated before there are several GPUs: boundaries are those that
RUN, a trained DLCM, decides in its own training text, and windows are dealt out to ranks at random, as the loader does.
So mixed are the windows that ranks get: what a window is of (prose, code, Chinese) decides most of its concepts.

    lock step   ranks wait for each other in every micro-batch, as under FSDP: max / mean of each, on average
    once        gradients travel with the last micro-batch, as under DDP: max / mean of a step's concepts

Writes concept_imbalance.json and concept_imbalance.md to `--output`. A minute on a CPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dlcm import DLCMForCausalLM
from dlcm.flops import forward_flops
from eval.accounting import CONFIGS
from eval.bench import Bar, Row, bars_table, find, markdown_table, record, record_lines, worst, write_json
from eval.loading import EvaluationError, load_checkpoint, report_errors
from train.config import build_model_config, load_run_config
from train.data import TokenShards, validation_batches

FAMILIES = ("small", "medium", "table3")
MOST = 0.03  # of a step; more, and windows would have to be dealt out by their concepts


@torch.no_grad()
def boundaries(model: DLCMForCausalLM, shards: TokenShards, length: int, rows: int = 8) -> np.ndarray:
    """(tokens,) bool: where the model begins a concept, as at inference, in windows of `length` tokens.

    That a window begins is no reason, unless a document does.
    """
    found: list[np.ndarray] = []
    for batch in validation_batches(shards, length, rows, None):
        output = model(
            batch.input_ids[None].to(model.device),
            labels=batch.labels[None].to(model.device),
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            return_logits=False,
        )
        boundary_T = output.boundaries[0].cpu()
        start = sum(len(earlier) for earlier in found)
        for first in range(0, len(boundary_T), length):
            _, opens = shards.window(start + first, 1)
            boundary_T[first] = len(opens) > 0
        found.append(boundary_T.numpy())
    return np.concatenate(found)


def concepts_of_windows(boundary_T: np.ndarray, length: int) -> np.ndarray:
    """(windows,) concepts of each; its first token opens one."""
    windows_WL = boundary_T[: len(boundary_T) // length * length].reshape(-1, length)
    return windows_WL[:, 1:].sum(1) + 1


def dealt_out(windows_W: np.ndarray, shape: tuple[int, int, int, int], seed: int) -> np.ndarray:
    """(steps, micro-batches, ranks) concepts of a micro-batch: windows in epochs, each in an order of its own.

    Args:
        windows_W: concepts of each window.
        shape: steps, micro-batches of a step, ranks, windows of a micro-batch.
        seed: of the orders.
    """
    draw, needed = np.random.default_rng(seed), int(np.prod(shape))
    epochs = [draw.permutation(windows_W) for _ in range(-(-needed // len(windows_W)))]
    return np.concatenate(epochs)[:needed].reshape(shape).sum(-1)


def measure(family: str, boundary_T: np.ndarray, ranks: int, steps: int, seed: int = 0) -> list[Row]:
    """A row for each way in which ranks wait, under the configuration of a family's DLCM.

    Raises:
        EvaluationError: the text is shorter than a micro-batch of every rank.
    """
    run = load_run_config(CONFIGS / family / "dlcm.yaml")
    length, batch = run.data.sequence_length, run.batch
    windows_W = concepts_of_windows(boundary_T, length)
    if len(windows_W) < ranks * batch.rows:
        raise EvaluationError(
            f"{len(windows_W)} windows of {length} tokens are fewer than {ranks} ranks with {batch.rows} each: "
            f"prepare more text, or give fewer --ranks"
        )
    ratio = length / float(windows_W.mean())
    stages = forward_flops(build_model_config(run), length, ratio).stages
    share = stages["backbone"] / sum(stages.values())
    concepts_SAR = dealt_out(windows_W, (steps, batch.accumulation, ranks, batch.rows), seed).astype(float)
    rows: list[Row] = []
    for waits, over_SR in (("lock step", concepts_SAR.reshape(-1, ranks)), ("once", concepts_SAR.sum(1))):
        imbalance_S = over_SR.max(1) / over_SR.mean(1)
        rows.append(
            {
                "family": family,
                "waits": waits,
                "ranks": ranks,
                "windows": batch.rows,
                "sequence_length": length,
                "micro_batches": batch.accumulation,
                "tokens_per_concept": ratio,
                "imbalance": float(imbalance_S.mean()),
                "imbalance_95": float(np.quantile(imbalance_S, 0.95)),
                "backbone_share": share,
                "cost": share * float(imbalance_S.mean() - 1),
                "cost_95": share * float(np.quantile(imbalance_S, 0.95) - 1),
            }
        )
    return rows


def must_show(rows: Sequence[Row]) -> dict[str, Bar]:
    """The bars, from rows alone."""
    return {
        f"longer a step for unequal concepts, {family}, on average": Bar(
            worst([row["cost"] for row in rows if row["family"] == family], at_most=True), MOST, at_most=True
        )
        for family in FAMILIES
    }


def page(recorded: dict, bars: dict[str, Bar], rows: Sequence[Row], text: str) -> str:
    """The results as markdown."""
    table = markdown_table(
        ("micro-batch", "ranks wait", "max / mean", "95 %", "backbone's share", "longer a step", "95 %"),
        (
            (
                f"{row['family']}, {row['windows']} x {row['sequence_length']:,}",
                "in lock step" if row["waits"] == "lock step" else f"once in {row['micro_batches']}",
                f"{row['imbalance']:.3f}",
                f"{row['imbalance_95']:.3f}",
                f"{row['backbone_share']:.1%}",
                f"{row['cost']:.2%}",
                f"{row['cost_95']:.2%}",
            )
            for family in FAMILIES
            for waits in ("lock step", "once")
            if (row := find(rows, family=family, waits=waits))
        ),
    )
    dear = [name for name, bar in bars.items() if not bar.holds]
    verdict = (
        f"All below {MOST:.0%}: windows need not be dealt out by their concepts."
        if not dear
        else f"{MOST:.0%} or more, or not measured: {'; '.join(dear)}. Larger micro-batches even concepts out."
    )
    parts = [
        "# Unequal numbers of concepts, simulated",
        record_lines(recorded),
        f"Written by `eval/imbalance.py`, whose docstring says what is counted. {text} No GPU has been timed: what a "
        "rank waits for is taken to be as long as its FLOPs say.",
        bars_table(bars),
        table,
        verdict,
    ]
    return "\n\n".join(parts) + "\n"


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    loaded = load_checkpoint(options.run)
    if not isinstance(loaded.model, DLCMForCausalLM):
        raise EvaluationError(f"{options.run}: has no concepts; give a run of a DLCM")
    if loaded.run.data.path is None:
        raise EvaluationError(f"{options.run}: was trained on a mixture; give a run of one data.path")
    shards = TokenShards(loaded.run.data.path, "train")
    length = loaded.model.config.max_position_embeddings
    boundary_T = boundaries(loaded.model, shards, length)
    rows = [row for family in FAMILIES for row in measure(family, boundary_T, options.ranks, options.steps)]
    bars, recorded = must_show(rows), record()
    text = (
        f"Boundaries of a DLCM of {loaded.model.num_parameters() / 1e6:.1f} M parameters after {loaded.state.step:,} "
        f"steps, in {len(boundary_T):,} tokens of {shards.path}, {len(boundary_T) / boundary_T.sum():.2f} tokens per "
        f"concept; {options.ranks} ranks, {options.steps:,} steps."
    )
    write_json(options.output / "concept_imbalance.json", recorded, bars, text=text, seed=0, rows=rows)
    (options.output / "concept_imbalance.md").write_text(page(recorded, bars, rows, text), encoding="utf-8")
    print(f"{bars_table(bars)}\n\nfiles are in {options.output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.imbalance", description="What unequal numbers of concepts cost on several ranks."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a trained DLCM: its checkpoint, and its prepared text")
    parser.add_argument("--ranks", type=int, default=8, help="that share a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="that are simulated (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where to write (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
