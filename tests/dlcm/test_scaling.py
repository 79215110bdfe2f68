"""Laws are recovered from curves drawn from them, refused where runs do not determine them, and used right."""

import dataclasses
import itertools

import numpy as np
import pytest

from dlcm.scaling import (
    BaselineLaw,
    ConceptLaw,
    Decays,
    Optimum,
    ScalingError,
    Term,
    Trajectories,
    _baseline_problem,
    _concept_problem,
    approximate_flops_per_token,
    bootstrap,
    compute_multiplier,
    fit_baseline_law,
    fit_concept_law,
    fit_decay_law,
    held_out,
    interval,
    optimum,
    tail_sample,
)

LAW = ConceptLaw(
    floor=1.8,
    token=Term(300.0, 0.38),
    concept=Term(60.0, 0.33, gamma=0.4),
    data=Term(400.0, 0.32),
)
BASELINE = BaselineLaw(1.8, Term(500.0, 0.37), Term(400.0, 0.32))
SIZES, RATIOS, SHARES = (1e7, 1e8, 1e9), (2.0, 4.0, 8.0), (0.3, 0.5, 0.7)
ASKED = (3e7, 5e9, 3.0, 0.4)


def draw(law=LAW, noise=0.002, sizes=SIZES, ratios=RATIOS, shares=SHARES, points=16, seed=0):
    """Curves of every N, R and P, at D from 1e8 to 1e11; relative noise is normal, of each point."""
    grid = np.array(list(itertools.product(sizes, ratios, shares)))
    run = np.repeat(np.arange(len(grid)), points)
    N, R, P = grid[run].T
    D = np.tile(np.geomspace(1e8, 1e11, points), len(grid))
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(D)))
    return Trajectories(run, N, D, R, P, law.loss(N, D, R, P) * factor)


def draw_baseline(noise=0.002, sizes=(1e7, 3e7, 1e8, 1e9), points=16):
    return draw(BASELINE, noise, sizes, (np.nan,), (np.nan,), points)


@pytest.fixture(scope="module")
def fit():
    return fit_concept_law(draw())


def test_constants_are_recovered(fit):
    found, truth = fit.law.constants(), LAW.constants()
    for name in ("d1", "d2", "gamma", "alpha"):
        assert found[name] == pytest.approx(truth[name], rel=0.1), name
    assert found["E0"] == pytest.approx(truth["E0"], rel=0.01)
    assert found["t_token"] == found["t_concept"] == found["t_data"] == 0
    assert fit.law.loss(*ASKED) == pytest.approx(LAW.loss(*ASKED), rel=0.002)
    assert fit.r_squared > 0.999 and fit.noise == pytest.approx(0.002, rel=0.2)
    assert fit.agreeing_starts >= 3 and fit.remarks == ()


def test_exact_curves_give_exact_constants():
    found = fit_concept_law(draw(noise=0.0)).law.constants()
    assert found == pytest.approx(LAW.constants(), rel=1e-4)


def test_the_order_of_points_and_the_units_of_nothing_matter(fit):
    order = np.random.default_rng(1).permutation(len(fit.trajectories))
    shuffled = fit_concept_law(fit.trajectories.take(order)).law.constants()
    assert shuffled == pytest.approx(fit.law.constants(), rel=1e-3)


def test_the_baseline_is_recovered():
    found = fit_baseline_law(draw_baseline())
    assert found.law.constants()["d"] == pytest.approx(0.37, rel=0.1)
    assert found.law.loss(3e8, 5e9) == pytest.approx(BASELINE.loss(3e8, 5e9), rel=0.003)


def test_offsets_are_recovered_where_asked_for():
    law = dataclasses.replace(
        LAW,
        token=dataclasses.replace(LAW.token, offset=5e6),
        concept=dataclasses.replace(LAW.concept, offset=1e7),
        data=dataclasses.replace(LAW.data, offset=3e8),
    )
    found = fit_concept_law(draw(law, noise=0.0), offsets=True).law.constants()
    assert found == pytest.approx(law.constants(), rel=0.01)


def test_outliers_do_not_rule_the_fit(fit):
    data = draw()
    loss = data.loss.copy()
    loss[::20] *= 1.3
    found = fit_concept_law(dataclasses.replace(data, loss=loss)).law
    assert found.loss(*ASKED) == pytest.approx(LAW.loss(*ASKED), rel=0.005)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("of", ["concept", "baseline"])
def test_derivatives_are_those_of_the_law(of, offsets):
    data = draw() if of == "concept" else draw_baseline()
    problem = (_concept_problem if of == "concept" else _baseline_problem)(data, offsets)
    theta = np.random.default_rng(0).uniform(-1.5, 0.5, len(problem.names()))
    predicted, derivatives = problem.predict(theta)
    assert np.exp(predicted) == pytest.approx(problem.law(theta).loss(data.N, data.D, data.R, data.P))
    for place in range(len(theta)):
        step = np.zeros_like(theta)
        step[place] = 1e-6
        numeric = (problem.predict(theta + step)[0] - problem.predict(theta - step)[0]) / 2e-6
        assert derivatives[:, place] == pytest.approx(numeric, abs=1e-8), problem.names()[place]


def relabelled(**columns):
    return dataclasses.replace(draw(), **columns)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (draw(ratios=(4.0,)), "one R only"),
        (draw(ratios=(3.9, 4.0, 4.1)), "one R only"),
        (draw(shares=(0.5,)), "one P only"),
        (draw(sizes=(1e8,)), "one N only"),
        (draw(points=1), "D is between"),
        (draw(sizes=(1e7, 1e8), ratios=(2.0, 4.0), shares=(0.3,)), "one P only"),
        (draw(shares=(0.3, 0.7), ratios=(2.0, 4.0), sizes=(1e7, 1e8)).take(np.arange(6 * 16)), "6 different"),
        (relabelled(R=(draw().N * draw().P / 1e6) ** 0.5), "d2, gamma apart"),
        (relabelled(loss=draw().loss - 3), "loss must be above 0"),
        (relabelled(P=draw().P + 0.5), "P between 0 and 1"),
        (draw_baseline(), "lacks R or P"),
        (draw().take(np.arange(0)), "no points"),
    ],
)
def test_what_runs_do_not_determine_is_refused(data, problem):
    with pytest.raises(ScalingError, match=problem) as refusal:
        fit_concept_law(data)
    assert "\n" not in str(refusal.value)


def test_a_baseline_of_too_few_sizes_is_refused():
    with pytest.raises(ScalingError, match="one N only"):
        fit_baseline_law(draw_baseline(sizes=(1e8,)))
    with pytest.raises(ScalingError, match="2 different N"):
        fit_baseline_law(draw_baseline(sizes=(1e8, 1e9)))


def test_what_is_hardly_determined_is_remarked_upon():
    absent = dataclasses.replace(LAW, token=Term(1e-9, 0.3))
    remarks = fit_concept_law(draw(absent, noise=0.0)).remarks
    assert any("A_token is below" in remark and "say nothing" in remark for remark in remarks)
    assert any("d1 is hardly determined" in remark for remark in fit_concept_law(draw(absent)).remarks)
    offsets = fit_concept_law(draw(), offsets=True).remarks
    assert any(remark.endswith("not told apart from 0") for remark in offsets)


def test_tail_samples_are_denser_towards_the_end():
    data = draw(points=1)
    D = np.arange(1.0, 1001.0)
    one = Trajectories(*(np.resize(column, 1000) for column in (0, 1e8, D, 4.0, 0.5, D)))
    for tail, median in ((0.0, 1000**0.5), (0.5, 1001 / 4), (1.0, 500.5)):
        chosen = tail_sample(one, per_run=20, tail=tail)
        assert len(np.unique(chosen.D)) == 20 and chosen.D.max() == 1000
        if tail:
            assert np.median(chosen.D) == pytest.approx(median, rel=0.1)
        else:
            assert np.median(chosen.D) < 100
    assert tail_sample(one, per_run=2000).D.tolist() == D.tolist()
    assert tail_sample(one, skip=0.1).D.min() == 100
    assert len(tail_sample(data)) == len(data)


def test_a_bootstrap_is_reproducible_and_its_intervals_hold_the_fit(fit):
    first, again, other = (bootstrap(fit, 12, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    alphas = [law.constants()["alpha"] for law in bootstrap(fit, 40)]
    low, high = interval(alphas, 27)
    assert low < fit.law.constants()["alpha"] < high and high - low < 0.05
    plain = np.quantile(alphas, [0.05, 0.95])
    assert low <= plain[0] and high >= plain[1]


def test_a_bootstrap_draws_runs(fit):
    """A run whose points are all shifted moves the laws of draws as one."""
    data = draw(noise=0.0)
    shift = 0.02 * np.random.default_rng(0).standard_normal(27)[data.run]
    shifted = fit_concept_law(dataclasses.replace(data, loss=data.loss * np.exp(shift)))
    spread = np.std([law.loss(*ASKED) for law in bootstrap(shifted, 30)]) / LAW.loss(*ASKED)
    assert spread > 0.002  # 0.02 over 27 runs; were points drawn, it would be a quarter of that


def test_few_runs_have_no_intervals():
    with pytest.raises(ScalingError, match="4 runs are too few"):
        bootstrap(fit_baseline_law(draw_baseline()))


def test_left_out_runs_are_predicted(fit):
    data = fit.trajectories
    errors = held_out(data, [np.unique(data.run[data.N == 1e9])], fit_concept_law)
    assert errors.runs == 9 and 0.0005 < errors.mean < 0.02 and errors.worst_run < 0.02
    with pytest.raises(ScalingError, match="one N only"):
        held_out(data, [np.unique(data.run[data.N > 1e7])], fit_concept_law)


def decays(noise=0.0, seed=0):
    generator = np.random.default_rng(seed)
    R, N = (np.array(column) for column in zip(*itertools.product(RATIOS, SIZES), strict=True))
    loss = generator.uniform(2.2, 3.0, len(R))
    drop = 0.004 * loss**2.5 * R**-0.1 * N**0.05
    return Decays(loss, R, N, drop * np.exp(noise * generator.standard_normal(len(R))))


def test_the_decay_law_is_recovered():
    exact = fit_decay_law(decays())
    assert (exact.k, exact.a, exact.b, exact.c) == pytest.approx((0.004, 2.5, -0.1, 0.05), rel=1e-5)
    assert exact.r_squared == pytest.approx(1)
    assert exact.drop(2.5, 4.0, 1e8) == pytest.approx(0.004 * 2.5**2.5 * 4**-0.1 * 1e8**0.05)
    noisy = fit_decay_law(decays(noise=0.02))
    assert noisy.a == pytest.approx(2.5, rel=0.2) and 0.9 < noisy.r_squared < 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({name: getattr(decays(), name)[:4] for name in Decays.__slots__}, "4 runs cannot"),
        ({"R": np.full(9, 4.0)}, "one R only"),
        ({"N": np.full(9, 1e8)}, "one N only"),
        ({"stable_loss": np.full(9, 2.5)}, "one L_stable only"),
        ({"stable_loss": 5 * decays().N ** -0.05}, "change together"),
        ({"drop": -decays().drop}, "did not fall"),
    ],
)
def test_decays_that_determine_nothing_are_refused(changes, problem):
    with pytest.raises(ScalingError, match=problem):
        fit_decay_law(dataclasses.replace(decays(), **changes))


@pytest.mark.parametrize(
    ("ratios", "shares", "at_limits"),
    [((2.0, 8.0), (0.3, 0.7), ("P",)), ((2.0, 8.0), (0.7, 0.7), ()), ((2.0, 2.0), (0.3, 0.7), ())],
)
def test_the_optimum_is_that_of_brute_force(ratios, shares, at_limits):
    law, flops = dataclasses.replace(LAW, concept=Term(60.0, 0.33, gamma=0.3)), 1e20
    found = optimum(law, flops, ratios, shares)
    N, R, P = np.meshgrid(np.geomspace(1e7, 1e11, 400), np.geomspace(*ratios, 60), np.linspace(*shares, 60))
    D = flops / (6 * N * (1 - P + P / R))
    loss = law.loss(N, D, R, P)
    best = np.unravel_index(loss.argmin(), loss.shape)
    assert found.loss <= loss[best] and found.loss == pytest.approx(loss[best], rel=1e-5)
    np.testing.assert_allclose([found.R, found.P], [R[best], P[best]], rtol=0.05)
    np.testing.assert_allclose(found.N, N[best], rtol=0.1)
    assert 3 * approximate_flops_per_token(found.N, found.R, found.P) * found.D == pytest.approx(flops)
    assert found.at_limits == at_limits


def test_the_optimum_follows_the_cost_it_is_given():
    free_backbone = optimum(LAW, 1e20, (2.0, 8.0), (0.3, 0.7), lambda N, R, P: 2 * N * (1 - P))
    assert free_backbone.at_limits == ("R", "P") and abs(free_backbone.R - 2) < 1e-3


def test_equal_loss_needs_as_many_times_the_flops():
    reached = optimum(BASELINE, 1e20)
    assert compute_multiplier(BASELINE, reached) == pytest.approx(1, rel=1e-3)
    more = dataclasses.replace(reached, loss=optimum(BASELINE, 2.5e20).loss)
    assert compute_multiplier(BASELINE, more) == pytest.approx(2.5, rel=1e-3)
    with pytest.raises(ScalingError, match="nowhere between"):
        compute_multiplier(BASELINE, Optimum(1e20, 1e9, 1e10, 4.0, 0.5, 1.7, ()))
