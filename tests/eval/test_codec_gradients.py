"""A training with compressed gradients learns, at the bits that it says."""

import pytest

from eval import codec_gradients
from eval.codec_gradients import table, train


def test_a_short_training_learns_from_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec_gradients, "SCORED_WINDOWS", 4)
    rows = [train(3, bits, True) for bits in (None, 2.6)]
    assert rows[0]["bits"] is None and 0.3 < rows[1]["bits"] < 3  # those of what has no gradient yet are 0
    assert all(row["bits_per_byte"] < 7.9 for row in rows) and rows[0]["bits_per_byte"] != rows[1]["bits_per_byte"]
    lines = table(rows).splitlines()
    assert "| exact | 32 |" in lines[2] and lines[2].endswith("+0.0000 |") and "| 2.6 bits |" in lines[3]
