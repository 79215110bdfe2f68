"""The end of a step on the device: clipping and skipping against their slow twin, and a host that waits for nothing."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dlcm.attention
from dlcm.compilation import compile_blocks_
from dlcm.host import OnHost
from tests.train.tiny import MODELS, prepare_tiny, write_config
from tests.waits import counting_waits, masked_sdpa
from train.checkpoint import TrainingState
from train.config import RunConfig, SpikesConfig, load_run_config
from train.data import PackedBatch, PackedLoader, TokenShards
from train.distributed import Ranks
from train.pretrain import build_model, build_optimizer
from train.spikes import SpikeRule
from train.step import (
    CE,
    Model,
    StepSums,
    UnreadNumbers,
    concept_metrics,
    forward_backward,
    over_ranks,
    update_parameters,
)
from train.tokenizer import load_tokenizer

ARCHITECTURES = list(MODELS)
STATE = TrainingState("data", "tokenizer", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("data"))


def open_tiny(
    architecture: str, data: Path, directory: Path, **sections: Any
) -> tuple[RunConfig, Model, torch.optim.AdamW, PackedLoader]:
    run = load_run_config(write_config(directory / "run.yaml", architecture, data, directory / "run", **sections))
    shards = TokenShards(data, "train")
    model = build_model(run, shards, load_tokenizer(str(data))).train()
    loader = PackedLoader(
        shards, run.data.sequence_length, run.batch.rows, run.seed, accumulation=run.batch.accumulation
    )
    return run, model, build_optimizer(run, model), loader


def parameters_and_state(model: torch.nn.Module, optimizer: torch.optim.AdamW) -> list[Tensor]:
    return [
        x.clone()
        for parameter in model.parameters()
        for x in (parameter.detach(), *optimizer.state[parameter].values())
    ]


@pytest.mark.parametrize("clip_norm", [0.1, 100.0], ids=["clipped", "not clipped"])
def test_clipping_and_skipping_on_the_device_equal_their_slow_twin(clip_norm: float, data: Path, tmp_path: Path):
    """clip_grad_norm_ and AdamW without fusion, which sees good steps alone."""
    run, model, optimizer, loader = open_tiny("dlcm", data, tmp_path)
    twin = copy.deepcopy(model)
    slow = build_optimizer(run, twin)
    for group in slow.param_groups:
        group |= {"fused": False, "foreach": False}
    for step in range(5):
        sums = forward_backward(run, model, [loader.batch(step)], step, Ranks())
        before = parameters_and_state(model, optimizer)
        if step == 2:
            sums[CE] = torch.inf
        if step == 3:
            next(model.parameters()).grad[0, 0] = torch.nan
        bad = step in (2, 3)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad.clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm)
        if not bad:
            slow.step()
        grad_norm, skipped, spike = update_parameters(optimizer, sums, clip_norm)
        torch.testing.assert_close(grad_norm, expected_norm, equal_nan=True)
        assert bool(skipped) is bad and not spike and all(parameter.grad is None for parameter in model.parameters())
        after = parameters_and_state(model, optimizer)
        assert all(map(torch.equal, before, after)) is bad
        torch.testing.assert_close(after, parameters_and_state(twin, slow), rtol=2e-5, atol=1e-7)


def train_step(
    run: RunConfig,
    model: Model,
    optimizer: torch.optim.AdamW,
    batches: list[PackedBatch],
    step: int,
    spikes: SpikeRule | None = None,
) -> UnreadNumbers:
    """What the loop of `train.pretrain` hands to the device."""
    sums = forward_backward(run, model, batches, step, Ranks())
    sums = over_ranks(sums, Ranks())
    return UnreadNumbers(step + 1, sums, update_parameters(optimizer, sums, run.optimizer.clip_norm, spikes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_training_step_waits_once_a_micro_batch(
    architecture: str, accumulation: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dlcm.attention, "_sdpa", masked_sdpa)
    run, model, optimizer, loader = open_tiny(architecture, data, tmp_path, batch={"accumulation": accumulation})
    batches = [loader.batch(0, micro) for micro in range(accumulation)]
    spikes = SpikeRule(SpikesConfig(deviations=6.0, window=2), STATE, torch.device("cpu"))
    train_step(run, model, optimizer, batches, 0, spikes)
    with counting_waits() as places:
        unread = train_step(run, model, optimizer, batches, 1, spikes)
    # cu_seqlens lies on the CPU, whatever the model does: its check, and its squares, wait for nothing.
    del places["dlcm/layout.py:from_cu_seqlens"]
    assert places.pop("train/step.py:add_to_sums_") == accumulation
    assert places == ({"dlcm/host.py:read": accumulation} if architecture == "dlcm" else {})
    numbers = unread.read()
    assert numbers.step == 2 and not numbers.skipped and numbers.grad_norm > 0
    assert numbers.sums.tokens == accumulation * 4 * 32


def test_the_imbalance_is_that_of_the_largest_micro_batch(data: Path, tmp_path: Path):
    run, model, _, loader = open_tiny("dlcm", data, tmp_path, batch={"accumulation": 3})
    batches = [loader.batch(0, micro) for micro in range(3)]
    outputs: list[int] = []
    model.register_forward_hook(lambda *arguments: outputs.append(len(arguments[-1].concept_lengths)))
    sums = StepSums(*over_ranks(forward_backward(run, model, batches, 0, Ranks()), Ranks()).tolist())
    assert len(set(outputs)) > 1 and sums.concepts == sum(outputs) and sums.micro_batches == 3
    assert concept_metrics(sums, model)["concept_imbalance"] == pytest.approx(max(outputs) / (sum(outputs) / 3))
    alone = StepSums(*forward_backward(run, model, batches[:1], 0, Ranks()).tolist())
    assert "concept_imbalance" not in concept_metrics(alone, model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    """The same where it counts: torch itself refuses whatever makes the host wait."""

    @staticmethod
    def open(architecture: str, data: Path, directory: Path) -> tuple:
        # FlashAttention has no heads of 12
        sections = {"model": {"concept_heads": 3}} if architecture == "dlcm" else {}
        run, model, optimizer, loader = open_tiny(architecture, data, directory, precision="bf16", **sections)
        model.cuda()
        return run, model, optimizer, loader

    @pytest.fixture(autouse=True)
    def strict(self) -> Iterator[None]:
        yield
        torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_a_warm_step_waits_for_the_number_of_concepts_alone(
        self, architecture: str, compiled: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        run, model, optimizer, loader = self.open(architecture, data, tmp_path)
        if compiled:
            compile_blocks_(model)
        spikes = SpikeRule(SpikesConfig(deviations=6.0, window=2), STATE, torch.device("cuda"))
        for step in range(3):  # warm
            train_step(run, model, optimizer, [loader.batch(step).to("cuda")], step, spikes)
        waits = []
        read = OnHost.read
        monkeypatch.setattr(OnHost, "read", lambda self: (self._read is None and waits.append(self)) or read(self))
        torch.cuda.set_sync_debug_mode("error")
        unread = None
        for step in range(3, 6):
            latest = train_step(run, model, optimizer, [loader.batch(step).to("cuda")], step, spikes)
            if unread is not None:
                unread.read()
            unread = latest
        misses = model.concept_rooms.misses if architecture == "dlcm" else 0
        assert len(waits) == 2 + (3 + misses if architecture == "dlcm" else 0)  # numbers of steps, and of concepts
        with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            torch.ones((), device="cuda").item()

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_compiled_steps_are_the_eager_ones(self, architecture: str, data: Path, tmp_path: Path):
        """Losses to what bf16 tells apart, and nothing compiled after the first step of a kind."""
        losses = []
        for compiled in (False, True):
            run, model, optimizer, loader = self.open(architecture, data, tmp_path)
            if compiled:
                compile_blocks_(model)
            train_step(run, model, optimizer, [loader.batch(0).to("cuda")], 0)
            with torch._dynamo.config.patch(error_on_recompile=True):
                steps = [
                    train_step(run, model, optimizer, [loader.batch(step).to("cuda")], step) for step in range(1, 8)
                ]
            losses.append([unread.read().sums.ce for unread in steps])
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
