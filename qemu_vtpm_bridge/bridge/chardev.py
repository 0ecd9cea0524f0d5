"""QEMU's door: serves swtpm's control channel, and passes data channels on.

Theory of operation.  One control client is served at a time, strictly request by
request; others wait in the backlog, as with swtpm.  The TPM behind the door is a
`TpmBehind`; commands never pass through here, only the descriptor that carries them,
so the control channel is served while a command is in flight.  A QEMU that leaves, with
CMD_SHUTDOWN or without, is followed by the next one: a guest that reboots under Xen gets
a new QEMU, which finds the same socket.

Keeps P1: no answer waits for the TPM longer than `TpmBehind.init` says, and those that
QEMU reads in full size have it.  Who may lie: whoever may connect; descriptors that
come uninvited are closed.

Source: swtpm's tpm_ioctl.h, ctrlchannel.c; QEMU's backends/tpm/tpm_emulator.c.
"""

from __future__ import annotations

import array
import logging
import math
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from ..ratelimit import RateLimit
from . import control
from .control import Command, ControlParser, Request, Result
from .listen import Listener

log = logging.getLogger(__name__)

LOCALITY_MAX: Final = 4
_READ_BYTES: Final = 65536
_FDS_MAX: Final = 16
_SEND_DEADLINE_S: Final = 10.0


class TpmBehind(Protocol):
    """The TPM as the door sees it.  Results are TPM 1.2 return codes."""

    async def attach_data(self, data_socket: socket.socket) -> None:
        """Serve commands from this socket, within half a second; takes ownership."""

    async def detach_data(self) -> None:
        """Close the data channel, if there is one; a command in flight has half a second."""

    def data_attached(self) -> bool:
        """Return whether a data channel is open and its peer has not hung up."""

    async def data_detached(self) -> None:
        """Return once there is no data channel."""

    async def init(self, *, resume: bool) -> int:
        """Power the TPM on anew, or let it go on where it was; return within half a second."""

    async def stop(self) -> int:
        """Switch the TPM off."""

    async def set_buffer_size(self, wanted_bytes: int) -> tuple[int, int, int]:
        """Set the largest response, 0 to ask; return the size in use, the least and the most."""

    def running(self) -> bool:
        """Return whether the TPM was switched on."""

    def set_locality(self, locality: int) -> None:
        """Set the locality of the commands that follow."""

    def cancel(self) -> None:
        """Ask for the end of the command in flight."""

    def established(self) -> bool:
        """Return the tpmEstablished flag."""

    def reset_established(self, locality: int) -> int:
        """Clear the flag, where the locality may."""


@dataclass(frozen=True, slots=True)
class DoorConfig:
    """How the door behaves."""

    terminate: bool = False
    """Return when QEMU leaves, instead of waiting for the next one."""
    empty_state_blobs: bool = False
    """Say that the TPM's state can be saved, and save nothing: it stays in its domain."""


class Door:
    """Serves whoever plays QEMU."""

    def __init__(self, tpm: TpmBehind, config: DoorConfig | None = None) -> None:
        self._tpm = tpm
        self._config = config or DoorConfig()
        self._complaints = RateLimit(log)
        self.clients = 0
        """Control connections so far, for the status document."""
        self.requests: dict[str, int] = {}
        """Control requests so far, by name."""

    async def serve(self, listener: Listener) -> None:
        """Serve until cancelled or, where configured so, until QEMU has left."""
        async with trio.open_nursery() as nursery:
            if listener.data is not None:
                nursery.start_soon(self._serve_data, listener.data)
            listener.control.setblocking(False)
            source = trio.socket.from_stdlib_socket(listener.control)
            while True:
                client = source if listener.connected else (await source.accept())[0]
                self.clients += 1
                with client:
                    left = await self._serve_client(client)
                if listener.connected or (left and self._config.terminate):
                    break
            nursery.cancel_scope.cancel()

    async def _serve_data(self, listener: socket.socket) -> None:
        """TCP: pass one data connection after the other on; tcti-swtpm makes one per command."""
        listener.setblocking(False)
        source = trio.socket.from_stdlib_socket(listener)
        while True:
            client, _ = await source.accept()
            with suppress(OSError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._tpm.attach_data(socket.socket(fileno=os.dup(client.fileno())))
            client.close()
            await self._tpm.data_detached()

    # One control client.

    async def _serve_client(self, client: trio.socket.SocketType) -> bool:
        """Serve one client to its end; return whether that was a QEMU that has left."""
        parser = ControlParser()
        gave_data = False
        try:
            while True:
                raw, fds = await _receive(client, parser)
                try:
                    request = parser.feed(raw) if raw else None
                    reply = await self._answer(request, fds) if request else b""
                finally:
                    _close_all(fds)
                if not raw:
                    return gave_data
                await _send(client, reply)
                if request is None:
                    continue
                gave_data |= request.command == Command.CMD_SET_DATAFD
                if request.command == Command.CMD_SHUTDOWN and not request.malformed:
                    await self._tpm.detach_data()
                    return True
                if request.too_long:
                    return False
        except OSError as error:
            log.info("the control connection broke: %s", error)
        except trio.TooSlowError:
            self._complaints.warning(
                "a control client did not finish a request, or did not read: disconnected"
            )
        return gave_data

    async def _answer(self, request: Request, fds: list[int]) -> bytes:
        """Carry a request out and return the response; takes from `fds` what it uses."""
        name = control.command_name(request.command)
        self.requests[name] = self.requests.get(name, 0) + 1
        if request.malformed:
            return control.result(Result.TPM_BAD_PARAMETER)
        handler = _HANDLERS.get(request.command)
        if handler is None:
            return control.result(Result.TPM_BAD_ORDINAL)
        return await handler(self, request, fds)

    async def _get_capability(self, request: Request, fds: list[int]) -> bytes:
        del request, fds
        capabilities = control.CAPABILITIES
        if self._config.empty_state_blobs:
            capabilities |= control.STATEBLOB_CAPABILITIES
        return bytes(control.CAPABILITY_RESPONSE.build({"capabilities": int(capabilities)}))

    async def _init(self, request: Request, fds: list[int]) -> bytes:
        del fds
        # Bit 0 comes after a restore.  Where blobs are refused there is none, and it is
        # how tcti-swtpm asks for a reset.
        resume = bool(request.body.flags & 1) and self._config.empty_state_blobs
        return control.result(await self._tpm.init(resume=resume))

    async def _stop(self, request: Request, fds: list[int]) -> bytes:
        del request, fds
        return control.result(await self._tpm.stop())

    async def _shutdown(self, request: Request, fds: list[int]) -> bytes:
        return await self._stop(request, fds)

    async def _get_established(self, request: Request, fds: list[int]) -> bytes:
        del request, fds
        running = self._tpm.running()
        return bytes(
            control.ESTABLISHED_RESPONSE.build(
                {
                    "result": Result.TPM_SUCCESS if running else Result.TPM_BAD_ORDINAL,
                    "established": int(running and self._tpm.established()),
                }
            )
        )

    async def _reset_established(self, request: Request, fds: list[int]) -> bytes:
        del fds
        if not self._tpm.running():
            return control.result(Result.TPM_BAD_ORDINAL)
        return control.result(self._tpm.reset_established(request.body.locality))

    async def _set_locality(self, request: Request, fds: list[int]) -> bytes:
        del fds
        if request.body.locality > LOCALITY_MAX:
            return control.result(Result.TPM_BAD_LOCALITY)
        self._tpm.set_locality(request.body.locality)
        return control.result(Result.TPM_SUCCESS)

    async def _cancel(self, request: Request, fds: list[int]) -> bytes:
        del request, fds
        if not self._tpm.running():
            return control.result(Result.TPM_BAD_ORDINAL)
        self._tpm.cancel()
        return control.result(Result.TPM_SUCCESS)

    async def _get_stateblob(self, request: Request, fds: list[int]) -> bytes:
        del request, fds
        if self._config.empty_state_blobs:
            return control.empty_stateblob()
        self._complaints.warning(
            "QEMU wants to save the TPM with the guest, and is refused: its state stays in the "
            "vTPM domain (--state-blobs empty lets it save without)"
        )
        return control.refused_stateblob()

    async def _set_stateblob(self, request: Request, fds: list[int]) -> bytes:
        del fds
        if request.body.length:
            self._complaints.warning(
                "QEMU wants to restore a TPM's state from the guest's image; it is not taken"
            )
            return control.result(Result.TPM_FAIL)
        return control.result(Result.TPM_SUCCESS)

    async def _get_config(self, request: Request, fds: list[int]) -> bytes:
        del request, fds
        return bytes(control.CONFIG_RESPONSE.build({"flags": 0}))

    async def _set_datafd(self, request: Request, fds: list[int]) -> bytes:
        del request
        if not fds:
            return control.result(Result.TPM_BAD_PARAMETER)
        if self._tpm.data_attached():
            return control.result(Result.TPM_IOERROR)
        try:
            data = socket.socket(fileno=fds[0])
        except OSError:
            return control.result(Result.TPM_BAD_PARAMETER)
        del fds[0]
        await self._tpm.attach_data(data)
        return control.result(Result.TPM_SUCCESS)

    async def _set_buffersize(self, request: Request, fds: list[int]) -> bytes:
        del fds
        in_use, least, most = await self._tpm.set_buffer_size(request.body.wanted)
        return bytes(
            control.BUFFERSIZE_RESPONSE.build({"in_use": in_use, "minimum": least, "maximum": most})
        )


_HANDLERS: Final[dict[int, Callable[[Door, Request, list[int]], Awaitable[bytes]]]] = {
    Command.CMD_GET_CAPABILITY: Door._get_capability,
    Command.CMD_INIT: Door._init,
    Command.CMD_SHUTDOWN: Door._shutdown,
    Command.CMD_GET_TPMESTABLISHED: Door._get_established,
    Command.CMD_SET_LOCALITY: Door._set_locality,
    Command.CMD_CANCEL_TPM_CMD: Door._cancel,
    Command.CMD_RESET_TPMESTABLISHED: Door._reset_established,
    Command.CMD_GET_STATEBLOB: Door._get_stateblob,
    Command.CMD_SET_STATEBLOB: Door._set_stateblob,
    Command.CMD_STOP: Door._stop,
    Command.CMD_GET_CONFIG: Door._get_config,
    Command.CMD_SET_DATAFD: Door._set_datafd,
    Command.CMD_SET_BUFFERSIZE: Door._set_buffersize,
}


async def _receive(
    client: trio.socket.SocketType, parser: ControlParser
) -> tuple[bytes, list[int]]:
    """Return what one read gives, with the descriptors that came along.

    Raises TooSlowError where the rest of a request does not come.
    """
    room = socket.CMSG_SPACE(_FDS_MAX * array.array("i").itemsize)
    with trio.fail_after(control.INCOMPLETE_S if parser.incomplete else math.inf):
        raw, ancillary, _, _ = await client.recvmsg(_READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return raw, list(fds)


async def _send(client: trio.socket.SocketType, reply: bytes) -> None:
    with trio.fail_after(_SEND_DEADLINE_S):
        while reply:
            reply = reply[await client.send(reply) :]


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)
