"""Causal attention over packed documents (section 4): one function, three backends.

    flash_attn    the flash-attn package; CUDA, fp16 or bf16
    torch_varlen  torch's own varlen FlashAttention; CUDA, fp16 or bf16
    sdpa          torch's scaled_dot_product_attention, document by document; any device and dtype. The reference.

`auto` takes flash_attn where it is importable, else torch_varlen, on CUDA in half precision, and sdpa otherwise.
A backend asked for by name that cannot run is an error.
"""

import functools
import importlib.util
import inspect
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
    match resolve_backend(backend, q_THN.device, q_THN.dtype):
        case "flash_attn":
            return _flash_attn(q_THN, k_TKN, v_TKN, layout)
        case "torch_varlen":
            return _torch_varlen(q_THN, k_TKN, v_TKN, layout)
        case _:
            return _sdpa(q_THN, k_TKN, v_TKN, layout)


def resolve_backend(backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend that will run: `auto` is decided, a named one is checked.

    Raises:
        AttentionBackendError: a named backend cannot run; the message says what it needs.
    """
    flash_runs = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if backend == "auto":
        if not flash_runs:
            return "sdpa"
        return "flash_attn" if _flash_attn_importable() else "torch_varlen"
    if backend == "sdpa":
        return backend
    if backend == "flash_attn" and not _flash_attn_importable():
        raise AttentionBackendError(
            "attention_backend='flash_attn' needs the flash-attn package: pip install flash-attn, "
            "or use attention_backend='auto'"
        )
    if not flash_runs:
        raise AttentionBackendError(
            f"attention_backend='{backend}' needs fp16 or bf16 on a CUDA device, got {dtype} on {device.type}: "
            "use bf16 autocast on a GPU, or attention_backend='auto'"
        )
    return backend


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


def _flash_attn_importable() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@functools.cache
def _varlen_attn_has_gqa() -> bool:
    from torch.nn.attention import varlen

    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
