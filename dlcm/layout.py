"""All index arithmetic of the project: packed documents, and the ragged geometry of their concepts.

Inside the models everything is packed: one row of T tokens that holds D documents. `RowLayout` is the door
between (B, L) rows and that row, `PackedLayout` describes documents in a packed row (of tokens or of
concepts), and `ConceptLayout` says which tokens make up a concept and which concepts a token may see.
Causality lives in one function, `ConceptLayout.from_boundaries`: pooling, backbone, cross-attention and
analysis read their geometry from it and never recompute it. Decoding has no later tokens; its geometry, of what goes on
behind a past, comes from `CLOSING_LAG` and `closing`, which say the same of one boundary.

Shapes: T is fixed by the batch. M changes every step; compiled code is spared most of that by rounding it up to a
multiple of a bucket, with concepts that have no token and that no token sees. And the host need not wait for it:
concepts can be laid out in the room that was enough for the last batches (`ConceptRooms`), and counted later.

Legend: T tokens, D documents, M concepts of all documents, S = M + D slots (each document's concepts behind
one null slot), B x L padded rows; D1 stands for D + 1.
"""

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dlcm.config import SlotWeighting, Visibility
from dlcm.host import OnHost


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Documents laid end to end in one row (section 4).

    Attributes:
        cu_seqlens_D1: int32, where each document begins; the last entry is the row's length.
        position_T: index of each element within its document.
        document_T: index of each element's document.
        max_seqlen: length of the longest document, on the host.
    """

    cu_seqlens_D1: Tensor
    position_T: Tensor
    document_T: Tensor
    max_seqlen: int

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens_D1: Tensor,
        total: int,
        max_seqlen: int | None = None,
        device: torch.device | None = None,
    ) -> "PackedLayout":
        """Layout of `total` elements cut at `cu_seqlens_D1`.

        Given on the CPU, or with `max_seqlen`, it costs no device synchronisation. Values are checked where
        that is free, on the CPU.

        Raises:
            ValueError: `cu_seqlens_D1` does not start at 0, increase strictly and end at `total`, or a document is
                longer than `max_seqlen`.
        """
        if cu_seqlens_D1.device.type == "cpu":
            lengths = cu_seqlens_D1.diff()
            if cu_seqlens_D1[0] != 0 or cu_seqlens_D1[-1] != total or bool((lengths <= 0).any()):
                raise ValueError(
                    f"cu_seqlens must start at 0, increase strictly (no empty document) and end at {total}, "
                    f"got {cu_seqlens_D1.tolist()}"
                )
            longest = int(lengths.max())
            if max_seqlen is not None and max_seqlen < longest:
                raise ValueError(f"max_seqlen={max_seqlen}, but a document has {longest} tokens: give their number")
            max_seqlen = longest
        elif max_seqlen is None:
            max_seqlen = int(cu_seqlens_D1.diff().max())
        cu_seqlens_D1 = cu_seqlens_D1.to(torch.int32)
        if device is not None and device.type == "cuda" and cu_seqlens_D1.device.type == "cpu":
            cu_seqlens_D1 = cu_seqlens_D1.pin_memory()  # from elsewhere, a copy waits for all that the device has to do
        return cls._of(cu_seqlens_D1.to(device, non_blocking=True), total, max_seqlen)

    @classmethod
    def _of(cls, cu_seqlens_D1: Tensor, total: int, max_seqlen: int) -> "PackedLayout":
        """Of what need not be checked."""
        starts_D = cu_seqlens_D1[:-1].long()
        index_T = torch.arange(total, device=starts_D.device)
        document_T = torch.bucketize(index_T, starts_D, right=True) - 1
        return cls(cu_seqlens_D1, index_T - starts_D[document_T], document_T, max_seqlen)

    @property
    def total(self) -> int:
        return self.position_T.shape[0]

    @property
    def num_documents(self) -> int:
        return self.cu_seqlens_D1.shape[0] - 1

    @property
    def is_first_T(self) -> Tensor:
        return self.position_T == 0

    def previous(self, x_T: Tensor, past_D: Tensor | None = None) -> Tensor:
        """The element before each, (T, ...): before the first of a document its past, else what is not to be used."""
        previous_T = x_T.roll(1, 0)
        if past_D is None:
            return previous_T
        return previous_T.index_copy(0, self.cu_seqlens_D1[:-1].long(), past_D.to(x_T.dtype))


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The door between (B, L) rows and the packed row: padding is dropped on the way in, restored on the way out."""

    shape: tuple[int, int]
    index_T: Tensor | None  # flat position of each real token; None when no row has padding

    @classmethod
    def from_mask(cls, attention_mask_BL: Tensor) -> tuple["RowLayout", Tensor]:
        """The layout of the rows' real tokens, and how many each row has, (B,) on the CPU.

        Raises:
            ValueError: a row with padding between real tokens.
        """
        mask_BL = attention_mask_BL.bool()
        runs_B = (mask_BL & ~torch.nn.functional.pad(mask_BL, (1, 0))[:, :-1]).sum(1)  # of real tokens
        if bool((runs_B > 1).any()):
            raise ValueError(f"row {int(runs_B.argmax())} of attention_mask has padding between its tokens")
        batch, length = mask_BL.shape
        index_T = mask_BL.flatten().nonzero().squeeze(1)
        return cls((batch, length), index_T), mask_BL.sum(1).cpu()

    @classmethod
    def full(cls, batch: int, length: int) -> tuple["RowLayout", Tensor]:
        """The layout of rows without padding, and how many tokens each row has, (B,) on the CPU."""
        return cls((batch, length), None), torch.full((batch,), length)

    def pack(self, x_BL: Tensor) -> Tensor:
        """(B, L) to (T,)."""
        x = x_BL.flatten()
        return x if self.index_T is None else x[self.index_T]

    def unpack(self, x_T: Tensor) -> Tensor:
        """(T, ...) to (B, L, ...), zero (or False) on padding."""
        if self.index_T is None:
            return x_T.view(*self.shape, *x_T.shape[1:])
        padded = x_T.new_zeros(self.shape[0] * self.shape[1], *x_T.shape[1:])
        return padded.index_copy(0, self.index_T, x_T).view(*self.shape, *x_T.shape[1:])


class ConceptRoom(NamedTuple):
    """Shapes that concepts are laid out in; what is left of them is padding, at the end of the last document.

    Attributes:
        total: M, padding included.
        longest: at least the length of the longest document in concepts, padding included.
    """

    total: int
    longest: int


class ConceptCounts(NamedTuple):
    """How many concepts there are in all, in the longest document and in the last: integers, or scalars on a device."""

    total: Any
    longest: Any
    last: Any

    def fit(self, room: ConceptRoom) -> Any:
        """Whether there is room for them, and for the padding that fills it."""
        padded_last = self.last + (room.total - self.total)
        return (self.total <= room.total) & (self.longest <= room.longest) & (padded_last <= room.longest)

    def room(self, bucket: int) -> ConceptRoom:
        """As little as holds them, M being a multiple of `bucket`."""
        padding = -self.total % bucket
        return ConceptRoom(self.total + padding, max(self.longest, self.last + padding))


class ConceptRooms:
    """How much room the concepts of a batch are given.

    Without foresight the host waits until the device has counted them. With it, a batch is given as much as the last
    `MEMORY` of its kind needed at most, and a little more; the host sees whether that was enough when it has launched
    all that follows, and where it was not, does it once more. So the device never idles while the host catches up.

    Attributes:
        bucket: M is rounded up to a multiple of it.
        foresight: see above.
        misses: batches for which the room was not enough.
    """

    MEMORY = 16
    MARGIN = 1 / 128

    def __init__(self, bucket: int = 1, foresight: bool = False):
        self.bucket, self.foresight, self.misses = bucket, foresight, 0
        self._last: dict[tuple[int, bool], deque[ConceptCounts]] = {}

    def foresee(self, tokens: PackedLayout, training: bool) -> ConceptRoom | None:
        """Room for the next batch, of these documents; None where the host must wait to know."""
        last = self._last.get((tokens.total, training))
        if not self.foresight or last is None:
            return None
        most = max(counts.total for counts in last)
        total = math.ceil(most * (1 + self.MARGIN) / self.bucket) * self.bucket
        if total < tokens.num_documents:  # each has a concept
            return None
        # A bound: half as much again costs nothing.
        longest = max(max(counts.longest, counts.last + total - counts.total) for counts in last)
        return ConceptRoom(total, min(total, longest + longest // 2))

    def saw(self, tokens: PackedLayout, training: bool, counts: ConceptCounts) -> None:
        """Remembers what a batch needed."""
        if self.foresight:
            self._last.setdefault((tokens.total, training), deque(maxlen=self.MEMORY)).append(counts)


@dataclass(frozen=True, slots=True)
class ConceptLayout:
    """Which tokens make up each concept, and which concepts each token may see.

    A document with concepts c_0 .. c_m has the slots [null, c_0, .., c_m]; a token sees a prefix of them that
    ends at `slot_T`. Six tokens whose boundaries are b = 1 0 1 0 0 1:

        token              0    1    2    3    4    5
        closed     concept 0    0    1    1    1    2      a boundary opens its segment
                   sees    -    -    c0   c0   c0   c0-1
        inclusive  concept 0    1    1    2    2    2      a boundary ends its segment, and sees it
                   sees    c0   c0   c0-1 c0-1 c0-1 c0-2

    The last document may end with padding: concepts of no token, after all others, so that causality alone keeps
    them out of everything (see `from_boundaries`).

    Attributes:
        tokens, concepts: the documents, measured in tokens and in concepts, padding included.
        counted: `ConceptCounts` without padding, and whether they fit, on their way to the host.
        segment_T: index of the concept each token belongs to.
        length_M: tokens in each concept; 0 for padding.
        last_M: index (in the packed row) of each concept's last token; for padding, of the last token of all.
        cu_slots_D1: int32, where each document's slots begin.
        slot_M: slot of each concept. The slot of a document's "no concept yet" is `cu_slots_D1[d]`.
        slot_T: newest slot each token may see.
    """

    tokens: PackedLayout
    concepts: PackedLayout
    counted: OnHost
    segment_T: Tensor
    length_M: Tensor
    last_M: Tensor
    cu_slots_D1: Tensor
    slot_M: Tensor
    slot_T: Tensor

    @classmethod
    def from_boundaries(
        cls,
        tokens: PackedLayout,
        boundary_T: Tensor,
        visibility: Visibility,
        bucket: int = 1,
        room: ConceptRoom | None = None,
        together: dist.ProcessGroup | None = None,
    ) -> "ConceptLayout":
        """The geometry that boundaries give (sections 3.3.2 and 3.5.2), made strictly causal.

        Everything a token may see is decided by boundaries at or before it: `closed`, a boundary at t says
        that the segment before t ended; `inclusive`, that it ends with t.

        Args:
            tokens: the documents, T tokens.
            boundary_T: bool, b_t.
            visibility: see the table above.
            bucket: M is rounded up to a multiple of it by padding.
            room: what to lay concepts out in. None waits until the device has counted them, and takes what they need.
                Room that is too small is safe, and useless: this is then the geometry of no boundaries, and not `fits`.
            together: ranks of which each calls this, and none `fits` unless all do.
        """
        segment_T = cls._segments(tokens, boundary_T, visibility)
        ends_D = segment_T[tokens.cu_seqlens_D1[1:].long() - 1] + 1
        counts_D = ends_D.diff(prepend=ends_D.new_zeros(1))
        counts = ConceptCounts(ends_D[-1], counts_D.max(), counts_D[-1])
        fit = torch.ones_like(counts.total, dtype=torch.bool) if room is None else counts.fit(room)
        numbers = torch.stack([*counts, fit.long()])
        if together is not None:
            dist.all_reduce(numbers[-1:], dist.ReduceOp.MIN, together)
        counted = OnHost(numbers)
        if room is None:
            room = ConceptCounts(*counted.read()[:-1]).room(bucket)
        else:
            boundary_T = boundary_T & fit
            segment_T = cls._segments(tokens, boundary_T, visibility)

        ends_D = segment_T[tokens.cu_seqlens_D1[1:].long() - 1] + 1
        ends_D = torch.nn.functional.pad(ends_D[:-1], (0, 1), value=room.total)
        cu_concepts_D1 = torch.nn.functional.pad(ends_D, (1, 0))
        cu_slots_D1 = cu_concepts_D1 + torch.arange(len(cu_concepts_D1), device=cu_concepts_D1.device)
        closed_T = segment_T - cu_concepts_D1[tokens.document_T]  # concepts of the document that are closed at t
        if visibility == "inclusive":
            closed_T = closed_T + boundary_T
        concepts = PackedLayout._of(cu_concepts_D1.to(torch.int32), room.total, room.longest)
        length_M = torch.zeros_like(concepts.position_T).scatter_add_(0, segment_T, torch.ones_like(segment_T))
        return cls(
            tokens=tokens,
            concepts=concepts,
            counted=counted,
            segment_T=segment_T,
            length_M=length_M,
            last_M=length_M.cumsum(0) - 1,
            cu_slots_D1=cu_slots_D1.to(torch.int32),
            slot_M=cu_slots_D1[concepts.document_T] + 1 + concepts.position_T,
            slot_T=cu_slots_D1[tokens.document_T] + closed_T,
        )

    @staticmethod
    def _segments(tokens: PackedLayout, boundary_T: Tensor, visibility: Visibility) -> Tensor:
        """Index of the concept each token belongs to, (T,)."""
        after_T = boundary_T if visibility == "closed" else boundary_T.roll(1)  # a boundary lies just before t
        return (after_T | tokens.is_first_T).cumsum(0) - 1

    @property
    def counts(self) -> ConceptCounts:
        """How many concepts there are, without padding. Waits until the device has counted them."""
        return ConceptCounts(*self.counted.read()[:-1])

    @property
    def num_concepts(self) -> int:
        return self.counts.total

    @property
    def fits(self) -> bool:
        """Whether there was room for the concepts, here and on all ranks that were asked; otherwise it is all to be
        done again. Waits like `counts`.
        """
        return bool(self.counted.read()[-1])

    @property
    def num_slots(self) -> int:
        return self.concepts.total + self.concepts.num_documents

    @property
    def context(self) -> PackedLayout:
        """All tokens of these documents: there are none before these."""
        return self.tokens

    @property
    def context_slot_U(self) -> Tensor:
        return self.slot_T

    @property
    def past_S(self) -> None:
        return None

    @property
    def closing_T(self) -> Tensor:
        """Which tokens are the first to see a concept, (T,) bool (see `closing`)."""
        null_T = self.cu_slots_D1[self.tokens.document_T]
        return self.slot_T != torch.where(self.tokens.is_first_T, null_T, self.tokens.previous(self.slot_T))

    @property
    def real_length_M(self) -> Tensor:
        """Tokens in each concept that is not padding."""
        return self.length_M[: self.num_concepts]

    @property
    def real_cu_concepts_D1(self) -> Tensor:
        """Where each document's concepts begin; the last entry is their number without padding."""
        return self.concepts.cu_seqlens_D1.clamp(max=self.num_concepts)

    @property
    def slot_position_S(self) -> Tensor:
        """Position of each slot's last token in its document; 0 for the null slot."""
        position_M = self.tokens.position_T[self.last_M]
        return position_M.new_zeros(self.num_slots).index_copy(0, self.slot_M, position_M)


class SlotLayout(Protocol):
    """What cross-attention has to know of a geometry: which slots each token sees, and how often each counts.

    Attributes:
        tokens: the documents, in the tokens that ask.
        context: the documents, in all their tokens: those before these, if there are any, and these.
        cu_slots_D1: int32, where each document's slots begin.
        slot_T: newest slot each token sees.
        context_slot_U: the same of all tokens of the documents.
        past_S: how many tokens before these had this one as their newest slot; None where there are none.
        num_slots: S.
    """

    @property
    def tokens(self) -> PackedLayout: ...
    @property
    def context(self) -> PackedLayout: ...
    @property
    def cu_slots_D1(self) -> Tensor: ...
    @property
    def slot_T(self) -> Tensor: ...
    @property
    def context_slot_U(self) -> Tensor: ...
    @property
    def past_S(self) -> Tensor | None: ...
    @property
    def num_slots(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SlotGeometry:
    """Which slots each token sees and how much each counts, as kernels read it (int32 and fp32).

    Attributes:
        oldest_T, newest_T: first and last slot that each token sees.
        log2_newest_T: log2 n(t, newest slot): it grows with every token.
        log2_count_S: log2 n(t, j) of every slot that is not t's newest; -inf where it never was anyone's.
        start_S1: first token whose newest slot is j or a later one; T at the end.
        end_S: where the tokens of the slot's document end.
    """

    oldest_T: Tensor
    newest_T: Tensor
    log2_newest_T: Tensor
    log2_count_S: Tensor
    start_S1: Tensor
    end_S: Tensor

    @classmethod
    def from_layout(cls, layout: SlotLayout, weighting: SlotWeighting = "replication") -> "SlotGeometry":
        """A handful of small kernels, no host synchronisation.

        Args:
            layout: the ragged geometry.
            weighting: `replication` counts a slot once per token mapped to it so far (Eq. 17), `uniform` once (Eq. 14).
        """
        newest_T = layout.slot_T.to(torch.int32)
        slot_S1 = torch.arange(layout.num_slots + 1, dtype=torch.int32, device=newest_T.device)
        start_S1 = torch.searchsorted(newest_T, slot_S1, out_int32=True)
        document_S = torch.searchsorted(layout.cu_slots_D1[1:-1], slot_S1[:-1], right=True)
        n_newest_T = torch.arange(1, len(newest_T) + 1, device=newest_T.device) - start_S1[layout.slot_T]
        count_S = start_S1.diff()
        if layout.past_S is not None:
            n_newest_T, count_S = n_newest_T + layout.past_S[layout.slot_T], count_S + layout.past_S
        if weighting == "uniform":
            n_newest_T, count_S = torch.ones_like(n_newest_T), torch.ones_like(count_S)
        return cls(
            oldest_T=layout.cu_slots_D1[layout.tokens.document_T],
            newest_T=newest_T,
            log2_newest_T=n_newest_T.float().log2(),
            log2_count_S=count_S.float().log2(),
            start_S1=start_S1,
            end_S=layout.tokens.cu_seqlens_D1[document_S + 1],
        )


@dataclass(frozen=True, slots=True)
class Extension:
    """New elements (tokens or concepts) of some rows of a batch, packed, behind what a cache has of these rows.

    Attributes:
        layout: the new elements; a document for each row that has any, positions going on from its past.
        context: the same documents with their past.
        row_D: the row of each document.
        row_T, row_U: the row of each new element, and of each element, past ones included.
    """

    layout: PackedLayout
    context: PackedLayout
    row_D: Tensor
    row_T: Tensor
    row_U: Tensor

    @classmethod
    def of(cls, new_B: Tensor, past_B: Tensor, device: torch.device) -> "Extension":
        """Of so many new elements in each row, after so many; both on the CPU, some row having any."""
        row_D = new_B.nonzero().squeeze(1)
        new_D, past_D = new_B[row_D], past_B[row_D]
        layout, context = (
            PackedLayout.from_cu_seqlens(cumulative(lengths_D), int(lengths_D.sum()), device=device)
            for lengths_D in (new_D, past_D + new_D)
        )
        position_T = layout.position_T + past_D.to(device)[layout.document_T]
        row_D = row_D.to(device)
        rows = row_D[layout.document_T], row_D[context.document_T]
        return cls(replace(layout, position_T=position_T), context, row_D, *rows)

    @property
    def last_D(self) -> Tensor:
        """The last new element of each document."""
        return self.layout.cu_seqlens_D1[1:].long() - 1


# How many tokens after a segment's last one its boundary is, which closes it and is the first to see its concept.
CLOSING_LAG: dict[Visibility, int] = {"closed": 1, "inclusive": 0}


def closing(boundary_T: Tensor, tokens: PackedLayout, visibility: Visibility) -> Tensor:
    """Which tokens close a segment, (T,) bool: under `closed` that before theirs, if there is one; else their own."""
    return boundary_T & ~tokens.is_first_T if CLOSING_LAG[visibility] else boundary_T


@dataclass(frozen=True, slots=True)
class ClosedSegments:
    """What boundaries make of new tokens, behind segments that are open (the counterpart of `ConceptLayout`).

    A document's segments here are those that close among its new tokens, in order, and the one that is open after them.
    The first may have begun in the past, or lie there altogether; the last may have no token yet.

    Attributes:
        segment_T: index of the segment each new token belongs to.
        length_G: new tokens in each of the G segments.
        first_D, open_D: index of each document's first and last segment.
        closed_M: index of each segment that closes.
        end_M: position of its last token.
        closed_T: how many of its document's segments have closed at each new token, since the past.
    """

    segment_T: Tensor
    length_G: Tensor
    first_D: Tensor
    open_D: Tensor
    closed_M: Tensor
    end_M: Tensor
    closed_T: Tensor

    @classmethod
    def from_boundaries(cls, new: Extension, boundary_T: Tensor, visibility: Visibility) -> "ClosedSegments":
        """The geometry that boundaries give behind a past (see `closing`). Waits for the device."""
        tokens, lag = new.layout, CLOSING_LAG[visibility]
        closing_T = closing(boundary_T, tokens, visibility)
        before_T = closing_T.cumsum(0) - closing_T.long()
        start_D = tokens.cu_seqlens_D1[:-1].long()
        closed_T = before_T - before_T[start_D][tokens.document_T] + closing_T
        segment_T = closed_T if lag else closed_T - closing_T.long()
        segments_D = closed_T[new.last_D] + 1
        open_D = segments_D.cumsum(0) - 1
        first_D = open_D + 1 - segments_D
        segment_T = first_D[tokens.document_T] + segment_T
        is_open_G = torch.zeros(int(open_D[-1]) + 1, dtype=torch.bool, device=segment_T.device)
        is_open_G[open_D] = True
        length_G = torch.zeros_like(is_open_G, dtype=torch.long).scatter_add_(0, segment_T, torch.ones_like(segment_T))
        end_M = tokens.position_T[closing_T] - lag
        return cls(segment_T, length_G, first_D, open_D, (~is_open_G).nonzero().squeeze(1), end_M, closed_T)


@dataclass(frozen=True, slots=True)
class CachedSlots:
    """A `SlotLayout` of new tokens and all slots of their documents, packed.

    Attributes: see `SlotLayout`.
    """

    tokens: PackedLayout
    context: PackedLayout
    cu_slots_D1: Tensor
    slot_T: Tensor
    past_S: Tensor

    @property
    def num_slots(self) -> int:
        return self.past_S.shape[0]

    @property
    def context_slot_U(self) -> Tensor:
        """Newest slots only ever move on: the tokens of a slot are neighbours."""
        count_S = self.past_S.scatter_add(0, self.slot_T, torch.ones_like(self.slot_T))
        return torch.repeat_interleave(count_S, output_size=self.context.total)


def cumulative(lengths: Tensor) -> Tensor:
    """(D + 1,) int32: where each of D documents begins, and the end."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
