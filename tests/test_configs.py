"""Every file in configs/ is a run that can be built, and every pair is what it says it is."""

from pathlib import Path

import pytest
import torch

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.flops import forward_flops
from dlcm.mup import role_of
from train.config import build_model_config, load_run_config

CONFIGS = Path(__file__).parent.parent / "configs"
# Grids and sweeps are held to what they say by tests/train/test_grid.py and tests/eval/test_mup.py.
MANY = ("scaling", "mup")
# Corpora are held to what they say by tests/train/test_corpora.py, sweeps by tests/eval/test_selfcompress_report.py.
NO_RUNS = ("base", "corpora", "frontier", "stages", "tiny", "tiny_base")
RUNS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.stem not in NO_RUNS and path.parent.name not in MANY)
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
