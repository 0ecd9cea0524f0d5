"""The pid file, by which xenopsd knows that a TPM is ready: it is there, or the bridge ends.

Theory of operation.  A process of the TPM's user writes the file under a passing name before
the bridge is opened, so that a full disk is found out while nothing runs.  When the bridge says
that it is ready, the process gives the file its name and ends.  It is not a thread, since the
bridge gives up its privileges with its one thread; and not the bridge, which by then may make
no files.

The process holds one end of a pipe.  However it ends, the bridge gets SIGIO; where the file is
not there then, it says why and ends in order, since xenopsd would wait in vain.

The file of an earlier process is moved away last of all: a start that fails, as one beside a
TPM that runs does, leaves it.

Who may lie: nobody; the directory is the TPM's user's, so that nothing in there is followed as
root.

Source: fcntl(2), F_SETOWN; link(2); xen-api's service.ml.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from ..errors import ConfigError

_PR_SET_PDEATHSIG: Final = 1
_WRITTEN: Final = b"+"
_REASON_MAX_BYTES: Final = 4096


class PidFile:
    """The pid file of this process, which is to be a TPM."""

    def __init__(self, path: Path, uid: int | None) -> None:
        self.path = path
        """As it is before the root is entered."""
        self.uid = uid
        """The TPM's user; None where it stays root."""
        self.failed = False
        """The bridge was told to end, as there is no file."""
        self._bridge = os.getpid()
        self._file: tuple[int, int] | None = None
        """What the file is known by, under any name and root."""
        self._reading = -1

    def when_ready(self) -> None:
        """Write the file, for it to have its name when the bridge says that it is ready.

        Raises ConfigError where it cannot be written.
        """
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.bind("")  # the kernel chooses a name that is in no directory
        name = ready.getsockname()
        os.environ["NOTIFY_SOCKET"] = "@" + os.fsdecode(name[1:])
        self._reading, writing = os.pipe()
        with ready:
            if os.fork() == 0:
                self._be_writer(ready, writing)
        os.close(writing)
        said = os.read(self._reading, _REASON_MAX_BYTES)
        if said != _WRITTEN:
            raise self._not_there(said)
        self._file = _identity(self._passing)
        self._listen()

    def remove(self) -> None:
        """Remove what is there of the file; that of another process stays."""
        # Once the directory was entered it is the root.
        for place in (self.path.parent, Path("/")):
            for name in (self._passing.name, self.path.name):
                with suppress(OSError):
                    if self._file is not None and _identity(place / name) == self._file:
                        (place / name).unlink()

    @property
    def _passing(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")

    def _not_there(self, said: bytes) -> ConfigError:
        reason = said.decode("utf-8", "replace") or "the process that writes it was killed"
        return ConfigError(
            f"{self.path}: {reason}",
            state="xenopsd would wait for this file, so the TPM ends",
            next_step="make room and give access there, and start the guest again: "
            f"df {self.path.parent}; ls -la {self.path.parent}",
        )

    # In the bridge.

    def _listen(self) -> None:
        """Hear of the writer's end, from now on and whatever is given up meanwhile."""
        # A service may have been started with it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGIO, lambda *_: self._look())
        fcntl.fcntl(self._reading, fcntl.F_SETOWN, self._bridge)
        fcntl.fcntl(self._reading, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        self._look()  # what came before is not told

    def _look(self) -> None:
        """End the bridge if the writer has ended and the file is not there."""
        try:
            said = os.read(self._reading, _REASON_MAX_BYTES)
        except BlockingIOError:
            return
        if self.failed or self._is_there():
            return
        self.failed = True
        print(f"qemu-vtpm-bridge-xapi: {self._not_there(said)}", file=sys.stderr)
        # It ends the bridge in order, also before the bridge listens for SIGTERM.
        signal.raise_signal(signal.SIGINT)

    def _is_there(self) -> bool:
        for place in (self.path.parent, Path("/")):
            with suppress(OSError):
                if _identity(place / self.path.name) == self._file:
                    return True
        return False

    # In the writer.

    def _be_writer(self, ready: socket.socket, writing: int) -> NoReturn:
        try:
            # The user may not find the way to it.
            directory = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY)
            self._become_user()
            if os.getppid() == self._bridge:
                self._write(directory)
                os.write(writing, _WRITTEN)
                while b"READY=1" not in ready.recv(4096).split(b"\n"):
                    pass
                self._give_name(directory)
        except OSError as error:
            os.write(writing, (error.strerror or str(error)).encode())
        except Exception as error:
            os.write(writing, repr(error).encode()[:_REASON_MAX_BYTES])
        finally:
            os._exit(0)

    def _become_user(self) -> None:
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)
        # After the user was changed, which takes it back.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def _write(self, directory: int) -> None:
        # One that was left may have the file's name too.
        with suppress(FileNotFoundError):
            os.unlink(self._passing.name, dir_fd=directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        file = os.open(self._passing.name, flags, 0o644, dir_fd=directory)
        try:
            os.write(file, f"{self._bridge}\n".encode())
        except OSError:
            os.unlink(self._passing.name, dir_fd=directory)
            raise
        finally:
            os.close(file)

    def _give_name(self, directory: int) -> None:
        """Have the file appear: whole, and as made, which xenopsd does not see of a rename."""
        name, passing = self.path.name, self._passing.name
        with suppress(FileNotFoundError):
            # xenopsd takes its removal for a failure.
            os.rename(name, f"{name}.old", src_dir_fd=directory, dst_dir_fd=directory)
        os.link(passing, name, src_dir_fd=directory, dst_dir_fd=directory)
        os.unlink(passing, dir_fd=directory)


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
