"""Allocations against the law they minimise, and on real curves."""

import math
import random

import pytest
import torch

from dlcm.codec import CodecError, allocate, compress, compress_state, decompress, deviation
from dlcm.codec.allocation import BELOW, LEAST, MOST, predicted_cost
from tests.dlcm.codec.test_tensor import gaussian


def mean(sizes: list[int], bits: list[float]) -> float:
    return sum(size * width for size, width in zip(sizes, bits, strict=True)) / sum(sizes)


def test_tensors_alike_get_the_mean_and_a_fourfold_cost_another_bit() -> None:
    assert allocate([10, 30], [1.0, 1.0], [2.0, 2.0], 3.25) == pytest.approx([3.25, 3.25])
    assert allocate([10, 10], [1.0, 1.0], [4.0, 1.0], 3.0) == pytest.approx([3.5, 2.5])
    assert allocate([10, 10], [2.0, 1.0], [1.0, 1.0], 3.0) == pytest.approx([3.5, 2.5])
    assert allocate([10, 30], [4.0, 1.0], [1.0, 1.0], 3.0) == pytest.approx([4.5, 2.5])
    assert allocate([10, 10], [8.0, 1.0], [1.0, 1.0], 3.0) == pytest.approx([3.5, 2.5])  # half a bit below is the most


def test_no_exchange_of_bits_between_two_tensors_costs_less() -> None:
    draw = random.Random(0)
    for _ in range(20):
        sizes = [draw.randrange(100, 10_000) for _ in range(6)]
        deviations, costs = ([math.exp(draw.gauss(0, 2)) for _ in sizes] for _ in range(2))
        bits = allocate(sizes, deviations, costs, 3.0)
        assert mean(sizes, bits) == pytest.approx(3.0) and all(3 - BELOW <= width <= MOST for width in bits)
        least = predicted_cost(sizes, deviations, costs, bits)
        for giver in range(6):
            for taker in range(6):
                moved = list(bits)
                moved[giver] -= 0.01
                moved[taker] += 0.01 * sizes[giver] / sizes[taker]
                if moved[giver] >= 3 - BELOW and moved[taker] <= MOST:
                    assert predicted_cost(sizes, deviations, costs, moved) >= least * (1 - 1e-9)


def test_what_costs_nothing_gets_the_least_and_what_cannot_be_judged_the_most() -> None:
    bits = allocate([10, 10, 10, 70], [1.0, 0.0, 1.0, 1.0], [0.0, 1.0, math.inf, 1.0], 3.0)
    assert bits[:3] == [3 - BELOW, 3 - BELOW, MOST] and mean([10, 10, 10, 70], bits) == pytest.approx(3.0)
    assert allocate([10, 10], [1.0, 1.0], [9.0, 1.0], LEAST) == pytest.approx([LEAST, LEAST])
    for mean_bits in (0.5, 7.0):
        with pytest.raises(CodecError, match=r"cannot be allocated: give 1 to 6"):
            allocate([10], [1.0], [1.0], mean_bits)
    with pytest.raises(CodecError, match="allocate uniformly"):
        allocate([10, 10], [1.0, 1.0], [0.0, 0.0], 3.0)


def test_real_codes_err_less_in_all_and_the_file_keeps_its_budget() -> None:
    tensors = {"quiet": gaussian(96, 128), "loud": 8 * gaussian(96, 128, seed=1), "large": 2 * gaussian(128, 160)}
    assert deviation(tensors["loud"]) == pytest.approx(tensors["loud"].std().item(), rel=0.01)
    uniform = compress_state(tensors, 3.0, backend="entropy")
    varied = compress_state(tensors, 3.0, costs=dict.fromkeys(tensors, 1.0), backend="entropy")
    errors = []
    for blobs in (uniform, varied):
        assert 2.9 < 8 * sum(blob.nbytes for blob in blobs.values()) / sum(x.numel() for x in tensors.values()) <= 3
        errors.append(sum((x - decompress(blobs[name])).square().sum() for name, x in tensors.items()))
    assert varied["loud"].bits > uniform["loud"].bits + 0.5 > varied["quiet"].bits + 0.9
    assert errors[1] < 0.7 * errors[0]


def test_an_outlier_does_not_pass_for_spread() -> None:
    x = gaussian(64, 64)
    x[3, 4] = 100.0
    assert deviation(x) == pytest.approx(gaussian(64, 64).std().item(), rel=0.01)
    assert deviation(torch.ones(64, 64)) == 0
    assert compress(x, bits=4).bits <= 4


def test_costs_of_tensors_that_are_not_coded_are_refused() -> None:
    with pytest.raises(CodecError, match="no cost of x"):
        compress_state({"x": gaussian(96, 128)}, 3.0, costs={"y": 1.0})
