"""How well checkpoints predict text: bits per byte by domain and source.

    python -m eval.perplexity RUN_DLCM RUN_LLAMA
    python -m eval.perplexity CHECKPOINT --text novel.txt.xz more.jsonl --window 512 --stride 256

The text is the validation split of the first run's data, or that of files, which are read as `train.prepare` reads
them. Every token of a document is scored once, given what opens it and the tokens before: as many as the model has
positions, or, in a document of more, those of its window. A window is `--stride` tokens ahead of the one before it, and
scores these; without, windows lie end to end. What ends a document is no text, and not scored.

    bits per byte       of all tokens of a text, over its bytes in UTF-8
    nats per token      of the same tokens; no measure between tokenizers
    tokens per concept  of what the model read, at inference

Writes OUTPUT/perplexity.json and .md, and prints the latter.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.bench import Row, markdown_table
from eval.held_out import held_out
from eval.loading import EvaluationError, LoadedCheckpoint, decode, load_checkpoint, report_errors
from eval.report import labels_of, publish, with_error, with_interval
from eval.scoring import BATCH_TOKENS, DTYPES, Score, Scorer
from eval.uncertainty import Ratio, paired_difference
from train.data import DataError
from train.documents import BadDocuments, Document, open_sources, read_documents
from train.metrics import bits_per_byte

AT_ONCE = 2**22  # characters of text whose tokens are held


# Text


@dataclass(slots=True)
class _NoBadDocuments(BadDocuments):
    """All are to be scored."""

    def report(self, where: str, problem: str) -> None:
        raise EvaluationError(f"{where}: {problem}; correct it, or leave the document out")


def read_texts(files: Sequence[str]) -> list[Document]:
    """The documents of files, or of all files in directories (see `train.documents`).

    Raises:
        EvaluationError: a document cannot be used, or there is none.
        DataError: a file cannot be read.
    """
    documents = [
        document for source in open_sources(files) for document in read_documents(source, "text", _NoBadDocuments())
    ]
    if not documents:
        raise EvaluationError(f"--text {' '.join(files)}: holds no document")
    return documents


def validation_documents(loaded: LoadedCheckpoint) -> Iterator[Document]:
    """The documents of the validation splits of a run's data, made from their tokens.

    Raises:
        DataError: the prepared data is gone, damaged, or no longer what the checkpoint was trained on.
    """
    for source in held_out(loaded.run, loaded.state, "--text"):
        for number, (start, row) in enumerate(zip(source.starts, source.rows, strict=False), 1):
            text = decode(loaded.tokenizer, torch.from_numpy(source.shards.window(start, row["tokens"])[0]))
            if len(text.encode()) != row["bytes"]:
                raise DataError(
                    f"{source.listing}, line {number}: tokens do not give back the document, since the tokenizer "
                    "alters text; give --text FILE"
                )
            yield Document(text, f"{source.listing}: line {number}", row["source"], row["domain"])


@dataclass(frozen=True, slots=True)
class Group:
    """Documents that have a number together: kind ("all", "domain", "source"), name, and their indices."""

    kind: str
    name: str
    indices: list[int]


# Scores


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a document adds to sums: its size, nats, scored tokens, and what was read."""

    num_bytes: int
    nats: float
    scored: int
    tokens: int
    concepts: int


def score_documents(
    scorer: Scorer, documents: Sequence[Document], window: int | None, stride: int | None, name: str
) -> list[Numbers]:
    """Numbers of each document (see `Scorer.document`)."""
    found: list[Numbers] = []
    start = size = 0
    for index, document in enumerate(documents, 1):
        size += len(document.text)
        if size >= AT_ONCE or index == len(documents):
            requests = scorer.documents([document.text for document in documents[start:index]], window, stride)
            scores = scorer.score(requests, f"{name}, documents {start + 1:,}-{index:,} of {len(documents):,}")
            found += [_numbers(request.num_bytes, score) for request, score in zip(requests, scores, strict=True)]
            start, size = index, 0
    return found


def _numbers(num_bytes: int, score: Score) -> Numbers:
    return Numbers(num_bytes, -score.log_likelihood, score.scored, score.tokens, score.concepts)


# Numbers


def groups_of(documents: Sequence[Document]) -> list[Group]:
    """All documents, those of each domain, and those of each source, in order of appearance."""
    found = [Group("all", "all", list(range(len(documents))))]
    for kind in ("domain", "source"):
        indices: dict[str, list[int]] = {}
        for index, document in enumerate(documents):
            if (name := getattr(document, kind)) is not None:
                indices.setdefault(name, []).append(index)
        found += [Group(kind, name, of) for name, of in indices.items()]
    return found


def bits(numbers: Sequence[Numbers]) -> Ratio:
    """Bits over bytes of text."""
    return Ratio.of([bits_per_byte(of.nats, 1) for of in numbers], [of.num_bytes for of in numbers])


def row_of(checkpoint: str, group: Group, numbers: Sequence[Numbers]) -> Row:
    ratio = bits(numbers)
    sums = {
        name: sum(getattr(of, name) for of in numbers) for name in ("num_bytes", "nats", "scored", "tokens", "concepts")
    }
    return {
        "checkpoint": checkpoint,
        "kind": group.kind,
        "name": group.name,
        "documents": len(numbers),
        "bytes": sums["num_bytes"],
        "tokens": sums["scored"],
        "bits_per_byte": ratio.value,
        "bits_per_byte_error": ratio.error,
        "nats_per_token": sums["nats"] / sums["scored"],
        "tokens_per_concept": sums["tokens"] / sums["concepts"] if sums["concepts"] else None,
    }


# Report


def table(rows: Sequence[Sequence[Row]], differences: Sequence[Sequence[Row]]) -> str:
    """A line for each group: rows of all checkpoints side by side, then how much the first differs from each other."""
    first = [of[0] for of in rows]
    shown = [
        [name for name in ("bits_per_byte", "nats_per_token", "tokens_per_concept") if row[name] is not None]
        for row in first
    ]
    header = ["text", "documents", "kB"]
    for row, names in zip(first, shown, strict=True):
        header += [f"{row['checkpoint']}: {name.replace('_', ' ')}" for name in names]
    header += [f"less {of[0]['theirs']}: bits per byte" for of in differences]
    lines = []
    for index, row in enumerate(rows[0]):
        line = [row["name"] if row["kind"] == "all" else f"{row['kind']} {row['name']}"]
        line += [f"{row['documents']:,}", f"{row['bytes'] / 1000:,.1f}"]
        for of, names in zip(rows, shown, strict=True):
            error = of[index]["bits_per_byte_error"]
            line += [with_error(of[index][name], error if name == "bits_per_byte" else None, 3) for name in names]
        lines.append([*line, *(with_interval(of[index], 3) for of in differences)])
    return markdown_table(header, lines)


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    paths = labels_of(options.checkpoints)
    documents = read_texts(options.text) if options.text else []
    fingerprint = None  # of the data whose split is scored
    numbers: dict[str, list[Numbers]] = {}
    for name, path in paths.items():
        loaded = load_checkpoint(path)
        if not documents:
            documents, fingerprint = list(validation_documents(loaded)), loaded.state.data_fingerprint
        if fingerprint not in (None, loaded.state.data_fingerprint):
            print(f"warning: {path} was trained on other data, which may have included this text", file=sys.stderr)
        scorer = Scorer(loaded.model, loaded.tokenizer, options.dtype, options.batch_tokens)
        numbers[name] = score_documents(scorer, documents, options.window, options.stride, name)
        del loaded, scorer  # before the next one takes memory

    groups = groups_of(documents)
    members = {name: [[of[index] for index in group.indices] for group in groups] for name, of in numbers.items()}
    rows = [[row_of(name, *pair) for pair in zip(groups, of, strict=True)] for name, of in members.items()]
    first, *others = members
    differences = [
        [
            {"ours": first, "theirs": other, "kind": group.kind, "name": group.name}
            | dataclasses.asdict(paired_difference(bits(ours), bits(theirs), group.name))
            for group, ours, theirs in zip(groups, members[first], members[other], strict=True)
        ]
        for other in others
    ]

    publish(
        options.output or options.checkpoints[0].parent / "perplexity",
        "perplexity",
        ["# Perplexity", table(rows, differences)],
        checkpoints={name: str(path) for name, path in paths.items()},
        text=options.text or "validation split",
        window=options.window,
        stride=options.stride,
        dtype=options.dtype,
        rows=[row for of in rows for row in of],
        differences=[row for of in differences for row in of],
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.perplexity", description="Bits per byte of text.")
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="run directories or checkpoints"
    )
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="jsonl, text or parquet (default: the run's)"
    )
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens read at a time (default: the model's positions)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from a window to the next (default: the window)"
    )
    parser.add_argument(
        "--output", type=Path, help="where to write (default: `perplexity` beside the first CHECKPOINT)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast (default: %(default)s)"
    )
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="read at a time (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
