"""One frontend of the vTPM domain: its entries in XenStore, its page and its port.

Theory of operation.  A `Device` follows the frontend's state node and carries out what
`BackendMachine` says.  It outlives the XenStore connection: `follow` is called again
with the next one.  What the frontend's directory holds is believed only as far as it
can be checked: the directory must lie below that domain's own, numbers are parsed, and
Xen itself refuses a page or port that was not given to this domain.

Keeps P8 and P9.  Who may lie: the frontend's domain.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from ..errors import BackendProtocolError, XenError
from ..xen.store import StoreGone
from ..xen.xenbus import (
    EVENT_CHANNEL,
    EVENT_CHANNEL_MAX,
    FEATURE_PROTOCOL_V2,
    FEATURE_RESET,
    GRANT_REF_MAX,
    HANDLE_MAX,
    RESET_COUNT,
    RESET_REQUEST,
    RING_REF,
    TRUST_RESET,
    XenbusState,
    parse_number,
    parse_state,
    printable,
)
from .backend import SHOWN_AS, Action, BackendMachine, Fact, State, frontend_fact

if TYPE_CHECKING:
    from ..xen.platform import Channel, Page, Platform
    from ..xen.store import Store

log = logging.getLogger(__name__)

_WRITTEN: Final = {
    Action.WRITE_INIT_WAIT: XenbusState.INIT_WAIT,
    Action.WRITE_CONNECTED: XenbusState.CONNECTED,
    Action.WRITE_CLOSING: XenbusState.CLOSING,
    Action.WRITE_CLOSED: XenbusState.CLOSED,
}


class TpmServer(Protocol):
    """Who serves pages from the TPM: the domain."""

    async def add_frontend(self, page: Page, channel: Channel, *, fail_pending: bool) -> int:
        """Serve a page; return its slot.  With `fail_pending`, what it holds is not run."""

    async def remove_frontend(self, slot: int, *, drain: bool) -> None:
        """Serve it no more, at once or after its command in flight."""

    async def power_cycle(self) -> bool:
        """Switch the TPM off and on; return whether it is off, or on anew."""


class Device:
    """One backend directory, `backend/vtpm/<frontend domid>/<handle>`."""

    def __init__(
        self,
        frontend_domid: int,
        handle: int,
        platform: Platform,
        server: TpmServer,
        *,
        trusted: bool,
    ) -> None:
        """`trusted`: it may have the TPM power-cycled, whether its entries say so or not."""
        self.frontend_domid = frontend_domid
        self.handle = handle
        self.backend = f"backend/vtpm/{frontend_domid}/{handle}"
        self.frontend = ""
        self.machine = BackendMachine()
        self.slot: int | None = None
        self.last_error = ""
        self.resets = 0
        self._platform = platform
        self._server = server
        self._trusted = trusted
        self._may_reset = trusted
        self._page: Page | None = None
        self._channel: Channel | None = None
        self.greeted = False
        self._left_connected = False
        self._broke = trio.Event()
        self._lock = trio.Lock()
        self._follower: trio.CancelScope | None = None

    @property
    def gone(self) -> bool:
        """Whether its entries are removed for good."""
        return self.machine.state is State.GONE

    def channel_broke(self) -> None:
        """The pump found the event channel broken, and serves the page no more."""
        self.slot = None
        self._broke.set()

    async def drop(self) -> None:
        """Let go without a word: the entries are gone, or others are in their place."""
        async with self._lock:
            for action in self.machine.feed(Fact.ENTRIES_REMOVED):
                assert action is Action.DISCONNECT
                await self.disconnect()
        if self._follower is not None:
            self._follower.cancel()

    async def follow(self, store: Store) -> None:
        """Serve this frontend until its entries are gone.

        Raises StoreGone when XenStore is lost.  Cancelling leaves the page served.
        """
        if self.gone:
            # XenStore ended before its entries were removed; another device sees to that.
            return
        if not await self._find_frontend(store):
            return
        async with self._lock:
            if self.gone:
                return  # the entries were removed meanwhile
            await self._greet(store)
        async with store.watch(f"{self.frontend}/state") as watch, trio.open_nursery() as nursery:
            self._follower = nursery.cancel_scope
            nursery.start_soon(self._follow_channel, store)
            while not self.gone:
                await watch.wait()
                state = parse_state(await store.peek(f"{self.frontend}/state"))
                await self._feed(store, frontend_fact(state))
            nursery.cancel_scope.cancel()

    async def _follow_channel(self, store: Store) -> None:
        while True:
            await self._broke.wait()
            self._broke = trio.Event()
            await self._feed(store, Fact.CHANNEL_BROKE)

    async def _find_frontend(self, store: Store) -> bool:
        """Read where the frontend is, and check that it may be there."""
        raw = await store.try_read(f"{self.backend}/frontend")
        below = re.compile(rb"/local/domain/0*%d(?:/[A-Za-z0-9_@-]+)+" % self.frontend_domid)
        if raw is None or not below.fullmatch(raw):
            found = "is missing" if raw is None else f"holds {printable(raw)}"
            self._report(
                f"{self.backend}/frontend {found}: no path of domain {self.frontend_domid}"
            )
            return False
        self.frontend = raw.decode("ascii")
        return True

    async def _greet(self, store: Store) -> None:
        """Announce what is offered, and the state; XenStore may have missed the last one."""
        raw_state = await store.try_read(f"{self.backend}/state")
        if not self.greeted:
            # What a process that is gone connected to may hold a command that it has run.
            self._left_connected = parse_state(raw_state) in (
                XenbusState.CONNECTED,
                XenbusState.CLOSING,
            )
        said = await store.peek(f"{self.backend}/{TRUST_RESET}")
        self._may_reset = self._trusted or said == b"1"
        if self._may_reset:
            await store.write(f"{self.backend}/{FEATURE_RESET}", b"1")
        else:
            await store.rm(
                f"{self.backend}/{FEATURE_RESET}"
            )  # a former process may have offered it
        await store.write(f"{self.backend}/{FEATURE_PROTOCOL_V2}", b"1")
        self.greeted = True
        if parse_state(await store.peek(f"{self.frontend}/state")) is XenbusState.CLOSED:
            # A reset that it asks for, and that may have been cut short, comes before
            # InitWait: with that it goes on.
            await self._take(store, Fact.FRONTEND_CLOSED)
            return
        shown = SHOWN_AS[self.machine.state]
        if parse_state(raw_state) is not shown:
            await self._write_state(store, shown)

    async def _feed(self, store: Store, fact: Fact) -> None:
        async with self._lock:
            await self._take(store, fact)

    async def _take(self, store: Store, fact: Fact) -> None:
        before = self.machine.state
        for action in self.machine.feed(fact):
            await self._perform(store, action)
        if self.machine.state is not before:
            log.info(
                "frontend %d/%d: %s -> %s (%s)",
                self.frontend_domid,
                self.handle,
                before.name,
                self.machine.state.name,
                fact.name,
            )

    async def _perform(self, store: Store, action: Action) -> None:
        match action:
            case Action.CONNECT:
                await self._take(store, await self._connect(store))
            case Action.DISCONNECT:
                await self.disconnect()
            case Action.RESET_IF_ASKED:
                await self._reset_if_asked(store)
            case Action.REMOVE_ENTRIES:
                await store.rm(self.backend)
            case Action.WRITE_CLOSED if self.gone:
                # The toolstack may have removed this side too: nothing is to come back.
                if await store.try_read(f"{self.backend}/state") is not None:
                    await self._write_state(store, XenbusState.CLOSED)
            case _:
                await self._write_state(store, _WRITTEN[action])

    async def _write_state(self, store: Store, state: XenbusState) -> None:
        await store.write(f"{self.backend}/state", b"%d" % state)

    # The connection.

    async def _connect(self, store: Store) -> Fact:
        try:
            ref = await self._number(store, RING_REF, GRANT_REF_MAX)
            port = await self._number(store, EVENT_CHANNEL, EVENT_CHANNEL_MAX)
            feature = await store.peek(f"{self.frontend}/{FEATURE_PROTOCOL_V2}")
            if feature != b"1":
                raise BackendProtocolError(f"{self.frontend} does not offer tpmif version 2")
            self._page = await trio.to_thread.run_sync(
                self._platform.map_page, self.frontend_domid, ref
            )
            self._channel = await trio.to_thread.run_sync(
                self._platform.bind_interdomain, self.frontend_domid, port
            )
            self.slot = await self._server.add_frontend(
                self._page, self._channel, fail_pending=self._left_connected
            )
            self._left_connected = False
            await store.write(f"{self.backend}/ready", b"1")
        except (StoreGone, trio.Cancelled):
            await self.disconnect()
            self.machine.feed(Fact.CONNECT_INTERRUPTED)
            raise
        except (XenError, BackendProtocolError) as error:
            await self.disconnect()
            self._report(str(error))
            return Fact.CONNECT_FAILED
        return Fact.CONNECT_DONE

    async def _number(self, store: Store, key: str, maximum: int) -> int:
        raw = await store.peek(f"{self.frontend}/{key}")
        if raw is None:
            raise XenError(f"{self.frontend}/{key} is missing")
        return parse_number(raw, f"{self.frontend}/{key}", maximum)

    async def disconnect(self, *, drain: bool = False) -> None:
        """Let go of page and port; with `drain`, after the command in flight.

        Cannot be cancelled: a page that the pump still serves must not be unmapped.
        Safe to call twice.
        """
        with trio.CancelScope(shield=True):
            slot, self.slot = self.slot, None
            if slot is not None:
                await self._server.remove_frontend(slot, drain=drain)
            resources = (self._channel, self._page)
            self._channel = self._page = None
            for resource in resources:
                if resource is not None:
                    await trio.to_thread.run_sync(resource.close)

    async def close(self, store: Store) -> None:
        """The domain is about to end: tell the frontend, drain, let go."""
        await self._write_state(store, XenbusState.CLOSING)
        await self.disconnect(drain=True)
        await self._write_state(store, XenbusState.CLOSED)

    # The reset extension.

    async def _reset_if_asked(self, store: Store) -> None:
        """Power-cycle the TPM where this frontend asked for it since the last time."""
        raw = await store.peek(f"{self.frontend}/{RESET_REQUEST}")
        if raw is None:
            return
        raw_count = await store.try_read(f"{self.backend}/{RESET_COUNT}")
        if raw == (raw_count or b"0"):
            return
        if not self._may_reset:
            self._report(
                f"domain {self.frontend_domid} asked for a power cycle of the TPM and may not; "
                "`attach --trust-reset` in domain 0, or --trust-reset here, says who may"
            )
            return
        try:
            request = parse_number(raw, f"{self.frontend}/{RESET_REQUEST}", HANDLE_MAX)
        except XenError as error:
            self._report(str(error))
            return
        if await self._server.power_cycle():
            self.resets += 1
            await store.write(f"{self.backend}/{RESET_COUNT}", b"%d" % request)

    # Telling.

    def _report(self, message: str) -> None:
        if message != self.last_error:
            log.warning("frontend %d/%d: %s", self.frontend_domid, self.handle, message)
        self.last_error = message

    def status(self) -> dict[str, Any]:
        """Return this frontend's part of the status document."""
        return {
            "domid": self.frontend_domid,
            "handle": self.handle,
            "frontend": self.frontend,
            "state": self.machine.state.name,
            "may-reset": self._may_reset,
            "resets": self.resets,
            "last-error": self.last_error,
        }
