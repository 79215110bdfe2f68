"""A change that should not change the numbers does not: fifty steps against the losses in tests/golden.

After a change that should, run `python -m tests.update_golden` and commit the difference.
"""

from pathlib import Path

import pytest

from tests.train.tiny import MODELS
from tests.update_golden import STEPS, golden_run, read_golden


@pytest.mark.parametrize("architecture", list(MODELS))
def test_fifty_steps_give_the_golden_losses(architecture: str, tmp_path: Path):
    golden, actual = read_golden(architecture), golden_run(architecture, tmp_path)
    assert [line["step"] for line in actual if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert len(actual) == len(golden)
    for ours, expected in zip(actual, golden, strict=True):
        assert ours.pop("kind") == expected.pop("kind")
        # processors differ in the last bits, and fifty steps of training magnify them
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-4), f"step {expected['step']}"


@pytest.mark.parametrize("architecture", list(MODELS))
def test_the_golden_losses_show_learning(architecture: str):
    losses = [line["ce"] for line in read_golden(architecture) if line["kind"] == "train"]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1
