"""What a run reports: metrics as JSON lines (and to TensorBoard where it is installed), and a progress bar.

The file of an interrupted and resumed run equals that of an uninterrupted one, apart from `WALL_CLOCK`.
"""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"
WALL_CLOCK = ("tokens_per_second", "mfu")

Kind = Literal["train", "validation"]


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Bits per byte of text whose targets cost `nats` in all and stand for `num_bytes` of UTF-8."""
    return nats / math.log(2) / num_bytes


class MetricsError(ValueError):
    """A metrics file that cannot be written, or that this code did not write."""


class MetricsLog:
    """Appends to RUN/metrics.jsonl, one object a line, and mirrors it to RUN/tensorboard.

    Lines of steps after `resumed_step` are dropped first: those steps are about to be repeated. A log that is
    not `active` does nothing: of several ranks, one reports.

    Raises:
        MetricsError: there is an older file to continue, and it is none of ours; names the line. Or the disk refused
            (full, for example), here or in any method; names the file.
    """

    def __init__(self, run_dir: Path, resumed_step: int = 0, active: bool = True):
        self._file = self._tensorboard = None
        if not active:
            return
        self._path = path = run_dir / METRICS_FILE
        kept = [line for line in read_metrics(run_dir) if line["step"] <= resumed_step] if resumed_step else []
        shortened = path.with_suffix(".tmp")
        with refusals_named(path):
            shortened.write_text("".join(map(_to_line, kept)), encoding="utf-8")
            shortened.replace(path)
            self._file = path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Adds one line, out of this process when it returns; numbers that are not finite become null."""
        if self._file is None:
            return
        with refusals_named(self._path):
            self._file.write(_to_line({"kind": kind, "step": step, **values}))
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            with refusals_named(self._path):  # writes again what was refused before
                self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl in order; none where there is no file.

    Raises:
        MetricsError: a line is not a JSON object with a step; names file and line.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    # A run that was killed may leave a last line without its end: that line was never reported.
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [_from_line(line, path, number) for number, line in enumerate(complete.splitlines(), 1)]


class Throughput:
    """Tokens per second since the last `restart`, which leaves out evaluations and checkpoints."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self._tokens, self._since = 0, self._clock()

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def rate(self) -> float:
        return self._tokens / max(self._clock() - self._since, 1e-9)


def progress_bar(steps: int, done: int, shown: bool) -> tqdm:
    """A bar over the steps of a run with tqdm's own estimate of the time left; only on a terminal."""
    return tqdm(
        total=steps,
        initial=done,
        unit="step",
        disable=not (shown and sys.stderr.isatty()),
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
    )


def show_progress(bar: tqdm, values: Mapping[str, float]) -> None:
    """Puts the numbers one watches beside the bar."""
    shown = {"loss": f"{values['loss']:.3f}", "bpb": f"{values['bpb']:.3f}"}
    if "tokens_per_concept" in values:
        shown["tok/concept"] = f"{values['tokens_per_concept']:.2f}"
    bar.set_postfix({**shown, "tok/s": f"{values['tokens_per_second']:.0f}"}, refresh=False)


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """The operating system's errors of writing, unlike those of opening, do not say which file they are about."""
    try:
        yield
    except OSError as error:
        raise MetricsError(
            f"{path}: could not be written ({error}); make room, then continue with --resume {path.parent}"
        ) from error


def _to_line(values: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _from_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
        assert isinstance(values["step"], int)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise MetricsError(f"{path}, line {number}: not a line of metrics; move the file away to go on") from error
    return values
