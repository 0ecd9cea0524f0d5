"""The service manager that started this program: what it is told, and when it hears nothing.

Theory of operation.  The manager gives a datagram socket (NOTIFY_SOCKET) and, where a
watchdog was asked for, a time (WATCHDOG_USEC) within which it wants to hear WATCHDOG=1
again; a program that stays silent is killed and started anew.  The socket is connected
before privileges are given up, and the variables are taken out of the environment, so that
swtpm cannot speak for us.

What counts as alive: trio's loop turns, because the feeding is a task in it; no main task
has failed, because that would have ended the program; and the pump has come to its bell
since the last feeding, or stands still for a change that has not taken too long
(`Carrier.alive`).  A vTPM domain, a guest or a swtpm that does not answer does not count:
waiting for those in bounded time is what the program is for.

Source: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

log = logging.getLogger(__name__)

FEEDINGS_PER_PERIOD: Final = 4
"""Looks at the pump in the watchdog's time: three may come late."""


class Supervisor:
    """The manager, or nobody where there is none.  Made by `from_environment`."""

    def __init__(self, out: socket.socket | None = None, watchdog_s: float | None = None) -> None:
        self._out = out
        self.watchdog_s = watchdog_s
        """The watchdog's time, or None where nobody watches."""

    @classmethod
    def from_environment(cls) -> Supervisor:
        """Return the manager that the environment names, and take it out of there."""
        place = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_s = _watchdog_s(
            os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        )
        if not place:
            return cls()
        out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            out.connect("\0" + place[1:] if place.startswith("@") else place)
        except OSError as error:
            out.close()
            log.warning("the service manager cannot be told anything: %s", error)
            return cls()
        return cls(out, watchdog_s)

    def tell(self, state: str) -> None:
        """Say something, as READY=1.  A manager that does not listen is no error."""
        if self._out is not None:
            with suppress(OSError):
                self._out.send(state.encode(), socket.MSG_DONTWAIT)

    async def feed_watchdog(self, alive: Callable[[], bool]) -> None:
        """Say WATCHDOG=1 again and again while `alive` says so; return where nobody watches."""
        if self._out is None or self.watchdog_s is None:
            return
        said = False
        while True:
            if alive():
                self.tell("WATCHDOG=1")
            elif not said:
                said = True
                log.critical("the pump does not turn: the watchdog is not fed")
            await trio.sleep(self.watchdog_s / FEEDINGS_PER_PERIOD)

    def close(self) -> None:
        """Forget the manager.  Safe to call twice."""
        if self._out is not None:
            self._out.close()
            self._out = None


def _watchdog_s(raw_usec: str, raw_pid: str) -> float | None:
    """Return the watchdog's time in seconds, where it is this process that is watched."""
    if not raw_usec.isdecimal() or int(raw_usec) == 0:
        return None
    if raw_pid and raw_pid != str(os.getpid()):
        return None
    return int(raw_usec) / 1e6


async def stop_on_signals(stop: Callable[[], None], supervisor: Supervisor | None = None) -> None:
    """Call `stop` at the first SIGTERM or SIGINT, and let a second one end the program."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s: closing", signal.Signals(number).name)
            if supervisor is not None:
                supervisor.tell("STOPPING=1")
            stop()
            break
