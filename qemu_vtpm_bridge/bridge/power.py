"""What CMD_INIT means for a TPM that cannot be switched off: the reset contract.

QEMU says CMD_STOP and CMD_INIT when it starts and at every reset of the guest.
A TPM that kept its PCRs over that would let a guest present the measurements of
an earlier boot, so no command of the new boot may reach it before it has shown
that it was power-cycled (P7).  tpmif has no word for a power cycle; the evidence
is the TPM's own answer: it wants Startup, or, where the vTPM domain starts it,
PCRs 0 to 15 have their reset values.

Theory of operation.  The machine below is fed with what QEMU, the connection and
the TPM said, and orders what happens to QEMU's data channel: held, refused or
forwarded.  Held never lasts: the driver arms a deadline, and without evidence
the machine fails closed until the next INIT.  A vTPM domain that lies about its
evidence harms the guest whose TPM it is, which it could do anyway.

No input or output happens here.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from ..errors import LocalProtocolError
from .tpm import (
    HEADER_SIZE,
    WANTS_STARTUP,
    Family,
    Header,
    response_family,
)


class ResetPolicy(enum.Enum):
    """How to get a TPM power-cycled that gives no evidence by itself."""

    VERIFIED = "verified"
    """Ask the vTPM domain through its reset extension."""
    RESTART_DOMAIN = "restart-domain"
    """Run a command that recreates the vTPM domain, and wait for the new one."""
    KEEP = "keep"
    """Go on without evidence, loudly."""


class State(enum.Enum):
    """What QEMU may expect of its TPM."""

    OFF = enum.auto()
    """Not initialised, or stopped: commands are refused."""
    WAIT_RING = enum.auto()
    """Initialised by QEMU; the vTPM domain is not connected yet."""
    EVIDENCE = enum.auto()
    """The TPM has been asked whether it was power-cycled."""
    CYCLING = enum.auto()
    """It was not; the policy's way of getting it cycled is under way."""
    EVIDENCE_AGAIN = enum.auto()
    """The TPM has been asked again, for the last time."""
    ON = enum.auto()
    """Commands flow."""
    FAILED = enum.auto()
    """No evidence: commands are refused until the next INIT."""


class Fact(enum.Enum):
    """What happened."""

    INIT_ASKED = enum.auto()
    INIT_RESUME_ASKED = enum.auto()
    """INIT after a restored snapshot of the guest, whose TPM ran on meanwhile."""
    STOP_ASKED = enum.auto()
    RING_UP = enum.auto()
    RING_DOWN = enum.auto()
    EVIDENCE_CLEAN = enum.auto()
    EVIDENCE_USED = enum.auto()
    """The TPM is started, and its PCRs are not at their reset values."""
    EVIDENCE_FAILED = enum.auto()
    """The TPM gave no answer that means anything, or is of the other family."""
    CYCLED = enum.auto()
    """The policy's way went through, and the vTPM domain is connected again."""
    CYCLE_REFUSED = enum.auto()
    DEADLINE = enum.auto()


class Action(enum.Enum):
    """What the driver is to do."""

    REFUSE = enum.auto()
    """Answer QEMU's commands with the family's failure."""
    HOLD = enum.auto()
    """Leave QEMU's commands in its socket, until the deadline that this arms."""
    FORWARD = enum.auto()
    ASK_EVIDENCE = enum.auto()
    CYCLE = enum.auto()
    """Do what the policy says."""
    WARN_KEPT = enum.auto()
    REPORT_FAILED = enum.auto()


Transition = tuple[State, tuple[Action, ...]]

_FAIL: Final = (State.FAILED, (Action.REFUSE, Action.REPORT_FAILED))

_COMMON: dict[tuple[State, Fact], Transition] = {
    (State.WAIT_RING, Fact.RING_UP): (State.EVIDENCE, (Action.ASK_EVIDENCE,)),
    (State.WAIT_RING, Fact.DEADLINE): _FAIL,
    (State.EVIDENCE, Fact.EVIDENCE_CLEAN): (State.ON, (Action.FORWARD,)),
    (State.EVIDENCE, Fact.EVIDENCE_FAILED): _FAIL,
    (State.EVIDENCE, Fact.RING_DOWN): (State.WAIT_RING, ()),
    (State.EVIDENCE, Fact.DEADLINE): _FAIL,
    (State.CYCLING, Fact.CYCLED): (State.EVIDENCE_AGAIN, (Action.ASK_EVIDENCE,)),
    (State.CYCLING, Fact.CYCLE_REFUSED): _FAIL,
    (State.CYCLING, Fact.DEADLINE): _FAIL,
    (State.EVIDENCE_AGAIN, Fact.EVIDENCE_CLEAN): (State.ON, (Action.FORWARD,)),
    (State.EVIDENCE_AGAIN, Fact.EVIDENCE_USED): _FAIL,
    (State.EVIDENCE_AGAIN, Fact.EVIDENCE_FAILED): _FAIL,
    (State.EVIDENCE_AGAIN, Fact.RING_DOWN): (State.WAIT_RING, ()),
    (State.EVIDENCE_AGAIN, Fact.DEADLINE): _FAIL,
}
for _state in State:
    _COMMON[_state, Fact.INIT_ASKED] = (State.WAIT_RING, (Action.HOLD,))
    _COMMON[_state, Fact.INIT_RESUME_ASKED] = (State.ON, (Action.FORWARD,))
    _COMMON[_state, Fact.STOP_ASKED] = (State.OFF, (Action.REFUSE,))

_USED: dict[ResetPolicy, Transition] = {
    ResetPolicy.VERIFIED: (State.CYCLING, (Action.CYCLE,)),
    ResetPolicy.RESTART_DOMAIN: (State.CYCLING, (Action.CYCLE,)),
    ResetPolicy.KEEP: (State.ON, (Action.WARN_KEPT, Action.FORWARD)),
}

TRANSITIONS: dict[ResetPolicy, dict[tuple[State, Fact], Transition]] = {
    policy: {**_COMMON, (State.EVIDENCE, Fact.EVIDENCE_USED): used}
    for policy, used in _USED.items()
}
"""policy -> (state, fact) -> (next state, actions)."""

_RING = frozenset({Fact.RING_UP, Fact.RING_DOWN})
_LATE = frozenset(
    {
        Fact.EVIDENCE_CLEAN,
        Fact.EVIDENCE_USED,
        Fact.EVIDENCE_FAILED,
        Fact.CYCLED,
        Fact.CYCLE_REFUSED,
    }
)

IGNORED: dict[State, frozenset[Fact]] = {
    State.OFF: _RING | _LATE,
    State.WAIT_RING: _RING | _LATE,
    State.EVIDENCE: _RING | {Fact.CYCLED, Fact.CYCLE_REFUSED},
    # The connection goes down and comes back: that is what cycling looks like.
    State.CYCLING: _RING | _LATE,
    State.EVIDENCE_AGAIN: _RING | {Fact.CYCLED, Fact.CYCLE_REFUSED},
    State.ON: _RING | _LATE,
    State.FAILED: _RING | _LATE,
}
"""Facts that change nothing: late words about an INIT that another one replaced."""


class PowerMachine:
    """The reset contract of one guest."""

    def __init__(self, policy: ResetPolicy) -> None:
        self.policy = policy
        self.state = State.OFF

    def feed(self, fact: Fact) -> tuple[Action, ...]:
        """Take a fact in, return the actions it calls for.

        Raises LocalProtocolError, and changes nothing, for a fact that cannot
        happen in the present state.
        """
        transition = TRANSITIONS[self.policy].get((self.state, fact))
        if transition is None:
            if fact in IGNORED[self.state]:
                return ()
            raise LocalProtocolError(f"no use for {fact.name} in power state {self.state.name}")
        self.state, actions = transition
        return actions


PCRS_MEASURED: Final = range(16)
"""PCRs that start at zero and that no locality resets (PC Client Platform TPM Profile)."""

HASH_BANKS: Final = {0x0004: 20, 0x000B: 32, 0x000C: 48, 0x000D: 64}
"""TPM_ALG_SHA1, SHA256, SHA384, SHA512 and the bytes of their digests."""


class Evidence(enum.Enum):
    """What a response to the evidence command says."""

    CLEAN = enum.auto()
    STARTED = enum.auto()
    OTHER_FAMILY = enum.auto()
    UNREADABLE = enum.auto()


def judge_evidence(family: Family, response: bytes) -> Evidence:
    """Return what the TPM's answer to `tpm.evidence_command(family)` means."""
    if len(response) < HEADER_SIZE:
        return Evidence.UNREADABLE
    header = Header.parse(response)
    if response_family(response) is not family:
        return Evidence.OTHER_FAMILY
    if header.code == WANTS_STARTUP[family]:
        return Evidence.CLEAN
    return Evidence.STARTED if header.code == 0 else Evidence.UNREADABLE


def pcr_values(family: Family, response: bytes) -> list[bytes] | None:
    """Return the digests in the answer to a PCR read, None where it is no such answer.

    TPM 2.0 answers with an empty list for a bank that is not allocated.
    """
    if len(response) < HEADER_SIZE or Header.parse(response).code != 0:
        return None
    body = response[HEADER_SIZE:]
    if family is Family.TPM_1_2:
        return [body] if len(body) == 20 else None
    try:
        # pcrUpdateCounter, TPML_PCR_SELECTION, TPML_DIGEST.
        _, selections = struct.unpack_from(">II", body)
        offset = 8
        if selections > len(HASH_BANKS):
            return None
        for _ in range(selections):
            offset += 3 + struct.unpack_from(">HB", body, offset)[1]
        (count,) = struct.unpack_from(">I", body, offset)
        offset += 4
        digests = []
        for _ in range(min(count, 8)):
            (size,) = struct.unpack_from(">H", body, offset)
            digests.append(body[offset + 2 : offset + 2 + size])
            offset += 2 + size
    except struct.error:
        return None
    return digests
