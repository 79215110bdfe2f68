"""Shows where a DLCM cuts a text into concepts.

    python -m eval.segmentation CHECKPOINT --text "To be, or not to be"
    python -m eval.segmentation CHECKPOINT --file README.md
    cat README.md | python -m eval.segmentation CHECKPOINT

Boundaries are those of inference: thresholded, never sampled. Concepts alternate between two colours on a
terminal, and are separated by `|` elsewhere or with --plain.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM
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


@torch.no_grad()
def segment(model: DLCMForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str) -> Segmentation:
    """Cuts a text, read as the beginning of a document, where the model in eval mode sees boundaries.

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
    output = model(input_ids=document.input_ids_1T.to(model.device))
    last_M = (output.concept_lengths.cumsum(0) - 1).tolist()
    cuts = [document.end_T[last] for last in last_M]
    cuts[-1] = len(text)  # some tokenizers drop trailing white space
    pieces = [text[start:end] for start, end in zip([0, *cuts], cuts, strict=False)]
    return Segmentation([piece for piece in pieces if piece], num_tokens, len(cuts))


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
    parser.add_argument("--plain", action="store_true", help="separate concepts by '|' on a terminal, too")
    options = parser.parse_args(arguments)

    text = options.text if options.text is not None else _read(options.file)
    model, tokenizer = load_dlcm(options.checkpoint)
    segmentation = segment(model, tokenizer, text)
    print(render(segmentation.pieces, colour=sys.stdout.isatty() and not options.plain))
    print(summary(segmentation))


def _read(file: Path | None) -> str:
    content = sys.stdin.buffer.read() if file is None else file.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{file or 'standard input'} is not UTF-8 at byte {error.start}; convert it") from error


if __name__ == "__main__":
    sys.exit(main())
