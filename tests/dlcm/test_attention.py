"""Attention over packed documents: each backend against the softmax written out, and the choice between them."""

import functools
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dlcm.attention
from dlcm.attention import AttentionBackendError, causal_attention, resolve_backend
from dlcm.layout import PackedLayout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def packed(lengths: list[int], device: torch.device = CPU) -> PackedLayout:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return PackedLayout.from_cu_seqlens(cu_seqlens, int(cu_seqlens[-1]), device=device)


def naive_attention(
    q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, document_T: Tensor, window: int | None = None
) -> Tensor:
    """Masked softmax over the whole row, head by head."""
    position_T = torch.arange(len(document_T), device=document_T.device)
    return naive_attention_to_past(q_THN, k_TKN, v_TKN, (document_T, position_T), (document_T, position_T), window)


def naive_attention_to_past(
    q_THN: Tensor,
    k_UKN: Tensor,
    v_UKN: Tensor,
    asking: tuple[Tensor, Tensor],
    asked: tuple[Tensor, Tensor],
    window: int | None,
) -> Tensor:
    """The same from queries to keys, each of a document and at a position."""
    heads, group = q_THN.shape[1], q_THN.shape[1] // k_UKN.shape[1]
    back_TU = asking[1][:, None] - asked[1]
    visible_TU = (asking[0][:, None] == asked[0]) & (back_TU >= 0)
    if window is not None:
        visible_TU &= back_TU < window
    outputs = []
    for head in range(heads):
        scores_TU = q_THN[:, head] @ k_UKN[:, head // group].T / q_THN.shape[2] ** 0.5
        weights_TU = scores_TU.masked_fill(~visible_TU, -torch.inf).softmax(1)
        outputs.append(weights_TU @ v_UKN[:, head // group])
    return torch.stack(outputs, 1)


def random_qkv(tokens: int, heads: int, kv_heads: int, head_dim: int, seed: int) -> list[Tensor]:
    """Large enough (scores of a few units) that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(tokens, h, head_dim, generator=generator, dtype=torch.float64)).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def assert_same_function(attention, reference, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    """Equal outputs, and equal gradients under a random cotangent."""
    ours, theirs = attention(*inputs), reference(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(theirs)
    gradients = torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_sdpa_equals_the_naive_softmax(heads: int, kv_heads: int):
    @settings(max_examples=30)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**16))
    def check(lengths: list[int], seed: int):
        layout = packed(lengths)
        assert_same_function(
            lambda q, k, v: causal_attention(q, k, v, layout, "sdpa"),
            lambda q, k, v: naive_attention(q, k, v, layout.document_T),
            random_qkv(layout.total, heads, kv_heads, head_dim=6, seed=seed),
        )

    check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (3, 1)])
def test_a_window_is_a_band_behind_each_position(heads: int, kv_heads: int):
    """Windows from the position alone to more than all documents have, with and without a past."""

    @settings(max_examples=30)
    @given(
        st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=1, max_size=4),
        st.booleans(),
        st.integers(1, 13),
        st.integers(0, 2**16),
    )
    @example([(5, 0), (1, 3)], True, 1, 0)
    @example([(7, 5), (2, 0)], True, 12, 0)
    def check(documents: list[tuple[int, int]], has_past: bool, window: int, seed: int):
        new, past = zip(*documents, strict=True)
        past = past if has_past else [0] * len(past)
        layout, context = packed(new), packed([n + p for n, p in documents] if has_past else new)
        position_T = layout.position_T + torch.tensor(past)[layout.document_T]
        (q, _, _), (_, k, v) = (random_qkv(x.total, heads, kv_heads, 6, seed) for x in (layout, context))
        assert_same_function(
            lambda q, k, v: causal_attention(q, k, v, layout, "sdpa", context if has_past else None, window),
            lambda q, k, v: naive_attention_to_past(
                *(q, k, v), (layout.document_T, position_T), (context.document_T, context.position_T), window
            ),
            [q, k, v],
        )

    check()


def test_auto_runs_the_reference_on_cpu():
    layout = packed([3, 4])
    q, k, v = random_qkv(7, 4, 2, 6, seed=0)
    assert torch.equal(causal_attention(q, k, v, layout), causal_attention(q, k, v, layout, "sdpa"))


# The choice of a backend


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The modules that seem to be installed."""
    names: set[str] = set()
    monkeypatch.setattr(dlcm.attention, "importable", names.__contains__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return names


FA2, FA4 = {"flash_attn.flash_attn_interface"}, {"flash_attn.cute", "cutlass"}
PACKAGES = {"flash_attn": FA2, "flash_attn_4": FA4}


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        (set(), "torch_varlen"),
        (FA2, "flash_attn"),
        (FA2 | {"flash_attn.cute"}, "flash_attn"),  # as flash-attn may be packaged
        (FA4, "flash_attn_4"),
        (FA2 | FA4, "flash_attn_4"),
    ],
)
def test_auto(installed: set[str], taken: str, importable: set[str]):
    importable.update(installed)
    assert resolve_backend("auto", CPU, torch.bfloat16, 64) == "sdpa"
    assert resolve_backend("auto", CUDA, torch.float32, 64) == "sdpa"
    assert resolve_backend("auto", CUDA, torch.bfloat16, 64) == taken
    assert resolve_backend("auto", CUDA, torch.float16, 64) == taken


def test_auto_leaves_flash_attn_4_to_gpus_that_have_it(importable: set[str], monkeypatch: pytest.MonkeyPatch):
    importable.update(FA4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert resolve_backend("auto", CUDA, torch.bfloat16, 64) == "torch_varlen"
    with pytest.raises(AttentionBackendError, match=r"Hopper or Blackwell GPU, got compute capability 8\.6"):
        resolve_backend("flash_attn_4", CUDA, torch.bfloat16, 64)


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn", "torch_varlen", "sdpa"])
def test_a_named_backend_that_can_run_is_taken(backend: str, importable: set[str]):
    importable.update(FA2 | FA4)
    assert resolve_backend(backend, CUDA, torch.bfloat16, 64) == backend


@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32), (CUDA, torch.float64)])
@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn", "torch_varlen"])
def test_a_named_backend_that_cannot_run_is_an_error(backend: str, device, dtype, importable: set[str]):
    importable.update(FA2 | FA4)
    with pytest.raises(AttentionBackendError, match=f"'{backend}' needs fp16 or bf16 on a CUDA device") as error:
        resolve_backend(backend, device, dtype, 64)
    assert str(dtype) in str(error.value) and device.type in str(error.value)
    assert "attention_backend='auto'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("head_dim", [12, 264])
def test_head_dimensions_that_flash_attention_does_not_have(head_dim: int, importable: set[str]):
    importable.update(FA2 | FA4)
    assert resolve_backend("auto", CUDA, torch.bfloat16, head_dim) == "sdpa"
    for backend in (*PACKAGES, "torch_varlen"):
        with pytest.raises(AttentionBackendError, match=f"multiple of 8 up to 256, got {head_dim}: use another"):
            resolve_backend(backend, CUDA, torch.bfloat16, head_dim)


@pytest.mark.parametrize(("backend", "package"), [("flash_attn", "flash-attn"), ("flash_attn_4", "flash-attn-4")])
def test_a_package_that_is_not_installed_is_an_error(backend: str, package: str, importable: set[str]):
    importable.update((FA2 | FA4) - PACKAGES[backend])  # the other one's does not help
    with pytest.raises(AttentionBackendError, match=f"pip install {package},"):
        resolve_backend(backend, CUDA, torch.bfloat16, 64)


def test_importable_looks_for_the_module_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("raise ImportError('undefined symbol')")
    (tmp_path / "broken_package" / "part.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importable = dlcm.attention.importable
    assert importable("torch.nn") and not importable("torch.no_such_module")
    assert not importable("no_such_package.module") and not importable("broken_package.part")


def test_the_cpu_does_not_look_for_packages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dlcm.attention, "importable", lambda module: pytest.fail(f"looked for {module}"))
    assert resolve_backend("auto", CPU, torch.bfloat16, 64) == "sdpa"


@pytest.mark.parametrize("backend", ["flash_attn_4", "flash_attn", "torch_varlen"])
def test_no_silent_fallback(backend: str):
    with pytest.raises(AttentionBackendError):
        causal_attention(*random_qkv(3, 2, 2, 4, seed=0), packed([3]), backend)


# The three FlashAttention backends, through stand-ins that compute naively and check what they are given


def naive_varlen(q, k, v, cu_seqlens: Tensor, longest: int, left: int | None) -> Tensor:
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0 and cu_seqlens[-1] == len(q)
    assert isinstance(longest, int) and longest == cu_seqlens.diff().max()
    document_T = torch.repeat_interleave(torch.arange(len(cu_seqlens) - 1), cu_seqlens.diff())
    return naive_attention(q, k, v, document_T, None if left in (None, -1) else left + 1)


def stand_in(name: str, function, monkeypatch: pytest.MonkeyPatch) -> None:
    """An importable module `name`, and its parents, with `flash_attn_varlen_func`."""
    for parent in ("flash_attn", name):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    sys.modules[name].flash_attn_varlen_func = function


def assert_equals_sdpa(
    backend: str, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, given: list[int | None]
) -> None:
    """With windows too; `given` gets what the stand-in is told of how far a token sees to the left."""
    monkeypatch.setattr(dlcm.attention, "resolve_backend", lambda backend, device, dtype, head_dim: backend)
    layout = packed([5, 1, 8, 2])
    for window in (None, 1, 3, 7, 8):  # the last leaves nothing out

        def attention(q, k, v, window=window, backend=backend):
            return causal_attention(q, k, v, layout, backend, window=window)

        reference = functools.partial(attention, backend="sdpa")
        assert_same_function(attention, reference, random_qkv(16, heads, kv_heads, head_dim=6, seed=1))
    endless = None if backend == "flash_attn_4" else -1
    assert given == [endless, 0, 2, 6, endless]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_flash_attn_interface(heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        assert causal and dropout_p == 0 and softmax_scale is None and window_size[1] == 0
        assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        left.append(window_size[0])
        return naive_varlen(q, k, v, cu_seqlens_q, max_seqlen_q, left[-1])

    left: list[int | None] = []
    stand_in("flash_attn", flash_attn_varlen_func, monkeypatch)
    assert_equals_sdpa("flash_attn", monkeypatch, heads, kv_heads, left)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_flash_attn_4_interface(heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch):
    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size):
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
        assert window_size[1] == 0
        left.append(window_size[0])
        return naive_varlen(q, k, v, cu_seqlens_q, max_seqlen_q, left[-1]), None

    left: list[int | None] = []
    stand_in("flash_attn.cute", flash_attn_varlen_func, monkeypatch)
    assert_equals_sdpa("flash_attn_4", monkeypatch, heads, kv_heads, left)


@pytest.fixture
def forget_signature():
    """The answer to "does varlen_attn have enable_gqa?" is remembered: forget it before and after."""
    dlcm.attention._varlen_attn_has_gqa.cache_clear()
    yield
    dlcm.attention._varlen_attn_has_gqa.cache_clear()


def assert_causal_varlen_call(q, k, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, grouped: bool) -> None:
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    assert scale is None and window_size[1] == 0, "causal is a window without future"
    assert grouped or q.shape[1] == k.shape[1], "key-value heads must be repeated where enable_gqa is missing"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_torch_varlen_interface(heads: int, kv_heads: int, forget_signature, monkeypatch: pytest.MonkeyPatch):
    """torch 2.13: key-value heads stay grouped."""

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ):
        assert_causal_varlen_call(query, key, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, grouped=enable_gqa)
        assert key.shape[1] == kv_heads
        left.append(window_size[0])
        return naive_varlen(query, key, value, cu_seq_q, max_q, left[-1])

    left: list[int | None] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert_equals_sdpa("torch_varlen", monkeypatch, heads, kv_heads, left)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_torch_varlen_without_enable_gqa(heads: int, kv_heads: int, forget_signature, monkeypatch: pytest.MonkeyPatch):
    """torch 2.11 and 2.12: key-value heads are repeated, each for its own group of query heads."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert_causal_varlen_call(query, key, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, grouped=False)
        left.append(window_size[0])
        return naive_varlen(query, key, value, cu_seq_q, max_q, left[-1])

    left: list[int | None] = []
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert_equals_sdpa("torch_varlen", monkeypatch, heads, kv_heads, left)


def test_the_stand_ins_take_what_torch_takes():
    """Every argument the stand-ins above rely on exists in the installed torch, in the same order."""
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's varlen attention needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_torch_varlen_on_cuda(heads: int, kv_heads: int, window: int | None):
    layout = packed([130, 1, 257, 64], CUDA)
    q, k, v = (
        x.detach().to(CUDA, torch.bfloat16).requires_grad_()
        for x in random_qkv(layout.total, heads, kv_heads, head_dim=64, seed=0)
    )
    out = causal_attention(q, k, v, layout, "torch_varlen", window=window)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = naive_attention(*wide, layout.document_T, window)
    torch.testing.assert_close(out.double(), reference, rtol=2e-2, atol=4e-2)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), cotangent)
    references = torch.autograd.grad(reference, wide, cotangent.double())
    for gradient, expected in zip(gradients, references, strict=True):
        assert (gradient.double() - expected).norm() < 2e-2 * expected.norm()
