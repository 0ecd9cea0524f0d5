"""Trying again what others refuse: ever later up to a bound, and with few words.

Theory of operation.  What is refused now may be granted in a moment, without an event that
would tell.  So whoever waits for an event waits no longer than `wait_s`, and tries again.  A
reason is logged when it is a new one, not at each try.  Keeps P10.
"""

from __future__ import annotations

import logging
import math


class Retries:
    """How long to wait before the next try of one thing, and what was said of it."""

    def __init__(self, log: logging.Logger, first_s: float, most_s: float) -> None:
        """The first wait is `first_s` long, the next one twice that, none above `most_s`."""
        self._log = log
        self._first_s = first_s
        self._most_s = most_s
        self._said = ""
        self.wait_s = math.inf
        """Until the next try; infinite where there is nothing to try again."""

    def later(self) -> None:
        """Note that it did not come to anything."""
        longer_s = self._first_s if self.wait_s == math.inf else 2 * self.wait_s
        self.wait_s = min(longer_s, self._most_s)

    def refused(self, error: Exception) -> None:
        """Note that it was refused, and why."""
        self.later()
        reason = str(error)
        if reason != self._said:
            self._log.warning("%s", reason)
            self._said = reason

    def succeeded(self) -> None:
        """Note that it was done; the next refusal is a new one."""
        self.wait_s = math.inf
        self._said = ""
