"""The frontend's driver on a real XenStore protocol, against a tpmback that only XenStore shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from qemu_vtpm_bridge.bridge.frontend import State
from qemu_vtpm_bridge.xen.platform import Page
from qemu_vtpm_bridge.xen.xenbus import PathMode, XenbusState, device_paths
from tests.support.frontend_bench import VTPM, bench, write_entries
from tests.support.xenstored import XenStore

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("mode", [PathMode.SEED, PathMode.DEVICE, PathMode.ZEROS])
async def test_it_waits_for_entries_and_for_a_vtpm_domain_that_boots_later(
    tmp_path: Path, xenstore: XenStore, mode: PathMode
) -> None:
    async with bench(tmp_path, xenstore, mode) as b:
        b.start()
        await write_entries(b.store, b.paths)
        backend = await b.backend()
        await b.frontend.wait_running()
        await b.state_becomes(XenbusState.CONNECTED)
        assert backend.connected_to is not None
        assert b.user.calls == ["up"]


async def test_closing_without_a_vtpm_domain_ends(tmp_path: Path, xenstore: XenStore) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        ended = b.start()
        while b.frontend.machine.state is not State.WAIT_BACKEND:
            await trio.lowlevel.checkpoint()
        # It has looked at everything, and nothing but the request wakes it.
        await trio.testing.wait_all_tasks_blocked(cushion=0.2)
        b.frontend.ask_close()
        await ended.wait()


async def test_P6_closing_drains_first_and_leaves_clean_entries(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        backend = await b.backend()
        ended = b.start()
        await b.frontend.wait_running()
        b.user.idle = trio.Event()
        b.frontend.ask_close()
        while b.frontend.machine.state is not State.CLOSE_DRAINING:
            await trio.lowlevel.checkpoint()
        assert XenbusState.CLOSED not in backend.seen
        b.user.idle.set()
        await ended.wait()
        await b.state_becomes(XenbusState.INITIALISING)
        assert b.user.calls == ["up", "down", "forget"]
        assert await b.store.try_read(f"{b.paths.frontend}/ring-ref") is None
        assert XenbusState.CLOSED in backend.seen or XenbusState.INITIALISING in backend.seen


async def test_P8_a_killed_bridge_is_followed_by_one_that_passes_closed(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        for key, value in {"state": b"4", "ring-ref": b"9", "event-channel": b"3"}.items():
            await b.store.write(f"{b.paths.frontend}/{key}", value)
        backend = await b.backend()
        async with b.store.watch(f"{b.paths.backend}/state") as watch:
            while backend.connected_to is None:
                await watch.wait()
        assert backend.connected_to == (b"9", b"3")
        b.start()
        await b.frontend.wait_running()
        assert backend.connects == 2
        assert backend.connected_to != (b"9", b"3")


async def test_a_backend_that_refuses_is_asked_again(tmp_path: Path, xenstore: XenStore) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        backend = await b.backend()
        backend.refuse_connects = 2
        b.start()
        await b.frontend.wait_running()
        assert backend.connects == 1
        assert backend.refuse_connects == 0


async def test_P8_a_vtpm_domain_that_dies_and_returns_is_connected_again(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        backend = await b.backend()
        b.start()
        await b.frontend.wait_running()
        await b.store.rm(b.paths.backend)
        await b.state_becomes(XenbusState.INITIALISING)
        assert b.user.calls[:2] == ["up", "down"]
        await write_entries(b.store, b.paths)
        backend.connected_to = None
        await b.store.write(f"{b.paths.backend}/feature-protocol-v2", b"1")
        await backend.show(XenbusState.INIT_WAIT)
        await b.frontend.wait_running()
        assert backend.connects == 2


async def test_a_reset_is_asked_for_while_closed_and_only_where_it_is_offered(
    tmp_path: Path,
    xenstore: XenStore,
) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        await b.store.write(f"{b.paths.backend}/reset-count", b"6")
        backend = await b.backend()
        b.start()
        assert await b.frontend.request_reset() is False
        await b.store.write(f"{b.paths.backend}/feature-reset", b"1")
        b.frontend.ask_replace()
        while backend.connects < 2:
            await trio.lowlevel.checkpoint()
        assert await b.frontend.request_reset() is True
        assert await b.store.read(f"{b.paths.frontend}/reset-request") == b"7"
        assert backend.connects == 3


async def test_entries_that_are_removed_end_the_connection(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        await b.backend()
        b.start()
        await b.frontend.wait_running()
        await b.store.rm(b.paths.frontend)
        while b.frontend.machine.state is not State.WAIT_ENTRIES:
            await trio.lowlevel.checkpoint()
        assert b.user.calls == ["up", "down", "forget"]


async def test_P8_another_vtpm_domain_may_be_named_while_a_page_is_published(
    tmp_path: Path, xenstore: XenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        await b.backend()
        other = device_paths(PathMode.SEED, backend_domid=VTPM, handle=1)
        await write_entries(b.store, other)
        backend = await b.backend(other)
        share_page = b.platform.share_page

        def share(domid: int) -> Page:
            trio.from_thread.run_sync(b.frontend.retarget, other)
            monkeypatch.undo()
            return share_page(domid)

        monkeypatch.setattr(b.platform, "share_page", share)
        b.start()
        await b.frontend.wait_running()
        assert b.frontend.paths == other
        assert backend.connects == 1
        assert b.user.calls == ["forget", "up"]


async def test_P9_entries_that_contradict_each_other_are_not_used(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with bench(tmp_path, xenstore) as b:
        await write_entries(b.store, b.paths)
        await b.store.write(f"{b.paths.backend}/frontend", b"/local/domain/0/device/vtpm/7")
        b.start()
        await b.backend()
        while not b.frontend.last_error:
            await trio.lowlevel.checkpoint()
        assert b.frontend.machine.state is State.WAIT_ENTRIES
        assert "expected" in b.frontend.last_error
        assert b.user.calls == []
