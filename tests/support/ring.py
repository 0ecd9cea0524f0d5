"""A domain's side of XenStore's ring, shared by several clients as a guest's kernel shares it.

A guest reaches xenstored over one page and one event channel, so for xenstored all its
programs are one connection.  The kernel tells them apart, and so does `SharedRing`: it
gives every request a number of its own and every watch a token of its own, refuses a
transaction that is another client's, and takes back what a client leaves behind.

Source: Xen's public header io/xs_wire.h (xenstore_domain_interface); Linux'
xenbus_dev_frontend.c.
"""

from __future__ import annotations

import math
import mmap
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from qemu_vtpm_bridge.embedded.wire import (
    MalformedStream,
    Message,
    Op,
    StreamParser,
    pack_strings,
)

PAGE_BYTES: Final = 4096
_RING_BYTES: Final = 1024
_REQ, _RSP = 0, _RING_BYTES
_REQ_CONS, _REQ_PROD, _RSP_CONS, _RSP_PROD = range(512, 516)
"""Places of the four indexes, in words of 32 bits."""

VIRQ: Final = 0xFFFFFFFF
"""The event that tells the daemon to look which domains live."""

_EVENT: Final = struct.Struct("=I")


def send_event(daemon: Path, number: int) -> None:
    """Fire the daemon's event channel of a domain, or VIRQ."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.setblocking(False)
        # It has events waiting already, or it is gone.
        with suppress(BlockingIOError, ConnectionRefusedError, FileNotFoundError):
            ours.sendto(_EVENT.pack(number), str(daemon))


class Ring:
    """A domain's end of a page: what was written and not yet read, in both directions."""

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self._words = page.cast("I")

    def close(self) -> None:
        """Let go of the page, which is the caller's."""
        self._words.release()
        self._page.release()

    def read(self) -> bytes:
        """Take what the daemon wrote."""
        taken = bytearray()
        consumed, produced = self._words[_RSP_CONS], self._words[_RSP_PROD]
        while consumed != produced:
            at = consumed % _RING_BYTES
            size = min(_RING_BYTES - at, (produced - consumed) & 0xFFFFFFFF)
            taken += self._page[_RSP + at : _RSP + at + size]
            consumed = (consumed + size) & 0xFFFFFFFF
        self._words[_RSP_CONS] = consumed
        return bytes(taken)

    def write(self, raw: bytes | bytearray) -> int:
        """Put as much as there is room for; return how much."""
        consumed, produced = self._words[_REQ_CONS], self._words[_REQ_PROD]
        room = _RING_BYTES - ((produced - consumed) & 0xFFFFFFFF)
        put = 0
        while put < min(room, len(raw)):
            at = produced % _RING_BYTES
            size = min(_RING_BYTES - at, room - put, len(raw) - put)
            self._page[_REQ + at : _REQ + at + size] = raw[put : put + size]
            produced = (produced + size) & 0xFFFFFFFF
            put += size
        self._words[_REQ_PROD] = produced
        return put


class _Client:
    """One program of the domain: who waits for what."""

    def __init__(self, number: int, deliver: Callable[[bytes], None]) -> None:
        self.number = number
        self.deliver = deliver
        self.watches: set[tuple[bytes, bytes]] = set()
        self.transactions: set[int] = set()

    def mark(self, token: bytes) -> bytes:
        return b"%d:%s" % (self.number, token)


class SharedRing:
    """All clients of one domain on its ring.  Run `run`; then `serve` each client."""

    def __init__(self, directory: Path, domid: int) -> None:
        self.domid = domid
        with (directory / f"dom-{domid}.ring").open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), PAGE_BYTES)
        self._ring = Ring(memoryview(self._mapped))
        self._daemon = directory / "events.sock"
        self._path = directory / f"dom-{domid}.sock"
        self._running = False
        self._out = bytearray()
        self._waiting: dict[int, tuple[_Client | None, Message]] = {}
        self._clients: dict[int, _Client] = {}
        self._numbers = 0
        self._ids = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry bytes until cancelled."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as events:
            await events.bind(str(self._path))
            self._running = True
            parser = StreamParser()
            try:
                task_status.started()
                while True:
                    self._flush()
                    if raw := self._ring.read():
                        self._tell_daemon()
                        for message in parser.feed(raw):
                            self._from_daemon(message)
                        continue
                    await events.recv(16)
            finally:
                self._running = False
                self._path.unlink()
                self._ring.close()
                self._mapped.close()

    def _flush(self) -> None:
        if self._out:
            put = self._ring.write(self._out)
            del self._out[:put]
            if put:
                self._tell_daemon()

    def _tell_daemon(self) -> None:
        send_event(self._daemon, self.domid)

    # Requests.

    async def serve(self, client: trio.socket.SocketType) -> None:
        """Serve one client's connection until it ends."""
        self._numbers += 1
        out, receive = trio.open_memory_channel[bytes](math.inf)
        served = self._clients[self._numbers] = _Client(self._numbers, out.send_nowait)
        parser = StreamParser()

        async def send() -> None:
            async for raw in receive:
                left = memoryview(raw)
                while left:
                    left = left[await client.send(left) :]

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                while raw := await client.recv(65536):
                    for message in parser.feed(raw):
                        self._from_client(served, message)
                    self._flush()
                nursery.cancel_scope.cancel()
        except* (OSError, MalformedStream):
            pass
        finally:
            del self._clients[served.number]
            self._take_back(served)

    def _from_client(self, client: _Client, message: Message) -> None:
        payload = message.payload
        if message.tx_id and message.tx_id not in client.transactions:
            refusal = Message(Op.ERROR, message.req_id, message.tx_id, b"ENOENT\0")
            client.deliver(refusal.pack())
            return
        if message.type in (Op.WATCH, Op.UNWATCH) and payload.count(b"\0") == 2:
            path, token, rest = payload.split(b"\0")
            payload = pack_strings([path, client.mark(token)]) + rest
        self._request(client, message, payload)

    def _request(self, client: _Client | None, message: Message, payload: bytes) -> None:
        self._ids += 1
        self._waiting[self._ids] = (client, message)
        self._out += Message(message.type, self._ids, message.tx_id, payload).pack()

    def _take_back(self, client: _Client) -> None:
        """Undo what a client left: its watches and its transactions."""
        for path, token in client.watches:
            strings = pack_strings([path, client.mark(token)])
            self._request(None, Message(Op.UNWATCH, 0, 0, b""), strings)
        for tx_id in client.transactions:
            self._request(None, Message(Op.TRANSACTION_END, 0, tx_id, b""), b"F\0")
        client.watches.clear()
        client.transactions.clear()
        if self._running:
            self._flush()

    # Answers and events.

    def _from_daemon(self, message: Message) -> None:
        if message.type == Op.WATCH_EVENT:
            path, marked, *rest = message.payload.split(b"\0")
            number, _, token = marked.partition(b":")
            client = self._clients.get(int(number))
            payload = b"\0".join([path, token, *rest])
            if client is not None:
                client.deliver(Message(Op.WATCH_EVENT, 0, 0, payload).pack())
            return
        asked_by, request = self._waiting.pop(message.req_id)
        if asked_by is None:
            return
        self._note(asked_by, request, message)
        answer = Message(message.type, request.req_id, message.tx_id, message.payload)
        if asked_by.number in self._clients:
            asked_by.deliver(answer.pack())
        else:
            self._take_back(asked_by)

    @staticmethod
    def _note(client: _Client, request: Message, answer: Message) -> None:
        """Note what the client holds from now on."""
        succeeded = answer.type != Op.ERROR
        match request.type:
            case Op.WATCH | Op.UNWATCH if succeeded:
                path, token, _ = request.payload.split(b"\0")
                change = client.watches.add if request.type == Op.WATCH else client.watches.discard
                change((path, token))
            case Op.TRANSACTION_START if succeeded:
                client.transactions.add(int(answer.payload.rstrip(b"\0")))
            case Op.TRANSACTION_END if succeeded or answer.payload == b"EAGAIN\0":
                client.transactions.discard(request.tx_id)
