"""From concepts back to tokens: causal cross-attention by concept replication (sections 3.5.2 and 4.1).

Token t may see a prefix of its document's slots [null, c_0, c_1, ..], ending at `slot_T[t]`. Replication (Eq. 17)
gives every position the key and value of its newest visible slot and then runs ordinary causal attention of length
T: a slot counts once per position mapped to it, so this equals attention over the slots themselves with a bias of
log n(t, j), n(t, j) being the number of positions i <= t whose newest slot is j. `replicated_attention` is the
reference of anything faster; the tests hold it against the explicit masked softmax.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from dlcm.attention import causal_attention
from dlcm.blocks import HeadNorm, apply_rope, rope_tables, token_block_shape
from dlcm.config import AttentionBackend, DLCMConfig
from dlcm.layout import ConceptLayout


def replicated_attention(
    q_THN: Tensor, k_SKN: Tensor, v_SKN: Tensor, layout: ConceptLayout, backend: AttentionBackend = "auto"
) -> Tensor:
    """Attention from tokens to slots by replication of keys and values (Eq. 17); (T, H, N).

    Raises:
        AttentionBackendError: `backend` cannot run on this device, dtype or installation.
    """
    k_TKN = k_SKN.index_select(0, layout.slot_T)
    v_TKN = v_SKN.index_select(0, layout.slot_T)
    return causal_attention(q_THN, k_TKN, v_TKN, layout.tokens, backend)


class CrossAttention(nn.Module):
    """H + CrossAttend(H, Z) (Eq. 12-14), with RMSNorm on queries and keys (Eq. 16).

    Slot 0 of every document is a learned "no concept yet" vector: the first tokens attend to it. Under
    `inclusive` visibility the first token already closes a concept, and replication leaves slot 0 unread.
    """

    def __init__(self, config: DLCMConfig):
        super().__init__()
        shape = token_block_shape(config)
        self.head_dim = shape.head_dim
        self.rope_theta = config.rope_theta if config.cross_attention_rope else None
        self.backend = config.attention_backend
        self.token_norm = nn.RMSNorm(config.d_token, config.rms_norm_eps)
        self.null_slot = nn.Parameter(torch.empty(config.d_concept))
        self.q_proj = nn.Linear(config.d_token, config.d_token, bias=False)
        self.k_proj = nn.Linear(config.d_concept, shape.kv_width, bias=False)
        self.v_proj = nn.Linear(config.d_concept, shape.kv_width, bias=False)
        self.o_proj = nn.Linear(config.d_token, config.d_token, bias=False)
        self.q_norm = HeadNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = HeadNorm(self.head_dim, config.rms_norm_eps)

    def slots(self, z_MC: Tensor, layout: ConceptLayout) -> Tensor:
        """[null, c_0, c_1, ..] of every document, (S, C)."""
        empty_SC = z_MC.new_zeros(layout.num_slots, z_MC.shape[1])
        null_DC = self.null_slot.to(z_MC.dtype).expand(layout.tokens.num_documents, -1)
        return empty_SC.index_copy(0, layout.slot_M, z_MC).index_copy(0, layout.cu_slots_D1[:-1].long(), null_DC)

    def forward(self, h_TE: Tensor, z_MC: Tensor, layout: ConceptLayout) -> Tensor:
        slots_SC = self.slots(z_MC, layout)
        q_THN = self.q_norm(rearrange(self.q_proj(self.token_norm(h_TE)), "T (H N) -> T H N", N=self.head_dim))
        k_SKN = self.k_norm(rearrange(self.k_proj(slots_SC), "S (K N) -> S K N", N=self.head_dim))
        v_SKN = rearrange(self.v_proj(slots_SC), "S (K N) -> S K N", N=self.head_dim)
        if self.rope_theta is not None:
            q_THN = apply_rope(q_THN, rope_tables(layout.tokens.position_T, self.head_dim, self.rope_theta))
            k_SKN = apply_rope(k_SKN, rope_tables(layout.slot_position_S, self.head_dim, self.rope_theta))
        q_THN, k_SKN = q_THN.to(v_SKN.dtype), k_SKN.to(v_SKN.dtype)
        read_THN = replicated_attention(q_THN, k_SKN, v_SKN, layout, self.backend)
        return h_TE + self.o_proj(rearrange(read_THN, "T H N -> T (H N)"))
