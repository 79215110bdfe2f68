"""Parameters on several ranks: whatever the strategy, the run of one process; and checkpoints that fit any other."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.train.tiny import prepare_tiny, write_config
from train.checkpoint import latest_checkpoint, load_state
from train.metrics import WALL_CLOCK, read_metrics
from train.pretrain import main

ROOT = Path(__file__).parents[2]
# One group of ranks runs one command line after the other.
RUN_ALL = """
import json, sys
import train.pretrain as module
ranks = module.Ranks()
for arguments in json.loads(sys.argv[1]):
    run, checkpoint = module.open_run(module.parse_arguments(arguments), ranks)
    assert module.pretrain(run, checkpoint, ranks) == 0
ranks.leave()
"""
STEPS = 4


def run_on(processes: int, commands: list[list[str]], directory: Path) -> None:
    script = directory / "run_all.py"
    script.write_text(RUN_ALL)
    answer = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script)]
        + [json.dumps(commands)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert answer.returncode == 0, answer.stderr


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in WALL_CLOCK} for line in read_metrics(run_dir)]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run_dir)
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def assert_same_run(run_dir: Path, expected: Path, flops: bool = True) -> None:
    """Losses, norms of gradients, parameters and moments, within what the order of fp32 sums may do.

    A step of a single micro-batch counts its boundaries without a pass ahead: `flops` are then fewer.
    """
    lines, expected_lines = metrics(run_dir), metrics(expected)
    assert len(lines) == len(expected_lines)
    for ours, theirs in zip(lines, expected_lines, strict=True):
        if not flops:
            ours, theirs = ({key: value for key, value in line.items() if key != "flops"} for line in (ours, theirs))
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    ours, theirs = tensors(run_dir), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # An AdamW step of a gradient near zero is of either sign.
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


class Runs:
    """Configurations of one run of 8 windows a step, on any number of processes, in a directory of their own."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.data = prepare_tiny(directory / "data")

    def config(self, name: str, accumulation: int, architecture: str = "dlcm", **changes: Any) -> list[str]:
        sections: dict[str, Any] = {
            "batch": {"rows": 2, "accumulation": accumulation},
            "schedule": {"steps": STEPS, "warmup_steps": 0},
            "evaluation": {"every": 2, "max_tokens": 300},  # 5 batches, which no number of ranks shares out evenly
            "checkpoint": {"every": 2, "keep": 9},
        }
        if architecture == "dlcm":
            sections["model"] = {"aux_loss_weight": 0.5}
        run_dir = self.directory / name
        return [
            str(write_config(run_dir.with_suffix(".yaml"), architecture, self.data, run_dir, **sections | changes))
        ]

    def __getitem__(self, name: str) -> Path:
        return self.directory / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same runs on one, two and four processes."""
    runs = Runs(tmp_path_factory.mktemp("runs"))
    fsdp, hybrid = {"strategy": "fsdp"}, {"strategy": "hybrid", "shard_size": 2}
    for name, accumulation in (("one", 4), ("few", 2)):
        assert main(runs.config(name, accumulation)) == 0
    assert main(runs.config("llama", 4, "llama")) == 0
    on_two = [
        runs.config("ddp", 2),
        runs.config("fsdp", 2, parallel=fsdp),
        runs.config("few-fsdp", 1, parallel=fsdp),
        runs.config("llama-fsdp", 2, "llama", parallel=fsdp, activation_checkpointing="full"),
    ]
    run_on(2, on_two, runs.directory)
    run_on(4, [runs.config("hybrid", 1, parallel=hybrid)], runs.directory)
    return runs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ddp", "one"),
        ("fsdp", "one"),
        ("few-fsdp", "few"),
        ("llama-fsdp", "llama"),
        ("hybrid", "one"),
    ],
)
def test_every_strategy_is_the_run_of_one_process(name: str, expected: str, runs: Runs):
    assert_same_run(runs[name], runs[expected], flops=name not in ("few-fsdp", "hybrid"))
