"""XenStore at two levels below pyxs: raw messages, and the stock command-line tools."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
from collections.abc import Sequence

import trio

from qemu_vtpm_bridge.embedded.store import Connection, Store
from qemu_vtpm_bridge.embedded.wire import HEADER, Message, Op, StreamParser, pack_strings

TOOL_DEADLINE_S = 60


class Caller:
    """One connection to a store in this process, with its own request ids."""

    def __init__(self, store: Store, domid: int) -> None:
        self.store = store
        self.connection: Connection = store.connect(domid)
        self._ids = 0

    def call(self, op: int, payload: bytes, tx: int = 0) -> bytes | str:
        """Return the payload of the reply, or the name of the error."""
        self._ids += 1
        reply = self.store.request(self.connection, Message(op, self._ids, tx, payload))
        assert (reply.req_id, reply.tx_id) == (self._ids, tx)
        if reply.type == Op.ERROR:
            return reply.payload.rstrip(b"\0").decode()
        assert reply.type == op
        return reply.payload

    def strings(self, op: int, *strings: str, tx: int = 0) -> bytes | str:
        return self.call(op, pack_strings([string.encode() for string in strings]), tx)

    def read(self, path: str, tx: int = 0) -> bytes | str:
        return self.strings(Op.READ, path, tx=tx)

    def write(self, path: str, value: bytes = b"", tx: int = 0) -> bytes | str:
        return self.call(Op.WRITE, path.encode() + b"\0" + value, tx)

    def perms(self, path: str, *permissions: str, tx: int = 0) -> bytes | str:
        return self.strings(Op.SET_PERMS, path, *permissions, tx=tx)

    def begin(self) -> int:
        raw = self.call(Op.TRANSACTION_START, b"\0")
        assert isinstance(raw, bytes)
        return int(raw[:-1])

    def end(self, tx: int, *, commit: bool = True) -> bytes | str:
        return self.call(Op.TRANSACTION_END, b"T\0" if commit else b"F\0", tx)

    def events(self) -> list[tuple[str, str]]:
        """Return and forget the watch events that wait, as (path, token)."""
        raw = [message.payload.split(b"\0") for message in self.connection.events]
        self.connection.events.clear()
        return [(path.decode(), token.decode()) for path, token, _ in raw]


async def raw_exchange(path: str, sent: bytes) -> list[Message]:
    """Send bytes to a XenStore socket; return what comes until it is closed."""
    received = []
    parser = StreamParser()
    with trio.socket.socket(socket.AF_UNIX) as client:
        await client.connect(path)
        await client.send(sent)
        while True:
            try:
                raw = await client.recv(65536)
            except ConnectionResetError:
                raw = b""
            if not raw:
                return received
            received += list(parser.feed(raw))


def message(op: int, payload: bytes, req_id: int = 1, tx: int = 0) -> bytes:
    return HEADER.pack(op, req_id, tx, len(payload)) + payload


async def tool(
    path: str, name: str, *words: str, check: bool = True
) -> subprocess.CompletedProcess[bytes]:
    """Run xenstore-`name` against the XenStore at this socket."""
    with trio.fail_after(TOOL_DEADLINE_S):
        return await trio.run_process(
            [f"xenstore-{name}", *words],
            env=tool_environment(path),
            capture_stdout=True,
            capture_stderr=True,
            check=check,
        )


async def printed(path: str, name: str, *words: str) -> list[str]:
    """Return the lines that a tool prints."""
    return (await tool(path, name, *words)).stdout.decode().splitlines()


def tool_environment(path: str) -> dict[str, str]:
    return {**os.environ, "XENSTORED_PATH": path}


class ToolWatch:
    """A running xenstore-watch."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._raw = b""

    async def line(self) -> str:
        """Return the next path that it prints."""
        assert self._process.stdout is not None
        with trio.fail_after(TOOL_DEADLINE_S):
            while b"\n" not in self._raw:
                chunk = await self._process.stdout.receive_some()
                assert chunk, "xenstore-watch ended"
                self._raw += chunk
        line, self._raw = self._raw.split(b"\n", 1)
        return line.decode()


async def start_watch(nursery: trio.Nursery, path: str, watched: Sequence[str]) -> ToolWatch:
    """Start xenstore-watch; it is killed with the nursery."""
    run = functools.partial(
        trio.run_process,
        ["stdbuf", "-oL", "xenstore-watch", *watched],
        env=tool_environment(path),
        stdout=subprocess.PIPE,
        check=False,
    )
    return ToolWatch(await nursery.start(run))
