"""How a model's parameters live on the ranks of a run: `parallel.strategy`, by PyTorch's own engines.

    ddp      every rank holds all of them; gradients are averaged
    fsdp     every rank holds its part of each, of its gradient and of its moments: a block is whole only where it runs
    hybrid   the `shard_size` ranks of a group do so, those of a machine say, and groups average gradients

A sharded parameter is a DTensor under its old name, so that roles, optimizer groups and checkpoints are what they were.
In a single process there is nothing to choose: the model is as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dlcm.blocks import Block
from dlcm.causal_lm import PackedCausalLM
from dlcm.cross_attention import CrossAttention
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
        # Gradients live in the buckets they travel in: otherwise both would take their room.
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks.size > 1 else model
    if parallel.strategy == "hybrid":
        assert parallel.shard_size is not None
        shape = ranks.size // parallel.shard_size, parallel.shard_size
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh(device.type, (ranks.size,))
    policy = BF16_BLOCKS if bf16 else MixedPrecisionPolicy()
    for block in [module for module in model.modules() if isinstance(module, Block | CrossAttention)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "boundary_statistics"):  # the other way into the model
        register_fsdp_forward_method(model, "boundary_statistics")
    return model


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


def part_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """What this rank holds of a whole tensor, which every rank has, if it is to live as `parameter` does."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    # A copy: a view would keep all of the tensor.
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None).clone()
