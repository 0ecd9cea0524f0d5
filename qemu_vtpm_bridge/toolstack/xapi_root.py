"""The directory that a guest's TPM process is shut into under xapi: furnished and entered.

Theory of operation.  xenopsd makes a directory for each TPM, on a file system that allows
device nodes, and has the TPM's process go into it by chroot(2) as a user of its own.  A
bridge needs more there than swtpm does: the Xen devices for a new page and port when its
vTPM domain was restarted, and XenStore, which it reaches in there by its device.  So nodes
for these are made in the directory, owned by the user; an embedded Xen, on a machine without
Xen, is bound to the same path inside.  What Python and the linker load late is loaded before.

The process also leaves the namespaces for networks, for System V IPC and, so that what is
bound is seen by nobody else, for mounts.

A process in there still holds domain 0's XenStore and may map what vTPM domains grant; see
docs/guides/xapi.md.  Who may lie: nobody before the directory is entered.

Source: chroot(2), unshare(2), mount(2), setresuid(2); xen-api's swtpm-wrapper.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import logging
import os
import pkgutil
import resource
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from ..errors import ConfigError, LocalProtocolError

log = logging.getLogger(__name__)

XEN_NODES: Final = ("evtchn", "gntalloc", "gntdev", "xenbus")
"""Below /dev/xen: for ports, for pages that are granted and mapped, for XenStore."""

FILE_SIZE_MAX_BYTES: Final = 256 << 10
"""As in xenopsd's wrapper; what a bridge writes is its pid file."""

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWNET: Final = 0x40000000
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_URANDOM: Final = (1, 9)

_NOT_A_BRIDGES: Final = ("__main__", "demo", "embedded", "vtpm")
"""What of this package a bridge never loads."""

_LATE_MODULES: Final = ("gc", "grp", "importlib", "json", "pwd", "tomllib", "trio", "traceback")
"""What functions of this package load when they are called; a test compares."""


_LATE_LIBRARIES: Final = ("xentoollog", "xengnttab", "xenevtchn")


def furnish(root: Path, uid: int, *, dev: Path = Path("/dev")) -> None:
    """Make in `root` what a bridge needs there, for the user `uid`.

    Raises ConfigError where it cannot be.  It can be done again.
    """
    try:
        for directory in (root / "dev", root / "dev/xen"):
            directory.mkdir(mode=0o755, exist_ok=True)
        _node(root / "dev/urandom", os.makedev(*_URANDOM), 0o444, 0)
        for name in XEN_NODES:
            with suppress(FileNotFoundError):
                found = (dev / "xen" / name).stat()
                if stat.S_ISCHR(found.st_mode):
                    _node(root / "dev/xen" / name, found.st_rdev, 0o600, uid)
        # xenopsd looks in here as root; the process makes and removes its own files.
        os.chown(root, uid, uid)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or root}: {error.strerror}",
            state="what the TPM's process needs in its directory could not be made",
            next_step=f"is {root} there, and on a file system without nodev and noexec?",
        ) from error


def _node(path: Path, device: int, mode: int, uid: int) -> None:
    if path.is_char_device() and path.stat().st_rdev != device:
        path.unlink()  # the kernel gives these numbers anew at each boot
    if not path.exists():
        os.mknod(path, mode | stat.S_IFCHR, device)
    os.chown(path, uid, uid)
    path.chmod(mode)


def leave_namespaces(root: Path | None, world: Path | None) -> None:
    """Leave the shared namespaces, and bind an embedded Xen to its own path in `root`.

    Where the system does not let us, that is said and no more: they are a second line.
    Raises ConfigError where an embedded Xen cannot be bound, and LocalProtocolError where
    there is another thread, which would stay where it is.
    """
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise LocalProtocolError("a thread was started before the directory was entered")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWNET) != 0:
        log.warning("the namespaces stay shared: %s", os.strerror(ctypes.get_errno()))
    if root is None or world is None:
        return
    place = root / world.relative_to("/")
    place.mkdir(parents=True, exist_ok=True)
    for source, target, flags in (
        (b"none", b"/", _MS_REC | _MS_PRIVATE),
        (os.fsencode(world), os.fsencode(place), _MS_BIND),
    ):
        if libc.mount(source, target, None, ctypes.c_ulong(flags), None) != 0:
            raise ConfigError(
                f"{world} cannot be bound to {place}: {os.strerror(ctypes.get_errno())}",
                next_step="call it with --priv, which leaves the directory alone",
            )


def load_all() -> None:
    """Load what a bridge would load later, and could not from inside."""
    package = importlib.import_module(__package__.rpartition(".")[0])
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.split(".")[1] not in _NOT_A_BRIDGES:
            importlib.import_module(found.name)
    for name in _LATE_MODULES:
        importlib.import_module(name)
    for name in _LATE_LIBRARIES:
        library = ctypes.util.find_library(name)
        if library is not None:
            ctypes.CDLL(library)


def enter(root: Path | None, uid: int) -> None:
    """Go into `root`, and become the user `uid`, in the group of the same number, for good.

    Raises ConfigError where that is not possible.
    """
    try:
        if root is not None:
            os.chroot(root)
            os.chdir("/")
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE_MAX_BYTES, FILE_SIZE_MAX_BYTES))
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise ConfigError(
            f"this process cannot go into {root} as user {uid}: {error.strerror}",
            next_step="call it as root, or with --priv",
        ) from error
