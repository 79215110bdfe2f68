"""A physically smaller model: what is zero in plain weights leaves the matrices and their neighbours' inputs.

A hidden unit of SwiGLU is gone if its row of gate or of up is zero, or its column of down; a channel of the values, if
its row is zero, or its columns of the output projection are, in every head that reads it. Any other row or column of
zeros is left out of the product alone: rows come back as zeros where they belong (queries and keys keep their heads,
so scale, norms and caches are what they were), columns are picked from the input. A sublayer of which nothing is left
is skipped. Sums keep their order, so logits move by rounding alone.

For inference: weights are copies, and a compact model is not saved, but made again from the packed file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm.attention import causal_attention
from dlcm.blocks import Block, LayerPast, Rope, SelfAttention, SwiGLU
from dlcm.causal_lm import PackedCausalLM
from dlcm.cross_attention import CrossAttention
from dlcm.layout import PackedLayout
from dlcm.selfcompress.quantiser import quantised_linears


class CompactLinear(nn.Module):
    """y = x W^T without rows and columns of W that are zero; x (T, I), y (T, O).

    Attributes:
        weight: what is left, (rows, columns).
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        alive = weight != 0
        rows, columns = alive.any(1), alive.any(0)
        self.out_features = len(rows)
        self.weight = nn.Parameter(weight.detach()[rows][:, columns].clone(), requires_grad=False)
        self.rows: Tensor | None
        self.columns: Tensor | None
        self.register_buffer("rows", None if rows.all() else rows.nonzero().squeeze(1), persistent=False)
        self.register_buffer("columns", None if columns.all() else columns.nonzero().squeeze(1), persistent=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TR = F.linear(x_TI if self.columns is None else x_TI.index_select(-1, self.columns), self.weight)
        if self.rows is None:
            return y_TR
        return y_TR.new_zeros(*y_TR.shape[:-1], self.out_features).index_copy(-1, self.rows, y_TR)


class CompactBlock(Block):
    """A block some of whose sublayers are compact, and those of which nothing is left are not run."""

    def __init__(self, block: Block):
        nn.Module.__init__(self)
        self.backend = block.backend
        self.attention_norm, self.attention = block.attention_norm, block.attention
        self.ffn_norm, self.ffn = block.ffn_norm, block.ffn
        self.attends = bool(block.attention.o_proj.weight.any()) and bool(block.attention.v_proj.weight.any())
        self.feeds = bool(block.ffn.down_proj.weight.any())

    def forward(self, x_TW: Tensor, rope: Rope, layout: PackedLayout, past: LayerPast | None = None) -> Tensor:
        if self.attends:
            q_THN, k_TKN, v_TKN = self.before_attention(x_TW, rope)
            if past is None:
                mixed_THN = causal_attention(q_THN, k_TKN, v_TKN, layout, self.backend)
            else:
                mixed_THN = past.attend(q_THN, k_TKN, v_TKN, self.backend)
            x_TW = x_TW + self.attention.merge(mixed_THN)
        return x_TW + self.ffn(self.ffn_norm(x_TW)) if self.feeds else x_TW


@torch.no_grad()
def compact_(model: PackedCausalLM) -> None:
    """Makes a model of plain weights smaller, in place; in evaluation it computes what it did.

    Raises:
        ValueError: its weights are rounded in the forward pass (see `plain_`).
    """
    if quantised_linears(model):
        raise ValueError("compact_ needs plain weights: call plain_(model) first")
    for module in list(model.modules()):
        if isinstance(module, SelfAttention | CrossAttention):
            _drop_dead_values_(module)
        if isinstance(module, SwiGLU):
            _drop_dead_units_(module)
    for module in list(model.modules()):
        if isinstance(module, Block | CrossAttention):
            _compact_linears_(module)
    for name, child in [(name, child) for name, child in model.named_modules() if isinstance(child, Block)]:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, CompactBlock(child))


def _drop_dead_values_(attention: SelfAttention | CrossAttention) -> None:
    """Makes zero what only meets zeros: rows of the values, and columns of the output projection."""
    values, output = attention.v_proj.weight, attention.o_proj.weight  # (K N, W), (W, H N)
    dimension = attention.head_dim
    heads_K = len(values) // dimension
    shared = output.shape[1] // len(values)  # query heads that read a key-value head
    read_KGN = (output != 0).any(0).view(heads_K, shared, dimension)
    written_KN = (values != 0).any(1).view(heads_K, dimension)
    attention.v_proj.weight = _masked(values, read_KGN.any(1).flatten(), 0)
    alive_HN = (read_KGN & written_KN[:, None]).flatten()
    attention.o_proj.weight = _masked(output, alive_HN, 1)


def _drop_dead_units_(ffn: SwiGLU) -> None:
    """Leaves the hidden units that say something; physically, since nothing else reads them."""
    gate, up, down = (layer.weight for layer in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
    alive_F = (gate != 0).any(1) & (up != 0).any(1) & (down != 0).any(0)
    ffn.gate_proj.weight, ffn.up_proj.weight = (nn.Parameter(x[alive_F], requires_grad=False) for x in (gate, up))
    ffn.down_proj.weight = nn.Parameter(down[:, alive_F], requires_grad=False)


def _masked(weight: Tensor, alive: Tensor, dimension: int) -> nn.Parameter:
    return nn.Parameter(weight * (alive if dimension else alive[:, None]), requires_grad=False)


def _compact_linears_(stage: nn.Module) -> None:
    for parent in list(stage.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, CompactLinear(child.weight))


def block_weights(model: PackedCausalLM) -> int:
    """How many weights the linear layers of blocks and cross-attention have."""
    return sum(
        layer.weight.numel()
        for stage in model.modules()
        if isinstance(stage, Block | CrossAttention)
        for layer in stage.modules()
        if isinstance(layer, nn.Linear | CompactLinear)
    )
