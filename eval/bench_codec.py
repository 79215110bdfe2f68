"""The tensor codec against rounding to nearest, at equal bits, on trained weights; and how fast its backends are.

    python -m eval.bench_codec CHECKPOINT [--backends x264 x265 entropy] [--output docs/results]

Weights are the matrices of a checkpoint or a safetensors file that `eval.codec pack` would code. Each gets as many bits
as rounding in groups of 128 to 4, 3 and 2 bits takes of it (4.16, 3.15 and 2.14, scales included). The codec's gain is
that of x264 without rotation. What the same codec keeps of it on shuffled entries, and how many bits an entropy coder
without a codec saves, stand beside it: they are no bars, and say what the gain is due to.

Speed is of one encoding and one decoding of a Gaussian matrix of --side^2 values at about 3 bits, on one thread; a
budget takes four or five encodings to hit.

Writes codec.json and codec.md.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dlcm.codec import BACKENDS
from dlcm.codec.tensor import Backend, decompress, encode_once
from eval.bench import Bar, Row, bars_table, find, markdown_table, record, record_lines, tell, write_json
from eval.codec import Weights, model_directory
from eval.codec_report import CLIPPED, LEVELS, ROUNDING, comparison, comparison_table, gap_bits, totals
from eval.loading import positive, report_errors

CODEC: Backend = "x264"
GAINS = dict(zip(LEVELS, (1.6, 2.0, 2.5), strict=True))  # over rounding, in relative MSE, by its bits
LOG_STEP = 2.05 - 3  # log2 of the step over the deviation, at which a Gaussian takes about 3 bits


def speed(backend: Backend, side: int) -> Row:
    """Million values a second in both directions."""
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    blob = encode_once(x, LOG_STEP, backend=backend)
    middle = time.perf_counter()
    decompress(blob)
    millions = x.numel() / 1e6
    return {
        "backend": backend,
        "bits": blob.bits,
        "encode_mvalues_per_second": millions / (middle - start),
        "decode_mvalues_per_second": millions / (time.perf_counter() - middle),
    }


def must_show(rows: Sequence[Row]) -> dict[str, Bar]:
    """Bars of the codec, from a comparison's rows."""
    summed, bars = totals(rows), {}
    for level, target in GAINS.items():
        found = {row["method"]: row["rel_mse"] for row in summed if row["level"] == level}
        gain = found[ROUNDING] / found[CODEC] if found.get(CODEC) else None
        over_clipped = found[CLIPPED] / found[CODEC] if found.get(CODEC) else None
        bars[f"relative MSE of RTN g128 at {level} bits, over the codec's at as many in all"] = Bar(gain, target)
        bars[f"the same, of RTN g128 with clip search at {level} bits"] = Bar(over_clipped, 1.0)
    budgets = {(row["tensor"], row["level"]): row["bits"] for row in rows if row["method"] == ROUNDING}
    large = [row for row in rows if row["values"] >= 1 << 16 and row["method"] not in (ROUNDING, CLIPPED)]
    misses = [budgets[row["tensor"], row["level"]] - row["bits"] for row in large]
    bars["bits by which a tensor of 65,536 values or more misses its budget"] = Bar(
        max(map(abs, misses), default=math.nan), 0.05, at_most=True
    )
    return bars


def page(recorded: Mapping[str, Any], rows: Sequence[Row], speeds: Sequence[Row], weights: str) -> str:
    """The results in markdown."""
    gaps = [
        f"{backend} takes {gap_bits(rows, backend):+.2f} bits a value against the entropy coder alone"
        for backend in dict.fromkeys(row["backend"] for row in speeds)
        if backend != "entropy" and find(totals(rows), level=LEVELS[0], method="entropy")
    ]
    columns = ("encode_mvalues_per_second", "decode_mvalues_per_second")
    fast = [(row["backend"], f"{row['bits']:.2f}", *(f"{row[column]:.1f}" for column in columns)) for row in speeds]
    return f"""# The tensor codec

{bars_table(must_show(rows))}

Weights: {weights}, {len({row["tensor"] for row in rows})} matrices. Relative MSE at equal bits, all side information
counted:

{comparison_table(rows)}

At the level where it does worst, {"; ".join(gaps) or "no backend was set against the entropy coder"}. What the shuffled
entries keep of a gain is entropy coding. Speed on one thread:

{markdown_table(("backend", "bits", "M values a second, encoding", "decoding"), fast)}

`eval/bench_codec.py` says how all is measured.

{record_lines(recorded)}
"""


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.bench_codec", description="Measures the tensor codec.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=["x264", "entropy"], help="(%(default)s)")
    parser.add_argument("--workers", type=positive, default=2, help="tensors at a time (%(default)s)")
    parser.add_argument("--side", type=positive, default=4096, help="of the matrix that is timed (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    options = parser.parse_args(arguments)
    recorded = record(options.commit)
    source = options.checkpoint if options.checkpoint.is_file() else model_directory(options.checkpoint)
    rows = comparison(Weights(source), LEVELS, options.backends, workers=options.workers)
    speeds = [speed(backend, options.side) for backend in options.backends]
    for row in totals(rows) + speeds:
        tell(row)
    bars, weights = must_show(rows), source.name
    write_json(options.output / "codec.json", recorded, bars, weights=weights, speeds=speeds, rows=rows)
    (options.output / "codec.md").write_text(page(recorded, rows, speeds, weights), encoding="utf-8")
    print(bars_table(bars))


if __name__ == "__main__":
    sys.exit(main())
