"""Decoupled muP: every parameter's role, and what it means for initialisation and optimiser.

Whether activations then keep their scale as widths grow is looked at by tests/eval/test_coord_check.py.
"""

import math

import pytest
import torch

from dlcm import DLCMConfig, DLCMForCausalLM
from dlcm.mup import ROLES, parameter_groups, role_of
from tests.conftest import random_documents, tiny_baseline, tiny_baseline_config, tiny_config, tiny_dlcm

# Roles

TOKEN_MATRICES = ["encoder.layers.0.attention.q_proj.weight", "decoder.layers.0.ffn.down_proj.weight"]
CONCEPT_MATRICES = ["backbone.layers.1.attention.o_proj.weight", "backbone.layers.0.ffn.gate_proj.weight"]


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("embed_tokens.weight", "embedding"),
        ("lm_head.weight", "unembedding"),
        *((name, "token_matrix") for name in TOKEN_MATRICES),
        *((name, "concept_matrix") for name in CONCEPT_MATRICES),
        ("pooling.up_proj.weight", "token_matrix"),  # mixed widths follow their fan-in
        ("cross_attention.q_proj.weight", "token_matrix"),
        ("cross_attention.k_proj.weight", "concept_matrix"),
        ("cross_attention.v_proj.weight", "concept_matrix"),
        ("cross_attention.o_proj.weight", "token_matrix"),
        ("detector.q_proj.weight", "boundary_matrix"),
        ("detector.k_proj.weight", "boundary_matrix"),
        ("encoder.layers.0.attention_norm.weight", "gain"),
        ("backbone.layers.0.attention.q_norm.weight", "gain"),
        ("backbone_norm.weight", "gain"),
        ("cross_attention.k_norm.weight", "gain"),
        ("smoothing.mix", "smoothing"),
        ("cross_attention.null_slot", "null_slot"),
        ("encoder_norm.weight", "gain"),
        ("cross_attention.gate", "gate"),
        ("later_cross_attention.0.q_proj.weight", "token_matrix"),
        ("later_cross_attention.0.k_proj.weight", "concept_matrix"),
        ("later_cross_attention.0.v_proj.weight", "concept_matrix"),
        ("later_cross_attention.0.o_proj.weight", "token_matrix"),
        ("later_cross_attention.0.null_slot", "null_slot"),
        ("later_cross_attention.0.gate", "gate"),
        ("later_cross_attention.0.q_norm.weight", "gain"),
        ("injection.gate", "gate"),
        ("injection.up_proj.weight", "concept_matrix"),
        ("skip_proj.weight", "skip_matrix"),
    ],
)
def test_roles_by_name(name: str, role: str):
    assert role_of(name).name == role
    assert name in dict(with_all_options().named_parameters())


def with_all_options(qk_norm: bool = True) -> DLCMForCausalLM:
    later = {"cross_attention_every": 1, "decoder_layers": 2}
    return tiny_dlcm(qk_norm=qk_norm, clean_start=True, injection="every", **later)


@pytest.mark.parametrize("build", [with_all_options, tiny_baseline])
def test_every_matrix_scales_with_the_width_of_its_fan_in(build):
    """Read off the shapes: no two widths are alike, so the number of columns says what a matrix reads."""
    model = build(qk_norm=True)
    config = model.config
    read_by_width = {config.d_token: "token", config.token_ffn: "token"}
    if isinstance(config, DLCMConfig):
        read_by_width |= {config.d_concept: "concept", config.concept_ffn: "concept"}
        assert len(read_by_width) == 4
    for name, parameter in model.named_parameters():
        expected = read_by_width[parameter.shape[1]] if name.endswith("_proj.weight") else None
        assert role_of(name).fan_in == expected, name


@pytest.mark.parametrize("build", [with_all_options, tiny_baseline])
def test_every_role_survives_wrapping(build):
    """Names as torch.compile, DDP, FSDP and checkpointing of layers leave them, nested too."""
    model = build()
    compiled = torch.compile(model)
    names = [name for name, _ in model.named_parameters()]
    for name, (wrapped, _) in zip(names, compiled.named_parameters(), strict=True):
        assert wrapped != name and role_of(wrapped) is role_of(name)
        assert role_of(f"module._orig_mod.{name}") is role_of(name)
        sharded = name.replace(".0.", ".0._checkpoint_wrapped_module.")
        assert role_of(f"_fsdp_wrapped_module.{sharded}") is role_of(name)


def test_every_pattern_is_used():
    models = with_all_options(), tiny_baseline(), tiny_baseline(quantiser="bits")
    names = [name for model in models for name, _ in model.named_parameters()]
    assert {id(role_of(name)) for name in names} == {id(role) for _, role in ROLES}


@pytest.mark.parametrize("name", ["adapter.weight", "encoder.layers.0.attention.bias", "my_embed_tokens.weight"])
def test_a_parameter_without_a_role_is_an_error(name: str):
    with pytest.raises(KeyError, match=f"'{name}' has no muP role"):
        role_of(name)


# Initialisation

WIDTHS = {
    "d_token": 64,
    "token_heads": 4,
    "token_kv_heads": 2,
    "token_ffn": 128,
    "d_concept": 144,
    "concept_heads": 6,
    "concept_kv_heads": 3,
    "concept_ffn": 288,
    "vocab_size": 500,
}


@pytest.mark.parametrize(("base", "sigma"), [(16, 0.05), (64, None), (None, 0.05), (None, None)])
def test_initial_scale_by_role(base: int | None, sigma: float | None):
    """Standard deviation sigma / sqrt(s) of the fan-in, within five standard errors, for every matrix."""
    torch.manual_seed(0)
    config = tiny_config(**WIDTHS, mup_base_width=base, initializer_range=sigma)
    s = {None: 1.0, "token": 64 / (base or 64), "concept": 144 / (base or 144)}
    drawn = 0
    for name, parameter in DLCMForCausalLM(config).named_parameters():
        role, weight = role_of(name), parameter.detach()
        if role.initialisation == "normal" or name in ("embed_tokens.weight", "lm_head.weight"):
            chosen = sigma or 1 / math.sqrt(64)
            of_tables = {"embed_tokens.weight": 1.0, "lm_head.weight": chosen**2}
            std = of_tables.get(name, chosen / math.sqrt(s[role.fan_in]))
            error = std / math.sqrt(2 * weight.numel())
            assert abs(weight.square().mean().sqrt() - std) < 5 * error, name
            assert abs(weight.mean()) < 5 * std / math.sqrt(weight.numel()), name
            drawn += 1
    assert drawn == 2 + 7 * (1 + 2 + 1) + 1 + 4, "embedding, unembedding, blocks, W_up, cross-attention"


def test_initial_values_of_vectors_and_boundary_projections():
    torch.manual_seed(0)
    model = DLCMForCausalLM(tiny_config(**WIDTHS, d_scan=40, qk_norm=True))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all()), name
    assert torch.equal(model.detector.q_proj.weight, torch.eye(40, 64))
    assert torch.equal(model.detector.k_proj.weight, torch.eye(40, 64))
    assert not model.smoothing.mix.any()
    assert abs(model.cross_attention.null_slot.std() - 1) < 5 / math.sqrt(2 * 144)


def test_initialisation_follows_the_seed():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(DLCMForCausalLM(tiny_config()).lm_head.weight)
    assert torch.equal(models[0], models[1]) and not torch.equal(models[0], models[2])


def test_logits_are_divided_by_the_token_width_multiplier():
    for build in (tiny_dlcm, tiny_baseline):
        ids_BL = torch.stack(random_documents([8], seed=0))
        scaled, plain = build(mup_base_width=4)(ids_BL), build(mup_base_width=None)(ids_BL)
        torch.testing.assert_close(scaled.logits * 4, plain.logits)


# Optimiser groups

RATES = {"lr_token": 1e-3, "lr_concept": 3e-3, "lr_boundary": 1e-4, "lr_other": 5e-3, "eps": 1e-8, "weight_decay": 0.1}


def test_rates_epsilon_and_decay_by_role():
    """s_token = 2, s_concept = 3: rate and epsilon fall as 1 / s, and lr * weight_decay does not depend on s."""
    model = tiny_dlcm()
    groups = {group["name"]: group for group in parameter_groups(model, model.config, **RATES)}
    assert model.config.token_width_multiplier == 2 and model.config.concept_width_multiplier == 3
    found = {name: (group["lr"], group["eps"], group["weight_decay"]) for name, group in groups.items()}
    expected = {
        "embedding": (5e-3 * math.sqrt(8), 1e-8, 0.0),  # lr_other / sigma_base
        "unembedding": (5e-3, 1e-8, 0.1),
        "token_matrix": (1e-3 / 2, 1e-8 / 2, 0.1 * 2),
        "concept_matrix": (3e-3 / 3, 1e-8 / 3, 0.1 * 3),
        "boundary_matrix": (1e-4 / 2, 1e-8 / 2, 0.0),
        "gain": (5e-3, 1e-8, 0.0),
        "smoothing": (5e-3, 1e-8, 0.0),
        "null_slot": (5e-3, 1e-8, 0.0),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-12), name


def test_the_standard_parametrisation_scales_nothing():
    model = tiny_dlcm(mup_base_width=None)
    for group in parameter_groups(model, model.config, **RATES, lr_embedding=0.1):
        assert group["lr"] in ((0.1,) if group["name"] == "embedding" else (1e-3, 3e-3, 1e-4, 5e-3))
        assert group["eps"] == 1e-8
        assert group["weight_decay"] in (0.0, 0.1)


@pytest.mark.parametrize("build", [tiny_dlcm, tiny_baseline])
def test_groups_hold_every_parameter_once(build):
    model = build()
    groups = parameter_groups(model, model.config, **RATES)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    torch.optim.AdamW(groups)


def test_groups_of_a_wrapped_model_and_of_named_parameters_are_the_same():
    model = tiny_dlcm()

    def described(parameters) -> list[dict]:
        groups = parameter_groups(parameters, model.config, **RATES)
        return [group | {"params": [id(parameter) for parameter in group["params"]]} for group in groups]

    assert described(torch.compile(model)) == described(model) == described(model.named_parameters())


def test_rates_are_needed_where_there_is_something_to_train():
    with pytest.raises(ValueError, match=r"'backbone.* needs lr_concept"):
        parameter_groups(tiny_dlcm(), tiny_config(), **RATES | {"lr_concept": None})
    with pytest.raises(ValueError, match=r"'detector.* needs lr_boundary"):
        parameter_groups(tiny_dlcm(), tiny_config(), **RATES | {"lr_boundary": None})
    ruled = tiny_dlcm(segmenter="rule")
    parameter_groups(ruled, ruled.config, **RATES | {"lr_boundary": None})
    parameter_groups(tiny_baseline(), tiny_baseline_config(), **RATES | {"lr_concept": None, "lr_boundary": None})
