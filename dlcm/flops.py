"""Forward FLOPs per token, stage by stage, as closed forms of the configuration.

Conventions: 2 FLOPs per multiply-add; causal attention is counted at half of its L x L products; norms, RoPE,
softmax, embedding look-ups, pooling and the D null slots are left out. A training step is 3 forwards. What happens
once per concept is charged 1 / R per token, with R the *realised* tokens per concept where it is known.

Counted is what the function needs, not what an implementation spends on it: a token reads each concept it may see
once, so cross-attention is half of L x L/R products whatever runs it. What replication adds to that is not credited.
"""

from dataclasses import dataclass

from dlcm.blocks import BlockShape, concept_block_shape, token_block_shape
from dlcm.config import DLCMConfig, LlamaBaselineConfig


@dataclass(frozen=True, slots=True)
class ForwardFlops:
    """FLOPs per token of each stage, in the order of the forward pass."""

    stages: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.stages.values())


def forward_flops(
    config: DLCMConfig | LlamaBaselineConfig, sequence_length: float, tokens_per_concept: float | None = None
) -> ForwardFlops:
    """Forward FLOPs per token for documents of `sequence_length` tokens.

    Args:
        config: of either model.
        sequence_length: tokens in a document (its mean, weighted by tokens, is right for attention too).
        tokens_per_concept: R; None takes the configuration's target. A model without concepts ignores it.
    """
    token_block = _block(token_block_shape(config), sequence_length)
    head = 2 * config.d_token * config.vocab_size
    if isinstance(config, LlamaBaselineConfig):
        return ForwardFlops({"decoder": config.num_layers * token_block, "head": head})

    ratio = config.target_ratio if tokens_per_concept is None else tokens_per_concept
    concept_block = _block(concept_block_shape(config), sequence_length / ratio)
    return ForwardFlops(
        {
            "encoder": config.encoder_layers * token_block,
            "detector": 2 * 2 * config.d_token * config.scan_width if config.segmenter == "learned" else 0,
            "pooling": 2 * config.d_token * config.d_concept / ratio,
            "backbone": config.backbone_layers * concept_block / ratio,
            "cross_attention": 2 * 2 * config.d_token**2
            + 2 * 2 * config.d_concept * token_block_shape(config).kv_width / ratio
            + _attention(config.d_token, sequence_length / ratio),
            "decoder": config.decoder_layers * token_block,
            "head": head,
        }
    )


def _block(shape: BlockShape, length: float) -> float:
    projections = 2 * shape.width**2 + 2 * shape.width * shape.kv_width
    return 2 * (projections + 3 * shape.width * shape.ffn) + _attention(shape.width, length)


def _attention(width: int, keys: float) -> float:
    """Scores and mixing per query, 2 * 2 * width * keys, at half: causality hides every other one of the `keys`."""
    return 2 * width * keys
