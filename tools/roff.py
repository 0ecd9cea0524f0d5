"""Plain text with a few marks, as roff for man pages.

The marks are those that help texts have anyway: a blank line between paragraphs, an
indented paragraph that is taken as it stands, `code` between backquotes, and --options.
Lines end where sentences do, and are short, as mandoc's linter wants them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator

WIDTH = 78

_CODE = re.compile(r"`([^`]+)`|(?<![\w-])(--[a-z][a-z0-9-]*)")
_BETWEEN = re.compile(r"\n[ \t]*\n+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`(])")


def literal(text: str) -> str:
    """Return text that is typed or printed as it stands, escaped."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    for char, name in (("'", "aq"), ("`", "ga"), ("^", "ha"), ("~", "ti"), ('"', "dq")):
        text = text.replace(char, f"\\({name}")
    return text


def prose(text: str) -> str:
    """Return a paragraph's text, escaped; code and options are bold."""
    parts = []
    at = 0
    for match in _CODE.finditer(text):
        parts += [_plain(text[at : match.start()]), bold(match[1] or match[2])]
        at = match.end()
    return "".join([*parts, _plain(text[at:])])


def _plain(text: str) -> str:
    return text.replace("\\", "\\e").replace("^", "\\(ha").replace("~", "\\(ti")


def quoted(text: str) -> str:
    """Return text for between the quotes of a request's argument."""
    return _plain(text).replace('"', "\\(dq")


def bold(text: str) -> str:
    """Return literal text in bold."""
    return f"\\fB{literal(text)}\\fR"


def italic(text: str) -> str:
    """Return literal text that stands for something else."""
    return f"\\fI{literal(text)}\\fR"


def safe(line: str) -> str:
    """Keep a line of text from being taken for a request."""
    return f"\\&{line}" if line.startswith((".", "'")) else line


def filled(text: str) -> Iterator[str]:
    """Yield the lines of one paragraph."""
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        yield from wrapped(prose(sentence))


def wrapped(text: str) -> Iterator[str]:
    """Yield text that is roff already, in short lines."""
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    yield from map(safe, lines)


def paragraphs(text: str) -> list[list[str]]:
    """Return the paragraphs of a text as lists of lines.

    Indented ones keep their indentation, and those in a row are one.
    """
    found: list[list[str]] = []
    for block in _BETWEEN.split(textwrap.dedent(text.expandtabs()).strip("\n")):
        lines = block.splitlines()
        if found and lines[0].startswith(" ") and found[-1][0].startswith(" "):
            found[-1] += ["", *lines]
        elif lines:
            found.append(lines)
    return found


def body(text: str, *, between: str = ".PP") -> Iterator[str]:
    """Yield a text's paragraphs, what is below a heading or a tag.

    `between` is the request that begins a paragraph: .IP below a tag.
    """
    for number, lines in enumerate(paragraphs(text)):
        if number:
            yield between
        if lines[0].startswith(" "):
            shown = textwrap.dedent("\n".join(lines)).splitlines()
            yield from verbatim(shown, indented=between == ".PP")
        else:
            yield from filled(" ".join(lines))


def verbatim(lines: Iterable[str], *, indented: bool) -> Iterator[str]:
    """Yield lines that are shown as they stand."""
    yield from ((".RS 4", ".nf") if indented else (".nf",))
    yield from (safe(literal(line)) for line in lines)
    yield from ((".fi", ".RE") if indented else (".fi",))
