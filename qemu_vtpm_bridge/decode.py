"""Turning register values and recorded accesses into lines that a person reads.

Purpose: who debugs a guest's driver sees numbers at offsets.  `decode` gives them the
names of the data sheets: register and fields, locality, the TPM's commands and response
codes.  A record is folded on the way: a run of FIFO bytes becomes one line, and so does a
driver that polls.

Theory of operation: a record's steps (`bridge/record.py`) become `Row`s, each with what it
says in columns; equal reads in a row are counted, bytes of commands and responses
gathered.  Nothing is believed: a line that is not JSON, or a step that is none, ends with
a ConfigError that names the line.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO, cast

from .bridge.crb_registers import CRB
from .bridge.device import ACCESS_MAX_BYTES, cut
from .bridge.registers import Access, Field, Register, RegisterMap
from .bridge.tis_registers import TIS
from .bridge.tpm import HEADER_SIZE, Family, Header
from .errors import ConfigError
from .names import ordinal_name, response_code_name

MAPS: Final[dict[str, RegisterMap]] = {"tis": TIS, "crb": CRB}
DATA_REGISTERS: Final = frozenset({"DATA_FIFO", "XDATA_FIFO", "DATA_BUFFER"})
SHOWN_BYTES: Final = 16

_COLUMNS: Final = "{step:>6}  {what:<2} {locality:>3}  {register:<15} {value:<12} {meaning}"


# Values.


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


# Commands and responses.


_TAGS: Final = {
    0x8001: "",
    0x8002: ", with sessions",
    0x00C1: "",
    0x00C2: ", with one authorisation",
    0x00C3: ", with two authorisations",
}


def command_text(raw: bytes, length: int) -> str:
    """Return a line about a command of `length` bytes, whose first ten at least are in `raw`."""
    if length < HEADER_SIZE or len(raw) < HEADER_SIZE:
        return f"{length} bytes, less than a header"
    header = Header.parse(raw)
    tag = _TAGS.get(header.tag, f", tag {header.tag:#06x}")
    return f"{ordinal_name(header.code)}, {_lengths(length, header)}{tag}"


def response_text(raw: bytes, length: int, family: Family) -> str:
    """Return a line about a response of `length` bytes, whose first ten at least are in `raw`."""
    if length < HEADER_SIZE or len(raw) < HEADER_SIZE:
        return f"{length} bytes, less than a header"
    header = Header.parse(raw)
    return f"{_response_name(header.code, family)}, {_lengths(length, header)}"


def _response_name(code: int, family: Family) -> str:
    return response_code_name(code, tpm_1_2=family is Family.TPM_1_2)


def _lengths(length: int, header: Header) -> str:
    if header.size_bytes == length:
        return f"{length} bytes"
    return f"{length} bytes (its header says {header.size_bytes})"


# Records.


@dataclass(slots=True)
class Row:
    """A line of the output; `count` accesses that look the same, or one run of bytes."""

    step: int
    what: str
    locality: str
    register: str
    value: str
    meaning: str
    count: int = 1

    def __str__(self) -> str:
        meaning = self.meaning if self.count == 1 else f"{self.meaning}  ({self.count} times)"
        return _COLUMNS.format(
            step="" if self.step < 0 else self.step,
            what=self.what,
            locality=self.locality,
            register=self.register,
            value=self.value,
            meaning=meaning,
        ).rstrip()

    def looks_like(self, other: Row) -> bool:
        """Whether only the step differs."""
        mine = (self.what, self.locality, self.register, self.value, self.meaning)
        return mine == (other.what, other.locality, other.register, other.value, other.meaning)


@dataclass(slots=True)
class _Run:
    """Bytes of a command or response that one access after the other moves."""

    step: int
    op: str
    locality: int
    register: str
    next_offset: int | None
    """Where the next access has to lie to belong to it; None for a FIFO."""
    data: bytearray
    hidden: int = 0
    """Bytes that the record does not hold."""
    accesses: int = 0

    def row(self) -> Row:
        count = len(self.data) + self.hidden
        value = f"{count} byte{'s' * (count != 1)}"
        if self.hidden:
            meaning = "(not recorded)"
        else:
            meaning = self.data[:SHOWN_BYTES].hex(" ") + " ..." * (count > SHOWN_BYTES)
        if self.accesses > 1:
            meaning += f"  in {self.accesses} accesses"
        arrow = "W" if self.op == "w" else "R"
        return Row(self.step, arrow, str(self.locality), self.register, value, meaning)


class _Sequence:
    """Turns the steps of one sequence into rows."""

    def __init__(self, header: dict[str, Any]) -> None:
        name = header.get("dev")
        self.map = MAPS.get(str(name))
        self.family = Family.TPM_1_2 if header.get("tpm") == 1 else Family.TPM_2_0
        established = ", D-RTM sequence seen" if header.get("est") else ""
        title = self.map.title if self.map else name
        self.title = (
            f"# sequence {header.get('n', 0)}: {title}, TPM {self.family.value}, "
            f"buffer {header.get('buf')} bytes{established}"
        )
        self._step = 0
        self._run: _Run | None = None
        self._last: Row | None = None

    def rows(self, step: dict[str, Any]) -> Iterator[Row]:
        """Yield the rows that a step completes."""
        match step["op"]:
            case "r" | "w" as op:
                if self.map is None:
                    raise ValueError("an access, but no register device")
                if not (0 <= step["o"] < 1 << 32 and 1 <= step["s"] <= ACCESS_MAX_BYTES):
                    raise ValueError(f"no access of {step['s']} bytes at {step['o']}")
                yield from self._access(self.map, op, step["o"], step["s"], step["v"])
            case "cmd":
                yield from self.flush()
            case "ctl":
                yield from self._single("", "", f"control: {step['name']}")
            case "done":
                raw = bytes.fromhex(step["rsp"])
                length = int(step.get("len", len(raw)))
                text = response_text(raw, length, self.family)
                yield from self._single("<-", "", f"TPM answers: {text}")
            case "reset":
                yield from self._single("**", "", "machine reset")
            case other:
                raise ValueError(f"no step is called {other!r}")
        if step.get("ev") or step.get("irq"):
            yield from self.flush()
        for event in step.get("ev", ()):
            yield self._event(event)
        for level in step.get("irq", ()):
            yield Row(-1, "!", "", "", "", f"interrupt line {'high' if level else 'low'}")
        self._step += 1

    def flush(self) -> Iterator[Row]:
        """Yield what waited for more of its kind."""
        if self._run is not None:
            yield self._run.row()
            self._run = None
        if self._last is not None:
            yield self._last
            self._last = None

    def _single(self, what: str, register: str, meaning: str) -> Iterator[Row]:
        yield from self.flush()
        yield Row(self._step, what, "", register, "", meaning)

    def _event(self, event: list[Any]) -> Row:
        match event:
            case ["submit", locality, raw, *rest]:
                command = bytes.fromhex(raw)
                length = rest[0] if rest else len(command)
                text = command_text(command, length)
                return Row(-1, "->", str(locality), "", "", f"TPM runs: {text}")
            case ["cancel"]:
                return Row(-1, "->", "", "", "", "TPM is told to cancel")
            case ["reset_est", locality]:
                return Row(-1, "->", str(locality), "", "", "TPM is told to reset tpmEstablishment")
            case _:
                raise ValueError(f"no event looks like {event!r}")

    def _access(
        self, device: RegisterMap, op: str, offset: int, size: int, value: int | None
    ) -> Iterator[Row]:
        known = 0 if value is None else value
        for locality, register, lane, piece, part in access_parts(device, offset, size, known):
            if register is not None and register.name in DATA_REGISTERS:
                data = None if value is None else part.to_bytes(piece, "little")
                yield from self._data(op, offset, locality, register, piece, data)
            else:
                yield from self._register(op, offset, locality, register, lane, piece, part)
            offset += piece

    def _data(
        self,
        op: str,
        offset: int,
        locality: int,
        register: Register,
        size: int,
        data: bytes | None,
    ) -> Iterator[Row]:
        run = self._run
        memory = register.name == "DATA_BUFFER"
        if (
            run is None
            or (run.op, run.locality) != (op, locality)
            or (memory and run.next_offset != offset)
        ):
            yield from self.flush()
            name = register.name if not memory else f"{register.name}+{offset & 0xFFF:03x}"
            run = self._run = _Run(self._step, op, locality, name, None, bytearray())
        run.accesses += 1
        if data is None:
            run.hidden += size
        else:
            run.data += data
        run.next_offset = offset + size if memory else None

    def _register(
        self,
        op: str,
        offset: int,
        locality: int,
        register: Register | None,
        lane: int,
        size: int,
        value: int,
    ) -> Iterator[Row]:
        if register is None:
            name, meaning = f"{offset & 0xFFF:#05x}", "no register"
        else:
            name = register.name + (f"+{lane}" if lane else "")
            meaning = value_text(register, value, lane, size, written=op == "w")
            if register.others_read is not None and value == (1 << 8 * size) - 1 and op == "r":
                meaning = "locality is not active"
        row = Row(self._step, op.upper(), str(locality), name, f"{value:0{2 * size}x}", meaning)
        if self._last is not None and self._run is None and self._last.looks_like(row):
            self._last.count += 1
            return
        yield from self.flush()
        self._last = row


def decode_record(lines: Iterable[str], name: str) -> Iterator[str]:
    """Yield the record's lines for people; raises ConfigError at one that is no record's."""
    sequence: _Sequence | None = None
    number = 0
    try:
        for line in lines:
            number += 1
            step = json.loads(line)
            if step["op"] == "seq":
                sequence = _Sequence(step)
                yield sequence.title
                yield _COLUMNS.format(
                    step="step",
                    what="",
                    locality="loc",
                    register="register",
                    value="value",
                    meaning="meaning",
                )
            elif sequence is None:
                raise ValueError("a step before the first sequence")
            elif step["op"] == "end":
                yield from map(str, sequence.flush())
                tags = ", ".join(step.get("tags", ()))
                yield f"# end{': ' + tags if tags else ''}"
                yield ""
                sequence = None
            else:
                yield from map(str, sequence.rows(step))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{name}, line {number}, is not of a record: {error}",
            next_step="give a file that --record wrote",
        ) from error
    if sequence is not None:
        yield from map(str, sequence.flush())
        yield "# the record ends here without an end line: what wrote it was stopped"


def open_record(name: str) -> TextIO:
    """Open a record, compressed or not; "-" is standard input."""
    if name == "-":
        return sys.stdin
    path = Path(name)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return cast(TextIO, gzip.open(path, "rt")) if packed else path.open()
    except OSError as error:
        raise ConfigError(
            f"{name} cannot be read: {error.strerror}",
            next_step="give a record's path, or tis, crb, rc or ordinal and what to decode",
        ) from error


# What is typed on the command line.


def _number(word: str, what: str) -> int:
    try:
        value = int(word, 0)
    except ValueError:
        raise ConfigError(
            f"{what} {word!r} is not a number", next_step="write 24 or 0x18"
        ) from None
    if not 0 <= value < 1 << 64:
        raise ConfigError(f"{what} {word} does not fit 64 bits")
    return value


def _place(device: RegisterMap, word: str) -> int:
    """Return the offset that is meant by a number or by a register's name."""
    for register in device:
        if register.name == word.upper():
            return register.offset
    if not word[:1].isdigit():
        names = ", ".join(register.name for register in device)
        raise ConfigError(f"the {device.title} device has no register {word}", next_step=names)
    return _number(word, "offset")


def _sheet(device: RegisterMap, offset: int) -> list[dict[str, Any]]:
    """Return what the data sheet says about an offset."""
    locality, register = device.find(offset)
    if register is None:
        return [{"locality": locality, "offset": offset, "register": None}]
    return [
        {
            "locality": locality,
            "offset": register.offset,
            "register": register.name,
            "meaning": register.meaning,
            "reset": register.reset,
            "access": register.access.value,
            "fields": [
                {
                    "name": field.name,
                    "bits": field.bits,
                    "access": field.access.value,
                    "meaning": field.meaning,
                }
                for field in register.fields
            ],
        }
    ]


def _sheet_lines(device: RegisterMap, offset: int) -> Iterator[str]:
    [entry] = _sheet(device, offset)
    if entry["register"] is None:
        yield f"{device.title}: no register at {offset:#x}"
        return
    locality = f", locality {entry['locality']}" if device.localities > 1 else ""
    yield (
        f"{entry['register']} at {entry['offset']:#05x}{locality}, {entry['access']}, "
        f"{entry['reset']:08x} after reset"
    )
    yield f"  {entry['meaning']}"
    for field in entry["fields"]:
        yield f"  {field['bits']:>5}  {field['access']:<3}  {field['name']:<24} {field['meaning']}"


def _decoded(device: RegisterMap, offset: int, size: int, value: int) -> list[dict[str, Any]]:
    found = []
    for locality, register, lane, piece, part in access_parts(device, offset, size, value):
        entry: dict[str, Any] = {
            "locality": locality,
            "register": register.name if register else None,
            "byte": lane,
            "size": piece,
            "value": part,
            "text": value_text(register, part, lane, piece) if register else "no register",
        }
        if register is not None:
            entry["fields"] = register.decode(part << 8 * lane)
        found.append(entry)
    return found


def decode_typed(words: list[str], family: Family, size: int | None) -> tuple[list[str], list[Any]]:
    """Return the lines, and the same for JSON, of `tis|crb PLACE [VALUE]`, `rc N`, `ordinal N`.

    Raises ConfigError for words that are none of these.
    """
    kind, *rest = words
    if kind in ("rc", "ordinal"):
        if len(rest) != 1:
            raise ConfigError(f"decode {kind} takes one number")
        number = _number(rest[0], kind)
        name = _response_name(number, family) if kind == "rc" else ordinal_name(number)
        return [name], [{kind: number, "name": name}]
    device = MAPS[kind]
    if len(rest) not in (1, 2):
        raise ConfigError(f"decode {kind} takes an offset or a register's name, and a value")
    offset = _place(device, rest[0])
    if len(rest) == 1:
        return list(_sheet_lines(device, offset)), _sheet(device, offset)
    value = _number(rest[1], "value")
    if size is None:
        # As many bytes as reach the word's end, or 8 for a value that needs them.
        size = 4 - offset % 4 if value < 1 << 32 else 8
    if value >> 8 * size:
        raise ConfigError(f"{value:#x} does not fit {size} bytes at {offset:#x}")
    found = _decoded(device, offset, size, value)
    lines = []
    for entry in found:
        place = f"{entry['register']}" + (f"+{entry['byte']}" if entry["byte"] else "")
        locality = f"locality {entry['locality']}  " if device.localities > 1 else ""
        digits = 2 * entry["size"]
        lines.append(f"{locality}{place:<12} {entry['value']:0{digits}x}  {entry['text']}")
    return lines, found


TYPED: Final = ("tis", "crb", "rc", "ordinal")


def show(words: list[str], *, family: Family, size: int | None, as_json: bool) -> None:
    """Print what the words of `qemu-vtpm-bridge decode` ask for."""
    if words[0] in TYPED:
        lines, document = decode_typed(words, family, size)
        print(json.dumps(document, indent=2) if as_json else "\n".join(lines))
        return
    if as_json or size is not None:
        raise ConfigError("--json and --size are for values; a record is JSON already")
    for name in words:
        with open_record(name) as file:
            for line in decode_record(file, name):
                print(line)
