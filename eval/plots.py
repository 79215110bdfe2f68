"""Figures: loss and compression over training, in the colours of Okabe and Ito that colour-blind readers tell apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter

COLOURS = ("#0072B2", "#D55E00")  # blue, vermillion
MARKERS = ("o", "s")
SMOOTHED_SHARE = 1 / 40  # of a curve: the width of its moving average
LOSS_HEADROOM = 1.25  # the axis ends this far above the loss reached at a tenth of the run; before it lies a cliff


@dataclass(frozen=True, slots=True)
class Curve:
    """Values (n,) against training tokens (n,)."""

    tokens: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class LossCurves:
    """One run's cross-entropy in nats per token."""

    label: str
    training: Curve
    validation: Curve


@dataclass(frozen=True, slots=True)
class CompressionCurves:
    """Tokens per concept of one run: boundaries sampled in training, thresholded in evaluation; and the target R."""

    sampled: Curve
    thresholded: Curve
    target: float


def plot_comparison(path: Path, losses: Sequence[LossCurves], compression: CompressionCurves) -> None:
    """Writes a PNG: losses of two runs on the left, compression of the DLCM on the right."""
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    loss_axes, compression_axes = figure.subplots(1, 2)
    _draw_losses(loss_axes, losses)
    _draw_compression(compression_axes, compression)
    for axes in (loss_axes, compression_axes):
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path)


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """Centred moving average over `width` <= n values, fewer where the curve begins and ends; (n,) to (n,)."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw_losses(axes: Axes, losses: Sequence[LossCurves]) -> None:
    for colour, marker, run in zip(COLOURS, MARKERS, losses, strict=True):
        axes.plot(run.training.tokens, run.training.values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(run.training.tokens, _smoothed(run.training), color=colour, label=f"{run.label}, training")
        axes.plot(
            run.validation.tokens,
            run.validation.values,
            color=colour,
            linestyle="none",
            marker=marker,
            markeredgecolor="white",
            label=f"{run.label}, validation",
        )
    early = [_smoothed(run.training)[len(run.training.values) // 10] for run in losses]
    lowest = min(value for run in losses for value in (*run.training.values, *run.validation.values))
    axes.set_ylim(lowest * 0.97, max(early) * LOSS_HEADROOM)
    axes.set_ylabel("cross-entropy, nats per token")
    axes.set_title("Loss")


def _draw_compression(axes: Axes, compression: CompressionCurves) -> None:
    sampled, thresholded = compression.sampled, compression.thresholded
    axes.axhline(compression.target, color="black", linestyle="--", linewidth=1, label=f"target {compression.target:g}")
    axes.plot(sampled.tokens, sampled.values, color=COLOURS[0], alpha=0.2, linewidth=0.8)
    axes.plot(sampled.tokens, _smoothed(sampled), color=COLOURS[0], label="training, sampled")
    axes.plot(
        thresholded.tokens,
        thresholded.values,
        color=COLOURS[1],
        marker="o",
        markeredgecolor="white",
        label="inference, thresholded",
    )
    axes.set_yscale("log", base=2)  # half and double are equally far from the target
    axes.yaxis.set_major_formatter(ScalarFormatter())
    seen = [*sampled.values, *thresholded.values]
    axes.set_ylim(min(compression.target / 2, *seen), max(compression.target * 2, *seen))
    axes.set_ylabel("tokens per concept")
    axes.set_title("Compression of the DLCM")


def _smoothed(curve: Curve) -> np.ndarray:
    return smooth(curve.values, max(1, round(len(curve.values) * SMOOTHED_SHARE)))
