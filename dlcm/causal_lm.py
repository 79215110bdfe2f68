"""What the DLCM and its baseline share as language models: the door to packed rows, the loss, generation.

A padded (B, L) batch is packed at the door and padded again on the way out; inside there are only packed documents.
So rows, packed documents and padding cannot differ, and there is no second code path to keep right.
"""

from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from dlcm import mup
from dlcm.boundary import Boundaries
from dlcm.cache import DecodingCache
from dlcm.config import TokenBlocksConfig
from dlcm.decoding import Call, StepGraphs, compiled_if_model_is, directly
from dlcm.layout import Extension, PackedLayout, RowLayout, cumulative
from dlcm.linear_cross_entropy import IGNORED, linear_cross_entropy
from dlcm.selfcompress.partial import PartialLinear

AnyCache = TypeVar("AnyCache", bound=DecodingCache)


class PackedCausalLM(PreTrainedModel, GenerationMixin, Generic[AnyCache]):
    """Base class: subclasses define `embed_tokens`, `lm_head` and what lies between.

    Attributes:
        compiled: whether the loss without logits may use torch.compile.
        cache_class: what its decoding remembers.
        compiled_steps: what was compiled for steps of decoding (see `dlcm.compilation`).
    """

    config: TokenBlocksConfig
    embed_tokens: nn.Embedding
    lm_head: nn.Linear
    compiled: bool = False
    cache_class: type[AnyCache]

    def __init__(self, config: TokenBlocksConfig):
        super().__init__(config)
        self.compiled_steps: dict[Any, Any] = {}

    def initialize_weights(self) -> None:
        """Draws what no checkpoint has filled (hook of transformers; roles follow from the whole model's names)."""
        mup.initialize_(self, self.config)
        for module in self.modules():
            if isinstance(module, PartialLinear):
                module.place_again_()

    def open_rows(
        self,
        input_ids_BL: Tensor,
        attention_mask_BL: Tensor | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
    ) -> tuple[Tensor, RowLayout, PackedLayout]:
        """The packed row (T,), the way back to (B, L), and the documents.

        Raises:
            ValueError: both a mask and `cu_seqlens`, several packed rows, an empty row or document, or a document
                longer than `max_position_embeddings`.
        """
        if cu_seqlens is not None:
            if attention_mask_BL is not None:
                raise ValueError("give either attention_mask (padded rows) or cu_seqlens (one packed row), not both")
            if input_ids_BL.shape[0] != 1:
                raise ValueError(f"cu_seqlens describes one packed row, got a batch of {input_ids_BL.shape[0]}")
            rows, _ = RowLayout.full(*input_ids_BL.shape)
        else:
            if attention_mask_BL is None:
                rows, lengths_B = RowLayout.full(*input_ids_BL.shape)
            else:
                _check_mask(attention_mask_BL, input_ids_BL)
                rows, lengths_B = RowLayout.from_mask(attention_mask_BL)
            if bool((lengths_B == 0).any()):
                raise ValueError(f"row {int(lengths_B.argmin())} of the batch has no token")
            cu_seqlens = cumulative(lengths_B)
        input_ids_T = rows.pack(input_ids_BL)
        layout = PackedLayout.from_cu_seqlens(cu_seqlens, len(input_ids_T), max_seqlen, input_ids_T.device)
        if layout.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"a document of {layout.max_seqlen} tokens is longer than "
                f"max_position_embeddings={self.config.max_position_embeddings}"
            )
        return input_ids_T, rows, layout

    def read_out(
        self,
        h_TE: Tensor,
        labels_BL: Tensor | None,
        rows: RowLayout,
        layout: PackedLayout,
        num_items: int | Tensor | None,
        return_logits: bool,
        logits_to_keep: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits (B, L, V) and next-token loss inside each document, in nats.

        Logits are multiplied by 1 / s_token (section 6.1). Without `return_logits` they are None, and the loss comes
        from `linear_cross_entropy`, which never holds them all. The loss, None without labels, is the sum over valid
        targets divided by `num_items`, or else by the number of valid targets, at least 1.

        Raises:
            ValueError: neither logits nor labels, or labels and logits of some columns only.
        """
        if labels_BL is None and not return_logits:
            raise ValueError("return_logits=False needs labels: without logits there is nothing but a loss")
        if labels_BL is not None and logits_to_keep:
            raise ValueError("logits_to_keep is for decoding: with labels, use return_logits=False to spare memory")
        if labels_BL is None:
            return self.last_logits(rows.unpack(h_TE), logits_to_keep), None
        h_TE = h_TE / self.config.token_width_multiplier  # the small side of the product
        logits_TV = self.lm_head(h_TE) if return_logits else None
        loss = None
        if labels_BL is not None:
            target_T = next_targets(rows.pack(labels_BL), layout)
            if logits_TV is None:
                total = linear_cross_entropy(h_TE, self.lm_head.weight, target_T, compiled=self.compiled)
            else:
                wide = torch.promote_types(logits_TV.dtype, torch.float32)
                total = F.cross_entropy(logits_TV.to(wide), target_T, ignore_index=IGNORED, reduction="sum")
            loss = total / ((target_T != IGNORED).sum().clamp(min=1) if num_items is None else num_items)
        return None if logits_TV is None else rows.unpack(logits_TV), loss

    def last_logits(self, h_BLE: Tensor, columns: int = 0) -> Tensor:
        """(B, columns, V): the logits of so many columns, the last ones; 0 is all."""
        return self.lm_head(h_BLE[:, -columns:] / self.config.token_width_multiplier)

    # Decoding with a cache. Subclasses say how tokens of any number, and one of each row, are read.

    def new_cache(self, room: int = 0, replayed: bool = False) -> AnyCache:
        """An empty cache for `past_key_values`.

        Args:
            room: how many tokens a row is expected to have in the end; with more, tensors are made anew.
            replayed: steps of one token are replayed as CUDA graphs (see `dlcm.decoding`).

        Raises:
            ValueError: graphs were asked for and the model is not on a GPU.
        """
        if replayed and self.device.type != "cuda":
            raise ValueError(f"replayed=True: CUDA graphs need a model on a GPU, this one is on {self.device.type}")
        return self.cache_class(self.config, room, replayed)

    def cache_to_use(
        self,
        given: AnyCache | None,
        use_cache: bool | None,
        labels_BL: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> AnyCache | None:
        """The cache of a forward pass, if it is to have one.

        Raises:
            ValueError: with a cache, labels or `cu_seqlens`.
        """
        if given is None and not use_cache:
            return None
        if labels_BL is not None or cu_seqlens is not None:
            raise ValueError("a cache is for decoding rows: give neither labels nor cu_seqlens, or use_cache=False")
        return self.new_cache() if given is None else given

    def start(self, cache: AnyCache) -> None:
        """What a row has before it has any token."""

    def extend(self, input_ids_T: Tensor, new: Extension, cache: AnyCache) -> tuple[Tensor, Boundaries | None]:
        """Reads tokens behind those in the cache; final states (T, E), before logits, and what was decided."""
        raise NotImplementedError

    def extend_by_nothing(self) -> tuple[Tensor, Boundaries | None]:
        """What `extend` gives where all columns are padding."""
        return self.embed_tokens.weight.new_zeros(0, self.config.d_token), None

    def step(
        self, input_ids_B: Tensor, active_B: Tensor, cache: AnyCache, call: Call = directly, whole: bool = False
    ) -> tuple[Tensor, Boundaries | None]:
        """Reads one token of each active row; logits (B, V), and what was decided. Nothing changes for other rows.

        Args:
            input_ids_B, active_B: the tokens, and whose count.
            cache: what came before.
            call: how the parts of the step are run.
            whole: run also the parts that need not be run.
        """
        raise NotImplementedError

    @torch.no_grad()
    def decode(
        self, input_ids_BL: Tensor, attention_mask_BX: Tensor | None, cache: AnyCache, logits_to_keep: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Goes on behind the cache with L more columns.

        One column is a step: shapes are the same every time. More are packed, and read like the documents of a batch.

        Args:
            input_ids_BL: the new columns alone.
            attention_mask_BX: of them, (B, L), or of them and all earlier ones; 0 on padding. A row may be all padding.
            cache: its rows are those of the batch.
            logits_to_keep: see `last_logits`.

        Returns:
            logits (B, columns, V), probabilities and boundaries (B, L), None where the model has none.

        Raises:
            ValueError: inputs that do not fit together or to the cache, or more tokens than positions. The cache is
                then as it was.
        """
        if type(cache) is not self.cache_class:
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, {type(self).__name__} needs a "
                f"{self.cache_class.__name__}: use model.new_cache()"
            )
        batch, columns = input_ids_BL.shape
        if attention_mask_BX is not None:
            if attention_mask_BX.shape == (batch, cache.columns + columns):
                attention_mask_BX = attention_mask_BX[:, cache.columns :]
            _check_mask(attention_mask_BX, input_ids_BL)
        cache.check_positions(columns)
        is_new = not cache.is_initialized
        cache.begin(batch, self.device, self.embed_tokens.weight.dtype, self._product_dtype())
        cache.reserve(columns)
        if is_new:
            self.start(cache)
        if columns == 1:
            logits_BV, decided = self._decode_step(input_ids_BL, attention_mask_BX, cache)
            if decided is None:
                return logits_BV[:, None], None, None
            return logits_BV[:, None], decided.probability_T[:, None], decided.boundary_T[:, None]
        h_TE, decided, rows = self._decode_many(input_ids_BL, attention_mask_BX, cache)
        logits = self.last_logits(rows.unpack(h_TE), logits_to_keep)
        if decided is None:
            return logits, None, None
        return logits, rows.unpack(decided.probability_T), rows.unpack(decided.boundary_T)

    def _decode_step(
        self, input_ids_B1: Tensor, mask_B1: Tensor | None, cache: AnyCache
    ) -> tuple[Tensor, Boundaries | None]:
        ids_B = input_ids_B1[:, 0]
        active_B = torch.ones_like(ids_B, dtype=torch.bool) if mask_B1 is None else mask_B1[:, 0].bool()
        if not cache.replayed:
            with compiled_if_model_is(self, len(ids_B)):
                answer = self.step(ids_B, active_B, cache)
        else:
            if cache.graphs is None or cache.graphs.moves != cache.moves:
                cache.graphs = None  # its memory is needed
                cache.graphs = StepGraphs(self, cache)
            answer = cache.graphs.step(self, cache, ids_B, active_B)
        cache.has_seen(active_B[:, None])
        cache.longest += 1
        return answer

    def _decode_many(
        self, input_ids_BL: Tensor, mask_BL: Tensor | None, cache: AnyCache
    ) -> tuple[Tensor, Boundaries | None, RowLayout]:
        if mask_BL is None:  # which asks nothing of the device
            rows, new_B = RowLayout.full(*input_ids_BL.shape)
            mask_BL = torch.ones_like(input_ids_BL)
        else:
            rows, new_B = RowLayout.from_mask(mask_BL)
        past_B = cache.length_B.cpu()
        longest = int((past_B + new_B).max())
        input_ids_T = rows.pack(input_ids_BL)
        if len(input_ids_T):
            new = Extension.of(new_B, past_B, input_ids_T.device)
            with compiled_if_model_is(self, None):
                h_TE, decided = self.extend(input_ids_T, new, cache)
            cache.length_B += new_B.to(cache.length_B.device)
        else:
            h_TE, decided = self.extend_by_nothing()
        cache.has_seen(mask_BL.bool())
        cache.longest = longest
        if cache.replayed:
            cache.reserve_expected()
        return h_TE, decided, rows

    def _product_dtype(self) -> torch.dtype:
        """What queries, keys and values are in."""
        device = self.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.lm_head.weight.dtype

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> bool:
        """Makes the cache that transformers' `generate` uses (its hook), unless it was given one or needs none.

        `cache_implementation="static"` is one with as much room as will be needed, whose steps are CUDA graphs.

        Raises:
            ValueError: there will be more tokens than positions, another `cache_implementation`, or a cache and
                `use_cache=False`.
        """
        positions = self.config.max_position_embeddings
        if max_cache_length > positions:
            raise ValueError(
                f"prompt and new tokens are up to {max_cache_length + 1}, of which all but the last need one of the "
                f"model's {positions} positions (max_position_embeddings): lower max_new_tokens, or shorten the prompt"
            )
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation='{implementation}' is not supported: use 'dynamic' or 'static'")
        given = model_kwargs.get("past_key_values")
        if given is not None:
            if implementation is not None:
                raise ValueError("give either past_key_values or cache_implementation: the former is a cache already")
            if not generation_config.use_cache:
                raise ValueError("past_key_values needs use_cache=True; here, or in the checkpoint, it is False")
            given._is_user_defined = True  # read by generate()
        elif generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_cache(max_cache_length, implementation == "static")
        return "past_key_values" in model_kwargs


def _check_mask(mask_BL: Tensor, input_ids_BL: Tensor) -> None:
    if mask_BL.shape != input_ids_BL.shape:
        raise ValueError(
            f"attention_mask of shape {tuple(mask_BL.shape)} does not fit input_ids of shape "
            f"{tuple(input_ids_BL.shape)}"
        )


def next_targets(labels_T: Tensor, layout: PackedLayout) -> Tensor:
    """The label that follows each position in its document, `IGNORED` for the last of them."""
    return labels_T.roll(-1).index_fill(0, layout.cu_seqlens_D1[1:].long() - 1, IGNORED)
