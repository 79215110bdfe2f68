"""The benchmark's caches are those that a text leaves, its memory is what tensors take, its bars follow from rows."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dlcm import DLCMForCausalLM
from dlcm.cache import ConceptCache, DecodingCache
from dlcm.causal_lm import PackedCausalLM
from dlcm.flops import cache_bytes_per_token, decode_bytes
from dlcm.layout import Extension
from eval import bench_decode
from eval.bench import Row
from eval.bench_decode import (
    BLOCK,
    TableDetector,
    attempt,
    build_model,
    compare_decisions,
    draw_boundaries,
    fill_,
    filled_cache,
    main,
    measure_decode,
    measure_flips,
    measure_prefill,
    model_config,
    needed,
    plan,
    windows,
)
from eval.bench_decode_report import (
    MODELS,
    PAIRS,
    context_bytes_table,
    couple,
    flips_table,
    merge_rows,
    must_show,
    page,
    plot,
    ratio_table,
    summary,
    why_it_loses,
)
from tests.conftest import VOCABULARY, tiny_baseline, tiny_baseline_config, tiny_config, tiny_dlcm
from tests.eval.conftest import Trained

CPU = torch.device("cpu")
BOTH = [pytest.param(tiny_dlcm, id="dlcm"), pytest.param(tiny_baseline, id="llama")]
H100 = 85.0e9


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def begun(model: PackedCausalLM, rows: int, room: int) -> DecodingCache:
    cache = model.new_cache(room)
    cache.begin(rows, CPU, model.embed_tokens.weight.dtype, model.lm_head.weight.dtype)
    return cache


# Boundaries


@pytest.mark.parametrize("ratio", [2.0, 3.0, 4.0, 5.5])
def test_every_block_of_boundaries_has_its_share(ratio: float) -> None:
    boundary_BP = draw_boundaries(3, 50 * BLOCK - 5, ratio, generator())
    assert boundary_BP.shape == (3, 50 * BLOCK - 5)
    counts = boundary_BP[:, : 49 * BLOCK].unflatten(1, (49, BLOCK)).sum(2)
    assert ((counts - BLOCK / ratio).abs() < 1).all() and (counts.sum(1) == int(49 * BLOCK / ratio)).all()
    assert not torch.equal(boundary_BP[0], boundary_BP[1])


def test_the_detector_scores_like_a_learned_one_and_reads_its_table() -> None:
    boundary_BP = torch.rand(3, 40, generator=generator()) < 0.4
    detector = TableDetector(tiny_config(), boundary_BP)
    new = Extension.of(torch.tensor([5, 1, 7]), torch.tensor([0, 20, 3]), CPU)
    h_TE, past_DE = torch.randn(13, 16), torch.randn(3, 16)
    decided = detector(h_TE, new.layout, None, past_DE)
    assert torch.equal(decided.probability_T, detector.score(h_TE, new.layout, past_DE))
    expected = [boundary_BP[0, :5], boundary_BP[1, 20:21], boundary_BP[2, 3:10]]
    assert torch.equal(decided.boundary_T, torch.cat(expected))
    assert not any("boundary" in name for name in detector.state_dict())


# Caches


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
@pytest.mark.parametrize(("ratio", "context"), [(4.0, 32), (4.0, 31), (2.5, 33), (1.0, 9), (8.0, 5), (3.0, 1)])
def test_a_filled_cache_keeps_its_books(visibility: str, ratio: float, context: int) -> None:
    model = tiny_dlcm(visibility=visibility)
    cache = begun(model, 3, 60)
    assert isinstance(cache, ConceptCache)
    fill_(cache, context, ratio, generator())
    assert (cache.length_B == context).all() and cache.columns == cache.longest == context
    assert cache.seen["columns"][0].sum(1).tolist() == [context] * 3
    concepts = int(cache.concepts_B[0])
    assert (cache.concepts_B == concepts).all() and cache.most_concepts == concepts
    assert context / ratio - 2 < concepts <= context / ratio
    count_BS, end_BS = cache.slots["count"][0], cache.slots["end"][0][:, 1 : concepts + 1]
    assert (count_BS.sum(1) == context).all() and (count_BS[:, concepts + 1 :] == 0).all()
    assert (end_BS.diff(dim=1) > 0).all() and (end_BS < context).all()
    start = int(end_BS[0, -1]) + 1 if concepts else 0
    assert (cache.open_count_B == context - start).all() and start < context
    states_BSE = cache.tokens["states"][0][:, start:context]
    torch.testing.assert_close(cache.open_sum_BE, states_BSE.sum(1))


@pytest.mark.parametrize(("segmenter", "pooling"), [("fixed", "mean"), ("learned", "mean"), ("learned", "last")])
def test_a_filled_cache_is_that_of_a_text_with_regular_boundaries(segmenter: str, pooling: str) -> None:
    """Counts and ends are those that a model with fixed boundaries leaves, and cropping recovers them."""
    model = tiny_dlcm(segmenter=segmenter, target_ratio=2.5, pooling=pooling)
    cache, read = begun(model, 2, 60), model.new_cache(60)
    assert isinstance(cache, ConceptCache)
    fill_(cache, 33, 2.5, generator())
    books = copy.deepcopy(cache)
    if segmenter == "fixed":
        model(torch.randint(VOCABULARY, (2, 33)), past_key_values=read)
        for name in ("count", "end"):
            assert torch.equal(cache.slots[name][0][:, :14], read.slots[name][0][:, :14])
        assert torch.equal(cache.concepts_B, read.concepts_B)
        assert torch.equal(cache.open_count_B, read.open_count_B)
    model.start(cache)
    for _ in range(9):
        assert model(torch.randint(VOCABULARY, (2, 1)), past_key_values=cache).logits.isfinite().all()
    cache.crop(33)
    assert torch.equal(cache.slots["count"][0][:, :14], books.slots["count"][0][:, :14])
    for name in ("concepts_B", "length_B"):
        assert torch.equal(getattr(cache, name), getattr(books, name))
    if pooling == "mean":
        assert torch.equal(cache.open_count_B, books.open_count_B)
        torch.testing.assert_close(cache.open_sum_BE, books.open_sum_BE)


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_filled_cache_decodes_on(build: Any, dtype: torch.dtype) -> None:
    model = build().to(dtype)
    cache = filled_cache(model, 2, 32, 48)
    for step in range(16):
        logits = model(torch.full((2, 1), step), past_key_values=cache).logits
        assert logits.isfinite().all()
    assert (cache.length_B == 48).all() and cache.moves == 0
    if isinstance(cache, ConceptCache):
        assert (cache.slots["count"][0][:, :-1].sum(1) == 48).all()


@pytest.mark.parametrize("config", [tiny_config(), tiny_baseline_config()])
def test_memory_is_what_tensors_take(config: Any) -> None:
    model = build_model(config, 3, CPU)
    assert model.dtype == torch.bfloat16
    cache = filled_cache(model, 3, 40, 50)
    rooms = [cache.tokens, cache.seen, *((cache.concepts, cache.slots) if isinstance(cache, ConceptCache) else ())]
    tensors = [x for room in rooms for tensors in room.tensors.values() for x in tensors]
    need = needed(config, 3, 50)
    assert need.cache == sum(x.nbytes for x in tensors)
    assert need.weights == 2 * model.num_parameters()
    assert need.fit(None) and need.fit(sum(need) + 4e9) and not need.fit(sum(need))
    in_use, keys_and_values = cache.bytes_in_use(), cache.key_value_bytes()
    assert keys_and_values <= in_use <= need.cache and (keys_and_values == in_use) == (len(rooms) == 2)
    # A concept is missing whose segment is open, and slot 0 is no concept's.
    assert keys_and_values / (3 * 40) == pytest.approx(cache_bytes_per_token(config).total, rel=0.1)


def test_what_does_not_fit_is_replaced_by_what_does() -> None:
    configs = [model_config("table3", architecture, None, 33_000) for architecture in MODELS]
    cases = plan(configs, (1024, 8192, 32768), (1, 16, 64), 272, H100)
    assert cases == [
        *((1024, batch) for batch in (1, 16, 64)),
        *((8192, batch) for batch in (1, 16, 64)),
        *((32768, batch) for batch in (1, 8, 16, 64)),
    ]
    assert plan(configs, (32768,), (16,), 272, H100) == [(32768, 8), (32768, 16)]
    assert plan(configs, (32768,), (16,), 272, None) == [(32768, 16)]
    assert plan(configs, (32768,), (1,), 272, 5e9) == [(32768, 1)]  # nothing fits
    llama = needed(configs[1], 16, 32768 + 272)
    assert llama.cache == pytest.approx(104e9, rel=0.01) and str(llama).startswith(
        "would need 106.5 GB: 2.6 of weights"
    )
    assert needed(configs[0], 16, 32768 + 272).fit(H100) and not llama.fit(H100)


def test_configurations_are_changed_as_asked() -> None:
    config = model_config("medium", "dlcm", 8.0, 33_000)
    assert (config.target_ratio, config.max_position_embeddings) == (8.0, 33_000)
    config = model_config("medium", "llama", 8.0, 100)
    assert config.max_position_embeddings == 2048


# Measurements


@pytest.mark.parametrize("config", [tiny_config(target_ratio=4.0), tiny_baseline_config()])
def test_steps_are_measured_at_the_ratio(config: Any) -> None:
    model = build_model(config, 2, CPU)
    row = measure_decode(model, BLOCK - bench_decode.WARM_UP, 2, steps=BLOCK)
    assert row["tokens_per_second"] == pytest.approx(2000 / row["mean_ms"]) and row["p50_ms"] > 0
    assert row["steps"] == BLOCK and not row["graphs"] and row["bandwidth_share"] is None and row["peak_gb"] is None
    read = 2 * decode_bytes(config, BLOCK + BLOCK // 2, 2, row["tokens_per_concept"]).total
    assert row["read_gb"] == pytest.approx(read / 1e9) and 0 < row["read_weights_gb"] < row["read_gb"]
    assert row["bandwidth_tbs"] == pytest.approx(read / row["mean_ms"] / 1e9)
    assert row["kv_bytes_per_token_closed_form"] == cache_bytes_per_token(config).total
    if isinstance(model, DLCMForCausalLM):
        assert row["tokens_per_concept"] == 4 and 0.25 <= row["reasoning_share"] <= 0.5
    else:
        assert row["tokens_per_concept"] is None and row["reasoning_share"] is None
        assert row["kv_bytes_per_token"] == row["kv_bytes_per_token_closed_form"]


@pytest.mark.parametrize("config", [tiny_config(target_ratio=4.0), tiny_baseline_config()])
def test_prefill_is_measured_at_the_ratio(config: Any) -> None:
    row = measure_prefill(build_model(config, 2, CPU), 32, 2)
    assert row["tokens_per_second"] == pytest.approx(64_000 / row["ms"]) and row["attention"] == "sdpa"
    assert row["tokens_per_concept"] == (pytest.approx(4, rel=0.2) if "target_ratio" in config.to_dict() else None)


def test_a_failure_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Row:
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    assert attempt({"part": "decode"}, fail) == {"part": "decode", "note": "error: CUDA out of memory"}
    assert "Traceback" in capsys.readouterr().err
    assert attempt({"a": 1}, lambda: {"b": 2}) == {"a": 1, "b": 2}


def test_flips_are_counted_with_their_distance() -> None:
    probability_BL = torch.tensor([[1.0, 0.3, 0.51, 0.9], [1.0, 0.499, 0.2, 0.505]])
    read_BL = torch.tensor([[1.0, 0.3, 0.49, 0.9], [1.0, 0.5, 0.2, 0.506]])
    difference_BL = torch.tensor([[0.1, 0.2, 7.0, 8.0], [0.3, 9.0, 9.0, 9.0]])
    pair = (probability_BL, probability_BL >= 0.5), (read_BL, read_BL >= 0.5)
    row = compare_decisions(*pair, difference_BL, 0.5)
    assert row["flips"] == 2 and row["tokens"] == 8 and row["boundaries"] == 5
    assert row["distances"] == pytest.approx([0.001, 0.01], rel=1e-4)
    assert row["largest_distance"] == row["distances"][-1]
    assert row["tokens_within"] == 3 and row["tokens_before_flips"] == 3
    assert row["largest_logit_difference"] == pytest.approx(0.3)
    assert row["largest_probability_difference"] == pytest.approx(0.02, rel=1e-4)
    same = compare_decisions(pair[0], pair[0], torch.zeros(2, 4), 0.5)
    assert same["flips"] == same["tokens_within"] == same["largest_logit_difference"] == 0
    assert same["largest_distance"] is None and same["tokens_before_flips"] == 8


@pytest.mark.parametrize("piece", [1, 7])
def test_in_full_precision_nothing_flips(piece: int) -> None:
    model = tiny_dlcm()
    ids_BL = torch.randint(VOCABULARY, (3, 40), generator=generator())
    row = measure_flips(model, ids_BL, piece)
    assert row["tokens"] == 120 and row["flips"] == 0 and row["tokens_before_flips"] == 120
    assert row["largest_logit_difference"] < 1e-5 and row["largest_probability_difference"] < 1e-12


def test_windows_are_spread_over_the_text() -> None:
    ids_T = torch.arange(100)
    assert windows(ids_T, 3, 20)[:, 0].tolist() == [0, 40, 80]
    assert windows(ids_T, 1, 100).shape == (1, 100) and windows(ids_T, 2, 99)[:, 0].tolist() == [0, 1]


# What is said about rows


def fake_rows(speed: float = 1.6, kv: float = 0.4) -> list[Row]:
    """Everything the benchmark measures; the LLaMA makes 100 tokens/s, and does not fit where it does not."""
    rows: list[Row] = []
    for model in MODELS:
        is_dlcm = model == "dlcm"
        rate = 100 * (speed if is_dlcm else 1.0)
        numbers: Row = {"tokens_per_second": rate, "mean_ms": 10.0, "p50_ms": 9.0, "peak_gb": 20.0}
        numbers |= {"tokens_per_concept": 4.0 if is_dlcm else None, "reasoning_share": 0.25 if is_dlcm else None}
        numbers |= {"read_gb": 2.0 if is_dlcm else 3.0, "read_weights_gb": 1.0, "bandwidth_tbs": 0.2 * rate / 100}
        numbers |= {"bandwidth_share": 0.6, "kv_bytes_per_token": 1000 * (kv if is_dlcm else 1)}
        numbers |= {"kv_bytes_per_token_closed_form": 500.0, "cache_bytes_per_token": 1100.0}
        for pair in PAIRS:
            key: Row = {"pair": pair, "model": model, "ratio": 4.0 if is_dlcm else None}
            for context in (1024, 8192, 32768):
                for batch in (1, 8, 16):
                    of_case = {"part": "decode", **key, "context": context, "batch": batch}
                    if (pair, model, context, batch) == ("table3", "llama", 32768, 16):
                        rows.append({**of_case, "needs_gb": 106.0, "note": "would need 106.0 GB"})
                    else:
                        rows.append({**of_case, **numbers})
                passes = {"tokens_per_second": rate, "ms": 5.0, "tflops": 400.0, "mfu": 0.4, "peak_gb": 30.0}
                passes |= {"tokens_per_concept": 4.0 if is_dlcm else None}
                for compiled in (False, True):
                    of_case = {"part": "prefill", **key, "context": context, "batch": 1, "compiled": compiled}
                    rows.append({**of_case, **passes})
        rows.append({"part": "trained", **key, "pair": "runs/x", "context": 100, "batch": 1, **numbers})
    flips: Row = {"tokens": 1000, "boundaries": 250, "flips": 2, "largest_distance": 1e-3, "tokens_within": 3}
    flips |= {"largest_probability_difference": 2e-3, "tokens_before_flips": 700, "largest_logit_difference": 0.1}
    key = {"part": "flips", "pair": "runs/x", "model": "dlcm", "ratio": 4.0, "context": 100, "batch": 10}
    for reading, piece in (("steps", 1), ("chunks", 96)):
        rows.append(
            {**key, "reading": reading, "piece": piece, "dtype": "bfloat16", **flips, "distances": [1e-4, 1e-3]}
        )
    return rows


def test_bars_hold_exactly_where_they_should() -> None:
    bars = must_show(fake_rows())
    assert [name.partition(":")[0] for name in bars] == [
        "kv_bytes_table3_r4",
        "decode_table3_batch1_1k",
        "decode_table3_batch16_32k",
        "decode_medium_batch16_32k",
        "prefill_table3_32k",
    ]
    assert [bar.value for bar in bars.values()] == pytest.approx([0.4, 1.6, 1.6, 1.6, 1.6])
    assert all(bar.holds for bar in bars.values())
    assert sum(name.endswith("the largest that fits both: 8") for name in bars) == 1
    assert [bar.holds for bar in must_show(fake_rows(1.1, 0.51)).values()] == [False, True, False, False, False]


def test_another_ratio_stands_beside_and_no_bar_looks_at_it() -> None:
    rows = fake_rows()
    others = [row | {"ratio": 8.0, "tokens_per_second": 1.0} for row in rows if row["model"] == "dlcm"]
    assert must_show(merge_rows([rows, others])) == must_show(rows)
    table = ratio_table(merge_rows([rows, others]))
    assert "| table3 | 4 | 16 | 1.60 | 1.60 | DLCM alone |" in table and "| table3 | 8 | 16 | 0.01 |" in table


def test_nothing_measured_holds_nothing(tmp_path: Path) -> None:
    failed: Row = {"part": "decode", "pair": "small", "model": "dlcm", "ratio": 4.0, "context": 1024, "batch": 1}
    failed["note"] = "error: no"
    for rows in ([], [failed]):
        assert len(must_show(rows)) == 5 and not any(bar.holds for bar in must_show(rows).values())
        plot(tmp_path / "empty.png", rows)
        assert summary(rows) and page(fake_record(), must_show(rows), rows)


def test_later_rows_replace_what_they_measure_again() -> None:
    old, new = fake_rows(), fake_rows(speed=2.0)
    merged = merge_rows([old, [row for row in new if row["part"] == "prefill"]])
    assert len(merged) == len(old)
    assert {row["tokens_per_second"] for row in merged if row["part"] == "prefill"} == {100.0, 200.0}
    assert {row.get("tokens_per_second") for row in merged if row["part"] == "decode"} == {100.0, 160.0, None}


def test_why_it_loses_is_bytes_or_rate() -> None:
    def reason(**ours: float) -> str | None:
        rows = [row | (ours if row["model"] == "dlcm" else {}) for row in fake_rows()]
        return why_it_loses(couple(rows, "decode", "table3", 1024, 1))

    assert reason() is None
    slow = reason(tokens_per_second=50.0, read_gb=6.0, read_weights_gb=5.0, bandwidth_tbs=0.1)
    assert slow == "reads 2.00 times as much (weights 5 GB, not 1), reads at 0.50 of the rate"
    assert reason(tokens_per_second=99.0, bandwidth_tbs=0.1) == "reads at 0.50 of the rate"


def fake_record() -> dict[str, Any]:
    return {"machine": {"device": "H100"}, "commit": "abc", "versions": {"torch": "2"}, "command": "a"}


def test_tables_say_what_rows_say() -> None:
    rows = fake_rows()
    assert "| table3 | 4 | 400 | 1,000 | 500 | 500 | 1,100 | 1,100 | 0.400 | 1.000 |" in context_bytes_table(rows)
    assert "| runs/x | bfloat16 | chunks of 96 | 10 x 100 | 250 | 2 of 1,000 | 1.0e-03 | 3 |" in flips_table(rows)
    text = page(fake_record(), must_show(rows), rows)
    assert text.count("| as they are |") == text.count("| compiled |") == 9
    assert "## Trained models on text" in text and "## Threshold flips" in text
    assert "| decode | table3 | LLaMA | - | 32,768 | 16 | would need 106.0 GB |" in text


# The command

TOY = ["--pairs", "demo", "--contexts", "16", "--batches", "1", "2", "--steps", "4"]


@pytest.fixture(autouse=True)
def _toy_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"WARM_UP": 2, "PREFILL_WARM_UP": 1, "PREFILLS": 2, "FLIP_LENGTH": 24, "FLIP_ROWS": 2, "FLIP_CHUNK": 7}
    for name, size in sizes.items():
        monkeypatch.setattr(bench_decode, name, size)


def test_a_toy_run_writes_everything_and_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOY, "--output", str(tmp_path / "a")]) == 0
    content = json.loads((tmp_path / "a" / "decode.json").read_text())
    assert len(content["rows"]) == 2 * (2 + 2) and not any("note" in row for row in content["rows"])
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert written == {f"decode.{kind}" for kind in ("json", "csv", "md", "png")}
    told = capsys.readouterr().out
    assert told.count("\ndecode  demo") + told.startswith("decode  demo") == 4 and "| demo | 4 | 2 |" in told
    arguments = ["--merge", str(tmp_path / "a" / "decode.json"), "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    again = json.loads((tmp_path / "b" / "decode.json").read_text())
    assert again["rows"] == content["rows"] and again["must_show"] == content["must_show"]


def test_a_killed_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = bench_decode.measure_decode, []

    def measure(*arguments: Any) -> Row:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        if len(calls) == 1:
            raise RuntimeError("no")
        return real(*arguments)

    monkeypatch.setattr(bench_decode, "measure_decode", measure)
    with pytest.raises(KeyboardInterrupt):
        main([*TOY, "--parts", "decode", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row.get("note") for row in rows] == ["error: no", None] and rows[1]["tokens_per_second"] > 0


def test_trained_models_are_read_and_compared(tmp_path: Path, trained: Trained) -> None:
    arguments = ["--parts", "trained", "--checkpoint", str(trained.dlcm), "--baseline", str(trained.llama)]
    arguments += ["--contexts", "32", "10000", "--batches", "1", "2", "--steps", "4", "--output", str(tmp_path)]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert not any("note" in row for row in rows)
    speeds = [row for row in rows if row["part"] == "trained"]
    assert {row["context"] for row in speeds} == {32, 256 - bench_decode.WARM_UP - 4} and len(speeds) == 2 * 2 * 2
    flips = [row for row in rows if row["part"] == "flips"]
    assert [(row["dtype"], row["reading"]) for row in flips] == [
        (dtype, reading) for dtype in ("float32", "bfloat16") for reading in ("steps", "chunks")
    ]
    assert all(row["tokens"] == 48 for row in flips) and flips[0]["largest_logit_difference"] < 1e-3


def test_a_text_may_be_given(tmp_path: Path, trained: Trained) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Nobody spoke. " * 20, encoding="utf-8")
    arguments = ["--checkpoint", str(trained.dlcm), "--parts", "trained", "--text", str(text), "--contexts", "32"]
    assert main([*arguments, "--batches", "1", "--steps", "4", "--output", str(tmp_path)]) == 0
    assert "## Threshold flips" in (tmp_path / "decode.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "trained"], "give --checkpoint"),
        (["--ratio", "1"], "must be more than 1"),
        (["--checkpoint", "LLAMA", "--parts", "trained"], "give the DLCM as --checkpoint"),
        (["--checkpoint", "DLCM", "--parts", "trained", "--steps", "300"], "lower --steps"),
    ],
)
def test_impossible_requests(
    arguments: list[str], message: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"DLCM": str(trained.dlcm), "LLAMA": str(trained.llama)}
    assert main([*(paths.get(word, word) for word in arguments), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
