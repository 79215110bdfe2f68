"""Cached decoding is the model: whatever the columns are cut into, every position gets what the parallel forward gives.

`decode` feeds a batch to a cache piece by piece; `assert_same` holds it against one forward pass over everything. Near
the end of the file, caches are damaged on purpose, and the comparison has to see it.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from dlcm import DLCMForCausalLM, decoding
from dlcm.cache import ConceptCache, DecodingCache
from dlcm.causal_lm import PackedCausalLM
from dlcm.config import changed
from dlcm.decoding import StepGraphs
from tests.conftest import VOCABULARY, random_options, tiny_baseline, tiny_dlcm

TOLERANCE = 1e-10  # in float64
# `test_any_pieces_under_any_combination_of_options` draws from all of their combinations.
OPTIONS: list[dict[str, Any]] = [
    {"segmenter": segmenter, "visibility": visibility, "smoothing": smoothing}
    for (segmenter, visibility), smoothing in zip(
        itertools.product(["learned", "rule", "fixed", "words"], ["closed", "inclusive"]),
        ["adjacent", "none", "none", "adjacent"] * 2,
        strict=True,
    )
]
OPTIONS += [
    {"slot_weighting": "uniform"},
    {"cross_attention_rope": False},
    {"visibility": "inclusive", "cross_attention_backend": "masked"},
    {"visibility": "inclusive", "qk_norm": True, "d_scan": 8},
]
OPTIONS += [
    {"visibility": visibility} | other
    for visibility in ("closed", "inclusive")
    for other in (
        {"threshold": 1e-9},  # every token is a boundary
        {"threshold": 1 - 1e-9},  # none but the first is
        {"injection": "every"},
        {"clean_start": True},
        {"segmenter": "words", "injection": "first", "clean_start": True},
        {"pooling": "last", "cross_attention_every": 1, "decoder_layers": 2},
        {"pooling": "last", "injection": "closing", "cross_attention": False},
    )
]
OPTIONS += [{"token_window": 3}]
MODELS = [pytest.param(tiny_dlcm, options, id="-".join(map(str, options.values()))) for options in OPTIONS]
LLAMAS: list[dict[str, Any]] = [{}, {"qk_norm": True}, {"token_window": 3, "global_every": 2}]
MODELS += [pytest.param(tiny_baseline, options, id=f"llama{options}") for options in LLAMAS]
BOTH = [pytest.param(tiny_dlcm, id="dlcm"), pytest.param(tiny_baseline, id="llama")]


def left_padded(lengths: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """Random tokens and their mask, (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    ids_BL = torch.randint(VOCABULARY, (len(lengths), columns), generator=generator)
    return ids_BL, (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()


@torch.no_grad()
def whole(model: PackedCausalLM, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """(B, L, V + 2): logits, and for a DLCM probability and boundary, by one forward pass."""
    return _everything(model(ids_BL, attention_mask=mask_BL))


@torch.no_grad()
def decode(
    model: PackedCausalLM, ids_BL: Tensor, mask_BL: Tensor, pieces: Sequence[int], cache: DecodingCache
) -> Tensor:
    """The same of the columns behind those in the cache, in pieces of so many."""
    answers, start = [], cache.columns
    for piece in pieces:
        end = start + piece
        output = model(ids_BL[:, start:end], attention_mask=mask_BL[:, :end], past_key_values=cache)
        assert output.past_key_values is cache and cache.get_seq_length() == end
        answers.append(_everything(output))
        start = end
    return torch.cat(answers, 1)


def _everything(output: Any) -> Tensor:
    parts = [output.logits]
    if "boundaries" in output:
        parts += [output.boundary_probs[..., None], output.boundaries[..., None].to(output.logits.dtype)]
    return torch.cat(parts, -1)


def assert_same(decoded: Tensor, expected: Tensor, mask_BL: Tensor, tolerance: float = TOLERANCE) -> None:
    """On real tokens; the newest columns of the expected, if there are more."""
    columns = decoded.shape[1]
    real_BL = mask_BL[:, -columns:].bool()
    torch.testing.assert_close(decoded[real_BL], expected[:, -columns:][real_BL], rtol=0, atol=tolerance)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[int]]:
    """Rows of unequal lengths, padded on the left, and the pieces that their columns are cut into."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    pieces, left = [], max(lengths)
    while left:
        pieces.append(draw(st.integers(1, left)))
        left -= pieces[-1]
    return *left_padded(lengths, draw(st.integers(0, 2**16))), pieces


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_any_pieces_are_the_parallel_forward(build: Callable, options: dict):
    model = build(3, **options)
    rates = []

    @settings(max_examples=4)  # of which the first is one token alone
    @example((*left_padded([14, 8, 1], 3), [5, 1, 6, 2]))
    @given(cases())
    def check(case: tuple[Tensor, Tensor, list[int]]) -> None:
        ids_BL, mask_BL, pieces = case
        expected = whole(model, ids_BL, mask_BL)
        rates.append(expected[mask_BL.bool()][:, -1].mean())
        for cut in (pieces, [1] * sum(pieces), [sum(pieces)]):
            assert_same(decode(model, ids_BL, mask_BL, cut, model.new_cache()), expected, mask_BL)

    check()
    if isinstance(model, DLCMForCausalLM) and "threshold" not in options:
        assert 0.2 < torch.stack(rates).mean() < 0.8


def test_any_pieces_under_any_combination_of_options():
    @settings(max_examples=60)
    @given(cases())
    def check(case: tuple[Tensor, Tensor, list[int]]) -> None:
        ids_BL, mask_BL, pieces = case
        seed = int(ids_BL.sum())
        model = tiny_dlcm(seed, **random_options(seed))
        expected = whole(model, ids_BL, mask_BL)
        cache = model.new_cache()
        assert_same(decode(model, ids_BL, mask_BL, pieces, cache), expected, mask_BL)
        keep = sum(pieces) // 2  # and goes on from the middle
        cache.crop(keep) if keep else cache.reset()
        assert_same(decode(model, ids_BL, mask_BL, [1] * (sum(pieces) - keep), cache), expected, mask_BL)

    check()


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
@pytest.mark.parametrize("piece", [1, 2, 3, 4, 6])
def test_boundaries_on_the_edges_of_pieces(visibility: str, piece: int):
    """A boundary every 3 tokens, pieces that end before, at and after one."""
    model = tiny_dlcm(1, segmenter="fixed", target_ratio=3.0, visibility=visibility)
    ids_BL, mask_BL = left_padded([24, 23, 22], 0)
    decoded = decode(model, ids_BL, mask_BL, [piece] * (24 // piece), model.new_cache())
    assert_same(decoded, whole(model, ids_BL, mask_BL), mask_BL)


@pytest.mark.parametrize("build", BOTH)
def test_full_precision_of_training(build: Callable):
    """The bar: 1e-4 in fp32, and the same token at every position."""
    model = build(5).float()
    ids_BL, mask_BL = left_padded([40, 33, 7], 1)
    expected = whole(model, ids_BL, mask_BL)
    for pieces in ([40], [20, *[1] * 20], [1] * 40, [7] * 5 + [5]):
        decoded = decode(model, ids_BL, mask_BL, pieces, model.new_cache())
        assert_same(decoded, expected, mask_BL, 1e-4)
        real_BL = mask_BL.bool()
        assert torch.equal(decoded[real_BL].argmax(-1), expected[real_BL].argmax(-1))


@pytest.mark.parametrize("build", BOTH)
def test_half_precision_products(build: Callable):
    """Under autocast keys and values are bf16, and the residual stream is not."""
    model = build(5).float()
    ids_BL, mask_BL = left_padded([12, 9], 1)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache()
        decoded = decode(model, ids_BL, mask_BL, [5, *[1] * 7], cache)
        expected = whole(model, ids_BL, mask_BL)
    assert cache.tokens["decoder_keys"][0].dtype == torch.bfloat16
    scale = expected[..., :VOCABULARY].abs().max()
    assert (decoded - expected)[mask_BL.bool()][:, :VOCABULARY].abs().median() < 0.02 * scale
    if isinstance(cache, ConceptCache):
        assert cache.tokens["states"][0].dtype == cache.open_sum_BE.dtype == torch.float32


# Rows


@pytest.mark.parametrize("build", BOTH)
def test_a_row_is_the_same_alone(build: Callable):
    model = build(2)
    ids_BL, mask_BL = left_padded([17, 5, 11], 3)
    pieces = [6, 1, 1, 5, 1, 1, 1, 1]
    together = decode(model, ids_BL, mask_BL, pieces, model.new_cache())
    for row, length in enumerate((17, 5, 11)):
        alone_ids, alone_mask = ids_BL[row : row + 1, -length:], mask_BL[row : row + 1, -length:]
        alone = decode(model, alone_ids, alone_mask, [3, *[1] * (length - 3)], model.new_cache())
        assert_same(together[row : row + 1, -length:], alone, alone_mask)


@pytest.mark.parametrize("build", BOTH)
def test_rows_may_pause(build: Callable):
    """Padding between turns: rows that have no token in a column are as if the column had not been."""
    model = build(2)
    documents = [torch.randint(VOCABULARY, (9,), generator=torch.Generator().manual_seed(s)) for s in range(2)]
    cache, fed = model.new_cache(), [0, 0]
    schedule = [[2, 2], [1, 0], [0, 1], [3, 1], [1, 1], [0, 3], [1, 1], [1, 0]]
    expected = [whole(model, d[None], torch.ones(1, 9))[0] for d in documents]
    for news in schedule:
        columns = max(news)
        ids_BL = torch.full((2, columns), 7)
        mask_BL = torch.zeros(2, columns, dtype=torch.long)
        for row, new in enumerate(news):
            ids_BL[row, columns - new :] = documents[row][fed[row] : fed[row] + new]
            mask_BL[row, columns - new :] = 1
        with torch.no_grad():
            decoded = _everything(model(ids_BL, attention_mask=mask_BL, past_key_values=cache))
        for row, new in enumerate(news):
            found, wanted = decoded[row, columns - new :], expected[row][fed[row] : fed[row] + new]
            torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
            fed[row] += new
    assert fed == cache.length_B.tolist() == [9, 9] and cache.columns == sum(map(max, schedule))
    cache.crop(-4)  # of these columns the first row had two, the second three
    assert cache.length_B.tolist() == [7, 6]
    with torch.no_grad():
        again = _everything(model(torch.stack([documents[0][7:], documents[1][6:8]]), past_key_values=cache))
    for row, wanted in enumerate([expected[0][7:], expected[1][6:8]]):
        torch.testing.assert_close(again[row], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_one_column_is_a_piece_like_others(build: Callable, options: dict):
    """The step, of static shapes, and its slow twin: packed, any number of tokens."""
    model = build(4, **options)
    ids_BL, mask_BL = left_padded([9, 7, 3], 5)
    stepped, packed = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for column in range(9):
            inputs = ids_BL[:, column : column + 1], mask_BL[:, column : column + 1]
            logits = model(inputs[0], attention_mask=inputs[1], past_key_values=stepped).logits
            packed.begin(3, model.device, torch.float64, torch.float64)
            packed.reserve(1)
            if column == 0:
                model.start(packed)
            h_TE, _, rows = model._decode_many(*inputs, packed)
            twin = model.last_logits(rows.unpack(h_TE))
            real = inputs[1].bool()
            torch.testing.assert_close(logits[real], twin[real], rtol=0, atol=TOLERANCE)
    assert_equal_books(stepped, packed)


def assert_equal_books(one: DecodingCache, other: DecodingCache) -> None:
    assert torch.equal(one.length_B, other.length_B)
    if isinstance(one, ConceptCache):
        assert isinstance(other, ConceptCache)
        assert torch.equal(one.concepts_B, other.concepts_B)
        if one.config.pooling == "mean":
            assert torch.equal(one.open_count_B, other.open_count_B)
            torch.testing.assert_close(one.open_sum_BE, other.open_sum_BE, rtol=0, atol=TOLERANCE)
        most = int(one.concepts_B.max()) + 1
        for name in ("count", "end"):
            ours, theirs = (cache.slots[name][0][:, :most] for cache in (one, other))
            there = torch.arange(most) <= one.concepts_B[:, None]
            assert torch.equal(ours[there], theirs[there]), name
        assert torch.equal(one.slots["count"][0][:, :most].sum(1), one.length_B)


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_crop_is_never_having_read(build: Callable, options: dict):
    model = build(6, **options)
    ids_BL, mask_BL = left_padded([9, 9, 5], 7)
    expected = whole(model, ids_BL, mask_BL)
    other_BL = (ids_BL + 1) % VOCABULARY
    for keep in (0, 1, 4, 6, 8, 9):
        cache = model.new_cache()
        decode(model, torch.cat([ids_BL[:, :keep], other_BL[:, keep:]], 1), mask_BL, [5, *[1] * 4], cache)
        if keep:
            cache.crop(keep - 9 if keep % 2 else keep)
        else:
            cache.reset()
        assert cache.get_seq_length() == keep
        fresh = model.new_cache()
        if 0 < keep < 9:
            decode(model, ids_BL, mask_BL, [keep], fresh)
            assert_equal_books(cache, fresh)
        if keep < 9:
            again = copy.deepcopy(cache)
            assert_same(decode(model, ids_BL, mask_BL, [9 - keep], cache), expected, mask_BL)
            assert_same(decode(model, ids_BL, mask_BL, [1] * (9 - keep), again), expected, mask_BL)


@pytest.mark.parametrize("build", BOTH)
def test_rows_change_places(build: Callable):
    model = build(8)
    ids_BL, mask_BL = left_padded([12, 6, 10], 9)
    order = torch.tensor([2, 2, 0])
    for change in ("reorder_cache", "batch_select_indices"):
        cache = model.new_cache()
        decode(model, ids_BL, mask_BL, [4, 1, 1], cache)
        getattr(cache, change)(order)
        assert_same(
            decode(model, ids_BL[order], mask_BL[order], [1, 1, 4], cache),
            whole(model, ids_BL[order], mask_BL[order]),
            mask_BL[order],
        )


@pytest.mark.parametrize("build", BOTH)
def test_a_prefix_serves_several(build: Callable):
    model = build(8)
    prefix, tails = torch.arange(9)[None], torch.randint(VOCABULARY, (3, 5))
    rows_BL, ones_BL = torch.cat([prefix.expand(3, -1), tails], 1), torch.ones(3, 14)
    cache = model.new_cache()
    decode(model, prefix, torch.ones(1, 9), [9], cache)
    several = copy.deepcopy(cache)
    several.batch_repeat_interleave(3)
    expected = whole(model, rows_BL, ones_BL)
    assert_same(decode(model, rows_BL, ones_BL, [5], several), expected, ones_BL)
    assert_same(decode(model, rows_BL[:1], ones_BL[:1], [1] * 5, cache), expected[:1], ones_BL[:1])


@pytest.mark.parametrize("build", BOTH)
def test_reset_starts_anew(build: Callable):
    model = build(8)
    cache = model.new_cache(room=20)
    for seed in (1, 2):
        ids_BL, mask_BL = left_padded([12, 9], seed)
        assert_same(decode(model, ids_BL, mask_BL, [4, *[1] * 8], cache), whole(model, ids_BL, mask_BL), mask_BL)
        cache.reset()
        assert cache.length_B.tolist() == [0, 0] and cache.bytes_in_use() <= 2 * 2**10
    assert cache.moves == 0 or isinstance(cache, ConceptCache)


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("room", [0, 5, 64])
def test_room_grows_and_what_it_holds_does_not_matter(build: Callable, room: int):
    """Entries that no row has may hold anything."""
    model = build(9)
    ids_BL, mask_BL = left_padded([20, 13], 2)
    cache = model.new_cache(room)
    with torch.no_grad():
        model(ids_BL[:, :8], attention_mask=mask_BL[:, :8], past_key_values=cache)
    rooms = [(cache.tokens, cache.length_B)]
    if isinstance(cache, ConceptCache):
        rooms += [(cache.concepts, cache.concepts_B), (cache.slots, cache.concepts_B + 1)]
    for held, used_B in rooms:
        for tensors in held.tensors.values():
            for x_BS in tensors:
                if x_BS.is_floating_point():
                    x_BS[torch.arange(x_BS.shape[1]) >= used_B[:, None]] = torch.nan
    decoded = decode(model, ids_BL, mask_BL, [1, 1, 5, 1, 1, 3], cache)
    assert_same(decoded, whole(model, ids_BL, mask_BL), mask_BL)
    assert cache.tokens.entries == max(room, cache.tokens.entries) <= 64


def test_bytes_in_use_are_those_of_rows():
    """In fp32. Of a token: keys and values of 2 blocks, a state; of a concept the same; of a slot also two integers."""
    model = tiny_dlcm(0, segmenter="fixed", target_ratio=3.0).float()
    cache = model.new_cache(64)
    ids_BL, mask_BL = left_padded([12, 6], 0)
    decode(model, ids_BL, mask_BL, [12], cache)
    tokens, concepts, rows = 18, 3 + 1, 2  # the last segment of each row is open
    per_token, per_concept = 2 * 2 * 8 + 16, 2 * 2 * 12 + 24
    slot = 2 * 8 + 2
    assert cache.bytes_in_use() == 4 * (tokens * per_token + concepts * per_concept + (concepts + rows) * slot)


# Errors


@pytest.mark.parametrize("build", BOTH)
def test_positions_run_out_with_an_error_and_nothing_lost(build: Callable):
    model = build(1, max_position_embeddings=16)
    ids_BL, mask_BL = left_padded([16, 9], 4)
    cache = model.new_cache()
    with pytest.raises(ValueError, match="0 tokens in the cache and 17 new ones"):
        model(torch.zeros(2, 17, dtype=torch.long), past_key_values=cache)
    decode(model, ids_BL, mask_BL, [12], cache)
    with pytest.raises(ValueError, match=r"12 tokens in the cache and 5 new ones .* max_position_embeddings=16"):
        model(ids_BL[:, :5], past_key_values=cache)
    expected = whole(model, ids_BL, mask_BL)
    assert_same(decode(model, ids_BL, mask_BL, [1, 3], cache), expected, mask_BL)
    with pytest.raises(ValueError, match="16 tokens in the cache and 1 new ones"):
        model(ids_BL[:, :1], past_key_values=cache)
    cache.crop(-1)
    assert_same(decode(model, ids_BL, mask_BL, [1], cache), expected, mask_BL)


@pytest.mark.parametrize("build", BOTH)
def test_pauses_do_not_use_up_positions(build: Callable):
    model = build(1, max_position_embeddings=8)
    cache = model.new_cache()
    ids_B1, on, off = torch.tensor([[1], [2]]), torch.ones(2, 1), torch.tensor([[1], [0]])
    with torch.no_grad():
        for mask in [on, off, off, on, 1 - off, 1 - off, *[on] * 4]:  # never more than 8 of a row
            model(ids_B1, attention_mask=mask, past_key_values=cache)
    assert cache.length_B.tolist() == [8, 8]


@pytest.mark.parametrize("build", BOTH)
def test_what_does_not_fit_is_refused(build: Callable):
    model = build(1)
    ids_BL, mask_BL = left_padded([4, 3], 4)
    cache = model.new_cache()
    model(ids_BL, past_key_values=cache)
    for arguments, message in (
        ({"input_ids": ids_BL[:1], "past_key_values": cache}, "past_key_values has 2 rows, the batch 1: .*interleave"),
        ({"input_ids": ids_BL, "past_key_values": DynamicCache()}, r"a DynamicCache.*use model.new_cache\(\)"),
        ({"input_ids": ids_BL, "past_key_values": cache, "labels": ids_BL}, "neither labels nor cu_seqlens"),
        ({"input_ids": ids_BL[:1], "use_cache": True, "cu_seqlens": torch.tensor([0, 4])}, "neither labels nor"),
        ({"input_ids": ids_BL, "past_key_values": cache, "attention_mask": mask_BL[:, 1:]}, r"\(2, 3\) does not fit"),
        (
            {"input_ids": ids_BL, "past_key_values": cache, "attention_mask": torch.tensor([[1, 0, 1, 1]] * 2)},
            "row 0 of attention_mask has padding between",
        ),
        ({"input_ids": ids_BL, "labels": ids_BL, "logits_to_keep": 1}, "logits_to_keep is for decoding"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    assert cache.get_seq_length() == 4
    other = (tiny_baseline if build is tiny_dlcm else tiny_dlcm)(0)
    with pytest.raises(ValueError, match="needs a"):
        model(ids_BL, past_key_values=other.new_cache())
    with pytest.raises(ValueError, match="CUDA graphs need a model on a GPU, this one is on cpu"):
        model.new_cache(replayed=True)


@pytest.mark.parametrize("build", BOTH)
def test_no_cache_is_made_unasked_and_gradients_end_at_one(build: Callable):
    model = build(1)
    ids_BL, _ = left_padded([4, 4], 4)
    assert model(ids_BL).past_key_values is None and model(ids_BL).logits.requires_grad
    output = model(ids_BL, use_cache=True)
    assert isinstance(output.past_key_values, model.cache_class) and not output.logits.requires_grad
    assert model(ids_BL, use_cache=True, return_dict=False)[-1].get_seq_length() == 4


@pytest.mark.parametrize("build", BOTH)
def test_logits_to_keep(build: Callable):
    model = build(1)
    ids_BL, mask_BL = left_padded([7, 4], 4)
    with torch.no_grad():
        every = model(ids_BL, attention_mask=mask_BL).logits
        for arguments in ({}, {"use_cache": True}):
            kept = model(ids_BL, attention_mask=mask_BL, logits_to_keep=2, **arguments).logits
            torch.testing.assert_close(kept, every[:, -2:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("build", BOTH)
def test_columns_of_nothing_but_padding(build: Callable):
    model = build(1)
    ids_BL, mask_BL = left_padded([6, 3], 4)
    ids_BL, mask_BL = torch.cat([ids_BL[:, :3], ids_BL], 1), torch.cat([0 * mask_BL[:, :3], mask_BL], 1)
    expected = whole(model, ids_BL, mask_BL)
    for pieces in ([3, 6], [1, 1, 1, 1, 5], [2, 7]):
        assert_same(decode(model, ids_BL, mask_BL, pieces, model.new_cache()), expected, mask_BL)


# The comparison sees what is wrong


def _forget_states(cache: ConceptCache) -> None:
    cache.tokens["states"][0].mul_(-1)


def _forget_the_open_sum(cache: ConceptCache) -> None:
    cache.open_sum_BE.zero_()


def _forget_the_open_count(cache: ConceptCache) -> None:
    cache.open_count_B += 1


def _miscount(cache: ConceptCache) -> None:
    cache.slots["count"][0][:, 1] += 1
    cache.slots["count"][0][:, 2] -= 1


def _forget_what_was_reasoned(cache: ConceptCache) -> None:
    cache.concepts["reasoned"][0].zero_()


def _forget_a_concept(cache: ConceptCache) -> None:
    cache.concepts["backbone_values"][1].zero_()


def _forget_what_the_second_layer_reads(cache: ConceptCache) -> None:
    cache.slots["cross_values"][1].zero_()


def _mistake_positions(cache: ConceptCache) -> None:
    cache.tokens["encoder_keys"][0].copy_(cache.tokens["encoder_keys"][0].roll(1, 1))


@pytest.mark.parametrize(
    "damage",
    [
        _forget_states,
        _forget_the_open_sum,
        _forget_the_open_count,
        _miscount,
        _forget_what_was_reasoned,
        _forget_a_concept,
        _forget_what_the_second_layer_reads,
        _mistake_positions,
    ],
)
@pytest.mark.parametrize("pieces", [[8], [1] * 8])
def test_damage_is_seen(damage: Callable, pieces: list[int]):
    segmenter = "fixed" if damage is not _forget_states else "learned"
    model = tiny_dlcm(3, target_ratio=3.0, segmenter=segmenter, cross_attention_every=1, decoder_layers=2)
    ids_BL, mask_BL = left_padded([16, 15], 0)
    cache = model.new_cache()
    decode(model, ids_BL, mask_BL, [8], cache)
    damage(cache)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(decode(model, ids_BL, mask_BL, pieces, cache), whole(model, ids_BL, mask_BL), mask_BL)


# Graphs


BETWEEN_DEVICES = {torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default}


class Tape(TorchDispatchMode):
    """Operations in the order in which they were run, with their arguments: run again, they see what is there then.

    Tensors that none of them made are the very ones of the first time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple[Callable, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in BETWEEN_DEVICES, f"{func}: such copies are not captured"
        result = func(*args, **(kwargs or {}))
        self.played.append((func, args, kwargs or {}, result))
        return result

    def play(self) -> dict[int, Tensor]:
        """What is now in the place of each tensor that was made, by the id of the one at the time of recording."""
        now: dict[int, Tensor] = {}

        def current(x: Any) -> Any:
            return list(map(current, x)) if isinstance(x, list) else now.get(id(x), x)

        for func, args, kwargs, result in self.played:
            again = func(*map(current, args), **{name: current(x) for name, x in kwargs.items()})
            several = isinstance(result, tuple | list)
            now |= zip(map(id, result), again, strict=True) if several else {id(result): again}
        return now


class TracedSteps(StepGraphs):
    """Parts of a step as lists of operations on given tensors, recorded once: what a CUDA graph is, without a GPU.

    Whatever depends on values at the time of recording, or on new tensors, is wrong or refused when they are run again.
    """

    def __init__(self, model: PackedCausalLM, cache: DecodingCache):
        self.moves, self._parts = cache.moves, {}
        self._ids_B = torch.zeros_like(cache.length_B)
        self._active_B = torch.zeros_like(cache.length_B, dtype=torch.bool)
        model.step(self._ids_B, self._active_B, cache, self._capture, whole=True)

    def _capture(self, function: Callable, *arguments: Any) -> Any:
        with Tape() as tape:
            result = function(*arguments)
        leaves: list[Tensor] = _tensors(result)

        def replay() -> None:
            now = tape.play()
            for leaf in leaves:
                new = now.get(id(leaf), leaf)
                if leaf is not new:
                    leaf.copy_(new)

        self._parts[function.__name__] = replay, result
        return result


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if result is None:
        return []
    return [leaf for name in result.__dataclass_fields__ for leaf in _tensors(getattr(result, name))]


@pytest.mark.parametrize(("build", "options"), MODELS)
def test_a_step_can_be_replayed(build: Callable, options: dict, monkeypatch: pytest.MonkeyPatch):
    """Captured before there is any token, then between two pieces; rooms grow meanwhile, and it is captured again."""
    captured = []

    def traced(model: PackedCausalLM, cache: DecodingCache) -> StepGraphs:
        before = copy.deepcopy(cache)
        captured.append(TracedSteps(model, cache))
        assert_equal_books(cache, before)
        return captured[-1]

    monkeypatch.setattr("dlcm.causal_lm.StepGraphs", traced)
    model = build(7, **options)
    ids_BL, mask_BL = left_padded([22, 20, 15], 8)
    cache = model.new_cache(room=12)
    cache.replayed = True
    decoded = decode(model, ids_BL, mask_BL, [1] * 8 + [4] + [1] * 10, cache)
    assert_same(decoded, whole(model, ids_BL, mask_BL), mask_BL)
    assert 1 < len(captured) < 5
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert decoding.StepGraphs is not traced and cache.graphs is captured[-1]


@pytest.mark.parametrize("part", [lambda x: x + torch.tensor(1.0), lambda x: x * x.sum().item()])
def test_what_no_graph_can_hold_is_refused(part: Callable):
    with pytest.raises(AssertionError, match="such copies are not captured"), Tape():
        part(torch.ones(3))


def test_a_tape_is_played_with_what_is_there_then():
    held, scale = torch.ones(3), torch.tensor(2.0)
    with Tape() as tape:
        low, _ = torch.cat([held * scale, held]).max(0)
        held.add_(low)
    assert held.tolist() == [3, 3, 3]
    scale.fill_(5)
    assert tape.play()[id(low)] == 15 and held.tolist() == [18, 18, 18]


@pytest.mark.parametrize("replayed", [True, False])
def test_graphs_outlive_a_text_of_short_segments(replayed: bool):
    """Steps after a prompt that has twice the concepts of the target ratio move nothing, if that would cost graphs."""
    model = tiny_dlcm(7, segmenter="fixed", target_ratio=2.0, max_position_embeddings=128)
    cache = ConceptCache(changed(model.config, {"target_ratio": 4.0}), room=128, replayed=replayed)
    ids_BL = torch.randint(VOCABULARY, (2, 128))
    with torch.no_grad():
        model(ids_BL[:, :96], past_key_values=cache)
        cache.replayed, moves = False, cache.moves
        for column in range(96, 128):
            model(ids_BL[:, column : column + 1], past_key_values=cache)
    assert (cache.moves == moves) == replayed


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@needs_cuda
@pytest.mark.parametrize("build", BOTH)
def test_cuda_graphs_are_the_eager_step(build: Callable):
    model = build(7).float().cuda()
    ids_BL, mask_BL = (x.cuda() for x in left_padded([40, 31, 9], 8))
    expected = whole(model, ids_BL, mask_BL)
    cache = model.new_cache(room=24, replayed=True)
    assert_same(decode(model, ids_BL, mask_BL, [6] + [1] * 34, cache), expected, mask_BL, 1e-4)
    assert cache.graphs is not None
    cache.crop(-12)
    assert_same(decode(model, ids_BL, mask_BL, [1] * 12, cache), expected, mask_BL, 1e-4)
