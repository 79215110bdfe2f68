"""Kills a run with SIGKILL again and again, restarts it, and compares what it comes to with a run left alone.

    python -m tests.train.killing [--moments 20] [--seed 0]

Moments are drawn from the seed, as far as a clock allows: in the middle of a step, while the process starts, and (every
other one) while a checkpoint is being written. Before each restart the newest checkpoint must be good, and at most one
interval of steps lost, or two where a checkpoint was being written; at the end parameters, optimizer and metrics must
be those of the other run, bit for bit.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.ranks import PRELOADED
from tests.train.tiny import prepare_tiny, write_config
from train.checkpoint import half_written, latest_checkpoint
from train.metrics import METRICS_FILE, WALL_CLOCK, read_metrics
from train.pretrain import main as pretrain
from train.pretrain import step_to_continue

EVERY = 2  # steps from one checkpoint to the next
STEPS_A_MOMENT = 12  # enough that no run is finished before its last moment has come
MOMENTS = ("write", "step", "write", "start")
PATIENCE = 120  # seconds for a process to come to its moment
STARTS = multiprocessing.get_context("forkserver")  # processes are copies of one that has done the imports


@dataclass(frozen=True)
class Kill:
    """What one kill found: the last step that was reported, the one to go on from, and whether a write was cut."""

    moment: str
    reported: int
    continued: int
    half_written: bool


def kill_once(config: Path, run_dir: Path, moment: str, draw: random.Random) -> Kill:
    """Starts the run and kills it at its moment.

    Raises:
        RuntimeError: the run ended before, or its moment did not come.
    """
    metrics = run_dir / METRICS_FILE
    before, left = metrics.stat().st_ino if metrics.exists() else None, _partials(run_dir)
    start, after, delay = step_to_continue(run_dir), draw.randint(1, 2 * EVERY + 1), draw.random()
    process = STARTS.Process(target=_run, args=(config, run_dir.parent / "said.txt"))
    process.start()
    assert process.pid is not None
    try:
        if moment == "start":
            time.sleep(0.3 * delay)
        else:  # a process writes the file of metrics anew, and then appends to it
            _wait(process, lambda: metrics.exists() and metrics.stat().st_ino != before and _step(run_dir) > start)
            _wait(process, lambda: _step(run_dir) >= start + after)
        if moment == "step":
            time.sleep(0.02 * delay)
        while moment == "write":
            _wait(process, lambda: not _partials(run_dir) <= left)
            time.sleep(0.005 * delay)
            os.kill(process.pid, signal.SIGSTOP)  # then there is time to see whether it is still at it
            time.sleep(0.01)
            if not _partials(run_dir) <= left:
                break
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.join()
    return Kill(moment, _step(run_dir), step_to_continue(run_dir), not _partials(run_dir) <= left)


def _run(config: Path, said: Path) -> None:
    with said.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    sys.exit(pretrain([str(config)]))


def _wait(process: BaseProcess, moment: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not moment():
        if process.exitcode is not None:
            raise RuntimeError(f"the run ended before it was killed, with status {process.exitcode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the moment to kill did not come in {PATIENCE} seconds")
        time.sleep(0.0002)


def _partials(run_dir: Path) -> set[tuple[str, int]]:
    """Half-written checkpoints; what an earlier kill left does not change."""
    found = set()
    for partial in half_written(run_dir):
        with suppress(FileNotFoundError):  # finished meanwhile
            found.add((partial.name, partial.stat().st_mtime_ns))
    return found


def _step(run_dir: Path) -> int:
    """The last step that was reported."""
    return max((line["step"] for line in read_metrics(run_dir)), default=0)


def _results(run_dir: Path) -> list[object]:
    """All that two equal runs have in common."""
    checkpoint = latest_checkpoint(run_dir)
    tensors = [(checkpoint / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]
    clockless = [{key: line[key] for key in line.keys() - set(WALL_CLOCK)} for line in read_metrics(run_dir)]
    return [checkpoint.name, *tensors, clockless]


def main(argv: Sequence[str] | None = None) -> list[Kill]:
    """Runs the command line; raises AssertionError or RuntimeError where a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.train.killing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--moments", type=int, default=20, help="how often to kill (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    arguments = parser.parse_args(argv)
    draw, kills = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = prepare_tiny(directory)
        configs = {
            run: write_config(
                directory / f"{run}.yaml",
                "dlcm",
                data,
                directory / run,
                schedule={"steps": STEPS_A_MOMENT * arguments.moments},
                checkpoint={"every": EVERY},
                evaluation={"every": 5, "max_tokens": 200},
            )
            for run in ("killed", "alone")
        }
        run_dir = directory / "killed"
        STARTS.set_forkserver_preload(PRELOADED)
        for number in range(arguments.moments):
            kill = kill_once(configs["killed"], run_dir, MOMENTS[number % len(MOMENTS)], draw)
            print(kill, flush=True)
            kills.append(kill)
            # While one checkpoint is being written there is only the one before.
            assert kill.reported - kill.continued <= EVERY * (1 + kill.half_written), kill
        assert kills == sorted(kills, key=lambda kill: kill.continued), "a restart went back"
        for config in configs.values():
            assert pretrain([str(config)]) == 0
        assert _results(run_dir) == _results(directory / "alone"), "the killed run came to something else"
    written = sum(kill.half_written for kill in kills)
    print(f"{len(kills)} kills, {written} of them while a checkpoint was written: bit for bit the run left alone")
    return kills


if __name__ == "__main__":
    main()
