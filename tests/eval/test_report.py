"""What is printed is what is kept, checkpoints have short names, and numbers a form that fits them."""

import json
from pathlib import Path

import pytest

from eval.loading import EvaluationError
from eval.report import labels_of, publish, with_error, with_interval


def test_labels_are_as_short_as_they_can_be() -> None:
    assert list(labels_of([Path("runs/mine/dlcm")])) == ["dlcm"]
    pair = [Path("runs/mine/dlcm"), Path("runs/mine/llama")]
    assert labels_of(pair) == {"dlcm": pair[0], "llama": pair[1]}
    steps = [Path("runs/a/checkpoints/step_1"), Path("runs/b/checkpoints/step_1").absolute()]
    assert list(labels_of(steps)) == ["a/checkpoints/step_1", "b/checkpoints/step_1"]
    assert list(labels_of([Path("runs"), Path("runs/a")])) == ["runs", "runs/a"]
    with pytest.raises(EvaluationError, match="given twice"):
        labels_of([Path("runs/a"), Path("runs/a").absolute()])


def test_a_report_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path / "new", "numbers", ["# Title", "Some text."], rows=[{"a": float("nan")}])
    out = capsys.readouterr().out
    kept = (tmp_path / "new" / "numbers.md").read_text()
    assert out.startswith("# Title\n\nSome text.\n\nFiles:\n") and kept.startswith("# Title\n\nSome text.\n\nMachine: ")
    content = json.loads((tmp_path / "new" / "numbers.json").read_text())
    assert content["rows"] == [{"a": None}] and content["commit"] and content["machine"]


def test_numbers_for_tables() -> None:
    assert with_error(0.1234, 0.0567, 1, 100) == "12.3 ± 5.7"
    assert with_error(1234.5, None, 2) == "1,234.50"
    assert with_error(1.5e12, 2.0, 2) == "1.50e+12 ± 2.00"
    assert with_error(None, None, 2) is None
    assert with_interval({"value": 0.01, "low": -0.002, "high": 0.02}, 1, 100) == "+1.0 [-0.2, +2.0]"
    assert with_interval({"value": -0.5, "low": None, "high": None}, 3) == "-0.500"
