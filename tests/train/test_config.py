"""Configurations: what is read, what is inherited, and every way of being refused."""

import re
from pathlib import Path

import pytest

from dlcm import DLCMConfig, LlamaBaselineConfig
from train.config import (
    ConfigError,
    RunConfig,
    build_model_config,
    config_differences,
    load_run_config,
    save_run_config,
)

DLCM = """
output: runs/test
data: {path: data/tiny, sequence_length: 64}
model:
  {architecture: dlcm, vocab_size: 258, d_token: 32, token_heads: 2, d_concept: 64, concept_heads: 4,
   target_ratio: 4}
batch: {rows: 2}
optimizer: {lr_token: 1e-3, lr_concept: 1e-3, lr_boundary: 1e-4, lr_other: 1e-3}
schedule: {steps: 20}
"""
LLAMA = """
output: runs/test
data: {path: data/tiny, sequence_length: 64}
model: {architecture: llama, vocab_size: 258, d_token: 32, token_heads: 2, num_layers: 2}
batch: {rows: 2}
optimizer: {lr_token: 1e-3, lr_other: 1e-3}
schedule: {steps: 20}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def dlcm_yaml(tmp_path: Path) -> Path:
    return write(tmp_path / "dlcm.yaml", DLCM)


@pytest.fixture
def llama_yaml(tmp_path: Path) -> Path:
    return write(tmp_path / "llama.yaml", LLAMA)


def test_reads_values_defaults_and_overrides(dlcm_yaml: Path):
    run = load_run_config(dlcm_yaml, ["batch.rows=3", "optimizer.lr_token=5e-4", "model.d_token=64"])
    assert (run.batch.rows, run.optimizer.lr_token, run.model["d_token"]) == (3, 5e-4, 64)
    assert (run.batch.accumulation, run.device, run.threads) == (1, "auto", None)


def test_model_config(dlcm_yaml: Path, llama_yaml: Path):
    dlcm, llama = (build_model_config(load_run_config(path)) for path in (dlcm_yaml, llama_yaml))
    assert isinstance(dlcm, DLCMConfig) and (dlcm.d_concept, dlcm.target_ratio) == (64, 4.0)
    assert isinstance(llama, LlamaBaselineConfig) and llama.num_layers == 2


def test_bases_are_relative_recursive_and_overridden(tmp_path: Path):
    (tmp_path / "family").mkdir()
    write(tmp_path / "root.yaml", DLCM)
    write(tmp_path / "family" / "base.yaml", "base: ../root.yaml\nbatch: {rows: 5, accumulation: 2}")
    child = write(tmp_path / "family" / "child.yaml", "base: base.yaml\nbatch: {rows: 7}\nmodel: {d_token: 64}")
    run = load_run_config(child)
    assert (run.batch.rows, run.batch.accumulation) == (7, 2)
    assert (run.model["d_token"], run.model["d_concept"]) == (64, 64)


def test_saved_run_reads_back_equal(tmp_path: Path, dlcm_yaml: Path):
    run = load_run_config(dlcm_yaml, ["threads=1"])
    save_run_config(run, tmp_path / "run.yaml")
    assert load_run_config(tmp_path / "run.yaml") == run


def test_differences_are_named_by_full_key(dlcm_yaml: Path):
    run, other = (
        load_run_config(dlcm_yaml),
        load_run_config(dlcm_yaml, ["batch.rows=3", "model.threshold=0.4"]),
    )
    assert config_differences(run, other) == {"batch.rows": (2, 3), "model.threshold": (None, 0.4)}
    assert config_differences(run, run) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lr_tokn=1",
            "command line: unknown key 'optimizer.lr_tokn'; did you mean 'optimizer.lr_token'?",
        ),
        ("rows=1", "unknown key 'rows'; did you mean 'batch.rows'?"),
        ("lr_token=1", "unknown key 'lr_token'; did you mean 'optimizer.lr_token'?"),
        ("model.num_layers=1", "unknown key 'model.num_layers'; only model.architecture=llama has it"),
        ("model.bos_token_id=1", "unknown key 'model.bos_token_id'; the tokenizer decides it"),
        ("zzz=1", "unknown key 'zzz'; the sections are model, data, batch"),
        ("model.d_tokken=8", "unknown key 'model.d_tokken'; did you mean 'model.d_token'?"),
        ("model.num_layers=8", "unknown key 'model.num_layers'"),  # the baseline's, not this architecture's
        ("model.bos_token_id=0", "unknown key 'model.bos_token_id'"),  # the tokenizer decides it
        ("model.return_dict=false", "unknown key 'model.return_dict'"),
        ("seed.x=1", "unknown key 'seed.x'; did you mean 'seed'?"),
        ("batch=3", "command line: batch is a section; write its keys, not 3"),
        ("model=3", "command line: model is a section; write its keys, not 3"),
        ("batch.rows", "command line: 'batch.rows' is no override; write section.key=value"),
        ("=3", "'=3' is no override"),
        (
            "batch.rows=two",
            "command line: batch.rows: Value 'two' of type 'str' could not be converted to Integer",
        ),
        ("batch.rows=2.5", "batch.rows: Value '2.5'"),
        ("batch.rows=null", "batch.rows: Incompatible value 'None'"),
        ("device=tpu", "device: Invalid value 'tpu', expected one of ['auto', 'cpu', 'cuda']"),
        ("batch.rows=0", "batch.rows is 0, but must be at least 1"),
        ("seed=-1", "seed is -1, but must be 0 or more"),
        ("parallel.strategy=hybrid", "parallel.shard_size is null where parallel.strategy is hybrid"),
        ("parallel.shard_size=2", "parallel.shard_size is 2 where parallel.strategy is ddp; hybrid needs one"),
        (
            "checkpoint.milestone_every=300",
            "checkpoint.milestone_every is 300, but there are checkpoints every 500 steps",
        ),
        ("checkpoint.milestone_every=0", "checkpoint.milestone_every is 0, but must be at least 1"),
        ("parallel.shard_size=1", "parallel.shard_size is 1, but must be at least 2"),
        (f"seed={2**63}", "seed does not fit into 64 bits; choose a number below 2**63"),
        (f"schedule.steps={10**400}", "schedule.steps does not fit into 64 bits"),
        (f"model.d_token={2**64}", "model.d_token does not fit into 64 bits"),
        ("threads=0", "threads is 0, but must be at least 1"),
        ("data.sequence_length=1", "data.sequence_length is 1, but must be at least 2"),
        ("optimizer.lr_token=0", "optimizer.lr_token is 0.0, but must be above 0"),
        ("optimizer.lr_token=.nan", "optimizer.lr_token is nan, but must be above 0"),
        ("optimizer.beta2=1", "optimizer.beta2 is 1.0, but must be 0 or more, and below 1"),
        ("schedule.decay_fraction=1.5", "schedule.decay_fraction is 1.5, but must be between 0 and 1"),
        ("schedule.warmup_steps=17", "together exceed schedule.steps 20"),
        ("data.sequence_length=4096", "longer than model.max_position_embeddings 2048"),
        ("optimizer.lr_concept=null", "optimizer.lr_concept is missing; this model has concept parameters"),
        ("optimizer.lr_boundary=null", "optimizer.lr_boundary is missing; this model has a learned segmenter"),
        ("model.segmenter=rule", "optimizer.lr_boundary is set, but this model does not have a learned segmenter"),
        ("model.architecture=gpt", "model.architecture is 'gpt'; choose one of dlcm, llama"),
        ("model.d_token=wide", "model: Field 'd_token' expected int, got str (value: 'wide')"),
        ("model.token_heads=5", "model: d_token=32 is not a multiple of token_heads=5"),
        ("model.target_ratio=0.5", "target_ratio=0.5 must be at least 1"),
        ("model.target_ratio=1", "target_ratio=1 needs segmenter='fixed'"),
    ],
)
def test_refused_overrides(dlcm_yaml: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_run_config(dlcm_yaml, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr_concept=1e-3", "optimizer.lr_concept is set, but this model does not have concept parameters"),
        (
            "schedule.sharpening_final=4",
            "schedule.sharpening_final: this model has no learned segmenter",
        ),
        ("model.d_concept=64", "unknown key 'model.d_concept'"),
    ],
)
def test_refused_for_the_baseline(llama_yaml: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(llama_yaml, [override])


def test_a_target_ratio_that_moves_needs_a_ratio_loss(dlcm_yaml: Path):
    load_run_config(dlcm_yaml, ["schedule.target_ratio_initial=2"])
    without = ["optimizer.lr_boundary=null", "schedule.sharpening_final=null", "schedule.target_ratio_initial=2"]
    load_run_config(dlcm_yaml, [*without, "model.segmenter=rule"])
    with pytest.raises(ConfigError, match=r"schedule\.target_ratio_initial: this model has no ratio loss"):
        load_run_config(dlcm_yaml, [*without, "model.segmenter=fixed"])
    with pytest.raises(ConfigError, match=r"schedule\.target_ratio_initial is 1\.0, but must be above 1"):
        load_run_config(dlcm_yaml, ["schedule.target_ratio_initial=1"])


def test_sharpening_needs_a_segmenter_that_samples(dlcm_yaml: Path):
    load_run_config(dlcm_yaml, ["schedule.sharpening_final=4"])
    rule = ["model.segmenter=rule", "optimizer.lr_boundary=null"]
    load_run_config(dlcm_yaml, rule)
    with pytest.raises(ConfigError, match="this model has no learned segmenter to sharpen; leave it null"):
        load_run_config(dlcm_yaml, [*rule, "schedule.sharpening_final=4"])


def test_the_offending_file_is_named(tmp_path: Path):
    root = write(tmp_path / "root.yaml", DLCM + "log_evry: 3\n")
    child = write(tmp_path / "child.yaml", "base: root.yaml\nseed: 3\n")
    with pytest.raises(ConfigError, match=re.escape(f"{root}: unknown key 'log_evry'; did you mean 'log_every'?")):
        load_run_config(child)
    write(root, DLCM + "log_every: often\n")
    with pytest.raises(ConfigError, match=re.escape(f"{root}: log_every: Value 'often'")):
        load_run_config(child, ["seed=4"])


def test_missing_mandatory_key(tmp_path: Path):
    path = write(tmp_path / "partial.yaml", "model: {architecture: llama}\n")
    with pytest.raises(ConfigError, match="output is missing; set it in the file or as output=VALUE"):
        load_run_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "not valid YAML"),
        ("- 1\n- 2\n", "must hold `key: value` pairs"),
        (
            DLCM.replace("rows: 2", 'rows: "${batch.raws}"'),
            "batch.rows: Interpolation key 'batch.raws' not found",
        ),
    ],
)
def test_refused_files(tmp_path: Path, text: str, message: str):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_run_config(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_run_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
        load_run_config(write(tmp_path / "child.yaml", "base: gone.yaml\n"))
    (tmp_path / "latin.yaml").write_bytes(b"output: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml"):
        load_run_config(tmp_path / "latin.yaml")


def test_a_circle_of_bases_is_refused(tmp_path: Path):
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: is its own base"):
        load_run_config(tmp_path / "a.yaml")


def test_configs_are_independent_of_each_other(dlcm_yaml: Path):
    first = load_run_config(dlcm_yaml)
    first.model["d_token"] = 1
    assert load_run_config(dlcm_yaml).model["d_token"] == 32
    assert RunConfig().model == {}
