"""The golden losses: fifty deterministic steps of each tiny model, kept in tests/golden/ARCHITECTURE.jsonl.

    python -m tests.update_golden

rewrites them on purpose: after a change that is meant to alter the numbers, never to make a test pass. The diff then
shows, step by step, what the change did.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.train.tiny import MODELS, prepare_tiny, write_config
from train.metrics import WALL_CLOCK, read_metrics
from train.pretrain import main

GOLDEN = Path(__file__).parent / "golden"
STEPS = 50
# Gradients magnify what processors do differently in the last bits; losses hardly do.
LEFT_OUT = (*WALL_CLOCK, "grad_norm")


def golden_run(architecture: str, directory: Path) -> list[dict[str, Any]]:
    """The metrics of fifty steps, run in `directory`, but for `LEFT_OUT`; floats to seven digits."""
    config = write_config(
        directory / "run.yaml",
        architecture,
        prepare_tiny(directory),
        directory / "run",
        schedule={"steps": STEPS, "warmup_steps": 5},
        evaluation={"every": 25},
    )
    if main([str(config)]) != 0:
        raise RuntimeError(f"the golden run of {architecture} failed")
    return [
        {
            key: float(f"{value:.7g}") if isinstance(value, float) else value
            for key, value in line.items()
            if key not in LEFT_OUT
        }
        for line in read_metrics(directory / "run")
    ]


def read_golden(architecture: str) -> list[dict[str, Any]]:
    lines = (GOLDEN / f"{architecture}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_golden(architecture: str, lines: list[dict[str, Any]]) -> None:
    GOLDEN.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (GOLDEN / f"{architecture}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in MODELS:
        with tempfile.TemporaryDirectory() as temporary:
            write_golden(name, golden_run(name, Path(temporary)))
