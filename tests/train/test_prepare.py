"""Preparing keeps every byte of every document, gives the same files however it is run, and loses nothing on error."""

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from train import prepare as module
from train.data import DataError, TokenShards
from train.prepare import STAGING_MARKER, PrepareArguments, SplitWriter, main, prepare, split_of
from train.tokenizer import BOS, EOS, byte_tokenizer, tokenizer_hash

WORDS = ["the", "moon", "over", "江心寺", "def", "return", "3.14159", "naïve", "🌊", "\n", "x += 1;", "<|eos|>"]


def corpus(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents of different length, some of which spell special tokens."""
    draw = random.Random(seed)
    return [
        {
            "text": f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 40))),
            "source": f"book {number % 3}",
            "domain": draw.choice(["en", "zh", "code"]),
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows_path(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "corpus.jsonl", corpus(200))


def arguments(input_path: Path, output: Path, **options: object) -> PrepareArguments:
    settings = {"validation_fraction": 0.1} | options
    return PrepareArguments(inputs=(str(input_path),), output=output, **settings)  # type: ignore[arg-type]


def stored_documents(output: Path, split: str) -> list[list[int]]:
    """Ids of each document, read without the code under test."""
    manifest = json.loads((output / "manifest.json").read_text())
    documents: list[list[int]] = []
    for shard in manifest["splits"][split]["shards"]:
        ids = np.fromfile(output / shard["file"], dtype="<u2" if manifest["dtype"] == "uint16" else "<u4")
        starts = np.fromfile(output / shard["index_file"], dtype="<u8")
        documents += [part.tolist() for part in np.split(ids, starts[1:].astype(np.int64))]
    return documents


def texts_of(output: Path, split: str) -> list[str]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    texts = []
    for ids in stored_documents(output, split):
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        texts.append(tokenizer.decode(ids[1:-1]))
    return texts


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
@pytest.mark.parametrize("dtype", [None, "uint32"])
def test_every_text_comes_back(tokenizer: str, dtype: str | None, rows_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    manifest = prepare(arguments(rows_path, output, tokenizer=tokenizer, dtype=dtype, shard_tokens=3000))
    rows = corpus(200)
    expected = {
        name: [row["text"] for row in rows if split_of(row["text"], 0, 0.1) == name] for name in ("train", "validation")
    }
    assert {name: texts_of(output, name) for name in expected} == expected
    assert len(manifest["splits"]["train"]["shards"]) > 1
    assert manifest["token_bytes"] == "exact"
    assert manifest["dtype"] == (dtype or "uint16")


def test_manifest_and_document_labels_describe_what_is_there(rows_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    manifest = prepare(arguments(rows_path, output, shard_tokens=3000))
    rows = {row["text"]: row for row in corpus(200)}
    for name, split in manifest["splits"].items():
        texts, documents = texts_of(output, name), stored_documents(output, name)
        labels = [json.loads(line) for line in (output / name / "documents.jsonl").read_text().splitlines()]
        assert labels == [
            {
                "source": rows[text]["source"],
                "domain": rows[text]["domain"],
                "bytes": len(text.encode()),
                "tokens": len(ids),
            }
            for text, ids in zip(texts, documents, strict=True)
        ]
        assert split["tokens"] == sum(map(len, documents)) == sum(shard["tokens"] for shard in split["shards"])
        assert split["documents"] == len(documents)
        assert split["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest["tokenizer"]["hash"] == tokenizer_hash(byte_tokenizer())
    assert manifest == json.loads((output / "manifest.json").read_text())


def test_worker_count_changes_nothing(rows_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 500)  # many more batches than may be in flight
    for workers in (1, 2):
        prepare(arguments(rows_path, tmp_path / str(workers), workers=workers, tokenizer="bpe:300"))
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "2")


def test_split_is_independent_of_order_and_depends_on_the_seed(rows_path: Path, tmp_path: Path) -> None:
    prepare(arguments(rows_path, tmp_path / "forward"))
    backward = write_rows(tmp_path / "backward.jsonl", corpus(200)[::-1])
    prepare(arguments(backward, tmp_path / "backward"))
    prepare(arguments(rows_path, tmp_path / "reseeded", seed=1))
    held_out = texts_of(tmp_path / "forward", "validation")
    assert texts_of(tmp_path / "backward", "validation") == held_out[::-1]
    assert set(texts_of(tmp_path / "reseeded", "validation")) != set(held_out)
    assert 5 <= len(held_out) <= 40  # about a tenth of 200


def test_bpe_never_sees_the_validation_text(tmp_path: Path) -> None:
    rows = [row for row in corpus(200) if split_of(row["text"], 0, 0.1) == "train"]
    hashes = set()
    for filler in ("zq", "xj"):  # validation documents that would yield other merges
        strangers = [{"text": f"{filler}{number} " * 50} for number in range(100)]
        held_out = [row for row in strangers if split_of(row["text"], 0, 0.1) == "validation"]
        path = write_rows(tmp_path / f"{filler}.jsonl", rows + held_out)
        hashes.add(prepare(arguments(path, tmp_path / filler, tokenizer="bpe:300"))["tokenizer"]["hash"])
    assert len(hashes) == 1


def test_bpe_training_text_is_limited_without_a_terminal() -> None:
    assert list(module._first_bytes(["one", "two", "é", "three"], 8)) == ["one", "two", "é"]


def test_labels_may_hold_any_character(tmp_path: Path) -> None:
    labels = ["a\u2028b", "c\x85d", "\ud800"]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "t", "source": label}) + "\n" for label in labels))
    prepare(arguments(path, tmp_path / "out", validation_fraction=0.0))
    lines = (tmp_path / "out" / "train" / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["source"] for line in lines] == labels


def test_defaults_of_the_command_line_are_those_of_the_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PrepareArguments] = []
    monkeypatch.setattr(module, "prepare", seen.append)
    main(["a.txt", "--output", str(tmp_path)])
    assert seen == [PrepareArguments(inputs=("a.txt",), output=tmp_path)]


def test_single_batch_starts_no_process(rows_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "ProcessPoolExecutor")
    assert prepare(arguments(rows_path, tmp_path / "out", workers=8))["splits"]["train"]["documents"] > 0


def test_text_that_spells_special_tokens_stays_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "corpus.jsonl", [{"text": f"{BOS}an{EOS}{EOS}"}])
    prepare(arguments(path, tmp_path / "out", validation_fraction=0.0))
    assert stored_documents(tmp_path / "out", "train") == [[256, *f"{BOS}an{EOS}{EOS}".encode(), 257]]


def test_bytes_fall_back_to_the_average_where_the_count_is_not_exact(tmp_path: Path) -> None:
    """A normaliser makes byte lengths wrong for the texts it changes; other vocabularies have none at all."""
    composing = byte_tokenizer()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="never")
    words.decoder = decoders.Metaspace()
    rows = [{"text": "one two"}, {"text": "cafe\u0301"}]
    path = write_rows(tmp_path / "corpus.jsonl", rows)
    for name, tokenizer in (("nfc", composing), ("words", PreTrainedTokenizerFast(tokenizer_object=words))):
        tokenizer.save_pretrained(tmp_path / f"{name}-tokenizer")
        options = {"tokenizer": str(tmp_path / f"{name}-tokenizer"), "validation_fraction": 0.0}
        manifest = prepare(arguments(path, tmp_path / name, **options))
        token_bytes_V = np.load(tmp_path / name / "token_bytes.npy", allow_pickle=False)
        ids = np.concatenate([np.array(document) for document in stored_documents(tmp_path / name, "train")])
        assert manifest["token_bytes"] == "average"
        assert len(set(token_bytes_V[token_bytes_V > 0])) == 1
        np.testing.assert_allclose(token_bytes_V[ids].sum(), manifest["splits"]["train"]["text_bytes"], rtol=1e-6)

    ascii_only = write_rows(tmp_path / "ascii.jsonl", rows[:1])
    options = {"tokenizer": str(tmp_path / "nfc-tokenizer"), "validation_fraction": 0.0}
    assert prepare(arguments(ascii_only, tmp_path / "exact", **options))["token_bytes"] == "exact"


def test_prepared_data_is_left_alone(
    rows_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokenizer in ("byte", "bpe:300"):
        output = tmp_path / tokenizer
        first = prepare(arguments(rows_path, output, tokenizer=tokenizer))
        with monkeypatch.context() as patch:
            patch.delattr(SplitWriter, "add")  # nothing may be written again
            assert prepare(arguments(rows_path, output, tokenizer=tokenizer, workers=2)) == first
        assert f"{output}: already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokenizer": "bpe:300"}, "tokenizer"),
        ({"seed": 3}, "seed"),
        ({"validation_fraction": 0.2, "dtype": "uint32"}, "validation_fraction, dtype"),
    ],
)
def test_other_data_is_not_overwritten(options: dict[str, object], named: str, rows_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prepare(arguments(rows_path, output))
    before = snapshot(output)
    with pytest.raises(DataError, match=rf"^--output .*out: holds data prepared differently \({named}\)"):
        prepare(arguments(rows_path, output, **options))
    assert snapshot(output) == before


def test_changed_document_tokens_are_noticed(rows_path: Path, tmp_path: Path) -> None:
    """They stand in tokenizer_config.json, which the hash of tokenizer.json does not cover."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer")}
    first = prepare(arguments(rows_path, tmp_path / "out", **options))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token=EOS).save_pretrained(
        tmp_path / "tokenizer"
    )
    with pytest.raises(DataError, match=r"prepared differently \(tokenizer\)"):
        prepare(arguments(rows_path, tmp_path / "out", **options))
    other = prepare(arguments(rows_path, tmp_path / "other", **options))
    assert other["tokenizer"]["hash"] == first["tokenizer"]["hash"]
    assert other["fingerprint"] != first["fingerprint"]


def test_changed_input_is_noticed_and_a_foreign_directory_is_kept(rows_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prepare(arguments(rows_path, output))
    write_rows(rows_path, corpus(201))
    with pytest.raises(DataError, match=r"prepared differently \(sources\)"):
        prepare(arguments(rows_path, output))
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"^--output .*thesis: exists and is not prepared data"):
        prepare(arguments(rows_path, foreign))
    assert (foreign / "chapter.txt").read_text() == "years of work"


def test_leftovers_of_a_killed_run_are_discarded(rows_path: Path, tmp_path: Path) -> None:
    staging = tmp_path / "out.tmp"
    (staging / "train").mkdir(parents=True)
    (staging / "train" / "00000.bin").write_bytes(b"half a shard")
    (staging / STAGING_MARKER).touch()
    prepare(arguments(rows_path, tmp_path / "out"))
    prepare(arguments(rows_path, tmp_path / "clean"))
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "clean")
    assert not staging.exists()


def test_directory_in_the_way_is_kept(rows_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "out.tmp" / "chapter.txt"
    foreign.parent.mkdir()
    foreign.write_text("years of work")
    command = [str(rows_path), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {tmp_path / 'out'}: {foreign.parent} is in the way")
    assert error.count("\n") == 1
    assert foreign.read_text() == "years of work"
    foreign.unlink()  # an empty one is nobody's loss
    assert main(command) == 0
    assert not (tmp_path / "out" / STAGING_MARKER).exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left(
    number: int,
    rows_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: SplitWriter) -> None:
        raise OSError(number, "device is full")

    monkeypatch.setattr(SplitWriter, "_flush", full)
    assert main([str(rows_path), "--output", str(tmp_path / "out"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --output {tmp_path / 'out'}: no space left")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [rows_path]


def test_interrupt_removes_what_was_written(rows_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: SplitWriter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SplitWriter, "_flush", interrupt)
    assert main([str(rows_path), "--output", str(tmp_path / "out"), "--workers", "1"]) == 130
    assert list(tmp_path.iterdir()) == [rows_path]


def test_vocabulary_larger_than_the_dtype(rows_path: Path, tmp_path: Path) -> None:
    for size in (2**16, 2**16 + 1):
        backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / str(size))
    fitting, large = str(tmp_path / str(2**16)), str(tmp_path / str(2**16 + 1))
    assert prepare(arguments(rows_path, tmp_path / "a", tokenizer=fitting, dtype="uint16"))["dtype"] == "uint16"
    with pytest.raises(DataError, match=r"^--dtype uint16: cannot hold a vocabulary of 65537 ids; use --dtype uint32"):
        prepare(arguments(rows_path, tmp_path / "b", tokenizer=large, dtype="uint16"))
    assert prepare(arguments(rows_path, tmp_path / "c", tokenizer=large))["dtype"] == "uint32"


def test_bad_documents_stop_the_job_or_are_counted(tmp_path: Path) -> None:
    rows = corpus(50)
    rows[7]["text"] = "  "
    path = write_rows(tmp_path / "corpus.jsonl", rows)
    with pytest.raises(DataError, match=r"corpus\.jsonl: line 8: empty document"):
        prepare(arguments(path, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [path]
    manifest = prepare(arguments(path, tmp_path / "out", skip_bad=True, tokenizer="bpe:280"))
    assert manifest["skipped_documents"] == 1
    assert sum(split["documents"] for split in manifest["splits"].values()) == 49


def test_document_without_tokens_is_bad(tmp_path: Path) -> None:
    deaf = byte_tokenizer()
    deaf.backend_tokenizer.normalizer = normalizers.Replace("silence", "")
    deaf.save_pretrained(tmp_path / "deaf")
    path = write_rows(tmp_path / "corpus.jsonl", [{"text": "words"}, {"text": "silence"}])
    options = {"tokenizer": str(tmp_path / "deaf"), "validation_fraction": 0.0}
    with pytest.raises(DataError, match=r"line 2: the tokenizer turns it into no token at all"):
        prepare(arguments(path, tmp_path / "out", **options))
    assert prepare(arguments(path, tmp_path / "out", skip_bad=True, **options))["splits"]["train"]["documents"] == 1


def test_empty_splits_are_errors(tmp_path: Path) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"empty\.jsonl: no documents in the input$"):
        prepare(arguments(empty, tmp_path / "out"))
    blank = write_rows(tmp_path / "blank.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match=r"no documents in the input \(1 were skipped as unusable\)"):
        prepare(arguments(blank, tmp_path / "out", skip_bad=True))
    single = write_rows(tmp_path / "single.jsonl", [{"text": "alone"}])
    with pytest.raises(DataError, match=r"none of the 1 documents fell into the validation split; change"):
        prepare(arguments(single, tmp_path / "out", validation_fraction=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation-fraction", "1"], "--validation-fraction 1.0: must be"),
        (["--workers", "0"], "--workers 0: must be"),
        (["--shard-tokens", "0"], "--shard-tokens 0: must be"),
        (["--tokenizer", "bpe:many"], "--tokenizer bpe:many: not a vocabulary size"),
        (["--tokenizer", "bpe:9999", "--workers", "1"], "bpe:9999: the text is too small"),
        (["--tokenizer", "./absent"], "./absent: no such tokenizer"),
        (["--text-column", "body", "--workers", "1"], "no 'body'"),
        (["--split", "test"], "--split: only hub: and disk: inputs"),
    ],
)
def test_command_line_errors_are_one_line(
    options: list[str], message: str, rows_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(rows_path), "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [rows_path]


def test_output_that_cannot_be_written_is_one_line(rows_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(rows_path), "--output", str(rows_path / "out"), "--workers", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Not a directory" in error
    assert str(rows_path) in error


def test_command_line_end_to_end(rows_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("a note\n", encoding="utf-8")
    output = tmp_path / "nested" / "out"
    command = [str(rows_path), str(notes), "--output", str(output), "--workers", "1"]
    assert main([*command, "--tokenizer", "bpe:300", "--validation-fraction", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert "vocabulary 300, bytes per token exact" in printed
    train, validation = TokenShards(output, "train"), TokenShards(output, "validation")
    documents = sum(shards.manifest["splits"][shards.split]["documents"] for shards in (train, validation))
    assert documents == 201
    assert "a note\n" in texts_of(output, "train") + texts_of(output, "validation")
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    train.check_tokenizer(tokenizer)
