"""The site builds, its links lead somewhere, and the files that documents name are there.

Nothing is fetched: of links to other hosts only the form is looked at.
"""

from __future__ import annotations

import re
import shutil
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from markdown import Markdown
from mkdocs.exceptions import PluginError

from tools import site, site_hooks
from tools.source_text import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGE = ROOT / "qemu_vtpm_bridge"
TREES = ("bench", "c_shim", "docs", "packaging", "qemu_vtpm_bridge", "tests", "tools")

CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"[\w.@*-]+(?:/[\w.@*-]+)+/?")
FETCHED = {("script", "src"), ("img", "src"), ("link", "href"), ("iframe", "src")}


class Links(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value and tag != "use":
                self.links.append(value)
                if (tag, name) in FETCHED:
                    self.fetched.append(value)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site; mkdocs is strict, so a page without a place in it is an error already."""
    directory = tmp_path_factory.mktemp("site")
    site.build(directory)
    return directory


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[Path, Links]:
    return {path: Links(path.read_text(encoding="utf-8")) for path in built.rglob("*.html")}


def faults(link: str, page: Path, root: Path, anchors: dict[Path, set[str]]) -> str | None:
    """Return what is wrong with a link on a page, or None."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return None if re.fullmatch(r"[a-z0-9.-]+\.[a-z]+(:\d+)?", parts.netloc) else "no host"
    if parts.scheme == "mailto":
        return None if "@" in parts.path else "no address"
    if parts.scheme or parts.netloc or parts.path.startswith("/"):
        return "neither relative nor a web address"
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if root not in target.parents and target != root:
        return "outside"
    if not target.exists():
        return "no such file"
    if parts.fragment and unquote(parts.fragment) not in anchors.get(target, set()):
        return "no such anchor"
    return None


def test_every_link_of_the_site_leads_somewhere(built: Path, pages: dict[Path, Links]) -> None:
    anchors = {path: page.anchors for path, page in pages.items()}
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue  # its links are from the root of a host
        for link in page.links:
            assert faults(link, path, built, anchors) is None, f"{path.name}: {link}"
            checked += 1
    assert checked > 500


def test_nothing_is_fetched_from_another_host(pages: dict[Path, Links]) -> None:
    fetched = [link for page in pages.values() for link in page.fetched]
    assert len(fetched) > len(pages)
    assert not [link for link in fetched if urlsplit(link).netloc]


def test_a_link_that_leads_nowhere_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<h1 id="here">')
    anchors = {page: Links(page.read_text()).anchors}
    for link in ("page.html", "page.html#here", "#here", "https://example.org/a", "mailto:a@b"):
        assert faults(link, page, tmp_path, anchors) is None
    for link in (
        "gone.html",
        "page.html#gone",
        "#gone",
        "https://",
        "/page.html",
        "../x",
        "file:///",
    ):
        assert faults(link, page, tmp_path, anchors) is not None, link


def test_the_generator_is_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    for name in ("docs", "tools"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tree / name)
    monkeypatch.setattr(site, "ROOT", tree)
    page = tree / "docs/design.md"
    whole = page.read_text()
    for fault in ("[gone](gone.md)", "[gone](states.md#gone)", "[gone](../tools/site.py)"):
        page.write_text(f"{whole}\n{fault}\n")
        with pytest.raises(site.SiteError, match=r"gone|site\.py"):
            site.build(tmp_path / "site")
    page.write_text(whole)
    site.build(tmp_path / "site")
    (tree / "docs/nowhere.md").write_text("# A page without a place\n")
    with pytest.raises(site.SiteError, match=r"nowhere\.md"):
        site.build(tmp_path / "site")


def forge_anchors(path: Path) -> set[str]:
    """Return the anchors that a forge gives a document's headings."""
    found: set[str] = set()
    for line in re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S).splitlines():
        if match := re.match(r"#+ (.+)", line):
            text = re.sub(r"[^\w\- ]", "", match[1].strip().lower())
            found.add(text.replace(" ", "-"))
    return found


def html_of(path: Path) -> Links:
    text = path.read_text(encoding="utf-8")
    return Links(Markdown(extensions=["tables", "fenced_code"]).convert(text))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_hold_on_a_forge_too(path: Path) -> None:
    anchors = {document: forge_anchors(document) for document in DOCUMENTS}
    for link in html_of(path).links:
        assert faults(link, path, ROOT, anchors) is None, link


def named_paths(path: Path) -> Iterator[str]:
    """Yield what looks like a file of the tree in a document.

    In text, code with a slash in it, and in blocks the words that begin with one of the
    tree's directories.
    """
    text = path.read_text(encoding="utf-8")
    fences = re.findall(r"^```\w*\n.*?^```", text, flags=re.M | re.S)
    for fence in fences:
        text = text.replace(fence, "")
    for block in [*fences, *re.findall(r"^    .+$", text, flags=re.M)]:
        for word in re.split(r"[\s'\"(),]+", block):
            if PATH.fullmatch(word) and word.split("/")[0] in TREES:
                yield word
    for code in CODE.findall(re.sub(r"^    .+$", "", text, flags=re.M)):
        for word in code.split():
            word = word.split("::")[0]
            if PATH.fullmatch(word) and (
                word.split("/")[0] in TREES or word.endswith((".py", ".c"))
            ):
                yield word


def exists(word: str) -> bool:
    """Whether a name is that of a file: from the top, or within the package."""
    return any(any(base.glob(word.rstrip("/"))) for base in (ROOT, PACKAGE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_document_names_are_there(path: Path) -> None:
    missing = [word for word in named_paths(path) if not exists(word)]
    assert not missing


def test_names_of_files_are_found(tmp_path: Path) -> None:
    document = tmp_path / "a.md"
    document.write_text(
        "See `tests/gone.py` and `bridge/gone.py`, not `/etc/x.py` or `a.py`.\n\n"
        "    sh packaging/gone.sh --x tests/test_cli.py\n\n"
        "```text\ntools/gone.py: here\n  docs/gone\n```\n"
    )
    found = [
        "docs/gone",
        "packaging/gone.sh",
        "tests/test_cli.py",
        "tests/gone.py",
        "bridge/gone.py",
    ]
    assert list(named_paths(document)) == found
    assert [word for word in found if exists(word)] == ["tests/test_cli.py"]
    assert exists("bridge/frontend.py")
    assert exists("qemu_vtpm_bridge/bridge/")


def test_every_document_is_named_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def places(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, dict | list):
            for inner in entry.values() if isinstance(entry, dict) else entry:
                yield from places(inner)

    named = list(places(nav))
    assert len(named) == len(set(named))
    documents = {str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS[1:]}
    assert documents <= set(named)


def test_the_first_page_is_the_readme_and_the_manual_is_whole(
    built: Path, pages: dict[Path, Links]
) -> None:
    first = pages[built / "index.html"]
    assert "Gives an unmodified QEMU the TPM of a Xen vTPM domain" in " ".join(first.text)
    assert any(link == "design.html" for link in first.links)
    for path in (ROOT / "docs/man").glob("man?/*"):
        page = pages[built / f"manual/{path.name}.html"]
        assert {"NAME", "SYNOPSIS", "TABLES"} & page.anchors
        assert "SEE_ALSO" in page.anchors


def test_state_diagrams_are_pictures(built: Path) -> None:
    for name in ("states", "registers"):
        html = (built / f"{name}.html").read_text()
        fences = (ROOT / f"docs/{name}.md").read_text().count("```mermaid")
        assert html.count('<div class="states"><svg') == fences > 0
        assert "stateDiagram" not in html


def test_a_diagram_of_another_form_is_refused() -> None:
    dot = site_hooks.states_to_dot('stateDiagram-v2\n state "a b" as a_b\n a_b --> C: x<br/>"y"\n')
    assert '"a_b" [label="a b"' in dot
    assert '"a_b" -> "C" [label=" x \\n \\"y\\" "]' in dot
    with pytest.raises(PluginError, match="note right of"):
        site_hooks.states_to_dot("stateDiagram-v2\n note right of A\n")


def test_the_generator_is_an_extra_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert any(word.startswith("mkdocs>=") for word in extras["docs"])
    assert "qemu-vtpm-bridge[docs]" in extras["test"]
