"""In which order windows come from several sources, so that each has its share of every stretch of the run."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

LARGEST_BLOCK = 1_000_000  # windows; two tables of that length are kept


class MixtureOrder:
    """Which window of which source is the n-th of a run, in O(1).

    Weights become whole numbers c_i of windows in a block of B = c_1 + c_2 + ..., in lowest terms (50, 25, 15 and 10 %
    are 10, 5, 3 and 2 of 20), and every block holds exactly those. Within one, windows are spread evenly: the j-th of
    source i stands where (j + 1/2) / c_i says. So after n windows, source i has had n c_i / B of them, to within half a
    window and c_i / B of half a window for each source.

    Raises:
        ValueError: no weights, one that is not above 0, or weights of so many digits that a block is too long.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights {list(weights)} must be above 0, and there must be one")
        exact = [Fraction(str(weight)) for weight in weights]  # as written: 0.15 is 3/20, unlike the float
        scale = lcm(*(weight.denominator for weight in exact))
        counts = [int(weight * scale) for weight in exact]
        self.counts = [count // gcd(*counts) for count in counts]
        self.block = sum(self.counts)
        if self.block > LARGEST_BLOCK:
            raise ValueError(
                f"weights {list(weights)} are met exactly by no fewer than {self.block:,} windows; give them fewer "
                "digits"
            )
        source_B = np.repeat(np.arange(len(self.counts)), self.counts)
        rank_B = np.concatenate([np.arange(count) for count in self.counts])
        order_B = np.argsort((2 * rank_B + 1) / np.array(self.counts)[source_B], kind="stable")
        self._source_B, self._rank_B = source_B[order_B], rank_B[order_B]

    @property
    def shares(self) -> list[float]:
        """The part of all windows that comes from each source; they add up to 1."""
        return [count / self.block for count in self.counts]

    def place(self, number: int) -> tuple[int, int]:
        """The source of window `number` of the run, and how many windows of that source come before it."""
        block, position = divmod(number, self.block)
        source = int(self._source_B[position])
        return source, block * self.counts[source] + int(self._rank_B[position])

    def taken(self, number: int) -> list[int]:
        """How many of the first `number` windows of the run come from each source."""
        blocks, rest = divmod(number, self.block)
        of_rest = np.bincount(self._source_B[:rest], minlength=len(self.counts))
        return [blocks * count + int(more) for count, more in zip(self.counts, of_rest, strict=True)]
