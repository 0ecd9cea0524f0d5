"""A directory on a disk that has room for names and for no contents."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.libvirt import may_have_namespaces

FILLER = "filler"

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not may_have_namespaces(),
    reason="chroot, other users and mounts are for a root who may have them",
)


@contextmanager
def full_disk(root: Path) -> Iterator[Path]:
    """Have a directory lie on a full disk; give the file to remove for there to be room."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size=64k,mode={root.stat().st_mode & 0o777:o}".encode()
    assert libc.mount(b"none", os.fsencode(root), b"tmpfs", 0, options) == 0, ctypes.get_errno()
    try:
        yield fill(root)
    finally:
        detach = 2  # MNT_DETACH
        assert libc.umount2(os.fsencode(root), detach) == 0, ctypes.get_errno()


def fill(root: Path) -> Path:
    """Take all the room there is; return the file that holds it."""
    filler = root / FILLER
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return filler
