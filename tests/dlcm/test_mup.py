"""Decoupled muP: every parameter's role, what it means for initialisation and optimiser, and whether it works.

The coordinate check trains small models for a few steps while token width and concept width grow one at a time:
under muP the size of activations, and of their change, must not depend on either.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dlcm.mup
from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.boundary import Boundaries, LearnedDetector
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
    ],
)
def test_roles_by_name(name: str, role: str):
    assert role_of(name).name == role
    assert name in dict(tiny_dlcm(qk_norm=True).named_parameters())


@pytest.mark.parametrize("build", [tiny_dlcm, tiny_baseline])
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


@pytest.mark.parametrize("build", [tiny_dlcm, tiny_baseline])
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
    names = [name for model in (tiny_dlcm(), tiny_baseline()) for name, _ in model.named_parameters()]
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


@pytest.mark.parametrize("base", [16, 64, None])
def test_initial_scale_by_role(base: int | None):
    """Standard deviation sigma / sqrt(s) of the fan-in, within five standard errors, for every matrix."""
    torch.manual_seed(0)
    config = tiny_config(**WIDTHS, mup_base_width=base, initializer_range=0.05)
    s = {None: 1.0, "token": 64 / (base or 64), "concept": 144 / (base or 144)}
    drawn = 0
    for name, parameter in DLCMForCausalLM(config).named_parameters():
        role, weight = role_of(name), parameter.detach()
        if role.initialisation == "normal":
            std = 0.05 / math.sqrt(s[role.fan_in])
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
        "embedding": (5e-3, 1e-8, 0.0),
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
    for group in parameter_groups(model, model.config, **RATES):
        assert group["lr"] in (1e-3, 3e-3, 1e-4, 5e-3) and group["eps"] == 1e-8
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


# The coordinate check

GROWING = [32, 64, 128, 256]  # the other width stays at the base of 64; heads have 16 dimensions throughout
SEEDS = 3
STEPS = 4
FLAT = 0.15  # over a factor of 8 in width a slope of 0.15 is a factor of 1.37; theory's wrong slopes are 0.5 and more
STAGES = ["encoder", "detector.q_proj", "pooling", "backbone"]
STAGES += [f"cross_attention.{projection}_proj" for projection in "qkvo"] + ["decoder", "lm_head"]


class EveryThird(LearnedDetector):
    """Learned probabilities, but boundaries that do not depend on width: the same concepts in every model."""

    def forward(self, h_TE, tokens, generator):
        decided = super().forward(h_TE, tokens, generator)
        return Boundaries(decided.probability_T, tokens.position_T % 3 == 0)


def wide_dlcm(d_token: int, d_concept: int, base: int | None) -> DLCMForCausalLM:
    config = tiny_config(
        vocab_size=64,
        d_token=d_token,
        token_heads=d_token // 16,
        token_kv_heads=d_token // 16,
        token_ffn=2 * d_token,
        d_concept=d_concept,
        concept_heads=d_concept // 16,
        concept_kv_heads=d_concept // 16,
        concept_ffn=2 * d_concept,
        backbone_layers=1,
        mup_base_width=base,
        initializer_range=0.1,
        aux_loss_weight=1.0,
    )
    model = DLCMForCausalLM(config)
    model.detector.__class__ = EveryThird
    # As coordinate checks do: random logits of the first step shrink as 1 / sqrt(width) and would hide the learnt ones.
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def activations(model: DLCMForCausalLM, ids_BL: Tensor) -> dict[str, Tensor]:
    """What every stage gives out, logits with their multiplier."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(stage).register_forward_hook(
            lambda module, inputs, output, stage=stage: seen.update({stage: output})
        )
        for stage in STAGES
    ]
    with torch.no_grad():
        output = model(ids_BL)
    for hook in hooks:
        hook.remove()
    return seen | {"lm_head": output.logits}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def sizes_after_training(d_token: int, d_concept: int, base: int | None) -> dict[str, tuple[float, float]]:
    """Size of each stage's activations after a few steps of AdamW, and of their change; mean over seeds."""
    ids_BL = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))
    sums = dict.fromkeys(STAGES, (0.0, 0.0))
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model = wide_dlcm(d_token, d_concept, base)
        rate = 3e-3
        groups = parameter_groups(
            model,
            model.config,
            lr_token=rate,
            lr_concept=rate,
            lr_boundary=rate,
            lr_other=rate,
            eps=1e-12,
            weight_decay=0.0,
        )
        optimizer = torch.optim.AdamW(groups)
        before = activations(model, ids_BL)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(ids_BL, labels=ids_BL).loss.backward()
            optimizer.step()
        after = activations(model, ids_BL)
        for stage, (size, change) in sums.items():
            sums[stage] = (size + rms(after[stage]), change + rms(after[stage] - before[stage]))
    return {stage: (size / SEEDS, change / SEEDS) for stage, (size, change) in sums.items()}


def slope(values: list[float]) -> float:
    """Exponent of the power of width that fits best."""
    width = torch.tensor(GROWING).double().log()
    width -= width.mean()
    return float(width @ torch.tensor(values).double().log() / (width @ width))


def slopes(axis: str, base: int | None) -> dict[str, tuple[float, float]]:
    """For each stage, how the size of its activations and of their change grow with one of the widths."""
    fixed = {"d_token": 64, "d_concept": 64}
    runs = [sizes_after_training(**fixed | {axis: width}, base=base) for width in GROWING]
    return {stage: tuple(slope([run[stage][i] for run in runs]) for i in (0, 1)) for stage in STAGES}


def largest(found: dict[str, tuple[float, float]]) -> float:
    return max(abs(value) for pair in found.values() for value in pair)


@pytest.mark.parametrize("axis", ["d_token", "d_concept"])
def test_coordinate_check(axis: str):
    found = slopes(axis, base=64)
    assert largest(found) < FLAT, found


@pytest.mark.parametrize(
    ("axis", "growing"),
    [
        ("d_token", ["encoder", "detector.q_proj", "pooling", "backbone", "decoder", "lm_head"]),
        ("d_concept", ["backbone", *(f"cross_attention.{projection}_proj" for projection in "kvo")]),
    ],
)
def test_the_standard_parametrisation_fails_the_check(axis: str, growing: list[str]):
    """Negative control: where theory says that activations explode with width, they do."""
    found = slopes(axis, base=None)
    for stage in growing:
        assert min(found[stage]) > 2 * FLAT, (stage, found[stage])


@pytest.mark.parametrize(("axis", "stage"), [("d_token", "pooling"), ("d_concept", "cross_attention.v_proj")])
def test_mixed_width_matrices_that_follow_their_fan_out_fail_the_check(
    axis: str, stage: str, monkeypatch: pytest.MonkeyPatch
):
    """Negative control for the one choice that is easy to get wrong."""
    swapped = {
        "pooling.up_proj.weight": replace(dlcm.mup.CONCEPT_MATRIX, name="fan_out_of_pooling"),
        "cross_attention.[kv]_proj.weight": replace(dlcm.mup.TOKEN_MATRIX, name="fan_out_of_slots"),
    }
    monkeypatch.setattr(dlcm.mup, "ROLES", tuple((pattern, swapped.get(pattern, role)) for pattern, role in ROLES))
    found = slopes(axis, base=64)
    assert min(found[stage]) > 2 * FLAT, found


def test_the_baseline_passes_too():
    """Its blocks are the encoder's: one stage is enough."""
    sizes = []
    for width in GROWING:
        torch.manual_seed(0)
        model = LlamaBaselineForCausalLM(
            tiny_baseline_config(
                d_token=width,
                token_heads=width // 16,
                token_kv_heads=width // 16,
                token_ffn=2 * width,
                mup_base_width=64,
                initializer_range=0.1,
            )
        )
        groups = parameter_groups(model, model.config, **RATES | {"eps": 1e-12, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups)
        ids_BL = torch.stack(random_documents([32] * 8, seed=0))
        states: list[Tensor] = []
        model.decoder.register_forward_hook(lambda module, inputs, output, states=states: states.append(output))
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(ids_BL, labels=ids_BL).loss.backward()
            optimizer.step()
        model(ids_BL)
        sizes.append((rms(states[-1].detach()), rms((states[-1] - states[0]).detach())))
    assert all(abs(slope([size[i] for size in sizes])) < FLAT for i in (0, 1)), sizes
