"""A XenStore server that misbehaves, for what the real one cannot be made to do."""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from qemu_vtpm_bridge.embedded.wire import HEADER, Message, Op, StreamParser

Behaviour = Callable[[Message], bytes | None]
"""Gives the bytes for a request; none where it stays silent, None to hang up."""


def reply(request: Message, payload: bytes, **changes: int) -> bytes:
    """Return a reply, right except for what `changes` says of its header."""
    words = {"type": request.type, "req_id": request.req_id, "tx_id": request.tx_id}
    words |= {"length": len(payload)} | changes
    return HEADER.pack(words["type"], words["req_id"], words["tx_id"], words["length"]) + payload


def answer(request: Message) -> bytes:
    """Do what is asked, as far as anybody can tell."""
    values = {Op.READ: b"value", Op.TRANSACTION_START: b"1\0"}
    return reply(request, values.get(Op(request.type), b"OK\0"))


@dataclass
class BadXenstored:
    path: str
    behaviour: Behaviour = answer
    requests: list[Message] = field(default_factory=list)
    clients: list[trio.SocketStream] = field(default_factory=list)
    asked: trio.Event = field(default_factory=trio.Event)

    async def serve(self, client: trio.SocketStream) -> None:
        self.clients.append(client)
        parser = StreamParser()
        try:
            async for raw in client:
                for request in parser.feed(raw):
                    self.requests.append(request)
                    self.asked.set()
                    raw_reply = self.behaviour(request)
                    if raw_reply is None:
                        await client.aclose()
                        return
                    if raw_reply:
                        await client.send_all(raw_reply)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def send(self, raw: bytes) -> None:
        """Send something unasked for to the latest client."""
        await self.clients[-1].send_all(raw)

    async def hang_up(self) -> None:
        await self.clients[-1].aclose()


@asynccontextmanager
async def bad_xenstored(behaviour: Behaviour = answer) -> AsyncIterator[BadXenstored]:
    with tempfile.TemporaryDirectory(prefix="qvb") as directory:
        path = Path(directory) / "xenstored.sock"
        with trio.socket.socket(socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen(8)
            server = BadXenstored(str(path), behaviour)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    trio.serve_listeners, server.serve, [trio.SocketListener(listener)]
                )
                yield server
                nursery.cancel_scope.cancel()


def event(path: bytes, token: bytes, *more: bytes) -> bytes:
    payload = b"".join(string + b"\0" for string in (path, token, *more))
    return HEADER.pack(Op.WATCH_EVENT, 0, 0, len(payload)) + payload


HUGE = struct.pack("=IIII", Op.READ, 1, 0, 0x7FFFFFFF)
