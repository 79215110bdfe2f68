"""Each start of a run leaves a line that says when, where, how and with what; and no secret."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from tests.train.test_pretrain import Tap, stop_at, tap
from tests.train.tiny import prepare_tiny, write_config
from train.config import load_run_config
from train.environment import STARTS_FILE, is_recorded, record_start
from train.metrics import MetricsError
from train.pretrain import main

__all__ = ["tap"]  # a fixture


def test_each_start_is_recorded(tmp_path: Path, tap: Tap, monkeypatch: pytest.MonkeyPatch):
    data, run_dir = prepare_tiny(tmp_path / "data"), tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", "llama", data, run_dir)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TORCH_API_KEY", "also_secret")
    tap.before = stop_at(2)
    assert main([str(config)]) != 0
    tap.before = lambda step: None
    with (run_dir / STARTS_FILE).open("a") as file:
        file.write('{"time": "2')  # of one that was killed
    assert main(["--resume", str(run_dir), "optimizer.lr_token=1e-3"]) == 0
    assert main([str(config), "optimizer.lr_token=1e-3"]) == 0  # finished: that is no start

    text = (run_dir / STARTS_FILE).read_text()
    first, torn, second = text.splitlines()
    assert torn == '{"time": "2' and "secret" not in text
    first, second = json.loads(first), json.loads(second)
    for line in (first, second):
        assert datetime.now(UTC) - datetime.fromisoformat(line["time"]) < timedelta(minutes=5)
        assert line["host"] and line["processes"] == 1 and line["device"] and line["argv"]
        assert line["versions"]["torch"] == torch.__version__ and "commit" in line
        assert line["variables"]["NCCL_DEBUG"] == "WARN"
    assert (first["step"], second["step"]) == (0, 3)
    rates = [line["config"]["optimizer"]["lr_token"] for line in (first, second)]
    assert rates == [3e-3, 1e-3] and first["config"]["data"]["path"] == str(data)


@pytest.mark.parametrize(
    ("name", "recorded"),
    [
        ("CUDA_VISIBLE_DEVICES", True),
        ("OMP_NUM_THREADS", True),
        ("MASTER_ADDR", True),
        ("TORCHELASTIC_RESTART_COUNT", True),
        ("SLURM_JOB_ID", True),
        ("SLURM_JWT", False),
        ("HOME", False),
        ("NCCL_PASSWORD", False),
        ("TRITON_CACHE_SECRET", False),
        ("AWS_ACCESS_KEY_ID", False),
    ],
)
def test_which_variables_are_recorded(name: str, recorded: bool):
    assert is_recorded(name) is recorded


def test_a_disk_that_refuses_is_named(tmp_path: Path):
    run = load_run_config(write_config(tmp_path / "run.yaml", "llama", tmp_path, tmp_path / "run"))
    with pytest.raises(MetricsError, match=r"starts.jsonl: could not be written"):  # there is no directory
        record_start(run, 0, 1, torch.device("cpu"))
