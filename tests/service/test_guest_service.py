"""Following a guest whose device the bridge is, from one of its domains to the next."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import trio

from qemu_vtpm_bridge import guest_service
from qemu_vtpm_bridge.device_service import Registers
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.guest_service import GuestService
from qemu_vtpm_bridge.xen import lasting_store
from qemu_vtpm_bridge.xen.ioreq import GuestDevices
from tests.support.chain import Chain, running_chain
from tests.support.ioreq import TouchedServer
from tests.support.wait import wait_until
from tests.support.world import store_socket

DID_VID = 0xF00
IBM = 0x00011014
TIMES = 8


class NoDevices:
    """Devices that cannot be had; the first domain ends just then."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self.asked: list[int] = []

    def serve(self, domid: int) -> None:
        """Refuse."""
        self.asked.append(domid)
        if len(self.asked) == 1:
            trio.from_thread.run(self._chain.world.destroy_domain, domid)
            trio.from_thread.run(self._chain.world.create_domain, domid + 1, "guest")
        raise XenError("not here")


async def test_a_guest_that_ends_before_it_is_served_is_no_error(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        devices = NoDevices(chain)
        await chain.world.create_domain(30, "guest")
        service = GuestService(
            chain.bridge, Registers.CRB, "guest", devices=cast(GuestDevices, devices)
        )
        with pytest.raises(XenError, match="not here"), trio.fail_after(60):
            await service.run()
        # The second one is there, so that what is wrong with it is said.
        assert devices.asked == [30, 31]


class XenStoreAway:
    """The world's XenStore, killed and started again with what it held."""

    def __init__(self, chain: Chain) -> None:
        self._world = chain.world
        self._path = Path(store_socket(chain.world))

    async def go(self) -> None:
        """Take it away from all who are connected."""
        self._path.rename(f"{self._path}.away")
        senders = self._world._senders
        for connection, sender in list(senders.items()):
            if connection.domid == 0:
                sender.scope.cancel()
        await wait_until(lambda: not any(connection.domid == 0 for connection in senders))

    def come_back(self) -> None:
        Path(f"{self._path}.away").rename(self._path)

    def watched(self, path: str) -> bool:
        return any(
            path in (watch.path for watch in connection.watches)
            for connection in self._world._senders
        )


async def test_P1_a_guest_keeps_its_tpm_while_xenstore_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting_store, "RETRY_S", 0.01)
    monkeypatch.setattr(guest_service, "IoreqServer", TouchedServer)
    async with running_chain(tmp_path) as chain:
        xenstore = XenStoreAway(chain)
        await chain.world.create_domain(30, "guest")
        service = GuestService(chain.bridge, Registers.TIS, "guest", terminate=True)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.run)
                await wait_until(lambda: xenstore.watched("/local/domain/30/name"))
                server = cast(TouchedServer, service.server)
                for _ in range(TIMES):  # at one moment it reads, at another it waits
                    assert await trio.to_thread.run_sync(server.read, DID_VID) == IBM
                    await xenstore.go()
                    assert await trio.to_thread.run_sync(server.read, DID_VID) == IBM
                    xenstore.come_back()
                    await wait_until(lambda: xenstore.watched("/local/domain/30/name"))
                assert await trio.to_thread.run_sync(server.read, DID_VID) == IBM
                assert service.server is server
                assert server.enabled
                assert not server.closed
                await chain.world.destroy_domain(30)
        # The guest's end was noticed, or the service would still run.
        assert server.closed
        assert server.answered == 2 * TIMES + 1


async def test_a_guest_that_ends_under_its_device_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_chain(tmp_path) as chain:

        class BreakingServer(TouchedServer):
            """One whose first domain goes, with its event channels before its name."""

            def next(self, answer: bool, fd: int = -1) -> int:
                if self.domid == 30:
                    trio.from_thread.run(chain.world.destroy_domain, 30)
                    trio.from_thread.run(chain.world.create_domain, 31, "guest")
                    raise XenError("the event channels of domain 30 broke")
                return super().next(answer, fd)

        monkeypatch.setattr(guest_service, "IoreqServer", BreakingServer)
        await chain.world.create_domain(30, "guest")
        service = GuestService(chain.bridge, Registers.TIS, "guest")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.run)
            await wait_until(lambda: service.server and service.server.domid == 31)
            server = cast(TouchedServer, service.server)
            assert await trio.to_thread.run_sync(server.read, DID_VID) == IBM
            nursery.cancel_scope.cancel()
        assert server.closed
