"""The Global Parser: holds the batch, not each sequence, to the target ratio (section 3.3.3, Eq. 8-10).

    L_aux = R / (R - 1) * [(R - 1) F G + (1 - F)(1 - G)] - 1

F is the mean of the decisions b (no gradient), G the mean of the probabilities p, over every token of the global
batch: all ranks and all accumulated micro-batches. L_aux is affine in G with slope R / (R - 1) * (R F - 1): the
pull on every p changes sign exactly at F = 1 / R. That is what makes a global statistic cheap: a micro-batch needs
F of the whole batch and only its own p to contribute its exact share of the gradient. Where even F is too much to wait
for, `RunningStatistics` comes close.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dlcm.boundary import Boundaries
from dlcm.config import ParserScope
from dlcm.layout import PackedLayout


@dataclass(frozen=True, slots=True)
class ParserStatistics:
    """Sums over tokens, which add up over micro-batches and ranks. All are scalars (fp32 or wider)."""

    boundaries: Tensor
    probability: Tensor
    tokens: Tensor
    documents: Tensor

    @classmethod
    def of(cls, decided: Boundaries, layout: PackedLayout) -> "ParserStatistics":
        p_T = decided.probability_T
        return cls(
            boundaries=decided.boundary_T.sum().to(p_T.dtype),
            probability=p_T.sum(),
            tokens=p_T.new_full((), layout.total),
            documents=p_T.new_full((), layout.num_documents),
        )

    def __add__(self, other: "ParserStatistics") -> "ParserStatistics":
        return ParserStatistics(
            self.boundaries + other.boundaries,
            self.probability + other.probability,
            self.tokens + other.tokens,
            self.documents + other.documents,
        )

    def all_reduce(self) -> "ParserStatistics":
        """The sum over all ranks, without gradient; without a process group, these numbers themselves."""
        sums = torch.stack([self.boundaries, self.probability, self.tokens, self.documents]).detach()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        return ParserStatistics(*sums.unbind())

    @property
    def boundary_rate(self) -> Tensor:
        """F, Eq. 8."""
        return self.boundaries / self.tokens

    @property
    def mean_probability(self) -> Tensor:
        """G, Eq. 9."""
        return self.probability / self.tokens


class RunningStatistics:
    """Statistics of a global batch for each of its micro-batches as they come, without a pass ahead to count them all.

    Of F, gradients need the slope of L_aux alone, which is affine in it. So each micro-batch is given the F of those so
    far, its own included, and the last one what makes the mean over all tokens the F of the whole batch. The gradient
    of a step then differs from the exact one by a covariance: of the F they were given, and the gradients of their G.

    Args:
        micro_batches: in a step, the same on every rank.
        tokens, documents: in the global batch.
    """

    def __init__(self, micro_batches: int, tokens: Tensor, documents: Tensor):
        self._left, self._tokens, self._documents = micro_batches, tokens, documents
        self._so_far: ParserStatistics | None = None
        self._given: Tensor | float = 0.0  # the F that were given, times tokens

    def next(self, own: ParserStatistics) -> ParserStatistics:
        """What stands for the statistics of the global batch, for the micro-batch that comes next on every rank.

        Args:
            own: of this rank's micro-batch.

        Raises:
            RuntimeError: there were as many micro-batches as were announced.
        """
        if self._left == 0:
            raise RuntimeError("RunningStatistics was told of fewer micro-batches than there are")
        self._left -= 1
        own = own.all_reduce()
        self._so_far = own if self._so_far is None else self._so_far + own
        rate = self._so_far.boundary_rate
        if self._left == 0:
            rate = (self._so_far.boundaries - self._given) / own.tokens
        self._given += rate * own.tokens
        tokens = self._tokens.to(own.tokens)
        probability = self._so_far.mean_probability * tokens
        return ParserStatistics(rate * tokens, probability, tokens, self._documents.to(own.documents))


def ratio_loss(boundary_rate: Tensor, mean_probability: Tensor, ratio: float) -> Tensor:
    """Eq. 10 (elementwise): zero at F = G = 1 / R, and not bounded below by it."""
    f, g = boundary_rate.detach(), mean_probability
    return ratio / (ratio - 1) * ((ratio - 1) * f * g + (1 - f) * (1 - g)) - 1


def global_parser_loss(
    decided: Boundaries,
    layout: PackedLayout,
    ratio: float,
    scope: ParserScope,
    total: ParserStatistics,
    gradient_scale: float = 1.0,
) -> Tensor:
    """The ratio loss of the global batch, differentiable in this micro-batch's probabilities.

    Args:
        decided, layout: boundaries of this rank's micro-batch and the documents they belong to.
        ratio: R, target tokens per concept.
        scope: `global` (Eq. 8-10), or `sequence`: the mean over documents of each one's own ratio loss.
        total: statistics of the global batch this micro-batch is part of.
        gradient_scale: 1 gives this micro-batch's exact share of the global gradient. The number of ranks
            undoes the averaging of data-parallel wrappers.

    Returns:
        Scalar. `global`: the value is that of `total`, whatever share this micro-batch has in it.
        `sequence`: the value is this micro-batch's share; shares add up.
    """
    if scope == "sequence":
        length_D = layout.cu_seqlens_D1.diff()
        p_T = decided.probability_T
        zeros_D = p_T.new_zeros(layout.num_documents)
        f_D = zeros_D.index_add(0, layout.document_T, decided.boundary_T.to(p_T.dtype)) / length_D
        g_D = zeros_D.index_add(0, layout.document_T, p_T) / length_D
        return gradient_scale * ratio_loss(f_D, g_D, ratio).sum() / total.documents
    own = decided.probability_T.sum()
    mean_probability = total.mean_probability.detach() + gradient_scale * (own - own.detach()) / total.tokens
    return ratio_loss(total.boundary_rate, mean_probability, ratio)
