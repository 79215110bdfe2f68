"""Bits per byte are those of the model's own logits, of the text that is scored and of no other, group by group."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from eval.loading import EvaluationError, load_checkpoint
from eval.perplexity import (
    Group,
    groups_of,
    main,
    read_texts,
    row_of,
    score_documents,
    validation_documents,
)
from eval.scoring import Scorer
from tests.eval.conftest import TEXTS, Trained, prepare_labelled
from tests.eval.toy import BYTES, bigram_model, log_likelihood, random_table, uniform_table
from train.documents import Document

TABLE = random_table(5)


def document(text: str, source: str = "here", domain: str | None = None) -> Document:
    return Document(text, "test", source, domain)


def test_bits_are_the_tables_however_long_the_text() -> None:
    texts = ["é中", "Nobody spoke. " * 20, "x"]
    scorer = Scorer(bigram_model(TABLE, positions=32), BYTES)
    for window, stride in ((None, None), (32, 8), (5, 1)):
        found = score_documents(scorer, [document(text) for text in texts], window, stride, "model")
        for text, numbers in zip(texts, found, strict=True):
            nats = -log_likelihood(TABLE, BYTES.bos_token_id, text.encode())
            assert numbers.nats == pytest.approx(nats, rel=1e-9)
            assert numbers.num_bytes == numbers.scored == len(text.encode())
        row = row_of("model", Group("all", "all", [0, 1, 2]), found)
        total = -sum(log_likelihood(TABLE, BYTES.bos_token_id, text.encode()) for text in texts)
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / 286, rel=1e-9)
        assert row["nats_per_token"] == pytest.approx(total / 286, rel=1e-9)
        assert (row["bytes"], row["tokens"], row["documents"]) == (286, 286, 3)
        assert row["tokens_per_concept"] is None


def test_many_documents_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(bigram_model(TABLE), BYTES)
    documents = [document("x" * length) for length in (3, 9, 1, 1, 1, 30, 2)]
    whole = score_documents(scorer, documents, None, None, "model")
    pieces: list[int] = []
    read = scorer.documents
    monkeypatch.setattr(scorer, "documents", lambda texts, *args: pieces.append(len(texts)) or read(texts, *args))
    monkeypatch.setattr("eval.perplexity.AT_ONCE", 10)
    assert score_documents(scorer, documents, None, None, "model") == whole
    assert pieces == [2, 4, 1]


def test_groups_are_all_then_domains_then_sources() -> None:
    documents = [
        document("a", "one", "en"),
        document("b", "two"),
        document("c", "one", "zh"),
        document("d", "two", "en"),
    ]
    assert [(group.kind, group.name, group.indices) for group in groups_of(documents)] == [
        ("all", "all", [0, 1, 2, 3]),
        ("domain", "en", [0, 3]),
        ("domain", "zh", [2]),
        ("source", "one", [0, 2]),
        ("source", "two", [1, 3]),
    ]


def test_validation_split_is_the_text_that_was_prepared(trained: Trained) -> None:
    loaded = load_checkpoint(trained.dlcm)
    documents = list(validation_documents(loaded))
    listing = (trained.data / "validation" / "documents.jsonl").read_text().splitlines()
    assert len(documents) == len(listing) > 2
    for found, line in zip(documents, listing, strict=True):
        assert found.domain == found.source == json.loads(line)["domain"]
        number = int("".join(filter(str.isdigit, found.text.split("\n")[0])))
        assert found.text == TEXTS[found.domain].format(number) * 8


def test_command_over_the_validation_split(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained.dlcm), str(trained.llama), "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    report = json.loads((tmp_path / "perplexity.json").read_text())
    assert captured.err == "" and captured.out.startswith(
        "# Perplexity\n\n| text | documents | kB | dlcm: bits per byte"
    )
    assert "| less llama: bits per byte |" in captured.out and "llama: tokens per concept" not in captured.out
    rows = {(row["checkpoint"], row["kind"], row["name"]): row for row in report["rows"]}
    assert {kind for _, kind, _ in rows} == {"all", "domain", "source"}
    for name in ("dlcm", "llama"):
        of = [rows[name, "domain", domain] for domain in TEXTS if (name, "domain", domain) in rows]
        whole = rows[name, "all", "all"]
        bits = sum(row["bits_per_byte"] * row["bytes"] for row in of)
        assert whole["bits_per_byte"] == pytest.approx(bits / whole["bytes"])
        assert whole["bytes"] == sum(row["bytes"] for row in of) == whole["tokens"]  # of bytes
    assert rows["dlcm", "all", "all"]["tokens_per_concept"] > 1
    assert rows["llama", "all", "all"]["tokens_per_concept"] is None
    for row in report["differences"]:
        ours, theirs = (rows[name, row["kind"], row["name"]] for name in ("dlcm", "llama"))
        assert row["value"] == pytest.approx(ours["bits_per_byte"] - theirs["bits_per_byte"])
        assert (row["low"] is None) == (ours["documents"] == 1)


def test_numbers_are_those_of_the_logits(trained: Trained) -> None:
    """The slow twin: each document alone, all its logits, and windows by hand."""
    model = load_checkpoint(trained.dlcm).model
    text = TEXTS["en"] * 4
    ids = [BYTES.bos_token_id, *text.encode()]
    (numbers,) = score_documents(Scorer(model, BYTES), [document(text)], None, None, "model")
    nats, concepts, tokens = 0.0, 0, 0
    for start, stop, scored in ((0, 256, 256), (len(ids) - 257, len(ids) - 1, len(ids) - 257)):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids[start:stop]]))
        log_p_TV = output.logits[0].double().log_softmax(1)
        nats -= sum(float(log_p_TV[t - start, ids[t + 1]]) for t in range(stop - scored, stop))
        concepts, tokens = concepts + len(output.concept_lengths), tokens + stop - start
    assert numbers.nats == pytest.approx(nats, rel=1e-5)
    assert (numbers.scored, numbers.tokens, numbers.concepts) == (len(ids) - 1, tokens, concepts)


def test_command_over_files(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("Some notes.", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "中文", "domain": "zh"}\n', encoding="utf-8")
    files = [str(tmp_path / name) for name in ("notes.txt", "rows.jsonl")]
    window = ["--window", "8", "--stride", "4", "--dtype", "bfloat16"]
    assert main([str(trained.llama), "--text", *files, *window, "--output", str(tmp_path)]) == 0
    assert "| domain zh | 1 | 0.0 |" in capsys.readouterr().out
    report = json.loads((tmp_path / "perplexity.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["all", "zh", "notes.txt", "rows.jsonl"]
    assert [row["bytes"] for row in report["rows"]] == [17, 6, 11, 6]
    assert (report["window"], report["stride"], report["text"]) == (8, 4, files)


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_bad_requests_are_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, blank, latin = tmp_path / "empty.jsonl", tmp_path / "blank.txt", tmp_path / "latin.txt"
    empty.write_text("")
    blank.write_text(" \n")
    latin.write_bytes("café".encode("latin-1"))
    for arguments, message in (
        (["--text", empty], "empty.jsonl: holds no document"),
        (["--text", blank], "blank.txt: empty document; correct it, or leave the document out"),
        (["--text", latin], "latin.txt: not UTF-8"),
        (["--text", tmp_path / "none.txt"], "no such file"),
        (["--window", 257], "window=257 and stride=257"),
        (["--window", 8, "--stride", 9], "window=8 and stride=9"),
    ):
        code, err = run([trained.dlcm, *arguments, "--output", tmp_path], capsys)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_other_data_than_trained_on_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_checkpoint(trained.dlcm)
    loaded.run.data.path = str(prepare_labelled(tmp_path, ("en",)))
    with pytest.raises(ValueError, match=r"no longer the data that .*give --text FILE"):
        list(validation_documents(loaded))


def test_uniform_probabilities_cost_the_same_bits_everywhere() -> None:
    scorer = Scorer(bigram_model(uniform_table()), BYTES)
    found = score_documents(scorer, [document("é中 and some more")], None, None, "model")
    assert row_of("model", Group("all", "all", [0]), found)["bits_per_byte"] == pytest.approx(math.log2(258), rel=1e-9)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="holds no document"):
        read_texts([str(tmp_path)])
