"""What scripts that score checkpoints leave behind: a text that is printed and kept, and numbers in JSON."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.bench import record, record_lines, write_json
from eval.loading import EvaluationError

LARGE = 1e9  # perplexities may be


def labels_of(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by what they are called in tables: what is left without the directory that all of them are in.

    Raises:
        EvaluationError: one is given twice.
    """
    absolute = [path.absolute() for path in paths]
    if len(set(absolute)) < len(paths):
        raise EvaluationError(f"{' '.join(map(str, paths))}: a checkpoint is given twice; leave it out once")
    common = os.path.commonpath([path.parent for path in absolute])
    return {full.relative_to(common).as_posix(): path for full, path in zip(absolute, paths, strict=True)}


def publish(output: Path, name: str, parts: Sequence[str], **content: Any) -> None:
    """Writes OUTPUT/NAME.json (content, and a record of the run) and OUTPUT/NAME.md (parts), and prints the latter."""
    recorded = record()
    numbers, text = output / f"{name}.json", "\n\n".join(parts)
    write_json(numbers, recorded, {}, **content)
    numbers.with_suffix(".md").write_text(f"{text}\n\n{record_lines(recorded)}\n", encoding="utf-8")
    print(f"{text}\n\nFiles:\n  {numbers}\n  {numbers.with_suffix('.md')}")


def with_error(value: float | None, error: float | None, digits: int, scale: float = 1) -> str | None:
    """A number with its standard error, if that is known; None stays None."""
    if value is None:
        return None
    numbers = [scale * number for number in (value, error) if number is not None]
    return " ± ".join(f"{number:,.{digits}f}" if number < LARGE else f"{number:.2e}" for number in numbers)


def with_interval(difference: Mapping[str, float | None], digits: int, scale: float = 1) -> str:
    """A difference with its interval, both as rows hold them (see `eval.uncertainty.Interval`)."""
    value, low, high = (
        None if number is None else f"{scale * number:+,.{digits}f}"
        for number in (difference[name] for name in ("value", "low", "high"))
    )
    return f"{value}" if low is None else f"{value} [{low}, {high}]"
