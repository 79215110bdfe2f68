"""Where losses and boundaries lie: by hand on toys, as in validation on trained models, and whole in the report."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dlcm.layout import ConceptLayout, PackedLayout
from eval.analysis import (
    CONTENT,
    Concepts,
    Measured,
    Text,
    class_rows,
    content_of,
    content_rows,
    length_numbers,
    length_rows,
    main,
    measure,
    open_checkpoints,
    position_rows,
    positions,
    rank_correlation,
    surprisal_rows,
    text_of_files,
    validation_text,
)
from eval.loading import EvaluationError, LoadedCheckpoint, load_checkpoint
from eval.token_classes import TOKEN_CLASSES, token_class, token_classes, token_texts
from tests.conftest import VOCABULARY, tiny_baseline, tiny_config, tiny_dlcm
from tests.eval.conftest import TEXTS, Trained, prepare_labelled, train_tiny
from train.checkpoint import TrainingState
from train.config import RunConfig, load_run_config
from train.data import DataError, TokenShards, validation_batches
from train.distributed import Ranks
from train.evaluate import evaluate
from train.metrics import METRICS_FILE
from train.prepare import PrepareArguments, prepare
from train.tokenizer import byte_tokenizer, train_bpe

BYTES = byte_tokenizer()
STATE = TrainingState("data", "tokenizer", 1)


def some_text(start_D: Sequence[int], length: int, window: int, **labels: Any) -> Text:
    """Random ids of the tiny models' vocabulary."""
    ids_T = np.random.default_rng(0).integers(VOCABULARY, size=length)
    labels_D = labels.get("labels_D", [(None, "here")] * len(start_D))
    return Text.of("a toy", ids_T, np.array(start_D), labels_D, window)


def toy(text: Text, length_M: Sequence[int], seed: int = 0, baseline: bool = True) -> Measured:
    """A DLCM that forms concepts of these lengths, and has losses and probabilities of no meaning."""
    generator, length = np.random.default_rng(seed), len(text.ids_T)
    ours_T, theirs_T = np.where(text.opens_T, np.nan, generator.exponential(size=(2, length)))
    probability_T = np.where(text.opens_T, 1, generator.uniform(size=length))
    concepts = Concepts(probability_T, probability_T > 0.5, np.array(length_M))
    return Measured("toy", tiny_config(), STATE, ours_T, concepts, theirs_T if baseline else None, text)


# Text


def test_windows_are_those_of_training(trained: Trained) -> None:
    run = load_checkpoint(trained.dlcm).run
    shards = TokenShards(trained.data, "validation")
    state = dataclasses.replace(STATE, data_fingerprint=shards.fingerprint)
    for window, windows, most in ((32, 4, None), (50, 3, 1000), (7, 1, 100)):
        run.data.sequence_length = window
        text = validation_text(run, state, most)
        found, wanted = list(text.batches(windows)), list(validation_batches(shards, window, windows, most))
        for (ids_T, cu_seqlens), batch in zip(found, wanted, strict=True):
            assert torch.equal(ids_T, batch.input_ids) and torch.equal(cu_seqlens, batch.cu_seqlens)
        starts = np.flatnonzero(np.diff(text.document_T, prepend=-1))
        assert text.opens_T[starts].all() and len(starts) == len(text.source_D) == len(text.domain_D)
        assert (~text.opens_T).sum() == sum(batch.num_targets for batch in wanted)


def test_files_are_laid_out_as_prepared(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    rows = [{"domain": name, "source": f"of {name}", "text": text} for name, text in TEXTS.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepare(PrepareArguments(inputs=(str(file),), output=tmp_path / "data", validation_fraction=0))
    shards = TokenShards(tmp_path / "data", "train")
    text = text_of_files([str(file)], BYTES, 32, None)
    ids_T, start_D = shards.window(0, shards.num_tokens)
    assert np.array_equal(text.ids_T, ids_T)
    assert np.array_equal(np.flatnonzero(np.diff(text.document_T, prepend=-1)), start_D)
    assert list(zip(text.domain_D, text.source_D, strict=True)) == [(name, f"of {name}") for name in TEXTS]
    assert len(text_of_files([str(file)], BYTES, 32, 50).ids_T) == 50


# Models


@pytest.mark.parametrize(
    ("visibility", "wanted"),
    [("closed", [0, 1, 0, 1, 2, 0, 0, 1]), ("inclusive", [0, 0, 1, 0, 1, 2, 0, 0])],
)
def test_positions_of_boundaries_by_hand(visibility: Any, wanted: list[int]) -> None:
    boundary_T = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0]).bool()
    tokens = PackedLayout.from_cu_seqlens(torch.tensor([0, 6, 8]), 8)
    length_M = ConceptLayout.from_boundaries(tokens, boundary_T, visibility).real_length_M
    assert positions(Concepts(boundary_T.numpy(), boundary_T.numpy(), length_M.numpy())).tolist() == wanted


def measure_part_by_part(model: Any, text: Text) -> tuple[list[float], list[int]]:
    """The slow twin: reads each part alone, walks over its boundaries. Losses where there are some, and positions."""
    losses, places = [], []
    starts = np.flatnonzero(text.opens_T)
    for start, stop in zip(starts, [*starts[1:], len(text.ids_T)], strict=True):
        ids_T = torch.from_numpy(text.ids_T[start:stop])
        with torch.no_grad():
            output = model(input_ids=ids_T[None])
        log_p_TV = output.logits[0].log_softmax(1)
        losses += [-float(log_p_TV[t - 1, ids_T[t]]) for t in range(1, len(ids_T))]
        place = 0
        for t, boundary in enumerate(output.get("boundaries", torch.zeros(1, len(ids_T)))[0].tolist()):
            if boundary and model.config.visibility == "closed" and t:
                place = 0
            places.append(place)
            place = 0 if boundary and getattr(model.config, "visibility", "") == "inclusive" else place + 1
    return losses, places


@pytest.mark.parametrize("visibility", ["closed", "inclusive"])
def test_measured_is_what_each_part_alone_gives(visibility: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = some_text([0, 5, 6, 40, 71], 97, window=16)  # the last window has one token
    for logits in (1, 3 * 16 * VOCABULARY, 2**20):  # one window, three, or all at once
        monkeypatch.setattr("eval.analysis.LOGITS", logits)
        model = tiny_dlcm(visibility=visibility)
        loss_T, concepts = measure(LoadedCheckpoint(Path("toy"), model, BYTES, RunConfig(), STATE), text)
        wanted, places = measure_part_by_part(model, text)
        assert concepts is not None and np.isnan(loss_T[text.opens_T]).all()
        assert loss_T[~text.opens_T] == pytest.approx(wanted, rel=1e-9)
        assert positions(concepts).tolist() == places
        assert concepts.boundary_T[text.opens_T].all() and 0 < concepts.boundary_T[~text.opens_T].mean() < 1
    baseline = tiny_baseline()
    loss_T, concepts = measure(LoadedCheckpoint(Path("toy"), baseline, BYTES, RunConfig(), STATE), text)
    assert concepts is None
    assert loss_T[~text.opens_T] == pytest.approx(measure_part_by_part(baseline, text)[0], rel=1e-9)


def test_means_are_those_of_validation(trained: Trained, tmp_path: Path) -> None:
    assert main([str(trained.dlcm), "--baseline", str(trained.llama), "--output", str(tmp_path)]) == 0
    rows = {row["checkpoint"]: row for row in json.loads((tmp_path / "report.json").read_text())["checkpoints"]}
    shards = TokenShards(trained.data, "validation")
    for name in ("dlcm", "llama"):
        loaded = load_checkpoint(getattr(trained, name))
        loaded.run.evaluation.max_tokens = None
        wanted = evaluate(loaded.run, loaded.model, shards, Ranks())
        assert rows[name]["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert rows[name].get("tokens_per_concept") == wanted.get("tokens_per_concept")
    assert rows["dlcm"]["baseline_loss"] == rows["llama"]["loss"]
    assert rows["dlcm"]["difference"] == pytest.approx(rows["dlcm"]["loss"] - rows["llama"]["loss"])


# Numbers


def test_losses_by_position_are_plain_means() -> None:
    text = some_text([0, 25, 60], 100, window=100)
    of = toy(text, [1, 24, 17, 18, 3, 2, 35])
    assert of.baseline_T is not None
    *rows, overall = position_rows(of)
    assert [row["position"] for row in rows] == [*map(str, range(16)), "16+"]
    assert sum(row["tokens"] for row in rows) == overall["tokens"] == 97
    for place, row in enumerate(rows):
        at = [t for t, p in enumerate(positions(of.concepts)) if min(p, 16) == place and not text.opens_T[t]]
        ours, theirs = of.loss_T[at], of.baseline_T[at]
        assert row["tokens"] == len(at)
        assert row["loss"] == pytest.approx(ours.mean()) and row["baseline_loss"] == pytest.approx(theirs.mean())
        assert row["difference"] == pytest.approx((ours - theirs).mean(), rel=1e-9)
        sums = [(ours - theirs - row["difference"])[text.document_T[at] == document].sum() for document in range(3)]
        number = len(set(text.document_T[at]))  # documents that have such tokens
        error = np.sqrt(np.square(sums).sum() * number / (number - 1)) / len(at)
        assert row["difference_error"] == pytest.approx(error) and row["low"] <= row["difference"] <= row["high"]


def test_the_same_losses_differ_by_nothing() -> None:
    of = toy(some_text([0, 25, 60], 100, window=100), [5, 20, 5, 30, 5, 35])
    rows = position_rows(dataclasses.replace(of, baseline_T=of.loss_T))
    for row in rows:
        assert row["difference"] == row["low"] == row["high"] == row["difference_error"] == 0


def test_what_is_not_known_is_none() -> None:
    of_one = position_rows(toy(some_text([0], 20, window=10), [4] * 5))
    assert of_one[0]["loss"] is not None and of_one[0]["loss_error"] is of_one[0]["low"] is None
    assert of_one[9]["tokens"] == 0 and of_one[9]["loss"] is of_one[9]["difference"] is of_one[9]["low"] is None
    alone = position_rows(toy(some_text([0], 20, window=10), [4] * 5, baseline=False))
    assert set(alone[0]) == {"checkpoint", "position", "tokens", "loss", "loss_error"}


def test_histogram_counts_every_token() -> None:
    lengths = [1] * 60 + [2] * 25 + [5] * 14 + [120]
    of = toy(some_text([0], 300, window=300), lengths)
    rows = length_rows(of)
    assert sum(row["concepts"] for row in rows) == 100
    assert sum(row["concepts"] * row["length"] for row in rows) == 300
    assert [row["length"] for row in rows] == list(range(1, 121))
    assert sum(row["geometric"] for row in rows) == pytest.approx(100)
    assert rows[2]["geometric"] == pytest.approx(100 * (1 / 3) * (2 / 3) ** 2)
    found = length_numbers(of)
    assert (found["mean"], found["median"], found["percentile_99"], found["longest"]) == (3, 1, 5, 120)
    assert (found["geometric_median"], found["geometric_percentile_99"]) == (2, 12)  # 1 - (2/3)^n first above
    of_ones = length_numbers(toy(some_text([0], 5, window=5), [1] * 5))
    assert of_ones["geometric_median"] == of_ones["geometric_percentile_99"] == of_ones["longest"] == 1


def test_bins_of_surprisal_hold_equally_many_scored_tokens() -> None:
    text = some_text([0, 40], 104, window=50)
    of = toy(text, [104])
    rows = surprisal_rows(of)
    assert [row["tokens"] for row in rows] == [10] * 10  # 0, 40, 50 and 100 open a part
    assert of.baseline_T is not None
    rising = sorted(of.baseline_T[~text.opens_T])
    assert [row["surprisal_from"] for row in rows] == rising[::10]
    assert [row["surprisal_to"] for row in rows] == rising[9::10]
    chosen = np.argsort(np.where(text.opens_T, np.inf, of.baseline_T))[:10]
    assert rows[0]["probability"] == pytest.approx(of.concepts.probability_T[chosen].mean())
    assert rows[0]["boundary_rate"] == pytest.approx(of.concepts.boundary_T[chosen].mean())
    own = surprisal_rows(dataclasses.replace(of, baseline_T=None))
    assert own[0]["surprisal_from"] == np.nanmin(of.loss_T)


def test_rank_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(1)
    document_K = np.repeat([0, 2, 3, 70], 50)
    x_K = generator.normal(size=200)
    y_K = np.round(x_K + generator.normal(size=200), 1)  # with ties
    value, error = rank_correlation(x_K, y_K, document_K)
    assert value == pytest.approx(spearmanr(x_K, y_K).statistic)
    ranks = np.array([spearmanr(x_K[document_K != d], y_K[document_K != d]).statistic for d in (0, 2, 3, 70)])
    assert error == pytest.approx(np.sqrt(3 / 4 * ((ranks - ranks.mean()) ** 2).sum()))
    assert rank_correlation(x_K, np.zeros(200), document_K) == (None, None)
    assert rank_correlation(x_K[:50], y_K[:50], document_K[:50])[1] is None


# Kinds of text and of tokens


def test_types_of_text_do_not_overlap() -> None:
    for content in CONTENT:
        for source in content.sources or ("anything",):
            assert content_of(content.domain, source) == content.name
            assert [other.name for other in CONTENT if other.has(content.domain, source)] == [content.name]
    assert content_of("en", "wordnet") == content_of("zh", "somewhere") == content_of(None, "austen") == "other"


def test_tokens_per_concept_by_type_of_text() -> None:
    labels_D = [("en", "austen"), ("code", "any"), ("en", "gcide"), ("en", "henry")]
    of = toy(some_text([0, 20, 40, 60], 100, window=100, labels_D=labels_D), [10, 10, *[5] * 4, 20, *[2] * 20])
    rows = {row["content"]: row for row in content_rows(of)}
    assert list(rows) == [*(content.name for content in CONTENT), "other", "all"]
    casual = rows["casual English"]
    assert casual["tokens_per_concept"] == 60 / 22 and casual["sources"] == "austen, henry"
    assert (casual["paper_r2"], casual["paper_r4"], casual["paper_r8"]) == (1.76, 3.53, 7.47)
    assert rows["code"]["tokens_per_concept"] == 5 and rows["code"]["tokens_per_concept_error"] is None
    assert rows["other"]["tokens_per_concept"] == 20 and rows["other"]["paper_r4"] is None
    assert rows["all"]["tokens_per_concept"] == 100 / 27 and rows["all"]["documents"] == 4
    assert rows["mathematics"]["documents"] == 0 and rows["mathematics"]["tokens_per_concept"] is None


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        (
            "word start",
            [(" the", ""), ("The", ""), ("the", " "), ("foo", "("), ("(foo", "bar"), (" 2nd", "a"), ("é", "")],
        ),
        ("word start", [("init", "__"), ("abc", "中"), (".join", "x"), ("'Tis", " "), ("\tif", "\n"), ("слово", "\n")]),
        ("word inside", [("ing", "walk"), ("'t", "don"), ("_bar", "foo"), ("bar", "foo_"), ("x", "2"), ("s", "it's")]),
        ("CJK", [("中", ""), ("蒼梧雲", "，"), ("ひらがな", ""), ("한국", " "), ("中a", ""), ("〇", "")]),
        ("digit", [("7", ""), (" 42", "="), ("½", ""), ("٣", "")]),
        (
            "punctuation",
            [(".", "end"), ("，", "中"), (" (", "f"), ('")', "a"), ("。」", ""), ("-", "well"), ("};\n", "")],
        ),
        (
            "symbol",
            [("=", "x"), (" ==", "x"), ("->", ")"), ("!=", "a"), ("*", "2"), ("+=", "x"), ("€", ""), ("😀", "")],
        ),
        ("symbol", [("\ufffd", ""), ("\x00", ""), ("@", "\n"), ("//", "")]),
        ("white space", [(" ", "a"), ("\n\n", "."), ("    ", "\n"), ("\t", ""), ("\u3000", "中")]),
        ("special", [(None, ""), ("", "a")]),
    ],
)
def test_class_of_a_token(name: str, tokens: list[tuple[str | None, str]]) -> None:
    assert {pair: token_class(*pair) for pair in tokens} == dict.fromkeys(tokens, name)
    assert name in TOKEN_CLASSES


SENTENCE = 'Don\'t stop! 蒼梧雲。 x_1 += f("é😀")\n\n'


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    return np.array([tokenizer.bos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id])


def test_tokens_that_share_a_character_stand_for_it() -> None:
    texts = token_texts(BYTES, ids_of(BYTES, "é😀中.\ufffd"))
    assert texts == [None, "é", "é", *["😀"] * 4, *["中"] * 3, ".", *["\ufffd"] * 3, None]
    for tokenizer in (BYTES, train_bpe([SENTENCE * 3, "the 梧雲"], 275)):
        ids_T = ids_of(tokenizer, SENTENCE * 2)
        texts = token_texts(tokenizer, ids_T)
        assert len(texts) == len(ids_T) and texts[0] is texts[-1] is None
        whole = "".join(text for text, last in zip(texts, [None, *texts], strict=False) if text and text != last)
        assert all(character in whole for character in SENTENCE)
        assert not any("\ufffd" in (text or "") for text in texts)


def test_a_word_starts_where_a_decoder_drops_its_space() -> None:
    vocabulary = {"▁the": 0, "re": 1, "▁re": 2, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([0]) == "the"
    assert token_texts(tokenizer, np.array([0, 1, 2])) == [" the", "re", " re"]


def test_classes_of_a_line_in_bytes() -> None:
    ids_T = ids_of(BYTES, "if 中>2:\n")
    text = dataclasses.replace(some_text([0], len(ids_T), window=99), ids_T=ids_T)
    names = [TOKEN_CLASSES[index] for index in token_classes(BYTES, text.ids_T)]
    line = ["word start", "word inside", "white space", *["CJK"] * 3, "symbol", "digit", "punctuation", "white space"]
    assert names == ["special", *line, "special"]


def test_losses_and_boundaries_by_class() -> None:
    text = some_text([0, 40], 100, window=50)
    of, class_T = toy(text, [100]), np.random.default_rng(2).integers(2, size=100)
    rows = {row["class"]: row for row in class_rows(of, class_T)}
    assert list(rows) == list(TOKEN_CLASSES)
    assert sum(row["tokens"] for row in rows.values()) == 97
    chosen_T = (class_T == 1) & ~text.opens_T
    assert rows["word inside"]["loss"] == pytest.approx(of.loss_T[chosen_T].mean())
    assert rows["word inside"]["boundary_rate"] == pytest.approx(of.concepts.boundary_T[chosen_T].mean())
    assert rows["word inside"]["probability"] == pytest.approx(of.concepts.probability_T[chosen_T].mean())
    assert rows["digit"]["tokens"] == 0 and rows["digit"]["boundary_rate"] is rows["digit"]["low"] is None


# Command


def test_report_is_whole(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, output = Path(shutil.copytree(trained.dlcm, tmp_path / "other")), tmp_path / "report"
    checkpoints = [str(trained.dlcm), str(other)]
    assert main([*checkpoints, "--baseline", str(trained.llama), "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.startswith("| checkpoint | R |")
    tables = ("checkpoints", "positions", "content", "lengths", "surprisal", "classes", "compression")
    plots = ("positions", "lengths", "surprisal", "classes", "compression")
    names = {*(f"{name}.csv" for name in tables), *(f"{name}.png" for name in plots), "report.md", "report.json"}
    assert {path.name for path in output.iterdir()} == names
    assert all(str(output / name) in printed.out for name in names)
    assert all((output / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in plots)

    page, report = (output / "report.md").read_text(), json.loads((output / "report.json").read_text())
    assert all(f"![]({name}.png)" in page for name in plots) and "Commit " in page
    assert page.count("| 16+ |") == 2 and "| technical Chinese | - | - |" in page and "nan" not in page
    dlcms = [row["checkpoint"] for row in report["length_numbers"]]
    for name in tables:
        with (output / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(report[name])
        assert list(dict.fromkeys(row["checkpoint"] for row in rows))[:2] == dlcms
    scored = report["text"]["scored"]
    for name in dlcms:
        for table, of in (("positions", "position"), ("classes", "class"), ("surprisal", "bin")):
            rows = [row for row in report[table] if row["checkpoint"] == name and row[of] != "all"]
            assert sum(row["tokens"] for row in rows) == scored == report["text"]["tokens"] - report["text"]["parts"]
        lengths = [row for row in report["lengths"] if row["checkpoint"] == name]
        assert sum(row["length"] * row["concepts"] for row in lengths) == report["text"]["tokens"]
    recorded = [row for row in report["compression"] if row["checkpoint"] == dlcms[0]]
    assert [row["boundaries"] for row in recorded].count("sampled") == 8
    assert recorded[-1]["training_tokens"] == 8 * 4 * 32


def test_a_dlcm_alone_over_files(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("Some notes. " * 30, encoding="utf-8")
    checkpoint = Path(shutil.copytree(next((trained.dlcm / "checkpoints").iterdir()), tmp_path / "alone" / "copied"))
    output = tmp_path / "report"
    arguments = ["--text", str(tmp_path / "notes.txt"), "--max-tokens", "200", "--output", str(output)]
    assert main([str(checkpoint), *arguments]) == 0
    report, page = json.loads((output / "report.json").read_text()), (output / "report.md").read_text()
    assert (report["text"]["tokens"], report["text"]["documents"], report["text"]["parts"]) == (200, 1, 7)
    assert len(report["checkpoints"]) == 1 and "difference" not in report["positions"][0]
    assert report["compression"] == [] and not (output / "compression.png").exists()
    assert "No metrics lie beside the checkpoints." in page and "| difference |" not in page
    assert "what it cost the DLCM itself" in page and "less" not in capsys.readouterr().out


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command fails with."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_bad_requests_are_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", tmp_path / "none"]
    assert "forms no concepts; give a DLCM" in run([trained.llama, *output], capsys)
    assert "given twice" in run([trained.dlcm, trained.dlcm, *output], capsys)
    assert "no such directory" in run([tmp_path / "gone", *output], capsys)
    assert "leave nothing to predict" in run([trained.dlcm, "--max-tokens", 1, *output], capsys)
    assert "leave nothing to predict" in run([trained.dlcm, "--max-tokens", -1, *output], capsys)
    assert "no such file" in run([trained.dlcm, "--text", tmp_path / "none.txt", *output], capsys)
    assert not (tmp_path / "none").exists()


def test_models_must_read_the_same_tokens(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{SENTENCE}{number} " * 40}) + "\n" for number in range(12)))
    prepare(
        PrepareArguments(inputs=(str(file),), output=tmp_path / "data", tokenizer="bpe:270", validation_fraction=0.3)
    )
    short = {"schedule": {"steps": 1, "warmup_steps": 0}, "model": {"vocab_size": 270}}
    other = train_tiny(tmp_path, "llama", tmp_path / "data", **short)
    assert "has another tokenizer than" in run([trained.dlcm, "--baseline", other], capsys)

    long = train_tiny(tmp_path / "long", "dlcm", trained.data, schedule={"steps": 1, "warmup_steps": 0})
    few = train_tiny(tmp_path / "few", "llama", trained.data, model={"max_position_embeddings": 32})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "eval.analysis.load_run_config", lambda path: with_windows(path, 64 if "long" in str(path) else 32)
        )
        with pytest.raises(
            EvaluationError, match=r"few/llama: has 32 positions, and .* windows of 64 tokens; give first"
        ):
            open_checkpoints([long], few)


def with_windows(path: Path, window: int) -> RunConfig:
    run = load_run_config(path)
    run.data.sequence_length = window
    return run


def test_other_data_than_trained_on_is_refused(trained: Trained, tmp_path: Path) -> None:
    loaded = load_checkpoint(trained.dlcm)
    loaded.run.data.path = str(prepare_labelled(tmp_path, ("en",)))
    with pytest.raises(DataError, match=r"no longer the data that .*give --text FILE"):
        validation_text(loaded.run, loaded.state, None)


def test_losses_that_are_not_finite_are_refused() -> None:
    model = tiny_dlcm()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(EvaluationError, match="not finite; choose an earlier checkpoint"):
        measure(LoadedCheckpoint(Path("toy"), model, BYTES, RunConfig(), STATE), some_text([0], 20, window=10))


def test_metrics_beyond_the_checkpoint_do_not_count(trained: Trained, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(trained.dlcm, tmp_path / "run"))
    with (copied / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 9, "tokens": 1152, "tokens_per_concept": 2.0}) + "\n")
    assert main([str(copied), "--max-tokens", "100", "--output", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert max(row["training_tokens"] for row in report["compression"]) == 8 * 4 * 32
