"""A stand-in for swtpm that holds every command until the test says how it ends.

Real swtpm cannot be made to wait, to answer a command of six bytes, or to say what QEMU
asked of it in which order.  It speaks what QEMU's `-tpmdev emulator` needs of the control
protocol; numbers are big-endian.
"""

from __future__ import annotations

import array
import contextlib
import queue
import socket
import struct
import threading
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.bridge.tpm import Family

GET_CAPABILITY, INIT, GET_ESTABLISHED, SET_LOCALITY, CANCEL = 1, 2, 4, 5, 9
RESET_ESTABLISHED, SET_DATAFD, SET_BUFFERSIZE = 11, 16, 17

BODY_BYTES = {INIT: 4, SET_LOCALITY: 4, RESET_ESTABLISHED: 4, SET_BUFFERSIZE: 4}
ALL_BUT_STATE = 0x3FFF & ~(1 << 6 | 1 << 8 | 1 << 9)
BAD_LOCALITY = 0x3D
WAIT_S = 60.0


class HeldTpm:
    """Listens at `path`; one control connection, whose first message brings the data socket."""

    def __init__(self, path: Path, *, family: Family, buffer_bytes: int, established: bool) -> None:
        self._family, self._buffer_bytes = family, buffer_bytes
        self._established = established
        self._locality = 0
        self._powered = False
        self._events: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._data: socket.socket | None = None
        self._control: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve_control, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up."""
        for end in (self._listener, self._control, self._data):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    # What the test does.

    def command(self) -> tuple[int, bytes]:
        """Wait for a command; return its locality and bytes."""
        return self._commands.get(timeout=WAIT_S)

    def unexpected_command(self) -> bool:
        """Whether a command waits that nobody asked for."""
        return not self._commands.empty()

    def answer(self, response: bytes) -> None:
        """End the command."""
        assert self._data is not None
        self._data.sendall(response)

    def events(self) -> list[list[Any]]:
        """Return cancels and resets of the establishment flag since the last call."""
        found = []
        while not self._events.empty():
            found.append(self._events.get())
        return found

    # The data channel.

    def _serve_data(self, data: socket.socket) -> None:
        tag = 0x8001 if self._family is Family.TPM_2_0 else 0x00C4
        with contextlib.suppress(OSError):
            while command := data.recv(1 << 16):
                if self._powered:
                    self._commands.put((self._locality, command))
                else:
                    # QEMU asks for the family before it powers the TPM on.
                    data.sendall(struct.pack(">HII", tag, 10, 0x0A))

    # The control channel.

    def _serve_control(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._control, _ = self._listener.accept()
            while True:
                (word,) = struct.unpack(">I", self._receive(4))
                body = self._receive(BODY_BYTES.get(word, 0))
                self._control.sendall(self._reply(word, body))
                if word == SET_DATAFD:
                    assert self._data is not None
                    threading.Thread(
                        target=self._serve_data, args=(self._data,), daemon=True
                    ).start()

    def _receive(self, count: int) -> bytes:
        assert self._control is not None
        got = b""
        while len(got) < count:
            part, ancillary, _, _ = self._control.recvmsg(
                count - len(got), socket.CMSG_SPACE(array.array("i").itemsize)
            )
            if not part:
                raise EOFError
            for _level, _kind, raw in ancillary:
                [number] = array.array("i", raw)
                self._data = socket.socket(fileno=number)
            got += part
        return got

    def _reply(self, word: int, body: bytes) -> bytes:
        done = struct.pack(">I", 0)
        if word == GET_CAPABILITY:
            return struct.pack(">Q", ALL_BUT_STATE)
        if word == GET_ESTABLISHED:
            return done + struct.pack(">B3x", self._established)
        if word == SET_BUFFERSIZE:
            return done + struct.pack(">III", self._buffer_bytes, 128, 4096)
        if word == INIT:
            self._powered = True
        elif word == SET_LOCALITY:
            self._locality = body[0]
        elif word == CANCEL:
            self._events.put(["cancel"])
        elif word == RESET_ESTABLISHED:
            self._events.put(["reset_est", body[0]])
            if body[0] not in (3, 4):
                return struct.pack(">I", BAD_LOCALITY)
            self._established = False
        return done
