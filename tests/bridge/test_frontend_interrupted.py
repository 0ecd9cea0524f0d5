"""The frontend's driver when XenStore ends in the middle of what it does."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from qemu_vtpm_bridge.bridge.frontend import State
from qemu_vtpm_bridge.vtpm_follower import follow_and_run
from qemu_vtpm_bridge.xen.platform import Channel
from qemu_vtpm_bridge.xen.store import Store, StoreGone, _Requests, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, XenbusState, device_paths
from tests.support.frontend_bench import VTPM, Bench, bench, write_entries
from tests.support.tpmback import StoreOnlyTpmback
from tests.support.wait import wait_until

pytestmark = pytest.mark.timeout(120)

DEADLINE_S: Final = 15.0
"""Below the ritual's own deadlines, which are no help here."""


class Breaker:
    """Ends the frontend's connection to XenStore at a request of choice."""

    def __init__(self, *, carried_out: bool) -> None:
        self.connection: Store | None = None
        self._carried_out = carried_out
        self._requests: int | None = None

    def arm(self, request: int) -> None:
        """Break the connection at this request, counted from now, 1 being the next."""
        self._requests = request

    @property
    def armed(self) -> bool:
        """Whether it has not happened yet."""
        return self._requests is not None

    def break_now(self) -> None:
        """Break the connection."""
        self._requests = None
        assert self.connection is not None
        self.connection._client.router.kill("by the test")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Come between the frontend's connection and XenStore."""
        original: Callable[..., Awaitable[Any]] = _Requests._call

        async def call(
            requests: _Requests, what: str, function: Callable[..., object], *arguments: object
        ) -> object:
            breaks = self._is_the_one(requests)
            if breaks and not self._carried_out:
                self.break_now()
            try:
                return await original(requests, what, function, *arguments)
            finally:
                if breaks and self._carried_out:
                    self.break_now()
                    raise StoreGone(f"the answer is lost: {what}")

        monkeypatch.setattr(_Requests, "_call", call)

    def _is_the_one(self, requests: _Requests) -> bool:
        connection = self.connection
        if connection is None or requests._client.router is not connection._client.router:
            return False
        if self._requests is None:
            return False
        self._requests -= 1
        return self._requests == 0


@dataclass
class Interrupted:
    """A frontend that is run over one connection after another."""

    bench: Bench
    breaker: Breaker
    backend: StoreOnlyTpmback

    async def run(self) -> None:
        """Run the frontend until it has closed."""
        while not self.bench.frontend.closed:
            try:
                async with open_store(self.bench.store_path) as store:
                    self.breaker.connection = store
                    await follow_and_run(None, self.bench.frontend, store)
            except StoreGone:
                pass

    async def in_state(self, state: State) -> None:
        """Wait until the frontend is in this state."""
        await wait_until(lambda: self.bench.frontend.machine.state is state, DEADLINE_S)

    async def runs_again(self, after_connections: int) -> None:
        """Wait until commands flow over a later connection."""
        with trio.fail_after(DEADLINE_S):
            await self.bench.frontend.wait_running(after_connections)
            await self.bench.state_becomes(XenbusState.CONNECTED)

    async def breaks(self) -> None:
        """Break the connection now, and wait until another is in its place."""
        before = self.breaker.connection
        self.breaker.break_now()
        await wait_until(lambda: self.breaker.connection is not before, DEADLINE_S)


@asynccontextmanager
async def interrupted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    carried_out: bool = False,
    break_at: int | None = None,
) -> AsyncIterator[Interrupted]:
    """Give a frontend that runs, and whose connection to XenStore can be broken.

    It is broken at this request on the way there.
    """
    async with bench(tmp_path) as b:
        await write_entries(b.store, b.paths)
        it = Interrupted(b, Breaker(carried_out=carried_out), await b.backend())
        it.breaker.install(monkeypatch)
        if break_at is not None:
            it.breaker.arm(break_at)
        b.nursery.start_soon(it.run)
        await it.runs_again(after_connections=0)
        yield it


Change = Callable[[Interrupted], Awaitable[None]]


async def replaced(it: Interrupted) -> None:
    it.bench.frontend.ask_replace()


async def backend_closes(it: Interrupted) -> None:
    await it.backend.show(XenbusState.CLOSING)
    await wait_until(lambda: it.bench.frontend.machine.state is not State.RUNNING)
    it.backend.connected_to = None
    await it.backend.show(XenbusState.CLOSED)


async def backend_fails(it: Interrupted) -> None:
    it.backend.connected_to = None
    await it.backend.show(XenbusState.CLOSED)


async def backend_shows_nonsense(it: Interrupted) -> None:
    await it.backend.show(XenbusState.RECONFIGURED)


async def backend_starts_anew(it: Interrupted) -> None:
    it.backend.connected_to = None
    await it.backend.show(XenbusState.INIT_WAIT)


async def backend_is_made_anew(it: Interrupted) -> None:
    b = it.bench
    await b.store.rm(b.paths.backend)
    await it.in_state(State.WAIT_BACKEND)
    await it.bench.entries_anew(it.backend)


async def entries_are_made_anew(it: Interrupted) -> None:
    b = it.bench
    await b.store.rm(b.paths.frontend)
    await b.store.rm(b.paths.backend)
    await it.in_state(State.WAIT_ENTRIES)
    await it.bench.entries_anew(it.backend)


async def sent_elsewhere(it: Interrupted) -> None:
    b = it.bench
    b.frontend.retarget(b.paths if b.frontend.target != b.paths else other_paths())


def other_paths() -> DevicePaths:
    return device_paths(PathMode.SEED, backend_domid=VTPM, handle=1)


HEARD: Final = pytest.mark.parametrize("carried_out", [False, True], ids=["unheard", "answer-lost"])


@HEARD
@pytest.mark.parametrize(
    "change",
    [
        replaced,
        backend_closes,
        backend_fails,
        backend_shows_nonsense,
        backend_starts_anew,
        backend_is_made_anew,
        entries_are_made_anew,
        sent_elsewhere,
    ],
)
async def test_P8_xenstore_may_end_at_any_request_of_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, carried_out: bool
) -> None:
    async with interrupted(tmp_path, monkeypatch, carried_out=carried_out) as it:
        await write_entries(it.bench.store, other_paths())
        await it.bench.backend(other_paths())
        for request in itertools.count(1):
            connections = it.bench.frontend.connections
            it.breaker.arm(request)
            await change(it)
            await it.runs_again(connections)
            calls = it.bench.user.calls
            assert calls[-3:] == ["down", "forget", "up"], calls
            if it.breaker.armed:
                assert request > 8
                return


@HEARD
async def test_P7_xenstore_may_end_at_any_request_of_a_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    async with interrupted(tmp_path, monkeypatch, carried_out=carried_out) as it:
        await it.bench.store.write(f"{it.bench.paths.backend}/feature-reset", b"1")
        await replaced(it)
        await it.runs_again(after_connections=1)
        for request in itertools.count(1):
            it.breaker.arm(request)
            with trio.fail_after(DEADLINE_S):
                assert await it.bench.frontend.request_reset()
            assert it.backend.resets == request
            if it.breaker.armed:
                assert request > 8
                return


@HEARD
async def test_P8_xenstore_may_end_at_any_request_of_the_first_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    for request in itertools.count(1):
        async with interrupted(
            tmp_path, monkeypatch, carried_out=carried_out, break_at=request
        ) as it:
            assert it.bench.user.calls == ["up"]
            if it.breaker.armed:
                assert request > 15
                return


@HEARD
async def test_xenstore_may_end_at_any_request_of_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    for request in itertools.count(1):
        async with interrupted(tmp_path, monkeypatch, carried_out=carried_out) as it:
            b = it.bench
            it.breaker.arm(request)
            b.frontend.ask_close()
            await wait_until(lambda: it.bench.frontend.closed, DEADLINE_S)
            assert await b.store.read(f"{b.paths.frontend}/state") == b"1"
            assert await b.store.try_read(f"{b.paths.frontend}/ring-ref") is None
            assert b.user.calls == ["up", "down", "forget"]
            if it.breaker.armed:
                assert request > 8
                return


async def test_P8_a_drain_outlives_the_connection_to_xenstore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interrupted(tmp_path, monkeypatch) as it:
        user = it.bench.user
        user.idle = trio.Event()
        it.bench.frontend.ask_replace()
        await it.in_state(State.DRAINING)
        await it.breaks()
        user.idle.set()
        await it.runs_again(after_connections=1)


class Slow:
    """The ring's user, whose first answer to one of the calls comes when XenStore is gone."""

    def __init__(self, it: Interrupted, call: str) -> None:
        self._it = it
        self._done: Callable[..., Awaitable[None]] = getattr(it.bench.user, call)
        self.was_cancelled = False

    async def __call__(self, *arguments: object) -> None:
        if not self.was_cancelled:
            self._it.breaker.break_now()
            try:
                await trio.sleep_forever()
            finally:
                self.was_cancelled = True
        await self._done(*arguments)


async def test_P8_xenstore_may_end_in_publishing_for_entries_that_are_removed_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interrupted(tmp_path, monkeypatch) as it:
        b = it.bench
        alloc_unbound = b.platform.alloc_unbound

        async def removed() -> None:
            await b.store.rm(b.paths.frontend)
            it.breaker.break_now()

        def late(domid: int) -> Channel:
            monkeypatch.undo()
            trio.from_thread.run(removed)
            return alloc_unbound(domid)

        monkeypatch.setattr(b.platform, "alloc_unbound", late)
        await replaced(it)
        await it.in_state(State.WAIT_ENTRIES)
        await wait_until(lambda: b.user.calls == ["up", "down", "forget", "forget"])
        assert await b.store.try_read(b.paths.frontend) is None
        await b.entries_anew(it.backend)
        await it.runs_again(after_connections=1)


@pytest.mark.parametrize("call", ["ring_down", "ring_forget", "ring_up"])
@pytest.mark.parametrize("change", [replaced, backend_fails, backend_is_made_anew])
async def test_P8_what_is_cancelled_with_the_connection_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, call: str
) -> None:
    async with interrupted(tmp_path, monkeypatch) as it:
        slow = Slow(it, call)
        monkeypatch.setattr(it.bench.user, call, slow)
        await change(it)
        await it.runs_again(after_connections=1)
        assert slow.was_cancelled
        assert it.bench.user.calls == ["up", "down", "forget", "up"]


async def test_entries_removed_while_xenstore_is_away_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with interrupted(tmp_path, monkeypatch) as it:
        b = it.bench

        async def removed() -> None:
            b.user.calls.append("down")
            if not b.user.calls.count("down") > 1:
                it.breaker.break_now()
                with trio.CancelScope(shield=True):
                    await b.store.rm(b.paths.frontend)
                await trio.sleep_forever()

        monkeypatch.setattr(b.user, "ring_down", removed)
        b.frontend.ask_replace()
        await it.in_state(State.WAIT_ENTRIES)
        await wait_until(lambda: "forget" in b.user.calls)
        assert await b.store.try_read(b.paths.frontend) is None
        await it.bench.entries_anew(it.backend)
        await it.runs_again(after_connections=1)
