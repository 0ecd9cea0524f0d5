"""The registry of checks, and what a check may use.

A check gets a place: `StorePlace`, where it finds XenStore as domain 0 and as guests, or
`XenPlace`, two sides.  It calls `expect`, and the first thing that is otherwise ends it
with `Mismatch`.  What a place cannot give (a guest's connection, a domain's death) a check
names as its needs, and it is then not run, which the report says.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from .client import StoreClient
from .sides import Side

TOP: Final = "/conformance"
"""Where checks write as domain 0; it is removed before and after each."""


class Group(enum.Enum):
    """What a check is about."""

    STORE = "store"
    GRANTS = "grants"
    EVENTS = "events"


class Need(enum.Enum):
    """What not every place can give."""

    PEERS = "two domains beside domain 0 that live"
    GUESTS = "connections to XenStore as two guests"
    LIFE = "domains that can be created and destroyed"
    DOORS = "domains with the id of one that is gone, and connections to XenStore as these"
    RESTART = "a XenStore that can be killed and started again"


class Mismatch(Exception):
    """Xen's answer is not the expected one."""

    def __init__(self, what: str, found: object, wanted: object) -> None:
        super().__init__(f"{what}: {found!r}, not {wanted!r}")
        self.what = what
        self.found = found


def expect(what: str, found: object, wanted: object) -> None:
    """Raise Mismatch where what was found is not what was wanted."""
    if found != wanted:
        raise Mismatch(what, found, wanted)


class Life(Protocol):
    """Creates and destroys domains; both return when XenStore knows."""

    def create(self) -> int:
        """Create a domain and return its id."""

    def destroy(self, domid: int) -> None:
        """Destroy a domain.  Its toolstack entries go as well."""

    def again(self, domid: int) -> None:
        """Create a domain that has the id of one that is gone."""


@dataclass
class StorePlace:
    """XenStore, as the checks of its group see it."""

    socket: str
    guest_sockets: dict[int, str] = field(default_factory=dict)
    peers: list[int] = field(default_factory=list)
    life: Life | None = None
    kill: Callable[[], None] | None = None
    """Kills XenStore at once, as by SIGKILL, and starts it again."""
    open_guest: Callable[[int], str] | None = None
    """Returns the socket of a domain that was created by `life`."""
    guests_in_order: bool = True
    """Whether guests find events before the answers that came after them."""
    stack: ExitStack = field(default_factory=ExitStack)

    def gives(self) -> set[Need]:
        """Return which needs this place fulfils."""
        return {
            need
            for need, there in (
                (Need.PEERS, len(self.peers) >= 2),
                (Need.GUESTS, len(self.guest_sockets) >= 2),
                (Need.LIFE, self.life is not None),
                (Need.DOORS, self.life is not None and self.open_guest is not None),
                (Need.RESTART, self.kill is not None),
            )
            if there
        }

    def client(self, socket: str | None = None) -> StoreClient:
        """Return a new connection, by default domain 0's; it is closed after the check."""
        return self.stack.enter_context(StoreClient(socket or self.socket))

    def guest(self, number: int = 0) -> tuple[int, StoreClient]:
        """Return a guest's id and a connection that acts as it."""
        domid = sorted(self.guest_sockets)[number]
        client = StoreClient(self.guest_sockets[domid], in_order=self.guests_in_order)
        return domid, self.stack.enter_context(client)


@dataclass
class XenPlace:
    """Two sides, and which domains they are."""

    one: Side
    other: Side
    one_domid: int
    other_domid: int
    stack: ExitStack = field(default_factory=ExitStack)

    def gives(self) -> set[Need]:
        """Return which needs this place fulfils."""
        return set()


Place = StorePlace | XenPlace


@dataclass(frozen=True)
class Check:
    """One check: its name is its function's, its text the docstring."""

    group: Group
    function: Callable[[Any], None]
    needs: frozenset[Need]

    @property
    def name(self) -> str:
        """What it is called, everywhere."""
        return self.function.__name__

    @property
    def text(self) -> str:
        """What Xen does, in a sentence."""
        return (self.function.__doc__ or "").strip().splitlines()[0]


CHECKS: Final[dict[str, Check]] = {}


def check(group: Group, *needs: Need) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a check."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        made = Check(group, function, frozenset(needs))
        if made.name in CHECKS or not function.__doc__:
            raise ValueError(f"{made.name} is registered already, or says nothing")
        CHECKS[made.name] = made
        return function

    return register
