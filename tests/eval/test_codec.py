"""Checkpoints packed and restored by command, and methods compared at equal bits."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dlcm.codec import Container, relative_mse
from eval.codec import main
from eval.codec_report import comparison, comparison_table, gap_bits, totals
from eval.loading import load_checkpoint
from tests.eval.conftest import TEXTS, Trained, train_tiny
from train.checkpoint import latest_checkpoint

WIDE = {"d_token": 64, "token_ffn": 128}  # or no matrix is large enough for a codec


@pytest.fixture(scope="module")
def wide(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("wide")
    dlcm = train_tiny(directory, "dlcm", trained.data, model=WIDE | {"d_concept": 96, "concept_ffn": 192})
    return Trained(trained.data, dlcm, train_tiny(directory, "llama", trained.data, model=WIDE))


@pytest.mark.parametrize("architecture", ("dlcm", "llama"))
def test_a_checkpoint_is_packed_listed_verified_and_restored(
    wide: Trained, architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, packed, restored = getattr(wide, architecture), tmp_path / "packed", tmp_path / "restored"
    assert main(["pack", str(run), str(packed), "--bits", "16", "--backend", "entropy"]) == 0
    weights = load_file(latest_checkpoint(run) / "model.safetensors")
    size = (packed / "model.codec").stat().st_size
    assert 8 * size <= 16 * sum(tensor.numel() for tensor in weights.values())
    assert not list(packed.glob("*.safetensors"))
    capsys.readouterr()
    assert main(["inspect", str(packed)]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in weights) and "entropy" in listed
    assert main(["verify", str(packed)]) == 0

    assert main(["unpack", str(packed), str(restored)]) == 0
    model = AutoModelForCausalLM.from_pretrained(restored)
    again = load_checkpoint(restored).model.state_dict()  # what every script of eval begins with
    for name, tensor in weights.items():
        assert torch.equal(model.state_dict()[name], again[name])
        assert relative_mse(tensor, again[name]) < 1e-3
        assert tensor.ndim > 1 or torch.equal(tensor, again[name])


def test_bits_are_allocated_by_what_errors_cost(
    wide: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text(TEXTS["en"] * 20, encoding="utf-8")
    common, widths = ["--bits", "5", "--backend", "entropy"], {}
    for mode, more in (("uniform", []), ("mse", []), ("hessian", ["--calibration", str(text)])):
        packed = tmp_path / mode
        assert main(["pack", str(wide.dlcm), str(packed), *common, "--mode", mode, *more]) == 0
        container = Container(packed / "model.codec")
        widths[mode] = {name: 8 * container.nbytes(name) / container.header(name).numel for name in container.names()}
    coded = [name for name in widths["mse"] if widths["uniform"][name] < 8]
    spread = {mode: max(of[name] for name in coded) - min(of[name] for name in coded) for mode, of in widths.items()}
    assert spread["uniform"] < 0.3 and spread["mse"] > 0.5 and spread["hessian"] > 0.5
    assert widths["mse"] != widths["hessian"]
    capsys.readouterr()
    for options, message in (
        (["--mode", "hessian"], "--mode hessian needs --calibration FILE"),
        (["--mode", "mse", "--calibration", str(text)], "is read by --mode hessian alone, not by mse"),
    ):
        assert main(["pack", str(wide.dlcm), str(tmp_path / "x"), *common, *options]) == 2
        assert message in capsys.readouterr().err


def test_a_directory_of_transformers_alone_is_packed_too(wide: Trained, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(latest_checkpoint(wide.llama)).to_llama().bfloat16()
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()
    assert main(["pack", str(tmp_path / "llama"), str(tmp_path / "packed"), "--bits", "10"]) == 0
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "restored")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "restored")
    assert again.dtype == torch.bfloat16 and type(again) is type(model)
    for name, tensor in model.state_dict().items():
        assert relative_mse(tensor, again.state_dict()[name]) < 0.01


def test_the_same_command_gives_the_same_bytes(wide: Trained, tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        assert main(["pack", str(wide.dlcm), str(tmp_path / name), "--bits", "12", "--workers", workers]) == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_whatever_goes_wrong_is_one_line(wide: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert main(["pack", str(wide.dlcm), str(packed), "--bits", "12"]) == 0

    def error(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    assert "exists; give another name" in error("pack", str(wide.dlcm), str(packed), "--bits", "16")
    assert "bits a value are too many: x264 takes" in error("pack", str(wide.dlcm), str(tmp_path / "x"), "--bits", "20")
    assert "spent on what is kept" in error("pack", str(wide.dlcm), str(tmp_path / "x"), "--bits", "0.1")
    assert "no such directory" in error("pack", str(tmp_path / "none"), str(tmp_path / "x"), "--bits", "3")
    (tmp_path / "empty").mkdir()
    assert "no model*.safetensors" in error("pack", str(tmp_path / "empty"), str(tmp_path / "x"), "--bits", "3")
    assert "no packed checkpoint" in error("verify", str(tmp_path / "empty"))
    assert "no tensor 'head'; it has" in error("rd", str(wide.dlcm), "head")
    assert "no matrix" in error("compare", str(wide.dlcm), "--only", "norm")
    for damage in ("config.json", "model.codec"):
        copy = tmp_path / f"damaged_{damage}"
        shutil.copytree(packed, copy)
        (copy / damage).write_bytes((copy / damage).read_bytes()[:-1])
        for command in (("verify", str(copy)), ("unpack", str(copy), str(tmp_path / "x"))):
            assert f"missing, added or damaged: {damage}" in error(*command)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.tmp"))
    (packed / "notes.txt").symlink_to(tmp_path / "empty")
    assert "notes.txt is no plain file" in error("unpack", str(packed), str(tmp_path / "x"))
    (packed / "notes.txt").unlink()
    (packed / "checksums.json").write_text("[1]")
    assert "missing, added or damaged" in error("verify", str(packed))


def test_methods_are_compared_at_equal_bits() -> None:
    noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    waves = torch.linspace(0, 6, 256).sin()[:, None] + torch.linspace(0, 9, 256).cos() + 0.1 * noise  # the codec's case
    weights = {"noise": noise, "waves": waves, "norm": torch.ones(9000)}
    rows = comparison(weights, (4, 2), ("x264", "entropy"))
    assert {row["tensor"] for row in rows} == {"noise", "waves"}
    assert comparison(weights, (4, 2), ("entropy",), re.compile("noise"))[0]["squared_error"] == pytest.approx(
        next(row["squared_error"] for row in rows if row["tensor"] == "noise")
    )
    for row in rows:
        width = row["level"] + (16 + row["level"]) / 128
        assert width - 0.05 <= row["bits"] <= width
    error = {(row["tensor"], row["level"], row["method"]): row["squared_error"] / row["energy"] for row in rows}
    for level in (4, 2):
        assert error["noise", level, "entropy"] < error["noise", level, "x264"] < error["noise", level, "RTN g128"]
        assert error["waves", level, "x264"] < 0.5 * error["waves", level, "x264, shuffled"]
        assert error["noise", level, "x264"] == pytest.approx(error["noise", level, "x264, shuffled"], rel=0.05)
    summed = totals(rows)
    assert len(summed) == 2 * (2 + 2 * 3)
    own = [row for row in rows if row["level"] == 2 and row["method"] == "x264"]
    expected = sum(row["squared_error"] for row in own) / sum(row["energy"] for row in own)
    assert [row["rel_mse"] for row in summed if row["level"] == 2 and row["method"] == "x264"] == [expected]
    assert f"{expected:.4f} (" in comparison_table(rows)
    assert 0.05 < gap_bits([row for row in rows if row["tensor"] == "noise"], "x264") < 0.4
    assert gap_bits([row for row in rows if row["tensor"] == "waves"], "x264") < -0.3


def test_compare_and_rd_print_tables(wide: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = ["compare", str(wide.llama), "--levels", "6", "--backends", "entropy", "--workers", "1", "--only"]
    assert main([*compare, "embed"]) == 0
    shown = capsys.readouterr().out
    assert "entropy, shuffled" in shown and "GPTQ" not in shown
    text = tmp_path / "calibration.txt"
    text.write_text(TEXTS["en"] * 20, encoding="utf-8")
    assert main([*compare, "embed|down_proj|lm_head", "--calibration", str(text)]) == 0
    weights, outputs = capsys.readouterr().out.split("\n\n")
    assert "relative MSE of outputs" in outputs
    gains = [float(re.search(r"GPTQ .*\(([\d.]+)\)", table)[1]) for table in (weights, outputs)]
    assert gains[1] > 1.5 > gains[0]  # it errs more, where it matters less
    names = load_file(latest_checkpoint(wide.llama) / "model.safetensors")
    largest = max(names, key=lambda name: names[name].numel())
    assert main(["rd", str(wide.llama), largest, "--bits", "8", "6", "--backend", "entropy"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
