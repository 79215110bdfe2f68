"""Bars, tables and files of the benchmarks."""

import csv
import json
from pathlib import Path

import pytest

from eval.bench import Bar, bars_table, find, markdown_table, one_line, record, worst, write_csv, write_json


@pytest.mark.parametrize(
    ("bar", "holds"),
    [
        (Bar(2.0, 2.0), True),
        (Bar(1.99, 2.0), False),
        (Bar(2.0, 2.0, at_most=True), True),
        (Bar(2.01, 2.0, at_most=True), False),
        (Bar(None, 0.0), False),
        (Bar(float("nan"), 0.0), False),
        (Bar(float("nan"), 0.0, at_most=True), False),
    ],
)
def test_a_bar_holds_at_its_target_and_not_unmeasured(bar: Bar, holds: bool) -> None:
    assert bar.holds == holds


def test_worst_decides_over_all_or_not_at_all() -> None:
    assert worst([3.0, 1.0, 2.0]) == 1 and worst([3.0, 1.0], at_most=True) == 3
    assert worst([]) is None and worst([3.0, None]) is None


def test_find_wants_one_row() -> None:
    rows = [{"a": 1, "b": 2}, {"a": 1, "b": 3}]
    assert find(rows, a=1, b=3) == rows[1] and find(rows, a=2) == {}
    with pytest.raises(AssertionError, match="2 rows"):
        find(rows, a=1)


def test_json_has_the_record_the_bars_and_the_rest(tmp_path: Path) -> None:
    recorded = record(commit="abc")
    assert recorded["commit"] == "abc" and recorded["versions"]["torch"] and recorded["machine"]["device"]
    path = tmp_path / "new" / "results.json"
    write_json(path, recorded, {"fast": Bar(1.5, 2.0), "small": Bar(1.5, 2.0, at_most=True)}, rows=[{"a": 1}])
    content = json.loads(path.read_text())
    assert content["must_show"]["fast"] == {"value": 1.5, "target": 2.0, "holds": False}
    assert content["must_show"]["small"]["holds"] and content["rows"] == [{"a": 1}]
    assert {"machine", "commit", "versions", "command"} <= set(content)
    write_json(path, recorded, {"broken": Bar(float("nan"), 1.0)}, rows=[{"a": float("inf")}])
    content = json.loads(path.read_text())
    assert content["must_show"]["broken"] == {"value": None, "target": 1.0, "holds": False}
    assert content["rows"] == [{"a": None}]


def test_csv_has_every_column_once(tmp_path: Path) -> None:
    write_csv(tmp_path / "rows.csv", [{"a": 1, "b": 2}, {"a": 3, "c": 4}])
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.reader(file)) == [["a", "b", "c"], ["1", "2", ""], ["3", "", "4"]]


def test_tables() -> None:
    assert markdown_table(("a", "b"), [(1, None)]).splitlines() == ["| a | b |", "| :-- | --: |", "| 1 | - |"]
    table = bars_table({"x": Bar(1.234, 2), "y": Bar(None, 3, at_most=True)})
    assert "| x | 1.23 | at least 2 | **no** |" in table and "| y | - | at most 3 | **no** |" in table


def test_an_error_is_one_short_line() -> None:
    assert one_line(RuntimeError("a\n  b")) == "error: a b" and one_line(KeyError()) == "error: KeyError"
    assert len(one_line(RuntimeError("x" * 500))) < 180
