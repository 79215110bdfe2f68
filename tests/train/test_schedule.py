"""The schedules have the shape their docstrings promise, at the corners above all."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import ScheduleConfig
from train.schedule import decay_start, learning_rate_factor, sharpening, target_ratio


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleConfig:
    steps = draw(st.integers(1, 60))
    decay = draw(st.integers(0, steps))
    return ScheduleConfig(
        steps=steps,
        warmup_steps=draw(st.integers(0, steps - decay)),
        decay_fraction=decay / steps,
        final_lr_fraction=draw(st.floats(0, 1)),
        sharpening_final=draw(st.none() | st.floats(0.1, 50)),
    )


def test_warmup_stable_decay():
    schedule = ScheduleConfig(steps=10, warmup_steps=2, decay_fraction=0.4, final_lr_fraction=0.2)
    factors = [learning_rate_factor(step, schedule) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


@given(schedules())
def test_learning_rate_rises_stays_and_falls(schedule: ScheduleConfig):
    factors = [learning_rate_factor(step, schedule) for step in range(schedule.steps)]
    start = decay_start(schedule)
    rising, stable, falling = (
        factors[: schedule.warmup_steps],
        factors[schedule.warmup_steps : start],
        factors[start:],
    )
    assert all(0 < factor <= 1 for factor in rising) and rising == sorted(rising)
    assert set(stable) <= {1.0}
    assert falling == sorted(falling, reverse=True)
    if falling:
        assert falling[-1] == schedule.final_lr_fraction


@given(schedules(), st.floats(0.1, 50))
def test_sharpening_runs_from_initial_to_final(schedule: ScheduleConfig, initial: float):
    values = [sharpening(step, initial, schedule) for step in range(schedule.steps)]
    if schedule.sharpening_final is None:
        assert set(values) == {initial}
        return
    start = decay_start(schedule)
    assert all(value == pytest.approx(schedule.sharpening_final) for value in values[start:])
    if start > 0:
        assert values[0] == pytest.approx(initial)
    if start > 1:
        ratios = [math.log(after / before) for before, after in itertools.pairwise(values[:start])]
        assert ratios == pytest.approx([math.log(schedule.sharpening_final / initial) / start] * len(ratios))


@given(schedules(), st.floats(1.1, 20), st.floats(1.1, 20))
def test_the_target_ratio_moves_like_sharpening_and_ends_at_the_models_own(schedule, initial: float, final: float):
    assert target_ratio(schedule.steps // 2, final, schedule) == final
    schedule.target_ratio_initial, schedule.sharpening_final = initial, final
    for step in range(schedule.steps):
        assert target_ratio(step, final, schedule) == pytest.approx(sharpening(step, initial, schedule))
