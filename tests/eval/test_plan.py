"""The plan's formulas: against bytes that two processes hold and send, one GPU's closed form, and sums by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dlcm.flops import parameter_counts, training_flops, training_memory
from eval.accounting import build
from eval.plan import Cluster, Groups, Memory, Traffic, groups, main, memory, plan, times, traffic
from tests.conftest import random_documents, tiny_baseline_config, tiny_config
from tests.ranks import run_two_ranks
from train.config import ParallelConfig, build_model_config, load_run_config
from train.distributed import Ranks
from train.parallel import distribute

CONFIGS = Path(__file__).parents[2] / "configs"
EVEN = {"vocab_size": 24}  # nothing is padded on two ranks
MODELS = {"dlcm": tiny_config(**EVEN), "llama": tiny_baseline_config(**EVEN)}
GB = 1e9
H100 = Cluster(memory=80 * GB, peak=1e15, mfu=0.5, machine=8, nvlink=450 * GB, infiniband=50 * GB)


def rank_main(rank: int, directory: str) -> None:
    """What each rank holds, and sends in a step of one micro-batch, in bf16."""
    sent = {"gathers": 0, "scatters": 0}

    def counting(name: str, older: str, which: str) -> None:
        name = name if hasattr(dist, name) else older
        original = getattr(dist, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            tensors = [*arguments, *options.values()]
            smaller = min((x for x in tensors if isinstance(x, torch.Tensor)), key=torch.Tensor.numel)
            sent[which] += smaller.numel() * smaller.itemsize
            return original(*arguments, **options)

        setattr(dist, name, counted)

    counting("all_gather_single", "all_gather_into_tensor", "gathers")
    counting("reduce_scatter_single", "reduce_scatter_tensor", "scatters")
    ranks = Ranks.__new__(Ranks)
    ranks.rank, ranks.size, ranks.local_rank = rank, 2, rank
    results = {}
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = build(config).train()
        parallel = distribute(model, ParallelConfig("fsdp"), torch.device("cpu"), ranks, bf16=True)
        for which in sent:
            sent[which] = 0
        ids = torch.cat(random_documents([20], rank))[None]
        cu_seqlens = torch.tensor([0, 20])
        with torch.autocast("cpu", torch.bfloat16):
            loss = parallel(ids, labels=ids, cu_seqlens=cu_seqlens, return_logits=False).loss
        loss.backward()
        held = sum(x.to_local().numel() * x.itemsize for x in model.parameters() if isinstance(x, DTensor))
        results[name] = sent | {"held": held}
    (Path(directory) / f"{rank}.json").write_text(json.dumps(results))


def test_two_ranks_hold_and_send_what_the_formulas_say(tmp_path: Path):
    run_two_ranks(rank_main, tmp_path)
    for rank in range(2):
        counted = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, config in MODELS.items():
            parts = groups(config)
            expected = traffic(parts, "fsdp", gpus=2, shards=2)
            assert counted[name]["gathers"] == expected.gathers and counted[name]["scatters"] == expected.scatters
            assert counted[name]["held"] == memory(config, parts, "fsdp", 2, 20, False, False).parameters


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_groups_are_all_parameters(config: Any):
    parts = groups(config)
    assert parts.total == sum(parameter_counts(config).values()) and 0 < parts.largest < parts.blocks


@pytest.mark.parametrize("name", ["dlcm", "llama"])
@pytest.mark.parametrize("accumulates", [False, True])
def test_memory_is_that_of_one_gpu_in_other_shares(name: str, accumulates: bool):
    """Which tests/dlcm/test_flops.py holds against measurements."""
    config = build_model_config(load_run_config(CONFIGS / "table3" / f"{name}.yaml"))
    parts, tokens = groups(config), 8192
    alone = training_memory(config, tokens, accumulates=accumulates)
    ddp = memory(config, parts, "ddp", 1, tokens, accumulates, False)
    # Buckets are there from the start, as the gradients of an earlier micro-batch are.
    assert ddp.peak == training_memory(config, tokens, accumulates=True).peak and ddp.gathered == 0
    sharded = memory(config, parts, "fsdp", 64, tokens, accumulates, False)
    assert sharded.parameters == 4 * parts.total / 64 and sharded.moments == 8 * parts.total / 64
    assert sharded.activations == ddp.activations == alone.activations + alone.head
    assert sharded.gathered == 4 * parts.others + 4 * parts.largest
    own = 4 * parts.total if accumulates else 4 * parts.total / 64 + 4 * parts.others + 12 * parts.largest
    assert sharded.gradients == own
    recomputed = memory(config, parts, "fsdp", 64, tokens, accumulates, True)
    assert recomputed.activations < 0.5 * sharded.activations and recomputed[:4] == sharded[:4]


def test_traffic_by_hand():
    parts = Groups(blocks=800, largest=100, others=200)
    assert traffic(parts, "ddp", 8, 1) == Traffic(0, 0, 2 * 7 / 8 * 4000)
    assert traffic(parts, "fsdp", 8, 8) == Traffic(7 / 8 * (4 * 800 + 4 * 200), 7 / 8 * 4000, 0)
    assert traffic(parts, "hybrid", 32, 8) == Traffic(7 / 8 * 4000, 7 / 8 * 4000, 2 * 3 / 4 * 4000 / 8)
    assert traffic(parts, "ddp", 1, 1) == Traffic(0, 0, 0)


def test_rings_within_and_through_machines():
    assert [H100.rate(gpus) / GB for gpus in (2, 8, 9, 512)] == [450, 450, 400, 400]
    slow = Cluster(memory=1, peak=1, mfu=1, machine=1, nvlink=450 * GB, infiniband=50 * GB)
    assert slow.rate(2) == 50 * GB


def test_times_by_hand():
    """One second of compute a micro-batch, half a second of gathers, two of gradients."""
    config = MODELS["llama"]
    needed = training_flops(config, 20).total * 20
    cluster = Cluster(memory=1, peak=2 * needed, mfu=0.5, machine=8, nvlink=100.0, infiniband=10.0)
    row = {"strategy": "hybrid", "gpus": 16, "shards": 8, "rows": 1, "micro_batches": 3, "recompute": False}
    sent = Traffic(gathers=50.0, scatters=100.0, between=10.0)
    found = times(config, 20, sent, row, cluster)
    assert found["compute_ms"] == pytest.approx(3000) and found["communication_ms"] == pytest.approx(3500)
    assert found["sent_gb"] * 1e9 == pytest.approx(260)
    assert found["mfu_added"] == pytest.approx(0.5 * 3 / 6.5)
    assert found["mfu_overlapped"] == pytest.approx(0.5 * 3 / (3 + 2 - 2 / 3))
    recomputed = times(config, 20, sent, row | {"recompute": True}, cluster)
    again = training_flops(config, 20, recompute=True).total * 20 / needed
    assert recomputed["compute_ms"] == pytest.approx(3000 * again)
    assert recomputed["mfu_added"] == pytest.approx(0.5 * 3 / (3 * again + 3.5))
    ddp = times(config, 20, Traffic(0.0, 0.0, 160.0), row | {"strategy": "ddp", "shards": 1}, cluster)
    assert ddp["communication_ms"] == pytest.approx(2000)  # through machines, at 8 times the rate of an adapter


def test_micro_batches_are_as_large_as_fits():
    large, small, none = (
        plan("small", "dlcm", "ddp", 8, 2**22, False, dataclasses.replace(H100, memory=gigabytes * GB))
        for gigabytes in (80, 8, 1)
    )
    assert large["rows"] > small["rows"] and not none["fits"]
    for row, most in ((large, 72), (small, 7.2)):
        assert row["fits"] and row["rows"] * row["micro_batches"] == 512 and row["peak_gb"] <= most
        assert sum(row[f"{name}_gb"] for name in Memory._fields) == pytest.approx(row["peak_gb"])


def test_the_command_says_that_nothing_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--pair", "demo", "--gpus", "8", "16", "--step-tokens", "65536", "--output", str(tmp_path)]
    assert main(command) == 0
    text = (tmp_path / "scale_out_plan.md").read_text()
    assert text.startswith("# The demo pair on many GPUs: planned, not measured\n")
    written = json.loads((tmp_path / "scale_out_plan.json").read_text())
    assert written["must_show"] == {} and "not measured" in written["what"]
    kinds = [(row["gpus"], row["strategy"]) for row in written["rows"] if row["model"] == "dlcm"][::2]
    assert kinds == [(8, "ddp"), (8, "fsdp"), (16, "ddp"), (16, "fsdp"), (16, "hybrid")]
    assert main([*command, "--memory", "0.01"]) == 0
    assert "does not fit" in (tmp_path / "scale_out_plan.md").read_text()
    assert main([*command, "--gpus", "7"]) == 2
    assert "give a multiple of 1792" in capsys.readouterr().err
