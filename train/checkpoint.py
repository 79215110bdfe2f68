"""Checkpoints: a directory alone is enough to resume, evaluate or export a run.

    RUN/checkpoints/step_00000100/
        model.safetensors, config.json, ...   what `save_pretrained` of model and tokenizer write
        run.yaml                              the resolved configuration
        optimizer.safetensors                 AdamW's state, `exp_avg.NAME` and so on by parameter name
        state.json                            how far the run is, on what data, under which versions
        checksums.json                        sha256 of every other file, written last

It is written beside its final name, synced and renamed: there is never a moment without a good checkpoint.
There is no random state to save, since every draw of a run is a function of its seed and the step.
"""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dlcm import DLCMConfig, LlamaBaselineConfig
from train.config import MODEL_CONFIGS, RunConfig, save_run_config
from train.data import file_sha256, sync
from train.environment import environment
from train.parallel import part_of, whole

# What every checkpoint holds, besides files that differ between transformers' versions and tokenizers.
REQUIRED_FILES = ("model.safetensors", "config.json", "run.yaml", "optimizer.safetensors", "state.json")
ANOTHER = "use another checkpoint, or copy this one again"  # what helps where one is damaged


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found or used; the message names it and the remedy."""


@dataclass(slots=True)
class TrainingState:
    """How far a run is, and what must not change before it goes on."""

    data_fingerprint: str
    tokenizer_hash: str
    world_size: int  # may change, if a step stays as large
    step: int = 0  # completed steps, skipped ones included
    tokens: int = 0
    flops: float = 0.0  # forward and backward
    skipped: int = 0  # steps without an update, because loss or gradient was not finite, or of a spike
    bad_in_a_row: int = 0
    spikes: int = 0
    recent_spikes: float = 0.0  # each counts less with every step since
    usual_norm: float = 1.0  # what `train.spikes` knows of gradients: exp(mean of log(norm)),
    norm_variance: float = 0.0  # variance of log(norm),
    norms: int = 0  # and of how many


class Tensors(NamedTuple):
    """What a checkpoint holds of model and optimizer, by name; whole, however the run shards them."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def whole_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer, kept: bool = True) -> Tensors:
    """The tensors themselves, or copies on the CPU of what is sharded: gathered one by one, to every rank, which must
    all ask; only where they are `kept` do they stay.
    """

    def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pairs = ((name, whole(x).cpu() if isinstance(x, DTensor) else x) for name, x in tensors.items())
        return {name: x for name, x in pairs if kept}

    return Tensors(gathered(model.state_dict()), gathered(optimizer_tensors(model, optimizer)))


def save_checkpoint(
    run_dir: Path,
    model: PreTrainedModel,
    tensors: Tensors,
    tokenizer: PreTrainedTokenizerBase,
    run: RunConfig,
    state: TrainingState,
) -> Path:
    """Writes the checkpoint of `state.step`, then deletes all but the newest `run.checkpoint.keep`.

    Raises:
        CheckpointError: the disk refused (full, for example). Earlier checkpoints are untouched.
    """
    final = checkpoint_path(run_dir, state.step)
    partial = final.with_suffix(".tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _discard(partial)
        partial.mkdir()
        model.save_pretrained(partial, state_dict=tensors.model)
        try:
            tokenizer.save_pretrained(partial)
        except Exception as error:  # where the disk refuses, the tokenizers package raises just that
            raise OSError(str(error)) from error
        save_run_config(run, partial / "run.yaml")
        save_file(tensors.optimizer, partial / "optimizer.safetensors")
        _write_json(partial / "state.json", dataclasses.asdict(state) | environment())
        checksums = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
        _write_json(partial / "checksums.json", checksums)
        for file in [*partial.iterdir(), partial]:
            sync(file)
        _discard(final)  # exists only if it was found corrupt and the steps since were repeated
        partial.rename(final)
        sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: could not be written ({error}); earlier checkpoints are intact: "
            f"make room, then continue with --resume {run_dir}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already, unless something went wrong
    _prune(run_dir, state.step, run.checkpoint.keep)
    return final


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run whose checksums hold; says on stderr which newer ones it passed over.

    Raises:
        CheckpointError: there is none.
    """
    refused: list[str] = []
    for _, directory in _candidates(run_dir):
        try:
            verify_checkpoint(directory)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            print(f"warning: {reason}; using {directory.name} instead", file=sys.stderr)
        return directory
    if not refused:
        raise CheckpointError(f"{run_dir}: no checkpoint here; start the run with its config file")
    raise CheckpointError(f"{'; '.join(refused)}; copy one of them again, or start the run with another output")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or would be."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step that `checkpoint_path` made this path of."""
    return int(checkpoint.name.removeprefix("step_"))


def has_checkpoints(run_dir: Path) -> bool:
    """Whether any checkpoint, good or not, was written here to its end."""
    return bool(_candidates(run_dir))


def half_written(run_dir: Path) -> list[Path]:
    """What is left of checkpoints whose writing was cut short; the next checkpoint removes them."""
    return sorted((run_dir / "checkpoints").glob("step_*.tmp"))


def verify_checkpoint(directory: Path) -> None:
    """Raises CheckpointError unless `directory` is a complete checkpoint, every file as it was written."""
    if not (directory / "checksums.json").is_file():
        raise CheckpointError(f"{directory}: is half-written or no checkpoint (no checksums.json)")
    _check_inside(directory, "checksums.json")
    checksums = _read_json(directory / "checksums.json")
    for name in REQUIRED_FILES:
        if name not in checksums:
            raise CheckpointError(f"{directory}: checksums.json lacks {name}, so it was edited or damaged")
    for name, checksum in checksums.items():
        if Path(name).name != name or not name.isprintable() or len(name.encode()) > 255:
            raise CheckpointError(f"{directory}: checksums.json names {name!r}, which is no plain file name")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: {name} is missing")
        _check_inside(directory, name)
        if file_sha256(directory / name) != checksum:
            raise CheckpointError(f"{directory}: {name} is corrupt (its sha256 is not the recorded one)")


def load_state(directory: Path) -> TrainingState:
    """How far the run was at this checkpoint.

    Raises:
        CheckpointError: state.json cannot be read, lacks an entry, or has one that cannot be; names it.
    """
    content = _read_json(directory / "state.json")
    for entry in dataclasses.fields(TrainingState):
        if entry.name not in content:
            raise CheckpointError(f"{directory}: state.json lacks {entry.name!r}; it is of another version of dlcm")
        value = content[entry.name]
        if type(value) is not entry.type or (entry.type is not str and not 0 <= value < math.inf):
            raise CheckpointError(f"{directory}: state.json says {entry.name} is {value!r:.80}; {ANOTHER}")
    state = TrainingState(**{entry.name: content[entry.name] for entry in dataclasses.fields(TrainingState)})
    if directory.name.startswith("step_") and directory.name != checkpoint_path(directory, state.step).name:
        raise CheckpointError(f"{directory}: state.json is of step {state.step}; {ANOTHER}")
    return state


def load_model_config(directory: Path, **overrides: Any) -> DLCMConfig | LlamaBaselineConfig:
    """The model config of a checkpoint. Only ours, and by its fields alone: none of them names code or other files.

    Raises:
        CheckpointError: config.json cannot be read, or is of another model.
    """
    content = _read_json(directory / "config.json") | overrides
    model_type = content.get("model_type")
    for config_class in MODEL_CONFIGS.values():
        if config_class.model_type == model_type:
            try:
                # Training keeps weights in fp32, whatever `dtype` says.
                return config_class.from_dict({key: value for key, value in content.items() if key != "dtype"})
            except Exception as error:  # transformers checks what it reads as it goes, with errors of any kind
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CheckpointError(f"{directory}: config.json is no model config ({reason}); {ANOTHER}") from error
    known = ", ".join(config_class.model_type for config_class in MODEL_CONFIGS.values())
    raise CheckpointError(f"{directory}: config.json is of a {model_type!r:.80} model, none of {known}; {ANOTHER}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file of fp32, by its header alone.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            other = next((name for name, one in slices.items() if one.get_dtype() != "F32"), None)
            shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no safetensors ({error}); {ANOTHER}") from error
    if other is not None:
        raise CheckpointError(f"{path}: {other} is not in fp32; {ANOTHER}")
    return shapes


def check_shapes(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless a safetensors file holds just these names and shapes, in fp32."""
    shapes = tensor_shapes(path)
    for name in sorted(expected.keys() | shapes.keys()):
        found, wanted = shapes.get(name), tuple(expected[name].shape) if name in expected else None
        if found != wanted:
            raise CheckpointError(f"{path}: {name} has shape {found}, the model's {wanted} (None: absent); {ANOTHER}")


def restore_checkpoint(directory: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Loads parameters and optimizer state into `model` and `optimizer`, each rank its part, and returns the state.

    Raises:
        CheckpointError: the checkpoint is of a model with another config, or its tensors do not fit; names them.
    """
    _check_same_config(directory, model.config)
    parameters = model.state_dict()
    check_shapes(directory / "model.safetensors", parameters)
    whole_state = load_file(directory / "model.safetensors")
    model.load_state_dict({name: part_of(x, parameters[name]) for name, x in whole_state.items()})
    _load_optimizer(directory / "optimizer.safetensors", model, optimizer)
    return load_state(directory)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, flat: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` for each parameter NAME."""
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def _load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {name: index for index, name in enumerate(ordered)}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    tensor_shapes(path)  # or it is no such file
    for key, value in load_file(path).items():
        kind, _, name = key.partition(".")
        if name not in index_of:
            raise CheckpointError(f"{path}: holds state of {name!r}, which this model has not; {ANOTHER}")
        is_moment = value.ndim > 0  # and not the number of steps
        state.setdefault(index_of[name], {})[kind] = part_of(value, parameters[name]) if is_moment else value
    for parameter, name in names.items():
        found = {kind: value.shape for kind, value in state.get(index_of[name], {}).items()}
        if found != {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": ()}:
            raise CheckpointError(f"{path}: the state of {name!r} is missing or does not fit; {ANOTHER}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_same_config(directory: Path, config: PreTrainedConfig) -> None:
    saved = load_model_config(directory)
    if saved.model_type != config.model_type:
        raise CheckpointError(f"{directory}: holds a {saved.model_type!r} model, not {config.model_type!r}")
    generic = {entry.name for entry in dataclasses.fields(PreTrainedConfig)}
    own = [entry.name for entry in dataclasses.fields(config) if entry.name not in generic]
    differing = [name for name in own if getattr(saved, name) != getattr(config, name)]
    if differing:
        changes = ", ".join(f"{name} {getattr(saved, name)} != {getattr(config, name)}" for name in differing)
        raise CheckpointError(f"{directory}: is of another model config ({changes}); use another output directory")


def _candidates(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of all checkpoints under their final names, newest first."""
    found = []
    for directory in (run_dir / "checkpoints").glob("step_*"):
        digits = directory.name.removeprefix("step_")
        if digits.isdecimal() and directory == checkpoint_path(run_dir, int(digits)) and directory.is_dir():
            found.append((int(digits), directory))
    return sorted(found, reverse=True)


def _prune(run_dir: Path, newest: int, keep: int) -> None:
    """Deletes all but the last `keep` checkpoints up to step `newest`.

    Half-written ones, and later ones (refused when the run was resumed from before them), go too.
    """
    candidates = _candidates(run_dir)
    kept = [directory for step, directory in candidates if step <= newest][:keep]
    for directory in [*half_written(run_dir), *(directory for _, directory in candidates)]:
        if directory not in kept:
            shutil.rmtree(directory)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_inside(directory: Path, name: str) -> None:
    if (directory / name).resolve().parent != directory.resolve():
        raise CheckpointError(f"{directory}: {name} is a link to another directory; copy the file itself")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read ({error}); {ANOTHER}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.parent}: {path.name} does not hold a JSON object; {ANOTHER}")
    return content


def _discard(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)
