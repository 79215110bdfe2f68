"""The validation splits of a run's data, document by document: what every evaluation of its own text begins with."""

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from train.checkpoint import TrainingState
from train.config import RunConfig
from train.data import DataError, Mixture, TokenShards


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Documents of one source that a run did not train on.

    Attributes:
        share: the part of what the run reads that comes from this source; 1 where it is the only one.
        shards: their tokens, bos and eos included.
        listing: the file that describes them.
        rows: what it says of each: source, domain, bytes, tokens.
        starts: where each document's tokens begin, and where the last one's end.
    """

    share: float
    shards: TokenShards
    listing: Path
    rows: list[dict[str, Any]]
    starts: list[int]

    def most(self, tokens: int | None) -> int:
        """How many of its tokens belong to so many of all sources; None stands for all of them."""
        there = self.shards.num_tokens
        return there if tokens is None else min(there, max(0, round(self.share * tokens)))


def held_out(run: RunConfig, state: TrainingState, instead: str) -> list[HeldOut]:
    """The validation split of every source.

    Args:
        run, state: of the checkpoint that it is to be held out of.
        instead: the option that gives other text.

    Raises:
        DataError: the prepared data is gone, damaged, or no longer what the checkpoint was trained on.
    """
    mixture = Mixture.open(run.data.sources(), "validation", verify=False)
    if mixture.fingerprint != state.data_fingerprint:
        raise DataError(
            f"{', '.join(str(one.path) for one in mixture.shards)}: no longer the data that {run.output} was trained "
            f"on, which may have included this validation split; restore it, or give {instead} FILE"
        )
    return [_described(share, shards) for share, shards in zip(mixture.shares, mixture.shards, strict=True)]


def _described(share: float, shards: TokenShards) -> HeldOut:
    listing = shards.path / "validation" / "documents.jsonl"
    try:
        rows = [json.loads(line) for line in listing.read_text(encoding="utf-8").splitlines()]
        starts = [0, *accumulate(int(row["tokens"]) for row in rows)]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        starts = [0]
    if starts[-1] != shards.num_tokens:
        raise DataError(f"{listing}: does not describe the shards beside it; delete {shards.path} and prepare it anew")
    return HeldOut(share, shards, listing, rows, starts)
