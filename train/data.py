"""Memory-mapped token shards, and the packed batches read from them.

A batch is a pure function of (seed, step, rank, micro-batch): nothing has to be saved or fast-forwarded for a
resumed run to continue with exactly the batches the uninterrupted run would have seen. That holds for a mixture of
several prepared directories as well (`Mixture`).

Names: T tokens, D documents, V vocabulary. On disk (written by `train.prepare`):

    manifest.json                  what is here, with a sha256 of every file that matters
    tokenizer.json, ...            the tokenizer
    token_bytes.npy                (V,) float32, bytes of text that each id stands for
    SPLIT/00000.bin                token ids, little-endian uint16 or uint32, documents end to end
    SPLIT/00000.idx                uint64 offset of each document's first token within the shard
    SPLIT/documents.jsonl          source, domain, bytes and tokens of each document
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from train.mixture import MixtureOrder
from train.tokenizer import tokenizer_hash

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
INDEX_DTYPE = np.dtype("<u8")
TOKEN_BYTES_FILE = "token_bytes.npy"

# What readers rely on; a manifest says more, for people to read.
MANIFEST_FIELDS: dict[str, Any] = {
    "dtype": str,
    "tokenizer": dict,
    "token_bytes": str,
    "token_bytes_sha256": str,
    "splits": dict,
    "arguments": dict,
    "fingerprint": str,
}
TOKENIZER_FIELDS: dict[str, Any] = {
    "hash": str,
    "vocab_size": int,
    "bos_token_id": int | None,
    "eos_token_id": int | None,
}
SHARD_FIELDS: dict[str, Any] = {
    "file": str,
    "index_file": str,
    "tokens": int,
    "documents": int,
    "sha256": str,
    "index_sha256": str,
}


class DataError(ValueError):
    """Data that cannot be prepared or read; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One packed row of T tokens that holds D documents.

    `cu_seqlens` (D+1,) int32 stays on the CPU: document d is tokens cu_seqlens[d]:cu_seqlens[d+1], the longest
    has `max_seqlen` tokens. The first token of a document is never a target, so `num_targets` = T - D;
    `target_bytes` is the text that those targets stand for, in bytes.
    """

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, equal to input_ids: the model shifts inside each document
    cu_seqlens: Tensor
    max_seqlen: int
    num_targets: int
    target_bytes: float

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tokens on `device`. Copies to a GPU, from pinned memory, are not waited for."""
        host = (self.input_ids, self.labels, self.cu_seqlens)
        ids_T, labels_T, cu_seqlens = (x.pin_memory() for x in host) if torch.device(device).type == "cuda" else host
        return replace(
            self,
            input_ids=ids_T.to(device, non_blocking=True),
            labels=labels_T.to(device, non_blocking=True),
            cu_seqlens=cu_seqlens,
        )


class TokenShards:
    """One split of prepared data: all its documents end to end, across shard borders, as one stream of tokens.

    Opening checks the manifest and the size of every file and, with `verify`, every sha256 (reads all the data
    once). Raises DataError naming the file that is missing, truncated or edited.
    """

    def __init__(self, path: str | Path, split: str, verify: bool = True) -> None:
        self.path = Path(path)
        self.split = split
        self.manifest = read_manifest(self.path)
        if split not in self.manifest["splits"]:
            present = ", ".join(self.manifest["splits"])
            raise DataError(f"{self.path}: no split '{split}' (there is {present}); prepare it anew with one")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.tokenizer_hash: str = self.manifest["tokenizer"]["hash"]
        self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]

        dtype = TOKEN_DTYPES[self.manifest["dtype"]]
        check_file(self.path, TOKEN_BYTES_FILE, None, self.manifest["token_bytes_sha256"])
        self.token_bytes_V = _read_token_bytes(self.path, self.vocab_size)

        self._tokens: list[np.ndarray] = []
        self._starts: list[np.ndarray] = []
        for shard in self.manifest["splits"][split]["shards"]:
            size, index_size = shard["tokens"] * dtype.itemsize, shard["documents"] * INDEX_DTYPE.itemsize
            check_file(self.path, shard["file"], size, shard["sha256"] if verify else None)
            check_file(self.path, shard["index_file"], index_size, shard["index_sha256"] if verify else None)
            self._tokens.append(np.memmap(self.path / shard["file"], dtype, mode="r"))
            self._starts.append(np.memmap(self.path / shard["index_file"], INDEX_DTYPE, mode="r"))
            if self._starts[-1][-1] >= shard["tokens"]:
                raise self._useless(len(self._starts) - 1, 1, "documents start beyond the tokens")
        # _borders[i] is where shard i begins in the stream; the last entry is the end.
        self._borders = np.cumsum([0] + [len(tokens) for tokens in self._tokens])
        self.num_tokens = int(self._borders[-1])

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise DataError unless these shards were written with `tokenizer`."""
        other = tokenizer_hash(tokenizer)
        if other != self.tokenizer_hash:
            raise DataError(
                f"{self.path}: the shards were written with tokenizer {self.tokenizer_hash[:12]}, not {other[:12]}; "
                f"prepare the data with this tokenizer, or load the one in {self.path}"
            )
        for name in ("bos_token_id", "eos_token_id"):
            written, here = self.manifest["tokenizer"][name], getattr(tokenizer, name)
            if written != here:
                raise DataError(
                    f"{self.path}: the shards were written with {name} {written}, but the tokenizer's is {here}; "
                    f"restore tokenizer_config.json, or prepare the data anew"
                )

    def window(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start:start+length of the stream.

        Returns their ids (length,) int64 and the positions inside the window where a document starts, (d,)
        int64 ascending, 0 among them only when one starts exactly there. Raises ValueError out of bounds.
        """
        stop = start + length
        if not 0 <= start < stop <= self.num_tokens:
            raise ValueError(f"window {start}:{stop} is not within the {self.num_tokens} tokens of '{self.split}'")
        ids_T = np.empty(length, dtype=np.int64)
        document_starts: list[np.ndarray] = []
        first = int(np.searchsorted(self._borders, start, side="right")) - 1
        last = int(np.searchsorted(self._borders, stop, side="left"))
        for shard in range(first, last):
            border = int(self._borders[shard])
            begin, end = max(start - border, 0), min(stop - border, len(self._tokens[shard]))
            to_window = border - start
            ids_T[begin + to_window : end + to_window] = self._tokens[shard][begin:end]
            starts = self._starts[shard]
            low, high = np.searchsorted(starts, np.array([begin, end], dtype=INDEX_DTYPE))
            inside = starts[low:high]
            if np.any(inside < begin) or np.any(inside >= end) or np.any(inside[1:] <= inside[:-1]):
                raise self._useless(shard, 1, "the starts of documents do not ascend")
            document_starts.append(inside.astype(np.int64) + to_window)
            if ids_T[begin + to_window : end + to_window].max() >= self.vocab_size:
                raise self._useless(shard, 0, f"holds ids beyond the vocabulary of {self.vocab_size}")
        return ids_T, np.concatenate(document_starts)

    def text_bytes(self, ids: np.ndarray) -> float:
        """Bytes of text that these tokens stand for."""
        return float(self.token_bytes_V[ids].sum())

    def _useless(self, shard: int, file: int, problem: str) -> DataError:
        """What no checksum shows: whoever wrote the file wrote its checksum too."""
        return DataError(
            f"{self.path / shard_files(self.split, shard)[file]}: {problem}; delete {self.path} and prepare it anew"
        )


class Mixture:
    """The same split of several prepared directories, or of one, and the order in which windows come from them.

    Attributes:
        names, shards: of the sources, in the order in which they were given, which counts.
        shares: the part of all tokens that is read from each; they add up to 1.
        fingerprint: of all that decides the batches; of a single source, that source's own.

    Raises:
        DataError: sources were prepared with different tokenizers, or weights have too many digits.
    """

    def __init__(self, shards: Mapping[str, TokenShards], weights: Mapping[str, float]) -> None:
        self.names, self.shards = list(shards), list(shards.values())
        try:
            self.order = MixtureOrder([weights[name] for name in shards])
        except ValueError as error:
            raise DataError(f"data.mixture: {error}") from error
        self.shares = self.order.shares
        first = self.shards[0]
        for name, other in shards.items():
            if other.tokenizer_hash != first.tokenizer_hash:
                raise DataError(
                    f"{other.path}: '{name}' was prepared with tokenizer {other.tokenizer_hash[:12]}, but "
                    f"'{self.names[0]}', {first.path}, with {first.tokenizer_hash[:12]}; prepare both with the same, "
                    f"say --tokenizer {first.path}"
                )
        self.tokenizer_hash = first.tokenizer_hash
        self.vocab_size = max(one.vocab_size for one in self.shards)
        self.path = first.path  # where its tokenizer is
        self.num_tokens = sum(one.num_tokens for one in self.shards)
        self.fingerprint = first.fingerprint if len(self.shards) == 1 else self._fingerprint()

    @classmethod
    def open(cls, sources: Mapping[str, tuple[str, float]], split: str, verify: bool = True) -> Mixture:
        """`sources` are paths and weights by name (`DataConfig.sources`). Raises DataError as `TokenShards` does."""
        shards = {name: TokenShards(path, split, verify) for name, (path, _) in sources.items()}
        return cls(shards, {name: weight for name, (_, weight) in sources.items()})

    @classmethod
    def of(cls, text: TokenShards | Mixture) -> Mixture:
        """A mixture as it is, or one of a single source."""
        return text if isinstance(text, Mixture) else cls({"": text}, {"": 1.0})

    @property
    def bytes_are_exact(self) -> bool:
        """Whether every source knows how many bytes of text each token stands for."""
        return all(one.manifest["token_bytes"] == "exact" for one in self.shards)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise DataError unless all shards were written with `tokenizer`."""
        for one in self.shards:
            one.check_tokenizer(tokenizer)

    def _fingerprint(self) -> str:
        content = [[one.fingerprint, count] for one, count in zip(self.shards, self.order.counts, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class PackedLoader:
    """Shuffled training batches of one rank, from one split or a mixture of several.

    Each source is cut into windows of `sequence_length` tokens (a shorter rest is left out), and each of its epochs
    visits every window once, in an order drawn from (seed, epoch, source). Windows of a run come from the sources as
    `MixtureOrder` says. Step s takes the next `world_size * accumulation * rows` of them, running on into a source's
    next epoch where one ends; which windows these are depends on that product alone, so ranks and accumulation may be
    traded against each other.

    Raises DataError when a split is smaller than one window, ValueError for impossible arguments.
    """

    def __init__(
        self,
        text: TokenShards | Mixture,
        sequence_length: int,
        rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        _check_window_arguments(sequence_length, rows)
        if world_size < 1 or accumulation < 1:
            raise ValueError(f"world_size={world_size} and accumulation={accumulation} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not within world_size={world_size}")
        if seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.mixture = Mixture.of(text)
        for shards in self.mixture.shards:
            if shards.num_tokens < sequence_length:
                raise DataError(
                    f"{shards.path}: '{shards.split}' has {shards.num_tokens} tokens, fewer than one sequence of "
                    f"{sequence_length}; prepare more text or shorten sequence_length"
                )
        self.sequence_length = sequence_length
        self.rows = rows
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.accumulation = accumulation
        self.windows_per_epoch = [shards.num_tokens // sequence_length for shards in self.mixture.shards]
        self.windows_per_step = world_size * accumulation * rows
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # of each source's current epoch; a cache, not state

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a whole step, over all ranks and micro-batches."""
        return self.windows_per_step * self.sequence_length

    def epochs(self, steps: int) -> list[float]:
        """How often each source has been read after so many steps."""
        taken = self.mixture.order.taken(steps * self.windows_per_step)
        return [windows / all_of_it for windows, all_of_it in zip(taken, self.windows_per_epoch, strict=True)]

    def batch(self, step: int, micro: int = 0) -> PackedBatch:
        """Micro-batch `micro` of `step` for this rank: T = rows * sequence_length tokens in one packed row."""
        if step < 0 or not 0 <= micro < self.accumulation:
            raise ValueError(f"step={step}, micro={micro}: no such micro-batch (accumulation={self.accumulation})")
        place = step * self.windows_per_step + (micro * self.world_size + self.rank) * self.rows
        places = [self._window(place + row) for row in range(self.rows)]
        length = self.sequence_length
        return _pack([(self.mixture.shards[source], window * length, length) for source, window in places])

    def _window(self, place: int) -> tuple[int, int]:
        """Source and number of the window at `place` in the endless sequence of them."""
        source, number = self.mixture.order.place(place)
        epoch, position = divmod(number, self.windows_per_epoch[source])
        if source not in self._orders or self._orders[source][0] != epoch:
            self._orders[source] = epoch, self._order(source, epoch)
        return source, int(self._orders[source][1][position])

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The windows of a source in the order in which an epoch visits them; 4 bytes each, while that holds them."""
        count = self.windows_per_epoch[source]
        order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
        # A trailing 0 changes nothing: the first source is shuffled as it would be alone.
        np.random.default_rng([self.seed, epoch, source]).shuffle(order)
        return order


def validation_batches(
    shards: TokenShards, sequence_length: int, rows: int, max_tokens: int | None
) -> Iterator[PackedBatch]:
    """The split from its beginning, in order, every token once, up to `max_tokens` (None: all of it).

    Batches hold `rows` windows of `sequence_length` tokens; the last window and the last batch may be shorter.
    Raises DataError when no token at all has one before it to be predicted from.
    """
    _check_window_arguments(sequence_length, rows)
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens} leaves nothing to predict")
    total = shards.num_tokens if max_tokens is None else min(max_tokens, shards.num_tokens)
    empty = True
    for batch_start in range(0, total, rows * sequence_length):
        batch_stop = min(batch_start + rows * sequence_length, total)
        starts = range(batch_start, batch_stop, sequence_length)
        batch = _pack([(shards, start, min(sequence_length, batch_stop - start)) for start in starts])
        if batch.num_targets > 0:  # a lone last token opens its window, and nothing predicts it
            empty = False
            yield batch
    if empty:
        raise DataError(f"{shards.path}: '{shards.split}' has no token to predict; prepare more text")


def shard_files(split: str, number: int) -> tuple[str, str]:
    """Names, below the directory, of the ids and of the index of one shard."""
    return f"{split}/{number:05d}.bin", f"{split}/{number:05d}.idx"


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 over what decides the batches: shards and their order, tokenizer, dtype and bytes per token."""
    shards = {
        name: [[shard[key] for key in SHARD_FIELDS] for shard in split["shards"]]
        for name, split in manifest["splits"].items()
    }
    tokenizer = [manifest["tokenizer"][key] for key in TOKENIZER_FIELDS]
    content = [manifest["dtype"], tokenizer, manifest["token_bytes_sha256"], shards]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_file(directory: Path, name: str, size: int | None, sha256: str | None) -> None:
    """Raise DataError unless the file is there, has `size` bytes and hashes to `sha256` (None: not checked)."""
    path = directory / name
    if not path.is_file():
        raise DataError(f"{path}: missing; delete {directory} and prepare it anew")
    if not path.resolve().is_relative_to(directory.resolve()):
        raise DataError(f"{path}: leads out of {directory}; copy the file here, or link the whole directory")
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise DataError(
            f"{path}: {actual} bytes where the manifest says {size}, so it was truncated or replaced; "
            f"delete {directory} and prepare it anew"
        )
    if sha256 is not None and file_sha256(path) != sha256:
        raise DataError(
            f"{path}: its sha256 is not the manifest's, so it was edited or damaged; "
            f"delete {directory} and prepare it anew"
        )


def _read_token_bytes(directory: Path, vocab_size: int) -> np.ndarray:
    """(V,) float64. The header is believed only as far as there are bytes in the file."""
    path = directory / TOKEN_BYTES_FILE
    try:
        token_bytes_V = np.lib.format.open_memmap(path, mode="r")
        if token_bytes_V.shape != (vocab_size,) or token_bytes_V.dtype != np.dtype("<f4"):
            raise ValueError(f"{token_bytes_V.dtype} of shape {token_bytes_V.shape}, not float32 of ({vocab_size},)")
        if not (np.all(np.isfinite(token_bytes_V) & (token_bytes_V >= 0)) and np.any(token_bytes_V)):
            raise ValueError("a length is negative or not finite, or all are 0")
    except Exception as error:  # numpy reads the header by Python's own parser, which raises as it likes
        raise DataError(f"{path}: not lengths in bytes ({error}); delete {directory} and prepare it anew") from error
    return token_bytes_V.astype(np.float64)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of prepared data; DataError when there is none, or it is not as `train.prepare` wrote it."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise DataError(f"{directory}: no prepared data here; run python -m train.prepare ... --output {directory}")
    check_file(directory, path.name, None, None)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); delete {directory} and prepare it anew") from error
    try:
        _check_manifest(manifest)
    except ValueError as error:
        raise DataError(f"{path}: {error}; delete {directory} and prepare it anew") from error
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Raise ValueError, saying what is wrong, unless readers can rely on everything the manifest says."""
    check_fields("the manifest", manifest, {})
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format version {version}, this code reads {FORMAT_VERSION}")
    check_fields("the manifest", manifest, MANIFEST_FIELDS)
    check_fields("tokenizer", manifest["tokenizer"], TOKENIZER_FIELDS)
    if manifest["dtype"] not in TOKEN_DTYPES:
        raise ValueError(f"dtype '{manifest['dtype']}' is none of {', '.join(TOKEN_DTYPES)}")
    for name, split in manifest["splits"].items():
        if name not in SPLITS:
            raise ValueError(f"split '{name}' is none of {', '.join(SPLITS)}")
        check_fields(name, split, {"shards": list})
        if not split["shards"]:
            raise ValueError(f"split '{name}' has no shards")
        check_shards(name, split["shards"])
    if manifest["fingerprint"] != fingerprint(manifest):
        raise ValueError("edited, its fingerprint no longer fits")


def check_shards(split: str, shards: list[Any]) -> None:
    """Raise ValueError unless these are a list of shards of this split, as a manifest has it."""
    for number, shard in enumerate(shards):
        where = f"shard {number} of {split}"
        check_fields(where, shard, SHARD_FIELDS)
        # Nothing else is opened, so no manifest can point outside its directory.
        if (shard["file"], shard["index_file"]) != shard_files(split, number):
            raise ValueError(f"{where} is called '{shard['file']}' and '{shard['index_file']}'")
        if shard["tokens"] < 1 or shard["documents"] < 1:
            raise ValueError(f"{where} is empty")


def check_fields(where: str, value: Any, fields: dict[str, Any]) -> None:
    """Raise ValueError unless `value` is a dictionary whose `fields` are of these types."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, not a JSON object")
    for key, kind in fields.items():
        if key not in value:
            raise ValueError(f"{where} has no '{key}'")
        if not isinstance(value[key], kind):
            raise ValueError(f"'{key}' of {where} is a {type(value[key]).__name__}")


def _check_window_arguments(sequence_length: int, rows: int) -> None:
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length} leaves nothing to predict; it must be at least 2")
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")


def _pack(windows: list[tuple[TokenShards, int, int]]) -> PackedBatch:
    """Lay windows (shards, start, length) end to end; each window, and each document inside one, opens a document."""
    ids: list[np.ndarray] = []
    opens: list[np.ndarray] = []
    length, target_bytes = 0, 0.0
    for shards, start, window_length in windows:
        window_ids, document_starts = shards.window(start, window_length)
        window_opens = np.unique(np.append(document_starts, 0))
        ids.append(window_ids)
        opens.append(window_opens + length)
        target_bytes += shards.text_bytes(window_ids) - shards.text_bytes(window_ids[window_opens])
        length += window_length
    ids_T, opens_D = np.concatenate(ids), np.concatenate(opens)
    cu_seqlens = np.append(opens_D, length).astype(np.int32)
    input_ids = torch.from_numpy(ids_T)
    return PackedBatch(
        input_ids=input_ids,
        labels=input_ids,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        num_targets=length - len(opens_D),
        target_bytes=target_bytes,
    )
