"""Whatever is done to the bytes of a checkpoint, a shard, a configuration, a tokenizer or an unfinished preparation:
read as before, or refused.

Refused means one error of ours that names the place and what helps: within seconds, in no more memory than such small
files need, and with nothing unpickled, run, or opened outside the directory. Bytes are changed as by accident (`stale`:
the checksums are of what was there before) and as by someone who can compute checksums (`sealed`), from whom only these
manners can be asked: what he wrote may be read.
"""

import builtins
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.loading import USER_ERRORS, load_checkpoint
from tests.train.tiny import prepare_tiny, seal_checkpoint, split_tensors, write_config
from train.checkpoint import checkpoint_path, file_of, index_of, latest_checkpoint, tensor_files
from train.config import load_run_config
from train.data import PackedLoader, TokenShards, file_sha256, fingerprint, validation_batches
from train.prepare import PrepareArguments, SplitWriter, prepare
from train.pretrain import main
from train.progress import read_progress
from train.tokenizer import load_tokenizer, tokenizer_hash

SECONDS = 10  # on a busy machine
ROOM = 256 << 20  # bytes of address space; the files have less than one million
STEPS = 3  # of the run whose checkpoint before the last is mutated
COPY, OUTSIDE = "copy", "outside"  # the directory that is mutated, and one beside it that is no reader's business

Mutation = Callable[[Path], object]  # of one file, or of a directory


# --- rules for readers ---


@dataclass(frozen=True)
class Refusal:
    """The message of an error of ours."""

    message: str


_watched: list[Path] = []  # the directory outside, while somebody reads


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open" and isinstance(arguments[0], str | Path):
        assert not Path(arguments[0]).resolve().is_relative_to(_watched[0]), f"opened {arguments[0]}"
    assert event not in ("pickle.find_class", "socket.connect", "subprocess.Popen", "os.system"), f"{event} {arguments}"


sys.addaudithook(_watch)  # there is no way to take it back


@pytest.fixture(autouse=True)
def nothing_is_unpickled_or_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("something was unpickled, or the user asked whether to run code")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(builtins, "input", refuse)
    monkeypatch.setattr("train.environment._commit", lambda: None)  # git is the one program that may be run
    monkeypatch.setenv("RUST_BACKTRACE", "0")  # of the tokenizers package; it takes much memory


@contextmanager
def rules(copy: Path) -> Iterator[None]:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, limits[1]))
    _watched.append(copy.with_name(OUTSIDE).resolve())
    start = time.monotonic()
    try:
        yield
    finally:
        _watched.clear()
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.monotonic() - start < SECONDS


def read(reader: Callable[[Path], Any], copy: Path) -> Any:
    """What the reader returns, or its `Refusal`."""
    with rules(copy):
        try:
            return reader(copy)
        except USER_ERRORS as error:
            assert str(copy) in str(error), error
            return Refusal(str(error))


def command(arguments: list[str], copy: Path, capsys: pytest.CaptureFixture[str]) -> Refusal | None:
    """What `train.pretrain` says of its arguments."""
    capsys.readouterr()
    with rules(copy):
        status = main(arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if status == 0:
        assert not errors
        return None
    assert status == 2 and len(errors) == 1 and str(copy) in errors[0], errors
    return Refusal(errors[0])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


# --- mutations of any file ---


def flip(path: Path) -> None:
    draw, content = random.Random(path.name), bytearray(path.read_bytes())
    for _ in range(3):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_early(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(path.name).randrange(min(len(content), 64))] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def double(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def garbage(path: Path) -> None:
    path.write_bytes(random.Random(path.name).randbytes(1000))  # not UTF-8, for one thing


def nest(path: Path) -> None:
    path.write_text("[" * 100_000)


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Path("/")))


def remove(path: Path) -> None:
    path.unlink()


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # whoever opens it waits for ever


def link_outside(path: Path) -> None:
    target = next(parent for parent in path.parents if parent.name == COPY).with_name(OUTSIDE) / path.name
    shutil.move(path, target)
    path.symlink_to(target)


ANY_FILE: list[Mutation] = [flip, flip_early, truncate, empty, double, garbage, nest, pickled, remove]
ANY_FILE += [make_directory, pipe, link_outside]


# --- mutations of what a file says ---


def write(name: str, content: str | bytes) -> Mutation:
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def edit_text(name: str, old: str, new: str) -> Mutation:
    def edit(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new, 1))

    return edit


def edit_json(name: str, keys: str, value: Any) -> Mutation:
    """Sets an entry, found by keys and indices with dots between; `...` removes it."""

    def edit(directory: Path) -> None:
        content = inner = json.loads((directory / name).read_text())
        *parents, last = (int(key) if key.isdecimal() else key for key in keys.split("."))
        for parent in parents:
            inner = inner[parent]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
        (directory / name).write_text(json.dumps(content))

    return edit


def edit_header(name: str, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Mutation:
    """Changes the JSON that opens a safetensors file: `change` gets all of it and the entry of its first tensor."""

    def edit(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        answer = change(header, next(entry for key, entry in header.items() if key != "__metadata__"))
        text = (answer if isinstance(answer, str) else json.dumps(header)).encode()
        (directory / name).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return edit


def edit_tensors(name: str, change: Callable[[dict[str, torch.Tensor], str], Any]) -> Mutation:
    """Writes a safetensors file anew, with a change to its tensors: `change` also gets the name of one of them."""

    def edit(directory: Path) -> None:
        tensors = load_file(directory / name)
        change(tensors, next(key for key, tensor in tensors.items() if tensor.shape != tensor.T.shape))
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in tensors.items()}, directory / name, {"format": "pt"}
        )

    return edit


def claim_length(name: str, length: int) -> Mutation:
    """A safetensors file whose header says of itself that it is so long."""
    return lambda directory: (directory / name).write_bytes(
        struct.pack("<Q", length) + (directory / name).read_bytes()[8:]
    )


def by_turns(names: list[str]) -> pytest.MarkDecorator:
    """Every file with a third of the mutations, every mutation with a third of the files.

    For readers that compare checksums before they look at anything: file and mutation do not depend on each other.
    """
    pairs = [(n, m) for i, n in enumerate(names) for j, m in enumerate(ANY_FILE) if (i + j) % 3 == 0]
    return pytest.mark.parametrize(("name", "mutate"), pairs, ids=lambda value: getattr(value, "__name__", value))


# --- checkpoints ---


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, and a run with the checkpoint before its last step; read once, so that all is imported."""
    directory = tmp_path_factory.mktemp("pristine")
    data = prepare_tiny(directory)
    config = write_config(
        directory / "config.yaml",
        "dlcm",
        data,
        directory / "run",
        schedule={"steps": STEPS, "warmup_steps": 0},
        checkpoint={"every": 1},
        evaluation={"every": 100, "max_tokens": 64},
    )
    assert main([str(config)]) == 0
    return directory


@pytest.fixture
def run_dir(pristine: Path, tmp_path: Path) -> Path:
    """A run of which nothing but a checkpoint is left."""
    (tmp_path / OUTSIDE).mkdir()
    kept = checkpoint_path(Path("run"), STEPS - 1)
    copy = tmp_path / COPY
    shutil.copytree(pristine / kept, copy / kept.relative_to("run"))
    return copy


def evaluated(run_dir: Path) -> dict[str, Any]:
    loaded = load_checkpoint(run_dir)
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.arange(60)[None]).logits
    state = loaded.state.step, loaded.state.tokens, tokenizer_hash(loaded.tokenizer)
    return {"weights": loaded.model.state_dict(), "logits": logits, "state": state, "run": loaded.run}


def outcomes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, Any]:
    """What evaluation reads of a run, and with what tensors its training ends."""
    evaluation = read(evaluated, run_dir)
    refusal = command(["--resume", str(run_dir)], run_dir, capsys)
    return evaluation, refusal or load_file(latest_checkpoint(run_dir) / "model.safetensors")


@pytest.fixture(scope="module")
def expected(pristine: Path) -> tuple[Any, Any]:
    final = checkpoint_path(pristine / "run", STEPS)
    shutil.move(final, pristine / "final")
    before = evaluated(pristine / "run")
    shutil.move(pristine / "final", final)
    return before, load_file(final / "model.safetensors")


CHECKPOINT_FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "run.yaml"]
CHECKPOINT_FILES += ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@by_turns([*CHECKPOINT_FILES, "checksums.json"])
def test_a_checkpoint_by_accident(name: str, mutate: Mutation, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    """Checksums see it, and say so."""
    checkpoint = latest_checkpoint(run_dir)
    mutate(checkpoint / name)
    for outcome in outcomes(run_dir, capsys):
        assert isinstance(outcome, Refusal) and str(checkpoint) in outcome.message and ";" in outcome.message
        assert name in outcome.message or name == "checksums.json"


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        (name, mutate)
        for name in CHECKPOINT_FILES
        for mutate in ([garbage, pipe, link_outside] if name == "generation_config.json" else ANY_FILE)
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_checkpoint_on_purpose(name: str, mutate: Mutation, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = latest_checkpoint(run_dir)
    mutate(checkpoint / name)
    seal_checkpoint(checkpoint)
    readable = mutate in (flip, flip_early) or name == "generation_config.json"  # which nothing reads
    for outcome in outcomes(run_dir, capsys):
        if isinstance(outcome, Refusal):
            assert str(checkpoint) in outcome.message
        else:
            assert readable or name.startswith("tokenizer") or name == "optimizer.safetensors"
    if mutate is link_outside:
        assert all(isinstance(outcome, Refusal) for outcome in outcomes(run_dir, capsys))


MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
DEEP = "[" * 100_000
HUGE = "1" * 5000  # digits; Python refuses to read them
FAR = [2**60, 2**60 + 4]


def both_files(edit: Callable[..., Mutation], *arguments: Any) -> dict[str, Mutation]:
    return {name.partition(".")[0]: edit(name, *arguments) for name in (MODEL, OPTIMIZER)}


TENSORS: dict[str, dict[str, Mutation]] = {
    "claims-2^60-bytes": both_files(claim_length, 2**60),
    "claims-2^64-1-bytes": both_files(claim_length, 2**64 - 1),
    "claims-90-MB": both_files(claim_length, 90_000_000),
    "claims-nothing": both_files(claim_length, 0),
    "offsets-overlap": both_files(edit_header, lambda header, first: first.update(data_offsets=[0, 8])),
    "offsets-beyond": both_files(edit_header, lambda header, first: first.update(data_offsets=FAR)),
    "offsets-negative": both_files(edit_header, lambda header, first: first.update(data_offsets=[-4, 0])),
    "offsets-backwards": both_files(edit_header, lambda header, first: first["data_offsets"].reverse()),
    "shape-2^40": both_files(edit_header, lambda header, first: first.update(shape=[2**40])),
    "shape-overflows": both_files(edit_header, lambda header, first: first.update(shape=[2**32, 2**32])),
    "dtype-unknown": both_files(edit_header, lambda header, first: first.update(dtype="PICKLE")),
    "dtype-relabelled": both_files(edit_header, lambda header, first: first.update(dtype="I32")),
    "header-nests": both_files(edit_header, lambda header, first: '{"a":' * 100_000),
    "header-twice": both_files(edit_header, lambda header, first: json.dumps(header)[:-1] + ',"a":1,"a":2}'),
    "header-is-a-list": both_files(edit_header, lambda header, first: "[]"),
    "shape-transposed": both_files(edit_tensors, lambda tensors, one: tensors.update({one: tensors[one].T})),
    "shape-flat": both_files(edit_tensors, lambda tensors, one: tensors.update({one: tensors[one].flatten()})),
    "missing": both_files(edit_tensors, lambda tensors, one: tensors.pop(one)),
    "unknown": both_files(edit_tensors, lambda tensors, one: tensors.update({"exp_avg.other": torch.ones(3)})),
    "renamed": both_files(edit_tensors, lambda tensors, one: tensors.update({one + "x": tensors.pop(one)})),
    "none": both_files(edit_tensors, lambda tensors, one: tensors.clear()),
    **{
        f"dtype-{dtype}": both_files(
            edit_tensors,
            lambda tensors, one, dtype=dtype: tensors.update({one: tensors[one].to(getattr(torch, dtype))}),
        )
        for dtype in ("float64", "float16", "bfloat16", "int64", "bool")
    },
}


@pytest.mark.parametrize("file", ["model", "optimizer"])
@pytest.mark.parametrize("kind", TENSORS)
def test_hostile_tensors(kind: str, file: str, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = latest_checkpoint(run_dir)
    TENSORS[kind][file](checkpoint)
    seal_checkpoint(checkpoint)
    evaluation, resumption = outcomes(run_dir, capsys)
    for outcome in (evaluation, resumption) if file == "model" else (resumption,):
        assert isinstance(outcome, Refusal) and f"{file}.safetensors" in outcome.message and ";" in outcome.message
    assert file == "model" or not isinstance(evaluation, Refusal)


# --- checkpoints of several files ---


@pytest.fixture
def split_run_dir(run_dir: Path) -> Path:
    """The run, as if two processes had written its checkpoint."""
    split_tensors(latest_checkpoint(run_dir))
    return run_dir


def test_several_files_are_one(split_run_dir: Path, expected: tuple[Any, Any], capsys: pytest.CaptureFixture[str]):
    assert len(tensor_files(latest_checkpoint(split_run_dir), "model")) == 2
    assert same(dict(enumerate(outcomes(split_run_dir, capsys))), dict(enumerate(expected)))


@by_turns([file_of("model", 0, 2), file_of("optimizer", 1, 2), index_of("model")])
def test_several_files_by_accident(
    name: str, mutate: Mutation, split_run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = latest_checkpoint(split_run_dir)
    mutate(checkpoint / name)
    for outcome in outcomes(split_run_dir, capsys):
        assert isinstance(outcome, Refusal) and name in outcome.message and ";" in outcome.message


FIRST, SECOND, INDEX = file_of("model", 0, 2), file_of("model", 1, 2), index_of("model")


def points_to(value: Any) -> Mutation:
    """The index says that the embedding is in this file."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / INDEX).read_text())
        content["weight_map"]["embed_tokens.weight"] = value
        (directory / INDEX).write_text(json.dumps(content))

    return edit


def only_first(directory: Path) -> None:
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"] = {name: file for name, file in content["weight_map"].items() if file == FIRST}
    (directory / INDEX).write_text(json.dumps(content))


def also_in_second(directory: Path) -> None:
    tensors = load_file(directory / FIRST)
    save_file(load_file(directory / SECOND) | dict(list(tensors.items())[:1]), directory / SECOND, {"format": "pt"})


def link_directory(directory: Path) -> None:
    shutil.move(directory / SECOND, directory.parents[2] / OUTSIDE / SECOND)
    (directory / SECOND).symlink_to(directory.parents[2] / OUTSIDE / SECOND)


SEVERAL: dict[str, Mutation] = {
    "index-nests": write(INDEX, DEEP),
    "index-is-a-list": write(INDEX, "[]"),
    "index-is-empty": write(INDEX, "{}"),
    "index-map-is-a-list": write(INDEX, '{"weight_map": []}'),
    "index-of-nothing": write(INDEX, '{"weight_map": {}}'),
    "index-outside": points_to(f"../../../{OUTSIDE}/model.safetensors"),
    "index-absolute": points_to("/etc/passwd"),
    "index-pickle": points_to("pytorch_model.bin"),
    "index-other-kind": points_to(file_of("optimizer", 0, 2)),
    "index-number": points_to(1),
    "index-list": points_to([FIRST]),
    "index-missing-file": points_to(file_of("model", 2, 3)),
    "index-line": points_to(FIRST + "\n"),
    "index-digits": points_to("model-٠٠٠٠١-of-00002.safetensors"),
    "index-lacks-a-file": only_first,
    "file-missing": lambda directory: (directory / SECOND).unlink(),
    "file-outside": link_directory,
    "file-twice": lambda directory: shutil.copy(directory / FIRST, directory / SECOND),
    "tensor-twice": also_in_second,
    "file-claims-2^60-bytes": claim_length(SECOND, 2**60),
    "file-offsets-beyond": edit_header(SECOND, lambda header, first: first.update(data_offsets=FAR)),
    "file-lacks": edit_tensors(SECOND, lambda tensors, one: tensors.pop(one)),
    "file-shape": edit_tensors(SECOND, lambda tensors, one: tensors.update({one: tensors[one].T})),
    "file-dtype": edit_tensors(SECOND, lambda tensors, one: tensors.update({one: tensors[one].half()})),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_hostile_several_files(kind: str, split_run_dir: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = latest_checkpoint(split_run_dir)
    SEVERAL[kind](checkpoint)
    seal_checkpoint(checkpoint)
    for outcome in outcomes(split_run_dir, capsys):
        assert isinstance(outcome, Refusal) and "model" in outcome.message and ";" in outcome.message


def test_one_file_beside_several_is_refused(split_run_dir: Path, pristine: Path, capsys: pytest.CaptureFixture[str]):
    """transformers would read it, and it is under no checksum."""
    checkpoint = latest_checkpoint(split_run_dir)
    shutil.copy(latest_checkpoint(pristine / "run") / MODEL, checkpoint / MODEL)
    for outcome in outcomes(split_run_dir, capsys):
        assert isinstance(outcome, Refusal) and f"checksums.json lacks {MODEL}" in outcome.message


def state(key: str, value: Any) -> Mutation:
    return edit_json("state.json", key, value)


def config(key: str, value: Any) -> Mutation:
    return edit_json("config.json", key, value)


REFUSED: dict[str, Mutation] = {
    "state-nests": write("state.json", DEEP),
    "state-is-a-list": write("state.json", "[]"),
    "state-huge-number": edit_text("state.json", '"skipped": 0', f'"skipped": {HUGE}'),
    "state-step-of-another": state("step", STEPS),
    "state-step-text": state("step", "2"),
    "state-step-negative": state("step", -1),
    "state-step-10^30": state("step", 10**30),
    "state-step-fraction": state("step", 2.0),
    "state-step-true": state("bad_in_a_row", True),
    "state-nan": state("flops", float("nan")),
    "state-infinity": state("flops", float("inf")),
    "state-lacks": state("tokens", ...),
    "state-twice": edit_text("state.json", '"skipped": 0', '"skipped": 0, "skipped": null'),
    "config-nests": write("config.json", DEEP),
    "config-is-a-list": write("config.json", "[]"),
    "config-other-model": config("model_type", "gpt2"),
    "config-no-model": config("model_type", ...),
    "config-model-list": config("model_type", ["dlcm"]),
    "config-local-code": config("auto_map", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
    "config-remote-code": config("auto_map", {"AutoModelForCausalLM": "who/repository--code.Model"}),
    "config-pickle": config("transformers_weights", "pytorch_model.bin"),
    "config-weights-outside": config("transformers_weights", f"../../../{OUTSIDE}/model.safetensors"),
    "config-quantised": config("quantization_config", {"quant_method": "gptq"}),
    "config-kernel": config("attn_implementation", "who/kernel"),
    "config-private-kernel": config("_attn_implementation", "who/kernel"),
    "config-width-2^40": config("d_token", 2**40),
    "config-a-billion-layers": config("encoder_layers", 10**9),
    "config-vocabulary-10^12": config("vocab_size", 10**12),
    "config-one-layer-more": config("backbone_layers", 2),
    "config-nan": config("target_ratio", float("nan")),
    "config-huge-number": edit_text("config.json", '"d_token": 32', f'"d_token": {HUGE}'),
    "config-text": config("d_token", "32"),
    "config-heads-0": config("token_heads", 0),
    "config-unknown": config("d_tokens", 32),
    "config-other-bos": config("bos_token_id", 10**30),
    "run-nests": write("run.yaml", DEEP),
    "run-huge-number": edit_text("run.yaml", "seed: 1", f"seed: {HUGE}"),
    "run-nan": edit_text("run.yaml", "weight_decay: 0.1", "weight_decay: .nan"),
    "run-code": edit_text("run.yaml", "seed: 1", "seed: !!python/object/apply:os.getpid []"),
    "run-nul": edit_text("run.yaml", "seed: 1", 'seed: "\\0"'),
    "run-unknown": edit_text("run.yaml", "seed: 1", "sed: 1"),
}
REFUSED_BY_EVALUATION: dict[str, Mutation] = {  # resuming reads the tokenizer beside the data instead
    "run-base-outside": edit_text("run.yaml", "output:", f"base: ../../../{OUTSIDE}/run.yaml\noutput:"),
    "run-variable": edit_text("run.yaml", "output: ", "output: ${oc.env:HOME}"),
    "tokenizer-of-other-text": edit_text("tokenizer.json", '"!": 33', '"!": 34'),
    "tokenizer-huge-id": edit_json("tokenizer.json", "model.vocab.a", 2**32 - 1),
    "tokenizer-larger-than-the-model": edit_json("tokenizer.json", "model.vocab.new", 5000),
    "tokenizer-other-bos": edit_json("tokenizer_config.json", "bos_token", "a"),
    "tokenizer-no-bos": edit_json("tokenizer_config.json", "bos_token", None),
    "tokenizer-token-added": write("added_tokens.json", '{"new": 258}'),
    "tokenizer-special-tokens": write("special_tokens_map.json", '{"bos_token": "a"}'),
}
PICKLE = pickle.dumps(Path("/"))
HARMLESS: dict[str, Mutation] = {
    "config-dtype": config("dtype", "float16"),
    "config-dtype-not-of-torch": config("dtype", "load"),
    "config-class": config("architectures", ["GPT2LMHeadModel"]),
    "beside-pickled-weights": write("pytorch_model.bin", PICKLE),
    "beside-pickled-optimizer": write("optimizer.pt", PICKLE),
    "beside-pickled-arguments": write("training_args.bin", PICKLE),
    "beside-index": write("model.safetensors.index.json", '{"weight_map": {"lm_head.weight": "../../../outside/a"}}'),
    "beside-adapter": write("adapter_config.json", '{"base_model_name_or_path": "who/model", "peft_type": "LORA"}'),
    "beside-code": write("modeling_dlcm.py", "raise AssertionError"),
    "tokenizer-local-code": edit_json("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["code.T", None]}),
    "tokenizer-class": edit_json("tokenizer_config.json", "tokenizer_class", "Other"),
    "tokenizer-outside": edit_json("tokenizer_config.json", "tokenizer_file", f"../../../{OUTSIDE}/tokenizer.json"),
    "state-more-than-it-needs": state("more", [1e999, None, {}]),
    "state-same-twice": edit_text("state.json", '"skipped": 0', '"skipped": null, "skipped": 0'),
}


@pytest.mark.parametrize("kind", [*REFUSED, *REFUSED_BY_EVALUATION])
def test_a_hostile_checkpoint(kind: str, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    checkpoint = latest_checkpoint(run_dir)
    (REFUSED | REFUSED_BY_EVALUATION)[kind](checkpoint)
    seal_checkpoint(checkpoint)
    if kind in REFUSED:
        assert all(isinstance(outcome, Refusal) for outcome in outcomes(run_dir, capsys))
    else:
        assert isinstance(read(evaluated, run_dir), Refusal)


@pytest.mark.parametrize(
    ("key", "number"),
    [("concept_ffn", 2**40), ("vocab_size", 10**12), ("encoder_layers", 10**9), ("backbone_layers", 2)],
)
def test_a_model_that_its_tensors_do_not_make_is_never_built(
    key: str, number: int, run_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """Though the run and the model agree on it."""
    checkpoint = latest_checkpoint(run_dir)
    config(key, number)(checkpoint)
    text = (checkpoint / "run.yaml").read_text()
    (checkpoint / "run.yaml").write_text(re.sub(rf"{key}: \d+", f"{key}: {number}", text, count=1))
    assert f"{key}: {number}" in (checkpoint / "run.yaml").read_text()
    seal_checkpoint(checkpoint)
    for outcome in outcomes(run_dir, capsys):
        assert isinstance(outcome, Refusal) and "parameters, model.safetensors of" in outcome.message


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_changes_nothing(kind: str, run_dir: Path, expected: tuple[Any, Any], capsys: pytest.CaptureFixture[str]):
    checkpoint = latest_checkpoint(run_dir)
    HARMLESS[kind](checkpoint)
    seal_checkpoint(checkpoint)
    assert same(dict(enumerate(outcomes(run_dir, capsys))), dict(enumerate(expected)))


@pytest.mark.parametrize("kind", [kind for kind in HARMLESS if kind.startswith("beside")])
def test_unlisted_files_change_nothing(kind: str, run_dir: Path, expected: tuple[Any, Any]):
    HARMLESS[kind](latest_checkpoint(run_dir))
    assert same(read(evaluated, run_dir), expected[0])


@pytest.mark.parametrize(
    "names",
    [
        {"../step_00000001/state.json": "0"},
        {"/etc/passwd": "0"},
        {"..": "0"},
        {"": "0"},
        {"a" * 5000: "0"},
        {"é" * 200: "0"},
        {"a\0b": "0"},
        {"\ud800": "0"},
        {"state.json": None},
        {"state.json": ["0"]},
        {"state.json": 0},
    ],
    ids=repr,
)
def test_hostile_checksums(names: dict[str, Any], run_dir: Path, capsys: pytest.CaptureFixture[str]):
    path = latest_checkpoint(run_dir) / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    assert all(isinstance(outcome, Refusal) and ";" in outcome.message for outcome in outcomes(run_dir, capsys))


# --- prepared data ---


@pytest.fixture
def data(pristine: Path, tmp_path: Path) -> Path:
    (tmp_path / OUTSIDE).mkdir()
    return Path(shutil.copytree(pristine / "prepared", tmp_path / COPY))


def seal_data(directory: Path) -> None:
    """Makes the manifest say what is on disk, as far as that is of any shape."""
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["token_bytes_sha256"] = sha256_if_file(directory / "token_bytes.npy")
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            for name, sha256, count, size in (
                ("file", "sha256", "tokens", 2),
                ("index_file", "index_sha256", "documents", 8),
            ):
                file = directory / shard[name]
                shard[sha256], shard[count] = sha256_if_file(file), file.stat().st_size // size if file.is_file() else 1
    path.write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))


def sha256_if_file(path: Path) -> str:
    return file_sha256(path) if path.is_file() else ""


def batches(directory: Path, verify: bool = True) -> dict[int, Any]:
    """Every batch of an epoch, as the trainer comes by them, and of the validation split."""
    train, validation = (TokenShards(directory, split, verify) for split in ("train", "validation"))
    train.check_tokenizer(load_tokenizer(str(directory)))
    loader = PackedLoader(train, 32, 8, 0)
    found = [loader.batch(step) for step in range(loader.windows_per_epoch[0] // 8 + 1)]
    found += validation_batches(validation, 32, 8, None)
    for batch in found:
        assert 0 <= int(batch.input_ids.min()) <= int(batch.input_ids.max()) < train.vocab_size
        assert int(batch.cu_seqlens[0]) == 0 and int(batch.cu_seqlens[-1]) == len(batch.input_ids)
        assert batch.cu_seqlens.diff().min() > 0
    return {
        index: {"ids": b.input_ids, "starts": b.cu_seqlens, "bytes": b.target_bytes} for index, b in enumerate(found)
    }


@pytest.fixture(scope="module")
def expected_batches(pristine: Path) -> dict[int, Any]:
    return batches(pristine / "prepared")


SHARD_FILES = ["train/00000.bin", "train/00000.idx", "validation/00000.bin", "validation/00000.idx", "token_bytes.npy"]
DATA_FILES = [*SHARD_FILES, "manifest.json", "tokenizer.json", "tokenizer_config.json"]


@by_turns(DATA_FILES)
def test_data_by_accident(name: str, mutate: Mutation, data: Path, expected_batches: dict[int, Any]):
    mutate(data / name)
    outcome = read(batches, data)
    if mutate is link_outside and name.startswith("tokenizer"):  # as in the hub's cache; its hash is checked
        return
    if not isinstance(outcome, Refusal):
        assert same(outcome, expected_batches) and name == "tokenizer_config.json"
    else:
        assert name in outcome.message or "tokenizer" in outcome.message or "no prepared data here" in outcome.message


@pytest.mark.parametrize("name", ["train/documents.jsonl", "validation/documents.jsonl"])
@pytest.mark.parametrize("mutate", ANY_FILE, ids=lambda mutate: mutate.__name__)
def test_training_does_not_read_the_list_of_documents(
    name: str, mutate: Mutation, data: Path, expected_batches: dict[int, Any]
):
    mutate(data / name)
    assert same(read(batches, data), expected_batches)


@pytest.mark.parametrize("mutate", ANY_FILE, ids=lambda mutate: mutate.__name__)
@pytest.mark.parametrize("name", SHARD_FILES)
def test_data_on_purpose(name: str, mutate: Mutation, data: Path):
    mutate(data / name)
    seal_data(data)
    for verify in (True, False):
        outcome = read(lambda copy, verify=verify: batches(copy, verify), data)
        if mutate in (remove, make_directory, pipe, link_outside, empty) or name == "token_bytes.npy":
            assert isinstance(outcome, Refusal) or mutate in (flip, double)
        if isinstance(outcome, Refusal):
            assert str(data) in outcome.message and ";" in outcome.message


def index(change: Callable[[np.ndarray], np.ndarray]) -> Mutation:
    def edit(directory: Path) -> None:
        path = directory / "train/00000.idx"
        change(np.fromfile(path, "<u8")).astype("<u8").tofile(path)

    return edit


def header(text: str, version: int = 1) -> Mutation:
    """A .npy file with as many bytes as before, whose header says what it likes."""
    head = text.encode().ljust(117) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(head))
    return write("token_bytes.npy", b"\x93NUMPY" + bytes([version, 0]) + size + head + bytes(4 * 258))


def array(values: np.ndarray) -> Mutation:
    return lambda directory: np.save(directory / "token_bytes.npy", values)


def zipped(directory: Path) -> None:
    np.savez(directory / "x.npz", a=np.ones(258, dtype=np.float32))
    (directory / "x.npz").rename(directory / "token_bytes.npy")


def one_token(directory: Path) -> None:
    (directory / "validation/00000.bin").write_bytes(b"a\0")
    (directory / "validation/00000.idx").write_bytes(bytes(8))


def link_directory(directory: Path) -> None:
    target = directory.with_name(OUTSIDE) / "train"
    shutil.move(directory / "train", target)
    (directory / "train").symlink_to(target)


def shape(words: str, dtype: str = "'<f4'") -> Mutation:
    return header(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {words}, }}")


HOSTILE_DATA: dict[str, Mutation] = {
    "index-backwards": index(lambda starts: starts[::-1]),
    "index-all-0": index(lambda starts: starts * 0),
    "index-rotated": index(lambda starts: np.roll(starts, 5)),
    "index-beyond": index(lambda starts: starts + 2**20),
    "index-2^63": index(lambda starts: starts + np.uint64(2**63)),
    "index-2^64-1": index(lambda starts: np.full_like(starts, 2**64 - 1)),
    "index-last-beyond": index(lambda starts: np.append(starts, 2**40)),
    "ids-beyond": write("train/00000.bin", b"\xff" * 6000),
    "ids-of-uint32": edit_json("manifest.json", "dtype", "uint32"),
    "shape-2^60": shape("(1152921504606846976,)"),
    "shape-2^40": shape("(1099511627776,)"),
    "shape-overflows": shape("(4294967296, 4294967296)"),
    "shape-2^64": shape("(18446744073709551616,)"),
    "shape-negative": shape("(-1,)"),
    "shape-none": shape("()"),
    "shape-other": shape("(257,)"),
    "shape-two": shape("(258, 1)"),
    "dtype-object": shape("(258,)", "'|O'"),
    "dtype-float64": shape("(129,)", "'<f8'"),
    "dtype-int32": shape("(258,)", "'<i4'"),
    "dtype-big-endian": shape("(258,)", "'>f4'"),
    "dtype-fields": shape("(258,)", "[('a', '<f4')]"),
    "header-open": header("{'descr': "),
    "header-code": header("__import__('os').getpid()"),
    "header-nests": header("(" * 60_000, version=2),
    "header-version": header("{}", version=9),
    "bytes-nan": array(np.full(258, np.nan, dtype=np.float32)),
    "bytes-infinite": array(np.full(258, np.inf, dtype=np.float32)),
    "bytes-negative": array(np.full(258, -1, dtype=np.float32)),
    "bytes-all-0": array(np.zeros(258, dtype=np.float32)),
    "bytes-zipped": zipped,
    "nothing-to-predict": one_token,
    "directory-linked": link_directory,
    "token-id-missing": edit_json("tokenizer_config.json", "bos_token", None),
    "token-id-other": edit_json("tokenizer_config.json", "eos_token", "a"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", HOSTILE_DATA)
def test_hostile_data(kind: str, verify: bool, data: Path):
    HOSTILE_DATA[kind](data)
    seal_data(data)
    outcome = read(lambda copy: batches(copy, verify), data)
    assert isinstance(outcome, Refusal) and ";" in outcome.message


SHARD = "splits.train.shards.0"
MANIFESTS: list[tuple[str, Any]] = [
    ("tokenizer.vocab_size", 10**18),
    ("tokenizer.vocab_size", -1),
    ("tokenizer.vocab_size", True),
    ("tokenizer.vocab_size", 10),
    ("tokenizer.vocab_size", float("nan")),
    ("tokenizer.bos_token_id", 10**30),
    ("tokenizer.hash", "0"),
    ("tokenizer", []),
    (f"{SHARD}.file", "../../etc/passwd"),
    (f"{SHARD}.file", "/etc/passwd"),
    (f"{SHARD}.index_file", f"../{OUTSIDE}/00000.idx"),
    (f"{SHARD}.tokens", 10**30),
    (f"{SHARD}.tokens", 2**62),
    (f"{SHARD}.tokens", True),
    (f"{SHARD}.documents", 2**61),
    (f"{SHARD}.sha256", 5),
    (SHARD, []),
    ("splits.train.shards", []),
    ("splits.validation.shards", []),
    ("splits.validation", ...),
    ("splits", {}),
    ("dtype", "object"),
    ("token_bytes", ...),
    ("arguments", 5),
    ("format_version", 1e999),
]


@pytest.mark.parametrize(("keys", "value"), MANIFESTS, ids=lambda value: str(value))
def test_a_hostile_manifest(keys: str, value: Any, data: Path, capsys: pytest.CaptureFixture[str]):
    edit_json("manifest.json", keys, value)(data)
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    with suppress(KeyError, TypeError):  # some have no fingerprint
        path.write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))
    outcome = read(batches, data)
    assert isinstance(outcome, Refusal) and ";" in outcome.message
    config = write_config(data.parent / "config.yaml", "dlcm", data, data.parent / "run")
    assert command([str(config)], data, capsys) is not None


@pytest.mark.parametrize(
    "content",
    [DEEP, f'{{"format_version": {HUGE}}}', '{"format_version": NaN}', "\xff", '{"a": 1, "a": 2}', "null", ""],
    ids=lambda content: content[:20],
)
def test_a_manifest_of_other_content(content: str, data: Path):
    (data / "manifest.json").write_bytes(content.encode("latin-1"))
    assert isinstance(read(batches, data), Refusal)


# --- unfinished preparations ---


def command_in(directory: Path) -> PrepareArguments:
    return PrepareArguments(
        inputs=(str(directory.with_name("tiny.jsonl")),),
        output=directory / "out",
        tokenizer="bpe:300",
        validation_fraction=0.2,
        shard_tokens=1500,
        workers=1,
    )


def prepared_anew(directory: Path) -> dict[str, bytes]:
    """What the same command comes to."""
    prepare(command_in(directory))
    files = [path for path in (directory / "out").rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preparation that was interrupted, and what it would have come to, in `whole`."""
    directory = tmp_path_factory.mktemp("begun")
    prepare_tiny(directory)
    (directory / "whole").mkdir()
    prepared_anew(directory / "whole")
    add, calls = SplitWriter.add, 0

    def interrupted(self: SplitWriter, *given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 18:
            raise KeyboardInterrupt
        add(self, *given)

    (directory / COPY).mkdir()
    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(SplitWriter, "add", interrupted)
        prepare(command_in(directory / COPY))
    progress = read_progress(directory / COPY / "out.tmp")
    assert progress is not None and progress.splits["validation"]["tokens"] and progress.splits["train"]["shards"]
    assert len(progress.splits["validation"]["shards"]) == 1
    return directory


@pytest.fixture
def unfinished(begun: Path, tmp_path: Path) -> Path:
    (tmp_path / OUTSIDE).mkdir()
    shutil.copy(begun / "tiny.jsonl", tmp_path)
    return Path(shutil.copytree(begun / COPY, tmp_path / COPY))


def whole(begun: Path) -> dict[str, bytes]:
    files = [path for path in (begun / "whole" / "out").rglob("*") if path.is_file()]
    return {str(path.relative_to(begun / "whole")): path.read_bytes() for path in files}


UNFINISHED = ["progress.json", "tokenizer.json", "tokenizer_config.json", "train/documents.jsonl", "train/00000.bin"]
UNFINISHED += ["validation/00001.bin", "validation/00001.idx", "validation/documents.jsonl"]  # of an open shard


@by_turns(UNFINISHED)
def test_an_unfinished_preparation_by_accident(name: str, mutate: Mutation, unfinished: Path, begun: Path):
    mutate(unfinished / "out.tmp" / name)
    outcome = read(prepared_anew, unfinished)
    if isinstance(outcome, Refusal):
        return
    differing = {name for name, content in whole(begun).items() if outcome.get(name) != content}
    if name == "progress.json":
        assert mutate is remove and not differing  # then it begins again
    elif name == "train/00000.bin":
        assert differing and isinstance(read(lambda copy: TokenShards(copy / "out", "train"), unfinished), Refusal)
    else:
        # what lies behind what counts is cut off
        assert not differing or (name.startswith("tokenizer") and differing <= {f"out/{name}"})


PROGRESS: list[tuple[str, Any]] = [
    ("place.row", -1),
    ("place.row", 10**30),
    ("place.row", "1"),
    ("place.source", 1),
    ("place.source", 2**61),
    ("place.state", [1]),
    ("place.more", 1),
    ("measure.tokens", 1.5),
    ("empty", None),
    ("tokenizer", ["0", 1, 2]),
    ("request", {}),
    ("splits", {}),
    ("splits.train", []),
    ("splits.train.tokens", 2**61),
    ("splits.train.documents", 10**6),
    ("splits.train.listing_bytes", 10**9),
    ("splits.validation.sha256", "0"),
    ("splits.train.shards.0.file", f"../../../{OUTSIDE}/x"),
    ("splits.train.shards.0.tokens", 5),
    ("splits.test", {}),
]


@pytest.mark.parametrize(("keys", "value"), PROGRESS, ids=lambda value: str(value))
def test_a_hostile_progress(keys: str, value: Any, unfinished: Path):
    """Its own checksum fits."""
    staging = unfinished / "out.tmp"
    path = staging / "progress.json"
    path.write_text(json.loads(path.read_text())["progress"])
    edit_json(path.name, keys, value)(staging)
    content = path.read_text()
    path.write_text(json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "progress": content}))
    outcome = read(prepared_anew, unfinished)
    assert isinstance(outcome, Refusal) and ";" in outcome.message


@pytest.mark.parametrize("content", [DEEP, HUGE, "null", '{"sha256": "", "progress": 5}', "\xff"], ids=lambda c: c[:9])
def test_a_progress_of_other_content(content: str, unfinished: Path):
    (unfinished / "out.tmp" / "progress.json").write_bytes(content.encode("latin-1"))
    outcome = read(prepared_anew, unfinished)
    assert isinstance(outcome, Refusal) and "progress.json" in outcome.message


# --- configurations ---


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / OUTSIDE).mkdir()
    return write_config(tmp_path / COPY / "config.yaml", "dlcm", Path("data"), Path("run"))


def loaded_config(directory: Path) -> Any:
    return load_run_config(directory / "config.yaml")


@pytest.mark.parametrize("seed", range(30))
def test_a_configuration_by_accident(seed: int, config_file: Path):
    """No checksum guards it, and what remains well-formed is read."""
    draw, content = random.Random(seed), bytearray(config_file.read_bytes())
    for _ in range(draw.randint(1, 4)):
        position = draw.randrange(len(content))
        content[position] = draw.choice([content[position] ^ 1 << draw.randrange(8), *b"\0\n:{[&*!%#'\"$"])
    config_file.write_bytes(content if seed % 3 else content[: draw.randrange(len(content))])
    read(loaded_config, config_file.parent)


def yaml(old: str, new: str) -> Mutation:
    return edit_text("config.yaml", old, new)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGURATIONS: dict[str, Mutation] = {
    "nests": write("config.yaml", DEEP),
    "nests-objects": write("config.yaml", "{a: " * 50_000),
    "nests-blocks": write("config.yaml", "- " * 50_000),
    "billion-laughs": write("config.yaml", LAUGHS),
    "number-of-5000-digits": yaml("seed: 1", f"seed: {HUGE}"),
    "number-2^63": yaml("seed: 1", f"seed: {2**63}"),
    "nan": yaml("lr_other: 0.003", "lr_other: .nan"),
    "infinity": yaml("lr_other: 0.003", "lr_other: .inf"),
    "twice": yaml("seed: 1", "seed: 1\nseed: 2"),
    "code": write("config.yaml", "!!python/object/apply:os.system [true]"),
    "object": yaml("seed: 1", "seed: !!python/object/apply:os.getpid []"),
    "path": yaml("seed: 1", "seed: !!python/object/apply:pathlib.PosixPath [/etc]"),
    "timestamp": yaml("seed: 1", "seed: !!timestamp x"),
    "bool": yaml("seed: 1", "seed: !!bool x"),
    "float": yaml("seed: 1", "seed: !!float x"),
    "set": yaml("seed: 1", "seed: !!set {a}"),
    "key-null": yaml("seed: 1", "~: 1"),
    "key-list": yaml("seed: 1", "? [a]\n: 1"),
    "variable": yaml("seed: 1", "seed: ${oc.env:HOME}"),
    "variable-of-itself": yaml("seed: 1", "seed: ${seed}"),
    "variable-nests": yaml("seed: 1", f"seed: {'${a' * 3000}"),
    "base-itself": yaml("seed: 1", "base: config.yaml"),
    "base-directory": yaml("seed: 1", "base: ."),
    "base-list": yaml("seed: 1", "base: [a]"),
    "base-nul": yaml("seed: 1", 'base: "a\\0b"'),
    "base-long": yaml("seed: 1", f"base: {'a' * 5000}"),
    "output-nul": yaml("output: run", 'output: "a\\0b"'),
    "architecture-list": yaml("architecture: dlcm", "architecture: [dlcm]"),
    "architecture-object": yaml("architecture: dlcm", "architecture: {dlcm: 1}"),
    "documents": yaml("seed: 1", "seed: 1\n---\na: 1"),
    "scalar": write("config.yaml", "5"),
    "list": write("config.yaml", "[1]"),
    "nul": write("config.yaml", b"seed: 1\0"),
    "utf-16": write("config.yaml", "seed: 1".encode("utf-16")),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_hostile_configuration(kind: str, config_file: Path):
    CONFIGURATIONS[kind](config_file.parent)
    assert isinstance(read(loaded_config, config_file.parent), Refusal)


# --- tokenizers ---


def loaded_tokenizer(directory: Path) -> list[int]:
    tokenizer = load_tokenizer(str(directory))
    return [tokenizer_hash(tokenizer), tokenizer.bos_token_id, *tokenizer("naïve 北京")["input_ids"]]


NORMALIZER: dict[str, Any] = {"type": "Replace", "pattern": {"Regex": "(" * 50_000}, "content": "x"}
TOKENIZERS: dict[str, Mutation] = {
    "panics": edit_json("tokenizer.json", "normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "regex-nests": edit_json("tokenizer.json", "normalizer", NORMALIZER),
    "id-2^32": edit_json("tokenizer.json", "model.vocab.a", 2**32),
    "id-negative": edit_json("tokenizer.json", "model.vocab.a", -1),
    "id-fraction": edit_json("tokenizer.json", "model.vocab.a", 1.5),
    "merge-unknown": edit_json("tokenizer.json", "model.merges", [["zz", "yy"]]),
    "merge-of-three": edit_json("tokenizer.json", "model.merges", ["a b c"]),
    "model-unknown": edit_json("tokenizer.json", "model.type", "Other"),
    "model-missing": edit_json("tokenizer.json", "model", ...),
    "dropout-nan": edit_json("tokenizer.json", "model.dropout", float("nan")),
    "version": edit_json("tokenizer.json", "version", "9.9"),
    "truncates-to-0": edit_json(
        "tokenizer.json",
        "truncation",
        {"max_length": 0, "strategy": "LongestFirst", "stride": 5, "direction": "Right"},
    ),
    "bos-number": edit_json("tokenizer_config.json", "bos_token", 5),
    "bos-object": edit_json("tokenizer_config.json", "bos_token", {"a": 1}),
    "added-tokens": edit_json("tokenizer_config.json", "added_tokens_decoder", {"x": 1}),
    "added-tokens-nest": write("added_tokens.json", DEEP),
    "config-nests": write("tokenizer_config.json", DEEP),
    "config-huge-number": write("tokenizer_config.json", f'{{"model_max_length": {HUGE}}}'),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_hostile_tokenizer(kind: str, data: Path):
    TOKENIZERS[kind](data)
    assert isinstance(read(loaded_tokenizer, data), Refusal)


@pytest.mark.parametrize("seed", range(20))
def test_a_tokenizer_by_accident(seed: int, data: Path):
    """Alone it has no checksum: what can be read is another tokenizer, which data and checkpoints do not take."""
    draw, path = random.Random(seed), data / "tokenizer.json"
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(7)
    path.write_bytes(content)
    read(loaded_tokenizer, data)
