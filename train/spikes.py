"""Steps whose gradient is far longer than gradients have been of late: spikes, which move nothing.

Of log(norm) a running mean and variance are kept, over about the last `spikes.window` steps; a spike lies more than
`spikes.deviations` standard deviations above the mean. What lies further off than `REACH` deviations counts as if it
lay just there: one spike moves neither number by much, and a new level comes to be the usual one. The first `window`
steps are no spikes, and count as they are: gradients change by the step while the learning rate warms up.

All of this happens on the device, from the norm of the global batch's gradient, which is the same number on every rank.
The loss is not looked at: it is high a step after the gradient was long, when the parameters have moved.
"""

import math

import torch
from torch import Tensor

from dlcm.host import OnHost
from train.checkpoint import TrainingState
from train.config import SpikesConfig

# Of the standard deviation. Where norms are nearly constant, ordinary ones would be many deviations away. 6 of these
# are a gradient 4.5 times as long as usual.
LEAST_DEVIATION = 0.25
REACH = 3.0  # of ordinary norms, one in several hundred lies further off


class SpikeRule:
    """Which norms are spikes. Its numbers are part of a run's state, so that a resumed run decides as before."""

    def __init__(self, spikes: SpikesConfig, state: TrainingState, device: torch.device):
        """Goes on from what the state knows of earlier norms.

        Args:
            spikes: its `deviations` are given.
            state: of the run.
            device: where norms are.
        """
        assert spikes.deviations is not None
        self._deviations, self._window = spikes.deviations, spikes.window
        numbers = torch.tensor([state.usual_norm, state.norm_variance, state.norms], dtype=torch.float64)
        self._usual, self._variance, self._norms = numbers.to(device).unbind()

    def is_spike(self, grad_norm: Tensor) -> Tensor:
        """Whether a step's norm is a spike, bool, on the device; and the norm counts from now on.

        One that is 0 or not finite is no spike, and does not count.
        """
        distance = (grad_norm.double() / self._usual).log()
        counts = distance.isfinite()
        armed = self._norms >= self._window
        deviation = self._variance.sqrt().clamp(min=LEAST_DEVIATION)
        spike = counts & armed & (distance > self._deviations * deviation)
        reach = torch.where(armed, REACH * deviation, torch.full_like(deviation, math.inf))
        distance = distance.nan_to_num(0, 0, 0).clamp(-reach, reach)
        share = (1 / (self._norms + 1)).clamp(min=1 / self._window) * counts  # at first, the mean of those so far
        self._usual = self._usual * (share * distance).exp()
        self._variance = (1 - share) * (self._variance + share * distance.square())
        self._norms = self._norms + counts
        return spike

    def write_to(self, state: TrainingState) -> None:
        """Notes what is known of norms; waits for the device."""
        usual, variance, norms = OnHost(torch.stack([self._usual, self._variance, self._norms])).read()
        state.usual_norm, state.norm_variance, state.norms = usual, variance, int(norms)
