"""The closed forms against built models, torch's own counter, measured memory, and the paper's table."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.config import changed
from dlcm.cross_attention import CrossAttention
from dlcm.flops import (
    ByStage,
    cache_bytes_per_token,
    decode_bytes,
    decode_flops,
    forward_flops,
    parameter_counts,
    prefill_flops,
    squared_lengths,
    training_flops,
    training_memory,
    weighted_length,
)
from dlcm.layout import ConceptLayout, PackedLayout
from eval.accounting import against_the_counter
from train.config import build_model_config, load_run_config

ROOT = Path(__file__).parents[2]

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
    decoder = cross_attention = 0.0
    for name, operations in counter.get_flop_counts().items():
        products, batched = (
            sum(flops for op, flops in operations.items() if ("bmm" in str(op)) == is_batched)
            for is_batched in (False, True)
        )
        name = name.partition(".")[2]
        if is_cross_attention := re.fullmatch(r"cross_attention|later_cross_attention\.\d+", name) is not None:
            # closed visibility: the null slot, and every segment before the token's own
            pairs = output.boundaries.cumsum(1).sum().item()
            batched = 2 * (2 * 2 * model.config.d_token * pairs)  # exact, so not halved
        stages[name] = (products + batched / 2) / ids.numel()
        cross_attention += stages[name] * is_cross_attention
        decoder += stages[name] * (re.fullmatch(r"decoder\.layers\.\d+", name) is not None)
    return stages | {"decoder": decoder, "cross_attention": cross_attention}  # later ones run within the decoder


OPTIONS = {"injection": "every", "clean_start": True, "cross_attention_every": 2, "decoder_layers": 5}
CLOSING = {"injection": "closing", "cross_attention": False, "decoder_layers": 1}
MODULES = {"head": "lm_head", "skip": "skip_proj"}  # where their name is not that of the stage


@pytest.mark.parametrize("options", [{"decoder_layers": 1}, OPTIONS, CLOSING], ids=["", "options", "closing"])
@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
def test_dlcm_stages_match_the_counter(segmenter, options):
    config = DLCMConfig(
        **TOKENS, d_concept=96, concept_heads=4, concept_kv_heads=2, concept_ffn=160, segmenter=segmenter,
        target_ratio=4.0, encoder_layers=2, backbone_layers=3, d_scan=48, **options,
    )  # fmt: skip
    model = DLCMForCausalLM(config)
    ratio = config.target_ratio
    if segmenter != "fixed":  # every token a boundary, whatever the ids
        model.detector.threshold, ratio = 0.0, 1.0
    expected = forward_flops(config, LENGTH, ratio).stages
    actual = counted(model)
    assert ("skip" in expected, "injection" in expected) == (options is OPTIONS, "injection" in options)
    for stage, flops in expected.items():
        # the rest of 2 % is the null slot of each document, which the formula leaves out
        assert actual.get(MODULES.get(stage, stage), 0) == pytest.approx(flops, rel=0.02), stage


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


# Windows

WINDOW = 40
WINDOWED = [
    DLCMConfig(**TOKENS, d_concept=96, concept_heads=4, concept_ffn=160, token_window=WINDOW, **OPTIONS),
    LlamaBaselineConfig(**TOKENS, num_layers=5, token_window=WINDOW),
    LlamaBaselineConfig(**TOKENS, num_layers=5, token_window=WINDOW, global_every=2),
]
LAYERS = [{"encoder": 4, "decoder": 5}, {"decoder": 5}, {"decoder": 3}]  # with a window
WITH_A_WINDOW = list(zip(WINDOWED, LAYERS, strict=True))


def without_windows(config: DLCMConfig | LlamaBaselineConfig) -> DLCMConfig | LlamaBaselineConfig:
    none = {"token_window": None} | ({"global_every": None} if isinstance(config, LlamaBaselineConfig) else {})
    return changed(config, none)


def saved(windowed: ByStage, full: ByStage) -> dict[str, float]:
    return {stage: full.stages[stage] - cost for stage, cost in windowed.stages.items() if cost != full.stages[stage]}


@pytest.mark.parametrize("lengths", [[400], [41], [1, 30, 40, 41, 300]], ids=str)
@pytest.mark.parametrize(("config", "layers"), WITH_A_WINDOW, ids=["dlcm", "llama", "some"])
def test_windows_save_the_pairs_that_are_further_apart(
    config: DLCMConfig | LlamaBaselineConfig, layers: dict[str, int], lengths: list[int]
):
    """Counted position by position, where a token is half of an other to itself, as in half of L x L."""
    pairs, near = (
        sum(min(position + 0.5, most) for length in lengths for position in range(length)) for most in (1000, WINDOW)
    )
    assert squared_lengths(lengths) == 2 * pairs and squared_lengths(lengths, WINDOW) == 2 * near
    length, windowed = weighted_length(lengths), weighted_length(lengths, WINDOW)
    found = saved(
        forward_flops(config, length, windowed_length=windowed), forward_flops(without_windows(config), length)
    )
    each = 4 * config.d_token * (pairs - near) / sum(lengths)
    assert found == pytest.approx({stage: number * each for stage, number in layers.items()})
    if len(lengths) == 1:
        assert saved(forward_flops(config, length), forward_flops(without_windows(config), length)) == found


@pytest.mark.parametrize("config", WINDOWED, ids=["dlcm", "llama", "some"])
def test_windows_save_nothing_where_documents_are_no_longer(config: DLCMConfig | LlamaBaselineConfig):
    for cost in (forward_flops, prefill_flops, decode_flops, decode_bytes):
        assert cost(config, WINDOW) == cost(without_windows(config), WINDOW)


@pytest.mark.parametrize(("config", "layers"), WITH_A_WINDOW, ids=["dlcm", "llama", "some"])
def test_decoding_reads_the_window(config: DLCMConfig | LlamaBaselineConfig, layers: dict[str, int]):
    beyond, full = 100 - WINDOW, without_windows(config)
    kv_width = config.d_token // config.token_heads * config.token_kv_heads
    assert saved(decode_flops(config, 100), decode_flops(full, 100)) == pytest.approx(
        {stage: number * 4 * config.d_token * beyond for stage, number in layers.items()}
    )
    assert saved(decode_bytes(config, 100), decode_bytes(full, 100)) == pytest.approx(
        {stage: number * 2 * 2 * kv_width * beyond for stage, number in layers.items()}
    )
    assert cache_bytes_per_token(config) == cache_bytes_per_token(full)  # it is kept all the same


def test_attention_that_is_gone_had_a_window():
    """Of the second and third of five layers, of which every second sees everything."""
    config = changed(WINDOWED[2], {"quantiser": "bits"})
    full = without_windows(config)
    for layer, layers in ((1, 3), (2, 2)):
        gone = {"channels_left": {f"decoder.layers.{layer}.attention": [0, 0]}}
        found = saved(forward_flops(changed(config, gone), 400), forward_flops(changed(full, gone), 400))
        further = 200 - (WINDOW - WINDOW**2 / 800)
        assert found == pytest.approx({"decoder": layers * 4 * config.d_token * further})


# Parameters


def built(config: DLCMConfig | LlamaBaselineConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return (DLCMForCausalLM if isinstance(config, DLCMConfig) else LlamaBaselineForCausalLM)(config)


RUNS = sorted(path for name in ("dlcm", "llama") for path in (ROOT / "configs").glob(f"*/{name}.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_parameters_of_every_configuration_are_exact(path: Path):
    config = build_model_config(load_run_config(path))
    assert sum(parameter_counts(config).values()) == built(config).num_parameters()


@pytest.mark.parametrize(
    "options", [{}, OPTIONS, {"injection": "first"}, CLOSING], ids=["", "options", "first", "closing"]
)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("smoothing", ["adjacent", "none"])
@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
def test_parameters_are_exact_stage_by_stage(segmenter: str, smoothing: str, qk_norm: bool, options: dict):
    shapes = dict(d_concept=96, concept_heads=4, concept_kv_heads=2, concept_ffn=160, d_scan=48)
    config = DLCMConfig(**TOKENS, **shapes, segmenter=segmenter, smoothing=smoothing, qk_norm=qk_norm, **options)
    model = built(config)
    modules = {
        "embedding": [model.embed_tokens],
        "encoder": [model.encoder, *([model.encoder_norm] if config.clean_start else [])],
        "detector": [model.detector],
        "pooling": [model.pooling],
        "backbone": [model.backbone, model.backbone_norm, model.smoothing],
        "cross_attention": model.cross_attentions,
        **({"skip": [model.skip_proj]} if config.clean_start else {}),
        **({"injection": [model.injection]} if model.injection is not None else {}),
        "decoder": [model.decoder, model.decoder_norm],
        "head": [model.lm_head],
    }
    counts = {stage: sum(p.numel() for m in parts for p in m.parameters()) for stage, parts in modules.items()}
    assert parameter_counts(config) == counts
    assert sum(counts.values()) == model.num_parameters()


# Training, prefill, decode


def test_training_matches_the_counter_stage_by_stage():
    """Forward and backward of both models; the table of docs/accounting.md."""
    rows = against_the_counter()
    assert {(row.model, row.stage) for row in rows} == {
        *(("DLCM", stage) for stage in forward_flops(DLCMConfig(), 64).stages),
        *(("LLaMA", stage) for stage in ("decoder", "head")),
        *((model, "all") for model in ("DLCM", "LLaMA")),
    }
    for row in rows:
        assert row.counter == pytest.approx(row.formula, rel=0.02), (row.model, row.stage)


CONFIGS = [
    DLCMConfig(**TOKENS, d_concept=96, concept_heads=4, concept_ffn=160, **OPTIONS),
    LlamaBaselineConfig(**TOKENS, num_layers=3),
]


@pytest.mark.parametrize("config", CONFIGS + WINDOWED)
def test_a_prompt_costs_what_decoding_it_would(config: DLCMConfig | LlamaBaselineConfig):
    """Token by token, but for the heads of all tokens but the last."""
    length = 400
    decoded = sum(decode_flops(config, context).total for context in range(length))
    heads = (length - 1) * 2 * config.d_token * config.vocab_size
    assert prefill_flops(config, length).total == pytest.approx(decoded - heads, rel=0.01)


@pytest.mark.parametrize("config", CONFIGS, ids=["dlcm", "llama"])
def test_recomputation_and_replication_cost_more_where_they_happen(config: DLCMConfig | LlamaBaselineConfig):
    forward, plain = forward_flops(config, 512).stages, training_flops(config, 512).stages
    again = training_flops(config, 512, recompute=True).stages
    stacks = {"encoder", "backbone", "decoder"} & forward.keys()
    assert {stage: again[stage] - plain[stage] for stage in stacks} == pytest.approx(
        {stage: forward[stage] for stage in stacks}
    )
    assert all(again[stage] == plain[stage] for stage in forward.keys() - stacks)
    replicated = forward_flops(config, 512, replicated=True).stages
    assert {stage for stage in forward if replicated[stage] > forward[stage]} == (
        {"cross_attention"} if isinstance(config, DLCMConfig) else set()
    )


@pytest.mark.parametrize("config", CONFIGS, ids=["dlcm", "llama"])
def test_documents_cost_what_their_weighted_length_does(config: DLCMConfig | LlamaBaselineConfig):
    lengths = [3, 500, 90, 1]
    apart = sum(length * forward_flops(config, length).total for length in lengths)
    assert sum(lengths) * forward_flops(config, weighted_length(lengths)).total == pytest.approx(apart)


# Bytes


def test_the_cache_of_the_papers_pair():
    """At R = 4 at most half the baseline's bytes per token of context."""
    dlcm, llama = (
        build_model_config(load_run_config(ROOT / "configs" / "table3" / f"{name}.yaml")) for name in ("dlcm", "llama")
    )
    theirs, ours = cache_bytes_per_token(llama).total, cache_bytes_per_token(dlcm, 4.0).total
    assert theirs == 32 * 2 * 1536 * 2
    assert ours == (10 + 6) * 2 * 768 * 2 + 16 * 2 * 1536 * 2 / 4 + 2 * 768 * 2 / 4
    assert ours / theirs < 0.5


@pytest.mark.parametrize("every", [None, 1])
def test_the_cache_is_what_decoding_keeps(every: int | None):
    """Keys and values of tokens, closed concepts, and slots: fixed boundaries, 12 tokens of which 8 are in concepts."""
    sizes = dict(TOKENS, max_position_embeddings=64)
    dlcm = DLCMForCausalLM(DLCMConfig(**sizes, segmenter="fixed", target_ratio=4.0, cross_attention_every=every))
    llama = LlamaBaselineForCausalLM(LlamaBaselineConfig(**sizes))
    input_ids = torch.randint(160, (2, 12))
    assert llama(input_ids, use_cache=True).past_key_values.key_value_bytes() == pytest.approx(
        2 * 12 * cache_bytes_per_token(llama.config, number=4).total
    )
    null_slots = 2 * 2 * 4 * 32 * len(dlcm.cross_attentions)  # of two rows; they do not grow
    kept = dlcm(input_ids, use_cache=True).past_key_values.key_value_bytes() - null_slots
    assert kept == pytest.approx(2 * 12 * cache_bytes_per_token(dlcm.config, 12 / 2, number=4).total)


def test_bytes_of_decoding():
    dlcm, llama = CONFIGS
    count = parameter_counts(llama)
    alone = decode_bytes(llama, context=0)
    assert alone.total == 2 * (sum(count.values()) - count["embedding"] + llama.d_token)
    in_batch = decode_bytes(llama, context=100, batch=10)
    cache = 100 * cache_bytes_per_token(llama).total
    assert in_batch.total == pytest.approx((alone.total - 2 * llama.d_token) / 10 + 2 * llama.d_token + cache)
    # At R = 1 a segment closes with every token: all weights are read, and the whole cache.
    every = decode_bytes(dlcm, context=100, tokens_per_concept=1.0)
    count = parameter_counts(dlcm)
    weights = 2 * (sum(count.values()) - count["embedding"] + dlcm.d_token)
    assert every.total == pytest.approx(weights + 100 * cache_bytes_per_token(dlcm, 1.0).total)
    # The more rows, the more steps in which one of them closes a segment.
    shares = [decode_bytes(dlcm, 0, batch, 4.0).stages["backbone"] * batch / 2 for batch in (1, 2, 1000)]
    assert [share / count["backbone"] for share in shares] == pytest.approx([1 / 4, 1 - (3 / 4) ** 2, 1])


def measured_peaks() -> Iterator[tuple[str, str, dict]]:
    rows = json.loads((ROOT / "docs" / "results" / "training.json").read_text())["rows"]
    for row in rows:
        if row["part"] in ("throughput", "accumulation", "length") and row["cross_attention"] != "replicated":
            yield row["pair"], row["model"], row


@pytest.mark.parametrize(
    ("pair", "model", "row"),
    list(measured_peaks()),
    ids=lambda value: value if isinstance(value, str) else value["part"],
)
def test_memory_is_within_a_tenth_of_what_was_measured(pair: str, model: str, row: dict):
    """On one H100; at 65,536 tokens in a step where blocks are recomputed."""
    run = load_run_config(ROOT / "configs" / pair / f"{model}.yaml", row["overrides"].split())
    memory = training_memory(
        build_model_config(run),
        row["documents"] * row["sequence_length"],
        row.get("tokens_per_concept"),
        recompute=row["activation_checkpointing"] == "full",
        accumulates=row["micro_batches"] > 1,
    )
    assert memory.peak / 1e9 == pytest.approx(row["peak_gb"], rel=0.1)
