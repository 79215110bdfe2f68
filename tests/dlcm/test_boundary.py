"""Where concepts begin (Eq. 5-6): probabilities, draws, thresholds, and what learns from what."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlcm.boundary import (
    DETECTORS,
    Boundaries,
    FixedDetector,
    LearnedDetector,
    RuleDetector,
    WordDetector,
    cosine_boundary_probability,
    sharpen,
)
from dlcm.layout import ConceptLayout, PackedLayout
from tests.conftest import arrange, random_documents, tiny_config, tiny_dlcm
from train.tokenizer import byte_tokenizer, word_end_ids


def packed(lengths: list[int]) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return PackedLayout.from_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]))


def random_states(tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, tiny_config().d_token, generator=generator, dtype=torch.float64)


def random_learned(**overrides) -> LearnedDetector:
    detector = LearnedDetector(tiny_config(**overrides)).double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return detector


def decide(detector, states_TE: Tensor, layout: PackedLayout, seed: int = 0) -> Boundaries:
    return detector(states_TE, layout, torch.Generator().manual_seed(seed))


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


def loop_probabilities(q_TS: Tensor, k_TS: Tensor, lengths: list[int]) -> list[float]:
    """Eq. 5, one token at a time."""
    probabilities: list[float] = []
    for length in lengths:
        start = len(probabilities)
        for t in range(start, start + length):
            p = 1.0 if t == start else (1 - cosine(q_TS[t - 1].tolist(), k_TS[t].tolist())) / 2
            probabilities.append(p)
    return probabilities


@settings(max_examples=50)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 2**16))
def test_probability_is_eq_5(lengths: list[int], seed: int):
    q_TS, k_TS = random_states(sum(lengths), seed), random_states(sum(lengths), seed + 1)
    tokens = packed(lengths)
    p_T = cosine_boundary_probability(tokens.previous(q_TS), k_TS, tokens)
    torch.testing.assert_close(p_T, torch.tensor(loop_probabilities(q_TS, k_TS, lengths), dtype=p_T.dtype))
    first_T = tokens.is_first_T
    assert bool((p_T[first_T] == 1).all()) and bool(((p_T >= 0) & (p_T <= 1)).all())


def test_probability_of_the_extremes():
    """Same direction 0, orthogonal 1/2, opposite 1."""
    east, north = [1.0, 0.0], [0.0, 1.0]
    states = torch.tensor([east, east, north, [0.0, -3.0]])
    tokens = packed([4])
    assert cosine_boundary_probability(tokens.previous(states), states, tokens).tolist() == [1.0, 0.0, 0.5, 1.0]


def test_probability_is_computed_wide():
    """bf16 states: the cosine is not rounded to bf16."""
    narrow = random_states(50).bfloat16()
    p_T = cosine_boundary_probability(narrow, narrow, packed([50]))
    assert p_T.dtype == torch.float32
    wide = cosine_boundary_probability(narrow.double(), narrow.double(), packed([50]))
    torch.testing.assert_close(p_T.double(), wide, rtol=0, atol=1e-6)


def test_learned_projects_the_previous_token_by_q_and_this_one_by_k():
    detector, states = random_learned(d_scan=10).eval(), random_states(20)
    layout = packed([12, 8])
    p_T = decide(detector, states, layout).probability_T
    q_TS, k_TS = states @ detector.q_proj.weight.T, states @ detector.k_proj.weight.T
    expected = torch.tensor(loop_probabilities(q_TS, k_TS, [12, 8]), dtype=p_T.dtype)
    torch.testing.assert_close(p_T, expected)


def test_rule_compares_the_states_themselves_and_has_no_parameters():
    detector, states = RuleDetector(tiny_config(segmenter="rule", threshold=0.45)), random_states(20)
    decided = decide(detector, states, packed([12, 8]))
    expected = torch.tensor(loop_probabilities(states, states, [12, 8]), dtype=torch.float64)
    torch.testing.assert_close(decided.probability_T, expected)
    assert torch.equal(decided.boundary_T, decided.probability_T >= 0.45)
    assert list(detector.parameters()) == []


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("segmenter", ["learned", "rule"])
def test_evaluation_is_a_threshold_and_never_samples(segmenter: str, threshold: float):
    detector = DETECTORS[segmenter](tiny_config(segmenter=segmenter, threshold=threshold)).double().eval()
    if segmenter == "learned":
        torch.nn.init.normal_(detector.q_proj.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(detector.k_proj.weight, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    global_before = torch.get_rng_state()
    decided = detector(random_states(200), packed([150, 50]), generator)
    assert torch.equal(decided.boundary_T, decided.probability_T >= threshold)
    assert torch.equal(generator.get_state(), before) and torch.equal(torch.get_rng_state(), global_before)
    assert 0 < int(decided.boundary_T.sum()) < 200


@pytest.mark.parametrize("segmenter", ["learned", "rule"])
def test_a_probability_at_the_threshold_is_a_boundary(segmenter: str):
    """Orthogonal neighbours: p = 1/2 exactly. The learned projections begin as identities."""
    model = tiny_dlcm(segmenter=segmenter, threshold=0.5)
    model.initialize_weights()
    states = torch.eye(16, dtype=torch.float64)[[0, 0, 1, 1]]
    decided = decide(model.detector, states, packed([4]))
    assert decided.probability_T.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert decided.boundary_T.tolist() == [True, False, True, False]


@pytest.mark.parametrize("segmenter", ["rule", "fixed"])
def test_only_the_learned_detector_samples(segmenter: str):
    detector = DETECTORS[segmenter](tiny_config(segmenter=segmenter)).train()
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    training = detector(random_states(60), packed([60]), generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(training.boundary_T, decide(detector.eval(), random_states(60), packed([60])).boundary_T)


def test_sharpening_of_one_changes_nothing():
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(sharpen(p, 1.0), p)


def test_sharpening_approaches_the_threshold():
    p = torch.tensor([0.0, 0.2, 0.49, 0.51, 0.8, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sharpen(p, 1e4), (p > 0.5).double())
    assert sharpen(torch.tensor(0.5), 1e4) == 0.5


@given(st.floats(0.01, 0.99), st.floats(0.1, 20))
def test_sharpening_raises_the_odds_to_a_power(p: float, sharpening: float):
    sharp = sharpen(torch.tensor(p, dtype=torch.float64), sharpening)
    odds = (p / (1 - p)) ** sharpening
    torch.testing.assert_close(sharp, torch.tensor(odds / (1 + odds), dtype=torch.float64))


def test_draws_follow_the_seed():
    detector, states, layout = random_learned().train(), random_states(300), packed([100, 200])
    first, again, other = (decide(detector, states, layout, seed).boundary_T for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_generator_draws_come_from_torchs_default():
    detector, states, layout = random_learned().train(), random_states(300), packed([300])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = detector(states, layout, None).boundary_T
        torch.manual_seed(5)
        assert torch.equal(detector(states, layout, None).boundary_T, first)


@pytest.mark.parametrize("sharpening", [0.5, 1.0, 4.0])
def test_draws_have_the_rate_of_the_sharpened_probabilities(sharpening: float):
    """Over 400 repetitions, every token's rate lies within five standard errors of its probability."""
    detector = random_learned(sharpening=sharpening).train()
    states, layout = random_states(40), packed([25, 15])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([detector(states, layout, generator).boundary_T for _ in range(400)]).double()
    p_T = sharpen(detector(states, layout, generator).probability_T, sharpening)
    error_T = (p_T * (1 - p_T) / 400).sqrt()
    assert bool(((draws.mean(0) - p_T).abs() <= 5 * error_T + 1e-12).all())
    assert bool((draws[:, layout.is_first_T] == 1).all()), "the first token of a document is always a boundary"


def test_extreme_sharpening_draws_the_threshold():
    detector, states, layout = random_learned(sharpening=1e6), random_states(200), packed([120, 80])
    drawn = decide(detector.train(), states, layout)
    assert torch.equal(drawn.boundary_T, decide(detector.eval(), states, layout).boundary_T)


@settings(max_examples=60)
@given(
    st.one_of(st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.7, 4.0, 8.0]), st.floats(1, 12)),
    st.lists(st.integers(1, 60), min_size=1, max_size=3),
)
def test_fixed_stride(ratio: float, lengths: list[int]):
    """A document begins a concept at its first token, and up to position t it has begun floor(t / R) + 1."""
    detector = FixedDetector(tiny_config(segmenter="fixed", target_ratio=ratio))
    layout = packed(lengths)
    decided = decide(detector, random_states(layout.total), layout)
    assert torch.equal(decided.probability_T, decided.boundary_T.to(decided.probability_T.dtype))
    for begun_T in decided.boundary_T.split(lengths):
        begun = begun_T.cumsum(0).tolist()
        assert begun == [math.floor(t / ratio) + 1 for t in range(len(begun_T))]
        assert bool(begun_T[0])


def test_fixed_stride_by_hand():
    def boundaries(ratio: float) -> list[int]:
        detector = FixedDetector(tiny_config(segmenter="fixed", target_ratio=ratio))
        return decide(detector, random_states(10), packed([10])).boundary_T.long().tolist()

    assert boundaries(1.0) == [1] * 10
    assert boundaries(4.0) == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert boundaries(2.5) == [1, 0, 0, 1, 0, 1, 0, 0, 1, 0]


def test_fixed_has_no_parameters():
    assert list(FixedDetector(tiny_config(segmenter="fixed")).parameters()) == []


def cut(text: bytes, visibility: str, lengths: list[int] | None = None) -> list[str]:
    """The segments of bytes of documents, laid end to end."""
    config = tiny_config(
        segmenter="words", visibility=visibility, vocab_size=258, word_end_ids=word_end_ids(byte_tokenizer())
    )
    detector, tokens = WordDetector(config), packed(lengths or [len(text)])
    ids_T = torch.tensor(list(text))
    decided = detector(detector.seen(ids_T, torch.empty(0)), tokens)
    assert torch.equal(decided.probability_T, decided.boundary_T.float()) and list(detector.parameters()) == []
    lengths_M = ConceptLayout.from_boundaries(tokens, decided.boundary_T, visibility).length_M.tolist()
    return [bytes(part.tolist()).decode() for part in ids_T.split(lengths_M)]


def test_words_are_closed_at_their_first_space_or_behind_the_last():
    text = b"It was, in 1815,\n    dear: no-one's."
    ended = ["It ", "was, ", "in ", "1815,\n    ", "dear: ", "no-", "one'", "s."]
    assert cut(text, "closed") == ended
    # inclusive: the first token of a document is a segment, as everywhere
    begun = ["I", "t ", "was,", " in ", "1815,", "\n    dear:", " no-", "one'", "s."]
    assert cut(text, "inclusive") == begun


def test_words_of_documents_are_apart():
    """The space before a document's first token belongs to another document."""
    assert cut(b"one two ten", "closed", [4, 7]) == ["one ", "two ", "ten"]
    assert cut(b"one two ten", "inclusive", [3, 8]) == ["o", "ne", " ", "two ", "ten"]


def test_chinese_is_cut_between_characters():
    text = "子不语怪".encode()
    tokens = packed([len(text)])
    config = tiny_config(segmenter="words", vocab_size=258, word_end_ids=word_end_ids(byte_tokenizer()))
    detector = WordDetector(config)
    boundary_T = detector(detector.seen(torch.tensor(list(text)), torch.empty(0)), tokens).boundary_T
    assert boundary_T.nonzero().flatten().tolist() == [0, 1, 4, 7, 10]  # behind the first byte of each


def test_words_need_to_know_which_tokens_end_them():
    with pytest.raises(ValueError, match=r"segmenter='words' needs word_end_ids.*train.tokenizer.word_end_ids"):
        WordDetector(tiny_config(segmenter="words", word_end_ids=None))


# What learns from what


def projection_gradients(model, loss: Tensor) -> list[Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [model.detector.q_proj.weight.grad, model.detector.k_proj.weight.grad]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_only_the_ratio_loss_teaches_the_projections(training: bool):
    model = tiny_dlcm(1, sharpening=2.0).train(training)
    batch = arrange(random_documents([12, 7, 9], seed=1), "packed")

    def output():
        generator = torch.Generator().manual_seed(0)
        return model(**batch.inputs, labels=batch.labels, generator=generator)

    assert projection_gradients(model, output().ce_loss) == [None, None]
    assert model.encoder.layers[0].attention.q_proj.weight.grad is not None
    from_aux = projection_gradients(model, output().aux_loss)
    assert all(gradient is not None and gradient.abs().max() > 1e-6 for gradient in from_aux)
    from_loss = projection_gradients(model, output().loss)
    expected = [model.config.aux_loss_weight * gradient for gradient in from_aux]
    torch.testing.assert_close(from_loss, expected)
