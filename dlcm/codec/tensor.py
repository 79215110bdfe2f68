"""A tensor in a given number of bits, or to a given error, and back.

    what is not finite, or far out -> exact table
    the rest -> minus its mean (-> rotated, and again what is far out -> exact table) -> samples -> stream

One number is searched for: the logarithm of the quantiser's step over the deviation. A video has whole QPs, a sixth of
an octave apart; between two of them the samples are scaled, which is continuous. Arithmetic is in fp32: of float64 only
exact values keep more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dlcm.codec import entropy, video
from dlcm.codec.blob import Blob, BudgetUnused, CodecError, from_raw, least_padding, raw_bytes
from dlcm.codec.outliers import read_table, write_table
from dlcm.codec.rotation import rotate, unrotate

Backend = Literal["x264", "x265", "nvenc", "entropy"]
Transform = Literal["none", "hadamard"]
Nonfinite = Literal["refuse", "keep"]
BACKENDS: tuple[Backend, ...] = ("x264", "x265", "nvenc", "entropy")
TRANSFORMS: tuple[Transform, ...] = ("none", "hadamard")
CLIP_SIGMA, DEPTH = 6.0, 10
WIDEST = 6.0  # octaves by which samples may shrink at the coarsest QP
GAUSSIAN_BITS = 2.05  # of a Gaussian, rounded to steps of its deviation
LOG_STEP_OVER_ERROR = 1.79  # log2 of sqrt(12): rounding errs by a twelfth of the squared step
MOST_TRIALS = 24


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A tensor before quantisation: what is not in `exact` or `exact_rotated`, centred, has this deviation."""

    blob: Blob
    values_RC: np.ndarray
    sigma: float


def compress(
    tensor: Tensor,
    *,
    bits: float | None = None,
    max_rel_mse: float | None = None,
    backend: Backend = "x264",
    transform: Transform = "none",
    depth: int = DEPTH,
    clip_sigma: float = CLIP_SIGMA,
    nonfinite: Nonfinite = "refuse",
) -> Blob:
    """Compresses a floating-point tensor to just below a budget, or to just below an error.

    Args:
        bits: per value, of all bytes of the blob. Or:
        max_rel_mse: the squared error over the squared values, at most; of the values that are finite.
        transform: `hadamard` rotates both sides of the matrix (..., C) seen as (R, C).
        depth: bits of a sample of video, 8 or 10.
        clip_sigma: what is further from the mean, in deviations, is kept exactly.
        nonfinite: `keep` keeps NaN and infinities exactly.

    Raises:
        CodecError: the target cannot be reached, a value is not finite, or the backend is not to be had here.
        BudgetUnused: the backend has no use for so many bits.
    """
    if (bits is None) == (max_rel_mse is None):
        raise CodecError("give either bits or max_rel_mse")
    if not (target := bits if max_rel_mse is None else max_rel_mse) or not 0 < target < math.inf:
        raise CodecError(f"{target} is no budget: give a positive number")
    if not tensor.numel():
        return store(tensor)
    prepared = _prepare(tensor, backend, transform, depth, clip_sigma, nonfinite)
    if not prepared.sigma:
        blob = replace(prepared.blob, stream="constant")
        blob = replace(blob, payload=least_padding(blob))
        if bits is not None and blob.bits > bits:
            raise CodecError(f"{bits:g} bits a value cannot be reached: a constant takes {blob.bits:.3g} here")
        return blob
    bounds = _bounds(backend, depth, clip_sigma)

    def trial_at(log_step: float) -> Blob:
        return _encoded(prepared, log_step, backend, clip_sigma)

    if bits is not None:
        room, guess = max(0.004, 64 / tensor.numel()), GAUSSIAN_BITS - bits + prepared.blob.side_bits
        blob, reached = _search(trial_at, lambda trial: trial.bits, -1, bits, room, guess, bounds)
        if bits - room <= reached <= bits:
            return blob
        finest, coarsest = (trial_at(bound) for bound in bounds)
        if reached > bits >= coarsest.bits:  # there the curve is no line, and a search may stop short of its end
            blob, reached = coarsest, coarsest.bits
        reach = f"{backend} takes {coarsest.bits:.3g} to {finest.bits:.3g} here"
        if finest.bits < bits - room:
            raise BudgetUnused(f"{bits:g} bits a value are too many: {reach}", finest)
        if reached > bits:
            raise CodecError(f"{bits:g} bits a value are too few: {reach}")
        return blob

    def log_error(trial: Blob) -> float:
        return math.log2(max(relative_mse(tensor, decompress(trial, torch.float64)), 1e-30))

    level = math.log2(target)
    guess = level / 2 + LOG_STEP_OVER_ERROR
    blob, reached = _search(trial_at, log_error, 2, level, 0.02, guess, bounds)
    if reached > level:
        raise CodecError(f"a relative error of {target:g} is too small: {backend} reaches {2**reached:.3g} here")
    return blob


def decompress(blob: Blob, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
    """The tensor of a blob, of its own dtype or another.

    Raises:
        CodecError: the blob is damaged.
    """
    if blob.stream == "exact":
        if len(blob.payload) != blob.numel * blob.dtype.itemsize:
            raise CodecError("an exact tensor is of another size than its bytes; get the file again")
        return from_raw(blob.payload, blob.dtype).reshape(blob.shape).to(device, dtype)
    if not blob.dtype.is_floating_point or not blob.numel:
        raise CodecError("a stream of no floating-point values; get the file again")
    shape_RC = _matrix(blob.shape)
    tables = read_table(blob.exact, blob.dtype, blob.numel)
    rotated = read_table(blob.exact_rotated, torch.float32, blob.numel)
    x = _decoded(blob, shape_RC)
    if blob.rotated:
        x[rotated[0]] = rotated[1].numpy()
        x = np.ascontiguousarray(unrotate(x.reshape(shape_RC))).reshape(-1)
    most = torch.finfo(blob.dtype).max
    restored = (torch.from_numpy(x).double() + blob.offset).clamp_(-most, most).to(blob.dtype)
    restored[torch.from_numpy(tables[0])] = tables[1]
    return restored.reshape(blob.shape).to(device, dtype)


def encode_once(tensor: Tensor, log_step: float, *, backend: Backend) -> Blob:
    """The blob at a log2 of the quantiser's step over the deviation: one trial of `compress`, for timing.

    Raises:
        CodecError: see `compress`; or the tensor is constant, and has no step.
    """
    prepared = _prepare(tensor, backend, "none", DEPTH, CLIP_SIGMA, "refuse")
    if not prepared.sigma:
        raise CodecError("a constant has no step; compress it")
    return _encoded(prepared, log_step, backend, CLIP_SIGMA)


def deviation(tensor: Tensor) -> float:
    """Of a tensor's values about their mean, those left out that `compress` keeps exactly.

    Raises:
        CodecError: see `compress`.
    """
    return _prepare(tensor, "entropy", "none", DEPTH, CLIP_SIGMA, "refuse").sigma


def store(tensor: Tensor) -> Blob:
    """A tensor of any dtype, exactly."""
    return Blob("exact", tuple(tensor.shape), tensor.dtype, payload=raw_bytes(tensor))


def relative_mse(x: Tensor, y: Tensor) -> float:
    """The squared error over the squared values, of those that are finite in `x`; 0 where there is no error."""
    known = torch.isfinite(x)
    x, y = x[known].double(), y.to(x.device)[known].double()
    error = (x - y).square().sum().item()
    return error / x.square().sum().item() if error else 0.0


def rate_distortion(tensor: Tensor, bits: Sequence[float], **options: Any) -> list[dict[str, float]]:
    """What `compress` makes of a tensor at several budgets: target, bits, side_bits, rel_mse, max_error."""
    rows = []
    for target in bits:
        blob = compress(tensor, bits=target, **options)
        again = decompress(blob)
        known = torch.isfinite(tensor)
        difference = (tensor.double() - again.double())[known].abs()
        rows.append(
            {
                "target": target,
                "bits": blob.bits,
                "side_bits": blob.side_bits,
                "rel_mse": relative_mse(tensor, again),
                "max_error": difference.max().item() if difference.numel() else 0.0,
            }
        )
    return rows


def _prepare(
    tensor: Tensor, backend: Backend, transform: Transform, depth: int, clip_sigma: float, nonfinite: Nonfinite
) -> _Prepared:
    for name, value, known in (
        ("backend", backend, BACKENDS),
        ("transform", transform, TRANSFORMS),
        ("depth", depth, (8, 10)),
        ("nonfinite", nonfinite, ("refuse", "keep")),
    ):
        if value not in known:
            raise CodecError(f"{name} {value!r}: take one of {', '.join(map(str, known))}")
    if not 1 <= clip_sigma < math.inf:
        raise CodecError(f"clip_sigma {clip_sigma}: give at least 1")
    if not tensor.is_floating_point():
        raise CodecError(f"a tensor of {tensor.dtype} is not compressed; store it exactly")
    flat = tensor.detach().cpu().reshape(-1)
    infinite = ~torch.isfinite(flat)
    if nonfinite == "refuse" and infinite.any():
        raise CodecError(f"{int(infinite.sum())} values are not finite; nonfinite='keep' keeps them exactly")
    x = flat.float().numpy()
    if not np.isfinite(x).sum() == flat.numel() - int(infinite.sum()):
        raise CodecError("values beyond the range of float32; scale the tensor first")
    far, mean, sigma = _far(x, clip_sigma)
    far_values = flat[torch.from_numpy(far)]
    values = x - np.float32(mean)
    values[far] = 0
    blob = Blob("", tuple(tensor.shape), tensor.dtype, offset=mean, exact=write_table(far, far_values))
    values_RC = values.reshape(_matrix(blob.shape))
    if transform == "hadamard" and sigma:
        values_RC = np.ascontiguousarray(rotate(values_RC))
        flat_rotated = values_RC.reshape(-1)
        far, _, sigma = _far(flat_rotated, clip_sigma)
        table = write_table(far, torch.from_numpy(flat_rotated[far]))
        flat_rotated[far] = 0
        blob = replace(blob, rotated=True, exact_rotated=table)
    return _Prepared(replace(blob, depth=0 if backend == "entropy" else depth), values_RC, sigma)


def _far(x: np.ndarray, clip_sigma: float) -> tuple[np.ndarray, float, float]:
    """Positions of what is not finite or far from the mean, and mean and deviation of the rest, which tell what is far:
    repeated, since outliers hide each other.
    """
    near = np.isfinite(x)
    mean = sigma = 0.0
    for _ in range(8):
        rest = x[near]
        if not len(rest):
            break
        scale = float(np.abs(rest).max()) or 1.0  # squares of what is tiny or huge are not in range
        scaled = rest / np.float64(scale)
        mean, sigma = float(scaled.mean()) * scale, float(scaled.std()) * scale
        if np.ptp(rest) == 0:
            return np.flatnonzero(~near), float(rest[0]), 0.0
        nearer = near & (np.abs(x.astype(np.float64) - mean) <= clip_sigma * sigma)
        if nearer.sum() == near.sum():
            break
        near = nearer
    return np.flatnonzero(~near), float(np.float32(mean)), sigma


def _bounds(backend: Backend, depth: int, clip_sigma: float) -> tuple[float, float]:
    """The finest and the coarsest log2 of the step over the deviation."""
    if backend == "entropy":
        levels = entropy.MOST_SYMBOLS / 2 - 1  # on either side
        return max(entropy.FINEST, math.log2(clip_sigma / levels)), entropy.COARSEST
    encoder = video.ENCODERS[backend]
    at_one = encoder.qp_of(video.reach(depth) / clip_sigma, depth)  # the QP of a step of one deviation
    return (encoder.least_qp(depth) - at_one) / 6, (encoder.most_qp(depth) - at_one) / 6 + WIDEST


def _encoded(prepared: _Prepared, log_step: float, backend: Backend, clip_sigma: float) -> Blob:
    """The blob at one step."""
    blob, values_RC, sigma = prepared.blob, prepared.values_RC, prepared.sigma
    if backend == "entropy":
        unit = sigma * 2**log_step
        stream, payload = "entropy", entropy.encode(values_RC, unit)
    else:
        encoder, reach = video.ENCODERS[backend], video.reach(blob.depth)
        exact_qp = encoder.qp_of(2**log_step * reach / clip_sigma, blob.depth)
        qp = min(max(math.floor(exact_qp + 1e-9), encoder.least_qp(blob.depth)), encoder.most_qp(blob.depth))
        unit = clip_sigma * sigma / reach * 2 ** ((exact_qp - qp) / 6)
        stream, payload = encoder.stream, video.encode(encoder, values_RC, unit, qp, blob.depth)
    blob = replace(blob, stream=stream, unit=unit, payload=payload)
    return replace(blob, payload=payload + least_padding(blob))


def _decoded(blob: Blob, shape_RC: tuple[int, int]) -> np.ndarray:
    """(R C,) fp32: what the payload says of the centred, perhaps rotated values."""
    if blob.stream == "constant":
        return np.zeros(blob.numel, np.float32)
    if blob.stream == "entropy":
        return entropy.decode(blob.payload, blob.numel, blob.unit)
    if blob.depth not in (8, 10):
        raise CodecError(f"video of {blob.depth} bits; get the file again")
    return video.decode(blob.stream, blob.payload, shape_RC, blob.unit, blob.depth)


def _search(
    trial_at: Callable[[float], Blob],
    measure: Callable[[Blob], float],
    slope: float,
    target: float,
    room: float,
    guess: float,
    bounds: tuple[float, float],
) -> tuple[Blob, float]:
    """The trial that measures most, but at most `target`; as soon as one is within `room` of it, that one. Where none
    is, the one that measures least.

    Args:
        trial_at: the blob at a log2 of the step.
        slope: about what the measure changes by as the step doubles; its sign must be right.
        guess: where to begin.
        bounds: the finest and the coarsest log2 of the step.
    """
    sign = -math.copysign(1, slope)  # times which the measure falls with the position
    low, high = sorted(sign * bound for bound in bounds)
    position, aim = min(max(sign * guess, low), high), target - room / 2
    above: tuple[float, float] | None = None
    below: tuple[float, float] | None = None
    best: tuple[Blob, float] | None = None
    for turn in range(MOST_TRIALS):
        blob = trial_at(sign * position)
        found = measure(blob)
        if best is None or (best[1] > target and found < best[1]) or best[1] < found <= target:
            best = blob, found
        if target - room <= found <= target:
            break
        if found > target:
            above = position, found
        else:
            below = position, found
        if above and below:
            if below[0] - above[0] < 1e-7:
                break
            share = (above[1] - aim) / max(above[1] - below[1], 1e-12)
            share = 0.5 if turn % 3 == 2 else min(max(share, 0.02), 0.98)  # halving now and then, or one end may stay
            position = above[0] + share * (below[0] - above[0])
            continue
        edge = high if above else low
        if position == edge:
            break
        step = (found - aim) / abs(slope)
        step += math.copysign(room, step)
        position = min(max(position + min(max(step, -3.0), 3.0), low), high)
    assert best
    return best


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The (R, C) that a tensor is seen as: the last dimension stays."""
    columns = shape[-1] if shape else 1
    return math.prod(shape) // columns, columns
