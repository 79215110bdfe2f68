"""The corpus' recipe on stand-ins: clients that bring small packages, and files as packages hold them."""

import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.tiny import EMBEDDED
from train.corpus import __main__ as command
from train.corpus import formats, packages
from train.corpus.formats import LayoutError
from train.corpus.markup import clean, grouped, html_to_text, man_to_text, unwrap
from train.corpus.packages import FetchError, Package, fetch
from train.corpus.recipe import SOURCES, Source
from train.corpus.selection import Repetitions, is_held_out, is_kept, sample
from train.documents import BadDocuments, open_sources, read_documents

PROSE = "It is a truth universally acknowledged that a text of some length is wanted here, number {0}. " * 4


def put(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


# Markup


def test_html_is_what_the_page_says():
    page = """<html><head><title>no</title></head><body><nav>no</nav><div class="sidebar"><p>no</p></div>
    <h1>Queues &amp; stacks</h1><p>A queue
    is   <em>first</em> in.</p><ul><li><p>one</p></li><li>two</ul><pre>  x = 1
      y = 2</pre><script>no()</script><table><tr><td>a</td><td>b</td></tr></table></body></html>"""
    text = clean(html_to_text(page))
    assert "no" not in text.split() and "no()" not in text
    assert "Queues & stacks\n\nA queue is first in.\n\n- one\n" in text
    assert "- two" in text and "x = 1\n      y = 2" in text and "a b" in text


def test_an_element_left_open_ends_with_the_one_around_it():
    assert clean(html_to_text("<div><div class=nav><p>no</div>yes</div>")) == "yes"


def test_manual_pages_lose_their_troff():
    page = '.TH LS 1\n.SH NAME\nls \\- list\n.PP\n.B "ls"\nshows \\fIfiles\\fP.\n.\\" no\n.TS\nno\n.TE\n.IP next\n'
    assert man_to_text(page) == "NAME ls - list\n\nls shows files.\n\nnext"


def test_lines_are_joined_to_paragraphs_and_cleaned():
    assert unwrap("a\nb\n\n \nc\n") == "a b\n\nc"
    assert clean("a \r\n\x1b[1mb\x00\n\n\n\nc\n") == "a\nb\n\nc"
    assert list(grouped(["aa", "bb", "cc"], size=3, separator=" ")) == ["aa bb", "cc"]


# Files as packages hold them


def test_pages_are_found_by_ending_and_place(tmp_path: Path):
    root = put(tmp_path, {"a/en/x.html": "<p>x</p>", "a/de/y.html": "<p>y</p>", "a/en/z.txt": "z"})
    (root / "a/en/link.html").symlink_to(root / "a/de/y.html")
    assert [text.strip() for text in formats.html_pages("/en/")(root)] == ["x"]
    assert list(formats.plain_texts(endings=(".txt",))(root)) == ["z"]
    with pytest.raises(LayoutError, match=r"no file \.pod"):
        list(formats.plain_texts(endings=(".pod",))(root))


def test_code_is_the_packages_own(tmp_path: Path):
    line = "value = compute(another, value)\n"
    kept = {"pkg/a.py": line * 20}
    dropped = {"pkg/tests/b.py": line * 20, "pkg/vendor/c.py": line * 20, "pkg/d.py": "x = 1\n", "pkg/e.py": "x" * 2000}
    assert list(formats.source_code(".py")(put(tmp_path, kept | dropped))) == [line * 20]


def test_sword_modules_are_blocks_of_zlib(tmp_path: Path):
    texts = ["<verse>In the &lt;beginning&gt;<note>no</note></verse><p/>two", "one line\n" * 5000]
    blocks = [zlib.compress(text.encode()) for text in texts]
    starts = [0, len(blocks[0])]
    index = b"".join(struct.pack("<III", start, len(block), 0) for start, block in zip(starts, blocks, strict=True))
    root = put(tmp_path, {"modules/ot.bzz": b"".join(blocks), "modules/ot.bzs": index})
    first, *cut = formats.sword_module(root)
    assert first == "In the <beginning>\ntwo"
    assert len(cut) == 2 and "".join(cut) == texts[1] and all(part.endswith("\n") for part in cut)


def test_novels_are_strings_of_r_objects(tmp_path: Path):
    lines = [
        *(f"CHAPTER {number}\n" + "A line of a novel. " * 200 for number in ("I", "II")),
    ] * 20
    strings = b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(line)) + line.encode() for line in lines)
    other = b"X\n" + bytes(12) + b"\x00\x04\x00\x09" + struct.pack(">i", 3) + b"abc"
    objects = [zlib.compress(other), zlib.compress(b"X\n" + bytes(12) + strings)]
    database = b"".join(struct.pack(">I", 1) + packed for packed in objects)
    (tmp_path / "usr/lib/R/site-library/novels/data").mkdir(parents=True)
    (tmp_path / "usr/lib/R/site-library/novels/data/Rdata.rdb").write_bytes(database)
    chapters = list(formats.r_novels(tmp_path))
    assert len(chapters) == 40 and chapters[1].startswith("CHAPTER II A line of a novel. A line")


def test_dictionaries(tmp_path: Path):
    entries = "Abacus\n   A {frame} with\n   beads, for reckoning. [1913 Webster]\nshort\nAbbey\n   " + "A house. " * 9
    root = put(tmp_path, {"usr/share/dictd/x.dict.dz": gzip.compress(entries.encode())})
    assert list(formats.dictionary()(root)) == [
        f"Abacus A frame with beads, for reckoning.\n\nAbbey {'A house. ' * 9}".strip()
    ]
    for name in ("noun", "verb", "adj", "adv"):
        put(
            root,
            {f"usr/share/wordnet/data.{name}": "  1 licence\n001 03 n 02 ice_cream 0 sorbet(p) 0 001 | sweet, cold\n"},
        )
    assert list(formats.wordnet(root)) == ["\n".join(["ice cream, sorbet (noun): sweet, cold"] * 4)]
    statement = (
        "$( A comment that is long enough to be one. (Contributed by A, 1-Jan-99.) $)\n  id $p |- ( ph -> ph ) $= a $."
    )
    put(root, {"usr/share/metamath/databases/set.mm": statement})
    assert list(formats.metamath(root)) == ["Theorem id. A comment that is long enough to be one.\n  |- ( ph -> ph )"]


def test_json_packages(tmp_path: Path):
    facts = {"Geography": {"Area": {"total": {"text": "12 km&sup2;<br>"}, "note": {"text": "small"}}}}
    countries = put(tmp_path / "a", {"package/europe/xx.json": json.dumps(facts), "package/package.json": "{}"})
    assert list(formats.factbook(countries)) == ["\nGeography\ntotal: 12 km²\nnote: small"]
    root = put(
        tmp_path / "b",
        {
            "skill/data/summaries_en-us.json": json.dumps(
                {"a": {"title": "A", "extract": "first"}, "b": {"title": "B"}}
            ),
            "skill/data/recipes_en-us.json": json.dumps(
                {"a": {"title": "T", "ingredients": ["x"], "steps": ["1", "2"]}}
            ),
            "package/dist/quantangshi/poet.tang.0.json": json.dumps(
                [{"title": "題", "author": "杜", "paragraphs": ["一"]}]
            ),
        },
    )
    assert list(formats.encyclopaedia(root)) == ["A\nfirst"]
    assert list(formats.recipes(root)) == ["T\n\nIngredients:\n- x\n\nMethod:\n1\n2"]
    assert list(formats.poetry(root)) == ["題 杜\n一"]


def test_descriptions_of_packages(tmp_path: Path):
    body = " ".join(["words"] * 30)
    stanzas = f"Package: a\nDescription-en: does a\n {body}\n .\n {body}\n\nPackage: b\nDescription-en: short\n no\n"
    assert list(formats.package_descriptions(put(tmp_path, {"Translation-en": stanzas}))) == [
        f"does a\n{body}\n\n{body}"
    ]


def test_game_texts_are_two_of_a_kind(tmp_path: Path):
    pairs = [(f"You see a door numbered {number}", f"你看见一扇门{number}") for number in range(5)] + [("no", "否")]
    (tmp_path / "usr/share/locale/zh_CN/LC_MESSAGES").mkdir(parents=True)
    (tmp_path / "usr/share/locale/zh_CN/LC_MESSAGES/game.mo").write_bytes(catalogue(pairs))
    (english,) = formats.game_texts("en", 10, 20)(tmp_path)
    assert len(english.split("\n\n")) == 2 and english.startswith("You see a door numbered")
    (chinese,) = formats.game_texts("zh", 5, 20)(tmp_path)
    assert len(chinese.split("\n\n")) == 5


def catalogue(pairs: Sequence[tuple[str, str]]) -> bytes:
    """A gettext .mo file."""
    pairs = sorted([("", "Content-Type: text/plain; charset=UTF-8\n"), *pairs])
    strings = [s.encode() for column in zip(*pairs, strict=True) for s in column]
    table, place, data = b"", 28 + 16 * len(pairs), b""
    for string in strings:
        table += struct.pack("<II", len(string), place + len(data))
        data += string + b"\0"
    return struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0) + table + data


# Selection


def test_what_is_kept_of_each_domain():
    assert is_kept(PROSE, "en") and not is_kept(PROSE[:150], "en") and not is_kept(PROSE, "zh")
    assert not is_kept("0123456789 " * 40, "tech") and is_kept("子曰學而時習之" * 40, "zh")
    assert is_kept("value = f(y, z) + 1\n" * 30, "code") and not is_kept("value = f(y, z) + 1\n" * 30, "en")


def test_nothing_is_kept_twice():
    seen = Repetitions()
    text = f"{PROSE.format(1)}\n\n{PROSE.format(2)}"
    assert seen.without(text, "en") == text
    assert seen.without(text.upper(), "en") is None
    assert seen.without(f"{PROSE.format(2)}\n\n{PROSE.format(3)}", "en") == PROSE.format(3)
    code = "".join(f"this_is_line_number_{number} = a_value\n" for number in range(10))
    assert seen.without(code, "code") == code
    assert seen.without(code + "one_more_line_that_is_long = 12345\n", "code") is None
    assert (seen.documents, seen.paragraphs, seen.code_files) == (1, 1, 1)


def test_samples_and_held_out_documents_follow_from_the_text():
    texts = [PROSE.format(number) for number in range(100)]
    some = sample(texts, 5000)
    assert some == sample(reversed(texts), 5000) == sample(texts, None)[: len(some)]
    assert 5000 <= sum(map(len, some)) < 5000 + len(texts[0]) + 10
    held_out = [is_held_out("a", text, 100) for text in texts]
    assert 2 < sum(held_out) < 25 and held_out == [is_held_out("a", text, 100) for text in texts]


# Packages


class Clients:
    """Stands for apt-get, dpkg-deb, npm and pip: brings an archive of these files."""

    def __init__(self, files: dict[str, str], fails: Sequence[str] = ()):
        self.files, self.fails, self.called = files, fails, []

    def __call__(self, command: Sequence[str], directory: Path) -> str:
        self.called.append(command)
        if command[-1] in self.fails:
            raise ValueError(f"{command[0]} ended with status 1: no such package")
        match command[0]:
            case "apt-get":
                (directory / "x_1.deb").write_bytes(b"deb")
            case "dpkg-deb" if command[1] == "-x":
                put(Path(command[3]), self.files)
            case "dpkg-deb":
                return "1.0-2\n"
            case "npm":
                with tarfile.open(directory / "x.tgz", "w:gz") as tar:
                    for name, content in self.files.items():
                        entry = tarfile.TarInfo(name)
                        entry.size = len(content.encode())
                        tar.addfile(entry, io.BytesIO(content.encode()))
            case _:
                with zipfile.ZipFile(directory / "x-2.0-py3-none-any.whl", "w") as wheel:
                    for name, content in self.files.items():
                        wheel.writestr(name, content)
        return ""


@pytest.mark.parametrize(("registry", "version"), [("apt", "1.0-2"), ("npm", "3.1"), ("pip", "2.0")])
def test_a_package_is_fetched_and_unpacked(registry, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clients = Clients({"package/package.json": '{"version": "3.1"}', "docs/a.txt": "text"})
    monkeypatch.setattr(packages, "run", clients)
    put(tmp_path, {"unpacked/old.txt": "of another package"})
    unpacked = fetch(Package(registry, "x"), tmp_path)
    assert unpacked.version == version and len(unpacked.sha256) == 64 and unpacked.archive_bytes > 0
    assert [path.read_text() for path in unpacked.root.rglob("*.txt")] == ["text"]
    if registry == "npm":
        assert "--ignore-scripts" in clients.called[0]


def test_an_archive_cannot_leave_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packages, "run", Clients({"../../escaped.txt": "x"}))
    with pytest.raises(FetchError, match=r"npm x: .*outside the destination"):
        fetch(Package("npm", "x"), tmp_path / "work")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_a_client_that_fails_is_quoted(tmp_path: Path):
    with pytest.raises(ValueError, match="ended with status 3: why not"):
        packages.run(["sh", "-c", "echo why not >&2; exit 3"], tmp_path)
    with pytest.raises(OSError, match="no-such-client"):
        packages.run(["no-such-client"], tmp_path)


# The command


def sources(*names: str) -> list[Source]:
    texts = formats.plain_texts(endings=(".txt",))
    return [Source(name, Package("npm", name), "MIT", "en", texts) for name in names]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Clients:
    files = {f"package/{number}.txt": PROSE.format(number) for number in range(300)}
    clients = Clients(files | {"package/package.json": '{"version": "3.1"}'})
    monkeypatch.setattr(packages, "run", clients)
    monkeypatch.setattr(command, "SOURCES", sources("first", "second"))
    return clients


def test_a_corpus_is_what_train_prepare_reads(two: Clients, tmp_path: Path):
    assert command.main(["--output", str(tmp_path), "--only", "first"]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (entry,) = manifest["sources"]
    assert (entry["source"], entry["version"], entry["licence"], entry["documents"]) == ("first", "3.1", "MIT", 300)
    assert manifest["splits"]["train"]["documents"] + manifest["splits"]["val"]["documents"] == 300
    (source,) = open_sources([str(tmp_path / "train.jsonl.xz")])
    documents = list(read_documents(source, "text", BadDocuments()))
    assert len(documents) == manifest["splits"]["train"]["documents"] > 250
    assert {(document.source, document.domain) for document in documents} == {("first", "en")}
    with lzma.open(EMBEDDED, "rt", encoding="utf-8") as embedded, lzma.open(tmp_path / "val.jsonl.xz", "rt") as ours:
        assert json.loads(next(ours)).keys() == json.loads(next(embedded)).keys()


def test_what_fails_is_named_and_left_out_only_on_demand(
    two: Clients, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    two.fails = ["first"]
    assert command.main(["--output", str(tmp_path / "a")]) == 2
    assert "error: 1 failed: npm first: npm ended with status 1: no such package" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert command.main(["--output", str(tmp_path / "b"), "--skip-failed"]) == 0
    assert "left out: npm first" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert [entry["source"] for entry in manifest["sources"]] == ["second"] and len(manifest["failed"]) == 1


def test_repeated_text_of_another_source_is_left_out(two: Clients, tmp_path: Path):
    assert command.main(["--output", str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [entry["documents"] for entry in manifest["sources"]] == [300, 0]
    assert manifest["left_out"]["repeated_documents"] == 300


def test_a_package_without_its_text_is_an_error(two: Clients, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    two.files = {"package/package.json": '{"version": "3.1"}'}
    assert command.main(["--output", str(tmp_path), "--only", "second"]) == 2
    assert "second (npm second): no file .txt" in capsys.readouterr().err
    assert command.main(["--output", str(tmp_path), "--only", "thrid"]) == 2
    assert "--only thrid: no such source; there are first, second" in capsys.readouterr().err


def test_the_recipe_names_each_source_once_and_its_licence():
    assert len({source.name for source in SOURCES}) == len(SOURCES) == 46
    assert all(source.licence for source in SOURCES)
    for source in SOURCES:  # versions that are not fixed are those of the release
        assert (("==" in source.package.name) or "@" in source.package.name[1:]) == (
            source.package.registry in ("npm", "pip")
        )
