"""From tokens to concepts (section 3.3.2, Eq. 7) and between neighbouring concepts (section 3.5.1, Eq. 11).

Instead of the mean of a segment's states, that of its last token may stand for it. Under `inclusive` visibility, where
a boundary ends its segment, this is the boundary token itself, seen from there on: as in H-Net (arXiv 2507.07955),
which says that a chunk begins there.
"""

import torch
from torch import Tensor, nn

from dlcm.config import DLCMConfig
from dlcm.layout import ConceptLayout, PackedLayout


def segment_mean(h_TE: Tensor, layout: ConceptLayout) -> Tensor:
    """Mean of the states of each concept's tokens, (M, E), in fp32 or wider; 0 for a concept of no token.

    A reduction over contiguous segments: no loop, no padding, no atomics. (Differences of a running sum would be
    simpler still, but carry every earlier document's rounding, and its infinities, into this one.)
    """
    h_TE = h_TE.float() if h_TE.dtype.itemsize < 4 else h_TE
    return torch.segment_reduce(h_TE, "mean", lengths=layout.length_M, axis=0, unsafe=True, initial=0)


def segment_sum(h_TE: Tensor, length_G: Tensor) -> Tensor:
    """Sum of the states of each segment, (G, E), in fp32 or wider; segments are neighbours, some may be empty."""
    h_TE = h_TE.float() if h_TE.dtype.itemsize < 4 else h_TE
    return torch.segment_reduce(h_TE, "sum", lengths=length_G, axis=0, unsafe=True, initial=0)


class ConceptPooling(nn.Module):
    """c_k = W_up mean_{t in S_k} h_t (Eq. 7), or W_up h_t of the last t in S_k: (T, E) to (M, C)."""

    def __init__(self, config: DLCMConfig):
        super().__init__()
        self.kind = config.pooling
        self.up_proj = nn.Linear(config.d_token, config.d_concept, bias=False)

    def forward(self, h_TE: Tensor, layout: ConceptLayout) -> Tensor:
        if self.kind == "last":
            return self.project(h_TE.index_select(0, layout.last_M))
        return self.project(segment_mean(h_TE, layout).to(h_TE.dtype))

    def project(self, pooled_ME: Tensor) -> Tensor:
        return self.up_proj(pooled_ME).to(pooled_ME.dtype)  # the backbone's residual stream is as wide as the tokens'


class AdjacentSmoothing(nn.Module):
    """A light causal blend of each concept with its predecessor in the document (Eq. 11 leaves the module open).

    z_k + mix * (z_{k-1} - z_k) with one learned `mix` per channel, zero at the start: smoothing begins as the
    identity, and never looks ahead.
    """

    def __init__(self, config: DLCMConfig):
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(config.d_concept))

    def forward(self, z_MC: Tensor, concepts: PackedLayout, past_DC: Tensor | None = None) -> Tensor:
        """(M, C); a document's concepts may have others before them, of which `past_DC` is the last."""
        previous_MC = torch.where(concepts.is_first_T[:, None], z_MC, concepts.previous(z_MC, past_DC))
        return z_MC + self.mix * (previous_MC - z_MC)


class NoSmoothing(nn.Module):
    """Concepts as the backbone leaves them."""

    def __init__(self, config: DLCMConfig):
        super().__init__()

    def forward(self, z_MC: Tensor, concepts: PackedLayout, past_DC: Tensor | None = None) -> Tensor:
        return z_MC


Smoother = AdjacentSmoothing | NoSmoothing
SMOOTHERS: dict[str, type[Smoother]] = {"adjacent": AdjacentSmoothing, "none": NoSmoothing}
