"""How long a TPM command may take: for the bridge, and for the vTPM domain that runs it.

Both ends use one table.  The vTPM domain's clock starts later than the bridge's, and the
bridge waits a little past its deadline for a cancelled command; so where the TPM itself
hangs it is the vTPM domain that answers, and the connection is kept (P1).

Sources: Linux' tpm2-cmd.c and tpm-interface.c; TPM Main Part 2, 21.6.
"""

from __future__ import annotations

from typing import Final

DEFAULT_DEADLINE_S: Final = 120.0
"""For an ordinal that no table names: what Linux waits for an unknown one
(TPM_LONG's fallback of two minutes in tpm_calc_ordinal_duration)."""

_QUICK_S: Final = 30.0
_CREATE_S: Final = 300.0

DEADLINES_S: Final[dict[int, float]] = {
    # TPM 2.0.  The classes follow Linux (tpm2-cmd.c: Startup, SelfTest, PCR and
    # GetRandom short or medium; Create, CreatePrimary, CreateLoaded long, three to
    # five minutes); the short class is far longer than Linux's two seconds, since a
    # guest's driver gives up by itself and cancels, while this deadline costs the
    # connection.
    0x00000144: _QUICK_S,  # Startup
    0x00000145: _QUICK_S,  # Shutdown
    0x0000017A: _QUICK_S,  # GetCapability
    0x0000017B: _QUICK_S,  # GetRandom
    0x0000017E: _QUICK_S,  # PCR_Read
    0x00000182: _QUICK_S,  # PCR_Extend
    0x00000181: _QUICK_S,  # ReadClock
    0x00000131: _CREATE_S,  # CreatePrimary
    0x00000153: _CREATE_S,  # Create
    0x00000191: _CREATE_S,  # CreateLoaded
    # TPM 1.2.  Durations of TPM Main Part 2, 21.6: short, medium, long; the first
    # command of a freshly built Mini-OS vTPM waits for its endorsement key.
    0x00000014: DEFAULT_DEADLINE_S,  # Extend
    0x00000015: DEFAULT_DEADLINE_S,  # PcrRead
    0x00000046: DEFAULT_DEADLINE_S,  # GetRandom
    0x00000065: DEFAULT_DEADLINE_S,  # GetCapability
    0x00000099: DEFAULT_DEADLINE_S,  # Startup
    0x0000000D: _CREATE_S,  # TakeOwnership
    0x0000001F: _CREATE_S,  # CreateWrapKey
    0x00000078: _CREATE_S,  # CreateEndorsementKeyPair
}
"""Seconds that each ordinal may take: then the bridge cancels it, and the vTPM domain
takes its TPM for hung."""
