"""The coordinate check, in small: flat under muP, and not where the parametrisation is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dlcm.mup
import eval.coord_check as coord_check
from dlcm import LlamaBaselineForCausalLM
from dlcm.mup import ROLES, parameter_groups
from eval.bench import Row
from eval.coord_check import (
    AXES,
    STAGES,
    batches,
    gain,
    main,
    measure,
    model_of,
    must_show,
    rms,
    slope,
    slopes,
    steepest,
)
from tests.conftest import tiny_baseline_config

WIDTHS = (32, 64, 128, 256)
STEPS = (1, 4)
FLAT = 0.2  # over a factor of 8 in width, of two seeds; theory's wrong slopes are 0.5 and more


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base as narrow as the models, so that the rate is what they are used to."""
    monkeypatch.setattr(coord_check, "BASE", 64)
    monkeypatch.setattr(coord_check, "RATE", 3e-3)
    monkeypatch.setitem(coord_check.PARAMETRISATIONS, "muP", 64)


def measured(axis: str, parametrisation: str) -> dict[str, Row]:
    """The exponents after the last step, of one seed: what is wrong is wrong by far."""
    found = slopes(measure(WIDTHS, STEPS, 1, (axis,), (parametrisation,)))
    return {row["stage"]: row for row in found if row["step"] == STEPS[-1]}


@pytest.mark.parametrize("axis", AXES)
def test_flat_under_mup(axis: str):
    found = slopes(measure(WIDTHS, STEPS, 2, (axis,), ("muP",)))
    assert len(found) == len(STAGES) * len(STEPS)
    assert steepest(found, "muP", axis) < FLAT, found
    if axis != "both":  # where what changes in the very first step is steeper
        last = [row for row in found if row["step"] == STEPS[-1]]
        assert steepest(last, "muP", axis, "change") < FLAT, last


@pytest.mark.parametrize(
    ("axis", "growing"),
    [
        ("d_token", [stage for stage in STAGES if not stage.startswith("cross-attention")]),
        ("d_concept", ["backbone", *(f"cross-attention {part}" for part in ("keys", "values", "output"))]),
    ],
)
def test_steep_in_the_standard_parametrisation(axis: str, growing: list[str]):
    """Negative control: where theory says that activations explode with width, they do."""
    found = measured(axis, "standard")
    for stage in growing:
        assert found[stage]["scale"] > 1.5 * FLAT, (stage, found[stage])


@pytest.mark.parametrize(("axis", "stage"), [("d_token", "up-projection"), ("d_concept", "cross-attention values")])
def test_steep_where_mixed_width_matrices_follow_their_fan_out(axis: str, stage: str, monkeypatch: pytest.MonkeyPatch):
    """Negative control for the one choice that is easy to get wrong."""
    swapped = {
        "pooling.up_proj.weight": replace(dlcm.mup.CONCEPT_MATRIX, name="fan_out_of_pooling"),
        "*cross_attention*.[kv]_proj.weight": replace(dlcm.mup.TOKEN_MATRIX, name="fan_out_of_slots"),
    }
    monkeypatch.setattr(dlcm.mup, "ROLES", tuple((pattern, swapped.get(pattern, role)) for pattern, role in ROLES))
    found = measured(axis, "muP")
    assert found[stage]["scale"] > 1.5 * FLAT, found


def test_the_baseline_is_flat_too():
    """Its blocks are the encoder's: one stage is enough."""
    looked_at, *training = batches(1 + STEPS[-1])
    found = []
    for width in WIDTHS:
        torch.manual_seed(0)
        heads = {"token_heads": width // 16, "token_kv_heads": width // 16, "token_ffn": 2 * width}
        model = LlamaBaselineForCausalLM(
            tiny_baseline_config(vocab_size=256, d_token=width, mup_base_width=64, initializer_range=0.1, **heads)
        )
        rates = {"lr_token": 3e-3, "lr_concept": None, "lr_boundary": None, "lr_other": 3e-3}
        optimizer = torch.optim.AdamW(parameter_groups(model, model.config, **rates, eps=1e-12, weight_decay=0.0))
        states: list[Tensor] = []
        model.decoder.register_forward_hook(lambda module, inputs, output, states=states: states.append(output))
        model(looked_at)
        for ids_BL in training:
            optimizer.zero_grad()
            model(ids_BL, labels=ids_BL).loss.backward()
            optimizer.step()
        model(looked_at)
        found.append((rms(states[-1].detach()), rms((states[-1] - states[0]).detach())))
    assert all(abs(slope(WIDTHS, [size[i] for size in found])) < FLAT for i in (0, 1)), found


def test_models_differ_in_width_alone():
    narrow, wide = model_of(64, 128, 64), model_of(128, 512, 64)
    assert [name for name, _ in narrow.named_parameters()] == [name for name, _ in wide.named_parameters()]
    assert not narrow.lm_head.weight.any()
    first, second = batches(2)
    assert first.shape == second.shape and not first.equal(second) and first.max() < 256


def test_gain_is_of_directions_that_a_matrix_narrows_to():
    narrows_OI = torch.linalg.qr(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))[0].T
    assert gain(narrows_OI, narrows_OI[:3]) == pytest.approx(2.0)  # sqrt(fan-in / fan-out)
    assert gain(narrows_OI, torch.eye(64)) == pytest.approx(1.0)  # of what points anywhere


def test_a_slope_is_the_exponent():
    assert slope([1, 2, 4, 8], [3.0, 3 * 2**0.5, 6.0, 6 * 2**0.5]) == pytest.approx(0.5)


def test_bars_need_all_axes():
    row = {"parametrisation": "muP", "axis": "d_token", "step": 1, "stage": "encoder", "scale": -0.05, "change": 0.0}
    bars = must_show([row])
    held = [name for name, bar in bars.items() if bar.holds]
    assert held == ["muP, token width: steepest of all stages"] and len(bars) == 6
    assert not any(bar.holds for bar in must_show([row | {"scale": -0.2}]).values())


def test_command_writes_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--widths", "32", "64", "--steps", "1", "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert "muP, both widths" in capsys.readouterr().out
    written = json.loads((tmp_path / "coord_check.json").read_text())
    assert len(written["must_show"]) == 6 and len(written["slopes"]) == 2 * 3 * len(STAGES)
    assert "### Concept width" in (tmp_path / "coord_check.md").read_text()
    assert (tmp_path / "coord_check.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widths", "64"], "at least two different multiples of 32"),
        (["--widths", "64", "100"], "at least two different multiples of 32"),
        (["--steps", "0"], "must be at least 1"),
        (["--seeds", "0"], "must be at least 1"),
    ],
)
def test_impossible_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
