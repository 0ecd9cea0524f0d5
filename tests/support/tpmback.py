"""A tpmback that lives in XenStore alone: it plays Mini-OS' part of the ritual, and its lapses.

It maps nothing and answers no command; what it is for is the frontend's driver,
whose writes it judges as tpmback would.  Where `feature-reset` stands in its entries it
counts power cycles as our own vTPM domain does.
"""

from __future__ import annotations

import trio

from qemu_vtpm_bridge.xen.store import Store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, XenbusState, parse_state


class StoreOnlyTpmback:
    """The backend of one device, as far as XenStore shows it."""

    def __init__(self, store: Store, paths: DevicePaths) -> None:
        self.store = store
        self.paths = paths
        self.connected_to: tuple[bytes, bytes] | None = None
        self.connects = 0
        self.refuse_connects = 0
        self.resets = 0
        self.seen: list[XenbusState | None] = []

    async def show(self, state: XenbusState) -> None:
        """Write the backend's state."""
        await self.store.write(f"{self.paths.backend}/state", str(int(state)).encode())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """React to the frontend's states until cancelled."""
        await self.store.write(f"{self.paths.backend}/feature-protocol-v2", b"1")
        await self.show(XenbusState.INIT_WAIT)
        async with self.store.watch(f"{self.paths.frontend}/state") as watch:
            task_status.started()
            while True:
                await watch.wait()
                raw = await self.store.try_read(f"{self.paths.frontend}/state")
                await self._react(parse_state(raw))

    async def _react(self, state: XenbusState | None) -> None:
        self.seen.append(state)
        if state in (XenbusState.INITIALISED, XenbusState.CONNECTED):
            if self.connected_to is None:
                await self._connect()
        elif state is XenbusState.CLOSING:
            await self.show(XenbusState.CLOSING)
        elif state is XenbusState.CLOSED:
            self.connected_to = None
            await self._reset_if_asked()
            await self.show(XenbusState.INIT_WAIT)
        elif state is None:
            await self.store.rm(self.paths.backend)

    async def _reset_if_asked(self) -> None:
        backend = self.paths.backend
        asked = await self.store.try_read(f"{self.paths.frontend}/reset-request")
        count = await self.store.try_read(f"{backend}/reset-count") or b"0"
        offered = await self.store.try_read(f"{backend}/feature-reset") == b"1"
        if offered and asked not in (None, count):
            self.resets += 1
            await self.store.write(f"{backend}/reset-count", asked)

    async def _connect(self) -> None:
        if self.refuse_connects:
            self.refuse_connects -= 1
            await self.show(XenbusState.CLOSED)
            return
        frontend = self.paths.frontend
        self.connected_to = (
            await self.store.read(f"{frontend}/ring-ref"),
            await self.store.read(f"{frontend}/event-channel"),
        )
        self.connects += 1
        await self.show(XenbusState.CONNECTED)
