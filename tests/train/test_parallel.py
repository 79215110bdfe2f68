"""Parameters on several ranks: whatever the strategy, the run of one process; and checkpoints that fit any other."""

import datetime
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train.distributed
import train.pretrain as pretrain_module
import train.saving
from dlcm import DLCMForCausalLM
from dlcm.blocks import TransformerStack
from dlcm.causal_lm import PackedCausalLM
from dlcm.compilation import compile_blocks_
from eval.loading import load_checkpoint
from tests.ranks import RankProcesses, run_ranks
from tests.train.tiny import prepare_tiny, write_config
from train.checkpoint import (
    KINDS,
    SavedTensors,
    has_checkpoints,
    latest_checkpoint,
    load_state,
    tensor_files,
    verify_checkpoint,
)
from train.config import ConfigError, ParallelConfig, RunConfig
from train.distributed import PATIENCE, Ranks
from train.metrics import WALL_CLOCK, read_metrics
from train.parallel import add_forward_method, check_parallel, keep_on_host
from train.pretrain import main

STEPS, HALF = 4, 2
SPIKE = 2  # counted from 0: the first step from which a run goes on
WATCHED = {"deviations": 10.0, "window": 2}
PRESSED = {"method": "learned", "target_bits": 1.0, "start": 0.0, "ramp": 0.5}
DYING = {"method": "learned", "bits": 1, "gamma": 12.0, "start": 0.0, "ramp": 0.0, "remove_every": 1}
FSDP, HYBRID = {"strategy": "fsdp"}, {"strategy": "hybrid", "shard_size": 2}
# Whose parameters are of no block, or of one that runs within the decoder.
PATHS = {"aux_loss_weight": 0.5, "clean_start": True, "injection": "every", "pooling": "last"}
PATHS |= {"cross_attention_every": 1, "decoder_layers": 2}
Command = tuple[list[str], list[str]]  # arguments, and which checkpoint is copied before, where to


def copy_checkpoint(source: str, target: str) -> None:
    """A run directory with nothing but the checkpoint of half the steps of another run."""
    name = Path("checkpoints") / f"step_{HALF:08d}"
    (Path(target) / name).mkdir(parents=True)
    for file in (Path(source) / name).iterdir():
        (Path(target) / name / file.name).hardlink_to(file)


def spiking(forward_backward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """In a run called so, the gradient of a step is a million times as long."""

    def lengthened(run: RunConfig, parallel: torch.nn.Module, batches: Any, step: int, ranks: Ranks) -> torch.Tensor:
        sums = forward_backward(run, parallel, batches, step, ranks)
        if "spiked" in run.output and step == SPIKE:
            for parameter in parallel.parameters():
                parameter.grad *= 1e6
        return sums

    return lengthened


# What ranks do; what they patch is patched in their processes alone.


def compile_for_ranks(model: PackedCausalLM) -> None:
    """Traced and differentiated where a model has few regions, and traced alone where there are many."""
    compile_blocks_(model, backend="eager" if isinstance(model, DLCMForCausalLM) else "aot_eager")


def run_all(commands: Sequence[Command]) -> None:
    """One command line after the other, some from a copy of a checkpoint.

    The residual stream is fp32 in all of them; it is counted how often gradients are scattered; and runs called so have
    a spike.
    """
    scattered: list[int] = []
    through = TransformerStack.forward

    def checked(stack: TransformerStack, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        y = through(stack, x, *arguments)
        assert x.dtype == y.dtype == torch.float32
        return y

    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # older torch
    scatter = getattr(dist, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        scattered.append(1)
        return scatter(*arguments, **options)

    TransformerStack.forward = checked  # type: ignore[method-assign]
    setattr(dist, name, counted)
    pretrain_module.compile_blocks_ = compile_for_ranks
    pretrain_module.forward_backward = spiking(pretrain_module.forward_backward)
    ranks = Ranks()
    for arguments, copied in commands:
        if copied:
            ranks.on_first(functools.partial(copy_checkpoint, *copied))
        run, checkpoint = pretrain_module.open_run(pretrain_module.parse_arguments(arguments), ranks)
        scattered.clear()
        assert pretrain_module.pretrain(run, checkpoint, ranks) == 0
        (Path(run.output) / f"scattered_{ranks.rank}").write_text(str(len(scattered)))
    ranks.leave()


def lose_one(config: str, what: str) -> int:
    """One of two ranks is killed in a step, or while it writes its share of a checkpoint; or its disk is full then."""
    step_of, save_file = pretrain_module.forward_backward, train.saving.save_file

    def lost(run: RunConfig, model: torch.nn.Module, batches: Any, step: int, ranks: Ranks) -> torch.Tensor:
        if step == 3 and what == "step" and ranks.rank == 1:
            while not has_checkpoints(Path(run.output)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of(run, model, batches, step, ranks)

    def refused(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if "step_00000004" in str(path) and os.environ["RANK"] == "1":
            if what == "write":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "disk":
                raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    pretrain_module.forward_backward = lost
    train.saving.save_file = refused
    return main([config])


def hang_one(config: str) -> int:
    """One of two ranks stops, and the other has little patience."""
    step_of = pretrain_module.forward_backward

    def hung(run: RunConfig, model: torch.nn.Module, batches: Any, step: int, ranks: Ranks) -> torch.Tensor:
        if (step, ranks.rank) == (2, 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        return step_of(run, model, batches, step, ranks)

    train.distributed.PATIENCE = datetime.timedelta(seconds=3)
    pretrain_module.forward_backward = hung
    return main([config])


class Runs:
    """Runs of one and the same training in one directory, on any number of processes."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.data = prepare_tiny(directory / "data")

    def __getitem__(self, name: str) -> Path:
        return self.directory / name

    def start(self, name: str, accumulation: int, architecture: str = "dlcm", **changes: Any) -> Command:
        sections: dict[str, Any] = {
            "batch": {"rows": 2, "accumulation": accumulation},
            "schedule": {"steps": STEPS, "warmup_steps": 0},
            "evaluation": {"every": HALF, "max_tokens": 320},  # 5 batches, that no number of ranks shares out evenly
            "checkpoint": {"every": HALF, "keep": 9},
            "model": {"aux_loss_weight": 0.5} if architecture == "dlcm" else {},
        }
        config = self.directory / f"{name}.yaml"
        return [str(write_config(config, architecture, self.data, self[name], **sections | changes))], []

    def resume(self, name: str, source: str, *changes: str) -> Command:
        return ["--resume", str(self[name]), *changes], [str(self[source]), str(self[name])]

    def run_here(self, command: Command) -> None:
        arguments, copied = command
        if copied:
            copy_checkpoint(*copied)
        assert main(arguments) == 0

    def run_on(self, processes: int, *commands: Command) -> None:
        run_ranks(processes, self.directory, run_all, commands)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.run_here(runs.start("one", 4))
    runs.run_here(runs.start("few", 2))
    runs.run_here(runs.start("llama", 4, "llama"))
    runs.run_here(runs.start("paths", 4, model=PATHS))
    runs.run_here(runs.start("pressed-one", 4, compression=PRESSED))
    runs.run_here(runs.start("dying-one", 4, compression=DYING))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_module, "forward_backward", spiking(pretrain_module.forward_backward))
        runs.run_here(runs.start("spiked-one", 4, spikes=WATCHED))
    changed = ["batch.accumulation=1", "parallel.strategy=hybrid", "parallel.shard_size=2"]
    runs.run_on(
        4,
        runs.start("hybrid", 1, parallel=HYBRID),
        runs.resume("hybrid-hybrid", "hybrid"),
        runs.resume("one-hybrid", "one", *changed),
        runs.start("four", 1, parallel=FSDP),
        runs.resume("four-fsdp", "four"),
    )
    changed = ["batch.accumulation=2", "parallel.strategy=ddp", "parallel.shard_size=null"]
    runs.run_on(
        2,
        runs.start("ddp", 2),
        runs.start("few-ddp", 1),
        runs.start("fsdp", 2, parallel=FSDP),
        runs.start("few-fsdp", 1, parallel=FSDP),
        runs.start("llama-fsdp", 2, "llama", parallel=FSDP, activation_checkpointing="full", compile=True),
        runs.start("paths-fsdp", 2, parallel=FSDP, model=PATHS),
        runs.start("compiled-fsdp", 2, parallel=FSDP, activation_checkpointing="full", compile=True),
        runs.start("bf16-ddp", 2, precision="bf16"),
        runs.start("bf16-fsdp", 2, precision="bf16", parallel=FSDP),
        runs.start("spiked-ddp", 2, spikes=WATCHED),
        runs.start("spiked-fsdp", 2, spikes=WATCHED, parallel=FSDP),
        runs.resume("spiked-fsdp-fsdp", "spiked-fsdp"),
        runs.start("pressed-ddp", 2, compression=PRESSED),
        runs.start("dying-ddp", 2, compression=DYING),
        runs.resume("dying-ddp-ddp", "dying-ddp"),
        runs.start("pressed-fsdp", 2, compression=PRESSED, parallel=FSDP),
        runs.resume("pressed-fsdp-fsdp", "pressed-fsdp"),
        runs.resume("fsdp-fsdp", "fsdp"),
        runs.resume("ddp-ddp", "ddp"),
        runs.resume("hybrid-ddp", "hybrid", *changed),
        runs.resume("four-ddp", "four", *changed),
        runs.resume("four-hybrid", "four", "batch.accumulation=2", *[f"parallel.{k}={v}" for k, v in HYBRID.items()]),
    )
    runs.run_here(runs.resume("fsdp-one", "fsdp", "batch.accumulation=4"))
    runs.run_here(runs.resume("four-one", "four", "batch.accumulation=4"))
    return runs


def metrics(run_dir: Path, after: int = 0) -> list[dict[str, Any]]:
    """What was logged from a step on, the first one not included, and without what the clock wrote."""
    lines = [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in read_metrics(run_dir)]
    return [line for line in lines if line["step"] > after]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run_dir)
    return {name: x for kind in KINDS for name, x in SavedTensors(checkpoint, kind).all().items()}


def assert_close(run_dir: Path, expected: Path, after: int = 0) -> None:
    """Losses, norms of gradients, parameters and moments, within what the order of fp32 sums may do."""
    ours, theirs = metrics(run_dir, after), metrics(expected, after)
    assert len(ours) == len(theirs) == (STEPS - after) + (STEPS - after) // HALF
    for our, their in zip(ours, theirs, strict=True):
        assert our.pop("kind") == their.pop("kind")
        # Of a single micro-batch, boundaries are counted without a pass ahead.
        assert our.pop("flops", 0) == pytest.approx(their.pop("flops", 0), rel=0.2)
        assert our == pytest.approx(their, rel=1e-4, abs=1e-5)
    values, expected_values = tensors(run_dir), tensors(expected)
    assert values.keys() == expected_values.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected_values[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", "one"),
        ("fsdp", "one"),
        ("compiled-fsdp", "one"),
        ("hybrid", "one"),
        ("four", "one"),
        ("few-ddp", "few"),
        ("few-fsdp", "few"),
        ("llama-fsdp", "llama"),
        ("paths-fsdp", "paths"),
        ("spiked-ddp", "spiked-one"),
        ("spiked-fsdp", "spiked-one"),
        ("pressed-ddp", "pressed-one"),
        ("dying-ddp", "dying-one"),
        ("pressed-fsdp", "pressed-one"),
    ],
)
def test_every_strategy_is_the_run_of_one_process(name: str, expected: str, runs: Runs):
    assert_close(runs[name], runs[expected])


@pytest.mark.parametrize(("name", "expected"), [("ddp", 0), ("few-fsdp", 5), ("fsdp", 5), ("hybrid", 5)])
def test_gradients_travel_once_a_step_and_block(name: str, expected: int, runs: Runs):
    """However many micro-batches: those of encoder, backbone, decoder, cross-attention, and the rest."""
    assert (runs[name] / "scattered_1").read_text() == str(expected * STEPS)


RESHARDED = {"fsdp-one": 1, "one-hybrid": 4, "hybrid-ddp": 2, "four-one": 1, "four-ddp": 2, "four-hybrid": 2}


@pytest.mark.parametrize("name", RESHARDED)
def test_a_run_goes_on_under_another_strategy_on_another_number_of_processes(name: str, runs: Runs):
    assert_close(runs[name], runs["one"], after=HALF)
    assert load_state(latest_checkpoint(runs[name])).world_size == RESHARDED[name]


@pytest.mark.parametrize("name", ["spiked-one", "spiked-ddp", "spiked-fsdp"])
def test_all_ranks_skip_a_spike(name: str, runs: Runs):
    before, after = (load_state(runs[name] / "checkpoints" / f"step_{step:08d}") for step in (HALF, STEPS))
    assert (before.spikes, after.spikes, after.skipped, after.norms) == (0, 1, 1, STEPS)
    assert [line["spikes"] for line in metrics(runs[name]) if line["kind"] == "train"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("resumed", "name"),
    [
        *(("ddp-ddp", "ddp"), ("fsdp-fsdp", "fsdp"), ("hybrid-hybrid", "hybrid"), ("four-fsdp", "four")),
        ("spiked-fsdp-fsdp", "spiked-fsdp"),
        ("pressed-fsdp-fsdp", "pressed-fsdp"),
        ("dying-ddp-ddp", "dying-ddp"),
    ],
)
def test_a_run_goes_on_unchanged_bit_for_bit(resumed: str, name: str, runs: Runs):
    assert metrics(runs[resumed], HALF) == metrics(runs[name], HALF)
    ours, theirs = tensors(runs[resumed]), tensors(runs[name])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("name", "processes"), [("ddp", 2), ("fsdp", 2), ("hybrid", 4), ("four", 4)])
def test_every_rank_writes_a_share_of_the_tensors(name: str, processes: int, runs: Runs):
    """And names and shapes, and all else, are those of one process."""
    ours, theirs = latest_checkpoint(runs[name]), latest_checkpoint(runs["one"])
    for kind in KINDS:
        files = tensor_files(ours, kind)
        assert files == [f"{kind}-{rank:05d}-of-{processes:05d}.safetensors" for rank in range(1, processes + 1)]
        sizes = [(ours / file).stat().st_size for file in files]
        assert min(sizes) > max(sizes) / 2
        assert SavedTensors(ours, kind).shapes == SavedTensors(theirs, kind).shapes
        index = json.loads((ours / f"{kind}.safetensors.index.json").read_text())
        assert {key: load_file(ours / file)[key].shape for key, file in index["weight_map"].items()}.keys() == (
            SavedTensors(theirs, kind).shapes.keys()
        )
    rest = [{f.name for f in directory.iterdir() if ".safetensors" not in f.name} for directory in (ours, theirs)]
    assert rest[0] == rest[1]
    assert (ours / "config.json").read_text() == (theirs / "config.json").read_text()
    verify_checkpoint(ours)


@pytest.mark.parametrize("name", ["ddp", "four"])
def test_a_checkpoint_of_several_files_suffices_for_transformers(name: str, runs: Runs):
    checkpoint = latest_checkpoint(runs[name])
    model, ours = AutoModelForCausalLM.from_pretrained(checkpoint), load_checkpoint(runs[name]).model.cpu()
    ids_BL = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BL).logits, ours(input_ids=ids_BL).logits)
    expected = SavedTensors(checkpoint, "model").all()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_sharded_in_bf16_is_ddp_in_bf16(runs: Runs):
    """Gains of norms are rounded to bf16, which all that they scale is then, too."""
    for ours, theirs in zip(metrics(runs["bf16-fsdp"]), metrics(runs["bf16-ddp"]), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-3)
    parameters = SavedTensors(latest_checkpoint(runs["bf16-fsdp"]), "model").all()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert any((parameter != parameter.bfloat16()).any() for parameter in parameters.values())


@pytest.mark.parametrize("what", ["step", "write", "disk"])
def test_a_lost_rank_ends_the_run_which_goes_on_with_those_that_are_left(what: str, runs: Runs):
    (config,), _ = runs.start(what, 2, parallel=FSDP)
    lost = RankProcesses(2, runs.directory, lose_one, config, what)
    assert lost.wait() == [2, 2 if what == "disk" else -signal.SIGKILL]
    (error,) = (line for line in lost.text.splitlines() if line.startswith("error: "))
    if what == "disk":
        assert "step_00000004: could not be written ([Errno 28] No space left on device); earlier" in error
        assert os.listdir(runs[what] / "checkpoints") == ["step_00000002"]
    else:
        assert "rank 0 lost another, which ended or hung (" in error and "continue with --resume RUN_DIR" in error
    assert latest_checkpoint(runs[what]).name == "step_00000002"
    assert main(["--resume", str(runs[what]), "batch.accumulation=4"]) == 0
    assert_close(runs[what], runs["one"])
    assert len(os.listdir(runs[what] / "checkpoints")) == 2


def test_a_hung_rank_ends_the_run(runs: Runs):
    (config,), _ = runs.start("hung", 2)
    hung = RankProcesses(2, runs.directory, hang_one, config)
    try:
        first, second = hung.processes
        first.join(timeout=120)
        assert first.exitcode == 2 and second.exitcode is None
        said = hung.said[0].read_text()
        assert "error: rank 0 lost another, which ended or hung (" in said and "--resume RUN_DIR" in said
    finally:
        hung.end()


def test_ranks_wait_for_each_other_for_so_long(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.update(options))
    Ranks()
    assert asked == {"timeout": PATIENCE}


def test_groups_that_do_not_fit_the_processes_are_refused():
    ranks = Ranks()
    check_parallel(ParallelConfig("hybrid", 3), ranks)  # in a single process there are no groups
    ranks.size = 8
    check_parallel(ParallelConfig("hybrid", 4), ranks)
    check_parallel(ParallelConfig("fsdp"), ranks)
    with pytest.raises(ConfigError, match="shard_size is 3, which does not divide 8 processes; set it to 2 or 4 or 8"):
        check_parallel(ParallelConfig("hybrid", 3), ranks)


def test_what_lies_on_the_host_is_not_moved(monkeypatch: pytest.MonkeyPatch):
    """FSDP sees no tensor there; the model sees what it was called with."""
    seen: list[dict[str, Any]] = []

    class Echo(torch.nn.Module):
        def forward(self, **inputs: Any) -> dict[str, Any]:
            return inputs

        def look(self, **inputs: Any) -> dict[str, Any]:
            return inputs

    def register(module: torch.nn.Module, name: str) -> None:
        method = getattr(module, name)
        setattr(module, name, lambda **kwargs: seen.append(kwargs) or method(**kwargs))

    model = Echo()
    model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs), prepend=True, with_kwargs=True
    )  # as FSDP
    monkeypatch.setattr("train.parallel.register_fsdp_forward_method", register)
    keep_on_host(model)
    add_forward_method(model, "look")
    inputs = {"input_ids": torch.ones(2, device="meta"), "cu_seqlens": torch.ones(2), "max_seqlen": 2}
    for way_in in (model, model.look):
        assert all(value is inputs[name] for name, value in way_in(**inputs).items())
        last = seen.pop()
        assert not isinstance(last["cu_seqlens"], torch.Tensor) and last["input_ids"] is inputs["input_ids"]
        assert not seen
