"""How far an unfinished preparation has come, so that the same command can go on from there.

    DIR.tmp/progress.json     {"sha256": of what follows, "progress": {...}}

It is written after each complete shard, and refers to what is on disk by size and sha256: what was written afterwards
is cut off again, and the result is the one that an uninterrupted run comes to, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data import SPLITS, DataError, check_fields, check_file, check_shards, sync

PROGRESS_FILE = "progress.json"
SPLIT_FIELDS: dict[str, Any] = {
    "text_bytes": int,
    "shards": list,
    "tokens": int,
    "documents": int,
    "sha256": str,
    "index_sha256": str,
    "listing_bytes": int,
    "listing_sha256": str,
}


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the input: after `row` rows of source number `source`, with `skipped` of all rows left out until then.

    `state` is what a streamed source says of that place.
    """

    source: int = 0
    row: int = 0
    skipped: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What has been prepared of which request.

    Attributes:
        tokenizer: hash, and ids of bos and eos.
        place: where reading goes on.
        empty: documents that the tokenizer turned into nothing.
        measure: of `TextMeasure`.
        splits: of each `SplitWriter`: its complete shards, and of the one that is open how much of it counts.
    """

    request: dict[str, Any]
    tokenizer: list[Any]
    place: Place
    empty: int
    measure: dict[str, Any]
    splits: dict[str, dict[str, Any]]

    @property
    def documents(self) -> int:
        """How many are kept."""
        return sum(
            split["documents"] + sum(shard["documents"] for shard in split["shards"]) for split in self.splits.values()
        )


def write_progress(directory: Path, progress: Progress) -> None:
    """Replaces what was recorded, whole or not at all."""
    content = json.dumps(dataclasses.asdict(progress))
    partial = directory / f"{PROGRESS_FILE}.tmp"
    partial.write_text(json.dumps({"sha256": _sha256(content), "progress": content}) + "\n", encoding="utf-8")
    sync(partial)
    partial.replace(directory / PROGRESS_FILE)
    sync(directory)


def read_progress(directory: Path) -> Progress | None:
    """What was recorded; None where nothing was.

    Raises:
        DataError: it is not as `write_progress` wrote it.
    """
    path = directory / PROGRESS_FILE
    if not os.path.lexists(path):
        return None
    for found in directory.rglob("*"):
        if found.is_symlink() or not (found.is_file() or found.is_dir()):
            raise DataError(f"{found}: neither a file nor a directory; delete {directory} and prepare it anew")
    check_file(directory, path.name, None, None)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check_fields("it", record, {"sha256": str, "progress": str})
        if record["sha256"] != _sha256(record["progress"]):
            raise ValueError("edited, its sha256 no longer fits")
        progress = json.loads(record["progress"])
        _check(progress)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}; delete {directory} and prepare it anew") from error
    return Progress(**progress | {"place": Place(**progress["place"])})


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _check(progress: Any) -> None:
    """Raise ValueError, saying what is wrong, unless everything has the right form."""
    fields = {"request": dict, "tokenizer": list, "place": dict, "empty": int, "measure": dict, "splits": dict}
    _check_exactly("the progress", progress, fields)
    _check_exactly("place", progress["place"], {"source": int, "row": int, "skipped": int, "state": dict | None})
    _check_exactly("measure", progress["measure"], {"exact": bool, "text_bytes": int, "tokens": int})
    for name, split in progress["splits"].items():
        if name not in SPLITS:
            raise ValueError(f"split '{name}' is none of {', '.join(SPLITS)}")
        _check_exactly(name, split, SPLIT_FIELDS)
        check_shards(name, split["shards"])


def _check_exactly(where: str, value: Any, fields: dict[str, Any]) -> None:
    check_fields(where, value, fields)
    if value.keys() != fields.keys():
        raise ValueError(f"{where} has other keys than {', '.join(fields)}")
    for key, number in value.items():
        if isinstance(number, int) and not 0 <= number < 2**62:
            raise ValueError(f"'{key}' of {where} is {number}")
