"""Giving up privileges: what the process did not need until now, it cannot do from now on.

Purpose: who takes over the bridge, through QEMU's socket, the vTPM domain's page or
XenStore, or takes over swtpm through a guest's commands, shall find a process that can do
what it already does and hardly anything else.  What is left is a table in
docs/security.md.

Theory of operation.  `confine` is called once, when everything that needs privileges is
open and before the first thread is started: capabilities, no_new_privs and Landlock belong
to a thread, and threads inherit them.  It refuses to work in a process that has several.
In this order: limits; no_new_privs; the bounding set and the securebits; another user;
no capabilities; Landlock; seccomp, which comes last because it forbids all the others.

seccomp's answer to what is not on the list is EPERM, not death: a library that tries
something new then gets an error which it can handle, instead of a guest losing its TPM.
Only a call by another processor's convention kills, because no honest one can come.  clone3
is answered with ENOSYS, since its flags cannot be looked at; libraries then use clone.

What this kernel cannot do is reported, or with `Mode.REQUIRE` refused.

Source: capabilities(7), prctl(2), landlock(7), seccomp(2).
"""

from __future__ import annotations

import enum
import errno
import logging
import os
import resource
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ._shim import ffi, lib
from .errors import ConfigError, LocalProtocolError

log = logging.getLogger(__name__)


class Mode(enum.Enum):
    """How much confinement is asked for."""

    AUTO = "auto"
    """All that this kernel has; what it lacks is said in the log."""
    REQUIRE = "require"
    """All of it, an unprivileged user included, or the program does not start."""
    OFF = "off"


class Access(enum.IntFlag):
    """Landlock's rights on files; <linux/landlock.h> has the same numbers."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ: Final = Access.READ_FILE | Access.READ_DIR
USE_FILE: Final = Access.READ_FILE | Access.WRITE_FILE | Access.TRUNCATE | Access.IOCTL_DEV
KEEP_FILES: Final = READ | USE_FILE | Access.MAKE_REG | Access.REMOVE_FILE

_OF_A_FILE: Final = USE_FILE | Access.EXECUTE
_FILES_OF_ABI_1: Final = Access.REFER - 1
_FILES_BY_ABI: Final = {2: Access.REFER, 3: Access.TRUNCATE, 5: Access.IOCTL_DEV}
_TCP_BIND_AND_CONNECT: Final = 3  # ABI 4
_ABSTRACT_SOCKETS_AND_SIGNALS: Final = 3  # ABI 6

_ALLOW: Final = 0


@dataclass(frozen=True, slots=True)
class Call:
    """A rule about a system call: with `argument`, only where (argument & mask) == value."""

    name: str
    argument: int | None = None
    mask: int = 0
    value: int = 0
    refusal: int = _ALLOW
    """0 allows; otherwise the errno that the caller gets."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a process may still do."""

    calls: Sequence[Call]
    """The first one that applies decides; what none is about is refused with EPERM."""
    paths: Mapping[Path, Access]
    """Trees and files; those that do not exist are passed over."""
    limits: Mapping[int, int] = field(default_factory=dict)
    """RLIMIT_... to the most that may be used; a limit that is lower already stays."""


@dataclass(frozen=True, slots=True)
class User:
    """Whom the process becomes."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Confinement:
    """What was done, for the status document."""

    user: str
    uid: int
    landlock_abi: int | None
    seccomp: bool

    def as_dict(self) -> dict[str, Any]:
        """Return it with the status document's names."""
        return {
            "user": self.user,
            "uid": self.uid,
            "landlock-abi": self.landlock_abi,
            "seccomp": self.seccomp,
        }


def find_user(word: str) -> User:
    """Return the user that `USER[:GROUP]` names, by names or numbers; raises ConfigError."""
    # Imported late: who does not change the user does without.
    import grp
    import pwd

    user, _, group = word.partition(":")
    try:
        entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        if not (user.isdecimal() and group):
            raise ConfigError(
                f"there is no user '{user}'",
                next_step="create it (`systemd-sysusers` makes the package's), "
                "or give numbers as UID:GID",
            ) from None
        entry = None
    try:
        if group:
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        else:
            assert entry is not None
            gid = entry.pw_gid
    except KeyError:
        raise ConfigError(f"there is no group '{group}'") from None
    uid = int(user) if entry is None else entry.pw_uid
    if uid == 0:
        raise ConfigError(
            "--run-as names root", next_step="name a user that owns nothing else on this host"
        )
    groups = (gid,) if entry is None else tuple(os.getgrouplist(entry.pw_name, gid))
    return User(user if entry is None else entry.pw_name, uid, gid, groups)


def check(mode: Mode, user: User | None) -> None:
    """Raise ConfigError where `confine` is sure to: before anything has been opened."""
    if mode is Mode.OFF:
        if user is not None:
            raise ConfigError(
                "--run-as is part of what --confine off switches off",
                next_step="leave one of the two out",
            )
        return
    if user is not None and os.geteuid() not in (0, user.uid):
        raise ConfigError(
            f"this is user {os.geteuid()}, who cannot become {user.name}",
            next_step="start it as root, or without --run-as",
        )
    if mode is Mode.REQUIRE and user is None and os.geteuid() == 0:
        raise ConfigError("--confine require: root would stay root", next_step="give --run-as USER")
    abi = lib.confine_landlock_abi()
    if abi < 0:
        _lacks(mode, f"Landlock ({os.strerror(-abi)})", "files stay open to this user")


def _lacks(mode: Mode, what: str, meaning: str) -> None:
    if mode is Mode.REQUIRE:
        raise ConfigError(
            f"--confine require: this kernel has no {what}",
            next_step="use a kernel that has it, or --confine auto",
        )
    log.warning("not confined by %s: this kernel has none; %s", what, meaning)


def confine(
    policy: Policy, mode: Mode, user: User | None, root: Path | None = None
) -> Confinement | None:
    """Give up everything but what the policy allows; None with `Mode.OFF`.

    With a user and `root` that directory becomes the process' root.  Cannot be undone.
    Raises ConfigError where something cannot be had: the process is then partly confined and
    should end.
    """
    if mode is Mode.OFF:
        return None
    threads = lib.confine_threads()
    if threads < 0:
        # Without /proc nobody can count, which is no reason to keep any privilege.
        if mode is Mode.REQUIRE:
            raise ConfigError("/proc is not there: this process' threads cannot be counted")
        log.warning("/proc is not there: a thread that was there before is not confined")
    elif threads != 1:
        raise LocalProtocolError(f"{threads} threads cannot be confined together")
    with ExitStack() as stack:
        # Found while everything can be: the new user may not even see them.
        paths = _open_paths(policy.paths, stack)
        _set_limits(policy.limits)
        _ensure("no_new_privs", lib.confine_no_new_privs())
        _become(user, root)
        landlock_abi = _restrict_files(paths, mode)
    seccomp = _restrict_calls(policy.calls, mode)
    done = Confinement(user.name if user else "", os.geteuid(), landlock_abi, seccomp)
    log.info(
        "confined: uid %d, no capabilities, Landlock %s, seccomp %s",
        done.uid,
        landlock_abi or "missing",
        "on" if seccomp else "missing",
    )
    return done


def _ensure(what: str, status: int) -> None:
    if status < 0:
        raise ConfigError(
            f"this process cannot be confined: {what}: {os.strerror(-status)}",
            next_step="see docs/security.md, or give --confine off",
        )


def _set_limits(limits: Mapping[int, int]) -> None:
    for which, most in limits.items():
        _, hard = resource.getrlimit(which)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (least, least))


def _become(user: User | None, root: Path | None) -> None:
    status = lib.confine_lock_capabilities()
    if status != -errno.EPERM:  # without privileges there are none to lock
        _ensure("capabilities", status)
    if user is not None and (os.geteuid(), os.getegid()) != (user.uid, user.gid):
        try:
            if root is not None:
                os.chroot(root)
                os.chdir("/")
            os.setgroups(user.groups)
            os.setresgid(user.gid, user.gid, user.gid)
            os.setresuid(user.uid, user.uid, user.uid)
        except OSError as error:
            raise ConfigError(
                f"this process cannot become {user.name}"
                f"{f' in {root}' if root else ''}: {error.strerror}",
                next_step="start it as root with CAP_SETUID and CAP_SETGID, "
                "or as that user without --run-as",
            ) from error
    _ensure("capabilities", lib.confine_drop_capabilities())


# Landlock.


def _open_paths(paths: Mapping[Path, Access], stack: ExitStack) -> list[tuple[int, Access]]:
    """Return descriptors of what is there, with the rights that it can have."""
    found = []
    for path, rights in paths.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        stack.callback(os.close, fd)
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        found.append((fd, rights if is_directory else rights & _OF_A_FILE))
    return found


def _restrict_files(paths: Iterable[tuple[int, Access]], mode: Mode) -> int | None:
    """Return the version of Landlock that is in force, None where there is none."""
    abi = lib.confine_landlock_abi()
    if abi < 0:
        if mode is Mode.REQUIRE:
            _lacks(mode, "Landlock", "")
        return None
    files = Access(_FILES_OF_ABI_1)
    for since, right in _FILES_BY_ABI.items():
        files |= right if abi >= since else Access(0)
    handled = [
        files,
        _TCP_BIND_AND_CONNECT if abi >= 4 else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0,
    ]
    rules = [(fd, rights & files) for fd, rights in paths if rights & files]
    table = ffi.new("struct confine_path[]", rules)
    _ensure("Landlock", lib.confine_landlock(handled, table, len(rules)))
    return int(abi)


# seccomp.


def _restrict_calls(calls: Iterable[Call], mode: Mode) -> bool:
    """Return whether the kernel looks at system calls from now on."""
    rules = [rule for call in calls for rule in _rule(call)]
    status = lib.confine_seccomp(ffi.new("struct confine_rule[]", rules), len(rules))
    if status in (-errno.ENOSYS, -errno.EINVAL):
        _lacks(mode, "seccomp filter", "every system call stays open to this process")
        return False
    _ensure("seccomp", status)
    return True


def _rule(call: Call) -> list[dict[str, int]]:
    """Return the rule for the shim; none for a call that this processor does not have."""
    number = lib.confine_syscall(call.name.encode())
    if number == -errno.EINVAL:
        raise LocalProtocolError(f"'{call.name}' is no system call that the shim knows")
    if number < 0:
        return []
    return [
        {
            "number": number,
            "argument": lib.CONFINE_ANY if call.argument is None else call.argument,
            "mask": call.mask,
            "value": call.value,
            "refusal": call.refusal,
        }
    ]
