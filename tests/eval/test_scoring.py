"""Scores are those of the tokens asked for, whatever else is in the batch; how text becomes tokens is what is said."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM
from eval import scoring
from eval.loading import EvaluationError
from eval.scoring import Request, Score, Scorer, Span
from tests.conftest import tiny_baseline, tiny_dlcm
from tests.eval.toy import BYTES, bigram_model, log_likelihood, random_table, uniform_table
from train.tokenizer import byte_tokenizer, train_bpe

BOS, EOS = BYTES.bos_token_id, BYTES.eos_token_id
SENTENCE = "It was a dark night, and the rain fell in torrents. "
BPE = train_bpe([SENTENCE * 3], 290)
TABLE = random_table()
PAIRS = [
    ("It was a dark", " night"),
    ("It was a dark", " morning, and nobody spoke"),
    ("", "The rain fell"),
    ("中文，", "字"),
    ("It was a dark night, and the rain", " fell in torrents"),
    ("Nobody", " spoke"),
    ("Nobody", " smiled"),
    ("A", "B"),
    ("A", "C"),
]


def model_for(tokenizer: PreTrainedTokenizerFast, **overrides: object) -> DLCMForCausalLM:
    """A tiny DLCM in fp32, in which boundaries fall where text puts them."""
    return tiny_dlcm(vocab_size=len(tokenizer), **overrides).float()


def score_text(scorer: Scorer, context: str, continuation: str) -> Score:
    return scorer.score(scorer.pairs([(context, continuation)]))[0]


def naive_score(model: DLCMForCausalLM, ids: list[int], scored: int) -> tuple[float, bool, Tensor]:
    """The slow twin: one text at a time, all logits, every step of it written out."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids[:-1]]))
    log_p_TV = output.logits[0].double().log_softmax(1)
    places = range(len(ids) - 1 - scored, len(ids) - 1)
    total = sum(float(log_p_TV[place, ids[place + 1]]) for place in places)
    greedy = all(int(log_p_TV[place].argmax()) == ids[place + 1] for place in places)
    return total, greedy, output.boundaries[0]


def without_special(tokenizer: PreTrainedTokenizerFast, *names: str) -> PreTrainedTokenizerFast:
    for name in names:
        setattr(tokenizer, name, None)
    return tokenizer


# What a score is


def test_scores_are_the_tables_to_the_digit() -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES)
    for context, continuation in PAIRS:
        score, ids = score_text(scorer, context, continuation), list(continuation.encode())
        assert score.log_likelihood == pytest.approx(log_likelihood(TABLE, [BOS, *context.encode()][-1], ids), rel=1e-9)
        assert (score.scored, score.tokens, score.concepts) == (len(ids), len(context.encode()) + len(ids), 0)
        assert not score.is_cut and not len(score.boundaries_T)


def test_greedy_is_the_likeliest_at_every_step() -> None:
    table = TABLE.clone()
    table[ord("a"), ord("b")] = table[ord("b"), ord("z")] = 1.0  # each row's largest
    table /= table.sum(1, keepdim=True)
    scorer = Scorer(bigram_model(table), BYTES)
    assert score_text(scorer, "a", "bz").is_greedy
    assert not score_text(scorer, "a", "by").is_greedy
    assert not score_text(scorer, "a", "cz").is_greedy


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["byte", "bpe"])
def test_scores_are_the_slow_twins(tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_for(tokenizer)
    scorer = Scorer(model, tokenizer)
    requests = scorer.pairs(PAIRS)
    boundaries = 0
    for request, score in zip(requests, scorer.score(requests), strict=True):
        (span,) = request.spans
        total, greedy, boundaries_T = naive_score(model, span.ids_T.tolist(), span.scored)
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == greedy
        assert torch.equal(score.boundaries_T, boundaries_T)
        boundaries += int(score.boundaries_T.sum())
    assert boundaries > len(PAIRS)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_batches_and_order_change_nothing(rows: int, tokens: int) -> None:
    model = model_for(BYTES)
    scorer = Scorer(model, BYTES)
    alone = [score_text(scorer, *pair) for pair in PAIRS]
    other = Scorer(model, BYTES, batch_tokens=tokens, batch_rows=rows)
    for order in (range(len(PAIRS)), reversed(range(len(PAIRS))), [3, 1, 3, 0, 8, 2]):
        order = list(order)
        for index, score in zip(order, other.score(other.pairs([PAIRS[index] for index in order])), strict=True):
            assert score.log_likelihood == pytest.approx(alone[index].log_likelihood, abs=1e-4)
            assert score.is_greedy == alone[index].is_greedy
            assert torch.equal(score.boundaries_T, alone[index].boundaries_T)
            assert score.concepts == alone[index].concepts > 0


def test_batches_hold_what_they_may() -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES, batch_tokens=10, batch_rows=3)
    assert list(scorer._batches([])) == []
    assert list(scorer._batches([12, 5, 5, 1, 1, 1, 1])) == [(0, 1), (1, 3), (3, 6), (6, 7)]


def test_what_is_the_same_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES)
    read: list[int] = []
    states = scorer._states
    monkeypatch.setattr(scorer, "_states", lambda rows: read.extend(map(len, rows)) or states(rows))
    scores = scorer.score(scorer.pairs([("Answer:", letter) for letter in "ABCD"] + [("Answer:", "AB")]))
    assert read == [9, 8]  # <bos> and 7 bytes, and once with a letter
    assert len({score.log_likelihood for score in scores}) == 5


def test_few_logits_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bigram_model(TABLE)
    whole = score_text(Scorer(model, BYTES), SENTENCE[:20], SENTENCE[20:])
    sizes: list[int] = []
    monkeypatch.setattr(scoring, "LOGITS", 5 * len(BYTES))
    model.lm_head.register_forward_hook(lambda module, args, logits: sizes.append(logits.numel() // len(BYTES)))
    assert score_text(Scorer(model, BYTES), SENTENCE[:20], SENTENCE[20:]).log_likelihood == whole.log_likelihood
    assert max(sizes) == 5 and sum(sizes) == whole.scored + 1  # one more, which the forward pass itself wants


def test_half_precision_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_for(BYTES)
    for name, tolerance in (("float32", 1e-4), ("bfloat16", 0.5)):
        scorer = Scorer(model, BYTES, dtype=name)  # type: ignore[arg-type]
        for request, score in zip(scorer.pairs(PAIRS), scorer.score(scorer.pairs(PAIRS)), strict=True):
            total, _, _ = naive_score(model, request.spans[0].ids_T.tolist(), request.spans[0].scored)
            assert abs(score.log_likelihood - total) / score.scored < tolerance
            assert name == "float32" or score.log_likelihood != pytest.approx(total, abs=1e-6)


# Text to tokens


def test_white_space_moves_to_the_continuation() -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES)
    for context, continuation in (("a \n", "b"), ("a", " \nb"), ("a ", "\nb")):
        (request,) = scorer.pairs([(context, continuation)])
        assert request.spans[0].ids_T.tolist() == [BOS, *b"a \nb"]
        assert (request.spans[0].scored, request.num_bytes) == (3, 3)
    (request,) = scorer.pairs([(" ", "b")])  # all of it white space: nothing is given but bos
    assert (request.spans[0].ids_T.tolist(), request.spans[0].scored) == ([BOS, *b" b"], 2)


def test_a_token_that_straddles_is_scored() -> None:
    def ids(text: str) -> list[int]:
        return BPE(text)["input_ids"]

    assert ids("the rain")[:-1] == ids("the") and len(ids(" ra")) > len(ids(" rain")) == 1
    (request,) = Scorer(model_for(BPE), BPE).pairs([("the ra", "in")])
    assert request.spans[0].ids_T.tolist() == [BPE.bos_token_id, *ids("the rain")]
    assert (request.spans[0].scored, request.num_bytes) == (1, len(" rain"))  # lm-eval would score nothing


def test_prefixes_of_each_other_are_told_apart() -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES)
    choices = ["a", "ab", "abc", "abcd"]
    scores = scorer.score(scorer.pairs([("x", choice) for choice in choices]))
    for choice, score in zip(choices, scores, strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood(TABLE, ord("x"), choice.encode()), rel=1e-9)
    values = [score.log_likelihood for score in scores]
    assert values == sorted(values, reverse=True)


def test_bytes_are_those_of_what_is_scored() -> None:
    for tokenizer in (BYTES, BPE):
        scorer = Scorer(model_for(tokenizer), tokenizer)
        requests = scorer.pairs([("中", "文，字é"), ("It was", " a dark night"), ("x ", "y")])
        assert [request.num_bytes for request in requests] == [11, 13, 2]
        documents = scorer.documents(["中文，字é", ""])
        assert [document.num_bytes for document in documents] == [14, 0]


def test_text_that_spells_a_special_token_is_text() -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES)
    (request,) = scorer.pairs([("<|bos|>", "<|eos|>")])
    assert request.spans[0].ids_T.tolist() == [BOS, *b"<|bos|><|eos|>"] and request.num_bytes == 7


def test_the_empty_continuation_is_certain() -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES)
    assert scorer.pairs([("a", "")]) == [Request((), 0)] == scorer.documents([""])
    empty, full = scorer.score(scorer.pairs([("a", ""), ("a", "b")]))
    assert (empty.log_likelihood, empty.is_greedy, empty.scored) == (0.0, True, 0)
    assert full.log_likelihood == pytest.approx(log_likelihood(TABLE, ord("a"), b"b"))
    assert scorer.score([]) == []


def test_what_opens_a_text() -> None:
    tokenizer = without_special(byte_tokenizer(), "bos_token")
    scorer = Scorer(bigram_model(TABLE), tokenizer)
    (request,) = scorer.pairs([("a", "b")])
    assert request.spans[0].ids_T.tolist() == [*b"ab"]  # as prepared: no bos
    assert scorer.pairs([("", "b")])[0].spans[0].ids_T.tolist() == [EOS, *b"b"]
    assert scorer.documents(["b"])[0].spans[0].ids_T.tolist() == [EOS, *b"b"]
    scorer = Scorer(bigram_model(TABLE), without_special(byte_tokenizer(), "bos_token", "eos_token"))
    assert len(scorer.pairs([("a", "b")])[0].spans) == 1
    with pytest.raises(EvaluationError, match="neither bos nor eos"):
        scorer.pairs([("", "b")])


# What does not fit


def test_contexts_are_cut_on_the_left() -> None:
    model = model_for(BYTES, max_position_embeddings=16)
    scorer = Scorer(model, BYTES)
    context = "a long beginning that does not fit"
    cut = score_text(scorer, context, " abc")
    total, _, boundaries_T = naive_score(model, [*(context + " abc").encode()][-17:], 4)
    assert cut.log_likelihood == pytest.approx(total, abs=1e-4) and torch.equal(cut.boundaries_T, boundaries_T)
    assert (cut.is_cut, cut.tokens, cut.scored) == (True, 16, 4)
    fits = score_text(scorer, "x" * 12, " abc")  # 16 with bos, and without the last byte
    assert (fits.is_cut, fits.tokens) == (False, 16)
    assert score_text(scorer, "x" * 13, " abc").is_cut


def test_a_continuation_that_does_not_fit_is_an_error() -> None:
    scorer = Scorer(bigram_model(TABLE, positions=16), BYTES)
    assert score_text(scorer, "a", "b" * 16).scored == 16
    with pytest.raises(EvaluationError, match=r"'bbbb.*17 tokens, the model 16 positions.*shorten it"):
        score_text(scorer, "a", "b" * 17)


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, 16), (16, 5), (9, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("length", [1, 9, 15, 16, 17, 41])
def test_windows_score_every_token_once(window: int | None, stride: int | None, length: int) -> None:
    text = (SENTENCE * 2)[:length]
    scorer = Scorer(bigram_model(TABLE, positions=16), BYTES)
    (request,) = scorer.documents([text], window, stride)
    ids = [BOS, *text.encode()]
    place = 0
    for span in request.spans:
        read = len(span.ids_T) - 1
        assert read <= (window or 16) and (place == 0 or read == (window or 16))
        end = place + span.scored
        assert span.ids_T.tolist() == ids[end - read : end + 1]
        place = end
    assert place == length and request.num_bytes == length
    (score,) = scorer.score([request])
    assert score.log_likelihood == pytest.approx(log_likelihood(TABLE, BOS, text.encode()), rel=1e-9)
    assert score.scored == length and not score.is_cut


def test_windows_give_as_much_context_as_asked_for() -> None:
    model = model_for(BYTES, max_position_embeddings=16)
    scorer, ids = Scorer(model, BYTES), [BOS, *SENTENCE.encode()]
    (score,) = scorer.score(scorer.documents([SENTENCE], window=12, stride=4))
    total = naive_score(model, ids[:13], 12)[0]
    for end in range(16, len(ids), 4):
        total += naive_score(model, ids[end - 12 : end + 1], 4)[0]
    assert (len(ids) - 1) % 4 == 0
    assert score.log_likelihood == pytest.approx(total, abs=1e-3)


def test_what_cannot_be_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bigram_model(uniform_table(), positions=16)
    for window, stride in ((17, 1), (4, 5), (0, 0), (4, 0)):
        with pytest.raises(EvaluationError, match="at most the model's 16 positions"):
            Scorer(model, BYTES).documents(["a"], window, stride)
    with pytest.raises(EvaluationError, match="has 290 ids and the model a vocabulary of 258"):
        Scorer(model, BPE)
    with pytest.raises(EvaluationError, match="batch_tokens=0"):
        Scorer(model, BYTES, batch_tokens=0)
    with pytest.raises(EvaluationError, match=r"model.eval\(\)"):
        Scorer(model.train(), BYTES)


def test_uniform_probabilities_cost_the_same_bits_everywhere() -> None:
    scorer = Scorer(bigram_model(uniform_table()), BYTES)
    (score,) = scorer.score(scorer.documents(["é中"]))
    assert -score.log_likelihood / math.log(2) / 5 == pytest.approx(math.log2(258))


def test_spans_of_other_origin() -> None:
    """What reads shards asks with tokens."""
    scorer = Scorer(bigram_model(TABLE), BYTES)
    request = Request((Span(np.array([BOS, 65, 66]), 1),), 1)
    assert scorer.score([request])[0].log_likelihood == pytest.approx(math.log(TABLE[65, 66]))
    ours, theirs = scorer.document(np.array([65, 66]), 2), scorer.documents(["AB"])[0]
    assert ours.num_bytes == theirs.num_bytes and np.array_equal(ours.spans[0].ids_T, theirs.spans[0].ids_T)


def test_baseline_and_dlcm_alike() -> None:
    model = tiny_baseline(vocab_size=len(BYTES)).float()
    scorer = Scorer(model, BYTES)
    (score,) = scorer.score(scorer.documents(["night"]))
    ids = [BOS, *b"night"]
    with torch.no_grad():
        log_p_TV = model(input_ids=torch.tensor([ids[:-1]])).logits[0].double().log_softmax(1)
    assert score.log_likelihood == pytest.approx(float(log_p_TV[range(5), ids[1:]].sum()), abs=1e-4)
