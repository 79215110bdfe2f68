"""Models that were trained to few bits (see dlcm/selfcompress), as packed files.

    python -m eval.selfcompress export CHECKPOINT PACKED [--rest fp16]
    python -m eval.selfcompress inspect PACKED
    python -m eval.selfcompress verify PACKED CHECKPOINT
    python -m eval.selfcompress unpack PACKED OUTPUT
    python -m eval.selfcompress speed PACKED [--rows 32] [--length 256] [--threads 1]

CHECKPOINT is a run directory or a checkpoint, of a run with `compression`. `export` writes a directory: model.packed,
config.json and the tokenizer. `inspect` says where its bits are. `verify` compares every weight with the checkpoint's,
to the last bit (but that a zero has no sign), and the logits of the physically smaller model with those of the whole
one. `unpack` writes a directory of plain weights that transformers' `from_pretrained` takes, zeros where training has
removed channels. `speed` times a forward pass, whole and smaller, on the CPU. Bits are told for each weight of the
network that the run began with.
"""

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dlcm.flops import rounded_weights
from dlcm.selfcompress.compact import block_weights, compact_
from dlcm.selfcompress.packing import (
    DTYPES,
    PACKED,
    Model,
    PackedError,
    Size,
    file_size,
    group_of,
    load_packed,
    predicted_size,
    read_packed,
    save_packed,
)
from dlcm.selfcompress.quantiser import plain, quantised_linears
from eval.bench import Row, markdown_table
from eval.loading import EvaluationError, add_command, checkpoint_directory, positive, report_errors
from train.checkpoint import load_model, load_model_config
from train.export import new_directory
from train.tokenizer import load_tokenizer

TOKENS = 4096  # of random text, on which logits are compared
TOLERANCE = 1e-4  # of logits
REPEATS = 7  # of a timed forward pass, whose median counts


def export(checkpoint: Path, output: Path, rest: str) -> tuple[Size, dict[str, int]]:
    """Writes a packed directory; returns what depths promised, in bits, and what came, in bytes.

    Raises:
        CheckpointError, EvaluationError: the checkpoint is damaged, has plain weights, or the output is there already.
    """
    directory = checkpoint_directory(checkpoint)
    model = load_model(directory)
    if not quantised_linears(model):
        raise EvaluationError(f"{directory}: its weights are plain; train with compression.method, or use train.export")
    with new_directory(output) as partial:
        path = save_packed(model, partial, rest)
        load_tokenizer(str(directory)).save_pretrained(partial)
        sizes = file_size(path)
    return predicted_size(model, rest), sizes


def inspection(packed: Path) -> list[Row]:
    """A row for each matrix that is rounded: its stage, weights, groups, those that are dead, and bits of codes."""
    content = read_packed(packed, load_model_config(packed))
    rows = []
    for name, layer in quantised_linears(content.model).items():
        height, width = group_of(layer)
        widths = content.matrices[name].widths_G
        row = {"matrix": name, "stage": name.partition(".")[0], "weights": layer.weight.numel(), "groups": len(widths)}
        bits = int(widths.sum(dtype="int64")) * height * width
        rows.append(row | {"dead": int((widths == 0).sum()), "bits": bits})
    return rows


def inspection_table(rows: Sequence[Row], sizes: dict[str, int], weights: int) -> str:
    """Matrices, stages and the file as a table, and what it is made of; there were so many `weights` at the start."""
    lines = [(row["matrix"], *_cells([row])) for row in rows]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        lines.append((f"all of {stage}", *_cells([row for row in rows if row["stage"] == stage])))
    parts = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if name != "file")
    return "\n".join(
        [
            markdown_table(("matrix", "weights", "bits a weight", "dead groups"), lines),
            "",
            f"{PACKED}: {sizes['file']:,} bytes, everything counted ({parts}),",
            f"{8 * sizes['file'] / weights:.4f} bits for each of {weights:,} weights that were rounded at the start",
        ]
    )


def _cells(rows: Sequence[Row]) -> tuple[str, str, str]:
    weights, bits, groups, dead = (sum(row[key] for row in rows) for key in ("weights", "bits", "groups", "dead"))
    return f"{weights:,}", f"{bits / weights:.4f}", f"{100 * dead / groups:.1f} %"


@dataclass(frozen=True, slots=True)
class Verification:
    """How a packed model compares.

    Attributes:
        mismatches: weights that differ from the checkpoint's rounded ones, or other numbers from its own in the dtype
            of the file.
        weights, kept: in blocks and cross-attention, and in those of the smaller model.
        logit_error: the largest difference between the logits of the smaller model and the whole one.
        argmax_share: of tokens, for which the same next one is likeliest.
        tokens: on how many.
    """

    mismatches: int
    weights: int
    kept: int
    logit_error: float
    argmax_share: float
    tokens: int

    @property
    def holds(self) -> bool:
        return self.mismatches == 0 and self.logit_error < TOLERANCE and self.argmax_share >= 0.9999


@torch.no_grad()
def verification(packed: Path, checkpoint: Path) -> Verification:
    """Compares a packed model with the checkpoint it was made of, and with its smaller self.

    Raises:
        CheckpointError, PackedError, EvaluationError: one of them is damaged, or they are of different models.
    """
    unpacked = load_packed(packed, load_model_config(packed))
    original = plain(load_model(checkpoint_directory(checkpoint)))
    dtypes = {name: x.dtype for name, x in read_packed(packed, load_model_config(packed)).rest.items()}
    ours, theirs = unpacked.state_dict(), original.state_dict()
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        raise EvaluationError(f"{packed} and {checkpoint} are of different models; give the checkpoint it was made of")
    mismatches = 0
    for name, x in theirs.items():
        expected = x.to(dtypes.get(name, x.dtype)).float()
        mismatches += int((ours[name] != expected).sum())  # of zeros, signs may differ
    small = compacted(unpacked)
    length = min(256, unpacked.config.max_position_embeddings)
    ids = random_text(unpacked, -(-TOKENS // length), length)
    errors, same = [], 0
    for row in ids.split(1):
        expected, actual = unpacked(row).logits, small(row).logits
        errors.append((actual - expected).abs().max().item())
        same += int((actual.argmax(-1) == expected.argmax(-1)).sum())
    weights, kept = block_weights(unpacked), block_weights(small)
    return Verification(mismatches, weights, kept, max(errors), same / ids.numel(), ids.numel())


def random_text(model: Model, rows: int, length: int) -> Tensor:
    """(rows, length) tokens, each as likely."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (rows, length), generator=generator)


def compacted(model: Model) -> Model:
    """A smaller copy."""
    small = copy.deepcopy(model)
    compact_(small)
    return small


@torch.no_grad()
def speed(model: Model, rows: int, length: int, threads: int) -> Row:
    """Seconds of a forward pass, whole and smaller, alternately; on the CPU.

    Args:
        model: of plain weights.
        rows, length: of random text.
        threads: of torch.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids, models = random_text(model, rows, length), {"dense": model, "compact": compacted(model)}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(REPEATS + 1):
            for name, one in models.items():
                start = time.perf_counter()
                one(ids, logits_to_keep=1)
                if repeat:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    dense, compact = (statistics.median(seconds[name]) for name in models)
    kept = block_weights(models["compact"]) / block_weights(model)
    shape = {"rows": rows, "length": length, "threads": threads, "weights_left": kept}
    return shape | {"dense_s": dense, "compact_s": compact, "speedup": dense / compact}


def _run_export(options: argparse.Namespace) -> None:
    predicted, sizes = export(options.checkpoint, options.packed, options.rest)
    bits, weights = 8 * sizes["file"], predicted.weights
    print(
        f"{options.packed}: {sizes['file']:,} bytes, {bits / weights:.4f} bits for each of {weights:,} weights that "
        f"were rounded at the start, everything counted; depths promised {predicted.total / weights:.4f}"
    )


def _run_inspect(options: argparse.Namespace) -> None:
    weights = sum(rounded_weights(load_model_config(options.packed)).values())
    print(inspection_table(inspection(options.packed), file_size(options.packed / PACKED), weights))


def _run_verify(options: argparse.Namespace) -> None:
    found = verification(options.packed, options.checkpoint)
    print("\n".join(f"{name:14}{value:,}" if value else f"{name:14}0" for name, value in asdict(found).items()))
    if not found.holds:
        raise PackedError(f"{options.packed}: is not what was trained; pack the checkpoint again")


def _run_unpack(options: argparse.Namespace) -> None:
    model = load_packed(options.packed, load_model_config(options.packed))
    with new_directory(options.output) as partial:
        model.save_pretrained(partial)
        load_tokenizer(str(options.packed)).save_pretrained(partial)


def _run_speed(options: argparse.Namespace) -> None:
    model = load_packed(options.packed, load_model_config(options.packed))
    row = speed(model, options.rows, options.length, options.threads)
    print(markdown_table(list(row), [[f"{value:.4g}" for value in row.values()]]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eval.selfcompress", description="Models of few bits, packed.")
    command = functools.partial(add_command, parser.add_subparsers(required=True, metavar="COMMAND"))
    made = command("export", _run_export, "Packs a checkpoint.", "checkpoint", "packed")
    made.add_argument("--rest", choices=DTYPES, default="fp16", help="of what is not rounded (%(default)s)")
    command("inspect", _run_inspect, "Says where bits are.", "packed")
    command("verify", _run_verify, "Compares with the checkpoint.", "packed", "checkpoint")
    command("unpack", _run_unpack, "Writes plain weights for transformers.", "packed", "output")
    made = command("speed", _run_speed, "Times the smaller model on the CPU.", "packed")
    for name, default in (("rows", 32), ("length", 256), ("threads", 1)):
        made.add_argument(f"--{name}", type=positive, default=default, help="(%(default)s)")
    return parser


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
