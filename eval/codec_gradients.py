"""A short training with compressed gradients: a small DLCM on bytes, its gradients as blobs, with error feedback.

    python -m eval.codec_gradients [--steps 300] [--bits 2.6 1.4]

The model is that of configs/demo/dlcm.yaml over bytes, with its learning rates and schedule; text is data/, of which
every twentieth document is scored. One process is one rank of a DDP: the hook is the one for many
(dlcm/codec/training.py), and the noise that many ranks would average away is all there. It is an early point of one
seed: it shows what is lost, not what a long run ends with.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dlcm import DLCMConfig, DLCMForCausalLM
from dlcm.codec.training import GradientCodec, average_compressed, gradient_code
from eval.bench import Row, markdown_table
from eval.loading import positive, report_errors
from eval.perplexity import read_texts
from train.config import build_model_config, load_run_config
from train.pretrain import build_optimizer
from train.schedule import learning_rate_factor, sharpening

ROOT = Path(__file__).parents[1]
BUDGETS = (2.6, 1.4)  # bits a value
HELD_OUT, SCORED_WINDOWS = 20, 64
END = 0  # opens a document; a byte that text does not have


def train(steps: int, bits: float | None, feedback: bool) -> Row:
    """Trains for so many steps.

    Args:
        bits: of a gradient's value; None: gradients are exact.
        feedback: see `GradientCodec`.

    Returns:
        bits, with all that is sent exactly, and bits per byte of held-out text.
    """
    overrides = [f"schedule.steps={steps}", f"schedule.warmup_steps={max(1, steps // 20)}", "model.vocab_size=256"]
    run = load_run_config(ROOT / "configs/demo/dlcm.yaml", overrides)
    training, held_out = _bytes()
    config = build_model_config(run)
    assert isinstance(config, DLCMConfig)
    torch.manual_seed(run.seed)
    model = DLCMForCausalLM(config)
    optimizer = build_optimizer(run, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    draw, length, rows = np.random.default_rng(run.seed), run.data.sequence_length, run.batch.rows
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        codec = None if bits is None else GradientCodec(gradient_code(bits), feedback)
        if codec is not None:
            parallel.register_comm_hook(codec, average_compressed)
        for step in range(steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_factor(step, run.schedule)
            model.set_sharpening(sharpening(step, config.sharpening, run.schedule))
            ids_BL = _windows(training, draw.integers(len(training) - length, size=rows), length)
            parallel(input_ids=ids_BL, labels=ids_BL, return_logits=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        del parallel
    finally:
        dist.destroy_process_group()
    return {
        "steps": steps,
        "budget": bits,
        "feedback": None if bits is None else feedback,
        "bits": None if codec is None else codec.bits / codec.values,
        "bits_per_byte": _score(model.eval(), held_out, length),
    }


def table(rows: Sequence[Row]) -> str:
    """A line for each training, against the one with exact gradients."""
    exact = next((row["bits_per_byte"] for row in rows if row["budget"] is None), math.nan)
    return markdown_table(
        ("gradients", "bits a value", "bits per byte", "more"),
        (
            (
                "exact"
                if row["budget"] is None
                else f"{row['budget']:g} bits" + ", no feedback" * (not row["feedback"]),
                "32" if row["bits"] is None else f"{row['bits']:.2f}",
                f"{row['bits_per_byte']:.4f}",
                f"{row['bits_per_byte'] - exact:+.4f}",
            )
            for row in rows
        ),
    )


def _bytes() -> tuple[np.ndarray, np.ndarray]:
    """The bytes of training and of held-out documents, end to end."""
    documents = read_texts([str(ROOT / "data/embedded.jsonl.xz")])
    parts: tuple[list[bytes], list[bytes]] = [], []
    for number, document in enumerate(documents):
        parts[number % HELD_OUT == 0].append(bytes([END]) + document.text.encode())
    training, held_out = (np.frombuffer(b"".join(part), np.uint8) for part in parts)
    return training, held_out


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    return torch.from_numpy(np.stack([text[start : start + length] for start in starts]).astype(np.int64))


@torch.no_grad()
def _score(model: DLCMForCausalLM, held_out: np.ndarray, length: int) -> float:
    """Bits per byte of windows spread over the held-out text."""
    starts = np.linspace(0, len(held_out) - length, SCORED_WINDOWS).astype(int)
    losses = [
        model(input_ids=ids_BL, labels=ids_BL, return_logits=False).ce_loss.item()
        for ids_BL in _windows(held_out, starts, length).split(8)
    ]
    return sum(losses) / len(losses) / math.log(2)


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.codec_gradients", description="Trains with coded gradients.")
    parser.add_argument("--steps", type=positive, default=300, help="(default: %(default)s)")
    parser.add_argument("--bits", type=float, nargs="+", default=list(BUDGETS), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    cases = [(None, True), *((bits, feedback) for bits in options.bits for feedback in (True, False))]
    print(table([train(options.steps, bits, feedback) for bits, feedback in cases]))


if __name__ == "__main__":
    sys.exit(main())
