"""A guest and a TPM made of bytes, and what must hold for a register device whatever they do.

Purpose: hypothesis and the fuzz targets turn bytes into accesses, ends of commands, resets
and saves, and check after each that the device kept its promises.  The list of what is
checked stands in the docstring of `Player`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.device import (
    CancelCommand,
    Quirk,
    RegisterDevice,
    ResetEstablishment,
    SubmitCommand,
    short_command_answer,
)
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family, Refusal, refusal

BUFFER_SIZES = (16, 128, 160, 255, 256, 257, 300, 1024, 4096, 65536)

ACCESS, INT_ENABLE, INT_STATUS, STS = 0x00, 0x08, 0x10, 0x18
ACTIVE, VALUES_OF_ACCESS = 0x20, (0x02, 0x02, 0x08, 0x10, 0x20, 0x20, 0x2A, 0xFF)
VALUES_OF_STS = (0x40, 0x40, 0x20, 0x02, 0x60, 1 << 24, 1 << 25, 0xFFFFFFFF)
VALUES_OF_INT = (0x80000087, 0x80000087, 0x80000081, 0, 0x87, 0xFFFFFFFF, 0x80000004, 0x18)
START, BUFFER = 0x4C, 0x80


class Bytes:
    """Bytes to make decisions of; zeros when they have run out."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def number(self, count: int = 1) -> int:
        value = int.from_bytes(self.data[self.at : self.at + count], "little")
        self.at += count
        return value

    def below(self, limit: int) -> int:
        return self.number(1 if limit <= 256 else 2) % limit


class Player:
    """Plays bytes on a device; raises AssertionError where it breaks one of these.

    1.  A read fits its size; no access raises.
    2.  A command that leaves has 10 bytes at least and the buffer at most.
    3.  At most one command is in flight, and `busy` says whether there is one.
    4.  A cancel leaves only while a command is in flight.
    5.  At most one locality is active; other localities than the active one read FFh
        from STS and FIFO.
    6.  burstCount never exceeds what the FIFO takes or gives: what is written stays within
        the buffer, and with dataAvail exactly burstCount bytes of the response follow.
    7.  A FIFO read returns FFh, or the next byte of this locality's own response; never
        one of another's response, nor of a command.
    8.  The interrupt line changes with every level reported, and is high only while a
        locality's INT_STATUS is not 0.
    9.  An answer with an old ticket, and one that nobody waits for, changes nothing.
    10. A reset brings reset values: registers, zeroed buffer, line low, nothing in flight.
    11. What `save` returns goes through JSON, and a device restored from it saves the same.
    12. CRB: Start is 1 exactly while a command is in flight, and what is behind a
        response reads 0.
    13. tpmEstablishment is only reset in the name of locality 3.
    """

    def __init__(
        self, kind: str, family: Family, buffer_bytes: int, quirks: Quirk = Quirk.NONE
    ) -> None:
        self.quirks = quirks
        self.kind, self.family, self.buffer_bytes = kind, family, buffer_bytes
        self.tis = kind == "tis"
        self.device = self.make()
        self.accesses = 0
        self.flying: SubmitCommand | None = None
        self.old_ticket: int | None = None
        self.responses: dict[int, bytes] = {}
        self.made_here = (
            short_command_answer(family),
            refusal(family, Refusal.FAILURE),
            refusal(family, Refusal.CANCELLED),
        )
        self.line = False
        self.submitted = 0
        self.commands: list[Callable[[Bytes], None]] = [
            self._read_known,
            self._read_known,
            self._write_known,
            self._write_known,
            self._write_known,
            self._any_read,
            self._any_write,
            self._fifo,
            self._fifo,
            self._whole_command,
            self._whole_command,
            self._end,
            self._end,
            self._end_badly,
            self._save,
            self._rarely_reset,
        ]

    def make(self) -> RegisterDevice:
        """Return a fresh device."""
        kind = TisDevice if self.tis else CrbDevice
        return kind(family=self.family, buffer_bytes=self.buffer_bytes, quirks=self.quirks)

    def play(self, data: bytes) -> None:
        """Do what the bytes say."""
        source = Bytes(data)
        while source:
            self.commands[source.below(len(self.commands))](source)
            self.check()

    # Accesses.

    def read(self, offset: int, size: int) -> int:
        self.accesses += 1
        owner = self._owner() if self.tis else None
        sts = self.device.read(owner << 12 | STS, 4) if owner is not None else 0
        value = self.device.read(offset, size)
        assert 0 <= value < 1 << 8 * size, "1"
        if self.tis:
            self._check_fifo_read(offset, size, value, owner, sts)
        self._collect()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses += 1
        self.device.write(offset, size, value)
        self._collect()

    def _owner(self) -> int | None:
        active = [n for n in range(5) if self.device.read(n << 12 | ACCESS, 1) & ACTIVE]
        assert len(active) <= 1, "5"
        return active[0] if active else None

    def _check_fifo_read(
        self, offset: int, size: int, value: int, owner: int | None, sts: int
    ) -> None:
        given = value.to_bytes(size, "little")
        left = sts >> 8 & 0xFFFF if sts & 0x10 else 0
        for at, byte in enumerate(given, offset):
            locality, within = divmod(at, 0x1000)
            if STS <= within < STS + 4 and locality != owner and locality < 5:
                assert byte == 0xFF, "5"
            if not (0x24 <= within < 0x28 or 0x80 <= within < 0xC0) or locality >= 5:
                continue
            if locality != owner or not left:
                assert byte == 0xFF, "6 or 7"
                continue
            assert byte in self._next_bytes(locality, left), "7"
            left -= 1

    def _next_bytes(self, locality: int, left: int) -> set[int]:
        """Return what the next byte of a response with `left` bytes to come can be."""
        answers = (self.responses.get(locality, b""), *self.made_here)
        return {answer[-left] for answer in answers if len(answer) >= left}

    def _collect(self) -> None:
        for output in self.device.take_outputs():
            match output:
                case SubmitCommand(locality, command, ticket):
                    assert 10 <= len(command) <= self.device.buffer_bytes, "2"
                    assert self.flying is None, "3"
                    assert ticket != self.old_ticket, "9"
                    assert 0 <= locality < 4, "2"
                    self.flying = output
                    self.submitted += 1
                case CancelCommand():
                    assert self.flying is not None, "4"
                case ResetEstablishment(locality):
                    assert locality == 3, "13"
        assert self.device.busy == (self.flying is not None), "3"
        for level in self.device.take_irq_levels():
            assert level != self.line, "8"
            self.line = level
        assert self.device.irq_level == self.line, "8"

    def check(self) -> None:
        """Look at all that can be seen without changing it."""
        if self.tis:
            owner = self._owner()
            if self.line:
                assert any(self.device.read(n << 12 | INT_STATUS, 4) for n in range(5)), "8"
            if owner is not None:
                sts = self.device.read(owner << 12 | STS, 4)
                burst = sts >> 8 & 0xFFFF
                assert burst <= self.device.buffer_bytes, "6"
                if sts & 0x10:
                    assert self._next_bytes(owner, burst), "6"
        else:
            assert self.device.read(START, 4) == int(self.device.busy), "12"

    # What the bytes choose from.

    def _locality(self, source: Bytes) -> int:
        return (0, 0, 1, 2, 3, 4, 0, 2)[source.below(8)] if self.tis else 0

    def _known(self, source: Bytes) -> int:
        if not self.tis:
            return source.below(40) * 4
        word = (ACCESS, STS, STS, INT_STATUS, INT_ENABLE, 0x24, 0x30, 0xF00)[source.below(8)]
        return self._locality(source) << 12 | word

    def _read_known(self, source: Bytes) -> None:
        size = (1, 4, 4, 2)[source.below(4)]
        self.read(self._known(source), size)

    def _write_known(self, source: Bytes) -> None:
        if not self.tis:
            at = (0x08, 0x40, 0x48, START)[source.below(4)]
            self.write(at, 4, (1, 1, 2, 0, 3, 0x101, 4, 8)[source.below(8)])
            return
        word = source.below(3)
        values = (VALUES_OF_ACCESS, VALUES_OF_STS, VALUES_OF_INT)[word]
        at = (ACCESS, STS, INT_ENABLE)[word] + (8 if word == 2 and source.below(2) else 0)
        value = values[source.below(8)]
        self.write(self._locality(source) << 12 | at, 4 if value > 0xFF else 1, value)

    def _any_offset(self, source: Bytes) -> int:
        return source.number(2) % (self.device.span_bytes + 16)

    def _any_read(self, source: Bytes) -> None:
        self.read(self._any_offset(source), 1 + source.below(8))

    def _any_write(self, source: Bytes) -> None:
        at, size = self._any_offset(source), 1 + source.below(8)
        self.write(at, size, source.number(size))

    def _fifo(self, source: Bytes) -> None:
        """A run of reads or writes of the FIFO, or of the CRB's memory."""
        what, size = source.below(4), (1, 4, 2, 8)[source.below(4)]
        base = self._locality(source) << 12 | BUFFER if self.tis else BUFFER
        for step in range(1 + source.below(12)):
            at = base if self.tis else base + step * size
            if what:
                self.read(at, size)
            else:
                self.write(at, size, source.number(size) & 0x7F7F7F7F7F7F7F7F)

    def _whole_command(self, source: Bytes) -> None:
        locality, payload = self._locality(source), source.below(16)
        announced = source.number() if source.below(4) == 0 else 10 + payload
        ordinal = (0x17A, 0x53, 0x144, 0x99)[source.below(4)]
        command = HEADER.pack(0x8001, announced, ordinal) + bytes(payload)
        if self.tis:
            page = locality << 12
            for value in (0x02, 0x08)[: 1 + source.below(2)]:
                self.write(page | ACCESS, 1, value)
            self.write(page | STS, 1, 0x40)
            for byte in command:
                self.write(page | 0x24, 1, byte)
            self.write(page | STS, 1, 0x20)
        else:
            self.write(0x08, 4, 1)
            self.write(0x40, 4, 1)
            for at, byte in enumerate(command, BUFFER):
                self.write(at, 1, byte)
            self.write(START, 4, 1)

    # The TPM's side.

    def _end(self, source: Bytes) -> None:
        payload, code = source.below(24), source.below(2)
        if self.flying is None:
            return
        size = min(10 + payload, self.device.buffer_bytes)
        mark = bytes([0xA0 + self.flying.locality])
        self._complete(HEADER.pack(0x8001, size, code) + mark * (size - 10))

    def _end_badly(self, source: Bytes) -> None:
        """An answer that is no response, or one that comes too late."""
        junk = bytes([0xEE]) * (source.number(2) % 5000)
        if source.below(2) and self.old_ticket is not None:
            before = self._seen()
            self.device.complete(junk, ticket=self.old_ticket)
            self._collect()
            assert self._seen() == before, "9"
        elif self.flying is not None:
            self._complete(junk)

    def _complete(self, response: bytes) -> None:
        assert self.flying is not None
        flying, self.flying = self.flying, None
        self.old_ticket = flying.ticket
        if self._well_formed(response):
            self.responses[flying.locality] = response
        self.device.complete(response, ticket=flying.ticket)
        # A command that waited for an orphan's end may leave now.
        self._collect()
        if not self.tis:
            self._check_memory(response)
        seen = self._seen()
        self.device.complete(response, ticket=flying.ticket)
        assert self._seen() == seen, "9"

    def _well_formed(self, response: bytes) -> bool:
        return 10 <= len(response) <= self.device.buffer_bytes and HEADER.unpack_from(response)[
            1
        ] == len(response)

    def _check_memory(self, response: bytes) -> None:
        memory = self._memory()
        if self._well_formed(response):
            assert memory[: len(response)] == response
            assert not any(memory[len(response) :]), "12"
        else:
            assert memory[:10] == refusal(self.family, Refusal.FAILURE)
            assert not any(memory[10:]), "12"

    def _memory(self) -> bytes:
        """Return the CRB's buffer; some of it as the guest reads it."""
        memory = bytes.fromhex(self.device.save()["buffer"])
        for at in (0, 8, 16, 24, len(memory) - 8):
            read = self.device.read(BUFFER + at, 8).to_bytes(8, "little")
            assert read == memory[at : at + 8]
        return memory

    def _seen(self) -> list[int]:
        """Return all registers that can be read without changing anything."""
        if not self.tis:
            return [self.device.read(at, 4) for at in range(0, BUFFER, 4)]
        return [
            self.device.read(page << 12 | at, 4)
            for page in range(5)
            for at in (ACCESS, INT_ENABLE, INT_STATUS, STS, 0x30)
        ]

    def _save(self, _source: Bytes) -> None:
        if self.device.busy:
            return
        state = self.device.save()
        other = self.make()
        other.restore(json.loads(json.dumps(state)))
        assert other.save() == state, "11"
        other.take_irq_levels()
        before = self._seen()
        self.device, self.old_ticket = other, None
        assert self._seen() == before, "11"
        # The line is found again from INT_ENABLE and INT_STATUS.
        self.line = other.irq_level

    def _rarely_reset(self, source: Bytes) -> None:
        if source.below(16):
            return
        if self.flying is not None:
            self.old_ticket, self.flying = self.flying.ticket, None
        self.device.reset()
        self._collect()
        assert not self.line, "10"
        assert self._seen() == Player(self.kind, self.family, self.buffer_bytes)._seen(), "10"
        if not self.tis:
            assert not any(self._memory()), "10"
