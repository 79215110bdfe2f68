"""Pooling (Eq. 7) against a loop, and smoothing (Eq. 11): the identity at first, causal always."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlcm.concepts import SMOOTHERS, AdjacentSmoothing, ConceptPooling, NoSmoothing, segment_mean
from dlcm.layout import ConceptLayout, PackedLayout
from tests.conftest import tiny_config


def packed(lengths: list[int]) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return PackedLayout.from_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]))


def loop_mean(h_TE: Tensor, layout: ConceptLayout) -> Tensor:
    means, start = [], 0
    for length in layout.length_M.tolist():
        means.append(sum(h_TE[start : start + length].unbind()) / length)
        start += length
    return torch.stack(means)


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_segment_mean_equals_the_loop(visibility: str):
    """Forward and gradient."""

    @settings(max_examples=40)
    @given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(0, 2**16))
    def check(documents: list[list[bool]], seed: int):
        boundary_T = torch.tensor([boundary for document in documents for boundary in document])
        layout = ConceptLayout.from_boundaries(packed([len(d) for d in documents]), boundary_T, visibility)
        generator = torch.Generator().manual_seed(seed)
        h_TE = torch.randn(len(boundary_T), 5, generator=generator, dtype=torch.float64, requires_grad=True)
        ours, theirs = segment_mean(h_TE, layout), loop_mean(h_TE, layout)
        torch.testing.assert_close(ours, theirs)
        cotangent_ME = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(*(torch.autograd.grad(mean_ME, h_TE, cotangent_ME)[0] for mean_ME in (ours, theirs)))

    check()


def one_segment(length: int) -> ConceptLayout:
    return ConceptLayout.from_boundaries(packed([length]), torch.arange(length) == 0, "closed")


def test_half_precision_is_accumulated_in_fp32():
    """Adding 1000 ones in bf16 stops at 256."""
    h_TE = torch.ones(1000, 3, dtype=torch.bfloat16, requires_grad=True)
    mean_ME = segment_mean(h_TE, one_segment(1000))
    assert mean_ME.dtype == torch.float32
    assert torch.equal(mean_ME, torch.ones(1, 3))
    mean_ME.sum().backward()
    assert h_TE.grad is not None and h_TE.grad.dtype == torch.bfloat16
    torch.testing.assert_close(h_TE.grad.float(), torch.full((1000, 3), 1e-3), rtol=4e-3, atol=0)


def test_a_large_document_leaves_no_trace_in_the_next():
    """Not even a rounding error, nor an infinity."""
    boundary_T = torch.tensor([True, False, True, True, False])
    layout = ConceptLayout.from_boundaries(packed([3, 2]), boundary_T, "closed")
    h_TE = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]])
    quiet = segment_mean(h_TE, layout)[-1]
    for loud in (1e30, torch.inf, torch.nan):
        h_TE[1] = loud
        assert torch.equal(segment_mean(h_TE, layout)[-1], quiet)


def test_pooling_projects_the_mean_to_concept_width():
    config = tiny_config()
    pooling = ConceptPooling(config)
    h_TE = torch.randn(7, config.d_token, generator=torch.Generator().manual_seed(0))
    boundary_T = torch.tensor([True, False, False, True, False, True, False])
    layout = ConceptLayout.from_boundaries(packed([5, 2]), boundary_T, "closed")
    c_MC = pooling(h_TE, layout)
    assert c_MC.shape == (3, config.d_concept)
    torch.testing.assert_close(c_MC, loop_mean(h_TE, layout) @ pooling.up_proj.weight.T)


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_the_last_state_may_stand_for_a_segment(visibility: str):
    """Under `inclusive` it is the boundary's, and the newest that a token sees that of the newest boundary: H-Net's."""
    pooling = ConceptPooling(tiny_config(pooling="last"))
    h_TE = torch.randn(7, tiny_config().d_token, generator=torch.Generator().manual_seed(0))
    boundary_T = torch.tensor([True, False, False, True, False, True, False])
    layout = ConceptLayout.from_boundaries(packed([5, 2]), boundary_T, visibility, bucket=8)
    last_M = {"closed": [2, 4, 6], "inclusive": [0, 3, 4, 5, 6]}[visibility]
    c_MC = pooling(h_TE, layout)[: len(last_M)]
    torch.testing.assert_close(c_MC, h_TE[last_M] @ pooling.up_proj.weight.T)
    if visibility == "inclusive":
        state_of_S = torch.full((layout.num_slots,), -1).index_copy(0, layout.slot_M, layout.last_M)
        assert state_of_S[layout.slot_T].tolist() == [0, 0, 0, 3, 3, 5, 5]


# Smoothing


def random_smoothing() -> AdjacentSmoothing:
    smoothing = AdjacentSmoothing(tiny_config())
    torch.nn.init.normal_(smoothing.mix, generator=torch.Generator().manual_seed(0))
    return smoothing


def random_concepts(concepts: int) -> Tensor:
    return torch.randn(concepts, tiny_config().d_concept, generator=torch.Generator().manual_seed(1))


def test_smoothing_begins_as_the_identity():
    z_MC = random_concepts(9)
    assert torch.equal(AdjacentSmoothing(tiny_config())(z_MC, packed([4, 5])), z_MC)


def test_smoothing_blends_with_the_predecessor():
    smoothing, z_MC = random_smoothing(), random_concepts(6)
    smooth_MC = smoothing(z_MC, packed([4, 2]))
    for m in range(6):
        previous = z_MC[m] if m in (0, 4) else z_MC[m - 1]  # concepts 0 and 4 open a document
        torch.testing.assert_close(smooth_MC[m], (1 - smoothing.mix) * z_MC[m] + smoothing.mix * previous)


@pytest.mark.parametrize("changed", range(7))
def test_smoothing_is_causal_and_stays_in_its_document(changed: int):
    """A concept reaches itself and its successor in the document, nothing else."""
    smoothing, before = random_smoothing(), random_concepts(7)
    after = before.clone()
    after[changed] += 1
    documents = packed([3, 1, 3])
    differs_M = (smoothing(before, documents) != smoothing(after, documents)).any(1)
    reached = {changed}
    if changed + 1 < 7 and documents.document_T[changed] == documents.document_T[changed + 1]:
        reached.add(changed + 1)
    assert set(differs_M.nonzero().flatten().tolist()) == reached


def test_smoothing_can_be_switched_off():
    smoothing = SMOOTHERS["none"](tiny_config(smoothing="none"))
    assert isinstance(smoothing, NoSmoothing) and list(smoothing.parameters()) == []
    z_MC = random_concepts(5)
    assert torch.equal(smoothing(z_MC, packed([5])), z_MC)
