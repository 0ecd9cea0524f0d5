"""Log lines that a guest can cause, kept few (promise P10)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

WINDOW_S: Final = 60.0
LINES_PER_WINDOW: Final = 5


class RateLimit:
    """Passes a few warnings a minute on, and says how many it left out."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._window_start = -WINDOW_S
        self._lines = 0
        self.left_out = 0

    def warning(self, message: str, *args: object) -> None:
        """Log a warning, unless there were too many in this minute."""
        now = self._clock()
        if now - self._window_start >= WINDOW_S:
            if self.left_out:
                self._log.warning("%d similar lines were left out", self.left_out)
            self._window_start, self._lines, self.left_out = now, 0, 0
        self._lines += 1
        if self._lines > LINES_PER_WINDOW:
            self.left_out += 1
            return
        self._log.warning(message, *args)
