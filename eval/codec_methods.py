"""The methods that the codec is compared with, and the codec, by the names that tables give them.

    RTN g128                  rounding to nearest in groups of 128; with `clip search`, over a part of each range
    GPTQ g128, clip search    the same grids, filled with an eye to what the layer reads
    x264, x265, entropy ..    a backend of dlcm.codec; `rotated`, with both sides of the matrix rotated

A backend's `shuffled` codes the entries of each row in random order and puts them back: what is gained then is no merit
of intra prediction and transforms.
"""

from torch import Tensor

from dlcm.codec import BACKENDS, Quantised, compress, decompress, gptq, round_to_nearest, shuffled, unshuffled
from dlcm.codec.tensor import Transform

ROUNDING, CLIPPED, GPTQ = "RTN g128", "RTN g128, clip search", "GPTQ g128, clip search"
ROUNDERS = (ROUNDING, CLIPPED, GPTQ)  # take whole bits, and scales beside them
ROTATED, SHUFFLED = ", rotated", ", shuffled"


def code(method: str, x: Tensor, bits: float, hessian_II: Tensor | None = None) -> Quantised:
    """A tensor after a method, and the bits it took: at most `bits`, or, of rounders, scales beside so many.

    Args:
        hessian_II: of the layer's inputs, which GPTQ asks for; what has none, as an embedding, is rounded to nearest.

    Raises:
        CodecError: see `compress`.
    """
    if method == GPTQ and hessian_II is not None:
        return gptq(x, hessian_II, int(bits), clip_search=True)
    if method in ROUNDERS:
        return round_to_nearest(x, int(bits), clip_search=method != ROUNDING)
    if method.endswith(SHUFFLED):
        mixed = code(method.removesuffix(SHUFFLED), shuffled(x), bits)
        return Quantised(unshuffled(mixed.tensor), mixed.bits)
    transform: Transform = "hadamard" if method.endswith(ROTATED) else "none"
    backend = next(name for name in BACKENDS if name == method.removesuffix(ROTATED))
    blob = compress(x, bits=bits, backend=backend, transform=transform)
    return Quantised(decompress(blob), blob.bits)
