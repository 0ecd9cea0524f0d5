"""Where QEMU connects: unix sockets, inherited ones, systemd's, and a TCP pair.

Theory of operation.  The socket is bound before anything slow is imported, since QEMU
connects once, does not try again, and may start at the same moment.  A connection that
comes early waits in the backlog.  This module therefore uses nothing but the standard
library, and knows nothing of trio.

Source: swtpm(8) for the forms; sd_listen_fds(3).
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import ConfigError

SYSTEMD_FIRST_FD: Final = 3
_PATH_MAX_BYTES: Final = 107
_BACKLOG: Final = 16
_GRAMMAR: Final = "PATH[,mode=0600][,owner=USER[:GROUP]] | fd=N | systemd | tcp=PORT[,bind=ADDR]"


@dataclass
class Listener:
    """Bound sockets, and what to clean up."""

    control: socket.socket
    """Listens for control connections, or is one where `connected`."""
    data: socket.socket | None = None
    """TCP only: listens for data connections."""
    connected: bool = False
    path: Path | None = None

    def close(self) -> None:
        """Close the sockets and remove the path that was bound.  Safe to call twice."""
        self.control.close()
        if self.data is not None:
            self.data.close()
        if self.path is not None:
            remove_path(self.path)
            self.path = None


def open_listener(spec: str) -> Listener:
    """Return the sockets that `spec` names; see `--socket` in the command's help.

    Raises ConfigError, which says what cannot be used and why.
    """
    word, *rest = spec.split(",")
    options = {}
    for item in rest:
        name, equals, value = item.partition("=")
        if not equals or name in options:
            raise _not_a_socket(spec)
        options[name] = value
    if word == "systemd":
        _no_more(spec, options)
        return _from_systemd()
    if match := re.fullmatch(r"fd=(\d+)", word):
        _no_more(spec, options)
        return _inherited(int(match[1]))
    if match := re.fullmatch(r"tcp=(\d+)", word):
        address = options.pop("bind", "127.0.0.1")
        _no_more(spec, options)
        return _tcp(int(match[1]), address)
    mode = options.pop("mode", "0600")
    owner = options.pop("owner", "")
    _no_more(spec, options)
    if not word or not re.fullmatch(r"[0-7]{3,4}", mode):
        raise _not_a_socket(spec)
    return Listener(bind_unix(Path(word), int(mode, 8), owner), path=Path(word))


def _not_a_socket(spec: str) -> ConfigError:
    return ConfigError(f"'{spec}' names no socket", next_step=f"use {_GRAMMAR}")


def _no_more(spec: str, options: dict[str, str]) -> None:
    if options:
        raise _not_a_socket(spec)


# Unix sockets.


def remove_path(path: Path) -> None:
    """Remove a socket's path, where this user still may; else the next start replaces it."""
    with suppress(FileNotFoundError, PermissionError):
        path.unlink()


def bind_unix(path: Path, mode: int, owner: str = "") -> socket.socket:
    """Return a listening unix socket at `path`, with permissions and owner set.

    A socket that nobody listens at is replaced.  Raises ConfigError where somebody
    does, where something else is there, and where it cannot be made.
    """
    if len(os.fsencode(path)) > _PATH_MAX_BYTES:
        raise ConfigError(
            f"{path}: a unix socket's path has at most {_PATH_MAX_BYTES} bytes",
            next_step="use a shorter one, as in /run",
        )
    uid, gid = _ids(owner)
    _make_room(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _directory(path.parent) as directory:
            # Under another name first: who waits for the path may connect as soon as it is
            # there, and nobody may before the owner and the mode are right.
            passing = f"{path.name}.new"
            name = str(path.with_name(passing))
            if len(os.fsencode(name)) > _PATH_MAX_BYTES:
                name = f"/proc/self/fd/{directory}/{passing}"
            try:
                mask = os.umask(0o177)
                try:
                    listener.bind(name)
                finally:
                    os.umask(mask)
                if owner:
                    os.chown(passing, uid, gid, dir_fd=directory)
                os.chmod(passing, mode, dir_fd=directory)
                listener.listen(_BACKLOG)
                os.rename(passing, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                with suppress(FileNotFoundError):
                    os.unlink(passing, dir_fd=directory)
                raise
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{path}: {error.strerror}", next_step="does its directory exist, and may we write it?"
        ) from error
    return listener


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_room(path: Path) -> None:
    try:
        found = path.lstat()
    except OSError:
        return  # nothing there, or binding will say what is wrong
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path} is there and is no socket", next_step="give another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(str(path))
    if result != errno.ECONNREFUSED:
        raise ConfigError(
            f"another program listens on {path}",
            next_step="stop it, or give another path",
        )


def _ids(owner: str) -> tuple[int, int]:
    """Return the user and group ids that `USER[:GROUP]` names, -1 for what it leaves out."""
    # Imported late: few name an owner, and every bridge would carry them.
    import grp
    import pwd

    user, _, group = owner.partition(":")
    try:
        uid = -1 if not user else int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        gid = -1 if not group else int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"there is no user or group '{owner}'") from None
    return uid, gid


# Inherited sockets.


def _inherited(fd: int) -> Listener:
    try:
        found = socket.socket(fileno=os.dup(fd))
        listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    except OSError as error:
        raise ConfigError(
            f"descriptor {fd} is no socket: {error.strerror}",
            next_step="pass a listening or connected unix socket to this program",
        ) from error
    if found.family != socket.AF_UNIX or found.type != socket.SOCK_STREAM:
        raise ConfigError(f"descriptor {fd} is no unix stream socket")
    os.close(fd)
    return Listener(found, connected=not listening)


def _from_systemd() -> Listener:
    count = os.environ.get("LISTEN_FDS", "0")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count != "1":
        raise ConfigError(
            f"systemd passed {count} sockets to this process, one is needed",
            state="LISTEN_PID and LISTEN_FDS say so",
            next_step="start it through a .socket unit with one ListenStream=",
        )
    return _inherited(SYSTEMD_FIRST_FD)


# TCP.


def _tcp(port: int, address: str) -> Listener:
    """Bind the data port and, one above it, the control port, as tcti-swtpm expects."""
    sockets = []
    for number in (port, port + 1):
        try:
            sockets.append(socket.create_server((address, number), backlog=_BACKLOG))
        except (OSError, OverflowError) as error:
            for opened in sockets:
                opened.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"TCP port {number} at {address}: {reason}") from error
    return Listener(control=sockets[1], data=sockets[0])
