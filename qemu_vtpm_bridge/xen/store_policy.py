"""What a bridge may ask of XenStore, where somebody stands between it and xenstored.

Theory of operation.  xenstored knows one kind of connection for domain 0, which may write
everything.  `StorePolicy` knows what a bridge is there for, and judges each request by its
type, its form and its path before xenstored sees it: a bridge reads which domains there are,
and the directories of vTPM devices; it writes its own frontend's directory, with `--attach` the
backend's too, and as a guest's device the guest's two or three entries.

Which domain a path may be about is asked of XenStore itself, at the time of the request: the
one that has the name of the vTPM domain, or of the guest, as the toolstack gave it.  A bridge
cannot write names.

Who may lie: the bridge, in every byte of a request, for it may have been taken over.

Source: docs/misc/xenstore.txt of Xen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from pyxs._internal import Op

from ..errors import XenError
from .router import OP_DIRECTORY_PART
from .xenbus import (
    DOMID_FIRST_RESERVED,
    EVENT_CHANNEL,
    FEATURE_PROTOCOL_V2,
    PATH_MAX_BYTES,
    RESET_REQUEST,
    RING_REF,
    DevicePaths,
)

GUEST_DIRECTORY: Final = "qemu-vtpm-bridge"
"""In a guest's own directory, which domain 0 owns: what outlives a killed bridge that was its
device."""

SERVER_KEY: Final = "ioreq-server"
"""Xen's number of the server."""

POWERED_KEY: Final = "powered"
"""The TPM was seen to be power-cycled for this boot."""

_READS: Final = frozenset({Op.DIRECTORY, Op.READ, Op.GET_PERMS, OP_DIRECTORY_PART})
_WRITES: Final = frozenset({Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS})
_WATCHES: Final = frozenset({Op.WATCH, Op.UNWATCH})
_TRANSACTIONS: Final = {Op.TRANSACTION_START: (b"\0",), Op.TRANSACTION_END: (b"T\0", b"F\0")}
"""By type, all that there is of it."""

_RESTS: Final = {
    **dict.fromkeys((Op.DIRECTORY, Op.READ, Op.GET_PERMS, Op.MKDIR, Op.RM), re.compile(rb"")),
    OP_DIRECTORY_PART: re.compile(rb"[0-9]{1,10}\0"),
    Op.WRITE: re.compile(rb".*", re.DOTALL),
    Op.SET_PERMS: re.compile(rb"(?:[nrwb][0-9]{1,5}\0){1,8}"),
    **dict.fromkeys((Op.WATCH, Op.UNWATCH), re.compile(rb"[!-~]{1,64}\0")),
}
"""By type, what stands behind the path.  A request of another form is nothing that xenstored
needs to see: Xen 4.17's does not survive all of them."""

_FRONTENDS_OWN: Final = frozenset(
    {"state", RING_REF, EVENT_CHANNEL, FEATURE_PROTOCOL_V2, RESET_REQUEST}
)
"""What a frontend writes itself."""
_FRONTENDS: Final = frozenset({"backend", "backend-id", "handle", "domain"})
_BACKENDS: Final = frozenset(
    {"frontend", "frontend-id", "online", "state", "handle", "uuid", "resume"}
)
"""What a toolstack writes besides, or a bridge with `--attach`."""
_GUESTS: Final = frozenset(
    {
        "platform/tpm_version",
        GUEST_DIRECTORY,
        f"{GUEST_DIRECTORY}/{SERVER_KEY}",
        f"{GUEST_DIRECTORY}/{POWERED_KEY}",
    }
)
"""What the bridge writes that is a guest's device.  All of these are few and known by name, so
that nobody fills xenstored's memory through a broker."""

_EVENTS: Final = ("@introduceDomain", "@releaseDomain")
_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_.:@+-]+)+")
_NUMBER: Final = r"(?:0|[1-9]\d{0,4})"
_OPEN_TO_ALL: Final = re.compile(
    rf"/local/domain(?:/{_NUMBER}/(?:name|domid|vm|backend/vtpm(?:/.+)?))?"
)
"""Which domains there are, and which vTPM devices; nothing in them is secret."""
_NAME: Final = re.compile(rf"/local/domain/{_NUMBER}/name")
_OF_A_DOMAIN: Final = re.compile(rf"/local/domain/({_NUMBER})/(.+)")


@dataclass
class StorePolicy:
    """Judges a bridge's requests."""

    paths_for: Callable[[int], DevicePaths]
    """The device's directories for a vTPM domain's id."""
    name_of: Callable[[int], bytes | None]
    """A domain's name as XenStore has it now; None where there is no such domain."""
    backend_domid: int
    """The vTPM domain at the start."""
    backend_name: str | None = None
    """Its name, where it is followed by that."""
    follows_entries: bool = False
    """Outside domain 0: the vTPM domain is whichever the entries name.  There XenStore itself keeps
    a bridge to what its domain may do."""
    writes_entries: bool = False
    """`--attach`: the bridge writes what a toolstack otherwise does."""
    guest: str | None = None
    """The name of the guest whose device the bridge is."""
    vm_of: Callable[[int], bytes | None] = lambda domid: None
    """Which machine a domain is (its `vm` in XenStore), which another name does not change."""
    _vtpms: dict[int, bytes | None] = field(default_factory=dict)
    """Domains that were seen to be the vTPM domain, and their `vm` then; their ids are in
    frontends' paths."""

    def __post_init__(self) -> None:
        vm = None
        if self.backend_name is not None:
            with suppress(XenError):  # then only its name tells it from others
                vm = self.vm_of(self.backend_domid)
        self._vtpms[self.backend_domid] = vm
        frontends = {self.paths_for(domid).frontend for domid in (0, 1)}
        self._in_path = len(frontends) > 1
        """Whether the vTPM domain's id is in the frontend's path."""

    def permits(self, op: int, payload: bytes) -> bool:
        """Return whether a request may go on to xenstored.  Raises what `name_of` raises."""
        if op in _TRANSACTIONS:
            return payload in _TRANSACTIONS[op]
        raw, separator, rest = payload.partition(b"\0")
        path = raw.decode("latin-1")
        form = _RESTS.get(op)
        if form is None or not separator or form.fullmatch(rest) is None:
            return False
        if op in _WATCHES and path in _EVENTS:
            return True
        if op in _READS and path == "domid":
            return True
        if _PATH.fullmatch(path) is None or len(path) > PATH_MAX_BYTES:
            return False
        if op in _READS:
            return self._may_read(path)
        if op in _WATCHES:
            return self._may_watch(path)
        return op in _WRITES and self._may_write(path, removing=op == Op.RM)

    def is_guest(self, domid: int) -> bool:
        """Return whether a domain is a boot of the guest whose device the bridge is."""
        return self.guest is not None and self.name_of(domid) == self.guest.encode()

    def _may_read(self, path: str) -> bool:
        if _OPEN_TO_ALL.fullmatch(path) or self._may_write(path):
            return True
        devices = self._devices(path)
        if any(_is_below(path, paths.frontend) for paths in devices):
            return True
        # And whether a directory above the frontend's is empty, before that is removed too.
        above = any(_is_below(paths.frontend, path) for paths in devices)
        return above and _OF_A_DOMAIN.fullmatch(path) is not None

    def _may_watch(self, path: str) -> bool:
        """Return whether a path is our device's: a watch tells of all that is written below."""
        return _NAME.fullmatch(path) is not None or any(
            _is_below(path, paths.frontend) or _is_below(path, paths.backend)
            for paths in self._devices(path)
        )

    def _may_write(self, path: str, *, removing: bool = False) -> bool:
        if any(self._is_ours(path, paths, removing) for paths in self._devices(path)):
            return True
        match = _OF_A_DOMAIN.fullmatch(path)
        return match is not None and match[2] in _GUESTS and self.is_guest(int(match[1]))

    def _is_ours(self, path: str, paths: DevicePaths, removing: bool) -> bool:
        """Return whether a path is written as our device's with a certain vTPM domain."""
        if self.writes_entries and (
            path == paths.backend or _is_entry(path, paths.backend, _BACKENDS)
        ):
            return self._is_vtpm(paths.backend_domid)
        frontends = _is_entry(path, paths.frontend, _FRONTENDS_OWN)
        if self.writes_entries and not frontends:
            # The directories above hold other guests' devices, but for the vTPM domain's own.
            above = paths.frontend.rpartition("/")[0]
            frontends = (
                path == paths.frontend
                or _is_entry(path, paths.frontend, _FRONTENDS)
                or (
                    removing
                    and path == above
                    and path.endswith(f"/{paths.backend_domid}")
                    and _OF_A_DOMAIN.fullmatch(path) is not None
                )
            )
        return frontends and self._is_nobody_elses(paths.backend_domid)

    def _devices(self, path: str) -> list[DevicePaths]:
        """Return our device's directories with each vTPM domain that a path may mean."""
        numbers = {int(part) for part in path.split("/") if re.fullmatch(_NUMBER, part)}
        for domid in numbers - self._vtpms.keys():
            # XenStore is asked for a name only where the path would be ours with it.
            near = domid < DOMID_FIRST_RESERVED and self._is_near(path, self.paths_for(domid))
            if near and self._is_vtpm(domid):
                self._vtpms[domid] = None if self.follows_entries else self.vm_of(domid)
        return [self.paths_for(domid) for domid in sorted(self._vtpms)]

    @staticmethod
    def _is_near(path: str, paths: DevicePaths) -> bool:
        return any(
            _is_below(path, top)
            for top in (paths.frontend, paths.frontend.rpartition("/")[0], paths.backend)
        )

    def _is_vtpm(self, domid: int) -> bool:
        if self.follows_entries:
            return True
        if self.backend_name is None:
            return domid == self.backend_domid
        return self.name_of(domid) == self.backend_name.encode()

    def _is_nobody_elses(self, domid: int) -> bool:
        """Return whether an id that was the vTPM domain's has not become another domain's.

        What is left of a domain that has gone is ours to remove, and one that was given another
        name is still the same.
        """
        if self.backend_name is None or not self._in_path:
            return True
        name = self.name_of(domid)
        if name is None or name == self.backend_name.encode():
            return True
        vm = self._vtpms[domid]
        return vm is not None and self.vm_of(domid) == vm


def _is_below(path: str, directory: str) -> bool:
    """Return whether a path is a directory or in it."""
    return f"{path}/".startswith(f"{directory}/")


def _is_entry(path: str, directory: str, keys: frozenset[str]) -> bool:
    above, _, key = path.rpartition("/")
    return above == directory and key in keys
