"""A tpmif frontend for tests: as well-behaved, as hasty or as hostile as they want it."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from qemu_vtpm_bridge._shim import ffi, lib
from qemu_vtpm_bridge.bridge.ring import FrontendPump
from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.vtpm.ordinals import COMMAND_TAGS, HEADER, TpmFamily
from qemu_vtpm_bridge.xen.platform import Channel, Page, Platform
from qemu_vtpm_bridge.xen.store import Store, Transaction, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, XenbusState
from tests.support.world import platform_of, store_socket

ANSWER_DEADLINE_S = 90.0
SUBMIT, FINISH, CANCEL = 1, 2, 3


class PageFrontend:
    """One frontend, in the domain that its store and platform act as."""

    def __init__(self, store: Store, platform: Platform, paths: DevicePaths) -> None:
        self.store = store
        self.platform = platform
        self.paths = paths
        self.page: Page | None = None
        self.channel: Channel | None = None
        self.pump = FrontendPump(120.0, {}, 5.0, COMMAND_TAGS)

    # XenStore.

    async def show(self, state: XenbusState) -> None:
        await self.store.write(f"{self.paths.frontend}/state", b"%d" % state)

    async def backend_shows(self, *wanted: XenbusState | None) -> None:
        """Wait until the backend's state is one of these; None stands for no state."""
        words = [None if state is None else b"%d" % state for state in wanted]
        async with self.store.watch(self.paths.backend) as watch:
            while await self.store.peek(f"{self.paths.backend}/state") not in words:
                await watch.wait()

    async def publish(self, **changes: bytes | None) -> None:
        """Make a page and a port and publish them; `changes` says what to write instead."""
        peer = self.paths.backend_domid
        self.page = await trio.to_thread.run_sync(self.platform.share_page, peer)
        self.channel = await trio.to_thread.run_sync(self.platform.alloc_unbound, peer)
        values: dict[str, bytes | None] = {
            "ring-ref": b"%d" % self.page.ref,
            "event-channel": b"%d" % self.channel.port,
            "feature-protocol-v2": b"1",
        } | {key.replace("_", "-"): value for key, value in changes.items()}

        async def write(transaction: Transaction) -> None:
            for key, value in values.items():
                if value is None:
                    await transaction.rm(f"{self.paths.frontend}/{key}")
                else:
                    await transaction.write(f"{self.paths.frontend}/{key}", value)

        await self.store.transact(write)
        self.pump.attach_ring(self.page, self.channel)

    async def connect(self, by: XenbusState = XenbusState.INITIALISED) -> None:
        """Go through the ritual; Mini-OS jumps to CONNECTED at once."""
        await self.backend_shows(XenbusState.INIT_WAIT)
        await self.publish()
        await self.show(by)
        await self.backend_shows(XenbusState.CONNECTED)
        await self.show(XenbusState.CONNECTED)

    async def close(self) -> None:
        """Close in order, and wait until the backend has let go."""
        await self.show(XenbusState.CLOSING)
        await self.show(XenbusState.CLOSED)
        await self.backend_shows(XenbusState.INIT_WAIT, None)
        await self.forget()

    async def forget(self) -> None:
        """Drop page and port."""
        self.pump.detach_ring()
        for resource in (self.page, self.channel):
            if resource is not None:
                await trio.to_thread.run_sync(resource.close)
        self.page = self.channel = None

    # The page.

    async def command(self, raw: bytes, locality: int = 0) -> bytes:
        """Run a TPM command and return the response."""
        return await self.pump.transact(raw, locality, ANSWER_DEADLINE_S)

    async def code(self, raw: bytes, locality: int = 0) -> int:
        return int(HEADER.unpack_from(await self.command(raw, locality))[2])

    def submit(self, raw: bytes, locality: int = 0) -> None:
        """Put a command on the page and say so, without waiting for anything."""
        assert self.page is not None
        assert self.channel is not None
        lib.tpmif_submit(self.page.cdata.shared, raw, len(raw), locality)
        self.channel.notify()

    def submit_as_it_is(self) -> None:
        """Notify, whatever is on the page."""
        assert self.channel is not None
        self.channel.notify()

    def cancel(self) -> bool:
        assert self.page is not None
        assert self.channel is not None
        cancelled = bool(lib.tpmif_cancel(self.page.cdata.shared))
        self.channel.notify()
        return cancelled

    def poke(self, offset: int, raw: bytes) -> None:
        assert self.page is not None
        ffi.buffer(self.page.cdata.shared, 4096)[offset : offset + len(raw)] = raw

    @property
    def state(self) -> int:
        assert self.page is not None
        return int(lib.tpmif_state(self.page.cdata.shared))

    async def state_becomes(self, wanted: int) -> None:
        assert self.channel is not None
        while self.state != wanted:
            with trio.move_on_after(0.05):  # an event may have been for an earlier change
                await trio.lowlevel.wait_readable(self.channel.fileno())
                await trio.lowlevel.checkpoint()

    async def answer(self) -> bytes:
        """Wait for the answer to what was submitted."""
        await self.state_becomes(FINISH)
        assert self.page is not None
        response = ffi.new("uint8_t[4088]")
        length = lib.tpmif_collect(self.page.cdata.shared, response)
        assert length >= 0
        return bytes(ffi.buffer(response, length))


@asynccontextmanager
async def page_frontend(world: World, paths: DevicePaths) -> AsyncIterator[PageFrontend]:
    """A frontend in its domain of a world."""
    domid = paths.frontend_domid
    async with (
        platform_of(world, domid) as platform,
        open_store(store_socket(world, domid)) as store,
    ):
        frontend = PageFrontend(store, platform, paths)
        try:
            yield frontend
        finally:
            with trio.CancelScope(shield=True):
                await frontend.forget()


# Commands.

RC_FAILURE = {TpmFamily.TPM_2_0: 0x101, TpmFamily.TPM_1_2: 9}


def startup(family: TpmFamily) -> bytes:
    if family is TpmFamily.TPM_2_0:
        return HEADER.pack(0x8001, 12, 0x144) + b"\0\0"
    return HEADER.pack(0xC1, 12, 0x99) + b"\0\x01"


def pcr_extend(family: TpmFamily, pcr: int) -> bytes:
    if family is TpmFamily.TPM_1_2:
        return HEADER.pack(0xC1, 34, 0x14) + struct.pack(">I", pcr) + b"m" * 20
    session = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
    body = struct.pack(">I", pcr) + session + struct.pack(">IH", 1, 0x0B) + b"m" * 32
    return HEADER.pack(0x8002, HEADER.size + len(body), 0x182) + body


def pcr_read(family: TpmFamily, pcr: int) -> bytes:
    if family is TpmFamily.TPM_1_2:
        return HEADER.pack(0xC1, 14, 0x15) + struct.pack(">I", pcr)
    selection = bytearray(3)
    selection[pcr // 8] = 1 << pcr % 8
    return HEADER.pack(0x8001, 20, 0x17E) + struct.pack(">IHB", 1, 0x0B, 3) + selection


def get_random(family: TpmFamily, count: int = 16) -> bytes:
    if family is TpmFamily.TPM_1_2:
        return HEADER.pack(0xC1, 14, 0x46) + struct.pack(">I", count)
    return HEADER.pack(0x8001, 12, 0x17B) + struct.pack(">H", count)


def shutdown(kind: int = 0) -> bytes:
    return HEADER.pack(0x8001, 12, 0x145) + struct.pack(">H", kind)


def create_primary() -> bytes:
    """Return TPM2_CreatePrimary of an RSA key, which takes a while."""
    public = (
        struct.pack(">HHIH", 0x0001, 0x000B, 0x00030072, 0)
        + struct.pack(">HHH", 0x0006, 128, 0x0043)
        + struct.pack(">HHI", 0x0010, 2048, 0)
        + struct.pack(">H", 0)
    )
    session = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
    body = struct.pack(">I", 0x40000001) + session
    body += struct.pack(">HHH", 4, 0, 0) + struct.pack(">H", len(public)) + public
    body += struct.pack(">HI", 0, 0)
    return HEADER.pack(0x8002, HEADER.size + len(body), 0x131) + body


async def pcr_value(frontend: PageFrontend, family: TpmFamily, pcr: int) -> bytes:
    answer = await frontend.command(pcr_read(family, pcr))
    assert HEADER.unpack_from(answer)[2] == 0
    return answer[-20 if family is TpmFamily.TPM_1_2 else -32 :]
