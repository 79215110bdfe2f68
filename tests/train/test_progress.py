"""A preparation that was interrupted, killed or left by the network comes to the very files of one that was not."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.train.test_prepare import corpus, snapshot
from train import prepare as module
from train.data import DataError
from train.prepare import STAGING_MARKER, PrepareArguments, SplitWriter, main, prepare
from train.progress import PROGRESS_FILE, read_progress

DOCUMENTS = 120
KINDS = ("jsonl", "parquet", "hub", "stream", "disk", "several")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(module, "FLUSH_BYTES", 700)  # between the ends of shards, too


def source(kind: str, directory: Path) -> tuple[list[str], dict[str, Any]]:
    """Inputs of a kind that hold the same rows, some of them unusable, and the options they need."""
    import datasets

    rows: list[dict[str, Any]] = [{"text": row["text"], "source": row["source"]} for row in corpus(DOCUMENTS)]
    for bad in (0, 17, 18, 64, DOCUMENTS - 1):
        rows[bad] |= {"text": "  "}
    table = {key: [row[key] for row in rows] for key in rows[0]}
    folder = directory / "folder"
    folder.mkdir()
    if kind == "disk":
        datasets.Dataset.from_dict(table).save_to_disk(directory / "disk")
        return [f"disk:{directory / 'disk'}"], {}
    for part in range(3):
        some = slice(part * DOCUMENTS // 3, (part + 1) * DOCUMENTS // 3)
        if kind in ("jsonl", "several"):
            lines = "".join(json.dumps(row) + "\n" for row in rows[some])
            (folder / f"{part}.jsonl").write_text(lines)
        else:
            columns = {key: values[some] for key, values in table.items()}
            parquet.write_table(pa.table(columns), folder / f"{part}.parquet", row_group_size=7)
    if kind == "several":
        return [str(folder / "0.jsonl"), f"hub:{folder}", str(folder / "2.jsonl")], {"streaming": True}
    if kind in ("hub", "stream"):
        return [f"hub:{folder}"], {"streaming": kind == "stream"}
    return [str(folder)], {}


def arguments(inputs: list[str], output: Path, **options: Any) -> PrepareArguments:
    settings = {"validation_fraction": 0.2, "shard_tokens": 2000, "workers": 1, "skip_bad": True}
    return PrepareArguments(inputs=tuple(inputs), output=output, **settings | options)


def failing_after(documents: int, error: BaseException) -> Any:
    """`SplitWriter.add`, which fails once it has been called so often."""
    add, calls = SplitWriter.add, 0

    def failing(self: SplitWriter, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > documents:
            raise error
        add(self, *given)

    return failing


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_again_and_again(
    kind: str, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, options = source(kind, tmp_path)
    options |= {"tokenizer": tokenizer, "shard_tokens": 900}
    manifest = prepare(arguments(inputs, tmp_path / "whole", **options))
    assert len(manifest["splits"]["train"]["shards"]) > 3 and manifest["skipped_documents"] >= 5
    output, places = tmp_path / "out", []
    for _ in range(DOCUMENTS):
        with monkeypatch.context() as patch:
            patch.setattr(SplitWriter, "add", failing_after(40, KeyboardInterrupt()))
            try:
                prepare(arguments(inputs, output, **options))
            except KeyboardInterrupt:
                progress = read_progress(tmp_path / "out.tmp")
                assert progress is not None and not output.exists()
                places.append((progress.place.source, progress.place.row))
            else:
                break
    assert places == sorted(set(places)) and len(places) >= 2  # each time it went on from a later place
    assert snapshot(output) == snapshot(tmp_path / "whole")
    assert not (tmp_path / "out.tmp").exists()
    assert "out.tmp: going on after" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "stream"])
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment(kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves is what is on disk; moments lie around every file that is written."""
    inputs, options = source(kind, tmp_path)
    whole, images = tmp_path / "whole", []

    def kept(name: str) -> None:
        images.append(tmp_path / f"image{len(images)}")
        if (tmp_path / "whole.tmp" / PROGRESS_FILE).exists():
            shutil.copytree(tmp_path / "whole.tmp", images[-1])

    with monkeypatch.context() as patch:
        for name in ("sync", "write_progress"):
            original = getattr(module, name)
            patch.setattr(module, name, lambda *given, f=original, n=name: (kept(n), f(*given))[1])
        prepare(arguments(inputs, whole, workers=workers, **options))
    found = [image for image in images if image.exists()]
    assert len(found) > 10
    draw = random.Random(0)
    for image in draw.sample(found, 4 if workers == 1 else 1) + found[-1:]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(image, tmp_path / "out.tmp")
        prepare(arguments(inputs, tmp_path / "out", workers=workers, **options))
        assert snapshot(tmp_path / "out") == snapshot(whole)


def test_what_was_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = source("stream", tmp_path)
    command = arguments(inputs, tmp_path / "out", **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SplitWriter, "add", failing_after(90, KeyboardInterrupt()))
        prepare(command)
    progress = read_progress(tmp_path / "out.tmp")
    assert progress is not None and progress.documents > 60
    read: list[int] = []
    documents = module.read_documents

    def counted(*given: Any) -> Iterator[Any]:
        for document in documents(*given):
            read.append(document.row)
            yield document

    monkeypatch.setattr(module, "read_documents", counted)
    prepare(command)
    assert len(read) < DOCUMENTS - progress.documents and read[0] > progress.place.row


@pytest.mark.parametrize("streaming", [True, False])
def test_streaming_may_be_switched_in_between(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = source("stream", tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SplitWriter, "add", failing_after(90, KeyboardInterrupt()))
        prepare(arguments(inputs, tmp_path / "out", streaming=streaming))
    assert read_progress(tmp_path / "out.tmp") is not None
    prepare(arguments(inputs, tmp_path / "out", streaming=not streaming))
    prepare(arguments(inputs, tmp_path / "whole"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_command_line_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, _ = source("jsonl", tmp_path)
    command = [*inputs, "--output", str(tmp_path / "out"), "--workers", "1", "--shard-tokens", "2000", "--skip-bad"]
    for after, kept in ((3, False), (90, True)):
        with monkeypatch.context() as patch:
            patch.setattr(SplitWriter, "add", failing_after(after, KeyboardInterrupt()))
            assert main(command) == 130
        error = capsys.readouterr().err
        assert ("out.tmp is kept; the same command goes on" in error) == kept and error.count("\n") == 1
        assert (tmp_path / "out.tmp").exists() == kept
    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "add", failing_after(3, OSError(errno.ENOSPC, "full")))
        assert main(command) == 2
    assert "no space left on this device" in (error := capsys.readouterr().err) and "out.tmp is kept" in error
    assert main([*command, "--seed", "3"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"out\.tmp holds an unfinished preparation of another request \(seed\); repeat", error)
    assert main(command) == 0
    prepare(arguments(inputs, tmp_path / "whole", validation_fraction=0.02))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_leaving_bad_documents_out_may_be_decided_when_one_is_met(tmp_path: Path) -> None:
    rows = corpus(DOCUMENTS)
    rows[100]["text"] = " "
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 101: empty document"):
        prepare(arguments([str(path)], tmp_path / "out", skip_bad=False))
    assert read_progress(tmp_path / "out.tmp") is not None
    for output in ("out", "whole"):
        prepare(arguments([str(path)], tmp_path / output))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_the_network_costs_nothing_that_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    inputs, options = source("stream", tmp_path)
    command = arguments(inputs, tmp_path / "out", **options, shard_tokens=10**6)  # no shard is complete before the end
    prepare(command)
    (tmp_path / "out").rename(tmp_path / "whole")
    monkeypatch.setattr("train.streams.time.sleep", lambda seconds: None)
    rows, lives = datasets.IterableDataset.__iter__, [70, 20, 0, 0, 0, 0, 0, 0, 0]

    def cut(self: Any) -> Iterator[Any]:
        left = lives.pop(0)
        for row in rows(self):
            if left == 0:
                raise ConnectionResetError("reset by peer")
            left -= 1
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "__iter__", cut)
        with pytest.raises(DataError, match=r"8 attempts failed, the last one with reset by peer; .*out\.tmp is kept"):
            prepare(command)
    assert lives == [] and "reset by peer; attempt 8 of 8 in 60 s" in capsys.readouterr().err
    progress = read_progress(tmp_path / "out.tmp")
    assert progress is not None and progress.place.row == 90
    prepare(command)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    inputs, _ = source("jsonl", tmp_path)
    (tmp_path / "out.tmp").mkdir()
    with (tmp_path / "out.tmp" / STAGING_MARKER).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is preparing it; let it finish"):
            prepare(arguments(inputs, tmp_path / "out"))
    prepare(arguments(inputs, tmp_path / "out"))


# --- what was changed meanwhile ---


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PrepareArguments:
    inputs, options = source("stream", tmp_path)
    command = arguments(inputs, tmp_path / "out", **options, tokenizer="bpe:300")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SplitWriter, "add", failing_after(90, KeyboardInterrupt()))
        prepare(command)
    return command


def open_shard(staging: Path) -> Path:
    progress = read_progress(staging)
    assert progress is not None and progress.splits["validation"]["tokens"] > 0
    return staging / "validation" / f"{len(progress.splits['validation']['shards']):05d}.bin"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda staging: os.truncate(open_shard(staging), 10), "10 bytes where the manifest says"),
        (lambda staging: os.truncate(staging / "train" / "00000.bin", 10), "10 bytes where the manifest says"),
        (lambda staging: open_shard(staging).write_bytes(np.arange(9999, dtype="<u2").tobytes()), "its sha256 is not"),
        (lambda staging: open_shard(staging).unlink(), "missing"),
        (lambda staging: (staging / "train" / "documents.jsonl").unlink(), "missing"),
        (lambda staging: shutil.rmtree(staging / "train"), "missing"),
        (lambda staging: (staging / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda staging: (staging / PROGRESS_FILE).write_text("{"), "progress.json: "),
    ],
)
def test_what_no_longer_fits_is_refused(
    change: Callable[[Path], object], message: str, unfinished: PrepareArguments
) -> None:
    staging = unfinished.output.with_name("out.tmp")
    change(staging)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        prepare(unfinished)
    assert str(staging) in str(caught.value) and staging.exists()


def test_more_than_counts_is_cut_off(unfinished: PrepareArguments, tmp_path: Path) -> None:
    staging = unfinished.output.with_name("out.tmp")
    with open_shard(staging).open("ab") as file:
        file.write(b"half a document")
    (staging / "train" / "00099.bin").write_bytes(b"a later shard")
    (staging / "validation" / "99999.idx").mkdir()
    prepare(unfinished)
    prepare(PrepareArguments(**{f: getattr(unfinished, f) for f in unfinished.__slots__} | {"output": tmp_path / "b"}))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "b")
