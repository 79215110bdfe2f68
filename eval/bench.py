"""What the benchmarks share: the bars they are held to, a record of the machine, and tables, JSON and CSV of rows.

A row is a flat dictionary: what was measured and under which conditions. Everything that is said about a benchmark,
bars included, is computed from its rows.
"""

import csv
import importlib.metadata
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from eval.loading import EvaluationError

Row = dict[str, Any]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl")


@dataclass(frozen=True, slots=True)
class Bar:
    """A number that must reach a target; None where it was not measured, which does not hold."""

    value: float | None
    target: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        if self.value is None or math.isnan(self.value):
            return False
        return self.value <= self.target if self.at_most else self.value >= self.target


def worst(values: Iterable[float | None], at_most: bool = False) -> float | None:
    """The value that decides a bar over several cases: None where there are none, or one was not measured."""
    found = list(values)
    if not found or None in found:
        return None
    return max(found) if at_most else min(found)  # type: ignore[type-var]


def find(rows: Sequence[Row], **wanted: Any) -> Row:
    """The one row with these values; an empty one where there is none."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    assert len(found) <= 1, f"{len(found)} rows are {wanted}"
    return found[0] if found else {}


def record(commit: str | None = None) -> dict[str, Any]:
    """Where and with what a benchmark ran.

    Args:
        commit: of the code, where it does not run in its git checkout.
    """
    command = " ".join(["python -m", *_module_and_arguments()])
    return {
        "machine": _machine(),
        "commit": commit or _commit(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda} | _package_versions(),
        "command": _without_output(command),
    }


def merge_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record for results of several calls.

    Raises:
        EvaluationError: they were measured on different machines, or with different versions.
    """
    machines = {record["machine"]["device"] for record in records}
    if len(machines) != 1:
        raise EvaluationError(f"results of different machines ({', '.join(sorted(machines))}): measure them on one")
    if any(record["versions"] != records[0]["versions"] for record in records):
        raise EvaluationError("results of different versions of torch and others: measure them with the same")
    joined = {key: "; ".join(dict.fromkeys(record[key] for record in records)) for key in ("commit", "command")}
    joined["command"] = _without_output(joined["command"])  # records of before have it
    last = records[-1]
    return {
        "machine": last["machine"],
        "commit": joined["commit"],
        "versions": last["versions"],
        "command": joined["command"],
    }


def _without_output(command: str) -> str:
    """Where results were written changes none."""
    return re.sub(r" --output [^\s;]+", "", command)


def tell(row: Row) -> None:
    """A row as it comes, for who is waiting."""
    shown = (f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values() if value is not None)
    print("  ".join(shown), flush=True)


def write_json(path: Path, recorded: Mapping[str, Any], must_show: Mapping[str, Bar], **content: Any) -> None:
    """Writes a benchmark's record, its bars and whatever else it has to say; what is not finite becomes null."""
    bars = {name: {"value": bar.value, "target": bar.target, "holds": bar.holds} for name, bar in must_show.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite({**recorded, "must_show": bars, **content}), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes rows under the union of their columns, in the order in which columns first appear."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in markdown, first column left, others right; None is shown as a dash."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)]]
    lines += [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bars_table(must_show: Mapping[str, Bar]) -> str:
    """The bars as a markdown table."""
    return markdown_table(
        ("bar", "measured", "target", "holds"),
        (
            (
                name,
                None if bar.value is None else f"{bar.value:#.3g}",
                f"{'at most' if bar.at_most else 'at least'} {bar.target:g}",
                "yes" if bar.holds else "**no**",
            )
            for name, bar in must_show.items()
        ),
    )


def record_lines(recorded: Mapping[str, Any]) -> str:
    """The record as lines of markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in recorded["versions"].items() if version)
    machine = ", ".join(str(value) for value in recorded["machine"].values() if value is not None)
    return f"Machine: {machine}.  \nVersions: {versions}.  \nCommit {recorded['commit']}; `{recorded['command']}`."


def where_trained(lines: Iterable[Mapping[str, Any]]) -> str:
    """What lines of sweeps (train/sweep.py) say of where their runs were trained."""
    places = {
        f"{line['device']} (commit {line['commit']}, torch {line['versions']['torch']})": None
        for line in lines
        if "device" in line
    }
    return "; ".join(places) or "not recorded"


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    """Labels, a faint grid, no frame."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def one_line(error: BaseException) -> str:
    """An error as a row's note."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"error: {text if len(text) <= 160 else text[:157] + '...'}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _machine() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"device": platform.processor() or platform.machine(), "memory": None, "driver": None}
    properties = torch.cuda.get_device_properties(0)
    return {"device": properties.name, "memory": f"{properties.total_memory / 1e9:.0f} GB", "driver": _driver()}


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return f"driver {lines[0]}" if lines else None


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--", ".", ":!docs/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _module_and_arguments() -> list[str]:
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return [specification.name if specification else Path(sys.argv[0]).stem, *sys.argv[1:]]
