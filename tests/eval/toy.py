"""A model whose probabilities are known: what follows a byte depends on that byte alone, and stands in a table."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dlcm import LlamaBaselineConfig, LlamaBaselineForCausalLM
from train.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
WIDTH = 264  # one state for each of the 258 ids, and heads of even width
LARGE = 1e4  # beside which the norm's epsilon is nothing


@torch.no_grad()
def bigram_model(probability_VV: Tensor, positions: int = 64) -> LlamaBaselineForCausalLM:
    """A baseline in float64 with p(next | last) = probability_VV[last, next]."""
    config = LlamaBaselineConfig(
        vocab_size=len(BYTES),
        d_token=WIDTH,
        token_heads=4,
        token_ffn=8,
        num_layers=1,
        max_position_embeddings=positions,
        mup_base_width=None,
    )
    model = LlamaBaselineForCausalLM(config).double().eval()
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)  # all that blocks add is nothing
    model.embed_tokens.weight.fill_diagonal_(LARGE)
    model.lm_head.weight[:, : len(BYTES)] = probability_VV.log().T / math.sqrt(WIDTH)  # the norm of a state
    return model


def random_table(seed: int = 0) -> Tensor:
    """(V, V) probabilities that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(BYTES), len(BYTES), generator=generator, dtype=torch.float64).mul(2).softmax(1)


def uniform_table() -> Tensor:
    return torch.full((len(BYTES), len(BYTES)), 1 / len(BYTES), dtype=torch.float64)


def log_likelihood(probability_VV: Tensor, before: int, ids: Sequence[int]) -> float:
    """Of tokens that follow the token `before`, in nats."""
    steps = zip([before, *ids], ids, strict=False)
    return math.fsum(math.log(probability_VV[last, token]) for last, token in steps)
