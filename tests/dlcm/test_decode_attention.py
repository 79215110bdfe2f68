"""One query per row against its cache: the kernels, under Triton's interpreter or for real, and their twin.

The reference is ordinary attention in float64, row by row, over keys and values that are repeated as often as they
count. All that no row sees is NaN or infinite, and caches are views of larger tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlcm.cached_attention import cached_attention, decode_attention_reference
from dlcm.kernels import decode_attention as kernel
from dlcm.kernels.decode_attention import decode_attention
from tests.waits import counting_waits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_CUDA = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs CUDA")
TILE = 16  # entries, so that few of them make many tiles
CAPACITY = 3 * TILE
EDGES = [0, 1, TILE - 1, TILE, TILE + 1, 2 * TILE, CAPACITY - 1, CAPACITY]
HEADS = [(2, 2), (4, 2), (3, 1), (8, 1)]
WINDOWS = [1, TILE - 1, TILE, TILE + 3, CAPACITY + 1]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "MAX_TILE_ENTRIES", TILE)


@dataclass(frozen=True)
class Step:
    """The arguments of one step of decoding."""

    q_BHN: Tensor
    k_BSKN: Tensor
    v_BSKN: Tensor
    length_B: Tensor
    count_BS: Tensor | None
    window: int | None = None

    @property
    def arguments(self) -> tuple:
        return self.q_BHN, self.k_BSKN, self.v_BSKN, self.length_B, self.count_BS


def random_step(
    lengths: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    counted: bool = False,
    capacity: int = CAPACITY,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    window: int | None = None,
) -> Step:
    """Keys and values are interleaved in the second layer of a cache of two, heads have NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    q_BHN = 2 * torch.randn(rows, heads, head_dim, generator=generator)
    cache_BS2KN = 2 * torch.randn(rows, capacity, 2, kv_heads, head_dim, generator=generator)
    length_B = torch.tensor(lengths, dtype=torch.int32 if seed % 2 else torch.int64)
    back_BS = length_B[:, None] - torch.arange(capacity)  # of the last entry, 1
    unseen_BS = back_BS <= 0
    if window is not None:
        unseen_BS |= back_BS > window
    count_BS = None
    if counted:
        count_BS = torch.randint(0, 5, (rows, capacity), generator=generator, dtype=torch.int32)
        unseen_BS |= count_BS == 0
    cache_BS2KN[unseen_BS] = torch.nan if seed % 3 else torch.inf
    cache_BLS2KN = torch.stack([torch.full_like(cache_BS2KN, torch.nan), cache_BS2KN], 1).to(DEVICE, dtype)
    k_BSKN, v_BSKN = F.pad(cache_BLS2KN, (0, 8), value=torch.nan)[:, 1, ..., :head_dim].unbind(2)
    count_BS = None if count_BS is None else torch.stack([count_BS, count_BS], 1).to(DEVICE)[:, 1]
    return Step(q_BHN.to(DEVICE, dtype), k_BSKN, v_BSKN, length_B.to(DEVICE), count_BS, window)


def dense(step: Step) -> Tensor:
    """Attention to replicated keys and values, in float64 on the CPU."""
    q_BHN, k_BSKN, v_BSKN = (x.cpu().double() for x in (step.q_BHN, step.k_BSKN, step.v_BSKN))
    out_BHN = torch.zeros_like(q_BHN)
    for row, length in enumerate(step.length_B.tolist()):
        first = 0 if step.window is None else max(length - step.window, 0)
        times_s = torch.ones(length).int() if step.count_BS is None else step.count_BS[row, :length].cpu()
        times_s[:first] = 0
        if not times_s.any():
            continue
        group = q_BHN.shape[1] // k_BSKN.shape[2]
        k_tHN, v_tHN = (
            x_SKN[:length].repeat_interleave(times_s, 0).repeat_interleave(group, 1)
            for x_SKN in (k_BSKN[row], v_BSKN[row])
        )
        p_Ht = (torch.einsum("HN,tHN->Ht", q_BHN[row], k_tHN) / q_BHN.shape[2] ** 0.5).softmax(1)
        out_BHN[row] = torch.einsum("Ht,tHN->HN", p_Ht, v_tHN)
    return out_BHN


@contextmanager
def in_parts(parts: int) -> Iterator[None]:
    """So many of a row, and NaN in what is allocated and never written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with mock.patch.object(kernel, "_parts", lambda *_: parts):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_is_dense(out_BHN: Tensor, step: Step, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    assert out_BHN.dtype == step.q_BHN.dtype and out_BHN.is_contiguous()
    torch.testing.assert_close(out_BHN.cpu().double(), dense(step), rtol=rtol, atol=atol)


HALF = {"rtol": 1e-2, "atol": 1e-2}  # inputs are exact, probabilities and outputs are rounded to 11 bits or 8


# Against ordinary attention


@settings(max_examples=24)
@given(
    st.lists(st.sampled_from(EDGES), min_size=1, max_size=3),
    st.sampled_from(HEADS),
    st.sampled_from([16, 24]),
    st.sampled_from(["counted", None, *WINDOWS]),
    st.sampled_from([1, 2, 5]),
    st.integers(0, 2**16),
)
def test_kernel_is_dense(
    lengths: list[int], heads: tuple[int, int], head_dim: int, limit: int | str | None, parts: int, seed: int
):
    window = None if limit == "counted" else limit
    step = random_step(lengths, *heads, head_dim, limit == "counted", seed=seed, window=window)
    with in_parts(parts):
        assert_is_dense(decode_attention(*step.arguments, window=window), step)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=4),
    st.sampled_from(HEADS),
    st.sampled_from(["counted", None, 1, 2, 19, 21]),
    st.integers(0, 2**16),
)
def test_twin_is_dense(lengths: list[int], heads: tuple[int, int], limit: int | str | None, seed: int):
    window = None if limit == "counted" else limit
    step = random_step(lengths, *heads, 6, limit == "counted", 20, torch.float64, seed, window)
    assert_is_dense(decode_attention_reference(*step.arguments, window), step, 1e-12, 1e-12)


@pytest.mark.parametrize(
    ("head_dim", "parts"), [(6, 5), (16, 1), (24, 5), (64, 5), (80, 1), (80, 5), (128, 1), (256, 1), (256, 5)]
)
def test_head_dimensions(head_dim: int, parts: int):
    """Those of a power of two, and those that are masked."""
    step = random_step([CAPACITY, 21], 4, 2, head_dim, counted=True)
    with in_parts(parts):
        assert_is_dense(decode_attention(*step.arguments), step)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("heads", [(16, 1), (20, 1), (3, 3)])
def test_groups_larger_than_a_tensor_core(heads: tuple[int, int], counted: bool):
    step = random_step([CAPACITY, 5], *heads, counted=counted)
    assert_is_dense(decode_attention(*step.arguments), step)


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=NEEDS_CUDA), torch.float16, torch.float32])
@pytest.mark.parametrize(("head_dim", "counted"), [(64, False), (128, True)])
def test_is_dense_in_the_tiles_used_in_earnest(
    head_dim: int, counted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()
    step = random_step([350, 64, 0, 257], 4, 2, head_dim, counted, capacity=350, dtype=dtype)
    tolerance = {} if dtype == torch.float32 else HALF
    for parts in (1, 4):
        with in_parts(parts):
            assert_is_dense(decode_attention(*step.arguments), step, **tolerance)
    assert_is_dense(decode_attention(*step.arguments), step, **tolerance)
    assert_is_dense(decode_attention_reference(*step.arguments), step, **tolerance)


def test_large_scores_do_not_overflow():
    step = random_step([CAPACITY, 5], counted=True)
    step = replace(step, q_BHN=100 * step.q_BHN)
    for parts in (1, 2):
        with in_parts(parts):
            assert_is_dense(decode_attention(*step.arguments), step, rtol=2e-3, atol=2e-3)
    assert_is_dense(decode_attention_reference(*step.arguments), step, rtol=2e-3, atol=2e-3)


# What counts mean, and what is not there


@pytest.mark.parametrize("attend", [decode_attention, decode_attention_reference])
def test_to_count_once_is_not_to_be_counted(attend):
    step = random_step([CAPACITY, 20, 0])
    ones_BS = torch.ones(3, CAPACITY, dtype=torch.int32, device=DEVICE)
    assert torch.equal(attend(*replace(step, count_BS=ones_BS).arguments), attend(*step.arguments))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_rows_that_see_nothing_are_zero(parts: int):
    """Whatever their cache holds, and whatever other rows see."""
    step = random_step([0, CAPACITY, 0, 1])
    count_BS = torch.ones(4, CAPACITY, dtype=torch.int32, device=DEVICE)
    count_BS[1] = 0
    k_BSKN, v_BSKN = (torch.full_like(x, torch.nan) for x in (step.k_BSKN, step.v_BSKN))
    k_BSKN[3], v_BSKN[3] = step.k_BSKN[3], step.v_BSKN[3]
    step = replace(step, k_BSKN=k_BSKN, v_BSKN=v_BSKN, count_BS=count_BS)
    with in_parts(parts):
        outputs = [decode_attention(*step.arguments), decode_attention_reference(*step.arguments)]
    for out_BHN in outputs:
        assert not out_BHN[:3].any()
        torch.testing.assert_close(out_BHN[3], step.v_BSKN[3, 0].repeat_interleave(2, 0))


def test_no_rows_and_no_capacity():
    for step in (random_step([]), random_step([0, 0], capacity=0)):
        for attend in (decode_attention, decode_attention_reference):
            assert torch.equal(attend(*step.arguments), torch.zeros_like(step.q_BHN))


# The newest entry, put there on the way


@settings(max_examples=16)
@given(
    st.lists(st.sampled_from(EDGES), min_size=1, max_size=3),
    st.sampled_from(HEADS),
    st.sampled_from([16, 24]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([None, *WINDOWS]),
    st.integers(0, 2**16),
)
def test_newest_entry_is_put_there_and_seen(
    lengths: list[int], heads: tuple[int, int], head_dim: int, parts: int, window: int | None, seed: int
):
    """By the kernel and by its twin; nothing else of the cache changes."""
    step = random_step(lengths, *heads, head_dim, seed=seed, window=window)
    there_BS = torch.arange(CAPACITY, device=DEVICE) == step.length_B[:, None] - 1
    last_B = (step.length_B - 1).clamp(min=0)
    rows = torch.arange(len(lengths), device=DEVICE)
    newest_BKN = tuple(x_BSKN[rows, last_B].nan_to_num(posinf=0) for x_BSKN in (step.k_BSKN, step.v_BSKN))
    for attend in (decode_attention, cached_attention if DEVICE.type == "cpu" else decode_attention):
        caches = [x.masked_fill(there_BS[:, :, None, None], torch.nan) for x in (step.k_BSKN, step.v_BSKN)]
        with in_parts(parts):
            out_BHN = attend(step.q_BHN, *caches, step.length_B, newest_BKN=newest_BKN, window=window)
        assert_is_dense(out_BHN, step)
        for cache_BSKN, x_BSKN in zip(caches, (step.k_BSKN, step.v_BSKN), strict=True):
            torch.testing.assert_close(cache_BSKN, x_BSKN, rtol=0, atol=0, equal_nan=True)


def test_newest_entry_counts_once():
    step = random_step([5, 3], counted=True)
    with pytest.raises(ValueError, match="where all count once"):
        decode_attention(*step.arguments, newest_BKN=(step.k_BSKN[:, 0], step.v_BSKN[:, 0]))


def test_no_window_over_slots():
    step = random_step([5, 3], counted=True)
    with pytest.raises(ValueError, match="none over slots"):
        cached_attention(*step.arguments, window=2)


# How a cache lies in memory


def test_caches_may_lie_in_memory_as_they_like():
    step = random_step([CAPACITY, 20], counted=True)
    with in_parts(2):
        expected_BHN = decode_attention(*step.arguments)
        for order in ([0, 1, 2, 3], [0, 2, 1, 3], [1, 0, 2, 3]):
            back = [order.index(i) for i in range(4)]
            k_BSKN, v_BSKN = (x.permute(order).contiguous().permute(back) for x in (step.k_BSKN, step.v_BSKN))
            moved = replace(step, k_BSKN=k_BSKN, v_BSKN=v_BSKN, q_BHN=step.q_BHN.mT.contiguous().mT)
            assert torch.equal(decode_attention(*moved.arguments), expected_BHN)


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_caches_may_be_larger_than_32_bits_count(dimension: int):
    """Rows, entries or heads more than 2^31 numbers apart; what lies between is never written and takes no memory."""
    step = random_step([2, 3, 3], 3, 3, capacity=3, dtype=torch.float16)
    strides = [512, 128, 32]
    strides[dimension] = 2**30 + 2**10
    memory = torch.empty(2 * strides[dimension] + 2**12, dtype=torch.float16, device=DEVICE)
    k_BSKN, v_BSKN = (memory.as_strided((3, 3, 3, 16), (*strides, 1), offset) for offset in (0, 16))
    step = replace(step, k_BSKN=k_BSKN.copy_(step.k_BSKN), v_BSKN=v_BSKN.copy_(step.v_BSKN))
    assert_is_dense(decode_attention(*step.arguments), step, **HALF)


@pytest.mark.parametrize("name", ["k_BSKN", "v_BSKN", "count_BS"])
def test_heads_must_be_contiguous(name: str):
    step = random_step([5, 3], counted=True)
    spread = torch.stack([getattr(step, name)] * 2, -1)[..., 0]
    with pytest.raises(ValueError, match="last dimension has stride 1"):
        decode_attention(*replace(step, **{name: spread}).arguments)


# How a row is cut up


def test_parts_fill_the_device_and_are_not_too_small():
    assert kernel._parts(12, 2**15, 132) == 64
    assert kernel._parts(12 * 8, 2**15, 132) == 8
    assert kernel._parts(12 * 8, 1000, 132) == 2
    assert kernel._parts(12 * 512, 2**15, 132) == 1
    assert kernel._parts(12, 10, 132) == 1
    for heads in range(1, 1500):
        parts = kernel._parts(heads, 2**15, 132)
        assert parts.bit_count() == 1 and parts <= kernel.MAX_PARTS
        assert heads * parts >= 132 * kernel.PROGRAMS_PER_MULTIPROCESSOR / 2 or parts == kernel.MAX_PARTS


# As an operator of torch


@pytest.mark.parametrize(("counted", "parts"), [(False, 2), (True, 1)])
def test_operator_is_registered_as_it_should_be(counted: bool, parts: int):
    """Schema, fake tensors, and tracing with dynamic shapes."""
    step = random_step([CAPACITY, 7, 0], counted=counted)
    with in_parts(parts):
        torch.library.opcheck(torch.ops.dlcm.decode_attention.default, step.arguments)
        if not counted:
            appended = (
                *step.arguments[:4],
                step.k_BSKN[:, 0].nan_to_num(posinf=0),
                step.v_BSKN[:, 0].nan_to_num(posinf=0),
            )
            torch.library.opcheck(torch.ops.dlcm.append_and_attend.default, appended)
            torch.library.opcheck(torch.ops.dlcm.append_and_attend.default, (*appended, 5))


@pytest.mark.parametrize("attend", [decode_attention, cached_attention])
def test_compiles_into_one_graph(attend):
    step = random_step([CAPACITY, 7, 0], counted=True)

    def doubled(q_BHN: Tensor, *rest):
        return 2 * attend(q_BHN + 1, *rest)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*step.arguments), doubled(*step.arguments))


@pytest.mark.parametrize("counted", [False, True])
def test_the_host_does_not_wait(counted: bool):
    step = random_step([CAPACITY, 7, 0], counted=counted)
    with counting_waits() as places:
        cached_attention(*step.arguments)
        decode_attention_reference(*step.arguments)
    assert not places


def test_there_is_no_backward_pass():
    step = random_step([5, 3])
    out_BHN = decode_attention(step.q_BHN.requires_grad_(), *step.arguments[1:])
    with pytest.raises(RuntimeError, match=r"through dlcm\W+decode_attention.* no autograd formula"):
        out_BHN.sum().backward()


@NEEDS_CUDA
def test_a_captured_graph_is_replayed_at_other_lengths():
    step = random_step([CAPACITY, 7, 0], counted=True)
    later = random_step([3, 0, CAPACITY - 5], counted=True, seed=1)
    step = replace(step, length_B=step.length_B.int())
    with in_parts(4):
        decode_attention(*step.arguments)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # which no wait of the host survives
            out_BHN = decode_attention(*step.arguments)
    for x, y in zip(step.arguments, later.arguments, strict=True):
        x.copy_(y)
    graph.replay()
    assert_is_dense(out_BHN, later)


# Where the kernel runs


def queries(dtype: torch.dtype = torch.float32, head_dim: int = 16) -> Tensor:
    return torch.zeros(2, 4, head_dim, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("q_BHN", "need"),
    [(queries(torch.float64), "use bf16, fp16 or fp32"), (queries(head_dim=257), "up to 256, got 257: use more heads")],
)
def test_what_the_kernel_does_not_have_is_an_error(q_BHN: Tensor, need: str):
    cache = q_BHN.new_zeros(2, 3, 2, q_BHN.shape[2])
    length_B = torch.tensor([3, 1], device=DEVICE)
    with pytest.raises(ValueError, match=f"decode attention .*{need}"):
        decode_attention(q_BHN, cache, cache, length_B)
    assert not cached_attention(q_BHN, cache, cache, length_B).any()  # its twin has everything


def test_a_device_without_the_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "InterpretedFunction", type(None))  # as if Triton did not interpret
    assert "needs CUDA, got tensors on cpu" in (kernel.obstacle(queries().cpu()) or "")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the interpreter")
def test_the_interpreter_has_no_bf16():
    assert "interpreter has none" in (kernel.obstacle(queries(torch.bfloat16)) or "")


def test_old_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: mock.Mock(major=7))
    on_cuda = mock.Mock(dtype=torch.float16, shape=(2, 4, 16), device=torch.device("cuda"))
    assert "compute capability 8.0" in (kernel.obstacle(on_cuda) or "")


@NEEDS_CUDA
def test_the_kernel_is_what_runs_on_cuda(monkeypatch: pytest.MonkeyPatch):
    step = random_step([CAPACITY, 7, 0], counted=True)
    monkeypatch.setattr("dlcm.cached_attention.decode_attention_reference", None)
    assert_is_dense(cached_attention(*step.arguments), step)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="of the CPU")
def test_the_twin_is_what_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    step = random_step([CAPACITY, 7, 0], counted=True)
    monkeypatch.setattr(kernel, "decode_attention", None)
    assert_is_dense(cached_attention(*step.arguments), step)
