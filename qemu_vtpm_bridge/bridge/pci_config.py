"""The PCI identity of the register devices: 256 bytes of configuration space.

Theory of operation.  A vfio-user client finds a PCI function: the windows of the register
devices are its BARs, its interrupt is INTx.  Two tables say what a byte holds and which
of its bits a guest may write; a BAR's mask is what makes its size readable.  There is
nothing behind the header: no capabilities, no MSI.

The identity is chosen so that no driver of any system binds to it by itself: what tells
a guest of its TPM is ACPI.  Who may lie: the guest with every access; there is no
value that it could write which means anything here, except that it reads it back.

Source: PCI Local Bus Specification 3.0, 6.1 and 6.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

VENDOR_ID: Final = 0x1234
"""Not assigned to anybody; QEMU's own standard VGA uses it too."""
DEVICE_ID: Final = 0x7470
CLASS_CODE: Final = 0x108000
"""Encryption controller, other."""

CONFIG_BYTES: Final = 256
BARS_OFFSET: Final = 0x10
BARS_MAX: Final = 6
_COMMAND: Final = 0x04
_COMMAND_WRITABLE: Final = 0x0546
"""Memory Space, Bus Master, Parity Error Response, SERR# Enable, Interrupt Disable."""
_STATUS: Final = 0x06
_INTERRUPT_STATUS: Final = 1 << 3
_CLASS: Final = 0x08
_CACHE_LINE: Final = 0x0C
_SUBSYSTEM: Final = 0x2C
_INTERRUPT_LINE: Final = 0x3C
_INTERRUPT_PIN: Final = 0x3D
_INTERRUPT_DISABLE: Final = 0x0400


def bar_bytes(span_bytes: int) -> int:
    """Return the size of a BAR that holds so many bytes: a power of two, a page at least."""
    return max(4096, 1 << (span_bytes - 1).bit_length())


class PciConfig:
    """The configuration space of a function whose memory BARs hold these spans, from 0 on."""

    def __init__(self, spans: Sequence[int]) -> None:
        if len(spans) > BARS_MAX:
            raise ValueError(f"a function has {BARS_MAX} BARs, not {len(spans)}")
        self._bytes = bytearray(CONFIG_BYTES)
        self._writable = bytearray(CONFIG_BYTES)
        self._spans = tuple(spans)
        self._put(0x00, 2, VENDOR_ID)
        self._put(0x02, 2, DEVICE_ID)
        self._put(_CLASS, 4, CLASS_CODE << 8)
        self._put(_SUBSYSTEM, 2, VENDOR_ID)
        self._put(_SUBSYSTEM + 2, 2, DEVICE_ID)
        self._put(_INTERRUPT_PIN, 1, 1)
        self._put(_COMMAND, 2, 0, writable=_COMMAND_WRITABLE)
        self._put(_CACHE_LINE, 1, 0, writable=0xFF)
        self._put(_INTERRUPT_LINE, 1, 0, writable=0xFF)
        for number, span in enumerate(self._spans):
            mask = ~(bar_bytes(span) - 1) & 0xFFFFFFFF
            self._put(BARS_OFFSET + 4 * number, 4, 0, writable=mask)

    def _put(self, at: int, size: int, value: int, *, writable: int = 0) -> None:
        self._bytes[at : at + size] = value.to_bytes(size, "little")
        self._writable[at : at + size] = writable.to_bytes(size, "little")

    def bar_size(self, number: int) -> int:
        """Return how many bytes a BAR has; 0 where there is none."""
        return bar_bytes(self._spans[number]) if number < len(self._spans) else 0

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes that lie within the space."""
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes that lie within the space; those of read-only fields vanish."""
        for at, byte in enumerate(data, offset):
            mask = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~mask | byte & mask

    def show_interrupt(self, level: bool) -> None:
        """Let the status register say whether the function wants service."""
        status = self._bytes[_STATUS] & ~_INTERRUPT_STATUS
        self._bytes[_STATUS] = status | (_INTERRUPT_STATUS if level else 0)

    @property
    def interrupts_enabled(self) -> bool:
        """Whether INTx may be asserted."""
        return not self._bytes[_COMMAND + 1] & _INTERRUPT_DISABLE >> 8

    def reset(self) -> None:
        """Clear what the guest wrote, as a reset of the bus does."""
        for at, mask in enumerate(self._writable):
            self._bytes[at] &= ~mask & 0xFF
        self.show_interrupt(False)
