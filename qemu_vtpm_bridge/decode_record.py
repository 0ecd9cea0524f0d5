"""Turning a record of accesses into lines that a person reads.

Theory of operation: a record's steps (`bridge/record.py`) become `Row`s, each with what it
says in columns.  A run of FIFO bytes becomes one line, and so does a driver that polls:
equal accesses in a row are counted.  Nothing is believed: a line that is not JSON, or a
step that is none, ends with a ConfigError that names the line.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO, cast

from .bridge.device import ACCESS_MAX_BYTES
from .bridge.registers import Register, RegisterMap
from .bridge.tpm import HEADER_SIZE, Family, Header
from .decode_values import DATA_REGISTERS, MAPS, access_parts, value_text, write_hint
from .errors import ConfigError
from .names import ordinal_name, response_code_name

SHOWN_BYTES: Final = 16

_COLUMNS: Final = "{step:>6}  {what:<2} {locality:>3}  {register:<15} {value:<12} {meaning}"


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
    return f"{response_name(header.code, family)}, {_lengths(length, header)}"


def response_name(code: int, family: Family) -> str:
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
            if op == "w" and (
                hint := write_hint(cast(RegisterMap, self.map), locality, register, lane, value)
            ):
                meaning += f"  ({hint})"
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
