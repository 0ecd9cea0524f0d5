"""The host that the doctor looks at: its files, and what the checks learn of it on the way.

Theory of operation.  A `Host` reads files below a root directory, `/` unless a test says
otherwise, bounded in size and never waiting for one that is a pipe.  A `Case` is what was
asked for and what the checks have learned so far: later ones need to know whether this is
domain 0, or which vtpm devices there are.  It also spells commands, so that those printed
go to the same XenStore as the doctor did.

Nothing here changes anything.  Who may lie: whoever may write the files; a reader gets
what is there, bounded.
"""

from __future__ import annotations

import enum
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from ..xen.store import default_path
from .doctor_report import shell

if TYPE_CHECKING:
    from .attach import Entry
    from .doctor_devices import Device

T = TypeVar("T")

FILE_MAX_BYTES: Final = 1 << 22
"""More than any file that is read here; modules.alias has one or two megabytes."""

RUN_DIR: Final = Path("/run/qemu-vtpm-bridge")
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,63}")


class Role(enum.Enum):
    """What this host is to do."""

    DOM0 = "dom0"
    """It runs bridges and QEMU, or is a stub domain that does."""
    VTPM = "vtpm"
    """It is a vTPM domain."""
    ANY = "any"
    """As a command-line word: find out.  As what was found: without Xen."""


class Host:
    """The files of a machine."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Return where the file of this absolute name is."""
        return self.root / name.lstrip("/")

    def read(self, name: str) -> str | None:
        """Return a file's text, or None where there is none that may be read."""
        raw = self.read_bytes(name)
        return None if raw is None else raw.decode("utf-8", "backslashreplace")

    def read_bytes(self, name: str) -> bytes | None:
        """Return a regular file's first FILE_MAX_BYTES, or None; never waits for a pipe."""
        try:
            descriptor = os.open(self.path(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return None
            raw = bytearray()
            while len(raw) < FILE_MAX_BYTES and (more := os.read(descriptor, 65536)):
                raw += more
            return bytes(raw)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def names(self, directory: str) -> list[str]:
        """Return the names in a directory in order, none where there is no such directory."""
        try:
            return names_in(self.path(directory))
        except OSError:
            return []

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return self.path(name).exists()

    def stat(self, name: str) -> os.stat_result | None:
        """Return what is known of a file, or None where there is none."""
        try:
            return self.path(name).stat()
        except OSError:
            return None

    def may_use(self, name: str) -> bool:
        """Return whether this process may read and write a file."""
        return os.access(self.path(name), os.R_OK | os.W_OK)

    @property
    def kernel(self) -> str:
        """The running kernel's release, as its modules' directory is named."""
        return (self.read("/proc/sys/kernel/osrelease") or "").strip()


@dataclass
class Case:
    """What was asked for, and what has been learned."""

    host: Host
    wanted: Role = Role.ANY
    guest: str | None = None
    run_dir: Path = RUN_DIR
    embedded: Path | None = None
    domid: int | None = None
    qemu: tuple[Path, ...] = ()

    # Learned by the checks, in their order.
    on_xen: bool = False
    xen_version: tuple[int, int] | None = None
    control_domain: bool | None = None
    """Whether Xen says that this is domain 0; None where nobody said."""
    store_answers: bool = False
    own_domid: int | None = None
    entries: list[Entry] = field(default_factory=list)
    """All devices that XenStore shows."""
    devices: list[Device] = field(default_factory=list)
    """Those that were looked at."""
    known_frontends: set[str] = field(default_factory=set)
    """Frontend directories of which something has been said."""

    @property
    def role(self) -> Role:
        """What this host is to be looked at as; ANY stands for a machine without Xen."""
        if self.wanted is not Role.ANY:
            return self.wanted
        if self.embedded is not None:
            return Role.VTPM if self.domid else Role.DOM0
        if not self.on_xen:
            return Role.ANY
        if self.control_domain is None:
            return Role.VTPM if self.own_domid else Role.DOM0
        return Role.DOM0 if self.control_domain else Role.VTPM

    @property
    def real_xen(self) -> bool:
        """Whether the machine's own Xen is meant, and is or should be there."""
        return self.embedded is None and (self.on_xen or self.wanted is not Role.ANY)

    @property
    def sees_all(self) -> bool:
        """Whether XenStore shows this domain the others' entries: it does so for domain 0."""
        return self.role is not Role.VTPM and not self.own_domid

    @property
    def door(self) -> str:
        """Where XenStore is reached."""
        if self.embedded is not None:
            return str(self.embedded / "dom" / str(self.domid or 0) / "xenstored.sock")
        if self.host.root == Path("/"):
            return default_path()
        socket = self.host.path("/run/xenstored/socket")
        return str(socket if socket.exists() else self.host.path("/dev/xen/xenbus"))

    def ours(self, command: str, *words: str | Path, domid: int | None = None) -> str:
        """Return one of this program's commands, for the same Xen.

        `domid` is for a command that runs in another domain: of the embedded Xen it has to
        be told which; on a real one it is run there.
        """
        place: list[str | Path] = []
        if self.embedded is not None:
            place = ["--embedded", self.embedded]
            if domid is not None:
                place += ["--domid", str(domid)]
        return shell("qemu-vtpm-bridge", command, *place, *words)

    def xenstore(self, tool: str, *words: str) -> str:
        """Return a command of the stock XenStore tools, for the same XenStore."""
        line = shell(f"xenstore-{tool}", *words)
        if self.embedded is None and self.host.root == Path("/"):
            return line
        return f"XENSTORED_PATH={shell(self.door)} {line}"

    def sockets_of(self, name: str) -> tuple[Path, Path]:
        """Return where a guest's socket and its bridge's status socket are by custom."""
        return self.run_dir / f"{name}.sock", self.run_dir / f"{name}.status"


async def left_behind(function: Callable[..., T], *args: Any) -> T:
    """Call what looks at files in a thread; cancelling leaves it behind.

    A file system may hang, and so may /proc where it asks another process.
    """
    return await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory, in order; raises OSError."""
    return sorted(entry.name for entry in directory.iterdir())


def file_name(name: str | None, instead: str) -> str:
    """Return `name` if it can be a file's name without surprises, else `instead`."""
    return name if name is not None and _SAFE_NAME.fullmatch(name) else instead


def is_decimal(name: str) -> bool:
    """Return whether a name is a number as Xen spells it."""
    return name.isascii() and name.isdecimal() and (name == "0" or not name.startswith("0"))
