"""Spikes move nothing, are counted, stop a run that has too many, and are decided alike wherever a run goes on."""

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.train.test_pretrain import Tap, assert_one_error, assert_same_run, final_tensors, stop_at, tap
from tests.train.tiny import MODELS, prepare_tiny, write_config
from train.checkpoint import TrainingState, latest_checkpoint, load_state, verify_checkpoint
from train.config import SpikesConfig
from train.metrics import read_metrics
from train.pretrain import main
from train.spikes import LEAST_DEVIATION, REACH, SpikeRule

__all__ = ["tap"]  # a fixture
CPU = torch.device("cpu")
STATE = TrainingState("data", "tokenizer", 1)
RULE = SpikesConfig(deviations=6.0, window=20)
WATCHED = {"deviations": 10.0, "window": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("data"))


def judged(norms: Sequence[float], rule: SpikesConfig = RULE) -> list[int]:
    """Which of the norms are spikes, by number."""
    spikes = SpikeRule(rule, STATE, CPU)
    return [number for number, norm in enumerate(norms) if spikes.is_spike(torch.tensor(norm))]


def ordinary(number: int, deviation: float = 0.3, seed: int = 0) -> list[float]:
    """Norms about 1, log-normal."""
    noise = torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (deviation * noise).exp().tolist()


def slow_twin(norms: Sequence[float], rule: SpikesConfig) -> list[int]:
    """The rule in plain numbers."""
    mean = variance = 0.0
    found, counted = [], 0
    for number, norm in enumerate(norms):
        if not 0 < norm < math.inf:
            continue
        distance, deviation = math.log(norm) - mean, max(variance**0.5, LEAST_DEVIATION)
        if counted >= rule.window:
            if distance > rule.deviations * deviation:
                found.append(number)
            distance = min(max(distance, -REACH * deviation), REACH * deviation)
        share = max(1 / (counted + 1), 1 / rule.window)
        mean, variance, counted = mean + share * distance, (1 - share) * (variance + share * distance**2), counted + 1
    return found


@pytest.mark.parametrize("deviations", [1.0, 2.0, 6.0])
def test_the_rule_is_its_slow_twin(deviations: float):
    rule = SpikesConfig(deviations=deviations, window=20)
    norms = ordinary(300, 0.5)
    norms[30:40:3] = [math.nan, math.inf, 0.0, 1e-30]
    norms[50:60:3] = [1e3, 1e30, 5.0, 20.0]
    assert judged(norms, rule) == slow_twin(norms, rule)
    assert {50, 53} <= set(judged(norms, rule))


def test_at_first_mean_and_deviation_are_those_of_all():
    spikes, state, norms = SpikeRule(RULE, STATE, CPU), dataclasses.replace(STATE), ordinary(20)
    for norm in norms:
        assert not spikes.is_spike(torch.tensor(norm, dtype=torch.float64))
    spikes.write_to(state)
    logs = [math.log(norm) for norm in norms]
    assert math.log(state.usual_norm) == pytest.approx(statistics.fmean(logs))
    assert state.norms == 20 and state.norm_variance == pytest.approx(statistics.pvariance(logs))


def test_ordinary_norms_are_no_spikes():
    for seed in range(3):
        assert judged(ordinary(1000, seed=seed)) == []
    warming_up = [norm * 30 * math.exp(-step / 15) + 1 for step, norm in enumerate(ordinary(300))]  # 30 times as long
    assert judged(warming_up) == []
    assert judged([1.0] * 100 + [4.0] * 10) == []  # nearly constant ones are held to no less than LEAST_DEVIATION


def test_a_spike_hardly_moves_the_limit_and_a_new_level_comes_to_be_the_usual_one():
    norms = ordinary(100)
    assert judged([*norms, 1e9, 50.0, *norms]) == [100, 101]
    risen = judged([*norms, *(30 * norm for norm in ordinary(200, seed=1))])
    assert 100 in risen and max(risen) < 130


def test_what_is_known_survives_json_bit_for_bit(tmp_path: Path):
    norms, state = ordinary(60), dataclasses.replace(STATE)
    whole, half = SpikeRule(RULE, STATE, CPU), SpikeRule(RULE, STATE, CPU)
    for norm in norms[:30]:
        whole.is_spike(torch.tensor(norm)), half.is_spike(torch.tensor(norm))
    half.write_to(state)
    resumed = SpikeRule(RULE, TrainingState(**json.loads(json.dumps(dataclasses.asdict(state)))), CPU)
    for norm in norms[30:]:
        whole.is_spike(torch.tensor(norm)), resumed.is_spike(torch.tensor(norm))
    ours, theirs = dataclasses.replace(STATE), dataclasses.replace(STATE)
    whole.write_to(ours), resumed.write_to(theirs)
    assert ours == theirs and ours.norms == 60


# --- in a run ---


def lengthen(*steps: int) -> Callable[[int, torch.nn.Module, torch.Tensor], None]:
    """Gradients of these steps are a million times as long."""

    def after(step: int, model: torch.nn.Module, sums: torch.Tensor) -> None:
        if step in steps:
            for parameter in model.parameters():
                parameter.grad *= 1e6

    return after


@pytest.mark.parametrize("architecture", list(MODELS))
def test_a_spike_moves_neither_parameters_nor_moments(
    architecture: str, data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    """Skipped, it leaves what the step before left, and the run goes on."""
    tap.after = lengthen(5)
    config = write_config(
        tmp_path / "run.yaml", architecture, data, tmp_path / "run", spikes=WATCHED, checkpoint={"every": 1, "keep": 9}
    )
    assert main([str(config)]) == 0
    checkpoints = tmp_path / "run" / "checkpoints"

    def tensors(step: int) -> list[bytes]:
        names = ("model.safetensors", "optimizer.safetensors")
        return [(checkpoints / f"step_{step:08d}" / name).read_bytes() for name in names]

    assert tensors(6) == tensors(5)
    assert all(ours != theirs for ours, theirs in zip(tensors(7), tensors(6), strict=True))
    lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["spikes"] for line in lines] == [line["skipped"] for line in lines] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert "step 6: skipped as a spike, its gradient's norm is" in capsys.readouterr().out
    state = load_state(latest_checkpoint(tmp_path / "run"))
    assert (state.spikes, state.skipped, state.bad_in_a_row, state.norms) == (1, 1, 0, 8)


def test_a_run_that_stopped_beside_a_spike_goes_on_as_if_it_had_not(data: Path, tmp_path: Path, tap: Tap):
    tap.after = lengthen(4, 6)
    for run in ("whole", "halves"):
        config = write_config(tmp_path / f"{run}.yaml", "dlcm", data, tmp_path / run, spikes=WATCHED)
        tap.before = stop_at(4) if run == "halves" else lambda step: None
        assert (main([str(config)]) == 0) == (run == "whole")
    tap.before = lambda step: None
    assert main(["--resume", str(tmp_path / "halves")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")
    whole, halves = (load_state(latest_checkpoint(tmp_path / run)) for run in ("whole", "halves"))
    assert whole == halves and whole.spikes == 2


@pytest.mark.parametrize("architecture", list(MODELS))
def test_no_false_alarm_while_a_run_warms_up(architecture: str, data: Path, tmp_path: Path):
    """Nor is a run without spikes another one for being watched."""
    for run, spikes in {"watched": {"deviations": 6.0, "window": 10}, "not": {}}.items():
        changes = {"schedule": {"steps": 40, "warmup_steps": 20}, "evaluation": {"every": 40}, "batch": {"rows": 16}}
        config = write_config(tmp_path / f"{run}.yaml", architecture, data, tmp_path / run, spikes=spikes, **changes)
        assert main([str(config)]) == 0
    state = load_state(latest_checkpoint(tmp_path / "watched"))
    assert state.spikes == state.skipped == 0 and state.norms == 40
    ours, theirs = final_tensors(tmp_path / "watched"), final_tensors(tmp_path / "not")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all("spikes" not in line for line in read_metrics(tmp_path / "not"))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((3, 4, 5), "step 6: loss or gradient not finite, or a spike, in 3 steps in a row"),
        ((3, 5), "step 6: more than 1 spikes in about 3 steps"),
    ],
)
def test_too_many_spikes_stop_the_run(
    steps: tuple[int, ...], message: str, data: Path, tmp_path: Path, tap: Tap, capsys: pytest.CaptureFixture[str]
):
    most = 10 if len(steps) == 3 else 1
    tap.after = lengthen(*steps)
    run_dir = tmp_path / "run"
    changes = {"spikes": WATCHED | {"most": most}, "checkpoint": {"every": 2}}
    assert main([str(write_config(tmp_path / "run.yaml", "llama", data, run_dir, **changes))]) == 2
    good = run_dir / "checkpoints" / "step_00000004"
    assert_one_error(capsys, f"{message}; the last good checkpoint, {good}, is intact: go on from it")
    verify_checkpoint(good)
