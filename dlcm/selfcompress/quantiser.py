"""Linear layers whose weights are rounded in the forward pass, to bit depths that are learned (arXiv 2301.13142).

A group of weights shares a bit depth b and an exponent e, both learned, the exponent as a real number:

    q(w, b, e) = 2^e round(min(max(2^-e w, -2^(B-1)), 2^(B-1) - 1)),    B = ceil(b), ties to even

A group is an output channel, or a tile of rows and columns. Rounding passes gradients straight through, to b as to w;
what is clipped passes none to w, and is all that the loss tells b. B in place of b makes a penalty on b one on storage:
a fractional b would be paid as such and stored as the next whole one. At b = 0 both bounds are -1/2, which rounds to 0:
the group is dead, yet b keeps its gradient.

The control is ternary weights by their mean magnitude, one scale a matrix (BitNet b1.58, weights alone).
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm.blocks import Block
from dlcm.causal_lm import PackedCausalLM
from dlcm.config import TokenBlocksConfig, changed
from dlcm.cross_attention import CrossAttention
from dlcm.selfcompress.partial import PartialLinear

AnyModel = TypeVar("AnyModel", bound=PackedCausalLM)

MAX_BITS = 8
GOLDEN_RATIO = (5**0.5 - 1) / 2
QUANTISER_PARAMETERS = ("depth", "exponent")  # names of what a layer has besides weights


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, source: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value`, to the last bit, whose gradient goes to `source`, of its shape."""
    result: Tensor = _StraightThrough.apply(value.detach(), source)
    return result


def scaled_codes(weight: Tensor, depth: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales whose product is the quantised weight, with gradients, in fp32 or wider.

    Args:
        weight: (O, I).
        depth, exponent: (O / r, I / c), of groups of r x c weights.

    Returns:
        (O / r, r, I / c, c), and (O / r, 1, I / c, 1).
    """
    groups, (rows, columns) = depth.shape, group_shape(weight, depth)
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = weight.to(wide).view(groups[0], rows, groups[1], columns)
    depth, exponent = (y.to(wide)[:, None, :, None] for y in (depth, exponent))
    depth = depth.clamp(0, MAX_BITS)
    half = torch.exp2(straight_through(depth.ceil(), depth) - 1)
    scale = torch.exp2(exponent)
    clipped = torch.minimum(torch.maximum(x / scale, -half), half - 1)
    return straight_through(clipped.round(), clipped), scale


def fake_quantise(weight: Tensor, depth: Tensor, exponent: Tensor) -> Tensor:
    """q(w, b, e) for each group, (O, I), in the weight's dtype."""
    codes, scale = scaled_codes(weight, depth, exponent)
    return (scale * codes).view(weight.shape).to(weight.dtype)


def ternary_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-1, 0 or 1 for each weight, (O, I), and their scale, the mean magnitude; in fp32 or wider, without gradients."""
    x = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    scale = x.abs().mean().clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).clamp(-1, 1).round(), scale


def kept_of(x: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """These rows and columns of a matrix; None: all."""
    for dimension, index in enumerate((rows, columns)):
        if index is not None:
            x = x.index_select(dimension, index.to(x.device))
    return x


def group_shape(weight: Tensor, depth: Tensor) -> tuple[int, int]:
    """Rows and columns of a group."""
    return weight.shape[0] // depth.shape[0], weight.shape[1] // depth.shape[1]


class QuantisedLinear(PartialLinear):
    """y = x q(W)^T, with the weights of a plain layer and, of each group, the bit depth and the exponent."""

    depth: nn.Parameter
    exponent: nn.Parameter

    def __init__(self, linear: nn.Linear, rows: int, columns: int | None):
        assert linear.bias is None
        super().__init__(linear.weight)
        groups = linear.out_features // rows, linear.in_features // (columns or linear.in_features)
        self.depth = nn.Parameter(linear.weight.new_full(groups, MAX_BITS))
        self.exponent = nn.Parameter(linear.weight.new_zeros(groups))

    def used_weight(self) -> Tensor:
        return fake_quantise(self.weight, self.depth, self.exponent)

    def keep_(self, rows: Tensor | None, columns: Tensor | None) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Keeps these rows and columns, whole groups of them, or columns of groups that have all; None: all.

        Returns:
            By parameter, which rows and columns of it.
        """
        height, width = group_shape(self.weight, self.depth)
        group_columns = None if columns is None or self.depth.shape[1] == 1 else columns[::width] // width
        groups = None if rows is None else rows[::height] // height, group_columns
        kept = {"weight": (rows, columns)} | dict.fromkeys(QUANTISER_PARAMETERS, groups)
        for name, index in kept.items():
            setattr(self, name, nn.Parameter(kept_of(getattr(self, name).detach(), *index)))
        self.place_(None, None)
        return kept

    @torch.no_grad()
    def fit_(self, bits: int) -> None:
        """Gives every group so many bits, and the exponent with which its largest weight is just not clipped.

        Depths are spread over all that round up to these bits. Were they equal, groups that are pressed alike would
        lose their bits in the same step, and their last ones, too: no mean below 1 could be held.
        """
        rows, columns = group_shape(self.weight, self.depth)
        x = self.weight.view(self.depth.shape[0], rows, self.depth.shape[1], columns)
        largest = x.abs().amax((1, 3)).clamp(min=torch.finfo(x.dtype).tiny)
        number = torch.arange(self.depth.numel(), dtype=torch.float64, device=self.depth.device)
        spread = (0.5 + number * GOLDEN_RATIO).frac()  # evenly, and neighbours far apart
        self.depth.copy_(bits - spread.view_as(self.depth))
        self.exponent.copy_(largest.log2() - (bits - 1))

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """Whole numbers (O / r, r, I / c, c) and scales (O / r, I / c)."""
        codes, scale = scaled_codes(self.weight, self.depth, self.exponent)
        return codes, scale[:, 0, :, 0]


class TernaryLinear(PartialLinear):
    """y = x W3^T, W3 in {-1, 0, 1} times one scale; gradients pass straight to the weights of a plain layer."""

    def __init__(self, linear: nn.Linear):
        assert linear.bias is None
        super().__init__(linear.weight)

    def used_weight(self) -> Tensor:
        codes, scale = ternary_codes(self.weight)
        return straight_through((scale * codes).to(self.weight.dtype), self.weight)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        """As of the other layer: the matrix is one group."""
        codes, scale = ternary_codes(self.weight)
        return codes[None, :, None], scale.view(1, 1)


Quantised = QuantisedLinear | TernaryLinear  # both have `used_weight` and `codes`


def quantise_linears_(model: nn.Module, config: TokenBlocksConfig) -> None:
    """Replaces the linear layers of blocks and cross-attention by those that `config.quantiser` names.

    Embedding, unembedding, norms, pooling and the boundary detector stay as they are. Weights keep names and values.
    """
    if config.quantiser == "none":
        return
    for parent, name, linear in _linears(model):
        if config.quantiser == "bits":
            setattr(parent, name, QuantisedLinear(linear, config.quantiser_rows, config.quantiser_columns))
        else:
            setattr(parent, name, TernaryLinear(linear))


def quantised_linears(model: nn.Module) -> dict[str, Quantised]:
    """The layers that round their weights, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantised)}


@torch.no_grad()
def plain(model: AnyModel) -> AnyModel:
    """A model of plain layers, of the rounded weights of all that round: what it is after training, and faster.

    It has the widths that the model began with: what removal left out of it is zero. All else is shared.
    """
    weights = {f"{name}.weight": layer.used_weight() for name, layer in quantised_linears(model).items()}
    return plain_of(model, model.state_dict() | weights)


def plain_of(model: AnyModel, state: Mapping[str, Tensor]) -> AnyModel:
    """A plain model in the widths that the model began with.

    Args:
        model: whose weights are rounded; its own tensors are not looked at.
        state: tensors by name, weights rounded and in the model's shapes.
    """
    with torch.device("meta"):
        whole = type(model)(changed(model.config, {"quantiser": "none", "channels_left": None}))
    placed = {f"{name}.weight": layer.placed for name, layer in quantised_linears(model).items()}
    some = next(iter(state.values()))
    tensors = {}
    for name, expected in whole.state_dict().items():
        x = state[name] if name in state else some.new_zeros(expected.shape)  # of a sublayer that is not there
        x = placed[name](x) if name in placed else x
        missing = [(0, size - own) for size, own in zip(expected.shape[::-1], x.shape[::-1], strict=True)]
        tensors[name] = F.pad(x, sum(missing, ())) if x.shape != expected.shape else x
    whole.load_state_dict(tensors, assign=True)
    return whole.train(model.training)


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name in it, layer) of the layers of blocks and cross-attention."""
    return [
        (parent, name, child)
        for stage in model.modules()
        if isinstance(stage, Block | CrossAttention)
        for parent in stage.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
