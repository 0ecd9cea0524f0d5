"""The driver of a vfio-user connection: one blocking thread a client.

Theory of operation.  An access of a register costs less than a switch between tasks, so
nothing here is asynchronous: the thread waits for the client and, while a command runs,
for the pump.  Whoever wants it to end shuts the client's socket down; there is nothing
else that it waits for.

Keeps P1.  Who may lie: the client, in what it sends and in what its descriptors are.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from .mmio import Mmio
from .vfio_user import Session
from .vfio_user_frames import FDS_MAX

_READ_BYTES: Final = 65536
_CMSG_ROOM: Final = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
_EVENTFD: Final = "anon_inode:[eventfd]"
_ONE_EVENT: Final = (1).to_bytes(8, "little")


def serve(client: socket.socket, mmio: Mmio, on_reset: Callable[[], None]) -> None:
    """Serve one client until it leaves or its socket is shut down; blocks, in its own thread.

    Raises QemuProtocolError where the client cannot be followed, XenError where the pump
    has gone, and what `on_reset` raises.
    """
    session = Session(mmio, on_reset)
    poll = select.poll()
    poll.register(client, select.POLLIN)
    poll.register(mmio, select.POLLIN)
    client_fd = client.fileno()
    try:
        while True:
            if mmio.waiting:
                ready = dict(poll.poll())
                if mmio.fileno() in ready:
                    mmio.collect()
                    session.follow_interrupt()
                    _signal(session)
                if client_fd not in ready:
                    continue
            raw, ancillary, _flags, _address = client.recvmsg(
                _READ_BYTES, _CMSG_ROOM, socket.MSG_CMSG_CLOEXEC
            )
            fds = _descriptors(ancillary) if ancillary else ()
            if not raw:
                session.unwanted_fds += fds
                return
            reply = session.feed(raw, fds)
            if session.intx.signals:
                _signal(session)
            if session.unwanted_fds:
                _close_all(session.unwanted_fds)
            if reply:
                client.sendall(reply)
    except (ConnectionError, BrokenPipeError):
        return
    finally:
        _close_all(session.close())


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _signal(session: Session) -> None:
    """Write the signals that are due.

    Nothing but an eventfd is written to, and never so that this thread could wait: a
    client that gives a full pipe would keep it from ever ending.
    """
    signals, session.intx.signals = session.intx.signals, 0
    fd = session.intx.eventfd
    if not signals or fd is None:
        return
    with suppress(OSError):
        if str(Path(f"/proc/self/fd/{fd}").readlink()) == _EVENTFD:
            os.set_blocking(fd, False)
            os.write(fd, _ONE_EVENT)


def _close_all(fds: list[int]) -> None:
    while fds:
        with suppress(OSError):
            os.close(fds.pop())
