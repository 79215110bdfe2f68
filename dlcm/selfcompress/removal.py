"""Removal (arXiv 2301.13142): dead channels leave a model that is being trained, so that steps get cheaper.

A hidden unit of SwiGLU is dead if all groups over its row of gate or of up have no bits, or all over its column of
down; a channel of the values likewise, with the columns of the output projection in all query heads that read it. It
leaves the matrices on both sides: what is left computes what it did, and has the gradients that it had, but for
rounding. (Had it stayed, the gradient of its bit depths might have brought it back.)

Only whole groups go: where they are tiles, as many channels as tiles of both matrices have in common, so that what is
left has tiles of the same size. Where a group is a row, it loses columns, and weighs less.

How many channels are left is `channels_left` of the configuration, which alone says how to build such a model; which
ones they were does not matter, since their order does not. So those of a head come first in it. A sublayer without any
is not there, and not run; but a cross-attention, which a DLCM reads in parts, keeps a whole group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dlcm.blocks import Block, SelfAttention, SwiGLU
from dlcm.causal_lm import PackedCausalLM
from dlcm.config import TokenBlocksConfig
from dlcm.cross_attention import CrossAttention
from dlcm.selfcompress.quantiser import QuantisedLinear, group_shape, quantised_linears

Attention = SelfAttention | CrossAttention
Kept = tuple[Tensor | None, Tensor | None]  # which rows and columns of a parameter stay; None: all


def leave_channels_(model: PackedCausalLM) -> None:
    """Makes a model of whole sublayers as narrow as its configuration says."""
    for name, left in (model.config.channels_left or {}).items():
        whole = model.config.sublayer(name).channels
        alive = torch.cat([torch.arange(size, device="cpu") < some for size, some in zip(whole, left, strict=True)])
        _narrow_(model, name, whole, alive)


@torch.no_grad()
def remove_dead_(model: PackedCausalLM) -> dict[str, Kept]:
    """Removes dead channels, in place. Parameters that lose any are made anew, without gradients.

    Returns:
        By the names of these parameters, which rows and columns they keep; of those that are gone altogether, none.
    """
    config, kept = model.config, dict[str, Kept]()
    left = dict(config.channels_left or {})
    for name, sublayer in list(model.named_modules()):
        if isinstance(sublayer, SelfAttention | CrossAttention | SwiGLU):
            heads = left.get(name, config.sublayer(name).channels)
            alive_V = _alive_channels(config, name, sublayer, heads)
            if not alive_V.all():
                kept |= _narrow_(model, name, heads, alive_V)
                left[name] = _by_head(alive_V, heads)
    if kept:
        config.channels_left = left
    return kept


# Which channels are dead


def _alive_channels(config: TokenBlocksConfig, name: str, sublayer: Attention | SwiGLU, heads: Sequence[int]) -> Tensor:
    """Which of the channels that are there must stay, (V,) bool, on the CPU; `heads` says how many are in each head."""
    begins, tile_rows, tile_columns = config.sublayer(name), config.quantiser_rows, config.quantiser_columns or 1
    before, after = _layers(sublayer)
    alive_V = _of_heads(_alive(after, 0), heads, begins.shared)
    for layer in before:
        alive_V = alive_V & _alive(layer, 1)
    if not begins.may_go and not alive_V.any():
        alive_V[0] = True
    while True:  # until there are whole tiles on both sides
        wider_V = _whole(alive_V, tile_rows)
        wider_V |= _of_heads(_whole(_to_heads(wider_V, heads, begins.shared), tile_columns), heads, begins.shared)
        if torch.equal(wider_V, alive_V):
            return alive_V
        alive_V = wider_V


def _layers(sublayer: Attention | SwiGLU) -> tuple[list[QuantisedLinear], QuantisedLinear]:
    """Those that write channels, as rows, and the one that reads them, as columns."""
    if isinstance(sublayer, SwiGLU):
        before, after = [sublayer.gate_proj, sublayer.up_proj], sublayer.down_proj
    else:
        before, after = [sublayer.v_proj], sublayer.o_proj
    return before, after  # type: ignore[return-value]  # whose declared type is that before quantisation


def _alive(layer: QuantisedLinear, over: int) -> Tensor:
    """Rows (`over` columns, 1), or columns (`over` rows, 0), of weights that are not all dead; bool, on the CPU."""
    size = group_shape(layer.weight, layer.depth)[1 - over]
    return (layer.depth > 0).any(over).repeat_interleave(size).cpu()


def _whole(alive: Tensor, size: int) -> Tensor:
    """All of a tile, if any of it."""
    return alive.view(-1, size).any(1).repeat_interleave(size)


def _to_heads(alive_V: Tensor, heads: Sequence[int], shared: int) -> Tensor:
    """From channels to the columns that read them, head after head of those that share them."""
    return torch.cat([x.repeat(shared) for x in alive_V.split(list(heads))])


def _of_heads(alive: Tensor, heads: Sequence[int], shared: int) -> Tensor:
    """From columns to the channels of which any is read."""
    return torch.cat([x.view(shared, -1).any(0) for x in alive.split([shared * size for size in heads])])


def _by_head(alive_V: Tensor, heads: Sequence[int]) -> list[int]:
    return [int(x.sum()) for x in alive_V.split(list(heads))]


# What goes with them


def _narrow_(model: PackedCausalLM, name: str, heads: Sequence[int], alive_V: Tensor) -> dict[str, Kept]:
    """Leaves these channels in a sublayer; `heads` says how many of all were in each head.

    Returns:
        As `remove_dead_`.
    """
    if not alive_V.any():
        return _leave_out_(model, name)
    sublayer, begins = model.get_submodule(name), model.config.sublayer(name)
    assert isinstance(sublayer, SelfAttention | CrossAttention | SwiGLU)
    before, after = _layers(sublayer)
    rows, columns = (x.nonzero().squeeze(1) for x in (alive_V, _to_heads(alive_V, heads, begins.shared)))
    kept = {layer: layer.keep_(rows, None) for layer in before} | {after: after.keep_(None, columns)}
    if not isinstance(sublayer, SwiGLU):  # whose heads are as wide as before for attention itself
        left = zip(begins.channels, _by_head(alive_V, heads), strict=True)
        place_V = torch.cat([torch.arange(size, device="cpu") < some for size, some in left])
        before[0].place_(place_V, None)
        after.place_(None, _to_heads(place_V, begins.channels, begins.shared))
    names = {layer: own for own, layer in quantised_linears(sublayer).items()}
    return {f"{name}.{names[layer]}.{kind}": index for layer, own in kept.items() for kind, index in own.items()}


def _leave_out_(model: PackedCausalLM, name: str) -> dict[str, Kept]:
    """Takes attention or SwiGLU out of a block, and the norm before it."""
    parent, _, own = name.rpartition(".")
    block = model.get_submodule(parent)
    assert isinstance(block, Block)
    gone = [key for key, _ in block.named_parameters() if key.partition(".")[0] in (own, f"{own}_norm")]
    delattr(block, own)
    delattr(block, f"{own}_norm")
    if own == "attention":
        block.attends = False
    else:
        block.feeds = False
    return {f"{parent}.{key}": (None, None) for key in gone}
