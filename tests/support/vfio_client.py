"""A vfio-user client for tests and measurements; blocking, one request at a time."""

from __future__ import annotations

import array
import json
import os
import socket
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.bridge import vfio_user_frames as frames
from qemu_vtpm_bridge.bridge.vfio_user_frames import Command

WAIT_S = 60.0


class VfioClient:
    """Connects, and asks.  Errno replies are raised as OSError."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(WAIT_S)
        self._id = 0

    @classmethod
    def connect(cls, path: Path) -> VfioClient:
        """Connect and agree on the version."""
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(path))
        client = cls(connected)
        client.version()
        return client

    def version(self) -> dict[str, Any]:
        """Say VERSION; return the server's capabilities."""
        reply = frames.VERSION.parse(self.ask(Command.VERSION, frames.version_body()))
        assert (reply.major, reply.minor) == (0, 0)
        document = json.loads(reply.text.rstrip(b"\0"))
        return dict(document["capabilities"])

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def ask(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """Send a request; return the body of its reply."""
        self._id = self._id + 1 & 0xFFFF
        message = frames.message(self._id, command, body)
        if fds:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            self.socket.sendmsg([message], [rights])
        else:
            self.socket.sendall(message)
        return self.reply(command)

    def reply(self, command: int) -> bytes:
        """Return the body of the reply to the last request."""
        raw = self._exactly(frames.HEADER_BYTES)
        message_id, replied, size, flags, error = frames.HEADER_STRUCT.unpack(raw)
        body = self._exactly(size - frames.HEADER_BYTES)
        assert (message_id, replied) == (self._id, command)
        if flags & frames.ERROR:
            raise OSError(error, os.strerror(error))
        assert flags == frames.TYPE_REPLY
        return body

    def _exactly(self, size: int) -> bytes:
        raw = b""
        while len(raw) < size:
            chunk = self.socket.recv(size - len(raw))
            if not chunk:
                raise ConnectionResetError("the server hung up")
            raw += chunk
        return raw

    def device_reset(self) -> None:
        """Reset the machine."""
        self.ask(Command.DEVICE_RESET)

    def read_region(self, region: int, offset: int, size: int) -> bytes:
        """Read bytes of any region."""
        fields = {"offset": offset, "region": region, "count": size, "data": b""}
        reply = frames.REGION_ACCESS.parse(
            self.ask(Command.REGION_READ, frames.REGION_ACCESS.build(fields))
        )
        assert reply.count == size == len(reply.data)
        return bytes(reply.data)

    def write_region(self, region: int, offset: int, data: bytes) -> None:
        """Write bytes to any region."""
        fields = {"offset": offset, "region": region, "count": len(data), "data": data}
        self.ask(Command.REGION_WRITE, frames.REGION_ACCESS.build(fields))


class VfioDevice:
    """A BAR of a connected client, with the read and write of a `trace.Device`, and fast."""

    def __init__(self, client: VfioClient, region: int) -> None:
        self.client, self._region = client, region
        self._socket = client.socket
        self._pack, self._bytes = frames.ACCESS_STRUCT.pack, frames.ACCESS_BYTES

    def read(self, offset: int, size: int) -> int:
        """Read a register."""
        self._socket.send(
            self._pack(1, Command.REGION_READ, self._bytes, 0, 0, offset, self._region, size)
        )
        raw = self._socket.recv(4096)
        if len(raw) != self._bytes + size:
            raise ConnectionResetError(f"a reply of {len(raw)} bytes")
        return int.from_bytes(raw[self._bytes :], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        total = self._bytes + size
        self._socket.send(
            self._pack(1, Command.REGION_WRITE, total, 0, 0, offset, self._region, size)
            + value.to_bytes(size, "little")
        )
        raw = self._socket.recv(4096)
        if len(raw) != self._bytes:
            raise ConnectionResetError(f"a reply of {len(raw)} bytes")
