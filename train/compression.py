"""Self-compression in training: bit depths and exponents in the optimizer, and what presses on the depths.

The penalty is gamma Q, Q = bits of all rounded weights / their number. Its gradient is a constant, gamma n / N for the
depth of a group of n of N weights, and is added to the loss's own after the backward pass: the same number on every
rank, however the batch is cut.

Who asks for `target_bits` leaves gamma to a controller. What is wanted falls in a straight line from the bits at the
start to the target. Gamma is what by itself would follow that line, and proportional to the bits that are too many,
one of which would be gone after `RESPONSE` of all steps, plus what of them has added up, which holds them there against
the loss; it is never below 0. What adds up is bits as they are stored; what is answered at once, a number without their
jumps.

AdamW's epsilon is given in units of n / N, the size of the penalty's gradient: a larger one, 6 say, keeps the step
proportional to gamma, where a tiny one would make all steps as long as the rate. So a penalty alone takes
lr gamma / epsilon bits a step from a group of any size, in a model of any size.

Removal (see `dlcm.selfcompress.removal`) makes groups smaller, where they are rows that lose columns: n is what a group
has now, in penalty and epsilon alike, so that a penalty takes as many bits a step as before. N is the number of weights
of the starting network, in which bits are counted throughout: what was removed has none.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dlcm.flops import rounded_weights
from dlcm.host import OnHost
from dlcm.selfcompress.quantiser import MAX_BITS, QUANTISER_PARAMETERS, QuantisedLinear, kept_of
from dlcm.selfcompress.removal import remove_dead_
from train.checkpoint import TrainingState
from train.config import RunConfig
from train.parallel import local, over_parts, whole
from train.step import Model

RESPONSE, LEAST_RESPONSE = 0.02, 20  # of all steps, and in steps: AdamW's momentum must have time to follow
HOLDING = 5  # how many times as long what adds up takes


class NothingLeft(Exception):
    """All that could be removed has been."""


Depth = tuple[nn.Parameter, int]  # of a layer's groups, and how many weights a group has


def is_of_quantiser(name: str) -> bool:
    """Whether a parameter is a bit depth or an exponent."""
    return name.rpartition(".")[2] in QUANTISER_PARAMETERS


def quantiser_groups(run: RunConfig, model: Model) -> list[dict[str, Any]]:
    """AdamW's groups of depths and exponents, by the number of weights that share one; none without them.

    No weight decay, and no part in the clipping of gradients. Depths that are given have a rate of 0.
    """
    compression, total = run.compression, sum(rounded_weights(model.config).values())
    groups: dict[str, dict[str, Any]] = {}
    for layer in _layers(model).values():
        size = _weights_in_group(layer)
        for kind in QUANTISER_PARAMETERS:
            rate = compression.lr if kind == "exponent" or compression.method == "learned" else 0.0
            group = {"lr": rate, "eps": compression.eps * size / total, "weight_decay": 0.0, "clipped": False}
            name = f"{kind}_{size}"
            groups.setdefault(name, {"name": name, "params": [], **group})["params"].append(getattr(layer, kind))
    return list(groups.values())


def fit_quantisers_(run: RunConfig, model: Model) -> None:
    """Sets depths to the bits of the run, and exponents to fit the weights."""
    for layer in _layers(model).values():
        layer.fit_(run.compression.bits)


class BitPenalty:
    """What presses on depths that are learned. Its one number is part of a run's state."""

    def __init__(self, run: RunConfig, model: Model, state: TrainingState):
        self._compression, self._steps = run.compression, run.schedule.steps
        self._depths = {name: (layer.depth, _weights_in_group(layer)) for name, layer in _layers(model).items()}
        self._weights = rounded_weights(model.config)
        total = sum(self._weights.values())
        # Each group's part of all weights, of those that this rank holds. All at once, they cost a GPU few kernels.
        self._shares = [torch.full_like(local(depth), size / total) for depth, size in self._depths.values()]
        self._share_G = torch.cat([share.flatten() for share in self._shares]).double()
        self._held = torch.tensor(state.gamma, dtype=torch.float64, device=model.device)
        self._gamma = torch.zeros_like(self._held)

    def press_(self, step: int) -> None:
        """Adds the penalty's gradient to the depths'. To be called once a step, after the backward pass.

        Args:
            step: counted from 0.
        """
        compression = self._compression
        progress = step / self._steps - compression.start
        if progress < 0:
            return
        arrived = min(1.0, progress / compression.ramp) if compression.ramp else 1.0
        if compression.gamma is not None:
            self._gamma.fill_(arrived * compression.gamma)
        else:
            assert compression.target_bits is not None
            fall = compression.bits - compression.target_bits
            wanted = compression.bits - arrived * fall
            response = max(LEAST_RESPONSE, RESPONSE * self._steps)
            per_bit = compression.eps / compression.lr  # the gamma that takes a bit a step
            gain = per_bit / response
            falling = per_bit * fall / (compression.ramp * self._steps) if arrived < 1 else 0.0
            stored, expected = self._bits()
            self._held = (self._held + gain * (stored - wanted) / (HOLDING * response)).clamp(min=0)
            self._gamma = (falling + self._held + gain * (expected - wanted)).clamp(min=0)
        gradients = [local(depth.grad) for depth, _ in self._depths.values() if depth.grad is not None]
        torch._foreach_add_(gradients, torch._foreach_mul(self._shares, self._gamma.to(self._shares[0].dtype)))

    @torch.no_grad()
    def project_(self) -> None:
        """Brings depths back to 0 to 8 bits. To be called after the optimizer's step."""
        depths = [local(depth) for depth, _ in self._depths.values()]
        torch._foreach_clamp_min_(depths, 0)
        torch._foreach_clamp_max_(depths, MAX_BITS)

    @torch.no_grad()
    def _bits(self) -> Tensor:
        """(2,): bits a weight as they are stored, and as they would be if depths lay anywhere between whole numbers.

        The latter does not jump where many cross one together.
        """
        depths = [depth for depth, _ in self._depths.values()]
        depth_G = torch.cat([local(depth).flatten() for depth in depths]).double()
        bits_2G = torch.stack([depth_G.ceil(), depth_G + 0.5 * (depth_G > 0)])
        return over_parts(bits_2G @ self._share_G, depths[0])

    def metrics(self) -> dict[str, float]:
        """Bits a weight, whole and by stage, the share of each stage's weights that have none, and gamma; waits.

        Weights are those of the starting network; bits those that depths allow for. All ranks must ask.
        """
        numbers = [self._gamma, bits_a_weight(self._depths.values(), sum(self._weights.values()))]
        for stage, weights in self._weights.items():
            depths = [depth for name, depth in self._depths.items() if name.partition(".")[0] == stage]
            numbers += [bits_a_weight(depths, weights), dead_share(depths, weights)]
        names = [f"{kind}/{stage}" for stage in self._weights for kind in ("weight_bits", "dead")]
        on_device = torch.stack([number.to(self._gamma.device) for number in numbers])
        return dict(zip(["gamma", "weight_bits", *names], OnHost(on_device).read(), strict=True))

    def write_to(self, state: TrainingState) -> None:
        """Notes what has added up; waits for the device."""
        (state.gamma,) = OnHost(self._held[None]).read()


def bits_a_weight(depths: Iterable[Depth], weights: int) -> Tensor:
    """The mean over so many weights of bits that depths allow for, on the device; all ranks must ask."""
    return _sum([(depth.detach().clamp(0, MAX_BITS).ceil(), size) for depth, size in depths]) / weights


def dead_share(depths: Iterable[Depth], weights: int) -> Tensor:
    """The share of so many weights that have no bits, or are not there, on the device; all ranks must ask."""
    return (weights - _sum([((depth.detach() > 0).float(), size) for depth, size in depths])) / weights


def _sum(values: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Over weights, of values of groups, each of so many weights; one reduction where they are sharded."""
    if not values:  # of a stage that removal has left nothing of
        return torch.zeros((), dtype=torch.float64)
    first, *others = (value.sum(dtype=torch.float64) * size for value, size in values)
    return whole(sum(others, first))


def remove_dead_channels_(
    model: Model, optimizer: torch.optim.Optimizer, groups: Callable[[], list[dict[str, Any]]]
) -> bool:
    """Takes dead channels out of the model and of the optimizer's state; says whether there were any.

    Args:
        optimizer: has done its step, and no gradients are left.
        groups: makes its groups anew, of the parameters that are left.

    Raises:
        NothingLeft: all channels of all blocks are dead.
    """
    before = dict(model.named_parameters())
    kept = remove_dead_(model)
    if not kept:
        return False
    if not _layers(model):
        raise NothingLeft
    old, state = optimizer.state, dict[Tensor, Any]()
    for name, parameter in model.named_parameters():
        rows, columns = kept.get(name, (None, None))
        own = old[before[name]].items()  # but for moments a count of steps, which is no matrix
        state[parameter] = {kind: kept_of(x, rows, columns) if x.ndim else x for kind, x in own}
    optimizer.state = defaultdict(dict, state)
    optimizer.param_groups = []
    for group in groups():
        optimizer.add_param_group(group)
    return True


def _layers(model: Model) -> dict[str, QuantisedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def _weights_in_group(layer: QuantisedLinear) -> int:
    return layer.weight.numel() // layer.depth.numel()
