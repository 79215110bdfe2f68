"""What a codec is measured against: rounding to nearest in groups, and a tensor whose order means nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dlcm.codec.blob import CodecError

GROUP = 128
SCALE_BITS = 16
CLIPS = tuple(1 - step / 20 for step in range(15))  # shares of a group's range that the search tries


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
    groups = -(-last // group)
    padded = torch.nn.functional.pad(x_RC[:, None], (0, groups * group - last), mode="replicate")[:, 0]
    x_Gg = padded.reshape(-1, group)  # what pads repeats a group's last value, and changes no range
    best = _rounded(x_Gg, bits, 1.0)
    for share in CLIPS[1:] if clip_search else ():
        candidate = _rounded(x_Gg, bits, share)
        better = (candidate - x_Gg).square().sum(1) < (best - x_Gg).square().sum(1)
        best[better] = candidate[better]
    rounded = best.reshape(len(x_RC), -1)[:, :last].reshape(tensor.shape).to(tensor.dtype)
    return Quantised(rounded, bits + len(x_Gg) * (SCALE_BITS + bits) / tensor.numel())


def shuffled(tensor: Tensor, seed: int = 265) -> Tensor:
    """The same rows, the entries of each in random order: what a codec still saves here is entropy coding."""
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(tensor.shape, generator=draw).argsort(-1)
    return tensor.cpu().gather(-1, order)


def _rounded(x_Gg: Tensor, bits: int, share: float) -> Tensor:
    """Groups, rounded to 2^bits levels over this share of their range, which always has room for 0."""
    low, high = x_Gg.amin(1, keepdim=True).clamp(max=0) * share, x_Gg.amax(1, keepdim=True).clamp(min=0) * share
    most = 2**bits - 1
    scale = ((high - low) / most).half().float()
    scale = torch.where(scale > 0, scale, torch.finfo(torch.float16).tiny)
    zero = (-low / scale).round().clamp(0, most)
    return ((x_Gg / scale + zero).round().clamp(0, most) - zero) * scale
