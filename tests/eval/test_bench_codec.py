"""The codec's bars follow from rows, and a run leaves a record."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from eval.bench_codec import main, must_show, speed


def test_bars_are_computed_from_rows() -> None:
    errors = {"RTN g128": 8.0, "RTN g128, clip search": 4.0, "x264": 2.0, "entropy": 1.0}
    rows = [
        {"tensor": "w", "values": 1 << 16, "level": level, "method": method, "bits": level - (method == "x264") / 64}
        | {"squared_error": error, "energy": 128.0}
        for level in (4, 3, 2)
        for method, error in errors.items()
    ]
    bars = must_show(rows)
    gains = [bar for name, bar in bars.items() if name.startswith("relative MSE")]
    assert [bar.value for bar in gains] == [4.0] * 3 and [bar.target for bar in gains] == [1.6, 2.0, 2.5]
    assert [bar.value for name, bar in bars.items() if "clip search" in name] == [2.0] * 3
    missed = bars["bits by which a tensor of 65,536 values or more misses its budget"]
    assert missed.value == 1 / 64 and missed.holds
    without = must_show([row for row in rows if row["method"] != "x264"])
    assert not any(bar.holds for name, bar in without.items() if "RTN" in name)  # not measured does not hold


def test_speed_is_of_one_encoding_at_about_three_bits() -> None:
    row = speed("entropy", 512)
    assert 2.9 < row["bits"] < 3.2 and row["encode_mvalues_per_second"] > 0 and row["decode_mvalues_per_second"] > 0


def test_a_run_writes_numbers_and_a_page(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    save_file({"w": torch.randn(256, 256, generator=draw)}, tmp_path / "model.safetensors")
    assert main([str(tmp_path / "model.safetensors"), "--side", "256", "--output", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "codec.json").read_text())
    assert len(numbers["must_show"]) == 7 and all(bar["value"] for bar in numbers["must_show"].values())
    text = (tmp_path / "codec.md").read_text()
    assert "x264, shuffled" in text and "against the entropy coder alone" in text
