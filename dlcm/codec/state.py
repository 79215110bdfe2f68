"""A state dict at a mean number of bits: matrices through the codec, everything else exactly.

The budget is of the file: what is kept exactly, and the file's own header, leave less to the matrices, which get the
same number of bits per value, or what `dlcm.codec.allocation` makes of costs; but the largest gets what the others
leave.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from dlcm.codec.allocation import allocate
from dlcm.codec.blob import Blob, CodecError
from dlcm.codec.container import most_header_bytes
from dlcm.codec.tensor import compress, deviation, store

LEAST_VALUES = 4096  # of a matrix that is worth a stream of its own


def is_coded(name: str, tensor: Tensor, keep: re.Pattern[str] | None = None) -> bool:
    """Whether a tensor goes through the codec: a large enough matrix of floats, whose name `keep` does not match."""
    large = tensor.ndim >= 2 and tensor.numel() >= LEAST_VALUES
    return large and tensor.is_floating_point() and not (keep and keep.search(name))


def compress_state(
    tensors: Mapping[str, Tensor],
    bits: float,
    *,
    keep: re.Pattern[str] | None = None,
    costs: Mapping[str, float] | None = None,
    workers: int = 1,
    tell: Callable[[str, Blob], None] = lambda name, blob: None,
    **options: Any,
) -> dict[str, Blob]:
    """Blobs whose container takes at most `bits` a value.

    Args:
        tensors: read one at a time, a few times; a lazy mapping keeps memory low.
        keep: names that are kept exactly.
        costs: of a unit of squared error in a value of each tensor that is coded (see `allocate`). None: they get the
            same bits.
        workers: tensors that are compressed at a time. The bytes do not depend on it.
        tell: called for each.
        options: of `compress`.

    Raises:
        CodecError: the budget is too small, a cost is missing, or `compress` refuses; names the tensor.
    """
    names, numel = sorted(tensors), {name: tensor.numel() for name, tensor in tensors.items()}
    coded = [name for name in names if is_coded(name, tensors[name], keep)]
    blobs = {name: store(tensors[name]) for name in names if name not in coded}
    room = bits * sum(numel.values()) - 8 * (most_header_bytes(names) + sum(blob.nbytes for blob in blobs.values()))
    share = room / max(1, sum(numel[name] for name in coded))
    if coded and share <= 0:
        raise CodecError(f"{bits:g} bits a value are spent on what is kept exactly; ask for more, or keep less")
    widths = dict.fromkeys(coded, share) if costs is None else widths_by_cost(tensors, coded, costs, share)
    for name, blob in blobs.items():
        tell(name, blob)

    def blob_of(name: str, width: float) -> Blob:
        try:
            return compress(tensors[name], bits=width, **options)
        except CodecError as error:
            raise CodecError(f"{name}: {error}") from error

    largest = max(coded, key=numel.__getitem__, default=None)
    others = [name for name in coded if name != largest]
    with ThreadPoolExecutor(workers) as pool:
        for name, blob in zip(others, pool.map(lambda name: blob_of(name, widths[name]), others), strict=True):
            tell(name, blob)
            blobs[name] = blob
            room -= 8 * blob.nbytes
    if largest is not None:
        blobs[largest] = blob_of(largest, room / numel[largest])
        tell(largest, blobs[largest])
    return blobs


def widths_by_cost(
    tensors: Mapping[str, Tensor], coded: Sequence[str], costs: Mapping[str, float], mean_bits: float
) -> dict[str, float]:
    """Bits per value of each tensor that is coded, whose mean over all their values is `mean_bits`.

    Raises:
        CodecError: a cost is missing; or see `allocate`.
    """
    if missing := [name for name in coded if name not in costs]:
        raise CodecError(f"no cost of {', '.join(missing)}; give one for every matrix that is coded")
    sizes = [tensors[name].numel() for name in coded]
    deviations = [deviation(tensors[name]) for name in coded]
    widths = allocate(sizes, deviations, [costs[name] for name in coded], mean_bits) if coded else []
    return dict(zip(coded, widths, strict=True))
