"""Attention of one query per row of a batch to that row's cache (see `dlcm/cached_attention.py`): flash-decoding.

    share    one program for a row, a key-value head and one of P parts of what the row has cached; it serves all query
             heads that read the head, so that keys and values are loaded once. The part that ends with the newest entry
             writes it into the cache, if it is not there yet
    combine  one program for a row and a query head: the parts, weighted by how much of the softmax's sum they hold

A row's parts are equal shares of its own length, which the device alone knows, or of what a window leaves of it:
however large the capacity, all work is spread over all parts. Grids depend on shapes and the window only. Rows and
heads are told apart in 64 bits: a cache may well have more than 2^31 numbers.

Scores are in base 2 throughout, as in `ragged_attention`. Legend: B rows, S the capacity of the cache, H / K query /
key-value heads, N head dimension, P parts; in kernels, G are the H / K query heads of a key-value head, Sb the entries
of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = 1.4426950408889634

# Of keys, and as much of values. Two of each are in shared memory: three programs fit in a Hopper multiprocessor.
TILE_BYTES = 16 * 2**10
MAX_TILE_ENTRIES = 128
PROGRAMS_PER_MULTIPROCESSOR = 8  # a few waves: rows of unequal length even out
MIN_PART_ENTRIES = 256  # of a full cache: against these, a part's output and its sum are a few per cent to write
MAX_PARTS = 64


def decode_attention(
    q_BHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    length_B: Tensor,
    count_BS: Tensor | None = None,
    newest_BKN: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
) -> Tensor:
    """Each row's query attends to the first entries of its cache, (B, H, N); zeros where a row sees none.

    Scores are scaled by 1 / sqrt(N). What no row sees is not read. There is no backward pass.

    Args:
        q_BHN: queries; bf16, fp16 or fp32, on CUDA (or on the CPU under Triton's interpreter).
        k_BSKN, v_BSKN: keys and values, of the same dtype; query head h reads head h // (H / K). Views will do, with
            numbers of a head next to each other: a cache is never copied.
        length_B: entries of each row's cache, int32 or int64, at most S.
        count_BS: how often each entry counts, int32; None is once.
        newest_BKN: key and value of each row's last entry, to be put there; None has them there already.
        window: how many of a row's last entries are seen; None: all.

    Raises:
        ValueError: the kernels do not run on these tensors; says what they need.
    """
    if problem := obstacle(q_BHN):
        raise ValueError(f"decode attention {problem}")
    if newest_BKN is None:
        return _decode_attention(q_BHN, k_BSKN, v_BSKN, length_B, count_BS, window)
    if count_BS is not None:
        raise ValueError("decode attention puts an entry where all count once")
    return _append_and_attend(q_BHN, k_BSKN, v_BSKN, length_B, *newest_BKN, window)


def obstacle(q_BHN: Tensor) -> str | None:
    """What keeps the kernels from running on such queries, and the remedy; None where they run."""
    if q_BHN.dtype not in DTYPES:
        return f"has no {q_BHN.dtype}: use bf16, fp16 or fp32"
    if q_BHN.shape[2] > MAX_HEAD_DIM:
        return f"has head dimensions up to {MAX_HEAD_DIM}, got {q_BHN.shape[2]}: use more heads"
    if q_BHN.device.type == "cuda":
        # Unlike get_device_capability, a constant to torch.compile.
        if torch.version.hip is not None or torch.cuda.get_device_properties(q_BHN.device).major < 8:
            return "needs an NVIDIA GPU of compute capability 8.0 or more (Ampere)"
        return None
    if not isinstance(_share_kernel, InterpretedFunction):
        return f"needs CUDA, got tensors on {q_BHN.device.type} (or TRITON_INTERPRET=1 from the start, to try it there)"
    return "needs CUDA for bf16: Triton's interpreter has none" if q_BHN.dtype == torch.bfloat16 else None


@torch.library.custom_op("dlcm::decode_attention", mutates_args=())
def _decode_attention(
    q_BHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    length_B: Tensor,
    count_BS: Tensor | None,
    window: int | None = None,
) -> Tensor:
    return _launch(q_BHN, k_BSKN, v_BSKN, length_B, count_BS, None, None, window)


@torch.library.custom_op("dlcm::append_and_attend", mutates_args=("k_BSKN", "v_BSKN"))
def _append_and_attend(
    q_BHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    length_B: Tensor,
    newest_k_BKN: Tensor,
    newest_v_BKN: Tensor,
    window: int | None = None,
) -> Tensor:
    newest_k_BKN, newest_v_BKN = newest_k_BKN.contiguous(), newest_v_BKN.contiguous()
    return _launch(q_BHN, k_BSKN, v_BSKN, length_B, None, newest_k_BKN, newest_v_BKN, window)


def _launch(
    q_BHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    length_B: Tensor,
    count_BS: Tensor | None,
    newest_k_BKN: Tensor | None,
    newest_v_BKN: Tensor | None,
    window: int | None,
) -> Tensor:
    if any(x is not None and x.stride(-1) != 1 for x in (k_BSKN, v_BSKN, count_BS)):
        raise ValueError("decode attention needs keys, values and counts whose last dimension has stride 1")
    batch, heads, head_dim = q_BHN.shape
    capacity, kv_heads = k_BSKN.shape[1:3]
    group = heads // kv_heads
    seen = capacity if window is None else min(window, capacity)
    parts = _parts(batch * kv_heads, seen, _multiprocessors(q_BHN.device))
    block_n = max(16, triton.next_power_of_2(head_dim))
    # Of one part, the output itself.
    part_BHPN = q_BHN.new_empty((batch, heads, parts, head_dim), dtype=q_BHN.dtype if parts == 1 else torch.float32)
    lse_BHP = q_BHN.new_empty((batch, heads, parts), dtype=torch.float32)
    with torch.cuda.device_of(q_BHN):
        _share_kernel[(batch * kv_heads, parts)](
            *(q_BHN.contiguous(), k_BSKN, v_BSKN, part_BHPN, lse_BHP, length_B.contiguous(), count_BS),
            *(newest_k_BKN, newest_v_BKN, window),
            head_dim**-0.5 * LOG2_E,
            kv_heads,
            *k_BSKN.stride()[:3],
            *v_BSKN.stride()[:3],
            0 if count_BS is None else count_BS.stride(0),
            GROUP=group,
            PARTS=parts,
            N=head_dim,
            BLOCK_G=max(16, triton.next_power_of_2(group)),  # a tensor core has 16 rows
            BLOCK_S=_tile_entries(block_n, q_BHN.dtype),
            BLOCK_N=block_n,
            PRECISION="ieee" if q_BHN.dtype == torch.float32 else "tf32",  # of fp32 products; the others have one
            num_warps=8 if q_BHN.dtype == torch.float32 else 4,  # without tensor cores, 4 run out of registers
            num_stages=3 if count_BS is None else 5,  # counts say what to load, so they are loaded ahead of it
        )
        if parts == 1:
            return part_BHPN.squeeze(2)
        out_BHN = q_BHN.new_empty((batch, heads, head_dim))
        _combine_kernel[(batch * heads,)](
            *(part_BHPN, lse_BHP, out_BHN),
            PARTS=parts,
            N=head_dim,
            BLOCK_P=triton.next_power_of_2(parts),
            BLOCK_N=block_n,
            num_warps=4,
        )
    return out_BHN


@_decode_attention.register_fake
@_append_and_attend.register_fake
def _(q_BHN, *_):
    return q_BHN.new_empty(q_BHN.shape)


def _parts(heads: int, entries: int, multiprocessors: int) -> int:
    """How many parts, of `heads` key-value heads of all rows; a power of two, so that few kernels are compiled."""
    to_fill_all = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // max(heads, 1)
    most = max(min(to_fill_all, entries // MIN_PART_ENTRIES, MAX_PARTS), 1)
    return 1 << most.bit_length() - 1


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _tile_entries(block_n: int, dtype: torch.dtype) -> int:
    return min(TILE_BYTES // (block_n * dtype.itemsize), MAX_TILE_ENTRIES)


@triton.jit
def _share_kernel(
    q_BHN, k_BSKN, v_BSKN, part_BHPN, lse_BHP, length_B, count_BS, newest_k_BKN, newest_v_BKN,
    window, scale_log2, kv_heads,
    k_stride_B, k_stride_S, k_stride_K, v_stride_B, v_stride_S, v_stride_K, count_stride_B,
    GROUP: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row_and_head = tl.program_id(0).to(tl.int64)
    row, kv_head = row_and_head // kv_heads, row_and_head % kv_heads
    part = tl.program_id(1)
    g_G, n_N = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N)
    head_G = row_and_head * GROUP + g_G  # among the heads of all rows
    ours_G, real_N = g_G < GROUP, n_N < N

    length = tl.load(length_B + row).to(tl.int32)
    first = 0
    if window is not None:
        first = tl.maximum(length - window, 0)
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_S), PARTS) * BLOCK_S
    begin = first + part * share
    end = tl.minimum(begin + share, length)
    if PARTS > 1 and begin >= end:  # the one part of a row writes its zeros
        tl.store(lse_BHP + head_G * PARTS + part, float("-inf"), mask=ours_G)
        return

    k_row_N = k_BSKN + row * k_stride_B + kv_head * k_stride_K + n_N
    v_row_N = v_BSKN + row * v_stride_B + kv_head * v_stride_K + n_N
    q_GN = tl.load(q_BHN + head_G[:, None] * N + n_N[None, :], mask=ours_G[:, None] & real_N[None, :], other=0.0)
    max_G = tl.full([BLOCK_G], float("-inf"), tl.float32)
    sum_G = tl.zeros([BLOCK_G], tl.float32)
    out_GN = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
    if newest_k_BKN is not None:
        newest = length - 1
        ends = (end == length) & (length > 0)  # this part ends with it; the others do not see it
        at_N = row_and_head * N + n_N
        k_N = tl.load(newest_k_BKN + at_N, mask=real_N, other=0.0)
        v_N = tl.load(newest_v_BKN + at_N, mask=real_N, other=0.0)
        tl.store(k_row_N + newest.to(tl.int64) * k_stride_S, k_N, mask=real_N & ends)
        tl.store(v_row_N + newest.to(tl.int64) * v_stride_S, v_N, mask=real_N & ends)
        score_G = tl.sum(q_GN.to(tl.float32) * k_N.to(tl.float32)[None, :], 1) * scale_log2
        max_G = tl.where(ends, score_G, max_G)
        sum_G = tl.where(ends, 1.0, sum_G)
        out_GN = tl.where(ends, v_N.to(tl.float32)[None, :], out_GN)
        end = tl.where(ends, newest, end)
    for s0 in tl.range(begin, end, BLOCK_S):
        s_S = s0 + tl.arange(0, BLOCK_S)
        seen_S = s_S < end
        bias_S = tl.where(seen_S, 0.0, float("-inf"))
        if count_BS is not None:
            count_S = tl.load(count_BS + row * count_stride_B + s_S, mask=seen_S, other=0)
            seen_S = count_S > 0
            bias_S = tl.where(seen_S, tl.log2(tl.maximum(count_S, 1).to(tl.float32)), float("-inf"))
        mask_SN = seen_S[:, None] & real_N[None, :]
        k_SN = tl.load(k_row_N[None, :] + s_S.to(tl.int64)[:, None] * k_stride_S, mask=mask_SN, other=0.0)
        v_SN = tl.load(v_row_N[None, :] + s_S.to(tl.int64)[:, None] * v_stride_S, mask=mask_SN, other=0.0)
        score_GS = tl.dot(q_GN, k_SN.T, input_precision=PRECISION) * scale_log2 + bias_S[None, :]
        new_max_G = tl.maximum(max_G, tl.max(score_GS, 1))
        reference_G = tl.where(new_max_G == float("-inf"), 0.0, new_max_G)  # all entries so far may count 0 times
        p_GS = tl.exp2(score_GS - reference_G[:, None])
        shrink_G = tl.exp2(max_G - reference_G)
        sum_G = sum_G * shrink_G + tl.sum(p_GS, 1)
        out_GN = tl.dot(p_GS.to(v_SN.dtype), v_SN, out_GN * shrink_G[:, None], input_precision=PRECISION)
        max_G = new_max_G
    sum_G = tl.where(sum_G == 0.0, 1.0, sum_G)
    out_GN = (out_GN / sum_G[:, None]).to(part_BHPN.dtype.element_ty)
    at_G = head_G * PARTS + part
    tl.store(part_BHPN + at_G[:, None] * N + n_N[None, :], out_GN, mask=ours_G[:, None] & real_N[None, :])
    tl.store(lse_BHP + at_G, max_G + tl.log2(sum_G), mask=ours_G)


@triton.jit
def _combine_kernel(
    part_BHPN, lse_BHP, out_BHN,
    PARTS: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # among the heads of all rows
    p_P, n_N = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    lse_P = tl.load(lse_BHP + head * PARTS + p_P, mask=p_P < PARTS, other=float("-inf"))
    written_P = lse_P > float("-inf")  # a part without entries is not
    max_lse = tl.max(lse_P, 0)
    weight_P = tl.exp2(lse_P - tl.where(max_lse == float("-inf"), 0.0, max_lse))
    at_PN = (head * PARTS + p_P[:, None]) * N + n_N[None, :]
    part_PN = tl.load(part_BHPN + at_PN, mask=written_P[:, None] & (n_N < N)[None, :], other=0.0)
    weight = tl.sum(weight_P, 0)
    out_N = tl.sum(part_PN * weight_P[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    tl.store(out_BHN + head * N + n_N, out_N.to(out_BHN.dtype.element_ty), mask=n_N < N)
