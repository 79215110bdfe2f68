"""How a model's parameters live on the ranks of a run: `parallel.strategy`, by PyTorch's own engines.

    ddp      every rank holds all of them; gradients are averaged
    fsdp     every rank holds its part of each, of its gradient and of its moments: a block is whole only where it runs
    hybrid   the `shard_size` ranks of a group do so, those of a machine say, and groups average gradients

A sharded parameter is a DTensor under its old name, so that roles, optimizer groups and checkpoints are what they were.
In a single process there is nothing to choose: the model is as it is.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dlcm.blocks import Block
from dlcm.causal_lm import PackedCausalLM
from dlcm.cross_attention import CrossAttention
from dlcm.sharding import sharing_ranks
from train.config import ConfigError, ParallelConfig
from train.distributed import Ranks

# Gathered for bf16 products, a block travels, and is kept, as bf16; its gradient is summed in fp32. Its inputs are not
# cast, so that the residual stream stays fp32. Gains of norms, which are no products, lose bits on this way: what is
# not a block (embedding, detector, last norms, unembedding) travels in fp32.
BF16_BLOCKS = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)


def check_parallel(parallel: ParallelConfig, ranks: Ranks) -> None:
    """Raises ConfigError where so many ranks cannot be grouped as asked; a single process need not be."""
    size = parallel.shard_size
    if ranks.size > 1 and size is not None and ranks.size % size:
        fitting = [str(divisor) for divisor in range(2, ranks.size + 1) if ranks.size % divisor == 0]
        raise ConfigError(
            f"parallel.shard_size is {size}, which does not divide {ranks.size} processes; set it to "
            f"{' or '.join(fitting)}"
        )


def distribute(
    model: PackedCausalLM, parallel: ParallelConfig, device: torch.device, ranks: Ranks, bf16: bool
) -> nn.Module:
    """Puts the model on `device`, its parameters on the ranks, and returns what a training step is to call.

    To be called before the optimizer is made. Sharded blocks go to the device one by one, and leave this rank's part.

    Args:
        model: the same on every rank, on the CPU.
        bf16: whether products are in bf16, by autocast.
    """
    if ranks.size == 1 or parallel.strategy == "ddp":
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        return _replicated(model) if ranks.size > 1 else model
    if parallel.strategy == "hybrid":
        assert parallel.shard_size is not None
        shape = ranks.size // parallel.shard_size, parallel.shard_size
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh(device.type, (ranks.size,))
    # Bit depths, exponents and the weights that they round must not lose bits on the way.
    policy = BF16_BLOCKS if bf16 and model.config.quantiser == "none" else MixedPrecisionPolicy()
    for block in [module for module in model.modules() if isinstance(module, Block | CrossAttention)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    keep_on_host(model)
    if hasattr(model, "boundary_statistics"):  # the other way into the model
        add_forward_method(model, "boundary_statistics")
    return model


def _replicated(model: nn.Module) -> DistributedDataParallel:
    # Gradients live in the buckets they travel in: otherwise both would take their room.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def rewrapped(parallel: nn.Module) -> nn.Module:
    """What a training step is to call once some parameters of a model, which is not sharded, are others than before."""
    assert not isinstance(parallel, FSDPModule)
    return _replicated(parallel.module) if isinstance(parallel, DistributedDataParallel) else parallel


class _Hidden:
    """A tensor that nobody takes for one."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def keep_on_host(model: nn.Module) -> None:
    """Lets a sharded model be called with tensors that lie on the host, where it wants them (`cu_seqlens`).

    FSDP moves whatever it is called with to the device, and the host waits for that until the device has done all that
    it was given before: after every step, a small model's GPU would be idle while the host gets ahead again.
    """

    model.register_forward_pre_hook(lambda _, args, kwargs: (args, _hidden(kwargs)), prepend=True, with_kwargs=True)
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, _shown(kwargs)), with_kwargs=True)


def add_forward_method(model: nn.Module, name: str) -> None:
    """Makes a method of a sharded model another way into it; what lies on the host stays there, as in `forward`."""
    method = getattr(model, name)
    setattr(model, name, lambda *args, **kwargs: method(*args, **_shown(kwargs)))
    register_fsdp_forward_method(model, name)
    sharded = getattr(model, name)
    setattr(model, name, lambda *args, **kwargs: sharded(*args, **_hidden(kwargs)))


def _hidden(kwargs: dict[str, Any]) -> dict[str, Any]:
    """These, but what lies on the host is no tensor any more."""
    on_host = {name for name, value in kwargs.items() if isinstance(value, Tensor) and value.device.type == "cpu"}
    return {name: _Hidden(value) if name in on_host else value for name, value in kwargs.items()}


def _shown(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tensor if isinstance(value, _Hidden) else value for name, value in kwargs.items()}


def unwrapped(parallel: nn.Module) -> nn.Module:
    """The model that `distribute` was given."""
    return parallel.module if isinstance(parallel, DistributedDataParallel) else parallel


@contextmanager
def gradients_travel(parallel: nn.Module, travel: bool) -> Iterator[None]:
    """Whether backward passes in here sum gradients over ranks, or add them to what this rank has, as whole tensors."""
    if isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(travel)
        yield
    elif isinstance(parallel, DistributedDataParallel) and not travel:
        with parallel.no_sync():
            yield
    else:
        yield


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Where it is sharded, every rank must ask, and every rank is given it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; to change it is to change the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def over_parts(values: Tensor, tensor: Tensor) -> Tensor:
    """Sums, in place, what ranks have found of their parts of a tensor, over those that hold one copy of it."""
    group = sharing_ranks(tensor)
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def owned_tensors(tensors: Mapping[str, Tensor], owner: Mapping[str, int], rank: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this `rank` owns, whole. All ranks must ask, for all of them.

    Shards travel to their owner alone, one tensor to each owner at a time: in all, a rank receives what it owns. The
    last tensor that was given is all that is held of others' shards.

    Args:
        tensors: by name, the same names in the same order on all ranks; sharded ones of one dtype.
        owner: a rank for each name.
    """
    sharded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    yield from ((name, x.detach()) for name, x in tensors.items() if name not in sharded and owner[name] == rank)
    if not sharded:
        return
    some = next(iter(sharded.values()))
    group = sharing_ranks(some)
    assert group is not None
    members = dist.get_process_group_ranks(group)
    queues = [[name for name in sharded if owner[name] == member] for member in members]
    for names in itertools.zip_longest(*queues):
        sent = [some.to_local().new_empty(0) if name is None else sharded[name].to_local().flatten() for name in names]
        own = names[members.index(rank)]
        shape = torch.Size([0]) if own is None else sharded[own].shape
        counts = [len(rows) * shape[1:].numel() for rows in _rows(shape[0], len(members))]
        received = some.to_local().new_empty(sum(counts))  # in the order of ranks, which is that of rows
        dist.all_to_all_single(received, torch.cat(sent).detach(), counts, [len(x) for x in sent], group=group)
        if own is not None:
            yield own, received.view(shape)


class Readable(Protocol):
    """A tensor in a file, of which slices can be read."""

    def __getitem__(self, index: Any) -> Tensor: ...


@torch.no_grad()
def fill_(tensor: Tensor, saved: Readable) -> None:
    """Copies what this rank holds of a tensor from a file; of a sharded one, no other rows are read."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(saved[...])
        return
    mesh, part = tensor.device_mesh, tensor.to_local()
    rows = _rows(tensor.shape[0], mesh.size(mesh.ndim - 1))[mesh.get_local_rank(mesh.ndim - 1)]
    assert len(rows) == len(part)
    if rows:
        part.copy_(saved[rows.start : rows.stop])


def _rows(total: int, ranks: int) -> list[range]:
    """Which rows of a tensor FSDP gives to each rank: as many as fit evenly, rounded up, while there are any."""
    each = -(-total // ranks)
    return [range(min(rank * each, total), min((rank + 1) * each, total)) for rank in range(ranks)]
