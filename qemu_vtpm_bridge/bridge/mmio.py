"""Joins register devices, the pump and reset: a guest's accesses on one side, the ring's door
on the other.

Theory of operation.  A guest may have the TIS device, the CRB device or both; they are two
faces of one TPM.  A device that submits a command puts it in a queue; one command at a
time leaves, through a socketpair whose other end the pump reads (`bridge/ring.py`), as
QEMU's would.  So there is one way into the ring, with its deadlines, its checks and its
refusals.  The answer comes back on the socketpair, and is looked for before each access
while one is owed: no access ever waits.

The pump answers every command that it was given whole (P1), so what is owed is counted,
never guessed: a reset forgets the command, and its late answer is dropped when it
comes (P5).  The pump reads the size in a command's header; one that has another size
would leave the stream out of step, and is answered here as the TPM would answer it.

Everything but `Behind` runs in the thread that serves the guest.  Who may lie: the
guest, with every access.  The pump is ours, but what comes from it is bounded all the
same.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

from ..errors import XenError
from .device import CancelCommand, RegisterDevice, ResetEstablishment, SubmitCommand
from .tpm import HEADER, HEADER_SIZE, Refusal, refusal

_READ_BYTES: Final = 8192


class Behind(Protocol):
    """What the devices ask of the TPM beside commands.  Called in the guest's thread."""

    def set_locality(self, locality: int) -> None:
        """Set the locality of the commands that follow."""

    def cancel(self) -> None:
        """Ask for the end of the command in flight."""

    def established(self) -> bool:
        """Return the tpmEstablished flag."""

    def reset_established(self, locality: int) -> int:
        """Clear the flag, where the locality may."""


class Mmio:
    """The register devices of one guest, and the command in flight of all of them.

    `data` is the near end of the socketpair; it belongs to the caller.
    """

    def __init__(
        self, devices: Sequence[RegisterDevice], behind: Behind, data: socket.socket
    ) -> None:
        self.devices = tuple(devices)
        self._behind = behind
        self._data = data
        data.setblocking(False)
        self._queue: deque[tuple[RegisterDevice, SubmitCommand]] = deque()
        self._flying: tuple[RegisterDevice, SubmitCommand] | None = None
        self._owed = 0
        """Answers that the pump has still to give, to commands of before a reset too."""
        self._input = bytearray()
        self.commands = 0
        """Commands given to the pump so far."""

    @property
    def waiting(self) -> bool:
        """Whether an answer is owed, so that `collect` may find one."""
        return self._owed > 0

    @property
    def irq_level(self) -> bool:
        """The interrupt line that all devices share."""
        for device in self.devices:  # noqa: SIM110 - a generator would cost an access dearly
            if device.irq_level:
                return True
        return False

    def read(self, device: RegisterDevice, offset: int, size: int) -> int:
        """Return what a guest reads: `size` bytes, 1 to 8, little-endian.  Never waits."""
        if self._owed:
            self.collect()
        value = device.read(offset, size)
        if device.has_outputs:
            self._see_to(device)
        return value

    def write(self, device: RegisterDevice, offset: int, size: int, value: int) -> None:
        """Do what a guest writes.  Never waits."""
        if self._owed:
            self.collect()
        device.write(offset, size, value)
        if device.has_outputs:
            self._see_to(device)

    def reset(self) -> None:
        """Reset all devices and forget what they submitted; their late answers are dropped."""
        self._queue.clear()
        self._flying = None
        for device in self.devices:
            device.reset(established=self._behind.established())

    # Towards the TPM.

    def _see_to(self, device: RegisterDevice) -> None:
        for output in device.take_outputs():
            match output:
                case SubmitCommand():
                    self._submit(device, output)
                case CancelCommand():
                    self._cancel(device)
                case ResetEstablishment(locality):
                    self._behind.reset_established(locality)
                    for each in self.devices:
                        each.established = self._behind.established()

    def _submit(self, device: RegisterDevice, output: SubmitCommand) -> None:
        size = HEADER.unpack_from(output.command)[1] if len(output.command) >= HEADER_SIZE else 0
        if size != len(output.command):
            self._complete(device, output, refusal(device.family, Refusal.COMMAND_SIZE))
            return
        self._queue.append((device, output))
        self._send_next()

    def _send_next(self) -> None:
        if self._owed or not self._queue:
            return
        self._flying = self._queue.popleft()
        output = self._flying[1]
        self._behind.set_locality(output.locality)
        try:
            sent = self._data.send(output.command)
        except OSError as error:
            raise XenError(f"the pump's socket: {error.strerror}") from error
        if sent != len(output.command):
            # The buffer holds many commands, and one is in it at most.
            raise XenError("the pump's socket takes no whole command")
        self._owed += 1
        self.commands += 1

    def _cancel(self, device: RegisterDevice) -> None:
        if self._flying is not None and self._flying[0] is device:
            self._behind.cancel()
            return
        for entry in self._queue:
            if entry[0] is device:
                self._queue.remove(entry)
                self._complete(*entry, refusal(device.family, Refusal.CANCELLED))
                return

    # From the TPM.

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when an answer comes."""
        return self._data.fileno()

    def collect(self) -> None:
        """Take the answers that have come.  Never waits; raises XenError at the pump's end."""
        try:
            raw = self._data.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise XenError(f"the pump's socket: {error.strerror}") from error
        if not raw:
            raise XenError("the pump has gone")
        self._input += raw
        while len(self._input) >= HEADER_SIZE:
            size = max(HEADER.unpack_from(self._input)[1], HEADER_SIZE)
            if len(self._input) < size:
                return
            response = bytes(self._input[:size])
            del self._input[:size]
            self._answered(response)

    def _answered(self, response: bytes) -> None:
        if not self._owed:
            raise XenError("the pump answered what nobody asked")
        self._owed -= 1
        if self._flying is not None and not self._owed:
            flying, self._flying = self._flying, None
            self._complete(*flying, response)
        self._send_next()

    def _complete(self, device: RegisterDevice, output: SubmitCommand, response: bytes) -> None:
        device.complete(response, ticket=output.ticket)
        # An end can bring the next command: one that waited in the device for an orphan's.
        if device.has_outputs:
            self._see_to(device)
