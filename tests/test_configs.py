"""Every file in configs/ is a run that can be built, and every pair is what it says it is."""

from pathlib import Path

import pytest
import torch

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.flops import forward_flops, parameter_counts
from dlcm.mup import role_of
from eval.matching import TOLERANCE
from train.config import build_model_config, load_run_config, read_yaml
from train.sweep import load_sweep

CONFIGS = Path(__file__).parent.parent / "configs"
# Grids and sweeps are held to what they say by tests/train/test_grid.py and tests/eval/test_mup.py.
MANY = ("scaling", "mup")
# Corpora are held to what they say by tests/train/test_corpora.py, sweeps by tests/eval/test_selfcompress_report.py.
NO_RUNS = ("base", "corpora", "frontier", "stages", "tiny", "tiny_base")
RUNS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.stem not in NO_RUNS and path.parent.name not in MANY)
HEADLINE = sorted(path for path in CONFIGS.glob("headline/*/*-*.yaml") if "axes" not in read_yaml(path))
HEADLINE_SWEEPS = sorted(path for path in CONFIGS.glob("headline/*/*.yaml") if "axes" in read_yaml(path))
UNMATCHED = ("tokens",)  # the token path alone
MODELS = {"dlcm": DLCMForCausalLM, "llama": LlamaBaselineForCausalLM}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_builds_on_the_meta_device(path):
    run = load_run_config(path)
    with torch.device("meta"):
        model = MODELS[run.model["architecture"]](build_model_config(run))
    assert model.num_parameters() > 1e6
    for name, _ in model.named_parameters():
        role_of(name)


@pytest.mark.parametrize(
    ("family", "ratio"),
    [("demo", 0.983), ("small", 1.0), ("medium", 0.999), ("table3", 0.893), ("table1", 0.893)],
)
def test_a_pair_sees_the_same_data_at_the_stated_flops(family, ratio):
    dlcm, llama = (load_run_config(CONFIGS / family / f"{name}.yaml") for name in ("dlcm", "llama"))
    dlcm.schedule.sharpening_final, dlcm.batch.boundary_count = None, "ahead"  # concern boundaries alone
    assert (dlcm.data, dlcm.batch, dlcm.seed, dlcm.schedule) == (llama.data, llama.batch, llama.seed, llama.schedule)
    dlcm_flops, llama_flops = (
        forward_flops(build_model_config(run), run.data.sequence_length).total for run in (dlcm, llama)
    )
    assert dlcm_flops / llama_flops == pytest.approx(ratio, abs=0.001)


def test_medium_is_a_baseline_of_some_350_million_and_a_third_of_the_flops_in_concepts():
    runs = {name: load_run_config(CONFIGS / "medium" / f"{name}.yaml") for name in ("dlcm", "llama")}
    with torch.device("meta"):
        baseline = MODELS["llama"](build_model_config(runs["llama"]))
    assert baseline.num_parameters() == pytest.approx(350e6, rel=0.03)
    flops = forward_flops(build_model_config(runs["dlcm"]), runs["dlcm"].data.sequence_length)
    assert 0.30 < flops.stages["backbone"] / flops.total < 0.35


def test_table_3_has_the_papers_parameter_counts():
    sizes = {}
    for name in ("dlcm", "llama"):
        run = load_run_config(CONFIGS / "table3" / f"{name}.yaml")
        with torch.device("meta"):
            sizes[name] = MODELS[name](build_model_config(run)).num_parameters()
    assert sizes["dlcm"] == pytest.approx(2.3e9, rel=0.02)
    assert sizes["llama"] == pytest.approx(1.3e9, rel=0.01)


@pytest.mark.parametrize("path", HEADLINE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_headline_models_cost_what_their_baseline_does(path):
    """docs/headline_protocol.md: forward FLOPs per token within 1 %, and nothing else differs but the model."""
    variant, _, size = path.stem.rpartition("-")
    run, llama = load_run_config(path), load_run_config(path.with_name(f"llama-{size}.yaml"))
    config = build_model_config(run)
    flops, baseline = forward_flops_of(run), forward_flops_of(llama)
    if variant in UNMATCHED:
        assert flops < baseline
    else:
        assert flops / baseline == pytest.approx(1, abs=TOLERANCE)
    run.schedule.sharpening_final = run.schedule.target_ratio_initial = None  # concern boundaries alone
    assert (run.data, run.batch, run.seed, run.schedule) == (llama.data, llama.batch, llama.seed, llama.schedule)
    assert run.output == f"runs/headline/{path.parent.name}/{path.stem}" and config.d_token == int(size)
    if run.model.get("segmenter") == "words":
        config.word_end_ids = [32]  # in training the tokenizer says which
    with torch.device("meta"):
        model = MODELS[run.model["architecture"]](config)
    assert model.num_parameters() == sum(parameter_counts(config).values())


def forward_flops_of(run):
    return forward_flops(build_model_config(run), run.data.sequence_length).total


def test_headline_sweeps_run_what_they_say():
    sweeps = {f"{path.parent.name}-{path.stem}": load_sweep(path)[1] for path in HEADLINE_SWEEPS}
    names = (
        "ablations",
        "closing",
        "combined",
        "first",
        "norms",
        "rates-dlcm",
        "rates-llama",
        "seeds",
        "splits",
        "trend",
    )
    assert set(sweeps) == {f"{kind}-{name}" for kind in ("bytes", "bpe") for name in names}
    for kind in ("bytes", "bpe"):
        ours, theirs = sweeps[f"{kind}-rates-dlcm"], sweeps[f"{kind}-rates-llama"]
        assert [run.labels["rate"] for run in ours] == [run.labels["rate"] for run in theirs]  # an equal tuning budget
        for run in (*ours, *theirs):
            rates = run.run.optimizer
            assert rates.lr_token == rates.lr_other == pytest.approx(float(run.labels["rate"][1:]) * 1e-3, rel=5e-3)
            assert rates.lr_concept in (None, rates.lr_token)
        assert {run.run.seed for run in sweeps[f"{kind}-seeds"]} == {0, 1, 2}
        tokens = {run.labels["budget"]: run.tokens for run in sweeps[f"{kind}-trend"]}
        assert tokens == pytest.approx({"t50": 50e6, "t200": 200e6, "t800": 800e6}, rel=0.01)
        for run in sweeps[f"{kind}-trend"]:
            assert run.run.schedule.steps % run.run.evaluation.every == 0
        added = [run for name in ("splits", "norms", "combined", "closing") for run in sweeps[f"{kind}-{name}"]]
        baseline = forward_flops_of(sweeps[f"{kind}-first"][0].run)
        for run in added:
            assert forward_flops_of(run.run) / baseline == pytest.approx(1, abs=TOLERANCE), run.name
    first = sweeps["bytes-first"] + sweeps["bpe-first"]
    assert len(first) == 9 and all(run.tokens == pytest.approx(50e6, rel=0.01) for run in first)
