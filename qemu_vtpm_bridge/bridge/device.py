"""What the two register devices share: outputs, cutting accesses, one command at a time.

Purpose: `tis.py` and `crb.py` answer a guest's accesses to a TPM's registers.  They do
no input or output: an access or the end of a command goes in, numbers and `Output`s come
out, and the caller carries commands to the TPM and interrupts to the guest.

Theory of operation.  A device is a table with an entry for each word of its address
space, a pair of a handler and of what the handler has to know (the locality, say).
`read` and `write` look the entry up and call the handler.  The registers never see an
access that is wider than four bytes or not aligned to its size: such a one is cut, low
addresses first, as QEMU's memory core does.  The table is built from the data sheet
when the device is; construct is not on this path.

A command goes out as `SubmitCommand` with a ticket, and `complete` brings the answer
back with that ticket.  There is one command at a time: an answer with another ticket
(one that a reset overtook, say) is dropped (promise P5).  What the TPM answered is not
trusted: an answer that is no response of the size it says, or larger than the buffer,
is replaced by the family's failure code (promises P1 and P2).

Deviations.  A guest sees what QEMU's devices show (promise P11) but for the list in
`Quirk`: there QEMU does what is unsafe or wrong, and these devices do it only where the
caller asks, which the tests do that compare them with QEMU access by access.
Where a module says "QEMU", QEMU 7.2 was watched.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..errors import LocalProtocolError
from .registers import WORD_MASK
from .tpm import (
    HEADER,
    HEADER_SIZE,
    TPM_RC_COMMAND_SIZE,
    TPM_ST_NO_SESSIONS,
    TPM_TAG_RSP_COMMAND,
    Family,
    Refusal,
    refusal,
)

TPM_BAD_PARAMETER: Final = 3

SIZE_MASK: Final = (0, 0xFF, 0xFFFF, 0xFFFFFF, WORD_MASK)
"""All bits of an access of that many bytes."""

_WHOLE: Final = frozenset({1, 2, 4})
ACCESS_MAX_BYTES: Final = 8

STATE_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class SubmitCommand:
    """Give the command to the TPM, at this locality, and `complete` it with this ticket."""

    locality: int
    command: bytes
    ticket: int


@dataclass(frozen=True, slots=True)
class CancelCommand:
    """Tell the TPM to give the running command up; its answer is still waited for."""


@dataclass(frozen=True, slots=True)
class ResetEstablishment:
    """Clear the TPM's sign of a D-RTM sequence, on behalf of this locality."""

    locality: int


Output = SubmitCommand | CancelCommand | ResetEstablishment


class Quirk(enum.Flag):
    """What QEMU's devices do and these leave out, unless they are told to do it too."""

    SHORT_COMMANDS = enum.auto()
    """A command of less than ten bytes is given to the TPM. swtpm then waits for the rest
    of a header for ever, and QEMU hangs at the next abort or reset. Here it is answered at
    once, with TPM_RC_COMMAND_SIZE (2.0) or TPM_BAD_PARAMETER (1.2); the CRB device sets
    tpmSts beside, as newer QEMU does, until the next cmdReady."""
    ORPHANS = enum.auto()
    """TIS: an owner that relinquishes while its command runs leaves an orphan, whose answer
    lands in whatever another locality is writing, or is given to it as its own. Here the
    command is cancelled, its locality goes Idle, its answer is dropped, and a command
    that another locality starts before that waits for it."""
    SHARED_RESPONSE = enum.auto()
    """TIS: a locality whose response waits in the buffer keeps dataAvail when another one
    writes its command there, and then reads that one's bytes. Here its response counts as
    read to the end as soon as another locality writes the first byte over it."""
    STALE_ESTABLISHMENT = enum.auto()
    """TIS: resetEstablishmentBit goes to the TPM in the name of the locality that ran the
    last command, and the TPM mostly refuses. Here it goes in that of locality 3, which wrote it."""
    KEEPS_AT_RESET = enum.auto()
    """A reset leaves the interrupt line as it is, which is then stuck, and the buffer with
    the last command or response in it. Here the line goes low and the buffer is zeroed."""
    KEEPS_TAIL = enum.auto()
    """CRB: behind a response the rest of the command stays readable. Here it is zeroed."""

    NONE = 0
    ALL = (
        SHORT_COMMANDS
        | ORPHANS
        | SHARED_RESPONSE
        | STALE_ESTABLISHMENT
        | KEEPS_AT_RESET
        | KEEPS_TAIL
    )


Read = Callable[[int, int, int], int]
Write = Callable[[int, int, int, int], None]


def cut(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the aligned pieces, offset and size, that QEMU's memory core makes of an access."""
    while size:
        piece = min(4, offset & -offset or 4, 1 << size.bit_length() - 1)
        yield offset, piece
        offset += piece
        size -= piece


def short_command_answer(family: Family) -> bytes:
    """Return what a command without a whole header is answered with."""
    if family is Family.TPM_2_0:
        return HEADER.pack(TPM_ST_NO_SESSIONS, HEADER_SIZE, TPM_RC_COMMAND_SIZE)
    return HEADER.pack(TPM_TAG_RSP_COMMAND, HEADER_SIZE, TPM_BAD_PARAMETER)


class RegisterDevice(abc.ABC):
    """Base of the devices: the access path, the command in flight, the interrupt line.

    A subclass fills `_reads` and `_writes`, one pair of handler and argument a word:
    `handler(argument, lane, size)` and `handler(argument, lane, size, value)`, and has the
    methods at this class's end.
    """

    name: ClassVar[str]
    span_bytes: ClassVar[int]
    buffer_max_bytes: ClassVar[int]

    def __init__(
        self,
        *,
        family: Family,
        buffer_bytes: int,
        established: bool = False,
        quirks: Quirk = Quirk.NONE,
    ) -> None:
        """Make a device in its reset state.

        `buffer_bytes` is what the TPM takes; the device uses at most its own maximum of it.
        `established` says that a D-RTM sequence has happened.  Raises ValueError where
        the buffer does not hold a header.
        """
        if buffer_bytes < HEADER_SIZE:
            raise ValueError(f"a buffer of {buffer_bytes} bytes holds no TPM header")
        self.family = family
        self.established = established
        self._quirks = quirks
        self._capacity = min(buffer_bytes, self.buffer_max_bytes)
        self._buffer = bytearray(self.buffer_max_bytes)
        self._busy = False
        self._ticket = 0
        self._outputs: list[Output] = []
        self._irq_level = False
        self._irq_levels: list[bool] = []
        self._reads: list[tuple[Read, int]] = []
        self._writes: list[tuple[Write, int]] = []

    # What the guest does.

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes, 1 to 8, at any offset, as a little-endian number.

        Outside of the device all bytes are zero.  Raises ValueError for another size.
        """
        if size in _WHOLE and not offset & size - 1 and 0 <= offset < self.span_bytes:
            handler, argument = self._reads[offset >> 2]
            return handler(argument, offset & 3, size)
        return self._read_pieces(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the low `size` bytes, 1 to 8, of `value` at any offset.

        Outside of the device nothing happens.  Raises ValueError for another size.
        """
        if size in _WHOLE and not offset & size - 1 and 0 <= offset < self.span_bytes:
            handler, argument = self._writes[offset >> 2]
            handler(argument, offset & 3, size, value & SIZE_MASK[size])
        else:
            self._write_pieces(offset, size, value)

    def _read_pieces(self, offset: int, size: int) -> int:
        self._check_access(offset, size)
        value = shift = 0
        for at, piece in cut(offset, size):
            if at < self.span_bytes:
                value |= self.read(at, piece) << shift
            shift += 8 * piece
        return value

    def _write_pieces(self, offset: int, size: int, value: int) -> None:
        self._check_access(offset, size)
        for at, piece in cut(offset, size):
            if at < self.span_bytes:
                self.write(at, piece, value)
            value >>= 8 * piece

    @staticmethod
    def _check_access(offset: int, size: int) -> None:
        if not 1 <= size <= ACCESS_MAX_BYTES or offset < 0:
            raise ValueError(f"no access of {size} bytes at offset {offset}")

    # What the caller does.

    @staticmethod
    @abc.abstractmethod
    def is_data(offset: int) -> bool:
        """Whether the byte at an offset is a command's or a response's, not a register's."""

    @property
    def busy(self) -> bool:
        """Whether a command was given out and has not been completed."""
        return self._busy

    @property
    def irq_level(self) -> bool:
        """The interrupt line."""
        return self._irq_level

    @property
    def buffer_bytes(self) -> int:
        """The largest command and response."""
        return self._capacity

    @property
    def has_outputs(self) -> bool:
        """Whether `take_outputs` has something to give."""
        return bool(self._outputs)

    def take_outputs(self) -> list[Output]:
        """Return what the device asked for since the last call, in order."""
        outputs = self._outputs
        if outputs:
            self._outputs = []
        return outputs

    def take_irq_levels(self) -> list[bool]:
        """Return the levels that the line went through since the last call, in order."""
        levels = self._irq_levels
        if levels:
            self._irq_levels = []
        return levels

    def complete(self, response: bytes, *, ticket: int | None = None) -> None:
        """End the running command with what the TPM answered.

        `response` may be anything.  With the ticket of a command that does not run any
        more, or when none runs, nothing happens.
        """
        if not self._busy or (ticket is not None and ticket != self._ticket):
            return
        self._busy = False
        self._finished(self._checked(response))

    def reset(self, *, established: bool = False) -> None:
        """Reset the machine: drop the running command and show reset values.

        Its answer is ignored when it comes; outputs that were not taken are gone.  The caller
        gives the TPM's sign of a D-RTM sequence, which outlives a reset.
        """
        self._busy = False
        self._outputs = []
        self.established = established
        if Quirk.KEEPS_AT_RESET not in self._quirks:
            self._buffer[:] = bytes(len(self._buffer))
            self._set_irq(False)
        self._to_reset_values()

    def save(self) -> dict[str, Any]:
        """Return the state as a document for JSON.

        Raises LocalProtocolError while a command runs: wait for it first, as its answer
        would find no one.
        """
        if self._busy or self._outputs:
            raise LocalProtocolError(
                f"the {self.name} device cannot be saved now",
                state="a command runs or an output was not taken",
                next_step="wait for the command's answer",
            )
        return {
            "version": STATE_VERSION,
            "device": self.name,
            "family": self.family.value,
            "buffer_bytes": self._capacity,
            "established": self.established,
            "buffer": self._buffer.hex(),
            **self._saved(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state over that `save` returned, from a device of the same kind.

        Raises ValueError, and changes nothing, where the state is of another device, version
        or family, is not well formed, or needs a larger buffer than this one's.
        """
        try:
            for key, want in (
                ("version", STATE_VERSION),
                ("device", self.name),
                ("family", self.family.value),
            ):
                if state[key] != want:
                    raise ValueError(f"its {key} is {state[key]!r}, not {want!r}")
            capacity = checked_int(state["buffer_bytes"], HEADER_SIZE, self._capacity)
            buffer = bytes.fromhex(state["buffer"])
            if len(buffer) != len(self._buffer):
                raise ValueError(f"its buffer has {len(buffer)} bytes, not {len(self._buffer)}")
            established = bool(state["established"])
            take_over = self._restorer(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a state of the {self.name} device: {error!r}") from error
        self._capacity = capacity
        self._buffer[:] = buffer
        self.established = established
        self._busy = False
        self._outputs = []
        take_over()

    # For the subclasses.

    def _set_irq(self, level: bool) -> None:
        if level != self._irq_level:
            self._irq_level = level
            self._irq_levels.append(level)

    def _submit(self, locality: int, command: bytes) -> None:
        """Give the command out; `_finished` is called when it has ended."""
        self._busy = True
        self._ticket += 1
        self._outputs.append(SubmitCommand(locality, command, self._ticket))

    def _is_short(self, command: bytes) -> bool:
        return len(command) < HEADER_SIZE and Quirk.SHORT_COMMANDS not in self._quirks

    def _checked(self, response: bytes) -> bytes:
        if HEADER_SIZE <= len(response) <= self._capacity:
            _tag, size, _code = HEADER.unpack_from(response)
            if size == len(response):
                return bytes(response)
        return refusal(self.family, Refusal.FAILURE)

    @staticmethod
    def _constant(value: int, lane: int, size: int) -> int:
        """Read a register that never changes; the table's argument is its value."""
        return value >> 8 * lane & SIZE_MASK[size]

    @staticmethod  # noqa: B027 - nothing is what it does
    def _ignore(_argument: int, _lane: int, _size: int, _value: int) -> None:
        """Write a register that takes no writes."""

    @abc.abstractmethod
    def _finished(self, response: bytes) -> None:
        """The command given out has ended; `response` is well formed."""

    @abc.abstractmethod
    def _to_reset_values(self) -> None:
        """Bring the registers to what they hold after a reset."""

    @abc.abstractmethod
    def _saved(self) -> dict[str, Any]:
        """Return the subclass's part of the state."""

    @abc.abstractmethod
    def _restorer(self, state: dict[str, Any]) -> Callable[[], None]:
        """Check the subclass's part of a state; the callable returned takes it over."""


def checked_int(value: Any, low: int, high: int) -> int:
    """Return a number of a saved state; raises ValueError where it is none from low to high."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is not a number from {low} to {high}")
    return value
