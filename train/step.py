"""One training step's arithmetic: the gradient and the numbers of a global batch, however it is cut into pieces.

Losses are normalised by the targets of the whole batch, and the Global Parser sees the boundaries of the whole
batch: the shares of ranks and micro-batches add up to the loss of one big batch.
"""

import functools
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.boundary import LearnedDetector
from dlcm.flops import forward_flops
from dlcm.global_parser import ParserStatistics
from train.config import RunConfig
from train.data import PackedBatch
from train.distributed import Ranks
from train.metrics import bits_per_byte

Model = DLCMForCausalLM | LlamaBaselineForCausalLM
FORWARDS_PER_STEP = 3  # in FLOPs: the backward pass costs as much as two


class StepSums(NamedTuple):
    """What a step adds up over micro-batches and ranks. A model without concepts leaves the last four at 0."""

    ce: float  # shares of the mean cross-entropy, in nats
    targets: float
    target_bytes: float
    tokens: float
    squared_lengths: float  # of documents: the cost of attention goes with it
    aux: float
    boundaries: float
    probability: float
    concepts: float


def forward_backward(
    run: RunConfig, parallel: torch.nn.Module, batches: Sequence[PackedBatch], step: int, ranks: Ranks
) -> StepSums:
    """Leaves the gradient of the global batch's loss in the parameters.

    Args:
        run: seed and precision.
        parallel: the model, wrapped for data parallelism where there are several ranks.
        batches: this rank's micro-batches, on the model's device.
        step: counted from 0; decides the boundary draws.
        ranks: those that hold the rest of the batch.
    """
    model = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
    kept_local = parallel.no_sync if isinstance(parallel, DistributedDataParallel) else nullcontext
    assert isinstance(model, Model)
    targets = ranks.sum(torch.tensor(sum(batch.num_targets for batch in batches), device=model.device))
    parser_total = global_boundary_statistics(run, model, batches, step, ranks)
    sums = torch.zeros(len(StepSums._fields), dtype=torch.float64, device=model.device)
    for micro, batch in enumerate(batches):
        inputs = model_inputs(batch) | {"labels": batch.labels[None], "num_items_in_batch": targets}
        if isinstance(model, DLCMForCausalLM):
            generator = boundary_generator(run.seed, step, micro, ranks, model.device)
            inputs |= {"generator": generator, "parser_total": parser_total}
        # Gradients travel between ranks once a step, with the last micro-batch.
        with kept_local() if micro < len(batches) - 1 else nullcontext():
            with autocast(run, model.device):
                output = parallel(**inputs)
            # Ranks average their gradients, but shares want to be summed.
            (output.loss * ranks.size).backward()
        sums += step_sums(output, batch)
    return StepSums(*ranks.sum(sums).tolist())


def global_boundary_statistics(
    run: RunConfig, model: Model, batches: Sequence[PackedBatch], step: int, ranks: Ranks
) -> ParserStatistics | None:
    """Boundaries of all micro-batches and ranks, by a pass of encoder and detector ahead of the step.

    This runs encoder and detector once more for every micro-batch, without gradient: about a third of a forward
    where the encoder is deep, as in configs/table3. None where none is needed (see `counts_boundaries_first`).
    """
    if not isinstance(model, DLCMForCausalLM) or not counts_boundaries_first(model, len(batches)):
        return None
    each = []
    for micro, batch in enumerate(batches):
        # The same seed as in the forward pass to come, so the same boundaries. And an autocast context of its
        # own: casts cached here, without gradient, must not be met again there.
        generator = boundary_generator(run.seed, step, micro, ranks, model.device)
        with autocast(run, model.device):
            each.append(model.boundary_statistics(**model_inputs(batch), generator=generator))
    return functools.reduce(operator.add, each).all_reduce()


def counts_boundaries_first(model: Model, accumulation: int) -> bool:
    """Whether a step needs a pass ahead to count its boundaries; a single micro-batch is summed by the model itself."""
    return isinstance(model, DLCMForCausalLM) and accumulation > 1 and model.config.segmenter != "fixed"


def boundary_generator(seed: int, step: int, micro: int, ranks: Ranks, device: torch.device) -> torch.Generator:
    """The source of one micro-batch's boundary draws: a function of where it stands in the run.

    Ranks and micro-batches are numbered as the loader deals out windows, so that one may be traded for the other.
    """
    place = np.random.SeedSequence((seed, step, micro * ranks.size + ranks.rank))
    return torch.Generator(device).manual_seed(int(place.generate_state(1, np.uint64)[0]))


def uses_bf16(run: RunConfig, device: torch.device) -> bool:
    return run.precision == "bf16" or (run.precision == "auto" and device.type == "cuda")


def autocast(run: RunConfig, device: torch.device) -> torch.autocast:
    """bf16 matrix products where the run asks for them; parameters, losses and statistics stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(run, device))


def model_inputs(batch: PackedBatch) -> dict[str, Any]:
    """A packed row (1, T) and its documents, as both models take them."""
    return {
        "input_ids": batch.input_ids[None],
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
    }


def step_sums(output: Any, batch: PackedBatch) -> Tensor:
    """One micro-batch's `StepSums` as a float64 tensor, without waiting for the device."""
    lengths_D = batch.cu_seqlens.diff().double()
    values = [
        output.ce_loss,
        batch.num_targets,
        batch.target_bytes,
        len(batch.input_ids),
        lengths_D.square().sum(),
    ]
    if "concept_lengths" in output:
        statistics = output.parser_statistics
        values += [
            output.aux_loss,
            statistics.boundaries,
            statistics.probability,
            len(output.concept_lengths),
        ]
    else:
        values += [0.0] * 4
    device = output.ce_loss.device
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in values])


def mean_losses(sums: StepSums, model: Model, micro_batches: int) -> dict[str, float]:
    """Losses of the global batch, in nats per target, and its bits per byte."""
    ce = {"ce": sums.ce, "bpb": bits_per_byte(sums.ce * sums.targets, sums.target_bytes)}
    if not isinstance(model, DLCMForCausalLM):
        return {"loss": sums.ce, **ce}
    # With a global parser every micro-batch reports the whole batch's ratio loss, not a share of it.
    aux = sums.aux / (micro_batches if model.config.parser_scope == "global" else 1)
    return {"loss": sums.ce + model.config.aux_loss_weight * aux, **ce, "aux": aux}


def concept_metrics(sums: StepSums, model: Model) -> dict[str, float]:
    """How the global batch was cut; nothing for a model without concepts."""
    if not isinstance(model, DLCMForCausalLM):
        return {}
    values = {
        "tokens_per_concept": sums.tokens / sums.concepts,
        "boundary_rate": sums.boundaries / sums.tokens,
        "mean_probability": sums.probability / sums.tokens,
    }
    if isinstance(model.detector, LearnedDetector):
        values["sharpening"] = model.detector.sharpening
    return values


def training_flops(sums: StepSums, model: Model, accumulation: int) -> float:
    """FLOPs of a step, at the documents and concepts that it really had.

    Forward and backward, and the pass that counts boundaries ahead where `accumulation` micro-batches need it.
    """
    length = sums.squared_lengths / sums.tokens
    ratio = sums.tokens / sums.concepts if sums.concepts else None
    forward = forward_flops(model.config, length, ratio)
    per_token = FORWARDS_PER_STEP * forward.total
    if counts_boundaries_first(model, accumulation):
        per_token += forward.stages["encoder"] + forward.stages["detector"]
    return per_token * sums.tokens
