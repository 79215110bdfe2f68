"""The page on Table 3: its bars hold, its claims follow from ratios, its mean is that of the rows."""

import json
from pathlib import Path

import pytest

from eval.accounting import (
    ACCOUNTINGS,
    READINGS,
    TABLE_2,
    claims_in_words,
    flops_ratio,
    main,
    table_2_means,
    tokens_per_concept_at,
)

EVERYTHING = next(iter(ACCOUNTINGS))


def test_the_page_and_its_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    assert main(["--output", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "results" / "accounting.json").read_text())
    assert content["must_show"] and all(bar["holds"] for bar in content["must_show"].values())
    assert {"demo/dlcm", "table3/llama"} <= content["parameters"].keys()
    text = (tmp_path / "accounting.md").read_text()
    assert "| **mean of the rows** | **42.24** | **41.23** | **+1.01** |" in text
    assert claims_in_words() in text and claims_in_words() in capsys.readouterr().out
    assert (tmp_path / "accounting.png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_is_of_twelve_rows() -> None:
    assert len(TABLE_2) == 12
    assert table_2_means() == pytest.approx((42.24, 41.23), abs=0.005)


@pytest.mark.parametrize(
    ("reading", "at_4", "at_8"), [("token SwiGLU 4,096", 0.79, 0.67), ("token SwiGLU 6,144", 0.89, 0.77)]
)
def test_ratios_are_those_of_the_specification(reading: str, at_4: float, at_8: float) -> None:
    assert flops_ratio(EVERYTHING, READINGS[reading], 4.0) == pytest.approx(at_4, abs=0.005)
    assert flops_ratio(EVERYTHING, READINGS[reading], 8.0) == pytest.approx(at_8, abs=0.005)


@pytest.mark.parametrize("name", list(ACCOUNTINGS))
def test_the_ratio_wanted_is_the_ratio_found(name: str) -> None:
    for wanted in (0.66, 1.0):
        found = tokens_per_concept_at(name, 4096, wanted)
        if found is None:
            assert flops_ratio(name, 4096, 1.0) < wanted or flops_ratio(name, 4096, 1000.0) > wanted
        else:
            assert flops_ratio(name, 4096, found) == pytest.approx(wanted, abs=1e-6)
