"""Errors are those of the textbook, and the bootstrap's agree with them."""

import math
import statistics

import numpy as np
import pytest

from eval.uncertainty import (
    RESAMPLES,
    Ratio,
    mean_error,
    mean_paired_difference,
    paired_difference,
    resampled_differences,
)

VALUES = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]


def test_error_of_a_mean_is_s_over_root_n() -> None:
    ratio = Ratio.mean(VALUES)
    assert ratio.value == 5 / 8
    assert ratio.error == pytest.approx(statistics.stdev(VALUES) / math.sqrt(8), rel=1e-12)
    assert ratio.error == pytest.approx(math.sqrt(5 / 8 * 3 / 8 / 7), rel=1e-12)
    assert Ratio.mean([True, True]).error == 0
    assert Ratio.mean([1.0]).error is None


def test_error_of_a_ratio_is_that_of_its_residuals() -> None:
    ratio = Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0, 2.0])
    assert ratio.value == 2.5
    assert ratio.error == pytest.approx(math.sqrt((0.5**2 + 1.5**2 + 1.0**2) * 3 / 2) / 6, rel=1e-12)
    assert Ratio.of([2.0, 6.0], [1.0, 3.0]).error == 0  # the same everywhere


def test_error_of_the_mean_over_tasks() -> None:
    assert mean_error([0.3, 0.4]) == pytest.approx(0.25)
    assert mean_error([0.3, None]) is None and mean_error([]) is None


def test_differences_are_paired() -> None:
    """Two checkpoints that fail alike differ by nothing, however few questions there are."""
    found = paired_difference(Ratio.mean(VALUES), Ratio.mean(VALUES), "task")
    assert (found.value, found.low, found.high) == (0, 0, 0)
    found = paired_difference(Ratio.mean(VALUES), Ratio.mean(np.subtract(VALUES, 0.5).tolist()), "task")
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_of_one_question_there_is_no_interval() -> None:
    found = paired_difference(Ratio.mean([1.0]), Ratio.mean([0.0]), "task")
    assert (found.value, found.low, found.high) == (1, None, None)
    pairs = [(Ratio.mean(VALUES), Ratio.mean(VALUES)), (Ratio.mean([1.0]), Ratio.mean([0.0]))]
    assert mean_paired_difference(pairs, ["many", "one"]).low is None


def test_intervals_are_as_wide_as_the_normal_ones() -> None:
    generator = np.random.default_rng(1)
    ours, theirs = generator.random((2, 2000)) < [[0.5], [0.4]]
    found = paired_difference(Ratio.mean(ours.tolist()), Ratio.mean(theirs.tolist()), "task")
    error = Ratio.mean((ours.astype(float) - theirs).tolist()).error
    assert error is not None
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert found.low < found.value < found.high


def test_draws_are_seeded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Ratio.mean(VALUES), Ratio.mean(VALUES[::-1])
    once = resampled_differences(ours, theirs, "task")
    assert len(once) == RESAMPLES
    assert np.array_equal(once, resampled_differences(ours, theirs, "task"))
    assert not np.array_equal(once, resampled_differences(ours, theirs, "other"))
    monkeypatch.setattr("eval.uncertainty.DRAWS", 8 * 7)  # in many pieces, which are other draws of the same kind
    pieces = resampled_differences(ours, theirs, "task")
    assert len(pieces) == RESAMPLES and pieces.std() == pytest.approx(once.std(), rel=0.1)


def test_difference_of_the_mean_over_tasks_is_narrower() -> None:
    generator = np.random.default_rng(2)
    pairs = [tuple(map(Ratio.mean, (generator.random((2, 500)) < 0.5).tolist())) for _ in range(4)]
    single = [paired_difference(*pair, name=str(number)) for number, pair in enumerate(pairs)]
    together = mean_paired_difference(pairs, [str(number) for number in range(4)])
    assert together.value == pytest.approx(np.mean([found.value for found in single]))
    widths = [found.high - found.low for found in single]
    assert together.high - together.low == pytest.approx(np.mean(widths) / 2, rel=0.1)


def test_pairs_need_the_same_questions() -> None:
    with pytest.raises(AssertionError, match="the same questions"):
        paired_difference(Ratio.mean(VALUES), Ratio.mean(VALUES[1:]), "task")
