"""What a calibration text tells of a model's matrices: what an error in them costs, and what they are multiplied by.

    squared gradients   E[g^2] of the loss against tokens drawn from the model itself, at every position of the text:
                        the diagonal of the Fisher matrix, which is that of the Gauss-Newton Hessian. An error d adds
                        about d^2 E[g^2] / 2 to the loss. Against the text's own tokens, the mean gradient of a model
                        that has not converged would stand in for it.
    input Hessians      sum of x x^T over the inputs x of a linear layer, of which GPTQ needs to know.

Both are of the model as it is, not of one whose first layers have been compressed already.

Legend: T tokens, O x I outputs and inputs of a linear layer.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from eval.loading import EvaluationError, encode_document
from train.documents import Document

Model = DLCMForCausalLM | LlamaBaselineForCausalLM
TOKENS, LENGTH = 16_384, 512  # of text, and of a window


def windows_of(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], positions: int, tokens: int = TOKENS
) -> list[Tensor]:
    """Windows (T,) of the beginnings of documents, about `tokens` in all; each document gives its share.

    Raises:
        EvaluationError: no document has two tokens.
    """
    length, share = min(LENGTH, positions), -(-tokens // max(1, len(documents)))
    windows: list[Tensor] = []
    for document in documents:
        ids_T = encode_document(tokenizer, document.text).input_ids_1T[0, : max(2, share)]
        windows += [window for window in ids_T.split(length) if len(window) > 1]
        if sum(map(len, windows)) >= tokens:
            break
    if not windows:
        raise EvaluationError("the calibration text has no two tokens in a row; give more text")
    return windows


def error_costs(model: Model, windows: Sequence[Tensor], seed: int = 0) -> dict[str, float]:
    """By parameter: what a unit of squared error in one of its values costs, on average, up to a common factor.

    The seed is of the tokens that are drawn. Infinite where no gradient reaches: what decides by a threshold, as the
    boundary detector does, cannot be judged so.
    """
    sums: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    for window_T in windows:
        model.zero_grad(set_to_none=True)
        logits_TV = model(input_ids=window_T[None].to(model.device)).logits[0].cpu()
        drawn_T = torch.multinomial(logits_TV.detach().float().softmax(1), 1, generator=draw)[:, 0]
        torch.nn.functional.cross_entropy(logits_TV, drawn_T, reduction="sum").backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, 0) + parameter.grad.square().mean(dtype=torch.float64)
    model.zero_grad(set_to_none=True)
    found = {name: float(sums[name]) if name in sums else 0.0 for name, _ in model.named_parameters()}
    return {name: cost if cost > 0 else math.inf for name, cost in found.items()}


@torch.no_grad()
def input_hessians(model: Model, windows: Sequence[Tensor]) -> dict[str, Tensor]:
    """By the name of its weight (O, I): sum of x x^T over the inputs of each linear layer, (I, I) fp32 on the CPU."""
    found: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x_TI = arguments[0].flatten(0, -2).float()
        found[name] = found.get(name, 0) + (x_TI.T @ x_TI).cpu()

    hooks = [
        module.register_forward_pre_hook(partial(add, f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        for window_T in windows:
            model(input_ids=window_T[None].to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
