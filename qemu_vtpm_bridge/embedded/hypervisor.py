"""The hypervisor stand-in: granted pages as sealed memfds, event channels as eventfds.

Theory of operation.  Grants and ports belong to the connection that made them, as they
belong to an open /dev/xen/gntalloc or evtchn, and go with it.  An event channel is a
pair of eventfds; each end of it listens to one and writes to the other, so the bytes of
a notification do not pass through this process.  What Xen would refuse is refused:
mapping what was granted to another domain, binding a port that waits for somebody else.

Who may lie: every domain.  A request is twelve bytes or the connection ends.

Source: Xen's public headers grant_table.h and event_channel.h; the packets are this
project's own (c_shim/xen_embedded.c is their client).
"""

from __future__ import annotations

import enum
import errno
import fcntl
import itertools
import os
import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

PAGE_BYTES: Final = 4096
REQUEST: Final = struct.Struct("=III")
REPLY: Final = struct.Struct("=iI")
GRANTS_MAX: Final = 1024
PORTS_MAX: Final = 1024

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Op(enum.IntEnum):
    """Requests; the two arguments are a domid and a reference or port."""

    HELLO = 1
    GRANT_SHARE = 2
    GRANT_END = 3
    GRANT_MAP = 4
    GRANT_UNMAP = 5
    EVTCHN_ALLOC = 6
    EVTCHN_BIND = 7
    EVTCHN_CLOSE = 8


class Refused(Exception):
    """Xen would say no; `errno` says why."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.errno = number


@dataclass(slots=True)
class Grant:
    """A page that its owner lets `grantee` map."""

    grantee: int
    memfd: int
    owner: Connection
    maps: int = 0
    ended: bool = False
    """Its owner ended it, but it is mapped, and until it is not, Xen lets it be mapped."""


@dataclass(slots=True)
class Port:
    """One end of an event channel; unbound while `peer` is None."""

    domid: int
    number: int
    remote_domid: int
    receive_fd: int
    notify_fd: int
    owner: Connection
    peer: Port | None = None


@dataclass(eq=False, slots=True)
class Connection:
    """One client, acting as `domid`, with what it holds."""

    domid: int
    grants: set[int] = field(default_factory=set)
    maps: Counter[tuple[int, int]] = field(default_factory=Counter)
    ports: set[int] = field(default_factory=set)


class Hypervisor:
    """All domains' grants and ports."""

    def __init__(self) -> None:
        self._grants: dict[tuple[int, int], Grant] = {}
        self._ports: dict[tuple[int, int], Port] = {}
        self._refs = itertools.count(8)  # Xen keeps the first eight for itself
        self._numbers = itertools.count(1)

    def connect(self, domid: int) -> Connection:
        """Return a new connection of a domain."""
        return Connection(domid)

    def disconnect(self, connection: Connection) -> None:
        """Release what the connection held; mapped pages live on with their mappings."""
        for domid, ref in list(connection.maps.elements()):
            self._grant_unmap(connection, domid, ref)
        for ref in list(connection.grants):
            self._grant_end(connection, 0, ref)
        for number in list(connection.ports):
            self._close(connection, 0, number)

    def request(self, connection: Connection, raw: bytes) -> tuple[bytes, list[int]]:
        """Carry a request out; return the reply and the descriptors to send along.

        The descriptors stay this object's.  Raises ValueError for what is no request.
        """
        if len(raw) != REQUEST.size:
            raise ValueError(f"a request has {REQUEST.size} bytes, here are {len(raw)}")
        number, domid, argument = REQUEST.unpack(raw)
        try:
            handler = _HANDLERS.get(number)
            if handler is None:
                raise Refused(errno.ENOSYS)
            value, fds = handler(self, connection, domid, argument)
        except Refused as refused:
            return REPLY.pack(-refused.errno, 0), []
        return REPLY.pack(0, value), fds

    def _hello(self, connection: Connection, domid: int, argument: int) -> tuple[int, list[int]]:
        del domid, argument
        return connection.domid, []

    # Grants.

    def _grant_share(self, connection: Connection, domid: int, _: int) -> tuple[int, list[int]]:
        if len(connection.grants) >= GRANTS_MAX:
            raise Refused(errno.ENOSPC)
        memfd = os.memfd_create("granted page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(memfd, PAGE_BYTES)
        fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, _SEALS)
        ref = next(self._refs)
        self._grants[connection.domid, ref] = Grant(domid, memfd, connection)
        connection.grants.add(ref)
        return ref, [memfd]

    def _grant_end(self, connection: Connection, _: int, ref: int) -> tuple[int, list[int]]:
        if ref not in connection.grants:
            raise Refused(errno.EINVAL)
        connection.grants.remove(ref)
        self._grants[connection.domid, ref].ended = True
        self._forget_grant(connection.domid, ref)
        return 0, []

    def _forget_grant(self, domid: int, ref: int) -> None:
        """Take a grant away once it was ended and nobody maps it."""
        grant = self._grants[domid, ref]
        if grant.ended and grant.maps == 0:
            os.close(self._grants.pop((domid, ref)).memfd)

    def _grant_map(self, connection: Connection, domid: int, ref: int) -> tuple[int, list[int]]:
        grant = self._grants.get((domid, ref))
        if grant is None or grant.grantee != connection.domid:
            raise Refused(errno.EINVAL)
        connection.maps[domid, ref] += 1
        grant.maps += 1
        return ref, [grant.memfd]

    def _grant_unmap(self, connection: Connection, domid: int, ref: int) -> tuple[int, list[int]]:
        if not connection.maps[domid, ref]:
            raise Refused(errno.EINVAL)
        connection.maps[domid, ref] -= 1
        self._grants[domid, ref].maps -= 1
        self._forget_grant(domid, ref)
        return 0, []

    # Event channels.

    def _open(
        self, connection: Connection, remote_domid: int, receive_fd: int, notify_fd: int
    ) -> Port:
        if len(connection.ports) >= PORTS_MAX:
            raise Refused(errno.ENOSPC)
        number = next(self._numbers)
        port = Port(connection.domid, number, remote_domid, receive_fd, notify_fd, connection)
        self._ports[connection.domid, number] = port
        connection.ports.add(number)
        return port

    def _alloc(self, connection: Connection, domid: int, _: int) -> tuple[int, list[int]]:
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        port = self._open(connection, domid, os.eventfd(0, flags), os.eventfd(0, flags))
        return port.number, [port.receive_fd, port.notify_fd]

    def _bind(self, connection: Connection, domid: int, number: int) -> tuple[int, list[int]]:
        remote = self._ports.get((domid, number))
        if remote is None or remote.peer is not None or remote.remote_domid != connection.domid:
            raise Refused(errno.EINVAL)
        port = self._open(connection, domid, os.dup(remote.notify_fd), os.dup(remote.receive_fd))
        port.peer, remote.peer = remote, port
        # As Xen does: the binder finds an event pending, and looks at what is there.
        os.eventfd_write(port.receive_fd, 1)
        return port.number, [port.receive_fd, port.notify_fd]

    def _close(self, connection: Connection, _: int, number: int) -> tuple[int, list[int]]:
        if number not in connection.ports:
            raise Refused(errno.EINVAL)
        connection.ports.remove(number)
        port = self._ports.pop((connection.domid, number))
        if port.peer is not None:
            # The other end is unbound again, for the same domain, and is not told.
            port.peer.peer = None
        os.close(port.receive_fd)
        os.close(port.notify_fd)
        return 0, []


_HANDLERS: Final = {
    Op.HELLO: Hypervisor._hello,
    Op.GRANT_SHARE: Hypervisor._grant_share,
    Op.GRANT_END: Hypervisor._grant_end,
    Op.GRANT_MAP: Hypervisor._grant_map,
    Op.GRANT_UNMAP: Hypervisor._grant_unmap,
    Op.EVTCHN_ALLOC: Hypervisor._alloc,
    Op.EVTCHN_BIND: Hypervisor._bind,
    Op.EVTCHN_CLOSE: Hypervisor._close,
}
