"""What the doctor says: findings, and how they are shown to people and to programs.

No input or output happens here.  Theory of operation.  A check gives `Finding`s; each has
the check's stable name, a verdict, one line, facts for programs, and what mends it.  The
text has one aligned line for each finding, and below them what to do, in the order of the
checks: what comes first is what the rest stands on.  The JSON document holds the same; its
form is SCHEMA, and grows only.

Keeps P10: whatever was read from files, XenStore, sockets and programs is printed bounded
and without control characters.  Who may lie: all of them, so this module is the last to
look at each string.
"""

from __future__ import annotations

import enum
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

SCHEMA: Final = 1
"""The JSON document's form: raised when a key changes its meaning or goes."""

STRING_MAX_CHARS: Final = 400
LIST_MAX: Final = 64

EXIT_PROBLEMS: Final = 3
"""Exit status where a problem was found; 1 and 2 have their meaning for all commands."""


class Verdict(enum.Enum):
    """What a finding means for a guest's TPM."""

    OK = "ok"
    WARNING = "warning"
    """It works now, or for others; there is something to know or to do."""
    PROBLEM = "problem"
    """A guest has no TPM, or a wrong one, or somebody may take it, until this is mended."""
    NOT_APPLICABLE = "not-applicable"
    """This host or this role does not need it."""


_ORDER: Final = (Verdict.NOT_APPLICABLE, Verdict.OK, Verdict.WARNING, Verdict.PROBLEM)
_SHOWN: Final = {Verdict.NOT_APPLICABLE: "-"}
_COLOURS: Final = {Verdict.OK: "32", Verdict.WARNING: "33", Verdict.PROBLEM: "31;1"}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the gravest of some verdicts."""
    return max(verdicts, key=_ORDER.index, default=Verdict.NOT_APPLICABLE)


@dataclass(frozen=True, slots=True)
class Mend:
    """One step that mends a finding.

    `command` is for a shell, exact and whole; empty where only a person can do it.  `line`
    is for a file that `does` names, such as a guest's xl.cfg.
    """

    does: str
    command: str = ""
    line: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return the step for JSON."""
        return {"does": tidy(self.does), "command": self.command, "line": tidy(self.line)}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found about one thing."""

    check: str
    """The check's name, the same in every version: `xen.devices`."""
    verdict: Verdict
    summary: str
    facts: dict[str, Any] = field(default_factory=dict)
    mend: tuple[Mend, ...] = ()
    subject: str = ""
    """Which of several things the check looked at: a path, a program, a domain."""

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        return {
            "check": self.check,
            "subject": tidy(self.subject),
            "verdict": self.verdict.value,
            "summary": tidy(self.summary),
            "facts": tidy(self.facts),
            "mend": [step.as_dict() for step in self.mend],
        }


@dataclass(slots=True)
class Report:
    """All findings, in the order of the checks."""

    role: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The gravest verdict; OK where nothing applied."""
        return worst([Verdict.OK, *(finding.verdict for finding in self.findings)])

    @property
    def exit_status(self) -> int:
        """0 where there is no problem, EXIT_PROBLEMS where there is one."""
        return EXIT_PROBLEMS if self.verdict is Verdict.PROBLEM else 0

    def count(self, verdict: Verdict) -> int:
        """Return how many findings have this verdict."""
        return sum(finding.verdict is verdict for finding in self.findings)

    def as_dict(self, version: str) -> dict[str, Any]:
        """Return the document that --json prints."""
        return {
            "program": "qemu-vtpm-bridge",
            "version": version,
            "schema": SCHEMA,
            "role": self.role,
            "verdict": self.verdict.value,
            "counts": {verdict.value: self.count(verdict) for verdict in Verdict},
            "findings": [finding.as_dict() for finding in self.findings],
        }


# Strings that others wrote.


def tidy(value: Any) -> Any:
    """Return `value` for output: strings escaped and bounded, lists bounded, all within too."""
    if isinstance(value, str):
        return _escaped(value)
    if isinstance(value, dict):
        return {_escaped(str(name)): tidy(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        kept = [tidy(item) for item in value[:LIST_MAX]]
        return kept + [f"and {len(value) - LIST_MAX} more"] * (len(value) > LIST_MAX)
    return value


def _escaped(text: str) -> str:
    cut = text[:STRING_MAX_CHARS]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)
    return shown + "..." if len(text) > STRING_MAX_CHARS else shown


_PLAIN: Final = re.compile(r"[\x20-\x7e]*")


def shell(*words: str | os.PathLike[str]) -> str:
    """Return the words as one line for a shell (bash), that does what they say.

    A word with other than printable ASCII is spelled with $'...'.
    """
    return " ".join(_quoted(os.fspath(word)) for word in words)


def _quoted(word: str) -> str:
    if _PLAIN.fullmatch(word):
        return shlex.quote(word)
    raw = os.fsencode(word)
    return "$'" + "".join(_spelled(byte) for byte in raw) + "'"


def _spelled(byte: int) -> str:
    character = chr(byte)
    plain = _PLAIN.fullmatch(character) and character not in "'\\"
    return character if plain else f"\\x{byte:02x}"


# For people.


def render(report: Report, *, colour: bool = False) -> str:
    """Return the report as text, with terminal colours if asked for."""
    checks = max((len(finding.check) for finding in report.findings), default=0)
    lines = [_line(finding, checks, colour=colour) for finding in report.findings]
    for title, steps in _to_do(report.findings):
        lines += ["", title, *_steps(steps)]
    return "\n".join([*lines, "", _total(report)])


def _line(finding: Finding, width: int, *, colour: bool) -> str:
    word = _SHOWN.get(finding.verdict, finding.verdict.value)
    padded = f"{word:<7}"
    if colour and finding.verdict in _COLOURS:
        padded = f"\x1b[{_COLOURS[finding.verdict]}m{padded}\x1b[0m"
    return f"{padded}  {finding.check:<{width}}  {tidy(finding.summary)}".rstrip()


def _to_do(findings: Sequence[Finding]) -> list[tuple[str, list[Mend]]]:
    """Return what to do under its title, problems before the rest, nothing twice."""
    titles = {
        Verdict.PROBLEM: "What to do, in this order:",
        Verdict.WARNING: "What to think about:",
        Verdict.NOT_APPLICABLE: "What can be done here:",
    }
    told: set[Mend] = set()
    parts = []
    for verdict, title in titles.items():
        steps = []
        for finding in findings:
            for step in finding.mend if finding.verdict is verdict else ():
                if step not in told:
                    told.add(step)
                    steps.append(step)
        if steps:
            parts.append((title, steps))
    return parts


def _steps(steps: Sequence[Mend]) -> list[str]:
    lines = []
    for number, step in enumerate(steps, 1):
        exact = step.command or tidy(step.line)
        lines.append(f"{number:>3}. {tidy(step.does)}" + (":" if exact else ""))
        if exact:
            lines.append(f"       {exact}")
    return lines


def _total(report: Report) -> str:
    said = [
        f"{count} {verdict.value}{'s' * (count != 1)}"
        for verdict in (Verdict.PROBLEM, Verdict.WARNING)
        if (count := report.count(verdict))
    ]
    return ", ".join(said) + "." if said else "No problem was found."
