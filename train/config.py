"""The configuration of a training run: one tree of dataclasses, read from YAML and dotted overrides.

A YAML file may name another as its `base` (a path relative to itself); the file's own keys win over the
base's, and `a.b=c` overrides win over both. Unknown keys, wrong types and impossible combinations are errors
here, before any tensor is allocated. The `model` section holds `architecture` (`dlcm` or `llama`) and fields
of that model's config.
"""

import copy
import dataclasses
import difflib
import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from transformers import PreTrainedConfig

from dlcm import DLCMConfig, LlamaBaselineConfig

MODEL_CONFIGS: dict[str, type[DLCMConfig] | type[LlamaBaselineConfig]] = {
    "dlcm": DLCMConfig,
    "llama": LlamaBaselineConfig,
}
# Model fields that the `compression` section decides, by its own keys.
FROM_COMPRESSION = {
    "quantiser": "method",
    "quantiser_rows": "group_rows",
    "quantiser_columns": "group_columns",
    "channels_left": "remove_every",
}
FROM_TOKENIZER = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "word_end_ids",
)  # model fields that are not the run's to choose

MIXTURE = "data.mixture"  # whose keys are names that the user chooses
MAX_DEPTH = 32  # of brackets in YAML; the parser of libyaml crashes where there are tens of thousands


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the file and the remedy."""


@dataclass(frozen=True)
class Range:
    """What values a number may have, and the words for it."""

    words: str
    holds: Callable[[float], bool]


AT_LEAST_ONE = Range("at least 1", lambda value: value >= 1)
AT_LEAST_TWO = Range("at least 2", lambda value: value >= 2)
POSITIVE = Range("above 0 and finite", lambda value: 0 < value < math.inf)
ABOVE_ONE = Range("above 1 and finite", lambda value: 1 < value < math.inf)
NOT_NEGATIVE = Range("0 or more, and finite", lambda value: 0 <= value < math.inf)
FRACTION = Range("between 0 and 1", lambda value: 0 <= value <= 1)
BITS = Range("above 0 and at most 8", lambda value: 0 < value <= 8)
BELOW_ONE = Range("0 or more, and below 1", lambda value: 0 <= value < 1)


def within(allowed: Range, default: Any = MISSING) -> Any:
    """A dataclass field whose value, unless null, must lie in the range."""
    return field(default=default, metadata={"range": allowed})


@dataclass
class SourceConfig:
    """One of several sources: a directory written by `train.prepare`, and its part of the tokens beside the others."""

    path: str = MISSING
    weight: float = within(POSITIVE)


@dataclass
class DataConfig:
    """What is read, in windows of `sequence_length` tokens: one directory written by `train.prepare`, or a mixture."""

    path: str | None = None
    mixture: dict[str, SourceConfig] | None = None  # by name; instead of `path`
    sequence_length: int = within(AT_LEAST_TWO)  # one token alone has no target
    verify: bool = True  # check the shards' sha256 at start

    def sources(self) -> dict[str, tuple[str, float]]:
        """Path and weight of each source by its name, sorted: where a file lists them is to change nothing.

        A single one has the empty name.
        """
        if self.mixture:
            return {name: (source.path, source.weight) for name, source in sorted(self.mixture.items())}
        assert self.path is not None  # seen to by `validate`
        return {"": (self.path, 1.0)}


@dataclass
class BatchConfig:
    """Windows per micro-batch and micro-batches per step, both per process."""

    rows: int = within(AT_LEAST_ONE)
    accumulation: int = within(AT_LEAST_ONE, 1)
    # F of the ratio loss, where there are several micro-batches: `ahead` counts all boundaries first, which is exact
    # and costs another pass of encoder and detector; `running` takes those so far (see dlcm/global_parser.py).
    boundary_count: Literal["ahead", "running"] = "ahead"


@dataclass
class ParallelConfig:
    """Where parameters live when there are several processes (see train/parallel.py)."""

    strategy: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    shard_size: int | None = within(AT_LEAST_TWO, None)  # processes that share a copy; for hybrid, null otherwise


@dataclass
class OptimizerConfig:
    """AdamW with decoupled muP: base learning rates by the role of parameters (see dlcm/mup.py)."""

    lr_token: float = within(POSITIVE)
    lr_concept: float | None = within(POSITIVE, None)  # null for the baseline: it has no concept parameters
    lr_boundary: float | None = within(POSITIVE, None)  # of a learned boundary detector, well below lr_token
    lr_other: float = within(POSITIVE)
    lr_embedding: float | None = within(POSITIVE, None)  # null: lr_other / sigma_base, see dlcm/mup.py
    beta1: float = within(BELOW_ONE, 0.9)
    beta2: float = within(BELOW_ONE, 0.95)
    eps: float = within(POSITIVE, 1e-8)
    weight_decay: float = within(NOT_NEGATIVE, 0.1)
    clip_norm: float = within(POSITIVE, 1.0)


@dataclass
class CompressionConfig:
    """In how many bits the weights of blocks and cross-attention are trained (see train/compression.py).

    `learned`: each group of weights learns its bits, down to none, so that there are `target_bits` a weight, or under a
    penalty of `gamma` a bit. `fixed`: `bits`, with learned scales. `ternary`: -1, 0 or 1 times a mean (BitNet b1.58).
    """

    method: Literal["none", "learned", "fixed", "ternary"] = "none"
    group_rows: int = within(AT_LEAST_ONE, 1)
    group_columns: int | None = within(AT_LEAST_ONE, None)  # null: all; with one row, a group is an output channel
    bits: int = within(BITS, 4)  # at the start; fixed: throughout
    target_bits: float | None = within(BITS, None)
    gamma: float | None = within(POSITIVE, None)
    start: float = within(BELOW_ONE, 0.1)  # share of all steps before anything presses on bits
    ramp: float = within(FRACTION, 0.5)  # and after it, until the target is wanted, or gamma whole
    lr: float = within(POSITIVE, 0.5)  # of bits and exponents
    eps: float = within(POSITIVE, 6.0)  # of their AdamW, as a multiple of the part that a group is of all weights
    remove_every: int | None = within(
        AT_LEAST_ONE, None
    )  # steps, after which dead channels leave the model; null: never


@dataclass
class SpikesConfig:
    """Which steps are skipped because their gradient is far longer than usual (see train/spikes.py)."""

    deviations: float | None = within(POSITIVE, None)  # of log(norm), above its running mean; null: none is skipped
    window: int = within(AT_LEAST_TWO, 200)  # steps behind mean and deviation; as many at the start are never skipped
    most: int = within(AT_LEAST_ONE, 10)  # spikes within about a window; more stop the run


@dataclass
class ScheduleConfig:
    """Warm-up, stable, decay over `steps` optimizer steps; what boundaries are drawn by moves along with them."""

    steps: int = within(AT_LEAST_ONE)
    warmup_steps: int = within(NOT_NEGATIVE, 0)
    decay_fraction: float = within(FRACTION, 0.2)  # share of all steps spent decaying, at the end
    final_lr_fraction: float = within(FRACTION, 0.1)
    sharpening_final: float | None = within(POSITIVE, None)  # null keeps the model's own sharpening
    target_ratio_initial: float | None = within(ABOVE_ONE, None)  # null begins with the model's own target_ratio


@dataclass
class EvaluationConfig:
    """How often, in steps, and on how many validation tokens (null: all of them)."""

    every: int = within(AT_LEAST_ONE, 500)
    max_tokens: int | None = within(AT_LEAST_TWO, None)


@dataclass
class CheckpointConfig:
    """How often, in steps, how many of the newest checkpoints to keep, and which of them for ever."""

    every: int = within(AT_LEAST_ONE, 500)
    keep: int = within(AT_LEAST_ONE, 2)
    milestone_every: int | None = within(AT_LEAST_ONE, None)  # checkpoints of these steps are kept; null: of none


@dataclass
class RunConfig:
    """Everything that decides a run. `output` is the run directory."""

    output: str = MISSING
    seed: int = within(NOT_NEGATIVE, 0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on CUDA, fp32 on the CPU
    threads: int | None = within(AT_LEAST_ONE, None)  # of torch on the CPU; sums depend on it in the last bits
    init_from: str | None = None  # a checkpoint, or what train.export wrote: its weights are the run's first
    compile: bool = False  # blocks, by torch.compile: a minute or more at the start, then faster steps
    activation_checkpointing: Literal["none", "full"] = "none"  # full: keep less memory, run each block twice
    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = within(AT_LEAST_ONE, 10)
    mfu: Literal["datasheet", "measured"] = "datasheet"  # of which peak; an unknown device has none by datasheet
    max_bad_steps: int = within(AT_LEAST_ONE, 10)  # skipped steps in a row that stop the run


def load_run_config(path: str | Path, overrides: Sequence[str] = (), resolved: bool = False) -> RunConfig:
    """The run that a YAML file, its bases and `a.b=c` overrides describe, validated.

    `resolved` is for what `save_run_config` wrote, perhaps elsewhere: it may refer to no other file and no variable.

    Raises:
        ConfigError: something is unknown, mistyped, missing or impossible; names the file or "command line".
    """
    if resolved:
        _check_resolved(Path(path))
    sources = _read_with_bases(Path(path))
    if overrides:
        sources.append(("command line", _read_overrides(overrides)))
    _check_keys(sources)
    try:
        run = OmegaConf.to_object(_typed(sources))
        assert isinstance(run, RunConfig)
        validate(run)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return run


def _typed(sources: Sequence[tuple[str, Mapping[str, Any]]]) -> Any:
    """The sources over the schema: at once, since one merge takes longer than all else that reading a run takes."""
    together: dict[str, Any] = {}
    for _, content in sources:
        _merge_into(together, content)
    with suppress(OmegaConfBaseException):
        return OmegaConf.merge(_schema(), together)
    merged = _schema()
    for source, content in sources:  # one of them is at fault
        try:
            merged = OmegaConf.merge(merged, content)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_explain(error)}") from error
    return merged


def _merge_into(target: dict[str, Any], content: Mapping[str, Any]) -> None:
    """As OmegaConf does it: later values win, sections are merged, and ??? changes nothing."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge_into(target[key], value)
        elif value != MISSING or key not in target:
            target[key] = value


@functools.cache
def _schema() -> Any:
    """Defaults and types, which merging copies; to look them up takes as long as all else."""
    return OmegaConf.structured(RunConfig)


def save_run_config(run: RunConfig, path: str | Path) -> None:
    """Writes the resolved run as YAML that `load_run_config` reads back to an equal run."""
    OmegaConf.save(OmegaConf.structured(run), path)


def config_differences(run: RunConfig, other: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ between two runs, with the value of each run."""
    ours, theirs = _flatten(dataclasses.asdict(run)), _flatten(dataclasses.asdict(other))
    both = {key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys())}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def build_model_config(run: RunConfig) -> DLCMConfig | LlamaBaselineConfig:
    """The model config that the `model` section describes.

    Raises:
        ConfigError: unknown architecture or key, a wrong type, or widths and heads that do not fit together.
    """
    fields = dict(run.model)
    architecture = fields.pop("architecture", None)
    if str(architecture) not in MODEL_CONFIGS:
        raise ConfigError(f"model.architecture is {architecture!r}; choose one of {', '.join(MODEL_CONFIGS)}")
    config_class, compression = MODEL_CONFIGS[architecture], run.compression
    if compression.method in ("learned", "fixed"):
        fields |= {"quantiser": "bits", "quantiser_rows": compression.group_rows}
        fields |= {"quantiser_columns": compression.group_columns}
    elif compression.method == "ternary":
        fields["quantiser"] = "ternary"
    try:
        return config_class(**fields)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def validate(run: RunConfig) -> None:
    """Checks values and their combinations; allocates nothing.

    Raises:
        ConfigError: no run can have these values; names the key and the remedy.
    """
    _check_whole_numbers(run)
    _check_ranges(run)
    _check_data(run.data)
    model_config = build_model_config(run)
    schedule, rates = run.schedule, run.optimizer
    if run.data.sequence_length > model_config.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length is {run.data.sequence_length}, longer than model.max_position_embeddings "
            f"{model_config.max_position_embeddings}; shorten the one or raise the other"
        )
    if schedule.warmup_steps + round(schedule.decay_fraction * schedule.steps) > schedule.steps:
        raise ConfigError(
            f"schedule.warmup_steps {schedule.warmup_steps} and schedule.decay_fraction "
            f"{schedule.decay_fraction} together exceed schedule.steps {schedule.steps}; shorten one of them"
        )
    if (run.parallel.strategy == "hybrid") != (run.parallel.shard_size is not None):
        raise ConfigError(
            f"parallel.shard_size is {run.parallel.shard_size or 'null'} where parallel.strategy is "
            f"{run.parallel.strategy}; hybrid needs one, say the processes of a machine, others leave it null"
        )
    every, milestones = run.checkpoint.every, run.checkpoint.milestone_every
    if milestones is not None and milestones % every:
        raise ConfigError(
            f"checkpoint.milestone_every is {milestones}, but there are checkpoints every {every} steps; set it to a "
            f"multiple of checkpoint.every"
        )
    _check_compression(run.compression)
    if run.compression.remove_every is not None and run.parallel.strategy != "ddp":
        raise ConfigError(
            f"compression.remove_every is {run.compression.remove_every} where parallel.strategy is "
            f"{run.parallel.strategy}, whose shards cannot change their shapes; set parallel.strategy=ddp, or leave "
            f"compression.remove_every null"
        )
    learned = isinstance(model_config, DLCMConfig) and model_config.segmenter == "learned"
    _check_given("optimizer.lr_concept", rates.lr_concept, isinstance(model_config, DLCMConfig), "concept parameters")
    _check_given("optimizer.lr_boundary", rates.lr_boundary, learned, "a learned segmenter")
    if schedule.sharpening_final is not None and not learned:
        raise ConfigError("schedule.sharpening_final: this model has no learned segmenter to sharpen; leave it null")
    if schedule.target_ratio_initial is not None and not getattr(model_config, "has_ratio_loss", False):
        raise ConfigError("schedule.target_ratio_initial: this model has no ratio loss to move; leave it null")


def _check_data(data: DataConfig) -> None:
    if not data.path and not data.mixture:
        raise ConfigError("data.path is missing; set it in the file or as data.path=VALUE, or give a data.mixture")
    if data.path and data.mixture:
        raise ConfigError("data.path and data.mixture are both given; set one of them to null")
    for name in data.mixture or {}:
        if re.fullmatch(r"[\w-]+", name) is None:
            raise ConfigError(f"data.mixture: {name!r} is no name for a source; use letters, digits, _ and -")


def _check_compression(compression: CompressionConfig) -> None:
    method, target, gamma = compression.method, compression.target_bits, compression.gamma
    for key in ("target_bits", "gamma", "remove_every"):
        if method != "learned" and getattr(compression, key) is not None:
            raise ConfigError(f"compression.{key} is set, but only compression.method=learned reads it; leave it null")
    if method == "learned" and (target is None) == (gamma is None):
        raise ConfigError("compression.target_bits or compression.gamma: give one of them, and leave the other null")
    if target is not None and target >= compression.bits:
        raise ConfigError(
            f"compression.target_bits is {target}, not below the {compression.bits} of compression.bits; lower the one "
            f"or raise the other"
        )
    if compression.start + compression.ramp > 1:
        raise ConfigError(
            f"compression.start {compression.start} and compression.ramp {compression.ramp} together exceed 1, which "
            f"is all steps; shorten one of them"
        )


def _check_given(key: str, value: float | None, needed: bool, what: str) -> None:
    if needed and value is None:
        raise ConfigError(f"{key} is missing; this model has {what}")
    if not needed and value is not None:
        raise ConfigError(f"{key} is set, but this model does not have {what}; leave it null")


def _check_whole_numbers(run: RunConfig) -> None:
    for key, value in _flatten(dataclasses.asdict(run)).items():
        if isinstance(value, int) and abs(value) >= 2**63:  # torch and numpy count in 64 bits
            raise ConfigError(f"{key} does not fit into 64 bits; choose a number below 2**63")


def _check_ranges(section: Any, prefix: str = "") -> None:
    for entry in dataclasses.fields(section):
        value, allowed = getattr(section, entry.name), entry.metadata.get("range")
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{prefix}{entry.name}.")
        elif entry.name == "mixture" and value:
            for name, source in value.items():
                _check_ranges(source, f"{prefix}{entry.name}.{name}.")
        elif allowed is not None and value is not None and not allowed.holds(value):
            raise ConfigError(f"{prefix}{entry.name} is {value}, but must be {allowed.words}")


def _check_keys(sources: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Unknown keys are looked for in each source before merging, while it is known who wrote them."""
    valid, sections = _valid_keys(sources), [entry.name for entry in dataclasses.fields(RunConfig)]
    for source, content in sources:
        for key, value in _flatten(content).items():
            if key not in valid and (key in sections or key.rpartition(".")[0] == MIXTURE):
                raise ConfigError(f"{source}: {key} is a section; write its keys, not {value!r}")
            if key not in valid:
                raise ConfigError(f"{source}: unknown key {key!r}{_suggestion(key, valid)}")


def _valid_keys(sources: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Dotted names of every leaf; those of `model` follow from the architecture that the sources agree on."""
    written: dict[str, Any] = {}
    for _, content in sources:
        written |= _flatten(content)
    architecture = str(written.get("model.architecture"))
    chosen = [MODEL_CONFIGS[architecture]] if architecture in MODEL_CONFIGS else list(MODEL_CONFIGS.values())
    generic = {entry.name for entry in dataclasses.fields(PreTrainedConfig)} | {*FROM_TOKENIZER, *FROM_COMPRESSION}
    names = {entry.name: None for config in chosen for entry in dataclasses.fields(config)}
    keys = ["model.architecture", *(f"model.{name}" for name in names if name not in generic)]
    for entry in dataclasses.fields(RunConfig):
        section = entry.default_factory
        if section is NO_DEFAULT:
            keys.append(entry.name)
        elif isinstance(section, type) and dataclasses.is_dataclass(section):
            keys += [f"{entry.name}.{leaf.name}" for leaf in dataclasses.fields(section)]
    names = {key.removeprefix(f"{MIXTURE}.").partition(".")[0]: None for key in written if key.startswith(MIXTURE)}
    return keys + [f"{MIXTURE}.{name}.{leaf.name}" for name in names for leaf in dataclasses.fields(SourceConfig)]


def _suggestion(key: str, valid: Sequence[str]) -> str:
    """What was probably meant: the same word in another section, else a key spelt alike; or whose key it is."""
    leaf, by_leaf = key.rpartition(".")[2], {name.rpartition(".")[2]: name for name in valid}
    if leaf in FROM_TOKENIZER:
        return "; the tokenizer decides it"
    if leaf in FROM_COMPRESSION:
        return f"; it follows from compression.{FROM_COMPRESSION[leaf]}"
    if leaf in by_leaf:
        return f"; did you mean {by_leaf[leaf]!r}?"
    owners = [name for name, config in MODEL_CONFIGS.items() if leaf in config.__dataclass_fields__]
    if key.startswith("model.") and owners:
        return f"; only model.architecture={owners[0]} has it"
    alike = difflib.get_close_matches(key, valid, 1)
    alike += [by_leaf[near] for near in difflib.get_close_matches(leaf, by_leaf, 1)]
    return f"; did you mean {alike[0]!r}?" if alike else f"; the sections are {', '.join(_sections())}"


def _sections() -> list[str]:
    return [entry.name for entry in dataclasses.fields(RunConfig) if entry.default_factory is not NO_DEFAULT]


def _read_with_bases(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(source, content) of a file's bases, oldest first, then of the file itself."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: is its own base; remove one of the `base` keys")
    content = read_yaml(path)
    base = content.pop("base", None)
    if base is None:
        return [(str(path), content)]
    return [*_read_with_bases(path.parent / str(base), (*seen, path.resolve())), (str(path), content)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The top level of a YAML file. Raises ConfigError where it is none."""
    try:
        content = copy.deepcopy(_parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except Exception as error:  # not only YAMLError: a month 13, a number of 5000 digits and more raise as they like
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold `key: value` pairs at the top level")
    for key, value in _flatten(content).items():
        if "\0" in str(value):
            raise ConfigError(f"{path}: {key} holds a NUL character, which no name of a file can; remove it")
    return {str(key): value for key, value in content.items()}


@functools.lru_cache(maxsize=8)  # all runs of a sweep have the same bases
def _parse_yaml(text: str) -> Any:
    _check_depth(text)
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def _check_resolved(path: Path) -> None:
    content = read_yaml(path)
    if "base" in content:
        raise ConfigError(f"{path}: names a base, which the record of a run never does; write its keys into the file")
    for key, value in _flatten(content).items():
        if "${" in str(value):
            raise ConfigError(f"{path}: {key} is {value!r}, but the record of a run refers to nothing; write its value")


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # written in Python, and does not recurse
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels deep")


def _read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not (key and equals):
            raise ConfigError(f"command line: {override!r} is no override; write section.key=value")
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"command line: {' '.join(str(error).split())}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's message without its trailing lines about internal types, headed by the full key."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing; set it in the file or as {error.full_key}=VALUE"
    message = str(error).splitlines()[0]
    return f"{error.full_key}: {message}" if error.full_key else message


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
