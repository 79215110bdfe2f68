"""Several processes of one group, for tests of what ranks do together."""

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 240  # seconds for what they do together
PRELOADED = ["tests.conftest", "train.pretrain"]


class RankProcesses:
    """`main(*arguments)` in each of so many processes, which are told what torchrun tells them.

    They are copies of one that has done the imports, which take longer than what most ranks do here.

    Attributes:
        said: a file for each, of what it writes to stdout and stderr.
    """

    def __init__(self, number: int, directory: Path, main: Callable[..., int | None], *arguments: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.said = [directory / f"said_{rank}.txt" for rank in range(number)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes = [
            context.Process(
                target=_as_rank, args=(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said, main, arguments)
            )
            for rank, said in enumerate(self.said)
        ]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """How they ended: what `main` returned (None is 0), 1 where it raised, or minus the signal that ended it."""
        try:
            deadline = time.monotonic() + PATIENCE
            for process in self.processes:
                process.join(max(deadline - time.monotonic(), 0))
            found = [process.exitcode for process in self.processes]
            assert None not in found, f"{found} after {PATIENCE} seconds:\n{self.text}"
            return [status for status in found if status is not None]
        finally:
            self.end()

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def text(self) -> str:
        return "".join(said.read_text() for said in self.said if said.exists())


def _as_rank(place: dict[str, str], said: Path, main: Callable[..., int | None], arguments: Sequence[Any]) -> None:
    with said.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ |= place
    torch.set_num_threads(1)
    sys.exit(main(*arguments))


def run_ranks(number: int, directory: Path, main: Callable[..., int | None], *arguments: Any) -> str:
    """Runs them to a good end, and returns what they said."""
    ranks = RankProcesses(number, directory, main, *arguments)
    assert ranks.wait() == [0] * number, ranks.text
    return ranks.text


def run_two_ranks(rank_main: Callable[[int, str], None], directory: Path) -> None:
    """Runs `rank_main(rank, directory)` in two processes of one gloo group."""
    run_ranks(2, directory, _in_group, rank_main, str(directory))


def _in_group(rank_main: Callable[[int, str], None], directory: str) -> None:
    dist.init_process_group("gloo")
    rank_main(dist.get_rank(), directory)
    gc.collect()  # see `train.distributed.Ranks.leave`
    dist.destroy_process_group()
