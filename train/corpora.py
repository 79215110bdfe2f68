"""Corpora that a YAML file describes, so that preparing each is one line: `python -m train.prepare --corpus FILE NAME`.

    common: {tokenizer: ..., workers: ...}       options of `train.prepare` that all corpora share
    corpora:
      NAME: {inputs: [...], output: ..., ...}    those of one, which win

Keys are the command line's options without dashes; what is given on the command line wins over both.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config import ConfigError, read_yaml


def corpus_arguments(file: Path, name: str, options: Sequence[str]) -> list[str]:
    """A corpus as arguments of a command line that has these options, `inputs` being its positional ones.

    Raises:
        ConfigError: not readable, no such corpus, an unknown key, or a value that no option can have.
    """
    content = read_yaml(file)
    if unknown := content.keys() - {"common", "corpora"}:
        raise ConfigError(f"{file}: unknown key {min(unknown)!r}; there are common and corpora")
    corpora = _mapping(file, "corpora", content.get("corpora"))
    if name not in corpora:
        raise ConfigError(f"{file}: no corpus {name!r}; there are {', '.join(map(str, corpora))}")
    merged: dict[str, Any] = {}
    for where, section in (("common", content.get("common") or {}), (f"corpora.{name}", corpora[name])):
        for key, value in _mapping(file, where, section).items():
            if key not in options:
                near = difflib.get_close_matches(str(key), options, 1)
                raise ConfigError(f"{file}: unknown key {where}.{key}; did you mean {(near or options)[0]!r}?")
            merged[key] = value
    arguments = [*_inputs(file, merged.pop("inputs", None))]
    for key, value in merged.items():
        if isinstance(value, Mapping | list) or value is None:
            raise ConfigError(f"{file}: {key} is {value!r}; write one value")
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            arguments += [option] * value
        else:
            arguments.append(f"{option}={value}")
    return arguments


def _mapping(file: Path, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or (not value and where == "corpora"):
        raise ConfigError(f"{file}: {where} is {value!r}; write `key: value` pairs")
    return value


def _inputs(file: Path, value: Any) -> Sequence[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or any(not isinstance(n, str) or n[:1] in ("", "-") for n in names):
        raise ConfigError(f"{file}: inputs is {value!r}; list files, directories and datasets")
    return names
