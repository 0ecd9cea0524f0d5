"""A client of swtpm's two channels, as QEMU is one; it says what it is told to say."""

from __future__ import annotations

import array
import socket
import struct
from pathlib import Path
from typing import Self

import trio

from qemu_vtpm_bridge.bridge.control import Command
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family

STARTUP = {
    Family.TPM_2_0: bytes.fromhex("80010000000c000001440000"),
    Family.TPM_1_2: bytes.fromhex("00c10000000c000000990001"),
}
GET_RANDOM = bytes.fromhex("80010000000c0000017b0010")
PCR_EXTEND_7 = bytes.fromhex(
    "80020000004100000182000000070000000940000009000000000000000001000b" + "5a" * 32
)
PCR_READ_7 = bytes.fromhex("8001000000140000017e00000001000b03800000")
ZERO_PCR = bytes(32)
DEADLINE_S = 60.0


class SwtpmClient:
    """One control connection, and the data channel that it gave."""

    def __init__(self, control: trio.socket.SocketType) -> None:
        self.control = control
        self.data: trio.SocketStream | None = None
        self._unread = b""

    @classmethod
    async def connect(cls, path: Path) -> Self:
        """Connect to a control socket."""
        control = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with trio.fail_after(DEADLINE_S):
                await control.connect(str(path))
        except BaseException:
            control.close()
            raise
        return cls(control)

    def close(self) -> None:
        """Leave without a word, as a QEMU that was killed."""
        self.control.close()
        if self.data is not None:
            self.data.socket.close()

    # Control.

    async def send(self, raw: bytes, fds: list[int] | None = None) -> None:
        """Send bytes in one message, with descriptors."""
        rights = array.array("i", fds or [])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
        with trio.fail_after(DEADLINE_S):
            await self.control.sendmsg([raw], ancillary)

    async def receive(self, size: int) -> bytes:
        """Return so many bytes, or fewer at the connection's end."""
        raw = b""
        with trio.fail_after(DEADLINE_S):
            while len(raw) < size:
                chunk = await self.control.recv(size - len(raw))
                if not chunk:
                    break
                raw += chunk
        return raw

    async def ask(self, command: int, body: bytes = b"", reply_bytes: int = 4) -> bytes:
        """Send a control command and return its answer."""
        await self.send(struct.pack(">I", command) + body)
        return await self.receive(reply_bytes)

    async def result(self, command: int, body: bytes = b"") -> int:
        """Send a control command and return its result word."""
        return int.from_bytes(await self.ask(command, body), "big")

    async def set_datafd(self) -> int:
        """Hand a data channel over; return the result word."""
        ours, theirs = socket.socketpair()
        with theirs:
            await self.send(struct.pack(">I", Command.CMD_SET_DATAFD), [theirs.fileno()])
            result = int.from_bytes(await self.receive(4), "big")
        if result:
            ours.close()
        else:
            ours.setblocking(False)
            self.data = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        return result

    async def init(self, flags: int = 0) -> int:
        """Power the TPM on."""
        return await self.result(Command.CMD_INIT, struct.pack(">I", flags))

    async def stop(self) -> int:
        """Power the TPM off."""
        return await self.result(Command.CMD_STOP)

    async def power_on(self) -> None:
        """Do what QEMU does at its start."""
        assert await self.set_datafd() == 0
        assert await self.stop() == 0
        assert await self.init() == 0

    # Data.

    async def write(self, raw: bytes) -> None:
        """Send bytes on the data channel."""
        assert self.data is not None
        with trio.fail_after(DEADLINE_S):
            await self.data.send_all(raw)

    async def response(self) -> bytes:
        """Return one response; checks that it is as long as it says (P2)."""
        assert self.data is not None
        with trio.fail_after(DEADLINE_S):
            while len(self._unread) < 10 or len(self._unread) < HEADER.unpack_from(self._unread)[1]:
                chunk = await self.data.receive_some(4096)
                assert chunk, f"the data channel ended after {self._unread.hex()}"
                self._unread += chunk
        size = HEADER.unpack_from(self._unread)[1]
        assert size >= 10
        raw, self._unread = self._unread[:size], self._unread[size:]
        return raw

    async def tpm(self, command: bytes) -> bytes:
        """Send a command and return its response, the only one that comes (P5)."""
        await self.write(command)
        raw = await self.response()
        assert not self._unread
        return raw

    async def code(self, command: bytes) -> int:
        """Send a command and return its response code."""
        return int(HEADER.unpack_from(await self.tpm(command))[2])

    async def startup(self, family: Family = Family.TPM_2_0) -> None:
        """Start the TPM, as firmware does."""
        assert await self.code(STARTUP[family]) == 0

    async def pcr_7(self) -> bytes:
        """Return PCR 7's SHA-256 value."""
        answer = await self.tpm(PCR_READ_7)
        assert HEADER.unpack_from(answer)[2] == 0, answer.hex()
        return answer[-32:]
