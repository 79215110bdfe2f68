"""Scaling laws of section 6: how loss falls with parameters, tokens, compression and the backbone's share.

    L(N, D, R, P) = E0 + A_token / (N (1 - P) + t_token)^d1
                       + A_concept R^gamma / (N P + t_concept)^d2 + A_data / (D + t_data)^alpha      (Eq. 22)
    L(N, D)       = E0 + A / (N + t)^d + A_data / (D + t_data)^alpha                                 (the baseline)
    delta         = k L_stable^a R^b N^c                                                             (Eq. 23)

N parameters, D training tokens, R tokens per concept, P the backbone's share of N; losses in nats per token.

Eq. 22 and the baseline's law are fitted jointly to whole training curves: residuals of log loss under Huber's loss, all
constants but gamma positive (their logarithms are fitted), many starts. Three choices are ours:

- Sizes are divided by their geometric means, so what is fitted is each term's value at the middle of the runs, which
  is well determined, and not A, which is an extrapolation to one parameter and moves with its exponent.
- Offsets t are 0 unless asked for. With N over two decades they can be fitted, for exponents that are about twice less
  certain (worst error of 50 draws 9 % instead of 4 %); over the paper's N (274M to 833M) the standard error of d1 grows
  from 0.1 to 0.7 of it, and 0 is the better guess. It is a guess: where true offsets are a tenth and more of the
  smallest sizes, exponents come out up to 46 % off, and predictions between the runs 1 % (eval.scaling --synthetic).
- Noise is that of points along a curve. Noise that a whole run shares, its seed's luck, is not averaged away by more
  points: 1 % of it leaves exponents up to 31 % off, with 45 runs. `bootstrap` draws runs, so intervals widen with it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import brentq, least_squares, nnls
from scipy.stats import norm as normal
from scipy.stats import t as student

from dlcm.flops import FORWARDS_PER_STEP

Array = np.ndarray
FlopsPerToken = Callable[[Any, Any, Any], Any]  # forward, of (N, R, P)

HUBER_DELTA = 1e-3  # of residuals of log loss, at least; beyond it they count linearly
STARTS, REFINED = 200, 6  # drawn exponents, and the best of them that are fitted to the end
EXPONENTS = (0.02, 2.0)
GAMMAS = (-3.0, 3.0)
TERM_VALUES = (1e-6, 1e3)  # nats, at the reference size
OFFSETS = (1e-3, 10.0)  # of the reference size
SAME_OPTIMUM = 1e-3  # relative difference of objectives
UNDETERMINED = 1e-6  # singular value of the Jacobian, over the largest, of constants that runs do not tell apart
UNCERTAIN = 0.5  # standard error, of an exponent relative to it, from which on it is remarked upon
NEGLIGIBLE = 1e-3  # share of the loss below which a term is not there

D_SPREAD = 3.0  # least factor between the smallest and the largest
LEVELS_APART = {"N": 1.2, "R": 1.2, "P": 1.1}  # realised R of one target differ by less
BOOTSTRAP_RUNS = 10
DECAY_CONSTANTS = 4
DECAY_UNDETERMINED = 0.01

GRID = (41, 13, 13)  # points over N, R and P of a search
ZOOMS, SHRINK = 16, 2.0
FARTHEST = 1e4  # factor of FLOPs within which equal loss is looked for


class ScalingError(ValueError):
    """A law that these runs do not determine, or a question it cannot answer; the message names the remedy."""


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Points of loss curves, (n,) each; R and P are NaN for a model without concepts.

    Attributes:
        run: which curve a point is on.
        N, D, R, P: parameters, training tokens, tokens per concept, share of parameters in the backbone.
        loss: nats per token.
    """

    run: Array
    N: Array
    D: Array
    R: Array
    P: Array
    loss: Array

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, index: Array) -> "Trajectories":
        """Some of the points, by a mask or by indices."""
        return Trajectories(*(getattr(self, name)[index] for name in self.__slots__))


# Laws


@dataclass(frozen=True, slots=True)
class Term:
    """coefficient R^gamma / (size + offset)^exponent, in nats."""

    coefficient: float
    exponent: float
    offset: float = 0.0
    gamma: float = 0.0

    def __call__(self, size: Any, ratio: Any = 1.0) -> Any:
        return self.coefficient * ratio**self.gamma / (size + self.offset) ** self.exponent


@dataclass(frozen=True, slots=True)
class ConceptLaw:
    """Eq. 22."""

    floor: float
    token: Term
    concept: Term
    data: Term

    def loss(self, N: Any, D: Any, R: Any, P: Any) -> Any:
        return self.floor + self.token(N * (1 - P)) + self.concept(N * P, R) + self.data(D)

    def constants(self) -> dict[str, float]:
        """By the names of Eq. 22."""
        return {
            "E0": self.floor,
            "A_token": self.token.coefficient,
            "d1": self.token.exponent,
            "t_token": self.token.offset,
            "A_concept": self.concept.coefficient,
            "d2": self.concept.exponent,
            "gamma": self.concept.gamma,
            "t_concept": self.concept.offset,
            "A_data": self.data.coefficient,
            "alpha": self.data.exponent,
            "t_data": self.data.offset,
        }


@dataclass(frozen=True, slots=True)
class BaselineLaw:
    """The law of a model whose parameters all work on every token."""

    floor: float
    parameters: Term
    data: Term

    def loss(self, N: Any, D: Any, R: Any = None, P: Any = None) -> Any:
        """R and P are ignored."""
        return self.floor + self.parameters(N) + self.data(D)

    def constants(self) -> dict[str, float]:
        return {
            "E0": self.floor,
            "A": self.parameters.coefficient,
            "d": self.parameters.exponent,
            "t": self.parameters.offset,
            "A_data": self.data.coefficient,
            "alpha": self.data.exponent,
            "t_data": self.data.offset,
        }


Law = ConceptLaw | BaselineLaw
EXPONENT_NAMES = ("d1", "d2", "gamma", "alpha", "d")


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted law.

    Attributes:
        law: the constants.
        trajectories: what it was fitted to.
        r_squared: share of the variance of loss, over these points, that the law explains.
        noise: standard deviation of a point's relative error, robustly estimated.
        agreeing_starts: how many of the `REFINED` best starts ended at this optimum.
        remarks: what these runs do not determine, in words.
    """

    law: Law
    trajectories: Trajectories
    r_squared: float
    noise: float
    agreeing_starts: int
    remarks: tuple[str, ...]
    _problem: "_Problem" = field(repr=False)
    _theta: Array = field(repr=False)


# Fitting


def tail_sample(trajectories: Trajectories, per_run: int = 64, tail: float = 0.5, skip: float = 0.0) -> Trajectories:
    """At most `per_run` points of each run, denser towards its end.

    The density of chosen points in log D grows as D^tail: 0 spreads them evenly over log D, which a power law alone
    would want, 1 evenly over D. Each place takes the nearest point that is still free.

    Args:
        trajectories: of any number of runs.
        per_run: points of each.
        tail: the weight of late points.
        skip: share of a run's last D below which points are left out: warm-up, and what follows no power law yet.
    """
    chosen = []
    for run in np.unique(trajectories.run):
        (rows,) = np.nonzero(trajectories.run == run)
        rows = rows[np.argsort(trajectories.D[rows], kind="stable")]
        rows = rows[trajectories.D[rows] >= skip * trajectories.D[rows[-1]]]
        if len(rows) > per_run:
            place = np.log(trajectories.D[rows]) if tail == 0 else trajectories.D[rows] ** tail
            wanted = np.linspace(place[0], place[-1], per_run)
            rows = rows[_nearest_free(place, wanted)]
        chosen.append(rows)
    return trajectories.take(np.concatenate(chosen))


def _nearest_free(place: Array, wanted: Array) -> Array:
    """For each of k ascending values the nearest of n >= k ascending ones that is free, in order."""
    nearest = np.abs(place[None] - wanted[:, None]).argmin(1)
    ahead = np.arange(len(wanted))
    nearest = np.maximum.accumulate(nearest - ahead) + ahead  # strictly rising
    return np.minimum(nearest, len(place) - len(wanted) + ahead)


def fit_concept_law(trajectories: Trajectories, *, offsets: bool = False, seed: int = 0) -> Fit:
    """Fits Eq. 22.

    Args:
        trajectories: loss curves of DLCMs.
        offsets: whether t_token, t_concept and t_data are free, or 0.
        seed: of the starts.

    Raises:
        ScalingError: the runs do not determine it; says what is missing.
    """
    _check_concept_runs(trajectories, offsets)
    return _fit(_concept_problem(trajectories, offsets), trajectories, seed)


def fit_baseline_law(trajectories: Trajectories, *, offsets: bool = False, seed: int = 0) -> Fit:
    """Fits the baseline's law (see `fit_concept_law`)."""
    _check_baseline_runs(trajectories, offsets)
    return _fit(_baseline_problem(trajectories, offsets), trajectories, seed)


@dataclass(frozen=True, slots=True)
class _Problem:
    """A law as a function of theta: log E0, then of each term the logs of value and exponent, gamma, log offset.

    Attributes:
        sizes: (terms, n) what each term falls with, in units of `references`.
        references: (terms,) geometric means.
        log_ratio: (n,) log of R over its geometric mean.
        ratio_reference: that mean.
        with_gamma: the term that R^gamma belongs to.
        offsets: whether offsets are free.
        log_loss: (n,).
    """

    sizes: Array
    references: Array
    log_ratio: Array
    ratio_reference: float
    with_gamma: int | None
    offsets: bool
    log_loss: Array

    def places(self) -> list[dict[str, int]]:
        """Of each term: where in theta its constants are."""
        found, at = [], 1
        for term in range(len(self.sizes)):
            names = ["value", "exponent"] + ["gamma"] * (term == self.with_gamma) + ["offset"] * self.offsets
            found.append({name: at + position for position, name in enumerate(names)})
            at += len(names)
        return found

    def bounds(self) -> tuple[Array, Array]:
        limits = [TERM_VALUES]
        by_name = {"value": TERM_VALUES, "exponent": EXPONENTS, "offset": OFFSETS}
        for names in self.places():
            limits += [tuple(np.exp(GAMMAS)) if name == "gamma" else by_name[name] for name in names]
        low, high = np.log(np.array(limits)).T
        return low, high

    def predict(self, theta: Array) -> tuple[Array, Array]:
        """log loss (n,) and its derivatives (n, constants)."""
        derivatives = np.empty((len(self.log_loss), len(theta)))
        derivatives[:, 0] = math.exp(theta[0])
        loss = derivatives[:, 0].copy()
        for size, at in zip(self.sizes, self.places(), strict=True):
            exponent = math.exp(theta[at["exponent"]])
            offset = math.exp(theta[at["offset"]]) if self.offsets else 0.0
            log_size = np.log(size + offset)
            log_term = theta[at["value"]] - exponent * log_size
            if "gamma" in at:
                log_term = log_term + theta[at["gamma"]] * self.log_ratio
            term = np.exp(log_term)
            loss += term
            derivatives[:, at["value"]] = term
            derivatives[:, at["exponent"]] = -exponent * log_size * term
            if "gamma" in at:
                derivatives[:, at["gamma"]] = self.log_ratio * term
            if self.offsets:
                derivatives[:, at["offset"]] = -exponent * offset / (size + offset) * term
        return np.log(loss), derivatives / loss[:, None]

    def law(self, theta: Array) -> Law:
        terms = []
        for reference, at in zip(self.references, self.places(), strict=True):
            exponent, gamma = math.exp(theta[at["exponent"]]), theta[at["gamma"]] if "gamma" in at else 0.0
            coefficient = math.exp(theta[at["value"]]) * reference**exponent / self.ratio_reference**gamma
            offset = math.exp(theta[at["offset"]]) * reference if self.offsets else 0.0
            terms.append(Term(float(coefficient), exponent, float(offset), float(gamma)))
        law: Any = BaselineLaw if self.with_gamma is None else ConceptLaw
        return law(math.exp(theta[0]), *terms)

    def take(self, index: Array) -> "_Problem":
        """Some of the points, in the units of all."""
        return dataclasses.replace(
            self, sizes=self.sizes[:, index], log_ratio=self.log_ratio[index], log_loss=self.log_loss[index]
        )

    def names(self) -> list[str]:
        """Of theta, as the law calls the constants."""
        return [name for name, value in self.law(self.bounds()[0] + 1).constants().items() if value != 0]


def _concept_problem(trajectories: Trajectories, offsets: bool) -> _Problem:
    N, P = trajectories.N, trajectories.P
    return _problem(trajectories, [N * (1 - P), N * P, trajectories.D], 1, offsets)


def _baseline_problem(trajectories: Trajectories, offsets: bool) -> _Problem:
    return _problem(trajectories, [trajectories.N, trajectories.D], None, offsets)


def _problem(trajectories: Trajectories, sizes: Sequence[Array], with_gamma: int | None, offsets: bool) -> _Problem:
    stacked = np.stack(sizes)
    references = np.exp(np.log(stacked).mean(1))
    log_ratio = np.zeros(len(trajectories)) if with_gamma is None else np.log(trajectories.R)
    return _Problem(
        sizes=stacked / references[:, None],
        references=references,
        log_ratio=log_ratio - log_ratio.mean(),
        ratio_reference=math.exp(log_ratio.mean()),
        with_gamma=with_gamma,
        offsets=offsets,
        log_loss=np.log(trajectories.loss),
    )


def _fit(problem: _Problem, trajectories: Trajectories, seed: int) -> Fit:
    starts = _starts(problem, np.random.default_rng(seed))
    rough = _solve(problem, starts[0], HUBER_DELTA)
    noise = _noise(problem.predict(rough.x)[0] - problem.log_loss)
    delta = _huber_delta(noise)
    solutions = [_solve(problem, theta, delta) for theta in (rough.x, *starts[1:])]
    best = min(solutions, key=lambda found: found.cost)
    theta, law = best.x, problem.law(best.x)
    residuals = trajectories.loss - law.loss(trajectories.N, trajectories.D, trajectories.R, trajectories.P)
    return Fit(
        law=law,
        trajectories=trajectories,
        r_squared=float(1 - (residuals**2).sum() / ((trajectories.loss - trajectories.loss.mean()) ** 2).sum()),
        noise=noise,
        agreeing_starts=int(sum(found.cost <= best.cost * (1 + SAME_OPTIMUM) + 1e-15 for found in solutions)),
        remarks=_remarks(problem, theta, trajectories.run),
        _problem=problem,
        _theta=theta,
    )


def _noise(residuals: Array) -> float:
    """Standard deviation of normal residuals, by their median."""
    return float(1.4826 * np.median(np.abs(residuals)))


def _huber_delta(noise: float) -> float:
    """Where Huber's loss keeps 95 % of the efficiency of least squares, under this noise."""
    return max(HUBER_DELTA, 1.345 * noise)


def _starts(problem: _Problem, generator: np.random.Generator) -> list[Array]:
    """The best of many draws of exponents, gamma and offsets; what is linear in the loss follows by least squares."""
    low, high = problem.bounds()
    low, high = np.maximum(low, math.log(0.05)), np.minimum(high, math.log(1.5))
    linear = [0, *(at["value"] for at in problem.places())]
    for gamma in (at["gamma"] for at in problem.places() if "gamma" in at):
        low[gamma], high[gamma] = -1.0, 2.0
    inverse, found = np.exp(-problem.log_loss), []
    for _ in range(STARTS):
        theta = generator.uniform(low, high)
        theta[linear] = 0
        log_predicted, derivatives = problem.predict(theta)
        basis = derivatives[:, linear] * (np.exp(log_predicted) * inverse)[:, None]
        values, misfit = nnls(basis, np.ones(len(basis)))
        theta[linear] = np.log(np.maximum(values, 1e-4))
        found.append((misfit, theta))
    found.sort(key=lambda pair: pair[0])
    return [theta for _, theta in found[:REFINED]]


def _solve(problem: _Problem, theta: Array, delta: float, tolerance: float = 1e-10) -> Any:
    """Huber's estimate of theta from a start, by a trust region with exact derivatives."""
    low, high = problem.bounds()
    remembered: dict[str, Any] = {}

    def residuals(theta: Array) -> Array:
        predicted, remembered["jacobian"] = problem.predict(theta)
        remembered["theta"] = theta.copy()
        return predicted - problem.log_loss

    def jacobian(theta: Array) -> Array:
        if not np.array_equal(theta, remembered["theta"]):
            residuals(theta)
        return remembered["jacobian"]

    return least_squares(
        residuals,
        np.clip(theta, low + 1e-9, high - 1e-9),
        jacobian,
        bounds=(low, high),
        method="dogbox",
        loss="huber",
        f_scale=delta,
        xtol=tolerance,
        ftol=tolerance,
        gtol=tolerance,
        max_nfev=100,
    )


def _remarks(problem: _Problem, theta: Array, run: Array) -> tuple[str, ...]:
    """What the points do not determine.

    Raises:
        ScalingError: constants that cannot be told apart at all.
    """
    log_predicted, derivatives = problem.predict(theta)
    scale = np.linalg.norm(derivatives, axis=0)
    _, singular, directions = np.linalg.svd(derivatives / scale, full_matrices=False)
    names = problem.names()
    if singular[-1] < UNDETERMINED * singular[0]:
        mixed = [name for name, share in zip(names, np.abs(directions[-1]), strict=True) if share > 0.1]
        raise ScalingError(
            f"these runs do not tell {', '.join(mixed)} apart: N, R and P change together; add runs that change one"
        )
    remarks = []
    low, high = problem.bounds()
    shares = derivatives[:, [0, *(at["value"] for at in problem.places())]].max(0)
    for name, share in zip([name for name in names if name.startswith(("E0", "A"))], shares, strict=True):
        if share < NEGLIGIBLE:
            remarks.append(f"the term of {name} is below {NEGLIGIBLE:.1%} of the loss: its constants say nothing")
    errors = _standard_errors(derivatives, problem.log_loss - log_predicted, run)
    for name, value, error, least, most in zip(names, theta, errors, low, high, strict=True):
        if name.startswith("t") and value - least < 1e-3:
            remarks.append(f"{name} is not told apart from 0")
        elif min(value - least, most - value) < 1e-3:
            remarks.append(f"{name} is at the limit of what is searched: take it as undetermined")
        elif name in EXPONENT_NAMES and error > UNCERTAIN:
            what = f"{error:.2f}" if name == "gamma" else f"{error:.0%} of it"
            remarks.append(f"{name} is hardly determined: its standard error is {what}")
    return tuple(remarks)


def _standard_errors(derivatives: Array, residuals: Array, run: Array) -> Array:
    """Of theta, linearised, runs being what is independent (the sandwich estimate)."""
    bread = np.linalg.inv(derivatives.T @ derivatives)
    runs = np.unique(run, return_inverse=True)[1]
    scores = np.zeros((runs.max() + 1, derivatives.shape[1]))
    np.add.at(scores, runs, derivatives * residuals[:, None])
    return np.sqrt(np.diag(bread @ (scores.T @ scores) @ bread))


def _check_concept_runs(trajectories: Trajectories, offsets: bool) -> None:
    R, P = trajectories.R, trajectories.P
    _check_points(trajectories)
    if not (np.isfinite(R) & np.isfinite(P)).all():
        raise ScalingError("a row lacks R or P; rows of a model without concepts belong to the baseline")
    if (R < 1).any() or (P <= 0).any() or (P >= 1).any():
        raise ScalingError("R must be at least 1, and P between 0 and 1; mend the rows")
    _check_levels(trajectories, ("N", "R", "P"))
    constants = 8 if offsets else 6  # that differences between runs alone determine, E0 among them
    models = len(np.unique(np.stack([trajectories.N, R, P]), axis=1).T)
    if models <= constants:
        raise ScalingError(
            f"{models} different (N, R, P) cannot determine the {constants} constants that only differences between "
            f"runs determine; give more than {constants}, N, R and P varied one by one (the paper has 27)"
        )


def _check_baseline_runs(trajectories: Trajectories, offsets: bool) -> None:
    _check_points(trajectories)
    _check_levels(trajectories, ("N",))
    constants = 4 if offsets else 3
    models = len(np.unique(trajectories.N))
    if models < constants:
        raise ScalingError(
            f"{models} different N cannot determine the {constants} constants that only differences between runs "
            f"determine; give at least {constants}"
        )


def _check_points(trajectories: Trajectories) -> None:
    for name in ("N", "D", "loss"):
        values = getattr(trajectories, name)
        if not (np.isfinite(values) & (values > 0)).all():
            raise ScalingError(f"{name} must be above 0 and finite; mend or leave out the rows where it is not")
    if len(trajectories) == 0:
        raise ScalingError("there are no points; give runs with validation losses, or rows")
    if trajectories.D.max() < D_SPREAD * trajectories.D.min():
        raise ScalingError(
            f"D is between {trajectories.D.min():.3g} and {trajectories.D.max():.3g} alone, which determines neither "
            f"alpha nor E0; give losses from D a factor of {D_SPREAD:g} apart, of whole runs for example"
        )


def _check_levels(trajectories: Trajectories, names: Sequence[str]) -> None:
    for name in names:
        values = getattr(trajectories, name)
        if values.max() < LEVELS_APART[name] * values.min():
            raise ScalingError(
                f"there is one {name} only ({np.median(values):.3g}); give runs whose {name} differ, by a factor of "
                f"{LEVELS_APART[name]:g} or more"
            )


# Uncertainty


def bootstrap(fit: Fit, draws: int = 200, seed: int = 0) -> list[Law]:
    """Laws fitted to as many runs as there were, drawn with replacement; draws that do not determine one are redrawn.

    Runs are drawn, not points, so that noise which a run's points share counts as what it is.

    Args:
        fit: where each refit starts.
        draws: how many.
        seed: of the draws.

    Raises:
        ScalingError: there are too few runs for their draws to mean anything.
    """
    problem, trajectories, generator = fit._problem, fit.trajectories, np.random.default_rng(seed)
    rows = [np.flatnonzero(trajectories.run == run) for run in np.unique(trajectories.run)]
    if len(rows) < BOOTSTRAP_RUNS:
        raise ScalingError(f"{len(rows)} runs are too few to draw from for intervals; give {BOOTSTRAP_RUNS} or more")
    check = _check_baseline_runs if isinstance(fit.law, BaselineLaw) else _check_concept_runs
    laws: list[Law] = []
    while len(laws) < draws:
        index = np.concatenate([rows[run] for run in generator.integers(len(rows), size=len(rows))])
        try:
            check(trajectories.take(index), problem.offsets)
        except ScalingError:
            continue
        found = _solve(problem.take(index), fit._theta, _huber_delta(fit.noise), tolerance=1e-6)
        laws.append(problem.law(found.x))
    return laws


def interval(values: Sequence[float] | Array, runs: int, level: float = 0.9) -> tuple[float, float]:
    """Where a number lies, by its values under `bootstrap`: percentiles, expanded for the number of runs.

    Percentiles alone are those of a normal distribution with the variance of the n runs themselves: too narrow by the
    factor sqrt(n / (n - 1)) and by Student's t. Both are made up for by taking percentiles farther out (Hesterberg,
    "What teachers should know about the bootstrap", 2015). Over 100 draws from a known law each, with noise of points,
    of runs, and of both, 27 and 45 runs, 90 % intervals of constants cover 88 to 91 % of the time, and plain
    percentiles 86 to 90 %. Flipping the signs of runs' residuals, which keeps the design, covers 80 to 82 %.

    Args:
        values: of the number under each draw.
        runs: how many runs were drawn from.
        level: how often the interval is to cover.
    """
    farther = student.ppf((1 + level) / 2, runs - 1) * math.sqrt(runs / (runs - 1))
    low, high = np.quantile(np.asarray(values), [normal.cdf(-farther), normal.cdf(farther)])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Relative errors of predicted losses of runs that were left out.

    Attributes:
        mean: over points, of the absolute error; the points' own noise is part of it.
        worst_run: of the mean error over a run's points, the largest: noise of points is averaged out.
        runs: how many were left out.
    """

    mean: float
    worst_run: float
    runs: int


def held_out(trajectories: Trajectories, groups: Sequence[Array], refit: Callable[[Trajectories], Fit]) -> HeldOut:
    """Fits without each group of runs in turn and predicts it.

    Args:
        trajectories: all points.
        groups: values of `Trajectories.run`.
        refit: `fit_concept_law` or `fit_baseline_law`.

    Raises:
        ScalingError: what is left does not determine the law.
    """
    errors, runs = [], []
    for group in groups:
        left_out = np.isin(trajectories.run, group)
        law, rest = refit(trajectories.take(~left_out)).law, trajectories.take(left_out)
        errors.append(law.loss(rest.N, rest.D, rest.R, rest.P) / rest.loss - 1)
        runs.append(rest.run)
    error, run = np.concatenate(errors), np.concatenate(runs)
    by_run = [abs(float(error[run == one].mean())) for one in np.unique(run)]
    return HeldOut(float(np.abs(error).mean()), max(by_run), len(by_run))


# The decay phase


@dataclass(frozen=True, slots=True)
class Decays:
    """One number a run, (n,): loss when the decay begins, R, N, and what the decay takes off the loss."""

    stable_loss: Array
    R: Array
    N: Array
    drop: Array


@dataclass(frozen=True, slots=True)
class DecayLaw:
    """Eq. 23; `r_squared` is that of log drop."""

    k: float
    a: float
    b: float
    c: float
    r_squared: float

    def drop(self, stable_loss: Any, R: Any, N: Any) -> Any:
        return self.k * stable_loss**self.a * R**self.b * N**self.c


def fit_decay_law(decays: Decays) -> DecayLaw:
    """Fits Eq. 23, linear in logarithms, under Huber's loss.

    Raises:
        ScalingError: the runs do not determine it.
    """
    if len(decays.drop) <= DECAY_CONSTANTS:
        raise ScalingError(
            f"{len(decays.drop)} runs cannot determine the {DECAY_CONSTANTS} constants of the decay law; "
            f"give more than {DECAY_CONSTANTS}"
        )
    if not (decays.drop > 0).all():
        raise ScalingError("a run's loss did not fall in its decay; leave it out, or look at it")
    variables = np.log(np.stack([decays.stable_loss, decays.R, decays.N], axis=1))
    middle = variables.mean(0)
    design = np.column_stack([np.ones(len(variables)), variables - middle])
    spread = np.ptp(variables, axis=0)
    for name, width, least in zip(("L_stable", "R", "N"), spread, (0.01, 0.1, 0.1), strict=True):
        if width < least:
            raise ScalingError(f"there is one {name} only in the decays; give runs that differ in it")
    singular = np.linalg.svd(design[:, 1:] / spread, compute_uv=False)
    if singular[-1] < DECAY_UNDETERMINED * singular[0]:
        raise ScalingError("L_stable, R and N of the decays change together; add runs that change one, P for example")
    target = np.log(decays.drop)
    start = np.linalg.lstsq(design, target, rcond=None)[0]
    delta = _huber_delta(_noise(design @ start - target))
    theta = least_squares(lambda x: design @ x - target, start, lambda x: design, loss="huber", f_scale=delta).x
    residuals = target - design @ theta
    return DecayLaw(
        k=math.exp(theta[0] - middle @ theta[1:]),
        a=float(theta[1]),
        b=float(theta[2]),
        c=float(theta[3]),
        r_squared=float(1 - (residuals**2).sum() / ((target - target.mean()) ** 2).sum()),
    )


# What to do with a law


def approximate_flops_per_token(N: Any, R: Any, P: Any) -> Any:
    """Forward FLOPs: 2 per parameter, the backbone's once a concept. Attention and head are left out."""
    return 2 * N * (1 - P + P / R)


@dataclass(frozen=True, slots=True)
class Optimum:
    """The lowest loss for a budget of training FLOPs; `at_limits` names what would go on where the search ended."""

    flops: float
    N: float
    D: float
    R: float
    P: float
    loss: float
    at_limits: tuple[str, ...]


def optimum(
    law: Law,
    flops: float,
    ratios: tuple[float, float] = (1.0, 1.0),
    shares: tuple[float, float] = (0.0, 0.0),
    flops_per_token: FlopsPerToken = approximate_flops_per_token,
) -> Optimum:
    """The best N, R and P for a budget; D follows. Searches grids that close in on the lowest point.

    Args:
        law: any; a baseline has the default ratios and shares.
        flops: the budget of training, three forwards a token.
        ratios, shares: between which R and P to look. Beyond those of the runs the law is an extrapolation.
        flops_per_token: forward, of (N, R, P).
    """
    balanced = math.sqrt(flops / 6)
    outer = [np.log([balanced / 1e4, balanced * 1e4]), np.log(np.array(ratios)), np.array(shares)]
    limits = [(float(low), float(high)) for low, high in outer]
    for _ in range(ZOOMS):
        axes = [
            np.linspace(low, high, points if high > low else 1)
            for (low, high), points in zip(limits, GRID, strict=True)
        ]
        log_N, log_R, P = np.meshgrid(*axes, indexing="ij")
        N, R = np.exp(log_N), np.exp(log_R)
        D = flops / (FORWARDS_PER_STEP * flops_per_token(N, R, P))
        loss = law.loss(N, D, R, P)
        at = np.unravel_index(int(np.argmin(loss)), loss.shape)
        best = [grid[at] for grid in (log_N, log_R, P)]
        limits = [
            (max(low, middle - (high - low) / SHRINK / 2), min(high, middle + (high - low) / SHRINK / 2))
            for middle, (low, high) in zip(best, limits, strict=True)
        ]
    edges = [
        name
        for name, value, (low, high) in zip("NRP", best, outer, strict=True)
        if high > low and min(value - low, high - value) < 1e-3 * (high - low)
    ]
    return Optimum(flops, float(N[at]), float(D[at]), float(R[at]), float(P[at]), float(loss[at]), tuple(edges))


def compute_multiplier(
    baseline: BaselineLaw, reached: Optimum, flops_per_token: FlopsPerToken = approximate_flops_per_token
) -> float:
    """How many times the FLOPs the baseline needs, at its own best N, for the loss that was reached.

    Args:
        baseline: a fitted law.
        reached: what to match.
        flops_per_token: forward, of (N, R, P); the baseline is asked for at R = 1, P = 0.

    Raises:
        ScalingError: the baseline's law never gets there.
    """

    def excess(log_factor: float) -> float:
        best = optimum(baseline, reached.flops * math.exp(log_factor), flops_per_token=flops_per_token)
        return best.loss - reached.loss

    least, most = math.log(1 / FARTHEST), math.log(FARTHEST)
    if excess(most) > 0 or excess(least) < 0:
        raise ScalingError(
            f"the baseline's law reaches the loss {reached.loss:.4f} nowhere between 1/{FARTHEST:g} and {FARTHEST:g} "
            f"times {reached.flops:.3g} FLOPs; take a budget within what its runs spent"
        )
    return math.exp(brentq(excess, least, most, xtol=1e-5))
