"""The validation split of a run's data, document by document: what every evaluation of its own text begins with."""

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from train.checkpoint import TrainingState
from train.config import RunConfig
from train.data import DataError, TokenShards


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Documents that a run did not train on.

    Attributes:
        shards: their tokens, bos and eos included.
        listing: the file that describes them.
        rows: what it says of each: source, domain, bytes, tokens.
        starts: where each document's tokens begin, and where the last one's end.
    """

    shards: TokenShards
    listing: Path
    rows: list[dict[str, Any]]
    starts: list[int]


def held_out(run: RunConfig, state: TrainingState, instead: str) -> HeldOut:
    """The validation split.

    Args:
        run, state: of the checkpoint that it is to be held out of.
        instead: the option that gives other text.

    Raises:
        DataError: the prepared data is gone, damaged, or no longer what the checkpoint was trained on.
    """
    shards = TokenShards(run.data.path, "validation", verify=False)
    if shards.fingerprint != state.data_fingerprint:
        raise DataError(
            f"{shards.path}: no longer the data that {run.output} was trained on, which may have included this "
            f"validation split; restore it, or give {instead} FILE"
        )
    listing = shards.path / "validation" / "documents.jsonl"
    try:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        starts = [0, *accumulate(int(row["tokens"]) for row in rows)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        starts = [0]
    if starts[-1] != shards.num_tokens:
        raise DataError(f"{listing}: does not describe the shards beside it; delete {shards.path} and prepare it anew")
    return HeldOut(shards, listing, rows, starts)
