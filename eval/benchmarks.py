"""Runs lm-eval's tasks on a checkpoint and its baseline: the paper's Table 2, or any others.

    python -m eval.benchmarks RUN_DLCM --baseline RUN_LLAMA
    python -m eval.benchmarks CHECKPOINT --tasks piqa,my_task [--include MY_TASKS/] [--limit 100]

Needs lm-eval (pip install dlcm[benchmarks]), which downloads a task's data when it is first run. `table2`, the default,
is the paper's twelve tasks, zero-shot. The paper does not name their versions, or say what its accuracy is; its figures
are in the range of `acc`, without normalisation by length (26.80 on OpenBookQA, 46.66 on HellaSwag), so that is what
stands beside them. Other tasks are shown with all their metrics.

Writes OUTPUT/benchmarks.json and .md, and prints the latter. The mean is that of the rows above it.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from eval.bench import Row, markdown_table
from eval.loading import EvaluationError, checkpoint_directory, report_errors
from eval.report import labels_of, publish, with_error, with_interval
from eval.scoring import BATCH_ROWS, DTYPES, Dtype
from eval.uncertainty import Ratio, mean_error, mean_paired_difference, paired_difference

TABLE2 = "table2"
ACCURACY = "acc"
SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match")  # metrics that are shown in per cent
BOOTSTRAP = 1_000  # resamples for the standard error of metrics that have no formula for it


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the paper's Table 2, in per cent, and lm-eval's name of the task."""

    label: str
    task: str
    dlcm: float
    baseline: float


PAPER = (
    Published("CommonsenseQA", "commonsense_qa", 21.38, 19.74),
    Published("HellaSwag", "hellaswag", 46.66, 45.99),
    Published("Winogrande", "winogrande", 57.22, 56.20),
    Published("OpenBookQA", "openbookqa", 26.80, 23.80),
    Published("PIQA", "piqa", 75.52, 73.10),
    Published("ARC-C", "arc_challenge", 34.81, 33.04),
    Published("ARC-E", "arc_easy", 69.91, 67.30),
    Published("MMLU", "mmlu", 25.40, 25.70),
    Published("BoolQ", "boolq", 62.54, 64.01),
    Published("RACE", "race", 35.31, 36.03),
    Published("C-Eval", "ceval-valid", 26.08, 24.37),
    Published("CMMLU", "cmmlu", 25.23, 25.47),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of a task: lm-eval's value and standard error, and its samples, where it is their mean."""

    value: float
    error: float | None
    samples: Ratio | None


Results = dict[tuple[str, str], Measured]  # by task and metric


def require_harness() -> None:
    """Raises EvaluationError unless lm-eval is installed."""
    if find_spec("lm_eval") is None:
        raise EvaluationError("lm-eval is not installed: pip install 'dlcm[benchmarks]'; eval.questions needs none")


def task_names(asked: str) -> list[str]:
    """Names of tasks, separated by commas; `table2` stands for its twelve.

    Raises:
        EvaluationError: there is none.
    """
    names: list[str] = []
    for name in filter(None, map(str.strip, asked.split(","))):
        names += [row.task for row in PAPER] if name == TABLE2 else [name]
    if not names:
        raise EvaluationError(f"--tasks '{asked}': give names of tasks, separated by commas, or {TABLE2}")
    return list(dict.fromkeys(names))


def load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """lm-eval's tasks and groups of these names, with their data.

    Raises:
        EvaluationError: there is no such task, its data cannot be had, or it is asked for twice.
    """
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`lm_eval ls tasks` lists all"
            raise EvaluationError(f"--tasks: lm-eval has no task '{name}' ({hint}), nor is it in an --include DIR")
    loaded: list[Any] = []
    for name in names:
        try:
            found = manager.load([name])
        except Exception as error:  # datasets, and the code of tasks, raise what they like
            reason = f"{type(error).__name__}: {error}"
            raise EvaluationError(f"--tasks: the data of '{name}' cannot be loaded ({reason})") from error
        loaded += [found["groups"][name]] if name in found["groups"] else found["tasks"].values()
    try:
        manager.load(loaded)
    except ValueError as error:  # a task and a group that it belongs to
        raise EvaluationError(f"--tasks: {error}; leave one of them out") from error
    return loaded


def shown_names(loaded: Sequence[Any]) -> list[str]:
    """What stands in the table: tasks, and groups that sum theirs up."""
    names: list[str] = []
    for item in loaded:
        if not hasattr(item, "get_all_tasks"):
            names.append(item.task_name)
        elif item.has_aggregation:
            names.append(item.name)
        else:
            names += [task.task_name for task in item.get_all_tasks()]
    return names


def run_tasks(
    path: Path, manager: Any, loaded: Sequence[Any], limit: int | None, batch_size: int, dtype: Dtype
) -> Results:
    """Everything that lm-eval measures of a checkpoint."""
    from lm_eval import simple_evaluate

    from eval.harness import HarnessModel

    model = HarnessModel.from_checkpoint(path, batch_size, dtype)
    return read_results(
        simple_evaluate(model=model, tasks=list(loaded), limit=limit, bootstrap_iters=BOOTSTRAP, task_manager=manager)
    )


def read_results(answer: Mapping[str, Any]) -> Results:
    """The metrics of all tasks and groups in lm-eval's answer."""
    results: Results = {}
    for task, metrics in answer["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            samples = [sample.get(metric) for sample in _samples(answer, task) if sample["filter"] == kind]
            name = metric if kind == "none" else f"{metric},{kind}"
            results[task, name] = Measured(value, error if _is_number(error) else None, _mean_of(samples, value))
    return results


def _samples(answer: Mapping[str, Any], task: str) -> Iterator[Mapping[str, Any]]:
    """Samples of a task, or of all tasks of a group."""
    yield from answer["samples"].get(task, ())
    for member in answer["group_subtasks"].get(task, ()):
        yield from _samples(answer, member)


def _mean_of(samples: Sequence[Any], value: float) -> Ratio | None:
    """The samples, if their mean is the value: some metrics are something else."""
    if not samples or not all(map(_is_number, samples)):
        return None
    ratio = Ratio.mean(samples)
    return ratio if math.isclose(ratio.value, value, abs_tol=1e-9) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


# Rows


def rows_of(names: Sequence[str], ours: Results, theirs: Results | None) -> list[Row]:
    """A row for each metric of each task, with what is known of the baseline, the difference and the paper."""
    published = {row.task: row for row in PAPER}
    rows = []
    for task, metric in ((name, metric) for name in names for task, metric in ours if task == name):
        measured = ours[task, metric]
        row: Row = {"task": task, "metric": metric, "value": measured.value, "error": measured.error}
        if theirs is not None:
            other = theirs[task, metric]
            row |= {"baseline": other.value, "baseline_error": other.error, "difference": None}
            if measured.samples is not None and other.samples is not None:
                row["difference"] = dataclasses.asdict(paired_difference(measured.samples, other.samples, task))
        if metric == ACCURACY and task in published:
            row |= {"paper": published[task].dlcm / 100, "paper_baseline": published[task].baseline / 100}
        rows.append(row)
    return rows


def mean_of(rows: Sequence[Row], ours: Results, theirs: Results | None) -> Row:
    """The mean over rows of Table 2, each counting alike."""
    columns = [name for name in ("value", "baseline", "paper", "paper_baseline") if name in rows[0]]
    mean: Row = {name: float(np.mean([row[name] for row in rows])) for name in columns}
    mean["error"] = mean_error([row["error"] for row in rows])
    if theirs is not None:
        mean["baseline_error"], mean["difference"] = mean_error([row["baseline_error"] for row in rows]), None
        tasks = [row["task"] for row in rows]
        pairs = [(ours[task, ACCURACY].samples, theirs[task, ACCURACY].samples) for task in tasks]
        known = [(mine, other) for mine, other in pairs if mine is not None and other is not None]
        if len(known) == len(rows):
            mean["difference"] = dataclasses.asdict(mean_paired_difference(known, tasks))
    return mean


# Report


def table2(rows: Sequence[Row], mean: Row, checkpoint: str, baseline: str | None) -> str:
    """The paper's Table 2, in per cent, ours beside it."""
    labels = {row.task: row.label for row in PAPER}
    header = ["task", "DLCM, paper", "baseline, paper", checkpoint]
    header += [] if baseline is None else [baseline, "difference"]
    lines: list[list[str | None]] = []
    for row in [*rows, mean]:
        line: list[str | None] = [labels[row["task"]] if "task" in row else "mean"]
        line += [f"{100 * row[name]:.2f}" for name in ("paper", "paper_baseline")]
        line += measured_cells(row, 100, baseline is not None)
        lines.append(line)
    return markdown_table(header, lines)


def metrics_table(rows: Sequence[Row], checkpoint: str, baseline: str | None) -> str:
    """All metrics as lm-eval gives them, shares in per cent."""
    header = ["task", "metric", checkpoint] + ([] if baseline is None else [baseline, "difference"])
    lines: list[list[str | None]] = []
    for row in rows:
        is_share = row["metric"].partition(",")[0] in SHARES
        cells = measured_cells(row, 100 if is_share else 1, baseline is not None)
        lines.append([row["task"], row["metric"] + ", %" * is_share, *cells])
    return markdown_table(header, lines)


def measured_cells(row: Row, scale: float, has_baseline: bool) -> list[str | None]:
    cells: list[str | None] = [with_error(row["value"], row["error"], 2, scale)]
    if has_baseline:
        difference = row["difference"]
        cells.append(with_error(row["baseline"], row["baseline_error"], 2, scale))
        cells.append(None if difference is None else with_interval(difference, 2, scale))
    return cells


def open_manager(include: Path | None) -> Any:
    """lm-eval's index of tasks, which it makes anew each time, in some ten seconds."""
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise EvaluationError(f"--include {include}: no such directory; give one with YAML files of tasks")
    return TaskManager(include_path=None if include is None else str(include))


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    require_harness()
    names = task_names(options.tasks)
    if options.limit is not None and options.limit < 1:
        raise EvaluationError(f"--limit {options.limit}: must be at least 1")
    paths = labels_of([options.checkpoint] + ([] if options.baseline is None else [options.baseline]))
    for path in paths.values():
        checkpoint_directory(path)  # before the index of tasks and their data, which take a while
    manager = open_manager(options.include)
    loaded = load_tasks(manager, names)

    found = {
        name: run_tasks(path, manager, loaded, options.limit, options.batch_size, options.dtype)
        for name, path in paths.items()
    }
    (checkpoint, ours), *others = found.items()
    baseline, theirs = others[0] if others else (None, None)
    rows = rows_of(shown_names(loaded), ours, theirs)
    published, unpublished = [row for row in rows if "paper" in row], [row for row in rows if "paper" not in row]
    mean = mean_of(published, ours, theirs) if published else None
    parts = ["# Benchmarks"]
    if options.limit is not None:
        parts.append(f"The first {options.limit:,} questions of each task alone.")
    if mean is not None:
        parts += ["## Table 2, accuracy in per cent", table2(published, mean, checkpoint, baseline)]
    if unpublished:
        parts += ["## Metrics", metrics_table(unpublished, checkpoint, baseline)]
    publish(
        options.output or options.checkpoint.parent / "benchmarks",
        "benchmarks",
        parts,
        lm_eval=importlib.metadata.version("lm_eval"),
        checkpoint=str(options.checkpoint),
        baseline=None if options.baseline is None else str(options.baseline),
        limit=options.limit,
        dtype=options.dtype,
        rows=rows,
        mean=mean,
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.benchmarks", description="Runs lm-eval's tasks.")
    parser.add_argument("checkpoint", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument("--baseline", type=Path, metavar="CHECKPOINT", help="compared question by question")
    parser.add_argument("--tasks", default=TABLE2, help="lm-eval's names, separated by commas (default: %(default)s)")
    parser.add_argument("--include", type=Path, metavar="DIR", help="YAML files of your own tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument("--output", type=Path, help="where to write (default: `benchmarks` beside CHECKPOINT)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=BATCH_ROWS, help="rows read at a time (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
