"""How many tokens a second one process reads as packed batches, against what one GPU eats.

    python -m eval.bench_loader [--output docs/results]

Text is made up, in documents of log-normal length (700 tokens on average), and is in the page cache: what is measured
is the work of the loader, not of a disk. Batches are as large as those of `eval.bench_training`, and cut into windows
of different length, from one source and from the paper's mixture of four. The bar is three times the tokens a second
at which the fastest small model trains, which is read from training.json beside.

Drawing the order of an epoch is measured at 1 T tokens: it is what a run waits for at its start and between epochs.

Writes loader.json and loader.md.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.bench import Bar, Row, bars_table, find, markdown_table, record, record_lines, worst, write_json
from eval.bench_decode_report import MODELS
from eval.loading import EvaluationError, report_errors
from train.data import FORMAT_VERSION, TOKEN_BYTES_FILE, Mixture, PackedLoader, file_sha256, fingerprint
from train.documents import Document
from train.prepare import SplitWriter

WEIGHTS = {"nemotron-cc": 0.5, "map-cc": 0.25, "opencoder": 0.15, "megamath-web": 0.1}  # Table 1
VOCABULARY = 128_815
MEAN_LENGTH, SPREAD = 700, 1.0  # of documents; the deviation is of the logarithm
TIMES_A_GPU, MOST_SECONDS = 3.0, 30.0
LONG_RUN = 10**12  # tokens
SHAPES = ((128, 1024), (16, 8192), (2, 65_536))  # rows, tokens in each


def make_source(directory: Path, tokens: int, seed: int) -> Path:
    """A directory as `train.prepare` writes it, of random ids."""
    draw = np.random.default_rng(seed)
    directory.mkdir()
    writer = SplitWriter(directory, "train", 100_000_000, np.dtype("<u4"))
    scale = MEAN_LENGTH / np.exp(SPREAD**2 / 2)
    while writer.tokens < tokens:
        length = 2 + int(scale * draw.lognormal(0, SPREAD))
        ids = draw.integers(0, VOCABULARY, length, dtype=np.uint32)
        writer.add(ids, 4 * length, Document("", "made up", "made up", None))
    np.save(directory / TOKEN_BYTES_FILE, draw.integers(1, 12, VOCABULARY).astype(np.float32))
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dtype": "uint32",
        "tokenizer": {"hash": "made up", "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1},
        "token_bytes": "exact",
        "token_bytes_sha256": file_sha256(directory / TOKEN_BYTES_FILE),
        "splits": {"train": writer.finish()},
        "arguments": {},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))
    return directory


def measure(mixture: Mixture, rows: int, length: int, seconds: float) -> Row:
    """Tokens a second of batches in order, after some for warming up."""
    loader = PackedLoader(mixture, length, rows, seed=0)
    steps = min(loader.windows_per_epoch) // rows
    for step in range(min(steps, 5)):
        loader.batch(step)
    start, step = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        loader.batch(step)
        step += 1
    documents = sum(len(loader.batch(step).cu_seqlens) - 1 for step in range(5)) / 5
    return {
        "sources": len(mixture.shards),
        "rows": rows,
        "sequence_length": length,
        "documents": documents,
        "batches": step,
        "tokens_per_second": step * loader.tokens_per_step / elapsed,
    }


def measure_order(mixture: Mixture, length: int) -> Row:
    """Seconds and bytes of the order of an epoch of a long run."""
    loader = PackedLoader(mixture, length, 1, seed=0)
    loader.windows_per_epoch = [LONG_RUN // length] * len(mixture.shards)
    start = time.perf_counter()
    order = loader._order(0, 0)
    return {
        "order_of_tokens": LONG_RUN,
        "sequence_length": length,
        "seconds": time.perf_counter() - start,
        "bytes": order.nbytes,
    }


def eaten(file: Path) -> Row:
    """The row of the small model that trains on most tokens a second.

    Raises:
        EvaluationError: there is none in the file.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        rows, machine = results["rows"], results["machine"]["device"]
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"{file}: no results of training; run python -m eval.bench_training") from error
    small = [row for row in rows if row.get("part") == "throughput" and row.get("pair") == "small"]
    measured = [row for row in small if row.get("tokens_per_second")]
    if not measured:
        raise EvaluationError(f"{file}: no throughput of a small model; run python -m eval.bench_training")
    return max(measured, key=lambda row: row["tokens_per_second"]) | {"machine": machine}


def must_show(rows: Sequence[Row], gpu: Row) -> dict[str, Bar]:
    """The slowest shape and number of sources decides."""
    read = [row["tokens_per_second"] for row in rows if "rows" in row]
    order = find(rows, order_of_tokens=LONG_RUN)
    return {
        "tokens a second of one process, over those of the fastest small model on one GPU": Bar(
            least / gpu["tokens_per_second"] if (least := worst(read)) else None, TIMES_A_GPU
        ),
        "seconds to draw the order of an epoch of 1 T tokens": Bar(order.get("seconds"), MOST_SECONDS, at_most=True),
    }


def page(recorded: Mapping[str, Any], rows: Sequence[Row], gpu: Row) -> str:
    """The results in markdown."""
    header = ("sources", "rows", "tokens in each", "documents a batch", "M tokens a second", "over one GPU")
    lines = [
        (
            row["sources"],
            row["rows"],
            f"{row['sequence_length']:,}",
            f"{row['documents']:.0f}",
            f"{row['tokens_per_second'] / 1e6:.1f}",
            f"{row['tokens_per_second'] / gpu['tokens_per_second']:.1f}",
        )
        for row in rows
        if "rows" in row
    ]
    order = find(rows, order_of_tokens=LONG_RUN)
    return f"""# Loading batches

{bars_table(must_show(rows, gpu))}

One {gpu["machine"]} trains the small {MODELS[gpu["model"]]} on {gpu["tokens_per_second"] / 1e6:.2f} M tokens a second
([figures](training.md)). One process of the loader, its text in the page cache, reads:

{markdown_table(header, lines)}

The order of an epoch of 1 T tokens in windows of {order["sequence_length"]:,} is drawn in {order["seconds"]:.1f} s, and
kept in {order["bytes"] / 1e6:,.0f} MB by each process. `eval/bench_loader.py` says how all is measured.

{record_lines(recorded)}
"""


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.bench_loader", description="Times the loader.")
    parser.add_argument("--tokens", type=int, default=40_000_000, metavar="N", help="of each source (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    options = parser.parse_args(arguments)
    gpu = eaten(options.output / "training.json")
    recorded = record(options.commit)
    with tempfile.TemporaryDirectory() as name:
        paths = {source: make_source(Path(name) / source, options.tokens, seed) for seed, source in enumerate(WEIGHTS)}
        mixed = Mixture.open({source: (str(paths[source]), weight) for source, weight in WEIGHTS.items()}, "train")
        alone = Mixture.of(mixed.shards[0])
        rows = [measure(text, *shape, options.seconds) for text in (alone, mixed) for shape in SHAPES]
        rows.append(measure_order(alone, 8192))
    bars = must_show(rows, gpu)
    shown = ("machine", "pair", "model", "sequence_length", "parameters", "commit", "tokens_per_second")
    write_json(
        options.output / "loader.json",
        recorded,
        bars,
        gpu={key: gpu.get(key) for key in shown},
        tokens=options.tokens,
        rows=rows,
    )
    (options.output / "loader.md").write_text(page(recorded, rows, gpu), encoding="utf-8")
    print(bars_table(bars))


if __name__ == "__main__":
    sys.exit(main())
