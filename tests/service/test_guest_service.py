"""Following a guest whose device the bridge is, from one of its domains to the next."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import trio

from qemu_vtpm_bridge.device_service import Registers
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.guest_service import GuestService
from qemu_vtpm_bridge.xen.ioreq import GuestDevices
from tests.support.chain import Chain, running_chain


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
