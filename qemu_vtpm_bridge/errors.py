"""The errors that cross a room's border.

Bytes from a peer cause a reply, one of these, or nothing (promise P10: what a
person reads says cause, state and next step).  Every error carries those three
sentences apart, so that the log, the status document and the command line can
each print what they need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class BridgeError(Exception):
    """Base of everything this package raises on purpose.

    `cause` says what happened, `state` what the program was doing or what is
    true now, `next_step` what the reader can do.  The last two may be empty
    where the caller that catches the error adds them.
    """

    def __init__(self, cause: str, *, state: str = "", next_step: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.state = state
        self.next_step = next_step

    def __str__(self) -> str:
        parts = [self.cause]
        if self.state:
            parts.append(f"state: {self.state}")
        if self.next_step:
            parts.append(f"next: {self.next_step}")
        return "; ".join(parts)


class LocalProtocolError(BridgeError):
    """This program used one of its own machines in a way the table does not allow."""


class QemuProtocolError(BridgeError):
    """QEMU, or what calls itself QEMU, broke the control or data protocol."""


class BackendProtocolError(BridgeError):
    """The vTPM domain broke tpmif or the XenBus ritual."""


class XenError(BridgeError):
    """XenStore, a grant or an event channel could not do what was asked."""


class ResetRefused(BridgeError):
    """The vTPM gave no evidence of a power cycle, and the policy fails closed."""


class ConfigError(BridgeError):
    """An option, a configuration file or a toolstack entry cannot be used as it is."""


def first_of(error: BaseException) -> BaseException:
    """Return the error itself, or the most telling one inside a group: what a person wants.

    A mistake of this program's goes before what is raised on purpose, and that before the end
    of a task that was cancelled; among equals the first one counts.
    """
    if isinstance(error, BaseExceptionGroup):
        return min(map(first_of, error.exceptions), key=_rank)
    return error


def _rank(error: BaseException) -> int:
    if isinstance(error, BridgeError):
        return 1
    return 0 if isinstance(error, Exception | KeyboardInterrupt | SystemExit) else 2


@contextmanager
def ungrouped() -> Iterator[None]:
    """Have what a nursery in the block raises come out as one plain error.

    A nursery raises groups, which pass those by who catch an error by its class.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        raise first_of(group) from None
