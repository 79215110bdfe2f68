"""Cross-entropy without logits against `F.cross_entropy` of all of them, and that it never holds more than a chunk."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dlcm.linear_cross_entropy import IGNORED, _softmax_step, linear_cross_entropy
from tests.conftest import needs_compiler

WIDTH, CHUNK = 12, 8
VOCABULARIES = [37, 128]  # with and without padding
TOKENS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 6 * CHUNK - 3]


def plain_loss(h_TE: Tensor, weight_VE: Tensor, target_T: Tensor) -> Tensor:
    """The slow twin, softmax in fp32 or wider."""
    logits_TV = F.linear(h_TE, weight_VE)
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), target_T, reduction="sum")


def problem(
    tokens: int, vocabulary: int, ignored: float = 0.3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight that need gradients, and targets of which a share is ignored."""
    generator = torch.Generator().manual_seed(tokens)
    h_TE = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VE = torch.randn(vocabulary, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target_T = torch.randint(vocabulary, (tokens,), generator=generator)
    target_T[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return h_TE, weight_VE, target_T


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of a multiple of the loss, as the mean over targets is."""
    return torch.autograd.grad(0.3 * loss, inputs)


class Watch(TorchDispatchMode):
    """Notes every operator and the shapes and dtypes of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.tensors: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(func._schema.name)
        self.tensors += [
            (tuple(x.shape), x.dtype) for x in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(x)
        ]
        return result

    @property
    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape, _ in self.tensors)


# Parity


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_loss_and_gradients_are_those_of_the_twin(tokens: int, vocabulary: int, ignored: float):
    h_TE, weight_VE, target_T = problem(tokens, vocabulary, ignored)
    actual = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK)
    expected = plain_loss(h_TE, weight_VE, target_T)
    assert actual.dtype == torch.float64 and actual.shape == ()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(actual, h_TE, weight_VE), gradients(expected, h_TE, weight_VE)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert all(bool((x.abs().max() > 1e-3) == (target_T != IGNORED).any()) for x in ours)


@pytest.mark.parametrize("needed", ["h", "weight"])
def test_one_gradient_alone(needed: str):
    h_TE, weight_VE, target_T = problem(20, 37)
    (h_TE if needed == "weight" else weight_VE).requires_grad_(False)
    leaf = h_TE if needed == "h" else weight_VE
    with Watch() as watch:
        loss = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK)
    torch.testing.assert_close(gradients(loss, leaf), gradients(plain_loss(h_TE, weight_VE, target_T), leaf))
    products = [watch.operators.count(name) for name in ("aten::mm", "aten::addmm")]
    assert products == ([6, 0] if needed == "h" else [3, 3]), "three chunks, and not a product more than it takes"


def test_a_nearly_sure_prediction_keeps_its_gradient_in_bf16():
    """bf16 has no number between 0.996 and 1, so p - 1 has to come before rounding. And nothing overflows."""
    h_TE = torch.tensor([[6.0, 0.0], [0.0, 500.0]], dtype=torch.bfloat16, requires_grad=True)
    weight_VE, target_T = torch.eye(2, dtype=torch.bfloat16), torch.tensor([0, 1])
    (grad_h_TE,) = torch.autograd.grad(linear_cross_entropy(h_TE, weight_VE, target_T), h_TE)
    p = torch.tensor(-6.0).sigmoid()
    torch.testing.assert_close(grad_h_TE[0].float(), torch.stack([-p, p]), rtol=0.005, atol=0)
    assert not grad_h_TE[1].any()


def test_nothing_uninitialised_is_read():
    """Deterministic mode fills new memory with NaN."""
    h_TE, weight_VE, target_T = problem(20, 37)
    torch.use_deterministic_algorithms(True)
    try:
        actual = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK)
        assert all(bool(x.isfinite().all()) for x in (actual, *gradients(actual, h_TE, weight_VE)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_calls_add_up_in_grad():
    h_TE, weight_VE, target_T = problem(20, 37)
    for _ in range(2):
        linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK).backward()
    once = torch.autograd.grad(plain_loss(h_TE, weight_VE, target_T), (h_TE, weight_VE))
    torch.testing.assert_close((h_TE.grad, weight_VE.grad), tuple(2 * grad for grad in once))


# Precision


@pytest.mark.parametrize("chunk_tokens", [4, 500])
def test_autocast_is_as_exact_as_the_twin(chunk_tokens: int):
    """Products in bf16 and the rest in fp32, over 125 chunks as over one."""
    h_TE, weight_VE, target_T = problem(500, 300, dtype=torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (h_TE, weight_VE)]
    reference = gradients(plain_loss(*exact, target_T), *exact)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=chunk_tokens)
        theirs = plain_loss(h_TE, weight_VE, target_T)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for our, their, x in zip(
        gradients(ours, h_TE, weight_VE), gradients(theirs, h_TE, weight_VE), reference, strict=True
    ):
        assert our.dtype == torch.float32
        assert 1e-4 < (our - x).norm() / x.norm() < 0.01, "bf16, but no worse"
        assert (our - x).norm() <= 1.2 * (their - x).norm()


def test_autocast_leaves_fp64_alone():
    h_TE, weight_VE, target_T = problem(20, 37)
    with torch.autocast("cpu", torch.bfloat16):
        actual = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK)
    torch.testing.assert_close(actual, plain_loss(h_TE, weight_VE, target_T))


def test_gradients_come_in_the_dtypes_of_their_inputs():
    h_TE, weight_VE, target_T = problem(20, 37, dtype=torch.bfloat16)
    loss = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=1)
    assert loss.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (h_TE, weight_VE)]
    for ours, x in zip(gradients(loss, h_TE, weight_VE), gradients(plain_loss(*exact, target_T), *exact), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - x).norm() < 0.01 * x.norm(), "sums over chunks in bf16 would be worse"


# Memory and waiting


@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_than_a_chunk_of_logits_is_ever_made(autocast: bool):
    h_TE, weight_VE, target_T = problem(50 * CHUNK, 128, dtype=torch.float32)
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with Watch() as ours, context:
        linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=4 * CHUNK).backward()
    with Watch() as theirs, context:
        plain_loss(h_TE, weight_VE, target_T).backward()
    assert theirs.largest == h_TE.shape[0] * 128, "what is to be avoided"
    assert ours.largest <= max(4 * CHUNK * 128, h_TE.numel())
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"} & {*ours.operators}, "waits for the device"
    casts = [tensor for tensor in ours.tensors if tensor == ((128, WIDTH), torch.bfloat16)]
    assert len(casts) == autocast, "once a call"


@pytest.mark.parametrize("reason", ["no_grad", "nothing needs it"])
def test_evaluation_computes_no_gradient(reason: str):
    h_TE, weight_VE, target_T = problem(20, 37)
    if reason == "nothing needs it":
        h_TE, weight_VE = h_TE.detach(), weight_VE.detach()
    with torch.set_grad_enabled(reason != "no_grad"), Watch() as watch:
        loss = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK)
    assert not loss.requires_grad
    assert watch.operators.count("aten::mm") == 3
    assert not {"aten::addmm", "aten::exp_", "aten::scatter_"} & {*watch.operators}
    torch.testing.assert_close(loss, plain_loss(h_TE, weight_VE, target_T).detach())


def test_rows_of_logits_begin_at_whole_cache_lines():
    h_TE, weight_VE, target_T = problem(20, 37)
    with torch.no_grad(), Watch() as watch:
        linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK)
    assert ((7, 64), torch.float64) in watch.tensors


# Refusals


def test_what_does_not_fit_is_refused():
    h_TE, weight_VE, target_T = problem(20, 37)
    for h, target in ((h_TE, target_T[1:]), (h_TE, target_T[:, None]), (h_TE[:0], target_T[:0])):
        with pytest.raises(ValueError, match=r"must be \(T, E\) and \(T,\), T > 0"):
            linear_cross_entropy(h, weight_VE, target)
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=0)


@pytest.mark.parametrize("wrong", [-1, 37, 50])
def test_a_target_outside_the_vocabulary_is_refused(wrong: int):
    """Also where it would lie in the padding."""
    h_TE, weight_VE, target_T = problem(20, 37)
    target_T[3] = wrong
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(h_TE, weight_VE, target_T)


def test_a_second_backward_is_refused():
    h_TE, weight_VE, target_T = problem(20, 37)
    loss = linear_cross_entropy(h_TE, weight_VE, target_T)
    loss.backward(retain_graph=True)
    before = h_TE.grad.clone()
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()
    assert torch.equal(h_TE.grad, before)


def test_double_backward_is_refused():
    h_TE, weight_VE, target_T = problem(20, 37)
    loss = linear_cross_entropy(h_TE, weight_VE, target_T)
    (grad_h_TE,) = torch.autograd.grad(loss.square(), h_TE, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_h_TE.sum().backward()


# Compiled


@needs_compiler
def test_compiled_is_the_same_and_compiles_no_more_after_the_first_ragged_chunk():
    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]
    compilations.clear()
    for dtype, tolerance, graphs in ((torch.float64, 1e-12, 2), (torch.bfloat16, 0.01, 3)):
        for tokens in (20, 3 * CHUNK, 41, 15):  # chunks of 7 and 6, of 8, of 7 and 6, of 8 and 7
            h_TE, weight_VE, target_T = problem(tokens, 37, dtype=dtype)
            compiled = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK, compiled=True)
            plain = linear_cross_entropy(h_TE, weight_VE, target_T, chunk_tokens=CHUNK)
            torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=0)
            for ours, theirs in zip(
                gradients(compiled, h_TE, weight_VE), gradients(plain, h_TE, weight_VE), strict=True
            ):
                assert (ours - theirs).norm() <= tolerance * theirs.norm()
            assert compilations["unique_graphs"] == graphs, (
                "one for the first length of all, one for any, in each dtype"
            )


@needs_compiler
@pytest.mark.parametrize("gradient", [False, True])
def test_the_compiled_step_makes_no_copy_of_its_chunk(gradient: bool):
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    logits_tP, target_t1 = torch.randn(CHUNK, 128).bfloat16(), torch.randint(37, (CHUNK, 1))
    with torch.no_grad():
        step = torch.compile(_softmax_step, fullgraph=True)
        _, (code, *_) = run_and_get_code(step, logits_tP, target_t1, target_t1 > 5, 37, gradient)
    made = re.findall(r"= empty_strided_cpu\(\(([\d, ]*)\)", code)
    assert made and all(torch.Size(int(n) for n in shape.split(",") if n.strip()).numel() <= CHUNK for shape in made)
