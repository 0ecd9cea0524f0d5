"""A real QEMU whose guest is the test: qtest drives its TIS registers, QMP the machine."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.support.qtest import BASE, QEMU

DEADLINE_S = 60.0
ACCESS, STS, FIFO = BASE + 0x00, BASE + 0x18, BASE + 0x24
REQUEST_USE, READY, GO, DATA_AVAIL = 0x02, 0x40, 0x20, 0x10


class Lines:
    """Lines of text over a socket that QEMU connects to."""

    def __init__(self, path: Path) -> None:
        self._listener = trio.socket.socket(socket.AF_UNIX)
        self._path = path
        self._stream: trio.SocketStream | None = None
        self._unread = b""

    async def listen(self) -> None:
        await self._listener.bind(str(self._path))
        self._listener.listen(1)

    async def accept(self) -> None:
        with trio.fail_after(DEADLINE_S):
            connection, _ = await self._listener.accept()
        self._stream = trio.SocketStream(connection)

    async def send(self, line: str) -> None:
        assert self._stream is not None
        await self._stream.send_all(line.encode() + b"\n")

    async def line(self) -> str:
        assert self._stream is not None
        with trio.fail_after(DEADLINE_S):
            while b"\n" not in self._unread:
                chunk = await self._stream.receive_some()
                if not chunk:
                    raise EOFError("QEMU is gone")
                self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def close(self) -> None:
        self._listener.close()
        if self._stream is not None:
            self._stream.socket.close()


class Qemu:
    """One QEMU with a TIS device and the emulator backend at a bridge's socket."""

    def __init__(self, process: trio.Process, qtest: Lines, qmp: Lines, log: Path) -> None:
        self.process = process
        self._qtest = qtest
        self._qmp = qmp
        self._log = log
        self._events: list[str] = []

    # The machine.

    async def qmp(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a QMP command: it has `return` or `error`."""
        await self.send_qmp(command, **arguments)
        while True:
            message: dict[str, Any] = json.loads(await self._qmp.line())
            if "return" in message or "error" in message:
                return message
            self._events.append(message["event"])

    async def send_qmp(self, command: str, **arguments: Any) -> None:
        """Send a QMP command without waiting for an answer."""
        await self._qmp.send(json.dumps({"execute": command, "arguments": arguments}))

    async def reset(self) -> None:
        """Reset the machine, and return once that is done."""
        self._events.clear()
        assert "return" in await self.qmp("system_reset")
        while "RESET" not in self._events:
            self._events.append(json.loads(await self._qmp.line())["event"])

    async def wait(self) -> int:
        """Return QEMU's exit status."""
        with trio.fail_after(DEADLINE_S):
            return await self.process.wait()

    def said(self) -> str:
        """What QEMU wrote on stderr."""
        return self._log.read_text()

    # The guest.

    async def _ask(self, line: str) -> str:
        await self._qtest.send(line)
        while not (answer := await self._qtest.line()).startswith("OK"):
            assert answer.startswith("IRQ"), answer
        return answer.removeprefix("OK").strip()

    async def read(self, address: int) -> int:
        return int(await self._ask(f"readb {address:#x}"), 16)

    async def write(self, address: int, value: int) -> None:
        await self._ask(f"writeb {address:#x} {value:#x}")

    async def submit(self, command: bytes) -> None:
        """Write a command and tpmGo."""
        await self.write(ACCESS, REQUEST_USE)
        await self.write(STS, READY)
        for byte in command:
            await self.write(FIFO, byte)
        await self.write(STS, GO)

    async def response(self) -> bytes:
        """Wait for the response and read it, as a polling driver does."""
        with trio.fail_after(DEADLINE_S):
            while not await self.read(STS) & DATA_AVAIL:
                pass
        raw = b""
        while await self.read(STS) & DATA_AVAIL:
            raw += bytes([await self.read(FIFO)])
        return raw

    async def tpm(self, command: bytes) -> bytes:
        """Run a command."""
        await self.submit(command)
        return await self.response()

    async def code(self, command: bytes) -> int:
        """Run a command and return its response code."""
        return int.from_bytes((await self.tpm(command))[6:10], "big")


def tpm_words(tpm_socket: Path) -> list[str]:
    """Return the words for a TIS device whose TPM listens at the socket."""
    return [
        *("-chardev", f"socket,id=chr,path={tpm_socket}"),
        *("-tpmdev", "emulator,id=tpm0,chardev=chr"),
        *("-device", "tpm-tis,tpmdev=tpm0"),
    ]


@asynccontextmanager
async def running_qemu(
    tpm_socket: Path | None, program: Sequence[str] = (QEMU,), **options: Any
) -> AsyncIterator[Qemu]:
    """Give a QEMU that has connected to the bridge; its processors stand still.

    Without a socket `program`, QEMU by default and its first words, sees to the TPM.
    """
    with tempfile.TemporaryDirectory(prefix="qvq") as directory:
        place = Path(directory)
        qtest, qmp, log = Lines(place / "qtest"), Lines(place / "qmp"), place / "log"
        await qtest.listen()
        await qmp.listen()
        with log.open("wb") as out:
            process = await trio.lowlevel.open_process(
                [
                    *(*program, "-nodefaults", "-no-user-config", "-display", "none"),
                    *("-machine", "q35", "-accel", "tcg", "-S", "-m", "16"),
                    *("-qtest", f"unix:{place / 'qtest'}", "-qtest-log", "/dev/null"),
                    *("-chardev", f"socket,id=mon,path={place / 'qmp'}"),
                    *("-mon", "chardev=mon,mode=control"),
                    *([] if tpm_socket is None else tpm_words(tpm_socket)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=out,
                **options,
            )
        qemu = Qemu(process, qtest, qmp, log)
        try:
            await qtest.accept()
            await qmp.accept()
            await qmp.line()
            assert "return" in await qemu.qmp("qmp_capabilities")
            yield qemu
        finally:
            qtest.close()
            qmp.close()
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
