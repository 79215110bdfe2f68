"""The rounding layer: levels, gradients by the formulas, initialisation, and whole models made of it."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from dlcm.compilation import compile_blocks_
from dlcm.flops import parameter_counts
from dlcm.mup import parameter_groups
from dlcm.selfcompress.quantiser import (
    MAX_BITS,
    QuantisedLinear,
    TernaryLinear,
    fake_quantise,
    plain,
    quantised_linears,
    scaled_codes,
    ternary_codes,
)
from tests.conftest import arrange, random_documents, tiny_baseline, tiny_baseline_config, tiny_config, tiny_dlcm

BUILDERS = [tiny_dlcm, tiny_baseline]
LEVELS = {0: [0], 1: [-1, 0], 2: [-2, 1], 3: [-4, 3], 8: [-128, 127]}


def one_group(values: torch.Tensor, depth: float, exponent: float) -> tuple[torch.Tensor, ...]:
    """A row as one group, all with gradients, in fp64."""
    x = values.double()[None].requires_grad_()
    b, e = (torch.tensor([[value]], dtype=torch.float64, requires_grad=True) for value in (depth, exponent))
    return x, b, e


def fitted(builder: Any, bits: int, seed: int = 0, **overrides: Any) -> nn.Module:
    model = builder(seed, quantiser="bits", **overrides)
    for layer in quantised_linears(model).values():
        layer.fit_(bits)
    return model


# The function


@pytest.mark.parametrize(("depth", "whole"), [(0, 0), (0.05, 1), (1, 1), (1.2, 2), (2, 2), (2.33, 3), (8, 8), (9.5, 8)])
def test_levels_are_those_of_the_next_whole_depth(depth: float, whole: int):
    x, b, e = one_group(torch.linspace(-500, 500, 4001), depth, 0.0)
    codes, _ = scaled_codes(x, b, e)
    assert sorted({int(code) for code in codes.flatten().tolist()})[:: max(1, 2**whole - 1)] == LEVELS[whole]
    assert len(codes.unique()) == 2**whole


def test_ties_go_to_the_even_level():
    x, b, e = one_group(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), 4, 0.0)
    assert fake_quantise(x, b, e).tolist() == [[-2, 0, 0, 2, 2]]


@pytest.mark.parametrize("depth", [-1.0, 0.0])
def test_at_no_bits_all_weights_are_zero_and_only_a_depth_below_zero_has_no_gradient(depth: float):
    x, b, e = one_group(torch.randn(64, generator=torch.Generator().manual_seed(0)).abs(), depth, -3.0)
    q = fake_quantise(x, b, e)
    assert not q.any()
    q.sum().backward()
    assert not x.grad.any() and bool(b.grad) == (depth == 0)


@pytest.mark.parametrize("depth", [1.0, 1.7, 2.0, 3.0, 5.4])
def test_gradients_are_those_of_the_formulas(depth: float):
    """Inside: 1, 0, ln2 (q - x). Above and below: 0, +- ln2 s h, ln2 q."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(200, generator=generator) * 2.0 ** (math.ceil(depth) - 2)
    x, b, e = one_group(values, depth, -1.37)
    grad = torch.randn(1, 200, generator=generator, dtype=torch.float64)
    q = fake_quantise(x, b, e)
    (q * grad).sum().backward()
    scale, half = 2**-1.37, 2.0 ** (math.ceil(depth) - 1)
    u = (x / scale).detach()
    above, below = u > half - 1, u < -half
    inside = ~(above | below)
    assert above.any() and below.any()
    assert inside.any() or depth == 1  # then the only levels are the bounds, -1 and 0, and what is between
    to_depth = math.log(2) * scale * half * (above.double() - below.double())
    to_exponent = math.log(2) * torch.where(inside, (q - x).detach(), q.detach())
    torch.testing.assert_close(x.grad, grad * inside, rtol=1e-12, atol=0)
    torch.testing.assert_close(b.grad.sum(), (grad * to_depth).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(e.grad.sum(), (grad * to_exponent).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (2, 4), (4, 2), (4, 8)])
def test_tiles_are_groups_of_their_own(rows: int, columns: int):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 16, generator=generator)
    depth = torch.randint(0, 5, (8 // rows, 16 // columns), generator=generator).float()
    exponent = torch.randn(depth.shape, generator=generator) - 2
    whole = fake_quantise(weight, depth, exponent)
    for i in range(8 // rows):
        for j in range(16 // columns):
            tile = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            alone = fake_quantise(weight[tile], depth[i : i + 1, j : j + 1], exponent[i : i + 1, j : j + 1])
            assert torch.equal(whole[tile], alone)


def test_the_product_of_codes_and_scales_is_the_weight_to_the_last_bit():
    layer = QuantisedLinear(nn.Linear(64, 32, bias=False), 4, 16)
    layer.fit_(3)
    codes, scale = layer.codes()
    assert torch.equal(codes, codes.round())
    assert torch.equal((codes * scale[:, None, :, None]).view(32, 64), layer.used_weight())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_exponent_at_the_start_clips_nothing_but_the_largest(bits: int):
    layer = QuantisedLinear(nn.Linear(256, 16, bias=False), 1, None)
    layer.fit_(bits)
    error = (layer.used_weight() - layer.weight).abs()
    step = layer.exponent.exp2()
    assert bool((error <= step + 1e-6).all()) and bool(((error > 0.5001 * step).sum(1) <= 2 ** (8 - bits) * 4).all())
    assert layer.depth.ceil().unique().tolist() == [bits]
    assert layer.depth.mean().item() == pytest.approx(bits - 0.5, abs=0.05)  # spread evenly


def test_ternary_weights_are_rounded_by_the_mean_and_pass_gradients_through():
    layer = TernaryLinear(nn.Linear(64, 32, bias=False))
    codes, scale = ternary_codes(layer.weight)
    assert scale == layer.weight.abs().mean() and codes.unique().tolist() == [-1, 0, 1]
    expected = (layer.weight / scale).round().clamp(-1, 1) * scale
    assert torch.equal(layer.used_weight(), expected)
    x = torch.randn(5, 64)
    layer(x).square().sum().backward()
    plain = nn.Linear(64, 32, bias=False)
    plain.weight.data = expected.detach()
    plain(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)


# Models


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("quantiser", ["bits", "ternary"])
def test_blocks_and_cross_attention_round_and_nothing_else(builder: Any, quantiser: str):
    model = builder(quantiser=quantiser)
    names = {name.removesuffix(".weight") for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
    left = {name for name in names if name.startswith(("pooling", "detector"))}
    assert set(quantised_linears(model)) == names - left
    assert sum(parameter_counts(model.config).values()) == model.num_parameters()


@pytest.mark.parametrize("builder", BUILDERS)
def test_weights_begin_as_those_of_the_plain_model(builder: Any):
    plain, rounding = builder().state_dict(), builder(quantiser="bits").state_dict()
    assert {name for name in rounding if name not in plain} == {
        name for name in rounding if name.endswith(("depth", "exponent"))
    }


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_plain_model_of_the_rounded_weights_computes_the_same(builder: Any):
    model = fitted(builder, 3)
    batch = arrange(random_documents([9, 17], 0), "packed")
    expected = model(**batch.inputs).logits
    same = plain(model)
    assert not quantised_linears(same) and same.config.quantiser == "none"
    assert torch.equal(same(**batch.inputs).logits, expected)
    assert sum(parameter_counts(same.config).values()) == same.num_parameters()
    assert same.state_dict().keys() == builder().state_dict().keys()


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_parameter_learns(builder: Any):
    model = fitted(builder, 2).train()
    batch = arrange(random_documents([9, 17, 30], 0), "packed")
    model(**batch.inputs, labels=batch.labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    learning = [layer for layer in quantised_linears(model).values() if layer.depth.grad.any()]
    assert len(learning) == len(quantised_linears(model))
    assert all(layer.exponent.grad.any() for layer in learning)


def test_compiled_blocks_compute_the_same():
    model = fitted(tiny_baseline, 3)
    batch = arrange(random_documents([9, 17], 0), "packed")
    expected = model(**batch.inputs).logits
    compiled = copy.deepcopy(model)
    compile_blocks_(compiled, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch.inputs).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"quantiser_rows": 3}, "does not divide d_token"),
        ({"quantiser_columns": 5}, "does not divide d_token"),
        ({"quantiser_rows": 0}, "at least 1"),
        ({"quantiser": "binary"}, "quantiser"),
    ],
)
def test_groups_that_do_not_fit_are_refused(wrong: dict[str, Any], message: str):
    for config in (tiny_config, tiny_baseline_config):
        with pytest.raises(ValueError, match=message):
            config(**{"quantiser": "bits"} | wrong)


def test_depths_are_capped():
    x, b, e = one_group(torch.linspace(-500, 500, 4001), MAX_BITS + 3.0, 0.0)
    assert len(fake_quantise(x, b, e).unique()) == 2**MAX_BITS


def test_llama_takes_rounded_weights_once_they_are_plain():
    model = fitted(tiny_baseline, 4)
    with pytest.raises(ValueError, match="plain"):
        model.to_llama()
    batch = arrange(random_documents([9, 9], 0), "rows")
    expected = model(**batch.inputs).logits
    model = plain(model)
    torch.testing.assert_close(model.to_llama()(**batch.inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_roles_exist_for_optimiser_groups():
    rates = dict(lr_token=1e-3, lr_concept=1e-3, lr_boundary=1e-3, lr_other=1e-3, eps=1e-8, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(tiny_dlcm(quantiser="bits"), tiny_config(), **rates)}
    assert groups["bit_depth"]["weight_decay"] == groups["exponent"]["weight_decay"] == 0
