"""Decoupled muP (section 6.1): every parameter has a role; the role gives its initialisation and its optimiser group.

Token width and concept width grow independently: s_token = d_token / d_base, s_concept = d_concept / d_base. For
a matrix whose *fan-in* has width multiplier s: init variance sigma_base^2 / s, learning rate eta_base / s, AdamW
epsilon eps_base / s. Mixed-width matrices follow their fan-in, so W_up (token to concept) scales with s_token, and
the keys and values of cross-attention (concept to token heads) with s_concept. Embedding and unembedding keep their
variance and rate, logits are multiplied by 1 / s_token; vectors (norm gains, the null slot, smoothing) keep both.

The paper leaves sigma_base open. 1 / sqrt(d_base), unless a configuration says otherwise, lets matrices keep the scale
of what they multiply, at every width, and embeddings have unit variance, and a rate that is larger in the same
proportion unless it is given. With 0.02 throughout, which suits widths of some 2,500, the first layers of a narrow
model add up what hardly depends on the token, and its loss stays on a plateau for hundreds of steps, the longer the
more layers there are.

Roles follow from parameter *names* alone, so they survive torch.compile, data-parallel wrapping and sharding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn
from transformers import initialization as init

from dlcm.config import DLCMConfig, TokenBlocksConfig

RateGroup = Literal["token", "concept", "boundary", "embedding", "other"]
Initialisation = Literal["normal", "small_normal", "unit_normal", "identity", "ones", "zeros"]


@dataclass(frozen=True, slots=True)
class Role:
    """What a parameter is.

    Attributes:
        name: names the optimiser group.
        rate: which base learning rate applies.
        fan_in: which width multiplier applies: of the tokens, of the concepts, or none.
        initialisation: `normal` has standard deviation initializer_range / sqrt(s), `small_normal` its square at s = 1.
        decays: whether weight decay applies.
    """

    name: str
    rate: RateGroup
    fan_in: Literal["token", "concept"] | None
    initialisation: Initialisation = "normal"
    decays: bool = True

    def width_multiplier(self, config: TokenBlocksConfig) -> float:
        if self.fan_in == "concept":
            assert isinstance(config, DLCMConfig)
            return config.concept_width_multiplier
        return config.token_width_multiplier if self.fan_in == "token" else 1.0


EMBEDDING = Role("embedding", "embedding", None, "unit_normal", decays=False)
UNEMBEDDING = Role("unembedding", "other", None, "small_normal")  # so that the loss begins at that of a guess
TOKEN_MATRIX = Role("token_matrix", "token", "token")
CONCEPT_MATRIX = Role("concept_matrix", "concept", "concept")
# W_q = W_k = 1 at the start makes p the distance of neighbouring encoder states, so that boundaries begin meaningful.
# The ratio loss pushes every p the same way; at the rate of other matrices W_q and W_k answer it by squeezing all p
# together, where the threshold cuts noise. A rate 10 to 30 times lower keeps p spread out.
BOUNDARY_MATRIX = Role("boundary_matrix", "boundary", "token", "identity", decays=False)
GAIN = Role("gain", "other", None, "ones", decays=False)
SMOOTHING = Role("smoothing", "other", None, "zeros", decays=False)
# Paths that begin at zero: a gate for each channel behind a matrix drawn as usual, or the matrix itself.
GATE = Role("gate", "other", None, "zeros", decays=False)
SKIP_MATRIX = Role("skip_matrix", "token", "token", "zeros")
BIT_DEPTH = Role("bit_depth", "other", None, "ones", decays=False)
EXPONENT = Role("exponent", "other", None, "zeros", decays=False)
NULL_SLOT = Role("null_slot", "other", None, "unit_normal", decays=False)

# The first pattern that matches a parameter's name decides. (Later cross-attentions are those of
# `later_cross_attention.*`.)
ROLES: tuple[tuple[str, Role], ...] = (
    ("embed_tokens.weight", EMBEDDING),
    ("lm_head.weight", UNEMBEDDING),
    ("*norm.weight", GAIN),
    ("smoothing.mix", SMOOTHING),
    ("*cross_attention*.null_slot", NULL_SLOT),
    ("*cross_attention*.gate", GATE),
    ("injection.gate", GATE),
    ("skip_proj.weight", SKIP_MATRIX),
    ("injection.up_proj.weight", CONCEPT_MATRIX),
    ("detector.?_proj.weight", BOUNDARY_MATRIX),
    ("pooling.up_proj.weight", TOKEN_MATRIX),
    ("*cross_attention*.q_proj.weight", TOKEN_MATRIX),
    ("*cross_attention*.o_proj.weight", TOKEN_MATRIX),
    ("*cross_attention*.[kv]_proj.weight", CONCEPT_MATRIX),
    ("backbone.layers.*_proj.weight", CONCEPT_MATRIX),
    ("encoder.layers.*_proj.weight", TOKEN_MATRIX),
    ("decoder.layers.*_proj.weight", TOKEN_MATRIX),
    ("*_proj.depth", BIT_DEPTH),
    ("*_proj.exponent", EXPONENT),
)
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def role_of(name: str) -> Role:
    """The role of the parameter called `name`, whatever wrappers have added to the name.

    Raises:
        KeyError: no pattern of `ROLES` matches: a new parameter needs a line there.
    """
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    for pattern, role in ROLES:
        if fnmatchcase(name, pattern):
            return role
    raise KeyError(f"parameter '{name}' has no muP role: add a pattern for it to dlcm.mup.ROLES")


@torch.no_grad()
def initialize_(model: nn.Module, config: TokenBlocksConfig) -> None:
    """Draws every parameter by its role (parameters already loaded from a checkpoint are left alone)."""
    for name, parameter in model.named_parameters():
        role = role_of(name)
        match role.initialisation:
            case "normal":
                init.normal_(parameter, std=config.sigma_base / role.width_multiplier(config) ** 0.5)
            case "small_normal":
                init.normal_(parameter, std=config.sigma_base**2)
            case "unit_normal":
                init.normal_(parameter, std=1.0)
            case "identity":
                init.copy_(parameter, torch.eye(*parameter.shape, device=parameter.device))
            case "ones":
                init.ones_(parameter)
            case "zeros":
                init.zeros_(parameter)


def parameter_groups(
    named_parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    config: TokenBlocksConfig,
    *,
    lr_token: float,
    lr_concept: float | None,
    lr_boundary: float | None,
    lr_other: float,
    lr_embedding: float | None = None,
    eps: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for `torch.optim.AdamW`, one per role, with the learning rate and epsilon that section 6.1 gives it.

    AdamW shrinks weights by lr * weight_decay a step; since lr falls as 1 / s, weight_decay grows as s, so that
    the time constant of the decay does not depend on width.

    Args:
        named_parameters: a model (wrapped or not), or its named parameters.
        config: the model's configuration.
        lr_token, lr_concept, lr_boundary, lr_other: base learning rates of token matrices, concept matrices, the
            boundary detector's projections, and the rest; None where the model has no such parameters.
        lr_embedding: of the embedding. None: lr_other / initializer_range, for its variance is 1 and not sigma_base^2.
        eps, weight_decay: base values.

    Raises:
        KeyError: a parameter without a role.
        ValueError: the model has parameters whose rate is None.
    """
    if isinstance(named_parameters, nn.Module):
        named_parameters = named_parameters.named_parameters()
    if lr_embedding is None:
        lr_embedding = lr_other / config.sigma_base
    rates = {"token": lr_token, "concept": lr_concept, "boundary": lr_boundary, "embedding": lr_embedding}
    rates["other"] = lr_other
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        role = role_of(name)
        rate = rates[role.rate]
        if rate is None:
            raise ValueError(f"parameter '{name}' needs lr_{role.rate}, which is None")
        s = role.width_multiplier(config)
        group = {"lr": rate / s, "eps": eps / s, "weight_decay": weight_decay * s if role.decays else 0.0}
        groups.setdefault(role.name, {"name": role.name, "params": [], **group})["params"].append(parameter)
    return list(groups.values())
