"""From concepts to tokens without attention: the newest concept that a token sees, added to its residual stream.

Not in the paper. Cross-attention has to find the newest concept among all; here it is simply there, as a normed
projection, before the first decoder layer or before each. A gate for each channel of each layer begins at zero: the
model begins as the one without.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm.config import DLCMConfig


def injections(config: DLCMConfig) -> int:
    """Before how many decoder layers, from the first on, the newest concept is added."""
    return {"off": 0, "first": 1, "every": config.decoder_layers}[config.injection]


class Injection(nn.Module):
    """x_t + gate_l * norm(W_up z_t), z_t being the newest concept that token t sees; x_t where there is none yet."""

    def __init__(self, config: DLCMConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.up_proj = nn.Linear(config.d_concept, config.d_token, bias=False)
        self.gate = nn.Parameter(torch.zeros(injections(config), config.d_token))

    def forward(self, z_MC: Tensor) -> Tensor:
        """norm(W_up z), (M, C) to (M, E), in fp32 or wider: gradients of a concept are sums over its tokens."""
        projected_ME = self.up_proj(z_MC)
        wide = torch.promote_types(projected_ME.dtype, torch.float32)
        return F.rms_norm(projected_ME.to(wide), projected_ME.shape[-1:], eps=self.eps)

    def enter(self, newest_TE: Tensor, layer: int, x_TE: Tensor) -> Tensor:
        """What a decoder layer gets: the residual stream, with what `forward` made of each token's newest concept."""
        return x_TE + self.gate[layer] * newest_TE if layer < len(self.gate) else x_TE
