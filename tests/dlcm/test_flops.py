"""The closed forms against torch's own counter, stage by stage, and against the paper's table."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.flops import forward_flops

TOKENS = dict(vocab_size=160, d_token=64, token_heads=4, token_kv_heads=2, token_ffn=96)
LENGTH, DOCUMENTS = 64, 3


def counted(model: torch.nn.Module) -> dict[str, float]:
    """FLOPs per token of each stage as torch counts them, causal attention at half like ours.

    The naive attention path makes its products visible, as the only batched ones.
    """
    ids = torch.randint(160, (DOCUMENTS, LENGTH))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.eval()(ids)
    stages = {}
    for name, operations in counter.get_flop_counts().items():
        total = sum(flops / (2 if "bmm" in str(op) else 1) for op, flops in operations.items())
        stages[name.rpartition(".")[2]] = total / ids.numel()
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
