"""Granted pages and event channels: the Python face of the C shim's Xen operations.

Theory of operation.  A `Platform` is one way to reach Xen, through Xen's own libraries
or at the socket of an embedded Xen; behind both stands the same table of C functions
(c_shim/xen_ops.h).  Every call is quick but may block for some milliseconds; async
callers use trio.to_thread.  The shim maps the pages itself, so a page must stay open
while a pump uses it: closing is the job of whoever detached it from the pump.

Who may lie: the embedded Xen's socket is checked in C; Xen itself is believed.
Source: Xen's public headers xengnttab.h and xenevtchn.h.
"""

from __future__ import annotations

import enum
import errno
import os
from types import TracebackType
from typing import Any, Final, Self

from .._shim import ffi, lib
from ..errors import XenError

_UNKNOWN_DOMID: Final = 0xFFFFFFFF

_NEXT_STEPS: Final = {
    "libxengnttab.so.1": "install Xen's runtime libraries (Debian: libxengnttab1)",
    "libxenevtchn.so.1": "install Xen's runtime libraries (Debian: libxenevtchn1)",
    "/dev/xen/evtchn": "run this in a Xen domain, as root, with the module xen-evtchn loaded; "
    "without Xen, --embedded names the directory of an embedded one",
}


class Role(enum.Enum):
    """Which end of tpmif a program is."""

    SHARES = lib.XEN_SHARES
    """A frontend: it shares pages."""
    MAPS = lib.XEN_MAPS
    """A backend: it maps pages of others."""


def _reason(status: int) -> str:
    return os.strerror(-status)


class Page:
    """One granted page.  Made by `Platform.share_page` or `Platform.map_page`."""

    def __init__(self, platform: Platform, cdata: Any) -> None:
        self._platform = platform  # its C object must outlive the page
        self.cdata = cdata

    @property
    def ref(self) -> int:
        """The grant reference."""
        return int(self.cdata.ref)

    def close(self) -> None:
        """Unmap it, and end the grant where it is ours.  Safe to call twice."""
        lib.xen_drop_page(self.cdata)


class Channel:
    """One event channel.  Made by `Platform.alloc_unbound` or `Platform.bind_interdomain`."""

    def __init__(self, platform: Platform, cdata: Any) -> None:
        self._platform = platform
        self.cdata = cdata

    @property
    def port(self) -> int:
        """The local port."""
        return int(self.cdata.port)

    def fileno(self) -> int:
        """The descriptor that becomes readable when the peer notified."""
        return int(self.cdata.fd)

    def notify(self) -> None:
        """Wake the peer; raises XenError where the channel broke."""
        status = lib.xen_notify(self.cdata)
        if status:
            raise XenError(f"event channel {self.port}: {_reason(status)}")

    def close(self) -> None:
        """Close the port.  Safe to call twice."""
        lib.xen_close_channel(self.cdata)


class Platform:
    """One way to reach Xen's grants and event channels; a context manager."""

    def __init__(self, cdata: Any, domid: int | None) -> None:
        self._xen = cdata
        self.domid = domid
        """The domain this program acts as; None where only XenStore can tell."""

    @classmethod
    def open_xen(cls) -> Self:
        """Open the real Xen.  Raises XenError, which names what is missing."""
        cdata = ffi.new("struct xen *")
        missing = ffi.new("const char **")
        status = lib.xen_open_libs(cdata, missing)
        if status:
            name = ffi.string(missing[0]).decode()
            raise XenError(
                f"Xen cannot be reached: {name}: {_reason(status)}",
                next_step=_NEXT_STEPS.get(name, "check Xen's installation"),
            )
        return cls(cdata, None)

    @classmethod
    def open_embedded(cls, socket_path: str) -> Self:
        """Open the embedded Xen whose hypervisor socket this is.  Raises XenError."""
        cdata = ffi.new("struct xen *")
        status = lib.xen_open_embedded(cdata, os.fsencode(socket_path), ffi.new("const char **"))
        if status:
            raise XenError(
                f"the embedded Xen cannot be reached at {socket_path}: {_reason(status)}",
                next_step="start one with `qemu-vtpm-bridge embedded-xen`, "
                "and create the domain in it",
            )
        return cls(cdata, None if cdata.own_domid == _UNKNOWN_DOMID else int(cdata.own_domid))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release everything; pages and channels must be closed before.  Safe to call twice."""
        lib.xen_close(self._xen)

    def keep_open(self, role: Role, channels: int) -> None:
        """Open in advance what `role` needs for so many channels at a time.

        Afterwards this process may lose the right to open Xen's devices.  Call it before there
        are threads.  Raises XenError.
        """
        status = lib.xen_keep(self._xen, role.value, channels)
        if status:
            device = "gntalloc" if role is Role.SHARES else "gntdev"
            raise _grant_error("Xen's devices cannot be opened", status, device)

    def share_page(self, domid: int) -> Page:
        """Share a page of zeros with domain `domid`, which may write to it."""
        cdata = ffi.new("struct xen_page *")
        status = lib.xen_share_page(self._xen, domid, cdata)
        if status:
            raise _grant_error(f"a page for domain {domid} cannot be granted", status, "gntalloc")
        return Page(self, cdata)

    def map_page(self, domid: int, ref: int) -> Page:
        """Map the page that domain `domid` granted to this one as `ref`."""
        cdata = ffi.new("struct xen_page *")
        status = lib.xen_map_page(self._xen, domid, ref, cdata)
        if status:
            raise _grant_error(f"grant {ref} of domain {domid} cannot be mapped", status, "gntdev")
        return Page(self, cdata)

    def alloc_unbound(self, domid: int) -> Channel:
        """Make a port that domain `domid` may bind to."""
        cdata = ffi.new("struct xen_channel *")
        status = lib.xen_alloc_unbound(self._xen, domid, cdata)
        if status:
            raise XenError(f"no event channel for domain {domid}: {_reason(status)}")
        return Channel(self, cdata)

    def bind_interdomain(self, domid: int, port: int) -> Channel:
        """Bind to port `port` of domain `domid`."""
        cdata = ffi.new("struct xen_channel *")
        status = lib.xen_bind_interdomain(self._xen, domid, port, cdata)
        if status:
            raise XenError(
                f"event channel {port} of domain {domid} cannot be bound: {_reason(status)}"
            )
        return Channel(self, cdata)


def _grant_error(what: str, status: int, module: str) -> XenError:
    next_step = ""
    if -status in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        next_step = f"load the module xen-{module}: /dev/xen/{module} is missing"
    elif -status in (errno.EACCES, errno.EPERM):
        next_step = f"run as root, or give this user /dev/xen/{module}"
    elif -status == errno.ENOSPC:
        next_step = "raise /sys/module/xen_gntalloc/parameters/limit: all its pages are in use"
    return XenError(f"{what}: {_reason(status)}", next_step=next_step)
