"""Configurations: every bad input is one line that names the key and the value."""

import math
from typing import Any

import pytest
import torch

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig
from tests.conftest import tiny_baseline_config, tiny_config, tiny_dlcm

BUILDERS = [tiny_config, tiny_baseline_config]


def rejected(build, *mentions: str, **fields: Any) -> str:
    """The message of the error that `fields` raise: one line, containing all of `mentions`."""
    with pytest.raises((ValueError, TypeError)) as error:
        build(**fields)
    message = str(error.value)
    assert "\n" not in message, f"more than one line: {message!r}"
    for mention in mentions:
        assert mention in message
    return message


@pytest.mark.parametrize("build", BUILDERS)
def test_defaults_and_tiny_configurations_are_valid(build):
    build()
    DLCMConfig()
    LlamaBaselineConfig()


@pytest.mark.parametrize(
    ("build", "typo", "meant"),
    [
        (tiny_config, "d_tokens", "d_token"),
        (tiny_config, "taget_ratio", "target_ratio"),
        (tiny_config, "encoder_layer", "encoder_layers"),
        (tiny_config, "visibilty", "visibility"),
        (tiny_baseline_config, "num_layer", "num_layers"),
        (tiny_baseline_config, "token_kvheads", "token_kv_heads"),
    ],
)
def test_a_mistyped_key_is_named_with_what_was_meant(build, typo: str, meant: str):
    rejected(build, f"'{typo}'", f"did you mean '{meant}'?", **{typo: 4})


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("key", ["quantum_flux", "n_embd", "dropout", "temperature", "rope_parameters", "d_Token"])
def test_a_key_that_nothing_reads_is_an_error(build, key: str):
    rejected(build, f"'{key}'", **{key: 1})


def test_the_baseline_has_no_concepts():
    for key in ("d_concept", "segmenter", "target_ratio", "encoder_layers"):
        rejected(tiny_baseline_config, f"'{key}'", **{key: 4})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("d_token", "wide"),
        ("d_token", 16.5),
        ("vocab_size", None),
        ("qk_norm", "yes"),
        ("rope_theta", "large"),
        ("attention_backend", "flashy"),
    ],
)
@pytest.mark.parametrize("build", BUILDERS)
def test_a_value_of_the_wrong_kind(build, key: str, value: Any):
    rejected(build, key, str(value), **{key: value})


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("segmenter", ["learned", "rule", "fixed"]),
        ("visibility", ["closed", "inclusive"]),
        ("smoothing", ["adjacent", "none"]),
        ("pooling", ["mean", "last"]),
        ("parser_scope", ["global", "sequence"]),
        ("attention_backend", ["auto", "flash_attn_4", "flash_attn", "torch_varlen", "sdpa"]),
        ("cross_attention_backend", ["auto", "ragged", "replicated", "masked"]),
        ("slot_weighting", ["replication", "uniform"]),
    ],
)
def test_a_choice_that_does_not_exist(key: str, choices: list[str]):
    rejected(tiny_config, key, "sometimes", *choices, **{key: "sometimes"})
    for choice in choices:
        assert getattr(tiny_config(**{key: choice}), key) == choice


def test_replication_cannot_weigh_concepts_uniformly():
    rejected(
        tiny_config, "slot_weighting", "replicated", "'auto'",
        slot_weighting="uniform", cross_attention_backend="replicated",
    )  # fmt: skip


def test_whole_numbers_serve_where_a_fraction_would():
    """YAML writes `target_ratio: 4`."""
    config = tiny_config(target_ratio=4, rope_theta=500000, sharpening=2, initializer_range=1, aux_loss_weight=0)
    assert (config.target_ratio, config.rope_theta, config.aux_loss_weight) == (4, 500000, 0)


@pytest.mark.parametrize(
    ("build", "stage", "width"),
    [
        (tiny_config, "token", "d_token"),
        (tiny_config, "concept", "d_concept"),
        (tiny_baseline_config, "token", "d_token"),
    ],
)
class TestHeads:
    def test_width_is_a_multiple_of_heads(self, build, stage: str, width: str):
        rejected(build, f"{width}=24", f"{stage}_heads=5", **{width: 24, f"{stage}_heads": 5})

    def test_head_dimension_is_even(self, build, stage: str, width: str):
        fields = {width: 24, f"{stage}_heads": 8, f"{stage}_kv_heads": 8}
        rejected(build, width, f"{stage}_heads", "even", **fields)

    def test_heads_are_a_multiple_of_kv_heads(self, build, stage: str, width: str):
        fields = {width: 24, f"{stage}_heads": 4, f"{stage}_kv_heads": 3}
        rejected(build, f"{stage}_heads=4", f"{stage}_kv_heads=3", **fields)

    @pytest.mark.parametrize("heads", [0, -4])
    def test_heads_are_positive(self, build, stage: str, width: str, heads: int):
        rejected(build, f"{stage}_heads={heads}", **{f"{stage}_heads": heads})
        rejected(build, f"{stage}_kv_heads={heads}", **{f"{stage}_kv_heads": heads})

    def test_kv_heads_default_to_heads(self, build, stage: str, width: str):
        assert getattr(build(**{f"{stage}_kv_heads": None}), f"{stage}_kv_heads") == getattr(build(), f"{stage}_heads")


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    ("build", "key"),
    [
        (build, key)
        for build in BUILDERS
        for key in ("vocab_size", "d_token", "token_ffn", "max_position_embeddings", "mup_base_width", "token_window")
    ]
    + [(tiny_baseline_config, "num_layers")]
    + [(tiny_config, f"{stage}_layers") for stage in ("encoder", "backbone", "decoder")]
    + [(tiny_config, key) for key in ("d_concept", "concept_ffn", "d_scan")],
)
def test_sizes_are_positive(build, key: str, value: int):
    rejected(build, f"{key}={value}", **{key: value})


@pytest.mark.parametrize("ratio", [0.99, 0.0, -4.0])
@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
def test_less_than_one_token_per_concept(segmenter: str, ratio: float):
    rejected(tiny_config, f"target_ratio={ratio}", target_ratio=ratio, segmenter=segmenter)


@pytest.mark.parametrize("every", [0, -1, 3])
def test_cross_attention_before_every_so_many_layers_of_those_that_there_are(every: int):
    rejected(
        tiny_config, f"cross_attention_every={every}", "decoder_layers=2", "null", decoder_layers=2,
        cross_attention_every=every,
    )  # fmt: skip


@pytest.mark.parametrize("other", [{"injection": "off"}, {"injection": "closing", "cross_attention_every": 1}])
def test_without_cross_attention_something_else_reads_concepts(other: dict[str, Any]):
    rejected(tiny_config, "cross_attention=false", "injection", cross_attention=False, **other)


@pytest.mark.parametrize("every", [0, -1, 3])
def test_a_layer_without_a_window_in_every_so_many_of_those_that_there_are(every: int):
    rejected(tiny_baseline_config, f"global_every={every}", "num_layers=2", "null", token_window=4, global_every=every)


def test_all_layers_see_everything_without_a_window():
    rejected(tiny_baseline_config, "global_every=2 needs a token_window", global_every=2)


def test_windows_are_those_of_the_token_level():
    assert tiny_config().windows("encoder") == tiny_config(token_window=4).windows("backbone")[:1] == [None]
    assert tiny_config(token_window=4, decoder_layers=2).windows("decoder") == [4, 4]
    sizes = {"token_window": 4, "num_layers": 7}
    assert tiny_baseline_config(**sizes).windows("decoder") == [4] * 7
    assert tiny_baseline_config(**sizes, global_every=3).windows("decoder") == [4, 4, None, 4, 4, None, 4]


@pytest.mark.parametrize("segmenter", ["learned", "rule"])
def test_one_token_per_concept_is_no_target_of_the_ratio_loss(segmenter: str):
    rejected(tiny_config, "target_ratio=1", "segmenter='fixed'", segmenter, target_ratio=1.0, segmenter=segmenter)


def test_one_token_per_concept_makes_every_token_a_concept():
    output = tiny_dlcm(segmenter="fixed", target_ratio=1.0)(torch.arange(8)[None])
    assert bool(output.boundaries.all())
    assert output.concept_lengths.tolist() == [1] * 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("build", "key"),
    [(build, key) for build in BUILDERS for key in ("rope_theta", "rms_norm_eps", "initializer_range")]
    + [(tiny_config, key) for key in ("target_ratio", "threshold", "sharpening", "aux_loss_weight")],
)
def test_numbers_are_finite(build, key: str, value: float):
    rejected(build, f"{key}={value}", **{key: value})


@pytest.mark.parametrize(
    ("build", "key", "value"),
    [(build, key, -1.0) for build in BUILDERS for key in ("rope_theta", "rms_norm_eps", "initializer_range")]
    + [(tiny_baseline_config, "rope_theta", 0.0)]
    + [(tiny_config, "threshold", value) for value in (0.0, 1.0, 1.5)]
    + [(tiny_config, "sharpening", value) for value in (0.0, -1.0)]
    + [(tiny_config, "aux_loss_weight", -0.1)],
)
def test_numbers_out_of_range(build, key: str, value: float):
    rejected(build, f"{key}={value}", **{key: value})


def test_ids_that_end_words():
    rejected(tiny_config, "word_end_ids is set, but segmenter='learned'", word_end_ids=[1])
    for ids in ([], [0, 23], [-1]):
        rejected(tiny_config, "word_end_ids must hold ids from 0 to 22", segmenter="words", word_end_ids=ids)


@pytest.mark.parametrize("build", BUILDERS)
def test_what_the_models_cannot_do(build):
    rejected(build, "tie_word_embeddings=true is not supported", tie_word_embeddings=True)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_saved_configuration_loads_as_it_was(build, tmp_path):
    config = build(rope_theta=5000.0, eos_token_id=3, qk_norm=True)
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("build", BUILDERS)
def test_an_edited_configuration_file_is_rejected(build, tmp_path):
    build().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"token_ffn"', '"token_fnn"'))
    with pytest.raises(ValueError, match="no field 'token_fnn'; did you mean 'token_ffn'"):
        type(build()).from_pretrained(tmp_path)


def test_width_multipliers():
    config = tiny_config(d_token=16, d_concept=24, mup_base_width=8)
    assert (config.token_width_multiplier, config.concept_width_multiplier) == (2.0, 3.0)
    standard = tiny_config(mup_base_width=None)
    assert (standard.token_width_multiplier, standard.concept_width_multiplier) == (1.0, 1.0)


def test_d_scan_is_the_width_of_the_boundary_projections():
    assert tiny_dlcm().detector.q_proj.weight.shape == (16, 16)
    assert DLCMForCausalLM(tiny_config(d_scan=6)).detector.k_proj.weight.shape == (6, 16)
