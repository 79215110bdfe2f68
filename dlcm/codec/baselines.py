"""What a codec is measured against: rounding in groups, to nearest or by GPTQ, and a tensor whose order means nothing.

GPTQ (Frantar et al., arXiv 2210.17323) rounds a matrix column by column, and moves what is not yet rounded so that the
output of the layer, on the inputs whose second moments it is given, changes least.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm.codec.blob import CodecError

GROUP = 128
SCALE_BITS = 16
CLIPS = tuple(1 - step / 20 for step in range(15))  # shares of a group's range that the search tries
DAMPING = 0.01  # of the mean of a Hessian's diagonal, added to it


@dataclass(frozen=True, slots=True)
class Quantised:
    """A tensor after rounding, in its dtype, and the bits per value that packing it takes, scales included."""

    tensor: Tensor
    bits: float


def round_to_nearest(tensor: Tensor, bits: int, group: int = GROUP, clip_search: bool = False) -> Quantised:
    """Asymmetric rounding in groups along the last dimension: `bits` a value, and of each group a scale of 16 bits and
    a zero point of `bits`.

    Args:
        clip_search: take the share of each group's range that errs least, of CLIPS.

    Raises:
        CodecError: the tensor is empty, or a value is not finite.
    """
    if not tensor.numel() or not torch.isfinite(tensor).all():
        raise CodecError("rounding to nearest needs finite values; leave this tensor out")
    last = tensor.shape[-1] if tensor.ndim else 1
    x_RC = tensor.detach().float().reshape(-1, last)
    whole_RC, rest_RC = x_RC.split([last // group * group, last % group], 1)
    parts = [part.reshape(-1, width) for part, width in ((whole_RC, group), (rest_RC, last % group)) if part.numel()]
    rounded = [_Grid.of(x_Gg, bits, clip_search).nearest(x_Gg).reshape(len(x_RC), -1) for x_Gg in parts]
    scales = sum(map(len, parts)) * (SCALE_BITS + bits)
    return Quantised(torch.cat(rounded, 1).reshape(tensor.shape).to(tensor.dtype), bits + scales / tensor.numel())


def gptq(weight_OI: Tensor, hessian_II: Tensor, bits: int, group: int = GROUP, clip_search: bool = False) -> Quantised:
    """The same grids, of as many bits, found and filled by GPTQ: groups get theirs when their turn comes, in order.

    Args:
        weight_OI: of a linear layer.
        hessian_II: sum of x x^T over its inputs, up to a factor.
        clip_search: see `round_to_nearest`.

    Raises:
        CodecError: a value is not finite, or the Hessian is of another layer.
    """
    if not torch.isfinite(weight_OI).all() or not torch.isfinite(hessian_II).all():
        raise CodecError("GPTQ needs finite weights and inputs; leave this tensor out")
    inputs = hessian_II.shape[0]
    if weight_OI.ndim != 2 or hessian_II.shape != (inputs, inputs) or weight_OI.shape[1] != inputs:
        raise CodecError(f"a Hessian of {tuple(hessian_II.shape)} is not of a layer of {tuple(weight_OI.shape)}")
    hessian_II = hessian_II.double()
    damped_II = hessian_II + DAMPING * hessian_II.diagonal().mean().clamp(min=1e-30) * torch.eye(inputs)
    # Row i: by how much an error in column i moves each later one, times the diagonal.
    factor_II = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_II)), upper=True).float()
    x_OI = weight_OI.detach().float().clone()
    rounded_OI = torch.empty_like(x_OI)
    for start in range(0, inputs, group):
        stop = min(start + group, inputs)
        grid, error_Og = _Grid.of(x_OI[:, start:stop], bits, clip_search), torch.empty_like(x_OI[:, start:stop])
        for column in range(start, stop):
            rounded_O1 = grid.nearest(x_OI[:, column : column + 1])
            error_O1 = (x_OI[:, column : column + 1] - rounded_O1) / factor_II[column, column]
            x_OI[:, column:stop] -= error_O1 * factor_II[column, column:stop]
            rounded_OI[:, column : column + 1], error_Og[:, column - start : column - start + 1] = rounded_O1, error_O1
        x_OI[:, stop:] -= error_Og @ factor_II[start:stop, stop:]
    groups = len(x_OI) * -(-inputs // group)
    return Quantised(rounded_OI.to(weight_OI.dtype), bits + groups * (SCALE_BITS + bits) / weight_OI.numel())


def shuffled(tensor: Tensor, seed: int = 265) -> Tensor:
    """The same rows, the entries of each in random order: what a codec still saves here is entropy coding."""
    return tensor.cpu().gather(-1, _order(tensor, seed))


def unshuffled(tensor: Tensor, seed: int = 265) -> Tensor:
    """The inverse of `shuffled`."""
    return torch.empty_like(tensor).scatter_(-1, _order(tensor, seed), tensor)


def _order(tensor: Tensor, seed: int) -> Tensor:
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Evenly spaced levels for each group: scale (zero + 0 .. most), of which one is 0."""

    scale_G1: Tensor
    zero_G1: Tensor
    most: int

    @classmethod
    def of(cls, x_Gg: Tensor, bits: int, clip_search: bool) -> "_Grid":
        """2^bits levels over each group's range, or over the share of it, of CLIPS, that errs least."""
        best = cls._over(x_Gg, bits, 1.0)
        least_G1 = best._error(x_Gg)
        for share in CLIPS[1:] if clip_search else ():
            grid = cls._over(x_Gg, bits, share)
            error_G1 = grid._error(x_Gg)
            better_G1 = error_G1 < least_G1
            least_G1 = torch.where(better_G1, error_G1, least_G1)
            scale_G1 = torch.where(better_G1, grid.scale_G1, best.scale_G1)
            best = cls(scale_G1, torch.where(better_G1, grid.zero_G1, best.zero_G1), best.most)
        return best

    @classmethod
    def _over(cls, x_Gg: Tensor, bits: int, share: float) -> "_Grid":
        """Over this share of the range, which always has room for 0."""
        low, high = x_Gg.amin(1, keepdim=True).clamp(max=0) * share, x_Gg.amax(1, keepdim=True).clamp(min=0) * share
        most = 2**bits - 1
        scale_G1 = ((high - low) / most).half().float()
        scale_G1 = torch.where(scale_G1 > 0, scale_G1, torch.finfo(torch.float16).tiny)
        return cls(scale_G1, (-low / scale_G1).round().clamp(0, most), most)

    def nearest(self, x_Gg: Tensor) -> Tensor:
        """Values of each group, rounded."""
        return ((x_Gg / self.scale_G1 + self.zero_G1).round().clamp(0, self.most) - self.zero_G1) * self.scale_G1

    def _error(self, x_Gg: Tensor) -> Tensor:
        return (self.nearest(x_Gg) - x_Gg).square().sum(1, keepdim=True)
