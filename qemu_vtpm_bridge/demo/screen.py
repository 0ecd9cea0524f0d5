"""What the demo shows: stages, a live line, checks.

On a terminal the live line is rewritten in place; elsewhere it is printed when it has
changed, and not more often than every few seconds.  Colour only on a terminal, and not
where NO_COLOR is set.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Final, TextIO

WIDTH: Final = 100
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
        self._started = time.monotonic()
        self._stage = ""
        self._stages = 0
        self._live_shown = ""
        self._live_at = -_LIVE_INTERVAL_PIPED_S
        self.checks: list[Check] = []

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def ok(self) -> bool:
        """Whether everything that was checked held, and something was."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def summary(self) -> dict[str, Any]:
        """Return the outcome for JSON."""
        return {
            "ok": self.ok,
            "elapsed_s": round(self.elapsed_s, 1),
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
        self._print(f"          {explanation}")

    def say(self, text: str) -> None:
        """Print lines below the stage's name."""
        for line in text.splitlines():
            self._print(f"          {line}")

    def quote(self, text: str) -> None:
        """Print what another program said."""
        for line in text.splitlines():
            self._print("          " + self._paint(f"| {line}", "2"))

    def live(self, text: str) -> None:
        """Show what is going on now; replaced by whatever comes next."""
        now = time.monotonic()
        interval = _LIVE_INTERVAL_S if self._tty else _LIVE_INTERVAL_PIPED_S
        if text == self._live_shown or now - self._live_at < interval:
            return
        self._live_at = now
        line = f"          ... {text}"[:WIDTH]
        if self._tty:
            self._out.write(f"\r\033[K{self._paint(line, '33')}")
        else:
            self._out.write(line + "\n")
        self._out.flush()
        self._live_shown = text

    def check(self, what: str, ok: bool) -> None:
        """Note and print a thing that must hold."""
        self.checks.append(Check(self._stage, what, ok))
        mark = self._paint("yes", "32") if ok else self._paint("NO", "1;31")
        self._print(f"          {mark:>3}  {what}")

    def end(self, text: str, *, ok: bool) -> None:
        """Close the show."""
        self._print()
        self._print(self._paint(text, "1;32" if ok else "1;31"))
