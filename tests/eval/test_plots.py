"""The smoothed curve is a moving average, and a figure is drawn from as little as one point."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.plots import CompressionCurves, Curve, LossCurves, plot_comparison, smooth


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=30), data=st.data())
def test_smooth_is_a_centred_mean(values: list[float], data: st.DataObject) -> None:
    width = data.draw(st.integers(1, len(values)))
    before, after = width // 2, (width - 1) // 2
    slow = [np.mean(values[max(0, i - before) : i + after + 1]) for i in range(len(values))]
    np.testing.assert_allclose(smooth(values, width), slow, atol=1e-9)


@pytest.mark.parametrize("points", [1, 2, 200])
def test_figure(points: int, tmp_path: Path) -> None:
    tokens = [1000.0 * (index + 1) for index in range(points)]
    falling = Curve(tokens, [5 / (index + 1) ** 0.2 for index in range(points)])
    ratio = Curve(tokens, [4.0] * points)
    runs = [LossCurves("DLCM", falling, falling), LossCurves("LLaMA", falling, falling)]
    path = tmp_path / "figure.png"
    plot_comparison(path, runs, CompressionCurves(sampled=ratio, thresholded=ratio, target=4.0))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") >= 1500  # wide enough to read
