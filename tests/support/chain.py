"""A bridge and a vTPM domain on an embedded Xen, in this process; swtpm is a real one."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from qemu_vtpm_bridge.bridge.chardev import Door, DoorConfig, TpmBehind
from qemu_vtpm_bridge.bridge.listen import Listener, open_listener
from qemu_vtpm_bridge.bridge.power import ResetPolicy
from qemu_vtpm_bridge.bridge.power import State as Power
from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.service import Bridge, BridgeConfig
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.vtpm.domain import VtpmConfig, VtpmDomain
from qemu_vtpm_bridge.vtpm.ordinals import TpmFamily
from qemu_vtpm_bridge.xen.platform import Platform
from qemu_vtpm_bridge.xen.store import open_store
from qemu_vtpm_bridge.xen.xenbus import PathMode, device_paths
from tests.support.swtpm_client import SwtpmClient
from tests.support.wait import wait_until
from tests.support.world import platform_of, running_world, store_socket, xen_socket
from tests.support.xenstored import XenStore

VTPM = 2
PATHS = device_paths(PathMode.SEED, backend_domid=VTPM, handle=0)


@dataclass
class Chain:
    """Everything between a client and swtpm."""

    world: World
    nursery: trio.Nursery
    state_dir: Path
    socket_path: Path
    bridge: Bridge
    door: Door
    family: Family
    domain: VtpmDomain | None = None
    vtpm_ended: trio.Event = field(default_factory=trio.Event)
    served: trio.Event = field(default_factory=trio.Event)
    """The door's `serve` has returned."""
    clients: list[SwtpmClient] = field(default_factory=list)

    async def start_vtpm(self, domid: int = VTPM, **config: Any) -> VtpmDomain:
        """Boot the vTPM domain's program."""
        defaults: dict[str, Any] = {
            "state_dir": self.state_dir,
            "family": TpmFamily(self.family.value),
            "store_path": store_socket(self.world, domid),
        }
        domain = VtpmDomain(
            VtpmConfig(**defaults | config),
            lambda: Platform.open_embedded(xen_socket(self.world, domid)),
        )
        self.vtpm_ended = ended = trio.Event()

        async def run(task_status: trio.TaskStatus[None]) -> None:
            try:
                await domain.run(task_status=task_status)
            finally:
                ended.set()

        await self.nursery.start(run)
        self.domain = domain
        return domain

    async def end_vtpm(self) -> None:
        """End the vTPM domain's program, and return once its state is free for another."""
        assert self.domain is not None
        self.domain.close()
        await self.vtpm_ended.wait()

    async def connect(self) -> SwtpmClient:
        """Connect to the control socket; the client is closed with the chain, if not before."""
        client = await SwtpmClient.connect(self.socket_path)
        self.clients.append(client)
        return client

    async def powered_on(self) -> SwtpmClient:
        """Return a client that did what QEMU does at its start, and TPM2_Startup."""
        client = await self.connect()
        await client.power_on()
        await client.startup(self.family)
        return client

    async def until(self, wanted: Power) -> None:
        """Return once the reset contract is in this state."""
        await wait_until(lambda: self.bridge.power.state is wanted)

    @property
    def swtpm_pid(self) -> int:
        """The process that is the TPM."""
        assert self.domain is not None
        return self.domain._engine.child.pid


@asynccontextmanager
async def running_chain(
    tmp_path: Path,
    *,
    server: XenStore = XenStore.EMBEDDED,
    vtpm: bool = True,
    family: Family = Family.TPM_2_0,
    door: DoorConfig | None = None,
    vtpm_config: dict[str, Any] | None = None,
    tap: Callable[[Bridge, trio.Nursery], TpmBehind] | None = None,
    **config: Any,
) -> AsyncIterator[Chain]:
    """Give a chain that listens; with `vtpm` its domain is up, and the frontend connected.

    `server` is its XenStore.  `tap` puts something between the door and the bridge.
    """
    async with running_world(tmp_path, server) as world:
        await world.create_domain(VTPM, "vtpm")
        async with open_store(store_socket(world)) as store:
            await attach(store, PATHS)
        with tempfile.TemporaryDirectory(prefix="qvb") as directory:
            path = Path(directory) / "tpm.sock"
            async with (
                _listening(path) as listener,
                platform_of(world) as platform,
                trio.open_nursery() as nursery,
            ):
                defaults: dict[str, Any] = {
                    "paths": PATHS,
                    "family": family,
                    "reset": ResetPolicy.VERIFIED,
                    "store_path": store_socket(world),
                }
                bridge = Bridge(BridgeConfig(**defaults | config), platform)
                chain = Chain(
                    world,
                    nursery,
                    tmp_path / "state",
                    path,
                    bridge,
                    Door(tap(bridge, nursery) if tap else bridge, door),
                    family,
                )
                await nursery.start(bridge.run)
                nursery.start_soon(_serve, chain, listener)
                if vtpm:
                    await chain.start_vtpm(**vtpm_config or {})
                    with trio.fail_after(60):
                        await bridge.frontend.wait_running()
                try:
                    yield chain
                finally:
                    for client in chain.clients:
                        client.close()
                    nursery.cancel_scope.cancel()


@asynccontextmanager
async def _listening(path: Path) -> AsyncIterator[Listener]:
    listener = open_listener(str(path))
    try:
        yield listener
    finally:
        listener.close()


async def _serve(chain: Chain, listener: Any) -> None:
    await chain.door.serve(listener)
    chain.served.set()
