"""Each source has its share of any stretch of a run, passes through its own epochs, and nothing else decides it."""

import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.analysis import validation_text
from eval.held_out import held_out
from eval.loading import load_checkpoint
from eval.perplexity import validation_documents
from tests.train.tiny import write_config
from train.checkpoint import checkpoint_path, latest_checkpoint, load_state
from train.config import ConfigError, load_run_config, save_run_config
from train.data import DataError, Mixture, PackedLoader, TokenShards, validation_batches
from train.distributed import Ranks
from train.evaluate import evaluate
from train.metrics import WALL_CLOCK, read_metrics
from train.mixture import LARGEST_BLOCK, MixtureOrder
from train.prepare import PrepareArguments, prepare
from train.pretrain import build_model, main
from train.tokenizer import load_tokenizer

PAPER = [50.0, 25.0, 15.0, 10.0]  # Table 1
LENGTH = 32
ALPHABETS = {"code": "(){}=;", "math": "012345", "web": "abcdef"}  # which tell a window's source
WEIGHTS = {"code": 0.3, "math": 0.2, "web": 0.5}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources of different size, whose alphabets differ."""
    directory, found = tmp_path_factory.mktemp("sources"), {}
    for number, (name, alphabet) in enumerate(ALPHABETS.items()):
        draw = random.Random(number)
        texts = ["".join(draw.choices(alphabet, k=draw.randint(40, 90))) for _ in range(40 + 20 * number)]
        rows = [json.dumps({"text": text, "source": name, "domain": name}) for text in texts]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        found[name] = directory / name
        prepare(
            PrepareArguments(
                inputs=(str(directory / f"{name}.jsonl"),), output=found[name], validation_fraction=0.3, workers=1
            )
        )
    return found


def opened(paths: dict[str, Path], split: str = "train", **weights: float) -> Mixture:
    return Mixture.open({name: (str(paths[name]), weight) for name, weight in (weights or WEIGHTS).items()}, split)


def section(paths: dict[str, Path], **weights: float) -> dict[str, Any]:
    """What the `data` section of a run says of them."""
    named = {name: {"path": str(paths[name]), "weight": weight} for name, weight in (weights or WEIGHTS).items()}
    return {"path": None, "mixture": named}


def sources_of(loader: PackedLoader, step: int) -> list[str]:
    """Which source each window of a batch comes from, by its letters."""
    letters = {ord(letter): name for name, alphabet in ALPHABETS.items() for letter in alphabet}
    rows = loader.batch(step).input_ids.view(-1, LENGTH).tolist()
    found = [{letters[token] for token in row if token in letters} for row in rows]
    assert all(len(names) == 1 for names in found)
    return [name for (name,) in found]


# --- the order ---


def test_the_papers_table_1_is_met_by_every_20_windows() -> None:
    order = MixtureOrder(PAPER)
    assert (order.counts, order.block, order.shares) == ([10, 5, 3, 2], 20, [0.5, 0.25, 0.15, 0.1])
    for start in (0, 20, 20 * 10**12):
        of = [order.place(number)[0] for number in range(start, start + 20)]
        assert [of.count(source) for source in range(4)] == order.counts
        assert of.index(3) < 10  # spread evenly: even the rarest comes in each half
        assert 3 in of[10:]


weights = st.lists(
    st.integers(1, 60) | st.floats(0.01, 9.99).map(lambda value: round(value, 2)), min_size=1, max_size=5
)


@given(weights=weights, far=st.integers(0, 10**15))
@settings(max_examples=60)
def test_shares_are_exact_over_blocks_and_nearly_so_over_anything(weights: list[float], far: int) -> None:
    order = MixtureOrder(weights)
    shares = [weight / sum(weights) for weight in weights]
    assert order.shares == pytest.approx(shares)
    assert order.taken(far * order.block) == [far * count for count in order.counts]
    taken = [0] * len(weights)
    for number in range(min(2 * order.block, 500)):
        assert order.taken(number) == taken
        source, before = order.place(number)
        assert before == taken[source]  # the windows of a source come one after another
        taken[source] += 1
        for have, share in zip(taken, order.shares, strict=True):
            assert abs(have - share * (number + 1)) <= 0.5 + 0.5 * share * len(weights) + 1e-6
    number = far * order.block + far % order.block  # as near to its place as the first ones are
    source, before = order.place(number)
    assert order.taken(number)[source] == before
    assert abs(before - order.shares[source] * number) <= 1 + len(weights)


def test_weights_that_no_block_meets_are_refused() -> None:
    for bad in ([], [1.0, 0.0], [1.0, -2.0]):
        with pytest.raises(ValueError, match="must be above 0"):
            MixtureOrder(bad)
    with pytest.raises(ValueError, match=r"are met exactly by no fewer than \d.* windows; give them fewer digits"):
        MixtureOrder([0.123456789, 0.5])
    for extreme in ([1e-300, 1.0], [1e300, 1.0]):
        with pytest.raises(ValueError, match="fewer digits"):
            MixtureOrder(extreme)
    assert MixtureOrder([1.0, LARGEST_BLOCK - 1]).block == LARGEST_BLOCK


# --- batches ---


@given(
    world_size=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    rows=st.integers(1, 3),
    step=st.integers(0, 30),
    seed=st.integers(0, 3),
)
@settings(max_examples=40)
def test_the_global_batch_does_not_depend_on_how_it_is_divided(
    paths: dict[str, Path], world_size: int, accumulation: int, rows: int, step: int, seed: int
) -> None:
    mixture = opened(paths)
    whole = PackedLoader(mixture, LENGTH, world_size * accumulation * rows, seed).batch(step)
    parts = [
        PackedLoader(mixture, LENGTH, rows, seed, rank, world_size, accumulation).batch(step, micro)
        for micro in range(accumulation)
        for rank in range(world_size)
    ]
    assert torch.cat([part.input_ids for part in parts]).tolist() == whole.input_ids.tolist()
    assert sum(part.num_targets for part in parts) == whole.num_targets
    assert sum(part.target_bytes for part in parts) == whole.target_bytes


def test_sources_have_their_shares_of_the_text_itself(paths: dict[str, Path]) -> None:
    loader = PackedLoader(opened(paths), LENGTH, 5, seed=3)
    drawn = [name for step in range(40) for name in sources_of(loader, step)]
    assert [drawn.count(name) for name in WEIGHTS] == [60, 40, 100]
    assert sources_of(loader, 7) == drawn[35:40]  # steps may come in any order
    for at in range(180):
        assert abs(drawn[at : at + 20].count("math") - 4) <= 1


def test_every_epoch_of_a_source_visits_its_windows_once(paths: dict[str, Path]) -> None:
    mixture = opened(paths)
    loader = PackedLoader(mixture, LENGTH, 1, seed=5)
    visited: dict[int, list[int]] = {source: [] for source in range(3)}
    for number in range(3000):
        source, window = loader._window(number)
        visited[source].append(window)
    for source, windows in visited.items():
        count = loader.windows_per_epoch[source]
        epochs = [windows[start : start + count] for start in range(0, len(windows) - count + 1, count)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and epochs[0] != epochs[1]
    epochs = [len(windows) / count for windows, count in zip(visited.values(), loader.windows_per_epoch, strict=True)]
    assert loader.epochs(3000) == epochs


def test_sources_of_one_size_are_shuffled_differently(paths: dict[str, Path]) -> None:
    twice = Mixture({name: TokenShards(paths["web"], "train") for name in "ab"}, {"a": 1.0, "b": 1.0})
    loader = PackedLoader(twice, LENGTH, 1, seed=0)
    count = loader.windows_per_epoch[0]
    of: dict[int, list[int]] = {0: [], 1: []}
    for number in range(2 * count):
        source, window = loader._window(number)
        of[source].append(window)
    assert of[0] != of[1] and sorted(of[0]) == sorted(of[1])


def test_a_mixture_of_one_is_that_one(paths: dict[str, Path]) -> None:
    alone, mixed = TokenShards(paths["web"], "train"), opened(paths, web=0.7)
    assert mixed.fingerprint == alone.fingerprint
    loaders = [PackedLoader(text, LENGTH, 3, seed=2) for text in (alone, mixed)]
    for step in range(30):
        one, other = (loader.batch(step) for loader in loaders)
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.cu_seqlens, other.cu_seqlens)


def test_each_source_counts_its_own_bytes(paths: dict[str, Path], tmp_path: Path) -> None:
    """Where one knows only averages, the others' bytes stay exact."""
    mixture = opened(paths, web=1.0, code=1.0)
    loader = PackedLoader(mixture, LENGTH, 2, seed=0)
    exact = loader.batch(0).target_bytes
    mixture.shards[1].token_bytes_V = 10 * mixture.shards[1].token_bytes_V
    first, second = (PackedLoader(mixture, LENGTH, 1, seed=0).batch(step).target_bytes for step in (0, 1))
    assert loader.batch(0).target_bytes == first + second and first + second / 10 == exact


def test_fingerprints_cover_sources_and_proportions(paths: dict[str, Path]) -> None:
    first = opened(paths).fingerprint
    assert opened(paths, code=3, math=2, web=5).fingerprint == first  # the same proportions
    assert opened(paths, "validation").fingerprint == first
    others = [
        opened(paths, code=0.2, math=0.3, web=0.5),
        opened(paths, code=0.3, web=0.5),
        opened(paths, web=0.5, code=0.3, math=0.2),  # another order, other windows
        Mixture({n: TokenShards(paths["web" if n == "math" else n], "train") for n in WEIGHTS}, WEIGHTS),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 5


def test_sources_that_do_not_go_together_are_named(paths: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a different vocabulary " * 20)
    bpe = tmp_path / "bpe"
    prepare(PrepareArguments(inputs=(str(tmp_path / "a.txt"),), output=bpe, tokenizer="bpe:260", validation_fraction=0))
    message = rf"{bpe}: 'bpe' was prepared with tokenizer [0-9a-f]{{12}}, but 'web', {paths['web']}, with .*--tokenizer"
    with pytest.raises(DataError, match=message):
        opened(paths | {"bpe": bpe}, web=1.0, bpe=1.0)
    with pytest.raises(DataError, match="no split 'validation'"):
        opened({"bpe": bpe}, "validation", bpe=1.0)
    with pytest.raises(DataError, match=r"data\.mixture: weights .* fewer digits"):
        opened(paths, web=0.123456789, code=1.0)
    smallest = min(opened(paths).shards, key=lambda one: one.num_tokens)
    message = f"{smallest.path}: 'train' has {smallest.num_tokens} tokens, fewer than one sequence of"
    with pytest.raises(DataError, match=message):
        PackedLoader(opened(paths), smallest.num_tokens + 1, 1, 0)


# --- configuration ---


@pytest.fixture
def config(paths: dict[str, Path], tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "run.yaml", "dlcm", Path("unused"), tmp_path / "run", data=section(paths), batch={"rows": 5}
    )


def test_configured_sources(config: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    run = load_run_config(config, ["data.mixture.math.weight=0.25"])
    assert run.data.sources() == {
        "web": (str(paths["web"]), 0.5),
        "code": (str(paths["code"]), 0.3),
        "math": (str(paths["math"]), 0.25),
    }
    backwards = yaml.safe_load(config.read_text())
    backwards["data"]["mixture"] = dict(reversed(backwards["data"]["mixture"].items()))
    (tmp_path / "backwards.yaml").write_text(yaml.safe_dump(backwards, sort_keys=False))
    assert list(load_run_config(tmp_path / "backwards.yaml").data.sources()) == list(WEIGHTS)
    save_run_config(run, tmp_path / "saved.yaml")
    saved = load_run_config(tmp_path / "saved.yaml", resolved=True)
    assert saved == run and list(saved.data.sources()) == list(WEIGHTS)
    assert load_run_config(config, ["data.mixture=null", "data.path=one"]).data.sources() == {"": ("one", 1.0)}
    added = load_run_config(config, ["data.mixture.more.path=x", "data.mixture.more.weight=1"])
    assert added.data.sources()["more"] == ("x", 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=also", "data.path and data.mixture are both given; set one of them to null"),
        ("data.mixture=null", "data.path is missing; set it in the file or as data.path=VALUE, or give a data.mixture"),
        ("data.mixture.web.weight=0", "data.mixture.web.weight is 0.0, but must be above 0"),
        ("data.mixture.web.weight=.inf", "data.mixture.web.weight is inf, but must be above 0"),
        ("data.mixture.web.weight=half", "data.mixture.web.weight: Value 'half'"),
        ("data.mixture.web.wieght=1", "unknown key 'data.mixture.web.wieght'; did you mean 'data.mixture.web.weight'?"),
        ("data.mixture.web=0.5", "command line: data.mixture.web is a section; write its keys, not 0.5"),
        ("data.mixture.more.weight=1", "data.mixture.more.path is missing"),
        ("data.mixture.more.path=x", "data.mixture.more.weight is missing"),
        ("data.mixture.a/b.weight=1", "data.mixture: 'a/b' is no name for a source"),
        ("data.mixture=5", "data.mixture"),
    ],
)
def test_refused_mixtures(override: str, message: str, config: Path) -> None:
    overrides = [override, "data.mixture.a/b.path=x"] if "a/b" in override else [override]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_run_config(config, overrides)
    assert "\n" not in str(caught.value)


# --- runs ---


def test_evaluation_weighs_sources_as_training_does(config: Path, paths: dict[str, Path]) -> None:
    run = load_run_config(config, ["evaluation.max_tokens=null"])
    mixture = opened(paths, "validation")
    model = build_model(run, mixture, load_tokenizer(str(mixture.path)))
    mixed = evaluate(run, model, mixture, Ranks())
    nats = num_bytes = tokens = concepts = 0.0  # of one target of the mixture
    for name, shards, share in zip(mixture.names, mixture.shards, mixture.shares, strict=True):
        alone = evaluate(run, model, shards, Ranks())
        batches = list(validation_batches(shards, LENGTH, 5, None))
        per_target = share / sum(batch.num_targets for batch in batches)
        read = sum(len(batch.input_ids) for batch in batches)
        nats += share * alone["loss"]
        num_bytes += per_target * sum(batch.target_bytes for batch in batches)
        tokens += per_target * read
        concepts += per_target * read / alone["tokens_per_concept"]
        assert mixed[f"bpb/{name}"] == pytest.approx(alone["bpb"])
        assert mixed["max_concept"] >= alone["max_concept"]
    assert mixed["loss"] == pytest.approx(nats)
    assert mixed["bpb"] == pytest.approx(nats / math.log(2) / num_bytes)
    assert mixed["tokens_per_concept"] == pytest.approx(tokens / concepts)


def test_evaluation_reads_shares_of_max_tokens(
    config: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mixture = load_run_config(config, ["evaluation.max_tokens=500"]), opened(paths, "validation")
    asked: dict[Path, int | None] = {}

    def batches(shards: TokenShards, length: int, rows: int, most: int | None) -> Iterator[Any]:
        asked[shards.path] = most
        return validation_batches(shards, length, rows, most)

    monkeypatch.setattr("train.evaluate.validation_batches", batches)
    evaluate(run, build_model(run, mixture, load_tokenizer(str(mixture.path))), mixture, Ranks())
    assert asked == {paths["web"]: 250, paths["code"]: 150, paths["math"]: 100}


def test_a_run_on_a_mixture_resumes_and_knows_its_data(
    config: Path, paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert main([str(config), f"output={whole}", "schedule.steps=60"]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^ +web: 50 %, {paths['web']}, [\d,]+ training and [\d,]+ validation tokens, ", said, re.M)
    epochs = {name: float(found) for name, found in re.findall(r"(\w+): [\d.]+ %.*, ([\d.]+) epochs", said)}
    assert epochs["web"] > 1 and said.count("so its text is repeated") == sum(n > 1 for n in epochs.values())
    lines = [line for line in read_metrics(whole) if line["kind"] == "validation"]
    assert lines and all({"bpb", "bpb/web", "bpb/code", "bpb/math"} <= line.keys() for line in lines)

    run_dir = tmp_path / "run"
    assert main([str(config), "schedule.steps=60", "checkpoint.every=20"]) == 0
    shutil.rmtree(checkpoint_path(run_dir, 60))
    assert main(["--resume", str(run_dir)]) == 0
    assert clockless(run_dir) == clockless(whole)
    assert load_state(latest_checkpoint(run_dir)).data_fingerprint == opened(paths).fingerprint
    capsys.readouterr()
    assert main(["--resume", str(run_dir), "schedule.steps=64", "data.mixture.web.weight=0.6"]) == 2
    assert "was trained on other data" in capsys.readouterr().err


def clockless(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line.keys() - set(WALL_CLOCK)} for line in read_metrics(run_dir)]


def test_evaluations_read_all_sources_of_a_run(config: Path, paths: dict[str, Path]) -> None:
    assert main([str(config)]) == 0
    loaded = load_checkpoint(Path(load_run_config(config).output))
    sources = held_out(loaded.run, loaded.state, "--text")
    assert [source.shards.path for source in sources] == list(paths.values())
    documents = list(validation_documents(loaded))
    assert len(documents) == sum(len(source.rows) for source in sources)
    assert {document.domain for document in documents} == set(ALPHABETS)
    text = validation_text(loaded.run, loaded.state, 500)
    lengths = {name: sum(text.domain_D[d] == name for d in text.document_T.tolist()) for name in ALPHABETS}
    assert lengths == {"web": 250, "code": 150, "math": 100}
    whole = validation_text(loaded.run, loaded.state, None)
    assert len(whole.ids_T) == sum(source.shards.num_tokens for source in sources)
    for domain, alphabet in ALPHABETS.items():  # labels belong to their tokens
        of = [
            t
            for t, d in zip(whole.ids_T.tolist(), whole.document_T.tolist(), strict=True)
            if whole.domain_D[d] == domain
        ]
        assert {chr(token) for token in of if token < 256} <= set(alphabet)
