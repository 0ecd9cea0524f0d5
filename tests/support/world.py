"""Embedded worlds for tests."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import trio

from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.xen.platform import Platform
from tests.support.xenstored import DaemonWorld, XenStore, running_daemon


@asynccontextmanager
async def running_world(
    tmp_path: Path, server: XenStore = XenStore.EMBEDDED
) -> AsyncIterator[World]:
    """Give a world that is served in this process until the block ends.

    Its directory is a short one: unix sockets' paths are limited, pytest's are long.
    Where `server` is a daemon, the world's XenStore is that process.
    """
    del tmp_path
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvb")))
        if server is XenStore.EMBEDDED:
            world = World(directory)
        else:
            world = DaemonWorld(directory, stack.enter_context(running_daemon(server)))
        async with trio.open_nursery() as nursery:
            await nursery.start(world.serve)
            yield world
            nursery.cancel_scope.cancel()


def store_socket(world: World, domid: int = 0) -> str:
    """Return the path of a domain's XenStore socket."""
    return str(world.directory / "dom" / str(domid) / "xenstored.sock")


def xen_socket(world: World, domid: int = 0) -> str:
    """Return the path of a domain's hypervisor socket."""
    return str(world.directory / "dom" / str(domid) / "xen.sock")


@asynccontextmanager
async def platform_of(world: World, domid: int = 0) -> AsyncIterator[Platform]:
    """Give the grants and event channels of a domain.

    Its calls block, and the world that answers them lives in this very thread, so they
    go through others.
    """
    platform = await trio.to_thread.run_sync(Platform.open_embedded, xen_socket(world, domid))
    try:
        yield platform
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(platform.close)
