"""Shows where a DLCM cuts a text into concepts.

    python -m eval.segmentation CHECKPOINT --text "To be, or not to be"
    python -m eval.segmentation CHECKPOINT --file README.md
    cat README.md | python -m eval.segmentation CHECKPOINT

Boundaries are those of inference: thresholded, never sampled. Concepts alternate between two colours on a
terminal, and are separated by `|` elsewhere or with --plain; --tokens adds a line about each token. `eval.viewer` shows
the same on a page.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from eval.loading import EvaluationError, encode_document, load_checkpoint, report_errors, visible

BACKGROUNDS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;223m")  # black on light blue, black on light orange
RESET = "\x1b[0m"
NEWLINE_MARK = "⏎"


@dataclass(frozen=True, slots=True)
class Segmentation:
    """A text cut into its concepts.

    Attributes:
        pieces: strings that concatenate to the text. A character whose bytes fall into several concepts stays whole, in
            the concept of its first byte, so there may be fewer pieces than concepts.
        num_tokens: tokens of the text, the document's opening token included.
        num_concepts: concepts they form.
    """

    pieces: list[str]
    num_tokens: int
    num_concepts: int

    @property
    def tokens_per_concept(self) -> float:
        return self.num_tokens / self.num_concepts


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as a model reads it, token by token.

    Attributes:
        tokens: strings that concatenate to the text, empty for the document's opening token. A character whose bytes
            fall into several tokens stays whole, in the first of them, and leaves the others empty.
        losses: nats that each token cost; None for the first, which nothing predicts.
        probabilities, boundaries, concepts: p_t, b_t, and the index of each token's concept; None without concepts.
    """

    tokens: list[str]
    losses: list[float | None]
    probabilities: list[float] | None = None
    boundaries: list[bool] | None = None
    concepts: list[int] | None = None


def segment(model: DLCMForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> Segmentation:
    """Cuts a text, read as the beginning of a document, where the model in eval mode sees boundaries.

    Raises:
        EvaluationError: the text is empty, or longer than the model's positions.
    """
    return cut(read(model, tokenizer, text))


@torch.no_grad()
def read(model: DLCMForCausalLM | LlamaBaselineForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> Reading:
    """What the model in eval mode makes of a text, read as the beginning of a document.

    Raises:
        EvaluationError: the text is empty, or longer than the model's positions.
    """
    document = encode_document(tokenizer, text)
    num_tokens, positions = len(document.end_T), model.config.max_position_embeddings
    if num_tokens > positions:
        raise EvaluationError(
            f"the text has {num_tokens} tokens, the model only {positions} positions (max_position_embeddings); "
            "shorten it"
        )
    input_ids_1T = document.input_ids_1T.to(model.device)
    output = model(input_ids=input_ids_1T)
    losses = F.cross_entropy(output.logits[0, :-1], input_ids_1T[0, 1:], reduction="none").tolist()
    end_T = [*document.end_T[:-1], len(text)]  # some tokenizers drop trailing white space
    tokens = [text[start:end] for start, end in zip([0, *end_T], end_T, strict=False)]
    if isinstance(model, LlamaBaselineForCausalLM):
        return Reading(tokens, [None, *losses])
    return Reading(
        tokens,
        [None, *losses],
        output.boundary_probs[0].tolist(),
        output.boundaries[0].tolist(),
        torch.arange(len(output.concept_lengths)).repeat_interleave(output.concept_lengths.cpu()).tolist(),
    )


def cut(reading: Reading) -> Segmentation:
    """The concepts of a text that a DLCM read."""
    assert reading.concepts is not None
    concepts = groupby(zip(reading.concepts, reading.tokens, strict=True), key=lambda pair: pair[0])
    pieces = ["".join(token for _, token in pairs) for _, pairs in concepts]
    return Segmentation([piece for piece in pieces if piece], len(reading.tokens), len(pieces))


def render(pieces: Sequence[str], colour: bool) -> str:
    """The pieces as one string to print: alternating background colours, or `|` between them; newlines are marked."""
    marked = [visible(piece).replace("\n", NEWLINE_MARK + "\n") for piece in pieces]
    if not colour:
        return "|".join(marked)
    return "".join(_paint(piece, BACKGROUNDS[index % 2]) for index, piece in enumerate(marked))


def _paint(text: str, background: str) -> str:
    # a background left on at the end of a line would fill the line up to the terminal's edge
    return "\n".join(f"{background}{line}{RESET}" if line else "" for line in text.split("\n"))


def summary(segmentation: Segmentation) -> str:
    return (
        f"{segmentation.num_tokens} tokens in {segmentation.num_concepts} concepts: "
        f"{segmentation.tokens_per_concept:.2f} tokens per concept"
    )


def table(reading: Reading) -> str:
    """A line a token: boundary probability, `|` at a boundary, loss in nats, the token in quotes."""
    assert reading.probabilities is not None and reading.boundaries is not None
    lines = ["boundary    nats  token"]
    for token, loss, probability, boundary in zip(
        reading.tokens, reading.losses, reading.probabilities, reading.boundaries, strict=True
    ):
        mark, cost = "|" if boundary else " ", "-" if loss is None else f"{loss:.3f}"
        lines.append(f"{probability:6.3f} {mark}{cost:>8}  {json.dumps(visible(token), ensure_ascii=False)}")
    return "\n".join(lines)


def load_dlcm(path: Path) -> tuple[DLCMForCausalLM, PreTrainedTokenizerFast]:
    """A DLCM and its tokenizer.

    Raises:
        EvaluationError: the checkpoint holds another model.
        CheckpointError: it cannot be read.
    """
    loaded = load_checkpoint(path)
    if not isinstance(loaded.model, DLCMForCausalLM):
        raise EvaluationError(f"{path} holds a {type(loaded.model).__name__}, which forms no concepts; give a DLCM")
    return loaded.model, loaded.tokenizer


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.segmentation", description="Shows where a DLCM cuts a text into concepts."
    )
    parser.add_argument("checkpoint", type=Path, help="a run directory (its newest checkpoint) or a checkpoint")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="the text itself")
    source.add_argument("--file", type=Path, help="a UTF-8 file with the text; standard input if neither is given")
    parser.add_argument("--tokens", action="store_true", help="also print each token's boundary probability and loss")
    parser.add_argument("--plain", action="store_true", help="separate concepts by '|' on a terminal, too")
    options = parser.parse_args(arguments)

    text = options.text if options.text is not None else read_text(options.file)
    model, tokenizer = load_dlcm(options.checkpoint)
    reading = read(model, tokenizer, text)
    segmentation = cut(reading)
    print(render(segmentation.pieces, colour=sys.stdout.isatty() and not options.plain))
    if options.tokens:
        print(table(reading))
    print(summary(segmentation))


def read_text(file: Path | None) -> str:
    """A UTF-8 file, or standard input.

    Raises:
        EvaluationError: it is not UTF-8.
    """
    content = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{file or 'standard input'} is not UTF-8 at byte {error.start}; convert it") from error


if __name__ == "__main__":
    sys.exit(main())
