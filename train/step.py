"""One training step's arithmetic: the gradient and the numbers of a global batch, however it is cut into pieces.

Losses are normalised by the targets of the whole batch, and the Global Parser sees the boundaries of the whole
batch: the shares of ranks and micro-batches add up to the loss of one big batch.

Nothing here waits for a GPU: what the device computes stays there, and whether a step may move the parameters is
decided there (`update_parameters`). The host reads a step's numbers when the device has gone on (`UnreadNumbers`).
"""

import functools
import gc
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.boundary import LearnedDetector
from dlcm.flops import FORWARDS_PER_STEP, ByStage, forward_flops, squared_lengths
from dlcm.global_parser import ParserStatistics, RunningStatistics, ratio_loss
from dlcm.host import OnHost
from train.config import BatchConfig, RunConfig
from train.data import PackedBatch
from train.distributed import Ranks
from train.metrics import bits_per_byte
from train.parallel import gradients_travel, local, unwrapped, whole
from train.spikes import SpikeRule

Model = DLCMForCausalLM | LlamaBaselineForCausalLM


class StepSums(NamedTuple):
    """What a step adds up over micro-batches and ranks (`over_ranks`). A model without concepts leaves theirs at 0."""

    # counted by the host
    targets: float
    target_bytes: float
    tokens: float
    squared_lengths: float  # of documents: the cost of attention goes with it
    windowed_lengths: float  # the same within the window, if the model has one
    concepts: float
    micro_batches: float
    stops: float  # ranks that were told to stop
    # computed by the device
    ce: float  # shares of the mean cross-entropy, in nats
    aux: float  # of the sequences' own ratio losses, their shares
    boundaries: float
    probability: float
    # no sum, but the largest of all
    most_concepts: float  # of a micro-batch


CONCEPTS, STOPS, CE, MOST = map(StepSums._fields.index, ("concepts", "stops", "ce", "most_concepts"))
NUM_COUNTED = CE


def forward_backward(
    run: RunConfig, parallel: torch.nn.Module, batches: Sequence[PackedBatch], step: int, ranks: Ranks
) -> Tensor:
    """Leaves the gradient of the global batch's loss in the parameters.

    Args:
        run: its seed and precision.
        parallel: the model as `train.parallel` distributes it.
        batches: this rank's micro-batches, on the model's device.
        step: counted from 0; decides the boundary draws.
        ranks: those that hold the rest of the batch.

    Returns:
        This rank's `StepSums`, float64, on the model's device.
    """
    model = unwrapped(parallel)
    assert isinstance(model, Model)
    counts = (sum(counted) for counted in zip(*map(known_counts, batches), strict=True))
    targets, tokens, documents = ranks.sum(
        torch.stack([torch.full((), count, dtype=torch.float64, device=model.device) for count in counts])
    )
    parser_total: ParserStatistics | RunningStatistics | None = None
    if counts_boundaries_first(model, run.batch):
        parser_total = global_boundary_statistics(run, model, batches, step, ranks)
    elif len(batches) > 1:
        parser_total = RunningStatistics(len(batches), tokens, documents)
    sums = torch.zeros(len(StepSums._fields), dtype=torch.float64, device=model.device)
    for micro, batch in enumerate(batches):
        inputs = model_inputs(batch) | {
            "labels": batch.labels[None],
            "num_items_in_batch": targets,
            "return_logits": False,
        }
        if isinstance(model, DLCMForCausalLM):
            generator = boundary_generator(run.seed, step, micro, ranks, model.device)
            inputs |= {"generator": generator, "parser_total": parser_total}
        # Gradients travel between ranks once a step, with the last micro-batch.
        with gradients_travel(parallel, micro == len(batches) - 1):
            with autocast(run, model.device):
                output = parallel(**inputs)
            # Ranks average their gradients, but shares want to be summed.
            (output.loss * ranks.size).backward()
        add_to_sums_(sums, output, batch, model.config.token_window)
    return sums


def known_counts(batch: PackedBatch) -> tuple[int, int, int]:
    """Targets, tokens and documents of a micro-batch."""
    return batch.num_targets, len(batch.input_ids), len(batch.cu_seqlens) - 1


def global_boundary_statistics(
    run: RunConfig, model: Model, batches: Sequence[PackedBatch], step: int, ranks: Ranks
) -> ParserStatistics:
    """Boundaries of all micro-batches and ranks, by a pass of encoder and detector ahead of the step.

    This runs encoder and detector once more for every micro-batch, without gradient: about a third of a forward
    where the encoder is deep, as in configs/table3.
    """
    assert isinstance(model, DLCMForCausalLM)
    each = []
    for micro, batch in enumerate(batches):
        # The same seed as in the forward pass to come, so the same boundaries (compiled code may round otherwise
        # without gradients, and a draw in many fall the other way). And an autocast context of its own: casts cached
        # here, without gradient, must not be met again there.
        generator = boundary_generator(run.seed, step, micro, ranks, model.device)
        with autocast(run, model.device):
            each.append(model.boundary_statistics(**model_inputs(batch), generator=generator))
    return functools.reduce(operator.add, each).all_reduce()


def counts_boundaries_first(model: Model, batch: BatchConfig) -> bool:
    """Whether a step needs a pass ahead to count its boundaries; a single micro-batch is summed by the model itself."""
    counts = isinstance(model, DLCMForCausalLM) and model.config.has_ratio_loss
    return counts and batch.accumulation > 1 and batch.boundary_count == "ahead"


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


def add_to_sums_(sums: Tensor, output: Any, batch: PackedBatch, window: int | None) -> None:
    """Adds one micro-batch's `StepSums`, of a model with such a `token_window`."""
    lengths = batch.cu_seqlens.diff().tolist()  # cu_seqlens is on the CPU
    has_concepts = "concept_lengths" in output
    counted = [
        batch.num_targets,
        batch.target_bytes,
        len(batch.input_ids),
        squared_lengths(lengths),
        squared_lengths(lengths, window),
        len(output.concept_lengths) if has_concepts else 0,
        1,
        0,  # stops: the loop's to say
    ]
    computed = [output.ce_loss]
    if has_concepts:
        computed += [output.aux_loss, output.parser_statistics.boundaries, output.parser_statistics.probability]
    on_host = torch.tensor(counted, dtype=torch.float64, pin_memory=sums.is_cuda)
    counts = on_host.to(sums.device, non_blocking=True)
    sums[:NUM_COUNTED] += counts
    torch.maximum(sums[MOST], counts[CONCEPTS], out=sums[MOST])
    sums[NUM_COUNTED : NUM_COUNTED + len(computed)] += torch.stack([x.detach().double() for x in computed])


def over_ranks(sums: Tensor, ranks: Ranks) -> Tensor:
    """The `StepSums` of all ranks, of this rank's, by one collective.

    Every rank has a slot for its largest number beside the sums, where others add nothing.
    """
    slots = sums.new_zeros(ranks.size)
    slots[ranks.rank : ranks.rank + 1] = sums[MOST:]
    added, largest = ranks.sum(torch.cat([sums[:MOST], slots])).split([MOST, ranks.size])
    return torch.cat([added, largest.max()[None]])


class Outcome(NamedTuple):
    """What became of a step, on the device."""

    grad_norm: Tensor  # before clipping
    skipped: Tensor  # 1 where it moved nothing, else 0
    spike: Tensor  # 1 where it was skipped as a spike, else 0


def update_parameters(
    optimizer: torch.optim.AdamW, sums: Tensor, clip_norm: float, spikes: SpikeRule | None = None
) -> Outcome:
    """Moves the parameters along the gradient, clipped, unless a number of the step is not finite, or it is a spike.

    One non-finite number would spoil every parameter: such a step moves none. Decided on the device, in the way of
    torch's GradScaler: a fused optimizer divides gradients by `grad_scale`, and does nothing where `found_inf` is 1.

    Args:
        optimizer: fused.
        sums: the `StepSums` of all ranks.
        clip_norm: what longer gradients are shortened to, but for groups with `clipped` False.
        spikes: says which gradients are too long; None: none is.
    """
    gradients = _gradients(optimizer, clipped=True)
    grad_norm = whole(torch.nn.utils.get_total_norm(gradients))
    finite = grad_norm.isfinite() & sums.isfinite().all()
    if unclipped := _gradients(optimizer, clipped=False):
        finite &= whole(torch.nn.utils.get_total_norm(unclipped)).isfinite()
    spike = torch.zeros_like(finite) if spikes is None else spikes.is_spike(grad_norm) & finite
    skipped = (~finite | spike).float()
    optimizer.grad_scale = (grad_norm / clip_norm).clamp(min=1)  # type: ignore[attr-defined]
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    if unclipped:  # the optimizer will divide all by it
        torch._foreach_mul_(list(map(local, unclipped)), optimizer.grad_scale)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    return Outcome(grad_norm, skipped, spike.float())


def _gradients(optimizer: torch.optim.Optimizer, clipped: bool) -> list[Tensor]:
    """Of groups that take part in clipping, or of those that say they do not."""
    groups = [group for group in optimizer.param_groups if group.get("clipped", True) == clipped]
    return [p.grad for group in groups for p in group["params"] if p.grad is not None]


def spare_the_collector() -> None:
    """Python's garbage collector leaves alone what is there now. To be called once the first steps have compiled.

    A full collection looks at a million objects of torch and its compilers, again and again, and takes most of the
    host's time in a step: time that a small model's GPU spends idle. Asked again, it looks once more at all there is.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextmanager
def collector_whole_afterwards() -> Iterator[None]:
    """Whatever the garbage collector was spared meanwhile is its business again."""
    try:
        yield
    finally:
        gc.unfreeze()


class StepNumbers(NamedTuple):
    """What the host wants to know of a step: its number, counted from 1, and what became of it over all ranks."""

    step: int
    sums: StepSums
    grad_norm: float  # before clipping
    skipped: bool
    spike: bool


class UnreadNumbers:
    """A step's numbers on their way to the host.

    Once the next step has been handed to the device they cost no time to read: it has other work to go on with.
    """

    def __init__(self, step: int, sums: Tensor, outcome: Outcome):
        self._step = step
        self._numbers = OnHost(torch.cat([sums, torch.stack(outcome).double()]))

    def read(self) -> StepNumbers:
        """The numbers; waits until the step is done."""
        *sums, grad_norm, skipped, spike = self._numbers.read()
        return StepNumbers(self._step, StepSums(*sums), grad_norm, bool(skipped), bool(spike))


def mean_losses(sums: StepSums, model: Model) -> dict[str, float]:
    """Losses of the global batch, in nats per target, and its bits per byte."""
    ce = {"ce": sums.ce, "bpb": bits_per_byte(sums.ce * sums.targets, sums.target_bytes)}
    if not isinstance(model, DLCMForCausalLM):
        return {"loss": sums.ce, **ce}
    aux = sums.aux  # shares, that add up
    if model.config.has_ratio_loss and model.config.parser_scope == "global":
        f, g = torch.tensor([sums.boundaries, sums.probability], dtype=torch.float64) / sums.tokens
        aux = float(ratio_loss(f, g, model.target_ratio))
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
    if sums.micro_batches > 1:
        # While the backbone of one is at work, others wait (see eval/imbalance.py).
        values["concept_imbalance"] = sums.most_concepts * sums.micro_batches / sums.concepts
    if isinstance(model.detector, LearnedDetector):
        values["sharpening"] = model.detector.sharpening
    return values


def model_flops(sums: StepSums, model: Model) -> float:
    """FLOPs that the model needs for a step, at the documents and concepts that it really had: what MFU counts."""
    return FORWARDS_PER_STEP * _forward(sums, model).total * sums.tokens


def training_flops(sums: StepSums, model: Model, batch: BatchConfig) -> float:
    """FLOPs that a step spends: what the model needs, and the pass that counts boundaries ahead where there is one."""
    stages = _forward(sums, model).stages
    ahead = stages["encoder"] + stages["detector"] if counts_boundaries_first(model, batch) else 0.0
    return model_flops(sums, model) + ahead * sums.tokens


def _forward(sums: StepSums, model: Model) -> ByStage:
    """Per token, of the step's own documents and concepts."""
    ratio = sums.tokens / sums.concepts if sums.concepts else None
    lengths, windowed = sums.squared_lengths / sums.tokens, sums.windowed_lengths / sums.tokens
    return forward_flops(model.config, lengths, ratio, windowed_length=windowed)
