"""The benchmark of scoring: it writes what it measured, and its bars can fail."""

import json
from pathlib import Path

from eval.bench_questions import main, must_show
from tests.eval.conftest import Trained
from tests.eval.test_questions import ROWS, write_rows


def test_writes_what_it_measured(trained: Trained, tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "questions.jsonl", ROWS)
    runs = [str(trained.dlcm), str(trained.llama)]
    assert main([*runs, "--questions", str(questions), "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert all(bar["holds"] for bar in written["must_show"].values()) and len(written["must_show"]) == 2
    dlcm, llama = written["rows"]
    assert dlcm["questions"] == llama["questions"] == len(ROWS) and llama["boundaries"] == 0
    assert 0 <= dlcm["boundaries"] < dlcm["tokens"] and dlcm["largest_difference"] < 1e-4
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert f"| {dlcm['checkpoint']} |" in page and "The questions of questions.jsonl" in page


def test_bars_can_fail() -> None:
    good = {"seconds": 100.0, "largest_difference": 1e-6}
    assert all(bar.holds for bar in must_show([good, good]).values())
    bad = must_show([good, good | {"seconds": 200.0}, good | {"largest_difference": 1e-3}])
    assert not any(bar.holds for bar in bad.values())
    assert not any(bar.holds for bar in must_show([]).values())
