"""The CRB device: one locality, a buffer in memory, a handful of control words.

Purpose: be what a guest's driver finds in QEMU's tpm-crb.  `crb_registers.py` is the data
sheet, `device.py` the access path; here is what the registers do.

Theory of operation.  The registers are 32 words that read as they are held.  Five of
them act when they are written, and only if the write starts at the register's first byte
and its value, of whatever size, is exactly one the `COMMANDS` table names.  From 80h
on there is memory: the guest puts its command there, sets Start, waits until Start is 0
again, and finds the response in the same place.  Idle and Ready are shown and gate
nothing, as in QEMU.

Promises: P1 and P5 for a guest at register level, P11.  Deviations are those of `Quirk`:
short commands, what is behind a response, the buffer at a reset.  Who may lie: the guest
with every access, the TPM with its answers.

Source: PTP, 6.4 and 6.5.3.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any, ClassVar, Final

from . import crb_registers as sheet
from .device import (
    SIZE_MASK,
    CancelCommand,
    Quirk,
    Read,
    RegisterDevice,
    Write,
    checked_int,
    short_command_answer,
)
from .tpm import Family

_WORDS: Final = sheet.BUFFER_OFFSET // 4

_LOC_STATE: Final = sheet.LOC_STATE.offset // 4
_LOC_STS: Final = sheet.LOC_STS.offset // 4
_CTRL_STS: Final = sheet.CTRL_STS.offset // 4
_CTRL_START: Final = sheet.CTRL_START.offset // 4

_ASSIGNED: Final = sheet.LOC_STATE.mask("locAssigned")
_NOT_ESTABLISHED: Final = sheet.LOC_STATE.mask("tpmEstablished")
_GRANTED: Final = sheet.LOC_STS.mask("Granted")
_IDLE: Final = sheet.CTRL_STS.mask("tpmIdle")
_ERROR: Final = sheet.CTRL_STS.mask("tpmSts")
_START: Final = sheet.CTRL_START.mask("Start")

_SIZE_AT: Final = slice(2, 6)
"""Where a command's header has its size."""

COMMANDS: Final[dict[tuple[str, int], tuple[str, str]]] = {
    ("LOC_CTRL", sheet.LOC_CTRL.mask("requestAccess")): (
        "_request",
        "locAssigned and Granted are set",
    ),
    ("LOC_CTRL", sheet.LOC_CTRL.mask("relinquish")): (
        "_relinquish",
        "locAssigned and Granted are cleared; a running command runs on",
    ),
    ("CTRL_REQ", sheet.CTRL_REQ.mask("cmdReady")): (
        "_ready",
        "tpmIdle is cleared, and tpmSts",
    ),
    ("CTRL_REQ", sheet.CTRL_REQ.mask("goIdle")): ("_idle", "tpmIdle is set"),
    ("CTRL_CANCEL", sheet.CTRL_CANCEL.mask("cancel")): (
        "_cancel",
        "while Start is 1, the TPM is told to cancel",
    ),
    ("CTRL_START", _START): (
        "_start",
        "with locAssigned and without Start: Start is 1, and the command goes to the TPM",
    ),
}
"""What acts: a register and the exact value written, the method that does it, its meaning."""


class CrbDevice(RegisterDevice):
    """The device; see `RegisterDevice` for its interface."""

    name: ClassVar[str] = "crb"
    span_bytes: ClassVar[int] = sheet.CRB.page_bytes
    buffer_max_bytes: ClassVar[int] = sheet.BUFFER_BYTES

    def __init__(
        self,
        *,
        family: Family,
        buffer_bytes: int,
        established: bool = False,
        quirks: Quirk = Quirk.NONE,
    ) -> None:
        super().__init__(
            family=family, buffer_bytes=buffer_bytes, established=established, quirks=quirks
        )
        self._to_reset_values()
        self._actions: dict[tuple[int, int], Callable[[], None]] = {
            (sheet.CRB[name].offset // 4, value): getattr(self, method)
            for (name, value), (method, _meaning) in COMMANDS.items()
        }
        acting = {word for word, _value in self._actions}
        for word in range(_WORDS):
            read: Read = self._read_loc_state if word == _LOC_STATE else self._read_word
            write: Write = self._write_command if word in acting else self._ignore
            self._reads.append((read, word))
            self._writes.append((write, word))
        buffer = range(0, sheet.BUFFER_BYTES, 4)
        self._reads += zip(repeat(self._read_buffer), buffer, strict=False)
        self._writes += zip(repeat(self._write_buffer), buffer, strict=False)

    def _to_reset_values(self) -> None:
        self._words = [
            register.reset if register else sheet.CRB.unclaimed
            for register in sheet.CRB.by_word[:_WORDS]
        ]
        # The flag is not held here: a read of the first byte adds it.
        self._words[_LOC_STATE] &= ~_NOT_ESTABLISHED

    @staticmethod
    def is_data(offset: int) -> bool:
        """Whether the byte at an offset is a command's or a response's, not a register's."""
        return sheet.BUFFER_OFFSET <= offset < sheet.CRB.page_bytes

    # Registers.

    def _read_word(self, word: int, lane: int, size: int) -> int:
        return self._words[word] >> 8 * lane & SIZE_MASK[size]

    def _read_loc_state(self, word: int, lane: int, size: int) -> int:
        value = self._words[word] >> 8 * lane & SIZE_MASK[size]
        return value if lane or self.established else value | _NOT_ESTABLISHED

    def _write_command(self, word: int, lane: int, _size: int, value: int) -> None:
        action = None if lane else self._actions.get((word, value))
        if action is not None:
            action()

    def _request(self) -> None:
        self._words[_LOC_STATE] |= _ASSIGNED
        self._words[_LOC_STS] |= _GRANTED

    def _relinquish(self) -> None:
        self._words[_LOC_STATE] &= ~_ASSIGNED
        self._words[_LOC_STS] &= ~_GRANTED

    def _ready(self) -> None:
        self._words[_CTRL_STS] &= ~(_IDLE | _ERROR)

    def _idle(self) -> None:
        self._words[_CTRL_STS] |= _IDLE

    def _cancel(self) -> None:
        if self._words[_CTRL_START] & _START:
            self._outputs.append(CancelCommand())

    def _start(self) -> None:
        if self._words[_CTRL_START] & _START or not self._words[_LOC_STATE] & _ASSIGNED:
            return
        size = min(int.from_bytes(self._buffer[_SIZE_AT], "big"), self._capacity)
        command = bytes(self._buffer[:size])
        if self._is_short(command):
            self._words[_CTRL_STS] |= _ERROR
            self._finished(short_command_answer(self.family))
            return
        self._words[_CTRL_START] |= _START
        self._submit(0, command)

    def _finished(self, response: bytes) -> None:
        self._words[_CTRL_START] &= ~_START
        size = len(response)
        self._buffer[:size] = response
        if Quirk.KEEPS_TAIL not in self._quirks:
            self._buffer[size:] = bytes(len(self._buffer) - size)

    # Memory.

    def _read_buffer(self, at: int, lane: int, size: int) -> int:
        at += lane
        return int.from_bytes(self._buffer[at : at + size], "little")

    def _write_buffer(self, at: int, lane: int, size: int, value: int) -> None:
        at += lane
        self._buffer[at : at + size] = value.to_bytes(size, "little")

    # Save and restore.

    def _saved(self) -> dict[str, Any]:
        return {
            "assigned": bool(self._words[_LOC_STATE] & _ASSIGNED),
            "ctrl_sts": self._words[_CTRL_STS],
        }

    def _restorer(self, state: dict[str, Any]) -> Callable[[], None]:
        assigned = bool(state["assigned"])
        ctrl_sts = checked_int(state["ctrl_sts"], 0, _IDLE | _ERROR)

        def take_over() -> None:
            self._to_reset_values()
            if assigned:
                self._request()
            self._words[_CTRL_STS] = ctrl_sts

        return take_over
