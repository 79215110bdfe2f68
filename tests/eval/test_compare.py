"""The comparison reports what the runs recorded and what the models are, and says when they do not match."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.flops import forward_flops
from eval.compare import Measurements, Run, caveats, format_table, load_run, main, measure
from eval.loading import EvaluationError
from eval.passages import CHARACTERS, Passage, excerpt, held_out_passages, read_passages
from tests.eval.conftest import TEXTS, Trained, prepare_labelled, train_tiny
from train.data import DataError, TokenShards
from train.metrics import METRICS_FILE, read_metrics
from train.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def pair(trained: Trained) -> tuple[Run, Run]:
    return (
        load_run(trained.dlcm, "DLCM", DLCMForCausalLM),
        load_run(trained.llama, "LLaMA", LlamaBaselineForCausalLM),
    )


def with_state(run: Run, **changes: object) -> Run:
    state = dataclasses.replace(run.loaded.state, **changes)
    return dataclasses.replace(run, loaded=dataclasses.replace(run.loaded, state=state))


def test_measurements_are_what_the_run_recorded_and_the_model_is(trained: Trained, pair: tuple[Run, Run]) -> None:
    for path, run in zip((trained.dlcm, trained.llama), pair, strict=True):
        measured, model = measure(run), run.loaded.model
        lines = read_metrics(path)
        last = [line for line in lines if line["kind"] == "validation"][-1]
        assert measured.validation_bits_per_byte == last["bpb"]
        assert measured.validation_loss == last["loss"]
        assert measured.training_tokens == 8 * 4 * 32
        assert measured.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert measured.parameters - measured.non_embedding_parameters == 2 * 258 * 32
        rates = sorted(line["tokens_per_second"] for line in lines if line["kind"] == "train")
        assert rates[0] <= measured.training_tokens_per_second <= rates[-1]


def test_flops_are_counted_at_the_realised_ratio(pair: tuple[Run, Run]) -> None:
    dlcm, baseline = pair
    config, measured = dlcm.loaded.model.config, measure(dlcm)
    realised = dlcm.validation[-1]["tokens_per_concept"]
    assert realised != config.target_ratio
    assert measured.tokens_per_concept_at_inference == realised
    assert measured.forward_flops_per_token == forward_flops(config, 32, realised).total
    assert measured.forward_flops_per_token_at_target == forward_flops(config, 32, 3.0).total
    of_baseline = measure(baseline)
    assert of_baseline.forward_flops_per_token == of_baseline.forward_flops_per_token_at_target
    assert of_baseline.tokens_per_concept_at_inference is of_baseline.tokens_per_concept_in_training is None


def test_training_ratio_is_that_of_the_last_tenth(pair: tuple[Run, Run]) -> None:
    dlcm, _ = pair
    line = dlcm.train[-1]
    lines = [line | {"tokens_per_concept": ratio} for ratio in [*[9.0] * 18, 2.0, 6.0]]
    measured = measure(dataclasses.replace(dlcm, train=lines))
    assert measured.tokens_per_concept_in_training == pytest.approx(2 / (1 / 2 + 1 / 6))  # tokens / concepts


def matched(pair: tuple[Run, Run], flops_ratio: float = 1.0, length_ratio: float = 1.0) -> tuple[Measurements, ...]:
    """Measurements of a pair whose costs, and whose concepts at inference and in training, have the given ratios."""
    ours, theirs = (measure(run) for run in pair)
    ours = dataclasses.replace(
        ours,
        forward_flops_per_token=flops_ratio * theirs.forward_flops_per_token,
        tokens_per_concept_in_training=4.0,
        tokens_per_concept_at_inference=4.0 * length_ratio,
    )
    return ours, theirs


def test_no_caveat_for_a_matched_pair(pair: tuple[Run, Run]) -> None:
    for near in (0.96, 1.04):
        assert caveats(*pair, *matched(pair, flops_ratio=near, length_ratio=near)) == []


@pytest.mark.parametrize("ratio", [0.85, 1.15])
def test_another_compression_at_inference_is_said(ratio: float, pair: tuple[Run, Run]) -> None:
    (caveat,) = caveats(*pair, *matched(pair, length_ratio=ratio))
    assert f"thresholding makes concepts {ratio} times as long" in caveat


@pytest.mark.parametrize("ratio", [0.94, 1.06])
def test_unequal_compute_is_said(ratio: float, pair: tuple[Run, Run]) -> None:
    (caveat,) = caveats(*pair, *matched(pair, flops_ratio=ratio))
    assert "not matched in compute" in caveat
    assert str(ratio) in caveat


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_fingerprint": "other"}, "different data"),
        ({"tokens": 5}, "different numbers of tokens: 1,024 and 5"),
        ({"step": 7}, "LLaMA run is unfinished: step 7 of 8"),
    ],
)
def test_unequal_training_is_said(changes: dict[str, object], message: str, pair: tuple[Run, Run]) -> None:
    dlcm, baseline = pair
    (caveat,) = caveats(dlcm, with_state(baseline, **changes), *matched(pair))
    assert message in caveat


def test_table_has_a_row_for_every_measurement(pair: tuple[Run, Run]) -> None:
    ours, theirs = measure(pair[0]), measure(pair[1])
    rows = format_table(ours, theirs).splitlines()
    assert len(rows) == 1 + len(dataclasses.fields(ours))
    assert len({len(row) for row in rows}) == 1  # aligned
    assert f"{ours.validation_bits_per_byte:.4f}" in rows[1]
    assert f"{ours.validation_bits_per_byte / theirs.validation_bits_per_byte:.3f}" in rows[1]
    not_finite = dataclasses.replace(ours, validation_bits_per_byte=None)
    assert format_table(not_finite, theirs).splitlines()[1].split()[-3] == "-"


def test_curves_leave_out_what_is_not_finite(pair: tuple[Run, Run]) -> None:
    lines = [{"tokens": 1, "ce": 2.0}, {"tokens": 2, "ce": None}, {"tokens": 3, "ce": 1.0}]
    curve = dataclasses.replace(pair[0], train=lines).curve("train", "ce")
    assert (curve.tokens, curve.values) == ([1, 3], [2.0, 1.0])


def test_passages_are_held_out_documents_of_each_domain(trained: Trained, pair: tuple[Run, Run]) -> None:
    passages = held_out_passages(pair[0].loaded)
    assert [passage.domain for passage in passages] == ["en", "code", "zh"]
    training = TokenShards(trained.data, "train")
    ids, _ = training.window(0, training.num_tokens)
    trained_text = byte_tokenizer().decode(ids)
    for passage in passages:
        opening = passage.text[: len(TEXTS[passage.domain])]
        assert opening[:8] in TEXTS[passage.domain]
        assert opening not in trained_text


def test_excerpt_keeps_words_and_fits_the_model() -> None:
    tokenizer = byte_tokenizer()
    words = "seven c " * 100
    assert excerpt(words, tokenizer, 1000) == words[:CHARACTERS].rsplit(" ", 1)[0]
    assert excerpt("short", tokenizer, 1000) == "short"
    chinese = "雲" * 500
    assert excerpt(chinese, tokenizer, 10_000) == chinese[:CHARACTERS]
    assert excerpt(chinese, tokenizer, 16) == chinese[:5]  # the opening token and 15 bytes
    assert excerpt(chinese, tokenizer, 17) == chinese[:6]


def test_whole_report(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report"
    assert main([str(trained.dlcm), str(trained.llama), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    report = json.loads((output / "comparison.json").read_text(encoding="utf-8"))
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for run in ("DLCM", "LLaMA"):
        assert Path(report["checkpoints"][run]).is_dir()
        assert report["checkpoints"][run] in captured.out
        assert f"{report['measurements'][run]['validation_bits_per_byte']:.4f}" in captured.out
        assert report["continuations"][run]
    assert [cut["domain"] for cut in report["segmentations"]] == ["en", "code", "zh"]
    assert "English in concepts" in captured.out
    for caveat in report["caveats"]:
        assert f"! {caveat}" in captured.out
    for line in "".join(report["segmentations"][0]["pieces"]).splitlines():
        assert line in captured.out.replace("|", "")
    assert captured.err == ""


def test_passages_from_a_file_and_default_output(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run_dir in (trained.dlcm, trained.llama):
        shutil.copytree(run_dir, tmp_path / run_dir.name)
    file = tmp_path / "passages.jsonl"
    file.write_text('{"domain": "haiku", "text": "An old silent pond"}\n', encoding="utf-8")
    assert main([str(tmp_path / "dlcm"), str(tmp_path / "llama"), "--passages", str(file)]) == 0
    out = capsys.readouterr().out
    assert "Haiku in concepts" in out
    assert "Anoldsilentpond" in out.replace("|", "").replace(" ", "")
    assert (tmp_path / "comparison" / "comparison.json").is_file()


def test_a_domain_without_held_out_document_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepare_labelled(tmp_path, domains=("en", "code"))
    loaded = load_run(train_tiny(tmp_path, "dlcm", data), "DLCM", DLCMForCausalLM).loaded
    capsys.readouterr()
    assert [passage.domain for passage in held_out_passages(loaded)] == ["en", "code"]
    assert "no Chinese document in the validation split" in capsys.readouterr().err


def test_data_that_changed_or_vanished_is_an_error(pair: tuple[Run, Run], tmp_path: Path) -> None:
    loaded = with_state(pair[0], data_fingerprint="other").loaded
    with pytest.raises(DataError, match="no longer the data"):
        held_out_passages(loaded)
    moved = dataclasses.replace(loaded.run, data=dataclasses.replace(loaded.run.data, path=str(tmp_path)))
    with pytest.raises(DataError, match="no prepared data here"):
        held_out_passages(dataclasses.replace(loaded, run=moved))


def test_a_listing_that_does_not_fit_the_shards_is_an_error(pair: tuple[Run, Run], tmp_path: Path) -> None:
    loaded = pair[0].loaded
    data = Path(shutil.copytree(loaded.run.data.path, tmp_path / "data"))
    listing = data / "validation" / "documents.jsonl"
    listing.write_text("".join(listing.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    edited = dataclasses.replace(loaded.run, data=dataclasses.replace(loaded.run.data, path=str(data)))
    with pytest.raises(DataError, match=r"documents\.jsonl: does not describe the shards"):
        held_out_passages(dataclasses.replace(loaded, run=edited))


@pytest.mark.parametrize("line", [b"text", b'["en", "text"]', b'{"text": "no domain"}', b'{"domain": "en"}', b"\xff"])
def test_bad_passages(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    file.write_bytes(b'{"domain": "en", "text": "good"}\n' + line + b"\n")
    with pytest.raises(EvaluationError, match=r"passages\.jsonl, line 2"):
        read_passages(file)
    file.write_bytes(file.read_bytes().splitlines()[0])
    assert read_passages(file) == [Passage("en", "good")]


def test_bad_input_is_one_line_and_writes_nothing(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unmeasured = Path(shutil.copytree(trained.llama, tmp_path / "unmeasured"))
    (unmeasured / METRICS_FILE).unlink()
    dlcm, llama, output = str(trained.dlcm), str(trained.llama), tmp_path / "report"
    for arguments, message in (
        ([llama, dlcm], "give the DLCM's run first"),
        ([dlcm, dlcm], "holds no LLaMA"),
        ([dlcm, str(tmp_path / "nowhere")], "nowhere: no such directory"),
        ([dlcm, str(unmeasured)], "recorded no validation yet"),
        ([dlcm, llama, "--passages", str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([dlcm, llama, "--prompt", "x" * 300], "256 positions"),
    ):
        assert main([*arguments, "--output", str(output)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err
        assert not output.exists()
