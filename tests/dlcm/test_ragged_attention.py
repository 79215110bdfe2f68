"""The fused kernel against attention written out: under Triton's interpreter on the CPU, for real where there is CUDA.

The reference is `dense_attention`, in float64, with the bias of the definition. Tiles are made small, so that few
tokens make many of them.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dlcm.attention import AttentionBackendError
from dlcm.cross_attention import masked_attention, replicated_attention, resolve_cross_backend, slot_attention
from dlcm.kernels import ragged_attention as kernel
from dlcm.kernels.ragged_attention import Tile, ragged_attention
from dlcm.layout import ConceptLayout, PackedLayout, SlotGeometry
from tests.dlcm.test_attention import assert_same_function
from tests.dlcm.test_cross_attention import EXTREMES, VISIBILITIES, concept_layout, dense_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WEIGHTINGS = ["replication", "uniform"]
HEADS = [(2, 2), (4, 2)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    """Of unequal sides, so that rows and columns cannot be mistaken for each other."""
    for table, tile in (
        (kernel.FORWARD_TILES, Tile(32, 16, 4, 2)),
        (kernel.QUERY_TILES, Tile(16, 32, 4, 2)),
        (kernel.KEY_VALUE_TILES, Tile(16, 32, 4, 2)),
    ):
        monkeypatch.setitem(table, "full", dict.fromkeys(kernel.HEAD_DIMS, tile))


def random_inputs(layout: ConceptLayout, heads: int, kv_heads: int, head_dim: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = layout.tokens.total, layout.num_slots, layout.num_slots
    return [
        (2 * torch.randn(n, h, head_dim, generator=generator)).to(DEVICE).requires_grad_()
        for n, h in zip(rows, (heads, kv_heads, kv_heads), strict=True)
    ]


def with_gradients(attention, inputs: list[Tensor], cotangent_THN: Tensor) -> list[Tensor]:
    out_THN = attention(*inputs)
    return [out_THN.detach(), *torch.autograd.grad(out_THN, inputs, cotangent_THN.to(out_THN))]


def assert_is_dense(layout: ConceptLayout, weighting: str, heads=4, kv_heads=2, head_dim=16, seed=0) -> None:
    """Forward and the gradients of queries, keys and values, to what fp32 gives."""
    inputs = random_inputs(layout, heads, kv_heads, head_dim, seed)
    cotangent_THN = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed + 1))
    on_device = to_device(layout)
    ours = with_gradients(
        lambda q, k, v: ragged_attention(q, k, v, SlotGeometry.from_layout(on_device, weighting)), inputs, cotangent_THN
    )
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    theirs = with_gradients(lambda q, k, v: dense_attention(q, k, v, layout, weighting), exact, cotangent_THN)
    for name, x, y in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        torch.testing.assert_close(
            x.cpu().double(), y, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def to_device(layout: ConceptLayout) -> ConceptLayout:
    def moved(part):
        names = [field.name for field in dataclasses.fields(part)]
        values = {name: getattr(part, name) for name in names}
        return dataclasses.replace(part, **{n: v.to(DEVICE) for n, v in values.items() if isinstance(v, Tensor)})

    layout = dataclasses.replace(layout, tokens=moved(layout.tokens), concepts=moved(layout.concepts))
    return moved(layout)


def random_layout(lengths: list[int], rate: float, visibility: str, seed: int = 0, bucket: int = 1) -> ConceptLayout:
    boundaries_T = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed)) < rate
    starts_D = torch.tensor([0, *lengths]).cumsum(0)
    boundaries_T[starts_D[:-1]] = True
    tokens = PackedLayout.from_cu_seqlens(starts_D, int(starts_D[-1]))
    return ConceptLayout.from_boundaries(tokens, boundaries_T, visibility, bucket)


# More tokens than a tile has, so that every loop runs: tiles of one document and of several, whole slots and partial.
LONG = {
    "one long document": ([110], 0.4),
    "one concept": ([70], 0.0),
    "every token a boundary": ([55, 20], 1.0),
    "ragged": ([41, 3, 1, 34, 18], 0.4),
    "many short documents": ([1, 2, 3, 4, 5, 6, 7] * 3, 0.5),
    "tiles of exactly the right size": ([64, 32], 0.5),
    "short before long": ([5, 80], 0.5),
    "long before short": ([80, 5], 0.5),
}


@pytest.mark.parametrize(
    ("case", "visibility", "weighting"),
    [
        (case, *how)
        for case, how in zip(LONG.values(), 4 * list(zip(VISIBILITIES, WEIGHTINGS, strict=True)), strict=True)
    ],
    ids=LONG.keys(),
)
def test_is_dense_over_many_tiles(case, visibility: str, weighting: str):
    """How much is visible and how slots are weighed is combined in every way by the two tests that follow."""
    assert_is_dense(random_layout(*case, visibility), weighting)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("case", EXTREMES.values(), ids=EXTREMES.keys())
def test_is_dense_at_the_extremes(case, visibility: str, weighting: str):
    assert_is_dense(concept_layout(*case, visibility), weighting)


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 36), min_size=1, max_size=3),
    st.floats(0, 1),
    st.sampled_from(HEADS),
    st.sampled_from(VISIBILITIES),
    st.sampled_from(WEIGHTINGS),
    st.integers(0, 2**16),
)
def test_is_dense_wherever_boundaries_fall(
    lengths: list[int], rate: float, heads: tuple[int, int], visibility: str, weighting: str, seed: int
):
    assert_is_dense(random_layout(lengths, rate, visibility, seed), weighting, *heads, seed=seed)


@pytest.mark.parametrize("head_dim", [6, 24, 64, 128])
def test_head_dimensions(head_dim: int):
    """Those that the kernel has, and those that are padded."""
    assert_is_dense(random_layout([40, 9], 0.4, "closed"), "replication", 2, 1, head_dim)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_padding_concepts_change_nothing(weighting: str):
    lengths, rate = [33, 20], 0.4
    exact, bucketed = (to_device(random_layout(lengths, rate, "closed", bucket=bucket)) for bucket in (1, 32))
    inputs = random_inputs(exact, 2, 2, 16, seed=0)
    extra = bucketed.num_slots - exact.num_slots
    assert extra > 0
    padded = [inputs[0]] + [torch.cat([x, torch.full_like(x[:1], 50.0).expand(extra, -1, -1)]) for x in inputs[1:]]
    padded = [x.detach().requires_grad_() for x in padded]
    cotangent_THN = torch.randn_like(inputs[0])

    def run(layout, inputs):
        return with_gradients(
            lambda q, k, v: ragged_attention(q, k, v, SlotGeometry.from_layout(layout, weighting)),
            inputs,
            cotangent_THN,
        )

    (out, dq, dk, dv), (padded_out, padded_dq, padded_dk, padded_dv) = run(exact, inputs), run(bucketed, padded)
    torch.testing.assert_close([padded_out, padded_dq], [out, dq])
    for gradient, padded_gradient in ((dk, padded_dk), (dv, padded_dv)):
        torch.testing.assert_close(padded_gradient[:-extra], gradient)
        assert not padded_gradient[-extra:].any()


NEEDS_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=NEEDS_CUDA), torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_half_precision_is_as_good_as_replication(head_dim: int, dtype: torch.dtype):
    """With the tiles that are used in earnest. The bar is 1.5 times the error of the replicated path in this dtype."""
    layout = random_layout([280, 30], 0.25, "closed")
    on_device = to_device(layout)
    inputs = [x.detach().to(dtype).requires_grad_() for x in random_inputs(layout, 2, 1, head_dim, seed=0)]
    cotangent_THN = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    ours = with_gradients(
        lambda q, k, v: ragged_attention(q, k, v, SlotGeometry.from_layout(on_device)), inputs, cotangent_THN
    )
    replicated = with_gradients(lambda q, k, v: replicated_attention(q, k, v, on_device), inputs, cotangent_THN)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    theirs = with_gradients(lambda q, k, v: dense_attention(q, k, v, layout), exact, cotangent_THN.to(dtype))
    floor = torch.finfo(dtype).eps / 4  # half an ulp, of which no path can do better for long
    for name, x, other, y in zip(("out", "dq", "dk", "dv"), ours, replicated, theirs, strict=True):
        error, bar = ((z.cpu().double() - y).norm() / y.norm() for z in (x, other))
        assert error <= 1.5 * max(float(bar), floor), f"{name}: {error:.1e} against {bar:.1e}"


@NEEDS_CUDA  # the interpreter runs one program after the other
def test_gradients_are_the_same_every_time():
    layout = to_device(random_layout([90, 31], 0.4, "closed"))
    inputs = random_inputs(layout, 4, 2, 16, seed=0)
    geometry = SlotGeometry.from_layout(layout)
    cotangent_THN = torch.randn_like(inputs[0])
    first, second = (
        with_gradients(lambda q, k, v: ragged_attention(q, k, v, geometry), inputs, cotangent_THN) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_large_scores_do_not_overflow():
    layout = to_device(random_layout([50], 0.4, "closed"))
    q, k, v = random_inputs(layout, 2, 2, 16, seed=0)
    geometry = SlotGeometry.from_layout(layout)
    results = with_gradients(
        lambda q, k, v: ragged_attention(100 * q, 100 * k, v, geometry), [q, k, v], v.new_ones(50, 2, 16)
    )
    assert all(bool(x.isfinite().all()) for x in results)


def test_inputs_need_not_be_contiguous():
    layout = to_device(random_layout([40], 0.4, "closed"))
    geometry = SlotGeometry.from_layout(layout)
    q, k, v = (x.detach() for x in random_inputs(layout, 2, 2, 16, seed=0))
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in (q, k, v)]  # no multiple of 16 bytes
    expected = ragged_attention(q, k, v, geometry)
    assert torch.equal(ragged_attention(*strided, geometry), expected)
    assert torch.equal(ragged_attention(*shifted, geometry), expected)


# As an operator of torch


def operator_arguments(requires_grad: bool) -> tuple:
    layout = to_device(random_layout([20, 7], 0.4, "closed"))
    inputs = [x.detach().requires_grad_(requires_grad) for x in random_inputs(layout, 4, 2, 16, seed=0)]
    geometry = SlotGeometry.from_layout(layout)
    return (*inputs, *(getattr(geometry, field.name) for field in dataclasses.fields(geometry)), 0.25)


def test_operator_is_registered_as_it_should_be():
    """Schema, fake tensors, autograd, and tracing with dynamic shapes."""
    torch.library.opcheck(torch.ops.dlcm.ragged_attention.default, operator_arguments(requires_grad=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool):
    layout = to_device(random_layout([40, 9], 0.4, "closed"))
    inputs = random_inputs(layout, 4, 2, 16, seed=0)
    geometry = SlotGeometry.from_layout(layout)
    cotangent_THN = torch.randn_like(inputs[0])

    def attend(q, k, v):
        return 2 * ragged_attention(q + 1, k, v, geometry)

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(
        with_gradients(compiled, inputs, cotangent_THN), with_gradients(attend, inputs, cotangent_THN)
    )


def test_survives_activation_checkpointing_and_autocast():
    layout = to_device(random_layout([40, 9], 0.4, "closed"))
    inputs = random_inputs(layout, 4, 2, 16, seed=0)
    geometry = SlotGeometry.from_layout(layout)
    cotangent_THN = torch.randn_like(inputs[0])

    def attend(q, k, v):
        return ragged_attention(q * 2, k, v, geometry)

    plain = with_gradients(attend, inputs, cotangent_THN)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        recomputed = with_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), inputs, cotangent_THN)
    assert all(torch.equal(x, y) for x, y in zip(plain, recomputed, strict=True))


# The choice of a backend


def queries(dtype: torch.dtype = torch.float32, head_dim: int = 16) -> Tensor:
    return torch.empty(3, 2, head_dim, dtype=dtype)


def test_auto_is_a_path_that_needs_no_kernel_on_the_cpu():
    assert resolve_cross_backend("auto", "replication", queries()) == "replicated"
    assert resolve_cross_backend("auto", "uniform", queries()) == "masked"


@NEEDS_CUDA
def test_auto_is_ragged_on_cuda_where_the_kernel_runs():
    def on_cuda(dtype: torch.dtype, head_dim: int) -> Tensor:
        return torch.empty(3, 2, head_dim, dtype=dtype, device=torch.device("cuda"))

    for dtype in kernel.DTYPES:
        assert resolve_cross_backend("auto", "replication", on_cuda(dtype, 64)) == "ragged"
    assert resolve_cross_backend("auto", "replication", on_cuda(torch.float64, 64)) == "replicated"
    assert resolve_cross_backend("auto", "uniform", on_cuda(torch.float16, 256)) == "masked"


@pytest.mark.parametrize(
    ("q_THN", "need"), [(queries(torch.float64), "use bf16, fp16 or fp32"), (queries(head_dim=256), "use more heads")]
)
def test_what_the_kernel_does_not_have_is_an_error(q_THN: Tensor, need: str):
    with pytest.raises(AttentionBackendError, match=f"'ragged' has .* {need}, or use cross_attention_backend='auto'"):
        resolve_cross_backend("ragged", "replication", q_THN)
    layout = concept_layout([3], [True] * 3, "closed")
    slots = q_THN.new_empty(layout.num_slots, 2, q_THN.shape[2])
    with pytest.raises(ValueError, match=need):
        ragged_attention(q_THN, slots, slots, SlotGeometry.from_layout(layout))


def test_a_device_without_the_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "InterpretedFunction", type(None))  # as if Triton did not interpret
    with pytest.raises(AttentionBackendError, match="'ragged' needs CUDA, got tensors on cpu"):
        resolve_cross_backend("ragged", "replication", queries())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the interpreter")
def test_the_interpreter_has_no_bf16():
    with pytest.raises(AttentionBackendError, match="interpreter has none"):
        resolve_cross_backend("ragged", "replication", queries(torch.bfloat16))


def test_triton_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AttentionBackendError, match="pip install triton"):
        resolve_cross_backend("ragged", "replication", queries())


def test_replication_has_no_uniform_weighting():
    with pytest.raises(AttentionBackendError, match="'replicated' counts slots"):
        resolve_cross_backend("replicated", "uniform", queries())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_masked_is_dense(visibility: str, weighting: str):
    layout = random_layout([9, 1, 14], 0.4, visibility)
    assert_same_function(
        lambda q, k, v: masked_attention(q, k, v, layout, weighting),
        lambda q, k, v: dense_attention(q, k, v, layout, weighting),
        [x.detach().cpu().double().requires_grad_() for x in random_inputs(layout, 4, 2, 6, seed=0)],
    )


@pytest.mark.parametrize("backend", ["ragged", "replicated", "masked"])
def test_backends_agree(backend: str):
    layout = to_device(random_layout([30, 9], 0.4, "inclusive"))
    inputs = random_inputs(layout, 4, 2, 16, seed=0)
    torch.testing.assert_close(
        slot_attention(*inputs, layout, "replication", backend),
        slot_attention(*inputs, layout, "replication", "replicated" if backend == "masked" else "masked"),
        rtol=1e-4,
        atol=1e-5,
    )
