"""Who may touch the pump, and when: the one thread that carries commands, and its breaks.

Theory of operation.  The pump runs in a thread of its own; its ring, its data
socket and its mode may change only while it stands still.  `Carrier.run` keeps
it running; whoever wants a change enters `paused`, which has it stop (after the
command in flight, or at once with a failure for it) and starts it again on the
way out.  The lock is fair, so a change waits for one stop at most.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from .ring import FrontendPump, PumpExit


class Carrier:
    """Runs a pump, and stops it for those who change it."""

    def __init__(self, pump: FrontendPump, on_exit: Callable[[PumpExit], Awaitable[None]]) -> None:
        self.pump = pump
        self._on_exit = on_exit
        self._lock = trio.Lock()
        self._waiting = 0
        self._resume = trio.Event()

    async def run(self) -> None:
        """Carry commands until cancelled; cancelling fails the one in flight."""
        while True:
            while self._waiting:
                self._resume = trio.Event()
                await self._resume.wait()
            async with self._lock:
                if self._waiting:
                    continue
                reason = await self.pump.run()
            if not reason.expected:
                await self._on_exit(reason)

    @asynccontextmanager
    async def paused(self, *, drain: bool = True) -> AsyncIterator[FrontendPump]:
        """Give the pump, standing still.

        With `drain` the command in flight is finished first, within its own
        deadline; without, QEMU gets a failure for it at once.  Cancelling while
        waiting leaves the pump running.
        """
        self._waiting += 1
        try:
            self.pump.request_stop(drain=drain)
            async with self._lock:
                yield self.pump
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._resume.set()
