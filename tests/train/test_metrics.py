"""Metrics files, and the numbers in them."""

import json
import math
import resource
from pathlib import Path

import pytest

from train.metrics import METRICS_FILE, MetricsError, MetricsLog, Throughput, bits_per_byte, read_metrics


def test_bits_per_byte():
    # uniform over 256 one-byte tokens: 8 bits for each byte
    assert bits_per_byte(nats=100 * math.log(256), num_bytes=100) == pytest.approx(8)
    assert bits_per_byte(nats=100 * math.log(256), num_bytes=400) == pytest.approx(2)


def test_lines_are_json_with_kind_and_step(tmp_path: Path):
    log = MetricsLog(tmp_path)
    log.write("train", 1, {"loss": 2.5, "tokens": 64})
    log.write("validation", 1, {"loss": math.nan})
    first, second = (json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines())
    assert first == {"kind": "train", "step": 1, "loss": 2.5, "tokens": 64}
    assert second == {"kind": "validation", "step": 1, "loss": None}
    log.close()


def test_a_resumed_log_drops_what_is_repeated(tmp_path: Path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write("train", step, {"loss": 1 / 3})
    log.close()
    before = (tmp_path / METRICS_FILE).read_text().splitlines()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    log = MetricsLog(tmp_path, resumed_step=3)
    assert (tmp_path / METRICS_FILE).read_text().splitlines() == before[:3]
    log.write("train", 4, {"loss": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_new_run_starts_an_empty_log(tmp_path: Path):
    MetricsLog(tmp_path).write("train", 1, {"loss": 1.0})
    MetricsLog(tmp_path).close()
    assert read_metrics(tmp_path) == []


def test_no_file_has_no_lines(tmp_path: Path):
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("line", ["loss 3", "[1]", '{"loss": 3}', '{"step": "1"}'])
def test_a_foreign_file_is_refused_and_kept(tmp_path: Path, line: str):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2: not a line of metrics"):
        MetricsLog(tmp_path, resumed_step=1)
    assert path.read_text().endswith(line + "\n")


def test_a_refusing_disk_is_named_with_the_file(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # no file may grow beyond 20 kB
    try:
        with (
            pytest.raises(MetricsError, match=r"metrics\.jsonl: could not be written .*File too large.*--resume"),
            MetricsLog(tmp_path) as log,
        ):
            log.write("train", 1, {"x" * 30_000: 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_throughput_leaves_out_pauses():
    now = 0.0
    throughput = Throughput(clock=lambda: now)
    now = 2.0
    throughput.add(100)
    assert throughput.rate() == 50
    now = 100.0
    throughput.restart()
    throughput.add(30)
    now = 103.0
    assert throughput.rate() == 10
