"""A pyxs that cannot hang: the router and the client underneath `store.py`.

Purpose: pyxs 0.4.1 speaks XenStore's protocol well as long as xenstored does.  Where
xenstored dies, babbles or says nothing, its callers wait for ever; this module keeps
its Client, its transactions and its packets, and replaces what waits.

Theory of operation.  `SafeRouter`'s thread polls (so descriptors above 1024 work) and
cuts packets out of whatever has arrived, so a packet that stops half-way blocks nobody.
Whatever ends the thread fails every request that waits and every one that comes later,
and tells the watches.  Request ids stay within their 32 bits.  A forked child may not
use the parent's router: its answers would go to the parent, and nothing that the child
does may end the parent's connection.  A request leaves in one piece (`_send_whole`).

On a socket any number of requests may wait for their answers; on Linux' device it is one.
While a WATCH or UNWATCH is written to it, the kernel holds a lock of that open file and
waits for xenstored; the thread that hands xenstored's answers out needs the same lock for
the answer to an earlier request of that file.  Neither ever goes on, and with them stands
all of the domain's XenStore, its disks' included.

Keeps P9.  Who may lie: xenstored, in every byte.

Source: Xen's public header io/xs_wire.h; docs/misc/xenstore.txt; Linux'
drivers/xen/xenbus/xenbus_dev_frontend.c (msgbuffer_mutex).
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final, Self, TypeVar

import pyxs
from pyxs._internal import Op, Packet
from pyxs.client import RVar
from pyxs.connection import (
    PacketConnection,
    UnixSocketConnection,
    XenBusConnection,
    _UnixSocketTransport,
)

from ..errors import XenError

log = logging.getLogger(__name__)

T = TypeVar("T")

PAYLOAD_MAX_BYTES: Final = 4096
DIRECTORY_MAX_BYTES: Final = 1 << 20
"""oxenstored keeps to no limit in listing a directory, and so sends 32768 domains in one."""

OP_DIRECTORY_PART: Final = 22

_HEADER: Final = Packet._struct
_READ_BYTES: Final = 65536
_ID_MASK: Final = 0xFFFFFFFF
_SEND_TIMEOUT_S: Final = 5
_END_TIMEOUT_S: Final = 2.0
"""For a thread that is at work on a connection that has ended to find that out."""


class StoreGone(XenError):
    """The connection to XenStore is dead, or its answer did not come in time."""


class StoreError(XenError):
    """XenStore refused a request; `errno` says why."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"{what}: {os.strerror(number)}")
        self.errno = number


class SafeRouter(pyxs.Router):  # type: ignore[misc]  # pyxs has no types
    """One connection to XenStore, shared by clients and watches."""

    def __init__(
        self, connection: PacketConnection, on_death: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(connection)
        self._ids = itertools.count(1)
        self._pid = os.getpid()
        self._state_lock = threading.Lock()
        self._on_death = on_death
        self._sinks: dict[bytes, Callable[[bytes], None]] = {}
        one_at_a_time = isinstance(connection, XenBusConnection)
        self.turn: AbstractContextManager[object] = (
            threading.Lock() if one_at_a_time else nullcontext()
        )
        """To be held from sending a request until its answer is there."""
        self.death: str | None = None
        """Why the connection ended; None while it lives."""

    # The thread.

    def __call__(self) -> None:
        """Relay packets until the connection ends; pyxs starts its thread with this."""
        reason = "closed"
        try:
            self._relay()
        except (OSError, ValueError) as error:
            reason = str(error)
        finally:
            self._die(reason)

    def _relay(self) -> None:
        poll = select.poll()
        fd = self.connection.fileno()
        poll.register(fd, select.POLLIN)
        poll.register(self.r_terminator, select.POLLIN)
        buffer = bytearray()
        while True:
            ready = [ready_fd for ready_fd, _ in poll.poll()]
            if self.r_terminator.fileno() in ready:
                return
            raw = os.read(fd, _READ_BYTES)
            if not raw:
                raise ConnectionResetError("xenstored closed the connection")
            buffer += raw
            self._cut(buffer)

    def _cut(self, buffer: bytearray) -> None:
        while len(buffer) >= _HEADER.size:
            op, rq_id, tx_id, size = _HEADER.unpack_from(buffer)
            if size > (DIRECTORY_MAX_BYTES if op == Op.DIRECTORY else PAYLOAD_MAX_BYTES):
                raise ValueError(f"xenstored announced a payload of {size} bytes")
            end = _HEADER.size + size
            if len(buffer) < end:
                return
            payload = bytes(buffer[_HEADER.size : end])
            del buffer[:end]
            if op == Op.WATCH_EVENT:
                self._dispatch(payload)
            else:
                self._answer(Packet._make((op, rq_id, tx_id, size, payload)))

    def _dispatch(self, payload: bytes) -> None:
        # Newer protocols may add fields behind these two.
        path, token, *_ = [*payload.split(b"\0"), b"", b""]
        sink = self._sinks.get(token)
        if sink is not None:
            sink(path)

    def _answer(self, packet: Packet) -> None:
        with self._state_lock:
            waiter = self.rvars.pop(packet.rq_id, None)
        if waiter is None:
            raise ValueError(f"xenstored answered a request that was not made ({packet.rq_id})")
        waiter.set(packet)

    def _die(self, reason: str) -> None:
        with self._state_lock:
            self.death = self.death or reason
            waiters = list(self.rvars.values())
            self.rvars.clear()
        for waiter in waiters:
            waiter.set(_dead_packet())
        self._close_transport()
        self.r_terminator.close()
        self._on_death()

    def _close_transport(self) -> None:
        self._shut_down()
        # Nobody may be sending: the descriptor's number may be another file's in a moment.
        # Who does not come back from the kernel keeps it.
        if self.send_lock.acquire(timeout=_END_TIMEOUT_S):
            try:
                with suppress(OSError, pyxs.PyXSError):
                    self.connection.close()
            finally:
                self.send_lock.release()

    def _shut_down(self) -> None:
        """Free a thread that is blocked in sending, where the transport is a socket."""
        transport = self.connection.transport
        with suppress(OSError, AttributeError):
            transport.sock.shutdown(socket.SHUT_RDWR)

    # Any thread.

    def start(self) -> None:
        """Connect and start the thread; raises StoreGone."""
        try:
            self.connection.connect()
        except pyxs.PyXSError as error:
            raise cannot_be_reached(self.connection.path, error) from error
        with self._state_lock:
            if self.death is None:
                self.thread.start()
                return
        # It took so long that nobody waits any more.
        self._close_transport()
        raise StoreGone(f"the XenStore connection is dead: {self.death}")

    def next_id(self) -> int:
        """Return a request id that no waiting request has."""
        while True:
            number = next(self._ids) & _ID_MASK
            if number not in self.rvars:
                return number

    def send(self, packet: Packet) -> RVar:
        """Send a request; the answer comes through what is returned.  Raises StoreGone."""
        if os.getpid() != self._pid:
            raise StoreGone("a XenStore connection was used in a forked process")
        waiter = RVar()
        with self._state_lock:
            if self.death is not None:
                raise StoreGone(f"the XenStore connection is dead: {self.death}")
            self.rvars[packet.rq_id] = waiter
        try:
            with self.send_lock:
                _send_whole(self.connection, packet)
        except (OSError, pyxs.PyXSError, AttributeError) as error:
            # AttributeError: the thread closed the transport between two lines of pyxs.
            self.kill(f"sending failed: {error}")
            raise StoreGone(f"the XenStore connection broke: {error}") from error
        return waiter

    def kill(self, reason: str) -> None:
        """End the connection: everyone who waits gets an error.  Returns at once."""
        with self._state_lock:
            if self.death is not None:
                return
            self.death = reason
        if os.getpid() != self._pid:
            return  # the connection and the thread are the parent's
        self._shut_down()
        with suppress(OSError):
            self.w_terminator.send(b"\0")

    def terminate(self) -> None:
        """End the connection and its thread.  Safe to call twice."""
        self.kill("closed")
        if os.getpid() != self._pid:
            return
        if self.thread.ident is None:
            self.r_terminator.close()
        elif self.thread.is_alive():
            self.thread.join(2 * _END_TIMEOUT_S)
        self.w_terminator.close()

    def set_sink(self, token: bytes, sink: Callable[[bytes], None] | None) -> None:
        """Send a token's events to `sink`, which runs in the router's thread."""
        if sink is None:
            self._sinks.pop(token, None)
        else:
            self._sinks[token] = sink


class SafeClient(pyxs.Client):  # type: ignore[misc]
    """pyxs' client over a `SafeRouter`: every wait ends, and every failure has a name."""

    def execute_command(self, op: int, *args: bytes, **kwargs: Any) -> bytes:
        """Send one request and return its payload without trailing NULs.

        Raises StoreError and StoreGone.  Replaces pyxs' own, which refuses values
        that XenStore takes (empty, 8-bit) and knows no DIRECTORY_PART.
        """
        del kwargs
        payload = b"".join(args)
        if len(payload) > PAYLOAD_MAX_BYTES:
            raise StoreError(errno.E2BIG, "a request to XenStore")
        router: SafeRouter = self.router
        packet = Packet._make((op, router.next_id(), self.tx_id, len(payload), payload))
        with router.turn:
            reply = router.send(packet).get()
        if reply.op == Op.ERROR:
            if router.death is not None:
                raise StoreGone(f"the XenStore connection died: {router.death}")
            raise _refusal(reply.payload)
        if reply.op != op or reply.tx_id != self.tx_id:
            router.kill("xenstored answered another request")
            raise StoreGone("xenstored's answer does not fit the request")
        return bytes(reply.payload.rstrip(b"\0"))


def _send_whole(connection: PacketConnection, packet: Packet) -> None:
    """Send a request in one piece, where pyxs sends its header and then its payload.

    xenstored reads both from a socket that blocks, so between the two it serves nobody: who is
    stopped there, or only has to wait for a CPU, holds up every domain's XenStore.
    """
    header = _HEADER.pack(packet.op, packet.rq_id, packet.tx_id, packet.size)
    connection.transport.send(header + packet.payload)


def _refusal(raw_name: bytes) -> pyxs.PyXSError:
    """Return the error that xenstored's answer names."""
    name = raw_name.rstrip(b"\0").decode("ascii", "replace")
    number = getattr(errno, name, errno.EIO) if name.startswith("E") else errno.EIO
    return pyxs.PyXSError(number, os.strerror(number))


def _dead_packet() -> Packet:
    return Packet._make((Op.ERROR, 0, 0, 0, b"ENOTCONN\0"))


class _SocketTransport(_UnixSocketTransport):  # type: ignore[misc]
    """pyxs' transport, but connecting and sending end, and nothing stays open behind it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        timeout = struct.pack("@ll", _SEND_TIMEOUT_S, 0)
        # Bounds connect as well: a xenstored that accepts nobody lets it block.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    @classmethod
    def to(cls, path: str) -> Self:
        """Connect to a path."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            transport = cls(sock)
            sock.connect(path)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            sock.close()
            raise pyxs.ConnectionError(str(error)) from error
        return transport

    def close(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class _SocketConnection(UnixSocketConnection):  # type: ignore[misc]
    def create_transport(self) -> _SocketTransport:
        return _SocketTransport.to(self.path)


class BrokeredConnection(UnixSocketConnection):  # type: ignore[misc]
    """A connection on a socket that another process relays."""

    def __init__(self, path: str, make_socket: Callable[[], socket.socket]) -> None:
        """`path` is where XenStore is; `make_socket` connects, and raises what that raises."""
        super().__init__(path)
        self._make_socket = make_socket

    def create_transport(self) -> _SocketTransport:
        return _SocketTransport(self._make_socket())


def connection_to(path: str) -> PacketConnection:
    """Return pyxs' connection for a unix socket, or for a device such as /dev/xen/xenbus."""
    if path.startswith(("/dev/", "/proc/")):
        return XenBusConnection(path)
    return _SocketConnection(path)


class EarlyConnection:
    """A connection on which this thread itself waits for answers, later somebody's `Store`.

    For what has to be asked before there are threads.  Nothing may be in flight when the
    transport is handed on.
    """

    def __init__(self, path: str) -> None:
        """Connect; raises StoreGone."""
        self._connection = connection_to(path)
        try:
            self._connection.connect()
        except pyxs.PyXSError as error:
            raise cannot_be_reached(path, error) from error

    def read(self, path: str) -> bytes | None:
        """Return a node's value, None where there is none to be read; else as `ask`."""
        return self.ask(path, lambda raw: self.execute_command(Op.READ, raw + b"\0"))

    def ask(self, path: str, function: Callable[[bytes], T]) -> T | None:
        """Call `function` with the path; None where there is nothing to be read.

        Raises StoreError and StoreGone.  Blocks, for some seconds at most.
        """
        try:
            return function(path.encode())
        except pyxs.PyXSError as error:
            if error.args[0] in (errno.ENOENT, errno.EACCES):
                return None
            raise StoreError(error.args[0], f"reading {path}") from error

    def execute_command(self, op: int, *args: bytes) -> bytes:
        """Send one request and return its payload without trailing NULs.

        Raises pyxs' error where XenStore refuses, and StoreGone where its answer is none or
        does not come in time.
        """
        payload = b"".join(args)
        try:
            _send_whole(self._connection, Packet._make((op, 0, 0, len(payload), payload)))
            raw_op, rq_id, _, size = _HEADER.unpack(self._receive(_HEADER.size))
            if size > PAYLOAD_MAX_BYTES:
                raise StoreGone(f"xenstored announced a payload of {size} bytes")
            reply = self._receive(size)
        except (OSError, pyxs.PyXSError) as error:
            raise StoreGone(f"the XenStore connection broke: {error}") from error
        if raw_op == Op.ERROR:
            raise _refusal(reply)
        if (raw_op, rq_id) != (op, 0):
            raise StoreGone("xenstored's answer does not fit the request")
        return reply.rstrip(b"\0")

    def _receive(self, size_bytes: int) -> bytes:
        fd = self._connection.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        raw = b""
        while len(raw) < size_bytes:
            if not poll.poll(_SEND_TIMEOUT_S * 1000):
                raise StoreGone(f"xenstored did not answer within {_SEND_TIMEOUT_S} s")
            chunk = os.read(fd, size_bytes - len(raw))
            if not chunk:
                raise StoreGone("xenstored closed the connection")
            raw += chunk
        return raw

    def hand_on(self) -> PacketConnection:
        """Return the connection for a router, which then owns it."""
        return self._connection

    def close(self) -> None:
        """Close a connection that was not handed on."""
        with suppress(OSError, pyxs.PyXSError):
            self._connection.close()


def cannot_be_reached(path: str, error: Exception) -> StoreGone:
    """Return the error of a XenStore to which no connection can be made."""
    return StoreGone(
        f"XenStore cannot be reached at {path}: {error}",
        next_step="is xenstored running, and may this user connect to it?",
    )
