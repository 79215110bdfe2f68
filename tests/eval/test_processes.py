"""Jobs over processes come back in order, and errors come through."""

import os

import pytest

from eval.loading import EvaluationError
from eval.processes import over_processes


def where(number: int) -> tuple[int, int]:
    if number < 0:
        raise EvaluationError("negative")
    return number, os.getpid()


@pytest.mark.parametrize("workers", (1, 2))
def test_jobs_come_back_in_order(workers: int) -> None:
    found = list(over_processes(where, [(number,) for number in range(6)], workers))
    assert [number for number, _ in found] == list(range(6))
    assert all((process == os.getpid()) == (workers == 1) for _, process in found)


@pytest.mark.parametrize("workers", (1, 2))
def test_what_a_job_raises_is_raised(workers: int) -> None:
    jobs: list[tuple[int]] = [(1,), (-1,)]
    with pytest.raises(EvaluationError, match="negative"):
        list(over_processes(where, jobs, workers))
