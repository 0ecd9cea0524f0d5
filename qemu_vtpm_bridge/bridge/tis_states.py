"""A locality of the TIS device: its states, what leads from one to another, its registers.

Theory of operation.  `TRANSITIONS` holds all pairs of a state and what happens in it that
change something, with where that leads and which method of `TisDevice` does it.  The
diagram in `docs/registers.md` is drawn from it.

Source: TIS 1.3, 5.6; PTP, 6.5.2; the shortcuts are QEMU's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Final

from . import tis_registers as sheet
from .device import checked_int
from .registers import WORD_MASK

INT_WRITABLE: Final = sum(field.mask for field in sheet.INT_ENABLE.fields)
INT_CLEARABLE: Final = sum(field.mask for field in sheet.INT_STATUS.fields)

NO_LOCALITY_YET: Final = 0xFF
_KEPT: Final = sheet.STS.mask("tpmFamily", "selfTestDone")
_DATA: Final = sheet.STS.mask("dataAvail")
_SAVED_FLAGS: Final = sheet.STS.mask(
    "stsValid", "commandReady", "dataAvail", "Expect", "selfTestDone"
)


class State(enum.Enum):
    """What a locality is at."""

    IDLE = "Idle"
    READY = "Ready"
    RECEPTION = "Reception"
    EXECUTION = "Execution"
    COMPLETION = "Completion"


class Input(enum.Enum):
    """What happens to a locality; the first four are the guest's."""

    COMMAND_READY = "commandReady written"
    TPM_GO = "tpmGo written, Expect=0"
    RESPONSE_RETRY = "responseRetry written"
    FIFO_WRITE = "first FIFO write"
    COMPLETED = "command ended"
    ABORTED = "abort done"
    GIVEN_UP = "relinquished"
    DISPLACED = "buffer taken"


@dataclass(frozen=True, slots=True)
class Step:
    """Where an input leads, the method of the device that does it, and what that means."""

    to: State
    action: str
    meaning: str


TRANSITIONS: Final[dict[tuple[State, Input], Step]] = {
    (State.IDLE, Input.COMMAND_READY): Step(
        State.READY, "_show_ready", "commandReady shows, and interrupts"
    ),
    (State.READY, Input.COMMAND_READY): Step(State.READY, "_rewind", "the offset is 0 again"),
    (State.RECEPTION, Input.COMMAND_READY): Step(
        State.RECEPTION, "_abort_own", "the command is thrown away: abort"
    ),
    (State.EXECUTION, Input.COMMAND_READY): Step(
        State.EXECUTION, "_abort_own", "the TPM is told to cancel; abort when it has ended"
    ),
    (State.COMPLETION, Input.COMMAND_READY): Step(
        State.READY, "_leave_response", "the response is thrown away, without a stop at Idle"
    ),
    (State.READY, Input.FIFO_WRITE): Step(
        State.RECEPTION, "_expect", "Expect shows until the command is whole"
    ),
    (State.RECEPTION, Input.TPM_GO): Step(State.EXECUTION, "_run", "the command goes to the TPM"),
    (State.EXECUTION, Input.COMPLETED): Step(
        State.COMPLETION, "_show_response", "dataAvail shows, and interrupts"
    ),
    (State.COMPLETION, Input.RESPONSE_RETRY): Step(
        State.COMPLETION, "_give_again", "the response from its start"
    ),
    (State.RECEPTION, Input.ABORTED): Step(
        State.READY, "_show_ready", "commandReady shows, and interrupts"
    ),
    (State.COMPLETION, Input.ABORTED): Step(
        State.READY, "_show_ready", "commandReady shows, and interrupts"
    ),
    (State.EXECUTION, Input.ABORTED): Step(
        State.READY, "_show_ready", "only with QEMU's orphans, of which one took this command's end"
    ),
    (State.EXECUTION, Input.GIVEN_UP): Step(
        State.IDLE, "_orphan", "the TPM is told to cancel; its answer is dropped"
    ),
    (State.COMPLETION, Input.DISPLACED): Step(
        State.COMPLETION, "_lose_response", "another locality writes over it: nothing is left"
    ),
}

STS_INPUTS: Final = {
    sheet.STS.mask("commandReady"): Input.COMMAND_READY,
    sheet.STS.mask("tpmGo"): Input.TPM_GO,
    sheet.STS.mask("responseRetry"): Input.RESPONSE_RETRY,
}
"""What a write to STS asks for; two of them at once ask for nothing."""


class Locality:
    """Registers and state of one locality."""

    __slots__ = (
        "been_seized",
        "int_enable",
        "int_status",
        "number",
        "seizing",
        "state",
        "sts",
        "wants",
    )

    def __init__(self, number: int, sts: int) -> None:
        self.number = number
        self.state = State.IDLE
        self.sts = sts
        self.wants = False
        """requestUse is set."""
        self.seizing = False
        """A seize waits for the running command."""
        self.been_seized = False
        self.int_enable = sheet.INT_ENABLE.reset
        self.int_status = sheet.INT_STATUS.reset

    def show(self, flags: int) -> None:
        """Set the flags of STS; only family and selfTestDone outlive that."""
        self.sts = self.sts & _KEPT | flags

    def saved(self) -> dict[str, Any]:
        """Return registers and state for `TisDevice.save`; no seize waits while no command runs."""
        return {
            "state": self.state.name,
            "sts": self.sts,
            "wants": self.wants,
            "been_seized": self.been_seized,
            "int_enable": self.int_enable,
            "int_status": self.int_status,
        }

    @classmethod
    def restored(cls, number: int, saved: dict[str, Any], family_bits: int) -> Locality:
        """Return the locality that was saved; ValueError or KeyError where it is none."""
        own = cls(number, 0)
        own.state = State[saved["state"]]
        if own.state is State.EXECUTION:
            raise ValueError("a command runs in it")
        own.sts = checked_int(saved["sts"], 0, WORD_MASK) & _SAVED_FLAGS | family_bits
        own.wants = bool(saved["wants"])
        own.been_seized = bool(saved["been_seized"])
        own.int_enable = checked_int(saved["int_enable"], 0, WORD_MASK) & INT_WRITABLE
        own.int_status = checked_int(saved["int_status"], 0, WORD_MASK) & INT_CLEARABLE
        return own


@dataclass(frozen=True, slots=True)
class SavedTis:
    """A saved device's state, checked."""

    active: int | None
    offset: int
    response_of: int | None
    last_locality: int
    interface_id: int
    localities: list[Locality]

    @classmethod
    def checked(cls, state: dict[str, Any], family_bits: int, *, shared_response: bool) -> SavedTis:
        """Return what `TisDevice.save` wrote, where it agrees with itself.

        `shared_response` allows dataAvail where the buffer holds another one's response.
        Raises ValueError, KeyError or TypeError for what no device saved.
        """
        localities = [
            Locality.restored(number, entry, family_bits)
            for number, entry in enumerate(state["localities"])
        ]
        if len(localities) != sheet.LOCALITIES:
            raise ValueError(f"it has {len(localities)} localities")
        saved = cls(
            _locality_or_none(state["active"]),
            checked_int(state["offset"], 0, sheet.BUFFER_MAX_BYTES),
            _locality_or_none(state["response_of"]),
            checked_int(state["last_locality"], 0, NO_LOCALITY_YET),
            checked_int(state["interface_id"], 0, WORD_MASK),
            localities,
        )
        for each in localities:
            holds = each.number == saved.response_of
            if holds and each.state is not State.COMPLETION:
                raise ValueError("it has a response of a locality that ran no command")
            if each.sts & _DATA and not holds and not shared_response:
                raise ValueError("it does not say whose response the buffer holds")
        return saved


def _locality_or_none(found: Any) -> int | None:
    return None if found is None else checked_int(found, 0, sheet.LOCALITIES - 1)
