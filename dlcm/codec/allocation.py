"""How many bits each tensor of a model gets, for a mean over all of them: reverse water-filling.

A quantiser errs by sigma^2 4^-b at b bits a value, 6 dB less with each bit. If a unit of squared error in tensor i
costs s_i, the sum over all tensors, n_i s_i sigma_i^2 4^-b_i at a given sum of n_i b_i, is least where

    b_i = level + log2(s_i sigma_i^2) / 2

so that a bit buys the same everywhere. It is this law that is minimised, not measured curves, which would take
encodings at several rates of every tensor: from 2 bits on they follow it, below they are flatter. LEAST and MOST keep
tensors off the ends, where the law is wrong. No tensor gets less than the mean by more than BELOW, since costs are
those of small errors: without it, a small LLaMA was worse at 2 bits by costs than at 2 bits for all. The level is what
meets the mean with these bounds.
"""

import math
from collections.abc import Sequence

from dlcm.codec.blob import CodecError

LEAST, MOST, BELOW = 1.0, 6.0, 0.5  # bits of a value
HALVINGS = 100


def allocate(
    sizes: Sequence[int], deviations: Sequence[float], costs: Sequence[float], mean_bits: float
) -> list[float]:
    """Bits per value of each tensor, whose mean over all values is `mean_bits`.

    Args:
        sizes: values of each tensor, n.
        deviations: of the values about their mean, what is kept exactly left out; sigma. 0 asks for the least bits.
        costs: of a unit of squared error in one value, in any unit; s. 0 asks for the least bits, infinity for the
            most.

    Raises:
        CodecError: the mean is not between LEAST and MOST; or nothing costs anything.
    """
    if not LEAST <= mean_bits <= MOST:
        raise CodecError(f"{mean_bits:g} bits a value cannot be allocated: give {LEAST:g} to {MOST:g}")
    wishes = [_half_log2(cost, sigma) for cost, sigma in zip(costs, deviations, strict=True)]
    finite = [wish for wish in wishes if math.isfinite(wish)]
    if not finite:
        raise CodecError("no error of any tensor costs anything; allocate uniformly")

    least = max(LEAST, mean_bits - BELOW)

    def bits_at(level: float) -> list[float]:
        return [min(max(level + wish, least), MOST) for wish in wishes]

    total = mean_bits * sum(sizes)
    low, high = least - max(finite), MOST - min(finite)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if sum(size * bits for size, bits in zip(sizes, bits_at(middle), strict=True)) > total:
            high = middle
        else:
            low = middle
    return bits_at(low)


def predicted_cost(
    sizes: Sequence[int], deviations: Sequence[float], costs: Sequence[float], bits: Sequence[float]
) -> float:
    """What the law says such bits cost; infinite costs are left out."""
    parts = zip(sizes, deviations, costs, bits, strict=True)
    return sum(size * cost * sigma**2 * 4**-width for size, sigma, cost, width in parts if math.isfinite(cost))


def _half_log2(cost: float, sigma: float) -> float:
    if math.isinf(cost):
        return math.inf
    return math.log2(cost) / 2 + math.log2(sigma) if cost > 0 and sigma > 0 else -math.inf
