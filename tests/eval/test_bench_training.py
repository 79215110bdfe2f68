"""The benchmark's steps are the trainer's at the stated ratio, its stages add up, and its bars follow from rows."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm.flops import forward_flops
from dlcm.layout import PackedLayout
from eval.bench import Row, merge_records
from eval.bench_training import (
    Bench,
    RatioDetector,
    StageClock,
    main,
    measure_breakdown,
    measure_throughput,
)
from eval.bench_training_report import (
    MODELS,
    PAIRS,
    PARTS,
    STAGES,
    breakdown_table,
    length_table,
    merge_rows,
    must_show,
    page,
    plot,
    summary,
    throughput_table,
)
from eval.loading import EvaluationError
from tests.conftest import tiny_config

CPU = torch.device("cpu")
TINY = (
    "batch.rows=2",
    "data.sequence_length=64",
    "threads=1",
    "model.d_token=32",
    "model.token_ffn=48",
    "model.vocab_size=64",
)
TINY_CONCEPTS = ("model.d_concept=64", "model.concept_ffn=80")


def tiny_bench(architecture: str) -> Bench:
    return Bench("demo", architecture, [*TINY, *(TINY_CONCEPTS if architecture == "dlcm" else ())], CPU)


def test_the_detector_scores_like_a_learned_one_and_draws_at_its_ratio() -> None:
    detector = RatioDetector(tiny_config(target_ratio=4.0))
    tokens = PackedLayout.from_cu_seqlens(torch.arange(21) * 200, 4000)
    h_TE = torch.randn(4000, 16)
    decided, again = (detector(h_TE, tokens, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(decided.probability_T, detector.score(h_TE, tokens)) and decided.probability_T.requires_grad
    assert torch.equal(decided.boundary_T, again.boundary_T) and decided.boundary_T[tokens.is_first_T].all()
    assert 4000 / int(decided.boundary_T.sum()) == pytest.approx(4, rel=0.1)


def test_the_clock_charges_what_lies_between_marks() -> None:
    clock = StageClock(CPU)
    clock.mark("update", "nobody's")  # nothing lies before it
    time.sleep(0.02)
    clock.start()
    for _ in range(2):
        time.sleep(0.01)
        clock.mark("forward", "a")
    clock.mark("forward", "b")
    totals = clock.read()
    assert list(totals) == [("forward", "a"), ("forward", "b")]
    assert 20 <= totals["forward", "a"] < 200 and totals["forward", "b"] < 10
    assert clock.read() == {}


@pytest.mark.parametrize("architecture", ["dlcm", "llama"])
def test_throughput_counts_what_the_steps_had(architecture: str) -> None:
    bench = tiny_bench(architecture)
    before = bench.model.lm_head.weight.clone()
    row = measure_throughput(bench, warm_up=1, steps=3, seconds=0)
    assert row["steps"] == 3 and not torch.equal(before, bench.model.lm_head.weight)
    assert row["tokens_per_second"] == pytest.approx(2 * 64 * 1000 / row["step_ms"])
    forward = forward_flops(bench.model.config, 64, row["tokens_per_concept"]).total
    assert row["flops_per_token"] == pytest.approx(3 * forward)
    assert row["tflops"] == pytest.approx(row["flops_per_token"] * row["tokens_per_second"] / 1e12)
    assert row["mfu"] is None and row["peak_gb"] is None
    assert (row["tokens_per_concept"] is None) == (architecture == "llama")
    bench.set_micro_batches(2)
    assert measure_throughput(bench, 0, 1, 0)["tokens_per_second"] > 0 and bench.describe()["micro_batches"] == 2
    bench.set_micro_batches(1)
    bench.set_documents(1, 32)
    assert bench.describe()["sequence_length"] == 32
    if architecture == "llama":  # the other's FLOPs also vary with its concepts
        assert measure_throughput(bench, 0, 1, 0)["flops_per_token"] < row["flops_per_token"]


def test_a_skipped_step_is_no_measurement() -> None:
    bench = tiny_bench("llama")
    with torch.no_grad():
        bench.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(EvaluationError, match="skipped"):
        measure_throughput(bench, warm_up=0, steps=1, seconds=0)


@pytest.mark.parametrize("architecture", ["dlcm", "llama"])
def test_stages_follow_each_other_and_add_up(architecture: str) -> None:
    bench = tiny_bench(architecture)
    began = time.perf_counter()
    rows = measure_breakdown(bench, warm_up=0, steps=2)
    ms = 1000 * (time.perf_counter() - began) / 2
    stages = [
        stage for stage in STAGES[:-1] if architecture == "dlcm" or stage in ("embedding", "decoder", "head and loss")
    ]
    assert [(row["pass"], row["stage"]) for row in rows] == [
        *(("forward", stage) for stage in stages),
        *(("backward", stage) for stage in reversed(stages)),
        ("update", "optimiser"),
    ]
    assert all(row["ms"] > 0 for row in rows) and 0.3 * ms < sum(row["ms"] for row in rows) <= ms
    hooks = [module for module in bench.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


def fake_rows(dlcm_tflops: float = 500.0, dlcm_tokens: float = 60_000.0, peak: float = 70.0) -> list[Row]:
    """Everything the benchmark measures; the LLaMA has 500 TFLOP/s, 50,000 tokens/s and an MFU of 0.5."""
    rows: list[Row] = []
    for model, cross_attention in MODELS:
        is_dlcm = model == "dlcm"
        key: Row = {
            "model": model,
            "cross_attention": cross_attention,
            "overrides": "",
            "documents": 2,
            "micro_batches": 1,
            "parameters": 10**9,
        }
        numbers: Row = {
            "tflops": dlcm_tflops if is_dlcm else 500.0,
            "tokens_per_second": dlcm_tokens if is_dlcm else 50_000.0,
        }
        numbers |= {
            "step_ms": 300.0,
            "mfu": 0.5,
            "peak_gb": peak if is_dlcm else 60.0,
            "reserved_gb": 75.0,
            "flops_per_token": 8e9,
        }
        numbers |= {"tokens_per_concept": 4.0 if is_dlcm else None, "steps": 12, "misses": 1}
        several = {**key, "micro_batches": 16, "sequence_length": 8192, **numbers}
        rows.append({"part": "accumulation", "pair": "table3", **several})
        for pair in PAIRS:
            rows.append({"part": "throughput", "pair": pair, **key, "sequence_length": 8192, **numbers})
            stages = [("forward", stage) for stage in STAGES[:-1]] + [("backward", stage) for stage in STAGES[:-1]]
            for which, stage in [*stages, ("update", "optimiser")]:
                rows.append({"part": "breakdown", "pair": pair, **key, "pass": which, "stage": stage, "ms": 10.0})
        for length in (1024, 8192, 65536):
            if cross_attention != "replicated":
                rows.append({"part": "length", "pair": "table3", **key, "sequence_length": length, **numbers})
    return rows


def test_bars_hold_exactly_where_they_should() -> None:
    bars = must_show(fake_rows())
    assert len(bars) == 3 + 2 + 2 + 1 + 1 and all(bar.holds for bar in bars.values())
    assert [bar.value for bar in bars.values()] == pytest.approx([1, 1, 1, 0.5, 0.5, 1.2, 1.2, 1.2, 70])
    bars = must_show(fake_rows(dlcm_tflops=470, dlcm_tokens=57_000, peak=81))
    assert [bar.holds for bar in bars.values()] == [False] * 3 + [True] * 2 + [False] * 4


def test_only_long_documents_and_rows_as_configured_count() -> None:
    rows = fake_rows()
    for row in rows:
        if row["part"] == "length" and row["sequence_length"] == 1024 and row["model"] == "dlcm":
            row["tokens_per_second"] = 1.0
        if row["part"] == "throughput" and row["pair"] == "small" and row["model"] == "dlcm":
            row["overrides"] = "batch.rows=1"
    bars = list(must_show(rows).values())
    assert bars[0].value is None and bars[7].value == pytest.approx(1.2)
    assert page(fake_record(), must_show(rows), rows).count("| `batch.rows=1` |") == 2  # DLCM, by both kernels


def test_nothing_measured_holds_nothing(tmp_path: Path) -> None:
    failed: Row = {
        "part": "throughput",
        "pair": "small",
        "model": "llama",
        "cross_attention": None,
        "overrides": "",
        "note": "error: no",
    }
    for rows in ([], [failed]):
        assert not any(bar.holds for bar in must_show(rows).values())
        plot(tmp_path / "empty.png", rows)
        assert summary(rows)


def test_later_rows_replace_what_they_measure_again() -> None:
    old, new = fake_rows(), fake_rows(dlcm_tflops=1.0)
    stage = {"part": "breakdown", "pair": "small", "model": "llama", "cross_attention": None, "overrides": ""}
    stage["note"] = "error: no"
    merged = merge_rows([old, [row for row in new if row["part"] == "length"], [stage]])
    of_small = [
        row for row in merged if row["part"] == "breakdown" and row["pair"] == "small" and row["model"] == "llama"
    ]
    assert of_small == [stage]
    assert all(row["tflops"] == 1.0 for row in merged if row["part"] == "length" and row["model"] == "dlcm")
    assert len([row for row in merged if row["part"] != "breakdown"]) == len(
        [row for row in old if row["part"] != "breakdown"]
    )
    other = {**old[0], "overrides": "batch.rows=1"}
    assert merge_rows([old, [other]]) == [*old, other]


def fake_record(device: str = "H100", command: str = "a") -> dict[str, Any]:
    return {"machine": {"device": device}, "commit": "abc", "versions": {"torch": "2"}, "command": command}


def test_records_of_one_machine_are_joined() -> None:
    joined = merge_records([fake_record(), fake_record(command="b"), fake_record()])
    assert joined["command"] == "a; b" and joined["commit"] == "abc"
    elsewhere = [fake_record(command=f"a --output /there{rest}") for rest in ("", " --pairs small")]
    assert merge_records(elsewhere)["command"] == "a; a --pairs small"
    with pytest.raises(EvaluationError, match="different machines"):
        merge_records([fake_record(), fake_record("H200")])
    with pytest.raises(EvaluationError, match="different versions"):
        merge_records([fake_record(), fake_record() | {"versions": {"torch": "0"}}])


def test_tables_say_what_rows_say() -> None:
    rows = fake_rows()
    medium = "| medium | DLCM | 2 x 8,192 | 1 | 1,000 M | 4.00 | 8.00 | 60,000 | 300.0 | 500 | 50.0% | 70.0 | 75.0 |"
    assert f"{medium} 1 / 12 |" in throughput_table(rows)
    assert throughput_table(rows).count("| 2 x 8,192 | 16 |") == len(MODELS)
    breakdown = breakdown_table(rows, "small").splitlines()
    assert "| optimiser | 10.00 | 10.00 | 10.00 |" in breakdown and "| all | 150.0 | 150.0 | 150.0 |" in breakdown
    assert "| backbone | 10.00 / 10.00 | 10.00 / 10.00 | 10.00 / 10.00 |" in breakdown
    assert "| 65,536 | 300 | 300 | 60,000 | 50,000 | 50.0% | 50.0% | 70.0 | 60.0 | 1.20 |" in length_table(rows)
    assert page(fake_record(), must_show(rows), rows).count("## A step by stage") == 3


def test_results_of_earlier_calls_are_merged_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = fake_rows()
    parts = {name: [row for row in rows if row["part"] == name] for name in PARTS}
    for name, of_part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fake_record(command=name) | {"rows": of_part}))
    assert (
        main(["--merge", *(str(tmp_path / f"{name}.json") for name in parts), "--output", str(tmp_path / "out")]) == 0
    )
    content = json.loads((tmp_path / "out" / "training.json").read_text())
    assert all(bar["holds"] for bar in content["must_show"].values()) and content["command"] == "; ".join(PARTS)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"training.{kind}" for kind in ("json", "csv", "md", "png")
    }
    assert "DLCM over LLaMA" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--parts", "length"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
