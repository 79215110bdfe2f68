"""Ranks: what the processes of one run have to agree on. In a single process every method is the obvious thing.

Several are started by `torchrun --nproc-per-node N -m train.pretrain ...`; tensors on the CPU travel by gloo,
those on CUDA by NCCL.
"""

import copy
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

# A rank that has not answered by then is given up, and with it the run. The longest that ranks wait for each other on
# purpose is while rank 0 hashes the data, of which a terabyte takes about as long, or the slowest writes its part of a
# checkpoint.
PATIENCE = timedelta(minutes=20)


class PeerFailure(RuntimeError):
    """Another rank, mostly rank 0, failed and says why; this one stops without a word."""


def means_lost_rank(error: RuntimeError) -> bool:
    """Whether an error says that another rank ended or did not answer in time. Of gloo's, only the words tell."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


class Ranks:
    """This process's `rank` among `size`; `local_rank` counts on its machine."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=PATIENCE)
        self._group: dist.ProcessGroup | None = None  # the group of all, by default

    def beside(self) -> Self:
        """The same ranks, for another thread: what it says, on the CPU, does not mix with what is said here."""
        ranks = copy.copy(self)
        if self.size > 1:
            ranks._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return ranks

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group)
        return values

    def max(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
        return int(values)

    def gather(self, values: Tensor) -> Tensor:
        """(ranks, ...): all ranks' values, which are on the CPU and alike in shape."""
        if self.size == 1:
            return values[None]
        each = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(each, values, group=self._group)
        return torch.stack(each)

    def on_first(self, action: Callable[[], int | None]) -> int:
        """Runs `action` on rank 0 alone and returns its result (None is 0) on every rank.

        Raises:
            PeerFailure: on the other ranks, when `action` raised on rank 0 (where its own error is raised).
        """
        if self.size == 1:
            return action() or 0
        failure: Exception | None = None
        answer = torch.zeros(2, dtype=torch.int64)  # the result, and whether there is none
        if self.is_first:
            try:
                answer[0] = action() or 0
            except Exception as error:  # the other ranks must hear of it before it is raised
                failure, answer[1] = error, 1
        dist.broadcast(answer, 0, group=self._group)
        if failure is not None:
            raise failure
        result, failed = answer.tolist()
        if failed:
            raise PeerFailure
        return result

    def leave(self) -> None:
        """Ends the group; whatever was wrapped for it (DistributedDataParallel) must be out of use."""
        if self.size > 1:
            # What still waits for the collector would hold on to the group and end it later, with the interpreter
            # locked, while it waits for gloo's threads, and they for the interpreter.
            gc.collect()
            dist.destroy_process_group()
