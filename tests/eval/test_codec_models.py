"""Trials of whole models against the methods they consist of, and a past that is exact against one forward pass."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from dlcm.codec import CodecError
from eval.calibration import Model
from eval.codec_methods import CLIPPED, GPTQ, ROUNDING, code
from eval.codec_models import STAGES, Trial, _nats_with_past, compress_model_, widths_of
from tests.conftest import VOCABULARY, tiny_baseline, tiny_dlcm
from tests.dlcm.codec.test_tensor import gaussian

WIDE = {"d_token": 64, "token_ffn": 80}
WINDOWS = [torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def matrices(model: Model) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def test_every_parameter_of_a_dlcm_belongs_to_one_stage_but_norms() -> None:
    for name in matrices(tiny_dlcm()):
        found = [stage for stage, begins in STAGES.items() if name.startswith(begins)]
        assert len(found) == 1 or (not found and "norm" in name)


@pytest.mark.parametrize("method", (ROUNDING, CLIPPED, GPTQ, "entropy", "x264, rotated", "entropy, shuffled"))
def test_matrices_are_replaced_by_what_comes_back_and_nothing_else_is(method: str) -> None:
    model = tiny_dlcm(**WIDE)
    before = matrices(model)
    row = compress_model_(model, Trial(method, 3.0, stage="encoder"), WINDOWS)
    changed = {name for name, x in matrices(model).items() if not torch.equal(x, before[name])}
    assert changed == {
        name for name, x in before.items() if name.startswith("encoder.") and x.ndim == 2 and x.numel() >= 4096
    }
    assert row["values"] == sum(before[name].numel() for name in changed)
    assert (3 < row["bits"] < 3.4) if method in (ROUNDING, CLIPPED, GPTQ) else (2.9 < row["bits"] <= 3)
    assert 0.01 < row["rel_mse"] < 0.2
    if method not in (GPTQ,):
        name = sorted(changed)[0]
        expected = code(method, before[name].float(), 3.0).tensor.double()
        torch.testing.assert_close(matrices(model)[name], expected)


def test_bits_follow_costs() -> None:
    shapes = {"a": 1.4 * gaussian(64, 64), "b": gaussian(64, 64, seed=1)}
    assert widths_of(Trial("entropy", 3.0), shapes, None) == {"a": 3.0, "b": 3.0}
    by_error = widths_of(Trial("entropy", 3.0, "mse"), shapes, None)
    assert by_error["a"] - by_error["b"] == pytest.approx(0.485, abs=0.05)
    by_harm = widths_of(Trial("entropy", 3.0, "hessian"), shapes, {"a": 1.0, "b": 1.96})
    assert by_harm["a"] == pytest.approx(by_harm["b"], abs=0.05)


@pytest.mark.parametrize("make", (tiny_dlcm, tiny_baseline))
def test_a_past_that_is_exact_changes_nothing(make: Callable[..., Model]) -> None:
    model = make(max_position_embeddings=200)
    ids_1T = torch.randint(VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(0))
    logits_TV = model(input_ids=ids_1T).logits[0, :-1]
    expected = nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum").item()
    assert _nats_with_past(model, ids_1T, None) == pytest.approx(expected)


def test_methods_take_the_bits_they_are_given() -> None:
    x = gaussian(96, 128)
    for method in ("x264", "x264, shuffled", "entropy", "entropy, rotated"):
        assert 2.9 < code(method, x, 3.0).bits <= 3.0
    assert code(GPTQ, x, 3.0).tensor.equal(code(CLIPPED, x, 3.0).tensor)  # an embedding has no inputs to look at
    assert not math.isclose(code(ROUNDING, x, 3.0).bits, 3.0)
    with pytest.raises(CodecError, match="too few"):
        code("entropy", x, 0.01)
