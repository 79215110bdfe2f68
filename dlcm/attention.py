"""Causal attention over packed documents (section 4): one function, four backends.

    flash_attn_4  the flash-attn-4 package, for Hopper and Blackwell GPUs; fp16 or bf16
    flash_attn    the flash-attn package; CUDA, fp16 or bf16
    torch_varlen  torch's own varlen FlashAttention; CUDA, fp16 or bf16
    sdpa          torch's scaled_dot_product_attention, document by document; any device and dtype. The reference.

`auto` takes the first of them that can run. A backend asked for by name that cannot run is an error.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dlcm.config import AttentionBackend
from dlcm.layout import PackedLayout


class AttentionBackendError(RuntimeError):
    """The attention backend that was asked for cannot run here."""


def causal_attention(
    q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: PackedLayout, backend: AttentionBackend = "auto"
) -> Tensor:
    """Each position attends to the positions at or before it in its own document.

    Args:
        q_THN: queries, H heads of dimension N.
        k_TKN, v_TKN: keys and values; query head h reads key-value head h // (H / K).
        layout: the documents of the packed row.
        backend: see the module's docstring.

    Returns:
        (T, H, N), scaled by 1 / sqrt(N) before the softmax.

    Raises:
        AttentionBackendError: `backend` cannot run on this device, dtype or installation.
    """
    match resolve_backend(backend, q_THN.device, q_THN.dtype, q_THN.shape[2]):
        case "flash_attn_4":
            return _flash_attn_4(q_THN, k_TKN, v_TKN, layout)
        case "flash_attn":
            return _flash_attn(q_THN, k_TKN, v_TKN, layout)
        case "torch_varlen":
            return _torch_varlen(q_THN, k_TKN, v_TKN, layout)
        case _:
            return _sdpa(q_THN, k_TKN, v_TKN, layout)


def resolve_backend(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The backend that will run: `auto` is decided, a named one is checked.

    Raises:
        AttentionBackendError: a named backend cannot run; the message says what it needs.
    """
    if backend == "auto":
        return next(name for name in OBSTACLES if OBSTACLES[name](device, dtype, head_dim) is None)
    if problem := OBSTACLES[backend](device, dtype, head_dim):
        raise AttentionBackendError(f"attention_backend='{backend}' needs {problem}, or use attention_backend='auto'")
    return backend


def _flash_attn_4_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if (problem := _torch_varlen_obstacle(device, dtype, head_dim)) is not None:
        return problem
    if not (importable("flash_attn.cute") and importable("cutlass")):  # flash-attn may bring the former alone
        return "the flash-attn-4 package: pip install flash-attn-4"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 9 else f"a Hopper or Blackwell GPU, got compute capability {major}.{minor}"


def _flash_attn_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if (problem := _torch_varlen_obstacle(device, dtype, head_dim)) is not None:
        return problem
    return None if importable("flash_attn.flash_attn_interface") else "the flash-attn package: pip install flash-attn"


def _torch_varlen_obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return f"fp16 or bf16 on a CUDA device, got {dtype} on {device.type}: use bf16 autocast on a GPU"
    if head_dim % 8 or head_dim > 256:
        return f"a head dimension that is a multiple of 8 up to 256, got {head_dim}: use another number of heads"
    return None


# What keeps a backend from running, and the remedy; None where it runs. In the order of preference of `auto`.
OBSTACLES: dict[AttentionBackend, Callable[[torch.device, torch.dtype, int], str | None]] = {
    "flash_attn_4": _flash_attn_4_obstacle,
    "flash_attn": _flash_attn_obstacle,
    "torch_varlen": _torch_varlen_obstacle,
    "sdpa": lambda device, dtype, head_dim: None,
}


def _flash_attn_4(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: PackedLayout) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    cu, longest = layout.cu_seqlens_D1, layout.max_seqlen
    out_THN, _ = flash_attn_varlen_func(
        *(q_THN, k_TKN, v_TKN),
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
    )
    return out_THN


def _flash_attn(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: PackedLayout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    cu, longest = layout.cu_seqlens_D1, layout.max_seqlen
    return flash_attn_varlen_func(q_THN, k_TKN, v_TKN, cu, cu, longest, longest, causal=True)


def _torch_varlen(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: PackedLayout) -> Tensor:
    from torch.nn.attention import varlen

    cu, longest = layout.cu_seqlens_D1, layout.max_seqlen
    attend = functools.partial(varlen.varlen_attn, window_size=(-1, 0))
    if q_THN.shape[1] != k_TKN.shape[1]:
        if _varlen_attn_has_gqa():
            attend = functools.partial(attend, enable_gqa=True)
        else:  # torch 2.11 and 2.12
            group = q_THN.shape[1] // k_TKN.shape[1]
            k_TKN, v_TKN = k_TKN.repeat_interleave(group, 1), v_TKN.repeat_interleave(group, 1)
    return cast(Tensor, attend(q_THN, k_TKN, v_TKN, cu, cu, longest, longest))


def _sdpa(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: PackedLayout) -> Tensor:
    lengths = layout.cu_seqlens_D1.diff().tolist()
    grouped = q_THN.shape[1] != k_TKN.shape[1]
    outputs = [
        F.scaled_dot_product_attention(
            q_lHN.transpose(0, 1)[None],
            k_lKN.transpose(0, 1)[None],
            v_lKN.transpose(0, 1)[None],
            is_causal=True,
            enable_gqa=grouped,
        )[0].transpose(0, 1)
        for q_lHN, k_lKN, v_lKN in zip(q_THN.split(lengths), k_TKN.split(lengths), v_TKN.split(lengths), strict=True)
    ]
    return torch.cat(outputs)


@functools.cache
def importable(module: str) -> bool:
    """Whether there is such a module, below parents that can be imported.

    Both flash-attn packages are called flash_attn, and either may be there alone.
    """
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # its parent is not there, or broken
        return False


@functools.cache
def _varlen_attn_has_gqa() -> bool:
    from torch.nn.attention import varlen

    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
