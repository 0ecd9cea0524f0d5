"""Register devices on a socket, with a whole chain down to swtpm behind them."""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from qemu_vtpm_bridge.bridge import vfio_user_frames as frames
from qemu_vtpm_bridge.bridge.listen import open_listener
from qemu_vtpm_bridge.bridge.power import ResetPolicy
from qemu_vtpm_bridge.bridge.record import create_record
from qemu_vtpm_bridge.bridge.recorded import DeviceRecords
from qemu_vtpm_bridge.bridge.tpm import HEADER, TPM_RC_FAILURE, TPM_RC_INITIALIZE, Family
from qemu_vtpm_bridge.bridge.vfio_user_frames import Command
from qemu_vtpm_bridge.cli import main
from qemu_vtpm_bridge.device_service import Registers, RegisterService
from tests.support.chain import Chain, running_chain
from tests.support.vfio_client import VfioClient, VfioDevice
from tests.support.wait import wait_until

ACCESS, STS, FIFO = 0x00, 0x18, 0x24
STARTUP = HEADER.pack(0x8001, 12, 0x144) + b"\0\0"
GET_RANDOM = HEADER.pack(0x8001, 12, 0x17B) + b"\0\x10"
EXTEND_16 = (
    HEADER.pack(0x8002, 65, 0x182)
    + (16).to_bytes(4, "big")
    + bytes.fromhex("00000009 40000009 0000 00 0000 00000001 000b")
    + b"\x5a" * 32
)
READ_16 = HEADER.pack(0x8001, 20, 0x17E) + bytes.fromhex("00000001 000b 03 000001")


class Service:
    """A service and the chain behind it."""

    def __init__(self, chain: Chain, path: Path, registers: RegisterService) -> None:
        self.chain, self.path, self.registers = chain, path, registers
        self.ended = trio.Event()

    async def connect(self) -> VfioClient:
        """Connect from a thread, as the service shares this one."""
        return await trio.to_thread.run_sync(VfioClient.connect, self.path)

    async def run(self, command: bytes, client: VfioClient) -> bytes:
        """Run a command through the first BAR as a TIS driver does."""
        return await trio.to_thread.run_sync(tis_command, VfioDevice(client, 0), command)


def tis_command(device: VfioDevice, command: bytes) -> bytes:
    """Run a command as Linux's driver does."""
    device.write(ACCESS, 1, 0x02)
    assert device.read(ACCESS, 1) & 0x20
    device.write(STS, 1, 0x40)
    for byte in command:
        device.write(FIFO, 1, byte)
    device.write(STS, 1, 0x20)
    while not device.read(STS, 1) & 0x10:
        pass
    response = bytearray()
    while device.read(STS, 1) & 0x10:
        response.append(device.read(FIFO, 1))
    device.write(STS, 1, 0x40)
    return bytes(response)


def code(response: bytes) -> int:
    """Return the response code."""
    return int(HEADER.unpack_from(response)[2])


@asynccontextmanager
async def running_service(
    tmp_path: Path,
    registers: Registers = Registers.TIS,
    *,
    records: DeviceRecords | None = None,
    **config: Any,
) -> AsyncIterator[Service]:
    """Give a service that listens, with its vTPM domain up."""
    async with running_chain(tmp_path, **config) as chain:
        with tempfile.TemporaryDirectory(prefix="qvb") as directory:
            path = Path(directory) / "vfio.sock"
            listener = open_listener(str(path))
            service = Service(
                chain, path, RegisterService(chain.bridge, registers, records=records)
            )

            async def serve() -> None:
                try:
                    await service.registers.serve(listener)
                finally:
                    listener.close()
                    service.ended.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                try:
                    yield service
                finally:
                    nursery.cancel_scope.cancel()


async def test_P7_a_device_reset_power_cycles_the_tpm(tmp_path: Path) -> None:
    async with running_service(tmp_path) as service:
        client = await service.connect()
        assert code(await service.run(GET_RANDOM, client)) == TPM_RC_INITIALIZE
        assert code(await service.run(STARTUP, client)) == 0
        assert len(await service.run(GET_RANDOM, client)) == 12 + 16
        before = await service.run(READ_16, client)
        assert code(await service.run(EXTEND_16, client)) == 0
        assert await service.run(READ_16, client) != before
        await trio.to_thread.run_sync(client.device_reset)
        assert code(await service.run(GET_RANDOM, client)) == TPM_RC_INITIALIZE
        assert code(await service.run(STARTUP, client)) == 0
        assert (await service.run(READ_16, client))[-32:] == before[-32:]
        client.close()


async def test_P7_without_evidence_commands_are_refused(tmp_path: Path) -> None:
    config = {"reset": ResetPolicy.RESTART_DOMAIN, "restart_command": ("false",)}
    async with running_service(tmp_path, **config) as service:
        client = await service.connect()
        assert code(await service.run(STARTUP, client)) == 0
        await trio.to_thread.run_sync(client.device_reset)
        assert code(await service.run(STARTUP, client)) == TPM_RC_FAILURE
        client.close()


async def test_a_guest_may_have_both_devices(tmp_path: Path) -> None:
    async with running_service(tmp_path, Registers.BOTH) as service:
        client = await service.connect()
        assert code(await service.run(STARTUP, client)) == 0

        def crb() -> bytes:
            device = VfioDevice(client, 1)
            device.write(0x08, 4, 1)
            for at in range(0, len(GET_RANDOM), 4):
                word = int.from_bytes(GET_RANDOM[at : at + 4], "little")
                device.write(0x80 + at, 4, word)
            device.write(0x4C, 4, 1)
            while device.read(0x4C, 4):
                pass
            raw = b"".join(device.read(0x80 + at, 8).to_bytes(8, "little") for at in (0, 8, 16, 24))
            return raw[: HEADER.unpack_from(raw)[1]]

        response = await trio.to_thread.run_sync(crb)
        assert (code(response), len(response)) == (0, 28)
        client.close()


async def test_the_end_of_a_command_is_signalled_on_the_eventfd(tmp_path: Path) -> None:
    async with running_service(tmp_path) as service:
        client = await service.connect()
        eventfd = os.eventfd(0)

        def wait_for_interrupt() -> bool:
            flags = frames.IRQ_SET_DATA_EVENTFD | frames.IRQ_SET_ACTION_TRIGGER
            fields = {"argsz": 20, "flags": flags, "index": 0, "start": 0, "count": 1, "data": b""}
            client.ask(Command.DEVICE_SET_IRQS, frames.IRQ_SET.build(fields), (eventfd,))
            device = VfioDevice(client, 0)
            device.write(ACCESS, 1, 0x02)
            device.write(0x08, 4, 0x80000001)
            device.write(STS, 1, 0x40)
            for byte in STARTUP:
                device.write(FIFO, 1, byte)
            device.write(STS, 1, 0x20)
            # Nothing is accessed from here on: the completion itself has to signal.
            ready, _, _ = select.select([eventfd], [], [], 60)
            return bool(ready)

        assert await trio.to_thread.run_sync(wait_for_interrupt)
        os.close(eventfd)
        client.close()


MALFORMED = [
    b"\xff" * 64,
    frames.HEADER_STRUCT.pack(1, Command.VERSION, 3, 0, 0),
    frames.HEADER_STRUCT.pack(1, Command.VERSION, 1 << 31, 0, 0),
    frames.HEADER_STRUCT.pack(1, Command.REGION_READ, 16, frames.TYPE_REPLY, 0),
]


async def test_a_malformed_client_is_disconnected_and_the_next_one_served(tmp_path: Path) -> None:
    async with running_service(tmp_path) as service:
        for raw in MALFORMED:
            stream = await trio.open_unix_socket(str(service.path))
            with trio.fail_after(60):
                await stream.send_all(raw)
                assert await stream.receive_some() == b""
            await stream.aclose()
        client = await service.connect()
        assert code(await service.run(STARTUP, client)) == 0
        client.close()


async def test_a_full_pipe_for_an_eventfd_holds_nobody(tmp_path: Path) -> None:
    async with running_service(tmp_path) as service:
        client = await service.connect()
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        with suppress(BlockingIOError):
            while True:
                os.write(write_end, bytes(4096))
        os.set_blocking(write_end, True)

        def trigger() -> None:
            for kind in (frames.IRQ_SET_DATA_EVENTFD, frames.IRQ_SET_DATA_NONE):
                flags = kind | frames.IRQ_SET_ACTION_TRIGGER
                fields = {
                    **dict.fromkeys(("index", "start"), 0),
                    "argsz": 20,
                    "flags": flags,
                    "count": 1,
                    "data": b"",
                }
                fds = (write_end,) if kind == frames.IRQ_SET_DATA_EVENTFD else ()
                client.ask(Command.DEVICE_SET_IRQS, frames.IRQ_SET.build(fields), fds)

        await trio.to_thread.run_sync(trigger)
        assert code(await service.run(STARTUP, client)) == 0
        client.close()
        os.close(read_end)
        os.close(write_end)


async def test_descriptors_of_mappings_are_closed(tmp_path: Path) -> None:
    async with running_service(tmp_path) as service:
        client = await service.connect()
        memory = os.memfd_create("guest")
        os.ftruncate(memory, 4096)

        def open_memory() -> int:
            found = 0
            for link in Path("/proc/self/fd").iterdir():
                # Other threads may close theirs meanwhile.
                with suppress(FileNotFoundError):
                    found += "memfd:guest" in str(link.readlink())
            return found

        def map_it() -> None:
            fields = {"argsz": 32, "flags": 3, "offset": 0, "address": 0, "size": 4096}
            for _ in range(50):
                client.ask(Command.DMA_MAP, frames.DMA_MAP.build(fields), (memory,))

        await trio.to_thread.run_sync(map_it)
        await wait_until(lambda: open_memory() == 1)  # this test's own
        os.close(memory)
        client.close()


async def test_cancelling_ends_the_thread_whatever_the_client_does(tmp_path: Path) -> None:
    async with running_service(tmp_path) as service:
        silent = await trio.open_unix_socket(str(service.path))
        await wait_until(lambda: service.registers.status()["connected"])
    assert service.ended.is_set()
    await silent.aclose()


async def test_a_client_that_leaves_in_mid_command_is_followed_by_the_next(tmp_path: Path) -> None:
    async with running_service(tmp_path) as service:
        client = await service.connect()

        def start_and_leave() -> None:
            device = VfioDevice(client, 0)
            device.write(ACCESS, 1, 0x02)
            device.write(STS, 1, 0x40)
            for byte in STARTUP:
                device.write(FIFO, 1, byte)
            device.write(STS, 1, 0x20)
            client.socket.shutdown(socket.SHUT_RDWR)
            client.close()

        await trio.to_thread.run_sync(start_and_leave)
        other = await service.connect()
        assert code(await service.run(GET_RANDOM, other)) == TPM_RC_INITIALIZE
        other.close()


@pytest.mark.parametrize("payloads", [False, True])
async def test_P10_a_record_tells_of_each_access_and_of_payloads_only_if_asked(
    tmp_path: Path, payloads: bool
) -> None:
    path = tmp_path / "record"
    with create_record(str(path)) as out:
        records = DeviceRecords(out, Family.TPM_2_0, payloads=payloads)
        async with running_service(tmp_path, records=records) as service:
            for _ in range(2):
                client = await service.connect()
                assert (await service.run(STARTUP, client))[6:10] == bytes(4)
                random = (await service.run(GET_RANDOM, client))[-16:]
                await trio.to_thread.run_sync(client.close)
        records.end()
    text = path.read_text()
    steps = [json.loads(line) for line in text.splitlines()]
    assert [step["op"] for step in steps].count("seq") == 2
    assert [step["op"] for step in steps].count("end") == 2
    submitted = [event for step in steps for event in step.get("ev", []) if event[0] == "submit"]
    assert len(submitted) == 4
    assert (random.hex() in text) is payloads
    assert (len(submitted[1]) == 3) is payloads
    assert main(["decode", str(path)]) == 0


def test_the_command_records_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="qvb") as directory:
        words = ["--embedded", directory, "--domid", "0", "--backend", "2", "--record", "r"]
        socket_path = str(Path(directory) / "s")
        assert main(["device", *words, "--registers", "both", "--socket", socket_path]) == 2
    assert "one device" in capsys.readouterr().err


def test_the_command_says_why_tcp_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "--backend", "2", "--socket", "tcp=4711"]) == 2
    assert "descriptors" in capsys.readouterr().err


async def test_the_status_document_tells_of_the_client(tmp_path: Path) -> None:
    async with running_service(tmp_path, Registers.BOTH) as service:
        assert service.registers.status()["connected"] is False
        client = await service.connect()
        await service.run(STARTUP, client)
        await trio.to_thread.run_sync(client.device_reset)
        assert service.registers.status() == {
            "registers": "both",
            "clients": 1,
            "connected": True,
            "resets": 2,
            "commands": 1,
        }
        client.close()
        await wait_until(lambda: not service.registers.status()["connected"])
        assert not service.chain.bridge.running(), "the machine is off, and so is its TPM"
