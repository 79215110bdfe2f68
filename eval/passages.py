"""Short texts to look at: from the validation split of a run's data, or from a file."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from eval.held_out import HeldOut, held_out
from eval.loading import EvaluationError, LoadedCheckpoint, decode, encode_document

DOMAINS = {"en": "English", "code": "code", "zh": "Chinese"}  # label in the data, name in words
CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Passage:
    """A text and the domain it comes from."""

    domain: str
    text: str


def held_out_passages(loaded: LoadedCheckpoint, domains: Mapping[str, str] = DOMAINS) -> list[Passage]:
    """The beginning of the first validation document of each domain; says on stderr where there is none.

    Raises:
        DataError: the prepared data is gone, damaged, or no longer what the checkpoint was trained on.
    """
    sources = held_out(loaded.run, loaded.state, "--passages")
    first_of: dict[str | None, tuple[HeldOut, int]] = {}
    for source in sources:
        for index, row in enumerate(source.rows):
            first_of.setdefault(row["domain"], (source, index))
    passages = []
    for domain, name in domains.items():
        if domain not in first_of:
            paths = ", ".join(str(source.shards.path) for source in sources)
            print(f"warning: {paths}: no {name} document in the validation split", file=sys.stderr)
            continue
        source, index = first_of[domain]
        ids_T, _ = source.shards.window(source.starts[index], source.rows[index]["tokens"])
        text = decode(loaded.tokenizer, torch.from_numpy(ids_T))
        positions = loaded.model.config.max_position_embeddings
        passages.append(Passage(domain, excerpt(text, loaded.tokenizer, positions)))
    return passages


def excerpt(text: str, tokenizer: PreTrainedTokenizerFast, positions: int) -> str:
    """The beginning of a text: at most `CHARACTERS`, in whole words if it has any, and at most `positions` tokens."""
    if len(text) > CHARACTERS:
        space = max(text.rfind(" ", 0, CHARACTERS), text.rfind("\n", 0, CHARACTERS))
        text = text[: space if space > CHARACTERS // 2 else CHARACTERS]
    ends = encode_document(tokenizer, text).end_T
    return text if len(ends) <= positions else text[: ends[positions - 1]]


def read_passages(file: Path) -> list[Passage]:
    """Passages from JSON lines, `{"domain": ..., "text": ...}`.

    Raises:
        EvaluationError: a line is something else; names it.
    """
    passages = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            values = json.loads(line)
            passages.append(Passage(str(values["domain"]), str(values["text"])))
        except (ValueError, TypeError, KeyError) as error:
            raise EvaluationError(
                f'{file}, line {number}: must be JSON in UTF-8 of the form {{"domain": ..., "text": ...}}'
            ) from error
    return passages
