"""The benchmark of the loader: it measures real batches, takes its target from a file, and its bars can fail."""

import json
from pathlib import Path
from typing import Any

import pytest

from eval.bench_loader import LONG_RUN, WEIGHTS, main, make_source, must_show
from train.config import load_run_config
from train.data import TokenShards

ROOT = Path(__file__).parents[2]
GPU = {"part": "throughput", "pair": "small", "model": "llama", "tokens_per_second": 1000.0, "parameters": 5}


def results(directory: Path, rows: list[dict[str, Any]]) -> Path:
    (directory / "training.json").write_text(json.dumps({"machine": {"device": "a GPU"}, "rows": rows}))
    return directory


def test_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.bench_loader.SHAPES", ((2, 64), (1, 256)))
    monkeypatch.setattr("eval.bench_loader.LONG_RUN", 10**8)
    slower = [GPU | {"tokens_per_second": 1.0}, GPU | {"pair": "medium", "tokens_per_second": 1e9}, {"part": "stages"}]
    results(tmp_path, [*slower, GPU, GPU | {"tokens_per_second": None}])
    assert main(["--output", str(tmp_path), "--tokens", "20000", "--seconds", "0.01"]) == 0
    written = json.loads((tmp_path / "loader.json").read_text())
    assert written["gpu"]["tokens_per_second"] == 1000.0 and written["gpu"]["machine"] == "a GPU"
    batches = [row for row in written["rows"] if "rows" in row]
    assert [(row["sources"], row["rows"], row["sequence_length"]) for row in batches] == [
        *((1, 2, 64), (1, 1, 256)),
        *((4, 2, 64), (4, 1, 256)),
    ]
    bar, order = written["must_show"].values()
    assert bar["target"] == 3 and bar["value"] == min(row["tokens_per_second"] for row in batches) / 1000
    assert bar["holds"] and order["holds"]
    assert written["rows"][-1]["bytes"] == 4 * (10**8 // 8192)
    assert "One a GPU trains the small LLaMA on 0.00 M" in (tmp_path / "loader.md").read_text()


def test_its_text_is_prepared_data(tmp_path: Path) -> None:
    shards = TokenShards(make_source(tmp_path / "made", 30_000, seed=0), "train")
    assert shards.num_tokens >= 30_000
    documents = shards.manifest["splits"]["train"]["documents"]
    assert 300 < shards.num_tokens / documents < 1200


def test_its_mixture_is_the_papers() -> None:
    sources = load_run_config(ROOT / "configs" / "table1" / "dlcm.yaml").data.sources()
    assert {name: weight for name, (_, weight) in sources.items()} == WEIGHTS


def test_bars_can_fail() -> None:
    order = {"order_of_tokens": LONG_RUN, "seconds": 1.0}
    rows = [{"rows": 1, "tokens_per_second": 5000.0}, {"rows": 2, "tokens_per_second": 4000.0}, order]
    assert all(bar.holds for bar in must_show(rows, GPU).values())
    slow = [*rows[:2], {"rows": 2, "tokens_per_second": 2900.0}, order | {"seconds": 31.0}]
    assert not any(bar.holds for bar in must_show(slow, GPU).values())
    assert not any(bar.holds for bar in must_show([], GPU).values())


@pytest.mark.parametrize("rows", [None, [], [GPU | {"pair": "medium"}], [GPU | {"tokens_per_second": None}]])
def test_no_target_is_an_error(
    rows: list[dict[str, Any]] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if rows is not None:
        results(tmp_path, rows)
    assert main(["--output", str(tmp_path)]) != 0
    error = capsys.readouterr().err
    assert "training.json: no " in error and "run python -m eval.bench_training" in error
