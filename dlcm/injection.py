"""From concepts to tokens without attention: the newest concept that a token sees, added to its residual stream.

Not in the paper. Cross-attention has to find the newest concept among all; here it is simply there.

    first, every    to all tokens that see it as their newest, as a normed projection, before the first decoder layer or
                    before each. A gate for each channel of each layer begins at zero: the model begins as one without
    closing         to the one token where it comes to be seen, before the first decoder layer, as any layer adds to a
                    residual stream; decoder attention takes it to later tokens. Under `inclusive` visibility with
                    `last` states this is the global block of SpaceByte (arXiv 2404.14408): where a segment ends, a
                    token passes through all layers, elsewhere through those of encoder and decoder
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm.config import DLCMConfig


def injections(config: DLCMConfig) -> int:
    """Before how many decoder layers, from the first on, the newest concept is added through a gate."""
    return {"off": 0, "first": 1, "every": config.decoder_layers, "closing": 0}[config.injection]


class Injection(nn.Module):
    """x_t + gate_l * norm(W_up z_t), z_t being the newest concept that token t sees; x_t where there is none yet.

    Of `closing`: x_t + W_up z_t where t is the first to see z_t, else x_t.
    """

    def __init__(self, config: DLCMConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.up_proj = nn.Linear(config.d_concept, config.d_token, bias=False)
        self.gate = None
        if config.injection != "closing":
            self.gate = nn.Parameter(torch.zeros(injections(config), config.d_token))

    def forward(self, z_MC: Tensor) -> Tensor:
        """norm(W_up z), (M, C) to (M, E), in fp32 or wider: gradients of a concept are sums over its tokens.

        Of `closing`, W_up z, of one token each.
        """
        projected_ME = self.up_proj(z_MC)
        wide = torch.promote_types(projected_ME.dtype, torch.float32)
        if self.gate is None:
            return projected_ME.to(wide)
        return F.rms_norm(projected_ME.to(wide), projected_ME.shape[-1:], eps=self.eps)

    def seen_by(self, newest_TE: Tensor, first_T: Callable[[], Tensor]) -> Tensor:
        """What each token gets of its newest concept; `first_T` says, if it matters, which are the first to see it."""
        return newest_TE if self.gate is not None else newest_TE.masked_fill(~first_T()[:, None], 0)

    def enter(self, newest_TE: Tensor, layer: int, x_TE: Tensor) -> Tensor:
        """What a decoder layer gets: the residual stream, with what `forward` made of each token's newest concept."""
        if self.gate is None:
            return x_TE + newest_TE if layer == 0 else x_TE
        return x_TE + self.gate[layer] * newest_TE if layer < len(self.gate) else x_TE
