"""Concept replication (Eq. 17) against what it stands for: a masked softmax over slots with a log-count bias."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlcm.cross_attention import CrossAttention, replicated_attention
from dlcm.layout import ConceptLayout, PackedLayout
from tests.conftest import random_documents, tiny_config, tiny_dlcm
from tests.dlcm.test_attention import assert_same_function


def concept_layout(lengths: list[int], boundaries: list[bool], visibility: str) -> ConceptLayout:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    tokens = PackedLayout.from_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]))
    return ConceptLayout.from_boundaries(tokens, torch.tensor(boundaries), visibility)


def log_counts(layout: ConceptLayout) -> Tensor:
    """(T, S): log n(t, j), n the number of positions i <= t of t's document whose newest visible slot is j."""
    bias_TS = torch.full((layout.tokens.total, layout.num_slots), -math.inf, dtype=torch.float64)
    document, newest = layout.tokens.document_T.tolist(), layout.slot_T.tolist()
    for t in range(layout.tokens.total):
        for slot in range(layout.num_slots):
            n = sum(1 for i in range(t + 1) if document[i] == document[t] and newest[i] == slot)
            if n:
                bias_TS[t, slot] = math.log(n)
    return bias_TS


def prefix_bias(layout: ConceptLayout) -> Tensor:
    """(T, S): 0 on the slots of t's document up to t's newest."""
    slot_S = torch.arange(layout.num_slots)
    first_T = layout.cu_slots_D1[layout.tokens.document_T]
    sees_TS = (slot_S >= first_T[:, None]) & (slot_S <= layout.slot_T[:, None])
    return torch.zeros(sees_TS.shape, dtype=torch.float64).masked_fill(~sees_TS, -math.inf)


def dense_attention(
    q_THN: Tensor, k_SKN: Tensor, v_SKN: Tensor, layout: ConceptLayout, weighting: str = "replication"
) -> Tensor:
    group = q_THN.shape[1] // k_SKN.shape[1]
    bias_TS = log_counts(layout) if weighting == "replication" else prefix_bias(layout)
    outputs = []
    for head in range(q_THN.shape[1]):
        scores_TS = q_THN[:, head] @ k_SKN[:, head // group].T / q_THN.shape[2] ** 0.5
        outputs.append((scores_TS + bias_TS).softmax(1) @ v_SKN[:, head // group])
    return torch.stack(outputs, 1)


def assert_replication_is_dense(layout: ConceptLayout, heads: int, kv_heads: int, seed: int) -> None:
    """Forward and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.tokens.total, heads, 6), (layout.num_slots, kv_heads, 6), (layout.num_slots, kv_heads, 6)]
    inputs = [(2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_() for shape in shapes]
    assert_same_function(
        lambda q, k, v: replicated_attention(q, k, v, layout, "sdpa"),
        lambda q, k, v: dense_attention(q, k, v, layout),
        inputs,
    )


HEADS = [(4, 4), (4, 2), (3, 1)]
VISIBILITIES = ["closed", "inclusive"]
EXTREMES = {
    "one concept": ([11], [True] + [False] * 10),
    "every token a boundary": ([7, 4], [True] * 11),
    "documents of one token": ([1] * 9, [True] * 9),
    "one long among short": ([1, 12, 1], [True] * 2 + [False] * 6 + [True] + [False] * 4 + [True]),
    "boundary at the very end": ([6], [True] + [False] * 4 + [True]),
}


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("case", EXTREMES.values(), ids=EXTREMES.keys())
def test_replication_is_dense_at_the_extremes(case, heads: int, kv_heads: int, visibility: str):
    lengths, boundaries = case
    assert_replication_is_dense(concept_layout(lengths, boundaries, visibility), heads, kv_heads, seed=0)


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_replication_is_dense_on_ragged_documents(heads: int, kv_heads: int, visibility: str):
    @settings(max_examples=25)
    @given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(0, 2**16))
    def check(documents: list[list[bool]], seed: int):
        for document in documents:
            document[0] = True  # as every detector decides
        boundaries = [boundary for document in documents for boundary in document]
        layout = concept_layout([len(document) for document in documents], boundaries, visibility)
        assert_replication_is_dense(layout, heads, kv_heads, seed)

    check()


def test_counts_by_hand():
    """Six tokens, boundaries 1 0 1 0 0 1, closed: the null slot is newest twice, the first concept three times."""
    counts_TS = log_counts(concept_layout([6], [True, False, True, False, False, True], "closed")).exp()
    assert counts_TS.round().tolist() == [
        [1, 0, 0, 0],
        [2, 0, 0, 0],
        [2, 1, 0, 0],
        [2, 2, 0, 0],
        [2, 3, 0, 0],
        [2, 3, 1, 0],
    ]


@pytest.fixture
def layout() -> ConceptLayout:
    return concept_layout([4, 1, 3], [True, False, True, False, True, True, False, True], "closed")


def test_slots_put_null_before_each_documents_concepts(layout: ConceptLayout):
    module = CrossAttention(tiny_config())
    torch.nn.init.constant_(module.null_slot, -1)
    z_MC = torch.arange(layout.concepts.total)[:, None].expand(-1, tiny_config().d_concept).float()
    assert module.slots(z_MC, layout)[:, 0].tolist() == [-1, 0, 1, -1, 2, -1, 3, 4]


def test_a_slots_position_is_that_of_its_last_token(layout: ConceptLayout):
    """Concepts of 2 + 2 | 1 | 2 + 1 tokens."""
    assert layout.slot_position_S.tolist() == [0, 1, 3, 0, 0, 0, 1, 2]


def random_module(**overrides) -> CrossAttention:
    module = CrossAttention(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module.double()


def module_inputs(layout: ConceptLayout) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config = tiny_config()
    h_TE = torch.randn(layout.tokens.total, config.d_token, generator=generator, dtype=torch.float64)
    z_MC = torch.randn(layout.concepts.total, config.d_concept, generator=generator, dtype=torch.float64)
    return h_TE, z_MC


def test_output_is_a_residual(layout: ConceptLayout):
    module = random_module()
    torch.nn.init.zeros_(module.o_proj.weight)
    h_TE, z_MC = module_inputs(layout)
    assert torch.equal(module(h_TE, z_MC, layout), h_TE)


def test_queries_and_keys_are_normed(layout: ConceptLayout):
    """With RMSNorm (Eq. 16) the scale of concepts reaches the values only, that of queries nothing."""
    module = random_module(rms_norm_eps=1e-12)
    h_TE, z_MC = module_inputs(layout)
    read_TE = module(h_TE, z_MC, layout) - h_TE
    with torch.no_grad():
        module.q_proj.weight.mul_(5)
        module.k_proj.weight.mul_(7)
    torch.testing.assert_close(module(h_TE, z_MC, layout) - h_TE, read_TE, rtol=1e-8, atol=1e-8)


def turn(x_TX: Tensor, positions: list[int], theta: float) -> Tensor:
    """RoPE as complex numbers: pair i of a head turns by position * theta^(-2i/N)."""
    first, second = x_TX.chunk(2, -1)
    frequency = theta ** -(torch.arange(first.shape[-1]) / first.shape[-1]).double()
    angle = torch.tensor(positions)[:, None, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("rope", [True, False])
def test_module_by_hand(layout: ConceptLayout, rope: bool):
    """H + O(dense attention of RMSNorm(q), turned by token position, to RMSNorm(k), turned by last token)."""
    module = random_module(cross_attention_rope=rope)
    config = tiny_config()
    h_TE, z_MC = module_inputs(layout)
    null = module.null_slot[None]
    slots_SC = torch.cat([null, z_MC[:2], null, z_MC[2:3], null, z_MC[3:]])
    q_THN = module.q_norm(module.q_proj(module.token_norm(h_TE)).unflatten(1, (config.token_heads, -1)))
    k_SKN = module.k_norm(module.k_proj(slots_SC).unflatten(1, (config.token_kv_heads, -1)))
    v_SKN = module.v_proj(slots_SC).unflatten(1, (config.token_kv_heads, -1))
    if rope:
        q_THN = turn(q_THN, [0, 1, 2, 3, 0, 0, 1, 2], config.rope_theta)
        k_SKN = turn(k_SKN, [0, 1, 3, 0, 0, 0, 1, 2], config.rope_theta)
    read_THN = dense_attention(q_THN, k_SKN, v_SKN, layout)
    expected = h_TE + module.o_proj(read_THN.flatten(1))
    torch.testing.assert_close(module(h_TE, z_MC, layout), expected, rtol=1e-6, atol=1e-6)  # RoPE tables are fp32


def test_rope_sees_where_concepts_ended(layout: ConceptLayout, monkeypatch):
    """Concepts differ only by position: with RoPE the output depends on it, without it does not."""
    h_TE, z_MC = module_inputs(layout)
    for rope in (True, False):
        module = random_module(cross_attention_rope=rope)
        at_home = module(h_TE, z_MC, layout)
        with monkeypatch.context() as patch:
            patch.setattr(ConceptLayout, "slot_position_S", torch.zeros(layout.num_slots, dtype=torch.long))
            assert torch.equal(module(h_TE, z_MC, layout), at_home) != rope


def test_first_tokens_read_the_null_slot_alone(layout: ConceptLayout):
    """Under `closed`, a token before the first closed concept reads the null slot's value, whatever its query."""
    module = random_module()
    h_TE, z_MC = module_inputs(layout)
    group = tiny_config().token_heads // tiny_config().token_kv_heads
    value_KN = module.v_proj(module.null_slot).view(tiny_config().token_kv_heads, -1)
    expected_E = module.o_proj(value_KN.repeat_interleave(group, 0).flatten())
    read_TE = module(h_TE, z_MC, layout) - h_TE
    for token in (0, 1, 4, 5, 6):
        torch.testing.assert_close(read_TE[token], expected_E)
    assert not torch.allclose(read_TE[2], expected_E)


# Before which layers of the decoder


@pytest.mark.parametrize(("every", "order"), [(None, "xddd"), (1, "xdxdxd"), (2, "xddxd"), (3, "xddd")])
def test_before_which_layers(every: int | None, order: str):
    """Each with parameters of its own, that move what follows."""
    model = tiny_dlcm(1, cross_attention_every=every, decoder_layers=3)
    ran: list[str] = []
    for cross in model.cross_attentions:
        cross.register_forward_hook(lambda *_: ran.append("x"))
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda *_: ran.append("d"))
    (document,) = random_documents([12], 1)
    with torch.no_grad():
        before = model(document[None]).logits
        assert "".join(ran) == order
        for cross in model.cross_attentions:
            cross.o_proj.weight.neg_()
            assert (model(document[None]).logits - before).abs().max() > 1e-3
            cross.o_proj.weight.neg_()
    assert any(name.startswith("later") for name in model.state_dict()) == (order.count("x") > 1)
