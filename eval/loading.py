"""What every evaluation script begins with: a trained model, its tokenizer, and a text as the model reads it."""

import argparse
import functools
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.codec import CodecError
from dlcm.selfcompress.packing import PackedError
from train.checkpoint import (
    ANOTHER,
    CheckpointError,
    TrainingState,
    checkpoint_directory,
    load_model,
    load_state,
)
from train.config import ConfigError, RunConfig, load_run_config
from train.data import DataError
from train.metrics import MetricsError
from train.tokenizer import TokenizerError, load_tokenizer, tokenizer_hash

# A terminal would obey control characters, which models trained on bytes do utter: they are shown as pictures.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE |= dict.fromkeys(range(128, 160), 0xFFFD)


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked; the message names the remedy."""


USER_ERRORS = (
    *(EvaluationError, CheckpointError, ConfigError, DataError, MetricsError, TokenizerError, CodecError),
    PackedError,
)


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """A checkpoint, ready to evaluate: the model is in eval mode, in fp32, on the GPU if there is one."""

    path: Path
    model: DLCMForCausalLM | LlamaBaselineForCausalLM
    tokenizer: PreTrainedTokenizerFast
    run: RunConfig
    state: TrainingState


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """The tokens of a document's beginning.

    Attributes:
        input_ids_1T: (1, T) the opening token, if the tokenizer has one, and those of the text.
        end_T: characters of the text that are covered once token t is read. A character that several tokens share is
            covered by the first of them.
    """

    input_ids_1T: Tensor
    end_T: list[int]


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Loads a checkpoint directory, or the newest good checkpoint of a run directory.

    Raises:
        CheckpointError: there is none, or the one given is damaged.
        ConfigError, TokenizerError: its configuration or tokenizer cannot be read.
    """
    directory = checkpoint_directory(path)
    run, state = load_run_config(directory / "run.yaml", resolved=True), load_state(directory)
    model, tokenizer = load_model(directory), load_tokenizer(str(directory))
    if tokenizer_hash(tokenizer) != state.tokenizer_hash or any(
        getattr(model.config, name) not in (None, getattr(tokenizer, name)) for name in ("bos_token_id", "eos_token_id")
    ):
        raise CheckpointError(f"{directory}: its tokenizer is not the one it was trained with; {ANOTHER}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedCheckpoint(directory, model.eval().to(device), tokenizer, run, state)


def encode_document(tokenizer: PreTrainedTokenizerFast, text: str) -> EncodedDocument:
    """The tokens of a text that opens a document, as `train.prepare` lays documents out.

    Raises:
        EvaluationError: the text is empty, or no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvaluationError("the text is not valid UTF-8; convert it first") from error
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,  # text that spells "<|eos|>" is text
        return_offsets_mapping=True,
    )
    ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    if not ids:
        raise EvaluationError("the text is empty; give at least one token")
    if tokenizer.bos_token_id is not None:
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    return EncodedDocument(torch.tensor([ids]), ends)


def decode(tokenizer: PreTrainedTokenizerFast, ids_T: Tensor) -> str:
    """The text that tokens stand for, without special tokens."""
    text = tokenizer.decode(ids_T, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def visible(text: str) -> str:
    """The text with control characters, other than newline and tab, replaced by one visible character each."""
    return text.translate(_VISIBLE)


def positive(text: str) -> int:
    """A number of things, on the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, *paths: str
) -> argparse.ArgumentParser:
    """Adds to a command's subparsers one that takes these paths, and is carried out by `options.run(options)`."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    made.set_defaults(run=run)
    for path in paths:
        made.add_argument(path, type=Path)
    return made


def report_errors(main: Callable[[Sequence[str] | None], None]) -> Callable[..., int]:
    """Makes a command's `main` return its exit code: 2, after one `error:` line on stderr, for what a user can mend."""

    @functools.wraps(main)
    def reporting(arguments: Sequence[str] | None = None) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # not every terminal can show every script
        transformers.logging.disable_progress_bar()  # of loading one file
        try:
            main(arguments)
        except (*USER_ERRORS, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0

    return reporting
