"""What is kept of the text: a filter for each domain, nothing twice, samples of what is too much."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Domain = Literal["en", "tech", "math", "code", "zh"]  # general and technical English, mathematics, code, Chinese
SHORTEST = 200  # characters of a document
LONG_PARAGRAPH, LONG_LINE = 80, 30  # characters from which a repeated one counts
REPEATED_LINES = 0.6  # of a file's long lines; more, and it is a copy of another
HAN = re.compile(r"[\u3400-\u9fff]")
LEAST_LETTERS: dict[Domain, float] = {"en": 0.6, "tech": 0.45, "math": 0.45, "code": 0.3}
MOST_BEYOND_ASCII: dict[Domain, float] = {"en": 0.06, "tech": 0.06, "math": 0.06, "code": 0.05}
LEAST_HAN = 0.2


def is_kept(text: str, domain: Domain) -> bool:
    """Whether a text is long enough, and mostly in the letters of its domain."""
    if len(text) < SHORTEST:
        return False
    if domain == "zh":
        return len(HAN.findall(text)) / len(text) > LEAST_HAN
    letters = sum(character.isalpha() for character in text) / len(text)
    beyond_ascii = sum(not character.isascii() for character in text) / len(text)
    return letters > LEAST_LETTERS[domain] and beyond_ascii < MOST_BEYOND_ASCII[domain]


def stable_hash(text: str) -> int:
    """64 bits that are the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def size(text: str) -> int:
    """Bytes of UTF-8."""
    return len(text.encode("utf-8", "replace"))


@dataclass
class Repetitions:
    """Remembers documents, long paragraphs of prose and long lines of code, over all sources.

    Attributes:
        documents, code_files, paragraphs: how many were left out.
    """

    documents: int = 0
    code_files: int = 0
    paragraphs: int = 0
    _documents: set[int] = field(default_factory=set)
    _parts: set[int] = field(default_factory=set)

    def without(self, text: str, domain: Domain) -> str | None:
        """The text without what was seen before; None where all, or of code too much, was."""
        key = _letters_hash(text)
        if key in self._documents:
            self.documents += 1
            return None
        self._documents.add(key)
        return self._code(text) if domain == "code" else self._prose(text)

    def _code(self, text: str) -> str | None:
        lines = {stable_hash(line.strip()) for line in text.split("\n") if len(line.strip()) >= LONG_LINE}
        if lines and len(lines & self._parts) / len(lines) > REPEATED_LINES:
            self.code_files += 1
            return None
        self._parts |= lines
        return text

    def _prose(self, text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\n+", text):
            if len(paragraph) >= LONG_PARAGRAPH:
                key = _letters_hash(paragraph)
                if key in self._parts:
                    self.paragraphs += 1
                    continue
                self._parts.add(key)
            kept.append(paragraph)
        return "\n\n".join(kept)


def _letters_hash(text: str) -> int:
    return stable_hash(re.sub(r"\W+", "", text.lower()))


def sample(texts: Iterable[str], most_bytes: float | None) -> list[str]:
    """Texts in an order drawn by their hash, up to the one that reaches `most_bytes`; None takes all."""
    kept, taken = [], 0
    for text in sorted(texts, key=stable_hash):
        if most_bytes is not None and taken >= most_bytes:
            break
        kept.append(text)
        taken += size(text)
    return kept


def is_held_out(source: str, text: str, permille: int) -> bool:
    """Whether a document belongs to validation, by its text and source alone."""
    return stable_hash(source + text[:2000]) % 1000 < permille


def total_size(texts: Sequence[str]) -> int:
    return sum(map(size, texts))
