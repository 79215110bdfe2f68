"""Continues a text with a trained model, and prints what it says as it says it.

    python -m eval.generate CHECKPOINT --prompt "Once upon a time"
    python -m eval.generate CHECKPOINT --prompt "Once upon a time" --boundaries
    python -m eval.generate CHECKPOINT --interactive

Only the continuation goes to standard output. With --boundaries, prompt and continuation do, cut into concepts as in
`eval.segmentation`: by two colours on a terminal, by `|` elsewhere or where NO_COLOR is set. Temperature 0 takes the
likeliest token at every step.

Interactively, each line is appended to the text as it stands, and the model goes on from there; an empty line lets it
go on. /new starts over, /quit or the end of input leaves, Ctrl-C stops the model.
"""

import argparse
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.config import Visibility
from eval.loading import EvaluationError, decode, encode_document, load_checkpoint, report_errors, visible
from eval.segmentation import render

UNFINISHED = "\ufffd"  # what a character is decoded to until all its bytes are there
HELP = "Each line goes on with the text, an empty one lets the model go on; /new starts over, /quit leaves."

Tell = Callable[[list[int], list[bool] | None], None]  # tokens, and which of them are boundaries


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Raises:
        EvaluationError: a value outside its range.
    """

    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise EvaluationError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise EvaluationError(f"temperature={self.temperature} must be 0 (greedy) or more, and finite")
        if not 0 < self.top_p <= 1:
            raise EvaluationError(f"top_p={self.top_p} must lie above 0 and not above 1")

    def options(self) -> dict[str, Any]:
        """The same as `GenerationConfig` says it."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


class GrowingText:
    """A text that is written by hand and by a model, which reads each token once: what it has read is in a cache.

    Attributes:
        ids: its tokens.
        ended: whether the model ended the document here. The end is no part of the text, which may be written on.
    """

    def __init__(
        self,
        model: DLCMForCausalLM | LlamaBaselineForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        sampling: Sampling,
        boundaries: bool = False,
    ):
        """An empty text.

        Args:
            model: what goes on with it.
            tokenizer: the model's.
            sampling: how.
            boundaries: tell tokens when they are read, with what was decided of them, and not when they are drawn.
        """
        self.model, self.tokenizer, self.sampling, self.boundaries = model, tokenizer, sampling, boundaries
        self.positions = model.config.max_position_embeddings
        self.ids: list[int] = []
        self.ended = False
        self._ahead: list[int] = []  # drawn, but neither read nor told: no part of the text yet
        replayed = model.device.type == "cuda"
        self._cache = model.new_cache(self.positions if replayed else 0, replayed)  # graphs do not outlive a move

    @property
    def room(self) -> int:
        """How many more tokens the model has positions for."""
        return self.positions - len(self.ids)

    def encode(self, text: str) -> list[int]:
        """The tokens of what is to be written next.

        Raises:
            EvaluationError: it is empty.
        """
        ids = encode_document(self.tokenizer, text).input_ids_1T[0].tolist()
        return ids[1:] if self.ids and self.tokenizer.bos_token_id is not None else ids

    def write(self, ids: list[int]) -> None:
        """Appends tokens, in place of any that the model would have appended."""
        self.ids += ids
        self._ahead, self.ended = [], False

    def go_on(self, most: int, tell: Tell | None = None, stop: Callable[[], bool] | None = None) -> list[int]:
        """Lets the model append tokens, until there are so many or the document ends; returns them.

        Args:
            most: at least 1, at most `room`.
            tell: gets tokens, in order: those that are drawn, as soon as they are; or with `boundaries`, all that are
                read, as soon as that is. One token more is drawn then, so that the last one is read.
            stop: asked after every token.

        Raises:
            EvaluationError: there is nothing to go on from.
        """
        start = len(self.ids)
        self.ids, self._ahead = self.ids + self._ahead, []
        if self._cache.get_seq_length() == len(self.ids):
            raise EvaluationError(
                "the model ended the document here; write more of it" if self.ids else "the text is empty; write some"
            )
        input_ids_1T = torch.tensor([self.ids], device=self.model.device)
        eos = self.tokenizer.eos_token_id
        with _told_when_read(self.model, tell) if self.boundaries and tell else contextlib.nullcontext():
            ids_1T = self.model.generate(  # type: ignore[misc]  # its annotation names a protocol that no model meets
                input_ids_1T,
                attention_mask=torch.ones_like(input_ids_1T),
                past_key_values=self._cache,
                streamer=None if self.boundaries or tell is None else _Drawn(tell),
                stopping_criteria=StoppingCriteriaList([_Stop(stop)] if stop else []),
                generation_config=GenerationConfig(
                    max_new_tokens=start + most - len(self.ids) + int(self.boundaries),
                    eos_token_id=eos,
                    pad_token_id=eos,
                    use_cache=True,  # checkpoints may say otherwise
                    **self.sampling.options(),
                ),
            )
        self.ids = ids_1T[0].tolist()
        self.ended = self.ids[-1] == eos
        if self.ended or self.boundaries:
            last = self.ids.pop()
            self._ahead = [] if self.ended else [last]
        return self.ids[start:]

    def clear(self) -> None:
        """Makes it an empty text again."""
        self._cache.reset()
        self.ids, self._ahead, self.ended = [], [], False


class _Drawn(BaseStreamer):
    """Tells each token when it is drawn."""

    def __init__(self, tell: Tell):
        self._tell = tell

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:  # before those that are drawn, `generate` puts all that were there, as (B, L)
            self._tell(value.tolist(), None)

    def end(self) -> None:
        pass


@contextlib.contextmanager
def _told_when_read(model: torch.nn.Module, tell: Tell) -> Iterator[None]:
    def told(model: torch.nn.Module, arguments: tuple, inputs: dict[str, Any], output: Any) -> None:
        tell(inputs["input_ids"][0].tolist(), output.boundaries[0].tolist())

    hook = model.register_forward_hook(told, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _Stop:
    """Ends `generate` after a token."""

    def __init__(self, stop: Callable[[], bool]):
        self._stop = stop

    def __call__(self, input_ids_BL: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full_like(input_ids_BL[:, 0], self._stop(), dtype=torch.bool)


def begin(
    model: DLCMForCausalLM | LlamaBaselineForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    sampling: Sampling,
    boundaries: bool = False,
) -> GrowingText:
    """A text that begins with a prompt, and has room for all of `max_new_tokens`.

    Raises:
        EvaluationError: an empty prompt, or more tokens than the model has positions.
    """
    text, more = GrowingText(model, tokenizer, sampling, boundaries), sampling.max_new_tokens
    text.write(text.encode(prompt))
    if text.room < more:
        raise EvaluationError(
            f"{len(text.ids)} tokens of prompt and max_new_tokens={more} need more than the model's "
            f"{text.positions} positions (max_position_embeddings); shorten one of them"
        )
    return text


def continue_prompt(
    model: DLCMForCausalLM | LlamaBaselineForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """What the model says after the prompt, which is read as the beginning of a document.

    Raises:
        EvaluationError: a value outside its range, an empty prompt, or more tokens than the model has positions.
    """
    text = begin(model, tokenizer, prompt, Sampling(max_new_tokens, temperature, top_p))
    torch.manual_seed(seed)  # generate() draws from torch's default generator
    return decode(tokenizer, torch.tensor(text.go_on(max_new_tokens), dtype=torch.long))


# Printing while the model speaks


class TextStream:
    """The text of tokens that come one by one, in pieces that concatenate to what `decode` makes of all tokens.

    A token may end inside a character. So a piece that ends in U+FFFD waits for tokens that may complete it; if none
    comes, `end` says what there is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._given = 0  # characters
        self._before: list[int] = []  # the last piece: where a token begins a text, some tokenizers drop a space
        self._waiting: list[int] = []

    @property
    def length(self) -> int:
        """Characters so far, with those that wait."""
        return self._given + len(self._text())

    def put(self, token: int) -> str:
        """What is complete with one more token."""
        self._waiting.append(token)
        text = self._text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._given += len(text)
        self._before, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        """What waits, as it stands: tokens that follow do not complete it."""
        text = self._text()
        if text:
            self._given += len(text)
            self._before, self._waiting = [], []
        return text

    def _text(self) -> str:
        known, text = (self._decode(ids) for ids in (self._before, self._before + self._waiting))
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return decode(self._tokenizer, torch.tensor(ids, dtype=torch.long))


class Printer:
    """Prints tokens as soon as their characters are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._text = TextStream(tokenizer)

    def tell(self, ids: list[int], boundaries: list[bool] | None) -> None:
        for token in ids:
            self._print(self._text.put(token))

    def end(self) -> None:
        """Prints what waits, too."""
        self._print(self._text.end())

    def _print(self, text: str) -> None:
        _say(visible(text))


class ConceptPrinter(Printer):
    """Prints tokens cut into concepts, as `eval.segmentation` does: a character stays whole, in its first concept."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, visibility: Visibility, colour: bool):
        super().__init__(tokenizer)
        self._closed, self._colour = visibility == "closed", colour
        self._printed, self._concept = 0, 0  # characters; index of the concept of the last of them
        self._cuts: deque[int] = deque()  # characters that open concepts, in what is not printed yet

    def tell(self, ids: list[int], boundaries: list[bool] | None) -> None:
        assert boundaries is not None
        for token, boundary in zip(ids, boundaries, strict=True):
            if boundary and self._closed:
                self._cuts.append(self._text.length)
            self._print(self._text.put(token))
            if boundary and not self._closed:
                self._cuts.append(self._text.length)

    def _print(self, text: str) -> None:
        while text:
            opens = False
            while self._cuts and self._cuts[0] <= self._printed:
                opens = self._cuts.popleft() > 0 or opens
            self._concept += opens
            end = self._cuts[0] - self._printed if self._cuts else len(text)
            piece, text = text[:end], text[end:]
            before = [""] * (self._concept % 2 if self._colour else opens)  # for the colour, or the separator
            _say(render([*before, piece], self._colour))
            self._printed += len(piece)


def _say(text: str) -> None:
    print(text, end="", flush=True)


def in_colour() -> bool:
    """Whether what is printed is coloured: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


@contextlib.contextmanager
def until_interrupted() -> Iterator[Callable[[], bool]]:
    """Gives what says whether Ctrl-C was pressed, so that the model may finish a token; a second one interrupts it.

    Where it is ignored, as in a script's background, it stays so.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield lambda: False
        return
    interrupted = False

    def interrupt(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def converse(text: GrowingText, new_printer: Callable[[], Printer], lines: Iterable[str]) -> None:
    """Line by line, writes the text and lets the model go on. What cannot be done is said, and changes nothing."""
    printer = new_printer()
    for line in lines:
        if line == "/quit":
            return
        if line == "/new":
            text.clear()
            printer = new_printer()
            continue
        try:
            _take_turn(text, printer, line)
        except EvaluationError as error:
            _remark(f"error: {error}")
            continue
        if text.ended:
            _remark("the model ended the document here")
        elif not text.room:
            _remark(_used_up(text))


def _take_turn(text: GrowingText, printer: Printer, line: str) -> None:
    if line:
        ids = text.encode(line)
        if len(ids) >= text.room:
            raise EvaluationError(
                f"{len(text.ids)} tokens of text and {len(ids)} of this line leave none of the model's "
                f"{text.positions} positions (max_position_embeddings); shorten the line, or start over with /new"
            )
        text.write(ids)
        printer.end()
    if not text.room:
        raise EvaluationError(_used_up(text))
    with until_interrupted() as interrupted:
        text.go_on(min(text.sampling.max_new_tokens, text.room), printer.tell, interrupted)
    print(flush=True)


def _used_up(text: GrowingText) -> str:
    return f"the model's {text.positions} positions (max_position_embeddings) are used up; start over with /new"


def _remark(remark: str) -> None:
    print(remark, file=sys.stderr, flush=True)


def typed_lines() -> Iterator[str]:
    """Lines of standard input; on a terminal with a prompt, where Ctrl-C discards the line.

    Raises:
        EvaluationError: what is not UTF-8.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # not everywhere
            import readline  # noqa: F401  # input() then knows history and arrow keys
    while True:
        try:
            line = input("> " if terminal else "")
        except KeyboardInterrupt:
            _remark("")
        except EOFError:
            if terminal:
                _remark("")
            return
        except UnicodeDecodeError as error:
            raise EvaluationError("standard input is not UTF-8; convert it") from error
        else:
            yield line


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
    loaded = load_checkpoint(options.checkpoint)
    model, tokenizer = loaded.model, loaded.tokenizer
    if options.boundaries and not isinstance(model, DLCMForCausalLM):
        raise EvaluationError(
            f"{options.checkpoint} holds a {type(model).__name__}, which forms no concepts; give a DLCM, or leave out "
            "--boundaries"
        )
    torch.manual_seed(options.seed)  # generate() draws from torch's default generator

    def new_printer() -> Printer:
        if isinstance(model, DLCMForCausalLM) and options.boundaries:
            return ConceptPrinter(tokenizer, model.config.visibility, in_colour())
        return Printer(tokenizer)

    if options.interactive:
        if sys.stdin.isatty():
            _remark(HELP)
        first = [] if options.prompt is None else [options.prompt]
        converse(GrowingText(model, tokenizer, sampling, options.boundaries), new_printer, chain(first, typed_lines()))
        return
    text, printer = begin(model, tokenizer, options.prompt, sampling, options.boundaries), new_printer()
    with until_interrupted() as interrupted:
        text.go_on(sampling.max_new_tokens, printer.tell, interrupted)
    printer.end()
    print()
    if interrupted():
        sys.exit(128 + signal.SIGINT)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.generate", description="Continues a text.")
    parser.add_argument("checkpoint", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    parser.add_argument("--prompt", help="beginning of the text; needed unless --interactive")
    parser.add_argument("--interactive", action="store_true", help="go on with lines from standard input")
    parser.add_argument("--boundaries", action="store_true", help="show the prompt, too, and the concepts of a DLCM")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of each continuation (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.prompt is None and not options.interactive:
        parser.error("give a --prompt, or --interactive")
    return options


if __name__ == "__main__":
    sys.exit(main())
