"""What the bridge must know of TPM commands: headers, ordinals, deadlines, answers made here.

Theory of operation: a TPM command and its response start with ten bytes, tag
(16 bits), size (32 bits) and ordinal or response code (32 bits), all
big-endian (TPM 2.0 Library, Part 1, 18; TPM 1.2 Main, Part 2, 2.2.9).  The bridge
looks at nothing behind them.  This module keeps promise P1 in data: every
command has a deadline, and for every refusal there is a well-formed answer of
the right family.  Nothing here does input or output.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

HEADER: Final = struct.Struct(">HII")
"""tag, size in bytes, ordinal (command) or response code (response)."""

HEADER_SIZE: Final = HEADER.size
COMMAND_MAX_BYTES: Final = 4088
"""One page less tpmif's eight bytes: the largest command and response."""

TPM_ST_NO_SESSIONS: Final = 0x8001
TPM_ST_SESSIONS: Final = 0x8002
TPM_TAG_RQU_COMMAND: Final = 0x00C1
TPM_TAG_RQU_AUTH1_COMMAND: Final = 0x00C2
TPM_TAG_RQU_AUTH2_COMMAND: Final = 0x00C3
TPM_TAG_RSP_COMMAND: Final = 0x00C4

COMMAND_TAGS: Final = frozenset(
    {
        TPM_ST_NO_SESSIONS,
        TPM_ST_SESSIONS,
        TPM_TAG_RQU_COMMAND,
        TPM_TAG_RQU_AUTH1_COMMAND,
        TPM_TAG_RQU_AUTH2_COMMAND,
    }
)
"""Tags that may reach the page (P3).  vtpm-stubdom takes 0x01C1 and 0x01C2 as
commands for its manager, hardware TPM included, so no guest may send them."""

TPM_RC_SUCCESS: Final = 0
TPM_RC_INITIALIZE: Final = 0x100
TPM_RC_FAILURE: Final = 0x101
TPM_RC_COMMAND_SIZE: Final = 0x142
TPM_RC_BAD_TAG: Final = 0x01E
TPM_RC_CANCELED: Final = 0x909
TPM_RC_RETRY: Final = 0x922

TPM_FAIL: Final = 9
TPM_BAD_PARAM_SIZE: Final = 25
TPM_BADTAG: Final = 30
TPM_INVALID_POSTINIT: Final = 38
TPM_RETRY: Final = 0x800


class Family(enum.Enum):
    """The two kinds of TPM; the value is how the configuration spells it."""

    TPM_1_2 = "1.2"
    TPM_2_0 = "2.0"


class Refusal(enum.Enum):
    """Why a command is answered here instead of by the TPM."""

    FAILURE = enum.auto()
    """The TPM cannot be used: not powered, no evidence of a reset, gone."""
    RETRY = enum.auto()
    """The TPM is busy or being reconnected; Linux sends the command again."""
    COMMAND_SIZE = enum.auto()
    """The announced size is below ten bytes or does not fit the page."""
    BAD_TAG = enum.auto()
    """The tag is in no family of TPM commands."""
    CANCELLED = enum.auto()
    """The command was given up because the guest asked for that."""


_REFUSAL_CODES: Final = {
    Family.TPM_2_0: {
        Refusal.FAILURE: TPM_RC_FAILURE,
        Refusal.RETRY: TPM_RC_RETRY,
        Refusal.COMMAND_SIZE: TPM_RC_COMMAND_SIZE,
        Refusal.BAD_TAG: TPM_RC_BAD_TAG,
        Refusal.CANCELLED: TPM_RC_CANCELED,
    },
    Family.TPM_1_2: {
        Refusal.FAILURE: TPM_FAIL,
        Refusal.RETRY: TPM_RETRY,
        Refusal.COMMAND_SIZE: TPM_BAD_PARAM_SIZE,
        Refusal.BAD_TAG: TPM_BADTAG,
        # TPM 1.2 has no code for it.
        Refusal.CANCELLED: TPM_FAIL,
    },
}
_RESPONSE_TAGS: Final = {
    Family.TPM_2_0: TPM_ST_NO_SESSIONS,
    Family.TPM_1_2: TPM_TAG_RSP_COMMAND,
}


def refusal(family: Family, reason: Refusal) -> bytes:
    """Return the ten-byte answer for a command that the TPM does not get to see.

    QEMU's version probe reads the family from the tag of such an answer, so the
    tag is the configured family's, whatever the command's was.
    """
    return HEADER.pack(_RESPONSE_TAGS[family], HEADER_SIZE, _REFUSAL_CODES[family][reason])


@dataclass(frozen=True, slots=True)
class Header:
    """The ten bytes at a start; `code` is an ordinal or, in a response, its code."""

    tag: int
    size_bytes: int
    code: int

    @classmethod
    def parse(cls, raw: bytes) -> Header:
        """Return the header of `raw`; raises ValueError when it is shorter than ten bytes."""
        if len(raw) < HEADER_SIZE:
            raise ValueError(f"a TPM header has {HEADER_SIZE} bytes, here are {len(raw)}")
        return cls(*HEADER.unpack_from(raw))


def response_family(raw: bytes) -> Family | None:
    """Return which family a response's tag belongs to, None where it is in neither."""
    tag = Header.parse(raw).tag
    if tag in (TPM_ST_NO_SESSIONS, TPM_ST_SESSIONS):
        return Family.TPM_2_0
    # vtpm-stubdom answers AUTH1 and AUTH2 commands that it refuses with tag 0x00C3.
    if TPM_TAG_RQU_AUTH2_COMMAND <= tag <= TPM_TAG_RSP_COMMAND + 2:
        return Family.TPM_1_2
    return None


CANCEL_GRACE_S: Final = 5.0
"""How long a TPM that was told to cancel may take before the bridge answers for it."""

# Commands that the bridge sends on its own account.


def evidence_command(family: Family) -> bytes:
    """Return a command that changes nothing and needs a started TPM.

    A TPM that was power-cycled answers TPM_RC_INITIALIZE (2.0) or
    TPM_INVALID_POSTINIT (1.2): that is the evidence which the reset contract
    asks for.  TPM2_GetCapability(TPM_CAP_TPM_PROPERTIES, TPM_PT_MANUFACTURER, 1)
    and TPM_PcrRead(0).
    """
    if family is Family.TPM_2_0:
        return HEADER.pack(TPM_ST_NO_SESSIONS, 22, 0x17A) + struct.pack(">III", 6, 0x105, 1)
    return HEADER.pack(TPM_TAG_RQU_COMMAND, 14, 0x15) + struct.pack(">I", 0)


WANTS_STARTUP: Final = {
    Family.TPM_2_0: TPM_RC_INITIALIZE,
    Family.TPM_1_2: TPM_INVALID_POSTINIT,
}
"""The response code with which a TPM says that it was power-cycled."""


def pcr_read_command(family: Family, pcr: int, hash_algorithm: int = 0) -> bytes:
    """Return the command that reads one PCR, of one bank for TPM 2.0."""
    if family is Family.TPM_1_2:
        return HEADER.pack(TPM_TAG_RQU_COMMAND, 14, 0x15) + struct.pack(">I", pcr)
    selection = bytearray(3)
    selection[pcr // 8] = 1 << pcr % 8
    body = struct.pack(">IHB", 1, hash_algorithm, len(selection)) + selection
    return HEADER.pack(TPM_ST_NO_SESSIONS, HEADER_SIZE + len(body), 0x17E) + body
