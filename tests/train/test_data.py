"""Batches cover the stream exactly, depend on nothing but their coordinates, and damaged shards are refused."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import DataError, PackedBatch, PackedLoader, TokenShards, fingerprint, validation_batches
from train.prepare import PrepareArguments, main, prepare
from train.tokenizer import byte_tokenizer, train_bpe

DOCUMENTS = 60
BOS_ID, EOS_ID = 256, 257


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand bytes in documents of 1 to 200 characters, spread over several shards."""
    directory = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    rows = [
        json.dumps({"text": f"{number}" + "".join(draw.choices("ab 江心🌊é\n", k=draw.randint(0, 200)))})
        for number in range(DOCUMENTS)
    ]
    (directory / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    prepare(
        PrepareArguments(
            inputs=(str(directory / "corpus.jsonl"),),
            output=directory / "prepared",
            validation_fraction=0.1,
            shard_tokens=1500,
        )
    )
    return directory / "prepared"


@pytest.fixture(scope="module")
def shards(data_path: Path) -> TokenShards:
    return TokenShards(data_path, "train")


@pytest.fixture
def damaged(data_path: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    copy = tmp_path / "copy"
    for source in data_path.rglob("*"):
        if source.is_file():
            target = copy / source.relative_to(data_path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return copy


def slow_stream(path: Path, split: str) -> list[int]:
    """All ids of the split in one list, read without the code under test."""
    manifest = json.loads((path / "manifest.json").read_text())
    return [
        int(token)
        for shard in manifest["splits"][split]["shards"]
        for token in np.fromfile(path / shard["file"], dtype="<u2")
    ]


def slow_pack(stream: list[int], windows: list[tuple[int, int]]) -> tuple[list[int], list[int], float]:
    """Ids, cu_seqlens and target bytes of windows laid end to end, one token at a time (byte tokenizer)."""
    ids: list[int] = []
    opens: list[int] = []
    target_bytes = 0
    for start, length in windows:
        for position in range(start, start + length):
            if position == start or stream[position] == BOS_ID:
                opens.append(len(ids))
            elif stream[position] != EOS_ID:
                target_bytes += 1
            ids.append(stream[position])
    return ids, [*opens, len(ids)], float(target_bytes)


def check_against_slow_twin(batch: PackedBatch, stream: list[int], windows: list[tuple[int, int]]) -> None:
    ids, cu_seqlens, target_bytes = slow_pack(stream, windows)
    assert batch.input_ids.tolist() == batch.labels.tolist() == ids
    assert batch.cu_seqlens.tolist() == cu_seqlens
    assert batch.max_seqlen == max(np.diff(cu_seqlens))
    assert batch.num_targets == len(ids) - (len(cu_seqlens) - 1)
    assert batch.target_bytes == target_bytes
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )


def windows_of(batch: PackedBatch, stream: list[int], length: int) -> list[int]:
    """Which windows of the stream a batch holds, found by content."""
    table = {
        tuple(stream[start : start + length]): start // length for start in range(0, len(stream) - length + 1, length)
    }
    assert len(table) == len(stream) // length  # content names the window
    return [table[tuple(row)] for row in batch.input_ids.view(-1, length).tolist()]


def test_shards_describe_themselves(shards: TokenShards, data_path: Path) -> None:
    stream = slow_stream(data_path, "train")
    assert shards.num_tokens == len(stream) == shards.manifest["splits"]["train"]["tokens"]
    assert len(shards.manifest["splits"]["train"]["shards"]) > 2
    assert shards.vocab_size == 258
    assert shards.fingerprint == TokenShards(data_path, "validation", verify=False).fingerprint
    shards.check_tokenizer(byte_tokenizer())


@given(data=st.data())
@settings(max_examples=60)
def test_window_equals_the_stream(shards: TokenShards, data_path: Path, data: st.DataObject) -> None:
    stream = slow_stream(data_path, "train")
    start = data.draw(st.integers(0, len(stream) - 1))
    length = data.draw(st.integers(1, len(stream) - start))
    ids_T, starts = shards.window(start, length)
    assert ids_T.tolist() == stream[start : start + length]
    assert starts.tolist() == [at for at in range(length) if stream[start + at] == BOS_ID]


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, 0), (0, 10**6), (10**6, 1)])
def test_window_out_of_bounds(shards: TokenShards, start: int, length: int) -> None:
    with pytest.raises(ValueError, match="is not within"):
        shards.window(start, length)


@given(
    sequence_length=st.integers(2, 400),
    rows=st.integers(1, 4),
    seed=st.integers(0, 5),
    step=st.integers(0, 40),
)
@settings(max_examples=40)
def test_batch_equals_its_slow_twin(
    shards: TokenShards, data_path: Path, sequence_length: int, rows: int, seed: int, step: int
) -> None:
    loader = PackedLoader(shards, sequence_length, rows, seed)
    numbers = [loader._window(step * rows + row) for row in range(rows)]
    windows = [(number * sequence_length, sequence_length) for _, number in numbers]
    check_against_slow_twin(loader.batch(step), slow_stream(data_path, "train"), windows)


@given(
    world_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    rows=st.integers(1, 3),
    step=st.integers(0, 20),
    seed=st.integers(0, 3),
)
@settings(max_examples=40)
def test_the_global_batch_does_not_depend_on_how_it_is_divided(
    shards: TokenShards, data_path: Path, world_size: int, accumulation: int, rows: int, step: int, seed: int
) -> None:
    """The parts are disjoint and make up what one process would take as one batch of that many rows."""
    length = 100
    whole = PackedLoader(shards, length, world_size * accumulation * rows, seed)
    parts = [
        PackedLoader(shards, length, rows, seed, rank, world_size, accumulation).batch(step, micro)
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    stream = slow_stream(data_path, "train")
    divided = [window for part in parts for window in windows_of(part, stream, length)]
    assert divided == windows_of(whole.batch(step), stream, length)
    assert sum(part.num_targets for part in parts) == whole.batch(step).num_targets
    assert sum(part.target_bytes for part in parts) == whole.batch(step).target_bytes
    assert whole.tokens_per_step == world_size * accumulation * rows * length


@given(rows=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=20)
def test_every_epoch_visits_every_window_once(shards: TokenShards, data_path: Path, rows: int, seed: int) -> None:
    length, epochs = 120, 3
    loader = PackedLoader(shards, length, rows, seed)
    (count,) = loader.windows_per_epoch
    stream = slow_stream(data_path, "train")
    assert count == len(stream) // length
    steps = -(-epochs * count // rows)
    visited = [window for step in range(steps) for window in windows_of(loader.batch(step), stream, length)]
    orders = [visited[epoch * count : (epoch + 1) * count] for epoch in range(epochs)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert orders[0] != orders[1]


def test_batches_are_a_pure_function_of_their_coordinates(shards: TokenShards, data_path: Path) -> None:
    def fresh(seed: int = 0) -> PackedLoader:
        return PackedLoader(TokenShards(data_path, "train"), 64, 2, seed, rank=1, world_size=2, accumulation=2)

    used = fresh()
    coordinates = [(step, micro) for step in range(30) for micro in range(2)]
    in_order = [used.batch(*at).input_ids.tolist() for at in coordinates]
    backwards = [used.batch(*at).input_ids.tolist() for at in reversed(coordinates)]
    assert backwards[::-1] == in_order
    assert fresh().batch(*coordinates[41]).input_ids.tolist() == in_order[41]  # a resumed run starts anywhere
    assert fresh(seed=1).batch(0).input_ids.tolist() != in_order[0]


@given(sequence_length=st.integers(2, 300), rows=st.integers(1, 4), max_tokens=st.none() | st.integers(2, 2000))
@settings(max_examples=60)
def test_validation_covers_every_token_once_in_order(
    data_path: Path, sequence_length: int, rows: int, max_tokens: int | None
) -> None:
    stream = slow_stream(data_path, "validation")[:max_tokens]
    batches = list(validation_batches(TokenShards(data_path, "validation"), sequence_length, rows, max_tokens))
    tokens = [token for batch in batches for token in batch.input_ids.tolist()]
    # A lone last token, with nothing before it in its window, cannot be a target and need not come.
    assert tokens in (stream, stream[:-1])
    if tokens != stream:
        assert len(stream) % (sequence_length * rows) == 1
    start = 0
    for batch in batches:
        size = len(batch.input_ids)
        windows = [
            (begin, min(sequence_length, start + size - begin)) for begin in range(start, start + size, sequence_length)
        ]
        check_against_slow_twin(batch, stream, windows)
        start += size


def test_target_bytes_are_the_text_of_whole_documents(data_path: Path) -> None:
    """With windows as long as the split, every byte of the text is a target, multi-byte characters included."""
    validation = TokenShards(data_path, "validation")
    (batch,) = validation_batches(validation, validation.num_tokens, 1, None)
    assert batch.target_bytes == validation.manifest["splits"]["validation"]["text_bytes"]
    assert batch.target_bytes < DOCUMENTS * 200 * 4


def test_batch_moves_to_a_device_with_cu_seqlens_left_behind(shards: TokenShards) -> None:
    batch = PackedLoader(shards, 50, 2, 0).batch(0)
    moved = batch.to("meta")
    assert (moved.input_ids.device.type, moved.labels.device.type) == ("meta", "meta")
    assert moved.cu_seqlens is batch.cu_seqlens
    assert (moved.num_targets, moved.target_bytes) == (batch.num_targets, batch.target_bytes)


def test_impossible_arguments(shards: TokenShards) -> None:
    with pytest.raises(DataError, match=r"'train' has \d+ tokens, fewer than one sequence of 1000000"):
        PackedLoader(shards, 1_000_000, 1, 0)
    for arguments, message in (
        ({"sequence_length": 1}, "sequence_length=1"),
        ({"rows": 0}, "rows=0"),
        ({"seed": -1}, "seed=-1"),
        ({"world_size": 0}, "world_size=0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedLoader(shards, **{"sequence_length": 8, "rows": 1, "seed": 0} | arguments)
    loader = PackedLoader(shards, 8, 1, 0, accumulation=2)
    for step, micro in ((-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match="no such micro-batch"):
            loader.batch(step, micro)
    with pytest.raises(ValueError, match="max_tokens=1 leaves nothing"):
        next(validation_batches(shards, 8, 1, 1))


def test_missing_data_and_split(data_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared data here; run python -m train\.prepare"):
        TokenShards(tmp_path, "train")
    with pytest.raises(DataError, match=r"no split 'test' \(there is train, validation\)"):
        TokenShards(data_path, "test")


def test_wrong_tokenizer(shards: TokenShards) -> None:
    with pytest.raises(DataError, match=r"written with tokenizer [0-9a-f]{12}, not [0-9a-f]{12}; prepare"):
        shards.check_tokenizer(train_bpe(["some text"], 260))


@pytest.mark.parametrize("name", ["train/00001.bin", "train/00001.idx"])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_or_missing_shard(name: str, verify: bool, damaged: Path) -> None:
    path = damaged / name
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=rf"{name}: \d+ bytes where the manifest says \d+, .*prepare it anew"):
        TokenShards(damaged, "train", verify)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: missing; delete .* and prepare it anew"):
        TokenShards(damaged, "train", verify)


@pytest.mark.parametrize("name", ["train/00000.bin", "train/00000.idx", "token_bytes.npy"])
def test_edited_file(name: str, damaged: Path) -> None:
    path = damaged / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: its sha256 is not the manifest's, .*prepare it anew"):
        TokenShards(damaged, "train")


def test_damage_in_one_split_leaves_the_other_readable(damaged: Path) -> None:
    (damaged / "train" / "00000.bin").unlink()
    assert TokenShards(damaged, "validation").num_tokens > 0


def test_edited_manifest(damaged: Path) -> None:
    path = damaged / "manifest.json"
    original = path.read_text()
    for keys, value in (
        (("tokenizer", "vocab_size"), 300),
        (("tokenizer", "bos_token_id"), None),
        (("tokenizer", "eos_token_id"), 1),
        (("dtype",), "uint32"),
        (("splits", "train", "shards", 0, "tokens"), 2),
    ):
        manifest = content = json.loads(original)
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value
        path.write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"manifest\.json: edited, its fingerprint no longer fits"):
            TokenShards(damaged, "train")
    path.write_text(json.dumps(json.loads(original) | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99, this code reads 1"):
        TokenShards(damaged, "train")
    path.write_text(original[:100])
    with pytest.raises(DataError, match=r"manifest\.json: not JSON"):
        TokenShards(damaged, "train")


def without(manifest: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != key}


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda manifest: [manifest], "the manifest is a list, not a JSON object"),
        (lambda manifest: without(manifest, "fingerprint"), "the manifest has no 'fingerprint'"),
        (lambda manifest: without(manifest, "splits"), "the manifest has no 'splits'"),
        (lambda manifest: without(manifest, "arguments"), "the manifest has no 'arguments'"),
        (lambda manifest: manifest | {"tokenizer": {}}, "tokenizer has no 'hash'"),
        (lambda manifest: manifest | {"tokenizer": "byte"}, "'tokenizer' of the manifest is a str"),
        (lambda manifest: manifest | {"dtype": "int8"}, "dtype 'int8' is none of uint16, uint32"),
        (lambda manifest: manifest | {"splits": {"train": []}}, "train is a list, not a JSON object"),
        (lambda manifest: manifest | {"splits": {"train": {"shards": [{}]}}}, "shard 0 of train has no 'file'"),
        (lambda manifest: manifest | {"splits": {"../train": {"shards": []}}}, "split '../train' is none of"),
    ],
)
def test_malformed_manifest(
    edit: Callable[[dict[str, Any]], Any], problem: str, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damaged / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=rf"manifest\.json: {re.escape(problem)}.*; delete .* and prepare it anew$"):
        TokenShards(damaged, "train")
    # prepare looks at it too, before it says that there is nothing to do
    (damaged.parent / "a.txt").write_text("some text")
    assert main([str(damaged.parent / "a.txt"), "--output", str(damaged)]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, "\xff"])
def test_manifest_that_json_cannot_read(content: str, damaged: Path) -> None:
    (damaged / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"manifest\.json: not JSON .* and prepare it anew$"):
        TokenShards(damaged, "train")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("file", "../prepared/train/00000.bin"),
        ("file", "/etc/hostname"),
        ("file", "train/00001.bin"),
        ("file", "train/0.bin"),
        ("index_file", "train/../train/00000.idx"),
    ],
)
def test_manifest_opens_only_its_own_shards(key: str, name: str, damaged: Path) -> None:
    """Not even with a fingerprint that fits."""
    path = damaged / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"]["shards"][0][key] = name
    path.write_text(json.dumps(manifest | {"fingerprint": fingerprint(manifest)}))
    with pytest.raises(DataError, match=rf"manifest\.json: shard 0 of train is called '.*{re.escape(name)}'"):
        TokenShards(damaged, "train", verify=False)
