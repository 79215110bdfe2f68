"""The benchmark's paths compute the function they are timed for, and what it reports follows from its rows."""

import json
from pathlib import Path

import pytest
import torch

from eval.bench import Row, write_csv, write_json
from eval.bench_attention import (
    LENGTHS,
    AttentionPath,
    Case,
    all_cases,
    all_paths,
    draw_problem,
    error_cases,
    exact_results,
    flex,
    main,
    relative_errors,
    replication,
    visible_pairs,
)
from eval.bench_attention_report import (
    LABELS,
    error_ratio,
    memory_spread,
    must_show,
    notes_table,
    page,
    plot,
    speedup,
    speedups_table,
    summary,
)
from eval.loading import EvaluationError

CPU = torch.device("cpu")


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["as many", "grouped"])
@pytest.mark.parametrize("path", [replication("sdpa"), flex(compiled=None)], ids=["replication", "flex"])
def test_paths_agree_with_the_dense_softmax(path: AttentionPath, kv_heads: int) -> None:
    boundary_T = torch.rand(61, generator=torch.Generator().manual_seed(0)) < 1 / 4
    problem = draw_problem((40, 1, 20), boundary_T, 4, kv_heads, 16, seed=0, device=CPU, dtype=torch.float64)
    exact = exact_results(problem, "replication")
    if path.prepare is None:
        for ours, theirs in zip(path.run("forward_backward", problem), exact, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        return
    for x in problem.inputs:
        x.requires_grad_(False)  # FlexAttention has no backward on the CPU
    for prepared in (None, path.prepare(problem.layout)):
        (out_THN,) = path.run("forward", problem, prepared)
        torch.testing.assert_close(out_THN, exact[0], rtol=0, atol=2e-6)  # the bias is fp32


def test_visible_pairs_are_those_of_the_mask() -> None:
    problem = draw_problem(
        (5, 3), torch.tensor([1, 0, 1, 0, 0, 1, 1, 1]) == 1, 1, 1, 2, seed=0, device=CPU, dtype=torch.float32
    )
    assert visible_pairs(problem.layout) == (1 + 1 + 2 + 2 + 2) + (1 + 2 + 3)


def test_cases_cover_lengths_ratios_and_head_dimensions() -> None:
    cases = all_cases()
    assert len(cases) == len(set(cases)) == 5 * len(LENGTHS)
    assert {case.head_dim for case in cases if (case.boundaries, case.ratio) != ("random", 4)} == {64}
    assert {(case.boundaries, case.ratio) for case in cases[: 2 * len(LENGTHS)]} == {("random", 4)}  # the bars' first
    regular = Case(20, "regular", 6, 64).boundary_T(0)
    assert regular.nonzero().flatten().tolist() == [0, 6, 12, 18]
    for ratio in (2, 4, 8):
        boundary_T = Case(8192, "random", ratio, 64).boundary_T(3)
        assert boundary_T[0] and 8192 / int(boundary_T.sum()) == pytest.approx(ratio, rel=0.1)
        assert not torch.equal(boundary_T, Case(8192, "random", ratio, 64).boundary_T(4))


def test_error_inputs_are_as_they_are_called() -> None:
    cases = error_cases()
    assert all(sum(case.lengths) == len(case.boundary_T) for case in cases.values())
    assert max(cases["documents of 1 to 7 tokens"].lengths) == 7
    assert cases["all boundary"].boundary_T.all() and cases["one concept"].boundary_T.sum() == 1


def test_paths_are_all_labelled() -> None:
    assert set(all_paths()) == set(LABELS)


def test_relative_errors_of_a_zero_gradient_are_those_of_the_output_gradient() -> None:
    one, zero = torch.full((4,), 2.0), torch.zeros(4)
    noise = torch.full((4,), 0.02)
    errors = relative_errors(
        [one + noise, noise, noise, one], [one.double(), zero.double(), zero.double(), one.double()], one
    )
    assert errors == pytest.approx({"out": 0.01, "dq": 0.01, "dk": 0.01, "dv": 0.0}, abs=1e-6)
    with pytest.raises(EvaluationError, match="dq is not finite"):
        relative_errors([one, one * torch.nan], [one.double()] * 2, one)


def fake_rows(**times: float) -> list[Row]:
    """Every case of the benchmark; `times` are those of forward and backward."""
    rows: list[Row] = []
    for case in all_cases():
        for name in ("replicated_fa2", "flex", "flex_static", "ragged"):
            if name not in times:
                continue
            row: Row = {"path": name, "length": case.length, "boundaries": case.boundaries, "ratio": case.ratio}
            row |= {"head_dim": case.head_dim, "slots": case.length // case.ratio + 1, "extra_bytes": 256 * case.length}
            for which, share in (("forward", 0.3), ("forward_backward", 1.0)):
                row[f"{which}_ms"] = share * times[name]
                row[f"{which}_prepared_ms"] = share * times.get(f"{name}_prepared", times[name])
                row[f"{which}_tflops"] = 100.0
                row[f"{which}_eager_ms"] = 1.0
            rows.append(row)
        rows.append(
            {key: row[key] for key in ("length", "boundaries", "ratio", "head_dim", "slots")}
            | {"path": "replicated_fa3", "note": "not installed"}
        )
    return rows


def fake_errors(ours: float, theirs: float, dtype: str = "bfloat16") -> list[Row]:
    key = {"input": "one document", "head_dim": 64, "dtype": dtype, "weighting": "replication"}
    return [
        {**key, "path": path, **dict.fromkeys(("out", "dq", "dk", "dv"), error)}
        for path, error in (("ragged", ours), ("replicated_fa2", theirs))
    ]


def test_bars_hold_exactly_where_they_should() -> None:
    rows = fake_rows(ragged=1.0, ragged_prepared=0.5, replicated_fa2=3.0, flex=2.1, flex_prepared=1.2, flex_static=9.0)
    bars = must_show(rows, fake_errors(3e-3, 2e-3))
    assert len(bars) == 2 * (3 + 2) + 3
    by_words = {
        words: [bar for name, bar in bars.items() if words in name] for words in ("2,048", "FA2, R = 4", "mask given")
    }
    assert [(bar.value, bar.holds) for bar in by_words["2,048"]] == [(3.0, True)] * 2  # not the prepared time
    assert [bar.holds for bar in by_words["FA2, R = 4"]] == [True, False, False] * 2
    assert [(bar.value, bar.holds) for bar in by_words["mask given"]] == [(1.2, False)] * 4
    rest = {name: bar for name, bar in bars.items() if "R = 4" not in name}
    assert [bar.value for bar in rest.values()] == pytest.approx([2.1, (1 + 1 / 2) / (1 + 1 / 8), 1.5], rel=1e-3)
    assert [bar.holds for bar in rest.values()] == [True, True, True]


def test_the_faster_flex_attention_counts() -> None:
    for faster, slower in (("flex", "flex_static"), ("flex_static", "flex")):
        times = {faster: 1.4, f"{faster}_prepared": 1.25, slower: 9.0}
        bars = must_show(fake_rows(ragged=1.0, replicated_fa2=9.0, **times), [])
        assert [bar.value for name, bar in bars.items() if "mask given" in name] == [1.25] * 4
        assert [bar.value for name, bar in bars.items() if "mask build" in name] == [1.4]


def test_results_of_earlier_calls_are_merged_without_a_gpu(tmp_path: Path) -> None:
    recorded = {"machine": {"device": "H100"}, "commit": "abc", "versions": {"torch": "2"}, "command": "first"}
    rows, errors = fake_rows(ragged=1.0, replicated_fa2=3.0, flex=2.1, flex_prepared=1.4), fake_errors(2e-3, 2e-3)
    later = [row | {"forward_backward_ms": 0.5} for row in rows if row["path"] == "ragged" and row["length"] == 2048]
    for name, content in (("first", rows), ("second", later)):
        text = json.dumps({**recorded, "command": name, "rows": content, "errors": errors if content is rows else []})
        (tmp_path / f"{name}.json").write_text(text)
    sources = [str(tmp_path / f"{name}.json") for name in ("first", "second")]
    assert main(["--merge", *sources, "--output", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "attention.json").read_text())
    assert content["command"] == "first; second"
    assert len(content["rows"]) == len(rows) and len(content["errors"]) == len(errors)
    faster = [row for row in content["rows"] if row.get("forward_backward_ms") == 0.5]
    assert {(row["path"], row["length"]) for row in faster} == {("ragged", 2048)}


def test_what_was_not_measured_does_not_hold() -> None:
    rows = fake_rows(ragged=1.0, replicated_fa2=9.0, flex=9.0, flex_static=9.0)
    rows = [row for row in rows if row["length"] <= 8192]
    for row in rows:
        if row["path"] == "flex" and row["length"] == 4096:  # one case of many
            row.pop("forward_backward_ms")
    bars = must_show(rows, [])
    missing = {name for name, bar in bars.items() if bar.value is None}
    assert all(not bars[name].holds for name in missing)
    assert {name for name in bars if "16,384" in name or "mask build" in name or "error" in name} == missing


def test_memory_spread_sees_what_grows_with_r() -> None:
    linear = [{"length": 4096, "slots": 4096 // ratio, "extra_bytes": 256 * 4096} for ratio in (2, 4, 8)]
    by_ratio = [{**row, "extra_bytes": 64 * 4096 * ratio} for row, ratio in zip(linear, (2, 4, 8), strict=True)]
    assert memory_spread(linear) < 1.5 < 3 < memory_spread(by_ratio)
    assert memory_spread([{**linear[0]} | {"extra_bytes": 1}, {"length": 1, "slots": 1, "note": "error"}]) is None


def test_error_ratio_is_blind_below_the_noise_only() -> None:
    def ratio(ours: float, theirs: float, dtype: str) -> float | None:
        errors = fake_errors(ours, theirs, dtype)
        return error_ratio(errors, errors[1])

    assert ratio(4e-3, 2e-3, "bfloat16") == 2
    assert ratio(1e-5, 1e-9, "bfloat16") == 1
    assert ratio(1e-3, 1e-9, "float16") == pytest.approx(1e-3 / 0.1 / 2**-10)
    assert error_ratio(fake_errors(1, 1)[1:], fake_errors(1, 1)[1]) is None


def test_speedups_are_other_over_ours() -> None:
    rows = fake_rows(ragged=2.0, replicated_fa2=5.0, flex=3.0, flex_prepared=2.5)
    ours = next(row for row in rows if row["path"] == "ragged")
    assert speedup(rows, ours, "replicated_fa2", "ms") == 2.5
    assert speedup(rows, ours, "flex", "prepared_ms") == 1.25
    assert speedup(rows, ours, "replicated_fa3", "ms") is None and speedup(rows, {}, "flex", "ms") is None
    of_one_setting = [row for row in rows if (row["ratio"], row["head_dim"]) == (6, 64)]
    assert "| 2,048 | 2.50 | 1.50 | 1.25 | 0.50 | 0.60 |" in speedups_table(of_one_setting)


def test_a_whole_report(tmp_path: Path) -> None:
    rows, errors = fake_rows(ragged=1.0, replicated_fa2=3.0, flex=2.1, flex_prepared=1.4), fake_errors(2e-3, 2e-3)
    recorded = {"machine": {"device": "none"}, "commit": "abc", "versions": {"torch": "2"}, "command": "python -m x"}
    bars = must_show(rows, errors)
    write_json(tmp_path / "attention.json", recorded, bars, rows=rows, errors=errors)
    write_csv(tmp_path / "attention.csv", rows)
    plot(tmp_path / "attention.png", rows)
    text = page(recorded, bars, rows, errors)
    assert text.count("## R = ") == 5 and "FlexAttention, mask given" in text and "**no**" in text
    assert summary(rows, errors, bars) and "not installed" in notes_table(rows)
    content = json.loads((tmp_path / "attention.json").read_text())
    assert set(content["must_show"]) == set(bars) and content["machine"] == {"device": "none"}
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
