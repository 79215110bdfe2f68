"""Unembedding and cross-entropy in one, never holding the logits of more than one chunk of tokens.

At the paper's vocabulary of 128,815 (Table 3), 8,192 tokens have 2.1 GB of logits in bf16 and 4.2 GB in fp32, and
gradients of the same size. Here a chunk's logits become their own gradient in place, and that goes into the gradients
of hidden states and weight, before the next chunk begins: the forward pass computes gradients, the backward pass only
scales them. `F.cross_entropy(F.linear(h, weight), target, reduction="sum")` is the slow twin.

Legend: T tokens, t tokens of one chunk, E width, V vocabulary, P vocabulary rounded up to `VOCABULARY_MULTIPLE`.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # label of positions without a target, as everywhere in transformers

# Tensor cores are fast on rows that begin at multiples of 16 bytes, best of 128. Rows of 128,815 numbers do not.
VOCABULARY_MULTIPLE = 64


def linear_cross_entropy(
    h_TE: Tensor, weight_VE: Tensor, target_T: Tensor, *, chunk_tokens: int = 4096, compiled: bool = False
) -> Tensor:
    """The sum over valid targets of -log softmax(h W^T)[target], in nats.

    Matrix products are in the dtype of autocast, or else of `h_TE`. The softmax, the loss and the weight's gradient,
    summed over chunks, are in fp32, or fp64 where the products are. Only gradients that are needed are computed. They
    are rounded before a loss scale could reach them, which bf16 does not mind and fp16 does.

    Args:
        h_TE: hidden states.
        weight_VE: the unembedding.
        target_T: int64 in [0, V), or `IGNORED`.
        chunk_tokens: upper bound on t; chunks are as equal as T allows. A chunk of 4,096 tokens of 128,815 words takes
            1.06 GB in bf16. Fewer tokens cost time, since each chunk reads and writes the weight's fp32 gradient: at
            width 1,536 that is 1.6 GB, against 1.6 TFLOP of a product of 4,096 tokens (0.5 against 2.3 ms at an
            H100's 3.35 TB/s and 700 TFLOP/s).
        compiled: run the softmax through torch.compile, which makes no copy of a chunk. Without, there is one in fp32.

    Returns:
        Scalar in fp32, or fp64 where the products are.

    Raises:
        ValueError: no token, not one target a token, or `chunk_tokens` below 1.
        RuntimeError: backward is called twice, or is itself differentiated.
    """
    if target_T.shape != h_TE.shape[:1] or len(target_T) == 0:
        raise ValueError(
            f"h of shape {tuple(h_TE.shape)} and target of shape {tuple(target_T.shape)} must be (T, E) and (T,), T > 0"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    if torch.is_grad_enabled() and (h_TE.requires_grad or weight_VE.requires_grad):
        return _LinearCrossEntropy.apply(h_TE, weight_VE, target_T, chunk_tokens, compiled)
    return _loss_and_gradients(h_TE, weight_VE, target_T, chunk_tokens, compiled, False, False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TE: Tensor, weight_VE: Tensor, target_T: Tensor, chunk_tokens: int, compiled: bool
    ) -> Tensor:
        loss, grad_h_TE, grad_weight_VE = _loss_and_gradients(
            h_TE, weight_VE, target_T, chunk_tokens, compiled, *ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(grad_h_TE, grad_weight_VE)
        ctx.spent = False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("linear_cross_entropy has one backward pass, which spends it: compute the loss again")
        ctx.spent = True
        grad_h_TE, grad_weight_VE = ctx.saved_tensors
        for computed in (grad_h_TE, grad_weight_VE):
            if computed is not None:
                computed.mul_(grad)
        return grad_h_TE, grad_weight_VE, None, None, None  # autograd casts to the dtypes of the inputs


def _loss_and_gradients(
    h_TE: Tensor,
    weight_VE: Tensor,
    target_T: Tensor,
    chunk_tokens: int,
    compiled: bool,
    for_h: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss, and its gradients for `h_TE` (in its dtype) and `weight_VE` (fp32 or fp64) where wanted."""
    dtype = h_TE.dtype
    if torch.is_autocast_enabled(h_TE.device.type) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(h_TE.device.type)
    wide = torch.promote_types(dtype, torch.float32)
    softmax_step = _compiled_softmax_step() if compiled else _softmax_step

    vocabulary = len(weight_VE)
    size = math.ceil(len(h_TE) / math.ceil(len(h_TE) / chunk_tokens))
    weight_PE = _padded(weight_VE, dtype)
    logits_tP = weight_PE.new_empty(size, len(weight_PE))
    loss = h_TE.new_zeros((), dtype=wide)
    grad_h_TE = torch.empty_like(h_TE) if for_h else None
    grad_weight_PE = torch.empty_like(weight_PE, dtype=wide) if for_weight else None
    for start in range(0, len(h_TE), size):
        chunk = slice(start, start + size)
        h_tE = h_TE[chunk].to(dtype)
        valid_t1 = (target_T[chunk] != IGNORED)[:, None]
        target_t1 = target_T[chunk, None].where(valid_t1, 0)
        logits_tP = logits_tP[: len(h_tE)]  # the last chunk may be shorter
        torch.mm(h_tE, weight_PE.T, out=logits_tP)
        logits_tP[:, vocabulary:].fill_(-torch.inf)  # padding has neither probability nor gradient
        log_p_t1 = softmax_step(logits_tP, target_t1, valid_t1, vocabulary, for_h or for_weight)
        loss -= log_p_t1.sum()
        if for_h or for_weight:
            # The gradient is p, less 1 at the target, taken off before p is rounded; ignored, both are 0. It is
            # not part of the softmax step because torch.compile would scatter into a copy of the chunk.
            logits_tP.scatter_(1, target_t1, log_p_t1.expm1().to(dtype))
        if grad_h_TE is not None:
            grad_h_TE[chunk] = logits_tP @ weight_PE
        if grad_weight_PE is not None:
            _add_product_(grad_weight_PE, logits_tP.T, h_tE, beta=int(start > 0))
    return loss, grad_h_TE, None if grad_weight_PE is None else grad_weight_PE[:vocabulary]


def _softmax_step(logits_tP: Tensor, target_t1: Tensor, valid_t1: Tensor, vocabulary: int, gradient: bool) -> Tensor:
    """Log-probabilities of the targets, 0 where not valid; `gradient` leaves probabilities in place of the logits."""
    log_p_tP = logits_tP.log_softmax(1, dtype=torch.promote_types(logits_tP.dtype, torch.float32))
    log_p_t1 = log_p_tP[:, :vocabulary].gather(1, target_t1).where(valid_t1, 0)
    if gradient:
        logits_tP.copy_(log_p_tP.exp_().mul_(valid_t1))
    return log_p_t1


@functools.cache
def _compiled_softmax_step() -> Any:
    # At the first chunk of another length, torch.compile makes the length dynamic; it compiles no more after that.
    return torch.compile(_softmax_step, fullgraph=True)


def _padded(weight_VE: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, E) in `dtype`: the weight, and rows of zeros."""
    vocabulary, width = weight_VE.shape
    if vocabulary % VOCABULARY_MULTIPLE == 0:
        return weight_VE.to(dtype)
    weight_PE = weight_VE.new_zeros(vocabulary + -vocabulary % VOCABULARY_MULTIPLE, width, dtype=dtype)
    weight_PE[:vocabulary] = weight_VE
    return weight_PE


def _add_product_(total: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """total = beta * total + left @ right, all of it in the dtype of `total`, and nothing of its size besides."""
    if total.is_cuda and total.dtype != left.dtype:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:  # only CUDA multiplies bf16 into fp32
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=total)
