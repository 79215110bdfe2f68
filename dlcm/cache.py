"""What decoding remembers: one row for each sequence of a batch, of any length, its padding left out.

    tokens     keys and values of encoder and decoder (of all blocks, for the baseline), and encoder states
    concepts   keys and values of the backbone, and what it made of each concept, before smoothing
    slots      keys and values of each cross-attention, how many tokens had each slot as their newest, where it ended;
               what is injected of it, if so configured
    open       where concepts are means, the segment that no boundary has closed yet: the sum of its states, and how
               many they are

So tokens cost what the token-level blocks cost, and concepts are paid for once in R tokens. Encoder states and concepts
are there for the next token and concept, which look at the last one, and for `crop`, which makes another one the last.
For it, keys and values that have left the window of a `token_window` are kept too; they are not read.

A cache is also what transformers' `generate` expects of one. Its length, there, counts columns of the (B, L) batches
that it has seen, padding included; in here, rows know how many tokens they have.

Legend: B rows, S entries, K key-value heads, N head dimension, E = d_token, C = d_concept.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dlcm.attention import causal_attention
from dlcm.blocks import BlockShape, concept_block_shape, token_block_shape
from dlcm.cached_attention import cached_attention
from dlcm.config import AttentionBackend, DLCMConfig, LlamaBaselineConfig, TokenBlocksConfig
from dlcm.layout import CLOSING_LAG, CachedSlots, Extension, PackedLayout

KEYS_AND_VALUES = ("_keys", "_values")  # how the names of such tensors end
GROWTH, MIN_GROWTH = 1.25, 16  # a room that is full grows at least by that factor, and by so many entries
RATIO_WORTH = 64  # tokens: a row that has so many says as much of how many concepts it will have as the target ratio


class Room:
    """Tensors (B, entries + 1, ...) by name, which grow together. The last entry is where nothing is kept."""

    def __init__(self, entries: int):
        self.entries = entries
        self.tensors: dict[str, list[Tensor]] = {}

    def __getitem__(self, name: str) -> list[Tensor]:
        return self.tensors[name]

    def add(self, name: str, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, number: int = 1) -> None:
        """Adds `number` tensors of zeros, with as many rows as `like`, where it is."""
        size = (like.shape[0], self.entries + 1, *shape)
        self.tensors[name] = [torch.zeros(size, dtype=dtype, device=like.device) for _ in range(number)]

    def add_stack(self, name: str, like: Tensor, shape: BlockShape, layers: int, dtype: torch.dtype) -> None:
        """Adds keys and values of a stack, or of one layer that reads like one."""
        for part in KEYS_AND_VALUES:
            self.add(f"{name}{part}", like, (shape.kv_width // shape.head_dim, shape.head_dim), dtype, layers)

    def reserve(self, entries: int) -> None:
        """Makes room for so many entries, which are more than there are; tensors move."""
        old, self.entries = self.entries, entries
        for tensors in self.tensors.values():
            for index, x_BS in enumerate(tensors):
                grown_BS = x_BS.new_zeros(x_BS.shape[0], entries + 1, *x_BS.shape[2:])
                grown_BS[:, :old] = x_BS[:, :old]
                tensors[index] = grown_BS

    def for_each(self, change: Callable[[Tensor], Tensor]) -> None:
        for tensors in self.tensors.values():
            tensors[:] = map(change, tensors)

    def bytes_per_entry(self, parts: tuple[str, ...] = ("",)) -> int:
        """Bytes of one entry of one row, in the tensors whose names end so."""
        kept = [x for name, tensors in self.tensors.items() if name.endswith(parts) for x in tensors]
        return sum(x[0, 0].numel() * x.element_size() for x in kept)


@dataclass(frozen=True, slots=True)
class Appending:
    """Writes new elements behind their rows' past, and lets them attend to both: any number of them, in any rows."""

    new: Extension

    @property
    def layout(self) -> PackedLayout:
        return self.new.layout

    def write(self, cache_BS: Tensor, x_T: Tensor, shift: int = 0) -> None:
        """Writes each new element where it belongs, or so many entries later."""
        cache_BS[self.new.row_T, self.layout.position_T + shift] = x_T.to(cache_BS.dtype)

    def attend(
        self,
        keys_BSKN: Tensor,
        values_BSKN: Tensor,
        q_THN: Tensor,
        k_TKN: Tensor,
        v_TKN: Tensor,
        backend: AttentionBackend,
        window: int | None,
    ) -> Tensor:
        self.write(keys_BSKN, k_TKN)
        self.write(values_BSKN, v_TKN)
        if self.new.context.total > self.layout.total:
            where = self.new.row_U, self.new.context.position_T
            k_TKN, v_TKN = keys_BSKN[where], values_BSKN[where]
        return causal_attention(q_THN, k_TKN, v_TKN, self.layout, backend, self.new.context, window)


@dataclass(frozen=True, slots=True)
class Stepping:
    """The same of one element in each row, or none: no shape depends on how long rows are, so that it can be replayed.

    Attributes:
        layout: a document for each row, of one element.
        entry_B: where it is written; a row that has none writes it where nothing is kept.
        length_B: how many entries it sees, itself included; 0 for a row that has none.
    """

    layout: PackedLayout
    entry_B: Tensor
    length_B: Tensor

    @classmethod
    def of(cls, past_B: Tensor, active_B: Tensor, room: Room) -> "Stepping":
        row_B = torch.arange(len(past_B), device=past_B.device)
        cu_seqlens_D1 = torch.arange(len(past_B) + 1, dtype=torch.int32, device=past_B.device)
        return cls(
            PackedLayout(cu_seqlens_D1, past_B, row_B, 1),
            past_B.masked_fill(~active_B, room.entries),
            (past_B + 1) * active_B,
        )

    def write(self, cache_BS: Tensor, x_B: Tensor, shift: int = 0) -> None:
        entry_B = self.entry_B + shift if shift else self.entry_B
        cache_BS[self.layout.document_T, entry_B] = x_B.to(cache_BS.dtype)

    def attend(
        self,
        keys_BSKN: Tensor,
        values_BSKN: Tensor,
        q_BHN: Tensor,
        k_BKN: Tensor,
        v_BKN: Tensor,
        backend: AttentionBackend,
        window: int | None,
    ) -> Tensor:
        newest_BKN = k_BKN.to(keys_BSKN.dtype), v_BKN.to(values_BSKN.dtype)
        return cached_attention(q_BHN, keys_BSKN, values_BSKN, self.length_B, newest_BKN=newest_BKN, window=window)


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """The past of one layer (a `dlcm.blocks.LayerPast`)."""

    where: Appending | Stepping
    keys_BSKN: Tensor
    values_BSKN: Tensor

    def attend(
        self, q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, backend: AttentionBackend, window: int | None
    ) -> Tensor:
        """Remembers keys and values, and attends to them and what is before, to `window` in all; (T, H, N)."""
        return self.where.attend(self.keys_BSKN, self.values_BSKN, q_THN, k_TKN, v_TKN, backend, window)


class DecodingCache(Cache):
    """The token level, which is all that the baseline has.

    Attributes:
        config: of the model.
        replayed: whether steps of one token are CUDA graphs (see `dlcm.decoding`).
        columns: how many columns of (B, L) batches it has seen.
        longest: at least as many tokens as the longest row has.
        moves: how often its tensors have been replaced by others.
        length_B: tokens of each row.
        tokens: see the module's docstring.
        seen: bool (B, S + 1), which columns were tokens.
    """

    length_B: Tensor

    def __init__(self, config: TokenBlocksConfig, room: int = 0, replayed: bool = False):
        """An empty cache; its tensors are made when rows are known.

        Args:
            config: of the model.
            room: how many tokens a row is expected to have in the end; it may have more.
            replayed: see above.
        """
        super().__init__(layers=[])
        self.config, self.replayed = config, replayed
        self.tokens, self.seen = Room(room), Room(room)
        self.columns, self.longest, self.moves = 0, 0, 0
        self.graphs: Any = None

    # Made, and kept large enough

    @property
    def is_initialized(self) -> bool:
        return hasattr(self, "length_B")

    def begin(self, batch: int, device: torch.device, dtype: torch.dtype, product_dtype: torch.dtype) -> None:
        """Makes the tensors of so many rows.

        Args:
            batch: B.
            device: of the model.
            dtype: of the residual stream.
            product_dtype: of keys and values.

        Raises:
            ValueError: it has rows already, and another number.
        """
        if not self.is_initialized:
            self.length_B = torch.zeros(batch, dtype=torch.long, device=device)
            self.seen.add("columns", self.length_B, (), torch.bool)
            self._begin_rows(dtype, product_dtype)
        elif batch != self.batch_size:
            raise ValueError(
                f"past_key_values has {self.batch_size} rows, the batch {batch}: use its batch_repeat_interleave or "
                "batch_select_indices, or another cache"
            )

    def _begin_rows(self, dtype: torch.dtype, product_dtype: torch.dtype) -> None:
        for stage, layers in self._token_stacks().items():
            self.tokens.add_stack(stage, self.length_B, token_block_shape(self.config), layers, product_dtype)

    def _token_stacks(self) -> dict[str, int]:
        assert isinstance(self.config, LlamaBaselineConfig)
        return {"decoder": self.config.num_layers}

    def check_positions(self, columns: int) -> None:
        """Whether so many more columns are possible.

        Raises:
            ValueError: a row would have more tokens than `max_position_embeddings`.
        """
        positions = self.config.max_position_embeddings
        if self.longest + columns > positions and self.is_initialized:
            self.longest = int(self.length_B.max())
        if self.longest + columns > positions:
            raise ValueError(
                f"{self.longest} tokens in the cache and {columns} new ones are more than "
                f"max_position_embeddings={positions}"
            )

    def reserve(self, columns: int) -> None:
        """Makes room for so many more columns."""
        self._grow(self.tokens, self.longest + columns, self.config.max_position_embeddings)
        self._grow(self.seen, self.columns + columns)

    def reserve_expected(self) -> None:
        """Makes room for what is expected beside tokens: nothing, here."""

    def _grow(self, room: Room, entries: int, at_most: int | None = None) -> None:
        if entries > room.entries:
            grown = max(entries, int(room.entries * GROWTH), room.entries + MIN_GROWTH)
            room.reserve(grown if at_most is None else min(grown, at_most))
            self.moves += 1

    def stack(self, name: str, room: Room, where: Appending | Stepping) -> list[CachedLayer]:
        """The past of a stack's layers."""
        keys, values = room[f"{name}_keys"], room[f"{name}_values"]
        return [CachedLayer(where, *layer) for layer in zip(keys, values, strict=True)]

    def has_seen(self, real_BL: Tensor) -> None:
        """Remembers which of the newest columns were tokens."""
        columns = real_BL.shape[1]
        self.seen["columns"][0][:, self.columns : self.columns + columns] = real_BL
        self.columns += columns

    # What transformers asks of a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.config.max_position_embeddings

    @property
    def batch_size(self) -> int:
        return len(self.length_B) if self.is_initialized else -1

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` should compile the model: it has its own graphs (see `dlcm.decoding`)."""
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def __len__(self) -> int:
        return sum(len(self.tokens[name]) for name in self.tokens.tensors if name.endswith("_keys"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({max(self.batch_size, 0)} rows, {self.columns} columns)"

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecodingCache":
        """A cache of its own tensors, without graphs, which are bound to these."""
        other = copy.copy(self)
        other.__dict__.update(
            {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in ("graphs", "config")}
        )
        other.graphs = None
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row `beam_idx[b]` was, in place."""
        self._for_each(lambda x_B: x_B.copy_(x_B.index_select(0, beam_idx.to(x_B.device))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda x_B: x_B.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace(lambda x_B: x_B.index_select(0, indices.to(x_B.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest columns, as transformers counts: for -n the last n, for n all but n, for 0 none."""
        keep = tokens_to_remove if tokens_to_remove > 0 else self.columns + tokens_to_remove
        if keep < self.columns:
            self._keep(max(keep, 0))

    def reset(self) -> None:
        """Forgets everything, and keeps the tensors."""
        if self.columns:
            self._keep(0)

    def _keep(self, columns: int) -> None:
        """Forgets all columns but so many, which are fewer than there are."""
        self.length_B -= self.seen["columns"][0][:, columns : self.columns].sum(1)
        self.columns, self.longest = columns, int(self.length_B.max())

    def _for_each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.length_B = change(self.length_B)
            self.tokens.for_each(change)
            self.seen.for_each(change)

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self._for_each(change)
        self.moves += 1

    # What it costs

    def keys_and_values(self) -> Iterator[tuple[str, list[Tensor], Tensor]]:
        """Of each stage: a name, a tensor (B, S, K, N) for each layer, and how many entries rows have, (B,)."""
        yield from self._keys_and_values(self.tokens, self.length_B)

    def _keys_and_values(self, room: Room, entries_B: Tensor) -> Iterator[tuple[str, list[Tensor], Tensor]]:
        yield from ((name, x, entries_B) for name, x in room.tensors.items() if name.endswith(KEYS_AND_VALUES))

    def bytes_in_use(self, parts: tuple[str, ...] = ("",)) -> int:
        """Bytes of the entries that rows have, of all that grows with them. Waits for the device."""
        return int(self.length_B.sum()) * self.tokens.bytes_per_entry(parts)

    def key_value_bytes(self) -> int:
        """The same of keys and values alone."""
        return self.bytes_in_use(KEYS_AND_VALUES)


class ConceptCache(DecodingCache):
    """Tokens and concepts: what the DLCM needs.

    Attributes:
        most_concepts: at least as many concepts as any row has.
        concepts_B: closed segments of each row, which are its concepts.
        concepts, slots: see the module's docstring. Slot 0 is "no concept yet", slot j + 1 concept j.
        open_sum_BE: fp32 or wider; there, like the next, where concepts are means.
        open_count_B: tokens.
    """

    config: DLCMConfig
    concepts_B: Tensor
    open_sum_BE: Tensor
    open_count_B: Tensor

    def __init__(self, config: DLCMConfig, room: int = 0, replayed: bool = False):
        super().__init__(config, room, replayed)
        self.most_concepts = 0
        expected = self.expected_concepts()
        self.concepts, self.slots = Room(expected), Room(expected + 1)  # one more, always

    def _token_stacks(self) -> dict[str, int]:
        return {"encoder": self.config.encoder_layers, "decoder": self.config.decoder_layers}

    def _begin_rows(self, dtype: torch.dtype, product_dtype: torch.dtype) -> None:
        super()._begin_rows(dtype, product_dtype)
        config, like = self.config, self.length_B
        self.tokens.add("states", like, (config.d_token,), dtype)
        if config.segmenter == "words":
            self.tokens.add("ends_word", like, (), torch.bool)
        self.concepts.add_stack("backbone", like, concept_block_shape(config), config.backbone_layers, product_dtype)
        self.concepts.add("reasoned", like, (config.d_concept,), dtype)
        self.slots.add_stack("cross", like, token_block_shape(config), config.num_cross_attentions, product_dtype)
        self.slots.add("count", like, (), torch.int32)
        self.slots.add("end", like, (), torch.int32)
        if config.injection != "off":
            self.slots.add("injected", like, (config.d_token,), dtype)
        self.concepts_B = torch.zeros_like(like)
        if config.pooling == "mean":
            self.open_count_B = torch.zeros_like(like)
            wide = torch.promote_types(dtype, torch.float32)
            self.open_sum_BE = torch.zeros(len(like), config.d_token, dtype=wide, device=like.device)

    def reserve(self, columns: int) -> None:
        """See `DecodingCache.reserve`; and for one more concept, which is what a step can close."""
        super().reserve(columns)
        self.reserve_concepts(1)

    def expected_concepts(self) -> int:
        """How many concepts a row may have once its tokens fill their room, if rows go on as they began."""
        rate = (self.most_concepts + RATIO_WORTH / self.config.target_ratio) / (self.longest + RATIO_WORTH)
        to_come = rate * GROWTH * max(self.tokens.entries - self.longest, 0)  # ratios drift, and rows differ
        return min(self.most_concepts + int(to_come) + 1, self.tokens.entries)

    def reserve_expected(self) -> None:
        """Makes room for the concepts that are expected: now, since graphs of steps are bound to where it is."""
        self.most_concepts = int(self.concepts_B.max())
        self.reserve_concepts(self.expected_concepts() - self.most_concepts)

    def reserve_concepts(self, number: int) -> None:
        """Makes room for so many more concepts in any row."""
        if self.most_concepts + number > self.concepts.entries:
            self.most_concepts = int(self.concepts_B.max())
        self._grow(self.concepts, self.most_concepts + number)
        if self.slots.entries <= self.concepts.entries:
            self.slots.reserve(self.concepts.entries + 1)

    @property
    def seen_BS(self) -> Tensor:
        """What the detector looks at, of each token (see `dlcm.boundary`)."""
        return self.tokens["ends_word" if self.config.segmenter == "words" else "states"][0]

    def last_seen(self) -> Tensor:
        """The same of each row's last token, (B, ..); of a row without tokens, nothing to be used."""
        return _entry(self.seen_BS, self.length_B - 1)

    def states_at(self, row_M: Tensor, position_M: Tensor) -> Tensor:
        """Encoder states of these tokens, (M, E), one of each row that is named."""
        return self.tokens["states"][0][row_M, position_M]

    def last_concept(self) -> Tensor:
        """Each row's last concept, (B, C); of a row without concepts, nothing to be used."""
        return _entry(self.concepts["reasoned"][0], self.concepts_B - 1)

    def newest_injected(self) -> Tensor:
        """What is injected of each row's newest concept, (B, E); 0, as slot 0 always is, where there is none yet."""
        return _entry(self.slots["injected"][0], self.concepts_B)

    def slots_seen(self, new: Extension, entry_T: Tensor) -> tuple[CachedSlots, tuple[Tensor, Tensor]]:
        """All slots of the rows that have new tokens, packed: who sees which, and where they are in the room of slots.

        Args:
            new: the new tokens.
            entry_T: the newest slot that each of them sees, of its row's. They are counted here.
        """
        slots_B = torch.zeros_like(self.concepts_B).index_copy_(0, new.row_D, self.concepts_B[new.row_D] + 1).cpu()
        packed = Extension.of(slots_B, torch.zeros_like(slots_B), entry_T.device)
        where = packed.row_T, packed.layout.position_T
        cu_slots_D1 = packed.layout.cu_seqlens_D1
        seen = CachedSlots(
            tokens=new.layout,
            context=new.context,
            cu_slots_D1=cu_slots_D1,
            slot_T=cu_slots_D1[new.layout.document_T] + entry_T,
            past_S=self.slots["count"][0][where].long(),
        )
        one = self.slots["count"][0].new_ones(())
        self.slots["count"][0].index_put_((new.row_T, entry_T), one, accumulate=True)
        return seen, where

    def count_newest(self, active_B: Tensor) -> None:
        """Counts a step's token for the newest slot of each row that is active."""
        newest_B = self.concepts_B.masked_fill(~active_B, self.slots.entries)
        count_BS = self.slots["count"][0]
        count_BS.scatter_add_(1, newest_B[:, None], torch.ones_like(count_BS[:, :1]))

    def read_slots(self, number: int, q_BHN: Tensor, active_B: Tensor) -> Tensor:
        """What the queries of a step's cross-attention of this number read from the slots, (B, H, N), once counted."""
        length_B = (self.concepts_B + 1) * active_B
        keys_BSKN, values_BSKN = self.slots["cross_keys"][number], self.slots["cross_values"][number]
        counted = self.slots["count"][0] if self.config.slot_weighting == "replication" else None
        return cached_attention(q_BHN, keys_BSKN, values_BSKN, length_B, counted)

    def _keep(self, columns: int) -> None:
        """Segments that closed in what is forgotten are open again."""
        super()._keep(columns)
        count_BS, end_BS = self.slots["count"][0], self.slots["end"][0].long()
        slot_S = torch.arange(count_BS.shape[1], device=count_BS.device)
        # The first token whose newest slot is this one.
        first_BS = torch.where(slot_S == 0, 0, end_BS + CLOSING_LAG[self.config.visibility])
        existed_BS = slot_S <= self.concepts_B[:, None]
        self.concepts_B.copy_((existed_BS & (slot_S > 0) & (first_BS < self.length_B[:, None])).sum(1))
        self.most_concepts = int(self.concepts_B.max())
        newest_B1 = self.concepts_B[:, None]
        left_B1 = self.length_B[:, None] - first_BS.gather(1, newest_B1)
        count_BS.masked_fill_(slot_S > newest_B1, 0)
        count_BS.scatter_(1, newest_B1, torch.minimum(count_BS.gather(1, newest_B1), left_B1.int()))
        if self.config.pooling == "mean":
            self._sum_open(end_BS)

    def _sum_open(self, end_BS: Tensor) -> None:
        """Sums the states of each row's open segment anew; the others end at these positions."""
        start_B = torch.where(self.concepts_B > 0, _entry(end_BS, self.concepts_B) + 1, 0)
        self.open_count_B.copy_(self.length_B - start_B)
        self.open_sum_BE.zero_()
        if self.open_count_B.any():
            still = Extension.of(self.open_count_B.cpu(), start_B.cpu(), start_B.device)
            states_TE = self.tokens["states"][0][still.row_T, still.layout.position_T]
            self.open_sum_BE.index_add_(0, still.row_T, states_TE.to(self.open_sum_BE.dtype))

    def _for_each(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._for_each(change)
        if self.is_initialized:
            self.concepts.for_each(change)
            self.slots.for_each(change)
            open_books = ("open_sum_BE", "open_count_B") if self.config.pooling == "mean" else ()
            for name in ("concepts_B", *open_books):
                setattr(self, name, change(getattr(self, name)))

    def keys_and_values(self) -> Iterator[tuple[str, list[Tensor], Tensor]]:
        yield from super().keys_and_values()
        yield from self._keys_and_values(self.concepts, self.concepts_B)
        yield from self._keys_and_values(self.slots, self.concepts_B + 1)

    def bytes_in_use(self, parts: tuple[str, ...] = ("",)) -> int:
        concepts, rows = int(self.concepts_B.sum()), len(self.concepts_B)
        by_concept = concepts * self.concepts.bytes_per_entry(parts) + (concepts + rows) * self.slots.bytes_per_entry(
            parts
        )
        return super().bytes_in_use(parts) + by_concept


def _entry(x_BS: Tensor, entry_B: Tensor) -> Tensor:
    """One entry of each row; negative ones are the first."""
    return x_BS[torch.arange(len(entry_B), device=entry_B.device), entry_B.clamp(min=0)]
