"""Markup as plain text: HTML and its like, manual pages, hard-wrapped prose."""

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser

CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff]")


def clean(text: str) -> str:
    """Without control characters, trailing blanks and runs of empty lines."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " "))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def unwrap(text: str) -> str:
    """Joins hard-wrapped lines; blank lines go on to part paragraphs."""
    paragraphs = (re.sub(r"\s*\n\s*", " ", part.strip()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def grouped(entries: Iterable[str], size: int = 8000, separator: str = "\n\n") -> Iterator[str]:
    """Short entries joined to documents of about `size` characters."""
    joined: list[str] = []
    characters = 0
    for entry in entries:
        joined.append(entry)
        characters += len(entry)
        if characters >= size:
            yield separator.join(joined)
            joined, characters = [], 0
    if joined:
        yield separator.join(joined)


# HTML

PARAGRAPHS = {"h1", "h2", "h3", "h4", "h5", "h6", "p", "page", "pre", "section"}  # an empty line before and after
LINES = {"article", "blockquote", "dd", "div", "dl", "dt", "item", "li", "note", "ol", "table", "title", "tr", "ul"}
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}  # have no end tag
SKIPPED = {"aside", "button", "footer", "form", "head", "header", "math", "nav", "noscript", "script", "select"}
SKIPPED |= {"style", "svg"}
MAY_BE_NAVIGATION = {"a", "div", "p", "span", "table", "ul"}
NAVIGATION = re.compile(
    r"nav|sidebar|toctree|toc\b|breadcrumb|footer|header(link)?\b|related|menu|search|copyright|index", re.IGNORECASE
)


class _TextOfHtml(HTMLParser):
    """Collects text; `skipped_from` holds depths of the open elements that are left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[str] = []
        self.skipped_from: list[int] = []
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            if tag in ("br", "hr") and not self.skipped_from:
                self.parts.append("\n")
            return
        names = " ".join(value or "" for name, value in attrs if name in ("class", "id", "role"))
        self.open.append(tag)
        if tag in SKIPPED or (tag in MAY_BE_NAVIGATION and NAVIGATION.search(names)):
            self.skipped_from.append(len(self.open))
        if self.skipped_from:
            return
        self.preformatted += tag == "pre"
        self._break(tag)
        if tag == "li":
            self.parts.append("- ")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or tag not in self.open:
            return
        closed = ""
        while closed != tag:  # whatever was left open inside ends with it
            depth, closed = len(self.open), self.open.pop()
            if self.skipped_from and self.skipped_from[-1] == depth:
                self.skipped_from.pop()
            elif not self.skipped_from:
                self.preformatted -= closed == "pre" and self.preformatted > 0
                self._break(closed)

    def handle_data(self, data: str) -> None:
        if not self.skipped_from:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))

    def _break(self, tag: str) -> None:
        if tag in PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in LINES:
            self.parts.append("\n")


def html_to_text(page: str) -> str:
    """What a page says, without navigation, scripts and the like; preformatted text keeps its lines."""
    body = re.search(r"<body\b", page, re.IGNORECASE)
    parser = _TextOfHtml()
    parser.feed(page[body.start() :] if body else page)
    parser.close()
    text = re.sub(r"(?m)^- *\n+(?!- )", "- ", "".join(parser.parts))  # an item whose text begins on another line
    return re.sub(r"\n[ \t]+(?=\S)", lambda indent: indent[0] if len(indent[0]) > 3 else "\n", text)


# Manual pages

NOT_TEXT = re.compile(
    r"""^[.'](\\"|TH|so|hy|ad|ft|nf|fi|if|ie|el|de|ds|nr|UR|UE|in|ti|ta|TS|TE|sp|ne|PD|RS|RE)"""  # requests of troff
)
ESCAPES = {"\\-": "-", "\\(aq": "'", "\\(dq": '"', "\\e": "\\", "\\&": "", "\\(bu": "-"}


def man_to_text(source: str) -> str:
    """A manual page in troff: headings, paragraphs, words in whatever font."""
    lines: list[str] = []
    for line in re.sub(r"(?ms)^\.TS.*?^\.TE", "", source).split("\n"):  # without tables
        if NOT_TEXT.match(line):
            continue
        if heading := re.match(r"^\.(SH|SS)\s+(.*)", line):
            lines.append("\n" + heading[2].strip('"'))
            continue
        if re.match(r"^\.(PP|LP|P|TP|IP|HP)\b", line):
            lines.append("")
            line = re.sub(r"^\.\w+\s*", "", line) if line.startswith(".IP") else ""
        if line[:1] == ".":
            line = re.sub(r"^\.(B|I|BR|IR|RB|RI|BI|IB|SM|SB)\s+", "", line).replace('" "', "").replace('"', "")
        if line[:1] not in (".", "'"):
            lines.append(_without_escapes(line))
    return unwrap("\n".join(lines))


def _without_escapes(line: str) -> str:
    line = re.sub(r"\\f(\[[^]]*\]|\(..|.)", "", line)  # fonts
    for escape, character in ESCAPES.items():
        line = line.replace(escape, character)
    return re.sub(r"\\(\(..|\[[^]]*\]|s[-+]?\d|[|^])", "", line)
