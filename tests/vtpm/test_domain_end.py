"""How a vTPM domain ends: its frontend's entries removed, XenStore gone."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.toolstack.attach import attach, detach
from qemu_vtpm_bridge.vtpm.domain import VtpmConfig, VtpmDomain
from qemu_vtpm_bridge.xen.platform import Platform
from qemu_vtpm_bridge.xen.store import Store, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.support.world import running_world, store_socket, xen_socket
from tests.support.xenstored import XenStore

pytestmark = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")

VTPM = 2
PATHS = device_paths(PathMode.SEED, backend_domid=VTPM, handle=0)


def vtpm_domain(world: World, state_dir: Path) -> VtpmDomain:
    config = VtpmConfig(state_dir=state_dir, store_path=store_socket(world, VTPM))
    return VtpmDomain(config, lambda: Platform.open_embedded(xen_socket(world, VTPM)))


@asynccontextmanager
async def attached(world: World, paths: DevicePaths) -> AsyncIterator[Store]:
    """Domain 0's XenStore, with a device's entries in it."""
    async with open_store(store_socket(world)) as store:
        await attach(store, paths)
        yield store


async def wait_for(store: Store, path: str, value: bytes | None) -> None:
    """Return once a node has this value."""
    async with store.watch(path) as watch:
        while await store.try_read(path) != value:
            await watch.wait()


async def test_P8_removed_entries_are_let_go_and_new_ones_served(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with running_world(tmp_path, xenstore) as world, trio.open_nursery() as nursery:
        await world.create_domain(VTPM, "vtpm")
        async with attached(world, PATHS) as store:
            # As under a real toolstack: what was made implicitly is domain 0's, for nobody.
            await store.set_perms("/local/domain/0/frontend/vtpm", ["n0"])
            await store.set_perms("/local/domain/0/frontend/vtpm/2", ["n0"])
            domain = vtpm_domain(world, tmp_path / "state")
            await nursery.start(domain.run)
            await wait_for(store, f"{PATHS.backend}/state", b"2")
            await detach(store, PATHS)
            await attach(store, PATHS)
            await wait_for(store, f"{PATHS.backend}/state", b"2")
            assert domain.last_error == ""
            domain.close()


async def test_it_ends_when_told_to_after_xenstore_went_away(
    tmp_path: Path, xenstore: XenStore
) -> None:
    domain = None
    async with trio.open_nursery() as nursery:
        async with running_world(tmp_path, xenstore) as world:
            await world.create_domain(VTPM, "vtpm")
            domain = vtpm_domain(world, tmp_path / "state")
            await nursery.start(domain.run)
        domain.close()
        # The nursery ends only when the domain's `run` does.
    assert not domain.status()["engine"]["running"]
    assert (tmp_path / "state" / "fresh").exists()
