"""What the site has beyond the Markdown files: README.md, the manual's pages, pictures.

mkdocs calls the functions whose names begin with `on_`.  README.md is the first page,
with its links as they are from there.  The man pages become HTML by mandoc.  Mermaid's
state diagrams, of which we use the few forms that `states_to_dot` knows, become SVG by
graphviz's dot, so that a reader needs neither JavaScript nor a network for them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
MAN_PAGES = sorted(
    (ROOT / "docs" / "man").glob("man?/*"), key=lambda path: (path.suffix, path.stem)
)

_README_LINK = re.compile(r"(\]\()docs/")
_FENCE = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_STATE = re.compile(r'state "([^"]+)" as (\w+)')
_EDGE = re.compile(r"(\w+|\[\*\]) --> (\w+)(?:: (.+))?")
_REFERENCE = re.compile(r"<b>([\w.-]+)</b>\(([15])\)")
_HEADING = re.compile(r"(</?h)([12])\b")


def program(name: str, *words: str, text: str) -> str:
    """Return what a program makes of a text; raises PluginError where it cannot."""
    if shutil.which(name) is None:
        raise PluginError(f"{name} is missing; `make deps` installs it")
    done = subprocess.run([name, *words], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PluginError(f"{name}: {done.stderr}")
    return done.stdout


def nav_with_files(nav: Any) -> Any:
    """Put the man pages where the navigation says so, and leave out what is not there."""
    if isinstance(nav, list):
        return [kept for kept in map(nav_with_files, nav) if kept]
    if isinstance(nav, dict):
        filled = {title: nav_with_files(entry) for title, entry in nav.items()}
        return {title: entry for title, entry in filled.items() if entry}
    if nav == "manual/*":
        return [{title(path): manual_uri(path)} for path in MAN_PAGES]
    return nav if nav == "index.md" or (ROOT / "docs" / nav).exists() else None


def title(path: Path) -> str:
    """Return a man page's name as it is cited: qemu-vtpm-bridge(1)."""
    return f"{path.stem}({path.suffix[1:]})"


def manual_uri(path: Path) -> str:
    """Return where a man page is in the site."""
    return f"manual/{path.name}.md"


def manual_page(path: Path) -> str:
    """Return a man page as Markdown with HTML in it."""
    html = program("mandoc", "-T", "html", "-O", "fragment", text=path.read_text(encoding="utf-8"))
    html = html[html.index('<div class="manual-text">') : html.index('<table class="foot">')]
    names = {page.name for page in MAN_PAGES}

    def link(match: re.Match[str]) -> str:
        name = f"{match[1]}.{match[2]}"
        return f'<a href="{name}.html">{match[0]}</a>' if name in names else match[0]

    html = _REFERENCE.sub(link, html)
    html = _HEADING.sub(lambda match: f"{match[1]}{int(match[2]) + 1}", html)
    return f'# {title(path)}\n\n<div class="manual">\n{html}\n</div>\n'


def states_to_dot(diagram: str) -> str:
    """Return a Mermaid state diagram in dot's language.

    Raises PluginError for a line of a form that the pages here do not have.
    """
    names = dict[str, str]()
    edges = dict[tuple[str, str], list[str]]()
    for line in map(str.strip, diagram.splitlines()):
        if match := _STATE.fullmatch(line):
            names[match[2]] = match[1].replace(" but ", "\nbut ").replace(", ", ",\n")
        elif match := _EDGE.fullmatch(line):
            edges.setdefault((match[1], match[2]), []).extend((match[3] or "").split("<br/>"))
        elif line not in ("", "stateDiagram-v2"):
            raise PluginError(f"no form of a state diagram that is known here: {line}")
    lines = [
        "digraph {",
        'graph [bgcolor="transparent" nodesep=0.3 ranksep=0.5]',
        'node [shape=box style="rounded,filled" fontname="Helvetica" fontsize=13]',
        'edge [fontname="Helvetica" fontsize=11]',
        '"[*]" [shape=circle label="" width=0.15 style=filled]',
    ]
    for state in dict.fromkeys(state for edge in edges for state in edge):
        if state in names:
            lines.append(f'"{state}" [label="{quoted(names[state])}" style="rounded,dashed"]')
    for (old, new), labels in edges.items():
        # Spaces around each line keep it off the arrows.
        label = "\n".join(f" {label} " for label in labels)
        lines.append(f'"{old}" -> "{new}" [label="{quoted(label)}"]')
    return "\n".join([*lines, "}"])


def quoted(text: str) -> str:
    """Return a label as dot takes it between quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def drawn(match: re.Match[str]) -> str:
    """Return a fence with a state diagram as a picture."""
    svg = program("dot", "-Tsvg", text=states_to_dot(match[1]))
    svg = re.sub(r"<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace("<svg ", '<svg role="img" aria-label="State diagram" ', 1)
    return f'<div class="states">{" ".join(svg.split())}</div>'


# What mkdocs calls.


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Complete the navigation."""
    config.nav = nav_with_files(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no Markdown files below docs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_README_LINK.sub(r"\1", readme)))
    for path in MAN_PAGES:
        files.append(File.generated(config, manual_uri(path), content=manual_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_others: Any) -> str:
    """Draw the state diagrams."""
    if page.file.src_uri == "states.md":
        # Wide pictures need the room more than five headings do.
        page.meta["hide"] = ["toc"]
    return _FENCE.sub(drawn, markdown)
