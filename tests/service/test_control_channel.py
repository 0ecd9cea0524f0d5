"""QEMU's door on a living bridge: the control channel's rules, one by one."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.bridge.chardev import DoorConfig
from qemu_vtpm_bridge.bridge.control import Command, Result
from qemu_vtpm_bridge.bridge.tpm import TPM_RC_INITIALIZE, Family
from tests.support.chain import running_chain
from tests.support.swtpm_client import GET_RANDOM, PCR_EXTEND_7, PCR_READ_7, STARTUP
from tests.support.wait import wait_until

pytestmark = pytest.mark.timeout(180)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_buffer_sizes_are_what_tis_and_crb_can_take(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.connect()
        for wanted, in_use in ((0, 4088), (4088, 4088), (0xF80, 0xF80), (8192, 4088), (1, 2808)):
            body = struct.pack(">I", wanted)
            answer = await client.ask(Command.CMD_SET_BUFFERSIZE, body, 16)
            assert struct.unpack(">IIII", answer) == (0, in_use, 2808, 4088)
        client.close()


async def test_P2_a_response_longer_than_the_buffer_that_was_granted_is_an_error(
    tmp_path: Path,
) -> None:
    """A CRB's buffer is smaller than the page: what would not fit must not reach QEMU."""
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        assert await client.stop() == 0
        chain.bridge._buffer_size = 20
        async with chain.bridge._carrier.paused() as pump:
            pump.set_buffer_size(20)
        assert await client.init() == 0
        assert await client.code(bytes.fromhex("80010000000c000001440000")) == 0
        assert (await client.tpm(GET_RANDOM)).hex() == "80010000000a00000101"
        client.close()


async def test_locality_is_kept_over_init_and_bounded(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        assert await client.result(Command.CMD_SET_LOCALITY, b"\x05") == Result.TPM_BAD_LOCALITY
        # PCR 20 may be extended from localities 1 to 3, not from 0.
        extend_20 = PCR_EXTEND_7.replace(b"\0\0\0\x07", b"\0\0\0\x14", 1)
        assert await client.code(extend_20) != 0
        assert await client.result(Command.CMD_SET_LOCALITY, b"\x02\0\0\0") == 0
        assert await client.code(extend_20) == 0
        assert await client.init() == 0
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        # QEMU does not say it again, so it must have stayed: Startup may come from 0 and 3 only.
        assert await client.code(STARTUP[Family.TPM_2_0]) == 0x907
        assert await client.result(Command.CMD_SET_LOCALITY, b"\x00") == 0
        await client.startup()
        assert await client.code(extend_20) != 0
        client.close()


async def test_established_bit_and_its_reset(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        answer = await client.ask(Command.CMD_GET_TPMESTABLISHED, reply_bytes=8)
        assert answer == bytes(8)
        for locality, result in ((0, 0x3D), (2, 0x3D), (3, 0), (4, 0), (5, 0x3D)):
            body = struct.pack(">B3x", locality)
            assert await client.result(Command.CMD_RESET_TPMESTABLISHED, body) == result
        client.close()


async def test_state_blobs_are_refused_in_full_size_by_default(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        for kind in (1, 2, 3):
            answer = await client.ask(
                Command.CMD_GET_STATEBLOB, struct.pack(">III", 1, kind, 0), reply_bytes=16
            )
            assert answer == struct.pack(">IIII", 9, 0, 0, 0)
        body = struct.pack(">III", 0, 1, 100) + bytes(100)
        assert await client.result(Command.CMD_SET_STATEBLOB, body) == 9
        assert await client.code(GET_RANDOM) == 0
        client.close()


async def test_empty_state_blobs_let_a_guest_be_saved_and_go_on(tmp_path: Path) -> None:
    async with running_chain(tmp_path, door=DoorConfig(empty_state_blobs=True)) as chain:
        client = await chain.powered_on()
        assert await client.ask(Command.CMD_GET_CAPABILITY, reply_bytes=8) == struct.pack(
            ">II", 0, 0x3FAF
        )
        assert await client.code(PCR_EXTEND_7) == 0
        value = await client.pcr_7()
        answer = await client.ask(
            Command.CMD_GET_STATEBLOB, struct.pack(">III", 1, 1, 0), reply_bytes=16
        )
        assert answer == bytes(16)
        # What a restoring QEMU says: the TPM ran on meanwhile.
        assert await client.stop() == 0
        assert await client.init(flags=1) == 0
        assert await client.pcr_7() == value
        client.close()


@pytest.mark.parametrize(
    "command",
    [
        Command.CMD_STORE_VOLATILE,
        Command.CMD_HASH_START,
        Command.CMD_HASH_END,
        0x14,
        0xFFFFFFFF,
    ],
)
async def test_what_is_not_offered_is_a_bad_ordinal(tmp_path: Path, command: int) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.connect()
        assert await client.result(command) == Result.TPM_BAD_ORDINAL
        assert await client.ask(Command.CMD_GET_CONFIG, reply_bytes=8) == bytes(8)
        client.close()


async def test_a_request_that_stays_incomplete_ends_the_connection(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.connect()
        await client.send(struct.pack(">I", Command.CMD_INIT))
        assert await client.receive(4) == b""
        client.close()
        # And the next one is served.
        client = await chain.powered_on()
        assert await client.code(GET_RANDOM) == 0
        client.close()


async def test_descriptors_that_come_uninvited_are_closed(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        before = open_fds()
        for _ in range(20):
            await client.send(struct.pack(">I", Command.CMD_GET_CONFIG), [0, 1, 2])
            assert await client.receive(8) == bytes(8)
        # One that is open for a moment only may have been counted before.
        await wait_until(lambda: open_fds() <= before)
        assert await client.code(GET_RANDOM) == 0
        client.close()


async def test_set_datafd_without_a_socket_or_twice_is_an_error(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.connect()
        assert await client.result(Command.CMD_SET_DATAFD) == Result.TPM_BAD_PARAMETER
        ends = os.pipe()
        await client.send(struct.pack(">I", Command.CMD_SET_DATAFD), [ends[0]])
        assert int.from_bytes(await client.receive(4), "big") == Result.TPM_BAD_PARAMETER
        for end in ends:
            os.close(end)
        assert await client.set_datafd() == 0
        data = client.data
        assert await client.set_datafd() == Result.TPM_IOERROR
        # After the peer hung up, another one is taken, as fast as it may come.
        assert data is not None
        await data.aclose()
        assert await client.set_datafd() == 0
        assert await client.init() == 0
        await client.startup()
        client.close()


async def test_control_is_served_while_a_command_is_in_flight(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        os.kill(chain.swtpm_pid, signal.SIGSTOP)
        try:
            await client.write(GET_RANDOM)
            # Once the vTPM domain has it, a cancel comes too late to take it back.
            await wait_until(lambda: chain.domain.status()["pump"]["in-flight"])
            assert await client.ask(Command.CMD_GET_CONFIG, reply_bytes=8) == bytes(8)
            assert await client.result(Command.CMD_SET_LOCALITY, b"\x01") == 0
            assert await client.result(Command.CMD_CANCEL_TPM_CMD) == 0
            await wait_until(lambda: chain.bridge._carrier.pump.stats().cancels == 1)
            assert chain.bridge._carrier.pump.stats().in_flight
        finally:
            os.kill(chain.swtpm_pid, signal.SIGCONT)
        # A backend at work finishes all the same; the client gets its one answer (P5).
        assert len(await client.response()) in (10, 28)
        assert await client.result(Command.CMD_SET_LOCALITY, b"\x00") == 0
        assert await client.code(GET_RANDOM) == 0
        client.close()


async def test_P1_stop_and_init_do_not_wait_for_a_tpm_that_hangs(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        os.kill(chain.swtpm_pid, signal.SIGSTOP)
        try:
            await client.write(GET_RANDOM)
            await wait_until(lambda: chain.bridge._carrier.pump.stats().in_flight)
            assert await client.stop() == 0
            assert (await client.response()).hex() == "80010000000a00000101"
            assert await client.init() == 0
        finally:
            os.kill(chain.swtpm_pid, signal.SIGCONT)
        # The late answer is dropped; the TPM was cycled, or it had never been started anew.
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        client.close()


async def test_one_client_at_a_time_the_others_wait_in_the_backlog(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        first = await chain.connect()
        assert await first.ask(Command.CMD_GET_CONFIG, reply_bytes=8) == bytes(8)
        second = await chain.connect()
        await second.send(struct.pack(">I", Command.CMD_GET_CONFIG))
        # The first one is served on, though the second has asked.
        for _ in range(3):
            assert await first.ask(Command.CMD_GET_CONFIG, reply_bytes=8) == bytes(8)
        assert chain.door.clients == 1
        first.close()
        assert await second.receive(8) == bytes(8)
        second.close()


async def test_a_tool_that_comes_and_goes_does_not_disturb_qemus_data_channel(
    tmp_path: Path,
) -> None:
    async with running_chain(tmp_path) as chain:
        qemu = await chain.powered_on()
        qemu.control.close()
        tool = await chain.connect()
        assert await tool.ask(Command.CMD_GET_CONFIG, reply_bytes=8) == bytes(8)
        assert await qemu.code(GET_RANDOM) == 0
        tool.close()
        qemu.close()


async def test_shutdown_answers_then_the_next_qemu_is_served(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        for _ in range(3):
            client = await chain.powered_on()
            assert await client.code(PCR_EXTEND_7) == 0
            assert await client.result(Command.CMD_SHUTDOWN) == 0
            assert await client.receive(1) == b""
            client.close()
        assert chain.door.clients == 3
        assert not chain.served.is_set()


async def test_terminate_ends_after_shutdown(tmp_path: Path) -> None:
    async with running_chain(tmp_path, door=DoorConfig(terminate=True)) as chain:
        client = await chain.powered_on()
        assert await client.result(Command.CMD_SHUTDOWN) == 0
        with trio.fail_after(60):
            await chain.served.wait()
        client.close()
