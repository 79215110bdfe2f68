"""A change that should not change the numbers does not: fifty steps against the losses in tests/golden.

After a change that should, run `python -m tests.update_golden` and commit the difference.
"""

from pathlib import Path

import pytest

from tests.train.tiny import MODELS
from tests.update_golden import STEPS, golden_run, read_golden

# Processors differ in the last bits, which fifty steps of training magnify; and now and then a boundary falls on the
# other side of its draw: one of the 128 tokens of a step.
CLOSE = 1e-4
AFTER_A_FLIP = {"loss": 2e-3, "ce": 2e-3, "bpb": 2e-3, "flops": 2e-3, "mean_probability": 2e-3}
ONE_FLIP = {"boundary_rate": 2 / 128, "aux": 0.02, "tokens_per_concept": 1.0, "max_concept": 32}


@pytest.mark.parametrize("architecture", list(MODELS))
def test_fifty_steps_give_the_golden_losses(architecture: str, tmp_path: Path):
    golden, actual = read_golden(architecture), golden_run(architecture, tmp_path)
    assert [line["step"] for line in actual if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert len(actual) == len(golden)
    draws = architecture == "dlcm"
    for ours, expected in zip(actual, golden, strict=True):
        assert ours.keys() == expected.keys() and ours.pop("kind") == expected.pop("kind")
        for name, value in expected.items():
            relative = AFTER_A_FLIP.get(name, CLOSE) if draws else CLOSE
            absolute = ONE_FLIP.get(name, CLOSE) if draws else CLOSE
            assert ours[name] == pytest.approx(value, rel=relative, abs=absolute), (expected["step"], name)


@pytest.mark.parametrize("architecture", list(MODELS))
def test_the_golden_losses_show_learning(architecture: str):
    losses = [line["ce"] for line in read_golden(architecture) if line["kind"] == "train"]
    assert losses[0] > 5 and losses[-1] < losses[0] - 1
