"""A guest's accesses at 0xFED40000, as Xen's ioreq protocol tells them.

Purpose: where the guest's QEMU has no TPM, `qemu-vtpm-bridge run --device` is its TPM: a
TIS or CRB device answers the accesses that a second ioreq server, beside QEMU's, gets.

Theory of operation.  `perform` does one request of the protocol: a plain access, or what
a `rep` instruction makes of it: `count` items of `size` bytes, at addresses that go up or
down, their data in the request or in guest memory.  The device cuts what is unaligned or
wide.  `serve` is the loop around it, in a blocking thread: an access costs less than a
switch between tasks, and nothing in it waits: a command goes to the pump, and the guest's
driver polls the registers until the answer has come.

A driver's copy to or from the buffer comes as one request with `data_is_ptr`, which the
device does item by item, while guest memory is read or written in one go.

Keeps P1: every request is answered, what makes no sense with all ones.  Who may lie: the
guest, in every field.  Source: Xen's public header hvm/ioreq.h; QEMU's and Xen's
behaviour as docs/xen.md and docs/registers.md have it.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from ..xen.ioreq import ACCESS, READABLE, STOPPED
from .device import RegisterDevice
from .mmio import Mmio

TPM_BASE: Final = 0xFED40000
TPM_LAST: Final = 0xFED44FFF
"""Five localities' pages: what a PC gives a TPM (PTP, 6.1)."""

IOREQ_TYPE_COPY: Final = 1
IOREQ_TYPE_INVALIDATE: Final = 8

ITEM_MAX_BYTES: Final = 8
DATA_MAX_BYTES: Final = 4096
"""Xen ends a `rep` at a page; more is not believed."""

ALL_ONES: Final = (1 << 64) - 1


class GuestMemory(Protocol):
    """The memory of the guest whose access it is."""

    def read_memory(self, address: int, size_bytes: int) -> bytes:
        """Return guest memory; all ones where there is none."""

    def write_memory(self, address: int, data: bytes) -> None:
        """Write guest memory, where there is some."""


class Request(Protocol):
    """One request: a `struct ioreq_access`."""

    address: int
    data: int
    count: int
    size_bytes: int
    type: int
    read: bool
    data_is_ptr: bool
    backwards: bool


class Window:
    """The device of one guest, at the addresses of a TPM."""

    def __init__(self, mmio: Mmio, device: RegisterDevice) -> None:
        self._mmio = mmio
        self._device = device
        self._span = device.span_bytes

    def read(self, address: int, size: int) -> int:
        """Return `size` bytes, 1 to 8; all ones where the device has nothing."""
        offset = address - TPM_BASE
        if offset >= 0 and offset + size <= self._span:
            return self._mmio.read(self._device, offset, size)
        return ALL_ONES >> 8 * (ITEM_MAX_BYTES - size)

    def write(self, address: int, size: int, value: int) -> None:
        """Write `size` bytes, 1 to 8, where the device has something."""
        offset = address - TPM_BASE
        if offset >= 0 and offset + size <= self._span:
            self._mmio.write(self._device, offset, size, value)


def perform(request: Request, window: Window, memory: GuestMemory) -> int:
    """Do what a request asks, and return the data to answer with.  Never waits."""
    size = request.size_bytes
    if request.count == 1 and not request.data_is_ptr and 1 <= size <= ITEM_MAX_BYTES:
        if request.read:
            return window.read(request.address, size)
        window.write(
            request.address, size, request.data & (ALL_ONES >> 8 * (ITEM_MAX_BYTES - size))
        )
        return request.data
    return _repeat(request, window, memory)


def _repeat(request: Request, window: Window, memory: GuestMemory) -> int:
    size, count = request.size_bytes, request.count
    if not (1 <= size <= ITEM_MAX_BYTES and 1 <= count <= DATA_MAX_BYTES // size):
        return ALL_ONES
    step = -size if request.backwards else size
    addresses = range(request.address, request.address + count * step, step)
    if not request.data_is_ptr:
        # One register value for all items; of a read the last one counts, as in QEMU.
        data = request.data
        for address in addresses:
            if request.read:
                data = window.read(address, size)
            else:
                window.write(address, size, data & (ALL_ONES >> 8 * (ITEM_MAX_BYTES - size)))
        return data
    # Guest memory goes the same way as the device's addresses.
    lowest = request.data + (count - 1) * step if request.backwards else request.data
    if lowest < 0:
        return ALL_ONES
    if request.read:
        items = [window.read(address, size).to_bytes(size, "little") for address in addresses]
        memory.write_memory(lowest, b"".join(reversed(items) if request.backwards else items))
    else:
        raw = memory.read_memory(lowest, count * size)
        places = range(0, count * size, size)
        for address, at in zip(
            addresses, reversed(places) if request.backwards else places, strict=True
        ):
            window.write(address, size, int.from_bytes(raw[at : at + size], "little"))
    return request.data


class Served(GuestMemory, Protocol):
    """The ioreq server, as `xen.ioreq.IoreqServer` is one."""

    access: Any

    def next(self, answer: bool, fd: int = -1) -> int:
        """Answer the last access, wait for what comes next."""

    def forget_memory(self) -> None:
        """Let go of guest memory."""


def serve(server: Served, mmio: Mmio, device: RegisterDevice) -> None:
    """Answer a guest until the server is told to stop; blocks, in its own thread.

    Raises XenError where the event channels or the pump broke; the access that was being
    answered then is left to whoever takes the server over.
    """
    window = Window(mmio, device)
    access = server.access
    answer = False
    while True:
        found = server.next(answer, mmio.fileno() if mmio.waiting else -1)
        answer = False
        if found & READABLE:
            mmio.collect()
        if found & ACCESS:
            answer = True
            if access.type == IOREQ_TYPE_COPY:
                access.data = perform(access, window, server)
            elif access.type == IOREQ_TYPE_INVALIDATE:
                server.forget_memory()
            else:
                access.data = ALL_ONES
        if found & STOPPED and not answer:
            return
