"""Has what swtpm writes be on the disk before it answers.

Purpose: what the TPM acknowledged is there after a power cut: of the host, or of a vTPM
domain that `xl destroy` ends with its page cache.

Theory of operation.  swtpm writes a state file aside, in one write, closes it and renames it
over the old one.  So a state is never torn, and nothing is lost when the process dies.  But
swtpm before 0.9 never calls fsync, and the kernel writes when it likes, on ext4 some seconds
later.  A counter that goes back by that is what a counter is there to prevent.  The cure
needs no other swtpm: a directory with the attributes S and D (chattr(1)) makes each write
and each rename in it synchronous, and what is created in it inherits S.

Not every file system has them: ext2 to ext4, XFS and btrfs do.  Of the others, tmpfs has
nothing to keep, and for the rest the caller says what they do not promise.

Source: Linux, ioctl_iflags(2); ext4's inheritance in fs/ext4/ialloc.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_SYNC_FL: Final = 0x8
FS_DIRSYNC_FL: Final = 0x10000

_UNKNOWN: Final = (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ENOSYS)
"""How file systems say that they do not have these attributes."""

_FLAGS: Final = struct.Struct("=I")


def make_synchronous(directory: Path) -> bool:
    """Have every later write in this directory be on the disk before it returns.

    Returns False where the file system cannot.  Raises OSError where the directory cannot
    be opened, or the disk fails.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = attributes(descriptor)
        wanted = found | FS_SYNC_FL | FS_DIRSYNC_FL
        if found != wanted:  # else only its owner might ask for what is so already
            fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, _FLAGS.pack(wanted))
    except OSError as error:
        if error.errno in _UNKNOWN:
            return False
        raise
    finally:
        os.close(descriptor)
    return True


def attributes(descriptor: int) -> int:
    """Return the attributes of an open file or directory, as FS_..._FL."""
    raw = fcntl.ioctl(descriptor, FS_IOC_GETFLAGS, _FLAGS.pack(0))
    return int(_FLAGS.unpack(raw)[0])
