"""Texts that models go on with: what is drawn is what they predict, cached or not, and in however many turns; what is
printed is whole characters, and concepts where the model sees boundaries; limits are errors that say what to change.
"""

import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from eval import generate
from eval.generate import ConceptPrinter, GrowingText, Printer, Sampling, TextStream, continue_prompt, converse, main
from eval.loading import EvaluationError, decode, load_checkpoint, visible
from eval.segmentation import BACKGROUNDS, render, segment
from tests.conftest import tiny_baseline, tiny_dlcm
from tests.eval.conftest import Trained
from train.tokenizer import byte_tokenizer, train_bpe

Model = DLCMForCausalLM | LlamaBaselineForCausalLM

BYTES = byte_tokenizer()
PROMPT = "Once"
GREEDY = Sampling(max_new_tokens=10, temperature=0)
SAMPLED = Sampling(max_new_tokens=10, temperature=1.0, top_p=0.9)
TEXT = " é 中文，字 🙂 a\nb\n\n" * 2
TOKENIZERS = {"byte": BYTES, "bpe": train_bpe([TEXT * 3], 270)}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """As on a terminal; a suite that runs in the background has interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def models(**overrides: Any) -> list[Model]:
    fields = {"vocab_size": len(BYTES), "max_position_embeddings": 64} | overrides
    return [build(**fields) for build in (tiny_dlcm, tiny_baseline)]


def growing(model: Model, text: str, sampling: Sampling = GREEDY, boundaries: bool = False) -> GrowingText:
    growing = GrowingText(model, BYTES, sampling, boundaries)
    growing.write(growing.encode(text))
    return growing


def without_cache(model: Model, ids: list[int], number: int, sampling: Sampling) -> list[int]:
    """The slow twin: all is read again for every token."""
    ids_1T = torch.tensor([ids])
    all_1T = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=number,
        use_cache=False,
        eos_token_id=BYTES.eos_token_id,
        pad_token_id=BYTES.eos_token_id,
        **sampling.options(),
    )
    drawn = all_1T[0, len(ids) :].tolist()
    return drawn[:-1] if drawn[-1] == BYTES.eos_token_id else drawn


def scripted(model: Model, script: Sequence[int]) -> Model:
    """The model, but that after n tokens the likeliest one is `script[n]`."""

    def recite(model: Any, arguments: Any, inputs: Any, output: Any) -> None:
        output.logits = torch.zeros_like(output.logits)
        output.logits[:, -1, script[inputs["past_key_values"].get_seq_length()]] = 1.0

    model.register_forward_hook(recite, with_kwargs=True)
    return model


def document(text: str) -> list[int]:
    return [BYTES.bos_token_id, *text.encode(), BYTES.eos_token_id]


def counted(model: Model) -> list[int]:
    """The tokens that the model reads from now on."""
    read: list[int] = []
    model.register_forward_hook(
        lambda model, arguments, inputs, output: read.extend(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    return read


def text_of(ids: list[int]) -> str:
    return decode(BYTES, torch.tensor(ids, dtype=torch.long))


# What is drawn


@pytest.mark.parametrize("model", models())
def test_greedy_continuation_is_the_argmax_of_every_step(model: Model) -> None:
    ids = [BYTES.bos_token_id, *PROMPT.encode()]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = BYTES.decode(ids[1 + len(PROMPT) :], skip_special_tokens=True)
    assert continue_prompt(model, BYTES, PROMPT, max_new_tokens=12, temperature=0) == expected


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("model", models())
def test_the_cache_changes_nothing(model: Model, sampling: Sampling, boundaries: bool) -> None:
    for seed in range(2):
        text = growing(model, PROMPT, sampling, boundaries)
        torch.manual_seed(seed)
        expected = without_cache(model, text.ids, 25, sampling)
        torch.manual_seed(seed)
        assert text.go_on(25) == expected


def test_a_checkpoint_that_asks_for_no_cache_changes_nothing() -> None:
    said = []
    for use_cache in (True, False):
        model = models()[0]
        model.generation_config.use_cache = use_cache
        read, text = counted(model), growing(model, PROMPT)
        text.go_on(20)
        said.append(text.ids)
        assert read == text.ids[:-1]
    assert said[0] == said[1]


@pytest.mark.parametrize("model", models())
def test_the_seed_decides(model: Model) -> None:
    said = [continue_prompt(model, BYTES, PROMPT, 20, temperature=1.0, top_p=1.0, seed=seed) for seed in (5, 5, 6)]
    assert said[0] == said[1] != said[2]


def test_a_small_top_p_is_greedy() -> None:
    model = models()[0]
    greedy = continue_prompt(model, BYTES, PROMPT, 12, temperature=0)
    assert continue_prompt(model, BYTES, PROMPT, 12, temperature=1.0, top_p=1e-6) == greedy


def test_sampling_is_not_cut_to_the_fifty_likeliest() -> None:
    model = models()[1]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all 258 tokens are equally likely
    said = continue_prompt(model, BYTES, "x", 62, temperature=1.0, top_p=1.0)
    unlikely = {token for token in BYTES(said)["input_ids"] if token >= 50}
    assert unlikely


def test_the_end_of_the_document_ends_it() -> None:
    model = models()[1]
    eos = BYTES.eos_token_id
    with torch.no_grad():
        model.decoder_norm.weight.zero_()[0] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[eos, 0], model.lm_head.weight[eos - 1, 0] = 1.0, -1.0  # <eos>, or <bos> if h is negative
    said = continue_prompt(model, BYTES, PROMPT, 12, temperature=0)
    assert said == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 60}, "5 tokens of prompt and max_new_tokens=60 .* 64 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"prompt": ""}, "empty"),
    ],
)
def test_impossible_requests(arguments: dict, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        continue_prompt(models()[0], BYTES, **{"prompt": PROMPT} | arguments)


def test_longest_possible_request() -> None:
    assert isinstance(continue_prompt(models()[0], BYTES, PROMPT, max_new_tokens=59), str)
    for boundaries in (False, True):
        text = growing(scripted(models()[0], document("x" * 70)), PROMPT, boundaries=boundaries)
        text.go_on(59)
        assert text.room == 0


# In turns


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("build", [tiny_dlcm, tiny_baseline])
def test_turns_make_one_text_of_which_nothing_is_read_twice(build: Callable[..., Model], boundaries: bool) -> None:
    model = build(vocab_size=len(BYTES), max_position_embeddings=128)
    lines, expected = [PROMPT, " there", "", " was"], [BYTES.bos_token_id]
    for line in lines:
        expected += line.encode()
        expected += without_cache(model, expected, 10, GREEDY)
    text, read = GrowingText(model, BYTES, GREEDY, boundaries), counted(model)
    for line in lines:
        if line:
            text.write(text.encode(line))
        text.go_on(10)
    assert text.ids == expected
    assert read == (expected if boundaries else expected[:-1])


@pytest.mark.parametrize("boundaries", [False, True])
def test_a_continuation_in_parts_is_the_same_draw(boundaries: bool) -> None:
    drawn = []
    for parts in ([30], [10, 1, 1, 18]):
        text = growing(models()[0], PROMPT, SAMPLED, boundaries)
        torch.manual_seed(1)
        drawn.append([token for part in parts for token in text.go_on(part)])
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 30


@pytest.mark.parametrize("boundaries", [False, True])
@pytest.mark.parametrize("model", models())
def test_a_text_that_was_cleared_is_a_new_one(model: Model, boundaries: bool) -> None:
    text = growing(model, PROMPT, boundaries=boundaries)
    said = [text.go_on(20)]
    for prompt in ("Another time", PROMPT):
        text.clear()
        text.write(text.encode(prompt))
        said.append(text.go_on(20))
    assert said[0] == said[2] != said[1]


@pytest.mark.parametrize("boundaries", [False, True])
def test_a_document_that_the_model_ended_can_be_written_on(boundaries: bool) -> None:
    script = document("Once, twice. ")
    text = growing(scripted(models()[0], script), PROMPT, boundaries=boundaries)
    assert text_of(text.go_on(40)) == ", twice. "
    assert text.ended
    with pytest.raises(EvaluationError, match="ended the document"):
        text.go_on(1)
    script[-1:] = b"Again??"
    text.write(text.encode("A"))
    assert not text.ended
    assert text_of(text.go_on(5)) == "gain?"


@pytest.mark.parametrize("boundaries", [False, True])
def test_an_interrupted_continuation_goes_on(boundaries: bool) -> None:
    whole = growing(models()[0], PROMPT, SAMPLED, boundaries)
    torch.manual_seed(0)
    whole.go_on(20)

    text, told = growing(models()[0], PROMPT, SAMPLED, boundaries), []

    def tell(ids: list[int], decided: list[bool] | None) -> None:
        told.extend(ids)
        if len(told) == (10 if boundaries else 5):
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(0)
    with generate.until_interrupted() as interrupted:
        first = text.go_on(20, tell, interrupted)
        assert interrupted()
    assert len(first) == (5 if boundaries else 6)  # Ctrl-C came when the fifth was read, or had been drawn
    assert told == (text.ids if boundaries else first)
    assert first + text.go_on(20 - len(first), tell) == whole.ids[5:]


def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with generate.until_interrupted() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert not interrupted()


def test_a_second_interrupt_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), generate.until_interrupted() as interrupted:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def conversation(text: GrowingText, lines: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str]]:
    """What is printed, and what is remarked, after each line."""
    said: list[tuple[str, str]] = []

    def recorded() -> Iterator[str]:
        for line in lines:
            yield line
            said.append(tuple(capsys.readouterr()))

    def new_printer() -> Printer:
        if isinstance(text.model, DLCMForCausalLM) and text.boundaries:
            return ConceptPrinter(BYTES, text.model.config.visibility, colour=False)
        return Printer(BYTES)

    converse(text, new_printer, recorded())
    return said


def test_what_does_not_fit_is_said_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    alphabet = "abcdefghijklmnopqrstuvwxyz" * 3
    text = GrowingText(scripted(models()[1], document(alphabet)), BYTES, Sampling(20, temperature=0))
    said = conversation(text, ["abcde", "x" * 38, "", "", "", "x", "/new", "abcdef"], capsys)
    too_long = (
        "error: 26 tokens of text and 38 of this line leave none of the model's 64 positions "
        "(max_position_embeddings); shorten the line, or start over with /new\n"
    )
    used_up = "the model's 64 positions (max_position_embeddings) are used up; start over with /new\n"
    assert said == [
        (alphabet[5:25] + "\n", ""),
        ("", too_long),
        (alphabet[25:45] + "\n", ""),
        (alphabet[45:63] + "\n", used_up),
        ("", "error: " + used_up),
        ("", too_long.replace("26", "64").replace("38", "1")),
        ("", ""),
        (alphabet[6:26] + "\n", ""),
    ]


def test_what_cannot_go_on_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = GrowingText(scripted(models()[1], document("ab")), BYTES, GREEDY)
    assert conversation(text, ["", "a", "", "/quit", "a"], capsys) == [
        ("", "error: the text is empty; write some\n"),
        ("b\n", "the model ended the document here\n"),
        ("", "error: the model ended the document here; write more of it\n"),
    ]


# What is printed


def pieces_of(name: str, ids: list[int]) -> list[str]:
    stream = TextStream(TOKENIZERS[name])
    return [*(stream.put(token) for token in ids), stream.end()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=40)
def test_pieces_are_the_text_whatever_the_tokens(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    token = st.integers(0, len(tokenizer) - 1)
    likely = st.sampled_from(tokenizer("中🙂 é")["input_ids"])  # else hardly a character would be complete
    ids = data.draw(st.lists(token | likely, max_size=30))
    assert "".join(pieces_of(name, ids)) == decode(tokenizer, torch.tensor(ids, dtype=torch.long))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("中文🙂é\n "), max_size=20))
@settings(max_examples=40)
def test_pieces_are_whole_characters_as_soon_as_they_are_complete(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = text.replace(generate.UNFINISHED, "")
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(name, ids)
    for number in range(len(ids) + 1):
        read = decode(tokenizer, torch.tensor(ids[:number], dtype=torch.long))
        assert "".join(pieces[:number]) == (read if "\ufffd" not in read else "".join(pieces[: number - 1]))
    assert "".join(pieces) == text


def test_characters_are_printed_when_they_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    printer, printed = Printer(BYTES), []

    def tell(ids: list[int], boundaries: list[bool] | None) -> None:
        printer.tell(ids, boundaries)
        printed.append(capsys.readouterr().out)

    growing(scripted(models()[1], document("aé中🙂\x1b[2J\n!")), "a").go_on(40, tell)
    assert printed == ["", "é", "", "", "中", "", "", "", "🙂", "␛", "[", "2", "J", "\n", "!", ""]


def test_a_character_is_completed_in_the_next_turn_or_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    text = GrowingText(scripted(models()[1], document("a中文b")), BYTES, Sampling(2, temperature=0))
    said = conversation(text, ["a", "", "", "", "/new", "a", "b"], capsys)
    assert [printed for printed, _ in said] == ["\n", "中\n", "文\n", "b\n", "", "\n", "\ufffd\n"]


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
@pytest.mark.parametrize("segmenter", ["learned", "rule", "fixed"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_concepts_are_those_of_the_whole_text(
    name: str, segmenter: str, visibility: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, prompt = TOKENIZERS[name], "The 中 fox"
    model = tiny_dlcm(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        segmenter=segmenter,
        visibility=visibility,
        target_ratio=1.7,
    )
    expected = segment(model, tokenizer, prompt + TEXT).pieces
    assert len(expected) > 8
    script = tokenizer(prompt + TEXT)["input_ids"]
    scripted(model, [tokenizer.bos_token_id, *script, tokenizer.eos_token_id])
    for colour in (False, True):
        text, printer = GrowingText(model, tokenizer, GREEDY, True), ConceptPrinter(tokenizer, visibility, colour)
        text.write(text.encode(prompt))
        text.go_on(90, printer.tell)
        printer.end()
        assert painted(capsys.readouterr().out) == painted(render(expected, colour))


def painted(text: str) -> list[tuple[str, str]]:
    """Each character and its colour."""
    colour, characters = "", []
    for escape, character in re.findall(r"(\x1b\[[\d;]*m)|(.)", text, re.DOTALL):
        colour = escape or colour
        characters += [(colour, character)] if character else []
    return characters


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_concepts_do_not_depend_on_turns(visibility: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_dlcm(vocab_size=len(BYTES), max_position_embeddings=128, visibility=visibility)
    whole = "It was 中 a dark 中文 night, and the rain fell in 🙂 torrents."
    expected = segment(model, BYTES, whole).pieces
    script = document(whole)
    text = GrowingText(scripted(model, script), BYTES, Sampling(7, temperature=0), boundaries=True)
    typed = whole.encode()[21:28].decode()  # what the model would have said after two turns
    lines = ["It was ", "", typed, *[""] * 8]
    printed = "".join(printed for printed, _ in conversation(text, lines, capsys))
    assert printed.replace("\n", "") == render(expected, colour=False)
    assert printed.count("\n") > 5


def test_invalid_bytes_are_cut_like_any(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_dlcm(vocab_size=len(BYTES), max_position_embeddings=64)
    text, printer = growing(model, PROMPT, SAMPLED, boundaries=True), ConceptPrinter(BYTES, "closed", colour=False)
    text.go_on(50, printer.tell)
    printer.end()
    boundaries = model(input_ids=torch.tensor([text.ids])).boundaries[0].tolist()
    starts = [0, *(index for index, boundary in enumerate(boundaries) if boundary and index > 1), len(text.ids)]
    ends = [len(text_of(text.ids[:start])) for start in starts]
    said = text_of(text.ids)
    pieces = [said[start:end] for start, end in pairwise(ends) if start < end]
    assert capsys.readouterr().out == render(pieces, colour=False)


# The command


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr()


def test_command_prints_the_continuation(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    for run_dir in (trained.dlcm, trained.llama):
        loaded = load_checkpoint(run_dir)
        capsys.readouterr()
        arguments = [run_dir, "--prompt", "It was", "--max-new-tokens", 8]
        first = run([*arguments, "--temperature", 0], capsys)[0]
        assert first == visible(continue_prompt(loaded.model, loaded.tokenizer, "It was", 8, temperature=0)) + "\n"
        assert run([*arguments, "--temperature", 0, "--seed", 3], capsys)[0] == first
        sampled = run([*arguments, "--seed", 3], capsys)[0]
        assert sampled == visible(continue_prompt(loaded.model, loaded.tokenizer, "It was", 8, seed=3)) + "\n"


def test_command_shows_concepts(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [trained.dlcm, "--prompt", "It was", "--max-new-tokens", 30]
    plain, cut = (run([*arguments, *more], capsys)[0] for more in ([], ["--boundaries"]))
    assert cut.replace("|", "").replace("⏎\n", "\n") == "It was" + plain
    assert "|" in cut
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for value, coloured in ((None, True), ("", True), ("1", False), ("0", False)):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if value is not None:
            monkeypatch.setenv("NO_COLOR", value)
        printed = run([*arguments, "--boundaries"], capsys)[0]
        assert all((background in printed) is coloured for background in BACKGROUNDS)
        assert coloured or printed == cut


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.mark.parametrize("boundaries", [False, True])
def test_command_converses(
    boundaries: bool, trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, said = load_checkpoint(trained.dlcm).model, [BYTES.bos_token_id], []
    for line in ("It was", " a night"):
        ids += line.encode()
        drawn = without_cache(model, ids, 8, GREEDY)
        ids += drawn
        said.append((line if boundaries else "") + visible(text_of(drawn)))
    capsys.readouterr()
    standard_input(monkeypatch, b" a night\n/new\nIt was\n")
    options = ["--interactive", "--prompt", "It was", "--max-new-tokens", 8, "--temperature", 0]
    printed, remarks = run([trained.dlcm, *options, *["--boundaries"] * boundaries], capsys)
    # what an answer ends with in mid-character waits for the next turn (see above), where it stands before the line
    printed, expected = (text.replace("\ufffd", "") for text in (printed, "\n".join([*said, said[0], ""])))
    assert printed.replace("|", "").replace("⏎\n", "\n") == expected
    assert remarks == ""


def test_a_terminal_gets_a_prompt(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, lines = [], iter(["It was", KeyboardInterrupt, "", EOFError])

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        line = next(lines)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    printed, remarks = run([trained.llama, "--interactive", "--max-new-tokens", 4, "--temperature", 0], capsys)
    assert prompts == ["> "] * 4
    assert remarks == f"{generate.HELP}\n\n\n"
    monkeypatch.undo()
    whole = run([trained.llama, "--prompt", "It was", "--max-new-tokens", 8, "--temperature", 0], capsys)[0]
    printed, whole = (text.replace("\n", "").replace("\ufffd", "") for text in (printed, whole))  # see above
    assert printed == whole


def test_an_interrupted_command_prints_what_there_is(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(trained.llama), "--prompt", "It was", "--temperature", "0", "--max-new-tokens"]
    put, told = Printer.tell, []

    def tell(self: Printer, ids: list[int], boundaries: list[bool] | None) -> None:
        put(self, ids, boundaries)
        if not told:
            os.kill(os.getpid(), signal.SIGINT)
        told.extend(ids)

    expected = run([*arguments, 2], capsys)[0]
    monkeypatch.setattr(Printer, "tell", tell)
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "50"])
    assert ended.value.code == 130
    assert capsys.readouterr().out == expected


def test_command_reports_errors(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    standard_input(monkeypatch, "café\n".encode("latin-1"))
    for arguments, message in (
        ([trained.dlcm, "--prompt", "It was", "--max-new-tokens", "1000"], "256 positions"),
        ([trained.dlcm, "--prompt", ""], "empty"),
        ([trained.llama, "--prompt", "It was", "--boundaries"], "forms no concepts"),
        ([tmp_path / "nowhere", "--interactive"], "no such directory"),
        ([trained.llama, "--interactive", "--top-p", "0"], "top_p=0.0"),
        ([trained.llama, "--interactive"], "standard input is not UTF-8"),
    ):
        assert main([*map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err
    with pytest.raises(SystemExit):
        main([str(trained.dlcm)])
    assert "--prompt, or --interactive" in capsys.readouterr().err
