"""The closed forms against torch's own counter, stage by stage, and against the paper's table."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.cross_attention import CrossAttention
from dlcm.flops import forward_flops
from dlcm.layout import ConceptLayout, PackedLayout

TOKENS = dict(vocab_size=160, d_token=64, token_heads=4, token_kv_heads=2, token_ffn=96)
LENGTH, DOCUMENTS = 64, 3


def counted(model: torch.nn.Module) -> dict[str, float]:
    """FLOPs per token of each stage as torch counts them, causal attention at half like ours.

    The naive attention path makes its products visible, as the only batched ones. Cross-attention's depend on how it
    is implemented: in their place stand the pairs of token and visible slot that the function needs.
    """
    ids = torch.randint(160, (DOCUMENTS, LENGTH))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        output = model.eval()(ids)
    stages = {}
    for name, operations in counter.get_flop_counts().items():
        products, batched = (
            sum(flops for op, flops in operations.items() if ("bmm" in str(op)) == is_batched)
            for is_batched in (False, True)
        )
        if name.endswith("cross_attention"):
            # closed visibility: the null slot, and every segment before the token's own
            pairs = output.boundaries.cumsum(1).sum().item()
            batched = 2 * (2 * 2 * model.config.d_token * pairs)  # exact, so not halved
        stages[name.rpartition(".")[2]] = (products + batched / 2) / ids.numel()
    return stages


@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
def test_dlcm_stages_match_the_counter(segmenter):
    config = DLCMConfig(
        **TOKENS, d_concept=96, concept_heads=4, concept_kv_heads=2, concept_ffn=160, segmenter=segmenter,
        target_ratio=4.0, encoder_layers=2, backbone_layers=3, decoder_layers=1, d_scan=48,
    )  # fmt: skip
    model = DLCMForCausalLM(config)
    ratio = config.target_ratio
    if segmenter != "fixed":  # every token a boundary, whatever the ids
        model.detector.threshold, ratio = 0.0, 1.0
    expected = forward_flops(config, LENGTH, ratio).stages
    actual = counted(model)
    for stage, flops in expected.items():
        # the rest of 2 % is the null slot of each document, which the formula leaves out
        assert actual.get("lm_head" if stage == "head" else stage, 0) == pytest.approx(flops, rel=0.02), stage


def test_cross_attention_is_the_same_function_whatever_runs_it():
    """The dense twin over slots, T x S products where replication has T x T: half of them are the formula's."""
    config = DLCMConfig(**TOKENS, segmenter="fixed", target_ratio=4.0, cross_attention_backend="masked")
    attention = CrossAttention(config)
    documents = PackedLayout.from_cu_seqlens(torch.tensor([0, 1024]), 1024)  # long: the null slot counts for little
    layout = ConceptLayout.from_boundaries(documents, torch.arange(1024) % 4 == 0, "closed")
    h_TE, z_MC = torch.zeros(1024, config.d_token), torch.zeros(layout.concepts.total, config.d_concept)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        attention(h_TE, z_MC, layout)
    batched = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    projections = counter.get_total_flops() - batched
    expected = forward_flops(config, 1024, 4).stages["cross_attention"]
    assert (projections + batched / 2) / 1024 == pytest.approx(expected, rel=0.01)


def test_baseline_matches_the_counter():
    config = LlamaBaselineConfig(**TOKENS, num_layers=3)
    expected = forward_flops(config, LENGTH).stages
    actual = counted(LlamaBaselineForCausalLM(config))
    assert actual["decoder"] == pytest.approx(expected["decoder"], rel=1e-6)
    assert actual["lm_head"] == pytest.approx(expected["head"], rel=1e-6)


def test_fewer_concepts_cost_less_and_only_where_concepts_are():
    config = DLCMConfig()
    at_4, at_8 = (forward_flops(config, 1024, ratio).stages for ratio in (4, 8))
    cheaper = {stage for stage in at_4 if at_8[stage] < at_4[stage]}
    assert cheaper == {"pooling", "backbone", "cross_attention"}
    assert forward_flops(config, 1024).total == forward_flops(config, 1024, config.target_ratio).total


def test_the_papers_pair():
    """Table 3 at 8,192 tokens; SwiGLU 4,096 at token width gives the lower of the two readings."""
    wide = dict(d_token=1536, vocab_size=128815, max_position_embeddings=8192)
    baseline = LlamaBaselineConfig(**wide, num_layers=32, token_heads=24, token_ffn=4096)
    dlcm = DLCMConfig(
        **wide, d_concept=3072, encoder_layers=10, backbone_layers=16, decoder_layers=6, token_heads=24,
        token_kv_heads=12, token_ffn=4096, concept_heads=48, concept_kv_heads=24, concept_ffn=6144,
    )  # fmt: skip
    assert forward_flops(baseline, 8192).total == pytest.approx(3.01e9, rel=0.01)
    assert forward_flops(dlcm, 8192, 4).total == pytest.approx(2.39e9, rel=0.01)
    assert forward_flops(dlcm, 8192, 8).total == pytest.approx(2.01e9, rel=0.01)
