"""torch.compile, region by region: what does not change from step to step stands inside, the rest outside.

In training (decoding has versions of its own, see `compiled_for_decoding`):

    T, tokens of a batch               fixed
    M, concepts, and S, their slots    dynamic; M is a multiple of `CONCEPT_BUCKET`
    documents, how many and how long   not seen: attention stands between two regions

So nothing is compiled anew once each kind of step has been seen: with gradients, without, and without on the shorter
last batch of an evaluation. And all blocks of a kind share their code: three are compiled, not 32. Where removal has
made blocks narrower (see `dlcm.selfcompress`), those of equal widths do.
"""

import functools
import itertools
import os
import shlex
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dlcm.blocks import TransformerStack
from dlcm.boundary import CosineDetector
from dlcm.causal_lm import PackedCausalLM
from dlcm.cross_attention import CrossAttention
from dlcm.layout import ConceptRooms, PackedLayout
from dlcm.model import DLCMForCausalLM

CONCEPT_BUCKET = 64  # of thousands of concepts: it costs a per cent or two of the backbone


class CompilationError(RuntimeError):
    """torch.compile cannot work here; the message says what it needs."""


def compile_blocks_(model: PackedCausalLM, backend: str = "inductor") -> None:
    """Compiles, in place: blocks and cross-attention around attention itself, the detector's scores, smoothing.

    Parameters keep their names, and blocks stay modules that may be wrapped or sharded. Compilation itself happens in
    the first steps. Meant for batches of one T, or a few: each is compiled once, and torch allows eight. To be called
    again where widths have changed. Sets `torch._dynamo.config.optimize_ddp` to False, for the whole process.

    Args:
        model: on the device where it is to run.
        backend: of torch.compile.

    Raises:
        CompilationError: no compiler for the model's device.
    """
    if backend == "inductor":
        check_compiler(model.device)
    # Gradients reach DistributedDataParallel region by region anyway, and dynamic shapes cannot be cut at its buckets.
    torch._dynamo.config.optimize_ddp = False

    @functools.cache
    def compiled(method: Callable, varying_rows: bool, widths: tuple[torch.Size, ...]) -> Callable:
        function = torch.compile(_with_own_code(method), backend=backend, fullgraph=True, dynamic=False)
        return _with_varying_rows(function) if varying_rows else function

    for region in _regions(model):
        widths = tuple(parameter.shape for parameter in region.module.parameters())
        method = compiled(getattr(type(region.module), region.name), region.varying_rows, widths)
        setattr(region.module, region.name, types.MethodType(method, region.module))  # so that copies have their own
    if isinstance(model, DLCMForCausalLM):
        # On the CPU nobody waits, and a run is to be the same however often it was resumed.
        model.concept_rooms = ConceptRooms(CONCEPT_BUCKET, foresight=model.device.type == "cuda")
    model.compiled = True


@contextmanager
def compiled_for_decoding(model: PackedCausalLM, batch: int | None) -> Iterator[None]:
    """Meanwhile, the same regions are compiled for decoding with a cache.

    Args:
        model: on the device where it is to run.
        batch: for steps of so many rows, where tokens and concepts are as many. None is for pieces of any number of
            tokens, in one version for them all: what depends on the number of documents besides is not compiled.
    """
    before = []
    regions = _regions(model) if batch is None else itertools.chain(_regions(model), _regions_of_steps(model))
    for region in regions:
        before.append((region, vars(region.module).get(region.name)))
        function = getattr(type(region.module), region.name)
        if batch is not None or not region.by_document:
            key = region.kind, region.name, batch
            if key not in model.compiled_steps:
                model.compiled_steps[key] = _compiled_for(function, batch)
            function = model.compiled_steps[key]
        setattr(region.module, region.name, types.MethodType(function, region.module))
    try:
        yield
    finally:
        for region, own in before:
            if own is None:
                delattr(region.module, region.name)
            else:
                setattr(region.module, region.name, own)


def _compiled_for(method: Callable, batch: int | None) -> Callable:
    function = torch.compile(_with_own_code(method), fullgraph=True, dynamic=False)
    # One row is a version of its own: concepts are often that few.
    return function if batch is not None else _with_varying_rows(function, torch._dynamo.maybe_mark_dynamic)


class _Region(NamedTuple):
    """A method to compile.

    Attributes:
        kind: what shares its code.
        varying_rows: in training, whether its inputs have as many rows as there are concepts.
        by_document: whether it takes what there is one of for each document.
    """

    module: nn.Module
    name: str
    kind: str
    varying_rows: bool = False
    by_document: bool = False


def _regions(model: PackedCausalLM) -> Iterator[_Region]:
    for name, stack in model.named_children():
        if isinstance(stack, TransformerStack):
            level = "concept" if name == "backbone" else "token"
            for block in stack.layers:
                yield _Region(block, "before_attention", level, level == "concept")
                yield _Region(block, "after_attention", level, level == "concept")
    if isinstance(model, DLCMForCausalLM):
        if isinstance(model.detector, CosineDetector):
            yield _Region(model.detector, "score", "detector", by_document=True)
        yield _Region(model, "smooth", "model", varying_rows=True, by_document=True)
        for cross in model.cross_attentions:
            yield _Region(cross, "queries", "cross")
            yield _Region(cross, "keys_and_values", "cross", varying_rows=True)
            yield _Region(cross, "after_attention", "cross")


def _regions_of_steps(model: PackedCausalLM) -> Iterator[_Region]:
    """What takes no time in training, but is many small kernels where a kernel's launch is what a step is made of."""
    for name, module in model.named_children():
        if isinstance(module, TransformerStack | CrossAttention):
            yield _Region(module, "rope", name)


def check_compiler(device: torch.device) -> None:
    """Raises CompilationError where torch.compile would find no C++ compiler for code on the CPU."""
    compilers = shlex.split(os.environ["CXX"])[:1] if "CXX" in os.environ else ["g++", "clang++"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise CompilationError(
            f"torch.compile needs a C++ compiler for a model on the CPU and found none ({', '.join(compilers)}): "
            "install one, name it in CXX, or train without compile"
        )


def _with_own_code(function: Callable) -> Callable:
    """The same function with a code object of its own.

    torch.compile keeps what it compiled by code object, and gives up after eight versions of it. Token blocks, concept
    blocks and other models of this process run the same lines, but are not versions of each other.
    """
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )


def _with_varying_rows(compiled: Callable, mark: Callable = torch._dynamo.mark_dynamic) -> Callable:
    """The first dimension of every input is dynamic from the first call on, and no other ever is."""

    def call(module: nn.Module, *inputs: Any) -> Any:
        for leaf in tree_leaves(inputs):
            rows = leaf.position_T if isinstance(leaf, PackedLayout) else leaf
            if rows is not None:
                mark(rows, 0)
        return compiled(module, *inputs)

    return call
