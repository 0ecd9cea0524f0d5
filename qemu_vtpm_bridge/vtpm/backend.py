"""The backend's side of the XenBus ritual, for one frontend.

Purpose: behave towards every frontend as Mini-OS' tpmback does, since that is what
frontends were written for: Linux' goes 3, then 4; Mini-OS' jumps from 1 to 4; after
Closed a backend shows InitWait, and takes the next connection.

Theory of operation.  `BackendMachine` is fed with what the frontend's state node says
and with what became of a connection; it answers with what to do.  States, facts and
actions are one table.  Nothing here does input or output.

Keeps P8 and P9.  Who may lie: the frontend, at any time and in any order; every fact
has an entry in every state.

Source: Mini-OS' tpmback.c, as observed; Xen's public header io/xenbus.h.
"""

from __future__ import annotations

import enum
from typing import Final

from ..errors import LocalProtocolError
from ..xen.xenbus import XenbusState


class State(enum.Enum):
    """What the backend has made of one frontend."""

    INIT_WAIT = enum.auto()
    """Ready for a connection; XenbusState 2."""
    CONNECTING = enum.auto()
    """Mapping the page and binding the port."""
    CONNECTED = enum.auto()
    """Serving; XenbusState 4."""
    CLOSING = enum.auto()
    """The frontend announced its end, and is served until it comes; XenbusState 5."""
    FAILED = enum.auto()
    """The connection could not be made, or broke; XenbusState 6."""
    GONE = enum.auto()
    """The frontend's entries are gone, and so are the backend's."""


class Fact(enum.Enum):
    """What happened."""

    FRONTEND_QUIET = enum.auto()
    """It is in a state that asks for nothing."""
    FRONTEND_READY = enum.auto()
    """Initialised or Connected: it has published a page and a port."""
    FRONTEND_CLOSING = enum.auto()
    FRONTEND_CLOSED = enum.auto()
    FRONTEND_GONE = enum.auto()
    """Its state node is missing or cannot be read."""
    CONNECT_DONE = enum.auto()
    CONNECT_FAILED = enum.auto()
    CONNECT_INTERRUPTED = enum.auto()
    """XenStore went away meanwhile: with its next connection it is tried again."""
    CHANNEL_BROKE = enum.auto()
    ENTRIES_REMOVED = enum.auto()
    """The backend's own entries are gone; others may be in their place."""


class Action(enum.Enum):
    """What the driver is to do."""

    CONNECT = enum.auto()
    """Map and bind, then say CONNECT_DONE or CONNECT_FAILED."""
    DISCONNECT = enum.auto()
    """Serve this page no more and unmap it."""
    RESET_IF_ASKED = enum.auto()
    """Power-cycle the TPM where the frontend asked for it and may."""
    WRITE_INIT_WAIT = enum.auto()
    WRITE_CONNECTED = enum.auto()
    WRITE_CLOSING = enum.auto()
    WRITE_CLOSED = enum.auto()
    REMOVE_ENTRIES = enum.auto()


SHOWN_AS: Final = {
    State.INIT_WAIT: XenbusState.INIT_WAIT,
    State.CONNECTED: XenbusState.CONNECTED,
    State.CLOSING: XenbusState.CLOSING,
    State.FAILED: XenbusState.CLOSED,
}
"""What the frontend sees of a state that lasts."""


def frontend_fact(state: XenbusState | None) -> Fact:
    """Return what a frontend's state, as read, means to a backend."""
    match state:
        case None:
            return Fact.FRONTEND_GONE
        case XenbusState.INITIALISED | XenbusState.CONNECTED:
            return Fact.FRONTEND_READY
        case XenbusState.CLOSING:
            return Fact.FRONTEND_CLOSING
        case XenbusState.CLOSED:
            return Fact.FRONTEND_CLOSED
        case _:
            return Fact.FRONTEND_QUIET


Transition = tuple[State, tuple[Action, ...]]

_REOPEN: Final = (Action.RESET_IF_ASKED, Action.WRITE_INIT_WAIT)
_RELEASE: Final = (Action.DISCONNECT, *_REOPEN)
_REMOVE: Final = (Action.WRITE_CLOSED, Action.REMOVE_ENTRIES)
_BREAK: Final = (Action.DISCONNECT, Action.WRITE_CLOSED)

TRANSITIONS: Final[dict[tuple[State, Fact], Transition]] = {
    (State.INIT_WAIT, Fact.FRONTEND_QUIET): (State.INIT_WAIT, ()),
    (State.INIT_WAIT, Fact.FRONTEND_READY): (State.CONNECTING, (Action.CONNECT,)),
    (State.INIT_WAIT, Fact.FRONTEND_CLOSING): (State.INIT_WAIT, ()),
    (State.INIT_WAIT, Fact.FRONTEND_CLOSED): (State.INIT_WAIT, _REOPEN),
    (State.INIT_WAIT, Fact.FRONTEND_GONE): (State.GONE, _REMOVE),
    (State.CONNECTING, Fact.CONNECT_DONE): (State.CONNECTED, (Action.WRITE_CONNECTED,)),
    (State.CONNECTING, Fact.CONNECT_FAILED): (State.FAILED, (Action.WRITE_CLOSED,)),
    (State.CONNECTING, Fact.CONNECT_INTERRUPTED): (State.INIT_WAIT, ()),
    (State.CONNECTED, Fact.FRONTEND_QUIET): (State.CONNECTED, ()),
    # It keeps the page it has: a frontend that wants another passes Closed.
    (State.CONNECTED, Fact.FRONTEND_READY): (State.CONNECTED, ()),
    (State.CONNECTED, Fact.FRONTEND_CLOSING): (State.CLOSING, (Action.WRITE_CLOSING,)),
    (State.CONNECTED, Fact.FRONTEND_CLOSED): (State.INIT_WAIT, _RELEASE),
    (State.CONNECTED, Fact.FRONTEND_GONE): (State.GONE, (Action.DISCONNECT, *_REMOVE)),
    (State.CONNECTED, Fact.CHANNEL_BROKE): (State.FAILED, _BREAK),
    (State.CLOSING, Fact.FRONTEND_QUIET): (State.CLOSING, ()),
    (State.CLOSING, Fact.FRONTEND_READY): (State.CONNECTED, (Action.WRITE_CONNECTED,)),
    (State.CLOSING, Fact.FRONTEND_CLOSING): (State.CLOSING, ()),
    (State.CLOSING, Fact.FRONTEND_CLOSED): (State.INIT_WAIT, _RELEASE),
    (State.CLOSING, Fact.FRONTEND_GONE): (State.GONE, (Action.DISCONNECT, *_REMOVE)),
    (State.CLOSING, Fact.CHANNEL_BROKE): (State.FAILED, _BREAK),
    (State.FAILED, Fact.FRONTEND_QUIET): (State.FAILED, ()),
    (State.FAILED, Fact.FRONTEND_READY): (State.CONNECTING, (Action.CONNECT,)),
    (State.FAILED, Fact.FRONTEND_CLOSING): (State.FAILED, ()),
    (State.FAILED, Fact.FRONTEND_CLOSED): (State.INIT_WAIT, _REOPEN),
    (State.FAILED, Fact.FRONTEND_GONE): (State.GONE, _REMOVE),
    # A channel that broke is told of once more if the frontend was quicker.
    (State.INIT_WAIT, Fact.CHANNEL_BROKE): (State.INIT_WAIT, ()),
    (State.FAILED, Fact.CHANNEL_BROKE): (State.FAILED, ()),
}
for _state in State:
    if _state is not State.CONNECTING:
        _held = _state in (State.CONNECTED, State.CLOSING)
        TRANSITIONS[_state, Fact.ENTRIES_REMOVED] = (
            State.GONE,
            (Action.DISCONNECT,) if _held else (),
        )
for _fact in Fact:
    TRANSITIONS.setdefault((State.GONE, _fact), (State.GONE, ()))


class BackendMachine:
    """One frontend's machine."""

    def __init__(self) -> None:
        self.state = State.INIT_WAIT

    def feed(self, fact: Fact) -> tuple[Action, ...]:
        """Take a fact and return what to do, in order.

        Raises LocalProtocolError, changing nothing, for a fact that cannot be in this
        state; those that a frontend brings about always can.
        """
        try:
            self.state, actions = TRANSITIONS[self.state, fact]
        except KeyError:
            raise LocalProtocolError(f"{fact.name} in state {self.state.name}") from None
        return actions
