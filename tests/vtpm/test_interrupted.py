"""The vTPM domain when XenStore, its process or swtpm ends in the middle of what it does."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import socket
import struct
import termios
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.vtpm.device import Device
from qemu_vtpm_bridge.vtpm.domain import VtpmDomain
from qemu_vtpm_bridge.vtpm.engine import SwtpmEngine
from qemu_vtpm_bridge.vtpm.ordinals import TpmFamily
from qemu_vtpm_bridge.vtpm.pump import BackendPump
from qemu_vtpm_bridge.xen.store import Store, StoreGone, open_store
from qemu_vtpm_bridge.xen.xenbus import XenbusState
from tests.support.page_frontend import (
    PageFrontend,
    page_frontend,
    pcr_extend,
    pcr_read,
    startup,
)
from tests.support.vtpm import GUEST, QEMU, VTPM, Place, place
from tests.support.wait import wait_until
from tests.support.world import store_socket

pytestmark = [
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
    pytest.mark.timeout(120),
]

TPM2 = TpmFamily.TPM_2_0
POSTINIT = 0x100


def end_xenstore(p: Place) -> None:
    """End the vTPM domain's connection to XenStore."""
    for connection, sender in list(p.world._senders.items()):
        if connection.domid == VTPM:
            sender.scope.cancel()


async def use(frontend: PageFrontend) -> None:
    """Connect, and give the TPM something to forget."""
    await frontend.connect()
    assert await frontend.code(startup(TPM2)) == 0
    assert await frontend.code(pcr_extend(TPM2, 7)) == 0


async def ask_for_reset(frontend: PageFrontend) -> None:
    await frontend.store.write(f"{frontend.paths.frontend}/reset-request", b"1")
    await frontend.show(XenbusState.CLOSED)


async def count_once_reopened(frontend: PageFrontend) -> bytes | None:
    """Return the count of resets as it is when the backend shows InitWait."""
    with trio.fail_after(60):
        await frontend.backend_shows(XenbusState.INIT_WAIT)
    return await frontend.store.peek(f"{frontend.paths.backend}/reset-count")


async def finds_it_power_cycled(frontend: PageFrontend) -> None:
    """Connect anew: the TPM waits for Startup."""
    await frontend.forget()
    await frontend.connect()
    assert await frontend.code(pcr_read(TPM2, 7)) == POSTINIT


class PowerCycles:
    """A domain's power cycles, the first of which is never done."""

    def __init__(self, domain: VtpmDomain, when_first: Callable[[], None]) -> None:
        self.begun = 0
        self._when_first = when_first
        self._done: Callable[[], Awaitable[bool]] = domain.power_cycle
        domain.power_cycle = self  # type: ignore[assignment, method-assign]

    async def __call__(self) -> bool:
        self.begun += 1
        if self.begun == 1:
            self._when_first()
            await trio.sleep_forever()
        return await self._done()


async def test_P7_a_reset_that_xenstores_end_cut_short_is_done_before_the_backend_reopens(
    tmp_path: Path,
) -> None:
    async with place(tmp_path) as p, p.domain() as domain:
        await p.attach(QEMU)
        async with page_frontend(p.world, QEMU) as frontend:
            await use(frontend)
            cycles = PowerCycles(domain, lambda: end_xenstore(p))
            await ask_for_reset(frontend)
            assert await count_once_reopened(frontend) == b"1"
            assert cycles.begun == 2
            await finds_it_power_cycled(frontend)


async def test_P7_a_reset_that_the_process_end_cut_short_is_done_before_the_next_reopens(
    tmp_path: Path,
) -> None:
    async with place(tmp_path) as p:
        await p.attach(QEMU)
        async with page_frontend(p.world, QEMU) as frontend:
            async with p.domain() as domain:
                await use(frontend)
                cycles = PowerCycles(domain, lambda: None)
                await ask_for_reset(frontend)
                await wait_until(lambda: cycles.begun)
            async with p.domain():
                assert await count_once_reopened(frontend) == b"1"
                await finds_it_power_cycled(frontend)


async def test_a_power_cycle_that_is_cut_short_leaves_the_pump_nothing_of_swtpms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its descriptors' numbers are somebody else's soon after it was ended."""
    given: list[tuple[int | None, int | None]] = []
    left: list[tuple[int | None, int | None]] = []
    set_engine, kill = BackendPump.set_engine, SwtpmEngine.kill

    def note(pump: BackendPump, data_fd: int | None, control_fd: int | None) -> None:
        given.append((data_fd, control_fd))
        set_engine(pump, data_fd, control_fd)

    async def note_and_kill(engine: SwtpmEngine) -> None:
        left.append(given[-1])
        await kill(engine)

    monkeypatch.setattr(BackendPump, "set_engine", note)
    monkeypatch.setattr(SwtpmEngine, "kill", note_and_kill)
    async with place(tmp_path) as p, p.domain() as domain:
        await p.attach(QEMU)
        async with page_frontend(p.world, QEMU) as frontend:
            await use(frontend)
            child = domain._engine.child
            os.kill(child.pid, signal.SIGSTOP)
            await ask_for_reset(frontend)
            await wait_until(lambda: unread_bytes(child.data))
            end_xenstore(p)
            assert await count_once_reopened(frontend) == b"1"
            assert left[0] == (None, None)


def unread_bytes(data: socket.socket) -> int:
    """Return how much of what was sent on a socket its peer has not read."""
    (unread,) = struct.unpack("i", fcntl.ioctl(data, termios.TIOCOUTQ, bytes(4)))
    return int(unread)


async def test_P7_a_reset_whose_swtpm_fails_is_counted_and_not_done_again(tmp_path: Path) -> None:
    async with place(tmp_path) as p, p.domain() as domain:
        await p.attach(QEMU)
        async with page_frontend(p.world, QEMU) as frontend:
            await use(frontend)
            os.kill(domain._engine.child.pid, signal.SIGKILL)
            domain._engine_not_before = trio.current_time() + 1000
            await ask_for_reset(frontend)
            # It is off, and comes on anew for the next command or after it.
            assert await count_once_reopened(frontend) == b"1"
            domain._engine_not_before = trio.current_time()
            await frontend.forget()
            await frontend.connect()
            await frontend.code(pcr_read(TPM2, 7))  # may find that it is off
            assert await frontend.code(pcr_read(TPM2, 7)) == POSTINIT
            await frontend.close()
            await frontend.connect()
            assert domain.status()["frontends"][0]["resets"] == 1


async def test_P7_a_reset_of_a_tpm_that_is_off_is_a_power_cycle(tmp_path: Path) -> None:
    async with place(tmp_path) as p, p.domain() as domain:
        await p.attach(QEMU)
        async with page_frontend(p.world, QEMU) as frontend:
            await use(frontend)
            os.kill(domain._engine.child.pid, signal.SIGKILL)
            domain._engine_not_before = trio.current_time() + 1000
            assert await frontend.code(pcr_read(TPM2, 7)) != 0
            await wait_until(lambda: not domain._engine.running)
            domain._engine_not_before = trio.current_time()
            await ask_for_reset(frontend)
            assert await count_once_reopened(frontend) == b"1"
            await finds_it_power_cycled(frontend)


async def test_P7_a_reset_that_cannot_be_promised_on_disk_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place(tmp_path) as p, p.domain() as domain:
        await p.attach(QEMU)
        async with page_frontend(p.world, QEMU) as frontend:
            await use(frontend)

            def full() -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            monkeypatch.setattr(domain._engine._snapshot, "power_on", full)
            await ask_for_reset(frontend)
            assert await count_once_reopened(frontend) is None
            assert domain.status()["frontends"][0]["resets"] == 0


async def test_entries_of_a_guest_that_ended_are_removed_by_the_next_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Device._write_state
    async with place(tmp_path) as p, p.domain() as domain:
        failures: list[XenbusState] = []

        async def write(device: Device, store: Store, state: XenbusState) -> None:
            if device.gone and not failures:
                failures.append(state)
                end_xenstore(p)
                raise StoreGone("by the test")
            await original(device, store, state)

        monkeypatch.setattr(Device, "_write_state", write)
        await p.attach(GUEST)
        async with page_frontend(p.world, GUEST) as guest:
            await use(guest)
            await p.world.destroy_domain(GUEST.frontend_domid)
        async with (
            open_store(store_socket(p.world)) as store,
            store.watch(GUEST.backend) as watch,
        ):
            with trio.fail_after(20):
                while await store.try_read(f"{GUEST.backend}/frontend") is not None:
                    await watch.wait()
        assert failures == [XenbusState.CLOSED]
        await wait_until(lambda: not domain._devices)
