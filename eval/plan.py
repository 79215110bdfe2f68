"""What a pair needs on many GPUs, planned and not run: memory, communication, and the MFU that this leaves.

    python -m eval.plan [--pair table3] [--gpus 8 64 512] [--step-tokens 4194304] [--memory 80] [--mfu 0.48]
                        [--peak 989.4] [--machine 8] [--nvlink 450] [--infiniband 50] [--output docs/results]

For `ddp`, `fsdp` and `hybrid` (shards within a machine), with blocks kept and recomputed. A step has as many tokens on
any number of GPUs. A micro-batch has the most windows that divide a GPU's share of them evenly and fit into nine tenths
of `--memory`: the closed form of activations (dlcm/flops.py) is within a tenth of what was measured.

With N parameters, of which N_b are in blocks and cross-attention, which FSDP gathers one by one, the largest of B
parameters; n GPUs, s that share a copy (n for fsdp), a micro-batches a step. Bytes on a GPU:

    parameters      ddp  4 N               else  4 N / s
    moments         ddp  8 N               else  8 N / s
    gradients       ddp  4 N, in buckets   else  4 N where a > 1, whole until they travel;
                                                 4 N / s + 4 (N - N_b) + 2 (2 + 4) B where a = 1: of two blocks in bf16
                                                 as they come and in fp32 as they travel, and of what is in no block
    gathered                               else  4 (N - N_b), from forward to backward, + 2 * 2 B: two blocks in bf16
    activations     and a chunk of logits: of the micro-batch, as on one GPU

Bytes that a GPU sends, by rings:

    gathers         of a micro-batch: (s - 1) / s * (2 * 2 N_b + 4 (N - N_b)), blocks for forward and backward
    gradients       of a step: ddp  2 (n - 1) / n * 4 N
                               else (s - 1) / s * 4 N + 2 (n / s - 1) / (n / s) * 4 N / s, the latter between copies

A ring within a machine runs at NVLink's rate; one through several enters and leaves each by all of its adapters, so it
runs at `--machine` times InfiniBand's rate, if NVLink's is no lower; between copies, each GPU uses its own adapter.

Time of a micro-batch is its FLOPs, recomputed ones included, at `--mfu` of the peak: what one GPU reached alone
(docs/results/training.md). Overlapped, gathers cost what is longer than the micro-batch, and gradients what is longer
than the backward pass of the last one, two thirds of it; otherwise both are added. Left out: latencies, of which a ring
has n - 1 and which grow with n where messages are small; other traffic on the network; waiting for the slowest rank
(eval/imbalance.py), for data and for checkpoints.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dlcm.blocks import Block
from dlcm.cross_attention import CrossAttention
from dlcm.flops import FULL, HALF, Config, training_flops, training_memory
from eval.accounting import CONFIGS, build
from eval.bench import Row, markdown_table, record, record_lines, write_json
from eval.bench_decode_report import MODELS
from eval.loading import EvaluationError, positive, report_errors
from train.config import build_model_config, load_run_config
from train.utilisation import PEAK_FLOPS

STRATEGIES = ("ddp", "fsdp", "hybrid")
USABLE = 0.9  # of a GPU's memory


class Groups(NamedTuple):
    """Parameters as FSDP gathers them (see train/parallel.py)."""

    blocks: int  # in blocks and cross-attention: gathered one by one, in bf16
    largest: int  # of one of them
    others: int  # gathered together, in fp32

    @property
    def total(self) -> int:
        return self.blocks + self.others


class Memory(NamedTuple):
    """Bytes on one GPU."""

    parameters: float
    moments: float
    gradients: float
    gathered: float
    activations: float

    @property
    def peak(self) -> float:
        return sum(self)


class Traffic(NamedTuple):
    """Bytes that a GPU sends."""

    gathers: float  # in a micro-batch, over shards
    scatters: float  # of gradients, over shards
    between: float  # of gradients, over copies


@dataclass(frozen=True, slots=True)
class Cluster:
    """What there is to compute with; bytes and FLOPs per second and GPU."""

    memory: float
    peak: float
    mfu: float
    machine: int  # GPUs of one
    nvlink: float
    infiniband: float

    def rate(self, gpus: int) -> float:
        """Of a ring over so many, side by side."""
        return self.nvlink if gpus <= self.machine else min(self.nvlink, self.machine * self.infiniband)


def groups(config: Config) -> Groups:
    """Counted in the model, built on no device."""
    with torch.device("meta"):
        model = build(config)
    counts = [
        sum(parameter.numel() for parameter in module.parameters())
        for module in model.modules()
        if isinstance(module, Block | CrossAttention)
    ]
    return Groups(sum(counts), max(counts), model.num_parameters() - sum(counts))


def memory(
    config: Config, parts: Groups, strategy: str, shards: int, tokens: int, accumulates: bool, recompute: bool
) -> Memory:
    """Of one of several GPUs.

    Args:
        config: of either model, at its target ratio.
        parts: its parameters.
        strategy: how parameters live on GPUs.
        shards: GPUs that share a copy; 1 for ddp.
        tokens: of a micro-batch.
        accumulates: whether a step has several.
        recompute: activation checkpointing of every block.
    """
    alone = training_memory(config, tokens, recompute=recompute, accumulates=accumulates)
    passing = alone.activations + alone.head
    if strategy == "ddp":
        return Memory(alone.parameters, alone.optimiser, alone.gradients, 0.0, passing)
    gathered = FULL * parts.others + 2 * HALF * parts.largest
    travelling = FULL * parts.others + 2 * (HALF + FULL) * parts.largest
    gradients = alone.gradients if accumulates else alone.gradients / shards + travelling
    return Memory(alone.parameters / shards, alone.optimiser / shards, gradients, gathered, passing)


def traffic(parts: Groups, strategy: str, gpus: int, shards: int) -> Traffic:
    """Of one of so many GPUs, of which `shards` share a copy."""

    def others(ring: int) -> float:
        return (ring - 1) / ring

    if strategy == "ddp":
        return Traffic(0.0, 0.0, 2 * others(gpus) * FULL * parts.total)
    return Traffic(
        gathers=others(shards) * (2 * HALF * parts.blocks + FULL * parts.others),
        scatters=others(shards) * FULL * parts.total,
        between=2 * others(gpus // shards) * FULL * parts.total / shards,
    )


def plan(pair: str, model: str, strategy: str, gpus: int, step_tokens: int, recompute: bool, cluster: Cluster) -> Row:
    """What one model needs on so many GPUs.

    Raises:
        EvaluationError: a step's tokens do not divide into windows for each GPU.
    """
    run = load_run_config(CONFIGS / pair / f"{model}.yaml")
    config, length = build_model_config(run), run.data.sequence_length
    parts = groups(config)
    windows, rest = divmod(step_tokens, gpus * length)
    if rest or not windows:
        raise EvaluationError(
            f"--step-tokens {step_tokens} are no whole number of windows of {length} tokens for each of {gpus} GPUs; "
            f"give a multiple of {gpus * length}"
        )
    shards = {"ddp": 1, "fsdp": gpus, "hybrid": min(cluster.machine, gpus)}[strategy]
    fitting = [
        rows
        for rows in range(1, windows + 1)
        if windows % rows == 0
        and memory(config, parts, strategy, shards, rows * length, rows < windows, recompute).peak
        <= USABLE * cluster.memory
    ]
    rows = max(fitting, default=1)
    micro_batches = windows // rows
    needs = memory(config, parts, strategy, shards, rows * length, micro_batches > 1, recompute)
    row: Row = {
        **{"model": model, "gpus": gpus, "strategy": strategy, "recompute": recompute, "fits": bool(fitting)},
        **{"rows": rows, "micro_batches": micro_batches, "shards": shards},
        **{f"{name}_gb": value / 1e9 for name, value in needs._asdict().items()},
        "peak_gb": needs.peak / 1e9,
    }
    return row | times(config, length, traffic(parts, strategy, gpus, shards), row, cluster)


def times(config: Config, length: int, sent: Traffic, row: Row, cluster: Cluster) -> Row:
    """What a step sends, how long it takes, and what that leaves of the MFU."""
    tokens, number = row["rows"] * length, row["micro_batches"]
    needed = training_flops(config, length).total * tokens
    compute = training_flops(config, length, recompute=row["recompute"]).total * tokens / cluster.peak / cluster.mfu
    within, between = cluster.rate(row["shards"]), cluster.infiniband
    if row["strategy"] == "ddp":
        between = cluster.rate(row["gpus"])
    gathers, gradients = sent.gathers / within, sent.scatters / within + sent.between / between
    added = number * (compute + gathers) + gradients
    overlapped = number * max(compute, gathers) + max(0.0, gradients - 2 / 3 * compute)
    return {
        "sent_gb": (number * sent.gathers + sent.scatters + sent.between) / 1e9,
        "compute_ms": 1000 * number * compute,
        "communication_ms": 1000 * (number * gathers + gradients),
        "mfu_overlapped": number * needed / cluster.peak / overlapped,
        "mfu_added": number * needed / cluster.peak / added,
    }


def page(recorded: dict[str, Any], rows: Sequence[Row], pair: str, step_tokens: int, cluster: Cluster) -> str:
    """The plan as markdown."""
    parts = [
        f"# The {pair} pair on many GPUs: planned, not measured",
        record_lines(recorded),
        "Written by `eval/plan.py`, whose docstring states the formulas and what they leave out. No number here comes "
        f"from a run on several GPUs. {step_tokens:,} tokens a step; GPUs of {cluster.memory / 1e9:g} GB and "
        f"{cluster.peak / 1e12:g} TFLOP/s, of which one alone uses {cluster.mfu:.0%}; machines of {cluster.machine}, "
        f"{cluster.nvlink / 1e9:g} GB/s by NVLink and {cluster.infiniband / 1e9:g} GB/s by InfiniBand, of each GPU in "
        "either direction.",
        "GB on a GPU: parameters / moments / gradients / gathered / activations with a chunk of logits. Windows: in a "
        "micro-batch x micro-batches. Sent: GB by a GPU in a step. MFU counts what the model needs: recomputed blocks "
        "cost time and do not count.",
    ]
    for model, name in MODELS.items():
        parts += [f"## {name}", _table([row for row in rows if row["model"] == model])]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    names = ("parameters", "moments", "gradients", "gathered", "activations")

    def line(row: Row) -> tuple[str | None, ...]:
        place = f"{row['gpus']}, {row['strategy']}{', recomputed' if row['recompute'] else ''}"
        parts = " / ".join(f"{row[f'{name}_gb']:.1f}" for name in names)
        needs = (f"{row['rows']} x {row['micro_batches']}", parts, f"{row['peak_gb']:.1f}")
        if not row["fits"]:
            return place, *needs, *["does not fit", None, None, None, None]
        milliseconds = (f"{row['compute_ms']:,.0f}", f"{row['communication_ms']:,.0f}")
        return (
            place,
            *needs,
            f"{row['sent_gb']:.1f}",
            *milliseconds,
            *(f"{row[name]:.1%}" for name in ("mfu_overlapped", "mfu_added")),
        )

    header = ("GPUs, strategy", "windows", "GB on a GPU", "in all", "sent", "compute, ms", "communication, ms")
    return markdown_table((*header, "MFU, overlapped", "MFU, added"), map(line, rows))


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    cluster = Cluster(
        memory=options.memory * 1e9,
        peak=options.peak * 1e12,
        mfu=options.mfu,
        machine=options.machine,
        nvlink=options.nvlink * 1e9,
        infiniband=options.infiniband * 1e9,
    )
    rows = [
        plan(options.pair, model, strategy, gpus, options.step_tokens, recompute, cluster)
        for model in MODELS
        for gpus in options.gpus
        for strategy in STRATEGIES
        if strategy != "hybrid" or gpus > options.machine  # a single machine's shards are fsdp's
        for recompute in (False, True)
    ]
    recorded, text = record(), "planned, not measured: closed forms, see eval/plan.py"
    write_json(options.output / "scale_out_plan.json", recorded, {}, what=text, pair=options.pair, rows=rows)
    written = page(recorded, rows, options.pair, options.step_tokens, cluster)
    (options.output / "scale_out_plan.md").write_text(written, encoding="utf-8")
    print(f"{written.partition('## ')[2]}\nfiles are in {options.output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.plan", description="Plans memory, communication and MFU of a pair on many GPUs."
    )
    parser.add_argument("--pair", default="table3", help="a directory of configs/ (%(default)s)")
    parser.add_argument("--gpus", type=positive, nargs="+", default=[8, 64, 512], help="how many (8 64 512)")
    parser.add_argument("--step-tokens", type=positive, default=2**22, help="of all GPUs together (%(default)s)")
    parser.add_argument("--memory", type=float, default=80, help="of a GPU, GB (%(default)s)")
    parser.add_argument("--mfu", type=float, default=0.48, help="of a GPU alone (%(default)s)")
    parser.add_argument(
        "--peak", type=float, default=PEAK_FLOPS["H100"] / 1e12, help="of a GPU, TFLOP/s in bf16 (%(default)s, an H100)"
    )
    parser.add_argument("--machine", type=positive, default=8, help="GPUs of one (%(default)s)")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s of a GPU and direction (%(default)s)")
    parser.add_argument("--infiniband", type=float, default=50, help="GB/s of a GPU's adapter (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where to write (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
