"""Finds the model whose forward FLOPs per token equal a given number: one size free, its SwiGLU width the fine knob.

    depth    LLaMA: num_layers, token_ffn.                     DLCM: backbone_layers, concept_ffn
    width    LLaMA: d_token, in heads of the same dimension.   DLCM: d_concept, likewise
    swiglu   LLaMA: token_ffn.                                 DLCM: concept_ffn

So a DLCM is fitted by its backbone, and everything at token level stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dlcm import DLCMConfig
from dlcm.config import changed
from dlcm.flops import Config, forward_flops
from eval.loading import EvaluationError

Free = Literal["depth", "width", "swiglu"]
TOLERANCE = 0.01
MULTIPLE = 64  # of SwiGLU widths, for tensor cores
MOST = 4  # a free size is at most so many times the template's
STRETCH = 1.5  # and its SwiGLU width at most so many times wider or narrower than the template's proportions


@dataclass(frozen=True, slots=True)
class Match:
    """A configuration, what of it differs from the template, and its FLOPs over those that were asked for."""

    config: Config
    changes: dict[str, int]
    ratio: float


def match(
    template: Config, flops: float, sequence_length: float, free: Free, tokens_per_concept: float | None = None
) -> Match:
    """The model like `template` with `flops` per token in a forward pass, within `TOLERANCE`.

    Of all that are close enough, the one whose SwiGLU width is nearest to the template's proportions.

    Args:
        template: either model.
        flops: forward, per token.
        sequence_length: of the documents.
        free: what may change, see above.
        tokens_per_concept: R; None takes the template's target.

    Raises:
        EvaluationError: there is none; names the nearest.
    """
    found = []
    for sizes, proportional in _sizes(template, free):
        width = _swiglu_name(template)

        def cost(swiglu: int, sizes: dict[str, int] = sizes, width: str = width) -> float:
            return forward_flops(changed(template, sizes | {width: swiglu}), sequence_length, tokens_per_concept).total

        slope = (cost(2 * MULTIPLE) - cost(MULTIPLE)) / MULTIPLE  # FLOPs are linear in it
        ideal = MULTIPLE + (flops - cost(MULTIPLE)) / slope
        if free != "swiglu":
            ideal = min(max(ideal, proportional / STRETCH), proportional * STRETCH)
        swiglu = max(round(ideal / MULTIPLE), 1) * MULTIPLE
        ratio = cost(swiglu) / flops
        close = abs(ratio - 1) <= TOLERANCE
        found.append((not close, abs(swiglu / proportional - 1) if close else abs(ratio - 1), sizes, swiglu, ratio))
    failed, _, sizes, swiglu, ratio = min(found, key=lambda candidate: candidate[:2])
    changes = sizes | {_swiglu_name(template): swiglu}
    if failed:
        nearest = ", ".join(f"{name}={value}" for name, value in changes.items())
        raise EvaluationError(
            f"no {template.model_type} with {free} free comes within {TOLERANCE:.0%} of {flops / 1e9:.3g} GFLOP per "
            f"token; the nearest, {nearest}, has {ratio:.2f} of them: free something else, or take another template"
        )
    config = changed(template, changes)
    return Match(config, {name: value for name, value in changes.items() if getattr(template, name) != value}, ratio)


def _swiglu_name(template: Config) -> str:
    return "concept_ffn" if isinstance(template, DLCMConfig) else "token_ffn"


def _sizes(template: Config, free: Free) -> Iterator[tuple[dict[str, int], float]]:
    """What the free size may be, and the SwiGLU width that is in proportion to it."""
    concepts = isinstance(template, DLCMConfig)
    swiglu = getattr(template, _swiglu_name(template))
    if free == "swiglu":
        yield {}, swiglu
    elif free == "depth":
        name = "backbone_layers" if concepts else "num_layers"
        for layers in range(getattr(template, "global_every", None) or 1, MOST * getattr(template, name) + 1):
            yield {name: layers}, swiglu
    else:
        stage = "concept" if concepts else "token"
        width, heads, kv_heads = (f"d_{stage}", f"{stage}_heads", f"{stage}_kv_heads")
        old_width, old_heads = getattr(template, width), getattr(template, heads)
        group = old_heads // getattr(template, kv_heads)
        for number in range(group, MOST * old_heads + 1, group):
            sizes = {width: old_width // old_heads * number, heads: number, kv_heads: number // group}
            yield sizes, swiglu * number / old_heads
