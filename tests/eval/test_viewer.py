"""The page of concepts: the models' own numbers, texts that stay text, nothing from elsewhere, errors in one line."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.loading import EvaluationError, LoadedCheckpoint
from eval.passages import Passage
from eval.segmentation import Reading, read
from eval.viewer import TEMPLATE, averages, describe_reading, load_models, main, page, page_data
from tests.eval.conftest import TEXTS, Trained, prepare_labelled, train_tiny

CHROMIUM = shutil.which("chromium")
HOSTILE = """</script><script>document.title = "owned"</script><img src="x" onerror='document.title = "owned"'>
<!--<script>\t{{policy}} {{data}} &lt; \\u003c 中é👩‍👧 שלום \u2028 \u202e \x00\x1b[2J\r"""


class Parsed(HTMLParser):
    """A page's elements with their attributes, and what its scripts and styles say."""

    def __init__(self, content: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}  # of each script and style, by tag and type
        self._open: str | None = None
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open = f"{tag} {dict(attrs).get('type', '')}".strip()
            assert self._open not in self.inside
            self.inside[self._open] = ""

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[self._open] += data

    @property
    def data(self) -> Any:
        return json.loads(self.inside["script application/json"])

    @property
    def policy(self) -> str:
        (policy,) = [at["content"] for _, at in self.elements if at.get("http-equiv") == "Content-Security-Policy"]
        assert policy is not None
        return policy


@pytest.fixture(scope="module")
def models(trained: Trained) -> list[LoadedCheckpoint]:
    return load_models([trained.dlcm, trained.llama])


def test_numbers_are_the_models_own(models: list[LoadedCheckpoint]) -> None:
    text = "def 雲(x):\n\treturn x\n"
    data = page_data(models, [Passage("code", text)])
    assert [model["target_ratio"] for model in data["models"]] == [3.0, None]
    assert [model["checkpoint"] for model in data["models"]] == [str(loaded.path) for loaded in models]
    assert data["models"][0]["guessing"] == pytest.approx(math.log(258))
    (passage,) = data["passages"]
    assert passage["title"] == "Code"
    ids = torch.tensor([[models[0].tokenizer.bos_token_id, *text.encode()]])
    for loaded, shown in zip(models, passage["readings"], strict=True):
        with torch.no_grad():
            output = loaded.model(input_ids=ids, labels=ids)
        assert "".join(shown["tokens"]) == text
        assert shown["mean_loss"] == pytest.approx(output.ce_loss.item(), abs=1e-4)
        assert shown["bits_per_byte"] == pytest.approx(
            output.ce_loss.item() / math.log(2), abs=1e-4
        )  # bytes are tokens
        assert shown["losses"] == pytest.approx(read(loaded.model, loaded.tokenizer, text).losses, abs=1e-4)
        if shown["concepts"] is None:
            assert shown["probabilities"] is shown["boundaries"] is shown["tokens_per_concept"] is None
        else:
            assert shown["probabilities"] == pytest.approx(output.boundary_probs[0].tolist(), abs=1e-4)
            assert shown["boundaries"] == output.boundaries[0].tolist()
            assert shown["concepts"][-1] + 1 == len(output.concept_lengths)
            assert shown["tokens_per_concept"] == pytest.approx(ids.numel() / len(output.concept_lengths), abs=1e-4)


def test_averages_are_of_what_was_predicted() -> None:
    reading = Reading(["ab", "c", "雲", ""], [None, 1.0, 2.0, 3.0])
    assert averages(reading) == {
        "mean_loss": 2.0,
        "bits_per_byte": pytest.approx(6 / math.log(2) / 4),
        "tokens_per_concept": None,
    }
    alone = averages(Reading(["a"], [None], [1.0], [True], [0]))
    assert alone == {"mean_loss": None, "bits_per_byte": None, "tokens_per_concept": 1.0}


def test_hostile_texts_stay_text(models: list[LoadedCheckpoint]) -> None:
    passages = [Passage(HOSTILE, HOSTILE)]
    data = page_data(models, passages)
    parsed, innocent = Parsed(page(data)), Parsed(page(page_data(models, [Passage("en", "text")])))
    assert parsed.data == data
    assert "".join(parsed.data["passages"][0]["readings"][0]["tokens"]) == HOSTILE
    assert parsed.elements == innocent.elements


@given(text=st.text())
def test_any_text_is_one_string_of_the_data(text: str) -> None:
    parsed = Parsed(page({text: [text]}))
    assert parsed.data == {text: [text]}
    assert parsed.elements == Parsed(page({})).elements


def test_the_page_needs_nothing_and_its_policy_forbids_the_rest(models: list[LoadedCheckpoint]) -> None:
    content = page(page_data(models, [Passage("en", "text")]))
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|import\(|XMLHttp|innerHTML", content)
    parsed = Parsed(content)
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style")]
    named = [
        f"'sha256-{base64.b64encode(hashlib.sha256(parsed.inside[tag].encode()).digest()).decode()}'"
        for tag in ("style", "script")
    ]
    assert parsed.policy.split("; ") == [
        "default-src 'none'",
        f"style-src {named[0]}",
        f"script-src {named[1]}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    tags = [tag for tag, _ in parsed.elements]
    assert tags.index("meta") < tags.index("style") < tags.index("script")
    assert content.index(parsed.policy) < content.index("<style>")  # it binds what comes after it


def test_the_template_has_each_place_once() -> None:
    template = TEMPLATE.read_text(encoding="utf-8")
    for place in ("{{policy}}", "{{data}}", "<style>", "<script>"):
        assert template.count(place) == 1


def written(arguments: list[str], capsys: pytest.CaptureFixture[str], output: Path) -> Any:
    """The data of the page that the command writes."""
    assert main([*arguments, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    return Parsed(output.read_text(encoding="utf-8")).data


def test_held_out_passages_side_by_side(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written([str(trained.dlcm), str(trained.llama)], capsys, tmp_path / "new" / "page.html")
    assert [passage["title"] for passage in data["passages"]] == ["English", "Code", "Chinese"]
    for passage in data["passages"]:
        ours, theirs = passage["readings"]
        assert "".join(ours["tokens"]) == "".join(theirs["tokens"])
        assert "".join(ours["tokens"])[:8] in TEXTS[passage["domain"]]


def test_texts_files_and_passages(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dlcm, output = str(trained.dlcm), tmp_path / "page.html"
    file, passages = tmp_path / "text.py", tmp_path / "passages.jsonl"
    file.write_bytes(b"x = 1\r\n\t")
    passages.write_text('{"domain": "haiku", "text": "An old silent pond"}\n', encoding="utf-8")
    for arguments, expected in (
        (["--text", "one", "two"], [("text", "one"), ("text", "two")]),
        (["--file", str(file)], [(str(file), "x = 1\r\n\t")]),
        (["--passages", str(passages)], [("haiku", "An old silent pond")]),
    ):
        data = written([dlcm, *arguments], capsys, output)
        shown = [(passage["title"], "".join(passage["readings"][0]["tokens"])) for passage in data["passages"]]
        assert shown == expected


def test_models_of_other_data_are_said(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger = train_tiny(tmp_path, "dlcm", prepare_labelled(tmp_path, domains=("en",)))
    capsys.readouterr()
    load_models([trained.dlcm, trained.llama])
    assert capsys.readouterr().err == ""
    load_models([trained.dlcm, stranger])
    warning = capsys.readouterr().err
    assert "were trained on different data" in warning and str(stranger) in warning
    assert warning.count("\n") == 1


def test_bad_input_is_one_line_and_no_page(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, output = tmp_path / "empty.jsonl", tmp_path / "page.html"
    empty.write_bytes(b"")
    dlcm = str(trained.dlcm)
    for arguments, message in (
        ([str(trained.llama), "--text", "x"], "forms no concepts; add a DLCM"),
        ([str(tmp_path / "nowhere"), "--text", "x"], "no such directory"),
        ([dlcm, "--passages", str(empty)], "no passage to show; give --text"),
        ([dlcm, "--file", str(tmp_path / "none.txt")], "none.txt"),
        ([dlcm, "--text", "y", ""], "text: the text is empty"),
        ([dlcm, "--text", "x" * 300], "256 positions"),
    ):
        assert main([*arguments, "--output", str(output)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert message in captured.err
    assert not output.exists()


def test_numbers_that_are_not_finite_are_an_error(trained: Trained) -> None:
    (loaded,) = load_models([trained.dlcm])
    with torch.no_grad():
        loaded.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"step_0+8: gives numbers that are not finite"):
        describe_reading(loaded, Passage("en", "text"))


@pytest.mark.skipif(CHROMIUM is None, reason="drawing the page needs chromium")
def test_a_browser_draws_every_token(models: list[LoadedCheckpoint], tmp_path: Path) -> None:
    assert CHROMIUM is not None
    file = tmp_path / "page.html"
    text = HOSTILE.replace("\x00", "").replace("\x1b", "")
    file.write_text(page(page_data(models, [Passage("en", text)])), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    drawn = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", file.as_uri()], capture_output=True, timeout=60, check=True
    ).stdout.decode()
    tags = [tag for tag, _ in Parsed(drawn).elements]
    assert (tags.count("img"), tags.count("script"), tags.count("article")) == (0, 2, 1)
    assert "<title>Texts cut into concepts</title>" in drawn
    classes = [(attributes.get("class") or "").split() for _, attributes in Parsed(drawn).elements]
    assert len([names for names in classes if "token" in names]) == 2 * (len(text) + 1)
    assert any("opens" in names and "even" in names for names in classes)
