"""What the vTPM domain must know of TPM commands: which change the TPM, and a few of its own.

Purpose: two things are decided by a command's ordinal.  The pump asks which
commands may run while the snapshot of the TPM's volatile state on disk is
current (`snapshot.py`), and the engine sends a handful of commands itself:
Startup and Shutdown round a power cycle, and the marks that it leaves in the
PCRs when volatile state was lost.  Nothing here does input or output.

A command is READ_ONLY here only if running it twice, or running it and then
going back to the snapshot, shows nothing and changes nothing.  The lists are
therefore short: what is not named counts as changing the TPM.  In particular

- GetRandom is not read-only: a random generator that went back to a snapshot
  would give out the same numbers again, and use them for nonces and keys.
- NV_Read, Quote, Certify and all that take an authorisation are not: a wrong
  authorisation counts towards dictionary attack lockout.
- ContextSave is not: it takes a number from a counter.

Sources: TPM 2.0 Library, Part 2, 6.5.2 (TPM_CC) and Part 3; TPM 1.2 Main, Part 2, 17.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

HEADER: Final = struct.Struct(">HII")
"""tag, size in bytes, ordinal (command) or response code (response)."""

TPM_ST_NO_SESSIONS: Final = 0x8001
TPM_ST_SESSIONS: Final = 0x8002
TPM_TAG_RQU_COMMAND: Final = 0x00C1
TPM_TAG_RSP_COMMAND: Final = 0x00C4

TPM_RC_SUCCESS: Final = 0
TPM_CC_SHUTDOWN: Final = 0x145

_TPM_CC_PCR_EVENT: Final = 0x13C
_TPM_CC_STARTUP: Final = 0x144
_TPM_ORD_EXTEND: Final = 0x14
_TPM_ORD_STARTUP: Final = 0x99
_TPM_RS_PW: Final = 0x40000009

PCRS_OF_BOOT: Final = range(16)
"""The PCRs that only a power cycle resets; 16 and 23 a guest may reset itself, and
17 to 22 start as all ones and cannot be brought to a measured value by a guest."""

LOST_STATE_MARK: Final = b"qemu-vtpm-bridge: volatile state lost"
"""What is measured into each PCR of `PCRS_OF_BOOT` when volatile state was lost."""


class TpmFamily(enum.Enum):
    """The two kinds of TPM; the value is how the configuration spells it."""

    TPM_1_2 = "1.2"
    TPM_2_0 = "2.0"


READ_ONLY: Final[dict[TpmFamily, frozenset[int]]] = {
    TpmFamily.TPM_2_0: frozenset(
        {
            0x169,  # NV_ReadPublic
            0x173,  # ReadPublic
            0x178,  # ECC_Parameters
            0x17A,  # GetCapability
            0x17C,  # GetTestResult
            0x17E,  # PCR_Read
            0x181,  # ReadClock
            0x18A,  # TestParms
        }
    ),
    TpmFamily.TPM_1_2: frozenset(
        {
            0x15,  # PcrRead
            0x54,  # GetTestResult
            0x65,  # GetCapability
            0xF1,  # GetTicks
        }
    ),
}
"""Ordinals that leave the TPM as a snapshot shows it."""


COMMAND_TAGS: Final = (0x8001, 0x8002, 0x00C1, 0x00C2, 0x00C3)
"""Tags of commands that may reach the TPM: both families', for a TPM answers the other's
commands with its own error, which is how guests find out what they have."""


def _password_session() -> bytes:
    """Return an authorisation area with one empty password."""
    session = struct.pack(">IHBH", _TPM_RS_PW, 0, 0, 0)
    return struct.pack(">I", len(session)) + session


def _command(tag: int, ordinal: int, body: bytes) -> bytes:
    return HEADER.pack(tag, HEADER.size + len(body), ordinal) + body


class Complaint(enum.Enum):
    """Why a command is answered here; the values are the codes for TPM 2.0 and 1.2."""

    FAILURE = (0x101, 9)  # TPM_RC_FAILURE, TPM_FAIL
    BAD_SIZE = (0x142, 25)  # TPM_RC_COMMAND_SIZE, TPM_BAD_PARAM_SIZE
    BAD_TAG = (0x01E, 30)  # TPM_RC_BAD_TAG, TPM_BADTAG
    BAD_LOCALITY = (0x907, 61)  # TPM_RC_LOCALITY, TPM_BAD_LOCALITY


def error_header(family: TpmFamily, complaint: Complaint) -> bytes:
    """Return the ten bytes of a response that is only an error."""
    code_2_0, code_1_2 = complaint.value
    if family is TpmFamily.TPM_2_0:
        return HEADER.pack(TPM_ST_NO_SESSIONS, HEADER.size, code_2_0)
    return HEADER.pack(TPM_TAG_RSP_COMMAND, HEADER.size, code_1_2)


def startup_command(family: TpmFamily) -> bytes:
    """Return Startup(CLEAR)."""
    if family is TpmFamily.TPM_2_0:
        return _command(TPM_ST_NO_SESSIONS, _TPM_CC_STARTUP, b"\x00\x00")
    return _command(TPM_TAG_RQU_COMMAND, _TPM_ORD_STARTUP, b"\x00\x01")


def probe_command(family: TpmFamily) -> bytes:
    """Return a command that changes nothing and needs a started TPM.

    TPM2_GetCapability of one property, TPM_PcrRead(0).
    """
    if family is TpmFamily.TPM_2_0:
        return _command(TPM_ST_NO_SESSIONS, 0x17A, struct.pack(">III", 6, 0x105, 1))
    return _command(TPM_TAG_RQU_COMMAND, 0x15, struct.pack(">I", 0))


WANTS_STARTUP: Final = {TpmFamily.TPM_2_0: 0x100, TpmFamily.TPM_1_2: 38}
"""TPM_RC_INITIALIZE, TPM_INVALID_POSTINIT: what a TPM says that was powered on."""


def shutdown_command() -> bytes:
    """Return TPM2_Shutdown(CLEAR); TPM 1.2 needs none before its power goes."""
    return _command(TPM_ST_NO_SESSIONS, TPM_CC_SHUTDOWN, b"\x00\x00")


def mark_command(family: TpmFamily, pcr: int) -> bytes:
    """Return the command that measures LOST_STATE_MARK into `pcr`, in every bank it has.

    TPM2_PCR_Event hashes with each active bank's algorithm; TPM_Extend takes the
    digest, for which the mark's first 20 bytes serve.
    """
    if family is TpmFamily.TPM_2_0:
        event = struct.pack(">H", len(LOST_STATE_MARK)) + LOST_STATE_MARK
        body = struct.pack(">I", pcr) + _password_session() + event
        return _command(TPM_ST_SESSIONS, _TPM_CC_PCR_EVENT, body)
    return _command(
        TPM_TAG_RQU_COMMAND, _TPM_ORD_EXTEND, struct.pack(">I", pcr) + LOST_STATE_MARK[:20]
    )
