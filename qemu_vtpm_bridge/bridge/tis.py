"""The TIS (FIFO) device: five localities, one buffer, one command at a time.

Purpose: be what a guest's driver finds in QEMU's tpm-tis.  `tis_registers.py` is the data
sheet, `device.py` the access path; here is what the registers do.

Theory of operation.  Each locality has a `State` of its own; buffer, offset and the TPM
are shared.  `TRANSITIONS`, in `tis_states.py`, says what takes a locality from state to
state: what it writes to STS and the FIFO, and what happens to its command.  A pair that the
table does not hold changes nothing when the guest caused it, and raises when the device
itself did.

Ownership is apart from that.  ACCESS says who is active; to hand over, the device aborts:
`_prepare_abort` notes who leaves and who comes, and tells the TPM to cancel if a command
runs.  The hand-over then happens when the command has ended, and the old owner, still
active until then, sees Execution.  An owner that aborts for itself comes to Ready.

Offset and buffer stay as they are over most changes of owner, as in QEMU: a locality
that was in Reception still is when it is active again, with the offset at 0, or at
where another locality left it.

Promises: P1 and P5 for a guest at register level, P11.  Deviations are those of `Quirk`:
short commands, orphans, responses left in a buffer that another locality writes, the
locality of ResetEstablishment, line and buffer at a reset.  Who may lie: the guest with
every access, the TPM with its answers.

Source: TIS 1.3, 5.6; PTP, 6.5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final

from . import tis_registers as sheet
from .device import (
    SIZE_MASK,
    CancelCommand,
    Quirk,
    Read,
    RegisterDevice,
    ResetEstablishment,
    Write,
    short_command_answer,
)
from .tis_states import (
    INT_CLEARABLE,
    INT_WRITABLE,
    NO_LOCALITY_YET,
    STS_INPUTS,
    TRANSITIONS,
    Input,
    Locality,
    SavedTis,
    State,
)
from .tpm import HEADER, HEADER_SIZE, TPM_RC_SUCCESS, Family, Refusal, refusal

_ACTIVE: Final = sheet.ACCESS.mask("activeLocality")
_BEEN_SEIZED: Final = sheet.ACCESS.mask("beenSeized")
_SEIZE: Final = sheet.ACCESS.mask("Seize")
_PENDING: Final = sheet.ACCESS.mask("pendingRequest")
_REQUEST_USE: Final = sheet.ACCESS.mask("requestUse")
_NOT_ESTABLISHED: Final = sheet.ACCESS.mask("tpmEstablishment")
_REG_VALID: Final = sheet.ACCESS.mask("tpmRegValidSts")

_FAMILY: Final = sheet.STS.mask("tpmFamily")
_RESET_ESTABLISHMENT: Final = sheet.STS.mask("resetEstablishmentBit")
_CANCEL: Final = sheet.STS.mask("commandCancel")
_BURST_SHIFT: Final = sheet.STS.field("burstCount").low
_VALID: Final = sheet.STS.mask("stsValid")
_READY_BIT: Final = sheet.STS.mask("commandReady")
_GO_BIT: Final = sheet.STS.mask("tpmGo")
_DATA: Final = sheet.STS.mask("dataAvail")
_EXPECT: Final = sheet.STS.mask("Expect")
_SELF_TEST: Final = sheet.STS.mask("selfTestDone")
_RETRY_BIT: Final = sheet.STS.mask("responseRetry")

_INT_GLOBAL: Final = sheet.INT_ENABLE.mask("globalIntEnable")
_INT_READY: Final = sheet.INT_STATUS.mask("commandReady")
_INT_LOCALITY: Final = sheet.INT_STATUS.mask("localityChange")
_INT_VALID: Final = sheet.INT_STATUS.mask("stsValid")
_INT_DATA: Final = sheet.INT_STATUS.mask("dataAvail")

_SELECTION_LOCK: Final = sheet.INTERFACE_ID.mask("IntfSelLock")

_SIZE_END: Final = 6
"""Bytes of a command until its size is known."""
_CONTINUE_SELF_TEST: Final = 0x53
_HIGHEST_FOR_ESTABLISHMENT: Final = (3, 4)
_WRITABLE_LOCALITIES: Final = 4


_READY, _RECEPTION, _COMPLETION = State.READY, State.RECEPTION, State.COMPLETION


class TisDevice(RegisterDevice):
    """The device; see `RegisterDevice` for its interface."""

    name: ClassVar[str] = "tis"
    span_bytes: ClassVar[int] = sheet.TIS.page_bytes * sheet.LOCALITIES
    buffer_max_bytes: ClassVar[int] = sheet.BUFFER_MAX_BYTES

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
        self._last_locality = NO_LOCALITY_YET
        self._to_reset_values()
        self._steps = {
            key: (step.to, getattr(self, step.action)) for key, step in TRANSITIONS.items()
        }
        self._build_tables()

    def _to_reset_values(self) -> None:
        two = self.family is Family.TPM_2_0
        sts = sheet.STS.reset if two else 0
        self._interface_id = sheet.INTERFACE_ID.reset if two else sheet.INTERFACE_ID_1_2
        self._localities = [Locality(number, sts) for number in range(sheet.LOCALITIES)]
        self._active: int | None = None
        self._aborting: int | None = None
        """Who owned the TPM when the abort was noted."""
        self._next: int | None = None
        """Who owns it when the running command has ended."""
        self._offset = 0
        self._executing = 0
        """Whose command was given out last."""
        self._runs_self_test = False
        self._orphaned = False
        """The command given out belongs to nobody any more."""
        self._held: bytes | None = None
        """A command of `_executing` that waits for an orphan's end."""
        self._response_of: int | None = None
        """Whose response the buffer holds."""

    def _build_tables(self) -> None:
        two = self.family is Family.TPM_2_0
        reads: dict[str, Read] = {
            "ACCESS": self._read_access,
            "INT_ENABLE": self._read_int_enable,
            "INT_STATUS": self._read_int_status,
            "STS": self._read_sts,
            "DATA_FIFO": self._read_fifo,
            "XDATA_FIFO": self._read_fifo,
            "INTERFACE_ID": self._read_interface_id,
        }
        writes: dict[str, Write] = {
            "ACCESS": self._write_access,
            "INT_ENABLE": self._write_int_enable,
            "INT_STATUS": self._write_int_status,
            "STS": self._write_sts,
            "DATA_FIFO": self._write_fifo,
            "XDATA_FIFO": self._write_fifo,
            "INTERFACE_ID": self._write_interface_id,
        }
        constants = {
            register.name: register.reset for register in sheet.TIS if register.name not in reads
        }
        if not two:
            constants["INTF_CAPABILITY"] = sheet.INTF_CAPABILITY_1_2
        unclaimed = (self._constant, sheet.TIS.unclaimed)
        ignored = (self._ignore, 0)
        for locality in range(sheet.LOCALITIES):
            known: dict[str, tuple[Read, int]] = {
                name: (self._constant, value) for name, value in constants.items()
            }
            known |= {name: (handler, locality) for name, handler in reads.items()}
            taken: dict[str, tuple[Write, int]] = {}
            if locality < _WRITABLE_LOCALITIES:
                taken = {name: (handler, locality) for name, handler in writes.items()}
            self._reads += sheet.TIS.page(known, unclaimed)
            self._writes += sheet.TIS.page(taken, ignored)

    @staticmethod
    def is_data(offset: int) -> bool:
        """Whether the byte at an offset is a command's or a response's, not a register's."""
        _locality, register = sheet.TIS.find(offset)
        return register in (sheet.DATA_FIFO, sheet.XDATA_FIFO)

    # ACCESS: who owns the TPM.

    def _read_access(self, locality: int, lane: int, size: int) -> int:
        if lane:
            return 0
        own = self._localities[locality]
        value = _REG_VALID
        if self._active == locality:
            value |= _ACTIVE
        if own.been_seized:
            value |= _BEEN_SEIZED
        if own.wants:
            value |= _REQUEST_USE
        for other in self._localities:
            if other.wants and other is not own:
                value |= _PENDING
                break
        if not self.established:
            value |= _NOT_ESTABLISHED
        return value

    def _write_access(self, locality: int, lane: int, _size: int, value: int) -> None:
        """Do what the bits ask for, in QEMU's order; a seize drowns two of the others."""
        value <<= 8 * lane
        own = self._localities[locality]
        if value & _SEIZE:
            value &= ~(_REQUEST_USE | _ACTIVE)
        owner, handed_over = self._active, False
        if value & _ACTIVE:
            if owner != locality:
                own.wants = False
            elif (successor := self._highest_waiting()) is not None:
                self._prepare_abort(locality, successor)
                handed_over = True
            else:
                owner = None
        if value & _BEEN_SEIZED:
            own.been_seized = False
        if value & _SEIZE and self._may_seize(own):
            for lower in self._localities[:locality]:
                lower.seizing = False
            own.seizing = True
            self._prepare_abort(self._active, locality)
            handed_over = True
        if value & _REQUEST_USE and self._active != locality:
            if self._active is None:
                owner = locality
            else:
                own.wants = True
        if handed_over:
            return
        if owner is None and self._active == locality:
            self._relinquish(own)
        else:
            self._make_active(owner)

    def _highest_waiting(self) -> int | None:
        return next((each.number for each in reversed(self._localities) if each.wants), None)

    def _may_seize(self, own: Locality) -> bool:
        """Only from nobody or from a lower locality, and not under a higher one's seize."""
        if self._active is not None and self._active >= own.number:
            return False
        return not any(each.seizing for each in self._localities[own.number :])

    def _relinquish(self, own: Locality) -> None:
        """Leave the TPM with nobody, or with who waited for the end of an orphan."""
        orphan = own.state is State.EXECUTION and Quirk.ORPHANS not in self._quirks
        if orphan:
            self._take(own, Input.GIVEN_UP)
        self._make_active(None)
        if not orphan or self._next is None:
            return
        if self._next == own.number:
            self._aborting = self._next = None
        else:
            self._abort()

    def _make_active(self, new: int | None) -> None:
        changed = new != self._active
        successor = None if new is None else self._localities[new]
        if changed and self._active is not None:
            old = self._localities[self._active]
            if successor is not None and successor.seizing:
                old.been_seized = True
            else:
                old.wants = False
        self._active = new
        if successor is not None:
            successor.wants = successor.seizing = False
            if changed:
                self._raise_irq(successor, _INT_LOCALITY)

    # Aborts.

    def _prepare_abort(self, old: int | None, new: int) -> None:
        """Hand over from `old` to `new`: now, or when the running command has ended."""
        self._aborting, self._next = old, new
        for each in self._localities:
            if each.state is State.EXECUTION:
                self._cancel(each)
                return
        self._abort()

    def _abort(self) -> None:
        aborting, new = self._aborting, self._next
        self._aborting = self._next = None
        self._offset = 0
        if aborting is not None and aborting == new:
            self._take(self._localities[aborting], Input.ABORTED)
        self._make_active(new)

    def _cancel(self, own: Locality) -> None:
        """Have the command of a locality in Execution end soon."""
        if self._held is None:
            self._outputs.append(CancelCommand())
            return
        # It never went out: it waits for an orphan's end, so the answer is made here.
        self._held = None
        self._answer(refusal(self.family, Refusal.CANCELLED))

    # Interrupts.

    def _raise_irq(self, own: Locality, events: int) -> None:
        if own.int_enable & _INT_GLOBAL and own.int_enable & events:
            own.int_status |= events
            self._set_irq(True)

    def _read_int_enable(self, locality: int, lane: int, size: int) -> int:
        return self._localities[locality].int_enable >> 8 * lane & SIZE_MASK[size]

    def _write_int_enable(self, locality: int, lane: int, size: int, value: int) -> None:
        if self._active == locality:
            own = self._localities[locality]
            others = own.int_enable & ~(SIZE_MASK[size] << 8 * lane)
            own.int_enable = others | value << 8 * lane & INT_WRITABLE

    def _read_int_status(self, locality: int, lane: int, size: int) -> int:
        return self._localities[locality].int_status >> 8 * lane & SIZE_MASK[size]

    def _write_int_status(self, locality: int, lane: int, _size: int, value: int) -> None:
        if self._active != locality:
            return
        own = self._localities[locality]
        cleared = value << 8 * lane & INT_CLEARABLE
        if cleared and own.int_status:
            own.int_status &= ~cleared
            if not own.int_status:
                self._set_irq(False)

    # STS.

    def _read_sts(self, locality: int, lane: int, size: int) -> int:
        if self._active != locality:
            return SIZE_MASK[size]
        sts = self._localities[locality].sts
        if sts & _DATA:
            burst = self._response_end() - self._offset
        else:
            burst = self._capacity - self._offset
            # A byte of the count must not read 0 when there is room.
            if size == 1 and burst > 0xFF:
                burst = 0xFF
        return ((burst & 0xFFFF) << _BURST_SHIFT | sts) >> 8 * lane & SIZE_MASK[size]

    def _write_sts(self, locality: int, lane: int, _size: int, value: int) -> None:
        if self._active != locality:
            return
        value <<= 8 * lane
        own = self._localities[locality]
        if value & (_CANCEL | _RESET_ESTABLISHMENT) and self.family is Family.TPM_2_0:
            if value & _CANCEL and own.state is State.EXECUTION:
                self._cancel(own)
            if value & _RESET_ESTABLISHMENT and locality in _HIGHEST_FOR_ESTABLISHMENT:
                self._reset_establishment(locality)
        asked = STS_INPUTS.get(value & (_READY_BIT | _GO_BIT | _RETRY_BIT))
        if asked is None or (asked is Input.TPM_GO and own.sts & _EXPECT):
            return
        if (own.state, asked) in TRANSITIONS:
            self._take(own, asked)

    def _reset_establishment(self, locality: int) -> None:
        if Quirk.STALE_ESTABLISHMENT in self._quirks:
            locality = self._last_locality
        self._outputs.append(ResetEstablishment(locality))
        if locality in _HIGHEST_FOR_ESTABLISHMENT:
            self.established = False

    def _take(self, own: Locality, happened: Input) -> None:
        """Go where the table says; KeyError for a pair that it does not hold."""
        own.state, action = self._steps[own.state, happened]
        action(own)

    # What the table's actions do.

    def _rewind(self, _own: Locality) -> None:
        self._offset = 0

    def _show_ready(self, own: Locality) -> None:
        own.show(_READY_BIT)
        if self._response_of == own.number:
            self._response_of = None
        self._raise_irq(own, _INT_READY)

    def _leave_response(self, own: Locality) -> None:
        self._offset = 0
        self._show_ready(own)

    def _abort_own(self, own: Locality) -> None:
        self._prepare_abort(own.number, own.number)

    def _expect(self, own: Locality) -> None:
        own.show(_EXPECT | _VALID)

    def _run(self, own: Locality) -> None:
        command = bytes(self._buffer[: self._offset])
        self._executing = own.number
        if self._is_short(command):
            self._answer(short_command_answer(self.family))
        elif not self._busy:
            self._start(command)
        elif Quirk.ORPHANS not in self._quirks:
            self._held = command

    def _start(self, command: bytes) -> None:
        self._last_locality = self._executing
        self._runs_self_test = (
            len(command) >= HEADER_SIZE and HEADER.unpack_from(command)[2] == _CONTINUE_SELF_TEST
        )
        self._submit(self._executing, command)

    def _orphan(self, own: Locality) -> None:
        own.show(0)
        self._offset = 0
        if self._held is not None:
            self._held = None
        else:
            self._orphaned = True
            self._outputs.append(CancelCommand())

    def _lose_response(self, own: Locality) -> None:
        own.show(_VALID)
        self._response_of = None

    def _give_again(self, own: Locality) -> None:
        self._offset = 0
        if self._response_of == own.number or Quirk.SHARED_RESPONSE in self._quirks:
            own.show(_VALID | _DATA)

    def _show_response(self, own: Locality) -> None:
        own.show(_VALID | _DATA)
        self._offset = 0
        self._response_of = own.number

    # The end of a command.

    def _finished(self, response: bytes) -> None:
        if not self._orphaned:
            self._answer(response, self_test=self._runs_self_test)
            return
        self._orphaned = False
        if self._held is not None:
            command, self._held = self._held, None
            self._start(command)

    def _answer(self, response: bytes, *, self_test: bool = False) -> None:
        """Give the executing locality its response; then the abort that waited for it happens."""
        own = self._localities[self._executing]
        self._buffer[: len(response)] = response
        if self_test and HEADER.unpack_from(response)[2] == TPM_RC_SUCCESS:
            for each in self._localities:
                each.sts |= _SELF_TEST
        self._take(own, Input.COMPLETED)
        if self._next is not None:
            self._abort()
        self._raise_irq(own, _INT_DATA | _INT_VALID)

    # The FIFO.

    def _response_end(self) -> int:
        """Return where the response in the buffer ends, as its header says."""
        return min(int.from_bytes(self._buffer[2:6], "big"), self._capacity)

    def _read_fifo(self, locality: int, _lane: int, size: int) -> int:
        ones = SIZE_MASK[size]
        if self._active != locality:
            return ones
        own = self._localities[locality]
        if own.state is not _COMPLETION or not own.sts & _DATA:
            return ones
        offset = self._offset
        end = self._response_end()
        # At or behind the end (QEMU's shared buffer only) one more byte is given.
        new_offset = min(offset + size, max(end, offset + 1))
        given = self._buffer[offset:new_offset]
        self._offset = new_offset
        if new_offset >= end:
            own.show(_VALID)
            self._raise_irq(own, _INT_VALID)
        return int.from_bytes(given, "little") | ones << 8 * len(given) & ones

    def _write_fifo(self, locality: int, _lane: int, size: int, value: int) -> None:
        if self._active != locality:
            return
        own = self._localities[locality]
        if own.state is not _RECEPTION:
            if own.state is not _READY:
                return
            self._take(own, Input.FIFO_WRITE)
        if not own.sts & _EXPECT:
            return
        if self._response_of is not None and Quirk.SHARED_RESPONSE not in self._quirks:
            self._take(self._localities[self._response_of], Input.DISPLACED)
        buffer, offset = self._buffer, self._offset
        end = offset + size
        if end > self._capacity:
            if offset < self._capacity:
                room = self._capacity - offset
                buffer[offset : self._capacity] = value.to_bytes(size, "little")[:room]
                self._offset = self._capacity
            own.show(_VALID)
            return
        buffer[offset:end] = value.to_bytes(size, "little")
        self._offset = end
        if end >= _SIZE_END and buffer[4] << 8 | buffer[5] <= end:
            own.show(_VALID)

    # INTERFACE_ID.

    def _read_interface_id(self, _locality: int, lane: int, size: int) -> int:
        return self._interface_id >> 8 * lane & SIZE_MASK[size]

    def _write_interface_id(self, _locality: int, lane: int, _size: int, value: int) -> None:
        self._interface_id |= value << 8 * lane & _SELECTION_LOCK

    # Save and restore.

    def _saved(self) -> dict[str, Any]:
        return {
            "active": self._active,
            "offset": self._offset,
            "response_of": self._response_of,
            "last_locality": self._last_locality,
            "interface_id": self._interface_id,
            "localities": [each.saved() for each in self._localities],
        }

    def _restorer(self, state: dict[str, Any]) -> Callable[[], None]:
        saved = SavedTis.checked(
            state,
            self._localities[0].sts & _FAMILY,
            shared_response=Quirk.SHARED_RESPONSE in self._quirks,
        )

        def take_over() -> None:
            self._to_reset_values()
            self._active, self._offset = saved.active, saved.offset
            self._response_of, self._localities = saved.response_of, saved.localities
            self._last_locality, self._interface_id = saved.last_locality, saved.interface_id
            self._set_irq(
                any(each.int_enable & _INT_GLOBAL and each.int_status for each in saved.localities)
            )

        return take_over
