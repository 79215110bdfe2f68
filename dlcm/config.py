"""Model configurations, checked before anything is allocated.

`DLCMConfig` holds the choices of the paper's section 3 and Table 3; `LlamaBaselineConfig` the same token
blocks without concepts. Both are `transformers` configurations: they save to and load from `config.json`,
and a key that is not a field is an error.
"""

import copy
import difflib
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

Segmenter = Literal["learned", "rule", "fixed", "words"]
Visibility = Literal["closed", "inclusive"]
Smoothing = Literal["adjacent", "none"]
ParserScope = Literal["global", "sequence"]
AttentionBackend = Literal["auto", "flash_attn", "flash_attn_4", "torch_varlen", "sdpa"]
CrossAttentionBackend = Literal["auto", "ragged", "replicated", "masked"]
SlotWeighting = Literal["replication", "uniform"]
Injection = Literal["off", "first", "every", "closing"]
Pooling = Literal["mean", "last"]
Quantiser = Literal["none", "bits", "ternary"]


Config = TypeVar("Config", bound=PreTrainedConfig)


def checked(config_class: type[Config]) -> type[Config]:
    """`strict` validation whose errors are the validator's own line, and which takes 4 for 4.0."""
    config_class = strict(config_class)
    strict_init = config_class.__init__
    fractions = {field.name for field in fields(config_class) if field.type in (float, float | None)}

    @functools.wraps(strict_init)
    def __init__(self: Config, **kwargs: Any) -> None:
        for name in fractions & kwargs.keys():
            if type(kwargs[name]) is int:
                kwargs[name] = float(kwargs[name])
        try:
            strict_init(self, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__)) from error

    config_class.__init__ = __init__  # type: ignore[assignment]
    return config_class


class Sublayer(NamedTuple):
    """What an attention or a SwiGLU begins with, before removal makes it narrower (see selfcompress/removal.py).

    Attributes:
        channels: of the values of each key-value head, or hidden units, (F,).
        shared: query heads that read a value; 1 for a SwiGLU.
        may_go: whether it can be left out altogether.
    """

    channels: tuple[int, ...]
    shared: int = 1
    may_go: bool = True


@checked
class TokenBlocksConfig(PreTrainedConfig):
    """What both models share: vocabulary, token-width Transformer blocks, initialisation, attention backend."""

    vocab_size: int = 32768
    d_token: int = 512
    token_heads: int = 8
    token_kv_heads: int | None = None  # None: as many as token_heads
    token_ffn: int = 1536  # SwiGLU width
    qk_norm: bool = False  # RMSNorm on queries and keys of self-attention (LLaMA has none)
    token_window: int | None = None  # tokens that a token sees in self-attention, itself included; None: all before it
    max_position_embeddings: int = 2048  # longest document, in tokens
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float | None = None  # sigma_base of section 6.1. None: 1 / sqrt(d_base), see mup.py
    mup_base_width: int | None = 256  # d_base of section 6.1; None is the standard parametrisation
    attention_backend: AttentionBackend = "auto"  # see attention.py
    quantiser: Quantiser = "none"  # of the weights of blocks and cross-attention, see selfcompress/quantiser.py
    quantiser_rows: int = 1  # of a group of weights that share a bit depth
    quantiser_columns: int | None = None  # of a group; None: all, so that with one row it is an output channel
    # Of sublayers that removal made narrower, by name: as many numbers as in `Sublayer.channels`. None: of none
    channels_left: dict[str, list[int]] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True  # whether transformers' generate() makes a cache; forward() itself makes none unasked

    def __post_init__(self, **kwargs: Any):
        self._reject_unknown(kwargs)
        if self.token_kv_heads is None:
            self.token_kv_heads = self.token_heads
        if self.initializer_range is None:
            self.initializer_range = max(1, self.mup_base_width or self.d_token) ** -0.5
        super().__post_init__(**kwargs)

    def _reject_unknown(self, kwargs: dict[str, Any]) -> None:
        known = {field.name for field in fields(self)}
        known |= {"model_type", "num_labels", "torch_dtype", "name_or_path", "_commit_hash"}  # transformers' own
        for name in kwargs:
            if name not in known:
                near = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise ValueError(f"{type(self).__name__} has no field '{name}'{hint}")

    @property
    def token_width_multiplier(self) -> float:
        """s_token = d_token / d_base (section 6.1); 1 under the standard parametrisation."""
        return self.d_token / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def sigma_base(self) -> float:
        """Standard deviation of matrices at the base width (section 6.1)."""
        assert self.initializer_range is not None  # filled in above
        return self.initializer_range

    def validate_architecture(self) -> None:
        """Rejects impossible combinations (called by `strict` after every construction)."""
        _check_positive(self, "vocab_size", "d_token", "token_ffn", "max_position_embeddings")
        _check_positive(self, "rope_theta", "rms_norm_eps", "initializer_range")
        _check_heads("token", self.d_token, self.token_heads, self.token_kv_heads)
        if self.mup_base_width is not None:
            _check_positive(self, "mup_base_width")
        if self.token_window is not None:
            _check_positive(self, "token_window")
        self._check_groups("token", self.d_token, self.token_heads, self.token_kv_heads, self.token_ffn)
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings=true is not supported: the paper's embeddings are untied")

    def groups(self, rows: int, columns: int) -> int:
        """Groups of weights, each with a bit depth and an exponent, in a matrix of these; 0 where there are none."""
        if self.quantiser != "bits":
            return 0
        return rows // self.quantiser_rows * (columns // (self.quantiser_columns or columns))

    def layers(self) -> dict[str, int]:
        """Blocks of each stage."""
        raise NotImplementedError

    def windows(self, stage: str) -> list[int | None]:
        """How many positions each of a stage's blocks sees, a position's own included; None: all up to it."""
        return [self.token_window] * self.layers()[stage]

    def sublayer(self, name: str) -> Sublayer:
        """What the sublayer of this name begins with.

        Raises:
            ValueError: the model has none.
        """
        match = re.fullmatch(r"(\w+)\.layers\.(0|[1-9]\d{0,8})\.(attention|ffn)", name, re.ASCII)
        if match is None or int(match[2]) >= self.layers().get(match[1], 0):
            raise ValueError(f"channels_left names {name!r:.80}, which this model does not have")
        width, heads, kv_heads, ffn = self._widths(match[1])
        if match[3] == "ffn":
            return Sublayer((ffn,))
        return Sublayer((width // heads,) * kv_heads, heads // kv_heads)

    def _widths(self, stage: str) -> tuple[int, int, int, int]:
        return self.d_token, self.token_heads, self.token_kv_heads or self.token_heads, self.token_ffn

    def _check_channels_left(self) -> None:
        if self.channels_left and self.quantiser != "bits":
            raise ValueError("channels_left needs quantiser='bits': no channel of other weights is removed")
        for name, left in (self.channels_left or {}).items():
            begins, total, what = self.sublayer(name), sum(left), f"channels_left of {name} are {left!r:.80}"
            fits = len(left) == len(begins.channels) and all(map(lambda x, most: 0 <= x <= most, left, begins.channels))
            if not fits:
                raise ValueError(f"{what}: they must lie between 0 and {list(begins.channels)!r:.80}")
            if total % self.quantiser_rows or total * begins.shared % (self.quantiser_columns or 1):
                raise ValueError(f"{what}: they are no whole groups of weights")
            if total == 0 and not begins.may_go:
                raise ValueError(f"{what}: a DLCM needs some of its cross-attention")

    def _check_groups(self, stage: str, width: int, heads: int, kv_heads: int | None, ffn: int) -> None:
        rows, columns = self.quantiser_rows, self.quantiser_columns
        if rows < 1 or (columns is not None and columns < 1):
            raise ValueError(f"quantiser_rows={rows} and quantiser_columns={columns} must be at least 1")
        if self.quantiser != "bits":
            return
        kv_width = width // heads * (kv_heads or heads)
        for what, size in ((f"d_{stage}", width), (f"{stage}_ffn", ffn), (f"{stage} keys' width", kv_width)):
            if size % rows:
                raise ValueError(f"quantiser_rows={rows} does not divide {what} {size}: choose a divisor")
            if columns is not None and size != kv_width and size % columns:
                raise ValueError(f"quantiser_columns={columns} does not divide {what} {size}: choose a divisor")


@checked
class LlamaBaselineConfig(TokenBlocksConfig):
    """The LLaMA baseline: `num_layers` token blocks between embedding and unembedding."""

    model_type = "dlcm_llama_baseline"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_token",
        "num_attention_heads": "token_heads",
        "num_hidden_layers": "num_layers",
    }

    num_layers: int = 12
    global_every: int | None = None  # with a token_window, the last of every so many layers has none; None: each has it

    def layers(self) -> dict[str, int]:
        return {"decoder": self.num_layers}

    def windows(self, stage: str) -> list[int | None]:
        every = self.global_every
        layers = range(1, self.num_layers + 1)
        return [None if every and layer % every == 0 else self.token_window for layer in layers]

    def validate_architecture(self) -> None:
        super().validate_architecture()
        _check_positive(self, "num_layers")
        if self.global_every is not None:
            if self.token_window is None:
                raise ValueError(
                    f"global_every={self.global_every} needs a token_window: without one, every layer sees all tokens"
                )
            if not 1 <= self.global_every <= self.num_layers:
                raise ValueError(
                    f"global_every={self.global_every} must lie between 1 and num_layers={self.num_layers}; null "
                    "leaves every layer its window"
                )
        self._check_channels_left()


@checked
class DLCMConfig(TokenBlocksConfig):
    """A Dynamic Large Concept Model: encoder, boundary detector, concept backbone, decoder (section 3)."""

    model_type = "dlcm"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_token", "num_attention_heads": "token_heads"}

    d_concept: int = 1024
    encoder_layers: int = 4  # at token width
    backbone_layers: int = 6  # at concept width
    decoder_layers: int = 2  # at token width
    concept_heads: int = 16
    concept_kv_heads: int | None = None  # None: as many as concept_heads
    concept_ffn: int = 3072  # SwiGLU width

    target_ratio: float = 4.0  # R, tokens per concept
    segmenter: Segmenter = "learned"  # how boundaries are found, see boundary.py
    d_scan: int | None = None  # width of the boundary queries and keys; None: d_token
    word_end_ids: list[int] | None = None  # of spaces, punctuation, .. for segmenter="words"; the tokenizer decides
    threshold: float = 0.5  # a boundary where p >= threshold (learned: at inference; rule: always)
    sharpening: float = 1.0  # exponent on the odds of p before the training-time Bernoulli draw
    pooling: Pooling = "mean"  # of a segment's states (Eq. 7); "last" is the state of its last token, see concepts.py
    visibility: Visibility = "closed"  # which concepts a token sees, see ConceptLayout
    smoothing: Smoothing = "adjacent"  # of each concept with the one before, see concepts.py
    cross_attention: bool = True  # False: what is injected is all that the decoder gets of concepts
    cross_attention_every: int | None = None  # decoder layers, from the first on; None: once, before them all
    cross_attention_rope: bool = True  # queries by token position, keys by their concept's last token
    cross_attention_backend: CrossAttentionBackend = "auto"  # see cross_attention.py
    slot_weighting: SlotWeighting = "replication"  # a concept counts once per token (Eq. 17), or "uniform" (Eq. 14)

    # Of the newest visible concept before the first or every decoder layer, or of each concept where it comes to be
    # seen, and nowhere else; see injection.py.
    injection: Injection = "off"
    # A norm at the encoder's end and a projection beside the skip connection to the decoder; this one and what
    # cross-attention adds begin at zero, so that the model begins as its encoder and decoder alone.
    clean_start: bool = False

    aux_loss_weight: float = 0.03  # lambda
    parser_scope: ParserScope = "global"  # statistics of the ratio loss; "sequence" is the ablation

    def __post_init__(self, **kwargs: Any):
        if self.concept_kv_heads is None:
            self.concept_kv_heads = self.concept_heads
        if self.d_scan is None:
            self.d_scan = self.d_token
        super().__post_init__(**kwargs)

    def layers(self) -> dict[str, int]:
        return {"encoder": self.encoder_layers, "backbone": self.backbone_layers, "decoder": self.decoder_layers}

    def windows(self, stage: str) -> list[int | None]:
        # Concepts carry what lies further back than tokens see.
        return [None] * self.backbone_layers if stage == "backbone" else super().windows(stage)

    @property
    def num_cross_attentions(self) -> int:
        """None, one before the decoder, or one before every so many of its layers, from the first on."""
        if not self.cross_attention:
            return 0
        return 1 if self.cross_attention_every is None else -(-self.decoder_layers // self.cross_attention_every)

    def sublayer(self, name: str) -> Sublayer:
        later = re.fullmatch(r"later_cross_attention\.(0|[1-9]\d{0,8})", name, re.ASCII)
        if (name == "cross_attention" and self.cross_attention) or (
            later is not None and int(later[1]) < self.num_cross_attentions - 1
        ):
            width, heads, kv_heads, _ = self._widths(name)
            return Sublayer((width // heads,) * kv_heads, heads // kv_heads, may_go=False)
        return super().sublayer(name)

    def _widths(self, stage: str) -> tuple[int, int, int, int]:
        if stage != "backbone":
            return super()._widths(stage)
        return self.d_concept, self.concept_heads, self.concept_kv_heads or self.concept_heads, self.concept_ffn

    @property
    def has_ratio_loss(self) -> bool:
        """Whether there are probabilities that Eq. 10 can move: the other segmenters obey a rule."""
        return self.segmenter in ("learned", "rule")

    @property
    def scan_width(self) -> int:
        return self.d_scan or self.d_token

    @property
    def concept_width_multiplier(self) -> float:
        """s_concept = d_concept / d_base (section 6.1); 1 under the standard parametrisation."""
        return self.d_concept / self.mup_base_width if self.mup_base_width else 1.0

    def validate_architecture(self) -> None:
        super().validate_architecture()
        _check_positive(self, "d_concept", "concept_ffn", "encoder_layers", "backbone_layers", "decoder_layers")
        _check_positive(self, "d_scan", "sharpening")
        _check_heads("concept", self.d_concept, self.concept_heads, self.concept_kv_heads)
        self._check_groups("concept", self.d_concept, self.concept_heads, self.concept_kv_heads, self.concept_ffn)
        if not (math.isfinite(self.target_ratio) and self.target_ratio >= 1):
            raise ValueError(f"target_ratio={self.target_ratio} must be at least 1 token per concept")
        if not self.cross_attention and (self.injection == "off" or self.cross_attention_every is not None):
            raise ValueError(
                "cross_attention=false needs an injection, or nothing reads concepts, and cross_attention_every=null"
            )
        if self.cross_attention_every is not None and not 1 <= self.cross_attention_every <= self.decoder_layers:
            raise ValueError(
                f"cross_attention_every={self.cross_attention_every} must lie between 1 and "
                f"decoder_layers={self.decoder_layers}; null is once, before all of them"
            )
        if self.target_ratio == 1 and self.has_ratio_loss:
            raise ValueError(
                f"target_ratio=1 needs segmenter='fixed': the ratio loss of '{self.segmenter}' divides by R - 1"
            )
        if self.word_end_ids is not None:
            if self.segmenter != "words":
                raise ValueError(
                    f"word_end_ids is set, but segmenter='{self.segmenter}' reads no tokens: leave it null"
                )
            if not self.word_end_ids or not all(0 <= token_id < self.vocab_size for token_id in self.word_end_ids):
                raise ValueError(f"word_end_ids must hold ids from 0 to {self.vocab_size - 1}, at least one")
        if self.slot_weighting == "uniform" and self.cross_attention_backend == "replicated":
            raise ValueError(
                "slot_weighting='uniform' needs another cross_attention_backend than 'replicated', which counts a "
                "slot as often as it is replicated: use 'auto'"
            )
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must lie between 0 and 1")
        if not 0 <= self.aux_loss_weight < math.inf:
            raise ValueError(f"aux_loss_weight={self.aux_loss_weight} must be finite and not negative")
        self._check_channels_left()


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with other values, checked.

    Raises:
        ValueError: they do not fit together.
    """
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    config.validate_architecture()
    return config


def _check_positive(config: PreTrainedConfig, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be positive and finite")


def _check_heads(stage: str, width: int, heads: int, kv_heads: int | None) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"d_{stage}={width} is not a multiple of {stage}_heads={heads}")
    if (width // heads) % 2:
        raise ValueError(f"d_{stage} / {stage}_heads = {width // heads} must be even: RoPE rotates pairs")
    if not kv_heads or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{stage}_heads={heads} is not a multiple of {stage}_kv_heads={kv_heads}")
