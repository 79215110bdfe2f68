"""Where code would make the host wait for a GPU, found without one."""

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dlcm.layout import PackedLayout

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(str(ROOT / package) for package in ("dlcm", "train", "eval", "tests"))

aten = torch.ops.aten
# What is decided by values that lie on the device: results on the host, and shapes. Operations, wherever they are from:
OPERATIONS = {
    aten._local_scalar_dense,  # item(), float(), bool()
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# And methods, which on the CPU are no operation.
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu}


@contextmanager
def counting_waits() -> Iterator[Counter[str]]:
    """Counts what waits, by the `file:function` of this repository that asked for it.

    Copies between devices look like any others on the CPU: those that wait are found on a GPU alone, by
    `torch.cuda.set_sync_debug_mode`.
    """
    places: Counter[str] = Counter()
    with _Methods(places), _Operations(places):
        yield places


class _Methods(TorchFunctionMode):
    def __init__(self, places: Counter[str]):
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A number assigned to one element is a tensor of the CPU, copied from memory that is not pinned.
        assigns_number = func is Tensor.__setitem__ and not isinstance(args[2], Tensor)
        if func in METHODS or assigns_number:
            self.places[_place()] += 1
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, places: Counter[str]):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        by_mask = packet in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
        if packet in OPERATIONS or by_mask:
            self.places[_place()] += 1
        return func(*args, **(kwargs or {}))


def masked_sdpa(
    q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: PackedLayout, context: PackedLayout, window: None
) -> Tensor:
    """Attention that, like the kernels of a GPU, does not look at document lengths on the host."""
    group = q_THN.shape[1] // k_TKN.shape[1]
    k_THN, v_THN = k_TKN.repeat_interleave(group, 1), v_TKN.repeat_interleave(group, 1)
    later_TT = torch.ones(layout.total, layout.total, dtype=torch.bool).triu(1)
    hidden_TT = later_TT | (layout.document_T[:, None] != layout.document_T)
    score_HTT = torch.einsum("THN,SHN->HTS", q_THN, k_THN) * q_THN.shape[-1] ** -0.5
    return torch.einsum("HTS,SHN->THN", score_HTT.masked_fill(hidden_TT, -torch.inf).softmax(-1), v_THN)


def _place() -> str:
    for frame in inspect.stack(context=0)[2:]:
        if frame.filename.startswith(PACKAGES) and frame.filename != __file__:
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.function}"
    return "elsewhere"
