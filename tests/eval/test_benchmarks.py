"""Table 2 is the paper's and ours comes from rows; lm-eval's own tasks, its absence, and errors in one line."""

import functools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from eval import benchmarks
from eval.benchmarks import PAPER, Measured, main, mean_of, metrics_table, read_results, rows_of, table2, task_names
from eval.loading import EvaluationError
from eval.uncertainty import Ratio
from tests.eval.conftest import Trained
from tests.eval.tasks import CHOICE, GENERATION, GROUP, QUESTIONS, ROLLING, write_tasks

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed (pip install dlcm[benchmarks])"
)


def results(shares: Sequence[float], questions: int = 40) -> dict[tuple[str, str], Measured]:
    """Accuracies of the paper's tasks in its order, and another metric of the first."""
    found = {}
    for row, share in zip(PAPER, shares, strict=True):
        right = round(share * questions)
        samples = Ratio.mean([1.0] * right + [0.0] * (questions - right))
        found[row.task, "acc"] = Measured(samples.value, samples.error, samples)
    return found | {("piqa", "acc_norm"): Measured(0.5, None, None)}


OURS = results([0.1 * (1 + number % 5) for number in range(12)])
THEIRS = results([0.3] * 12)
NAMES = [row.task for row in PAPER]


def test_the_papers_figures_and_what_is_computed_from_them() -> None:
    assert len(PAPER) == 12
    assert statistics.mean(row.dlcm for row in PAPER) == pytest.approx(42.24, abs=0.01)  # the paper says 43.92
    assert statistics.mean(row.baseline for row in PAPER) == pytest.approx(41.23, abs=0.01)


def test_names_of_tasks() -> None:
    assert task_names("table2") == NAMES
    assert task_names("piqa, mine,piqa") == ["piqa", "mine"]
    assert task_names("mine,table2") == ["mine", *NAMES]
    with pytest.raises(EvaluationError, match="give names of tasks"):
        task_names(" ,")


def test_table_is_the_papers_with_ours_beside_it() -> None:
    rows = rows_of(NAMES, OURS, THEIRS)
    assert [(row["task"], row["metric"]) for row in rows if row["metric"] != "acc"] == [("piqa", "acc_norm")]
    published = [row for row in rows if "paper" in row]
    assert [row["task"] for row in published] == NAMES
    mean = mean_of(published, OURS, THEIRS)
    assert mean["value"] == pytest.approx(statistics.mean(row["value"] for row in published))
    assert mean["error"] == pytest.approx(math.hypot(*(row["error"] for row in published)) / 12)
    assert mean["difference"]["value"] == pytest.approx(mean["value"] - mean["baseline"])
    assert mean["difference"]["low"] < mean["difference"]["value"] < mean["difference"]["high"]
    lines = table2(published, mean, "dlcm", "llama").splitlines()
    assert lines[0] == "| task | DLCM, paper | baseline, paper | dlcm | llama | difference |"
    assert lines[2].startswith("| CommonsenseQA | 21.38 | 19.74 | 10.00 ± 4.80 | 30.00 ± 7.34 | -20.00 [")
    assert lines[-1].startswith("| mean | 42.24 | 41.23 | 27.50 ± 1.96 | 30.00 ± 2.12 | -2.50 [")
    assert len(lines) == 15


def test_without_a_baseline_there_is_no_difference() -> None:
    rows = [row for row in rows_of(NAMES, OURS, None) if "paper" in row]
    lines = table2(rows, mean_of(rows, OURS, None), "dlcm", None).splitlines()
    assert lines[0] == "| task | DLCM, paper | baseline, paper | dlcm |"
    assert "difference" not in rows[0] and "baseline" not in rows[0]


def test_what_is_no_mean_has_no_difference() -> None:
    rows = rows_of(["piqa"], OURS, THEIRS)
    assert [row["difference"] is None for row in rows] == [False, True]
    assert metrics_table(rows, "dlcm", "llama").splitlines()[-1] == "| piqa | acc_norm, % | 50.00 | 50.00 | - |"


def test_results_are_lm_evals() -> None:
    answer = {
        "results": {
            "group": {"alias": "group", "acc,none": 0.6, "acc_stderr,none": 0.2},
            "first": {"name": "first", "acc,none": 1.0, "acc_stderr,none": "N/A", "sample_len": 2},
            "second": {"acc,none": 1 / 3, "f1,none": 0.7, "acc,strict": 0.0},
        },
        "group_subtasks": {"group": ["first", "second"]},
        "samples": {
            "first": [{"filter": "none", "acc": 1.0}] * 2,
            "second": [
                {"filter": kind, "acc": acc, "f1": (0, 1)} for kind in ("none", "strict") for acc in (1.0, 0, 0)
            ],
        },
    }
    found = read_results(answer)
    assert set(found) == {
        ("group", "acc"),
        ("first", "acc"),
        ("second", "acc"),
        ("second", "f1"),
        ("second", "acc,strict"),
    }
    group = found["group", "acc"]
    assert group.value == 0.6 and group.error == 0.2
    assert group.samples is not None and group.samples.part_N.tolist() == [1, 1, 1, 0, 0]
    assert found["first", "acc"].error is None
    assert found["second", "f1"].samples is None
    assert found["second", "acc,strict"].samples is None  # whose mean it is not


# The command


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own, which take some ten seconds to list."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


@needs_lm_eval
def test_table2_names_tasks_that_lm_eval_has() -> None:
    import lm_eval.tasks
    from lm_eval.tasks._index import TaskIndex

    tasks = Path(lm_eval.tasks.__file__).parent
    folders = ("arc", "ceval", "cmmlu", "commonsense_qa", "hellaswag", "mmlu/default", "openbookqa", "piqa", "race")
    index = TaskIndex().build([tasks / folder for folder in (*folders, "super_glue/boolq", "winogrande")])
    assert set(NAMES) <= set(index)


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
def test_command_runs_any_task(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    piqa: dict[str, Any] = CHOICE | {"task": "piqa"}  # stands for the real one, whose data is not here
    include = write_tasks(
        tmp_path / "tasks", piqa, CHOICE, CHOICE | {"task": "local_other"}, GROUP, ROLLING, GENERATION
    )
    output = tmp_path / "output"
    arguments = [trained.dlcm, "--baseline", trained.llama, "--include", include, "--output", output]
    code, out, _ = run([*arguments, "--tasks", "piqa,local_group,local_rolling,local_generation"], capsys)
    assert code == 0
    assert out.startswith((output / "benchmarks.md").read_text().split("\n\nMachine")[0])
    assert "| task | DLCM, paper | baseline, paper | dlcm | llama | difference |" in out
    assert "| PIQA | 75.52 | 73.10 |" in out and "| mean | 75.52 | 73.10 |" in out
    report = json.loads((output / "benchmarks.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in report["rows"]}
    assert set(rows) == {
        *(("piqa", metric) for metric in ("acc", "acc_norm", "acc_bytes")),
        ("local_group", "acc"),
        ("local_rolling", "bits_per_byte"),
        ("local_generation", "exact_match"),
    }
    assert rows["piqa", "acc"]["value"] == rows["local_group", "acc"]["value"] == report["mean"]["value"]
    assert rows["local_group", "acc"]["difference"] is not None
    assert rows["local_rolling", "bits_per_byte"]["difference"] is None  # no mean of samples
    assert rows["local_rolling", "bits_per_byte"]["value"] > 1
    assert report["lm_eval"].startswith("0.4")

    code, out, _ = run(
        [trained.llama, "--include", include, "--output", output, "--tasks", "local_choice", "--limit", 2], capsys
    )
    assert code == 0 and "The first 2 questions" in out and "## Table 2" not in out
    (row, *_) = json.loads((output / "benchmarks.json").read_text())["rows"]
    assert row["value"] * 2 == round(row["value"] * 2)


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
def test_bad_requests_are_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    include = write_tasks(tmp_path / "tasks", CHOICE)
    group = write_tasks(tmp_path / "group", CHOICE, CHOICE | {"task": "local_other"}, GROUP)
    gone = write_tasks(tmp_path / "gone", CHOICE)
    (gone / "rows.jsonl").unlink()
    empty = write_tasks(tmp_path / "empty", CHOICE, rows=[])
    long = write_tasks(tmp_path / "long", CHOICE, rows=[QUESTIONS[1] | {"choices": ["x" * 300, "y"]}])
    for arguments, message in (
        (["--include", include, "--tasks", "local_choise"], "no task 'local_choise' (did you mean 'local_choice'?)"),
        (["--include", include, "--tasks", "qqq"], "no task 'qqq' (`lm_eval ls tasks` lists all)"),
        (["--include", include, "--tasks", ","], "give names of tasks"),
        (["--include", group, "--tasks", "local_group,local_choice"], "'local_choice': found in both"),
        (["--include", include, "--baseline", trained.dlcm], "is given twice"),
        (["--include", include, "--limit", 0], "--limit 0"),
        (["--include", tmp_path / "none"], "no such directory"),
        (["--include", gone, "--tasks", "local_choice"], "the data of 'local_choice' cannot be loaded"),
        (["--include", empty, "--tasks", "local_choice"], "the data of 'local_choice' cannot be loaded"),
        (["--include", long, "--tasks", "local_choice"], "301 tokens, the model 256 positions"),
    ):
        code, out, err = run([trained.dlcm, *arguments, "--output", tmp_path], capsys)
        assert code == 2 and "Table 2" not in out
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert message in line


def test_without_lm_eval_the_remedy_is_named(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = run([trained.dlcm], capsys)
    assert (code, out) == (2, "")
    assert err == "error: lm-eval is not installed: pip install 'dlcm[benchmarks]'; eval.questions needs none\n"
    assert benchmarks.__doc__ and "pip install dlcm[benchmarks]" in benchmarks.__doc__
