"""The reset extension, from the frontend's end: a reset is carried out or reported, never late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from qemu_vtpm_bridge.bridge.frontend import State
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.xen.xenbus import XenbusState
from tests.support.frontend_bench import Bench, bench, write_entries
from tests.support.tpmback import StoreOnlyTpmback
from tests.support.wait import wait_until

pytestmark = pytest.mark.timeout(60)


@asynccontextmanager
async def resettable(tmp_path: Path) -> AsyncIterator[tuple[Bench, StoreOnlyTpmback]]:
    """Give a frontend that runs, and a vTPM domain that offers resets and has counted six."""
    async with bench(tmp_path) as b:
        await write_entries(b.store, b.paths)
        await offer(b)
        backend = await b.backend()
        b.start()
        await b.frontend.wait_running()
        yield b, backend


async def offer(b: Bench) -> None:
    await b.store.write(f"{b.paths.backend}/feature-reset", b"1")
    await b.store.write(f"{b.paths.backend}/reset-count", b"6")


async def reconnected(b: Bench) -> None:
    """Have the connection replaced, and wait for the next."""
    connections = b.frontend.connections
    b.frontend.ask_replace()
    await b.frontend.wait_running(after_connections=connections)


@asynccontextmanager
async def asked_in_a_drain(b: Bench) -> AsyncIterator[list[Any]]:
    """Ask for a reset whose drain does not end; give the list that the answer will be in.

    Who asked gives up when the block ends.
    """
    b.user.idle = trio.Event()
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(await b.frontend.request_reset())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await wait_until(lambda: b.frontend.machine.state is State.DRAINING)
        yield answers
        nursery.cancel_scope.cancel()


async def vanish(b: Bench) -> None:
    """Have the vTPM domain vanish before its answer."""
    await b.store.rm(b.paths.backend)
    await wait_until(lambda: b.frontend.machine.state is State.WAIT_BACKEND)
    b.user.idle.set()


async def test_a_reset_asked_of_a_vtpm_domain_that_vanishes_is_asked_of_the_next(
    tmp_path: Path,
) -> None:
    async with resettable(tmp_path) as (b, backend):
        async with asked_in_a_drain(b) as answers:
            await vanish(b)
            await offer(b)
            await b.entries_anew(backend)
            await wait_until(lambda: answers)
        assert answers == [True]
        assert backend.resets == 1
        await reconnected(b)
        assert backend.resets == 1


async def test_a_reset_is_reported_where_the_next_vtpm_domain_offers_none(tmp_path: Path) -> None:
    async with resettable(tmp_path) as (b, backend):
        async with asked_in_a_drain(b) as answers:
            await vanish(b)
            await b.entries_anew(backend)
            await wait_until(lambda: answers)
        assert answers == [False]


@pytest.mark.parametrize("what", ["backend", "frontend"])
async def test_P7_a_reset_that_nobody_waits_for_is_void_with_its_connection(
    tmp_path: Path, what: str
) -> None:
    async with resettable(tmp_path) as (b, backend):
        async with asked_in_a_drain(b):
            pass
        await b.store.rm(b.paths.backend)
        if what == "frontend":
            await b.store.rm(b.paths.frontend)
        gone = State.WAIT_BACKEND if what == "backend" else State.WAIT_ENTRIES
        await wait_until(lambda: b.frontend.machine.state is gone)
        b.user.idle.set()
        await offer(b)
        await b.entries_anew(backend)
        await b.frontend.wait_running(after_connections=1)
        await reconnected(b)
        assert backend.resets == 0


async def test_P7_a_plain_reconnect_takes_back_a_request_that_was_not_heard(tmp_path: Path) -> None:
    async with resettable(tmp_path) as (b, backend):
        await b.store.write(f"{b.paths.frontend}/reset-request", b"9")
        await reconnected(b)
        assert backend.resets == 0
        await b.store.write(f"{b.paths.frontend}/reset-request", b"9")
        b.frontend.ask_close()
        await wait_until(lambda: b.frontend.closed)
        assert backend.resets == 0


async def test_P7_a_new_bridge_takes_back_what_a_killed_one_asked_for(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await write_entries(b.store, b.paths)
        await offer(b)
        for key, value in {"state": b"4", "ring-ref": b"9", "event-channel": b"3"}.items():
            await b.store.write(f"{b.paths.frontend}/{key}", value)
        await b.store.write(f"{b.paths.frontend}/reset-request", b"7")
        backend = await b.backend()
        b.start()
        await b.frontend.wait_running()
        assert backend.resets == 0


async def test_P9_a_count_that_is_no_number_is_reported_and_stops_nothing(tmp_path: Path) -> None:
    async with resettable(tmp_path) as (b, backend):
        await b.store.write(f"{b.paths.backend}/reset-count", b"six")
        with trio.fail_after(10), pytest.raises(XenError, match="reset-count"):
            await b.frontend.request_reset()
        await b.state_becomes(XenbusState.CONNECTED)
        assert backend.resets == 0
        await b.store.write(f"{b.paths.backend}/reset-count", b"7")
        assert await b.frontend.request_reset()
        assert backend.resets == 1


async def test_a_reset_that_takes_long_is_asked_for_once(tmp_path: Path) -> None:
    async with resettable(tmp_path) as (b, backend):
        b.frontend._times = replace(b.frontend._times, reset_s=0.01)
        reopen = trio.Event()
        done = backend._reset_if_asked

        async def slowly() -> None:
            await done()
            await reopen.wait()

        backend._reset_if_asked = slowly  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.frontend.request_reset)
            await wait_until(lambda: "too long" in b.frontend.last_error)
            # It is Closed that is written once more, and not another request.
            assert await b.store.read(f"{b.paths.frontend}/reset-request") == b"7"
            reopen.set()
        assert backend.resets == 1
