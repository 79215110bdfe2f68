"""The codec's bars and tables follow from rows, and a run leaves a record that it goes on from."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eval.bench_codec import main, speed, texts_of
from eval.bench_codec_report import must_show, page
from eval.loading import EvaluationError
from tests.eval.conftest import Trained, train_tiny
from train.documents import Document

SETTINGS = {"text": [], "limit": 1000}


def test_bars_are_computed_from_rows() -> None:
    errors = {"RTN g128": 8.0, "RTN g128, clip search": 4.0, "x264": 2.0, "entropy": 1.0}
    rows = [
        {"tensor": "w", "values": 1 << 16, "level": level, "method": method, "bits": level - (method == "x264") / 64}
        | {"squared_error": error, "energy": 128.0}
        for level in (4, 3, 2)
        for method, error in errors.items()
    ]
    bars = must_show({"weights": {"good": rows}})
    gains = [bar for name, bar in bars.items() if name.startswith("relative MSE")]
    assert [bar.value for bar in gains] == [4.0] * 3 and [bar.target for bar in gains] == [1.6, 2.0, 2.5]
    assert [bar.value for name, bar in bars.items() if "clip search" in name] == [2.0] * 3
    missed = bars["bits by which a tensor of 65,536 values or more misses its budget"]
    assert missed.value == 1 / 64 and missed.holds
    assert bars["bits by which a tensor of 1,000,000 values or more misses its budget"].value is None
    worse = [row | {"squared_error": row["squared_error"] * (1 + 3 * (row["method"] == "x264"))} for row in rows]
    both = must_show({"weights": {"good": rows, "bad": worse}})
    assert [bar.value for name, bar in both.items() if name.startswith("relative MSE")] == [1.0] * 3
    without = must_show({"weights": {"good": [row for row in rows if row["method"] != "x264"]}})
    assert not any(bar.holds for name, bar in without.items() if "RTN" in name)  # not measured does not hold
    assert not any(bar.holds for bar in must_show({}).values())


def test_tables_say_which_stage_costs_most_and_what_the_codec_gains_over_entropy_coding() -> None:
    models = [{"method": None, "budget": None, "mode": "uniform", "bits_per_byte": 2.0}] + [
        {"method": method, "budget": 3.0, "mode": mode, "bits_per_byte": loss, "bits": 3.125}
        for method, mode, loss in (
            ("RTN g128", "uniform", 2.5),
            ("x264", "uniform", 2.25),
            ("entropy", "uniform", 2.125),
            ("x264", "hessian", 2.0625),
        )
    ]
    stages = [{"method": None, "bits_per_byte": 2.0, "stage": None}] + [
        {"method": "x264", "stage": stage, "budget": budget, "bits_per_byte": 2 + harm / budget, "values": 500_000}
        for stage, harm in (("encoder", 0.5), ("backbone", 0.25))
        for budget in (2.5, 2.0)
    ]
    results = {"models": {"dlcm": models}, "stages": {"dlcm": stages}}
    text = page({"machine": {}, "versions": {}, "commit": "c", "command": "d"}, {}, SETTINGS, results)
    assert "| RTN g128 | 2.5000 (+0.5000) at 3.12 |" in text
    assert "| x264, bits by hessian | 2.0625 (+0.0625) |" in text
    assert "x264 less the entropy coder alone, bits per byte: 3 bits +0.1250." in text
    assert "| encoder | 0.500 | +0.2000 | +0.2500 | +0.5000 |" in text and "At 2 bits encoder costs most." in text


def test_speed_is_of_one_encoding_at_about_three_bits() -> None:
    row = speed("entropy", 512)
    assert 2.9 < row["bits"] < 3.2 and row["encode_mvalues_per_second"] > 0 and row["decode_mvalues_per_second"] > 0


def test_texts_that_calibrate_are_not_scored() -> None:
    documents = [Document(f"{number:04}" * 100, "", "", None) for number in range(20)]
    texts = texts_of(documents, 800)
    calibration, scored = ({of.text for of in part} for part in (texts.calibration, texts.scored))
    assert len(calibration) == 10 and len(scored) == 8 and not calibration & scored
    assert all(len(text) == 100 for text in scored)
    assert texts_of(documents, 800) == texts
    with pytest.raises(EvaluationError, match="one document is too few"):
        texts_of(documents[:1], 800)


def test_weights_alone_can_be_measured(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    save_file({"w": torch.randn(256, 256, generator=draw)}, tmp_path / "model.safetensors")
    arguments = [str(tmp_path / "model.safetensors"), "--sections", "weights", "models", "speed", "--side", "256"]
    arguments += ["--workers", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    numbers = json.loads((tmp_path / "codec.json").read_text())
    measured = {name: bar["value"] for name, bar in numbers["must_show"].items()}
    assert len(measured) == 8 and [name for name, value in measured.items() if value is None] == [
        "bits by which a tensor of 1,000,000 values or more misses its budget"
    ]
    assert numbers["results"].keys() == {"weights", "speed"}  # there is no model
    (tmp_path / "codec.json").unlink()
    assert main([arguments[0], "--sections", "speed", *arguments[4:]]) == 0  # of which there is no figure
    assert "Speed on one thread" in (tmp_path / "codec.md").read_text()


def test_a_page_shows_what_the_gain_is_due_to(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    save_file({"w": torch.randn(256, 256, generator=draw)}, tmp_path / "model.safetensors")
    arguments = [str(tmp_path / "model.safetensors"), "--sections", "weights", "--workers", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    text = (tmp_path / "codec.md").read_text()
    assert "x264, shuffled" in text and "Against the entropy coder alone" in text


def test_a_run_measures_checkpoints_and_goes_on_where_it_was(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"d_token": 64, "token_ffn": 128, "d_concept": 96, "concept_ffn": 192}
    run = train_tiny(tmp_path, "dlcm", trained.data, model=model)
    arguments = [str(run), "--budgets", "3", "--limit", "2400", "--workers", "1", "--backends", "entropy"]
    arguments += ["--output", str(tmp_path / "results"), "--commit", "abc"]
    assert main([*arguments, "--sections", "models", "stages"]) == 0
    assert main([*arguments, "--sections", "stages", "past"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("stages dlcm:") == 1  # not twice
    numbers = json.loads((tmp_path / "results" / "codec.json").read_text())
    assert numbers["results"].keys() == {"models", "stages", "past"}
    models, stages, past = (numbers["results"][section]["dlcm"] for section in ("models", "stages", "past"))
    assert {row["mode"] for row in models} == {"uniform", "mse", "hessian"}
    coded = [row for row in models if row["method"] not in (None, "RTN g128", "RTN g128, clip search")]
    assert all(2.5 < row["bits"] <= 3 for row in coded if "GPTQ" not in row["method"])
    assert {row["stage"] for row in stages} > {"embedding", "encoder", "backbone", "decoder", "head"}
    assert all(row["values"] < models[1]["values"] for row in stages if row["stage"])
    exact = next(row for row in past if row["method"] is None)
    assert models[0]["bits_per_byte"] == stages[0]["bits_per_byte"] and exact["bits"] is None
    assert any(row["bits"] is not None and row["bits_per_byte"] != exact["bits_per_byte"] for row in past)
    assert all((tmp_path / "results" / name).stat().st_size for name in ("codec.md", "codec.png"))

    assert main([*arguments, "--side", "128", "--sections", "speed"]) == 2
    assert "of other settings, another commit or machine; remove it" in capsys.readouterr().err
    (tmp_path / "results" / "codec.json").write_text("{}")
    assert main([*arguments, "--sections", "speed"]) == 2
    assert "not of this command" in capsys.readouterr().err
