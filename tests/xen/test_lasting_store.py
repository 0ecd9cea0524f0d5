"""A connection to XenStore that several tasks share and that is made anew."""

from __future__ import annotations

import pytest
import trio

from qemu_vtpm_bridge.xen import lasting_store
from qemu_vtpm_bridge.xen.lasting_store import LastingStore
from qemu_vtpm_bridge.xen.store import KeptStore, Store, StoreError, first_to_return, open_store
from tests.support.wait import wait_until
from tests.support.xenstored import XenStore, running_daemon

SERVERS = [XenStore.XENSTORED, XenStore.OXENSTORED]


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.value)
async def test_all_go_on_with_one_new_connection(
    server: XenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting_store, "RETRY_S", 0.01)
    with running_daemon(server) as daemon:
        kept = KeptStore(str(daemon.socket))
        kept.keep(2)
        async with LastingStore(kept) as lasting:
            used: list[Store] = []

            async def look(store: Store) -> list[str]:
                used.append(store)
                return await store.ls("/")

            before = await lasting.use(look)
            assert before == await lasting.use(look)
            assert used[0] is used[1]
            await trio.to_thread.run_sync(daemon.restart)
            used.clear()
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(lasting.use, look)
            assert len({id(store) for store in used[-5:]}) == 1
        kept.close()


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.value)
async def test_P8_who_waits_for_several_watches_waits_on_with_another_connection(
    server: XenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting_store, "RETRY_S", 0.01)
    with running_daemon(server) as daemon:
        async with LastingStore(str(daemon.socket)) as lasting:
            waiting: list[Store] = []

            async def until_written(store: Store) -> None:
                async with store.watch("@releaseDomain") as other, store.watch("/node") as node:
                    await other.wait()
                    await node.wait()
                    waiting.append(store)
                    await first_to_return(other.wait, node.wait)

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(lasting.use, until_written)
                    await wait_until(lambda: len(waiting) == 1)
                    await trio.to_thread.run_sync(daemon.restart)
                    await wait_until(lambda: len(waiting) == 2)
                    async with open_store(str(daemon.socket)) as store:
                        await store.write("/node", b"1")


async def test_a_refusal_is_the_callers() -> None:
    with running_daemon(XenStore.XENSTORED) as daemon:
        async with LastingStore(str(daemon.socket)) as lasting:
            with pytest.raises(StoreError):
                await lasting.use(lambda store: store.read("/nothing/here"))
            assert await lasting.use(lambda store: store.try_read("/nothing/here")) is None
