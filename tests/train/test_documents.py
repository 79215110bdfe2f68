"""Every kind of input yields its documents and labels; every unusable document is named or counted, never lost."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from train.data import DataError
from train.documents import BadDocuments, Document, open_sources, read_documents

ROWS = [
    {"text": "one\ntwo", "source": "book", "domain": "en"},
    {"text": "蒼梧雲杳杳", "source": "poem", "domain": "zh"},
    {"text": "no labels"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def read(
    *inputs: str | Path, column: str = "text", bad: BadDocuments | None = None, **options: object
) -> list[Document]:
    bad = bad or BadDocuments()
    sources = open_sources([str(name) for name in inputs], **options)  # type: ignore[arg-type]
    return [document for source in sources for document in read_documents(source, column, bad)]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_json_lines(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"corpus.jsonl{suffix}", COMPRESSORS[suffix](LINES))
    documents = read(path)
    assert [document.text for document in documents] == [row["text"] for row in ROWS]
    assert [document.source for document in documents] == ["book", "poem", path.name]
    assert [document.domain for document in documents] == ["en", "zh", None]
    assert documents[1].where == f"{path}: line 2"


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_text_file_is_one_document(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"notes.txt{suffix}", COMPRESSORS[suffix](b"first line\nsecond line\n"))
    assert [document.text for document in read(path, column="ignored")] == ["first line\nsecond line\n"]


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string(), pa.binary()])
def test_parquet(text_type: pa.DataType, tmp_path: Path) -> None:
    texts = [f"document {number} 詩" for number in range(25)]
    columns = {"body": pa.array(texts).cast(text_type), "domain": pa.array(["zh"] * 25), "other": pa.array(range(25))}
    path = tmp_path / "part.parquet"
    parquet.write_table(pa.table(columns), path, row_group_size=10)
    documents = read(path, column="body")
    assert [document.text for document in documents] == texts
    assert {(document.source, document.domain) for document in documents} == {("part.parquet", "zh")}
    assert documents[-1].where == f"{path}: row 25"


def test_directory_is_read_in_sorted_order(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    write(folder / "b.txt", "third")
    write(folder / "a" / "z.txt", "second")
    write(folder / "a" / "y.jsonl", '{"text": "first"}\n')
    write(folder / "README.md", "not a document")
    documents = read(folder)
    assert [document.text for document in documents] == ["first", "second", "third"]
    assert [document.source for document in documents] == ["corpus/a/y.jsonl", "corpus/a/z.txt", "corpus/b.txt"]


def test_identity_follows_the_content_not_the_place(tmp_path: Path) -> None:
    first = write(tmp_path / "1" / "corpus.jsonl", LINES)
    moved = write(tmp_path / "2" / "corpus.jsonl", LINES)
    edited = write(tmp_path / "3" / "corpus.jsonl", LINES + LINES)
    one, two, three = open_sources([str(first), str(moved), str(edited)])
    assert (one.name, one.identity) == (two.name, two.identity)
    assert one.identity != three.identity


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b'{"text": "   \\n"}', "empty document"),
        (b'{"text": ""}', "empty document"),
        (b'{"text": "caf\xe9"}', r"not UTF-8 \(byte 13 of it is 0xe9\)"),
        (b'{"text": "\\ud800"}', r"not UTF-8 \(lone surrogate at character 0\)"),
        (b'{"text": "cut', r"not valid JSON \(.*\)"),
        (b"", r"not valid JSON"),
        (b'{"text": "t", "id": ' + b"1" * 5000 + b"}", r"not valid JSON \(Exceeds the limit"),
        (b"[" * 100_000, r"not valid JSON \(maximum recursion depth"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"body": "b", "id": 3}', r"no 'text' \(the row has body, id; --text-column names another\)"),
        (b'{"text": 7}', "'text' is int, not text"),
        (b'{"text": null}', "'text' is NoneType, not text"),
    ],
)
def test_bad_row_is_named_or_counted(row: bytes, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", b'{"text": "good"}\n' + row + b'\n{"text": "also good"}\n')
    with pytest.raises(DataError, match=rf"corpus\.jsonl: line 2: {problem}.*--skip-bad$"):
        read(path)
    bad = BadDocuments(skip=True)
    assert [document.text for document in read(path, bad=bad)] == ["good", "also good"]
    assert bad.skipped == 1


def test_bad_text_file_and_bad_parquet_row_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 \(byte 3 of it is 0xe9\)"):
        read(write(tmp_path / "latin.txt", b"caf\xe9"))
    with pytest.raises(DataError, match=r"blank\.txt: empty document"):
        read(write(tmp_path / "blank.txt", "\n\n"))
    path = tmp_path / "part.parquet"
    invalid = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff\xfe"]).buffers())
    parquet.write_table(pa.table({"text": invalid}), path)
    with pytest.raises(DataError, match=r"part\.parquet: row 2: not UTF-8"):
        read(path)


def test_damaged_parquet_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    parquet.write_table(pa.table({"text": [f"document {number}" for number in range(5000)]}), path, row_group_size=1000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part\.parquet: cannot be read beyond row \d+, damaged \(.*\)$"):
        read(path, bad=BadDocuments(skip=True))
    invalid = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff\xfe"]).buffers())
    parquet.write_table(pa.table({"text": ["one", "two"], "source": invalid}), path)
    with pytest.raises(DataError, match=r"part\.parquet: cannot be read beyond row 0, damaged"):
        read(path)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_damaged_compression_is_an_error_even_when_skipping(suffix: str, tmp_path: Path) -> None:
    content = COMPRESSORS[suffix](LINES * 200)
    for name, damaged in (("cut", content[: len(content) // 2]), ("not", b"this was never compressed")):
        path = write(tmp_path / f"{name}.jsonl{suffix}", damaged)
        with pytest.raises(DataError, match=rf"{name}\.jsonl{suffix}: cannot be read to its end"):
            read(path, bad=BadDocuments(skip=True))


def test_inputs_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
        read(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"book\.pdf: unknown file suffix"):
        read(write(tmp_path / "book.pdf", "x"))
    with pytest.raises(DataError, match=r"no \.jsonl, \.txt or \.parquet file in this directory"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"fake\.parquet: not a parquet file"):
        read(write(tmp_path / "fake.parquet", "x" * 100))
    path = tmp_path / "part.parquet"
    parquet.write_table(pa.table({"body": ["x"]}), path)
    with pytest.raises(DataError, match=r"part\.parquet: no column 'text' \(there is body\); name one with --text"):
        read(path)


def test_options_that_no_input_reads_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=r"^--split: only hub: and disk: inputs"):
        read(path, split="test")
    with pytest.raises(DataError, match=r"^--streaming: only hub: inputs"):
        read(path, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # A folder stands in for a hub repository: `load_dataset` treats both alike.
    write(tmp_path / "repository" / "train.jsonl", LINES)
    write(tmp_path / "repository" / "test.jsonl", '{"text": "held out"}\n')
    name = f"hub:{tmp_path / 'repository'}"
    assert [document.text for document in read(name, streaming=streaming)] == [row["text"] for row in ROWS]
    documents = read(name, streaming=streaming, split="test")
    assert [document.text for document in documents] == ["held out"]
    assert documents[0].where == f"{name}: row 1"
    with pytest.raises(DataError, match=r"^hub:.*repository: the dataset could not be loaded \(.*nowhere.*\)$"):
        read(name, streaming=streaming, split="nowhere")


def test_saved_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["one", "two"], "source": ["a", "b"]})
    rows.save_to_disk(tmp_path / "single")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "both")
    documents = read(f"disk:{tmp_path / 'single'}", column="body")
    assert [(document.text, document.source) for document in documents] == [("one", "a"), ("two", "b")]
    assert [document.text for document in read(f"disk:{tmp_path / 'both'}", column="body", split="test")] == ["two"]
    with pytest.raises(DataError, match=r"no column 'text' \(there is body, source\)"):
        read(f"disk:{tmp_path / 'single'}")
    with pytest.raises(DataError, match=r"no split 'dev' \(there is train, test\)"):
        read(f"disk:{tmp_path / 'both'}", column="body", split="dev")
    with pytest.raises(DataError, match=r"^disk:.*absent: the dataset could not be loaded"):
        read(f"disk:{tmp_path / 'absent'}")
