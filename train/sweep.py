"""A sweep: one run for every combination of a few settings.

    python -m train.sweep SWEEP.yaml ...            runs what is not finished, several at a time
    python -m train.sweep SWEEP.yaml ... --list     the runs, and nothing else
    python -m train.sweep SWEEP.yaml ... --print    writes the configurations and prints the commands, for a cluster

Of several sweeps, all runs stand in one queue, so that no GPU waits for the last run of each; there are as many at a
time as the most that one of them asks for.

SWEEP.yaml holds the fields of `SweepConfig`: a base run, and axes. A point of an axis is a label and the keys of the
run that it sets; a run is one point of every axis, and its name their labels:

    base: proxy.yaml
    output: runs/mup/transfer
    at_once: 4                                  # on each GPU, or on the CPU
    axes:
      size:
        d256: {model.d_token: 256, model.token_heads: 4}
        d512: {model.d_token: 512, model.token_heads: 8}
      rate:
        "1e-3": {optimizer.lr_token: 1.0e-3, optimizer.lr_other: 1.0e-3}
        "2e-3": {optimizer.lr_token: 2.0e-3, optimizer.lr_other: 2.0e-3}

A point may name another `base` for its runs, so that an axis can hold different models: `llama: {base: llama.yaml}`.

    OUTPUT/NAME.*, OUTPUT/NAME/    a run (see train/runs.py)
    OUTPUT/results.jsonl           a line for each run that is finished: name, labels, tokens, its last validation, the
                                   device, versions and commit it ended with, and its configuration

A run of which there is a line, with its very configuration, is not run again, though nothing else of it be there: a
sweep goes on from results.jsonl alone, on another machine too. (What a report reads beside results, as curves or
checkpoints, is gone then.)
"""

import argparse
import dataclasses
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dlcm.flops import forward_flops, parameter_counts
from train.config import ConfigError, RunConfig, build_model_config, config_differences, load_run_config
from train.environment import last_place
from train.runs import (
    PlannedRun,
    Running,
    add_instead_of_running,
    carry_out,
    columns,
    is_finished,
    last_validation,
    read_plan,
    report_errors,
)

RESULTS = "results.jsonl"
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # what a file name can be made of


@dataclass
class SweepConfig:
    """What SWEEP.yaml holds."""

    base: str | None = None  # YAML of a run, relative to this file; its output is not used. Points may name others
    output: str = MISSING
    axes: dict[str, Any] = MISSING  # axis: {label: {key of the run: value}}
    at_once: int = 1  # runs at a time, on each GPU or on the CPU
    processes: int = 1  # of one run, data-parallel, by torchrun
    keep_checkpoints: bool = True  # of finished runs; many runs of large models fill a disk


@dataclass(frozen=True, slots=True)
class SweptRun(PlannedRun):
    """A run, and the label it has on each axis."""

    labels: dict[str, str]


def load_sweep(path: Path) -> tuple[SweepConfig, list[SweptRun]]:
    """The sweep that a YAML file describes, and its runs, the last axis turning fastest.

    Raises:
        ConfigError: not readable, an unknown key, a wrong type, or a run that is no run.
    """
    sweep = read_plan(path, SweepConfig)
    if not sweep.axes:
        raise ConfigError(f"{path}: axes is empty; give at least one")
    for axis, axis_points in sweep.axes.items():
        _check_axis(f"{path}: axes.{axis}", axis_points)
    runs = []
    for points in itertools.product(*(axis.items() for axis in sweep.axes.values())):
        name = "_".join(label for label, _ in points)
        settings = {key: value for _, values in points for key, value in values.items()}
        base = settings.pop("base", sweep.base)
        if base is None or sum("base" in values for _, values in points) > 1:
            raise ConfigError(f"{path}: {name}: no base, or several; name one, of the sweep or at points of one axis")
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        output = f"output={json.dumps(str(Path(sweep.output) / name))}"
        try:
            run = load_run_config(path.parent / str(base), [*overrides, output])
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from error
        labels = dict(zip(sweep.axes, (label for label, _ in points), strict=True))
        runs.append(SweptRun(name, run, sweep.processes, labels))
    return sweep, runs


def _check_axis(where: str, points: Any) -> None:
    if not isinstance(points, dict) or not points:
        raise ConfigError(f"{where} must hold points, `label: {{key: value}}`, at least one")
    for label, settings in points.items():
        if not isinstance(label, str):
            raise ConfigError(f"{where}: YAML reads the label {label!r} as a {type(label).__name__}; put it in quotes")
        if not LABEL.fullmatch(label):
            raise ConfigError(f"{where}: {label!r} will be part of a file name; use letters and digits")
        if not isinstance(settings, dict):
            raise ConfigError(f"{where}.{label} is {settings!r}; give the keys that it sets, `{{key: value}}`")


Results = dict[str, dict[str, Any]]  # a line by the name of its run


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file.

    Raises:
        ConfigError: not there, not readable, or not written by a sweep.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there are no results yet; run train.sweep first")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line in lines:
            if Path(line["name"]).name != line["name"]:
                raise ValueError(f"{line['name']!r} is no name of a run")
            dict(line["labels"]), line["validation"]["loss"], dict(line["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: no results of a sweep ({error!r}); delete it, or put it back as it was") from error
    return lines


def read_results(runs: Sequence[SweptRun], path: Path) -> Results:
    """What a results file, if there is one, says of these very runs: lines of other configurations are left out.

    Raises:
        ConfigError: see `read_lines`.
    """
    if not path.exists():
        return {}
    known = {run.name: run.run for run in runs}
    return {line["name"]: line for line in read_lines(path) if _is_of(line, known.get(line["name"]))}


def _is_of(line: dict[str, Any], run: RunConfig | None) -> bool:
    """Whether a line was written of this run. Options that it does not know had their defaults."""
    if run is None:
        return False
    try:
        whole = OmegaConf.merge(OmegaConf.structured(RunConfig), line["run"], {"output": run.output})
        recorded = OmegaConf.to_object(whole)
    except OmegaConfBaseException:  # options that are no more
        return False
    assert isinstance(recorded, RunConfig)
    return not config_differences(recorded, run)


def write_results(runs: Sequence[SweptRun], path: Path, earlier: Results, running: Running) -> list[SweptRun]:
    """Writes what is known of runs: what they themselves have recorded, or `earlier` lines. Returns the former.

    Those that are running are left out: one that saves its last checkpoint has all that is recorded, and is not
    finished.
    """
    finished = [
        run for run in runs if run.name not in earlier and run.run.output not in running and is_finished(run.run)
    ]
    lines = dict(earlier)
    for run in finished:
        line = {"name": run.name, "labels": run.labels, "tokens": run.tokens, "validation": last_validation(run.run)}
        line |= last_place(Path(run.run.output))
        configuration = dataclasses.asdict(run.run)
        del configuration["output"]
        lines[run.name] = line | {"run": configuration}
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(json.dumps(lines[run.name]) + "\n" for run in runs if run.name in lines), "utf-8")
    temporary.replace(path)
    return finished


def table(runs: Sequence[SweptRun]) -> str:
    """The runs, one a line."""
    rows = [("name", "parameters", "MFLOP / token", "tokens")]
    for run in runs:
        config = build_model_config(run.run)
        flops = forward_flops(config, run.run.data.sequence_length).total
        number = sum(parameter_counts(config).values())
        rows.append((run.name, f"{number:,}", f"{flops / 1e6:,.3f}", f"{run.tokens:,}"))
    return columns(rows)


@dataclass(frozen=True)
class Sweep:
    """A sweep, its runs, and the results that there were before."""

    config: SweepConfig
    runs: list[SweptRun]
    earlier: Results

    @classmethod
    def read(cls, path: Path) -> "Sweep":
        """Raises ConfigError: see `load_sweep` and `read_results`."""
        config, runs = load_sweep(path)
        return cls(config, runs, read_results(runs, Path(config.output) / RESULTS))

    @property
    def left(self) -> list[SweptRun]:
        return [run for run in self.runs if run.name not in self.earlier]

    def keep_results(self, running: Running) -> None:
        """Writes results of runs that have ended, and deletes their checkpoints if they are not to be kept."""
        for run in write_results(self.runs, Path(self.config.output) / RESULTS, self.earlier, running):
            if not self.config.keep_checkpoints:
                shutil.rmtree(Path(run.run.output) / "checkpoints", ignore_errors=True)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.sweep", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP.yaml", help="a base run, and axes")
    add_instead_of_running(parser)
    return parser.parse_args(argv)


@report_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 done, 2 an error, 128 + N stopped by signal N."""
    arguments = parse_arguments(argv)
    sweeps = [Sweep.read(path) for path in arguments.sweeps]
    runs = [run for sweep in sweeps for run in sweep.runs]
    for output, number in Counter(sweep.config.output for sweep in sweeps).items():
        if number > 1:
            raise ConfigError(f"{number} sweeps have the output {output}, and would write over each other; name one")
    left = [run for sweep in sweeps for run in sweep.left]

    def keep_results(running: Running) -> None:
        for sweep in sweeps:
            sweep.keep_results(running)

    if len(left) < len(runs) and not arguments.list:
        print(f"{len(runs) - len(left)} of {len(runs)} runs were finished before", file=sys.stderr)
    at_once = max(sweep.config.at_once for sweep in sweeps)
    status = carry_out(left, arguments, lambda: table(runs), at_once, keep_results)
    if not (arguments.list or arguments.print):
        keep_results(set())
    return status


if __name__ == "__main__":
    sys.exit(main())
