"""Attention from T tokens straight to S concept slots: concept replication (section 4.1, Eq. 17) without replicating.

Causal attention over keys replicated to token length counts slot j once for each position mapped to it so far. So it
is attention over the slots themselves with the bias

    log n(t, j),   n(t, j) = min(t + 1, start[j + 1]) - start[j],

start[j] being the first position whose newest slot is j or a later one: R times less work, no mask, no replicated
tensors. Per score, this is one addition. Each row stops at its own newest slot; only where that happens, and for tokens
of several documents in one tile, is there a look at single entries.

Inputs must be finite: a tile of several documents multiplies by zero what a row does not see, and 0 times inf is NaN.

    forward   one program for BLOCK_T tokens and a head, over the slots they see
    backward  the same for dQ (and for delta, the row sums of dO * O); one program for BLOCK_S slots and a head for
              dK and dV, over the tokens that see them. No atomics: gradients are the same every time.

Scores are in base 2 throughout: exp2 and log2 are what the hardware has. Legend: T tokens, S slots, H / K query /
key-value heads, N head dimension; in kernels, Tb and Sb are the rows and columns of a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dlcm.layout import SlotGeometry

HEAD_DIMS = (16, 32, 64, 128)  # others are padded with zeros to the next
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2_E = 1.4426950408889634


def ragged_attention(q_THN: Tensor, k_SKN: Tensor, v_SKN: Tensor, geometry: SlotGeometry) -> Tensor:
    """Each token attends to the slots it sees, (T, H, N); scores are scaled by 1 / sqrt(N).

    Args:
        q_THN: queries; bf16, fp16 or fp32, on CUDA (or on the CPU under Triton's interpreter).
        k_SKN, v_SKN: keys and values of the slots; query head h reads head h // (H / K).
        geometry: what each token sees.

    Raises:
        ValueError: the kernels do not run on these tensors; says what they need.
    """
    if problem := obstacle(q_THN):
        raise ValueError(f"ragged attention {problem}")
    head_dim = q_THN.shape[2]
    padding = next(known for known in HEAD_DIMS if known >= head_dim) - head_dim
    if padding:
        q_THN, k_SKN, v_SKN = (F.pad(x, (0, padding)) for x in (q_THN, k_SKN, v_SKN))
    out_THN, _ = _ragged_attention(
        q_THN,
        k_SKN,
        v_SKN,
        geometry.oldest_T,
        geometry.newest_T,
        geometry.log2_newest_T,
        geometry.log2_count_S,
        geometry.start_S1,
        geometry.end_S,
        head_dim**-0.5,
    )
    return out_THN[..., :head_dim] if padding else out_THN


def obstacle(q_THN: Tensor) -> str | None:
    """What keeps the kernels from running on such queries, and the remedy; None where they run."""
    if q_THN.dtype not in DTYPES:
        return f"has no {q_THN.dtype}: use bf16, fp16 or fp32"
    if q_THN.shape[2] > HEAD_DIMS[-1]:
        return f"has head dimensions up to {HEAD_DIMS[-1]}, got {q_THN.shape[2]}: use more heads"
    if q_THN.device.type == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(q_THN.device) < (9, 0):
            return "needs an NVIDIA GPU of compute capability 9.0 or more (Hopper), for which its tiles were made"
        return None
    if not isinstance(_forward_kernel, InterpretedFunction):
        return f"needs CUDA, got tensors on {q_THN.device.type} (or TRITON_INTERPRET=1 from the start, to try it there)"
    return "needs CUDA for bf16: Triton's interpreter has none" if q_THN.dtype == torch.bfloat16 else None


@torch.library.custom_op("dlcm::ragged_attention", mutates_args=())
def _ragged_attention(
    q_THN: Tensor,
    k_SKN: Tensor,
    v_SKN: Tensor,
    oldest_T: Tensor,
    newest_T: Tensor,
    log2_newest_T: Tensor,
    log2_count_S: Tensor,
    start_S1: Tensor,
    end_S: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q_THN, k_SKN, v_SKN = (_dense(x) for x in (q_THN, k_SKN, v_SKN))
    tokens, heads, head_dim = q_THN.shape
    out_THN = torch.empty_like(q_THN)
    lse_HT = q_THN.new_empty((heads, tokens), dtype=torch.float32)
    tile = FORWARD_TILES[_precision(q_THN)][head_dim]
    with torch.cuda.device_of(q_THN):
        _forward_kernel[(heads, triton.cdiv(tokens, tile.block_t))](
            _by_head(q_THN, tile.block_t),
            _by_head(k_SKN, tile.block_s),
            _by_head(v_SKN, tile.block_s),
            _by_head(out_THN, tile.block_t),
            lse_HT,
            oldest_T,
            newest_T,
            log2_newest_T,
            log2_count_S,
            scale * LOG2_E,
            tokens,
            k_SKN.shape[0],
            GROUP=heads // k_SKN.shape[1],
            **tile.arguments(head_dim, q_THN.dtype),
        )
    return out_THN, lse_HT


@_ragged_attention.register_fake
def _(q_THN, k_SKN, v_SKN, *rest):
    tokens, heads, head_dim = q_THN.shape
    return q_THN.new_empty((tokens, heads, head_dim)), q_THN.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("dlcm::ragged_attention_backward", mutates_args=())
def _ragged_attention_backward(
    dout_THN: Tensor,
    q_THN: Tensor,
    k_SKN: Tensor,
    v_SKN: Tensor,
    out_THN: Tensor,
    lse_HT: Tensor,
    oldest_T: Tensor,
    newest_T: Tensor,
    log2_newest_T: Tensor,
    log2_count_S: Tensor,
    start_S1: Tensor,
    end_S: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dout_THN, q_THN, k_SKN, v_SKN, out_THN = (_dense(x) for x in (dout_THN, q_THN, k_SKN, v_SKN, out_THN))
    tokens, heads, head_dim = q_THN.shape
    slots, kv_heads, _ = k_SKN.shape
    group = heads // kv_heads
    dq_THN = torch.empty_like(q_THN)
    delta_HT = torch.empty_like(lse_HT)
    # Every query head writes its own; heads of a group are added up afterwards, in fp32.
    shape, dtype = (slots, heads, head_dim), k_SKN.dtype if group == 1 else torch.float32
    dk_SHN, dv_SHN = k_SKN.new_empty(shape, dtype=dtype), v_SKN.new_empty(shape, dtype=dtype)

    seen = (oldest_T, newest_T, log2_newest_T, log2_count_S)
    sizes = (scale, scale * LOG2_E, tokens, slots)
    with torch.cuda.device_of(q_THN):
        tile = QUERY_TILES[_precision(q_THN)][head_dim]
        _query_gradient_kernel[(heads, triton.cdiv(tokens, tile.block_t))](
            _by_head(q_THN, tile.block_t),
            _by_head(k_SKN, tile.block_s),
            _by_head(v_SKN, tile.block_s),
            _by_head(out_THN, tile.block_t),
            _by_head(dout_THN, tile.block_t),
            _by_head(dq_THN, tile.block_t),
            *(lse_HT, delta_HT, *seen, *sizes),
            GROUP=group,
            **tile.arguments(head_dim, q_THN.dtype),
        )
        tile = KEY_VALUE_TILES[_precision(q_THN)][head_dim]
        _key_value_gradient_kernel[(heads, triton.cdiv(slots, tile.block_s))](
            _by_head(q_THN, tile.block_t),
            _by_head(k_SKN, tile.block_s),
            _by_head(v_SKN, tile.block_s),
            _by_head(dout_THN, tile.block_t),
            _by_head(dk_SHN, tile.block_s),
            _by_head(dv_SHN, tile.block_s),
            *(lse_HT, delta_HT, *seen, start_S1, end_S, *sizes),
            GROUP=group,
            **tile.arguments(head_dim, q_THN.dtype),
        )
    if group > 1:
        dk_SHN, dv_SHN = (x.unflatten(1, (kv_heads, group)).sum(2).to(k_SKN.dtype) for x in (dk_SHN, dv_SHN))
    return dq_THN, dk_SHN, dv_SHN


@_ragged_attention_backward.register_fake
def _(dout_THN, q_THN, k_SKN, v_SKN, *rest):
    return tuple(x.new_empty(x.shape) for x in (q_THN, k_SKN, v_SKN))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout_THN, _):
    q_THN, k_SKN, v_SKN, *geometry, out_THN, lse_HT = ctx.saved_tensors
    gradients = _ragged_attention_backward(dout_THN, q_THN, k_SKN, v_SKN, out_THN, lse_HT, *geometry, ctx.scale)
    return (*gradients, *[None] * (len(geometry) + 1))


_ragged_attention.register_autograd(_backward, setup_context=_save_for_backward)


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is cut up and pipelined."""

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # a thread; None leaves it to the compiler

    def arguments(self, head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "N": head_dim,
            "BLOCK_T": self.block_t,
            "BLOCK_S": self.block_s,
            "PRECISION": "ieee" if dtype == torch.float32 else "tf32",  # of fp32 products; the others have one
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


# By head dimension. Half precision: the fastest of some 90 on one H100, at 16,384 and 2,048 tokens. Full precision does
# without tensor cores.
FULL = {head_dim: Tile(32, 32, 4, 1) for head_dim in HEAD_DIMS}
FORWARD_TILES = {
    "half": dict.fromkeys((16, 32, 64), Tile(64, 128, 4, 3)) | {128: Tile(128, 64, 8, 2, 128)},
    "full": FULL,
}
QUERY_TILES = {
    "half": dict.fromkeys((16, 32, 64), Tile(64, 64, 4, 2, 128)) | {128: Tile(128, 32, 4, 3)},
    "full": FULL,
}
KEY_VALUE_TILES = {
    "half": dict.fromkeys((16, 32, 64), Tile(128, 64, 4, 2)) | {128: Tile(64, 64, 4, 2)},
    "full": FULL,
}


def _precision(x: Tensor) -> str:
    return "full" if x.dtype == torch.float32 else "half"


def _dense(x_XHN: Tensor) -> Tensor:
    """As the copy engine reads it: contiguous, from an address that is a multiple of 16 bytes."""
    x_XHN = x_XHN.contiguous()
    return x_XHN if x_XHN.data_ptr() % 16 == 0 else x_XHN.clone()


def _by_head(x_XHN: Tensor, block: int) -> TensorDescriptor:
    """One head's block of rows at a time, by the copy engine: rows past the end read as zeros and are not written."""
    rows, heads, head_dim = x_XHN.shape
    return TensorDescriptor(x_XHN, [rows, heads * head_dim], [heads * head_dim, 1], [block, head_dim])


@triton.jit
def _bias(s, oldest, newest, log2_newest, log2_count):
    """log2 n(t, j) where token t sees slot j, else -inf; of columns and rows that broadcast to (Tb, Sb) or (Sb, Tb)."""
    return tl.where((s >= oldest) & (s <= newest), tl.where(s == newest, log2_newest, log2_count), float("-inf"))


@triton.jit
def _slot_range(t0, oldest_T, newest_T, tokens, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Slots that a block of tokens sees. Those of [begin, split) are older than the newest of any: no mask there."""
    last = tl.minimum(t0 + BLOCK_T, tokens) - 1
    begin = tl.load(oldest_T + t0)
    end = tl.load(newest_T + last) + 1
    older = tl.where(tl.load(oldest_T + last) == begin, tl.load(newest_T + t0) - begin, 0)
    return begin, begin + older // BLOCK_S * BLOCK_S, end


@triton.jit
def _attend(
    max_T, sum_T, out_TN, q_TN, k_desc, v_desc, kv_column, begin, end,
    oldest_T, newest_T, log2_newest_T, log2_count_S, scale_log2, slots,
    MASKED: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the slots [begin, end)."""
    for s0 in tl.range(begin, end, BLOCK_S):
        s_S = s0 + tl.arange(0, BLOCK_S)
        bias_TS = tl.load(log2_count_S + (tl.minimum(s_S, slots - 1) if MASKED else s_S))[None, :]
        if MASKED:
            bias_TS = _bias(s_S[None, :], oldest_T[:, None], newest_T[:, None], log2_newest_T[:, None], bias_TS)
        k_SN = k_desc.load([s0, kv_column])
        score_TS = tl.dot(q_TN, k_SN.T, input_precision=PRECISION) * scale_log2 + bias_TS
        new_max_T = tl.maximum(max_T, tl.max(score_TS, 1))
        reference_T = new_max_T
        if MASKED:  # a row of another document than the slots' may have seen nothing yet
            reference_T = tl.where(new_max_T == float("-inf"), 0.0, new_max_T)
        p_TS = tl.exp2(score_TS - reference_T[:, None])
        shrink_T = tl.exp2(max_T - reference_T)
        sum_T = sum_T * shrink_T + tl.sum(p_TS, 1)
        v_SN = v_desc.load([s0, kv_column])
        out_TN = tl.dot(p_TS.to(v_SN.dtype), v_SN, out_TN * shrink_T[:, None], input_precision=PRECISION)
        max_T = new_max_T
    return max_T, sum_T, out_TN


@triton.jit(do_not_specialize=["tokens", "slots"])
def _forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_HT, oldest_T, newest_T, log2_newest_T, log2_count_S, scale_log2,
    tokens, slots, GROUP: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T  # late tokens see most: they go first
    column, kv_column = head * N, head // GROUP * N
    t_T = t0 + tl.arange(0, BLOCK_T)
    begin, split, end = _slot_range(t0, oldest_T, newest_T, tokens, BLOCK_T, BLOCK_S)

    q_TN = q_desc.load([t0, column])
    max_T = tl.full([BLOCK_T], float("-inf"), tl.float32)
    sum_T = tl.zeros([BLOCK_T], tl.float32)
    out_TN = tl.zeros([BLOCK_T, N], tl.float32)
    max_T, sum_T, out_TN = _attend(
        max_T, sum_T, out_TN, q_TN, k_desc, v_desc, kv_column, begin, split,
        None, None, None, log2_count_S, scale_log2, slots, False, BLOCK_S, PRECISION,
    )  # fmt: skip
    row_T = tl.minimum(t_T, tokens - 1)
    max_T, sum_T, out_TN = _attend(
        max_T, sum_T, out_TN, q_TN, k_desc, v_desc, kv_column, split, end,
        tl.load(oldest_T + row_T), tl.load(newest_T + row_T), tl.load(log2_newest_T + row_T),
        log2_count_S, scale_log2, slots, True, BLOCK_S, PRECISION,
    )  # fmt: skip
    out_desc.store([t0, column], (out_TN / sum_T[:, None]).to(out_desc.dtype))
    tl.store(lse_HT + head * tokens + t_T, max_T + tl.log2(sum_T), mask=t_T < tokens)


@triton.jit
def _add_query_gradient(
    dq_TN, q_TN, dout_TN, lse_T, delta_T, k_desc, v_desc, kv_column, begin, end,
    oldest_T, newest_T, log2_newest_T, log2_count_S, scale_log2, slots,
    MASKED: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ from the slots [begin, end)."""
    for s0 in tl.range(begin, end, BLOCK_S):
        s_S = s0 + tl.arange(0, BLOCK_S)
        bias_TS = tl.load(log2_count_S + (tl.minimum(s_S, slots - 1) if MASKED else s_S))[None, :]
        if MASKED:
            bias_TS = _bias(s_S[None, :], oldest_T[:, None], newest_T[:, None], log2_newest_T[:, None], bias_TS)
        k_SN = k_desc.load([s0, kv_column])
        v_SN = v_desc.load([s0, kv_column])
        score_TS = tl.dot(q_TN, k_SN.T, input_precision=PRECISION) * scale_log2 + bias_TS
        p_TS = tl.exp2(score_TS - lse_T[:, None])
        dp_TS = tl.dot(dout_TN, v_SN.T, input_precision=PRECISION)
        dscore_TS = (p_TS * (dp_TS - delta_T[:, None])).to(k_SN.dtype)
        dq_TN = tl.dot(dscore_TS, k_SN, dq_TN, input_precision=PRECISION)
    return dq_TN


@triton.jit(do_not_specialize=["tokens", "slots"])
def _query_gradient_kernel(
    q_desc, k_desc, v_desc, out_desc, dout_desc, dq_desc, lse_HT, delta_HT, oldest_T, newest_T, log2_newest_T,
    log2_count_S, scale, scale_log2, tokens, slots,
    GROUP: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    t0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    column, kv_column = head * N, head // GROUP * N
    t_T = t0 + tl.arange(0, BLOCK_T)
    row_T = tl.minimum(t_T, tokens - 1)
    begin, split, end = _slot_range(t0, oldest_T, newest_T, tokens, BLOCK_T, BLOCK_S)

    q_TN = q_desc.load([t0, column])
    dout_TN = dout_desc.load([t0, column])
    lse_T = tl.load(lse_HT + head * tokens + row_T)
    delta_T = tl.sum(out_desc.load([t0, column]).to(tl.float32) * dout_TN.to(tl.float32), 1)
    tl.store(delta_HT + head * tokens + t_T, delta_T, mask=t_T < tokens)

    dq_TN = tl.zeros([BLOCK_T, N], tl.float32)
    dq_TN = _add_query_gradient(
        dq_TN, q_TN, dout_TN, lse_T, delta_T, k_desc, v_desc, kv_column, begin, split,
        None, None, None, log2_count_S, scale_log2, slots, False, BLOCK_S, PRECISION,
    )  # fmt: skip
    dq_TN = _add_query_gradient(
        dq_TN, q_TN, dout_TN, lse_T, delta_T, k_desc, v_desc, kv_column, split, end,
        tl.load(oldest_T + row_T), tl.load(newest_T + row_T), tl.load(log2_newest_T + row_T),
        log2_count_S, scale_log2, slots, True, BLOCK_S, PRECISION,
    )  # fmt: skip
    dq_desc.store([t0, column], (dq_TN * scale).to(dq_desc.dtype))


@triton.jit
def _add_key_value_gradient(
    dk_SN, dv_SN, k_SN, v_SN, q_desc, dout_desc, lse_T, delta_T, column, begin, end, s_S,
    oldest_T, newest_T, log2_newest_T, log2_count_S, scale_log2,
    MASKED: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV from the tokens [begin, end). With (Sb, Tb) tiles, two of four products read what is in registers."""
    for t0 in tl.range(begin, end, BLOCK_T):
        t_T = t0 + tl.arange(0, BLOCK_T)
        inside_T = t_T < end
        bias_ST = log2_count_S[:, None]
        if MASKED:
            oldest = tl.load(oldest_T + t_T, mask=inside_T, other=0)[None, :]
            newest = tl.load(newest_T + t_T, mask=inside_T, other=0)[None, :]
            log2_newest = tl.load(log2_newest_T + t_T, mask=inside_T, other=0.0)[None, :]
            bias_ST = _bias(s_S[:, None], oldest, newest, log2_newest, bias_ST)
        q_TN = q_desc.load([t0, column])
        dout_TN = dout_desc.load([t0, column])
        score_ST = tl.dot(k_SN, q_TN.T, input_precision=PRECISION) * scale_log2 + bias_ST
        p_ST = tl.exp2(score_ST - tl.load(lse_T + t_T, mask=inside_T, other=float("inf"))[None, :])
        dv_SN = tl.dot(p_ST.to(dout_TN.dtype), dout_TN, dv_SN, input_precision=PRECISION)
        dp_ST = tl.dot(v_SN, dout_TN.T, input_precision=PRECISION)
        dscore_ST = p_ST * (dp_ST - tl.load(delta_T + t_T, mask=inside_T, other=0.0)[None, :])
        dk_SN = tl.dot(dscore_ST.to(q_TN.dtype), q_TN, dk_SN, input_precision=PRECISION)
    return dk_SN, dv_SN


@triton.jit(do_not_specialize=["tokens", "slots"])
def _key_value_gradient_kernel(
    q_desc, k_desc, v_desc, dout_desc, dk_desc, dv_desc, lse_HT, delta_HT, oldest_T, newest_T, log2_newest_T,
    log2_count_S, start_S1, end_S, scale, scale_log2, tokens, slots,
    GROUP: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    s0 = tl.program_id(1) * BLOCK_S  # early slots are seen most: they go first
    column, kv_column = head * N, head // GROUP * N
    s_S = s0 + tl.arange(0, BLOCK_S)
    last = tl.minimum(s0 + BLOCK_S, slots) - 1
    begin = tl.load(start_S1 + s0)
    end = tl.load(end_S + last)
    # From the slot after the block on, its slots are nobody's newest: no mask, unless they belong to several documents.
    newer = tl.minimum(tl.maximum(tl.load(start_S1 + last + 1), begin), end)
    split = tl.minimum(begin + tl.cdiv(newer - begin, BLOCK_T) * BLOCK_T, end)
    split = tl.where(tl.load(end_S + s0) == end, split, end)

    k_SN = k_desc.load([s0, kv_column])
    v_SN = v_desc.load([s0, kv_column])
    log2_count_rows_S = tl.load(log2_count_S + tl.minimum(s_S, slots - 1))  # rows past the end are not written
    dk_SN = tl.zeros([BLOCK_S, N], tl.float32)
    dv_SN = tl.zeros([BLOCK_S, N], tl.float32)
    lse_T, delta_T = lse_HT + head * tokens, delta_HT + head * tokens
    dk_SN, dv_SN = _add_key_value_gradient(
        dk_SN, dv_SN, k_SN, v_SN, q_desc, dout_desc, lse_T, delta_T, column, begin, split, s_S,
        oldest_T, newest_T, log2_newest_T, log2_count_rows_S, scale_log2, True, BLOCK_T, PRECISION,
    )  # fmt: skip
    dk_SN, dv_SN = _add_key_value_gradient(
        dk_SN, dv_SN, k_SN, v_SN, q_desc, dout_desc, lse_T, delta_T, column, split, end, s_S,
        None, None, None, log2_count_rows_S, scale_log2, False, BLOCK_T, PRECISION,
    )  # fmt: skip
    dk_desc.store([s0, column], (dk_SN * scale).to(dk_desc.dtype))
    dv_desc.store([s0, column], dv_SN.to(dv_desc.dtype))
