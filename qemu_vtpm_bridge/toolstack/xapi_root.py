"""The directory that a guest's TPM process is shut into under xapi, and what is left outside.

Theory of operation.  xenopsd makes a directory for each TPM, and has the TPM's process go into
it by chroot(2) as a user of its own.  A bridge goes there by `run --chroot --run-as`, once it
has all of Xen open; what it needs again later it has from its broker, so that the directory
holds no devices.  It belongs to the user, who makes and removes its own files there.

Before that the process leaves the namespaces for networks, for System V IPC and for mounts, as
xenopsd's wrapper has swtpm do.

Who may lie: nobody before the directory is entered.

Source: chroot(2), unshare(2); xen-api's swtpm-wrapper.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from pathlib import Path
from typing import Final

from ..errors import ConfigError, LocalProtocolError

log = logging.getLogger(__name__)

FILE_SIZE_MAX_BYTES: Final = 256 << 10
"""As in xenopsd's wrapper; what a bridge writes is its pid file."""

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWNET: Final = 0x40000000


def give_directory(root: Path, uid: int) -> None:
    """Give a directory to the user `uid`; raises ConfigError where it cannot be."""
    try:
        # xenopsd looks in here as root; the process makes and removes its own files.
        os.chown(root, uid, uid)
    except OSError as error:
        raise ConfigError(
            f"{root}: {error.strerror}",
            state="the TPM's process needs it",
            next_step="xenopsd makes it; call this as root, or with --priv",
        ) from error


def leave_namespaces() -> None:
    """Leave the shared namespaces, and limit the size of files.

    Where the system does not let us, that is said and no more: they are a second line.
    Raises LocalProtocolError where there is another thread, which would stay where it is.
    """
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise LocalProtocolError("a thread was started before the namespaces were left")
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE_MAX_BYTES, FILE_SIZE_MAX_BYTES))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWNET) != 0:
        log.warning("the namespaces stay shared: %s", os.strerror(ctypes.get_errno()))
