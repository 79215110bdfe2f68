"""Self-compression in training: bits reach their target, a resumed run is the run, and nothing else changes."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm import LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.flops import rounded_weights
from dlcm.selfcompress.quantiser import MAX_BITS, quantised_linears
from tests.conftest import arrange, random_documents, tiny_baseline, tiny_dlcm
from tests.train.test_pretrain import Tap, assert_one_error, assert_same_run, final_tensors, metrics, stop_at, tap
from tests.train.tiny import MODELS, prepare_tiny, write_config
from train.checkpoint import TrainingState, latest_checkpoint, load_model, load_state
from train.compression import (
    BitPenalty,
    bits_a_weight,
    fit_quantisers_,
    is_of_quantiser,
    quantiser_groups,
    remove_dead_channels_,
)
from train.config import CompressionConfig, ConfigError, RunConfig, build_model_config, load_run_config
from train.pretrain import build_optimizer, main, optimizer_groups
from train.step import StepSums, update_parameters

__all__ = ["tap"]  # a fixture
ARCHITECTURES = list(MODELS)
LEARNED = {"method": "learned", "target_bits": 1.0, "start": 0.0, "ramp": 0.5}
# Some groups are dead after two steps, and most after eight.
DYING = {"method": "learned", "bits": 1, "gamma": 2.7, "start": 0.0, "ramp": 0.0, "remove_every": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_tiny(tmp_path_factory.mktemp("data"))


def written(tmp_path: Path, architecture: str, data: Path, name: str, **sections: Any) -> Path:
    return write_config(tmp_path / f"{name}.yaml", architecture, data, tmp_path / name, **sections)


def a_run(**compression: Any) -> RunConfig:
    """A run with steps and compression, and nothing else that counts."""
    run = RunConfig(model={"architecture": "llama"}, compression=CompressionConfig(**compression))
    run.schedule.steps = 1000
    return run


def a_model(**overrides: Any) -> LlamaBaselineForCausalLM:
    fields = {"vocab_size": 23, "d_token": 16, "token_heads": 2, "token_ffn": 32, "num_layers": 1}
    return LlamaBaselineForCausalLM(LlamaBaselineConfig(**fields | {"quantiser": "bits"} | overrides))


# Runs


@pytest.mark.parametrize("groups", [{}, {"group_rows": 4, "group_columns": 8}], ids=["rows", "tiles"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_that_loses_channels_goes_on_bit_for_bit(
    architecture: str, groups: dict[str, Any], data: Path, tmp_path: Path, tap: Tap
):
    sections = {"compression": DYING | groups, "log_every": 2, "checkpoint": {"every": 2}}
    assert main([str(written(tmp_path, architecture, data, "whole", **sections))]) == 0
    tap.before = stop_at(5)  # channels go with this step
    config = written(tmp_path, architecture, data, "halves", **sections)
    assert main([str(config)]) != 0
    middle = load_model(latest_checkpoint(tmp_path / "halves"))
    tap.before = lambda step: None
    assert main([str(config)]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")

    last = load_model(latest_checkpoint(tmp_path / "halves"))
    sizes = [sum(rounded_weights(last.config).values())]
    sizes += [sum(layer.weight.numel() for layer in quantised_linears(x).values()) for x in (middle, last)]
    assert sizes[0] > sizes[1] > sizes[2]
    tensors = final_tensors(tmp_path / "halves")
    for name, parameter in last.named_parameters():
        assert tensors[f"exp_avg.{name}"].shape == tensors[f"exp_avg_sq.{name}"].shape == parameter.shape
    lines = [line for line in metrics(tmp_path / "halves") if line["kind"] == "train"]
    assert 0.01 < lines[0]["dead/decoder"] < lines[-1]["dead/decoder"] <= 1
    layers = [layer for name, layer in quantised_linears(last).items() if name.startswith("decoder")]
    bits = sum(bits_a_weight([(x.depth, x.weight.numel() // x.depth.numel())], 1).item() for x in layers)
    expected = bits / rounded_weights(last.config)["decoder"]  # when the last were not removed yet
    assert expected <= lines[-1]["weight_bits/decoder"] < lines[0]["weight_bits/decoder"] < 1
    assert lines[-1]["flops"] - lines[-2]["flops"] < 0.9 * 2 * lines[0]["flops"]  # of two steps


def test_blocks_are_compiled_again_when_they_are_narrower(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    compiled: list[Any] = []
    monkeypatch.setattr("train.pretrain.compile_blocks_", lambda model: compiled.append(model.config.channels_left))
    config = written(tmp_path, "llama", data, "run", compression=DYING | {"remove_every": 4}, compile=True)
    assert main([str(config)]) == 0
    assert compiled[0] is None and compiled[1] != compiled[2] and len(compiled) == 3


def test_a_run_does_not_begin_with_what_is_left_of_another(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(written(tmp_path, "llama", data, "run", compression=DYING))]) == 0
    left = latest_checkpoint(tmp_path / "run")
    assert main([str(written(tmp_path, "llama", data, "next", compression=DYING, init_from=str(left)))]) == 2
    assert_one_error(capsys, "eval.selfcompress export and unpack")


def test_a_run_of_which_nothing_is_left_ends(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = written(tmp_path, "llama", data, "run", compression=DYING | {"gamma": 100.0, "remove_every": 4})
    assert main([str(config)]) == 2
    assert_one_error(capsys, "step 4: no weight of any block has bits left; there is no checkpoint yet")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_and_resumed_half_of_a_compression_equal_the_whole(
    architecture: str, data: Path, tmp_path: Path, tap: Tap
):
    sections = {"compression": LEARNED | {"ramp": 0.0}}
    assert main([str(written(tmp_path, architecture, data, "whole", **sections))]) == 0
    tap.before = stop_at(4)
    config = written(tmp_path, architecture, data, "halves", **sections)
    assert main([str(config)]) != 0
    assert load_state(latest_checkpoint(tmp_path / "halves")).gamma > 0
    tap.before = lambda step: None
    assert main([str(config)]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "halves")


def test_bits_fall_to_the_target_and_metrics_say_so(data: Path, tmp_path: Path):
    sections = {"compression": LEARNED, "schedule": {"steps": 200}, "evaluation": {"every": 200}}
    config = written(tmp_path, "dlcm", data, "run", **sections, log_every=10)
    assert main([str(config)]) == 0
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[0]["weight_bits"] == pytest.approx(4, abs=0.05)
    assert lines[-1]["weight_bits"] == pytest.approx(1.0, abs=0.2)
    assert lines[-1]["loss"] < lines[0]["loss"]
    stages = {"encoder", "backbone", "cross_attention", "decoder"}
    model = load_model(latest_checkpoint(tmp_path / "run"))
    layers = quantised_linears(model)
    for stage in stages:
        own = [layer for name, layer in layers.items() if name.startswith(stage)]
        number = sum(layer.weight.numel() for layer in own)
        dead = sum((layer.used_weight() == 0).all(1).sum().item() * layer.in_features for layer in own)
        assert 0 <= lines[-1][f"dead/{stage}"] <= dead / number  # rows of bits can be zero, too
        depths = [(layer.depth, layer.in_features) for layer in own]
        assert lines[-1][f"weight_bits/{stage}"] == pytest.approx(bits_a_weight(depths, number).item())
    assert {key for key in lines[-1] if "/" in key} == {
        f"{kind}/{x}" for kind in ("weight_bits", "dead") for x in stages
    }
    assert all(layer.depth.min() >= 0 and layer.depth.max() <= MAX_BITS for layer in layers.values())


@pytest.mark.parametrize(
    "compression",
    [{"method": "fixed", "bits": 2}, {"method": "ternary"}, LEARNED | {"group_rows": 4, "group_columns": 8}],
    ids=["fixed", "ternary", "tiles"],
)
def test_the_other_methods_train(compression: dict[str, Any], data: Path, tmp_path: Path):
    config = written(tmp_path, "llama", data, "run", compression=compression, schedule={"steps": 30})
    assert main([str(config)]) == 0
    lines = [line for line in metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    tensors = final_tensors(tmp_path / "run")
    depths = [x for name, x in tensors.items() if name.endswith(".depth") and not name.startswith("exp_avg")]
    if compression["method"] == "fixed":
        assert depths and all(bool((x.ceil() == 2).all()) for x in depths if x.ndim)
        exponents = [x for name, x in tensors.items() if name.startswith("exp_avg.") and name.endswith("exponent")]
        assert all(x.any() for x in exponents)
    for layer in quantised_linears(load_model(latest_checkpoint(tmp_path / "run"))).values():
        values = len(layer.codes()[0].unique())
        assert values <= {"fixed": 4, "ternary": 3, "learned": 16}[compression["method"]]


def test_a_plain_model_can_be_compressed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(written(tmp_path, "llama", data, "plain", schedule={"steps": 60}))]) == 0
    plain = latest_checkpoint(tmp_path / "plain")
    sections = {"init_from": str(plain), "compression": {"method": "fixed", "bits": 8}}
    assert main([str(written(tmp_path, "llama", data, "eight", **sections))]) == 0
    assert "changed  model.quantiser from none to bits" in capsys.readouterr().out
    losses = [line["loss"] for name in ("plain", "eight") for line in metrics(tmp_path / name)]
    assert losses[60] == pytest.approx(losses[58], abs=0.3)  # where the one ended the other begins
    sections = {"init_from": str(tmp_path / "eight" / "checkpoints" / "step_00000008")}
    assert main([str(written(tmp_path, "llama", data, "back", **sections))]) == 2
    assert_one_error(capsys, "changes model.quantiser from bits to none")


# The penalty


def pressed(run: RunConfig, model: LlamaBaselineForCausalLM, steps: int, state: TrainingState) -> list[float]:
    """Bits a weight after each step of AdamW under the penalty alone."""
    penalty = BitPenalty(run, model, state)
    optimizer = torch.optim.AdamW(quantiser_groups(run, model), fused=True)
    layers, bits = quantised_linears(model), []
    for step in range(steps):
        for layer in layers.values():
            layer.depth.grad, layer.exponent.grad = torch.zeros_like(layer.depth), torch.zeros_like(layer.exponent)
        penalty.press_(step)
        optimizer.step()
        penalty.project_()
        bits.append(penalty.metrics()["weight_bits"])
    return bits


def test_gamma_takes_as_many_bits_a_step_from_groups_of_any_size():
    run, state = a_run(method="learned", gamma=0.3, start=0.0, ramp=0.0), TrainingState("data", "tokenizer", 1)
    ends = []
    for overrides in ({}, {"token_ffn": 64}, {"num_layers": 3}, {"quantiser_columns": 4}):
        model = a_model(**overrides)
        fit_quantisers_(run, model)
        before = [layer.depth.detach().clone() for layer in quantised_linears(model).values()]
        pressed(run, model, 40, state)
        after = [layer.depth for layer in quantised_linears(model).values()]
        ends += [(b - a).flatten() for b, a in zip(before, after, strict=True)]
    taken = torch.cat(ends)
    torch.testing.assert_close(taken, torch.full_like(taken, 40 * 0.5 * 0.3 / 6.3), rtol=0.03, atol=0)


def test_the_controller_follows_the_line_and_stays_at_the_target():
    run, model = a_run(method="learned", target_bits=1.5, start=0.1, ramp=0.5), a_model()
    fit_quantisers_(run, model)
    bits = pressed(run, model, 1000, TrainingState("data", "tokenizer", 1))
    assert bits[99] == bits[0]
    assert bits[350] == pytest.approx(2.75, abs=0.1)
    assert bits[700] == pytest.approx(1.5, abs=0.2) and bits[-1] == pytest.approx(1.5, abs=0.2)


def test_depths_and_exponents_take_no_part_in_clipping():
    run, model = a_run(method="learned", gamma=0.3), a_model()
    fit_quantisers_(run, model)
    run.optimizer.lr_token = run.optimizer.lr_other = 1e-3
    optimizer = build_optimizer(run, model)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, 1e-3 if is_of_quantiser(name) else 100.0)
    outcome = update_parameters(optimizer, torch.ones(len(StepSums._fields), dtype=torch.float64), 1.0)
    weights = sum(x.numel() for name, x in model.named_parameters() if not is_of_quantiser(name))
    assert outcome.grad_norm == pytest.approx(100 * weights**0.5)
    for name, parameter in model.named_parameters():
        if is_of_quantiser(name):
            (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
            expected = before[name] - group["lr"] * 1e-3 / (1e-3 + group["eps"])
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_of_a_depth_that_is_not_finite_moves_nothing():
    run, model = a_run(method="learned", gamma=0.3), a_model()
    run.optimizer.lr_token = run.optimizer.lr_other = 1e-3
    optimizer = build_optimizer(run, model)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(iter(quantised_linears(model).values())).depth.grad[0] = torch.nan
    outcome = update_parameters(optimizer, torch.ones(len(StepSums._fields), dtype=torch.float64), 1.0)
    assert outcome.skipped == 1
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


# Removal


@pytest.mark.parametrize("builder", [tiny_dlcm, tiny_baseline])
def test_losses_are_those_without_removal_if_what_is_dead_stays_dead(builder: Any):
    """In tiles: a row that loses columns would weigh less from then on, and its depth move otherwise."""
    run = a_run(method="learned", gamma=10.0, start=0.0, ramp=0.0, bits=1)
    run.optimizer.lr_token = run.optimizer.lr_concept = run.optimizer.lr_other = run.optimizer.lr_boundary = 1e-3
    batch, losses = arrange(random_documents([9, 17, 30], 0), "packed"), []
    for removes in (False, True):
        model = builder(quantiser="bits", quantiser_rows=4, quantiser_columns=4)
        fit_quantisers_(run, model)
        state, optimizer = TrainingState("data", "tokenizer", 1), build_optimizer(run, model)
        for step in range(8):
            loss = model(**batch.inputs, labels=batch.labels).loss
            losses.append(loss.item())
            loss.backward()
            penalty = BitPenalty(run, model, state)
            penalty.press_(step)
            for layer in quantised_linears(model).values():
                layer.depth.grad[layer.depth <= 0] = 1.0
            optimizer.step()
            optimizer.zero_grad()
            penalty.project_()
            if removes:
                names = [group["name"] for group in optimizer.param_groups]
                remove_dead_channels_(model, optimizer, functools.partial(optimizer_groups, run, model))
                assert [group["name"] for group in optimizer.param_groups] == names
        assert bool(model.config.channels_left) == removes
    assert losses[8:] == pytest.approx(losses[:8], rel=1e-9)


def test_what_is_left_keeps_its_moments_and_steps():
    run, model = a_run(method="learned", gamma=0.3), a_model()
    fit_quantisers_(run, model)
    run.optimizer.lr_token = run.optimizer.lr_other = 1e-3
    optimizer = build_optimizer(run, model)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ffn = model.decoder.layers[0].ffn
    before = {name: optimizer.state[x] for name, x in model.named_parameters()}
    ffn.up_proj.depth.data[[3, 7]] = 0
    assert remove_dead_channels_(model, optimizer, functools.partial(optimizer_groups, run, model))
    left = [unit for unit in range(32) if unit not in (3, 7)]
    after = {name: optimizer.state[x] for name, x in model.named_parameters()}
    for kind in ("exp_avg", "exp_avg_sq"):
        for name in ("gate_proj.weight", "gate_proj.depth", "gate_proj.exponent", "up_proj.weight", "up_proj.depth"):
            name = f"decoder.layers.0.ffn.{name}"
            assert torch.equal(after[name][kind], before[name][kind][left])
        name = "decoder.layers.0.ffn.down_proj.weight"
        assert torch.equal(after[name][kind], before[name][kind][:, left])
        assert torch.equal(after["lm_head.weight"][kind], before["lm_head.weight"][kind])
    assert all(own["step"] == 1 for own in after.values()) and len(optimizer.state) == len(after)
    # The bits of a row of 30 weights count as 30 of those that there were at the start.
    number = 2 * 16 * 16 + 2 * 16 * 16 + 3 * 16 * 32
    (group,) = [group for group in optimizer.param_groups if group["name"] == "depth_30"]
    assert group["eps"] == pytest.approx(run.compression.eps * 30 / number) and group["lr"] == run.compression.lr
    bits = BitPenalty(run, model, TrainingState("data", "tokenizer", 1)).metrics()["weight_bits"]
    own = [x.depth.detach().ceil().sum().item() * x.weight.shape[1] for x in quantised_linears(model).values()]
    assert bits == pytest.approx(sum(own) / number)


# Configuration


def test_a_model_without_compression_is_what_it_was(tmp_path: Path):
    run = load_run_config(write_config(tmp_path / "run.yaml", "llama", tmp_path, tmp_path))
    assert build_model_config(run).quantiser == "none"
    assert quantiser_groups(run, LlamaBaselineForCausalLM(build_model_config(run))) == []


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ({"method": "learned"}, "give one of them"),
        ({"method": "learned", "gamma": 0.1, "target_bits": 1.0}, "give one of them"),
        ({"target_bits": 1.0}, "only compression.method=learned reads it"),
        ({"method": "fixed", "gamma": 0.1}, "only compression.method=learned reads it"),
        ({"method": "fixed", "remove_every": 10}, "only compression.method=learned reads it"),
        ({"method": "learned", "gamma": 0.1, "remove_every": 0}, "at least 1"),
        ({"method": "learned", "target_bits": 4.0}, "not below"),
        ({"method": "learned", "target_bits": 0.0}, "above 0 and at most 8"),
        ({"method": "learned", "gamma": 0.1, "start": 0.6}, "together exceed 1"),
        ({"method": "fixed", "group_rows": 5}, "quantiser_rows=5 does not divide"),
    ],
)
def test_impossible_compressions_are_refused(compression: dict[str, Any], message: str, tmp_path: Path):
    config = write_config(tmp_path / "run.yaml", "llama", tmp_path, tmp_path / "run", compression=compression)
    with pytest.raises(ConfigError, match=message):
        load_run_config(config)


def test_shards_lose_no_channels(tmp_path: Path):
    config = write_config(tmp_path / "run.yaml", "llama", tmp_path, tmp_path / "run", compression=DYING)
    with pytest.raises(ConfigError, match=r"set parallel\.strategy=ddp, or leave compression\.remove_every null"):
        load_run_config(config, ["parallel.strategy=fsdp"])


def test_what_the_section_decides_is_not_the_models_to_say(tmp_path: Path):
    config = write_config(tmp_path / "run.yaml", "llama", tmp_path, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"it follows from compression\.method"):
        load_run_config(config, ["model.quantiser=bits"])
    with pytest.raises(ConfigError, match=r"it follows from compression\.remove_every"):
        load_run_config(config, ["model.channels_left=1"])


def test_checkpoints_from_before_compression_still_load(data: Path, tmp_path: Path):
    assert main([str(written(tmp_path, "llama", data, "run"))]) == 0
    checkpoint = latest_checkpoint(tmp_path / "run")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["gamma"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert load_state(checkpoint).gamma == 0
