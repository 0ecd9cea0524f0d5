"""Names for the values of registers: fields, what a write asks for, what it does not do.

Used by the `decode` command for values that are typed and for records.  All names come
from the data sheets in `bridge/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .bridge.crb_registers import CRB
from .bridge.device import cut
from .bridge.registers import Access, Field, Register, RegisterMap
from .bridge.tis_registers import LOCALITIES, STS, TIS

MAPS: Final[dict[str, RegisterMap]] = {"tis": TIS, "crb": CRB}
DATA_REGISTERS: Final = frozenset({"DATA_FIFO", "XDATA_FIFO", "DATA_BUFFER"})

_LAUNCH_LOCALITY: Final = LOCALITIES - 1
_ONE_OF: Final = STS.mask("commandReady", "tpmGo", "responseRetry")


def field_text(field: Field, number: int) -> str:
    """Return a field and its number as people write it: "dataAvail", "burstCount=1024"."""
    if field.width == 1:
        return field.name
    if number in field.values:
        return f"{field.name}={number} ({field.values[number]})"
    return f"{field.name}={number}" if number < 1 << 16 else f"{field.name}={number:#x}"


def value_text(
    register: Register, value: int, lane: int = 0, size: int = 4, *, written: bool = False
) -> str:
    """Return the names of what is set in the `size` bytes from `lane` on of a register.

    A flag shows when it is set, a wider field always; one that the bytes hold only in
    part shows with the bits that they do hold. Of what is written, wider fields that
    cannot be are left out.
    """
    if not register.fields:
        return f"{value:#x}" if value else "-"
    low, high = 8 * lane, 8 * (lane + size) - 1
    found = register.decode(value << low)
    parts = []
    for field in register.fields:
        number = found.pop(field.name)
        if field.high < low or field.low > high:
            continue
        if field.width == 1:
            if number:
                parts.append((written and field.written) or field.name)
        elif written and field.access is Access.READ_ONLY and not number:
            continue
        elif field.low >= low and field.high <= high:
            parts.append(field_text(field, number))
        else:
            from_bit, to_bit = max(field.low, low) - field.low, min(field.high, high) - field.low
            part = number >> from_bit & (1 << to_bit - from_bit + 1) - 1
            parts.append(f"{field.name}[{to_bit}:{from_bit}]={part:#x}")
    parts += found
    return " ".join(parts) or "-"


def access_parts(
    device: RegisterMap, offset: int, size: int, value: int
) -> Iterator[tuple[int, Register | None, int, int, int]]:
    """Cut an access as the devices do; yield locality, register, lane, size and value of each."""
    for at, piece in cut(offset, size):
        locality, register = device.find(at)
        yield locality, register, at & 3, piece, value & (1 << 8 * piece) - 1
        value >>= 8 * piece


def write_hint(
    device: RegisterMap, locality: int, register: Register, lane: int, value: int
) -> str:
    """Return why a write does nothing, as far as the write alone shows it; "" where it may act."""
    if device is TIS and locality == _LAUNCH_LOCALITY:
        return "ignored: locality 4 is the processor's"
    if register.access is Access.READ_ONLY:
        return "ignored: read-only"
    if register is STS:
        asked = value << 8 * lane & _ONE_OF
        if asked & asked - 1:
            return "ignored: one of commandReady, tpmGo, responseRetry at a time"
    elif device is CRB and register.access in (Access.WRITE_ONLY, Access.WRITE_ONE_ACTS):
        if lane:
            return "ignored: not from the first byte on"
        if value & value - 1 or not any(value == field.mask for field in register.fields):
            return "ignored: exactly one bit acts"
    return ""
