"""Activations and gradients through blobs: what crosses, what it costs, and what error feedback gives back."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlcm.codec import CodecError, compress, decompress, relative_mse
from dlcm.codec.training import GradientCodec, PipelineCut, average_compressed, compress_at_most, gradient_code
from tests.dlcm.codec.test_tensor import gaussian
from tests.ranks import run_two_ranks

THREE = partial(compress, bits=3.0, backend="entropy")
EIGHT = partial(compress, bits=8.0, backend="entropy")


def test_activations_cross_as_blobs_and_gradients_come_back_as_they_are() -> None:
    x_TE, weight_E = gaussian(96, 64).requires_grad_(), gaussian(64, seed=1)
    cut = PipelineCut(THREE)
    y_TE = cut(x_TE)
    assert torch.equal(y_TE, decompress(THREE(x_TE.detach()))) and 0 < relative_mse(x_TE.detach(), y_TE.detach()) < 0.03
    (y_TE * weight_E).sum().backward()
    assert torch.equal(x_TE.grad, weight_E.expand(96, 64))  # not that of rounding, which is 0
    assert 2.9 < cut.forward_bits / cut.values <= 3 and 32 < cut.backward_bits / cut.values < 33


def test_gradients_across_a_cut_have_a_budget_of_their_own() -> None:
    x_TE, gradient_TE = gaussian(96, 64).requires_grad_(), gaussian(96, 64, seed=1)
    cut = PipelineCut(None, EIGHT)
    y_TE = cut(x_TE)
    assert torch.equal(y_TE, x_TE)
    y_TE.backward(gradient_TE)
    assert torch.equal(x_TE.grad, decompress(EIGHT(gradient_TE)))
    assert 7.8 < cut.backward_bits / cut.values <= 8


def test_error_feedback_makes_the_sum_of_what_was_sent_right() -> None:
    parameter, steps = nn.Parameter(gaussian(64, 64)), 30
    wanted = [gaussian(64, 64, seed=1) + 0.1 * gaussian(64, 64, seed=seed) for seed in range(2, 2 + steps)]
    errors = {}
    for feedback in (True, False):
        codec = GradientCodec(gradient_code(1.2), feedback)
        sent = [decompress(codec.blob(parameter, gradient)) for gradient in wanted]
        errors[feedback] = relative_mse(sum(wanted), sum(sent))
        assert 1.1 < codec.bits / codec.values <= 1.2
    assert errors[True] < 0.1 * errors[False]


def test_small_and_infinite_gradients_are_sent_exactly() -> None:
    codec = GradientCodec(gradient_code(2.0))
    for gradient in (gaussian(300), gaussian(10, 10), torch.full((64, 64), torch.inf)):
        assert torch.equal(decompress(codec.blob(nn.Parameter(torch.empty(0)), gradient)), gradient)


def test_gradients_of_few_rows_take_fewer_bits_than_they_may_have() -> None:
    gradient = torch.zeros(4000, 64)
    gradient[::400] = gaussian(10, 64)
    with pytest.raises(CodecError, match="too many"):
        compress(gradient, bits=2, backend="entropy", clip_sigma=64)
    blob = compress_at_most(gradient, 2, backend="entropy", clip_sigma=64)
    assert blob.bits < 1.95 and relative_mse(gradient, decompress(blob)) < 1e-5
    assert gradient_code(2.0)(torch.zeros(64, 64)).bits < 1


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def loss_of(network: nn.Module, rank: int, step: int) -> Tensor:
    x_TE = gaussian(128, 64, seed=100 * step + rank) / 0.02
    return (network(x_TE) - x_TE.roll(1, 1)).square().mean()


def _train(rank: int, directory: str) -> None:
    for name, bits in (("exact", None), ("coded", 2.6)):
        network = nn.parallel.DistributedDataParallel(model(), bucket_cap_mb=0.02, gradient_as_bucket_view=True)
        codec = None
        if bits is not None:
            codec = GradientCodec(gradient_code(bits))
            network.register_comm_hook(codec, average_compressed)
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for step in range(60):
            optimizer.zero_grad()
            loss_of(network, rank, step).backward()
            optimizer.step()
        final = sum(loss_of(network, rank, 1000 + step).item() for step in range(4)) / 4
        result = {"loss": final, "state": network.module.state_dict(), "bits": codec and codec.bits / codec.values}
        torch.save(result, Path(directory) / f"{name}_{rank}.pt")


def _average(rank: int) -> None:
    network = nn.parallel.DistributedDataParallel(model())
    codec = GradientCodec(EIGHT, feedback=False)
    network.register_comm_hook(codec, average_compressed)
    loss_of(network, rank, 0).backward()
    alone = []
    for of in (0, 1):
        copy = model()
        loss_of(copy, of, 0).backward()
        alone.append([codec.blob(x, x.grad) for x in copy.parameters()])
    for parameter, first, second in zip(network.parameters(), *alone, strict=True):
        torch.testing.assert_close(parameter.grad, (decompress(first) + decompress(second)) / 2)


def _both(rank: int, directory: str) -> None:
    _average(rank)
    _train(rank, directory)
    dist.barrier()


def test_two_ranks_average_what_each_has_sent_and_train_alike(tmp_path: Path) -> None:
    run_two_ranks(_both, tmp_path)
    found = {(name, rank): torch.load(tmp_path / f"{name}_{rank}.pt") for name in ("exact", "coded") for rank in (0, 1)}
    for name in ("exact", "coded"):
        for key, value in found[name, 0]["state"].items():
            assert torch.equal(value, found[name, 1]["state"][key])  # both ranks stay one model
    untrained = loss_of(model(), 0, 1000).item()
    exact, coded = (found[name, 0]["loss"] for name in ("exact", "coded"))
    assert exact < 0.8 * untrained and exact < coded < exact + 0.3 * (untrained - exact)
    assert 2.6 < found["coded", 0]["bits"] < 3.2  # biases are exact
