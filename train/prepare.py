"""Turn documents into memory-mapped token shards: `python -m train.prepare INPUT... --output DIR`.

    python -m train.prepare data/embedded.jsonl.xz --output runs/data --tokenizer bpe:4096
    python -m train.prepare hub:NAME:CONFIG --streaming --output runs/data --tokenizer HUB_ID
    python -m train.prepare --corpus configs/table1/corpora.yaml megamath-web --workers 64

A document becomes [bos] + tokens + [eos], with those of the two that the tokenizer defines. Whether it belongs to
validation depends on its text and the seed alone, so neither the order of the inputs nor the number of workers
changes the result. Everything is written into DIR.tmp and renamed when complete. A preparation that was interrupted,
killed, or left by the network goes on by the same command from its last complete shard (`train.progress`).
`train.documents` describes the inputs, `train.data` the files written.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from train.config import ConfigError
from train.corpora import corpus_arguments
from train.data import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    TOKEN_BYTES_FILE,
    TOKEN_DTYPES,
    DataError,
    check_file,
    file_sha256,
    fingerprint,
    read_manifest,
    shard_files,
    sync,
)
from train.documents import BadDocuments, Document, Source, open_sources, read_documents
from train.progress import PROGRESS_FILE, Place, Progress, read_progress, write_progress
from train.streams import NetworkError
from train.tokenizer import (
    TokenizerError,
    load_tokenizer,
    special_ids,
    token_byte_lengths,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)

# More text than this no longer changes the merges of a BPE noticeably, and would have to be held in memory.
BPE_TRAINING_BYTES = 1_000_000_000
BATCH_CHARACTERS = 250_000  # text handed to a worker at a time
FLUSH_BYTES = 8_000_000  # of ids held back before they are written
STAGING_MARKER = ".unfinished"  # tells a directory of ours, which may be deleted, from anybody else's


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareArguments:
    """What is prepared from what; the fields are the command line's options and their defaults."""

    inputs: tuple[str, ...]
    output: Path
    tokenizer: str = "byte"
    validation_fraction: float = 0.02
    text_column: str = "text"
    split: str | None = None
    streaming: bool = False
    workers: int = os.cpu_count() or 1
    shard_tokens: int = 100_000_000
    max_tokens: int | None = None
    dtype: str | None = None
    seed: int = 0
    skip_bad: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"--validation-fraction {self.validation_fraction}: must be at least 0 and below 1")
        if self.workers < 1:
            raise DataError(f"--workers {self.workers}: must be at least 1")
        if self.shard_tokens < 1:
            raise DataError(f"--shard-tokens {self.shard_tokens}: must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"--max-tokens {self.max_tokens}: must be at least 1")


def prepare(arguments: PrepareArguments) -> dict[str, Any]:
    """Write the shards and return their manifest; a directory that already holds exactly them is left alone.

    Goes on where the same request was left unfinished. Raises DataError or TokenizerError for anything that cannot be
    prepared as asked; what complete shards there are by then are kept, and the message says so.
    """
    sources = open_sources(arguments.inputs, arguments.split, arguments.streaming)
    bpe_size = _bpe_size(arguments.tokenizer)
    tokenizer = load_tokenizer(arguments.tokenizer) if bpe_size is None else None
    request = _request(arguments, sources, tokenizer)
    existing = _existing_manifest(arguments.output, request)
    if existing is not None:
        print(f"{arguments.output}: already prepared")
        return existing

    with _staged(arguments.output) as staging:
        progress = read_progress(staging)
        if progress is not None:
            _check_same_request(arguments.output, staging, progress, request)
            print(f"{staging}: going on after {progress.documents:,} documents", flush=True)
        if bpe_size is not None:
            trained = progress is not None
            tokenizer = load_tokenizer(str(staging)) if trained else _trained_tokenizer(arguments, sources, bpe_size)
        assert tokenizer is not None
        if progress is None or bpe_size is None:
            tokenizer.save_pretrained(staging)
        manifest = _write_shards(arguments, sources, tokenizer, staging, request, progress)
        manifest["arguments"] = request
        _write_json(staging / "manifest.json", manifest)
    _print_summary(arguments.output, manifest)
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 2 with one `error:` line on stderr when the request cannot be met."""
    try:
        options = _options(sys.argv[1:] if argv is None else list(argv))
        prepare(PrepareArguments(**options))
    except (ConfigError, DataError, TokenizerError, OSError) as error:  # an OSError names its file and what is wrong
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        staging = _staging(options["output"])
        kept = (staging / PROGRESS_FILE).exists()
        left = (
            f"{staging} is kept; the same command goes on" if kept else "nothing was written; the same command starts"
        )
        print(f"interrupted: {left}{'' if kept else ' again'}", file=sys.stderr)
        return 130
    return 0


def _options(argv: list[str]) -> dict[str, Any]:
    """Fields of `PrepareArguments`: those of the corpus that is named, then those of the command line, which win."""
    parser = _argument_parser()
    options = parser.parse_args(argv)
    if options.corpus is not None:
        if options.inputs:
            parser.error("give either INPUTs or a --corpus, which names its own")
        file, name = options.corpus
        known = [field.name for field in fields(PrepareArguments)]
        options = parser.parse_args([*corpus_arguments(Path(file), name, known), *argv])
    if not options.inputs or options.output is None:
        parser.error("INPUT and --output are required, unless a --corpus says them")
    return {key: value for key, value in vars(options).items() if key != "corpus"} | {"inputs": tuple(options.inputs)}


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.prepare",
        description="Turn documents into memory-mapped token shards.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="file, directory, hub:NAME[:CONFIG[:FOLDER]] or disk:PATH")
    add("--corpus", nargs=2, metavar=("FILE", "NAME"), help="a corpus that a YAML file describes, instead of INPUTs")
    add("--output", type=Path, metavar="DIR", help="directory to write")
    add("--tokenizer", help="byte, bpe:SIZE (trained on the training split), a path or a hub id")
    add("--validation-fraction", type=float, help="share of documents held out")
    add("--text-column", help="where rows keep their text")
    add("--split", help="which split of a dataset to read; train if not given")
    add("--streaming", action="store_true", help="read hub: datasets without downloading them first")
    add("--workers", type=int, help="processes that tokenise")
    add("--shard-tokens", type=int, help="a shard is closed once it has this many tokens")
    add("--max-tokens", type=int, help="stop after the document that makes it so many, over all splits")
    add("--dtype", choices=sorted(TOKEN_DTYPES), help="of stored ids; the smallest that holds the vocabulary")
    add("--seed", type=int, help="draws the validation documents")
    add("--skip-bad", action="store_true", help="leave unusable documents out and count them")
    parser.set_defaults(
        **{option.name: option.default for option in fields(PrepareArguments) if option.default is not MISSING}
    )
    return parser


# What was asked for


def _bpe_size(name: str) -> int | None:
    """SIZE of `bpe:SIZE`, None for any other tokenizer."""
    if not name.startswith("bpe:"):
        return None
    size = name.removeprefix("bpe:")
    if not size.isdecimal():
        raise TokenizerError(f"--tokenizer {name}: not a vocabulary size; write bpe:4096")
    return int(size)


def _request(
    arguments: PrepareArguments, sources: list[Source], tokenizer: PreTrainedTokenizerFast | None
) -> dict[str, Any]:
    """Everything that decides the output; how it is computed (workers, streaming) and where is left out."""
    return {
        "sources": [[source.name, source.identity] for source in sources],
        # The hash is of tokenizer.json, which does not say which ids open and close a document.
        "tokenizer": arguments.tokenizer
        if tokenizer is None  # still to be trained
        else [tokenizer_hash(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id],
        "validation_fraction": arguments.validation_fraction,
        "text_column": arguments.text_column,
        "shard_tokens": arguments.shard_tokens,
        "max_tokens": arguments.max_tokens,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "skip_bad": arguments.skip_bad,
    }


def _existing_manifest(output: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in `output` when it answers this very request, None when nothing is there yet."""
    if not output.exists() or _is_empty_directory(output):
        return None
    if not (output / "manifest.json").is_file():
        raise DataError(f"--output {output}: exists and is not prepared data; name another directory")
    manifest = read_manifest(output)
    previous = manifest["arguments"]
    differing = [key for key in request if previous.get(key) != request[key]]
    if differing:
        raise DataError(
            f"--output {output}: holds data prepared differently ({', '.join(differing)}); "
            "name another directory, or delete this one"
        )
    return manifest


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _check_same_request(output: Path, staging: Path, progress: Progress, request: dict[str, Any]) -> None:
    """Raise DataError unless this request comes to what the unfinished one would have come to."""
    differing = [key for key in request if progress.request.get(key) != request[key]]
    if differing == ["skip_bad"] and progress.place.skipped == progress.empty == 0:
        return  # it has not mattered yet
    if differing:
        raise DataError(
            f"--output {output}: {staging} holds an unfinished preparation of another request "
            f"({', '.join(differing)}); repeat that one's command, or delete it"
        )


def _staging(output: Path) -> Path:
    return output.with_name(output.name + ".tmp")


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `output` at the end.

    With the first exception it disappears, unless there is progress in it to go on from.
    """
    staging = _staging(output)
    marker = staging / STAGING_MARKER
    if staging.exists() and not _is_empty_directory(staging) and not marker.is_file():
        raise DataError(f"--output {output}: {staging} is in the way, and not ours to delete; move it away")
    staging.mkdir(parents=True, exist_ok=True)
    with marker.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"--output {output}: another process is preparing it; let it finish, or end it") from error
        try:
            if not (staging / PROGRESS_FILE).exists():
                _clear(staging, {STAGING_MARKER})  # left by a run that was killed
            yield staging
            staging.rename(output)
            for name in (PROGRESS_FILE, STAGING_MARKER):
                (output / name).unlink(missing_ok=True)
        except BaseException as error:
            kept = (staging / PROGRESS_FILE).exists()
            if not kept:
                shutil.rmtree(staging, ignore_errors=True)
            fate = f"{staging} {'is kept, the same command goes on from there' if kept else 'was removed'}"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"--output {output}: no space left on this device; {fate}") from error
            if kept and isinstance(error, NetworkError):
                raise NetworkError(f"{error}; {fate}") from error
            raise


def _clear(directory: Path, keep: set[str]) -> None:
    """Deletes what is in a directory but some names."""
    for path in directory.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# Documents


START = Place()
Placed = tuple[Document, Place]  # a document, and the place after it


def _documents(
    arguments: PrepareArguments, sources: list[Source], bad: BadDocuments, place: Place = START
) -> Iterator[Placed]:
    """Documents after a place in the input."""
    for number, source in enumerate(sources[place.source :], place.source):
        start = place if number == place.source else Place(number)
        for document in read_documents(source, arguments.text_column, bad, start.row, start.state):
            yield document, Place(number, document.row, bad.skipped, source.state())


def split_of(text: str, seed: int, validation_fraction: float) -> str:
    """`train` or `validation`, as a pure function of the text and the seed."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return "validation" if int.from_bytes(digest, "big") < validation_fraction * 2**64 else "train"


def _trained_tokenizer(arguments: PrepareArguments, sources: list[Source], vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE trained on the training split: the validation text must not shape what measures it."""
    bad = BadDocuments(arguments.skip_bad)
    texts = (
        document.text
        for document, _ in _documents(arguments, sources, bad)
        if split_of(document.text, arguments.seed, arguments.validation_fraction) == "train"
    )
    return train_bpe(_first_bytes(texts, BPE_TRAINING_BYTES), vocab_size)


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    total = 0  # progress.n stands still where no bar is shown
    with _progress("training the tokenizer") as progress:
        for text in texts:
            yield text
            size = len(text.encode())
            progress.update(size)
            total += size
            if total >= limit:
                return


def _batches(documents: Iterable[Placed]) -> Iterator[list[Placed]]:
    batch: list[Placed] = []
    characters = 0
    for document, place in documents:
        batch.append((document, place))
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# Tokens


@dataclass(frozen=True, slots=True)
class TokenizedDocument:
    """Ids of one document without bos and eos, and the size of its text."""

    ids: np.ndarray
    text_bytes: int


class DocumentTokenizer:
    """Turns a list of texts into TokenizedDocuments; can be rebuilt in another process from its JSON."""

    def __init__(self, tokenizer_json: str, dtype: np.dtype) -> None:
        self._backend = Tokenizer.from_str(tokenizer_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        # Text that spells "<|eos|>" is text: only prepare itself places special tokens.
        self._backend.encode_special_tokens = True
        self._dtype = dtype

    def __call__(self, texts: list[str]) -> list[TokenizedDocument]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [
            TokenizedDocument(np.array(encoding.ids, dtype=self._dtype), len(text.encode()))
            for text, encoding in zip(texts, encodings, strict=True)
        ]


_worker_tokenizer: DocumentTokenizer


def _start_worker(tokenizer_json: str, dtype: np.dtype) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = DocumentTokenizer(tokenizer_json, dtype)


def _tokenize_in_worker(texts: list[str]) -> list[TokenizedDocument]:
    return _worker_tokenizer(texts)


def _tokenized(
    documents: Iterable[Placed], tokenizer_json: str, dtype: np.dtype, workers: int
) -> Iterator[tuple[Placed, TokenizedDocument]]:
    """Documents with their tokens, in order whatever the number of workers."""
    batches = _batches(documents)
    beginning = list(islice(batches, 2))
    batches = chain(beginning, batches)
    if workers == 1 or len(beginning) < 2:  # a single batch is done before a process has started
        tokenize = DocumentTokenizer(tokenizer_json, dtype)
        for batch in batches:
            yield from zip(batch, tokenize([document.text for document, _ in batch]), strict=True)
        return
    # Forked from a server that has the slow imports done and runs no threads: forking this process, where torch and
    # tokenizers may run some, can deadlock, and a spawned process would spend seconds on its imports.
    context = get_context("forkserver")
    context.set_forkserver_preload(["train.documents", "train.tokenizer"])
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_json, dtype))
    pending: deque[tuple[list[Placed], Future[list[TokenizedDocument]]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, pool.submit(_tokenize_in_worker, [document.text for document, _ in batch])))
            # Enough to keep every worker busy, and no more: the input may be larger than memory.
            if len(pending) > 2 * workers:
                batch, future = pending.popleft()
                yield from zip(batch, future.result(), strict=True)
        for batch, future in pending:
            yield from zip(batch, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


# Shards


class SplitWriter:
    """Writes the shards of one split; a document never crosses from one shard into the next.

    `saved` is what `save` returned once: writing goes on from there, and what was written since is cut off.
    """

    def __init__(
        self, directory: Path, split: str, shard_tokens: int, dtype: np.dtype, saved: dict[str, Any] | None = None
    ) -> None:
        self.text_bytes = 0
        self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._dtype = dtype
        self._listing = f"{split}/documents.jsonl"
        self._listing_bytes = 0
        self._listing_hash = hashlib.sha256()
        if saved is None:
            (directory / split).mkdir()
            self._start_shard()
        else:
            self._restore(saved)

    def add(self, ids: np.ndarray, text_bytes: int, document: Document) -> None:
        """Append one document: its ids (bos and eos included) and its line in documents.jsonl."""
        self.text_bytes += text_bytes
        self._starts.append(self._tokens)
        self._tokens += len(ids)
        self.tokens += len(ids)
        self._id_buffer += ids.tobytes()
        record = {"source": document.source, "domain": document.domain, "bytes": text_bytes, "tokens": len(ids)}
        self._record_buffer += json.dumps(record).encode() + b"\n"
        if len(self._id_buffer) >= FLUSH_BYTES:
            self._flush()
        if self._tokens >= self._shard_tokens:
            self._end_shard()

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns the split's part of the manifest."""
        if self._starts:
            self._end_shard()
        return {
            "tokens": self.tokens,
            "documents": sum(shard["documents"] for shard in self.shards),
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }

    def save(self) -> dict[str, Any]:
        """Bring everything onto the disk; returns what it takes to go on from here."""
        self._flush()
        for path in (self._directory / self._split).iterdir():
            if path.name >= Path(self._file).stem:  # the open shard, and the listing
                sync(path)
        return {
            "text_bytes": self.text_bytes,
            "shards": self.shards,
            "tokens": self._tokens,
            "documents": len(self._starts),
            "sha256": self._hash.hexdigest(),
            "index_sha256": hashlib.sha256(self._index()).hexdigest(),
            "listing_bytes": self._listing_bytes,
            "listing_sha256": self._listing_hash.hexdigest(),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        itemsize = self._dtype.itemsize
        self.text_bytes, self.shards = saved["text_bytes"], saved["shards"]
        for shard in self.shards:
            check_file(self._directory, shard["file"], shard["tokens"] * itemsize, None)
            check_file(self._directory, shard["index_file"], shard["documents"] * INDEX_DTYPE.itemsize, None)
        own = self._directory / self._split
        if not own.is_dir():
            raise DataError(f"{own}: missing; delete {self._directory} and prepare it anew")
        self._start_shard()
        self._tokens, self._listing_bytes = saved["tokens"], saved["listing_bytes"]
        self.tokens = self._tokens + sum(shard["tokens"] for shard in self.shards)
        index_bytes = saved["documents"] * INDEX_DTYPE.itemsize
        kept = {Path(shard[key]).name for shard in self.shards for key in ("file", "index_file")}
        for name, size, sha256 in (
            (self._file, self._tokens * itemsize, saved["sha256"]),
            (self._index_file, index_bytes, saved["index_sha256"]),
            (self._listing, self._listing_bytes, saved["listing_sha256"]),
        ):
            if size:
                _cut(self._directory, name, size, sha256)
                kept.add(Path(name).name)
        _clear(own, kept)
        if self._listing_bytes:
            self._listing_hash = _hash_of(self._directory / self._listing)
        if self._tokens:
            self._hash = _hash_of(self._directory / self._file)
            self._starts += np.fromfile(self._directory / self._index_file, INDEX_DTYPE).tolist()
            self._starts_written = len(self._starts)

    def _start_shard(self) -> None:
        self._file, self._index_file = shard_files(self._split, len(self.shards))
        self._starts: list[int] = []
        self._starts_written = 0
        self._tokens = 0
        self._id_buffer = bytearray()
        self._record_buffer = bytearray()
        self._hash = hashlib.sha256()

    def _index(self, first: int = 0) -> bytes:
        return np.array(self._starts[first:], dtype=INDEX_DTYPE).tobytes()

    def _flush(self) -> None:
        for name, buffer in (
            (self._file, self._id_buffer),
            (self._index_file, self._index(self._starts_written)),
            (self._listing, self._record_buffer),
        ):
            if buffer:
                with (self._directory / name).open("ab") as file:
                    file.write(buffer)
        self._hash.update(self._id_buffer)
        self._listing_hash.update(self._record_buffer)
        self._listing_bytes += len(self._record_buffer)
        self._starts_written = len(self._starts)
        self._id_buffer, self._record_buffer = bytearray(), bytearray()

    def _end_shard(self) -> None:
        self._flush()
        self.shards.append(
            {
                "file": self._file,
                "index_file": self._index_file,
                "tokens": self._tokens,
                "documents": len(self._starts),
                "sha256": self._hash.hexdigest(),
                "index_sha256": hashlib.sha256(self._index()).hexdigest(),
            }
        )
        for name in (self._file, self._index_file):
            sync(self._directory / name)
        self._start_shard()


def _hash_of(path: Path) -> Any:
    """What hashlib has of a file, which can be added to."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _cut(directory: Path, name: str, size: int, sha256: str) -> None:
    """Shortens a file to what counts of it; DataError where that is not all there, or does not hash to `sha256`."""
    check_file(directory, name, None, None)
    path = directory / name
    if path.stat().st_size > size:
        os.truncate(path, size)
    check_file(directory, name, size, sha256)


def _write_shards(
    arguments: PrepareArguments,
    sources: list[Source],
    tokenizer: PreTrainedTokenizerFast,
    staging: Path,
    request: dict[str, Any],
    progress: Progress | None,
) -> dict[str, Any]:
    """Tokenise every document, or those after what was done, into the shards of its split; returns the manifest."""
    vocab_size = vocabulary_size(tokenizer)
    dtype_name = _dtype_name(arguments.dtype, vocab_size)
    dtype = TOKEN_DTYPES[dtype_name]
    bos_id, eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    head = np.array([] if bos_id is None else [bos_id], dtype=dtype)
    tail = np.array([] if eos_id is None else [eos_id], dtype=dtype)
    split_names = ["train"] if arguments.validation_fraction == 0 else ["train", "validation"]
    identity = [tokenizer_hash(tokenizer), bos_id, eos_id]
    if progress is not None and (
        progress.tokenizer != identity or list(progress.splits) != split_names or progress.place.source >= len(sources)
    ):
        raise DataError(f"{staging}: its tokenizer, splits or sources are not those it was begun with; delete it")
    saved: dict[str, dict[str, Any]] = {} if progress is None else progress.splits
    writers = {name: SplitWriter(staging, name, arguments.shard_tokens, dtype, saved.get(name)) for name in split_names}
    measure = TextMeasure(tokenizer, None if progress is None else progress.measure)
    place = START if progress is None else progress.place
    # One for reading, which is ahead, and one for what has been tokenised.
    bad, empty = BadDocuments(arguments.skip_bad, place.skipped), BadDocuments(arguments.skip_bad)
    empty.skipped = 0 if progress is None else progress.empty

    def save() -> None:
        of_splits = {name: writer.save() for name, writer in writers.items()}
        write_progress(staging, Progress(request, identity, place, empty.skipped, measure.saved(), of_splits))

    def tokens() -> int:
        return sum(writer.tokens for writer in writers.values())

    documents = _documents(arguments, sources, bad, place)
    if arguments.max_tokens is not None and tokens() >= arguments.max_tokens:  # it was ended just then
        documents = iter(())
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    complete = sum(len(writer.shards) for writer in writers.values())
    try:
        with _progress("tokenising") as bar:
            for (document, after), tokenized in _tokenized(documents, tokenizer_json, dtype, arguments.workers):
                bar.update(tokenized.text_bytes)
                place = after
                if len(tokenized.ids) == 0:
                    empty.report(document.where, "the tokenizer turns it into no token at all")
                    continue
                measure.add(tokenized)
                split = split_of(document.text, arguments.seed, arguments.validation_fraction)
                writers[split].add(np.concatenate([head, tokenized.ids, tail]), tokenized.text_bytes, document)
                before, complete = complete, sum(len(writer.shards) for writer in writers.values())
                if complete > before:
                    save()
                if arguments.max_tokens is not None and tokens() >= arguments.max_tokens:
                    break
    except NetworkError:
        if place != START:
            save()  # all that was read before, up to what is still being tokenised
        raise

    splits = {name: writer.finish() for name, writer in writers.items()}
    skipped = bad.skipped + empty.skipped
    _check_splits(splits, arguments, skipped)
    np.save(staging / TOKEN_BYTES_FILE, measure.token_bytes(), allow_pickle=False)
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "dtype": dtype_name,
        "tokenizer": {
            "name": arguments.tokenizer,
            "hash": tokenizer_hash(tokenizer),
            "vocab_size": vocab_size,
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
        },
        "token_bytes": "exact" if measure.exact else "average",
        "token_bytes_sha256": file_sha256(staging / TOKEN_BYTES_FILE),
        "splits": splits,
        "skipped_documents": skipped,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    return manifest


class TextMeasure:
    """How many bytes of text each token id stands for, checked against every document.

    It is `exact` as long as the lengths known from the vocabulary add up to the length of each document; where they
    are unknown or ever fail to (not byte-level, a normaliser), every id counts the average instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, saved: dict[str, Any] | None = None) -> None:
        self._lengths_V = token_byte_lengths(tokenizer)  # None: not exact
        self._vocab_size = vocabulary_size(tokenizer)
        self._special = sorted(special_ids(tokenizer))
        self._text_bytes = 0
        self._tokens = 0
        if saved is not None:
            self._text_bytes, self._tokens = saved["text_bytes"], saved["tokens"]
            self._lengths_V = self._lengths_V if saved["exact"] else None

    def saved(self) -> dict[str, Any]:
        """What it takes to go on from here."""
        return {"exact": self.exact, "text_bytes": self._text_bytes, "tokens": self._tokens}

    @property
    def exact(self) -> bool:
        return self._lengths_V is not None

    def add(self, document: TokenizedDocument) -> None:
        self._text_bytes += document.text_bytes
        self._tokens += len(document.ids)
        if self._lengths_V is not None and self._lengths_V[document.ids].sum() != document.text_bytes:
            self._lengths_V = None

    def token_bytes(self) -> np.ndarray:
        """(V,) float32; 0 for special tokens, which stand for no text."""
        if self._lengths_V is not None:
            return self._lengths_V.astype(np.float32)
        average_V = np.full(self._vocab_size, self._text_bytes / self._tokens, dtype=np.float32)
        average_V[self._special] = 0
        return average_V


def _dtype_name(asked: str | None, vocab_size: int) -> str:
    fitting = [name for name, dtype in TOKEN_DTYPES.items() if vocab_size <= 256**dtype.itemsize]
    if asked is not None and asked not in fitting:
        raise DataError(
            f"--dtype {asked}: cannot hold a vocabulary of {vocab_size} ids; use --dtype {fitting[0]} or leave it out"
        )
    return asked or fitting[0]


def _check_splits(splits: dict[str, Any], arguments: PrepareArguments, skipped_documents: int) -> None:
    counts = {name: split["documents"] for name, split in splits.items()}
    if sum(counts.values()) == 0:
        skipped = f" ({skipped_documents} were skipped as unusable)" if skipped_documents else ""
        raise DataError(f"{' '.join(arguments.inputs)}: no documents in the input{skipped}")
    for name, count in counts.items():
        if count == 0:
            raise DataError(
                f"--validation-fraction {arguments.validation_fraction}: none of the {sum(counts.values())} documents "
                f"fell into the {name} split; change the fraction (0 for no validation split) or --seed"
            )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _progress(description: str) -> tqdm:
    """A progress bar in bytes of text, shown on terminals only."""
    return tqdm(desc=description, unit="B", unit_scale=True, disable=None)


def _print_summary(output: Path, manifest: dict[str, Any]) -> None:
    print(f"{output}: vocabulary {manifest['tokenizer']['vocab_size']}, bytes per token {manifest['token_bytes']}")
    for name, split in manifest["splits"].items():
        ratio = split["text_bytes"] / split["tokens"]
        print(
            f"  {name}: {split['documents']:,} documents, {split['tokens']:,} tokens, {split['text_bytes']:,} bytes "
            f"({ratio:.2f} per token), {len(split['shards'])} shards"
        )
    if manifest["skipped_documents"]:
        print(f"  {manifest['skipped_documents']:,} unusable documents skipped")
    if manifest["tokenizer"]["eos_token_id"] is None:
        print("  the tokenizer names no end-of-document token: a model trained on this never learns to stop")


if __name__ == "__main__":
    sys.exit(main())
