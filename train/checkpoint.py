"""Checkpoints: a directory alone is enough to resume, evaluate or export a run.

    RUN/checkpoints/step_00000100/
        model.safetensors           parameters, in fp32
        config.json, ...            what `save_pretrained` of model and tokenizer write beside them
        run.yaml                    the resolved configuration
        optimizer.safetensors       AdamW's state, `exp_avg.NAME` and so on by parameter name
        state.json                  how far the run is, on what data, under which versions
        checksums.json              sha256 of every other file, written last

Of N processes each writes a share of the tensors, every one of them whole. Then there are as many files,
model-00001-of-0000N.safetensors and so on, and model.safetensors.index.json, which says what is where, as transformers
does it; and the same of `optimizer`. So every checkpoint is one of transformers, and fits any strategy and number of
processes, of which each reads its part.

`train.saving` writes them. There is no random state to save, since every draw of a run is a function of its seed and
the step.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.flops import parameter_counts
from train.config import MODEL_CONFIGS
from train.data import file_sha256
from train.parallel import Readable, fill_

KINDS = ("model", "optimizer")  # of tensors
# What every checkpoint holds, besides tensors, and files that differ between transformers' versions and tokenizers.
REQUIRED_FILES = ("config.json", "run.yaml", "state.json")
CHECKSUMS = "checksums.json"
ANOTHER = "use another checkpoint, or copy this one again"  # what helps where one is damaged
FP32, FLOATS = ("F32",), ("F32", "BF16", "F16")  # as safetensors calls them


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
    gamma: float = 0.0  # what holds bits at their target (see `train.compression`)


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest checkpoint of a run whose checksums hold; says on stderr which newer ones it passed over.

    Raises:
        CheckpointError: there is none.
    """
    refused: list[str] = []
    for _, directory in candidates(run_dir):
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


def checkpoint_directory(path: Path) -> Path:
    """The verified checkpoint that a path means: itself, or the newest good one of a run.

    Raises:
        CheckpointError: there is none, or the one given is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run directory or a checkpoint")
    if (path / "checkpoints").is_dir():
        return latest_checkpoint(path)
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {ANOTHER}") from error
    return path


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or would be."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoint_step(checkpoint: Path) -> int:
    """The step that `checkpoint_path` made this path of."""
    return int(checkpoint.name.removeprefix("step_"))


def has_checkpoints(run_dir: Path) -> bool:
    """Whether any checkpoint, good or not, was written here to its end."""
    return bool(candidates(run_dir))


def half_written(run_dir: Path) -> list[Path]:
    """What is left of checkpoints whose writing was cut short; the next checkpoint removes them."""
    return sorted((run_dir / "checkpoints").glob("step_*.tmp"))


def verify_checkpoint(directory: Path) -> None:
    """Raises CheckpointError unless `directory` is a complete checkpoint, every file as it was written."""
    if not (directory / CHECKSUMS).is_file():
        raise CheckpointError(f"{directory}: is half-written or no checkpoint (no {CHECKSUMS})")
    _check_inside(directory, CHECKSUMS)
    checksums = _read_json(directory / CHECKSUMS)
    for name in checksums:
        if not _is_plain(name):
            raise CheckpointError(f"{directory}: {CHECKSUMS} names {name!r}, which is no plain file name")
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory}: {name} is missing")
        _check_inside(directory, name)
    for name in REQUIRED_FILES:
        _check_listed(directory, name, checksums)
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: file_sha256(directory / name), checksums)
        for (name, checksum), actual in zip(checksums.items(), found, strict=True):
            if actual != checksum:
                raise CheckpointError(f"{directory}: {name} is corrupt (its sha256 is not the recorded one)")
    for kind in KINDS:
        for name in tensor_files(directory, kind):
            _check_listed(directory, name, checksums)


def load_state(directory: Path) -> TrainingState:
    """How far the run was at this checkpoint.

    Raises:
        CheckpointError: state.json cannot be read, lacks an entry, or has one that cannot be; names it.
    """
    content = {"gamma": 0.0} | _read_json(directory / "state.json")  # older ones had no compression
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


def file_of(kind: str, rank: int, world_size: int) -> str:
    """The file to which a rank writes its share of a kind of tensors."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors" if world_size > 1 else f"{kind}.safetensors"


def index_of(kind: str) -> str:
    """The file that says where a kind of tensors lie, if there is not one file for all of them."""
    return f"{kind}.safetensors.index.json"


def tensor_files(directory: Path, kind: str) -> list[str]:
    """Names of the files that hold a kind of tensors: of the one, or, as transformers does it, of those in the index.

    Raises:
        CheckpointError: the index cannot be read, or names what is no such file of this directory.
    """
    index = index_of(kind)
    if (directory / file_of(kind, 0, 1)).exists() or not (directory / index).exists():
        return [file_of(kind, 0, 1)]
    _check_inside(directory, index)
    where = _read_json(directory / index).get("weight_map")
    if not isinstance(where, dict):
        raise CheckpointError(f"{directory}: {index} has no weight_map; {ANOTHER}")
    for name in where.values():
        if not isinstance(name, str) or not re.fullmatch(rf"{kind}-\d{{5}}-of-\d{{5}}\.safetensors", name, re.ASCII):
            raise CheckpointError(f"{directory}: {index} names {name!r:.80}, which is no file of a {kind}; {ANOTHER}")
    return sorted(set(where.values()))


class SavedTensors:
    """Tensors of a kind, in their files: names and shapes by the headers alone; what is asked for is read.

    Raises:
        CheckpointError: a file is missing or no safetensors, or holds a tensor of another dtype, or one that another
            file holds too.
    """

    def __init__(self, directory: Path, kind: str, dtypes: tuple[str, ...] = FP32):
        names = tensor_files(directory, kind)
        self.path = directory / (names[0] if len(names) == 1 else index_of(kind))
        self._slices: dict[str, Any] = {}
        for name in names:
            _check_inside(directory, name)
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; {ANOTHER}")
            try:
                file = safe_open(path, "pt")
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: no safetensors ({error}); {ANOTHER}") from error
            for key, one in slices.items():
                if one.get_dtype() not in dtypes:
                    raise CheckpointError(f"{path}: {key} is {one.get_dtype()}, not {' or '.join(dtypes)}; {ANOTHER}")
                if key in self._slices:
                    raise CheckpointError(f"{path}: {key} is in another file, too; {ANOTHER}")
            self._slices |= slices
        self.shapes = {key: tuple(one.get_shape()) for key, one in self._slices.items()}

    def __getitem__(self, name: str) -> Readable:
        return self._slices[name]

    def all(self) -> dict[str, Tensor]:
        """All of them, read."""
        return {name: saved[...] for name, saved in self._slices.items()}

    def check_shapes(self, expected: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError unless these are just the names and shapes."""
        for name in sorted(expected.keys() | self.shapes.keys()):
            found, wanted = self.shapes.get(name), tuple(expected[name].shape) if name in expected else None
            if found != wanted:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {found}, the model's {wanted} (None: absent); {ANOTHER}"
                )


def load_model(directory: Path) -> DLCMForCausalLM | LlamaBaselineForCausalLM:
    """The model of a verified checkpoint. Unlike transformers' loader, it opens nothing but the model's files.

    Raises:
        CheckpointError: they do not fit together.
    """
    # The run's own choice of backend may need half precision, which evaluation does not use.
    config = load_model_config(directory, attention_backend="auto")
    model, saved = model_without_memory(directory, config), SavedTensors(directory, "model")
    model.load_state_dict(saved.all(), assign=True)
    return model


def model_without_memory(
    directory: Path, config: PreTrainedConfig, dtypes: tuple[str, ...] = FP32
) -> DLCMForCausalLM | LlamaBaselineForCausalLM:
    """A model of this config on the meta device, whose tensors are those that the directory holds.

    Raises:
        CheckpointError: they are not. How many numbers there are is compared before anything of that size is built.
    """
    assert isinstance(config, DLCMConfig | LlamaBaselineConfig)
    saved = SavedTensors(directory, "model", dtypes)
    described, held = sum(parameter_counts(config).values()), sum(map(math.prod, saved.shapes.values()))
    if described != held:
        raise CheckpointError(
            f"{directory}: config.json is of {described:,} parameters, {saved.path.name} of {held:,}; {ANOTHER}"
        )
    with torch.device("meta"):
        model = DLCMForCausalLM(config) if isinstance(config, DLCMConfig) else LlamaBaselineForCausalLM(config)
    saved.check_shapes(model.state_dict())
    return model


def check_model(directory: Path, config: PreTrainedConfig) -> None:
    """Raises CheckpointError unless the checkpoint is of a model with this config; allocates nothing.

    What removal has left of its channels is the checkpoint's to say.
    """
    saved = load_model_config(directory)
    changes = config_changes(saved, config)
    changes.pop("channels_left", None)
    if changes:
        words = ", ".join(f"{name} {old} != {new}" for name, (old, new) in changes.items())
        raise CheckpointError(f"{directory}: is of another model config ({words}); use another output directory")
    model_without_memory(directory, saved)


def restore_checkpoint(directory: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Loads parameters and optimizer state into `model` and `optimizer`, each rank its part, and returns the state.

    Raises:
        CheckpointError: the checkpoint is of a model with another config, or its tensors do not fit; names them.
    """
    check_model(directory, model.config)
    load_weights(directory, model)
    _load_optimizer(directory, model, optimizer)
    return load_state(directory)


def load_weights(
    directory: Path,
    model: PreTrainedModel,
    dtypes: tuple[str, ...] = FP32,
    without: Callable[[str], bool] = lambda name: False,
) -> None:
    """Fills the model's tensors, each rank its part; those `without` which it was saved stay as they are.

    Raises:
        CheckpointError: names or shapes of those that were saved are not the model's.
    """
    saved = SavedTensors(directory, "model", dtypes)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not without(name)}
    saved.check_shapes(tensors)
    for name, tensor in tensors.items():
        fill_(tensor, saved[name])


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, flat: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME` for each parameter NAME."""
    return {
        f"{kind}.{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def _load_optimizer(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    saved = SavedTensors(directory, "optimizer")
    state = {
        name: {
            "step": torch.zeros(()),
            "exp_avg": torch.empty_like(parameters[name]),
            "exp_avg_sq": torch.empty_like(parameters[name]),
        }
        for name in ordered
    }
    expected = {f"{kind}.{name}": tensor for name, kinds in state.items() for kind, tensor in kinds.items()}
    saved.check_shapes(expected)
    for name, tensor in expected.items():
        fill_(tensor, saved[name])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(enumerate(state[name] for name in ordered)), "param_groups": groups})


def config_changes(saved: PreTrainedConfig, config: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    """Entries of our own in which two model configs differ, with the value of each."""
    if saved.model_type != config.model_type:
        return {"model_type": (saved.model_type, config.model_type)}
    generic = {entry.name for entry in dataclasses.fields(PreTrainedConfig)}
    own = [entry.name for entry in dataclasses.fields(config) if entry.name not in generic]
    both = {name: (getattr(saved, name), getattr(config, name)) for name in own}
    return {name: values for name, values in both.items() if values[0] != values[1]}


def candidates(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, directory) of all checkpoints under their final names, newest first."""
    found = []
    for directory in (run_dir / "checkpoints").glob("step_*"):
        digits = directory.name.removeprefix("step_")
        if digits.isdecimal() and directory == checkpoint_path(run_dir, int(digits)) and directory.is_dir():
            found.append((int(digits), directory))
    return sorted(found, reverse=True)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and len(name.encode()) <= 255


def _check_listed(directory: Path, name: str, checksums: Mapping[str, Any]) -> None:
    if name not in checksums:
        raise CheckpointError(f"{directory}: {CHECKSUMS} lacks {name}, so it was edited or damaged")


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
