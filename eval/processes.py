"""Independent jobs over processes of one thread each, for work that Python's lock would keep to one core."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def over_processes(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """function(*job) for each job, in order, so many at a time; in this process for one worker.

    What a job raises is raised here, and the jobs that have not begun are not begun. Long jobs should come first.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield function(*job)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), torch.set_num_threads, (1,))
    try:
        for future in [pool.submit(function, *job) for job in jobs]:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
