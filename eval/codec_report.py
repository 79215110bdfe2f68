"""Errors of tensors at equal bits: rounding to nearest, codecs, codecs on shuffled entries, entropy coding alone.

Each tensor gets from every method as many bits as rounding to nearest takes of it, all side information counted. Errors
are squared errors of all tensors together, over their squared values.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from dlcm.codec import compress, decompress, round_to_nearest, shuffled
from dlcm.codec.state import is_coded
from dlcm.codec.tensor import Backend, Transform
from eval.bench import Row, find, markdown_table
from eval.loading import EvaluationError

LEVELS = (4, 3, 2)  # bits of rounding, without scales
ROUNDING, CLIPPED = "RTN g128", "RTN g128, clip search"


def comparison(
    weights: Mapping[str, Tensor],
    levels: Sequence[int],
    backends: Sequence[Backend],
    only: re.Pattern[str] | None = None,
    workers: int = 1,
) -> list[Row]:
    """A row for each tensor, level and method: bits, squared error, energy, and seconds in both directions.

    Raises:
        EvaluationError: no tensor is large enough.
    """
    names = [name for name in weights if is_coded(name, weights[name]) and (only is None or only.search(name))]
    if not names:
        raise EvaluationError("no matrix of floats that is large enough; give another checkpoint, or other names")

    def rows_of(name: str) -> list[Row]:
        tensor = weights[name].float()
        return [{"tensor": name, "values": tensor.numel()} | row for row in _measured(tensor, levels, backends)]

    with ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(rows_of, names) for row in rows]


def totals(rows: Sequence[Row]) -> list[Row]:
    """A row for each level and method, over all tensors."""
    summed = []
    for level, method in dict.fromkeys((row["level"], row["method"]) for row in rows):
        own = [row for row in rows if row["level"] == level and row["method"] == method]
        values = sum(row["values"] for row in own)
        summed.append(
            {
                "level": level,
                "method": method,
                "bits": sum(row["bits"] * row["values"] for row in own) / values,
                "rel_mse": sum(row["squared_error"] for row in own) / sum(row["energy"] for row in own),
            }
        )
    return summed


def comparison_table(rows: Sequence[Row]) -> str:
    """Totals as a table: a method a line, a level a column, and how often its error goes into that of rounding."""
    summed = totals(rows)
    levels = list(dict.fromkeys(row["level"] for row in summed))
    bits = [find(summed, level=level, method=ROUNDING)["bits"] for level in levels]
    lines = []
    for method in dict.fromkeys(row["method"] for row in summed):
        own = [find(summed, level=level, method=method) for level in levels]
        against = [find(summed, level=level, method=ROUNDING)["rel_mse"] for level in levels]
        cells = [f"{row['rel_mse']:.4f} ({base / row['rel_mse']:.2f})" for row, base in zip(own, against, strict=True)]
        lines.append((method, *cells))
    return markdown_table(("relative MSE (gain over RTN)", *(f"{width:.3f} bits" for width in bits)), lines)


def _measured(tensor: Tensor, levels: Sequence[int], backends: Sequence[Backend]) -> Iterable[Row]:
    energy, mixed = tensor.double().square().sum().item(), shuffled(tensor)

    def row(level: int, method: str, bits: float, original: Tensor, again: Tensor, **seconds: float) -> Row:
        error = (original.double() - again.double()).square().sum().item()
        return {"level": level, "method": method, "bits": bits, "squared_error": error, "energy": energy} | seconds

    for level in levels:
        rounded, clipped = (round_to_nearest(tensor, level, clip_search=search) for search in (False, True))
        yield row(level, ROUNDING, rounded.bits, tensor, rounded.tensor)
        yield row(level, CLIPPED, clipped.bits, tensor, clipped.tensor)
        for backend in backends:
            variants: tuple[tuple[str, Tensor, Transform], ...] = (
                (backend, tensor, "none"),
                (f"{backend}, rotated", tensor, "hadamard"),
                (f"{backend}, shuffled", mixed, "none"),
            )
            for label, original, transform in variants:
                start = time.perf_counter()
                blob = compress(original, bits=rounded.bits, backend=backend, transform=transform)
                middle = time.perf_counter()
                again = decompress(blob)
                seconds = {"compress_s": middle - start, "decompress_s": time.perf_counter() - middle}
                yield row(level, label, blob.bits, original, again, **seconds)


def gap_bits(rows: Sequence[Row], backend: str) -> float:
    """Bits a value that a backend takes more than entropy coding alone for the same error, at the worst level; error
    falls fourfold with each bit. Below 0 where it takes fewer.
    """
    summed = totals(rows)
    levels = dict.fromkeys(row["level"] for row in summed)
    errors = [[find(summed, level=level, method=name)["rel_mse"] for name in (backend, "entropy")] for level in levels]
    return max(math.log2(own / control) / 2 for own, control in errors)
