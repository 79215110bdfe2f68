"""Texts read token by token and cut into concepts: the model's numbers, no character lost, errors in one line."""

import io
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM
from eval.loading import EvaluationError
from eval.segmentation import BACKGROUNDS, RESET, Reading, cut, main, read, render, segment, table
from tests.conftest import tiny_baseline, tiny_dlcm
from tests.eval.conftest import Trained
from train.tokenizer import byte_tokenizer, train_bpe

BYTES = byte_tokenizer()
TEXT = "a b c d e f g h 中文，字 " * 20
TOKENIZERS = {"byte": BYTES, "bpe": train_bpe([TEXT], 270)}


def model_for(tokenizer: PreTrainedTokenizerFast, **overrides: object) -> DLCMForCausalLM:
    return tiny_dlcm(vocab_size=len(tokenizer), max_position_embeddings=128, **overrides)


def cut_one_by_one(model: DLCMForCausalLM, text: str) -> list[str]:
    """The slow twin, for ASCII text in bytes: walks over the boundaries and opens a piece where the rule says so."""
    ids = [BYTES.bos_token_id, *text.encode()]
    with torch.no_grad():
        boundaries = model(input_ids=torch.tensor([ids])).boundaries[0].tolist()
    pieces = [""]
    for index, byte in enumerate(ids):
        if model.config.visibility == "closed" and boundaries[index] and index > 0:
            pieces.append("")
        pieces[-1] += "" if index == 0 else chr(byte)
        if model.config.visibility == "inclusive" and boundaries[index]:
            pieces.append("")
    return [piece for piece in pieces if piece]


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
def test_cuts_where_the_boundaries_are(segmenter: str, visibility: str) -> None:
    model = model_for(BYTES, segmenter=segmenter, visibility=visibility)
    text = "The quick brown fox\njumps over the lazy dog."
    found = segment(model, BYTES, text)
    assert found.pieces == cut_one_by_one(model, text)
    assert 1 < found.num_concepts < found.num_tokens == len(text) + 1


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(min_size=1, max_size=30), ratio=st.sampled_from([1.0, 1.7, 4.0]))
@settings(max_examples=30)
def test_no_character_is_lost(name: str, text: str, ratio: float) -> None:
    tokenizer = TOKENIZERS[name]
    found = segment(model_for(tokenizer, segmenter="fixed", target_ratio=ratio), tokenizer, text)
    assert "".join(found.pieces) == text
    assert all(found.pieces)
    assert len(found.pieces) <= found.num_concepts


def test_a_character_of_several_bytes_stays_with_its_first() -> None:
    every_token = model_for(BYTES, segmenter="fixed", target_ratio=1.0)
    found = segment(every_token, BYTES, "a中é")
    assert found.pieces == ["a", "中", "é"]
    assert (found.num_tokens, found.num_concepts) == (7, 7)  # the document's opening token, then 1 + 3 + 2 bytes
    found = segment(model_for(BYTES, segmenter="fixed", target_ratio=3.0), BYTES, "a中é")
    assert found.pieces == ["a中", "é"]  # <bos> a E4 | B8 AD C3 | A9
    assert found.tokens_per_concept == pytest.approx(7 / 3)


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_numbers_are_the_models_own(visibility: str) -> None:
    model, text = model_for(BYTES, visibility=visibility), "The quick brown fox"
    ids = torch.tensor([[BYTES.bos_token_id, *text.encode()]])
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    reading = read(model, BYTES, text)
    assert reading.tokens == ["", *text]
    assert reading.losses[0] is None
    chance_TV = output.logits[0].softmax(-1)
    for token, loss in enumerate(reading.losses[1:], 1):
        assert loss == pytest.approx(-chance_TV[token - 1, ids[0, token]].log().item(), abs=1e-5)
    assert sum(reading.losses[1:]) / len(text) == pytest.approx(output.ce_loss.item(), abs=1e-5)
    assert reading.probabilities == output.boundary_probs[0].tolist()
    assert reading.boundaries == output.boundaries[0].tolist()
    assert [reading.concepts.count(concept) for concept in range(max(reading.concepts) + 1)] == (
        output.concept_lengths.tolist()
    )


def test_a_baseline_reads_without_concepts() -> None:
    reading = read(tiny_baseline(vocab_size=len(BYTES), max_position_embeddings=128), BYTES, "a中")
    assert reading.tokens == ["", "a", "中", "", ""]
    assert len(reading.losses) == 5
    assert reading.probabilities is reading.boundaries is reading.concepts is None


def test_one_token_costs_nothing() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert read(model_for(tokenizer), tokenizer, "a").losses == [None]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(min_size=1, max_size=30))
@settings(max_examples=30)
def test_tokens_concatenate_to_the_text(name: str, text: str) -> None:
    reading = read(model_for(TOKENIZERS[name]), TOKENIZERS[name], text)
    assert "".join(reading.tokens) == text
    assert "".join(cut(reading).pieces) == text


def test_text_that_spells_a_special_token_is_text() -> None:
    found = segment(model_for(BYTES, segmenter="fixed"), BYTES, "<|eos|>")
    assert (found.num_tokens, "".join(found.pieces)) == (8, "<|eos|>")


def test_white_space_that_the_tokenizer_drops_is_kept() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    assert (
        "".join(segment(model_for(tokenizer, segmenter="fixed"), tokenizer, "  some words \n").pieces)
        == "  some words \n"
    )


@pytest.mark.parametrize(
    ("text", "message"), [("", "empty"), ("\udce9", "not valid UTF-8"), ("x" * 128, "129 tokens.*128 positions")]
)
def test_impossible_texts(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        segment(model_for(BYTES), BYTES, text)


def test_rendering() -> None:
    pieces = ["one", " two\n", "\n", "\x1b[2J"]
    assert render(pieces, colour=False) == "one| two⏎\n|⏎\n|␛[2J"
    first, second = BACKGROUNDS
    assert render(["a", "b\nc"], colour=True) == f"{first}a{RESET}{second}b⏎{RESET}\n{second}c{RESET}"


def test_table() -> None:
    reading = Reading(["", "a\n", '"'], [None, 1.5, 12.25], [1.0, 0.25, 0.5], [True, False, True], [0, 0, 1])
    assert table(reading).splitlines() == [
        "boundary    nats  token",
        ' 1.000 |       -  ""',
        ' 0.250     1.500  "a\\n"',
        ' 0.500 |  12.250  "\\""',
    ]


def test_command_reads_text_file_and_standard_input(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "雲 clouds\n"
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    outputs = []
    for source in (["--text", text], ["--file", str(file)], []):
        assert main([str(trained.dlcm), *source]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].split("\n", 1)[0].replace("|", "") == "雲 clouds⏎"
    assert "tokens per concept" in outputs[0].splitlines()[-1]


def test_colours_on_a_terminal_unless_plain(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([str(trained.dlcm), "--text", "some text"]) == 0
    assert BACKGROUNDS[0] in capsys.readouterr().out
    assert main([str(trained.dlcm), "--text", "some text", "--plain"]) == 0
    assert BACKGROUNDS[0] not in capsys.readouterr().out


def test_tokens_are_told_between_text_and_summary(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained.dlcm), "--text", "雲 x", "--tokens"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].replace("|", "") == "雲 x"
    assert [line.split()[-1] for line in lines[2:-1]] == ['""', '"雲"', '""', '""', '"', '"x"']
    assert "tokens per concept" in lines[-1]


def test_bad_input_is_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    for arguments, message in (
        ([str(trained.llama), "--text", "x"], "forms no concepts"),
        ([str(tmp_path / "nowhere"), "--text", "x"], "no such directory"),
        ([str(trained.dlcm), "--file", str(latin)], "latin.txt is not UTF-8 at byte 3"),
        ([str(trained.dlcm), "--file", str(tmp_path / "none.txt")], "none.txt"),
        ([str(trained.dlcm), "--text", "x" * 300], "256 positions"),
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err
