"""What the tests of training share."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from train.pretrain import main as pretrain


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    status: int

    def poll(self) -> int:
        return self.status

    def send_signal(self, sig: int) -> None:
        raise AssertionError("it has ended")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are launched, in this process, where torch is loaded already."""
    names: list[str] = []

    def here(command: Sequence[str], log_file: Path, environment: Mapping[str, str]) -> Done:
        names.append(log_file.stem)
        assert command[:3] == [sys.executable, "-m", "train.pretrain"]
        return Done(pretrain(command[3:]))

    monkeypatch.setattr("train.runs.start", here)
    return names
