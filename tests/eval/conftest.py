"""A DLCM and a baseline trained for a few steps on text with domain labels, once for all tests of this directory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny import write_config
from train.prepare import PrepareArguments, prepare
from train.pretrain import main as pretrain

TEXTS = {
    "en": "It was a dark night, number {}, and the rain fell in torrents.\nNobody spoke.\n",
    "code": "def area_{}(width, height):\n    return width * height\n\n",
    "zh": "蒼梧雲杳杳，湘浦月沈沈{}。\n誰將竹間淚，彈成絲上音。\n",
}
DOCUMENTS_PER_DOMAIN = 12


@dataclass(frozen=True)
class Trained:
    """Prepared data and the run directories of a pair trained on it."""

    data: Path
    dlcm: Path
    llama: Path


def prepare_labelled(directory: Path, domains: tuple[str, ...] = tuple(TEXTS)) -> Path:
    """Prepares documents of several passages' length with the byte tokenizer; returns the prepared directory."""
    rows = [
        {"domain": domain, "source": domain, "text": TEXTS[domain].format(number) * 8}
        for domain in domains
        for number in range(DOCUMENTS_PER_DOMAIN)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    source = directory / "labelled.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output = directory / "prepared"
    prepare(PrepareArguments(inputs=(str(source),), output=output, validation_fraction=0.3))
    return output


def train_tiny(directory: Path, architecture: str, data: Path, **sections: Any) -> Path:
    """Trains a tiny model with room for a passage; returns its run directory."""
    run_dir = directory / architecture
    model = {"max_position_embeddings": 256} | sections.pop("model", {})
    config = write_config(directory / f"{architecture}.yaml", architecture, data, run_dir, model=model, **sections)
    assert pretrain([str(config)]) == 0
    return run_dir


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("trained")
    data = prepare_labelled(directory)
    return Trained(data, train_tiny(directory, "dlcm", data), train_tiny(directory, "llama", data))
