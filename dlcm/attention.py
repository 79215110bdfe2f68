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
    q_THN: Tensor,
    k_UKN: Tensor,
    v_UKN: Tensor,
    layout: PackedLayout,
    backend: AttentionBackend = "auto",
    context: PackedLayout | None = None,
    window: int | None = None,
) -> Tensor:
    """Each position attends to the positions at or before it in its own document, or to the last of these.

    Args:
        q_THN: queries, H heads of dimension N.
        k_UKN, v_UKN: keys and values; query head h reads key-value head h // (H / K).
        layout: the documents of the packed row.
        backend: see the module's docstring.
        context: the documents of keys and values, where they have a past: their last positions are those that ask.
        window: how many positions each attends to at most, itself included; None: all.

    Returns:
        (T, H, N), scaled by 1 / sqrt(N) before the softmax.

    Raises:
        AttentionBackendError: `backend` cannot run on this device, dtype or installation.
    """
    context = layout if context is None else context
    if window is not None and window >= context.max_seqlen:
        window = None  # it leaves nothing out
    match resolve_backend(backend, q_THN.device, q_THN.dtype, q_THN.shape[2]):
        case "flash_attn_4":
            return _flash_attn_4(q_THN, k_UKN, v_UKN, layout, context, window)
        case "flash_attn":
            return _flash_attn(q_THN, k_UKN, v_UKN, layout, context, window)
        case "torch_varlen":
            return _torch_varlen(q_THN, k_UKN, v_UKN, layout, context, window)
        case _:
            return _sdpa(q_THN, k_UKN, v_UKN, layout, context, window)


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


def _flash_attn_4(
    q_THN: Tensor, k_UKN: Tensor, v_UKN: Tensor, layout: PackedLayout, context: PackedLayout, window: int | None
) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    out_THN, _ = flash_attn_varlen_func(
        *(q_THN, k_UKN, v_UKN),
        cu_seqlens_q=layout.cu_seqlens_D1,
        cu_seqlens_k=context.cu_seqlens_D1,
        max_seqlen_q=layout.max_seqlen,
        max_seqlen_k=context.max_seqlen,
        causal=True,
        window_size=(None if window is None else window - 1, 0),
    )
    return out_THN


def _flash_attn(
    q_THN: Tensor, k_UKN: Tensor, v_UKN: Tensor, layout: PackedLayout, context: PackedLayout, window: int | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q_THN, k_UKN, v_UKN, *_lengths(layout, context), causal=True, window_size=_window_size(window)
    )


def _torch_varlen(
    q_THN: Tensor, k_UKN: Tensor, v_UKN: Tensor, layout: PackedLayout, context: PackedLayout, window: int | None
) -> Tensor:
    from torch.nn.attention import varlen

    attend = functools.partial(varlen.varlen_attn, window_size=_window_size(window))
    if q_THN.shape[1] != k_UKN.shape[1]:
        if _varlen_attn_has_gqa():
            attend = functools.partial(attend, enable_gqa=True)
        else:  # torch 2.11 and 2.12
            group = q_THN.shape[1] // k_UKN.shape[1]
            k_UKN, v_UKN = k_UKN.repeat_interleave(group, 1), v_UKN.repeat_interleave(group, 1)
    return cast(Tensor, attend(q_THN, k_UKN, v_UKN, *_lengths(layout, context)))


def _window_size(window: int | None) -> tuple[int, int]:
    """How far a position sees to the left and to the right, -1 for without end."""
    return -1 if window is None else window - 1, 0


def _lengths(layout: PackedLayout, context: PackedLayout) -> tuple[Tensor, Tensor, int, int]:
    return layout.cu_seqlens_D1, context.cu_seqlens_D1, layout.max_seqlen, context.max_seqlen


def _sdpa(
    q_THN: Tensor, k_UKN: Tensor, v_UKN: Tensor, layout: PackedLayout, context: PackedLayout, window: int | None
) -> Tensor:
    asking_D, lengths_D = (x.cu_seqlens_D1.diff().tolist() for x in (layout, context))
    outputs = []
    for q_lHN, k_uKN, v_uKN in zip(q_THN.split(asking_D), k_UKN.split(lengths_D), v_UKN.split(lengths_D), strict=True):
        asking, length = len(q_lHN), len(k_uKN)
        seen = length if window is None else min(window, length)
        mask_lu = None
        if seen < length or asking < length:
            mask_lu = torch.ones(asking, length, dtype=torch.bool, device=q_THN.device)
            mask_lu = mask_lu.tril(length - asking).triu(length - asking - seen + 1)
        out_HlN = F.scaled_dot_product_attention(
            q_lHN.transpose(0, 1)[None],
            k_uKN.transpose(0, 1)[None],
            v_uKN.transpose(0, 1)[None],
            attn_mask=mask_lu,
            is_causal=mask_lu is None,
            enable_gqa=q_THN.shape[1] != k_UKN.shape[1],
        )[0]
        outputs.append(out_HlN.transpose(0, 1))
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
