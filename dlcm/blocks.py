"""The Transformer blocks of every stage: pre-norm self-attention with RoPE and SwiGLU, as in LLaMA.

Encoder and decoder run them at token width (sections 3.2 and 3.5), the backbone at concept width (section 3.4),
the baseline uses nothing else. T stands for whatever is packed: tokens or concepts. W is the width, F the SwiGLU
width, H / K the query / key-value heads, N the head dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dlcm.attention import causal_attention
from dlcm.config import AttentionBackend, DLCMConfig, TokenBlocksConfig
from dlcm.layout import PackedLayout


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One stage's Transformer blocks."""

    width: int
    heads: int
    kv_heads: int | None  # None: as many as heads
    ffn: int
    config: TokenBlocksConfig  # what all stages share

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return (self.kv_heads or self.heads) * self.head_dim


def token_block_shape(config: TokenBlocksConfig) -> BlockShape:
    """Encoder, decoder and baseline."""
    return BlockShape(config.d_token, config.token_heads, config.token_kv_heads, config.token_ffn, config)


def concept_block_shape(config: DLCMConfig) -> BlockShape:
    """The backbone (section 3.4)."""
    return BlockShape(config.d_concept, config.concept_heads, config.concept_kv_heads, config.concept_ffn, config)


Rope = tuple[Tensor, Tensor]  # cos and sin, each (T, 1, N)


def rope_tables(position_T: Tensor, head_dim: int, theta: float) -> Rope:
    """Cosines and sines of the rotary embedding at the given positions (fp32)."""
    exponent = torch.arange(0, head_dim, 2, device=position_T.device, dtype=torch.float32) / head_dim
    angle_TN = torch.outer(position_T.float(), theta**-exponent).repeat(1, 2)
    return angle_TN.cos()[:, None], angle_TN.sin()[:, None]


def apply_rope(x_THN: Tensor, rope: Rope) -> Tensor:
    """Rotates the pairs (i, i + N/2) of each head, in fp32 or wider; keeps the dtype."""
    cos_T1N, sin_T1N = rope
    first, second = x_THN.chunk(2, dim=-1)
    rotated = x_THN * cos_T1N + torch.cat([-second, first], -1) * sin_T1N
    return rotated.to(x_THN.dtype)


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the head dimension in the gain's dtype: under autocast, heads arrive in bf16, gains are fp32."""

    def forward(self, x_THN: Tensor) -> Tensor:
        return super().forward(x_THN.to(self.weight.dtype))


class SelfAttention(nn.Module):
    """Grouped-query causal self-attention over packed documents, in the parts before and after positions mix."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, shape.kv_width, bias=False)
        self.v_proj = nn.Linear(shape.width, shape.kv_width, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.q_norm = HeadNorm(shape.head_dim, shape.config.rms_norm_eps) if shape.config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(shape.head_dim, shape.config.rms_norm_eps) if shape.config.qk_norm else nn.Identity()

    def heads(self, x_TW: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, N), keys and values (T, K, N)."""
        q_THN, k_TKN, v_TKN = (
            project(x_TW).unflatten(1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_THN = apply_rope(self.q_norm(q_THN), rope).to(v_TKN.dtype)
        k_TKN = apply_rope(self.k_norm(k_TKN), rope).to(v_TKN.dtype)
        return q_THN, k_TKN, v_TKN

    def merge(self, mixed_THN: Tensor) -> Tensor:
        return self.o_proj(mixed_THN.flatten(1))


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), (T, W) to (T, W)."""

    def __init__(self, shape: BlockShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.ffn, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.ffn, bias=False)
        self.down_proj = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x_TW: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TW)) * self.up_proj(x_TW))


class LayerPast(Protocol):
    """What a block remembers of earlier positions (see `dlcm.cache`)."""

    def attend(
        self, q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, backend: AttentionBackend, window: int | None
    ) -> Tensor:
        """Remembers keys and values, and attends to them and what is before, to `window` in all; (T, H, N)."""
        ...


class Block(nn.Module):
    """Pre-norm attention and SwiGLU around a residual stream (T, W).

    Attention over documents, whose number and lengths change every step, stands between two functions of shapes that
    do not: these are what `dlcm.compilation` compiles.

    Attributes:
        window: how many positions each sees, itself included; None: all before it.
        attends, feeds: whether attention and SwiGLU are run; where self-compression left nothing of them, they are not.
    """

    attends: bool = True
    feeds: bool = True

    def __init__(self, shape: BlockShape, window: int | None):
        super().__init__()
        self.backend, self.window = shape.config.attention_backend, window
        self.attention_norm = nn.RMSNorm(shape.width, shape.config.rms_norm_eps)
        self.attention = SelfAttention(shape)
        self.ffn_norm = nn.RMSNorm(shape.width, shape.config.rms_norm_eps)
        self.ffn = SwiGLU(shape)

    def forward(self, x_TW: Tensor, rope: Rope, layout: PackedLayout, past: LayerPast | None = None) -> Tensor:
        if not self.attends:
            return self.after_attention(x_TW, None)
        q_THN, k_TKN, v_TKN = self.before_attention(x_TW, rope)
        if past is None:
            mixed_THN = causal_attention(q_THN, k_TKN, v_TKN, layout, self.backend, window=self.window)
        else:
            mixed_THN = past.attend(q_THN, k_TKN, v_TKN, self.backend, self.window)
        return self.after_attention(x_TW, mixed_THN)

    def before_attention(self, x_TW: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.heads(self.attention_norm(x_TW), rope)

    def after_attention(self, x_TW: Tensor, mixed_THN: Tensor | None) -> Tensor:
        if mixed_THN is not None:
            x_TW = x_TW + self.attention.merge(mixed_THN)
        return x_TW + self.ffn(self.ffn_norm(x_TW)) if self.feeds else x_TW


def recompute_blocks_(model: nn.Module, recompute: bool) -> None:
    """Sets activation checkpointing of every stack in a model."""
    for module in model.modules():
        if isinstance(module, TransformerStack):
            module.recompute = recompute


class TransformerStack(nn.Module):
    """Blocks over packed documents, causal, one for each window; the residual stream goes in and comes out un-normed.

    Attributes:
        recompute: whether the backward pass runs each block once more, so that the forward pass need not keep what is
            inside, only the residual stream between blocks.
    """

    recompute: bool = False

    def __init__(self, shape: BlockShape, windows: Sequence[int | None]):
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(Block(shape, window) for window in windows)

    def forward(
        self,
        x_TW: Tensor,
        layout: PackedLayout,
        past: Sequence[LayerPast] | None = None,
        enter: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(T, W) to (T, W).

        Args:
            x_TW: the residual stream.
            layout: the documents; with a past, it goes on from there.
            past: of each layer.
            enter: makes of a layer's number and the residual stream before it what that layer gets.
        """
        rope = self.rope(layout.position_T)
        for index, layer in enumerate(self.layers):
            if enter is not None:
                x_TW = enter(index, x_TW)
            if past is not None:
                x_TW = layer(x_TW, rope, layout, past[index])
            elif self.recompute:
                x_TW = checkpoint(layer, x_TW, rope, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TW = layer(x_TW, rope, layout)
        return x_TW

    def rope(self, position_T: Tensor) -> Rope:
        return rope_tables(position_T, self.shape.head_dim, self.shape.config.rope_theta)
