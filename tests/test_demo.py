"""The demo's DLCM, on the demo's text, in a fifth of the steps and a quarter of their tokens: it learns, and holds its
ratio.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from train.data import TokenShards
from train.prepare import main as prepare
from train.pretrain import main as pretrain

ROOT = Path(__file__).parent.parent
STEPS = 120


def unigram_entropy(data: Path) -> float:
    """Nats per token of the validation text under the token frequencies of the training text."""
    train, validation = (TokenShards(data, split) for split in ("train", "validation"))
    counts_V = np.ones(train.vocab_size)  # every token once, so that none is impossible
    np.add.at(counts_V, train.window(0, train.num_tokens)[0], 1)
    log_p_V = np.log(counts_V / counts_V.sum())
    return -float(log_p_V[validation.window(0, validation.num_tokens)[0]].mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The prepared text, and what a shortened run of configs/demo/dlcm.yaml recorded."""
    directory = tmp_path_factory.mktemp("demo")
    data, run = directory / "data", directory / "dlcm"
    text = ["--tokenizer", "bpe:4096", "--validation-fraction", "0.05", "--workers", "1"]
    assert prepare([str(ROOT / "data/embedded.jsonl.xz"), "--output", str(data), *text]) == 0
    shorter = [f"schedule.steps={STEPS}", "schedule.warmup_steps=10", "threads=1", "evaluation.max_tokens=20480"]
    shorter += ["evaluation.every=1000", "checkpoint.every=1000", "batch.rows=4", "data.sequence_length=128"]
    places = [f"data.path={data}", f"output={run}"]
    assert pretrain([str(ROOT / "configs/demo/dlcm.yaml"), *shorter, *places]) == 0
    return data, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_ends_below_the_unigram_entropy(trained):
    data, lines = trained
    assert lines[-1]["kind"] == "validation"
    assert lines[-1]["loss"] < unigram_entropy(data) < math.log(4096)


def test_ends_near_its_target_ratio_in_training_and_at_inference(trained):
    _, lines = trained
    late = [line["boundary_rate"] for line in lines if line["kind"] == "train"][-5:]
    sampled, thresholded = len(late) / sum(late), lines[-1]["tokens_per_concept"]
    assert sampled == pytest.approx(4.0, rel=0.25)
    assert thresholded == pytest.approx(sampled, rel=0.25)  # another text; the whole demo ends within 10 %
