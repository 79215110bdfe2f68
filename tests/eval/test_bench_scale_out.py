"""The benchmark of several GPUs runs, on CPUs; and its bars follow from rows."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.bench import Row
from eval.bench_scale_out import ONE, PAIRS, STRATEGIES, main, must_show, page, throughput_table
from tests.ranks import RankProcesses

TINY = ["device=cpu", "precision=fp32", "threads=1", "batch.rows=2", "data.sequence_length=32", "model.vocab_size=512"]


@pytest.fixture
def without_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the commands do, in processes that have torch already: one of its own is this one."""

    run_command = subprocess.run

    def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess:
        if command[0] != sys.executable:  # of git
            return run_command(command, **options)
        module = command.index("eval.bench_scale_out")
        launcher, arguments = command[1 : module - 1], command[module + 1 :]
        assert command[module - 1] == "-m"
        if not launcher:
            return subprocess.CompletedProcess(command, main(arguments))
        assert launcher == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return subprocess.CompletedProcess(command, max(RankProcesses(2, tmp_path, main, arguments).wait()))

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.usefixtures("without_imports")
def test_two_processes_are_measured_against_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    command = ["--pairs", "demo", "--models", "dlcm", "--steps", "2", "--set", *TINY, "--output", str(tmp_path)]
    assert main(command) == 0
    written = json.loads((tmp_path / "scale_out.json").read_text())
    rows = written["rows"]
    kinds = [(row["model"], row["strategy"], row["gpus"]) for row in rows]
    assert kinds == [("dlcm", ONE, 1), *(("dlcm", strategy, 2) for strategy in STRATEGIES)]
    for row in rows:
        assert row["steps"] == 2 and row["peak_gb"] is None
        tokens = row["tokens_per_second"] * row["step_ms"] / 1000
        assert tokens == pytest.approx(row["gpus"] * 2 * 32)  # of all ranks
        assert row["tokens_per_concept"] == pytest.approx(4, rel=0.35)  # few tokens
    assert not any(bar["holds"] for bar in written["must_show"].values())  # these pairs were not measured
    assert "| demo | DLCM | 2, fsdp | 2 x 32 |" in (tmp_path / "scale_out.md").read_text()
    capfd.readouterr()
    assert main(["--pairs", "demo", "--models", "llama", "--steps", "2", "--set", *TINY, "model.d_tokens=7"]) == 2
    err = capfd.readouterr().err
    assert "unknown key 'model.d_tokens'" in err and "error: measuring on 1 GPUs failed with status 2" in err


def fake_rows(llama: float = 1.9, dlcm: float = 1.95, overrides: str = "") -> list[Row]:
    rows: list[Row] = []
    for pair in PAIRS:
        for model, faster in (("dlcm", dlcm), ("llama", llama)):
            for strategy, gpus in ((ONE, 1), ("ddp", 2), ("fsdp", 2)):
                rate = 1000.0 * (faster if gpus == 2 else 1)
                key = {"pair": pair, "model": model, "strategy": strategy, "gpus": gpus, "overrides": overrides}
                measured = {"tokens_per_second": rate, "step_ms": 10.0, "mfu": 0.4, "peak_gb": 20.0 / gpus}
                rows.append({**key, "documents": 4, "sequence_length": 1024, **measured})
    return rows


def test_bars_follow_from_rows():
    bars = must_show(fake_rows())
    assert len(bars) == 14 and all(bar.holds for bar in bars.values())
    assert bars["tokens per second, 2 GPUs over 1, ddp, LLaMA, small"].value == pytest.approx(1.9)
    assert bars["that of the DLCM over that of the LLaMA, fsdp, medium"].value == pytest.approx(1.95 / 1.9)
    assert bars["GB at the peak, fsdp over 1 GPU, the larger of DLCM and LLaMA, small"].value == 0.5
    missed = [name for name, bar in must_show(fake_rows(dlcm=1.8)).items() if not bar.holds]
    assert len(missed) == 8 and all("DLCM" in name for name in missed)
    for rows in ([], fake_rows(overrides="batch.rows=1"), [row | {"gpus": 4} for row in fake_rows()]):
        assert not any(bar.holds for bar in must_show(rows).values())
    assert "| small | DLCM | 2, ddp | 4 x 1,024 | 1,950 | 10.0 | 40.0% | 10.0 | 1.950 |" in throughput_table(
        fake_rows()
    )
    record = {"machine": {"device": "one"}, "versions": {}, "commit": "c", "command": "x"}
    assert page(record, bars, fake_rows()).startswith("# Training steps on several GPUs")


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="there are GPUs enough")
def test_without_gpus_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "times 2 GPUs, but torch sees" in capsys.readouterr().err
