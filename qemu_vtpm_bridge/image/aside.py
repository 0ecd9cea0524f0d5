"""Files that get their names when they are whole.

Theory of operation.  A file is written beside the one that it becomes, under that one's name
and `.part`, and is given its name in one step: whoever reads finds the old file or the new
one, and a run that is killed leaves both as they are.  Who writes holds a lock on it, which
ends with the process.  What has such a name and no lock is what a killed run left; it is
removed and never written to, as it may be a second name of something else.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import ConfigError


@contextmanager
def said(path: Path, state: str) -> Iterator[None]:
    """Turn what the system refuses into what a person can mend."""
    try:
        yield
    except OSError as error:
        path = Path(error.filename or path)
        raise ConfigError(
            f"{path}: {error.strerror}",
            state=state,
            next_step=f"make room or give access there: df {path.parent}; ls -ld {path.parent}",
        ) from error


class Aside:
    """A new file that has not got its name yet; leaving the context removes it.

    Raises ConfigError for what the system refuses; `path` is then as it was.
    """

    def __init__(self, path: Path, permissions: int = 0o666) -> None:
        self.path = path
        with self._said():
            if path.exists() and not path.is_file():
                raise ConfigError(
                    f"{path} is there and is no file",
                    state="nothing was replaced",
                    next_step="give another name",
                )
            self.aside = _aside(path)
            self.file = self._claimed(permissions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove what has not got its name."""
        # Where the passing name is another file's, that is another run's.
        with suppress(OSError):
            if _has_name(self.file, self.aside):
                self.aside.unlink()
        os.close(self.file)

    def write(self, content: bytes) -> None:
        """Write all of it."""
        with self._said():
            with os.fdopen(os.dup(self.file), "wb") as file:
                file.write(content)
            self.sync()

    def sync(self) -> None:
        """Bring it to the disk: some file systems find out only then that there is no room."""
        with self._said():
            os.fsync(self.file)

    def replace(self) -> None:
        """Give it its name, in place of what has it."""
        with self._said():
            self.aside.rename(self.path)

    def put_new(self) -> None:
        """Give it its name, which must be free."""
        with self._said():
            try:
                # A link never replaces, where renaming does.
                os.link(self.aside, self.path)
            except FileExistsError:
                raise ConfigError(
                    f"{self.path} is there already",
                    state="it was made just now, and was left alone",
                    next_step="give another name",
                ) from None
            except OSError:
                # No room for a second name, or no such thing on this file system.
                if os.path.lexists(self.path):
                    raise
                self.aside.rename(self.path)
            else:
                self.aside.unlink()

    def _claimed(self, permissions: int) -> int:
        """Make it anew, locked; what a killed run left gives way."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while True:
            _remove_left(self.aside)
            try:
                file = os.open(self.aside, flags, permissions)
            except FileExistsError:
                continue  # another run was quicker, and is seen by its lock
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _has_name(file, self.aside):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # another run took it for a killed one's

    @contextmanager
    def _said(self) -> Iterator[None]:
        state = f"{self.path} is as it was"
        with said(self.path, state):
            try:
                yield
            except BlockingIOError:
                raise ConfigError(
                    f"another vtpm-image writes {self.path}",
                    state=state,
                    next_step="run this one again when that one has ended",
                ) from None


def forget(path: Path) -> None:
    """Remove what a killed run left aside for this name, where that can be."""
    with suppress(OSError):
        _remove_left(_aside(path))


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _remove_left(aside: Path) -> None:
    """Remove what a killed run left.  Raises BlockingIOError where the run is alive."""
    try:
        file = os.open(aside, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _has_name(file, aside):
            aside.unlink()
    finally:
        os.close(file)


def _has_name(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False
