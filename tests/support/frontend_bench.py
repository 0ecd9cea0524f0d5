"""A frontend's driver in an embedded world, without the pump."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from qemu_vtpm_bridge.bridge.frontend_driver import Frontend, FrontendTimes
from qemu_vtpm_bridge.xen.platform import Channel, Page, Platform
from qemu_vtpm_bridge.xen.store import Store, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, XenbusState, device_paths
from tests.support.tpmback import StoreOnlyTpmback
from tests.support.world import platform_of, running_world, store_socket
from tests.support.xenstored import XenStore

VTPM = 2


class Recorder:
    """Takes the pump's place: notes what the frontend tells its user."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.idle = trio.Event()
        self.idle.set()

    async def ring_up(self, page: Page, channel: Channel) -> None:
        del page, channel
        self.calls.append("up")

    async def ring_down(self) -> None:
        self.calls.append("down")

    async def ring_drained(self) -> None:
        await self.idle.wait()

    async def ring_forget(self) -> None:
        self.calls.append("forget")


@dataclass
class Bench:
    """One device in one world."""

    store: Store
    paths: DevicePaths
    user: Recorder
    frontend: Frontend
    nursery: trio.Nursery
    store_path: str
    platform: Platform

    def start(self) -> trio.Event:
        """Run the frontend; return the event of its end."""
        ended = trio.Event()

        async def run() -> None:
            await self.frontend.run(self.store)
            ended.set()

        self.nursery.start_soon(run)
        return ended

    async def backend(self, paths: DevicePaths | None = None) -> StoreOnlyTpmback:
        """Boot the vTPM domain, for the device or for another one."""
        backend = StoreOnlyTpmback(self.store, paths or self.paths)
        await self.nursery.start(backend.run)
        return backend

    async def entries_anew(self, backend: StoreOnlyTpmback) -> None:
        """Attach the device again to a vTPM domain that is up."""
        await write_entries(self.store, self.paths)
        backend.connected_to = None
        await self.store.write(f"{self.paths.backend}/feature-protocol-v2", b"1")
        await backend.show(XenbusState.INIT_WAIT)

    async def state_becomes(self, wanted: XenbusState) -> None:
        """Wait until the frontend has published this state."""
        path = f"{self.frontend.paths.frontend}/state"
        async with self.store.watch(path) as watch:
            while await self.store.try_read(path) != b"%d" % wanted:
                await watch.wait()


async def write_entries(store: Store, paths: DevicePaths) -> None:
    """Write what a toolstack writes."""
    for path, value in {
        f"{paths.frontend}/backend": paths.backend,
        f"{paths.frontend}/backend-id": str(paths.backend_domid),
        f"{paths.frontend}/state": "1",
        f"{paths.backend}/frontend": paths.frontend,
        f"{paths.backend}/frontend-id": str(paths.frontend_domid),
        f"{paths.backend}/state": "1",
    }.items():
        await store.write(path, value.encode())


@asynccontextmanager
async def bench(
    tmp_path: Path, server: XenStore = XenStore.EMBEDDED, mode: PathMode = PathMode.SEED
) -> AsyncIterator[Bench]:
    """Give a world with a vTPM domain's place in it, and a frontend that is not yet run."""
    paths = device_paths(mode, backend_domid=VTPM, handle=0)
    times = FrontendTimes(grace_s=0.01, reset_s=20, connect_s=20, drain_s=20, close_s=20)
    async with running_world(tmp_path, server) as world:
        await world.create_domain(VTPM, "vtpm")
        async with (
            platform_of(world) as platform,
            open_store(store_socket(world)) as store,
            trio.open_nursery() as n,
        ):
            user = Recorder()
            frontend = Frontend(paths, platform, user, times=times)
            yield Bench(store, paths, user, frontend, n, store_socket(world), platform)
            n.cancel_scope.cancel()
