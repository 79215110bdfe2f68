"""Attention of one query per row of a batch to that row's cache: a step of decoding.

Row b attends to the entries 0 .. length_B[b] - 1 of its cache, or to the last of them where there is a window. Counts
are concept replication in compact form (section 4.1, Eq. 17): an entry that is replicated n times is kept once, with
the bias log n. What is past the length, or counted 0 times, may hold anything, and a row that sees no entry is zero: so
rows with nothing to do in a step are passed over.

Shapes alone decide what is launched, lengths and counts stay on the device: CUDA graphs can replay a step. The kernel
has no backward pass.

Legend: B rows, S the capacity of the cache, H / K query / key-value heads, G = H / K, N head dimension.
"""

import importlib.util

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up here, where torch.compile does not look


def cached_attention(
    q_BHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    length_B: Tensor,
    count_BS: Tensor | None = None,
    newest_BKN: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
) -> Tensor:
    """Each row's query attends to its cache, (B, H, N): by a fused kernel on CUDA where it runs, else written out.

    Args:
        q_BHN: queries; scores are scaled by 1 / sqrt(N).
        k_BSKN, v_BSKN: keys and values, of the queries' dtype; query head h reads head h // (H / K).
        length_B: entries of each row's cache, int32 or int64, at most S.
        count_BS: how often each entry counts, int32; None is once.
        newest_BKN: key and value of each row's last entry, where all count once: they are put there first. A row that
            sees no entry puts none.
        window: how many of a row's last entries are seen, where all count once; None: all.

    Raises:
        ValueError: both counts and a window.
    """
    if count_BS is not None and window is not None:
        raise ValueError("cached attention has a window where all entries count once, and none over slots")
    if q_BHN.device.type == "cuda" and _HAS_TRITON:
        from dlcm.kernels import decode_attention as kernel

        if kernel.obstacle(q_BHN) is None:
            return kernel.decode_attention(q_BHN, k_BSKN, v_BSKN, length_B, count_BS, newest_BKN, window)
    if newest_BKN is not None:
        put_newest(k_BSKN, v_BSKN, length_B, *newest_BKN)
    return decode_attention_reference(q_BHN, k_BSKN, v_BSKN, length_B, count_BS, window)


def put_newest(k_BSKN: Tensor, v_BSKN: Tensor, length_B: Tensor, newest_k_BKN: Tensor, newest_v_BKN: Tensor) -> None:
    """Writes each row's last entry, if it has one."""
    row_B, last_B = torch.arange(len(length_B), device=length_B.device), (length_B - 1).clamp(min=0)
    sees_B11 = (length_B > 0)[:, None, None]
    for cache_BSKN, x_BKN in ((k_BSKN, newest_k_BKN), (v_BSKN, newest_v_BKN)):
        cache_BSKN[row_B, last_B] = x_BKN.to(cache_BSKN.dtype).where(sees_B11, cache_BSKN[row_B, last_B])


def decode_attention_reference(
    q_BHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    length_B: Tensor,
    count_BS: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The same with scores over the whole capacity and the bias written out, in fp32 or wider; any device and dtype."""
    dtype, wide = q_BHN.dtype, torch.promote_types(q_BHN.dtype, torch.float32)
    capacity, kv_heads, head_dim = k_BSKN.shape[1:]
    entry_S = torch.arange(capacity, device=length_B.device)
    seen_BS = entry_S < length_B[:, None]
    if window is not None:
        seen_BS = seen_BS & (entry_S >= length_B[:, None] - window)
    if count_BS is not None:
        seen_BS = seen_BS & (count_BS > 0)
    unseen_BS = ~seen_BS
    bias_BS = torch.zeros_like(unseen_BS, dtype=wide) if count_BS is None else count_BS.to(wide).log()
    bias_BS = bias_BS.masked_fill(unseen_BS, -torch.inf)
    # 0 times NaN is NaN: what nobody sees is made zero before anything multiplies it.
    k_BSKN, v_BSKN = (x.to(wide).masked_fill(unseen_BS[:, :, None, None], 0) for x in (k_BSKN, v_BSKN))

    q_BKGN = q_BHN.to(wide).unflatten(1, (kv_heads, -1))
    score_BKGS = torch.einsum("bkgn,bskn->bkgs", q_BKGN, k_BSKN) * head_dim**-0.5 + bias_BS[:, None, None]
    p_BKGS = score_BKGS.softmax(3).masked_fill(unseen_BS[:, None, None], 0)  # NaN where a row sees nothing
    return torch.einsum("bkgs,bskn->bkgn", p_BKGS, v_BSKN).flatten(1, 2).to(dtype)
