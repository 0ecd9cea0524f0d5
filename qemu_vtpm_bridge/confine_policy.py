"""What a bridge, its broker and a vTPM domain's program may still do once they run.

Theory of operation.  Both lists were found by watching the programs (strace) through start,
commands, resets, reconnections and the end, on CPython 3.11 and glibc 2.36; names of calls that
other versions use in the same places were added.  `docs/security.md` shows what is left in words.

A bridge needs no files but its own code, starts no program and makes no connection but to
unix sockets.  A vTPM domain's program starts swtpm again whenever that dies, so it may start
programs, but Landlock lets it start swtpm, setpriv and their loader only; swtpm then lives
under the same rules and puts a filter of its own on top.  Whoever is allowed to run the
loader could have it load any file that may be read, so nothing that may be read is a program
of use: the trees below are libraries and Python's own.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import trio

from . import _shim
from .confine import KEEP_FILES, READ, USE_FILE, Access, Call, Policy
from .errors import ConfigError

_BOTH: Final = """
    read write readv writev pread64 pwrite64 lseek close fstat newfstatat lstat stat
    open openat getdents64 readlink readlinkat access faccessat faccessat2 getcwd
    unlink unlinkat dup dup2 dup3 pipe pipe2
    brk munmap mremap madvise
    futex get_robust_list set_robust_list rseq sched_yield sched_getaffinity gettid getpid
    membarrier exit exit_group restart_syscall
    rt_sigaction rt_sigprocmask rt_sigpending rt_sigreturn rt_sigsuspend rt_sigtimedwait sigaltstack
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrandom
    poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2
    connect accept accept4 recvfrom recvmsg sendto sendmsg shutdown
    getsockname getpeername getsockopt setsockopt
    uname sysinfo getuid geteuid getgid getegid getresuid getresgid getgroups getppid getpgid
    getpgrp getsid getrusage getrlimit umask
"""

_VTPM: Final = """
    execve vfork wait4 waitid pidfd_open pidfd_send_signal kill setsid set_tid_address arch_prctl
    prctl seccomp capget capset
    ftruncate truncate fsync fdatasync flock mkdir mkdirat rename renameat renameat2 rmdir
    chmod fchmod fchmodat utimensat fallocate statfs fstatfs fadvise64 chdir fchdir close_range
    sendmmsg recvmmsg setpriority getpriority mlock timerfd_create timerfd_settime
"""

_AF_UNIX: Final = 1
_PROT_WRITE: Final = 2
_PROT_EXEC: Final = 4
_CLONE_VM: Final = 0x100
_CLONE_THREAD: Final = 0x10000
_CLONE_NEW: Final = 0x7E020000
"""All namespaces that clone can make; CLONE_NEWTIME exists in clone3 and unshare only."""
_PR_SET_NAME: Final = 15
_SIGNALS_BY_DESCRIPTOR: Final = (8, 10, 15)
"""fcntl's F_SETOWN, F_SETSIG and F_SETOWN_EX: any signal for any process of this user."""
_WORD: Final = 0xFFFFFFFF
_IOCTLS: Final = (
    0x5401,  # TCGETS: is it a terminal?
    0x5421,  # FIONBIO
    0x5450,  # FIONCLEX
    0x5451,  # FIOCLEX
    0x541B,  # FIONREAD
)
_IOCTL_TYPE: Final = 0xFF00
_EVTCHN_IOCTLS: Final = ord("E") << 8
_GRANT_IOCTLS: Final = ord("G") << 8
"""All that gntalloc and gntdev have."""

_FRONTENDS_EVTCHN_IOCTLS: Final = (
    0x00044502,  # IOCTL_EVTCHN_BIND_UNBOUND_PORT
    0x00044503,  # IOCTL_EVTCHN_UNBIND
    0x00044504,  # IOCTL_EVTCHN_NOTIFY
)
_EVTCHN_BIND_INTERDOMAIN: Final = 0x00084501
"""IOCTL_EVTCHN_BIND_INTERDOMAIN: a device model binds its guest's ports.  Source: Linux'
include/uapi/xen/evtchn.h."""

_PRIVCMD_IOCTLS: Final = (
    0x00105005,  # IOCTL_PRIVCMD_DM_OP
    0x00205004,  # IOCTL_PRIVCMD_MMAPBATCH_V2
    0x00205007,  # IOCTL_PRIVCMD_MMAP_RESOURCE
)
"""What a device model needs of /dev/xen/privcmd; not hypercalls of its own choice.  Source:
Linux' include/uapi/xen/privcmd.h, sizes of a 64-bit machine."""

_BROKERS_IOCTLS: Final = (
    0x00025006,  # IOCTL_PRIVCMD_RESTRICT
    0x00024506,  # IOCTL_EVTCHN_RESTRICT_DOMID
    0x5411,  # SIOCOUTQ, of a socket: is what was sent still there?
)

_LIBRARIES: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_TIME_ZONES: Final = ("/etc/localtime", "/usr/share/zoneinfo")
_XENBUS: Final = "/dev/xen/xenbus"
_XEN_DEVICES: Final = ("/dev/xen/evtchn", "/dev/xen/gntalloc", "/dev/xen/gntdev", _XENBUS)
"""Of grants and event channels, and of XenStore."""

_MIB: Final = 1 << 20
_LIMITS: Final = {
    # A core holds the guest's secrets.  With 0 the kernel still gives it to a program that
    # kernel.core_pattern names; 1 keeps it from both (Linux' fs/coredump.c).
    resource.RLIMIT_CORE: 1,
    resource.RLIMIT_NOFILE: 512,
    # Threads of all processes of this user count, and one user may run every guest's bridge.
    resource.RLIMIT_NPROC: 4096,
    resource.RLIMIT_MEMLOCK: _MIB,
    resource.RLIMIT_MSGQUEUE: 0,
}
_VTPM_FILE_MAX_BYTES: Final = 64 * _MIB
"""swtpm's state has some hundred KiB."""


def bridge_policy(*, sockets: Iterable[Path], device_model: bool = False) -> Policy:
    """Return what a bridge may do; `sockets` are paths that it removes at its end.

    With `device_model` it may also be a guest's device, through devices that are open.
    """
    calls = [
        *_everybodys_calls(),
        *_calls_of_xens(_FRONTENDS_EVTCHN_IOCTLS),
        Call("ioctl", 1, _IOCTL_TYPE, _GRANT_IOCTLS),
        # Threads, and no processes.
        Call("clone", 0, _CLONE_THREAD | _CLONE_VM | _CLONE_NEW, _CLONE_THREAD | _CLONE_VM),
        Call("prctl", 0, _WORD, _PR_SET_NAME),
        Call("tgkill", 0, _WORD, os.getpid()),
        Call("prlimit64", 0, _WORD, 0),
    ]
    if device_model:
        calls += _calls_of_xens((*_PRIVCMD_IOCTLS, _EVTCHN_BIND_INTERDOMAIN))
    paths = _everybodys_paths() | dict.fromkeys(map(Path, _XEN_DEVICES), USE_FILE)
    for path in sockets:
        paths[path.parent] = paths.get(path.parent, Access(0)) | Access.REMOVE_FILE
    return Policy(calls, paths, _limits())


def broker_policy(*, device_model: bool = False) -> Policy:
    """Return what a bridge's broker may do: carry messages, and restrict Xen's devices.

    It stays root, whose devices and sockets it opens, but has no capabilities.
    """
    calls = [
        *_everybodys_calls(),
        Call("prctl", 0, _WORD, _PR_SET_NAME),
        Call("tgkill", 0, _WORD, os.getpid()),
    ]
    paths = _everybodys_paths()
    paths[Path(_XENBUS)] = USE_FILE
    if device_model:
        calls += _calls_of_xens(_BROKERS_IOCTLS)
        for name in ("privcmd", "evtchn"):
            paths[Path("/dev/xen", name)] = USE_FILE
    return Policy(calls, paths, _limits())


def vtpm_policy(*, state_dir: Path, swtpm: str, sockets: Iterable[Path]) -> Policy:
    """Return what a vTPM domain's program and its swtpm may do.

    Raises ConfigError where `swtpm` is not a program that the kernel itself can start.
    """
    calls = [
        *_everybodys_calls(),
        *(Call("ioctl", 1, _IOCTL_TYPE, kind) for kind in (_EVTCHN_IOCTLS, _GRANT_IOCTLS)),
        *(Call(name) for name in _VTPM.split()),
        Call("clone", 0, _CLONE_NEW, 0),
        Call("fork"),
        Call("tgkill"),
        Call("prlimit64"),
    ]
    paths = _everybodys_paths() | dict.fromkeys(map(Path, _XEN_DEVICES), USE_FILE)
    for path in sockets:
        paths[path.parent] = paths.get(path.parent, Access(0)) | Access.REMOVE_FILE
    paths[state_dir] = paths.get(state_dir, Access(0)) | KEEP_FILES
    for program in _programs(swtpm):
        paths[program] = paths.get(program, Access(0)) | Access.EXECUTE | Access.READ_FILE
    for name in ("/etc/ssl", "/etc/ld.so.cache", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group"):
        paths[Path(name)] = READ
    return Policy(calls, paths, _limits() | {resource.RLIMIT_FSIZE: _VTPM_FILE_MAX_BYTES})


def _everybodys_calls() -> list[Call]:
    return [
        *(Call(name) for name in _BOTH.split()),
        *(Call("fcntl", 1, _WORD, n, refusal=errno.EPERM) for n in _SIGNALS_BY_DESCRIPTOR),
        Call("fcntl"),
        # Its flags are in memory, where a filter cannot look; ENOSYS brings callers to clone.
        Call("clone3", refusal=errno.ENOSYS),
        Call("socket", 0, _WORD, _AF_UNIX),
        Call("socketpair", 0, _WORD, _AF_UNIX),
        # No memory that is written to and then run, nor made runnable.
        Call("mprotect", 2, _PROT_EXEC, 0),
        Call("mmap", 2, _PROT_EXEC, 0),
        Call("mmap", 2, _PROT_WRITE, 0),
        *(Call("ioctl", 1, _WORD, number) for number in _IOCTLS),
    ]


def _calls_of_xens(ioctls: Iterable[int]) -> list[Call]:
    return [Call("ioctl", 1, _WORD, number) for number in ioctls]


def _everybodys_paths() -> dict[Path, Access]:
    code = [Path(file).parent for file in (os.__file__, __file__, _shim.__file__)]
    installed = Path(trio.__file__).parent.parent
    trees: list[str | Path] = [*_LIBRARIES, *code, installed, *_TIME_ZONES]
    paths: dict[Path, Access] = {Path(tree).resolve(): READ for tree in trees}
    paths[Path("/dev/null")] = USE_FILE
    paths[Path("/dev/urandom")] = Access.READ_FILE
    return paths


def _limits() -> dict[int, int]:
    return dict(_LIMITS)


# Programs that may be started.


def _programs(swtpm: str) -> list[Path]:
    """Return swtpm, what starts it, and their loaders."""
    found = shutil.which(swtpm)
    if found is None:
        return []  # starting it will say so
    setpriv = shutil.which("setpriv")
    programs = [Path(name).resolve() for name in (found, setpriv) if name]
    loaders = [_loader(program) for program in programs]
    return [*programs, *(loader for loader in loaders if loader is not None)]


def _loader(program: Path) -> Path | None:
    """Return the interpreter that an ELF program names; raises ConfigError for other files."""
    raw = program.read_bytes()
    if raw[:4] != b"\x7fELF":
        raise ConfigError(
            f"{program} is a script, and a confined program may start no shell",
            next_step="name swtpm itself with --swtpm, or give --confine off",
        )
    if raw[4] != 2:
        return None  # of 32 bits: not this kernel's own kind
    order = "<" if raw[5] == 1 else ">"
    (table,) = struct.unpack_from(order + "Q", raw, 32)
    size, count = struct.unpack_from(order + "HH", raw, 54)
    for at in range(table, table + size * count, size):
        kind, _, offset = struct.unpack_from(order + "IIQ", raw, at)
        if kind == 3:  # PT_INTERP
            (length,) = struct.unpack_from(order + "Q", raw, at + 32)
            return Path(os.fsdecode(raw[offset : offset + length - 1])).resolve()
    return None
