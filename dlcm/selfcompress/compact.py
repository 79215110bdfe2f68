"""A physically smaller model: what is zero in plain weights leaves the matrices and their neighbours' inputs.

A hidden unit of SwiGLU is gone if its row of gate or of up is zero, or its column of down; a channel of the values, if
its row is zero, or its columns of the output projection are, in every head that reads it. Any other row or column of
zeros is left out of the product alone: rows come back as zeros where they belong (queries and keys keep their heads,
so scale, norms and caches are what they were), columns are picked from the input. A sublayer of which nothing is left
is skipped. Sums keep their order, so logits move by rounding alone.

For inference: weights are copies, and a compact model is not saved, but made again from the packed file. What goes
while a model trains is the business of `dlcm.selfcompress.removal`.
"""

import torch
from torch import Tensor, nn

from dlcm.blocks import Block, SelfAttention, SwiGLU
from dlcm.causal_lm import PackedCausalLM
from dlcm.cross_attention import CrossAttention
from dlcm.selfcompress.partial import PartialLinear
from dlcm.selfcompress.quantiser import quantised_linears


class CompactLinear(PartialLinear):
    """y = x W^T without rows and columns of W that are zero; x (T, I), y (T, O)."""

    def __init__(self, weight: Tensor):
        alive = weight != 0
        rows, columns = alive.any(1), alive.any(0)
        super().__init__(nn.Parameter(weight.detach()[rows][:, columns].clone(), requires_grad=False))
        self.place_(rows, columns)


@torch.no_grad()
def compact_(model: PackedCausalLM) -> None:
    """Makes a model of plain weights smaller, in place; in evaluation it computes what it did.

    Raises:
        ValueError: its weights are rounded in the forward pass (see `plain`).
    """
    if quantised_linears(model):
        raise ValueError("compact_ needs plain weights: call plain(model) first")
    for module in list(model.modules()):
        if isinstance(module, SelfAttention | CrossAttention):
            _drop_dead_values_(module)
        if isinstance(module, SwiGLU):
            _drop_dead_units_(module)
    for module in list(model.modules()):
        if isinstance(module, Block):
            module.attends = bool(module.attention.o_proj.weight.any())
            module.feeds = bool(module.ffn.down_proj.weight.any())
        if isinstance(module, Block | CrossAttention):
            _compact_linears_(module)


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
        if isinstance(layer, nn.Linear)
    )
