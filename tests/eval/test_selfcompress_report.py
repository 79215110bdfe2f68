"""The frontier: bars from rows made by hand, the sweeps' files, and a small one that is really run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dlcm.flops import parameter_counts
from eval.bench import Row
from eval.selfcompress_report import bars, main, means, ternary_lines
from tests.train.conftest import launched
from tests.train.tiny import prepare_tiny, write_config
from train.config import build_model_config, load_run_config
from train.sweep import load_sweep
from train.sweep import main as sweep

__all__ = ["launched"]  # a fixture
CONFIGS = Path(__file__).parents[2] / "configs" / "selfcompress"
TO_TWO, TO_NARROW, TO_FILE = "above 2 fixed bits", "narrower models", "file against prediction"


# Bars


def row(bits: str, loss: float, size: float, seed: str = "s0", **changes: Any) -> Row:
    found = {"bits": bits, "seed": seed, "loss": loss, "bytes": size, "weights": 1000}
    if bits != "float":
        found |= {"mismatches": 0, "logit_error": 1e-5, "argmax_share": 1.0, "predicted_bytes": size}
        found |= {"weights_left": 0.2, "speedup": 2.0}
    return found | changes


ROWS = [
    row("float", 1.5, 2000),
    row("fixed-2", 1.60, 260),
    row("narrow-240", 1.80, 100),
    row("narrow-192", 1.78, 50),  # another size: no rival
    row("learned-1.5", 1.58, 200, "s0"),
    row("learned-1.5", 1.60, 220, "s1"),
    row("learned-0.6", 1.70, 98),
]


def test_bars_hold_and_say_by_how_much():
    found = bars(ROWS)
    assert all(bar.holds for bar in found.values())
    values = {part: next(bar.value for name, bar in found.items() if part in name) for part in (TO_TWO, TO_NARROW)}
    assert values == {TO_TWO: pytest.approx(-0.01), TO_NARROW: pytest.approx(0.1)}


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        (row("learned-1.5", 1.7, 200), TO_TWO),
        (row("learned-0.6", 1.76, 98), TO_NARROW),
        (row("learned-0.6", 1.7, 140), TO_NARROW),  # no narrower model is as large
        (row("learned-0.6", 1.7, 98, mismatches=1), "differ"),
        (row("learned-0.6", 1.7, 98, logit_error=1e-3), "error of a logit"),
        (row("learned-0.6", 1.7, 98, argmax_share=0.99), "likeliest"),
        (row("learned-0.6", 1.7, 98, predicted_bytes=90), TO_FILE),
        (row("learned-0.6", 1.7, 98, speedup=1.2), "speed-up"),
    ],
)
def test_each_bar_can_be_missed(changed: Row, missed: str):
    rows = [changed if one["bits"] == changed["bits"] else one for one in ROWS]
    assert [name for name, bar in bars(rows).items() if not bar.holds and missed in name]


def test_what_was_not_measured_does_not_hold():
    found = bars([ROWS[0], {key: value for key, value in ROWS[-1].items() if key != "speedup"}])
    assert {bar.value for name, bar in found.items() if TO_TWO in name or TO_NARROW in name or "speed" in name} == {
        None
    }


def test_sizes_are_told_in_bits_for_each_weight_of_the_largest_model():
    rows = [row("float", 1.5, 2000), row("narrow-240", 1.8, 100, weights=300)]
    assert means(rows)["narrow-240"]["file_bits"] == pytest.approx(0.8)
    assert means(ROWS)["learned-1.5"]["bytes"] == 210 and means(ROWS)["learned-1.5"]["seeds"] == 2


# Sweeps


@pytest.mark.parametrize(("name", "runs", "seeds"), [("frontier", 42, 3), ("stages", 12, 3), ("tiny", 8, 1)])
def test_sweeps_are_runs_of_what_their_labels_say(name: str, runs: int, seeds: int):
    _, planned = load_sweep(CONFIGS / f"{name}.yaml")
    assert len(planned) == runs and len({one.labels["seed"] for one in planned}) == seeds
    for one in planned:
        compression, label = one.run.compression, one.labels["bits"]
        method = label.partition("-")[0].replace("narrow", "fixed").replace("float", "none")
        assert compression.method == method
        if method == "learned":
            assert compression.target_bits == float(label.removeprefix("learned-"))
        if label.startswith("narrow"):
            assert one.run.model["d_token"] == int(label.split("-")[1])


def test_the_articles_model_has_eleven_million_weights_in_blocks():
    overrides = ["compression.method=none", "compression.target_bits=null"]
    counts = parameter_counts(build_model_config(load_run_config(CONFIGS / "llama.yaml", overrides)))
    assert counts["decoder"] == pytest.approx(10.6e6, rel=0.01)


SETTINGS = {
    "float": {"compression.method": "none", "compression.target_bits": None},
    "fixed-2": {"compression.method": "fixed", "compression.bits": 2, "compression.target_bits": None},
    "learned-1.5": {"compression.target_bits": 1.5},
    "learned-0.1": {"compression.target_bits": 0.1},
}


@pytest.mark.usefixtures("launched")
def test_a_small_frontier_has_the_order_that_it_should(tmp_path: Path):
    """Loosely: some steps of a model of 40,000 parameters."""
    data = prepare_tiny(tmp_path / "data")
    sections: dict[str, Any] = {"schedule": {"steps": 150, "decay_fraction": 0.3}, "evaluation": {"every": 150}}
    sections |= {"compression": {"method": "learned", "target_bits": 1.0, "start": 0.0}, "log_every": 20}
    sections["optimizer"] = {"lr_token": 1e-2, "lr_other": 1e-2}
    for architecture, settings in (("llama", SETTINGS), ("dlcm", {"learned-1.0": {"schedule.steps": 40}})):
        write_config(tmp_path / f"{architecture}.yaml", architecture, data, tmp_path / "base", **sections)
        plan = {"base": f"{architecture}.yaml", "output": str(tmp_path / architecture)}
        plan["axes"] = {"bits": settings, "seed": {"s0": {"seed": 0}}}
        (tmp_path / f"sweep_{architecture}.yaml").write_text(yaml.safe_dump(plan))
        assert sweep([str(tmp_path / f"sweep_{architecture}.yaml")]) == 0
    output = tmp_path / "results"
    assert main([str(tmp_path / "llama"), "--stages", str(tmp_path / "dlcm"), "--output", str(output)]) == 0

    found = json.loads((output / "self_compression.json").read_text())
    mean = {one["bits"]: one for one in found["means"]}
    losses, sizes = ({bits: one[key] for bits, one in mean.items()} for key in ("loss", "bytes"))
    assert losses["float"] < min(losses["fixed-2"], losses["learned-1.5"]) + 0.02
    assert max(losses["fixed-2"], losses["learned-1.5"]) < losses["learned-0.1"] + 0.02
    assert sizes["float"] > sizes["fixed-2"] > sizes["learned-1.5"] > sizes["learned-0.1"]
    assert mean["learned-0.1"]["weights_left"] < 0.4
    held = {name: bar["holds"] for name, bar in found["must_show"].items()}
    assert [held[name] for name in held if "differ" in name or "logit" in name or "likeliest" in name] == [True] * 3
    assert {one["stage"] for one in found["stages"]} == {"encoder", "backbone", "cross_attention", "decoder"}
    text = (output / "self_compression.md").read_text()
    assert "Where a DLCM's bits are" in text and "from fewest to most" in text
    for name in ("self_compression.png", "self_compression_masks.png"):
        assert (output / name).stat().st_size > 10_000


def test_no_results_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 2
    assert "run train.sweep first" in capsys.readouterr().err


def test_ternary_files_are_also_told_as_five_weights_to_a_byte():
    rows = [*ROWS, row("ternary", 1.6, 250, bytes_in_base_3=200.0)]
    assert "would have 200 bytes" in ternary_lines(means(rows)["ternary"])[0]
