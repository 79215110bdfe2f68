"""Many runs: as many at a time as there are places, each logged, and all of them stopped by one signal."""

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import pytest

from tests.train.conftest import Done
from tests.train.tiny import prepare_tiny, write_config
from train import runs as runs_module
from train.config import load_run_config
from train.runs import PassedOn, PlannedRun, RunsFailed, is_finished, places, run_all, start, write_configs
from train.signals import StopRequests


@pytest.fixture
def planned(tmp_path: Path) -> list[PlannedRun]:
    """Three runs that are never looked into."""
    run = load_run_config(write_config(tmp_path / "run.yaml", "llama", tmp_path / "data", tmp_path / "unused"))
    names = ["a", "b", "c"]
    return [PlannedRun(n, load_run_config(tmp_path / "run.yaml", [f"output={tmp_path / n}"]), 1) for n in names if run]


class Slow:
    """A process that ends when it is told to, or after so many looks."""

    def __init__(self, looks: int, status: int = 0):
        self.looks, self.status, self.signals = looks, status, [0][:0]

    def poll(self) -> int | None:
        self.looks -= 1
        return self.status if self.looks < 0 or self.signals else None

    def send_signal(self, sig: int) -> None:
        self.signals.append(sig)
        self.status = 128 + sig


@pytest.fixture
def without_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "outcome", lambda planned: "done")
    monkeypatch.setattr(runs_module, "POLL_SECONDS", 0.0)


@pytest.mark.usefixtures("without_outcome")
@pytest.mark.parametrize(("number", "most"), [(1, 1), (2, 2), (5, 3)])
def test_as_many_at_a_time_as_there_are_places(
    number: int, most: int, planned: list[PlannedRun], monkeypatch: pytest.MonkeyPatch
):
    active: dict[str, Slow] = {}
    seen: list[tuple[int, str]] = []
    done: list[Set[str]] = []

    def slow(command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> Slow:
        active[log_file.stem] = Slow(looks=3)
        running = sum(process.looks >= 0 for process in active.values())
        seen.append((running, environment["PLACE"]))
        return active[log_file.stem]

    monkeypatch.setattr(runs_module, "start", slow)
    assert run_all(planned, [{"PLACE": str(i)} for i in range(number)], done.append) == 0
    assert list(active) == ["a", "b", "c"] and len(done) == 3 and done[-1] == set()
    assert max(map(len, done)) == most - 1
    assert max(running for running, _ in seen) == most
    assert len({place for _, place in seen}) == most


@pytest.mark.usefixtures("without_outcome")
def test_failures_are_named_when_the_others_are_done(
    planned: list[PlannedRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(runs_module, "start", lambda command, log_file, environment: Done(log_file.stem == "b"))
    with pytest.raises(RunsFailed, match=r"1 of 3 runs failed: b \(.*b\.log\); the same command tries them again"):
        run_all(planned)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "[1/3] a: done, 0 s" and out[1].startswith("[2/3] b: failed") and out[2] == "[3/3] c: done, 0 s"


@pytest.mark.usefixtures("without_outcome")
def test_a_signal_stops_all_and_starts_no_more(
    planned: list[PlannedRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    started: list[Slow] = []

    def slow(*arguments: object) -> Slow:
        started.append(Slow(looks=10**9))
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)  # while the second one is being started: it must hear of it too
        return started[-1]

    monkeypatch.setattr(runs_module, "start", slow)
    handler = signal.getsignal(signal.SIGTERM)
    assert run_all(planned, [{}, {}]) == signal.SIGTERM
    assert [process.signals for process in started] == [[signal.SIGTERM], [signal.SIGTERM]]
    assert capsys.readouterr().out.count("stopped after") == 2
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
        assert requests.number == 0
    finally:
        signal.signal(signal.SIGINT, before)


SIGNALLED = """
import os, signal, sys, time
def stop(number, frame):
    print("saved", os.environ["PLACE"], flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_is_logged_and_hears_signals_once(tmp_path: Path):
    log_file = tmp_path / "log"
    command = [sys.executable, "-c", SIGNALLED]
    with PassedOn() as signals:
        process = start(command, log_file, {"PLACE": "here"})
        signals.started(process)
        while "ready" not in log_file.read_text():
            time.sleep(0.01)
        threading.Timer(0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        while (status := process.poll()) is None:
            time.sleep(0.01)
    assert status == 128 + signal.SIGTERM == 128 + signals.number
    assert log_file.read_text().splitlines() == ["ready", "saved here"]


def test_places(planned: list[PlannedRun], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    on_cpu = [PlannedRun(p.name, load_run_config(p.run.output + ".yaml"), 1) for p in _written(planned, "cpu")]
    anywhere = [PlannedRun(p.name, load_run_config(p.run.output + ".yaml"), 1) for p in _written(planned, "auto")]
    assert places(on_cpu, 3) == [{}, {}, {}]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(anywhere, 2)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(anywhere, 1)] == ["5", "7"]
    assert places([PlannedRun(p.name, p.run, 2) for p in anywhere], 1) == [{}]  # torchrun deals them out


def _written(planned: list[PlannedRun], device: str) -> list[PlannedRun]:
    for one in planned:
        one.run.device = device  # type: ignore[assignment]
    write_configs(planned)
    return planned


def test_a_run_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real thing, once: other tests run in this process."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = prepare_tiny(tmp_path / "prepared")
    write_config(tmp_path / "run.yaml", "llama", data, tmp_path / "one")
    one = PlannedRun("one", load_run_config(tmp_path / "run.yaml"), 1)
    write_configs([one])
    assert run_all([one]) == 0
    assert "finished" in one.log_file.read_text() and is_finished(one.run)
