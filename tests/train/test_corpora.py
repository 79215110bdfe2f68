"""The paper's corpora are prepared by one line each, here from stand-ins laid out as the hub's, and trained on."""

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from tests.train.tiny import write_config
from train.config import ConfigError, load_run_config
from train.corpora import corpus_arguments
from train.data import DataError, TokenShards
from train.documents import open_sources
from train.metrics import read_metrics
from train.prepare import PrepareArguments, main, prepare
from train.pretrain import main as pretrain

TABLE1 = Path(__file__).parents[2] / "configs" / "table1"
WEIGHTS = {"map-cc": 0.25, "megamath-web": 0.1, "nemotron-cc": 0.5, "opencoder": 0.15}
DOCUMENTS = 40


def texts(name: str) -> list[str]:
    draw = random.Random(name)
    return [f"{name} {number} " + "".join(draw.choices("ab 江\n", k=60)) for number in range(DOCUMENTS)]


def write_parquet(path: Path, name: str, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"id": [f"{number}" for number in range(DOCUMENTS)], "text": texts(name)}
    parquet.write_table(pa.table(table | columns), path, row_group_size=9)


def repository(path: Path, subsets: list[str]) -> None:
    """A card that names subsets, as the hub reads it."""
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*"}]} for name in subsets]
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def write_parts(path: Path, name: str, count: int) -> None:
    rows = [{"text": text, "meta": {"length": len(text)}} for text in texts(name)]
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    size = len(content) // count + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path.with_name(f"{path.name}.part{number + 1:02d}").write_bytes(content[number * size : (number + 1) * size])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four corpora in miniature, and `corpora.yaml` with their places instead of the hub's names."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub = tmp_path / "hub"
    subsets = ["High-Quality", "Medium-High-Quality", "Diverse-QA"]
    repository(hub / "nvidia/Nemotron-CC-v2", subsets)
    for name in subsets:
        write_parquet(hub / "nvidia/Nemotron-CC-v2" / name / "part_000000.parquet", name)
    write_parts(hub / "MAP-CC/zh_cc.jsonl.gz", "zh_cc", 11)
    write_parts(hub / "MAP-CC/zh_baike.jsonl.gz", "zh_baike", 1)
    write_parquet(hub / "OpenCoder-LLM/opc-fineweb-code-corpus/data/train-00000-of-00001.parquet", "fineweb-code")
    for name in ("synthetic_code_snippet", "synthetic_qa", "algorithmic_corpus"):
        rows = datasets.Dataset.from_dict({"text": texts(name), "lang": ["python"] * DOCUMENTS})
        rows.save_to_disk(hub / "opc-annealing-corpus" / name)
    for name in ("megamath-web", "megamath-web-pro"):
        write_parquet(hub / "LLM360/MegaMath" / name / "part-00000.parquet", name, url=["u"] * DOCUMENTS)

    content = (TABLE1 / "corpora.yaml").read_text(encoding="utf-8")
    content = re.sub(r"hub:(?=\w)", f"hub:{hub}/", content)
    for fetched in ("MAP-CC", "opc-annealing-corpus"):
        content = content.replace(f"runs/table1/{fetched}", str(hub / fetched))
    content = content.replace("runs/table1", str(tmp_path / "runs")).replace("deepseek-ai/DeepSeek-V3", "byte")
    (tmp_path / "corpora.yaml").write_text(content.replace("validation_fraction: 0.0002", "validation_fraction: 0.2"))
    return hub


def test_the_papers_mix_from_its_corpora_to_a_run(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = {
        "nemotron-cc": ["High-Quality", "Medium-High-Quality"],
        "map-cc": ["zh_baike", "zh_cc"],
        "opencoder": ["fineweb-code", "algorithmic_corpus", "synthetic_code_snippet", "synthetic_qa"],
        "megamath-web": ["megamath-web"],
    }
    for name, parts in held.items():
        line = ["--corpus", str(tmp_path / "corpora.yaml"), name, "--workers", "1"]
        assert main(line) == 0, capsys.readouterr().err
        assert main(line) == 0 and "already prepared" in capsys.readouterr().out
        splits = [TokenShards(tmp_path / "runs" / name, split) for split in ("train", "validation")]
        found = [bytes(t for t in s.window(0, s.num_tokens)[0] if t < 256).decode() for s in splits]
        expected = [text for part in parts for text in texts(part)]
        assert sum(map(len, found)) == sum(map(len, expected))
        assert all(text in found[0] or text in found[1] for text in expected)

    run = load_run_config(TABLE1 / "dlcm.yaml")
    assert {name: weight for name, (_, weight) in run.data.sources().items()} == WEIGHTS
    data = {"path": None, "mixture": {n: {"path": str(tmp_path / "runs" / n), "weight": w} for n, w in WEIGHTS.items()}}
    config = write_config(tmp_path / "run.yaml", "dlcm", Path("x"), tmp_path / "run", data=data)
    assert pretrain([str(config)]) == 0
    assert {f"bpb/{name}" for name in WEIGHTS} <= read_metrics(tmp_path / "run")[-1].keys()


def test_the_command_line_wins(hub: Path, tmp_path: Path) -> None:
    line = ["--corpus", str(tmp_path / "corpora.yaml"), "megamath-web", "--workers", "1"]
    assert main([*line, "--output", str(tmp_path / "mine"), "--max-tokens", "300", "--seed", "5"]) == 0
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    assert manifest["arguments"]["seed"] == 5 and not (tmp_path / "runs").exists()
    assert 300 <= sum(split["tokens"] for split in manifest["splits"].values()) < 300 + 200


def test_the_shipped_files_fit_each_other() -> None:
    known = [*PrepareArguments.__slots__]
    named = yaml.safe_load((TABLE1 / "corpora.yaml").read_text(encoding="utf-8"))["corpora"]
    sources = load_run_config(TABLE1 / "llama.yaml").data.sources()
    assert named.keys() == sources.keys() == WEIGHTS.keys()
    shares = {}
    for name in named:
        arguments = corpus_arguments(TABLE1 / "corpora.yaml", name, known)
        assert f"--output={sources[name][0]}" in arguments
        (shares[name],) = (int(a.removeprefix("--max-tokens=")) / 1e12 for a in arguments if "max-tokens" in a)
    assert shares == WEIGHTS


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("corpora: {a: {inputs: [x]}}", "b", "no corpus 'b'; there are a"),
        ("corpora: {a: {input: [x]}}", "a", "unknown key corpora.a.input; did you mean 'inputs'?"),
        ("common: {worker: 3}\ncorpora: {a: {inputs: x}}", "a", "unknown key common.worker; did you mean 'workers'?"),
        ("more: 1\ncorpora: {a: {}}", "a", "unknown key 'more'; there are common and corpora"),
        ("common: 5\ncorpora: {a: {}}", "a", "common is 5; write `key: value` pairs"),
        ("a: {inputs: [x]}", "a", "unknown key 'a'"),
        ("corpora: [a]", "a", "corpora is ['a']; write `key: value` pairs"),
        ("corpora: {a: x}", "a", "corpora.a is 'x'; write `key: value` pairs"),
        ("corpora: {a: {output: x}}", "a", "inputs is None; list files"),
        ("corpora: {a: {inputs: [--output]}}", "a", "inputs is ['--output']; list files"),
        ("corpora: {a: {inputs: [3]}}", "a", "inputs is [3]; list files"),
        ("corpora: {a: {inputs: [x], seed: [1]}}", "a", "seed is [1]; write one value"),
        ("corpora: {a: {inputs: [x], split: null}}", "a", "split is None; write one value"),
        ("corpora: {a: [", "a", "not valid YAML"),
        ("[" * 100_000, "a", "not valid YAML"),
        ("corpora: {a: !!python/object/apply:os.getpid []}", "a", "not valid YAML"),
    ],
)
def test_corpora_that_are_none(
    content: str, name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "corpora.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        corpus_arguments(file, name, [*PrepareArguments.__slots__])
    assert main(["--corpus", str(file), name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and error.count("\n") == 1


@pytest.mark.parametrize("line", [["x", "--corpus", "FILE", "a"], ["x"], ["--output", "y"], []])
def test_inputs_come_from_one_place(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(line)
    assert re.search("either INPUTs or a --corpus|INPUT and --output are required", capsys.readouterr().err)


# --- parts, folders and limits ---


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_parts_are_read_as_if_joined(suffix: str, tmp_path: Path) -> None:
    from tests.train.test_documents import COMPRESSORS, LINES, read

    content = COMPRESSORS[suffix](LINES * 50)
    whole = tmp_path / "whole" / f"a.jsonl{suffix}"
    whole.parent.mkdir()
    whole.write_bytes(content)
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in range(12):  # 1, 2, ... 12: as numbers, not as text
        size = len(content) // 12 + 1
        (parts / f"a.jsonl{suffix}.part{number + 1}").write_bytes(content[number * size : (number + 1) * size])
    expected = [document.text for document in read(whole)]
    assert [document.text for document in read(parts)] == expected
    assert [document.text for document in read(parts / f"a.jsonl{suffix}.part1")] == expected
    (source,) = open_sources([str(parts)])
    (parts / f"a.jsonl{suffix}.part7").write_bytes(b"x" + content)
    assert open_sources([str(parts)])[0].identity != source.identity
    (parts / f"a.jsonl{suffix}.part7").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl.*: part 7 of it is missing; fetch it"):
        open_sources([str(parts)])


def test_parts_that_are_cut_or_of_parquet_are_errors(tmp_path: Path) -> None:
    from tests.train.test_documents import read

    write_parts(tmp_path / "a.jsonl.gz", "a", 3)
    (tmp_path / "a.jsonl.gz.part03").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read to its end, damaged or truncated"):
        read(tmp_path / "a.jsonl.gz.part01")
    (tmp_path / "b.parquet.part1").write_bytes(b"x")
    with pytest.raises(DataError, match="unknown file suffix"):
        read(tmp_path / "b.parquet.part1")


def test_too_many_parts_of_a_name() -> None:
    with pytest.raises(DataError, match=r"^hub:a:b:c:d: too many parts; write hub:NAME:CONFIG:FOLDER"):
        open_sources(["hub:a:b:c:d"])


def edited(**options: Any) -> Callable[[Path, Path], PrepareArguments]:
    return lambda file, output: PrepareArguments(inputs=(str(file),), output=output, workers=1, **options)


def test_max_tokens_is_a_limit_that_interruptions_do_not_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.train.test_prepare import snapshot
    from tests.train.test_progress import failing_after
    from train.prepare import SplitWriter

    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("a")))
    command = edited(max_tokens=1500, shard_tokens=400, validation_fraction=0.2)
    manifest = prepare(command(file, tmp_path / "whole"))
    documents = sum(split["documents"] for split in manifest["splits"].values())
    tokens = sum(split["tokens"] for split in manifest["splits"].values())
    last = json.loads((tmp_path / "whole" / "train" / "documents.jsonl").read_text().splitlines()[-1])["tokens"]
    assert 1500 <= tokens < 1500 + max(last, 200) and documents < DOCUMENTS
    for after in range(5, documents, 4):
        output = tmp_path / f"out{after}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SplitWriter, "add", failing_after(after, KeyboardInterrupt()))
            prepare(command(file, output))
        prepare(command(file, output))
        assert snapshot(output) == snapshot(tmp_path / "whole")
    with pytest.raises(DataError, match="--max-tokens 0: must be at least 1"):
        edited(max_tokens=0)(file, tmp_path / "x")
    with pytest.raises(DataError, match=r"prepared differently \(max_tokens\)"):
        prepare(edited(max_tokens=9, shard_tokens=400, validation_fraction=0.2)(file, tmp_path / "whole"))
