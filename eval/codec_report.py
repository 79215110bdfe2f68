"""Errors of tensors at equal bits: rounding, codecs, codecs on shuffled entries, entropy coding alone.

Each tensor gets from every method as many bits as rounding to nearest takes of it, all side information counted. Errors
are squared errors of all tensors together, over their squared values. Where it is known what a layer reads, there is
also the error of its output, over the output, on average over layers.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from dlcm.codec import round_to_nearest
from dlcm.codec.state import is_coded
from dlcm.codec.tensor import Backend
from eval.bench import Row, find, markdown_table
from eval.codec_methods import CLIPPED, GPTQ, ROTATED, ROUNDING, SHUFFLED, code
from eval.loading import EvaluationError
from eval.processes import over_processes

LEVELS = (4, 3, 2)  # bits of rounding, without scales


def comparison(
    weights: Mapping[str, Tensor],
    levels: Sequence[int],
    backends: Sequence[Backend],
    only: re.Pattern[str] | None = None,
    workers: int = 1,
    hessians: Mapping[str, Tensor] | None = None,
) -> list[Row]:
    """A row for each tensor, level and method: bits, squared error, energy, and seconds in both directions.

    Args:
        hessians: of the inputs of layers, by the names of their weights (see `eval.calibration`): adds GPTQ, and
            `output_rel_mse` of each method.

    Raises:
        EvaluationError: no tensor is large enough.
    """
    names = [name for name in weights if is_coded(name, weights[name]) and (only is None or only.search(name))]
    if not names:
        raise EvaluationError("no matrix of floats that is large enough; give another checkpoint, or other names")
    names.sort(key=lambda name: -weights[name].numel())
    known = hessians or {}
    jobs = [(weights, name, level, backends, known.get(name), bool(known)) for name in names for level in levels]
    return [row for rows in over_processes(_measured, jobs, workers) for row in rows]


def totals(rows: Sequence[Row]) -> list[Row]:
    """A row for each level and method, over all tensors."""
    summed = []
    for level, method in dict.fromkeys((row["level"], row["method"]) for row in rows):
        own = [row for row in rows if row["level"] == level and row["method"] == method]
        values = sum(row["values"] for row in own)
        total: Row = {
            "level": level,
            "method": method,
            "bits": sum(row["bits"] * row["values"] for row in own) / values,
            "rel_mse": sum(row["squared_error"] for row in own) / sum(row["energy"] for row in own),
        }
        if outputs := [row["output_rel_mse"] for row in own if "output_rel_mse" in row]:
            total["output_rel_mse"] = sum(outputs) / len(outputs)
        summed.append(total)
    return summed


def comparison_table(rows: Sequence[Row], column: str = "rel_mse") -> str:
    """Totals as a table: a method a line, a level a column, and how often its error goes into that of rounding."""
    summed = totals(rows)
    levels = list(dict.fromkeys(row["level"] for row in summed))
    bits = [find(summed, level=level, method=ROUNDING)["bits"] for level in levels]
    lines = []
    for method in dict.fromkeys(row["method"] for row in summed):
        own = [find(summed, level=level, method=method) for level in levels]
        if all(column in row for row in own):
            against = [find(summed, level=level, method=ROUNDING)[column] for level in levels]
            cells = [f"{row[column]:.4f} ({base / row[column]:.2f})" for row, base in zip(own, against, strict=True)]
            lines.append((method, *cells))
    title = {"rel_mse": "relative MSE", "output_rel_mse": "relative MSE of outputs"}[column]
    return markdown_table((f"{title} (gain over RTN)", *(f"{width:.3f} bits" for width in bits)), lines)


def gap_bits(rows: Sequence[Row], backend: str) -> float:
    """Bits a value that a backend takes more than entropy coding alone for the same error, at the worst level; error
    falls fourfold with each bit. Below 0 where it takes fewer.
    """
    summed = totals(rows)
    levels = dict.fromkeys(row["level"] for row in summed)
    errors = [[find(summed, level=level, method=name)["rel_mse"] for name in (backend, "entropy")] for level in levels]
    return max(math.log2(own / control) / 2 for own, control in errors)


def _measured(
    weights: Mapping[str, Tensor],
    name: str,
    level: int,
    backends: Sequence[Backend],
    hessian_II: Tensor | None,
    with_gptq: bool,
) -> list[Row]:
    tensor = weights[name].float()
    energy, budget = tensor.double().square().sum().item(), round_to_nearest(tensor, level).bits
    methods: list[tuple[str, float]] = [(ROUNDING, level), (CLIPPED, level), *([(GPTQ, level)] if with_gptq else [])]
    methods += [(backend + variant, budget) for backend in backends for variant in ("", ROTATED, SHUFFLED)]
    rows = []
    for method, bits in methods:
        start = time.perf_counter()
        coded = code(method, tensor, bits, hessian_II)
        seconds = time.perf_counter() - start
        error = coded.tensor.double() - tensor.double()
        row: Row = {"tensor": name, "values": tensor.numel(), "level": level, "method": method, "bits": coded.bits}
        row |= {"squared_error": error.square().sum().item(), "energy": energy, "seconds": seconds}
        if hessian_II is not None:
            row["output_rel_mse"] = _energy(error, hessian_II) / _energy(tensor, hessian_II)
        rows.append(row)
    return rows


def _energy(weight_OI: Tensor, hessian_II: Tensor) -> float:
    """Of what a layer of such weights puts out, on the inputs of the Hessian."""
    wide_OI = weight_OI.double()
    return ((wide_OI @ hessian_II.double()) * wide_OI).sum().item()
