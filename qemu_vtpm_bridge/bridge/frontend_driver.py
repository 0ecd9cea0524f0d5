"""Carries the frontend's ritual out: XenStore, grants and event channels for `frontend.py`.

Theory of operation.  Watches are hints: whatever fires, the driver reads the
backend's state again and feeds the machine with what it found, until a reading
brings nothing new.  `run` may be called again after XenStore was lost: the
machine, the page and the port outlive the connection, so a guest whose commands
flow does not notice.  The machine has moved on before its actions are done, so what
is left of them outlives the connection too, and the next one finishes that before it
looks at anything: every action bears to be begun again.  Keeps P6, P8 and P9; the
backend directory's contents are hostile and pass through xenbus.parse_....
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

from ..errors import XenError
from ..xen.store import StoreGone
from ..xen.xenbus import (
    EVENT_CHANNEL,
    FEATURE_PROTOCOL_V2,
    FEATURE_RESET,
    RING_REF,
    DevicePaths,
    XenbusState,
    parse_state,
    printable,
)
from .frontend import Action, Fact, FrontendMachine, State, backend_fact
from .frontend_reset import ResetRequest, take_back

if TYPE_CHECKING:
    from ..xen.platform import Channel, Page, Platform
    from ..xen.store import Store, Transaction, Watch

log = logging.getLogger(__name__)

BACK_OFF_FIRST_S = 0.1
BACK_OFF_MAX_S = 10.0

_NEED_NO_ENTRIES = frozenset({Action.RING_DOWN, Action.RELEASE})
"""What is still to be done where the directory is gone that it was ordered for."""


class RingUser(Protocol):
    """Who uses the connection: the pump's owner."""

    async def ring_up(self, page: Page, channel: Channel) -> None:
        """The page is connected."""

    async def ring_down(self) -> None:
        """The page must not be used for new commands; one in flight is answered with an error."""

    async def ring_drained(self) -> None:
        """Return when the peer owes no answer on the page any more."""

    async def ring_forget(self) -> None:
        """The page is about to be unmapped."""


@dataclass(frozen=True, slots=True)
class FrontendTimes:
    """Deadlines of the ritual, seconds."""

    grace_s: float = 60.0
    """Before Closed is written over a dead bridge's page, where the vTPM domain is not
    known to survive that; as long as the longest ordinary command."""
    reset_s: float = 30.0
    connect_s: float = 30.0
    drain_s: float = 60.0
    close_s: float = 5.0


class Frontend:
    """One tpmif device seen from the bridge."""

    def __init__(
        self,
        paths: DevicePaths,
        platform: Platform,
        user: RingUser,
        *,
        times: FrontendTimes | None = None,
        require_feature: bool = True,
        vtpm_uuid: str | None = None,
    ) -> None:
        self.paths = paths
        self.machine = FrontendMachine()
        self.backend_state: XenbusState | None = None
        self.last_error = ""
        self.connections = 0
        self.changed: Callable[[], None] = lambda: None
        """Called after each change of state, for the status document."""
        self._platform = platform
        self._user = user
        self._times = times or FrontendTimes()
        self._require_feature = require_feature
        self._vtpm_uuid = vtpm_uuid
        self._page: Page | None = None
        self._channel: Channel | None = None
        self._deadline = math.inf
        self._back_off_s = 0.0
        self._not_before = -math.inf
        self._facts: deque[Fact] = deque()
        self._wake = trio.Event()
        self._left: deque[Action] = deque()
        """What the machine has ordered and is not done, in order."""
        self._reset: ResetRequest | None = None
        """What Closed is to say of a reset, until the connection is let go."""
        self._ring_is_up = False
        self._running = trio.Event()
        self._drain = trio.Event()
        self._problem = ""
        self._next_paths: DevicePaths | None = None

    @property
    def target(self) -> DevicePaths:
        """The directories that are followed, or will be at the next turn."""
        return self._next_paths or self.paths

    @property
    def closed(self) -> bool:
        """The ritual has ended for good."""
        return self.machine.state is State.CLOSED and not self._left

    # What others ask for.

    def ask_replace(self) -> None:
        """Have the connection replaced: drain, Closed, and the whole ritual anew (P5)."""
        self._put(Fact.REPLACE_ASKED)

    def retarget(self, paths: DevicePaths) -> None:
        """Leave the present directories, whose vTPM domain is gone, and follow these."""
        self._next_paths = paths
        self._wake.set()

    def ask_close(self) -> None:
        """Have the frontend drain, close and stop; `run` returns when it has."""
        self._put(Fact.CLOSE_ASKED)

    async def wait_running(self, after_connections: int = -1) -> None:
        """Return when commands can flow, over a connection later than so many.

        Cancelling changes nothing.
        """
        while not self._ring_is_up or self.connections <= after_connections:
            await self._running.wait()

    async def request_reset(self) -> bool:
        """Have the vTPM domain power-cycle the TPM; return whether it offers that.

        Returns after the reconnection that follows; the caller then asks the TPM
        itself for evidence.  A vTPM domain that vanishes before it was asked has the
        next one asked.  Raises XenError where the present one cannot be.  Cancelling
        abandons the waiting, not the request, which ends with the connection.
        """
        while True:
            await self.wait_running()
            if not self.offers_reset:
                return False
            request = self._reset = self._reset or ResetRequest()
            connections = self.connections
            self.ask_replace()
            await self.wait_running(after_connections=connections)
            if request.error is not None:
                raise request.error
            if request.was_told:
                return True

    offers_reset = False
    """The backend of the present connection wrote `feature-reset`."""

    # The loop.

    async def run(self, store: Store) -> None:
        """Follow the ritual until closed.

        Raises StoreGone when XenStore is lost: call again with a new connection.
        Cancelling leaves the published state as it is; the next start finds it
        stale and resets.
        """
        while not self.closed:
            if self._next_paths is not None:
                await self._leave(store)
                self.paths, self._next_paths = self._next_paths, None
            await self._run_here(store)

    async def _run_here(self, store: Store) -> None:
        """Follow the ritual in the present directories until closed, or sent to others."""
        async with (
            store.watch(self.paths.backend) as backend_watch,
            store.watch(self.paths.frontend) as frontend_watch,
            store.watch("@releaseDomain") as release_watch,
            trio.open_nursery() as nursery,
        ):
            for watch in (backend_watch, frontend_watch, release_watch):
                nursery.start_soon(self._relay, watch)
            nursery.start_soon(self._await_drained)
            try:
                await self._resume(store)
                await self._loop(store)
            finally:
                nursery.cancel_scope.cancel()

    async def _resume(self, store: Store) -> None:
        """Finish what the last connection to XenStore left undone."""
        if self._left and not await self._frontend_exists(store):
            # Writing would make entries that the toolstack has removed.
            await self._leave(store)
        await self._finish(store)

    async def _leave(self, store: Store) -> None:
        """Let go of directories that are gone, or not to be followed any more."""
        self._left = deque(action for action in self._left if action in _NEED_NO_ENTRIES)
        await self._feed(store, Fact.ENTRIES_REMOVED)

    async def _loop(self, store: Store) -> None:
        while not self.closed and self._next_paths is None:
            self._wake = trio.Event()
            acted = False
            while self._facts:
                acted |= await self._feed(store, self._facts.popleft())
            if trio.current_time() >= self._deadline:
                self._deadline = math.inf
                acted |= await self._feed(store, Fact.DEADLINE)
            if self.closed:
                return
            acted |= await self._look(store)
            if not acted and not self._facts:
                with trio.move_on_at(min(self._deadline, self._next_look())):
                    await self._wake.wait()

    def _next_look(self) -> float:
        return self._not_before if self._not_before > trio.current_time() else math.inf

    async def _relay(self, watch: Watch) -> None:
        while True:
            await watch.wait()
            self._wake.set()

    def _put(self, fact: Fact) -> None:
        self._facts.append(fact)
        self._wake.set()

    async def _look(self, store: Store) -> bool:
        """Read what the peers wrote, feed it; return whether anything was done."""
        self.backend_state = parse_state(await store.peek(f"{self.paths.backend}/state"))
        if self.machine.state is State.WAIT_ENTRIES:
            fact = await self._entries(store)
            return fact is not None and await self._feed(store, fact)
        if not await self._frontend_exists(store):
            self._report(f"the entries at {self.paths.frontend} were removed")
            return await self._feed(store, Fact.ENTRIES_REMOVED)
        fact = backend_fact(self.backend_state)
        if fact is Fact.BACKEND_INIT_WAIT and self.machine.state is State.WAIT_BACKEND:
            if trio.current_time() < self._not_before:
                return False
            if not await self._is_our_vtpm(store):
                return False
        return await self._feed(store, fact)

    async def _feed(self, store: Store, fact: Fact) -> bool:
        """Tell the machine, and do what it orders; return whether that was anything."""
        ordered = self._take(fact)
        await self._finish(store)
        return ordered

    def _take(self, fact: Fact) -> bool:
        before = self.machine.state
        actions = self.machine.feed(fact)
        if self.machine.state is not before:
            self._deadline = math.inf
            log.info(
                "frontend %s: %s -> %s (%s)",
                self.paths.frontend,
                before.name,
                self.machine.state.name,
                fact.name,
            )
        self._left.extend(actions)
        return bool(actions)

    async def _finish(self, store: Store) -> None:
        """Do what is left.  An action that is cut short stays, to be begun again."""
        if not self._left:
            return
        while self._left:
            outcome = await self._perform(store, self._left[0])
            self._left.popleft()
            if outcome is not None:
                self._take(outcome)
        self.changed()

    async def _perform(self, store: Store, action: Action) -> Fact | None:
        """Do this; return what came of it where the machine has to know."""
        match action:
            case Action.WRITE_INITIALISING:
                await self._write_state(store, XenbusState.INITIALISING)
            case Action.WRITE_INITIALISED:
                await self._write_state(store, XenbusState.INITIALISED)
            case Action.WRITE_CONNECTED:
                await self._write_state(store, XenbusState.CONNECTED)
            case Action.WRITE_CLOSING:
                await self._write_state(store, XenbusState.CLOSING)
            case Action.WRITE_CLOSED:
                await self._write_closed(store)
            case Action.REMOVE_RING_KEYS:
                for key in (RING_REF, EVENT_CHANNEL):
                    await store.rm(f"{self.paths.frontend}/{key}")
            case Action.PUBLISH:
                return await self._publish(store)
            case Action.RING_UP:
                assert self._page is not None
                assert self._channel is not None
                await self._user.ring_up(self._page, self._channel)
                self._tell_running()
            case Action.RING_DOWN:
                self._ring_is_up = False
                await self._user.ring_down()
            case Action.AWAIT_DRAINED:
                self._drain.set()
            case Action.RELEASE:
                # Its Closed was written, or never will be.
                self._reset = None
                await self._release()
            case Action.BACK_OFF:
                self._back_off_s = min(BACK_OFF_MAX_S, max(BACK_OFF_FIRST_S, 2 * self._back_off_s))
                self._not_before = trio.current_time() + self._back_off_s
            case Action.REPORT_STUCK:
                self._report_stuck()
            case _:
                self._arm(action)
        return None

    def _tell_running(self) -> None:
        self.connections += 1
        self._back_off_s = 0.0
        self._ring_is_up = True
        running, self._running = self._running, trio.Event()
        running.set()

    def _arm(self, action: Action) -> None:
        seconds = {
            Action.ARM_GRACE: self._times.grace_s,
            Action.ARM_RESET: self._times.reset_s,
            Action.ARM_CONNECT: self._times.connect_s,
            Action.ARM_DRAIN: self._times.drain_s,
            Action.ARM_CLOSE: self._times.close_s,
        }[action]
        self._deadline = trio.current_time() + seconds

    # The actions that take more than a line.

    async def _write_state(self, store: Store, state: XenbusState) -> None:
        await store.write(f"{self.paths.frontend}/state", str(int(state)).encode())

    async def _write_closed(self, store: Store) -> None:
        request = self._reset
        if request is None:
            await take_back(store, self.paths)
        else:
            await request.ask(store, self.paths)
        await self._write_state(store, XenbusState.CLOSED)
        if request is not None:
            request.was_told = True

    async def _publish(self, store: Store) -> Fact:
        """Make a page and a port, and write them in one transaction."""
        try:
            backend_domid = self.paths.backend_domid
            if self._page is None:
                self._page = await trio.to_thread.run_sync(self._platform.share_page, backend_domid)
            if self._channel is None:
                self._channel = await trio.to_thread.run_sync(
                    self._platform.alloc_unbound, backend_domid
                )
            page, channel = self._page, self._channel

            async def write(transaction: Transaction) -> None:
                for key, value in (
                    (RING_REF, page.ref),
                    (EVENT_CHANNEL, channel.port),
                    (FEATURE_PROTOCOL_V2, 1),
                ):
                    await transaction.write(f"{self.paths.frontend}/{key}", str(value).encode())

            await store.transact(write)
        except StoreGone:
            raise
        except XenError as error:
            self._report(str(error))
            return Fact.PUBLISH_FAILED
        return Fact.PUBLISHED

    async def _release(self) -> None:
        if self._page is None and self._channel is None:
            return
        await self._user.ring_forget()
        if self._channel is not None:
            await trio.to_thread.run_sync(self._channel.close)
            self._channel = None
        if self._page is not None:
            await trio.to_thread.run_sync(self._page.close)
            self._page = None

    async def _await_drained(self) -> None:
        """Tell when the page owes no answer any more, as often as that is asked."""
        while True:
            await self._drain.wait()
            await self._user.ring_drained()
            self._drain = trio.Event()
            self._put(Fact.DRAINED)

    # What the entries say.

    async def _frontend_exists(self, store: Store) -> bool:
        return await store.try_read(f"{self.paths.frontend}/backend") is not None

    async def _entries(self, store: Store) -> Fact | None:
        """Check the toolstack's entries; None while they are missing or wrong (P9)."""
        paths = self.paths
        expected = {
            f"{paths.frontend}/backend": paths.backend,
            f"{paths.frontend}/backend-id": str(paths.backend_domid),
            f"{paths.backend}/frontend": paths.frontend,
            f"{paths.backend}/frontend-id": str(paths.frontend_domid),
        }
        for path, wanted in expected.items():
            raw = await store.peek(path)
            if raw is None or raw != wanted.encode():
                found = "is missing" if raw is None else f"holds {printable(raw)}"
                self._report(f"{path} {found}, expected '{wanted}'; see `qemu-vtpm-bridge attach`")
                return None
        own = parse_state(await store.try_read(f"{paths.frontend}/state"))
        settled = (None, XenbusState.UNKNOWN, XenbusState.INITIALISING, XenbusState.INIT_WAIT)
        if own is XenbusState.INITIALISING and self.backend_state in settled:
            return Fact.ENTRIES_CLEAN
        reset_offered = await store.peek(f"{paths.backend}/{FEATURE_RESET}")
        # Our own vTPM domain finishes a command on a page that was closed under it.
        if own is XenbusState.CONNECTED and reset_offered != b"1":
            return Fact.ENTRIES_STALE_UNSAFE
        return Fact.ENTRIES_STALE

    async def _is_our_vtpm(self, store: Store) -> bool:
        """Check that the backend can be talked to, and is the domain that was configured."""
        backend = self.paths.backend
        if await store.peek(f"{backend}/{FEATURE_PROTOCOL_V2}") != b"1":
            message = f"{backend}/{FEATURE_PROTOCOL_V2} is not 1"
            if self._require_feature:
                self._report(f"{message}; the vTPM domain does not offer tpmif version 2")
                return False
            log.warning("%s; going on as configured", message)
        if self._vtpm_uuid is not None:
            raw = await store.try_read(f"/local/domain/{self.paths.backend_domid}/vm")
            if raw != f"/vm/{self._vtpm_uuid}".encode():
                found = "nothing" if raw is None else printable(raw)
                self._report(
                    f"domain {self.paths.backend_domid} is {found}, not the vTPM domain "
                    f"{self._vtpm_uuid}: its id was given to another domain"
                )
                return False
        self.offers_reset = await store.peek(f"{backend}/{FEATURE_RESET}") == b"1"
        return True

    def _report_stuck(self) -> None:
        shown = "missing" if self.backend_state is None else self.backend_state.label
        self._report(
            f"the vTPM domain's state at {self.paths.backend} is {shown} for too long "
            f"(frontend in {self.machine.state.name})"
        )

    def _report(self, message: str) -> None:
        self.last_error = message
        if message != self._problem:
            self._problem = message
            log.warning("%s", message)
