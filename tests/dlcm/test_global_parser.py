"""The ratio loss (Eq. 8-10): its zero, its turning point, and one global batch however it is cut up."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlcm import DLCMForCausalLM
from dlcm.boundary import Boundaries
from dlcm.global_parser import ParserStatistics, RunningStatistics, global_parser_loss, ratio_loss
from dlcm.layout import PackedLayout
from tests.conftest import Batch, arrange, random_documents, tiny_dlcm
from tests.ranks import run_two_ranks

ratios = st.floats(1.01, 64)


def loss_at(f: float, g: float, ratio: float) -> tuple[float, float, Tensor | None]:
    """Value, slope in G, and gradient through F."""
    boundary_rate = torch.tensor(f, dtype=torch.float64, requires_grad=True)
    probability = torch.tensor(g, dtype=torch.float64, requires_grad=True)
    loss = ratio_loss(boundary_rate, probability, ratio)
    loss.backward()
    assert probability.grad is not None
    return loss.item(), probability.grad.item(), boundary_rate.grad


@given(ratios)
def test_zero_on_target(ratio: float):
    assert abs(loss_at(1 / ratio, 1 / ratio, ratio)[0]) < 1e-9


@pytest.mark.parametrize(("f", "g", "ratio"), [(0.25, 0.5, 2.0), (0.9, 0.1, 4.0), (0.0, 1.0, 8.0)])
def test_equals_eq_10(f: float, g: float, ratio: float):
    expected = ratio / (ratio - 1) * ((ratio - 1) * f * g + (1 - f) * (1 - g)) - 1
    assert loss_at(f, g, ratio)[0] == pytest.approx(expected, abs=1e-12)


@given(ratios, st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_pull_on_g_turns_exactly_at_the_target_rate(ratio: float, g: float, below: float, above: float):
    """Too many boundaries push probabilities down, too few pull them up, and the right number leaves them."""
    step = 1e-6  # far enough from 1 / R that the sign is not a matter of rounding
    assert loss_at((1 - step) / ratio * below, g, ratio)[1] < 0
    too_many = (1 + step) / ratio
    assert loss_at(too_many + (1 - too_many) * above, g, ratio)[1] > 0
    assert abs(loss_at(1 / ratio, g, ratio)[1]) < 1e-12 * ratio / (ratio - 1)


@given(ratios, st.floats(0, 1), st.floats(0, 1))
def test_no_gradient_through_the_decisions(ratio: float, f: float, g: float):
    assert loss_at(f, g, ratio)[2] is None


def test_is_not_bounded_by_zero():
    """At few boundaries and high probabilities the loss is negative: it is no distance, only its slope matters."""
    assert loss_at(0.05, 0.9, 4.0)[0] < -0.5


def decided(lengths: list[int], seed: int) -> tuple[Boundaries, PackedLayout]:
    generator = torch.Generator().manual_seed(seed)
    p_T = torch.rand(sum(lengths), generator=generator, dtype=torch.float64).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return Boundaries(p_T, p_T > 0.6), PackedLayout.from_cu_seqlens(cu_seqlens, sum(lengths))


def test_statistics_count_and_add_up():
    first, second = (ParserStatistics.of(*decided(lengths, seed)) for lengths, seed in (([3, 5], 0), ([4], 1)))
    both = first + second
    p_T = torch.cat([decided([3, 5], 0)[0].probability_T, decided([4], 1)[0].probability_T])
    assert (both.tokens, both.documents) == (12, 3)
    torch.testing.assert_close(both.boundary_rate, (p_T > 0.6).double().mean())
    torch.testing.assert_close(both.mean_probability, p_T.mean())


def test_without_a_process_group_all_reduce_is_the_identity_without_gradient():
    own = ParserStatistics.of(*decided([3, 5], 0))
    summed = own.all_reduce()
    assert (summed.boundaries, summed.probability, summed.tokens, summed.documents) == (
        own.boundaries,
        own.probability,
        own.tokens,
        own.documents,
    )
    assert own.probability.requires_grad and not summed.probability.requires_grad


def test_sequence_scope_is_the_mean_over_documents_of_their_own_loss():
    lengths = [3, 1, 6]
    boundaries, layout = decided(lengths, 3)
    total = ParserStatistics.of(boundaries, layout)
    loss = global_parser_loss(boundaries, layout, 4.0, "sequence", total)
    own = [
        ratio_loss(b.double().mean(), p.mean(), 4.0)
        for p, b in zip(boundaries.probability_T.split(lengths), boundaries.boundary_T.split(lengths), strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(own).mean())
    assert not torch.allclose(loss, global_parser_loss(boundaries, layout, 4.0, "global", total))


def test_global_scope_reports_the_global_value_whatever_the_share():
    parts = [decided([3, 5], 0), decided([4], 1)]
    total = ParserStatistics.of(*parts[0]) + ParserStatistics.of(*parts[1])
    expected = ratio_loss(total.boundary_rate, total.mean_probability, 4.0)
    for part in parts:
        torch.testing.assert_close(global_parser_loss(*part, 4.0, "global", total), expected)


# Running statistics


def running_statistics(parts: list[ParserStatistics]) -> list[ParserStatistics]:
    """What each part is given."""
    whole = sum(parts[1:], parts[0])
    running = RunningStatistics(len(parts), whole.tokens, whole.documents)
    return [running.next(part) for part in parts]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=6))
def test_running_rates_are_those_so_far_and_their_mean_is_the_batchs(cases: list[tuple[int, int]]):
    parts = [ParserStatistics.of(*decided([length, 2], seed)) for length, seed in cases]
    whole, given_to = sum(parts[1:], parts[0]), running_statistics(parts)
    so_far = parts[0]
    for part, statistics in zip(parts[1:], given_to, strict=False):
        torch.testing.assert_close(statistics.boundary_rate, so_far.boundary_rate)
        so_far = so_far + part
    rates = torch.stack([one.boundary_rate * part.tokens for one, part in zip(given_to, parts, strict=True)])
    torch.testing.assert_close(rates.sum() / whole.tokens, whole.boundary_rate)
    torch.testing.assert_close(given_to[-1].mean_probability, whole.mean_probability.detach())
    assert all((one.tokens, one.documents) == (whole.tokens, whole.documents) for one in given_to)


def test_running_statistics_of_one_micro_batch_are_exact():
    own = ParserStatistics.of(*decided([3, 5], 0))
    (alone,) = running_statistics([own])
    torch.testing.assert_close(alone.boundaries, own.boundaries)
    torch.testing.assert_close(alone.probability, own.probability.detach())


def test_running_statistics_end_with_the_batch():
    own = ParserStatistics.of(*decided([3, 5], 0))
    running = RunningStatistics(1, own.tokens, own.documents)
    running.next(own)
    with pytest.raises(RuntimeError, match="fewer micro-batches than there are"):
        running.next(own)


# One batch, cut into micro-batches and over ranks. Documents differ in length, so shares are unequal.

LENGTHS = [[9, 1, 4], [15], [2, 6, 3]]
MICRO_BATCHES = [random_documents(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
WHOLE = arrange([document for documents in MICRO_BATCHES for document in documents], "packed")


def valid_targets(batch: Batch) -> int:
    return batch.labels.numel() - (len(batch.inputs["cu_seqlens"]) - 1)


def build(scope: str) -> DLCMForCausalLM:
    """Draws so sharp that they do not depend on the order of random numbers; a loss in which the ratio counts."""
    model = tiny_dlcm(6, parser_scope=scope, sharpening=1e9, aux_loss_weight=0.7)
    return model.train()


def gradients(model: DLCMForCausalLM) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def whole_batch_gradients(scope: str, loss: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = build(scope)
    output = model(**WHOLE.inputs, labels=WHOLE.labels)
    output[loss].backward()
    return output[loss].detach(), gradients(model)


def accumulate(model: DLCMForCausalLM, batches: list[Batch], total: ParserStatistics | RunningStatistics) -> Tensor:
    """Adds each micro-batch's share to the gradients; the sum of its losses."""
    losses = []
    for batch in batches:
        output = model(
            **batch.inputs,
            labels=batch.labels,
            num_items_in_batch=valid_targets(WHOLE),
            parser_total=total,
        )
        output.loss.backward()
        losses.append(output.ce_loss.detach())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_micro_batches_equal_one_batch(scope: str):
    ce_loss, expected = whole_batch_gradients(scope, "ce_loss")[0], whole_batch_gradients(scope, "loss")[1]
    model = build(scope)
    batches = [arrange(documents, "packed") for documents in MICRO_BATCHES]
    first, *rest = (model.boundary_statistics(b.inputs["input_ids"], b.inputs["cu_seqlens"]) for b in batches)
    total = sum(rest, first)
    torch.testing.assert_close(accumulate(model, batches, total), ce_loss, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(model), expected, rtol=0, atol=1e-10)
    assert expected["detector.q_proj.weight"].abs().max() > 1e-4, "the ratio loss must matter here"


def test_micro_batches_need_the_total():
    """Negative control: micro-batches that only know themselves do not add up to the global loss."""
    expected = whole_batch_gradients("global", "loss")[1]
    model = build("global")
    for documents in MICRO_BATCHES:
        batch = arrange(documents, "packed")
        shares = valid_targets(WHOLE)
        model(**batch.inputs, labels=batch.labels, num_items_in_batch=shares).loss.backward()
    name = "detector.q_proj.weight"
    assert (gradients(model)[name] - expected[name]).abs().max() > 1e-4


@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
def test_boundary_statistics_are_those_of_the_forward(segmenter: str):
    """Sampling too: with the same generator state, the forward draws the same boundaries."""
    model = tiny_dlcm(2, segmenter=segmenter).train()
    ahead = model.boundary_statistics(
        WHOLE.inputs["input_ids"], WHOLE.inputs["cu_seqlens"], generator=torch.Generator().manual_seed(8)
    )
    output = model(**WHOLE.inputs, generator=torch.Generator().manual_seed(8))
    own = output.parser_statistics
    assert (ahead.boundaries, ahead.tokens, ahead.documents) == (own.boundaries, own.tokens, own.documents)
    torch.testing.assert_close(ahead.probability, own.probability)
    assert ahead.boundaries == output.boundaries.sum() == len(output.concept_lengths)
    assert not ahead.probability.requires_grad


def test_fixed_boundaries_have_no_ratio_loss():
    model = tiny_dlcm(2, segmenter="fixed").train()
    output = model(**WHOLE.inputs, labels=WHOLE.labels)
    assert output.aux_loss == 0 and output.loss == output.ce_loss


# Two processes

SCOPES = ["global", "sequence"]


def rank_main(rank: int, directory: str) -> None:
    """One of two ranks: writes gradients as each way of training leaves them. Micro-batches 0 and 1 | 2."""
    own = [MICRO_BATCHES[0] + MICRO_BATCHES[1], MICRO_BATCHES[2]][rank]
    for scope in SCOPES:
        # Data-parallel wrappers average gradients over ranks; the model is given nothing but its batch.
        model = build(scope)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        wrapped(**arrange(own, "packed").inputs).aux_loss.backward()
        save_gradients(model, directory, f"{scope}-ddp-{rank}")

        # Shares: every rank accumulates micro-batches towards one global batch, gradients are summed.
        model = build(scope)
        batches = [arrange(documents, "packed") for documents in (own[: len(own) // 2], own[len(own) // 2 :])]
        first, second = (model.boundary_statistics(b.inputs["input_ids"], b.inputs["cu_seqlens"]) for b in batches)
        total = (first + second).all_reduce()
        accumulate(model, batches, total)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        save_gradients(model, directory, f"{scope}-shares-{rank}")
        running = RunningStatistics(2, total.tokens, total.documents)
        rates = {f"rate_{micro}": running.next(own).boundary_rate for micro, own in enumerate((first, second))}
        save_file(rates | {"whole": total.boundary_rate}, f"{directory}/{scope}-running-{rank}.safetensors")


def save_gradients(model: DLCMForCausalLM, directory: str, name: str) -> None:
    save_file({k: v.contiguous() for k, v in gradients(model).items()}, f"{directory}/{name}.safetensors")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ranks")
    run_two_ranks(rank_main, directory)
    return directory


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scope", SCOPES)
def test_two_ranks_averaged_equal_one_process(scope: str, rank: int, two_ranks: Path):
    expected = whole_batch_gradients(scope, "aux_loss")[1]
    found = load_file(two_ranks / f"{scope}-ddp-{rank}.safetensors")
    for name, gradient in expected.items():
        torch.testing.assert_close(found.pop(name), gradient, rtol=0, atol=1e-10, msg=name)
    assert all(not gradient.any() for gradient in found.values()), "only the encoder and detector learn from the ratio"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scope", SCOPES)
def test_two_ranks_of_shares_equal_one_process(scope: str, rank: int, two_ranks: Path):
    expected = whole_batch_gradients(scope, "loss")[1]
    found = load_file(two_ranks / f"{scope}-shares-{rank}.safetensors")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scope", SCOPES)
def test_ranks_are_given_the_same_running_rates(scope: str, two_ranks: Path):
    one, other = (load_file(two_ranks / f"{scope}-running-{rank}.safetensors") for rank in (0, 1))
    assert one == other and one["rate_0"] != one["whole"]
    first, second = 9 + 1 + 2, 4 + 15 + 6 + 3  # tokens of both ranks, see `rank_main`
    torch.testing.assert_close((first * one["rate_0"] + second * one["rate_1"]) / (first + second), one["whole"])
