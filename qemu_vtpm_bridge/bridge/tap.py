"""Recording what QEMU says to the bridge: control requests, commands, responses.

Purpose: `run --record FILE`, for finding out what a guest's driver or QEMU does.  It stands
between the door and the TPM behind it, and is not there when nothing is recorded.

Theory of operation: a `TappedTpm` is a `TpmBehind` that passes each call on.  A data
socket is not passed on itself: the TPM gets one end of a pair, and two tasks carry bytes
between the other end and QEMU, unchanged and as they come, while a `Cutter` finds the
messages in them.  Recording costs a command two more ways through Python; nothing else
changes.  When one side hangs up, so does the other.

Keeps P10: the recorder takes headers and lengths, unless it was told to keep payloads.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Final

import trio

from .chardev import TpmBehind
from .record import Recorder
from .tpm import HEADER, HEADER_SIZE

MESSAGE_MAX_BYTES: Final = 1 << 16
"""A message that says that it is longer is taken as what has come of it."""
_READ_BYTES: Final = 1 << 16


class Cutter:
    """Finds messages in a stream by the size in their headers."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def feed(self, raw: bytes) -> list[bytes]:
        """Take what one read gave; return the messages that are whole now.

        A size that cannot be ends the cutting: all that has come is then one message.
        """
        self._kept += raw
        messages = []
        while len(self._kept) >= HEADER_SIZE:
            size = HEADER.unpack_from(self._kept)[1]
            if not HEADER_SIZE <= size <= MESSAGE_MAX_BYTES:
                size = len(self._kept)
            if len(self._kept) < size:
                break
            messages.append(bytes(self._kept[:size]))
            del self._kept[:size]
        return messages


class TappedTpm:
    """The TPM behind the door, with everything written down."""

    def __init__(self, inner: TpmBehind, recorder: Recorder, nursery: trio.Nursery) -> None:
        """`nursery` runs the tasks that carry the data; it outlives the door."""
        self._inner = inner
        self._recorder = recorder
        self._nursery = nursery
        self._locality = 0
        self._qemu: socket.socket | None = None

    async def attach_data(self, data_socket: socket.socket) -> None:
        """Serve commands from this socket; takes ownership."""
        self._recorder.control("CMD_SET_DATAFD")
        ours, theirs = socket.socketpair()
        self._qemu = data_socket
        for end in (ours, data_socket):
            end.setblocking(False)
        await self._inner.attach_data(theirs)
        self._nursery.start_soon(self._carry, data_socket, ours)

    async def _carry(self, qemu: socket.socket, pump: socket.socket) -> None:
        """Carry bytes both ways until one side hangs up; closes both."""
        with (
            trio.socket.from_stdlib_socket(qemu) as left,
            trio.socket.from_stdlib_socket(pump) as right,
        ):
            async with trio.open_nursery() as both:
                for source, sink, record in (
                    (left, right, self._command),
                    (right, left, self._recorder.done),
                ):
                    both.start_soon(_pass_on, source, sink, record, both.cancel_scope)
        if self._qemu is qemu:
            self._qemu = None

    def _command(self, command: bytes) -> None:
        self._recorder.command(self._locality, command)

    async def detach_data(self) -> None:
        """Close the data channel, if there is one; a command in flight has half a second."""
        self._recorder.control("CMD_SHUTDOWN")
        await self._inner.detach_data()

    def data_attached(self) -> bool:
        """Return whether a data channel is open and its peer has not hung up."""
        if self._qemu is not None:
            # The TPM's end of the pair may not have heard yet that QEMU is gone.
            poll = select.poll()
            poll.register(self._qemu, 0)
            if poll.poll(0):
                return False
        return self._inner.data_attached()

    async def data_detached(self) -> None:
        """Return once there is no data channel."""
        await self._inner.data_detached()

    async def init(self, *, resume: bool) -> int:
        """Power the TPM on anew, or let it go on where it was."""
        self._recorder.control("CMD_INIT to resume" if resume else "CMD_INIT")
        return await self._inner.init(resume=resume)

    async def stop(self) -> int:
        """Switch the TPM off."""
        self._recorder.control("CMD_STOP")
        return await self._inner.stop()

    async def set_buffer_size(self, wanted_bytes: int) -> tuple[int, int, int]:
        """Set the largest response, 0 to ask."""
        self._recorder.control(f"CMD_SET_BUFFERSIZE {wanted_bytes}")
        return await self._inner.set_buffer_size(wanted_bytes)

    def running(self) -> bool:
        """Return whether the TPM was switched on."""
        return self._inner.running()

    def set_locality(self, locality: int) -> None:
        """Set the locality of the commands that follow."""
        self._recorder.control(f"CMD_SET_LOCALITY {locality}")
        self._locality = locality
        self._inner.set_locality(locality)

    def cancel(self) -> None:
        """Ask for the end of the command in flight."""
        self._recorder.control("CMD_CANCEL_TPM_CMD", ev=[["cancel"]])
        self._inner.cancel()

    def established(self) -> bool:
        """Return the tpmEstablished flag."""
        return self._inner.established()

    def reset_established(self, locality: int) -> int:
        """Clear the flag, where the locality may."""
        self._recorder.control("CMD_RESET_TPMESTABLISHED", ev=[["reset_est", locality]])
        return self._inner.reset_established(locality)


async def _pass_on(
    source: trio.socket.SocketType,
    sink: trio.socket.SocketType,
    record: Callable[[bytes], None],
    scope: trio.CancelScope,
) -> None:
    """Pass bytes on until the source ends, then cancel the scope."""
    cutter = Cutter()
    try:
        while raw := await source.recv(_READ_BYTES):
            for message in cutter.feed(raw):
                record(message)
            while raw:
                raw = raw[await sink.send(raw) :]
    except OSError:
        pass
    scope.cancel()
