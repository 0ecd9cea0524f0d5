"""The errors that cross a room's border.

Bytes from a peer cause a reply, one of these, or nothing (promise P10: what a
person reads says cause, state and next step).  Every error carries those three
sentences apart, so that the log, the status document and the command line can
each print what they need.
"""

from __future__ import annotations


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
    """Return the error itself, or the first one inside a group of them: what a person wants."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
