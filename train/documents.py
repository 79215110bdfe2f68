"""Reading documents, one at a time, from local files and from `datasets` datasets.

Inputs are named on the command line of `train.prepare`:

    corpus.jsonl[.xz|.gz|.zst]     one JSON object a line; `source` and `domain` are kept where a row has them
    notes.txt[.xz|.gz|.zst]        one document a file
    part.parquet                   one document a row, read one row group at a time
    directory/                     every such file below it, in sorted order
    NAME.part01, NAME.part02, ...  such a file in parts, in a directory or named by the first; read as if joined
    hub:NAME[:CONFIG[:FOLDER]]     a dataset of the hub (or a local folder that `load_dataset` accepts)
    disk:PATH                      what `Dataset.save_to_disk` wrote
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from train.data import DataError, file_sha256
from train.streams import Stream, patiently, told

JSON_LINES_SUFFIXES = (".jsonl", ".json-lines")
COMPRESSION_SUFFIXES = (".xz", ".gz", ".zst")
LABELS = ("source", "domain")
PARQUET_ROWS = 1024
PART = re.compile(r"\.part\d+")


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is not blank, where it was found (for messages), and the labels that evaluation groups by.

    `row` counts the rows of its source up to it.
    """

    text: str
    where: str
    source: str
    domain: str | None
    row: int = 0


@dataclass(slots=True)
class BadDocuments:
    """What to do with a document that cannot be used: stop (default), or leave it out and count it."""

    skip: bool = False
    skipped: int = 0

    def report(self, where: str, problem: str) -> None:
        """Raise DataError, or count the document when skipping."""
        if not self.skip:
            raise DataError(f"{where}: {problem}; correct it, or leave such documents out with --skip-bad")
        self.skipped += 1


class UnusableError(Exception):
    """One document is unusable; the message says why, the caller knows where it is."""


# A raw row: an undecoded line of JSON, or columns whose text may still be undecoded bytes.
Row = bytes | Mapping[str, Any]


class Rows(Protocol):
    def __call__(self, text_column: str, start: int = 0, state: Any = None) -> Iterator[tuple[str, Row]]: ...


@dataclass(frozen=True, slots=True)
class Source:
    """One file or dataset: `identity` changes when its content does.

    `rows` takes the name of the text column and reads (where, row) from the start, or after so many rows. A stream, in
    which such a place is not found again by counting, goes on from the `state` that it was in.
    """

    name: str
    identity: str
    rows: Rows = field(repr=False)
    state: Callable[[], Any] = field(default=lambda: None, repr=False)


def open_sources(inputs: Sequence[str], split: str | None = None, streaming: bool = False) -> list[Source]:
    """Resolve the inputs, in order. `split` and `streaming` concern datasets only.

    Raises DataError for an input that does not exist or has an unknown suffix, and for an option that none of
    the inputs reads.
    """
    if split is not None and not any(name.startswith(("hub:", "disk:")) for name in inputs):
        raise DataError("--split: only hub: and disk: inputs have splits; leave it out")
    if streaming and not any(name.startswith("hub:") for name in inputs):
        raise DataError("--streaming: only hub: inputs can be streamed; leave it out")
    sources: list[Source] = []
    for name in inputs:
        if name.startswith("hub:"):
            sources.append(_hub_source(name, split or "train", streaming))
        elif name.startswith("disk:"):
            sources.append(_disk_source(name, split or "train"))
        else:
            sources.extend(_local_sources(Path(name)))
    return sources


def read_documents(
    source: Source, text_column: str, bad: BadDocuments, start: int = 0, state: Any = None
) -> Iterator[Document]:
    """Documents of one source in order, after the first `start` rows; unusable ones are handed to `bad`."""
    for number, (where, row) in enumerate(source.rows(text_column, start, state), start + 1):
        try:
            columns = _parse_json(row) if isinstance(row, bytes) else row
            text = _text(columns, text_column)
        except UnusableError as problem:
            bad.report(where, str(problem))
            continue
        label, domain = (None if columns.get(key) is None else str(columns[key]) for key in LABELS)
        yield Document(text=text, where=where, source=label or source.name, domain=domain, row=number)


def _parse_json(line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(_decode(line))
    except json.JSONDecodeError as error:
        raise UnusableError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # an integer of too many digits, or brackets nested too deep
        raise UnusableError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UnusableError(f"a JSON {type(row).__name__}, not an object with a text")
    return row


def _text(columns: Mapping[str, Any], text_column: str) -> str:
    if text_column not in columns:
        present = ", ".join(columns) or "nothing"
        raise UnusableError(f"no '{text_column}' (the row has {present}; --text-column names another)")
    value = columns[text_column]
    text = _decode(value) if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise UnusableError(f"'{text_column}' is {type(text).__name__}, not text")
    if not text.strip():
        raise UnusableError("empty document")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableError(f"not UTF-8 (lone surrogate at character {error.start})") from error
    return text


def _decode(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UnusableError(f"not UTF-8 (byte {error.start} of it is 0x{raw[error.start]:02x})") from error


# Local files


def _local_sources(path: Path) -> list[Source]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file) and _is_first(file)]
        if not files:
            raise DataError(f"{path}: no .jsonl, .txt or .parquet file in this directory")
        return [_file_source(file, file.relative_to(path.parent).as_posix()) for file in files]
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory")
    return [_file_source(path, path.name)]


def _file_source(path: Path, name: str) -> Source:
    kind = _kind(path)
    if kind is None:
        raise DataError(
            f"{path}: unknown file suffix; known are .jsonl and .txt (plain, .xz, .gz or .zst) and .parquet"
        )
    digests = [file_sha256(part) for part in _parts(path)]
    identity = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def rows(text_column: str, start: int = 0, state: Any = None) -> Iterator[tuple[str, Row]]:
        return islice(kind(path, text_column), start, None)

    return Source(name, identity, rows)


def _whole_name(path: Path) -> Path:
    """The file that this one is a part of: itself, mostly."""
    return path.with_suffix("") if PART.fullmatch(path.suffix) else path


def _is_first(path: Path) -> bool:
    return path == _parts(path)[0]


def _parts(path: Path) -> list[Path]:
    """The files that make up this one, in order, whichever of them it is."""
    whole = _whole_name(path)
    if whole == path:
        return [path]
    beside = path.parent.glob(f"{glob.escape(whole.name)}.part*")
    numbered = {int(part.suffix[5:]): part for part in beside if _whole_name(part) == whole}
    if missing := set(range(min(numbered), max(numbered))) - numbered.keys():
        raise DataError(f"{whole}: part {min(missing)} of it is missing; fetch it")
    return [numbered[number] for number in sorted(numbered)]


def _kind(path: Path) -> Callable[[Path, str], Iterator[tuple[str, Row]]] | None:
    """The reader for this file's suffix; None when there is none."""
    if (whole := _whole_name(path)) != path:
        return None if whole.suffix == ".parquet" else _kind(whole)
    if path.suffix == ".parquet":
        return _parquet_rows
    inner = Path(path.stem).suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix
    if inner in JSON_LINES_SUFFIXES:
        return _json_lines
    return _text_file if inner == ".txt" else None


def _json_lines(path: Path, _: str) -> Iterator[tuple[str, Row]]:
    with _open(path) as file:
        for number, line in enumerate(_whole(path, file), start=1):
            yield f"{path}: line {number}", line


def _text_file(path: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    with _open(path) as file:
        yield str(path), {text_column: b"".join(_whole(path, file))}


def _parquet_rows(path: Path, text_column: str) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({told(error)})") from error
    with file:
        names = file.schema_arrow.names
        _check_columns(str(path), names, text_column)
        text_type = file.schema_arrow.field(text_column).type
        columns = [text_column, *(label for label in LABELS if label in names and label != text_column)]
        number = 0
        try:
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                table = {name: batch.column(name) for name in columns}
                if pa.types.is_string(text_type) or pa.types.is_large_string(text_type):
                    # Undecoded, so that one bad row is reported as such and does not fail its whole batch.
                    table[text_column] = table[text_column].cast(pa.large_binary())
                for values in zip(*(column.to_pylist() for column in table.values()), strict=True):
                    number += 1
                    yield f"{path}: row {number}", dict(zip(columns, values, strict=True))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read beyond row {number}, damaged ({told(error)})") from error


def _open(path: Path) -> io.BufferedIOBase:
    parts, suffix = _parts(path), _whole_name(path).suffix
    file: Any = path if len(parts) == 1 else io.BufferedReader(_Joined(parts))
    if suffix == ".xz":
        return lzma.open(file)
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".zst":
        import pyarrow as pa  # unlike the zstandard package, it notices a file that ends early

        return io.BufferedReader(pa.input_stream(file, compression="zstd"))
    return file if file is not path else path.open("rb")


class _Joined(io.RawIOBase):
    """Files one after another, as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._rest = list(paths)
        self._file: io.BufferedReader | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._file is not None or self._rest:
            if self._file is None:
                self._file = self._rest.pop(0).open("rb")
            if size := self._file.readinto(buffer):
                return size
            self._file.close()
            self._file = None
        return 0


def _whole(path: Path, file: io.BufferedIOBase) -> Iterator[bytes]:
    """The lines of a file, or DataError when its compressed stream is damaged or ends early."""
    try:
        yield from file
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read to its end, damaged or truncated ({error})") from error


# Datasets


def _hub_source(name: str, split: str, streaming: bool) -> Source:
    import datasets

    parts = name.removeprefix("hub:").split(":")
    if len(parts) > 3:
        raise DataError(f"{name}: too many parts; write hub:NAME:CONFIG:FOLDER, or less")
    repository, config, folder = [*parts, "", ""][:3]
    which = {"path": repository, "name": config or None, "data_dir": folder or None}
    with _loading(name):
        # The builder's hash names the revision and files of the dataset before any of it is downloaded.
        identity = patiently(name, lambda: datasets.load_dataset_builder(**which).hash)
        dataset = patiently(name, lambda: datasets.load_dataset(**which, split=split, streaming=streaming))
    if not streaming:
        return Source(f"{name}/{split}", f"{identity}/{split}", _dataset_rows(name, dataset))
    stream = Stream(name, dataset)

    def rows(text_column: str, start: int = 0, state: Any = None) -> Iterator[tuple[str, Row]]:
        if dataset.column_names is not None:  # it may not know them; then each row is checked
            _check_columns(name, dataset.column_names, text_column)
        for number, row in stream.rows(start, state):
            yield f"{name}: row {number}", row

    return Source(f"{name}/{split}", f"{identity}/{split}", rows, lambda: stream.state)


def _disk_source(name: str, split: str) -> Source:
    import datasets

    path = name.removeprefix("disk:")
    with _loading(name):
        dataset = datasets.load_from_disk(path)
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{name}: no split '{split}' (there is {', '.join(dataset)}); name one with --split")
        dataset = dataset[split]
    return Source(f"disk:{Path(path).name}", dataset._fingerprint, _dataset_rows(name, dataset))


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: the dataset could not be loaded ({told(error)})") from error


def _dataset_rows(name: str, dataset: Any) -> Rows:
    def rows(text_column: str, start: int = 0, state: Any = None) -> Iterator[tuple[str, Row]]:
        _check_columns(name, dataset.column_names, text_column)
        for number, row in enumerate(dataset.skip(start), start + 1):
            yield f"{name}: row {number}", row

    return rows


def _check_columns(name: str, columns: Sequence[str], text_column: str) -> None:
    if text_column not in columns:
        raise DataError(
            f"{name}: no column '{text_column}' (there is {', '.join(columns)}); name one with --text-column"
        )
