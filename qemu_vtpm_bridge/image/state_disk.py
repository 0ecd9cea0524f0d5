"""The disk that a vTPM domain keeps its TPM on: an ext4 file system in a file.

It has a journal, so a domain that is killed while it writes leaves it whole, and a mark that
it is new: the domain makes a TPM there once, and never again.

It gets its name when it is whole, so a file of that name is one that may hold a TPM.

Source: Linux, Documentation/filesystems/ext4/super.rst.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Final

from ..errors import ConfigError
from .aside import Aside, forget, said
from .init import NEW_MARK, STATE_LABEL
from .shared_objects import program_path

SIZE_MIN_MIB: Final = 16
SIZE_DEFAULT_MIB: Final = 32
_JOURNAL_MIB: Final = 4


_SUPERBLOCK: Final = 1024
_MAGIC: Final = slice(0x38, 0x3A)
_UUID: Final = slice(0x68, 0x78)
_VOLUME_NAME: Final = slice(0x78, 0x88)


def make_state_disk(path: Path, size_mib: int) -> str:
    """Make a new state disk and return the UUID of its file system.

    Raises ConfigError where the file is there already, or cannot be written; nothing of a
    disk that could not be made is left.
    """
    check_state_disk(path, size_mib)
    identity = str(uuid.uuid4())
    with written_aside(path, size_mib, identity) as disk:
        disk.put_new()
    return identity


def check_state_disk(path: Path, size_mib: int) -> None:
    """Raise ConfigError where this disk is not to be made."""
    if size_mib < SIZE_MIN_MIB:
        raise ConfigError(
            f"a state disk of {size_mib} MiB is too small for a journal and a TPM",
            next_step=f"give --state-size-mib {SIZE_MIN_MIB} or more",
        )
    program_path("mkfs.ext4", "e2fsprogs")
    # Never over a disk that holds a TPM.
    if not os.path.lexists(path):
        return
    # Its passing name is there too where a run was killed as it had just made it.
    forget(path)
    identity = _identity(path)
    raise ConfigError(
        f"{path} is there already",
        state="it may hold a TPM, so it was left alone",
        next_step=f"to use it, leave out --make-state and give --state-uuid {identity}"
        if identity
        else "give another name, or remove it yourself",
    )


def written_aside(path: Path, size_mib: int, identity: str) -> Aside:
    """Return a new state disk that has not got its name yet."""
    disk = Aside(path, 0o600)
    try:
        with said(path, "no state disk was made"):
            _make_file_system(disk, size_mib, identity)
        disk.sync()
    except BaseException:
        disk.close()
        raise
    return disk


def _make_file_system(disk: Aside, size_mib: int, identity: str) -> None:
    mkfs = program_path("mkfs.ext4", "e2fsprogs")
    with tempfile.TemporaryDirectory() as contents:
        Path(contents, NEW_MARK).touch()
        os.ftruncate(disk.file, size_mib << 20)
        words = [
            *(str(mkfs), "-q", "-F", "-L", STATE_LABEL, "-U", identity, "-m", "0"),
            *("-J", f"size={_JOURNAL_MIB}", "-E", "root_owner=0:0", "-d", contents),
            str(disk.aside),
        ]
        # With the file it has the lock: it may outlive this process, which is killed.
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, pass_fds=[disk.file]
        )
    if done.returncode:
        said_last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ConfigError(
            f"mkfs.ext4 failed: {said_last.removeprefix('mkfs.ext4: ')}",
            state="no state disk was made",
            next_step=f"see that the disk has room: df {disk.path.parent}",
        )


def _identity(path: Path) -> str | None:
    """Return the UUID of a state disk's file system, or None where it is none."""
    if not (path.is_file() or path.is_block_device()):
        return None
    try:
        with path.open("rb") as file:
            file.seek(_SUPERBLOCK)
            block = file.read(_VOLUME_NAME.stop)
    except OSError:
        return None
    if block[_MAGIC] != b"\x53\xef" or block[_VOLUME_NAME].rstrip(b"\0") != STATE_LABEL.encode():
        return None
    return str(uuid.UUID(bytes=block[_UUID]))
