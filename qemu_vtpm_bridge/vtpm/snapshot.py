"""What is known on disk of the TPM's volatile state: PCRs, sessions, loaded keys.

Purpose: a swtpm that dies, or a vTPM process that is replaced, shall go on as
if nothing had happened, but a snapshot that is older than the TPM's last change
must never be loaded: a PCR that went back to an earlier value forges the measured
boot.

Theory of operation.  swtpm writes the snapshot when it is told to
(CMD_STORE_VOLATILE) and loads it at CMD_INIT if the file is there.  Three files
beside swtpm's own say what it is worth:

- swtpm's volatile file exists: it is current.  It is removed *before* the first
  command that could change the TPM reaches it.
- `fresh` exists: no command that could change the TPM has reached it since its
  power came on, so starting it again loses nothing.
- neither: the state was in the memory of a process that is gone.  It is lost.
- `life` holds a random word that is also written into the domain's XenStore
  directories, which vanish with the domain.  A domain that was destroyed and made
  anew was powered off: what an earlier life stored is thrown away.

The order of the changes is such that a crash between any two of them leads to
`LOST` or to a new life, never to an old snapshot.  The directory belongs to this
program; nobody else may write to it (mode 0700).
"""

from __future__ import annotations

import enum
import secrets
from collections.abc import Iterable
from pathlib import Path

from .ordinals import TpmFamily

_VOLATILE_FILES = {
    TpmFamily.TPM_1_2: "tpm-00.volatilestate",
    TpmFamily.TPM_2_0: "tpm2-00.volatilestate",
}


class VolatileState(enum.Enum):
    """What starting swtpm on the directory would find."""

    FRESH = "fresh"
    """Nothing has changed the TPM since its power came on; it waits for Startup."""
    STORED = "stored"
    """The snapshot is current; the TPM goes on where it was."""
    LOST = "lost"
    """The TPM ran, and what it held in memory is gone."""


class Snapshot:
    """The files of one state directory.  Every method may raise OSError."""

    def __init__(self, state_dir: Path, family: TpmFamily) -> None:
        self._volatile = state_dir / _VOLATILE_FILES[family]
        self._fresh = state_dir / "fresh"
        self._life = state_dir / "life"

    def state(self) -> VolatileState:
        """Return what is known now."""
        if self._volatile.exists():
            return VolatileState.STORED
        return VolatileState.FRESH if self._fresh.exists() else VolatileState.LOST

    def invalidate(self) -> None:
        """The TPM is about to change: neither the snapshot nor `fresh` holds any more."""
        self._fresh.unlink(missing_ok=True)
        self._volatile.unlink(missing_ok=True)

    def power_on(self) -> None:
        """The TPM's power is about to come on anew."""
        self._volatile.unlink(missing_ok=True)
        self._fresh.touch(mode=0o600)

    def enter_life(self, words: Iterable[str]) -> str:
        """Return this life's word; begin a new life unless its word is among `words`.

        `words` is what the domain's XenStore directories hold: written by the
        domain itself and by nobody else but domain 0.
        """
        try:
            word = self._life.read_text(encoding="ascii")
        except (FileNotFoundError, UnicodeDecodeError):
            word = ""
        if word and word in words:
            return word
        self._life.unlink(missing_ok=True)
        self.power_on()
        word = secrets.token_hex(16)
        self._life.write_text(word, encoding="ascii")
        return word
