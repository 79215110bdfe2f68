"""What packages hold, as documents of plain text: each function takes the root of an unpacked package.

A file or folder that is not where the recipe expects it is an error, since a corpus without it would be another one.
"""

import bz2
import gettext
import gzip
import html
import json
import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from train.corpus.markup import grouped, html_to_text, man_to_text, unwrap
from train.corpus.selection import stable_hash

Reader = Callable[[Path], Iterator[str]]


class LayoutError(ValueError):
    """A package does not hold what the recipe says; the message names what is missing."""


# What a reader raises, besides, where a file is not what it should be.
MALFORMED = (ValueError, LookupError, TypeError, OSError, EOFError, struct.error, zlib.error, lzma.LZMAError)


def read(path: Path) -> str:
    """A text file, perhaps gzipped; bytes that are no UTF-8 are replaced."""
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix in (".gz", ".dz") else raw).decode("utf-8", "replace")


def files(root: Path, endings: tuple[str, ...], within: tuple[str, ...] = ()) -> Iterator[Path]:
    """All regular files with one of these endings, sorted; if parts of paths are given, those that have one of them.

    Raises:
        LayoutError: there is none.
    """
    found = False
    for path in sorted(root.rglob("*")):
        inside = f"/{path.relative_to(root).as_posix()}"
        wanted = inside.endswith(endings) and (not within or any(part in inside for part in within))
        if wanted and path.is_file() and not path.is_symlink():
            found = True
            yield path
    if not found:
        raise LayoutError(f"no file {' or '.join(endings)} {' or '.join(within)}".rstrip())


def one(root: Path, pattern: str) -> Path:
    """The first file that a pattern finds.

    Raises:
        LayoutError: there is none.
    """
    found = sorted(root.glob(pattern))
    if not found:
        raise LayoutError(f"no file {pattern}")
    return found[0]


# Files of one document each


def html_pages(*within: str, endings: tuple[str, ...] = (".html", ".htm", ".html.en")) -> Reader:
    return lambda root: (html_to_text(read(path)) for path in files(root, endings, within))


def plain_texts(*within: str, endings: tuple[str, ...]) -> Reader:
    return lambda root: (read(path) for path in files(root, endings, within))


def rewrapped_texts(*within: str, endings: tuple[str, ...]) -> Reader:
    """Hard-wrapped ones, in which two blanks after a sentence begin a paragraph."""

    def texts(root: Path) -> Iterator[str]:
        for path in files(root, endings, within):
            yield unwrap(re.sub(r"(?<=[.?!])\s{2,}", "\n\n", read(path)))

    return texts


def kernel_documentation(root: Path) -> Iterator[str]:
    """Of Linux, without its translations."""
    sources = files(root, (".rst.txt",), ("/_sources/",))
    return (read(path) for path in sources if "/translations/" not in path.as_posix())


def mallard_pages(root: Path) -> Iterator[str]:
    """GNOME's help in English."""
    for path in files(root, (".page",), ("/usr/share/help/C/",)):
        yield html_to_text(re.sub(r"<info>.*?</info>", "", read(path), flags=re.DOTALL))


def manual_pages(*within: str) -> Reader:
    return lambda root: (man_to_text(read(path)) for path in files(root, (".gz",), within or ("/usr/share/man/",)))


NOT_OWN_CODE = re.compile(
    r"/(vendor|_vendor|node_modules|testdata|locale|migrations|tests?|stdarch|portable-simd)/|\.min\.js$"
)


def source_code(ending: str, *within: str) -> Reader:
    """Files of 400 to 200,000 bytes with no line of 1,000 characters, without tests and what others wrote."""

    def sources(root: Path) -> Iterator[str]:
        for path in files(root, (ending,), within):
            inside = f"/{path.relative_to(root).as_posix()}"
            if not NOT_OWN_CODE.search(inside) and 400 < path.stat().st_size < 200_000:
                text = read(path)
                if max(map(len, text.split("\n"))) < 1000:
                    yield text

    return sources


# Books and dictionaries


def sword_module(root: Path) -> Iterator[str]:
    """A module of the SWORD project: zlib blocks of OSIS or ThML. Long books are cut near 30,000 characters."""
    for path in files(root, ("bzz", "czz")):
        index, blocks = path.with_name(path.name[:-1] + "s").read_bytes(), path.read_bytes()
        for entry in range(0, len(index) - 11, 12):
            start, length, _ = struct.unpack("<III", index[entry : entry + 12])
            yield from _cut(_osis_to_text(zlib.decompress(blocks[start : start + length]).decode("utf-8", "replace")))


def _osis_to_text(source: str) -> str:
    text = re.sub(r"<note\b.*?</note>", "", source, flags=re.DOTALL)
    text = re.sub(r"<(?:/?p|lb|l|/?lg|chapter|div|title|/title|verse eID|br)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[ \t]+", " ", text))


def _cut(text: str, characters: int = 30_000) -> Iterator[str]:
    """Pieces of about so many characters, cut at ends of lines."""
    cuts = [text.rfind("\n", 0, place) + 1 for place in range(characters, len(text), characters)]
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        yield text[start:end]


def r_novels(root: Path) -> Iterator[str]:
    """Chapters of the novels in R's lazy-load database: every string of long serialised objects is a line."""
    for values in _r_objects(one(root, "usr/lib/R/site-library/*/data/Rdata.rdb").read_bytes()):
        text = "\n".join(_r_strings(values))
        if len(text) > 100_000:
            for chapter in re.split(r"\n(?=(?:CHAPTER|Chapter|VOLUME) +[IVXLC0-9]+)", text):
                yield unwrap(chapter)


def _r_objects(database: bytes) -> Iterator[bytes]:
    """Objects, each behind four bytes of its length and, unless it is zlib, a letter for its compression."""
    place = 0
    while place + 4 < len(database):
        match database[place + 4 : place + 5]:
            case b"Z":
                decompressor: Any = lzma.LZMADecompressor()
                start = place + 5
            case b"2":
                decompressor, start = bz2.BZ2Decompressor(), place + 5
            case _:
                decompressor, start = zlib.decompressobj(), place + 4
        yield decompressor.decompress(database[start:])
        place = len(database) - len(decompressor.unused_data)


def _r_strings(values: bytes) -> Iterator[str]:
    """Strings of a serialised object: CHARSXP headers, lengths, UTF-8."""
    header, place = b"\x00\x04\x00\x09", 14
    while 0 <= (found := values.find(header, place)) <= len(values) - 8:
        (length,) = struct.unpack(">i", values[found + 4 : found + 8])
        place = found + 4
        if 0 <= length < 5000:
            place = found + 8 + length
            yield values[found + 8 : place].decode("utf-8", "replace")


DICTIONARY_MARKS = re.compile(
    r"\n?[ ]*\[(?:1913 Webster|Webster 1913 Suppl\.|PJC|WordNet 1\.5|Century Dict\. 1906|GG|RP|AS)(?: \+PJC)?\]"
)


def dictionary(separator: str = r"\n\n(?=\S)|\n(?=\S)") -> Reader:
    """Entries of a dictd dictionary, which begin at a margin, several to a document."""

    def entries(root: Path) -> Iterator[str]:
        text = DICTIONARY_MARKS.sub("", read(one(root, "usr/share/dictd/*.dict.dz")))
        found = (entry for entry in re.split(separator, text) if len(entry) > 40)
        return grouped(unwrap(re.sub(r"\{([^}]*)\}", r"\1", entry)) for entry in found)

    return entries


def wordnet(root: Path) -> Iterator[str]:
    """WORD, WORD (part of speech): gloss."""
    parts_of_speech = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}

    def glosses() -> Iterator[str]:
        for name in ("noun", "verb", "adj", "adv"):
            for line in read(one(root, f"usr/share/wordnet/data.{name}")).split("\n"):
                if line.startswith("  ") or "|" not in line:  # the licence, at the top
                    continue
                data, gloss = line.split("|", 1)
                fields = data.split()
                words = (fields[4 + 2 * number] for number in range(int(fields[3], 16)))
                shown = ", ".join(re.sub(r"\(.*?\)", "", word).replace("_", " ") for word in words)
                yield f"{shown} ({parts_of_speech[fields[2]]}): {gloss.strip()}"

    return grouped(glosses(), separator="\n")


def metamath(root: Path) -> Iterator[str]:
    """Statements of set.mm, and what their comments say."""
    source = read(one(root, "usr/share/metamath/databases/set.mm"))

    def statements() -> Iterator[str]:
        pattern = r"\$\(\s([^$]{40,}?)\s\$\)\s*(\S+) \$([ap]) (\|-[^$]*?) \$[=.]"
        for comment, label, kind, formula in re.findall(pattern, source):
            credits = r"\((?:Contributed|Revised|Proof shortened|New usage|Proof modification)[^)]*\)"
            said = re.sub(r"[~`]", "", " ".join(re.sub(credits, "", comment).split()))
            yield f"{'Axiom' if kind == 'a' else 'Theorem'} {label}. {said.strip()}\n  {' '.join(formula.split())}"

    return grouped(statements())


# JSON


def factbook(root: Path) -> Iterator[str]:
    """A country a document, `field: text` a line."""
    for path in files(root, (".json",), ("/package/",)):
        if "/meta/" not in path.as_posix() and path.name != "package.json":
            lines: list[str] = []
            for section, content in json.loads(read(path)).items():
                lines.append(f"\n{section}")
                _add_fields(content, section, lines)
            yield "\n".join(lines)


def _add_fields(content: Any, name: str, lines: list[str]) -> None:
    if isinstance(content, list):
        for part in content:
            _add_fields(part, name, lines)
    elif isinstance(content, dict):
        if isinstance(content.get("text"), str):
            lines.append(f"{name}: {re.sub(r'<[^>]+>', '', html.unescape(content['text']))}")
        for key, part in content.items():
            _add_fields(part, key, lines)


def encyclopaedia(root: Path) -> Iterator[str]:
    """Titles and summaries."""
    articles = json.loads(read(one(root, "*/data/summaries_en-us.json"))).values()
    return grouped((f"{a['title']}\n{a['extract']}" for a in articles if a.get("extract")), 4000)


def recipes(root: Path) -> Iterator[str]:
    """Title, ingredients, steps."""

    def text_of(dish: dict[str, Any]) -> str:
        ingredients = "\n".join(f"- {ingredient}" for ingredient in dish["ingredients"])
        return f"{dish['title']}\n\nIngredients:\n{ingredients}\n\nMethod:\n" + "\n".join(dish["steps"])

    dishes = json.loads(read(one(root, "*/data/recipes_en-us.json"))).values()
    return grouped((text_of(dish) for dish in dishes if len(dish.get("steps") or []) > 1), 4000)


POETRY = (
    *("lunyu/*", "sishuwujing/*", "shijing/*", "chuci/*", "mengxue/*", "caocaoshiji/*", "nalanxingde/*"),
    *("youmengying/*", "wudaishici/*/*", "songci/ci.song.*", "yuanqu/*", "quantangshi/poet.tang.*"),
    "quantangshi/poet.song.*",
)


def poetry(root: Path) -> Iterator[str]:
    """Chinese classics: title and author, then lines."""
    one(root, "package/dist/quantangshi/poet.tang.*")
    for path in (path for pattern in POETRY for path in sorted((root / "package" / "dist").glob(pattern))):
        if path.suffix == ".json":
            poems = json.loads(read(path))
            yield from grouped(map(_poem, _mappings(poems if isinstance(poems, list) else [poems])), 3000)


def _mappings(values: Iterable[Any]) -> Iterator[dict[str, Any]]:
    return (value for value in values if isinstance(value, dict))


def _poem(poem: dict[str, Any]) -> str:
    lines = poem.get("paragraphs") or poem.get("content") or poem.get("para") or []
    head = (poem.get("title") or poem.get("rhythmic") or poem.get("chapter"), poem.get("author"))
    shown = " ".join(part for part in head if isinstance(part, str))
    lines = [lines] if isinstance(lines, str) else lines
    return "\n".join([shown, *(line for line in lines if isinstance(line, str))])


# Others


def package_descriptions(root: Path) -> Iterator[str]:
    """Debian's long descriptions, in which a dot is an empty line."""

    def described() -> Iterator[str]:
        for stanza in read(one(root, "Translation-en")).split("\n\n"):
            found = re.search(r"^Description-en: (.*(?:\n .*)*)", stanza, re.MULTILINE)
            if found is None:
                continue
            summary, *lines = found[1].split("\n")
            body = "\n".join("" if line == " ." else line[1:] for line in lines)
            if not re.search(r"^ ", body, re.MULTILINE):  # no lists
                body = unwrap(body)
            if len(body) > 150:
                yield f"{summary}\n{body}"

    return grouped(described(), 4000)


def game_texts(language: Literal["en", "zh"], shortest: int, beginning: int) -> Reader:
    """Long messages of a gettext catalogue, or their translations; of those that begin alike, two."""

    def messages(root: Path) -> Iterator[str]:
        begun: dict[str, int] = {}
        for message, translation in sorted(_catalogue(root), key=lambda pair: stable_hash(pair[0])):
            text = re.sub(r"</?color[^>]*>", "", message if language == "en" else translation)
            if len(text) >= shortest:
                begun[text[:beginning]] = begun.get(text[:beginning], 0) + 1
                if begun[text[:beginning]] <= 2:
                    yield text

    return lambda root: grouped(messages(root), 4000)


def _catalogue(root: Path) -> Iterator[tuple[str, str]]:
    with one(root, "usr/share/locale/zh_CN/LC_MESSAGES/*.mo").open("rb") as file:
        catalogue: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for message, translation in catalogue.items():
        singular = message if isinstance(message, str) else message[0]
        if singular:  # not the header
            yield singular.split("\x04")[-1], translation  # behind its context
