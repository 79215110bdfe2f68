"""The command that counts models: tables from closed forms, matches within a per cent, sweeps at equal parameters."""

import json
from pathlib import Path

import pytest

from dlcm import DLCMConfig, LlamaBaselineConfig
from dlcm.config import changed
from dlcm.flops import decode_bytes, forward_flops, parameter_counts
from eval.flops import from_checkpoint, from_run, main, sweep
from eval.loading import EvaluationError
from eval.matching import match
from tests.eval.conftest import Trained
from train.config import build_model_config, load_run_config
from train.metrics import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
DLCM, LLAMA = (CONFIGS / "table3" / f"{name}.yaml" for name in ("dlcm", "llama"))


def config_of(path: Path) -> DLCMConfig | LlamaBaselineConfig:
    return build_model_config(load_run_config(path))


def test_tables_and_json_are_of_the_closed_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--length", "4096", "--context", "1024", "--batch", "2", "--json", str(tmp_path / "a" / "costs.json")]
    assert main([str(DLCM), str(LLAMA), *options]) == 0
    out = capsys.readouterr().out
    assert out.count("| stage |") == 2 and "table3/dlcm over table3/llama" in out
    content = json.loads((tmp_path / "a" / "costs.json").read_text())
    assert content["table3/llama"]["forward"]["total"] == forward_flops(config_of(LLAMA), 4096).total
    assert content["table3/dlcm"]["parameters"]["backbone"] == parameter_counts(config_of(DLCM))["backbone"]
    assert content["table3/dlcm"]["decode_bytes"]["total"] == decode_bytes(config_of(DLCM), 1024, 2, 4.0).total


def test_the_ratio_is_of_the_dlcm_alone(tmp_path: Path) -> None:
    assert from_run(DLCM, None, None).ratio == 4 and from_run(DLCM, None, 3.0).ratio == 3
    assert from_run(LLAMA, None, 3.0).ratio is None


@pytest.mark.parametrize("free", ["depth", "width", "swiglu"])
@pytest.mark.parametrize(("wanted", "template"), [(DLCM, LLAMA), (LLAMA, DLCM)], ids=["llama", "dlcm"])
def test_matches_are_within_a_per_cent_and_change_nothing_else(wanted: Path, template: Path, free: str) -> None:
    config = config_of(template)
    flops = forward_flops(config_of(wanted), 8192).total
    found = match(config, flops, 8192, free)
    assert forward_flops(found.config, 8192).total / flops == pytest.approx(found.ratio) == pytest.approx(1, abs=0.01)
    differing = {name: value for name, value in vars(found.config).items() if vars(config)[name] != value}
    assert differing == found.changes and found.changes
    if template == DLCM:  # everything at token level stays
        assert forward_flops(found.config, 8192).stages["encoder"] == forward_flops(config, 8192).stages["encoder"]


@pytest.mark.parametrize("windows", [{}, {"token_window": 512, "global_every": 4}], ids=["", "windows"])
def test_a_model_matches_itself_without_change(windows: dict[str, int]) -> None:
    config = changed(config_of(LLAMA), windows)
    assert match(config, forward_flops(config, 8192).total, 8192, "depth").changes == {}


def test_what_cannot_be_matched_says_what_is_nearest() -> None:
    with pytest.raises(EvaluationError, match=r"nearest, num_layers=1, token_ffn=\d+, has \d"):
        match(config_of(LLAMA), 1e6, 8192, "depth")


def test_matched_overrides_give_the_matched_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DLCM), "--match", str(LLAMA), "--free", "depth"]) == 0
    out = capsys.readouterr().out
    overrides = next(line for line in out.splitlines() if line.startswith("    model.")).split()
    matched = build_model_config(load_run_config(LLAMA, overrides))
    ratio = forward_flops(matched, 8192).total / forward_flops(config_of(DLCM), 8192).total
    assert ratio == pytest.approx(1, abs=0.01) and f"{ratio:.4f}" in out


def test_sweeps_keep_the_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = from_run(DLCM, None, None)
    counts = parameter_counts(subject.config)
    body = sum(counts.values()) - counts["embedding"] - counts["head"]
    own = counts["backbone"] / body
    (row,) = sweep(subject, [4.0], [own])
    assert row["forward_flops"] == pytest.approx(forward_flops(subject.config, 8192, 4.0).total)
    assert [row["saved"] for row in sweep(subject, [4.0], [0.0])] == pytest.approx([0], abs=1e-12)
    saved = [row["saved"] for row in sweep(subject, [2.0, 4.0, 8.0], [0.3, 0.6])]
    assert saved[:3] == sorted(saved[:3]) and all(more > less for less, more in zip(saved[:3], saved[3:], strict=True))
    assert main([str(DLCM), "--sweep", "R=2,4", "backbone_share=0.3,0.5", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("%") == 4
    assert (tmp_path / "flops_saved.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "nothing to count"),
        ([str(LLAMA), "--sweep", "R=2"], "no concepts to sweep"),
        ([str(DLCM), "--sweep", "R=two"], "--sweep R=two: give NAME=NUMBER"),
        ([str(DLCM), "--sweep", "width=2"], "R, backbone_share"),
        ([str(DLCM), "--sweep", "R=0.5"], "at least 1"),
        ([str(DLCM), "--sweep", "backbone_share=1.5"], r"in [0, 1)"),
        ([str(CONFIGS / "missing.yaml")], "missing.yaml"),
        (["--checkpoint", str(CONFIGS)], "configs"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert problem in error and error.count("\n") == 1


def test_a_run_is_counted_at_its_realised_ratio(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    realised = [line["tokens_per_concept"] for line in read_metrics(trained.dlcm) if line["kind"] == "validation"][-1]
    assert main(["--checkpoint", str(trained.dlcm), str(trained.llama)]) == 0
    out = capsys.readouterr().out
    assert f"{realised:.3g} tokens per concept" in out and f"{trained.dlcm} over {trained.llama}" in out
    assert (
        from_checkpoint(trained.dlcm, None).ratio == realised != from_run(trained.dlcm / "run.yaml", None, None).ratio
    )
    assert from_checkpoint(trained.llama, None).ratio is None
