"""From concepts back to tokens: causal cross-attention, by concept replication or without (sections 3.5.2 and 4.1).

Token t may see a prefix of its document's slots [null, c_0, c_1, ..], ending at `slot_T[t]`. Replication (Eq. 17)
gives every position the key and value of its newest visible slot and then runs ordinary causal attention of length
T: a slot counts once per position mapped to it, so this equals attention over the slots themselves with a bias of
log n(t, j), n(t, j) being the number of positions i <= t whose newest slot is j. Eq. 14 alone has no such bias.

    ragged      attention over the slots by a fused kernel; bf16, fp16 or fp32 on CUDA (see kernels/ragged_attention.py)
    replicated  Eq. 17 as it stands, on any backend of self-attention; R times the work. The reference
    masked      the definition, document by document, with the whole bias in memory; any device and dtype

`auto` takes ragged where it runs, else replicated, else (under `uniform` weighting, which replication cannot give)
masked. A backend asked for by name that cannot run is an error.
"""

import importlib.util

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dlcm.attention import AttentionBackendError, causal_attention
from dlcm.blocks import HeadNorm, Rope, apply_rope, rope_tables, token_block_shape
from dlcm.config import AttentionBackend, CrossAttentionBackend, DLCMConfig, SlotWeighting
from dlcm.layout import ConceptLayout, SlotGeometry, SlotLayout


def slot_attention(
    q_THN: Tensor,
    k_SKN: Tensor,
    v_SKN: Tensor,
    layout: SlotLayout,
    weighting: SlotWeighting = "replication",
    backend: CrossAttentionBackend = "auto",
    causal_backend: AttentionBackend = "auto",
) -> Tensor:
    """Each token attends to the slots it sees; (T, H, N), scaled by 1 / sqrt(N) before the softmax.

    Args:
        q_THN: queries of the tokens, H heads of dimension N.
        k_SKN, v_SKN: keys and values of the slots; query head h reads key-value head h // (H / K).
        layout: which slots each token sees.
        weighting: `replication` counts a slot once per token mapped to it so far (Eq. 17), `uniform` once (Eq. 14).
        backend: see the module's docstring.
        causal_backend: of self-attention, for `replicated`.

    Raises:
        AttentionBackendError: `backend` cannot run here, or does not have this weighting.
    """
    match resolve_cross_backend(backend, weighting, q_THN):
        case "ragged":
            from dlcm.kernels.ragged_attention import ragged_attention

            return ragged_attention(q_THN, k_SKN, v_SKN, SlotGeometry.from_layout(layout, weighting))
        case "replicated":
            return replicated_attention(q_THN, k_SKN, v_SKN, layout, causal_backend)
        case _:
            return masked_attention(q_THN, k_SKN, v_SKN, layout, weighting)


def resolve_cross_backend(
    backend: CrossAttentionBackend, weighting: SlotWeighting, q_THN: Tensor
) -> CrossAttentionBackend:
    """The backend that will run: `auto` is decided, a named one is checked.

    Raises:
        AttentionBackendError: a named backend cannot run; the message says what it needs.
    """
    if backend == "auto":
        if q_THN.device.type == "cuda" and _ragged_obstacle(q_THN) is None:
            return "ragged"
        return "replicated" if weighting == "replication" else "masked"
    if backend == "ragged" and (problem := _ragged_obstacle(q_THN)):
        raise AttentionBackendError(
            f"cross_attention_backend='ragged' {problem}, or use cross_attention_backend='auto'"
        )
    if backend == "replicated" and weighting == "uniform":
        raise AttentionBackendError(
            "cross_attention_backend='replicated' counts slots as often as they are replicated: for "
            "slot_weighting='uniform' use cross_attention_backend='auto'"
        )
    return backend


def _ragged_obstacle(q_THN: Tensor) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package: pip install triton"
    from dlcm.kernels import ragged_attention

    return ragged_attention.obstacle(q_THN)


def replicated_attention(
    q_THN: Tensor, k_SKN: Tensor, v_SKN: Tensor, layout: SlotLayout, backend: AttentionBackend = "auto"
) -> Tensor:
    """Attention from tokens to slots by replication of keys and values (Eq. 17); (T, H, N).

    Raises:
        AttentionBackendError: `backend` cannot run on this device, dtype or installation.
    """
    k_UKN = k_SKN.index_select(0, layout.context_slot_U)
    v_UKN = v_SKN.index_select(0, layout.context_slot_U)
    return causal_attention(q_THN, k_UKN, v_UKN, layout.tokens, backend, layout.context)


def masked_attention(
    q_THN: Tensor, k_SKN: Tensor, v_SKN: Tensor, layout: SlotLayout, weighting: SlotWeighting
) -> Tensor:
    """Attention over the slots with the bias written out, document by document, in fp32 or wider; (T, H, N)."""
    dtype, wide = q_THN.dtype, torch.promote_types(q_THN.dtype, torch.float32)
    q_THN, k_SKN, v_SKN = q_THN.to(wide), k_SKN.to(wide), v_SKN.to(wide)
    tokens_D, slots_D = (cu_D1.diff().tolist() for cu_D1 in (layout.tokens.cu_seqlens_D1, layout.cu_slots_D1))
    newest_T = layout.slot_T - layout.cu_slots_D1[layout.tokens.document_T]
    past_S = newest_T.new_zeros(layout.num_slots) if layout.past_S is None else layout.past_S
    outputs = []
    for q_tHN, newest_t, k_sKN, v_sKN, past_s in zip(
        q_THN.split(tokens_D),
        newest_T.split(tokens_D),
        *(x_S.split(slots_D) for x_S in (k_SKN, v_SKN, past_S)),
        strict=True,
    ):
        is_newest_ts = F.one_hot(newest_t, len(k_sKN))
        if weighting == "replication":
            bias_ts = (past_s + is_newest_ts.cumsum(0)).to(wide).log()
        else:
            bias_ts = is_newest_ts.flip(1).cumsum(1).flip(1).to(wide).log()  # 0 up to the newest, then -inf
        out_HtN = F.scaled_dot_product_attention(
            q_tHN.transpose(0, 1)[None],
            k_sKN.transpose(0, 1)[None],
            v_sKN.transpose(0, 1)[None],
            attn_mask=bias_ts,
            enable_gqa=q_THN.shape[1] != k_SKN.shape[1],
        )[0]
        outputs.append(out_HtN.transpose(0, 1))
    return torch.cat(outputs).to(dtype)


class CrossAttention(nn.Module):
    """H + CrossAttend(H, Z) (Eq. 12-14), with RMSNorm on queries and keys (Eq. 16).

    Slot 0 of every document is a learned "no concept yet" vector: the first tokens attend to it. Under
    `inclusive` visibility the first token already closes a concept, and replication leaves slot 0 unread. Where a model
    has several cross-attentions, each has its own: what "no concept yet" says to one says nothing to another.

    With `clean_start`, a gate for each channel, zero at the start, stands before the residual connection.
    """

    def __init__(self, config: DLCMConfig):
        super().__init__()
        shape = token_block_shape(config)
        self.head_dim = shape.head_dim
        self.rope_theta = config.rope_theta if config.cross_attention_rope else None
        self.weighting = config.slot_weighting
        self.backend = config.cross_attention_backend
        self.causal_backend = config.attention_backend
        self.token_norm = nn.RMSNorm(config.d_token, config.rms_norm_eps)
        self.null_slot = nn.Parameter(torch.empty(config.d_concept))
        self.q_proj = nn.Linear(config.d_token, config.d_token, bias=False)
        self.k_proj = nn.Linear(config.d_concept, shape.kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_concept, shape.kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_token, config.d_token, bias=False)
        self.q_norm = HeadNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = HeadNorm(self.head_dim, config.rms_norm_eps)
        self.gate = nn.Parameter(torch.zeros(config.d_token)) if config.clean_start else None

    def forward(self, h_TE: Tensor, z_MC: Tensor, layout: ConceptLayout) -> Tensor:
        slots_SC = self.slots(z_MC, layout)
        q_THN = self.queries(h_TE, self.rope(layout.tokens.position_T))
        k_SKN, v_SKN = self.keys_and_values(slots_SC, self.rope(layout.slot_position_S))
        return self.after_attention(h_TE, self.attend(q_THN, k_SKN, v_SKN, layout))

    def slots(self, z_MC: Tensor, layout: ConceptLayout) -> Tensor:
        """[null, c_0, c_1, ..] of every document, (S, C)."""
        empty_SC = z_MC.new_zeros(layout.num_slots, z_MC.shape[1])
        null_DC = self.null_slot.to(z_MC.dtype).expand(layout.tokens.num_documents, -1)
        return empty_SC.index_copy(0, layout.slot_M, z_MC).index_copy(0, layout.cu_slots_D1[:-1].long(), null_DC)

    def rope(self, position: Tensor) -> Rope | None:
        return None if self.rope_theta is None else rope_tables(position, self.head_dim, self.rope_theta)

    def queries(self, h_TE: Tensor, rope: Rope | None) -> Tensor:
        """Normed and, if so configured, turned by the position of the token; (T, H, N) in the dtype of products."""
        q_THN = rearrange(self.q_proj(self.token_norm(h_TE)), "T (H N) -> T H N", N=self.head_dim)
        normed_THN = self.q_norm(q_THN)
        return (normed_THN if rope is None else apply_rope(normed_THN, rope)).to(q_THN.dtype)

    def keys_and_values(self, slots_SC: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
        """Keys, normed and turned by the position of the slot's last token, and values; (S, K, N)."""
        k_SKN = rearrange(self.k_proj(slots_SC), "S (K N) -> S K N", N=self.head_dim)
        v_SKN = rearrange(self.v_proj(slots_SC), "S (K N) -> S K N", N=self.head_dim)
        normed_SKN = self.k_norm(k_SKN)
        return (normed_SKN if rope is None else apply_rope(normed_SKN, rope)).to(k_SKN.dtype), v_SKN

    def attend(self, q_THN: Tensor, k_SKN: Tensor, v_SKN: Tensor, layout: SlotLayout) -> Tensor:
        return slot_attention(q_THN, k_SKN, v_SKN, layout, self.weighting, self.backend, self.causal_backend)

    def after_attention(self, h_TE: Tensor, read_THN: Tensor) -> Tensor:
        read_TE = self.o_proj(rearrange(read_THN, "T H N -> T (H N)"))
        return h_TE + (read_TE if self.gate is None else self.gate * read_TE)
