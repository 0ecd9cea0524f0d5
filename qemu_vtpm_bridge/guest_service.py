"""Being a guest's TPM under Xen: wires a bridge, a register device and an ioreq server.

Theory of operation.  `service.Bridge` is the TPM, as it is behind QEMU's door.  The
guest is followed by its name: each domain that bears it is one boot of the guest, so a
reboot is a new server, a device with reset values and, by the reset contract, a TPM that
has shown that it was power-cycled.  The server is there before the guest runs: Xen
introduces a domain to XenStore long before its toolstack unpauses it.

A bridge that is killed leaves a virtual CPU waiting, its server to Xen and two notes in
the guest's directory in XenStore, which only domain 0 can read and write and which ends
with the guest: which server it was, and that the TPM was seen to be power-cycled.  The
next bridge takes the server over and answers the CPU; the TPM runs on, as it is the same
boot, and the device begins with reset values, which costs the driver one command.  The
server is noted before it is enabled, so there is none that answers and is unknown.  Where
no evidence was seen before the kill, it is asked for again.

However else this ends, the range is given up: the guest then finds no TPM, and goes on.

Keeps P1, P7, P8 and P9.  Who may lie: the guest, with every access.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import trio

from .bridge.device import RegisterDevice
from .bridge.ioreq import TPM_BASE, TPM_LAST, serve
from .bridge.mmio import Mmio
from .device_service import Registers, devices_for
from .errors import XenError, ungrouped
from .service import Bridge
from .xen.domains import tell_hvmloader, write_while_there
from .xen.ioreq import GuestDevices, IoreqServer
from .xen.lasting_store import LastingStore
from .xen.store import Store, StoreError, StoreGone, Transaction, domains_named, first_to_return
from .xen.store_policy import GUEST_DIRECTORY, POWERED_KEY, SERVER_KEY
from .xen.xenbus import parse_number, printable

log = logging.getLogger(__name__)

SERVER_ID_MAX: Final = 0xFFFF


async def find_guest(store: Store, name: str) -> int | None:
    """Return the id of the domain of this name, the newest of several, None where there is none."""
    return max(await domains_named(store, name), default=None)


class GuestService:
    """Serves the TPM's registers of the guest `name` with the TPM of `bridge`."""

    def __init__(
        self,
        bridge: Bridge,
        registers: Registers,
        name: str,
        *,
        terminate: bool = False,
        devices: GuestDevices | None = None,
    ) -> None:
        """`devices` are to be told of each boot's domain, where they serve one at a time."""
        (self._kind,) = registers.kinds
        self._bridge = bridge
        self._registers = registers
        self.name = name
        self._terminate = terminate
        self._devices = devices
        self._limiter = trio.CapacityLimiter(1)
        self._store = LastingStore(bridge.config.store_path)
        self._mmio: Mmio | None = None
        self.server: IoreqServer | None = None
        """The server of the boot that is being served."""
        self.boots = 0
        """Domains served so far."""
        self.adopted = 0
        """Servers taken over from a bridge that was killed."""

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until cancelled or, where so asked, until the guest has ended.

        Calls `on_ready` once the guest's server is enabled or, where there is no guest yet,
        at once.  Cancelling gives the range up.  Raises XenError where Xen refuses the server.
        """
        async with self._store:
            domid = await self._store.use(lambda store: find_guest(store, self.name))
            if domid is None:
                log.info("waiting for a guest named %s", printable(self.name.encode()))
                on_ready()
            while True:
                domid = domid or await self._appeared()
                try:
                    await self._serve(domid, on_ready)
                except StoreGone:
                    raise  # the broker has ended, and there will be no devices
                except XenError as error:
                    # A guest that was destroyed before it was served is no reason to end.
                    place = f"/local/domain/{domid}/name"
                    if await self._store.use(partial(Store.try_read, path=place)) is not None:
                        raise
                    log.info("domain %d has gone: %s", domid, error.cause)
                if self._terminate:
                    return
                domid = None

    async def _serve(self, domid: int, on_ready: Callable[[], None]) -> None:
        """Serve one domain until it has gone."""
        near, far = socket.socketpair()
        with near:
            await self._bridge.attach_data(far)
            try:
                (device,) = await devices_for(self._bridge, [self._kind])
                mmio = Mmio([device], self._bridge, near)
                mmio.reset()
                async with self._server_for(domid) as (server, powered):
                    self._mmio, self.server = mmio, server
                    self.boots += 1
                    on_ready()
                    await self._serve_with(server, mmio, device, domid, powered)
            finally:
                self._mmio = self.server = None
                with trio.CancelScope(shield=True):
                    await self._bridge.stop()
                    await self._bridge.detach_data()

    async def _serve_with(
        self, server: IoreqServer, mmio: Mmio, device: RegisterDevice, domid: int, powered: bool
    ) -> None:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._switch_on, domid, powered)
                nursery.start_soon(self._stop_when_gone, server, domid)
                await trio.to_thread.run_sync(serve, server, mmio, device, limiter=self._limiter)
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def _server_for(self, domid: int) -> AsyncIterator[tuple[IoreqServer, bool]]:
        """Give the domain's server, enabled and noted, and whether its boot has been powered."""
        noted, powered = await self._store.use(lambda store: self._notes(store, domid))
        if self._devices is not None:
            await trio.to_thread.run_sync(self._devices.serve, domid)
        server = None
        if noted is not None:
            try:
                server = IoreqServer(domid, adopt=noted)
                self.adopted += 1
            except XenError as error:
                log.info("the server of the bridge before is gone: %s", error.cause)
        server = server or IoreqServer(domid)
        adopting = server.id == noted
        try:
            await self._store.use(lambda store: self._note_server(store, domid, server.id))
            server.enable(TPM_BASE, TPM_LAST)
            adopting = False
            log.info(
                "domain %d (%s): %s registers, ioreq server %d, %d virtual CPUs%s",
                domid,
                printable(self.name.encode()),
                self._registers.value,
                server.id,
                server.vcpus,
                "; the boot goes on" if powered else "",
            )
            yield server, powered
        finally:
            if adopting:
                server.abandon()  # another bridge has it, which goes on
            else:
                server.close()

    # The reset contract.

    async def _switch_on(self, domid: int, powered: bool) -> None:
        if powered:
            await self._bridge.init(resume=True)
            return
        await self._bridge.stop()
        await self._bridge.init(resume=False)
        if await self._bridge.settled():
            await self._store.use(lambda store: self._note(store, domid, POWERED_KEY, b"1"))

    # XenStore.

    async def _notes(self, store: Store, domid: int) -> tuple[int | None, bool]:
        """Return the server that was noted for this domain, and whether it was powered."""
        notes = f"/local/domain/{domid}/{GUEST_DIRECTORY}"
        raw = await store.peek(f"{notes}/{SERVER_KEY}")
        noted = None if raw is None else parse_number(raw, SERVER_KEY, SERVER_ID_MAX)
        return noted, await store.peek(f"{notes}/{POWERED_KEY}") is not None

    async def _note(self, store: Store, domid: int, key: str, value: bytes) -> None:
        notes = f"/local/domain/{domid}/{GUEST_DIRECTORY}"

        async def write(transaction: Transaction) -> None:
            await transaction.mkdir(notes)
            await transaction.set_perms(notes, ["n0"])
            await transaction.write(f"{notes}/{key}", value)

        await _while_ours(domid, write_while_there(store, domid, write))

    async def _note_server(self, store: Store, domid: int, server: int) -> None:
        await self._note(store, domid, SERVER_KEY, str(server).encode())
        await _while_ours(domid, tell_hvmloader(store, domid, self._registers.value))

    async def _appeared(self) -> int:
        """Return the domain of the guest once there is one."""

        async def look(store: Store) -> int:
            async with store.watch("@introduceDomain") as watch:
                while True:
                    domid = await find_guest(store, self.name)
                    if domid is not None:
                        return domid
                    await watch.wait()

        return await self._store.use(look)

    async def _stop_when_gone(self, server: IoreqServer, domid: int) -> None:
        """Stop the thread when the domain has gone, or this is cancelled."""

        async def gone(store: Store) -> None:
            place = f"/local/domain/{domid}/name"
            async with store.watch("@releaseDomain") as released, store.watch(place) as removed:
                while await store.try_read(place) is not None:
                    await first_to_return(released.wait, removed.wait)

        try:
            await self._store.use(gone)
            log.info("domain %d has gone", domid)
        finally:
            server.stop()

    # Telling.

    def status(self) -> dict[str, Any]:
        """Return the part of the status document that is about the guest."""
        server, mmio = self.server, self._mmio
        return {
            "name": self.name,
            "registers": self._registers.value,
            "domid": server.domid if server else None,
            "ioreq-server": server.id if server else None,
            "vcpus": server.vcpus if server else 0,
            "boots": self.boots,
            "adopted": self.adopted,
            "accesses": server.answered if server else 0,
            "commands": mmio.commands if mmio else 0,
        }


async def _while_ours(domid: int, writing: Awaitable[object]) -> None:
    """Do without what was to be written where the broker says that it may not be."""
    try:
        await writing
    except StoreError as error:
        # The broker's word for a domain that is no boot of the guest any more.
        if error.errno != errno.EACCES:
            raise
        log.info("domain %d: %s", domid, error.cause)
