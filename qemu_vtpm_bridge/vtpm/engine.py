"""The TPM itself: swtpm, its state directory, its power.

Purpose: give the domain a TPM that is there, that loses nothing it can keep and
that never shows a state which is older than its last change.

Theory of operation.  `SwtpmEngine` owns a locked state directory, whose writes
are on the disk before swtpm answers (`synchronous.py`), and at most one
`SwtpmChild`. `start` brings swtpm up and takes up the volatile state as
`snapshot.py` says: a fresh TPM waits for Startup, a stored one goes on where it
was.  Where it was lost while guests may still run, the TPM is started here and a
mark is measured into each PCR that only a power cycle resets: keys, NV and random
numbers serve on, while nobody can send Startup and then measure what a trusted
boot would have measured.  A power cycle clears the marks.

`power_cycle` is the reset that a trusted frontend asks for: Shutdown(CLEAR) first,
unless the guest's last command was a Shutdown of its own (swtpm before 0.8 does
not do it, and a TPM that is switched off without counts towards lockout; a
guest's Shutdown(STATE) on its way to sleep must stand).

Keeps P7 (a power cycle is one, and is counted by the domain only when it
succeeded) and P8.  Nothing of a command or an answer is logged (P10).

Source: TPM 2.0 Library, Part 1, 12.2 (Startup and Shutdown); swtpm's
tpm_ioctl.h; swtpm_nvstore_dir.c (names of the state files).
"""

from __future__ import annotations

import enum
import fcntl
import logging
import os
import struct
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, TypeVar

import trio

from ..confine import User
from ..errors import ConfigError
from ..ratelimit import RateLimit
from .child import (
    CMD_INIT,
    CMD_SET_LOCALITY,
    CMD_STOP,
    CMD_STORE_VOLATILE,
    EngineError,
    EngineRefusal,
    SwtpmChild,
)
from .ordinals import (
    PCRS_OF_BOOT,
    TPM_RC_SUCCESS,
    WANTS_STARTUP,
    TpmFamily,
    mark_command,
    probe_command,
    shutdown_command,
    startup_command,
)
from .snapshot import Snapshot, VolatileState
from .synchronous import make_synchronous

logger = logging.getLogger(__name__)

T = TypeVar("T")

CONTROL_DEADLINE_S: Final = 30.0
"""For one exchange on swtpm's channels.  CMD_INIT of a TPM 1.2 on a new directory
makes an endorsement key, a few seconds on a slow machine."""

_PERMANENT_FILES: Final = {
    TpmFamily.TPM_1_2: "tpm-00.permall",
    TpmFamily.TPM_2_0: "tpm2-00.permall",
}
_LOCK_FILE: Final = "lock"
_INIT: Final = struct.pack(">I", 0)


class Resumption(enum.Enum):
    """How the TPM came up."""

    WAITS_FOR_STARTUP = "waits for Startup"
    CONTINUES = "continues where it was"
    MARKED = "volatile state was lost; the boot PCRs carry a mark until the next power cycle"


def make_state_dir(state_dir: Path, user: User | None = None) -> None:
    """Make the directory of a TPM's state where it is missing, and give it to `user`.

    What is written there is on the disk from then on (`synchronous.py`).  For root, before
    it becomes that user and may do so no more.  What is in it is given along only where the
    directory is root's and nobody else could write to it: otherwise somebody may have put
    a link there to what is not his.  Raises ConfigError.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_synchronous(state_dir)
        # Whose it is already, root without its capabilities may not even look into.
        if user is not None and os.geteuid() == 0 and state_dir.lstat().st_uid == 0:
            _give_along(state_dir, user)
    except OSError as error:
        raise _not_usable(state_dir, error) from error


def _make_synchronous(state_dir: Path) -> None:
    try:
        can_be = make_synchronous(state_dir)
    except PermissionError:
        # It was, when it was given to the user whose it is; root without its capabilities may
        # not look into it now. Who may not use it at all is told so when it is opened.
        return
    if not can_be:
        logger.info(
            "%s: its file system has no synchronous directories; in a power cut it may lose "
            "what the TPM wrote last",
            state_dir,
        )


def _give_along(state_dir: Path, user: User) -> None:
    directory = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(directory)
        if found.st_uid != 0 or found.st_mode & 0o022:
            return
        for name in os.listdir(directory):  # noqa: PTH208 - of this very directory
            os.chown(name, user.uid, user.gid, dir_fd=directory, follow_symlinks=False)
        os.fchown(directory, user.uid, user.gid)
    finally:
        os.close(directory)


def _not_usable(state_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{state_dir}: {error.strerror}",
        state="the TPM's state is kept there, so nothing was started",
        next_step="give a directory that this user may write to, on a disk with room",
    )


def open_state_dir(state_dir: Path, family: TpmFamily) -> int:
    """Make the directory if it is missing, lock it, return the lock's descriptor.

    The lock goes with the descriptor, so it dies with the process.  Raises
    ConfigError where the directory cannot be used, is in use, or holds a TPM of
    the other family.
    """
    if not state_dir.exists():
        make_state_dir(state_dir)
    try:
        lock_fd = os.open(state_dir / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _not_usable(state_dir, error) from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for other, name in _PERMANENT_FILES.items():
            if other is not family and (state_dir / name).exists():
                raise ConfigError(
                    f"{state_dir} holds a TPM {other.value}, not a TPM {family.value}",
                    next_step=f"give --tpm {other.value}, or another directory",
                )
    except BlockingIOError:
        os.close(lock_fd)
        raise ConfigError(
            f"{state_dir} is in use by another vTPM process",
            next_step="stop that one first; two would destroy the TPM's state",
        ) from None
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


class SwtpmEngine:
    """One TPM.  `open`, then `start`; `close` in the end.

    The pump uses `child.control` and `child.data` while it runs; every method
    here may be called only while it does not.  Run `child.relay_log` after `start`.
    """

    def __init__(self, state_dir: Path, family: TpmFamily, program: str = "swtpm") -> None:
        self._state_dir = state_dir
        self._family = family
        self._program = program
        self._snapshot = Snapshot(state_dir, family)
        self._lines = RateLimit(logger)
        self._lock_fd: int | None = None
        self._child: SwtpmChild | None = None
        self._stack = AsyncExitStack()
        self.marked = False

    async def open(self) -> None:
        """Take the state directory; raises ConfigError where that cannot be."""
        self._lock_fd = await trio.to_thread.run_sync(open_state_dir, self._state_dir, self._family)

    async def enter_life(self, words: Iterable[str]) -> str:
        """Return the word of this life of the domain; see `Snapshot.enter_life`.

        Raises EngineError where the directory cannot be written to.
        """
        return await self._on_disk(self._snapshot.enter_life, list(words))

    @property
    def child(self) -> SwtpmChild:
        """The running swtpm; raises EngineError where there is none."""
        if self._child is None:
            raise EngineError("swtpm is not running")
        return self._child

    @property
    def running(self) -> bool:
        """Whether `start` succeeded and `stop` or `kill` has not been called since."""
        return self._child is not None

    async def start(self) -> Resumption:
        """Start swtpm and bring the TPM to where it was, as far as that is known.

        Raises EngineError; nothing is left running then.  So does cancelling.
        """
        before = await self._on_disk(self._snapshot.state)
        try:
            await self._power_up()
            if before is VolatileState.STORED and await self._wants_startup():
                # libtpms passes over a snapshot that it cannot read, without a word.
                before = VolatileState.LOST
        except EngineError as error:
            if before is not VolatileState.STORED:
                raise
            logger.warning("the stored volatile state cannot be loaded: %s", error)
            await self._on_disk(self._snapshot.invalidate)
            before = VolatileState.LOST
            await self._power_up()
        if before is VolatileState.FRESH:
            self.marked = False
            return Resumption.WAITS_FOR_STARTUP
        if before is VolatileState.STORED:
            return Resumption.CONTINUES
        try:
            await self._mark()
        except BaseException:
            await self.kill()
            raise
        return Resumption.MARKED

    async def _power_up(self) -> None:
        async with AsyncExitStack() as stack:
            child = SwtpmChild.spawn(self._program, self._state_dir, self._family, self._lines)
            await stack.enter_async_context(child)
            await child.set_buffer_size(CONTROL_DEADLINE_S)
            await child.control_command(CMD_INIT, _INIT, CONTROL_DEADLINE_S)
            self._child = child
            self._stack = stack.pop_all()

    async def _mark(self) -> None:
        """Start the TPM and spoil the PCRs that a new boot would measure into."""
        child = self.child
        await child.control_command(CMD_SET_LOCALITY, b"\x00", CONTROL_DEADLINE_S)
        commands = [startup_command(self._family)]
        commands += [mark_command(self._family, pcr) for pcr in PCRS_OF_BOOT]
        for command in commands:
            code = await child.tpm_command(command, CONTROL_DEADLINE_S)
            if code != TPM_RC_SUCCESS:
                raise EngineError(f"the TPM answered {code:#x} to the mark of lost state")
        self.marked = True

    async def _wants_startup(self) -> bool:
        """Return whether the TPM waits for Startup; ends it where it does not say."""
        try:
            code = await self.child.tpm_command(probe_command(self._family), CONTROL_DEADLINE_S)
        except BaseException:
            await self.kill()
            raise
        return code == WANTS_STARTUP[self._family]

    async def store_volatile(self) -> None:
        """Write the snapshot: from now on it is current, until `about_to_change`.

        Raises EngineError; swtpm runs on only where it said that it cannot.
        """
        if await self._wants_startup():
            # Nothing happened to it: a TPM that is powered on anew is as good.
            await self._on_disk(self._snapshot.power_on)
            return
        try:
            await self.child.control_command(CMD_STORE_VOLATILE, b"", CONTROL_DEADLINE_S)
        except EngineRefusal:
            raise
        except BaseException:
            await self.kill()
            raise

    async def about_to_change(self) -> None:
        """Throw the snapshot away, because the next command may change the TPM."""
        await self._on_disk(self._snapshot.invalidate)

    async def power_cycle(self, *, shutdown_first: bool) -> None:
        """Switch the TPM off and on: it then waits for Startup, all volatile state gone.

        `shutdown_first` sends TPM2_Shutdown(CLEAR); pass False where the last
        command was a Shutdown that succeeded.  Raises EngineError, in which case
        `start` must be called; that completes the cycle if `is_fresh` says so.
        """
        # First of all the promise on disk: whatever goes wrong from here on ends swtpm,
        # and a TPM that is started after that has lost its power.
        await self._on_disk(self._snapshot.power_on)
        child = self.child
        try:
            if shutdown_first and self._family is TpmFamily.TPM_2_0:
                # A TPM that was never started answers TPM_RC_INITIALIZE; that is as good.
                await child.tpm_command(shutdown_command(), CONTROL_DEADLINE_S)
            await child.control_command(CMD_STOP, b"", CONTROL_DEADLINE_S)
            await child.control_command(CMD_INIT, _INIT, CONTROL_DEADLINE_S)
        except BaseException:
            await self.kill()
            raise
        self.marked = False

    async def is_fresh(self) -> bool:
        """Return whether the TPM is known to wait for Startup, now or once it is started."""
        try:
            return await self._on_disk(self._snapshot.state) is VolatileState.FRESH
        except EngineError:
            return False

    async def kill(self) -> None:
        """End swtpm at once.  What it held in memory is lost unless it was stored."""
        if self._child is not None:
            self._child = None
            with trio.CancelScope(shield=True):  # it is dead within a moment
                await self._stack.aclose()

    async def stop(self, *, store: bool) -> None:
        """End swtpm in order, storing the volatile state first where `store` says so."""
        if self._child is None:
            return
        try:
            if store:
                await self.store_volatile()
            await self._child.end(CONTROL_DEADLINE_S)
        except EngineError as error:
            logger.warning("the volatile state could not be stored: %s", error)
        finally:
            await self.kill()

    async def close(self) -> None:
        """End swtpm and let the state directory go.  Safe to call twice."""
        await self.kill()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    async def _on_disk(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await trio.to_thread.run_sync(function, *arguments)
        except OSError as error:
            raise EngineError(
                f"{self._state_dir}: {error.strerror}",
                next_step="see that the disk has room and the directory is writable",
            ) from error
