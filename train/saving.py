"""Writing checkpoints (see `train.checkpoint`), while training goes on.

`save` copies what this rank is to write into memory of the host, which is all that training waits for, and a thread
writes the copies. Every rank writes a share of the tensors, about as many bytes as the others, whole: shards travel to
their tensor's rank. All write into one directory, beside its final name, which it is given once every file of every
rank is on disk: there is never a moment without a good checkpoint. One is written at a time, and the next waits: a run
that is killed loses the steps since the last checkpoint, or, while that is being written, since the one before.

Not torch.distributed.checkpoint, which copies on every rank all that is replicated, and writes shards: files that
transformers cannot read before they are read again, all of them, and put together.
"""

import copy
import dataclasses
import json
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from train.checkpoint import (
    CHECKSUMS,
    KINDS,
    CheckpointError,
    TrainingState,
    candidates,
    checkpoint_path,
    file_of,
    half_written,
    index_of,
    optimizer_tensors,
)
from train.config import CheckpointConfig, RunConfig, save_run_config
from train.data import file_sha256, sync
from train.distributed import PeerFailure, Ranks
from train.environment import environment
from train.parallel import owned_tensors

SHA256_BYTES = 32


class CheckpointSaver:
    """Saves a run's checkpoints; to be made, and asked, by all ranks alike.

    On leaving its context by an error it waits for what is being written, and says on stderr if that failed. On the way
    out by an interrupt it waits for nothing.
    """

    def __init__(
        self,
        run: RunConfig,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
    ):
        self._run, self._model, self._optimizer, self._tokenizer = run, model, optimizer, tokenizer
        self._ranks, self._beside = ranks, ranks.beside()
        self._copies: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}  # room that is used again
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainingState) -> Path:
        """Begins to write the checkpoint of `state.step`, of which all but the newest and milestones are deleted then.

        Returns:
            Where it will be.

        Raises:
            CheckpointError, PeerFailure: see `wait`; or the disk refused the directory.
        """
        self.wait()
        final = checkpoint_path(Path(self._run.output), state.step)
        self._ranks.on_first(lambda: self._make_room(final))
        tensors = {
            "model": self._model.state_dict(),
            "optimizer": optimizer_tensors(self._model, self._optimizer),
        }
        owner = {kind: shared_out(tensors[kind], self._ranks.size) for kind in KINDS}
        for kind in KINDS:
            for name, tensor in owned_tensors(tensors[kind], owner[kind], self._ranks.rank):
                self._copy(kind, name, tensor)
            own = [name for name in tensors[kind] if owner[kind][name] == self._ranks.rank]
            self._copies[kind] = {name: self._copies[kind][name] for name in own}  # others are gone since
        sizes = {kind: sum(x.numel() * x.element_size() for x in tensors[kind].values()) for kind in KINDS}
        indices = {kind: self._index(kind, owner[kind], sizes[kind]) for kind in KINDS} if self._ranks.size > 1 else {}
        copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if copied is not None:
            copied.record()
        arguments = final, dataclasses.replace(state), copy.copy(self._model.config), indices, copied
        self._thread = threading.Thread(target=self._in_background, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        return final

    def wait(self) -> None:
        """Waits until what is being written is on disk under its final name.

        Raises:
            CheckpointError: the disk refused (full, for example). Earlier checkpoints are untouched.
            PeerFailure: it refused another rank, which says so.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise; asks no other rank."""
        return self._error is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            if not isinstance(failure, PeerFailure):
                print(f"warning: {' '.join(str(failure).split())}", file=sys.stderr)

    # In the foreground

    def _make_room(self, final: Path) -> None:
        with self._refusals_named(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            _discard(_partial(final))
            _partial(final).mkdir()

    def _copy(self, kind: str, name: str, tensor: Tensor) -> None:
        """Copies what the next step will change; a GPU, which does both in order, need not be waited for."""
        copies = self._copies[kind]
        if name not in copies or copies[name].shape != tensor.shape:
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name].copy_(tensor, non_blocking=True)

    def _index(self, kind: str, owner: Mapping[str, int], total_size: int) -> dict[str, Any]:
        where = {name: file_of(kind, rank, self._ranks.size) for name, rank in sorted(owner.items())}
        return {"metadata": {"total_size": total_size}, "weight_map": where}

    # In the background, on every rank

    def _in_background(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # whatever it is, `wait` raises it
            self._error = error

    def _write(
        self,
        final: Path,
        state: TrainingState,
        config: PreTrainedConfig,
        indices: dict[str, Any],
        copied: torch.cuda.Event | None,
    ) -> None:
        failure: BaseException | None = None
        hashes = torch.zeros(len(KINDS) + 1, SHA256_BYTES, dtype=torch.uint8)  # last, whether there are none
        try:
            if copied is not None:
                copied.synchronize()
            with self._refusals_named(final):
                if self._ranks.is_first:
                    self._write_small_files(_partial(final), state, config, indices)
                for row, kind in zip(hashes, KINDS, strict=False):
                    row.copy_(self._write_tensors(_partial(final), kind))
        except BaseException as error:  # the other ranks must hear of it before it is raised
            failure, hashes[-1] = error, 1
        every = self._beside.gather(hashes)
        if every[:, -1].any():
            if self._ranks.is_first:
                shutil.rmtree(_partial(final), ignore_errors=True)
            raise failure or PeerFailure
        self._beside.on_first(lambda: self._publish(final, every))

    def _write_tensors(self, partial: Path, kind: str) -> Tensor:
        """Writes this rank's share, even of nothing; returns the file's sha256."""
        file = partial / file_of(kind, self._ranks.rank, self._ranks.size)
        save_file(self._copies[kind], file, {"format": "pt"})
        sync(file)
        return torch.frombuffer(bytearray.fromhex(file_sha256(file)), dtype=torch.uint8)

    # In the background, on rank 0

    def _write_small_files(
        self, partial: Path, state: TrainingState, config: PreTrainedConfig, indices: dict[str, Any]
    ) -> None:
        generation_config = self._model.generation_config
        config.architectures, config.dtype = [type(self._model).__name__.removeprefix("FSDP")], "float32"
        config.save_pretrained(partial)
        if generation_config is not None:
            generation_config.save_pretrained(partial)
        try:
            self._tokenizer.save_pretrained(partial)
        except Exception as error:  # where the disk refuses, the tokenizers package raises just that
            raise OSError(str(error)) from error
        save_run_config(self._run, partial / "run.yaml")
        _write_json(partial / "state.json", dataclasses.asdict(state) | environment())
        for kind, index in indices.items():
            _write_json(partial / index_of(kind), index)

    def _publish(self, final: Path, hashes: Tensor) -> None:
        """Gives a checkpoint of which all tensors are on disk its final name.

        Args:
            hashes: (ranks, kinds + 1, bytes), what each rank has written.
        """
        partial = _partial(final)
        try:
            with self._refusals_named(final):
                checksums = {
                    file_of(kind, rank, self._ranks.size): bytes(hashes[rank, number].tolist()).hex()
                    for number, kind in enumerate(KINDS)
                    for rank in range(self._ranks.size)
                }
                for path in [*write_checksums(partial, checksums), partial]:
                    sync(path)
                _discard(final)  # exists only if it was found corrupt and the steps since were repeated
                partial.rename(final)
                sync(final.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something went wrong
        prune(final, self._run.checkpoint)

    @contextmanager
    def _refusals_named(self, final: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{final}: could not be written ({error}); earlier checkpoints are intact: "
                f"make room, then continue with --resume {self._run.output}"
            ) from error


def shared_out(tensors: Mapping[str, Tensor], ranks: int) -> dict[str, int]:
    """A rank for each tensor, so that all have about as many bytes: the largest first, to whom has least."""
    loads, owner = [0] * ranks, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += tensor.numel() * tensor.element_size()
    return owner


def prune(newest: Path, retention: CheckpointConfig) -> None:
    """Deletes checkpoints beside the newest one, but for the last `keep` and milestones.

    Half-written ones, and later ones (refused when the run was resumed from before them), go too.
    """
    run_dir, every = newest.parents[1], retention.milestone_every
    found = candidates(run_dir)
    (newest_step,) = (step for step, directory in found if directory == newest)
    before = [(step, directory) for step, directory in found if step <= newest_step]
    kept = [directory for _, directory in before[: retention.keep]]
    kept += [directory for step, directory in before if every is not None and step % every == 0]
    for directory in [*half_written(run_dir), *(directory for _, directory in found)]:
        if directory not in kept:
            shutil.rmtree(directory)


def write_checksums(directory: Path, known: Mapping[str, str] | None = None) -> list[Path]:
    """Writes down the sha256 of every file of a checkpoint, those that are `known` as they are.

    Returns:
        The other files, and the one that was written.
    """
    checksums = dict(known or {})
    others = sorted(file for file in directory.iterdir() if file.name not in checksums)
    checksums |= {file.name: file_sha256(file) for file in others}
    _write_json(directory / CHECKSUMS, checksums)
    return [*others, directory / CHECKSUMS]


def _partial(final: Path) -> Path:
    return final.with_suffix(".tmp")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _discard(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
