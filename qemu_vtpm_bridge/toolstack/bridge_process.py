"""The process that is a guest's bridge: is it there, what does it say, start it, end it.

Theory of operation.  Files in the run directory, named after the guest, say what is there:

    STEM.lock     locked by whoever starts or stops the guest's bridge just now
    STEM.bridge   locked by the bridge itself, from before its first instruction to its
                  end, since it inherits the descriptor; its pid stands in it
    STEM.sock     QEMU connects here         STEM.status   the status socket
    STEM.notify   the launcher hears here that the bridge is ready, while it waits
    STEM.device   which device a bridge had that is being ended

A kernel's lock goes with the process that held it.  So no crash leaves a bridge on paper
that is not there, and none is overlooked that has not got as far as its sockets; and while
the lock is held, the pid is nobody else's.

Keeps P9 and P10.  Who may lie: the directory is ours alone, which the caller checks; what
listens there may be anything, so its answer is bounded and judged.

Source: flock(2), unix(7), sd_notify(3).
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError
from ..xen.xenbus import printable

READY_DEADLINE_S: Final = 25.0
"""For a bridge to listen; libxl gives a device model a minute in all."""

LOCK_DEADLINE_S: Final = 30.0
STOP_DEADLINE_S: Final = 20.0
"""For a bridge to drain and close; then it is killed."""

_LOOK_S: Final = 0.05
_STATUS_DEADLINE_S: Final = 2.0
_STATUS_MAX_BYTES: Final = 1 << 20
_LOG_TAIL_BYTES: Final = 2000
_MODULE: Final = "qemu_vtpm_bridge"

_DETACHED: Final = 'sh -c \'echo $$ 1<>"$0" && exec "$@"\' "$@" </dev/null &'
"""Runs a command, behind the name of the file for its pid, that outlives its parent and is
nobody's child: what becomes QEMU reaps none that it does not know.  The pid is written over
what is in the file."""

_PID_BYTES: Final = 16
"""Of room for the pid, kept before there is one."""


@dataclass(frozen=True, slots=True)
class BridgeProcess:
    """A guest's bridge, running or not."""

    name: str
    """The guest's."""
    run_dir: Path
    log_dir: Path
    stem: str
    """What the names of the guest's files begin with."""

    def at(self, ending: str) -> Path:
        """Return the file in the run directory with this ending."""
        return self.run_dir / f"{self.stem}.{ending}"

    @property
    def log(self) -> Path:
        """Where the bridge's own words go."""
        return self.log_dir / f"{self.stem}.log"

    # Looking.

    def alive(self) -> bool:
        """Return whether a bridge that was started here is there, however young."""
        with said(self.at("bridge")):
            descriptor = os.open(self.at("bridge"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            return not _try_lock(descriptor)
        finally:
            os.close(descriptor)

    def pid(self) -> int:
        """Return the living bridge's process id; 0 where it is not known yet."""
        raw = self.at("bridge").read_text(encoding="ascii", errors="replace").strip()
        return int(raw) if raw.isdecimal() else 0

    def words(self) -> list[str] | None:
        """Return the words that the living bridge was started with."""
        try:
            raw = Path(f"/proc/{self.pid()}/cmdline").read_bytes()
        except OSError:
            return None
        words = [os.fsdecode(word) for word in raw.split(b"\0")[:-1]]
        return words[words.index(_MODULE) + 1 :] if _MODULE in words else None

    def status(self) -> dict[str, Any] | None:
        """Return the status document of the bridge that listens, if one does."""
        raw = b""
        end = time.monotonic() + _STATUS_DEADLINE_S
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            try:
                client.settimeout(_STATUS_DEADLINE_S)
                client.connect(str(self.at("status")))
                while len(raw) <= _STATUS_MAX_BYTES and time.monotonic() < end:
                    chunk = client.recv(65536)
                    if not chunk:
                        return _bridges(json.loads(raw))
                    raw += chunk
            except (OSError, ValueError, RecursionError):
                pass
        return None

    def until_it_answers(self) -> dict[str, Any] | None:
        """Return the living bridge's status; None where it ends meanwhile."""
        for _ in looks(READY_DEADLINE_S):
            document = self.status()
            if document is not None:
                return document
            if not self.alive():
                return None
        raise ConfigError(
            f"the bridge of guest {self.name!r} does not answer",
            state=f"process {self.pid()} holds {self.at('bridge')}",
            next_step=f"end it with `qemu-vtpm-bridge guest stop`, and look into {self.log}",
        )

    # Starting and ending.

    def start(self, words: Sequence[str]) -> None:
        """Start the program with these words, and wait until it says that it is ready.

        Raises ConfigError where it is not; it may be there nevertheless.
        """
        with said(self.run_dir), _notify_socket(self.at("notify")) as ready:
            self._spawn(words)
            self._until_ready(ready)

    def _spawn(self, words: Sequence[str]) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")
        } | {"NOTIFY_SOCKET": str(self.at("notify"))}
        with said(self.log), self.log.open("ab", buffering=0) as log:
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            # A disk that takes not even this line is found out before anything runs.
            log.write(f"{when} the bridge of guest {self.name!r} starts\n".encode())
            held = os.open(self.at("bridge"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not _try_lock(held):
                    raise ConfigError(
                        f"another bridge of guest {self.name!r} has just been started",
                        next_step="try again",
                    )
                with said(self.at("bridge")):
                    os.truncate(held, 0)
                    # A bridge whose pid found no room could be neither known nor ended.
                    os.write(held, b" " * _PID_BYTES)
                subprocess.run(
                    [
                        *("/bin/sh", "-c", _DETACHED, "sh", str(self.at("bridge"))),
                        *(sys.executable, "-P", "-m", _MODULE, *words),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=environment,
                    pass_fds=[held],
                    start_new_session=True,
                    check=True,
                )
            finally:
                os.close(held)

    def _until_ready(self, ready: socket.socket) -> None:
        ready.settimeout(_LOOK_S)
        for _ in looks(READY_DEADLINE_S):
            with suppress(TimeoutError):
                if "READY=1" in ready.recv(4096).decode("utf-8", "replace").split("\n"):
                    return
            if not self.alive():
                raise ConfigError(
                    f"the bridge of guest {self.name!r} ended at once",
                    state=f"it said: {self._last_line()}",
                    next_step=f"mend that; all it said is in {self.log}",
                )
        raise ConfigError(
            f"the bridge of guest {self.name!r} was not ready in {READY_DEADLINE_S:g} s",
            state=f"it said: {self._last_line()}",
            next_step=f"see {self.log}, and try again",
        )

    def _last_line(self) -> str:
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
                lines = file.read().splitlines()
        except OSError:
            lines = []
        return printable(lines[-1], _LOG_TAIL_BYTES) if lines else "nothing"

    def end(self) -> None:
        """End the living bridge: in order if it can, else killed; raises ConfigError."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            told = False
            for _ in looks(STOP_DEADLINE_S):
                if not self.alive():
                    return
                pid = self.pid()
                if pid and not told:
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
                    told = True
        raise ConfigError(
            f"process {self.pid()}, the bridge of guest {self.name!r}, does not end",
            next_step="see what it waits for, in /proc/PID/stack",
        )

    def sweep(self) -> None:
        """Remove the sockets that a killed bridge leaves."""
        for ending in ("sock", "status", "notify"):
            with said(self.at(ending)):
                self.at(ending).unlink(missing_ok=True)

    # What outlives it.

    def note(self, document: dict[str, Any]) -> None:
        """Write down what is to be known when the bridge has ended."""
        # A full disk must keep no bridge from its end: the caller knows it too, if it lives.
        with suppress(OSError):
            self.at("device").write_text(json.dumps(document), encoding="ascii")

    def noted(self) -> dict[str, Any] | None:
        """Return what was written down, if it was written to its end."""
        try:
            document = json.loads(self.at("device").read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return document if isinstance(document, dict) else None

    def forget(self) -> None:
        """Remove what was written down."""
        with said(self.at("device")):
            self.at("device").unlink(missing_ok=True)

    # Others.

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from starting or stopping the guest's bridge."""
        with said(self.at("lock")):
            descriptor = os.open(self.at("lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not any(_try_lock(descriptor) for _ in looks(LOCK_DEADLINE_S)):
                raise ConfigError(
                    f"another process starts or stops the bridge of guest {self.name!r}",
                    state=f"it has held {self.at('lock')} for {LOCK_DEADLINE_S:g} s",
                    next_step=f"see who it is with `fuser -v '{self.at('lock')}'`, and try again",
                )
            yield
        finally:
            os.close(descriptor)

    def listens(self, ending: str) -> bool:
        """Return whether somebody listens there; raises ConfigError where it is no socket."""
        path = self.at(ending)
        if not path.exists() and not path.is_symlink():
            return False
        if not path.is_socket():
            raise ConfigError(
                f"{path} is there and is no socket", next_step="see what it is, and move it away"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_STATUS_DEADLINE_S)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                return False
            except OSError:
                return True
        return True


def _bridges(document: object) -> dict[str, Any] | None:
    """Return the document if a bridge wrote it."""
    if isinstance(document, dict) and document.get("program") == "qemu-vtpm-bridge":
        return document
    return None


@contextmanager
def said(path: Path) -> Iterator[None]:
    """Turn what the system refuses into what a person can mend."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or path}: {error.strerror}",
            state="the guest's bridge was not started",
            next_step=f"make room or give access there: df {path.parent}; ls -ld {path.parent}",
        ) from error


def looks(deadline_s: float) -> Iterator[None]:
    """Yield now and every moment until the deadline has passed."""
    end = time.monotonic() + deadline_s
    yield
    while time.monotonic() < end:
        time.sleep(_LOOK_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _notify_socket(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(str(path))
        try:
            yield ready
        finally:
            path.unlink(missing_ok=True)
