"""The geometry of concepts against a twin that walks from token to token, and the doors between layouts."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm.layout import ConceptCounts, ConceptLayout, ConceptRoom, ConceptRooms, PackedLayout, RowLayout


def packed(lengths: list[int]) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return PackedLayout.from_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]))


@dataclass
class Twin:
    """What `ConceptLayout` states, written down while reading the tokens one by one.

    segments: (document, tokens) of each concept. sees: for each token, its document's concepts it may see.
    """

    segments: list[tuple[int, list[int]]]
    segment: list[int]
    sees: list[list[int]]


def slow_layout(lengths: list[int], boundaries: list[bool], visibility: str) -> Twin:
    twin = Twin([], [], [])
    token = 0
    for document, length in enumerate(lengths):
        closed: list[int] = []  # concepts of this document known to have ended
        open_concept = None
        for _ in range(length):
            if visibility == "closed" and boundaries[token] and open_concept is not None:
                closed.append(open_concept)
                open_concept = None
            if open_concept is None:
                open_concept = len(twin.segments)
                twin.segments.append((document, []))
            twin.segments[open_concept][1].append(token)
            twin.segment.append(open_concept)
            if visibility == "inclusive" and boundaries[token]:
                closed.append(open_concept)
                open_concept = None
            twin.sees.append(list(closed))
            token += 1
    return twin


@st.composite
def ragged(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    """Lengths of documents, and boundaries anywhere: at none, some or all tokens."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    total = sum(lengths)
    boundaries = draw(
        st.one_of(
            st.lists(st.booleans(), min_size=total, max_size=total),
            st.just([True] * total),
            st.just([False] * total),
        )
    )
    return lengths, boundaries


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_concept_layout_equals_its_slow_twin(visibility: str):
    @settings(max_examples=200)
    @given(ragged())
    def check(case: tuple[list[int], list[bool]]):
        lengths, boundaries = case
        tokens = packed(lengths)
        layout = ConceptLayout.from_boundaries(tokens, torch.tensor(boundaries), visibility)
        twin = slow_layout(lengths, boundaries, visibility)

        documents = [document for document, _ in twin.segments]
        per_document = [documents.count(document) for document in range(len(lengths))]
        assert layout.segment_T.tolist() == twin.segment
        assert layout.length_M.tolist() == [len(members) for _, members in twin.segments]
        assert layout.last_M.tolist() == [members[-1] for _, members in twin.segments]
        assert layout.concepts.document_T.tolist() == documents
        assert layout.concepts.position_T.tolist() == [i for count in per_document for i in range(count)]
        assert layout.concepts.cu_seqlens_D1.diff().tolist() == per_document
        assert layout.concepts.max_seqlen == max(per_document)

        # Slots: each document's null slot, then its concepts; a token sees the slots up to and including slot_T.
        slots = [
            slot
            for document in range(len(lengths))
            for slot in ["null", *(index for index, owner in enumerate(documents) if owner == document)]
        ]
        assert layout.num_slots == len(slots)
        assert [slots[slot] for slot in layout.slot_M] == list(range(len(documents)))
        starts = layout.cu_slots_D1.tolist()
        assert [slots[start] for start in starts[:-1]] == ["null"] * len(lengths)
        assert starts[-1] == len(slots)
        for token, document in enumerate(tokens.document_T.tolist()):
            visible = slots[starts[document] : int(layout.slot_T[token]) + 1]
            assert visible == ["null", *twin.sees[token]]

    check()


@pytest.mark.parametrize(
    ("visibility", "segment", "sees"),
    [("closed", [0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 1, 2]), ("inclusive", [0, 1, 1, 2, 2, 2], [1, 1, 2, 2, 2, 3])],
)
def test_worked_example_of_the_docstring(visibility: str, segment: list[int], sees: list[int]):
    boundaries = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
    layout = ConceptLayout.from_boundaries(packed([6]), boundaries, visibility)
    assert layout.segment_T.tolist() == segment
    assert layout.slot_T.tolist() == sees  # one document: slot 0 is null, slot j is concept j - 1


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_a_visible_concept_has_ended(visibility: str):
    """Causality read off the geometry: the last token of the newest visible concept is not later than the token."""

    @settings(max_examples=100)
    @given(ragged())
    def check(case: tuple[list[int], list[bool]]):
        lengths, boundaries = case
        layout = ConceptLayout.from_boundaries(packed(lengths), torch.tensor(boundaries), visibility)
        last_token_S = torch.full((layout.num_slots,), -1).index_copy(0, layout.slot_M, layout.last_M)
        newest_T = last_token_S[layout.slot_T]
        token_T = torch.arange(layout.tokens.total)
        assert bool((newest_T <= (token_T if visibility == "inclusive" else token_T - 1)).all())

    check()


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_a_bucket_adds_concepts_that_are_empty_and_unseen(visibility: str):
    """At the end of the last document; nothing else of the geometry changes."""
    paddings = set()

    @settings(max_examples=100)
    @given(ragged(), st.sampled_from([2, 3, 8, 50]))
    def check(case: tuple[list[int], list[bool]], bucket: int):
        lengths, boundaries = case
        plain = ConceptLayout.from_boundaries(packed(lengths), torch.tensor(boundaries), visibility)
        layout = ConceptLayout.from_boundaries(packed(lengths), torch.tensor(boundaries), visibility, bucket)
        real, total, last = plain.num_concepts, layout.concepts.total, len(lengths) - 1
        paddings.add(total - real)

        assert real == layout.num_concepts == plain.concepts.total
        assert total % bucket == 0 and real <= total < real + bucket
        assert layout.length_M.tolist() == plain.length_M.tolist() + [0] * (total - real)
        assert layout.last_M.tolist() == plain.last_M.tolist() + [sum(lengths) - 1] * (total - real)
        assert layout.concepts.document_T.tolist() == plain.concepts.document_T.tolist() + [last] * (total - real)
        assert layout.concepts.cu_seqlens_D1.tolist() == [*plain.concepts.cu_seqlens_D1.tolist()[:-1], total]
        counts_D = layout.concepts.cu_seqlens_D1.diff()
        assert layout.concepts.position_T.tolist() == [i for count in counts_D.tolist() for i in range(count)]
        assert layout.concepts.max_seqlen >= counts_D.max()

        assert torch.equal(layout.segment_T, plain.segment_T)
        assert torch.equal(layout.slot_T, plain.slot_T)  # so padding, behind all other slots, is not seen
        assert torch.equal(layout.slot_M[:real], plain.slot_M)
        assert layout.slot_M[real:].tolist() == list(range(plain.num_slots, layout.num_slots))
        assert torch.equal(layout.slot_position_S[: plain.num_slots], plain.slot_position_S)

    check()
    assert {0, 1, 2} < paddings


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_room_that_is_enough_is_filled_and_other_room_is_declined(visibility: str):
    """Enough: the geometry of a bucket as large. Too little: that of no boundaries, in the same room; and it tells."""
    outcomes = set()

    @settings(max_examples=200)
    @given(ragged(), st.integers(-3, 9), st.integers(-3, 9))
    def check(case: tuple[list[int], list[bool]], spare: int, spare_in_longest: int):
        lengths, boundaries = case
        tokens, boundary_T = packed(lengths), torch.tensor(boundaries)
        plain = ConceptLayout.from_boundaries(tokens, boundary_T, visibility)
        total = max(plain.num_concepts + spare, len(lengths))
        filled = ConceptLayout.from_boundaries(tokens, boundary_T, visibility, bucket=total)
        longest = max(filled.concepts.max_seqlen + spare_in_longest, 1)
        room = ConceptRoom(total, longest)
        layout = ConceptLayout.from_boundaries(tokens, boundary_T, visibility, room=room)

        assert layout.fits == (plain.num_concepts <= total and filled.concepts.max_seqlen <= longest)
        outcomes.add((layout.fits, plain.num_concepts <= total))
        assert layout.counts == plain.counts
        if not layout.fits:
            filled = ConceptLayout.from_boundaries(tokens, boundary_T & False, visibility, bucket=total)
        assert (layout.concepts.total, layout.concepts.max_seqlen) == (total, longest)
        for name in ("segment_T", "length_M", "last_M", "cu_slots_D1", "slot_M", "slot_T"):
            assert torch.equal(getattr(layout, name), getattr(filled, name)), name
        for name in ("cu_seqlens_D1", "position_T", "document_T"):
            assert torch.equal(getattr(layout.concepts, name), getattr(filled.concepts, name)), name

    check()
    assert outcomes == {(True, True), (False, True), (False, False)}


def test_rooms_are_foreseen_from_what_the_last_batches_needed():
    rooms, tokens = ConceptRooms(bucket=8, foresight=True), packed([60, 40])
    assert rooms.foresee(tokens, training=True) is None  # nothing was seen yet
    for total in (30, 41, 20):
        rooms.saw(tokens, True, ConceptCounts(total, total - 10, 10))
    room = rooms.foresee(tokens, training=True)
    assert room.total == 48 and ConceptCounts(41, 31, 10).fit(room)
    assert rooms.foresee(tokens, training=False) is None and rooms.foresee(packed([99]), training=True) is None
    assert rooms.foresee(packed([1] * 50 + [50]), training=True) is None  # more documents than concepts
    for _ in range(ConceptRooms.MEMORY):
        rooms.saw(tokens, True, ConceptCounts(20, 10, 10))
    assert rooms.foresee(tokens, training=True).total == 24
    without = ConceptRooms(bucket=8)
    without.saw(tokens, True, ConceptCounts(20, 10, 10))
    assert without.foresee(tokens, training=True) is None


@settings(max_examples=200)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 40))
def test_a_batch_like_the_last_always_has_room(counts_D: list[int], bucket: int):
    counts = ConceptCounts(sum(counts_D), max(counts_D), counts_D[-1])
    assert counts.fit(counts.room(bucket)) and counts.room(bucket).total % bucket == 0
    rooms, tokens = ConceptRooms(bucket, foresight=True), packed([30] * len(counts_D))
    rooms.saw(tokens, True, counts)
    assert counts.fit(rooms.foresee(tokens, training=True))


@settings(max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_packed_layout_counts_positions_and_documents(lengths: list[int]):
    layout = packed(lengths)
    assert layout.cu_seqlens_D1.dtype == torch.int32
    assert layout.position_T.tolist() == [i for length in lengths for i in range(length)]
    assert layout.document_T.tolist() == [d for d, length in enumerate(lengths) for _ in range(length)]
    assert layout.is_first_T.tolist() == [i == 0 for length in lengths for i in range(length)]
    assert (layout.total, layout.num_documents, layout.max_seqlen) == (sum(lengths), len(lengths), max(lengths))


@pytest.mark.parametrize(
    "cu_seqlens",
    [[1, 4, 6], [0, 4, 5], [0, 4, 7], [0, 3, 3, 6], [0, 5, 3, 6], [6], [0]],
    ids=["late start", "too short", "too long", "empty document", "decreasing", "no start", "no document"],
)
def test_packed_layout_rejects(cu_seqlens: list[int]):
    with pytest.raises(ValueError, match="cu_seqlens must start at 0") as error:
        PackedLayout.from_cu_seqlens(torch.tensor(cu_seqlens, dtype=torch.int32), 6)
    assert str(cu_seqlens) in str(error.value) and "6" in str(error.value)
    assert "\n" not in str(error.value)


def test_packed_layout_rejects_documents_longer_than_it_was_told():
    with pytest.raises(ValueError, match="max_seqlen=3, but a document has 4 tokens"):
        PackedLayout.from_cu_seqlens(torch.tensor([0, 4, 6]), 6, max_seqlen=3)


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    real = [draw(st.integers(0, length)) for _ in range(batch)]
    left = draw(st.booleans())
    rows = [[0] * (length - n) + [1] * n if left else [1] * n + [0] * (length - n) for n in real]
    return torch.tensor(rows)


@settings(max_examples=100)
@given(masks(), st.integers(0, 2**16))
def test_rows_survive_the_round_trip(mask_BL: torch.Tensor, seed: int):
    x_BL = torch.randn(mask_BL.shape, generator=torch.Generator().manual_seed(seed))
    rows, lengths_B = RowLayout.from_mask(mask_BL)
    x_T = rows.pack(x_BL)
    assert x_T.tolist() == [x for row, mask in zip(x_BL, mask_BL, strict=True) for x in row[mask.bool()].tolist()]
    assert lengths_B.tolist() == mask_BL.sum(1).tolist()
    assert torch.equal(rows.unpack(x_T), x_BL * mask_BL)
    assert torch.equal(rows.unpack(torch.stack([x_T, -x_T], 1))[..., 1], -x_BL * mask_BL)
    assert torch.equal(rows.unpack(x_T > 0), (x_BL > 0) & mask_BL.bool())


def test_rows_without_padding():
    x_BL = torch.arange(12).view(3, 4)
    rows, lengths_B = RowLayout.full(3, 4)
    assert lengths_B.tolist() == [4, 4, 4]
    assert torch.equal(rows.unpack(rows.pack(x_BL)), x_BL)
    masked, same = RowLayout.from_mask(torch.ones(3, 4))
    assert torch.equal(masked.pack(x_BL), rows.pack(x_BL)) and torch.equal(same, lengths_B)


def test_padding_between_tokens_is_refused():
    with pytest.raises(ValueError, match="row 1 of attention_mask has padding between its tokens"):
        RowLayout.from_mask(torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]]))
