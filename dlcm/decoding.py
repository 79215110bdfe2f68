"""How a step of decoding is run: part by part, or as CUDA graphs of the parts.

A step reads one token of each row. At batch 1 a GPU is done with a kernel before the host has launched the next one; a
graph is launched at once. Between two graphs the host may look at what the first one found: the DLCM's step has three
parts,

    read      encoder, boundary, and the bookkeeping of segments
    reason    pooling, backbone, keys and values of the new concept; only if a segment closed in some row
    answer    cross-attention, decoder, logits

and the baseline's is one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dlcm.boundary import Boundaries

if TYPE_CHECKING:
    from dlcm.cache import DecodingCache
    from dlcm.causal_lm import PackedCausalLM

Call = Callable[..., Any]  # call(function, *arguments) is function(*arguments), one way or another


def directly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a part of a step as it stands."""
    return function(*arguments)


def compiled_if_model_is(model: "PackedCausalLM[Any]", batch: int | None) -> AbstractContextManager[None]:
    """See `dlcm.compilation.compiled_for_decoding`; nothing where the model's blocks are not compiled."""
    from dlcm.compilation import compiled_for_decoding  # which knows the models, and they know this file

    return compiled_for_decoding(model, batch) if model.compiled else nullcontext()


class StepGraphs:
    """A model's step on a cache, captured once: it reads and writes the very tensors that were there at capture.

    Where the model's blocks are compiled, they are for this too, for B rows (see `dlcm.compilation`).

    Attributes:
        moves: of the cache, when it was captured; with others, there are other tensors.
    """

    WARM_UP = 2  # steps: kernels are compiled and libraries set up in the first

    def __init__(self, model: "PackedCausalLM[Any]", cache: "DecodingCache"):
        """Captures; the cache stays as it is, since no row is active meanwhile."""
        self.moves = cache.moves
        self._ids_B = torch.zeros_like(cache.length_B)
        self._active_B = torch.zeros_like(cache.length_B, dtype=torch.bool)
        self._parts: dict[str, tuple[Callable[[], None], Any]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        with compiled_if_model_is(model, len(self._ids_B)):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(self.WARM_UP):
                    model.step(self._ids_B, self._active_B, cache, whole=True)
            torch.cuda.current_stream().wait_stream(stream)
            model.step(self._ids_B, self._active_B, cache, self._capture, whole=True)

    def step(
        self, model: "PackedCausalLM[Any]", cache: "DecodingCache", input_ids_B: Tensor, active_B: Tensor
    ) -> tuple[Tensor, Boundaries | None]:
        """`model.step`, in copies that the next step does not overwrite."""
        self._ids_B.copy_(input_ids_B)
        self._active_B.copy_(active_B)
        logits_BV, decided = model.step(self._ids_B, self._active_B, cache, self._replay)
        if decided is not None:
            decided = Boundaries(decided.probability_T.clone(), decided.boundary_T.clone())
        return logits_BV.clone(), decided

    def _capture(self, function: Callable[..., Any], *arguments: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function(*arguments)
        self._parts[function.__name__] = graph.replay, result
        return result

    def _replay(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The arguments are those of the capture: what earlier parts left in place."""
        replay, result = self._parts[function.__name__]
        replay()
        return result
