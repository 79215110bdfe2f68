"""LLM.265: tensors through video codecs (Xu et al., MICRO 2025, DOI 10.1145/3725843.3756078), and what they must beat.

    blob = compress(weight, bits=3.15, backend="x264")
    again = decompress(blob)

A tensor is scaled by its deviation, rounded to 10-bit samples, laid out as grey pictures, and coded as a video of
intra frames; what is far out is kept exactly beside it. The `entropy` backend is the control: a uniform quantiser and
a range coder, no codec. Bits are always those of all bytes, headers and outliers included.

Needs `pip install 'dlcm[codec]'`: PyAV, whose wheels bring x264 and x265 (GPL), and constriction.
"""

from dlcm.codec.allocation import allocate
from dlcm.codec.baselines import Quantised, gptq, round_to_nearest, shuffled, unshuffled
from dlcm.codec.blob import Blob, BudgetUnused, CodecError
from dlcm.codec.container import Container, save
from dlcm.codec.past import OldBlocks
from dlcm.codec.state import compress_state
from dlcm.codec.tensor import (
    BACKENDS,
    TRANSFORMS,
    compress,
    decompress,
    deviation,
    rate_distortion,
    relative_mse,
    store,
)

__all__ = [
    "BACKENDS",
    "TRANSFORMS",
    "Blob",
    "BudgetUnused",
    "CodecError",
    "Container",
    "OldBlocks",
    "Quantised",
    "allocate",
    "compress",
    "compress_state",
    "decompress",
    "deviation",
    "gptq",
    "rate_distortion",
    "relative_mse",
    "round_to_nearest",
    "save",
    "shuffled",
    "store",
    "unshuffled",
]
