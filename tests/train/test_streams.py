"""A stream loses, repeats and reorders nothing, whatever the network does; what does not pass is told at once."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import httpx
import pyarrow as pa
import pytest
import requests
from pyarrow import parquet

from train.data import DataError
from train.documents import open_sources
from train.streams import ATTEMPTS, LONGEST_WAIT, NetworkError, Patience, Stream, is_passing, patiently

ROWS = 90


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr("train.streams.time.sleep", waits.append)
    return waits


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for part in range(3):
        texts = [f"text {part * ROWS // 3 + row}" for row in range(ROWS // 3)]
        (tmp_path / "repository").mkdir(exist_ok=True)
        parquet.write_table(pa.table({"text": texts}), tmp_path / "repository" / f"{part}.parquet", row_group_size=8)
    return tmp_path / "repository"


class Flaky:
    """A streamed dataset that is cut after each number of rows in turn."""

    def __init__(self, repository: Path, cuts: list[int], error: Exception) -> None:
        datasets = pytest.importorskip("datasets")
        self._dataset = datasets.load_dataset(str(repository), split="train", streaming=True)
        self._cuts, self._error = cuts, error
        self.read = 0
        self.state_dict, self.load_state_dict = self._dataset.state_dict, self._dataset.load_state_dict

    def __iter__(self) -> Iterator[dict[str, Any]]:
        left = self._cuts.pop(0) if self._cuts else ROWS + 1
        for row in self._dataset:
            if left == 0:
                raise self._error
            left -= 1
            self.read += 1
            yield row


@pytest.mark.parametrize("cuts", [[0], [1], [25, 0, 0, 3], [30, 30, 1], [8, 8, 8, 8, 8, 8, 8], [89]])
def test_rows_go_on_where_the_stream_was_cut(
    cuts: list[int], repository: Path, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Flaky(repository, list(cuts), ConnectionResetError("reset by peer"))
    rows = list(Stream("hub:x", dataset).rows(0, None))
    assert rows == [(number, {"text": f"text {number - 1}"}) for number in range(1, ROWS + 1)]
    assert dataset.read == ROWS  # none was read again
    assert len(slept) == len(cuts)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(cuts)
    assert warnings[0] == f"warning: hub:x: reset by peer; attempt 2 of {ATTEMPTS} in 1 s"


@pytest.mark.parametrize("stop", [1, 8, 29, 30, 31, 60, 89])
def test_a_stream_is_taken_up_in_another_process(stop: int, repository: Path) -> None:
    """From what JSON keeps of its state."""
    import json

    name = f"hub:{repository}"
    (source,) = open_sources([name], streaming=True)
    first = source.rows("text")
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(source.state()))
    (again,) = open_sources([name], streaming=True)
    rest = list(again.rows("text", stop, state))
    assert [row["text"] for _, row in rest] == [f"text {number}" for number in range(stop, ROWS)]  # type: ignore[call-overload]
    assert not rest or rest[0][0] == f"{name}: row {stop + 1}"


def test_patience_ends(repository: Path, slept: list[float]) -> None:
    dataset = Flaky(repository, [40] + [0] * 50, TimeoutError())
    stream, rows = Stream("hub:x", dataset), []
    with pytest.raises(NetworkError, match=rf"^hub:x: {ATTEMPTS} attempts failed, the last one with TimeoutError$"):
        for row in stream.rows(0, None):
            rows.append(row)
    assert len(rows) == 40 and stream.state is not None
    assert slept == [min(2**n, LONGEST_WAIT) for n in range(ATTEMPTS - 1)] and sum(slept) < 180


def test_a_row_restores_patience(repository: Path, slept: list[float]) -> None:
    dataset = Flaky(repository, [1] * (ROWS - 1), ConnectionError("again"))
    assert len(list(Stream("hub:x", dataset).rows(0, None))) == ROWS
    assert slept == [1] * (ROWS - 1)


def test_damage_is_told_at_once(repository: Path, slept: list[float]) -> None:
    dataset = Flaky(repository, [13], ValueError("no such column\nand more"))
    with pytest.raises(DataError, match=r"^hub:x: cannot be read beyond row 13 \(no such column\); look"):
        list(Stream("hub:x", dataset).rows(0, None))
    for state in ({}, {"epoch": 0, "examples_iterable": 5}, {"epoch": []}):
        with pytest.raises(DataError, match=r"^hub:x: cannot be read beyond row 7: its state is none"):
            list(Stream("hub:x", Flaky(repository, [], ValueError())).rows(7, state))
    assert slept == []


def answer(status: int) -> Exception:
    error = requests.HTTPError("answer")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[assignment]
    return error


def caused(error: Exception, by: BaseException) -> Exception:
    error.__cause__ = by
    return error


class OfflineModeIsEnabled(ConnectionError):
    """Of huggingface_hub."""


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (httpx.ReadTimeout(""), True),
        (httpx.RemoteProtocolError(""), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError(), True),
        (requests.exceptions.ChunkedEncodingError(), True),
        (answer(503), True),
        (answer(429), True),
        (answer(404), False),
        (answer(401), False),
        (aiohttp.ClientResponseError(None, (), status=403), False),  # type: ignore[arg-type]
        (aiohttp.ClientResponseError(None, (), status=502), True),  # type: ignore[arg-type]
        (caused(RuntimeError("generating"), ConnectionError()), True),
        (caused(FileNotFoundError("dataset"), answer(404)), False),
        (FileNotFoundError(), False),
        (ValueError(), False),
        (OSError(28, "No space left on device"), False),
        (OfflineModeIsEnabled(), False),
    ],
    ids=repr,
)
def test_what_may_pass(error: Exception, passing: bool) -> None:
    assert is_passing(error) == passing


def test_opening_a_dataset_is_patient(
    repository: Path, slept: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    load, failures = datasets.load_dataset, [httpx.ConnectError("no route to host"), answer(500)]

    def refusing(**options: Any) -> Any:
        if failures:
            raise failures.pop()
        return load(**options)

    monkeypatch.setattr(datasets, "load_dataset", refusing)
    (source,) = open_sources([f"hub:{repository}"], streaming=True)
    assert len(list(source.rows("text"))) == ROWS and slept == [1, 2]
    assert "no route to host; attempt 3 of" in capsys.readouterr().err
    failures += [answer(500)] * ATTEMPTS
    with pytest.raises(NetworkError, match=rf"^hub:{re.escape(str(repository))}: {ATTEMPTS} attempts failed"):
        open_sources([f"hub:{repository}"], streaming=True)


def test_patiently_returns_the_answer_or_the_error(slept: list[float]) -> None:
    assert patiently("x", lambda: 5) == 5
    with pytest.raises(KeyError):
        patiently("x", lambda: {}["a"])
    assert slept == []
    patience = Patience("x")
    patience.wait(TimeoutError())
    patience.succeeded()
    patience.wait(TimeoutError())
    assert slept == [1, 1]
