"""No neighbour: packed documents do not see each other; rows, padded rows and packed documents cannot differ."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlcm.causal_lm import PackedCausalLM
from tests.conftest import (
    ARRANGEMENTS,
    VOCABULARY,
    Arrangement,
    arrange,
    random_documents,
    tiny_baseline,
    tiny_config,
    tiny_dlcm,
    trained_scale_,
)

TOLERANCE = 1e-9
OPTIONS = [
    {"segmenter": segmenter, "visibility": visibility, "smoothing": smoothing}
    for (segmenter, visibility), smoothing in zip(
        itertools.product(["learned", "rule", "fixed", "words"], ["closed", "inclusive"]),
        ["adjacent", "none", "none", "adjacent"] * 2,
        strict=True,
    )
]
OPTIONS += [{"visibility": "inclusive", "injection": "closing", "cross_attention": False}]
OPTIONS += [{"visibility": "closed", "injection": "every"}, {"visibility": "closed", "token_window": 3}]
OPTIONS += [{"visibility": "closed", "pooling": "last", "cross_attention_every": 1, "decoder_layers": 2}]
lengths_of_documents = st.lists(st.integers(1, 12), min_size=2, max_size=4)


def name_of(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def run(model: PackedCausalLM, documents: list[Tensor], arrangement: Arrangement, seed: int) -> dict[str, Tensor]:
    """Outputs of real tokens, document after document. The seed makes training draws repeatable."""
    batch = arrange(documents, arrangement)
    if not hasattr(model, "detector"):
        return {"logits": batch.tokens_of(model(**batch.inputs).logits)}
    output = model(**batch.inputs, generator=torch.Generator().manual_seed(seed))
    return {
        "logits": batch.tokens_of(output.logits),
        "probabilities": batch.tokens_of(output.boundary_probs),
        "boundaries": batch.tokens_of(output.boundaries).double(),
        "concept_lengths": output.concept_lengths.double(),
    }


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_no_neighbour(options: dict[str, Any], training: bool):
    model = tiny_dlcm(**options).train(training)
    changes = []

    @settings(max_examples=6)
    @given(lengths_of_documents, st.data(), st.integers(0, 2**16))
    def check(lengths: list[int], data: st.DataObject, seed: int):
        trained_scale_(model, seed)
        changed = data.draw(st.integers(0, len(lengths) - 1))
        before = random_documents(lengths, seed)
        after = [*before]
        after[changed] = (after[changed] + 1 + seed % (VOCABULARY - 1)) % VOCABULARY
        own_T = torch.cat([torch.full((n,), index == changed) for index, n in enumerate(lengths)])
        with torch.no_grad():
            first, second = (run(model, documents, "packed", seed) for documents in (before, after))
        for key in ("logits", "probabilities", "boundaries"):
            torch.testing.assert_close(first[key][~own_T], second[key][~own_T], rtol=0, atol=TOLERANCE)
        changes.append(float((first["logits"] - second["logits"])[own_T].abs().max()))

    check()
    assert min(changes) > 1e-3, "the changed document must see its own change"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_rows_padding_and_packing_agree(options: dict[str, Any], training: bool):
    """Also in training: draws follow the packed order, which padding does not change."""
    model = tiny_dlcm(**options).train(training)

    @settings(max_examples=3)
    @given(lengths_of_documents, st.integers(0, 2**16))
    def check(lengths: list[int], seed: int):
        trained_scale_(model, seed)
        with torch.no_grad():
            for same_length, arrangements in ((False, ARRANGEMENTS[1:]), (True, ARRANGEMENTS)):
                if same_length:
                    lengths = [lengths[0]] * len(lengths)
                documents = random_documents(lengths, seed)
                packed = run(model, documents, "packed", seed)
                for arrangement in arrangements:
                    for key, value in run(model, documents, arrangement, seed).items():
                        torch.testing.assert_close(value, packed[key], rtol=0, atol=TOLERANCE)

    check()


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_each_document_alone_equals_packed(options: dict[str, Any]):
    model = tiny_dlcm(7, **options)
    documents = random_documents([5, 1, 9, 1, 1, 12], seed=7)
    with torch.no_grad():
        packed = run(model, documents, "packed", seed=0)
        alone = [run(model, [document], "rows", seed=0) for document in documents]
    for key, value in packed.items():
        torch.testing.assert_close(torch.cat([x[key] for x in alone]), value, rtol=0, atol=TOLERANCE)


def test_baseline_arrangements_agree_and_documents_are_apart():
    model = tiny_baseline(5)
    documents = random_documents([6, 1, 11], seed=5)
    with torch.no_grad():
        packed = run(model, documents, "packed", seed=0)["logits"]
        for arrangement in ("left_padded", "right_padded"):
            logits = run(model, documents, arrangement, seed=0)["logits"]
            torch.testing.assert_close(logits, packed, rtol=0, atol=TOLERANCE)
        alone = torch.cat([run(model, [document], "rows", seed=0)["logits"] for document in documents])
    torch.testing.assert_close(alone, packed, rtol=0, atol=TOLERANCE)


def gradients(model: PackedCausalLM, documents: list[Tensor], arrangement: Arrangement) -> dict[str, Tensor]:
    batch = arrange(documents, arrangement)
    draws = {"generator": torch.Generator().manual_seed(1)} if hasattr(model, "detector") else {}
    model.zero_grad()
    model(**batch.inputs, labels=batch.labels, **draws).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("build", [tiny_dlcm, tiny_baseline])
def test_gradients_agree(build, training: bool):
    model = build(4).train(training)
    documents = random_documents([7, 1, 12, 4], seed=4)
    packed = gradients(model, documents, "packed")
    for arrangement in ("left_padded", "right_padded"):
        torch.testing.assert_close(gradients(model, documents, arrangement), packed, rtol=1e-9, atol=1e-11)
    level = random_documents([6, 6, 6], seed=4)
    torch.testing.assert_close(
        gradients(model, level, "rows"), gradients(model, level, "packed"), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
def test_documents_of_one_token(segmenter: str, visibility: str):
    """Each is one concept, its token a boundary of probability 1; identical documents get identical logits."""
    model = tiny_dlcm(2, segmenter=segmenter, visibility=visibility)
    documents = [torch.tensor([token]) for token in (3, 8, 3, 11)]
    batch = arrange(documents, "packed")
    output = model(**batch.inputs, labels=batch.labels)
    assert output.concept_lengths.tolist() == [1, 1, 1, 1]
    assert output.cu_concepts.tolist() == [0, 1, 2, 3, 4]
    assert output.boundary_probs.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    assert bool(output.boundaries.all())
    torch.testing.assert_close(output.logits[0, 0], output.logits[0, 2], rtol=0, atol=TOLERANCE)
    assert output.ce_loss == 0, "a document of one token has no target"
    output.loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


IDS_BL = torch.zeros(2, 6, dtype=torch.long)
CUTS = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize("build", [tiny_dlcm, tiny_baseline])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": IDS_BL[:1], "cu_seqlens": CUTS, "attention_mask": torch.ones(1, 6)}, "not both"),
        ({"input_ids": IDS_BL, "cu_seqlens": CUTS}, "one packed row, got a batch of 2"),
        ({"input_ids": IDS_BL, "attention_mask": torch.ones(2, 5)}, r"\(2, 5\) does not fit .*\(2, 6\)"),
        ({"input_ids": IDS_BL, "attention_mask": torch.ones(2, 6).tril(-1).flip(1)}, "row 0 .* has no token"),
        ({"input_ids": IDS_BL[:1], "cu_seqlens": torch.tensor([0, 2, 5])}, r"end at 6, got \[0, 2, 5\]"),
        ({"input_ids": IDS_BL[:1], "cu_seqlens": torch.tensor([0, 2, 2, 6])}, "no empty document"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 tokens is longer than .*embeddings=64"),
    ],
    ids=["both", "several rows", "shape", "empty row", "end", "empty document", "too long"],
)
def test_rejects(build, inputs: dict[str, Tensor], message: str):
    with pytest.raises(ValueError, match=message) as error:
        build()(**inputs)
    assert "\n" not in str(error.value)


def test_a_packed_row_may_be_longer_than_any_document():
    longest = tiny_config().max_position_embeddings
    documents = random_documents([longest, longest, 3], seed=0)
    with torch.no_grad():
        logits = run(tiny_dlcm(), documents, "packed", seed=0)["logits"]
    assert logits.shape == (2 * longest + 3, VOCABULARY)
