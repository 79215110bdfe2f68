"""No future: nothing at a position depends on later tokens, in training or evaluation, whatever the options.

One checker, `change_before`, measures how far outputs before t move when tokens from t on are replaced. The tests
at the end of the file put leaks into the model on purpose and demand that the checker sees them.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlcm import DLCMForCausalLM
from dlcm.boundary import Boundaries, WordDetector
from dlcm.concepts import AdjacentSmoothing, ConceptPooling
from dlcm.layout import ConceptLayout
from dlcm.model import DLCMOutput
from tests.conftest import (
    ARRANGEMENTS,
    VOCABULARY,
    Arrangement,
    arrange,
    random_documents,
    random_options,
    tiny_baseline,
    tiny_dlcm,
    trained_scale_,
)

TOLERANCE = 1e-9  # a concept count that changes after t also changes matrix shapes, and with them the last bits
DEFAULTS = {"segmenter": "learned", "visibility": "closed", "smoothing": "adjacent", "cross_attention_rope": True}
# `test_no_future_in_any_combination_of_options` draws from all of their combinations.
OPTIONS = [
    {"segmenter": segmenter, "visibility": visibility, "smoothing": smoothing, "cross_attention_rope": rope}
    for (segmenter, visibility), (smoothing, rope) in zip(
        itertools.product(["learned", "rule", "fixed", "words"], ["closed", "inclusive"]),
        [("adjacent", True), ("none", True), ("none", False), ("adjacent", False)] * 2,
        strict=True,
    )
]
# The rest change one thing at a time, at both visibilities where it depends on them.
OPTIONS += [
    DEFAULTS | other
    for other in (
        {"qk_norm": True},
        {"token_window": 3},
        {"d_scan": 8},
        {"threshold": 0.45},
        {"slot_weighting": "uniform"},
    )
]
OPTIONS += [
    DEFAULTS | {"visibility": visibility} | other
    for visibility in ("closed", "inclusive")
    for other in (
        {"injection": "every"},
        {"clean_start": True},
        {"segmenter": "words", "injection": "first", "clean_start": True},
        {"pooling": "last", "cross_attention_every": 1, "decoder_layers": 2},
        {"pooling": "last", "injection": "closing", "cross_attention": False},
    )
]


@dataclass(frozen=True)
class Case:
    """Documents, and a cut: tokens of document `changed` from its position `t` on are replaced."""

    before: list[Tensor]
    after: list[Tensor]
    changed: int
    t: int
    seed: int

    @property
    def future_T(self) -> Tensor:
        """Which tokens, document after document, are the replaced ones."""
        return torch.cat(
            [
                (torch.arange(len(document)) >= self.t) & (index == self.changed)
                for index, document in enumerate(self.before)
            ]
        )


@st.composite
def cases(draw: st.DrawFn, arrangement: Arrangement) -> Case:
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    if arrangement == "rows":
        lengths = [lengths[0]] * len(lengths)
    changed = draw(st.integers(0, len(lengths) - 1))
    t = draw(st.integers(0, lengths[changed] - 1))
    seed = draw(st.integers(0, 2**16))
    before = random_documents(lengths, seed)
    shift = torch.randint(1, VOCABULARY, before[changed][t:].shape, generator=torch.Generator().manual_seed(seed))
    after = [document.clone() for document in before]
    after[changed][t:] = (after[changed][t:] + shift) % VOCABULARY  # every replaced token differs
    return Case(before, after, changed, t, seed)


@dataclass
class Evidence:
    """What was seen over all examples: a test that changed nothing would prove nothing."""

    future_logit_change: float = 0.0
    boundaries: list[Tensor] = field(default_factory=list)
    concept_count_changes: int = 0

    @property
    def boundary_rate(self) -> float:
        """Over the tokens where a boundary is not a matter of course: all but the first of each document."""
        return float(torch.cat(self.boundaries).double().mean())


@torch.no_grad()
def run(model: DLCMForCausalLM, documents: list[Tensor], arrangement: Arrangement, seed: int):
    """(T, V + 2) logits, probability and boundary of every real token, and the output itself."""
    batch = arrange(documents, arrangement)
    output: DLCMOutput = model(**batch.inputs, generator=torch.Generator().manual_seed(seed))
    outputs = (output.logits, output.boundary_probs[..., None], output.boundaries[..., None].double())
    return torch.cat([batch.tokens_of(x_BL) for x_BL in outputs], -1), output


def change_before(
    model: DLCMForCausalLM, case: Case, arrangement: Arrangement, evidence: Evidence | None = None
) -> float:
    """Largest change of a logit, probability or boundary that is not in the replaced part."""
    before_TX, before = run(model, case.before, arrangement, case.seed)
    after_TX, after = run(model, case.after, arrangement, case.seed)
    change_T = (after_TX - before_TX).abs().amax(1)
    if evidence is not None:
        future = (after_TX - before_TX)[case.future_T, :VOCABULARY].abs().max()
        inner_T = torch.cat([torch.arange(len(document)) > 0 for document in case.before])
        evidence.future_logit_change = max(evidence.future_logit_change, float(future))
        evidence.boundaries.append(before_TX[inner_T, -1])
        evidence.concept_count_changes += len(before.concept_lengths) != len(after.concept_lengths)
    return float(change_T.masked_fill(case.future_T, 0).max())


def name_of(options: dict[str, Any]) -> str:
    rope = "rope" if options["cross_attention_rope"] else "norope"
    rest = "".join(f"-{key}-{value}" for key, value in options.items() if key not in DEFAULTS)
    return f"{options['segmenter']}-{options['visibility']}-{options['smoothing']}-{rope}{rest}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_no_future(options: dict[str, Any], training: bool):
    evidence = Evidence()
    seen: set[Arrangement] = set()
    model = tiny_dlcm(**options, sharpening=6.0).train(training)  # draws that follow p, so that tokens move them

    @settings(max_examples=16)
    @given(st.sampled_from(ARRANGEMENTS), st.data())
    def check(arrangement: Arrangement, data: st.DataObject):
        case = data.draw(cases(arrangement))
        seen.add(arrangement)
        trained_scale_(model, case.seed)
        assert change_before(model, case, arrangement, evidence) < TOLERANCE

    check()
    assert seen == set(ARRANGEMENTS)
    assert evidence.future_logit_change > 0.1, "the replaced tokens changed nothing: the test is vacuous"
    assert 0.2 < evidence.boundary_rate < 0.8, "boundaries hardly vary: the test is vacuous"
    assert (evidence.concept_count_changes > 0) == (options["segmenter"] != "fixed")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_no_future_in_any_combination_of_options(training: bool):
    evidence = Evidence()

    @settings(max_examples=60)
    @given(cases("packed"))
    def check(case: Case):
        model = tiny_dlcm(case.seed, **random_options(case.seed), sharpening=6.0).train(training)
        assert change_before(model, case, "packed", evidence) < TOLERANCE

    check()
    assert evidence.future_logit_change > 0.1 and evidence.concept_count_changes > 5


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_no_future_in_the_baseline(arrangement: Arrangement):
    @settings(max_examples=20)
    @given(cases(arrangement))
    def check(case: Case):
        model = tiny_baseline(case.seed)
        batches = [arrange(documents, arrangement) for documents in (case.before, case.after)]
        with torch.no_grad():
            before_TV, after_TV = (batch.tokens_of(model(**batch.inputs).logits) for batch in batches)
        change_T = (after_TV - before_TV).abs().amax(1)
        assert change_T[~case.future_T].numel() == 0 or change_T[~case.future_T].max() < TOLERANCE
        assert change_T[case.future_T].max() > 1e-3

    check()


@pytest.mark.parametrize(("window", "every", "reach"), [(1, None, 0), (3, None, 4), (3, 2, None)])
def test_windows_end_what_a_llama_can_see(window: int, every: int | None, reach: int | None):
    """Two layers see a window each, but for one that sees everything."""
    model = tiny_baseline(4, token_window=window, global_every=every)
    (document,) = random_documents([16], seed=4)
    with torch.no_grad():
        expected_LV = model(document[None]).logits[0]
        for position in range(len(document)):
            other = document.clone()
            other[position] = (other[position] + 1) % VOCABULARY
            change_L = (model(other[None]).logits[0] - expected_LV).abs().amax(1)
            assert not change_L[:position].any()
            end = len(document) if reach is None else min(position + reach + 1, len(document))
            assert change_L[position:end].min() > 0
            assert not change_L[end:].any()


@pytest.mark.parametrize("segmenter", ["fixed", "learned"])
def test_concepts_carry_what_is_out_of_a_window(segmenter: str):
    model = tiny_dlcm(4, token_window=2, segmenter=segmenter)
    assert [block.window for block in model.backbone.layers] == [None, None]
    (document,) = random_documents([24], seed=4)
    other = document.clone()
    other[0] = (other[0] + 1) % VOCABULARY
    with torch.no_grad():
        change_LV = model(other[None]).logits[0] - model(document[None]).logits[0]
    assert change_LV[-1].abs().max() > 1e-3


@pytest.mark.parametrize("segmenter", ["learned", "words"])
@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_a_document_cut_short_keeps_its_logits(visibility: str, segmenter: str):
    """Nothing depends on how long a document will be: the form in which generation meets causality."""
    model = tiny_dlcm(3, visibility=visibility, segmenter=segmenter)
    (document,) = random_documents([16], seed=3)
    with torch.no_grad():
        whole = model(document[None])
        for length in range(1, 16):
            prefix = model(document[None, :length])
            torch.testing.assert_close(prefix.logits, whole.logits[:, :length], rtol=0, atol=TOLERANCE)
            assert torch.equal(prefix.boundaries, whole.boundaries[:, :length])


def test_catches_an_injection_of_the_slot_that_is_still_open(monkeypatch: pytest.MonkeyPatch):
    """Cross-attention as it should be, the injection one slot too new."""
    through = DLCMForCausalLM.through_decoder

    def one_more(self, h_TE, tokens, attend, newest_TE, past=None):
        last_T = tokens.is_first_T.roll(-1)
        newer_TE = torch.where(last_T[:, None], newest_TE, newest_TE.roll(-1, 0))
        return through(self, h_TE, tokens, attend, newer_TE, past)

    monkeypatch.setattr(DLCMForCausalLM, "through_decoder", one_more)
    assert largest_change({"injection": "first"}) > 1e-3


def largest_change(options: dict[str, Any], arrangement: Arrangement = "packed") -> float:
    """The checker's finding over many cases."""
    found = []
    model = tiny_dlcm(**options)

    @settings(max_examples=20)
    @given(cases(arrangement))
    def search(case: Case):
        trained_scale_(model, case.seed)
        found.append(change_before(model, case, arrangement))

    search()
    return max(found)


# Negative controls: each leak looks ahead by as little as it can.


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_catches_a_token_that_sees_its_own_segment(visibility: str, monkeypatch: pytest.MonkeyPatch):
    """Eq. 14 with Eq. 7 read literally: every token attends to the mean of all of its segment."""
    causal = ConceptLayout.from_boundaries

    def literal(tokens, boundary_T, *rest):
        layout = causal(tokens, boundary_T, *rest)
        return dataclasses.replace(layout, slot_T=layout.slot_M[layout.segment_T])

    monkeypatch.setattr(ConceptLayout, "from_boundaries", literal)
    assert largest_change({"visibility": visibility}) > 1e-3


def test_catches_one_slot_too_many(monkeypatch: pytest.MonkeyPatch):
    causal = ConceptLayout.from_boundaries

    def off_by_one(tokens, boundary_T, *rest):
        layout = causal(tokens, boundary_T, *rest)
        last_slot_T = layout.cu_slots_D1[1:].long()[tokens.document_T] - 1
        return dataclasses.replace(layout, slot_T=torch.minimum(layout.slot_T + 1, last_slot_T))

    monkeypatch.setattr(ConceptLayout, "from_boundaries", off_by_one)
    assert largest_change({"visibility": "closed"}) > 1e-3


def test_catches_smoothing_that_looks_ahead(monkeypatch: pytest.MonkeyPatch):
    def centred(self, z_MC, concepts, past_DC):
        last_M = concepts.position_T.roll(-1) == 0
        return z_MC + self.mix * (torch.where(last_M[:, None], z_MC, z_MC.roll(-1, 0)) - z_MC)

    monkeypatch.setattr(AdjacentSmoothing, "forward", centred)
    assert largest_change({"smoothing": "adjacent"}) > 1e-3


def test_catches_a_pool_that_reaches_into_the_next_segment(monkeypatch: pytest.MonkeyPatch):
    def reaching(self, h_TE, layout):
        last_of_document_T = layout.tokens.position_T.roll(-1) == 0
        next_TE = torch.where(last_of_document_T[:, None], h_TE, h_TE.roll(-1, 0))
        return self.up_proj(next_TE[layout.last_M])

    monkeypatch.setattr(ConceptPooling, "forward", reaching)
    assert largest_change({"visibility": "inclusive"}) > 1e-3


def test_catches_words_that_end_where_only_the_next_token_tells(monkeypatch: pytest.MonkeyPatch):
    """The run of spaces closes on its own last token, which nobody knows before the token after it."""

    def looking_ahead(self, ends_word_T, tokens, generator=None, past_D=None):
        last_of_run_T = ends_word_T & ~(ends_word_T.roll(-1) & ~tokens.is_first_T.roll(-1))
        return Boundaries(last_of_run_T.float(), last_of_run_T | tokens.is_first_T)

    monkeypatch.setattr(WordDetector, "forward", looking_ahead)
    assert largest_change({"segmenter": "words", "visibility": "inclusive"}) > 1e-3


def test_catches_a_boundary_that_waits_for_the_next_token(monkeypatch: pytest.MonkeyPatch):
    """A boundary at t decided by the distance between t and t + 1."""
    causal = ConceptLayout.from_boundaries

    def late(tokens, boundary_T, *rest):
        return causal(tokens, boundary_T.roll(-1) | tokens.is_first_T, *rest)

    monkeypatch.setattr(ConceptLayout, "from_boundaries", late)
    assert largest_change({"visibility": "inclusive"}) > 1e-3
