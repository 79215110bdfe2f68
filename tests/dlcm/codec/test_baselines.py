"""Rounding, rotation and shuffling against what they are by definition."""

import pytest
import torch

from dlcm.codec import CodecError, gptq, relative_mse, round_to_nearest, shuffled, unshuffled
from dlcm.codec.rotation import rotate, unrotate
from tests.dlcm.codec.test_tensor import gaussian


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_rounding_takes_the_nearest_of_evenly_spaced_levels(bits: int) -> None:
    x = gaussian(3, 256)
    rounded = round_to_nearest(x, bits)
    assert rounded.bits == bits + (16 + bits) / 128
    for group, levels in zip(x.reshape(-1, 128), rounded.tensor.reshape(-1, 128), strict=True):
        assert len(levels.unique()) <= 2**bits
        step = (group.max() - group.min()) / (2**bits - 1)
        assert (group - levels).abs().max() < 1.01 * step  # the zero point is rounded too, so ends may be cut


def test_searching_for_a_clip_never_errs_more_and_helps_at_two_bits() -> None:
    x = gaussian(64, 512)
    plain, clipped = (round_to_nearest(x, 2, clip_search=search) for search in (False, True))
    assert plain.bits == clipped.bits
    assert relative_mse(x, clipped.tensor) < 0.6 * relative_mse(x, plain.tensor)


def test_a_group_may_be_cut_short() -> None:
    x = gaussian(10, 200)
    rounded = round_to_nearest(x, 4)
    assert rounded.tensor.shape == x.shape and rounded.bits == 4 + 20 * 20 / 2000
    assert torch.equal(rounded.tensor[:, :128], round_to_nearest(x[:, :128], 4).tensor)
    assert torch.equal(round_to_nearest(torch.zeros(4, 128), 4).tensor, torch.zeros(4, 128))
    with pytest.raises(CodecError, match="finite"):
        round_to_nearest(torch.tensor([torch.nan]), 4)


def test_shuffling_stays_within_rows() -> None:
    x = gaussian(8, 300)
    mixed = shuffled(x)
    assert torch.equal(mixed.sort(1).values, x.sort(1).values) and not torch.equal(mixed, x)
    assert torch.equal(unshuffled(mixed), x)
    assert torch.equal(mixed, shuffled(x)) and not torch.equal(mixed, shuffled(x, seed=1))


@pytest.mark.parametrize("shape", ((64, 128), (96, 40), (7, 12), (1, 16), (5, 3)), ids=str)
def test_rotation_keeps_lengths_and_is_undone(shape: tuple[int, int]) -> None:
    x = gaussian(*shape).numpy()
    y = rotate(x)
    assert y.shape == x.shape and (y**2).sum() == pytest.approx((x**2).sum(), rel=1e-5)
    assert unrotate(y) == pytest.approx(x, abs=1e-6)


def test_rotation_spreads_one_value_over_all() -> None:
    x = torch.zeros(32, 64).numpy()
    x[3, 5] = 1.0
    assert abs(rotate(x)) == pytest.approx((32 * 64) ** -0.5)


def correlated_inputs(inputs: int) -> torch.Tensor:
    """(T, I): a few directions, and noise."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(inputs // 8, inputs, generator=draw)
    return torch.randn(2000, inputs // 8, generator=draw) @ directions + torch.randn(2000, inputs, generator=draw)


def output_error(x_TI: torch.Tensor, weight_OI: torch.Tensor, rounded_OI: torch.Tensor) -> float:
    return relative_mse(x_TI @ weight_OI.T, x_TI @ rounded_OI.T)


@pytest.mark.parametrize("clip_search", (False, True))
@pytest.mark.parametrize("bits", (2, 3, 4))
def test_gptq_changes_outputs_less_than_rounding_at_the_same_bits(bits: int, clip_search: bool) -> None:
    weight_OI, x_TI = gaussian(96, 320), correlated_inputs(320)
    seen_TI, unseen_TI = x_TI[:1500], x_TI[1500:]
    by_gptq = gptq(weight_OI, seen_TI.T @ seen_TI, bits, clip_search=clip_search)
    nearest = round_to_nearest(weight_OI, bits, clip_search=clip_search)
    assert by_gptq.bits == nearest.bits
    for inputs_TI in (seen_TI, unseen_TI):
        errors = [output_error(inputs_TI, weight_OI, rounded.tensor) for rounded in (by_gptq, nearest)]
        assert errors[0] < 0.5 * errors[1]
    for row in by_gptq.tensor[:, :128]:
        assert len(row.unique()) <= 2**bits


@pytest.mark.parametrize("inputs", (128, 200))
@pytest.mark.parametrize("clip_search", (False, True))
def test_gptq_is_rounding_where_inputs_are_not_correlated(inputs: int, clip_search: bool) -> None:
    weight_OI = gaussian(40, inputs)
    hessian_II = torch.diag(torch.rand(inputs, generator=torch.Generator().manual_seed(0)))
    nearest = round_to_nearest(weight_OI, 3, clip_search=clip_search)
    assert torch.equal(gptq(weight_OI, hessian_II, 3, clip_search=clip_search).tensor, nearest.tensor)


def test_gptq_takes_singular_hessians_and_refuses_others() -> None:
    weight_OI, x_TI = gaussian(16, 64), correlated_inputs(64)[:10]
    assert torch.isfinite(gptq(weight_OI, x_TI.T @ x_TI, 4).tensor).all()
    assert torch.isfinite(gptq(weight_OI, torch.zeros(64, 64), 4).tensor).all()
    with pytest.raises(CodecError, match=r"\(32, 32\) is not of a layer of \(16, 64\)"):
        gptq(weight_OI, torch.eye(32), 4)
    with pytest.raises(CodecError, match="finite weights and inputs"):
        gptq(weight_OI, torch.full((64, 64), torch.nan), 4)
