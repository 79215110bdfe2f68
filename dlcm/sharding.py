"""Parameters that several ranks hold together (FSDP2's): what the models need to know of it."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def sharing_ranks(tensor: Tensor) -> dist.ProcessGroup | None:
    """Those that each hold a part of one copy of a tensor; None where it is whole. Of hybrid shards, one group."""
    if not isinstance(tensor, DTensor):
        return None
    return tensor.device_mesh.get_group(tensor.device_mesh.ndim - 1)
