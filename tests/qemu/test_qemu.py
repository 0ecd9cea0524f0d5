"""The installed QEMU, unmodified, on a bridge and a vTPM domain with a real swtpm."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from qemu_vtpm_bridge.bridge.chardev import DoorConfig
from qemu_vtpm_bridge.bridge.power import State as Power
from qemu_vtpm_bridge.bridge.tpm import (
    TPM_RC_COMMAND_SIZE,
    TPM_RC_FAILURE,
    TPM_RC_INITIALIZE,
    Family,
)
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.xen.store import open_store
from tests.support.chain import PATHS, VTPM, running_chain
from tests.support.qemu import QEMU, Qemu, running_qemu
from tests.support.swtpm_client import GET_RANDOM, PCR_EXTEND_7, PCR_READ_7, STARTUP, ZERO_PCR
from tests.support.wait import wait_until
from tests.support.world import store_socket

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(shutil.which(QEMU) is None, reason="QEMU is not installed"),
]

START = STARTUP[Family.TPM_2_0]
NOBODY_MAY_RESET = {"trusted_reset_domids": frozenset[int]()}


async def use(qemu: Qemu) -> bytes:
    """Start the TPM, change PCR 7, return its value."""
    assert await qemu.code(START) == 0
    assert await qemu.code(PCR_EXTEND_7) == 0
    value = (await qemu.tpm(PCR_READ_7))[-32:]
    assert value != ZERO_PCR
    return value


async def test_a_guest_uses_its_tpm_and_a_reset_gives_it_a_clean_one(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain, running_qemu(chain.socket_path) as qemu:
        await use(qemu)
        await qemu.reset()
        assert await qemu.code(PCR_READ_7) == TPM_RC_INITIALIZE
        assert await qemu.code(START) == 0
        assert (await qemu.tpm(PCR_READ_7))[-32:] == ZERO_PCR
        assert chain.door.requests["CMD_INIT"] == 2


async def test_a_qemu_that_quits_is_followed_by_the_next_one(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        for _ in range(2):
            async with running_qemu(chain.socket_path) as qemu:
                await use(qemu)
                await qemu.qmp("quit")
                assert await qemu.wait() == 0
        assert chain.door.requests["CMD_SHUTDOWN"] == 2


async def test_P8_a_qemu_that_is_killed_is_followed_by_the_next_one(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        for _ in range(2):
            async with running_qemu(chain.socket_path) as qemu:
                await use(qemu)
                await qemu.submit(GET_RANDOM)
                qemu.process.kill()
                await qemu.wait()


async def test_qemus_probe_is_answered_while_the_vtpm_domain_still_boots(tmp_path: Path) -> None:
    async with (
        running_chain(tmp_path, vtpm=False) as chain,
        running_qemu(chain.socket_path) as qemu,
    ):
        assert chain.bridge.power.state is Power.WAIT_RING
        await qemu.submit(START)
        await chain.start_vtpm()
        assert (await qemu.response())[6:10] == bytes(4)
        assert await qemu.code(GET_RANDOM) == 0


async def test_moving_the_guest_is_refused_since_its_tpm_stays(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain, running_qemu(chain.socket_path) as qemu:
        await use(qemu)
        answer = await qemu.qmp("migrate", uri="exec:cat >/dev/null")
        assert "does not support migration" in answer["error"]["desc"]
        answer = await qemu.qmp("human-monitor-command", **{"command-line": "savevm one"})
        assert "Error" in answer["return"]
        assert await qemu.code(GET_RANDOM) == 0


@pytest.mark.parametrize("empty", [False, True])
async def test_xl_save_is_refused_or_saves_a_guest_without_its_tpm(
    tmp_path: Path, empty: bool
) -> None:
    door = DoorConfig(empty_state_blobs=empty)
    async with (
        running_chain(tmp_path, door=door) as chain,
        running_qemu(chain.socket_path) as qemu,
    ):
        await use(qemu)
        image = tmp_path / "image"
        answer = await qemu.qmp("xen-save-devices-state", filename=str(image))
        assert ("return" in answer) is empty
        assert not empty or image.stat().st_size > 0
        # In both cases the guest goes on.
        assert await qemu.code(GET_RANDOM) == 0


async def test_stop_and_cont_change_nothing(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain, running_qemu(chain.socket_path) as qemu:
        value = await use(qemu)
        assert "return" in await qemu.qmp("stop")
        assert "return" in await qemu.qmp("cont")
        assert (await qemu.tpm(PCR_READ_7))[-32:] == value


@pytest.mark.parametrize(
    "command",
    [
        bytes(6),
        bytes.fromhex("800100000009000001"),
        bytes.fromhex("80010001000a00000144"),
        bytes.fromhex("8001000100000000"),
    ],
    ids=bytes.hex,
)
async def test_P1_a_size_that_qemu_does_not_send_hangs_neither_the_guest_nor_its_reset(
    tmp_path: Path, command: bytes
) -> None:
    """Real swtpm waits for the rest of a header, and QEMU's main loop for swtpm."""
    async with running_chain(tmp_path) as chain, running_qemu(chain.socket_path) as qemu:
        await use(qemu)
        assert await qemu.code(command) == TPM_RC_COMMAND_SIZE
        assert await qemu.code(GET_RANDOM) == 0
        await qemu.submit(command)
        await qemu.reset()
        assert await qemu.code(START) == 0


async def test_a_reset_that_fails_closed_stops_a_guest_that_is_to_be_stopped(
    tmp_path: Path,
) -> None:
    async with (
        running_chain(
            tmp_path, vtpm_config=NOBODY_MAY_RESET, stop_guest_on_reset_failure=True
        ) as chain,
        running_qemu(chain.socket_path) as qemu,
    ):
        await use(qemu)
        await qemu.send_qmp("system_reset")
        assert await qemu.wait() == 1
        assert "TPM" in qemu.said()


async def test_P7_a_reset_that_fails_closed_leaves_a_guest_without_a_tpm(tmp_path: Path) -> None:
    async with (
        running_chain(tmp_path, vtpm_config=NOBODY_MAY_RESET) as chain,
        running_qemu(chain.socket_path) as qemu,
    ):
        await use(qemu)
        await qemu.reset()
        for command in (START, PCR_READ_7, GET_RANDOM):
            assert await qemu.code(command) == TPM_RC_FAILURE


async def test_P1_P8_a_vtpm_domain_that_dies_under_a_command_costs_one_error(
    tmp_path: Path,
) -> None:
    async with running_chain(tmp_path) as chain, running_qemu(chain.socket_path) as qemu:
        await use(qemu)
        os.kill(chain.swtpm_pid, signal.SIGSTOP)
        await qemu.submit(GET_RANDOM)
        await wait_until(lambda: chain.bridge._carrier.pump.stats().in_flight)
        await chain.world.destroy_domain(VTPM)
        assert int.from_bytes((await qemu.response())[6:10], "big") == TPM_RC_FAILURE
        os.kill(chain.swtpm_pid, signal.SIGKILL)
        await chain.end_vtpm()
        # The toolstack makes it anew; its TPM has lost its power.
        await chain.world.create_domain(VTPM, "vtpm")
        async with open_store(store_socket(chain.world)) as store:
            await attach(store, PATHS)
        await chain.start_vtpm(state_dir=tmp_path / "other")
        await chain.bridge.frontend.wait_running(after_connections=1)
        assert await qemu.code(GET_RANDOM) == TPM_RC_INITIALIZE
        await qemu.reset()
        await use(qemu)
