"""Schedules: pure functions of the step, so that a resumed run needs no schedule state.

The learning rate follows warm-up / stable / decay (WSD): it rises linearly, stays, and falls linearly to a
fraction of its peak over the last part of the run. The sharpening of boundary sampling moves geometrically
from the model's own value to its final one and arrives where the decay begins, so that the model settles, at
a falling rate, on boundaries drawn almost as inference thresholds them. So does the target of the ratio loss, from
another value to the model's own.
"""

from train.config import ScheduleConfig


def decay_start(schedule: ScheduleConfig) -> int:
    """The first step, counted from 0, of the decay."""
    return schedule.steps - round(schedule.decay_fraction * schedule.steps)


def learning_rate_factor(step: int, schedule: ScheduleConfig) -> float:
    """What every group's peak learning rate is multiplied by at `step`, counted from 0.

    The first step already has a rate above zero, and the last one has exactly `final_lr_fraction` of it.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    start = decay_start(schedule)
    if step < start:
        return 1.0
    progress = (step + 1 - start) / (schedule.steps - start)
    return 1.0 - progress + progress * schedule.final_lr_fraction


def sharpening(step: int, initial: float, schedule: ScheduleConfig) -> float:
    """The sharpness of the boundary draw at `step`: `initial` at step 0, final from the decay's start on."""
    return initial if schedule.sharpening_final is None else _moved(step, initial, schedule.sharpening_final, schedule)


def target_ratio(step: int, final: float, schedule: ScheduleConfig) -> float:
    """The target tokens per concept at `step`: the schedule's own at step 0, `final` from the decay's start on."""
    initial = schedule.target_ratio_initial
    return final if initial is None else _moved(step, initial, final, schedule)


def _moved(step: int, initial: float, final: float, schedule: ScheduleConfig) -> float:
    start = decay_start(schedule)
    progress = min(1.0, step / start) if start else 1.0
    return initial ** (1.0 - progress) * final**progress
