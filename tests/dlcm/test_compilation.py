"""A step without waste: padding changes no number, code is compiled once and equals eager, the host waits once."""

import copy
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import dlcm.attention
import dlcm.compilation
from dlcm import DLCMForCausalLM
from dlcm.blocks import TransformerStack
from dlcm.causal_lm import PackedCausalLM
from dlcm.compilation import CompilationError, compile_blocks_
from dlcm.concepts import AdjacentSmoothing
from dlcm.host import OnHost
from dlcm.layout import ConceptRooms, PackedLayout
from tests.conftest import arrange, needs_compiler, random_documents, tiny_baseline, tiny_dlcm
from tests.waits import counting_waits, masked_sdpa

BUILDERS: list[Callable[..., PackedCausalLM]] = [tiny_dlcm, tiny_baseline]
EVERY_LAYER: dict[str, Any] = {"cross_attention_every": 1, "decoder_layers": 2}
# What the dlcm's boundaries can be like: p lies in [0, 1], so a threshold beyond it means all, or first tokens alone.
THRESHOLDS = {"ragged": 0.5, "one concept": 2.0, "all boundary": -1.0}


@pytest.fixture(autouse=True)
def small_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dlcm.compilation, "CONCEPT_BUCKET", 8)
    yield
    torch._dynamo.reset()


def forward(model: PackedCausalLM, documents: Sequence[Tensor], **options: Any) -> Any:
    """One packed forward pass; its draws are always the same."""
    batch = arrange(documents, "packed")
    if isinstance(model, DLCMForCausalLM):
        options["generator"] = torch.Generator().manual_seed(0)
    return model(**batch.inputs, labels=batch.labels, **options)


def gradients(model: PackedCausalLM, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def assert_same(one: PackedCausalLM, other: PackedCausalLM, documents: Sequence[Tensor], **tolerance: float) -> None:
    """Logits, losses and gradients."""
    ours, theirs = forward(one, documents), forward(other, documents)
    torch.testing.assert_close(ours.logits, theirs.logits, **tolerance)
    torch.testing.assert_close(ours.loss, theirs.loss, **tolerance)
    if "concept_lengths" in ours:
        assert torch.equal(ours.concept_lengths, theirs.concept_lengths)
        assert torch.equal(ours.cu_concepts, theirs.cu_concepts)
    torch.testing.assert_close(gradients(one, ours.loss), gradients(other, theirs.loss), **tolerance)


# Buckets


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
@pytest.mark.parametrize("boundaries", list(THRESHOLDS))
def test_a_bucket_changes_no_number(boundaries: str, visibility: str, training: bool):
    """Whatever its size; `rule` decides by the threshold in training too."""
    segmenter = "learned" if boundaries == "ragged" else "rule"
    plain = tiny_dlcm(segmenter=segmenter, visibility=visibility).train(training)
    plain.detector.threshold = THRESHOLDS[boundaries]
    bucketed = copy.deepcopy(plain)

    @settings(max_examples=5)
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=8), st.sampled_from([2, 5, 64]), st.integers(0, 99))
    def check(lengths: list[int], bucket: int, seed: int):
        bucketed.concept_rooms = ConceptRooms(bucket)
        assert_same(plain, bucketed, random_documents(lengths, seed), rtol=1e-9, atol=1e-11)

    check()


# Foreseen room


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_foresight_changes_no_number_whether_room_was_enough_or_not(visibility: str, training: bool):
    plain = tiny_dlcm(visibility=visibility).train(training)
    foreseeing = copy.deepcopy(plain)
    foreseeing.concept_rooms = rooms = ConceptRooms(2, foresight=True)
    rooms.MEMORY = 1  # so that a batch with fewer concepts lets the next one down
    for seed in range(8):
        documents = random_documents([24] if seed % 2 else [20, 1, 3], seed)
        assert_same(plain, foreseeing, documents, rtol=1e-9, atol=1e-11)
    assert 0 < rooms.misses < 7


def test_the_wait_comes_when_all_has_been_launched(monkeypatch: pytest.MonkeyPatch):
    """With foresight, after the decoder; without, before the backbone."""
    model = tiny_dlcm(segmenter="rule")
    model.detector.threshold = THRESHOLDS["one concept"]
    model.concept_rooms = ConceptRooms(8, foresight=True)
    order: list[str] = []
    for name in ("backbone", "decoder"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
    read = OnHost.read

    def reads(self: OnHost) -> list:
        if self._read is None:
            order.append("wait")
        return read(self)

    monkeypatch.setattr(OnHost, "read", reads)
    for _ in range(2):
        forward(model, random_documents([9, 7, 1], 0))
    assert order == ["wait", "backbone", "decoder", "backbone", "decoder", "wait"]
    model.detector.threshold = THRESHOLDS["all boundary"]
    forward(model, random_documents([9, 7, 1], 0))
    assert model.concept_rooms.misses == 1
    assert order[6:] == ["backbone", "decoder", "wait", "wait", "backbone", "decoder"]


# Compiled against eager


def compiled_copy(model: PackedCausalLM, backend: str = "aot_eager") -> PackedCausalLM:
    """`aot_eager` traces, differentiates and guards as `inductor` does, and needs no compiler."""
    model = copy.deepcopy(model)
    compile_blocks_(model, backend)
    return model


def test_other_parts_compile():
    model = tiny_dlcm(segmenter="rule", smoothing="none", cross_attention_rope=False, pooling="last", **EVERY_LAYER)
    assert_same(model, compiled_copy(model), random_documents([9, 7], 0), rtol=1e-9, atol=1e-11)


@needs_compiler
def test_inductor_under_bf16_autocast_is_as_exact_as_eager():
    """Fewer roundings between operations: what is compiled is no further from float64 than what is not."""
    exact = tiny_baseline()
    eager = copy.deepcopy(exact).float()
    compiled = compiled_copy(eager, "inductor")

    def error(model: PackedCausalLM, documents: list[Tensor]) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(model, documents).loss
        ours, truth = gradients(model, loss), gradients(exact, forward(exact, documents).loss)
        squares = [((ours[name].double() - truth[name]).square().sum(), truth[name].square().sum()) for name in truth]
        return float(sum(wrong for wrong, _ in squares) / sum(right for _, right in squares)) ** 0.5

    documents = random_documents([30, 10], 0)
    assert error(compiled, documents) <= 1.25 * error(eager, documents) < 0.25


def test_the_buckets_of_data_parallel_do_not_cut_regions():
    """Each parameter is larger than a bucket here, as those of large models are."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain, compiled = tiny_dlcm(), compiled_copy(tiny_dlcm())
        parallel = DistributedDataParallel(compiled, bucket_cap_mb=0.0001)
        for lengths in ([9, 7], [1] * 16):
            batch = arrange(random_documents(lengths, 0), "packed")
            for model in (plain, parallel):
                model(**batch.inputs, labels=batch.labels).loss.backward()
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    finally:
        torch.distributed.destroy_process_group()


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(CompilationError, match=r"found none \(g\+\+, clang\+\+\): install one") as error:
        compile_blocks_(tiny_baseline())
    assert "\n" not in str(error.value)


# No recompilation

TOKENS = 48


def random_lengths(seed: int) -> list[int]:
    """Of 1 to 12 documents of `TOKENS` tokens in all."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(TOKENS - 1, generator=generator)[: seed % 12] + 1
    return torch.tensor([0, *cuts.sort().values.tolist(), TOKENS]).diff().tolist()


def every_kind_of_step(model: PackedCausalLM, documents: Sequence[Tensor]) -> Any:
    """A training step, the count of boundaries before it, and an evaluation, whose logits come along."""
    batch = arrange(documents, "packed")
    if isinstance(model, DLCMForCausalLM):
        model.train().boundary_statistics(**batch.inputs, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = forward(model.eval(), documents).logits
    output = forward(model.train(), documents)
    return output, logits, gradients(model, output.loss)


def stacks(model: PackedCausalLM) -> list[TransformerStack]:
    return [module for module in model.modules() if isinstance(module, TransformerStack)]


SEVERAL = functools.partial(tiny_dlcm, seed=6, qk_norm=True, d_concept=TOKENS, **EVERY_LAYER)


@pytest.mark.parametrize("build", [pytest.param(SEVERAL, id="dlcm"), pytest.param(tiny_baseline, id="llama")])
def test_compiled_equals_eager_and_nothing_is_compiled_after_the_first_step(build: Callable[..., PackedCausalLM]):
    """Though concepts, documents and the longest of them change every time, and blocks are recomputed every other time.

    The first is a trap: there, T, M and the width of concepts are one number, and must not be taken for one thing.
    Compiling in place leaves names and copies alone.
    """
    eager, model = build(), build()
    compile_blocks_(model, "aot_eager")
    assert list(model.state_dict()) == list(eager.state_dict()) and model.compiled
    if isinstance(model, DLCMForCausalLM):
        assert not model.concept_rooms.foresight  # on the CPU
    every_kind_of_step(model, random_documents([1] * TOKENS, 0))
    concepts, documents = set(), set()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(12, 24):
            lengths = random_lengths(seed)
            for stack in stacks(model):
                stack.recompute = seed % 2 == 1
            if isinstance(model, DLCMForCausalLM):
                model.concept_rooms.foresight = seed % 4 > 1
            output, *ours = every_kind_of_step(model, random_documents(lengths, seed))
            expected, *theirs = every_kind_of_step(eager, random_documents(lengths, seed))
            torch.testing.assert_close([output.logits, *ours], [expected.logits, *theirs], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(output.loss, expected.loss, rtol=1e-9, atol=1e-11)
            documents.add(len(lengths))
            if isinstance(model, DLCMForCausalLM):
                assert torch.equal(output.concept_lengths, expected.concept_lengths)
                assert torch.equal(output.cu_concepts, expected.cu_concepts)
                concepts.add(-(-len(output.concept_lengths) // model.concept_rooms.bucket))
        assert len(documents) == 12 and (len(concepts) > 2 or not isinstance(model, DLCMForCausalLM))
        changed = copy.deepcopy(model)
        for parameter in changed.decoder.layers[0].ffn.parameters():
            parameter.data.zero_()
        assert not torch.equal(every_kind_of_step(changed, random_documents(lengths, seed))[1], ours[0])
        assert torch.equal(every_kind_of_step(model, random_documents(lengths, seed))[1], ours[0])
        with pytest.raises(torch._dynamo.exc.RecompileError):  # another T: the test can fail
            every_kind_of_step(model, random_documents([TOKENS - 1], 0))


def test_stacks_and_models_do_not_share_versions():
    """Of which torch allows eight for one piece of code: here, one."""
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad():
        for model in (tiny_dlcm(segmenter="fixed"), tiny_baseline()):
            forward(compiled_copy(model, "eager"), random_documents([9, 7], 0))


# Recomputed activations


@pytest.mark.parametrize(
    ("build", "compiled"),
    [(tiny_dlcm, False), (tiny_baseline, False), (tiny_baseline, True)],
    ids=["dlcm", "llama", "llama-compiled"],
)
def test_recomputing_blocks_gives_the_same_gradients_from_fewer_bytes(
    build: Callable[..., PackedCausalLM], compiled: bool
):
    model, documents = build().train(), random_documents([9, 7, 20], 0)
    if compiled:
        compile_blocks_(model, "aot_eager")
    results = []
    for recompute in (False, True):
        for stack in stacks(model):
            stack.recompute = recompute
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = forward(model, documents).loss
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        results.append((sum(kept.values()), gradients(model, loss)))
    (all_bytes, gradients_kept), (few_bytes, gradients_recomputed) = results
    torch.testing.assert_close(gradients_kept, gradients_recomputed, rtol=1e-12, atol=0)
    assert few_bytes < 0.5 * all_bytes


# One wait


def waits_of_a_step(model: PackedCausalLM, **options: Any) -> dict[str, int]:
    """Of forward and backward, but for the check of cu_seqlens, which lies on the CPU whatever the model does."""
    with counting_waits() as places:
        forward(model, random_documents([9, 7, 1], 0), **options).loss.backward()
    return {place: count for place, count in places.items() if place != "dlcm/layout.py:from_cu_seqlens"}


@pytest.mark.parametrize("return_logits", [True, False])
@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed", "words"])
def test_a_step_of_the_dlcm_waits_once(segmenter: str, return_logits: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dlcm.attention, "_sdpa", masked_sdpa)
    model = tiny_dlcm(segmenter=segmenter).train()
    model.concept_rooms = ConceptRooms(8)
    assert waits_of_a_step(model, return_logits=return_logits) == {"dlcm/host.py:read": 1}


def test_a_step_of_the_baseline_never_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dlcm.attention, "_sdpa", masked_sdpa)
    assert waits_of_a_step(tiny_baseline().train()) == {}


def test_a_wait_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dlcm.attention, "_sdpa", masked_sdpa)
    smooth = AdjacentSmoothing.forward

    def looks(self: AdjacentSmoothing, z_MC: Tensor, concepts: PackedLayout, past_DC: Tensor | None) -> Tensor:
        assert z_MC.sum().item() != 0 and len(z_MC[z_MC[:, 0] > 0]) > 0
        return smooth(self, z_MC, concepts)

    monkeypatch.setattr(AdjacentSmoothing, "forward", looks)
    assert waits_of_a_step(tiny_dlcm())["tests/dlcm/test_compilation.py:looks"] == 2


# Decoding


@pytest.mark.parametrize("build", BUILDERS)
def test_decoding_has_compiled_regions_of_its_own(build, monkeypatch: pytest.MonkeyPatch):
    """Only meanwhile, one version for pieces and one for each number of rows of a step; they are the same function."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = build()
    compile_blocks_(model, backend="aot_eager")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for batch in (1, 3):
        ids_BL = torch.randint(5, (batch, 30), generator=torch.Generator().manual_seed(batch))
        expected = build()(ids_BL).logits
        for pieces in ([5, 1, 1, 1, 7, 2, 3, 10], [20, 10], [2] * 15, [6, 8, 4, 3, 9]):
            cache, start = model.new_cache(), 0
            for piece in pieces:
                found = model(ids_BL[:, start : start + piece], past_key_values=cache).logits
                torch.testing.assert_close(found, expected[:, start : start + piece], rtol=0, atol=1e-10)
                start += piece
    compiled = {key for key in model.compiled_steps if key[:2] == ("token", "before_attention")}
    assert {batch for *_, batch in compiled} == {None, 1, 3}
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items() if callable(value))
