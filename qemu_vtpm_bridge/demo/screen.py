"""What the demo shows: stages, a live line, checks.

On a terminal the live line is rewritten in place; elsewhere it is printed when it has
changed, and not more often than every few seconds.  Colour only on a terminal, and not
where NO_COLOR is set.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from typing import Any, Final, TextIO

WIDTH: Final = 100
INDENT: Final = " " * 10
_LABEL: Final = 17
_LIVE_INTERVAL_S: Final = 0.1
_LIVE_INTERVAL_PIPED_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was shown, and whether it held."""

    stage: str
    what: str
    ok: bool


class Screen:
    """Writes the demo's output and keeps its checks."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._tty = self._out.isatty()
        self._colour = self._tty and "NO_COLOR" not in os.environ
        self._width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns - 1)
        self._started = time.monotonic()
        self._stage = ""
        self._stages = 0
        self._live_shown = ""
        self._live_at = -_LIVE_INTERVAL_PIPED_S
        self.checks: list[Check] = []
        self.failure: dict[str, str] | None = None
        """The stage that could not be shown, and why."""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def ok(self) -> bool:
        """Whether everything that was checked held, and something was."""
        return self.failure is None and bool(self.checks) and all(check.ok for check in self.checks)

    def summary(self) -> dict[str, Any]:
        """Return the outcome for JSON."""
        return {
            "ok": self.ok,
            "elapsed_s": round(self.elapsed_s, 1),
            "failure": self.failure,
            "checks": [asdict(check) for check in self.checks],
        }

    # Lines.

    def _paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def _print(self, text: str = "") -> None:
        if self._live_shown and self._tty:
            self._out.write("\r\033[K")
        self._live_shown = ""
        self._out.write(text + "\n")
        self._out.flush()

    def title(self, text: str, *lines: str) -> None:
        """Open the show."""
        self._print(self._paint(text, "1"))
        for line in lines:
            self._print(line)

    def stage(self, name: str, explanation: str) -> None:
        """Begin a stage."""
        self._stages += 1
        self._stage = name
        self._print()
        clock = self._paint(f"[{self.elapsed_s:5.1f} s]", "2")
        self._print(f"{clock} {self._paint(f'{self._stages}. {name}', '1;36')}")
        self.say(explanation)

    def say(self, text: str) -> None:
        """Print lines below the stage's name."""
        for line in text.splitlines():
            spaces = " " * (len(line) - len(line.lstrip()))
            wrapped = textwrap.wrap(
                line,
                self._width,
                initial_indent=INDENT,
                subsequent_indent=INDENT + spaces,
                drop_whitespace=True,
            )
            for piece in wrapped or [""]:
                self._print(piece)

    def heading(self, text: str) -> None:
        """Begin a part of a stage."""
        self._print()
        self._print(INDENT + self._paint(text, "1"))

    def row(self, label: str, text: str) -> None:
        """Print what was seen at one place."""
        pieces = textwrap.wrap(text, self._width - len(INDENT) - _LABEL) or ["nothing"]
        for number, piece in enumerate(pieces):
            head = f"{'' if number else label:<{_LABEL}}"
            shown = piece.replace("\u00a0", " ")
            self._print(f"{INDENT}{self._paint(head, '36')}{shown}")

    def quote(self, text: str) -> None:
        """Print what another program said."""
        for line in text.splitlines():
            self._print(INDENT + self._paint(f"| {line}", "2"))

    def live(self, text: str) -> None:
        """Show what is going on now; replaced by whatever comes next."""
        now = time.monotonic()
        interval = _LIVE_INTERVAL_S if self._tty else _LIVE_INTERVAL_PIPED_S
        # On a terminal the clock in it goes on, which shows that something is alive.
        if (text == self._live_shown and not self._tty) or now - self._live_at < interval:
            return
        self._live_at = now
        line = f"{f'{self.elapsed_s:7.1f} s':<{len(INDENT)}}... {text}"
        if len(line) > self._width:
            line = line[: self._width - 3] + "..."
        if self._tty:
            self._out.write(f"\r\033[K{self._paint(line, '33')}")
        else:
            self._out.write(line + "\n")
        self._out.flush()
        self._live_shown = text

    def check(self, what: str, ok: bool) -> None:
        """Note and print a thing that must hold."""
        self.checks.append(Check(self._stage, what, ok))
        mark = self._paint("yes", "32") if ok else self._paint(" NO", "1;31")
        first, *rest = textwrap.wrap(what, self._width - len(INDENT) - 5)
        self._print(f"{INDENT}{mark}  {first}")
        for line in rest:
            self._print(f"{INDENT}     {line}")

    def fail(self, why: str, logs: str) -> None:
        """Close the show early: at which stage, why, and where more is found."""
        self.failure = {"stage": self._stage, "why": why}
        self._print()
        self._print(self._paint(f"The demo failed at stage {self._stages}, {self._stage}.", "1;31"))
        self.say(f"{why}\nLogs: {logs}")

    def end(self, text: str, *, ok: bool) -> None:
        """Close the show."""
        self._print()
        self._print(self._paint(text, "1;32" if ok else "1;31"))
