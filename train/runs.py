"""Many runs, each a process of its own: what they share, and running those that are not finished.

Each run of a grid or a sweep has its files beside its directory:

    OUTPUT/NAME.yaml    its configuration; by hand: python -m train.pretrain OUTPUT/NAME.yaml
    OUTPUT/NAME.log     what it printed
    OUTPUT/NAME/        the run
"""

import argparse
import dataclasses
import difflib
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.checkpoint import has_checkpoints
from train.config import ConfigError, RunConfig, save_run_config
from train.data import read_manifest
from train.metrics import read_metrics
from train.pretrain import ERRORS, check_run_directory, lacks_evaluation, step_to_continue
from train.signals import StopRequests

POLL_SECONDS = 0.1
Running = Set[str]  # outputs of runs


class RunsFailed(RuntimeError):
    """Runs that failed; the message names them and their logs."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A run and its name among others."""

    name: str
    run: RunConfig
    processes: int  # data-parallel, by torchrun

    @property
    def config_file(self) -> Path:
        return Path(f"{self.run.output}.yaml")

    @property
    def log_file(self) -> Path:
        return Path(f"{self.run.output}.log")

    @property
    def tokens(self) -> int:
        """D, those of all steps."""
        batch = self.run.batch
        per_step = batch.rows * batch.accumulation * self.run.data.sequence_length * self.processes
        return self.run.schedule.steps * per_step

    def command(self, python: str) -> list[str]:
        """What runs it, or resumes it."""
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        return [python, *(several if self.processes > 1 else []), "-m", "train.pretrain", str(self.config_file)]


# Plans


Plan = TypeVar("Plan")


def read_plan(path: Path, kind: type[Plan]) -> Plan:
    """The dataclass of this kind that a YAML file describes.

    Raises:
        ConfigError: not readable, an unknown or a missing key, or a wrong type.
    """
    try:
        content = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise ConfigError(f"{path}: must hold `key: value` pairs at the top level")
        known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for key in content:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1)
                raise ConfigError(f"{path}: unknown key {key!r}; did you mean {(near or known)[0]!r}?")
        merged = OmegaConf.merge(OmegaConf.structured(kind), content)
        for key in OmegaConf.missing_keys(merged):
            raise ConfigError(f"{path}: {key} is missing; set it in the file")
        plan = OmegaConf.to_object(merged)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(plan, kind)
    for name in ("processes", "at_once"):
        if getattr(plan, name, 1) < 1:
            raise ConfigError(f"{path}: {name} is {getattr(plan, name)}, but must be at least 1")
    return plan


def add_instead_of_running(parser: argparse.ArgumentParser) -> Any:
    """Adds --list and --print to a command line, and returns the group that excludes them from each other."""
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="show the runs, and run nothing")
    instead.add_argument("--print", action="store_true", help="write configurations, print commands, run nothing")
    return instead


def report_errors(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Makes a command's `main` return 2, after one `error:` line on stderr, for what a user can mend."""

    @functools.wraps(main)
    def reporting(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except (RunsFailed, *ERRORS) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("error: interrupted between two runs; the same command goes on from here", file=sys.stderr)
            return 128 + signal.SIGINT

    return reporting


def carry_out(
    runs: Sequence[PlannedRun],
    arguments: argparse.Namespace,
    table: Callable[[], str],
    at_once: int = 1,
    when_one_is_done: Callable[[Running], None] = lambda running: None,
) -> int:
    """Shows, prints or runs, as the command line says; returns the exit status: 0, or 128 + N stopped by signal N.

    Raises:
        RunsFailed, ConfigError, DataError: see `run_all` and `read_manifest`.
    """
    if arguments.list:
        print(table())
        return 0
    write_configs(runs)
    if arguments.print:
        print("\n".join(shlex.join(planned.command("python")) for planned in runs))
        return 0
    for path in dict.fromkeys(path for planned in runs for path, _ in planned.run.data.sources().values()):
        read_manifest(Path(path))  # once here, rather than in every log
    number = run_all(runs, places(runs, at_once), when_one_is_done)
    return 128 + number if number else 0


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines, one under another: the first column to the left, others to the right."""
    broad = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(broad[0]), *(cell.rjust(room) for cell, room in zip(row[1:], broad[1:], strict=True))])
        for row in rows
    )


# Running


def write_configs(runs: Iterable[PlannedRun]) -> None:
    """Writes every run's configuration, from which it can be run by hand."""
    for planned in runs:
        planned.config_file.parent.mkdir(parents=True, exist_ok=True)
        save_run_config(planned.run, planned.config_file)


def is_finished(run: RunConfig) -> bool:
    """Whether `train.pretrain` would leave the run alone, or its checkpoints were deleted after its last evaluation.

    Where it would stop with an error, it is to say so.
    """
    run_dir, steps = Path(run.output), run.schedule.steps
    try:
        check_run_directory(run)
        if not has_checkpoints(run_dir):
            return any(line["kind"] == "validation" and line["step"] == steps for line in read_metrics(run_dir))
        step = step_to_continue(run_dir)
        return step >= steps and not lacks_evaluation(run, step)
    except ERRORS:
        return False


def last_validation(run: RunConfig) -> dict[str, Any]:
    """What a finished run's last validation found."""
    return [line for line in read_metrics(Path(run.output)) if line["kind"] == "validation"][-1]


def outcome(planned: PlannedRun) -> str:
    """The last validation of a run, in words."""
    last = last_validation(planned.run)
    found = "validation loss not finite" if last["loss"] is None else f"validation loss {last['loss']:.4f}"
    return f"{found}, {last['tokens_per_concept']:.2f} tokens per concept" if "tokens_per_concept" in last else found


def places(runs: Sequence[PlannedRun], at_once: int) -> list[dict[str, str]]:
    """Where runs may be, as environment variables: `at_once` on each GPU, or on the CPU where there is none."""
    gpus = torch.cuda.device_count() if all(planned.run.device != "cpu" for planned in runs) else 0
    if gpus == 0 or any(planned.processes > 1 for planned in runs):  # a run of several processes takes its GPUs itself
        return [{}] * at_once
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(at_once) for gpu in visible]


class Process(Protocol):
    """What is needed of a `subprocess.Popen`."""

    def poll(self) -> int | None: ...
    def send_signal(self, sig: int) -> None: ...


def start(command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> Process:
    """Starts a command, its output added to a log.

    It is in a process group of its own, so that a terminal does not send it what is passed on, a second time, at which
    it would stop at once.
    """
    with log_file.open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            env={**os.environ, **environment},
        )


class PassedOn(StopRequests):
    """Signals go to all runs that have been started, which save and stop."""

    def __init__(self) -> None:
        super().__init__()
        self._processes: list[Process] = []

    def started(self, process: Process) -> None:
        self._processes.append(process)
        if self.number:  # while it was being started
            process.send_signal(self.number)

    def react(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)


def run_all(
    runs: Sequence[PlannedRun],
    where: Sequence[Mapping[str, str]] = ({},),
    when_one_is_done: Callable[[Running], None] = lambda running: None,
) -> int:
    """Runs what is not finished, as many at a time as there are places (see `places`).

    Args:
        runs: in the order in which they are started.
        where: for each place, the environment variables that put a run there.
        when_one_is_done: called after each success with the outputs of the runs that go on, whose files are theirs.

    Returns:
        0, or the number of the signal that stopped it.

    Raises:
        RunsFailed: some failed; the others are finished.
    """
    waiting, failed = deque(enumerate(runs, 1)), []
    free = list(range(len(where)))
    active: dict[int, tuple[str, PlannedRun, float, Process]] = {}
    with PassedOn() as signals:
        while True:
            while waiting and free and not signals.number:
                number, planned = waiting.popleft()
                progress = f"[{number}/{len(runs)}] {planned.name}:"
                if is_finished(planned.run):
                    print(progress, "finished before", flush=True)
                    continue
                place = free.pop(0)
                process = start(planned.command(sys.executable), planned.log_file, where[place])
                active[place] = progress, planned, time.monotonic(), process
                signals.started(process)
            if not active:
                break
            statuses = {place: process.poll() for place, (*_, process) in active.items()}
            done = {place: status for place, status in statuses.items() if status is not None}
            for place, status in done.items():
                progress, planned, began, _ = active.pop(place)
                free.append(place)
                print(progress, _how_it_ended(planned, status, time.monotonic() - began, signals.number), flush=True)
                if status == 0:
                    when_one_is_done({planned.run.output for _, planned, _, _ in active.values()})
                elif not signals.number:
                    failed.append(planned)
            if not done:
                time.sleep(POLL_SECONDS)
    if failed and not signals.number:
        named = ", ".join(f"{planned.name} ({planned.log_file})" for planned in failed)
        raise RunsFailed(f"{len(failed)} of {len(runs)} runs failed: {named}; the same command tries them again")
    return signals.number


def _how_it_ended(planned: PlannedRun, status: int, seconds: float, signal_number: int) -> str:
    if status == 0:
        return f"{outcome(planned)}, {seconds:.0f} s"
    if signal_number:
        return f"stopped after {seconds:.0f} s; the same command goes on from here"
    return f"failed after {seconds:.0f} s with status {status}, see {planned.log_file}"
