"""Both register devices of a guest, with the test as the pump at the socketpair's far end."""

from __future__ import annotations

import socket

from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.mmio import Mmio
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family

ACCESS, STS, FIFO = 0x00, 0x18, 0x24
LOC_CTRL, START, BUFFER = 0x08, 0x4C, 0x80
COMMAND = HEADER.pack(0x8001, 12, 0x17B) + b"\0\x10"
RESPONSE = HEADER.pack(0x8001, 14, 0) + b"abcd"
OTHER_RESPONSE = HEADER.pack(0x8001, 14, 0) + b"wxyz"


class Behind:
    """Notes what it was asked."""

    def __init__(self) -> None:
        self.locality: int | None = None
        self.cancels = 0
        self.flag = True

    def set_locality(self, locality: int) -> None:
        self.locality = locality

    def cancel(self) -> None:
        self.cancels += 1

    def established(self) -> bool:
        return self.flag

    def reset_established(self, locality: int) -> int:
        self.flag = False
        return 0


class Rig:
    """Both devices of a guest, and the pump's end."""

    def __init__(self) -> None:
        near, self.pump = socket.socketpair()
        self.near = near
        self.pump.setblocking(False)
        self.behind = Behind()
        self.tis = TisDevice(family=Family.TPM_2_0, buffer_bytes=3968)
        self.crb = CrbDevice(family=Family.TPM_2_0, buffer_bytes=3968)
        self.mmio = Mmio([self.tis, self.crb], self.behind, near)

    def tis_go(self, command: bytes = COMMAND, locality: int = 0) -> None:
        page = locality << 12
        self.mmio.write(self.tis, page | ACCESS, 1, 0x02)
        self.mmio.write(self.tis, page | STS, 1, 0x40)
        for byte in command:
            self.mmio.write(self.tis, page | FIFO, 1, byte)
        self.mmio.write(self.tis, page | STS, 1, 0x20)

    def tis_response(self, locality: int = 0) -> bytes:
        page, found = locality << 12, b""
        while self.mmio.read(self.tis, page | STS, 1) & 0x10:
            found += bytes([self.mmio.read(self.tis, page | FIFO, 1)])
        return found

    def crb_go(self, command: bytes = COMMAND) -> None:
        self.mmio.write(self.crb, LOC_CTRL, 4, 1)
        for at, byte in enumerate(command, BUFFER):
            self.mmio.write(self.crb, at, 1, byte)
        self.mmio.write(self.crb, START, 4, 1)

    def sent(self) -> bytes:
        try:
            return self.pump.recv(8192)
        except BlockingIOError:
            return b""
