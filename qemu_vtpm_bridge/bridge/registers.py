"""A notation in which a device's registers read like its data sheet.

Purpose: `tis_registers.py` and `crb_registers.py` say in this notation where each
register lies, what its bits are called, what it holds after a reset, who may write it
and what that means.  The devices take their offsets, masks and reset values from
there; the `decode` command, the traces and the tables in `docs/registers.md` take the
names.  So there is one place in which a register is described.

Theory of operation: a `Register` is 32 bits wide (wider ones are written down as two)
and lists its fields from high bits to low ones.  Its `format` is a construct
`BitStruct` made of them, with the bits between them as reserved fields, and is built
when first asked for.  construct takes tens of microseconds for a value: it serves
people, never an access of a guest.  The access path uses what `mask`, `shift` and
`RegisterMap.by_word` give, plain numbers and lists, fetched when a module is imported
or a device is built.

Nothing here does input or output.  Sources of the notation's words: PC Client Platform
TPM Profile (PTP), 6.3 and 6.5; TCG PC Client TPM Interface Specification (TIS) 1.3.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeVar

from construct import BitsInteger, BitStruct

T = TypeVar("T")

WORD_BYTES: Final = 4
WORD_MASK: Final = 0xFFFFFFFF


class Access(enum.Enum):
    """Who changes a register or field; the value is what a table shows."""

    READ_ONLY = "RO"
    """Writes vanish."""
    READ_WRITE = "RW"
    """Reads what was written."""
    WRITE_ONE_CLEARS = "W1C"
    """A written 1 clears the bit, a 0 leaves it."""
    WRITE_ONE_ACTS = "W1"
    """A written 1 asks for something; it reads what the device makes of it."""
    WRITE_ONLY = "WO"
    """A written value asks for something; reads as zero."""


@dataclass(frozen=True, slots=True)
class Field:
    """Bits `high` to `low` of a register.

    `values` names what they can hold, `written` what a written 1 says where the name does
    not fit that.
    """

    name: str
    high: int
    low: int
    access: Access
    meaning: str
    values: Mapping[int, str] = field(default_factory=dict)
    written: str = ""

    @property
    def width(self) -> int:
        """How many bits the field has."""
        return self.high - self.low + 1

    @property
    def mask(self) -> int:
        """The field's bits where they lie in the register."""
        return ((1 << self.width) - 1) << self.low

    @property
    def bits(self) -> str:
        """The place of the bits as a data sheet writes it: "7" or "23:8"."""
        return str(self.high) if self.width == 1 else f"{self.high}:{self.low}"


def bit(name: str, at: int, access: Access, meaning: str, written: str = "") -> Field:
    """Return a field of one bit."""
    return Field(name, at, at, access, meaning, written=written)


@dataclass(frozen=True)
class Register:
    """One word of a device's address space.

    `offset` counts in bytes from the page's start; `last_offset` is that of the last
    word that acts as this register, for one that is seen at several addresses.
    `reset` is what it holds after a reset.
    """

    name: str
    offset: int
    access: Access
    meaning: str
    fields: tuple[Field, ...] = ()
    reset: int = 0
    last_offset: int | None = None
    others_read: int | None = None
    """What a locality that is not active reads; None where it reads the register."""

    def __post_init__(self) -> None:
        seen = 0
        below = 32
        for entry in self.fields:
            if entry.high >= below or entry.low > entry.high or seen & entry.mask:
                raise ValueError(f"{self.name}.{entry.name}: fields go from high bits to low ones")
            seen |= entry.mask
            below = entry.low
        if self.offset % WORD_BYTES or self.end % WORD_BYTES:
            raise ValueError(f"{self.name} does not lie at a word")

    @property
    def end(self) -> int:
        """The offset behind the register."""
        return (self.offset if self.last_offset is None else self.last_offset) + WORD_BYTES

    def field(self, name: str) -> Field:
        """Return the field of that name; raises KeyError."""
        for entry in self.fields:
            if entry.name == name:
                return entry
        raise KeyError(f"{self.name} has no field {name}")

    def mask(self, *names: str) -> int:
        """Return the bits of all fields named, where they lie."""
        return sum(self.field(name).mask for name in names)

    def value(self, **numbers: int) -> int:
        """Return a value with these fields set and all others zero."""
        total = 0
        for name, number in numbers.items():
            entry = self.field(name)
            if number >> entry.width:
                raise ValueError(f"{self.name}.{name} has {entry.width} bits, not for {number:#x}")
            total |= number << entry.low
        return total

    @cached_property
    def format(self) -> Any:
        """The register as a construct `BitStruct`, its reserved bits as fields too."""
        parts: list[Any] = []
        above = 31
        for entry in self.fields:
            if above > entry.high:
                parts.append(_reserved(above, entry.high + 1))
            parts.append(entry.name / BitsInteger(entry.width))
            above = entry.low - 1
        if above >= 0:
            parts.append(_reserved(above, 0))
        return BitStruct(*parts)

    def decode(self, value: int) -> dict[str, int]:
        """Return the value's fields by name, high bits first, reserved ones only where set."""
        parsed = self.format.parse((value & WORD_MASK).to_bytes(WORD_BYTES, "big"))
        return {
            name: number
            for name, number in parsed.items()
            if not name.startswith("_") and (number or not name.startswith("reserved"))
        }

    def encode(self, fields: Mapping[str, int]) -> int:
        """Return the value that `decode` takes apart into `fields`; what is missing is zero."""
        numbers = {part.name: fields.get(part.name, 0) for part in self.format.subcon.subcons}
        return int.from_bytes(self.format.build(numbers), "big")


def _reserved(high: int, low: int) -> Any:
    name = f"reserved_{high}" if high == low else f"reserved_{high}_{low}"
    return name / BitsInteger(high - low + 1)


@dataclass(frozen=True)
class RegisterMap:
    """All registers of one page of a device; they do not overlap."""

    device: str
    title: str
    meaning: str
    registers: tuple[Register, ...]
    page_bytes: int = 0x1000
    localities: int = 1
    unclaimed: int = WORD_MASK
    """What a word reads that no register claims."""

    def __post_init__(self) -> None:
        end = 0
        for register in self.registers:
            if register.offset < end or register.end > self.page_bytes:
                raise ValueError(f"{register.name} lies outside the page or over its neighbour")
            end = register.end

    def __iter__(self) -> Iterator[Register]:
        return iter(self.registers)

    def __getitem__(self, name: str) -> Register:
        for register in self.registers:
            if register.name == name:
                return register
        raise KeyError(f"{self.device} has no register {name}")

    @cached_property
    def by_word(self) -> tuple[Register | None, ...]:
        """The register at each word of a page, to be looked up by offset // 4."""
        return tuple(self.page({register.name: register for register in self.registers}, None))

    def page(self, entries: Mapping[str, T], default: T) -> list[T]:
        """Return a page's words: each has the entry of its register's name, or `default`."""
        words = [default] * (self.page_bytes // WORD_BYTES)
        for register in self.registers:
            if register.name in entries:
                first, end = register.offset // WORD_BYTES, register.end // WORD_BYTES
                words[first:end] = [entries[register.name]] * (end - first)
        return words

    def find(self, offset: int) -> tuple[int, Register | None]:
        """Return the locality and the register at an offset of the device."""
        locality, within = divmod(offset, self.page_bytes)
        if not 0 <= locality < self.localities:
            return locality, None
        return locality, self.by_word[within // WORD_BYTES]
