"""Jobs over processes come back in order, and errors come through."""

import os

import pytest

from eval.processes import over_processes


def where(number: int) -> tuple[int, int]:
    if number < 0:
        raise ValueError("negative")
    return number, os.getpid()


@pytest.mark.parametrize("workers", (1, 2))
def test_jobs_come_back_in_order_until_one_fails(workers: int) -> None:
    found = []
    with pytest.raises(ValueError, match="negative"):
        for result in over_processes(where, [(number,) for number in (0, 1, 2, 3, -1, 4)], workers):
            found.append(result)
    assert [number for number, _ in found] == list(range(4))
    assert all((process == os.getpid()) == (workers == 1) for _, process in found)
