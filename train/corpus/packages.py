"""Fetching a package by the client of its registry, and unpacking it; nothing is installed, no script of it runs."""

import json
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.data import file_sha256

Registry = Literal["apt", "npm", "pip", "apt-descriptions"]


class FetchError(RuntimeError):
    """A package that could not be fetched or unpacked; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Package:
    """A package by its name, or that of a version of it: NAME@1.2 for npm, NAME==1.2 for pip."""

    registry: Registry
    name: str


@dataclass(frozen=True, slots=True)
class Unpacked:
    """An archive and where its files lie."""

    root: Path
    version: str
    sha256: str
    archive_bytes: int


def fetch(package: Package, work: Path) -> Unpacked:
    """Fetches and unpacks below `work`, in place of what was there.

    Raises:
        FetchError: no such client, no such package, no network, or no archive of the kind expected.
    """
    downloads, root = work / "downloads", work / "unpacked"
    for directory in (downloads, root):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    try:
        archive, version = CLIENTS[package.registry](package.name, downloads, root)
    except (OSError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise FetchError(f"{package.registry} {package.name}: {' '.join(str(error).split())}") from error
    return Unpacked(root, version, file_sha256(archive), archive.stat().st_size)


def run(command: Sequence[str], directory: Path) -> str:
    """What a command prints on stdout.

    Raises:
        ValueError: it failed; with the end of what it said.
        OSError: there is no such command.
    """
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"{' '.join(command[:3])} ended with status {done.returncode}: {said[-300:]}")
    return done.stdout


def _only_file(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{len(found)} files like {pattern} were downloaded, where one was expected")
    return found[0]


def _from_apt(name: str, downloads: Path, root: Path) -> tuple[Path, str]:
    run(["apt-get", "-q", "download", name], downloads)
    archive = _only_file(downloads, "*.deb")
    run(["dpkg-deb", "-x", str(archive), str(root)], downloads)
    return archive, run(["dpkg-deb", "-f", str(archive), "Version"], downloads).strip()


def _from_npm(name: str, downloads: Path, root: Path) -> tuple[Path, str]:
    run(["npm", "pack", "--silent", "--ignore-scripts", name], downloads)
    archive = _only_file(downloads, "*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter="data")
    return archive, json.loads((root / "package" / "package.json").read_text(encoding="utf-8"))["version"]


def _from_pip(name: str, downloads: Path, root: Path) -> tuple[Path, str]:
    only_wheels = ["--quiet", "--no-deps", "--only-binary=:all:"]
    run([sys.executable, "-m", "pip", "download", *only_wheels, "--dest", str(downloads), name], downloads)
    archive = _only_file(downloads, "*.whl")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(root)
    return archive, archive.name.split("-")[1]


def _apt_descriptions(name: str, downloads: Path, root: Path) -> tuple[Path, str]:
    """Debian's own long descriptions of all packages, as a file of that name."""
    (downloads / "partial").mkdir()
    cache = downloads / "cache"
    cache.mkdir()
    options = ("Acquire::Languages=en", f"Dir::State::Lists={downloads}", f"Dir::Cache={cache}")
    run(["apt-get", "-q", *(word for option in options for word in ("-o", option)), "update"], downloads)
    lists = sorted(downloads.glob("*Translation-en*"), key=lambda path: path.stat().st_size)
    if not lists:
        raise ValueError("apt-get update brought no Translation-en: its sources have none, or no index is allowed")
    text = run(["/usr/lib/apt/apt-helper", "cat-file", str(lists[-1])], downloads)
    (root / name).write_text(text, encoding="utf-8")
    return lists[-1], time.strftime("%Y-%m-%d")


CLIENTS: dict[Registry, Callable[[str, Path, Path], tuple[Path, str]]] = {
    "apt": _from_apt,
    "npm": _from_npm,
    "pip": _from_pip,
    "apt-descriptions": _apt_descriptions,
}
