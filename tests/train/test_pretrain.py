"""The training loop: exact resumption, one gradient however the batch is cut, and every way of going wrong."""

import gc
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

import dlcm.blocks
import dlcm.compilation
import train.pretrain as pretrain_module
import train.saving
import train.step as step_module
from dlcm import DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.baseline import LlamaBaselineOutput
from dlcm.causal_lm import PackedCausalLM
from dlcm.flops import forward_flops
from dlcm.global_parser import ratio_loss
from tests.ranks import run_ranks
from tests.train.tiny import MODELS, prepare_tiny, write_config
from train.checkpoint import (
    KINDS,
    CheckpointError,
    SavedTensors,
    TrainingState,
    has_checkpoints,
    latest_checkpoint,
    load_model_config,
    load_state,
    verify_checkpoint,
)
from train.config import BatchConfig, RunConfig, load_run_config
from train.data import DataError, PackedBatch, PackedLoader, TokenShards
from train.distributed import Ranks
from train.evaluate import evaluate
from train.metrics import WALL_CLOCK, read_metrics
from train.pretrain import build_model, check_continues, main, open_shards
from train.step import CE, StepSums, forward_backward, mean_losses
from train.tokenizer import byte_tokenizer, load_tokenizer, word_end_ids

ARCHITECTURES = list(MODELS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("data"))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what the clock wrote."""
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in read_metrics(run_dir)]


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run_dir)
    return {name: x for kind in KINDS for name, x in SavedTensors(checkpoint, kind).all().items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: every metric, parameter and optimizer moment."""
    assert metrics(one) == metrics(other)
    ours, theirs = final_tensors(one), final_tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Tap:
    """Stands in for `forward_backward`: records the batches, and does something before or after given steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.batches: dict[int, list[list[int]]] = {}
        self.before: Callable[[int], None] = lambda step: None
        self.after: Callable[[int, torch.nn.Module, torch.Tensor], None] = lambda step, model, sums: None
        monkeypatch.setattr(pretrain_module, "forward_backward", self)

    def __call__(
        self, run: RunConfig, model: torch.nn.Module, batches: Sequence[PackedBatch], step: int, ranks: Ranks
    ) -> torch.Tensor:
        self.before(step)
        self.batches[step] = [batch.input_ids.tolist() for batch in batches]
        sums = forward_backward(run, model, batches, step, ranks)
        self.after(step, model, sums)
        return sums


@pytest.fixture
def tap(monkeypatch: pytest.MonkeyPatch) -> Tap:
    return Tap(monkeypatch)


def stop_at(wanted: int, number: signal.Signals = signal.SIGTERM) -> Callable[[int], None]:
    """Sends this process a signal in the middle of a step."""
    return lambda step: os.kill(os.getpid(), number) if step == wanted else None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_and_resumed_half_equal_the_whole(
    architecture: str, data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert main([str(write_config(tmp_path / "whole.yaml", architecture, data, whole))]) == 0
    batches = dict(tap.batches)
    tap.batches.clear()

    tap.before = stop_at(3)
    config = write_config(tmp_path / "halves.yaml", architecture, data, halves)
    assert main([str(config)]) == 128 + signal.SIGTERM
    assert f"stopped after step 4; continue: python -m train.pretrain --resume {halves}" in capsys.readouterr().out
    assert load_state(latest_checkpoint(halves)).step == 4 and max(tap.batches) == 3

    tap.before = lambda step: None
    assert main(["--resume", str(halves)]) == 0
    assert tap.batches == batches
    assert_same_run(whole, halves)
    assert [line["step"] for line in metrics(whole) if line["kind"] == "validation"] == [3, 6, 8]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_killed_run_starts_again_from_its_last_checkpoint(architecture: str, data: Path, tmp_path: Path, tap: Tap):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([str(write_config(tmp_path / "whole.yaml", architecture, data, whole))]) == 0

    def die(step: int) -> None:
        if step == 6:
            raise SystemError("killed")

    tap.before = die
    config = write_config(tmp_path / "killed.yaml", architecture, data, killed, checkpoint={"every": 2})
    with pytest.raises(SystemError):
        main([str(config)])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    shutil.rmtree(killed / "checkpoints" / "step_00000006")  # so that steps 5 and 6 are done again
    tap.before = lambda step: None
    assert main([str(config)]) == 0
    assert_same_run(whole, killed)


def test_a_corrupt_checkpoint_costs_only_the_steps_since_the_previous_one(
    data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    assert main([str(write_config(tmp_path / "whole.yaml", "dlcm", data, whole))]) == 0
    config = write_config(tmp_path / "damaged.yaml", "dlcm", data, damaged, checkpoint={"every": 2})
    tap.before = stop_at(5)
    assert main([str(config)]) == 128 + signal.SIGTERM
    newest = latest_checkpoint(damaged)
    (newest / "optimizer.safetensors").write_bytes(b"\0" * 100)
    tap.before = lambda step: None
    assert main(["--resume", str(damaged)]) == 0
    assert f"{newest}: optimizer.safetensors is corrupt" in capsys.readouterr().err
    assert_same_run(whole, damaged)


def test_a_moved_run_and_a_bare_checkpoint_resume(data: Path, tmp_path: Path, tap: Tap):
    whole, first, moved = tmp_path / "whole", tmp_path / "first", tmp_path / "elsewhere" / "moved"
    assert main([str(write_config(tmp_path / "whole.yaml", "llama", data, whole))]) == 0
    tap.before = stop_at(3)
    assert main([str(write_config(tmp_path / "first.yaml", "llama", data, first))]) != 0
    tap.before = lambda step: None
    shutil.copytree(first / "checkpoints", moved / "checkpoints")
    shutil.rmtree(first)
    assert main(["--resume", str(moved)]) == 0
    assert not first.exists()
    ours, theirs = final_tensors(whole), final_tensors(moved)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("step", [3, 8])
def test_a_failing_evaluation_costs_no_step_and_is_made_up_for(
    step: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    whole, failed = tmp_path / "whole", tmp_path / "failed"
    assert main([str(write_config(tmp_path / "whole.yaml", "dlcm", data, whole))]) == 0
    config = write_config(tmp_path / "failed.yaml", "dlcm", data, failed, checkpoint={"every": 3})

    def fail(*arguments: Any) -> dict[str, float]:
        if read_metrics(failed)[-1]["step"] == step:
            raise OSError("the validation shard is gone")
        return evaluate(*arguments)

    monkeypatch.setattr(pretrain_module, "evaluate", fail)
    assert main([str(config)]) == 2
    assert_one_error(capsys, "the validation shard is gone")
    assert load_state(latest_checkpoint(failed)).step == step
    monkeypatch.setattr(pretrain_module, "evaluate", evaluate)
    assert main(["--resume", str(failed)]) == 0
    assert_same_run(whole, failed)


def test_an_unfinished_first_checkpoint_is_started_over(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([str(write_config(tmp_path / "whole.yaml", "llama", data, whole))]) == 0
    config = write_config(tmp_path / "killed.yaml", "llama", data, killed)
    assert main([str(config)]) == 0
    final = latest_checkpoint(killed)
    final.rename(final.with_suffix(".tmp"))  # killed just before it was renamed
    capsys.readouterr()
    assert main([str(config)]) == 0
    captured = capsys.readouterr()
    assert f"warning: {final.with_suffix('.tmp')}: is half-written" in captured.err and captured.err.count("\n") == 1
    assert "from scratch" in captured.out
    assert_same_run(whole, killed)
    assert os.listdir(killed / "checkpoints") == [final.name]


def test_a_resumed_run_may_change(data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir)
    tap.before = stop_at(3)
    assert main([str(config)]) != 0

    def die(step: int) -> None:
        raise SystemError("killed")

    tap.before = die
    capsys.readouterr()
    with pytest.raises(SystemError):
        main(["--resume", str(run_dir), "optimizer.lr_token=1e-3", "schedule.steps=6"])
    out = capsys.readouterr().out
    assert "changed  optimizer.lr_token from 0.003 to 0.001" in out and "schedule.steps from 8 to 6" in out
    tap.before = lambda step: None
    assert main(["--resume", str(run_dir)]) == 0  # the changes are on record
    checkpoint = latest_checkpoint(run_dir)
    assert load_state(checkpoint).step == 6
    for record in (run_dir / "run.yaml", checkpoint / "run.yaml"):
        assert load_run_config(record).optimizer.lr_token == 1e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.d_token=64", "model.d_token cannot change from 32 to 64 in a resumed run"),
        ("output=elsewhere", "output cannot change from"),
        ("batch.rows=0", "batch.rows is 0, but must be at least 1"),
        ("batch.row=2", "unknown key 'batch.row'; did you mean 'batch.rows'?"),
    ],
)
def test_changes_that_a_resumed_run_cannot_make(
    override: str, message: str, data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    tap.before = stop_at(0)
    assert main([str(write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run"))]) != 0
    assert main(["--resume", str(tmp_path / "run"), override]) == 2
    assert_one_error(capsys, message)


def test_a_finished_run_is_left_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run")
    assert main([str(config)]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for command in ([str(config)], ["--resume", str(tmp_path / "run")]):
        assert main(command) == 0
        assert f"{tmp_path / 'run'} is finished: " in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_another_config_in_the_same_directory_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run")
    assert main([str(config)]) == 0
    assert main([str(config), "batch.rows=2", "model.rope_theta=500.0"]) == 2
    assert_one_error(capsys, "holds a run with other values of batch.rows, model.rope_theta; choose another output")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of SIGINT, which it does not set up where SIGINT was ignored when it started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_stops_a_step_that_nobody_waits_for(data: Path, tmp_path: Path, tap: Tap):
    """Neither reported nor saved otherwise; its numbers are read for the checkpoint."""
    tap.before = stop_at(3)
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir, log_every=100, evaluation={"every": 100})
    assert main([str(config)]) == 128 + signal.SIGTERM
    assert load_state(latest_checkpoint(run_dir)).step == 4 and max(tap.batches) == 3


@pytest.mark.usefixtures("interruptible")
def test_an_ignored_signal_stays_ignored(data: Path, tmp_path: Path, tap: Tap):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tap.before = stop_at(3, signal.SIGINT)
    assert main([str(write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run"))]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once(data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]):
    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    tap.before = twice
    config = write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run")
    assert main([str(config)]) == 128 + signal.SIGINT
    assert_one_error(capsys, "interrupted at once")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- one gradient, however the batch is cut ---


def tiny_step(
    architecture: str, data: Path, tmp_path: Path, rows: int, accumulation: int, **sections: Any
) -> tuple[DLCMForCausalLM, list[dict[str, float]]]:
    """Three steps without the checkpoints around them: the model, and the losses of each step."""
    batch = {"rows": rows, "accumulation": accumulation}
    config = write_config(tmp_path / "step.yaml", architecture, data, tmp_path / "run", batch=batch, **sections)
    run = load_run_config(config)
    shards = TokenShards(data, "train")
    model = build_model(run, shards, load_tokenizer(str(data)))
    model.train()
    optimizer = pretrain_module.build_optimizer(run, model)
    loader = PackedLoader(shards, run.data.sequence_length, rows, run.seed, accumulation=accumulation)
    losses = []
    for step in range(3):
        batches = [loader.batch(step, micro) for micro in range(accumulation)]
        sums = StepSums(*forward_backward(run, model, batches, step, Ranks()).tolist())
        losses.append(mean_losses(sums, model) | step_module.concept_metrics(sums, model))
        optimizer.step()
        optimizer.zero_grad()
    return model, losses


def whole_batch_draws(rows: int, length: int) -> Callable[..., torch.Generator]:
    """Micro-batches of `rows` windows draw from one stream in turn, as one big batch does."""

    def generator(seed: int, step: int, micro: int, ranks: Ranks, device: torch.device) -> torch.Generator:
        stream = torch.Generator().manual_seed(1000 * seed + step)
        torch.rand(micro * rows * length, generator=stream)
        return stream

    return generator


@pytest.mark.parametrize(
    ("architecture", "segmenter", "scope"),
    [
        ("llama", None, None),
        ("dlcm", "learned", "global"),
        ("dlcm", "learned", "sequence"),
        ("dlcm", "rule", "global"),
        ("dlcm", "fixed", "global"),
    ],
)
def test_accumulation_equals_one_big_batch(
    architecture: str,
    segmenter: str | None,
    scope: str | None,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    sections: dict[str, Any] = {}
    if segmenter is not None:
        sections |= {"model": {"segmenter": segmenter, "parser_scope": scope, "aux_loss_weight": 0.5}}
        sections |= {"schedule": {"sharpening_final": None}}
    if segmenter in ("rule", "fixed"):
        sections |= {"optimizer": {"lr_boundary": None}}
    results = []
    for rows, accumulation in ((4, 1), (1, 4)):
        monkeypatch.setattr(step_module, "boundary_generator", whole_batch_draws(rows, 32))
        results.append(tiny_step(architecture, data, tmp_path, rows, accumulation, **sections))
    (big, big_losses), (cut, cut_losses) = results
    for ours, theirs in zip(big_losses, cut_losses, strict=True):
        assert theirs.pop("concept_imbalance", 1) >= 1  # of several micro-batches
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    for ours, theirs in zip(big.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    if segmenter == "learned":
        assert abs(big_losses[0]["aux"]) > 1e-3  # a loss that is there to be compared


@pytest.mark.parametrize("scope", ["global", "sequence"])
def test_running_counts_come_close_to_counting_ahead(scope: str, data: Path, tmp_path: Path):
    """And are the same thing where nothing depends on F of the batch."""
    gradients = []
    for count in ("ahead", "running"):
        batch = {"rows": 4, "accumulation": 4, "boundary_count": count}
        aux = {"parser_scope": scope, "aux_loss_weight": 10.0}  # nearly all of the detector's gradient, much of others'
        config = write_config(tmp_path / f"{count}.yaml", "dlcm", data, tmp_path / "run", batch=batch, model=aux)
        run = load_run_config(config)
        shards = TokenShards(data, "train")
        model = build_model(run, shards, load_tokenizer(str(data))).train()
        loader = PackedLoader(shards, 32, 4, run.seed, accumulation=4)
        forward_backward(run, model, [loader.batch(0, micro) for micro in range(4)], 0, Ranks())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    ahead, running = gradients
    if scope == "sequence":
        torch.testing.assert_close(running, ahead)
    else:
        assert 1e-4 * ahead.norm() < (running - ahead).norm() < 0.1 * ahead.norm()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_accumulation_reaches_every_parameter(architecture: str, data: Path, tmp_path: Path):
    config = write_config(
        tmp_path / "bf16.yaml", architecture, data, tmp_path / "run", precision="bf16", batch={"accumulation": 2}
    )
    run = load_run_config(config)
    shards = TokenShards(data, "train")
    model = build_model(run, shards, load_tokenizer(str(data))).train()
    loader = PackedLoader(shards, 32, 4, run.seed, accumulation=2)
    forward_backward(run, model, [loader.batch(0, 0), loader.batch(0, 1)], 0, Ranks())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def run_all_and_stop(configs: Sequence[str], stopped: str) -> None:
    """Of two ranks; in the last run, one is told to stop, in its second step."""
    ranks = Ranks()
    for config in configs:
        run, _ = pretrain_module.open_run(pretrain_module.parse_arguments([config]), ranks)
        assert pretrain_module.pretrain(run, None, ranks) == 0

    def told_to_stop(run: RunConfig, model: torch.nn.Module, batches: Any, step: int, ranks: Ranks) -> torch.Tensor:
        if step == 1 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(run, model, batches, step, ranks)

    pretrain_module.forward_backward = told_to_stop
    run, _ = pretrain_module.open_run(pretrain_module.parse_arguments([stopped]), ranks)
    assert pretrain_module.pretrain(run, None, ranks) == signal.SIGTERM
    ranks.leave()


def test_two_processes_equal_one(data: Path, tmp_path: Path):
    """Two gloo processes against one process with twice the micro-batches; and both stop."""
    alone, pair = [tmp_path / "alone1", tmp_path / "alone2"], [tmp_path / "pair1", tmp_path / "pair2"]
    changes: dict[str, Any] = {"model": {"aux_loss_weight": 0.5}, "schedule": {"steps": 3, "warmup_steps": 0}}

    def config(run_dir: Path, accumulation: int) -> str:
        batch = {"rows": 2, "accumulation": accumulation}
        return str(write_config(run_dir.with_suffix(".yaml"), "dlcm", data, run_dir, batch=batch, **changes))

    for run_dir, accumulation in zip(alone, (2, 4), strict=True):
        assert main([config(run_dir, accumulation)]) == 0
    stopped = write_config(
        tmp_path / "stopped.yaml", "llama", data, tmp_path / "stopped", log_every=100, evaluation={"every": 100}
    )
    configs = [config(run_dir, accumulation) for run_dir, accumulation in zip(pair, (1, 2), strict=True)]
    said = run_ranks(2, tmp_path, run_all_and_stop, configs, str(stopped))
    assert said.count("from scratch") == 3  # one rank speaks
    assert said.count("stopped after step 3") == 1  # a step late, and at the same step on both ranks
    state = load_state(latest_checkpoint(tmp_path / "stopped"))
    assert state.step == 3
    per_token = forward_flops(pretrain_module.build_model_config(load_run_config(stopped)), 1).total
    assert state.flops > 3 * per_token * state.tokens  # all three steps are counted

    for one, other, accumulation in zip(alone, pair, (1, 2), strict=True):
        assert len(metrics(one)) == len(metrics(other)) == 4
        for ours, theirs in zip(metrics(one), metrics(other), strict=True):
            assert ours.pop("kind") == theirs.pop("kind")
            if accumulation == 1 and "flops" in ours:  # two micro-batches against one: boundaries are counted ahead
                assert ours.pop("flops") > theirs.pop("flops")
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        single, double = final_tensors(one), final_tensors(other)
        for name in SavedTensors(latest_checkpoint(one), "model").shapes:
            torch.testing.assert_close(single[name], double[name], rtol=1e-3, atol=2e-5)
        state = load_state(latest_checkpoint(other))
        assert (state.world_size, state.tokens) == (2, 3 * 2 * accumulation * 2 * 32)


def test_the_first_rank_verifies_the_data_for_all(data: Path, tmp_path: Path):
    class OtherRank(Ranks):
        def on_first(self, action: Callable[[], int | None]) -> int:
            return 0  # done, elsewhere

    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    shard = next((copy / "train").glob("*.bin"))
    shard.write_bytes(bytes(len(shard.read_bytes())))
    run = load_run_config(write_config(tmp_path / "run.yaml", "llama", copy, tmp_path / "run"))
    with pytest.raises(DataError, match="its sha256 is not the manifest's"):
        open_shards(run, Ranks())
    shards, validation = open_shards(run, OtherRank())
    assert [one.split for mixture in (shards, validation) for one in mixture.shards] == ["train", "validation"]
    run.data.verify = False
    open_shards(run, Ranks())


# --- the same run, faster or smaller ---


def test_compiled_and_recomputed_runs_are_the_plain_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To rounding; the drawn boundaries are the same. Evaluation, on a shorter batch, is compiled too."""
    done: list[str] = []

    def recompute(*arguments: Any, **options: Any) -> Any:
        done.append("recomputed")
        return checkpoint(*arguments, **options)

    def compile_blocks(model: PackedCausalLM) -> None:
        done.append("compiled")
        dlcm.compilation.compile_blocks_(model, backend="eager")  # gradients: tests/dlcm/test_compilation.py

    monkeypatch.setattr(dlcm.compilation, "CONCEPT_BUCKET", 16)
    monkeypatch.setattr(dlcm.blocks, "checkpoint", recompute)
    monkeypatch.setattr(pretrain_module, "compile_blocks_", compile_blocks)
    reports = []
    for name, changes in {
        "plain": {},
        "recomputed": {"activation_checkpointing": "full"},
        "compiled": {"compile": True, "activation_checkpointing": "full"},
    }.items():
        sections: dict[str, Any] = {"evaluation": {"every": 3, "max_tokens": 100}} | changes
        config = write_config(tmp_path / f"{name}.yaml", "dlcm", data, tmp_path / name, **sections)
        assert main([str(config)]) == 0
        reports.append(metrics(tmp_path / name))
        assert set(done) == {"plain": set(), "recomputed": {"recomputed"}, "compiled": {"recomputed", "compiled"}}[name]
        done.clear()
    plain, recomputed, compiled = reports
    assert recomputed == plain
    assert len(compiled) == len(plain)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    torch._dynamo.reset()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiler for a GPU is part of triton")
def test_compiling_without_a_compiler_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main([str(write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run", compile=True))]) == 2
    assert_one_error(capsys, "found none (no-such-compiler): install one, name it in CXX, or train without compile")
    assert not (tmp_path / "run").exists()


def test_the_collector_is_spared_once_the_run_is_warm_and_whole_afterwards(
    data: Path, tmp_path: Path, tap: Tap, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pretrain_module, "spare_the_collector", step_module.spare_the_collector)
    frozen: dict[int, bool] = {}
    tap.before = lambda step: frozen.update({step: gc.get_freeze_count() > 0})
    assert main([str(write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run"))]) == 0
    assert frozen == {step: step >= pretrain_module.WARM_UP_STEPS for step in range(8)}
    assert gc.get_freeze_count() == 0


# --- the numbers ---


@pytest.mark.parametrize("segmenter", ["fixed", "words"])
def test_logged_numbers_are_consistent(data: Path, tmp_path: Path, segmenter: str):
    run_dir = tmp_path / "run"
    without_detector = {"optimizer": {"lr_boundary": None}, "schedule": {"sharpening_final": None}}
    config = write_config(
        tmp_path / "run.yaml", "dlcm", data, run_dir, model={"segmenter": segmenter}, **without_detector
    )
    assert main([str(config)]) == 0
    saved = load_model_config(latest_checkpoint(run_dir))
    assert saved.word_end_ids == (word_end_ids(byte_tokenizer()) if segmenter == "words" else None)
    lines = [line for line in read_metrics(run_dir) if line["kind"] == "train"]
    assert [line["tokens"] for line in lines] == [128 * step for step in range(1, 9)]
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert line["loss"] == line["ce"] and line["aux"] == 0 and "sharpening" not in line
        assert line["bpb"] == pytest.approx(line["ce"] / math.log(2), rel=0.05)  # bytes: one token, one byte
        assert line["boundary_rate"] == pytest.approx(1 / line["tokens_per_concept"])
        assert line["tokens_per_second"] > 0 and line["skipped"] == 0
    model_config = pretrain_module.build_model_config(load_run_config(config))
    upper = 3 * forward_flops(model_config, 32, 1.0).total * 128
    lower = 3 * forward_flops(model_config, 1, 32.0).total * 128
    assert 8 * lower < lines[-1]["flops"] < 8 * upper


def test_the_ratio_loss_follows_a_target_that_moves(data: Path, tmp_path: Path):
    """Each logged loss is Eq. 10 at the target of its step; after the decay's start it is the model's."""
    schedule = {"target_ratio_initial": 9.0, "steps": 8, "decay_fraction": 0.25}
    config = write_config(tmp_path / "run.yaml", "dlcm", data, tmp_path / "run", schedule=schedule)
    assert main([str(config)]) == 0
    targets = []
    for line in [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]:
        f, g = (torch.tensor(line[name], dtype=torch.float64) for name in ("boundary_rate", "mean_probability"))
        targets.append(9.0 * (3 / 9) ** min(1, (line["step"] - 1) / 6))
        assert line["aux"] == pytest.approx(float(ratio_loss(f, g, targets[-1])), abs=1e-6)
    assert targets[0] == 9 and targets[-2:] == pytest.approx([3, 3])


def test_utilisation_is_of_what_the_model_needs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pretrain_module, "measured_peak", lambda device: 1e15)
    batch = {"accumulation": 2}  # FLOPs of the pass ahead are spent, but not needed
    assert (
        main([str(write_config(tmp_path / "a.yaml", "dlcm", data, tmp_path / "a", mfu="measured", batch=batch))]) == 0
    )
    lines = [line for line in read_metrics(tmp_path / "a") if line["kind"] == "train"]
    warm = pretrain_module.WARM_UP_STEPS
    assert all(("mfu" in line) == (line["step"] > warm) for line in lines)
    for before, line in zip(lines[warm - 1 :], lines[warm:], strict=False):
        spent = (line["flops"] - before["flops"]) / 256  # per token
        assert 0.6 * spent < line["mfu"] * 1e15 / line["tokens_per_second"] < 0.99 * spent


def test_utilisation_above_one_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(pretrain_module, "measured_peak", lambda device: 1.0)
    assert main([str(write_config(tmp_path / "a.yaml", "llama", data, tmp_path / "a", mfu="measured"))]) == 2
    assert "MFU is" in capsys.readouterr().err


def test_steps_flops_are_of_the_real_documents_and_concepts():
    config = pretrain_module.DLCMConfig(
        **{key: value for key, value in MODELS["dlcm"].items() if key not in ("architecture", "target_ratio")},
        target_ratio=3.0,
    )
    model = DLCMForCausalLM(config)
    # Documents of 10 and 30 tokens: attention costs what one length of (100 + 900) / 40 would.
    sums = StepSums(*[0] * len(StepSums._fields))._replace(tokens=40, squared_lengths=1000, concepts=8)
    forward = forward_flops(config, 25, 5)
    assert step_module.training_flops(sums, model, BatchConfig(1)) == 3 * 40 * forward.total
    ahead = forward.stages["encoder"] + forward.stages["detector"]  # to count boundaries
    flops = [step_module.training_flops(sums, model, BatchConfig(1, 2, count)) for count in ("ahead", "running")]
    assert flops == pytest.approx([40 * (3 * forward.total + ahead), 40 * 3 * forward.total])


def test_steps_flops_are_of_each_documents_window():
    config = LlamaBaselineConfig(vocab_size=20, d_token=16, token_heads=2, token_ffn=16, num_layers=2, token_window=8)
    model = LlamaBaselineForCausalLM(config)
    lengths, ids = [10, 30], torch.zeros(40, dtype=torch.int64)
    batch = PackedBatch(ids, ids, torch.tensor([0, 10, 40], dtype=torch.int32), 30, 40, 40)
    sums = torch.zeros(len(StepSums._fields), dtype=torch.float64)
    step_module.add_to_sums_(sums, LlamaBaselineOutput(ce_loss=torch.ones(())), batch, config.token_window)
    expected = sum(3 * length * forward_flops(config, length).total for length in lengths)
    assert step_module.model_flops(StepSums(*sums.tolist()), model) == pytest.approx(expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluation_is_exact_and_leaves_training_mode(architecture: str, data: Path, tmp_path: Path):
    values = []
    for rows in (1, 5):
        config = write_config(
            tmp_path / "run.yaml",
            architecture,
            data,
            tmp_path / "run",
            batch={"rows": rows},
            evaluation={"max_tokens": None},
        )
        run = load_run_config(config)
        validation = TokenShards(data, "validation")
        model = build_model(run, validation, load_tokenizer(str(data))).train()
        values.append(evaluate(run, model, validation, Ranks()))
        assert model.training
        with torch.no_grad():
            model.lm_head.weight.zero_()  # every token equally likely: ln V nats each
        assert evaluate(run, model, validation, Ranks())["loss"] == pytest.approx(math.log(258), rel=1e-6)
    assert values[0] == pytest.approx(values[1], rel=1e-6)


# --- going wrong ---


def assert_one_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_non_finite_steps_are_skipped_and_counted(spoilt: str, data: Path, tmp_path: Path, tap: Tap):
    snapshots: dict[int, list[torch.Tensor]] = {}

    def spoil(step: int, model: torch.nn.Module, sums: torch.Tensor) -> None:
        snapshots[step] = [parameter.detach().clone() for parameter in model.parameters()]
        if step not in (3, 4, 6):
            return
        if spoilt == "loss":
            sums[CE] = math.nan
        else:
            next(model.parameters()).grad[0, 0] = math.inf

    tap.after = spoil
    run_dir = tmp_path / "run"
    assert main([str(write_config(tmp_path / "run.yaml", "llama", data, run_dir))]) == 0
    moved = {
        step: any(not torch.equal(a, b) for a, b in zip(snapshots[step], snapshots[step + 1], strict=True))
        for step in range(7)
    }
    assert moved == {step: step not in (3, 4, 6) for step in range(7)}
    lines = [line for line in read_metrics(run_dir) if line["kind"] == "train"]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 2, 2, 3, 3]
    assert lines[3]["loss" if spoilt == "loss" else "grad_norm"] is None
    assert lines[-1]["loss"] is not None
    assert all(torch.isfinite(tensor).all() for tensor in final_tensors(run_dir).values())
    assert load_state(latest_checkpoint(run_dir)).skipped == 3


def test_bad_steps_in_a_row_stop_the_run_with_its_checkpoint_intact(
    data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir, checkpoint={"every": 2})
    tap.after = lambda step, model, sums: sums[CE].fill_(math.inf) if step >= 3 else None
    assert main([str(config)]) == 2
    good = run_dir / "checkpoints" / "step_00000004"  # step 4 was bad, but moved nothing
    change = "optimizer.lr_token=0.0015"
    assert_one_error(
        capsys,
        f"not finite in 3 steps in a row; the last good checkpoint, {good}, is intact: go on from it with a lower "
        f"learning rate, --resume {run_dir} {change}",
    )
    verify_checkpoint(good)
    tap.after = lambda step, model, sums: None
    assert main(["--resume", str(run_dir), change]) == 0
    assert load_state(latest_checkpoint(run_dir)).skipped == 1


def test_bad_steps_stop_the_run_though_their_numbers_are_read_a_step_late(
    data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    """Steps 3, 4 and 5 are bad, and none of them reports; while they are counted, step 6 is under way, and lost."""
    tap.after = lambda step, model, sums: sums[CE].fill_(math.nan) if step in (2, 3, 4) else None
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir, log_every=100, evaluation={"every": 100})
    assert main([str(config)]) == 2
    assert_one_error(capsys, "step 5: loss or gradient not finite in 3 steps in a row")
    assert max(tap.batches) == 5 and [line["step"] for line in read_metrics(run_dir)] == [1]


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_checkpoint_counts_the_steps_it_is_behind(log_every: int, data: Path, tmp_path: Path, tap: Tap):
    """Numbers that were not needed before are read for it, its own step's too."""
    tap.after = lambda step, model, sums: sums[CE].fill_(math.nan) if step in (1, 4, 5) else None
    run_dir = tmp_path / "run"
    changes: dict[str, Any] = {"log_every": log_every, "evaluation": {"every": 100}}
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir, **changes, checkpoint={"every": 3, "keep": 9})
    assert main([str(config)]) == 0
    states = [load_state(run_dir / "checkpoints" / f"step_{step:08d}") for step in (3, 6, 8)]
    assert [(state.skipped, state.bad_in_a_row) for state in states] == [(1, 0), (3, 2), (3, 0)]
    flops = [state.flops for state in states]
    assert flops == pytest.approx([flops[-1] * step / 8 for step in (3, 6, 8)], rel=0.1)


def test_bad_steps_before_the_first_checkpoint(
    data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    tap.after = lambda step, model, sums: sums[CE].fill_(math.nan)
    assert main([str(write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run"))]) == 2
    assert_one_error(capsys, f"there is no checkpoint yet: delete {tmp_path / 'run'} and start again with a lower")


def test_a_full_disk_stops_the_run_with_its_checkpoint_intact(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir, checkpoint={"every": 2})
    original = os.fsync

    def refuse_later(descriptor: int) -> None:
        if "step_00000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_later)
    assert main([str(config)]) == 2
    assert_one_error(capsys, "step_00000004: could not be written ([Errno 28] No space left on device); earlier")
    assert latest_checkpoint(run_dir).name == "step_00000002"
    monkeypatch.setattr(os, "fsync", original)
    assert main([str(config)]) == 0


def test_a_disk_that_refuses_in_the_background_stops_the_run_at_the_next_step(
    data: Path, tmp_path: Path, tap: Tap, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    config = write_config(
        tmp_path / "run.yaml", "llama", data, run_dir, checkpoint={"every": 2}, schedule={"steps": 100}
    )

    def refuse(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if "step_00000004" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    def refused(step: int) -> None:  # the step after the checkpoint waits until it has failed
        for thread in threading.enumerate():
            if step == 4 and thread.name == "checkpoint":
                thread.join()

    tap.before = refused
    monkeypatch.setattr(train.saving, "save_file", refuse)
    assert main([str(config), "checkpoint.every=4"]) == 2
    assert_one_error(capsys, "step_00000004: could not be written ([Errno 28] No space left on device); earlier")
    assert max(tap.batches) == 4
    assert not list((run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize("ends", ["last step", "signal"])
def test_training_goes_on_while_a_checkpoint_is_written_and_its_end_waits_for_it(
    ends: str, data: Path, tmp_path: Path, tap: Tap, monkeypatch: pytest.MonkeyPatch
):
    run_dir = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir, checkpoint={"every": 4, "keep": 9})
    gone_on = threading.Event()

    def slow(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        assert gone_on.wait(60)  # which never comes if steps wait for this
        time.sleep(0.3)
        save_file(tensors, path, metadata)

    def go_on(step: int) -> None:
        if step == 6:
            assert not has_checkpoints(run_dir)
            gone_on.set()
            if ends == "signal":
                os.kill(os.getpid(), signal.SIGTERM)

    tap.before = go_on
    monkeypatch.setattr(train.saving, "save_file", slow)
    assert main([str(config)]) == (128 + signal.SIGTERM if ends == "signal" else 0)
    last = 7 if ends == "signal" else 8
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["step_00000004", f"step_{last:08d}"]
    verify_checkpoint(run_dir / "checkpoints" / "step_00000004")
    assert load_state(latest_checkpoint(run_dir)).step == last


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/nowhere", "/nowhere: no prepared data here"),
        ("model.vocab_size=200", "its tokenizer has 258 ids, but model.vocab_size is 200; set it to 258 or more"),
        ("model.vocabsize=200", "unknown key 'model.vocabsize'; did you mean 'model.vocab_size'?"),
        ("data.sequence_length=20000", "longer than model.max_position_embeddings"),
    ],
)
def test_what_cannot_run_is_refused_before_the_run_directory_is_made(
    override: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run")
    assert main([str(config), override]) == 2
    assert_one_error(capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the backend may run here")
def test_a_run_that_failed_before_its_first_step_leaves_the_directory_free(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run")
    assert main([str(config), "model.attention_backend=flash_attn"]) == 2
    assert_one_error(capsys, "flash_attn")
    assert main([str(config)]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run")
    assert main([str(config), "device=cuda"]) == 2
    assert_one_error(capsys, "device is cuda, but torch sees no CUDA device; set device=cpu")


def test_another_tokenizer_beside_the_shards_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copy = shutil.copytree(data, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "<|other|>"
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert main([str(write_config(tmp_path / "run.yaml", "llama", copy, tmp_path / "run"))]) == 2
    assert_one_error(capsys, "the shards were written with tokenizer")


def test_other_data_under_the_same_path_is_refused_on_resume(
    data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    copy = Path(shutil.copytree(data, tmp_path / "prepared"))
    config = write_config(tmp_path / "run.yaml", "llama", copy, tmp_path / "run")
    tap.before = stop_at(2)
    assert main([str(config)]) != 0
    shutil.rmtree(copy)
    document = tmp_path / "other.txt"
    document.write_text("Another text altogether. " * 40)
    more = tmp_path / "more.txt"
    more.write_text("And one more of them, for validation. " * 40)
    from train.prepare import PrepareArguments, prepare

    for seed in range(20):  # until one of the two documents falls into each split
        arguments = PrepareArguments(inputs=(str(document), str(more)), output=copy, validation_fraction=0.5, seed=seed)
        try:
            prepare(arguments)
            break
        except ValueError:
            continue
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert_one_error(capsys, "was trained on other data")


def test_what_must_not_change_between_halves(data: Path, tmp_path: Path):
    run = load_run_config(write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "run", batch={"rows": 6}))
    fresh = TrainingState("data", "tokenizer", 2)
    check_continues(run, fresh, TrainingState("data", "tokenizer", 2, step=5), tmp_path)
    with pytest.raises(CheckpointError, match="other data"):
        check_continues(run, fresh, TrainingState("data", "another", 2), tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "remedy"),
    [
        # processes, rows, accumulation
        ((4, 6, 1), (2, 6, 2), None),
        ((2, 6, 2), (8, 3, 1), None),
        ((1, 6, 4), (2, 6, 4), "set batch.rows=6 batch.accumulation=2, or start as many as before"),
        ((4, 6, 1), (3, 6, 1), "set batch.rows=2 batch.accumulation=4, or start as many as before"),
        ((4, 6, 1), (5, 6, 1), "start a number of processes that divides 24"),
    ],
)
def test_another_number_of_processes_keeps_the_size_of_a_step(
    before: tuple[int, int, int], now: tuple[int, int, int], remedy: str | None, data: Path, tmp_path: Path
):
    (processes, rows, accumulation), (others, *batch) = before, now
    write_config(tmp_path / "run.yaml", "llama", data, tmp_path, batch={"rows": rows, "accumulation": accumulation})
    run = load_run_config(tmp_path / "run.yaml", [f"batch.rows={batch[0]}", f"batch.accumulation={batch[1]}"])
    states = [TrainingState("data", "tokenizer", number) for number in (others, processes)]
    if remedy is None:
        check_continues(run, *states, tmp_path)
    else:
        with pytest.raises(
            CheckpointError, match=f"on 24 windows a step, which {others} with .* do not make; {remedy}"
        ):
            check_continues(run, *states, tmp_path)


def test_resume_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--resume", str(tmp_path)]) == 2
    assert_one_error(capsys, f"{tmp_path}: no checkpoint here; start the run with its config file")


@pytest.mark.parametrize("command", [[], ["config.yaml", "--resume", "run"], ["config.yaml", "a=1", "--resume", "run"]])
def test_the_command_line_is_either_a_config_or_a_run(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert re.search("give either a CONFIG or --resume RUN_DIR, with", capsys.readouterr().err)
