"""Costs of errors and Hessians of inputs, against what errors cost and inputs are."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dlcm import DLCMForCausalLM
from eval.calibration import Model, error_costs, input_hessians, windows_of
from eval.loading import EvaluationError, load_checkpoint
from tests.conftest import VOCABULARY, tiny_baseline, tiny_dlcm
from tests.eval.conftest import TEXTS, Trained
from train.documents import Document

WINDOWS = [torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)) for length in (40, 23)]


@pytest.mark.parametrize("make", (tiny_dlcm, tiny_baseline))
def test_costs_are_the_fisher_matrix_s_diagonal(make: Callable[[], Model]) -> None:
    model = make()
    costs = error_costs(model, WINDOWS)
    assert costs.keys() == {name for name, _ in model.named_parameters()}
    name, parameter = next((name, x) for name, x in model.named_parameters() if "decoder" in name and x.ndim == 2)
    draws, exact, window_T = 200, 0.0, WINDOWS[1][:10]
    mean = sum(error_costs(model, [window_T], seed)[name] for seed in range(draws)) / draws
    logits_TV = model(input_ids=window_T[None]).logits[0]
    for logits_V in logits_TV:  # over positions, which are drawn for independently
        log_p_V = logits_V.log_softmax(0)
        for token in range(VOCABULARY):
            gradient = torch.autograd.grad(log_p_V[token], parameter, retain_graph=True)[0]
            exact += log_p_V[token].exp().item() * gradient.square().mean().item()
    assert mean == pytest.approx(exact, rel=0.2) and costs[name] > 0
    assert error_costs(model, WINDOWS) == costs != error_costs(model, WINDOWS, seed=1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_decides_by_a_threshold_cannot_be_judged() -> None:
    costs = error_costs(tiny_dlcm(), WINDOWS)
    assert {name for name, cost in costs.items() if math.isinf(cost)} == {
        name for name in costs if name.startswith("detector.")
    }


def test_hessians_are_of_the_inputs_of_every_linear_layer() -> None:
    model = tiny_dlcm()
    assert isinstance(model, DLCMForCausalLM)
    caught: list[Tensor] = []
    hook = model.decoder_norm.register_forward_hook(lambda module, given, h_TE: caught.append(h_TE))
    hessians = input_hessians(model, WINDOWS)
    hook.remove()
    weights = dict(model.named_parameters())
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {f"{name}.weight" for name in linear} == hessians.keys()
    assert all(hessian.shape == 2 * (weights[name].shape[1],) for name, hessian in hessians.items())
    h_TE = torch.cat(caught) / model.config.token_width_multiplier
    torch.testing.assert_close(hessians["lm_head.weight"], (h_TE.T @ h_TE).float(), rtol=1e-4, atol=1e-5)


def test_windows_are_of_all_documents(trained: Trained) -> None:
    tokenizer = load_checkpoint(trained.llama).tokenizer
    documents = [Document(TEXTS[name] * 20, name, name, None) for name in ("en", "code", "zh")]
    windows = windows_of(tokenizer, documents, 256, tokens=900)
    assert 890 <= sum(map(len, windows)) <= 900 and max(map(len, windows)) == 256
    assert [len(window) for window in windows] == [256, 44] * 3
    with pytest.raises(EvaluationError, match="no two tokens"):
        windows_of(tokenizer, [], 256)
