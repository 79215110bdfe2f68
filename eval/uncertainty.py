"""How sure a number is: standard errors, and bootstrap intervals of paired differences.

Accuracy, bits per byte and their like are ratios of two sums over questions: right answers over questions, bits over
bytes. So there is one formula for the error of all of them, and one way to resample.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEED = 0
RESAMPLES = 5_000
CONFIDENCE = 0.95
DRAWS = 2**23  # indices held at once


@dataclass(frozen=True, slots=True)
class Ratio:
    """A number that is sum(part) / sum(whole) over questions.

    Attributes:
        part_N: what is averaged, one entry a question.
        whole_N: what it is averaged over; ones for a mean.
    """

    part_N: np.ndarray
    whole_N: np.ndarray

    @classmethod
    def mean(cls, values: Sequence[float]) -> "Ratio":
        part_N = np.asarray(values, dtype=np.float64)
        return cls(part_N, np.ones_like(part_N))

    @classmethod
    def of(cls, parts: Sequence[float], wholes: Sequence[float]) -> "Ratio":
        return cls(np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64))

    @property
    def value(self) -> float:
        return float(self.part_N.sum() / self.whole_N.sum())

    @property
    def error(self) -> float | None:
        """Standard error, to first order; of a mean it is s / sqrt(N) with N - 1 in s. None for one question."""
        number = len(self.part_N)
        if number < 2:
            return None
        residual_N = self.part_N - self.value * self.whole_N
        return math.sqrt((residual_N**2).sum() * number / (number - 1)) / float(self.whole_N.sum())


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, and where it lies with a confidence of `CONFIDENCE`, by percentiles of the bootstrap.

    Of one question nobody knows where: then `low` and `high` are None.
    """

    value: float
    low: float | None = None
    high: float | None = None


def resampled_differences(ours: Ratio, theirs: Ratio, name: str) -> np.ndarray:
    """(RESAMPLES,) values of ours - theirs, the same questions drawn for both; `name` seeds the draws."""
    questions = len(ours.part_N)
    assert len(theirs.part_N) == questions, "differences are paired: both need the same questions"
    generator = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    found, at_once = [], max(1, DRAWS // questions)
    for start in range(0, RESAMPLES, at_once):
        drawn_RN = generator.integers(questions, size=(min(at_once, RESAMPLES - start), questions))
        sums = (x_N[drawn_RN].sum(1) for x_N in (ours.part_N, ours.whole_N, theirs.part_N, theirs.whole_N))
        part_R, whole_R, other_part_R, other_whole_R = sums
        found.append(part_R / whole_R - other_part_R / other_whole_R)
    return np.concatenate(found)


def paired_difference(ours: Ratio, theirs: Ratio, name: str) -> Interval:
    """ours - theirs, and its interval."""
    return mean_paired_difference([(ours, theirs)], [name])


def mean_paired_difference(pairs: Sequence[tuple[Ratio, Ratio]], names: Sequence[str]) -> Interval:
    """The same of the mean over tasks, whose questions are drawn task by task."""
    value = float(np.mean([ours.value - theirs.value for ours, theirs in pairs]))
    if any(len(ours.part_N) < 2 for ours, _ in pairs):
        return Interval(value)
    resampled_SR = [resampled_differences(*pair, name) for pair, name in zip(pairs, names, strict=True)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.mean(resampled_SR, axis=0), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def mean_error(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent numbers; None where there is none, or one of theirs is not known."""
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    return math.sqrt(sum(error**2 for error in known)) / len(known)
