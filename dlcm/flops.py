"""What the models cost, stage by stage, as closed forms of the configuration: parameters, FLOPs, bytes.

Conventions, stated once:

- 2 FLOPs per multiply-add; matrix products alone. Norms, RoPE, softmax, SwiGLU's elementwise part, embedding look-ups,
  pooling, the D null slots and the optimiser are left out.
- Causal attention over a document of L tokens is counted at half of its L x L products, in training and prefill: a
  token reads L / 2 others. Of these, a window of w < L leaves w - w^2 / (2 L). A decoded token reads all that is before
  it, or w of them.
- A backward pass costs two forwards.
- What happens once per concept is charged 1 / R per token, R being the *realised* tokens per concept where it is known,
  else the configuration's target.
- Of a model that self-compression has made narrower, counted is what is left: of parameters and FLOPs. Activations and
  caches are those of the start.
- Counted is what the function needs, not what an implementation spends on it: a token reads each concept that it may
  see once, whatever runs it. `replicated` and `recompute` say what those implementations spend.

Lengths: attention alone depends on L, and linearly. So documents of several lengths cost what documents of one do, the
mean weighted by tokens (`weighted_length`). In blocks with a window they cost what documents of another length do in
blocks without: `weighted_length` knows it too.

Legend: W a stage's width, F its SwiGLU width, KV its key-value width, E = d_token, C = d_concept, L tokens of a
document, R tokens per concept.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dlcm.blocks import BlockShape, concept_block_shape, token_block_shape
from dlcm.config import DLCMConfig, LlamaBaselineConfig
from dlcm.injection import injections

Config = DLCMConfig | LlamaBaselineConfig
FORWARDS_PER_STEP = 3
STACKS = ("encoder", "backbone", "decoder")  # of blocks
TABLES = ("embedding", "head")  # stages that N, the size of a model, leaves out
FULL, HALF = 4, 2  # bytes of a number in fp32 and in bf16


@dataclass(frozen=True, slots=True)
class ByStage:
    """A cost of each stage, in the order of the forward pass."""

    stages: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.stages.values())


def weighted_length(lengths: Iterable[float], window: int | None = None) -> float:
    """Mean length of documents, weighted by tokens: sum l^2 / sum l.

    With a window, the length at which attention without one costs as much.
    """
    lengths = list(lengths)
    return squared_lengths(lengths, window) / sum(lengths)


def squared_lengths(lengths: Sequence[float], window: int | None = None) -> float:
    """The sum above: twice the pairs of tokens that attend; a window leaves out those of what is further back."""
    beyond = 0 if window is None else sum(max(length - window, 0) ** 2 for length in lengths)
    return sum(length**2 for length in lengths) - beyond


class Keys(NamedTuple):
    """How many others a token reads on average, in token-level blocks without a window and in those with one."""

    everywhere: float
    in_window: float

    def of(self, window: int | None) -> float:
        return self.everywhere if window is None else self.in_window


# Parameters


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of each stage; a final norm belongs to the stage it ends, smoothing to the backbone, and all
    cross-attentions are one stage.
    """
    counts = _counts_at_the_start(config)
    for name in config.channels_left or {}:
        counts[_stage(name)] -= _removed_parameters(config, name)
    return counts


def _counts_at_the_start(config: Config) -> dict[str, int]:
    token = token_block_shape(config)
    table = config.vocab_size * config.d_token
    if isinstance(config, LlamaBaselineConfig):
        return {
            "embedding": table,
            "decoder": config.num_layers * _block_parameters(token) + config.d_token,
            "head": table,
        }
    concept = concept_block_shape(config)
    smoothing = config.d_concept if config.smoothing == "adjacent" else 0
    cross = 2 * config.d_token**2 + 2 * config.d_concept * token.kv_width  # queries and output, keys and values
    cross += config.d_token + config.d_concept + 2 * token.head_dim  # norms, and the null slot
    if config.clean_start:
        cross += config.d_token  # the gate
    cross += 2 * 2 * config.groups(config.d_token, config.d_token)
    cross += 2 * 2 * config.groups(token.kv_width, config.d_concept)
    return {
        "embedding": table,
        "encoder": config.encoder_layers * _block_parameters(token) + (config.d_token if config.clean_start else 0),
        "detector": 2 * config.d_token * config.scan_width if config.segmenter == "learned" else 0,
        "pooling": config.d_token * config.d_concept,
        "backbone": config.backbone_layers * _block_parameters(concept) + config.d_concept + smoothing,
        "cross_attention": config.num_cross_attentions * cross,
        **_options(config, skip=config.d_token**2, injection=config.d_token * (config.d_concept + injections(config))),
        "decoder": config.decoder_layers * _block_parameters(token) + config.d_token,
        "head": table,
    }


def _options(config: DLCMConfig, skip: float, injection: float) -> dict[str, Any]:
    """Costs of stages that few models have: the others do not list them."""
    return ({"skip": skip} if config.clean_start else {}) | (
        {"injection": injection} if config.injection != "off" else {}
    )


def _block_parameters(shape: BlockShape) -> int:
    norms = 2 * shape.width + (2 * shape.head_dim if shape.config.qk_norm else 0)
    return _block_products(shape) + norms + _bit_parameters(shape)


def _bit_parameters(shape: BlockShape) -> int:
    """Bit depths and exponents of a block's seven matrices, where it learns any (see `dlcm.selfcompress`)."""
    groups, width = shape.config.groups, shape.width
    attention = 2 * groups(width, width) + 2 * groups(shape.kv_width, width)
    return 2 * (attention + 2 * groups(shape.ffn, width) + groups(width, shape.ffn))


def rounded_weights(config: Config) -> dict[str, int]:
    """Weights of blocks and cross-attention before any were removed, by child of the model."""
    weights = {stage: layers * _block_products(_shape_of(config, stage)) for stage, layers in config.layers().items()}
    if isinstance(config, DLCMConfig):
        cross = 2 * config.d_token**2 + 2 * config.d_concept * token_block_shape(config).kv_width
        if config.cross_attention:
            weights["cross_attention"] = cross
        if config.num_cross_attentions > 1:
            weights["later_cross_attention"] = (config.num_cross_attentions - 1) * cross
    return weights


def _block_products(shape: BlockShape) -> int:
    """Parameters that are multiplied with a token: 2 W^2 + 2 W KV + 3 W F."""
    return 2 * shape.width**2 + 2 * shape.width * shape.kv_width + 3 * shape.width * shape.ffn


# Removal (see `dlcm.selfcompress.removal`), which takes a part of few sublayers: it is subtracted, name by name.


def _stage(name: str) -> str:
    """That of a sublayer."""
    return name.partition(".")[0].removeprefix("later_")


def _shape_of(config: Config, name: str) -> BlockShape:
    if isinstance(config, DLCMConfig) and _stage(name) == "backbone":
        return concept_block_shape(config)
    return token_block_shape(config)


def _matrices(config: Config, name: str, left: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of a sublayer's matrices, of so many channels; none of one that is not there."""
    channels, width = sum(left), _shape_of(config, name).width
    if channels == 0:
        return []
    if name.endswith("ffn"):
        return [(channels, width), (channels, width), (width, channels)]
    begins = config.sublayer(name)
    read = config.d_concept if isinstance(config, DLCMConfig) and _stage(name) == "cross_attention" else width
    return [(width, width), (sum(begins.channels), read), (channels, read), (width, channels * begins.shared)]


def _removed(config: Config, name: str, cost: Callable[[int, int], float]) -> float:
    """What the matrices of a sublayer cost less than at the start, each by its rows and columns."""
    assert config.channels_left is not None
    before, after = (_matrices(config, name, x) for x in (config.sublayer(name).channels, config.channels_left[name]))
    return sum(cost(*matrix) for matrix in before) - sum(cost(*matrix) for matrix in after)


def _gone(config: Config, name: str) -> bool:
    return not any((config.channels_left or {})[name])


def _removed_parameters(config: Config, name: str) -> int:
    shape, norms = _shape_of(config, name), 0
    if _gone(config, name):
        norms = shape.width + (2 * shape.head_dim if name.endswith("attention") and config.qk_norm else 0)
    return norms + int(_removed(config, name, lambda rows, columns: rows * columns + 2 * config.groups(rows, columns)))


def _removed_flops(config: Config, name: str, keys: Keys, ratio: float) -> float:
    """Of one token."""
    if _stage(name) == "cross_attention":
        assert isinstance(config, DLCMConfig) and config.channels_left is not None
        begins, left = config.sublayer(name), sum(config.channels_left[name])
        return 2 * (sum(begins.channels) - left) * (config.d_concept / ratio + config.d_token * begins.shared)
    rows, shape = 1 / ratio if _stage(name) == "backbone" else 1.0, _shape_of(config, name)
    flops = 2 * _removed(config, name, lambda height, width: height * width)
    if name.endswith("attention") and _gone(config, name):
        window = config.windows(_stage(name))[int(name.split(".")[2])]
        flops += _attention_flops(shape.width, keys.of(window) * rows)
    return flops * rows


# FLOPs


def forward_flops(
    config: Config,
    sequence_length: float,
    tokens_per_concept: float | None = None,
    *,
    replicated: bool = False,
    windowed_length: float | None = None,
) -> ByStage:
    """Forward FLOPs per token for documents of `sequence_length` tokens.

    Args:
        config: of either model.
        sequence_length: L.
        tokens_per_concept: R; None takes the configuration's target. A model without concepts ignores it.
        replicated: count cross-attention as concept replication runs it (Eq. 17): over L keys instead of L / R.
        windowed_length: of documents of several lengths, `weighted_length` with the configuration's window; None: all
            have L tokens.
    """
    keys = _mean_keys(config, sequence_length, windowed_length)
    return _flops(config, keys, tokens_per_concept, heads_per_token=1, replicated=replicated)


def training_flops(
    config: Config, sequence_length: float, tokens_per_concept: float | None = None, *, recompute: bool = False
) -> ByStage:
    """FLOPs per token of forward and backward: three forwards.

    Args:
        config, sequence_length, tokens_per_concept: see `forward_flops`.
        recompute: count blocks once more, as activation checkpointing runs them. MFU leaves that out.
    """
    forward = forward_flops(config, sequence_length, tokens_per_concept).stages
    again = {stage: FORWARDS_PER_STEP + (recompute and stage in STACKS) for stage in forward}
    return ByStage({stage: again[stage] * flops for stage, flops in forward.items()})


def prefill_flops(config: Config, prompt: int, tokens_per_concept: float | None = None) -> ByStage:
    """FLOPs of a whole prompt of so many tokens: a forward pass with the head at the last token alone."""
    per_token = _flops(config, _mean_keys(config, prompt), tokens_per_concept, heads_per_token=1 / prompt)
    return ByStage({stage: prompt * flops for stage, flops in per_token.stages.items()})


def decode_flops(config: Config, context: int, tokens_per_concept: float | None = None) -> ByStage:
    """FLOPs of one more token after `context` others, with a cache; the backbone's are spread over R tokens."""
    return _flops(
        config, Keys(context, entries_read(context, config.token_window)), tokens_per_concept, heads_per_token=1
    )


def entries_read(context: int, window: int | None) -> int:
    """Of so many that a block's cache has, what a decoded token reads."""
    return context if window is None else min(context, window)


def _mean_keys(config: Config, length: float, windowed_length: float | None = None) -> Keys:
    """Of a causal pass over documents of a length, and of another within the window, if that is not the same."""
    if windowed_length is None:
        windowed_length = weighted_length([length], config.token_window) if length else 0.0
    return Keys(length / 2, windowed_length / 2)


def _flops(
    config: Config, keys: Keys, tokens_per_concept: float | None, heads_per_token: float, replicated: bool = False
) -> ByStage:
    """Of one token."""
    stages = _flops_at_the_start(config, keys, tokens_per_concept, heads_per_token, replicated)
    ratio = _ratio(config, tokens_per_concept) if isinstance(config, DLCMConfig) else 1.0
    for name in config.channels_left or {}:
        stages[_stage(name)] -= _removed_flops(config, name, keys, ratio)
    return ByStage(stages)


def _flops_at_the_start(
    config: Config, keys: Keys, tokens_per_concept: float | None, heads_per_token: float, replicated: bool
) -> dict[str, float]:
    token = token_block_shape(config)
    head = 2 * config.d_token * config.vocab_size * heads_per_token
    if isinstance(config, LlamaBaselineConfig):
        return {"decoder": _stack_flops(config, "decoder", token, keys), "head": head}
    ratio = _ratio(config, tokens_per_concept)
    concepts = keys.everywhere / ratio
    cross_keys = keys.everywhere if replicated else concepts
    return {
        "encoder": _stack_flops(config, "encoder", token, keys),
        "detector": 2 * 2 * config.d_token * config.scan_width if config.segmenter == "learned" else 0,
        "pooling": 2 * config.d_token * config.d_concept / ratio,
        "backbone": config.backbone_layers * _block_flops(concept_block_shape(config), concepts) / ratio,
        "cross_attention": config.num_cross_attentions
        * (
            2 * 2 * config.d_token**2
            + 2 * 2 * config.d_concept * token.kv_width / ratio
            + _attention_flops(config.d_token, cross_keys)
        ),
        **_options(config, skip=2 * config.d_token**2, injection=2 * config.d_token * config.d_concept / ratio),
        "decoder": _stack_flops(config, "decoder", token, keys),
        "head": head,
    }


def _stack_flops(config: Config, stage: str, shape: BlockShape, keys: Keys) -> float:
    """Of the blocks of a stage at token level."""
    windows = config.windows(stage)
    without = windows.count(None)
    flops = without * _block_flops(shape, keys.everywhere)
    return flops + (len(windows) - without) * _block_flops(shape, keys.in_window)


def _block_flops(shape: BlockShape, keys: float) -> float:
    return 2 * _block_products(shape) + _attention_flops(shape.width, keys)


def _attention_flops(width: int, keys: float) -> float:
    """Scores and mixing of one query: 2 products of `width` multiply-adds with every key."""
    return 2 * 2 * width * keys


def _ratio(config: DLCMConfig, tokens_per_concept: float | None) -> float:
    return config.target_ratio if tokens_per_concept is None else tokens_per_concept


# Bytes


class TrainingMemory(NamedTuple):
    """Bytes on one device in training: fp32 parameters and AdamW, bf16 autocast, compiled blocks, chunked head."""

    parameters: float
    gradients: float
    optimiser: float
    activations: float  # kept from forward to backward, with what one recomputed block needs
    head: float  # one chunk of logits, and the gradients of head and hidden states
    accumulates: bool

    @property
    def peak(self) -> float:
        """Gradients appear as activations go, unless those of an earlier micro-batch are there from the start."""
        fixed = self.parameters + self.optimiser
        passing = self.activations + self.head
        return fixed + (self.gradients + passing if self.accumulates else max(self.gradients, passing))


def training_memory(
    config: Config,
    tokens: int,
    tokens_per_concept: float | None = None,
    *,
    recompute: bool = False,
    accumulates: bool = False,
    head_chunk: int = 4096,
) -> TrainingMemory:
    """Closed form of a training step's memory for `tokens` in a micro-batch.

    A block keeps, per token: its input, the residual between attention and SwiGLU (fp32), and in bf16 what products
    read: two normed inputs, queries, keys, values, what attention returns, gate, up, and their product. So
    4 (2 W) + 2 (2 W + W + 2 KV + W) + 2 (3 F) bytes. Recomputed, it keeps its input. Between the stacks of a DLCM some
    ten tensors of token width are kept; each later cross-attention adds its input (fp32), and in bf16 that normed,
    queries before and after their norm, what they read (and what the gate multiplies), slots, keys likewise, values,
    none of it recomputed. Small things (statistics of norms and softmax, workspaces) are left out.

    Args:
        config: of either model.
        tokens: T.
        tokens_per_concept: R; None takes the configuration's target.
        recompute: activation checkpointing of every block.
        accumulates: whether a step has several micro-batches.
        head_chunk: tokens whose logits are there at once.
    """
    number = sum(parameter_counts(config).values())
    token, depth = token_block_shape(config), getattr(config, "num_layers", 0)
    stacks: list[tuple[BlockShape, int, float]] = [(token, depth, tokens)]
    between = 0.0
    if isinstance(config, DLCMConfig):
        concepts = tokens / _ratio(config, tokens_per_concept)
        stacks = [(token, config.encoder_layers + config.decoder_layers, tokens)]
        stacks.append((concept_block_shape(config), config.backbone_layers, concepts))
        later_by_token = FULL * config.d_token + HALF * (4 + config.clean_start) * config.d_token
        later_by_concept = HALF * (config.d_concept + 3 * token.kv_width)
        between = 10 * FULL * config.d_token * tokens
        between += max(config.num_cross_attentions - 1, 0) * (tokens * later_by_token + concepts * later_by_concept)
    whole = [rows * _block_activation_bytes(shape) for shape, _, rows in stacks]
    if recompute:
        kept = sum(layers * rows * FULL * shape.width for shape, layers, rows in stacks) + max(whole)
    else:
        kept = sum(layers * each for (_, layers, _), each in zip(stacks, whole, strict=True))
    table = config.vocab_size * config.d_token
    return TrainingMemory(
        parameters=FULL * number,
        gradients=FULL * number,
        optimiser=2 * FULL * number,
        activations=kept + between,
        head=HALF * config.vocab_size * min(head_chunk, tokens)
        + (HALF + FULL) * table
        + FULL * config.d_token * tokens,
        accumulates=accumulates,
    )


def _block_activation_bytes(shape: BlockShape) -> float:
    in_full = 2 * shape.width
    in_half = 4 * shape.width + 2 * shape.kv_width + 3 * shape.ffn
    return FULL * in_full + HALF * in_half


def cache_bytes_per_token(config: Config, tokens_per_concept: float | None = None, *, number: int = HALF) -> ByStage:
    """Bytes of keys and values that decoding keeps per token of context, windows or not.

    Args:
        config: of either model.
        tokens_per_concept: R; None takes the configuration's target.
        number: bytes of one number.
    """
    pair = 2 * number * token_block_shape(config).kv_width
    if isinstance(config, LlamaBaselineConfig):
        return ByStage({"decoder": config.num_layers * pair})
    ratio = _ratio(config, tokens_per_concept)
    concept_pair = 2 * number * concept_block_shape(config).kv_width
    return ByStage(
        {
            "encoder": config.encoder_layers * pair,
            "backbone": config.backbone_layers * concept_pair / ratio,
            "cross_attention": config.num_cross_attentions * pair / ratio,
            "decoder": config.decoder_layers * pair,
        }
    )


def decode_bytes(
    config: Config, context: int, batch: int = 1, tokens_per_concept: float | None = None, *, number: int = HALF
) -> ByStage:
    """Bytes read per decoded token: a share of the weights, which one step of a batch reads once, and the cache, of
    which blocks with a window read its last entries.

    Pooling, backbone and the keys and values of cross-attention are read in steps where a segment closes in at least
    one row: in a share 1 - (1 - 1/R)^batch of them, if rows close independently. Activations are left out.

    Args:
        config: of either model.
        context: tokens before this one, in each row.
        batch: rows that are decoded together.
        tokens_per_concept: R; None takes the configuration's target.
        number: bytes of one number, of weights and cache.
    """
    weights: dict[str, float] = {stage: number * count for stage, count in parameter_counts(config).items()}
    weights["embedding"] = number * config.d_token * batch  # a row of the table for each
    cache = dict(cache_bytes_per_token(config, tokens_per_concept, number=number).stages)
    if isinstance(config, DLCMConfig):
        ratio = _ratio(config, tokens_per_concept)
        closing = 1 - (1 - 1 / ratio) ** batch
        by_concept = 2 * number * config.num_cross_attentions * config.d_concept * token_block_shape(config).kv_width
        weights["cross_attention"] += (closing - 1) * by_concept
        for stage in {"pooling", "backbone", "injection"} & weights.keys():
            weights[stage] *= closing
        cache["backbone"] /= ratio  # which reads its cache once per concept
    read = dict.fromkeys(cache, float(context))
    for stage in config.layers():
        windows = config.windows(stage)
        read[stage] = sum(entries_read(context, window) for window in windows) / len(windows)
    return ByStage({x: weight / batch + read.get(x, 0.0) * cache.get(x, 0.0) for x, weight in weights.items()})
