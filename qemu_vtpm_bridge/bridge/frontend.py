"""The XenBus frontend's machine: negotiate, connect, drain, reconnect, close.

No input or output happens here; `frontend_driver.py` reads XenStore, turns what
it finds into facts and carries the actions out.

Theory of operation.  A frontend that published its page to tpmback must pass
Closed, and see the backend answer with InitWait, before it may publish another:
the backend ignores a second page and keeps the first.  So every road back to
work leads through `RESETTING`, in which Closed is written and InitWait is
awaited; whether the last life ended by a crash, a poisoned page, a reset or a
backend that failed makes no difference.  Before Closed is written on a page
that a living backend may still write to, the machine drains (P6): a backend
that finds its page unmapped under a running command may crash, and with it
every guest it serves.

Keeps P5 (a page is replaced, never reused, after a deadline), P6 and P8.  Who
may lie: the backend may show any state at any time, in any order, and skip
states; each pair of state and fact is in the table, and what the backend shows
is a fact, never an order.

Source: Mini-OS tpmback.c (tpmback's reactions), xen/include/public/io/tpmif.h,
Linux drivers/char/tpm/xen-tpmfront.c.
"""

from __future__ import annotations

import enum

from ..errors import LocalProtocolError
from ..xen.xenbus import XenbusState


class State(enum.Enum):
    """Where the ritual stands."""

    WAIT_ENTRIES = enum.auto()
    """The toolstack's entries are not there yet, or do not fit together."""
    GRACE = enum.auto()
    """A dead bridge left a page that the backend may be writing an answer to."""
    RESETTING = enum.auto()
    """Closed is written; the backend has not yet shown that it let go of the page."""
    WAIT_BACKEND = enum.auto()
    """The vTPM domain has not reached InitWait; it may boot later."""
    PUBLISHING = enum.auto()
    """A page and a port are being made and written to XenStore."""
    WAIT_CONNECTED = enum.auto()
    """Initialised is written; the backend has not mapped the page yet."""
    RUNNING = enum.auto()
    """Both ends are Connected: commands flow."""
    LEAVING = enum.auto()
    """The backend closes by itself; its last state is awaited."""
    DRAINING = enum.auto()
    """The page is to be replaced; the request on it has not been answered yet."""
    CLOSE_DRAINING = enum.auto()
    """As DRAINING, but this end stops afterwards."""
    CLOSE_WAIT = enum.auto()
    """Closed is written for good; the backend has not let go of the page yet."""
    CLOSED = enum.auto()
    """The end: nothing is published, nothing is held."""


class Fact(enum.Enum):
    """What happened, as the driver saw it."""

    ENTRIES_CLEAN = enum.auto()
    """The entries are there, and nobody has used them or everybody left them."""
    ENTRIES_STALE = enum.auto()
    """The entries show the traces of an earlier life; Closed may be written at once."""
    ENTRIES_STALE_UNSAFE = enum.auto()
    """As stale, but the backend may not survive a Closed during a command."""
    ENTRIES_REMOVED = enum.auto()
    """The toolstack removed the frontend directory."""
    BACKEND_GONE = enum.auto()
    BACKEND_INIT_WAIT = enum.auto()
    BACKEND_CONNECTED = enum.auto()
    BACKEND_CLOSING = enum.auto()
    BACKEND_CLOSED = enum.auto()
    BACKEND_OTHER = enum.auto()
    """Any other state, nonsense included."""
    PUBLISHED = enum.auto()
    PUBLISH_FAILED = enum.auto()
    DRAINED = enum.auto()
    """No request is outstanding on the page."""
    REPLACE_ASKED = enum.auto()
    """The page broke its protocol or passed a deadline, or a reset is wanted."""
    CLOSE_ASKED = enum.auto()
    DEADLINE = enum.auto()
    """The deadline that an ARM_... action set has passed."""


class Action(enum.Enum):
    """What the driver is to do, in the order given."""

    WRITE_INITIALISING = enum.auto()
    WRITE_INITIALISED = enum.auto()
    WRITE_CONNECTED = enum.auto()
    WRITE_CLOSING = enum.auto()
    WRITE_CLOSED = enum.auto()
    REMOVE_RING_KEYS = enum.auto()
    """Remove ring-ref and event-channel, which name a page that is no more."""
    PUBLISH = enum.auto()
    RING_UP = enum.auto()
    """Give the page to the pump."""
    RING_DOWN = enum.auto()
    """Take it away; a command in flight is answered with an error now (P1)."""
    AWAIT_DRAINED = enum.auto()
    RELEASE = enum.auto()
    """Close the port and end the grant."""
    BACK_OFF = enum.auto()
    """Wait before the next attempt, longer each time."""
    REPORT_STUCK = enum.auto()
    ARM_GRACE = enum.auto()
    ARM_RESET = enum.auto()
    ARM_CONNECT = enum.auto()
    ARM_DRAIN = enum.auto()
    ARM_CLOSE = enum.auto()


BACKEND_FACTS = {
    None: Fact.BACKEND_GONE,
    XenbusState.INIT_WAIT: Fact.BACKEND_INIT_WAIT,
    XenbusState.CONNECTED: Fact.BACKEND_CONNECTED,
    XenbusState.CLOSING: Fact.BACKEND_CLOSING,
    XenbusState.CLOSED: Fact.BACKEND_CLOSED,
}


def backend_fact(state: XenbusState | None) -> Fact:
    """Return the fact that a backend's state amounts to; None is a missing node."""
    return BACKEND_FACTS.get(state, Fact.BACKEND_OTHER)


Transition = tuple[State, tuple[Action, ...]]

_RESET = (Action.WRITE_CLOSED, Action.ARM_RESET)
_RETRY = (Action.WRITE_CLOSED, Action.BACK_OFF, Action.ARM_RESET)
_AFRESH = (Action.RELEASE, Action.REMOVE_RING_KEYS, Action.WRITE_INITIALISING)
_CLOSE = (Action.WRITE_CLOSING, Action.WRITE_CLOSED, Action.ARM_CLOSE)
_END = (Action.RELEASE, Action.REMOVE_RING_KEYS, Action.WRITE_INITIALISING)

TRANSITIONS: dict[tuple[State, Fact], Transition] = {
    (State.WAIT_ENTRIES, Fact.ENTRIES_CLEAN): (State.WAIT_BACKEND, _AFRESH),
    (State.WAIT_ENTRIES, Fact.ENTRIES_STALE): (State.RESETTING, _RESET),
    (State.WAIT_ENTRIES, Fact.ENTRIES_STALE_UNSAFE): (State.GRACE, (Action.ARM_GRACE,)),
    (State.WAIT_ENTRIES, Fact.CLOSE_ASKED): (State.CLOSED, ()),
    # The page of a dead bridge cannot be seen, so only time tells that its command ended.
    (State.GRACE, Fact.DEADLINE): (State.RESETTING, _RESET),
    (State.GRACE, Fact.BACKEND_GONE): (State.WAIT_BACKEND, _AFRESH),
    (State.GRACE, Fact.BACKEND_INIT_WAIT): (State.RESETTING, _RESET),
    (State.GRACE, Fact.CLOSE_ASKED): (State.CLOSED, ()),
    (State.RESETTING, Fact.BACKEND_INIT_WAIT): (State.WAIT_BACKEND, _AFRESH),
    (State.RESETTING, Fact.BACKEND_GONE): (State.WAIT_BACKEND, _AFRESH),
    (State.RESETTING, Fact.DEADLINE): (State.RESETTING, (Action.REPORT_STUCK, *_RESET)),
    (State.RESETTING, Fact.CLOSE_ASKED): (State.CLOSE_WAIT, (Action.ARM_CLOSE,)),
    (State.WAIT_BACKEND, Fact.BACKEND_INIT_WAIT): (State.PUBLISHING, (Action.PUBLISH,)),
    # A backend that is already past InitWait is living in an earlier life of this device.
    (State.WAIT_BACKEND, Fact.BACKEND_CONNECTED): (State.RESETTING, _RESET),
    (State.WAIT_BACKEND, Fact.BACKEND_CLOSING): (State.RESETTING, _RESET),
    (State.WAIT_BACKEND, Fact.BACKEND_CLOSED): (State.RESETTING, _RESET),
    (State.WAIT_BACKEND, Fact.CLOSE_ASKED): (State.CLOSED, ()),
    (State.PUBLISHING, Fact.PUBLISHED): (
        State.WAIT_CONNECTED,
        (Action.WRITE_INITIALISED, Action.ARM_CONNECT),
    ),
    (State.PUBLISHING, Fact.PUBLISH_FAILED): (State.RESETTING, _RETRY),
    (State.WAIT_CONNECTED, Fact.BACKEND_CONNECTED): (
        State.RUNNING,
        (Action.WRITE_CONNECTED, Action.RING_UP),
    ),
    (State.WAIT_CONNECTED, Fact.BACKEND_CLOSING): (State.RESETTING, _RETRY),
    (State.WAIT_CONNECTED, Fact.BACKEND_CLOSED): (State.RESETTING, _RETRY),
    (State.WAIT_CONNECTED, Fact.BACKEND_GONE): (State.WAIT_BACKEND, _AFRESH),
    (State.WAIT_CONNECTED, Fact.DEADLINE): (State.RESETTING, (Action.REPORT_STUCK, *_RETRY)),
    (State.WAIT_CONNECTED, Fact.CLOSE_ASKED): (State.CLOSE_WAIT, _CLOSE),
    (State.RUNNING, Fact.BACKEND_INIT_WAIT): (State.RESETTING, (Action.RING_DOWN, *_RETRY)),
    (State.RUNNING, Fact.BACKEND_GONE): (State.WAIT_BACKEND, (Action.RING_DOWN, *_AFRESH)),
    (State.RUNNING, Fact.BACKEND_CLOSING): (State.LEAVING, (Action.RING_DOWN, Action.ARM_RESET)),
    (State.RUNNING, Fact.BACKEND_CLOSED): (State.RESETTING, (Action.RING_DOWN, *_RETRY)),
    # A directory made anew under a living backend, or nonsense: the page may be in use.
    (State.RUNNING, Fact.BACKEND_OTHER): (
        State.DRAINING,
        (Action.RING_DOWN, Action.AWAIT_DRAINED, Action.ARM_DRAIN),
    ),
    (State.RUNNING, Fact.REPLACE_ASKED): (
        State.DRAINING,
        (Action.RING_DOWN, Action.AWAIT_DRAINED, Action.ARM_DRAIN),
    ),
    (State.RUNNING, Fact.CLOSE_ASKED): (
        State.CLOSE_DRAINING,
        (Action.RING_DOWN, Action.AWAIT_DRAINED, Action.ARM_DRAIN),
    ),
    (State.LEAVING, Fact.BACKEND_CLOSED): (State.RESETTING, _RESET),
    (State.LEAVING, Fact.BACKEND_INIT_WAIT): (State.RESETTING, _RESET),
    (State.LEAVING, Fact.BACKEND_GONE): (State.WAIT_BACKEND, _AFRESH),
    (State.LEAVING, Fact.DEADLINE): (
        State.DRAINING,
        (Action.REPORT_STUCK, Action.AWAIT_DRAINED, Action.ARM_DRAIN),
    ),
    (State.LEAVING, Fact.CLOSE_ASKED): (
        State.CLOSE_DRAINING,
        (Action.AWAIT_DRAINED, Action.ARM_DRAIN),
    ),
    (State.DRAINING, Fact.DRAINED): (State.RESETTING, (Action.WRITE_CLOSING, *_RESET)),
    (State.DRAINING, Fact.BACKEND_INIT_WAIT): (State.RESETTING, _RESET),
    (State.DRAINING, Fact.BACKEND_CLOSED): (State.RESETTING, _RESET),
    (State.DRAINING, Fact.BACKEND_GONE): (State.WAIT_BACKEND, _AFRESH),
    (State.DRAINING, Fact.DEADLINE): (State.DRAINING, (Action.REPORT_STUCK, Action.ARM_DRAIN)),
    (State.DRAINING, Fact.CLOSE_ASKED): (State.CLOSE_DRAINING, (Action.ARM_DRAIN,)),
    (State.CLOSE_DRAINING, Fact.DRAINED): (State.CLOSE_WAIT, _CLOSE),
    (State.CLOSE_DRAINING, Fact.BACKEND_INIT_WAIT): (State.CLOSED, _END),
    (State.CLOSE_DRAINING, Fact.BACKEND_CLOSED): (State.CLOSED, _END),
    (State.CLOSE_DRAINING, Fact.BACKEND_GONE): (State.CLOSED, _END),
    # The state stays at Connected: the next start finds it stale and resets, which is
    # safer for the vTPM domain than Closed with its answer still to come.
    (State.CLOSE_DRAINING, Fact.DEADLINE): (State.CLOSED, (Action.REPORT_STUCK, Action.RELEASE)),
    (State.CLOSE_WAIT, Fact.BACKEND_INIT_WAIT): (State.CLOSED, _END),
    (State.CLOSE_WAIT, Fact.BACKEND_CLOSED): (State.CLOSED, _END),
    (State.CLOSE_WAIT, Fact.BACKEND_GONE): (State.CLOSED, _END),
    (State.CLOSE_WAIT, Fact.DEADLINE): (State.CLOSED, (Action.REPORT_STUCK, Action.RELEASE)),
}
"""(state, fact) -> (next state, actions)."""

for _state in State:
    if _state in (State.CLOSE_DRAINING, State.CLOSE_WAIT):
        TRANSITIONS[_state, Fact.ENTRIES_REMOVED] = (State.CLOSED, (Action.RELEASE,))
    elif _state is State.RUNNING:
        TRANSITIONS[_state, Fact.ENTRIES_REMOVED] = (
            State.WAIT_ENTRIES,
            (Action.RING_DOWN, Action.RELEASE),
        )
    elif _state not in (State.WAIT_ENTRIES, State.CLOSED):
        TRANSITIONS[_state, Fact.ENTRIES_REMOVED] = (State.WAIT_ENTRIES, (Action.RELEASE,))

_LATE = frozenset({Fact.REPLACE_ASKED, Fact.DRAINED})
"""What may still arrive from a life of the page that has ended meanwhile."""
_BACKEND = frozenset({*BACKEND_FACTS.values(), Fact.BACKEND_OTHER})

IGNORED: dict[State, frozenset[Fact]] = {
    State.WAIT_ENTRIES: _BACKEND | _LATE | {Fact.ENTRIES_REMOVED},
    State.GRACE: _BACKEND | _LATE,
    State.RESETTING: _BACKEND | _LATE,
    State.WAIT_BACKEND: _BACKEND | _LATE,
    State.PUBLISHING: frozenset(),
    State.WAIT_CONNECTED: _BACKEND | _LATE,
    State.RUNNING: frozenset({Fact.BACKEND_CONNECTED, Fact.DRAINED}),
    State.LEAVING: _BACKEND | _LATE,
    State.DRAINING: _BACKEND | _LATE,
    State.CLOSE_DRAINING: _BACKEND | _LATE | {Fact.CLOSE_ASKED},
    State.CLOSE_WAIT: _BACKEND | _LATE | {Fact.CLOSE_ASKED},
    State.CLOSED: _BACKEND | _LATE | {Fact.CLOSE_ASKED, Fact.ENTRIES_REMOVED},
}
"""Facts that change nothing in a state.  A pair in neither table is a defect of the driver."""


class FrontendMachine:
    """One device's frontend.  Not safe for use from several tasks at once."""

    def __init__(self) -> None:
        self.state = State.WAIT_ENTRIES

    def feed(self, fact: Fact) -> tuple[Action, ...]:
        """Take a fact in, return the actions it calls for.

        Raises LocalProtocolError, and changes nothing, for a fact that cannot
        happen in the present state.
        """
        transition = TRANSITIONS.get((self.state, fact))
        if transition is None:
            if fact in IGNORED[self.state]:
                return ()
            raise LocalProtocolError(
                f"the frontend has no use for {fact.name} in {self.state.name}",
                next_step="this is a defect of the bridge; please report it",
            )
        self.state, actions = transition
        return actions
