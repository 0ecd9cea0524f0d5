"""The disk that a vTPM domain keeps its TPM on: an ext4 file system in a file.

It has a journal, so a domain that is killed while it writes leaves it whole, and a mark that
it is new: the domain makes a TPM there once, and never again.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import Final

from ..errors import ConfigError
from .init import NEW_MARK, STATE_LABEL
from .shared_objects import program_path

SIZE_MIN_MIB: Final = 16
SIZE_DEFAULT_MIB: Final = 32
_JOURNAL_MIB: Final = 4


def make_state_disk(path: Path, size_mib: int) -> str:
    """Make a new state disk and return the UUID of its file system.

    Raises ConfigError where the file is there already, or cannot be written; nothing of a
    disk that could not be made is left.
    """
    if size_mib < SIZE_MIN_MIB:
        raise ConfigError(
            f"a state disk of {size_mib} MiB is too small for a journal and a TPM",
            next_step=f"give --state-size-mib {SIZE_MIN_MIB} or more",
        )
    mkfs = program_path("mkfs.ext4", "e2fsprogs")
    try:
        # Never over a disk that holds a TPM.
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already",
            state="it may hold a TPM, so it was left alone",
            next_step="give another name, or remove it yourself",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", next_step="name a file in a directory you may write to"
        ) from error
    identity = str(uuid.uuid4())
    with tempfile.TemporaryDirectory() as contents:
        Path(contents, NEW_MARK).touch()
        os.truncate(path, size_mib << 20)
        words = [
            *(str(mkfs), "-q", "-F", "-L", STATE_LABEL, "-U", identity, "-m", "0"),
            *("-J", f"size={_JOURNAL_MIB}", "-E", "root_owner=0:0", "-d", contents, str(path)),
        ]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        path.unlink()
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise ConfigError(f"mkfs.ext4 failed: {said}", next_step="see that the disk has room")
    return identity
