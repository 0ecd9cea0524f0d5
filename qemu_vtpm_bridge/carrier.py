"""Who may touch the pump, and when: the one thread that carries commands, and its breaks.

Used at both ends.  Theory of operation: the pump runs in a thread of its own; its ring, its data
socket and its mode may change only while it stands still.  `Carrier.run` keeps
it running; whoever wants a change enters `paused`, which has it stop (after the
command in flight, or at once with a failure for it) and starts it again on the
way out.  The lock is fair, so a change waits for one stop at most.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, Generic, Protocol, TypeVar

import trio


class Exit(Protocol):
    """Why a pump returned."""

    @property
    def expected(self) -> bool:
        """Whether somebody asked for it."""


class Pump(Protocol):
    """What both pumps have."""

    async def run(self) -> Any:
        """Carry commands; return an `Exit`."""

    def request_stop(self, *, drain: bool) -> None:
        """Have `run` return."""

    def reset_stop(self) -> None:
        """Take that back."""

    def ping(self) -> int:
        """Wake it, and return how often it has come to its bell."""


STILL_MAX_S: Final = 300.0
"""Standing still for longer than this is no change but a lock that nobody gives back.  The
longest change is a power cycle whose every step takes swtpm until its deadline."""

P = TypeVar("P", bound=Pump)
E = TypeVar("E", bound=Exit)


class Carrier(Generic[P, E]):
    """Runs a pump, and stops it for those who change it.

    `on_exit` sees to a pump that stopped by itself; nothing is carried until it returns.
    """

    def __init__(self, pump: P, on_exit: Callable[[E], Awaitable[None]]) -> None:
        self.pump = pump
        self._on_exit = on_exit
        self._lock = trio.Lock()
        self._waiting = 0
        self._urgent = 0
        self._resume = trio.Event()
        self._still_since: float | None = math.inf  # it has not run yet
        self._pings: int | None = None

    async def run(self) -> None:
        """Carry commands until cancelled; cancelling fails the one in flight."""
        while True:
            while self._waiting:
                self._resume = trio.Event()
                await self._resume.wait()
            async with self._lock:
                if self._waiting:
                    continue
                self.pump.reset_stop()
                self._pings = self._still_since = None
                try:
                    reason = await self.pump.run()
                finally:
                    self._still_since = trio.current_time()
            if not reason.expected:
                await self._on_exit(reason)

    def alive(self) -> bool:
        """Return whether the pump has turned since the last call, or rightly stands still.

        For a watchdog: call it rarely, and the pump has all the time between two calls.
        """
        if self._still_since is not None:
            return trio.current_time() - self._still_since < STILL_MAX_S
        before, self._pings = self._pings, self.pump.ping()
        return before != self._pings

    @asynccontextmanager
    async def paused(self, *, drain: bool = True) -> AsyncIterator[P]:
        """Give the pump, standing still.

        With `drain` the command in flight is finished first, within its own
        deadline; without, QEMU gets a failure for it at once.  Cancelling while
        waiting leaves the pump running.
        """
        self._waiting += 1
        self._urgent += not drain
        try:
            self.pump.request_stop(drain=drain)
            try:
                await self._lock.acquire()
            finally:
                self._urgent -= not drain
            try:
                # Only what others still ask for may cut short what is done now.
                self.pump.reset_stop()
                if self._urgent:
                    self.pump.request_stop(drain=False)
                yield self.pump
            finally:
                self._lock.release()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._resume.set()
