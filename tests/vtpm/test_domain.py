"""The vTPM domain on the embedded Xen, with swtpm and frontends of every manner."""

from __future__ import annotations

import os
import shutil
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack.attach import attach, detach
from qemu_vtpm_bridge.vtpm.device import Device
from qemu_vtpm_bridge.vtpm.domain import VtpmDomain
from qemu_vtpm_bridge.vtpm.ordinals import HEADER, TpmFamily
from qemu_vtpm_bridge.xen.store import Transaction, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, XenbusState, device_paths
from tests.support.page_frontend import (
    CANCEL,
    RC_FAILURE,
    SUBMIT,
    PageFrontend,
    create_primary,
    get_random,
    page_frontend,
    pcr_extend,
    pcr_read,
    pcr_value,
    shutdown,
    startup,
)
from tests.support.vtpm import GUEST, QEMU, STUB, VTPM, Place, place, stopped
from tests.support.wait import wait_until
from tests.support.world import store_socket

pytestmark = [
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
    pytest.mark.timeout(180),
]

FAMILIES = list(TpmFamily)
TPM2 = TpmFamily.TPM_2_0
POSTINIT = {TpmFamily.TPM_2_0: 0x100, TpmFamily.TPM_1_2: 0x26}


@asynccontextmanager
async def one_frontend(
    tmp_path: Path, paths: DevicePaths = QEMU, family: TpmFamily = TPM2, **changes: object
) -> AsyncIterator[tuple[Place, VtpmDomain, PageFrontend]]:
    """A vTPM domain with one connected frontend and a started TPM."""
    async with place(tmp_path, family) as p, p.domain(**changes) as domain:
        await p.attach(paths)
        async with page_frontend(p.world, paths) as frontend:
            await frontend.connect()
            assert await frontend.code(startup(family)) == 0
            yield p, domain, frontend


def swtpm_pid(domain: VtpmDomain) -> int:
    return domain._engine.child.pid


async def in_the_tpms_hand(domain: VtpmDomain, commands: int) -> None:
    """Wait until the pump has taken so many commands in all."""
    await wait_until(lambda: domain._pump.stats().commands >= commands)
    await wait_until(lambda: domain._pump.stats().in_flight_slot is not None)


async def settled(domain: VtpmDomain) -> None:
    """Wait until the started TPM is stored: a swtpm that is stopped in that is given up."""
    await wait_until(lambda: domain.stores)


async def begun_by_the_tpm(domain: VtpmDomain, changes: int) -> None:
    """Wait until swtpm was sent so many commands in all that change its state.

    A command in flight is not there yet: the journal is marked before the first change.
    """
    await wait_until(lambda: domain._pump.stats().mutating >= changes)


@pytest.mark.parametrize("family", FAMILIES)
async def test_guest_qemu_and_stub_domain_are_served_at_once(
    tmp_path: Path, family: TpmFamily
) -> None:
    async with place(tmp_path, family) as p, p.domain() as domain, AsyncExitStack() as stack:
        devices = [GUEST, QEMU, STUB]
        await p.attach(*devices)
        frontends = [await stack.enter_async_context(page_frontend(p.world, d)) for d in devices]
        async with trio.open_nursery() as nursery:
            for frontend in frontends:
                nursery.start_soon(frontend.connect)
        assert await frontends[0].code(startup(family)) == 0

        async def use(frontend: PageFrontend, pcr: int) -> None:
            for _ in range(15):
                assert await frontend.code(pcr_extend(family, pcr)) == 0
                assert await frontend.code(get_random(family)) == 0
                assert len(await frontend.command(pcr_read(family, pcr))) >= 30

        async with trio.open_nursery() as nursery:
            for pcr, frontend in enumerate(frontends, 10):
                nursery.start_soon(use, frontend, pcr)
        values = {await pcr_value(frontends[0], family, pcr) for pcr in (10, 11, 12)}
        assert len(values) == 1  # each was extended as often, with the same
        status = domain.status()
        assert [f["state"] for f in status["frontends"]] == ["CONNECTED"] * 3
        assert status["engine"]["starts"] == 1


async def test_the_pages_locality_reaches_the_tpm(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (_, _, frontend):
        assert await frontend.code(pcr_extend(TPM2, 17), 0) == 0x907
        assert await frontend.code(pcr_extend(TPM2, 17), 3) == 0
        assert await frontend.code(pcr_extend(TPM2, 17), 0) == 0x907
        frontend.submit(get_random(TPM2), 7)
        assert HEADER.unpack(await frontend.answer())[2] == 0x907
        assert await frontend.code(get_random(TPM2)) == 0


async def test_cancel_before_and_while_the_tpm_works(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, domain, busy), AsyncExitStack() as stack:
        await p.attach(GUEST)
        waiting = await stack.enter_async_context(page_frontend(p.world, GUEST))
        await waiting.connect()
        await settled(domain)
        async with stopped(swtpm_pid(domain)):
            before = domain._pump.stats().mutating
            busy.submit(create_primary())
            await begun_by_the_tpm(domain, before + 1)
            waiting.submit(get_random(TPM2))
            assert waiting.cancel()
            await waiting.state_becomes(0)  # IDLE, though the TPM is not free
            assert busy.cancel()
            assert busy.state == CANCEL
        assert HEADER.unpack_from(await busy.answer())[2] == 0  # too late: it is done
        for frontend in (busy, waiting):
            assert await frontend.code(get_random(TPM2), 3) == 0
        assert domain.engine_starts == 1


def loud_swtpm(directory: Path) -> str:
    """Make a swtpm that logs every command, to where it complains; return its path."""
    program = directory / "loud-swtpm"
    # Descriptor 2 itself it does not take.
    words = 'exec 200>&2\nexec swtpm "$@" --log fd=200,level=20\n'
    program.write_text(f"#!/bin/bash\n{words}", encoding="ascii")
    program.chmod(0o755)
    return str(program)


def last_words(domain: VtpmDomain) -> list[str]:
    return list(domain._engine.child._last_lines)


def hierarchy_change_auth(secret: bytes) -> bytes:
    """Return TPM2_HierarchyChangeAuth for the owner, whose authorization is empty so far."""
    body = struct.pack(">II", 0x40000001, 9) + struct.pack(">IHBH", 0x40000009, 0, 0, 0)
    body += struct.pack(">H", len(secret)) + secret
    return HEADER.pack(0x8002, HEADER.size + len(body), 0x129) + body


@pytest.mark.parametrize("family", FAMILIES)
async def test_P1_P10_a_swtpm_that_logs_more_than_a_pipe_holds_serves_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: TpmFamily
) -> None:
    swtpm = loud_swtpm(tmp_path)
    async with one_frontend(tmp_path, family=family, swtpm=swtpm) as (_, domain, frontend):
        for _ in range(600):
            assert await frontend.code(get_random(family)) == 0
        assert domain.engine_starts == 1
        assert "SWTPM_IO" in " ".join(last_words(domain))
    assert 0 < sum("swtpm: " in record.getMessage() for record in caplog.records) <= 5
    assert "00 00 00" not in caplog.text


async def test_P10_a_command_that_swtpm_logs_is_kept_out_of_our_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A TPM that cannot write its state goes into failure mode, and logs what led it there."""
    secret = b"hunter2-secret-auth-value"
    async with one_frontend(tmp_path) as (p, domain, frontend):
        (p.state_dir / "TMP2-00.permall").mkdir()  # where swtpm writes before it renames
        assert await frontend.code(hierarchy_change_auth(secret)) == RC_FAILURE[TPM2]
        await wait_until(lambda: "failure mode" in caplog.text)
        assert await frontend.code(get_random(TPM2)) == RC_FAILURE[TPM2]
        told = caplog.text + "".join(last_words(domain))
    # A line of the dump ends anywhere.
    assert secret.hex() not in "".join(told.lower().split())


async def test_frontends_that_jump_to_connected_and_that_submit_before(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, _, _), AsyncExitStack() as stack:
        await p.attach(GUEST, STUB)
        mini_os = await stack.enter_async_context(page_frontend(p.world, GUEST))
        await mini_os.connect(XenbusState.CONNECTED)
        assert await mini_os.code(get_random(TPM2)) == 0
        linux = await stack.enter_async_context(page_frontend(p.world, STUB))
        await linux.publish()
        linux.submit(get_random(TPM2))
        await linux.show(XenbusState.INITIALISED)
        assert HEADER.unpack_from(await linux.answer())[2] == 0


async def test_a_frontend_published_before_the_vtpm_domain_boots(tmp_path: Path) -> None:
    async with place(tmp_path) as p:
        await p.attach(GUEST)
        async with page_frontend(p.world, GUEST) as frontend:
            await frontend.publish()
            frontend.submit(startup(TPM2))
            await frontend.show(XenbusState.CONNECTED)
            async with p.domain():
                assert HEADER.unpack_from(await frontend.answer())[2] == 0


@pytest.mark.parametrize("mode", [PathMode.SEED, PathMode.DEVICE, PathMode.ZEROS])
async def test_every_path_form_of_domain_0_is_served(tmp_path: Path, mode: PathMode) -> None:
    paths = device_paths(mode, backend_domid=VTPM, handle=4)
    async with one_frontend(tmp_path, paths) as (_, _, frontend):
        assert await frontend.code(get_random(TPM2)) == 0
        await frontend.close()
        await frontend.connect()
        assert await frontend.code(get_random(TPM2)) == 0


async def test_a_guest_that_dies_in_the_middle_of_a_command(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, domain, survivor):
        await p.attach(GUEST)
        async with page_frontend(p.world, GUEST) as dying:
            await dying.connect()
            before = await pcr_value(survivor, TPM2, 9)
            await settled(domain)
            async with stopped(swtpm_pid(domain)):
                changes = domain._pump.stats().mutating
                dying.submit(pcr_extend(TPM2, 9))
                await begun_by_the_tpm(domain, changes + 1)
                await p.world.destroy_domain(3)
                # It is let go at once, not when the TPM is done.
                await wait_until(lambda: len(domain._devices) == 1)
                survivor.submit(pcr_read(TPM2, 9))
            answer = await survivor.answer()
            assert answer[-32:] != before  # the TPM did what it had begun
        async with open_store(store_socket(p.world)) as store:
            assert await store.try_read(f"{GUEST.backend}/state") is None


# Hostile frontends.


async def served_on(frontend: PageFrontend) -> None:
    assert await frontend.code(get_random(TPM2)) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"ring_ref": b"garbage"},
        {"ring_ref": b""},
        {"ring_ref": b"-1"},
        {"ring_ref": b"4294967304"},
        {"ring_ref": b"2147483647"},
        {"ring_ref": b"\xff\xff\n"},
        {"ring_ref": None},
        {"event_channel": b"99999999999999999999"},
        {"event_channel": b"131072"},
        {"event_channel": b"131071"},
        {"event_channel": b"0x10"},
        {"event_channel": None},
        {"feature_protocol_v2": b"01"},
        {"feature_protocol_v2": None},
    ],
)
async def test_P9_keys_that_no_frontend_writes(
    tmp_path: Path, changes: dict[str, bytes | None]
) -> None:
    async with one_frontend(tmp_path) as (p, _, good):
        await p.attach(GUEST)
        async with page_frontend(p.world, GUEST) as bad:
            await bad.backend_shows(XenbusState.INIT_WAIT)
            await bad.publish(**changes)
            await bad.show(XenbusState.INITIALISED)
            await bad.backend_shows(XenbusState.CLOSED)
            await served_on(good)
            await bad.forget()
            await bad.show(XenbusState.CLOSED)  # and it may better itself
            await bad.connect()
            await served_on(bad)


async def test_P9_pages_and_ports_of_others_are_not_used(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, _, good):
        await p.attach(GUEST)
        assert good.page is not None
        assert good.channel is not None
        async with page_frontend(p.world, GUEST) as thief:
            for stolen in (
                {"ring_ref": b"%d" % good.page.ref},
                {"event_channel": b"%d" % good.channel.port},
            ):
                await thief.backend_shows(XenbusState.INIT_WAIT)
                await thief.publish(**stolen)
                await thief.show(XenbusState.INITIALISED)
                await thief.backend_shows(XenbusState.CLOSED)
                await thief.forget()
                await thief.show(XenbusState.CLOSED)
            await served_on(good)


@pytest.mark.parametrize(
    "path",
    [
        b"",
        b"/",
        b"relative",
        b"/local/domain/5/device/vtpm/0",
        b"/local/domain/33/device/vtpm/0",
        b"/local/domain/3/../5/device/vtpm/0",
        b"/local/domain/3//device/vtpm/0",
        b"/local/domain/3/device/vtpm/0/",
        b"/local/domain/3",
        b"/local/domain/3/device vtpm",
        b"/local/domain/3/\xff",
    ],
)
async def test_P9_a_frontend_path_outside_its_domain_is_not_followed(
    tmp_path: Path, path: bytes
) -> None:
    async with (
        one_frontend(tmp_path) as (p, domain, good),
        open_store(store_socket(p.world)) as store,
    ):

        async def write(transaction: Transaction) -> None:
            await transaction.mkdir(GUEST.backend)
            await transaction.set_perms(GUEST.backend, ["n2", "r3"])
            await transaction.write(f"{GUEST.backend}/frontend", path)
            await transaction.write(f"{GUEST.backend}/state", b"1")

        await store.transact(write)
        await wait_until(lambda: len(domain._devices) == 2)
        await wait_until(lambda: all(f["last-error"] for f in domain.status()["frontends"][1:]))
        assert await store.read(f"{GUEST.backend}/state") == b"1"
        await served_on(good)


async def test_P4_a_hostile_page_gets_errors_and_reaches_nothing(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, domain, good):
        await p.attach(GUEST)
        async with page_frontend(p.world, GUEST) as bad:
            await bad.connect()
            command = get_random(TPM2)
            taken = domain._pump.stats().commands
            for length in (1, 9, 11, 4089, 0xFFFFFFFF):
                bad.poke(8, command)
                bad.poke(0, length.to_bytes(4, "little") + bytes([SUBMIT, 0, 0, 0]))
                bad.submit_as_it_is()
                assert HEADER.unpack(await bad.answer()) == (0x8001, 10, 0x142)
            for state in (4, 77, 255):
                bad.poke(4, bytes([state]))
                bad.submit_as_it_is()
            bad.poke(0, b"\0\0\0\0" + bytes([SUBMIT]))
            bad.submit_as_it_is()
            assert await bad.answer() == b""
            assert domain._pump.stats().commands == taken
            await served_on(good)
            await served_on(bad)


async def test_a_frontend_that_goes_back_and_forth_delays_nobody_for_good(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, _, good):
        await p.attach(GUEST)
        async with page_frontend(p.world, GUEST) as restless:
            await restless.publish()
            for number in range(60):
                await restless.show(XenbusState((3, 4, 5, 6, 1, 8, 2, 7)[number % 8]))
                if number % 10 == 0:
                    await served_on(good)
            await restless.show(XenbusState.CLOSED)
            await restless.backend_shows(XenbusState.INIT_WAIT)
            await restless.forget()
            await restless.connect()
            await served_on(restless)


# The reset extension.


async def ask_for_reset(frontend: PageFrontend, count: bytes) -> bytes | None:
    """Close, ask for a power cycle, and return the count once the backend has reopened."""
    await frontend.show(XenbusState.CLOSING)
    await frontend.store.write(f"{frontend.paths.frontend}/reset-request", count)
    await frontend.show(XenbusState.CLOSED)
    await frontend.backend_shows(XenbusState.INIT_WAIT)
    await frontend.forget()
    found = await frontend.store.peek(f"{frontend.paths.backend}/reset-count")
    await frontend.connect()
    return found


@pytest.mark.parametrize("family", FAMILIES)
async def test_P7_a_trusted_frontend_has_the_tpm_power_cycled(
    tmp_path: Path, family: TpmFamily
) -> None:
    async with one_frontend(tmp_path, family=family) as (_, domain, frontend):
        backend = frontend.paths.backend
        assert await frontend.store.read(f"{backend}/feature-reset") == b"1"
        zero = await pcr_value(frontend, family, 7)
        assert await frontend.code(pcr_extend(family, 7)) == 0
        assert await ask_for_reset(frontend, b"1") == b"1"
        assert await frontend.code(pcr_read(family, 7)) == POSTINIT[family]
        assert await frontend.code(startup(family)) == 0
        assert await pcr_value(frontend, family, 7) == zero
        assert await frontend.code(pcr_extend(family, 7)) == 0
        await frontend.close()  # the request stands there still, and is done
        await frontend.connect()
        assert await pcr_value(frontend, family, 7) != zero
        assert await ask_for_reset(frontend, b"garbage") == b"1"
        assert await pcr_value(frontend, family, 7) != zero
        assert domain.status()["frontends"][0]["resets"] == 1


async def test_P7_a_guest_cannot_have_its_tpm_power_cycled(tmp_path: Path) -> None:
    async with one_frontend(tmp_path, GUEST) as (_, domain, frontend):
        assert await frontend.store.peek(f"{GUEST.backend}/feature-reset") is None
        assert await frontend.code(pcr_extend(TPM2, 7)) == 0
        value = await pcr_value(frontend, TPM2, 7)
        assert await ask_for_reset(frontend, b"1") is None
        assert await pcr_value(frontend, TPM2, 7) == value
        assert "may not" in domain.status()["frontends"][0]["last-error"]


async def test_P7_whom_the_toolstack_trusts_has_the_tpm_power_cycled(tmp_path: Path) -> None:
    async with place(tmp_path) as p, p.domain() as domain:
        async with open_store(store_socket(p.world)) as store:
            await attach(store, STUB, trust_reset=True)
        async with page_frontend(p.world, STUB) as frontend:
            await frontend.connect()
            assert await frontend.store.read(f"{STUB.backend}/feature-reset") == b"1"
            assert domain.status()["frontends"][0]["may-reset"]
            assert await frontend.code(startup(TPM2)) == 0
            assert await frontend.code(pcr_extend(TPM2, 7)) == 0
            assert await ask_for_reset(frontend, b"1") == b"1"
            assert await frontend.code(startup(TPM2)) == 0
            assert await pcr_value(frontend, TPM2, 7) == bytes(32)


async def test_P7_what_a_former_process_offered_is_taken_back(tmp_path: Path) -> None:
    async with place(tmp_path) as p, AsyncExitStack() as stack:
        await p.attach(GUEST)
        guest = await stack.enter_async_context(page_frontend(p.world, GUEST))
        async with p.domain(trusted_reset_domids=frozenset({3})):
            await guest.backend_shows(XenbusState.INIT_WAIT)
            assert await guest.store.peek(f"{GUEST.backend}/feature-reset") == b"1"
        async with p.domain():
            await guest.connect()
            assert await guest.store.peek(f"{GUEST.backend}/feature-reset") is None


async def test_a_power_cycle_follows_a_shutdown_of_the_guest_or_makes_its_own(
    tmp_path: Path,
) -> None:
    async with one_frontend(tmp_path) as (_, _, frontend):
        # Its own is Shutdown(CLEAR): what was not saved cannot be resumed.
        assert await ask_for_reset(frontend, b"1") == b"1"
        resume = HEADER.pack(0x8001, 12, 0x144) + b"\0\x01"
        assert await frontend.code(resume) != 0
        assert await frontend.code(startup(TPM2)) == 0
        assert await frontend.code(pcr_extend(TPM2, 7)) == 0
        value = await pcr_value(frontend, TPM2, 7)
        assert await frontend.code(shutdown(1)) == 0  # the guest sleeps: Shutdown(STATE)
        assert await ask_for_reset(frontend, b"2") == b"2"
        assert await frontend.code(resume) == 0
        assert await pcr_value(frontend, TPM2, 7) == value


# A swtpm that dies or hangs.


@pytest.mark.parametrize("family", FAMILIES)
async def test_P1_a_swtpm_that_is_killed_in_a_command(tmp_path: Path, family: TpmFamily) -> None:
    async with one_frontend(tmp_path, family=family) as (_, domain, frontend):
        assert await frontend.code(pcr_extend(family, 7)) == 0
        value = await pcr_value(frontend, family, 7)
        await wait_until(lambda: domain._engine._snapshot._volatile.exists())
        async with stopped(swtpm_pid(domain)):
            taken = domain._pump.stats().commands
            frontend.submit(pcr_read(family, 7))
            await in_the_tpms_hand(domain, taken + 1)
            os.kill(swtpm_pid(domain), signal.SIGKILL)
            assert HEADER.unpack(await frontend.answer())[2] == RC_FAILURE[family]
        assert await pcr_value(frontend, family, 7) == value  # nothing was lost
        assert domain.engine_starts == 2


async def test_P1_a_swtpm_that_hangs_in_a_command(tmp_path: Path) -> None:
    slow = {0x17E: 0.2}  # PCR_Read; the others take as long as they need on this machine
    async with one_frontend(tmp_path, deadlines_s=slow) as (_, domain, frontend):
        assert await frontend.code(pcr_extend(TPM2, 7)) == 0
        await wait_until(lambda: domain._engine._snapshot._volatile.exists())
        os.kill(swtpm_pid(domain), signal.SIGSTOP)
        frontend.submit(pcr_read(TPM2, 7))
        assert HEADER.unpack(await frontend.answer())[2] == 0x101
        assert await frontend.code(get_random(TPM2)) == 0
        assert domain.engine_starts == 2
        assert "did not answer" in domain.status()["last-error"]


async def test_P1_a_swtpm_that_dies_while_idle_costs_no_command_but_the_next(
    tmp_path: Path,
) -> None:
    async with one_frontend(tmp_path) as (_, domain, frontend):
        os.kill(swtpm_pid(domain), signal.SIGKILL)
        await wait_until(lambda: domain.engine_starts == 2)
        assert await frontend.code(get_random(TPM2)) == 0


async def test_P1_a_swtpm_that_cannot_be_started_answers_failure(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, domain, frontend):
        (p.state_dir / "tpm2-00.permall").write_bytes(b"garbage")
        os.kill(swtpm_pid(domain), signal.SIGKILL)
        for _ in range(3):
            assert await frontend.code(get_random(TPM2)) == 0x101
        assert "does not start" in domain.status()["last-error"]


# Restarts.


@pytest.mark.parametrize("family", FAMILIES)
async def test_P8_a_vtpm_process_that_is_killed_and_started_again(
    tmp_path: Path, family: TpmFamily
) -> None:
    async with place(tmp_path, family) as p, AsyncExitStack() as stack:
        await p.attach(QEMU)
        frontend = await stack.enter_async_context(page_frontend(p.world, QEMU))
        async with p.process() as first:
            await frontend.connect()
            assert await frontend.code(startup(family)) == 0
            assert await frontend.code(pcr_extend(family, 7)) == 0
            value = await pcr_value(frontend, family, 7)
            await stored(p, family)
            swtpm = first.swtpm_pid()
            await first.kill()
            await wait_until(lambda: not Path(f"/proc/{swtpm}/root").exists())
        async with p.process():
            # It takes up the page that it finds; what is on it by then gets an error.
            assert await frontend.code(get_random(family)) in (0, RC_FAILURE[family])
            assert await pcr_value(frontend, family, 7) == value
            await frontend.close()
            await frontend.connect()
            assert await pcr_value(frontend, family, 7) == value


async def test_P8_a_command_of_a_killed_process_is_failed_and_not_run_twice(
    tmp_path: Path,
) -> None:
    async with place(tmp_path) as p, AsyncExitStack() as stack:
        await p.attach(QEMU)
        frontend = await stack.enter_async_context(page_frontend(p.world, QEMU))
        async with p.process() as first:
            await frontend.connect()
            assert await frontend.code(startup(TPM2)) == 0
            value = await pcr_value(frontend, TPM2, 9)
            await stored(p, TPM2)
            os.kill(first.swtpm_pid(), signal.SIGSTOP)
            frontend.submit(pcr_read(TPM2, 9))
            await first.kill()
        frontend.submit(pcr_extend(TPM2, 9))  # what such a process would leave behind
        async with p.process():
            assert HEADER.unpack(await frontend.answer())[2] == 0x101
            assert await pcr_value(frontend, TPM2, 9) == value


async def test_P8_sigterm_ends_in_order_and_loses_nothing(tmp_path: Path) -> None:
    async with place(tmp_path) as p, AsyncExitStack() as stack:
        await p.attach(QEMU)
        frontend = await stack.enter_async_context(page_frontend(p.world, QEMU))
        async with p.process() as first:
            await frontend.connect()
            assert await frontend.code(startup(TPM2)) == 0
            assert await frontend.code(pcr_extend(TPM2, 7)) == 0
            value = await pcr_value(frontend, TPM2, 7)
            frontend.submit(create_primary())  # drained, not dropped
            assert await first.terminate() == 0
            assert HEADER.unpack_from(await frontend.answer())[2] == 0
            await frontend.backend_shows(XenbusState.CLOSED)
        await frontend.forget()
        await frontend.show(XenbusState.CLOSED)
        async with p.process():
            await frontend.connect()
            assert await pcr_value(frontend, TPM2, 7) == value


async def test_P7_a_vtpm_domain_made_anew_has_a_tpm_that_was_off(tmp_path: Path) -> None:
    async with place(tmp_path) as p:
        await p.attach(QEMU)
        async with p.process() as first, page_frontend(p.world, QEMU) as frontend:
            await frontend.connect()
            assert await frontend.code(startup(TPM2)) == 0
            assert await frontend.code(pcr_extend(TPM2, 7)) == 0
            await first.terminate()
        await p.world.destroy_domain(VTPM)
        await p.world.create_domain(VTPM, "vtpm")
        async with open_store(store_socket(p.world)) as store:
            await detach(store, QEMU, force=True)
        await p.attach(QEMU)
        async with p.process(), page_frontend(p.world, QEMU) as frontend:
            await frontend.connect()
            assert await frontend.code(pcr_read(TPM2, 7)) == 0x100
            assert await frontend.code(startup(TPM2)) == 0
            assert await pcr_value(frontend, TPM2, 7) == bytes(32)


async def stored(p: Place, family: TpmFamily) -> None:
    """Wait until the TPM's volatile state is on disk."""
    name = "tpm2-00.volatilestate" if family is TPM2 else "tpm-00.volatilestate"
    await wait_until((p.state_dir / name).exists)


# Entries and XenStore that come and go.


async def test_entries_written_anew_over_old_ones_are_served(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, domain, frontend):
        async with open_store(store_socket(p.world)) as store:
            await detach(store, QEMU, force=True)
            await attach(store, QEMU)
        await frontend.forget()
        await frontend.connect()
        await served_on(frontend)
        assert len(domain._devices) == 1


async def test_a_backend_directory_that_vanishes_alone_lets_the_page_go(tmp_path: Path) -> None:
    async with (
        one_frontend(tmp_path) as (p, domain, _),
        open_store(store_socket(p.world)) as store,
    ):
        await store.rm(QEMU.backend)
        await wait_until(lambda: not domain._devices)
        assert await store.try_read(f"{QEMU.backend}/state") is None
        assert not domain._pump._rings


async def test_entries_that_vanish_before_the_backend_greets_stay_away() -> None:
    class SlowStore:
        """Its answers come when the entries are gone."""

        async def try_read(self, path: str) -> bytes:
            await device.drop()
            return b"/local/domain/0/frontend/vtpm/2/0"

        async def write(self, path: str, value: bytes) -> None:
            pytest.fail(f"{path} was written")

    device = Device(0, 0, None, None, trusted=True)  # type: ignore[arg-type]
    await device.follow(SlowStore())  # type: ignore[arg-type]
    assert device.gone


async def test_entries_removed_while_xenstore_is_away_are_let_go(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, domain, frontend):
        socket_path = Path(store_socket(p.world, VTPM))
        hidden = socket_path.with_name("hidden.sock")
        os.rename(socket_path, hidden)  # noqa: PTH104
        for connection, sender in list(p.world._senders.items()):
            if connection.domid == VTPM:
                sender.scope.cancel()
        await wait_until(lambda: "XenStore" in domain.last_error)
        await served_on(frontend)  # which needs no XenStore
        async with open_store(store_socket(p.world)) as store:
            await detach(store, QEMU, force=True)
        os.rename(hidden, socket_path)  # noqa: PTH104
        await wait_until(lambda: not domain._devices)
        assert not domain._pump._rings


async def test_xenstore_that_comes_back_finds_the_states_it_missed(tmp_path: Path) -> None:
    async with one_frontend(tmp_path) as (p, domain, frontend):
        for connection, sender in list(p.world._senders.items()):
            if connection.domid == VTPM:
                sender.scope.cancel()
        await frontend.show(XenbusState.CLOSING)
        await frontend.show(XenbusState.CLOSED)
        await frontend.backend_shows(XenbusState.INIT_WAIT)
        await frontend.forget()
        await frontend.connect()
        await served_on(frontend)
        assert len(domain._devices) == 1


async def test_more_frontends_than_slots(tmp_path: Path) -> None:
    async with place(tmp_path) as p, p.domain() as domain, AsyncExitStack() as stack:
        devices = [device_paths(PathMode.SEED, backend_domid=VTPM, handle=n) for n in range(9)]
        await p.attach(*devices[:8])
        frontends = [await stack.enter_async_context(page_frontend(p.world, d)) for d in devices]
        for frontend in frontends[:8]:
            await frontend.connect()
        with pytest.raises(ConfigError, match="has 8 frontends"):
            await p.attach(devices[8])
        assert await frontends[7].code(startup(TPM2)) == 0
        assert len(domain._pump._rings) == 8
