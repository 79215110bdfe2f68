"""Rounding, rotation and shuffling against what they are by definition."""

import pytest
import torch

from dlcm.codec import CodecError, relative_mse, round_to_nearest, shuffled
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
