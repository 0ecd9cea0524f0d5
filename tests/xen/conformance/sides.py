"""One side of a check of grants and event channels, in this domain or in another one.

A check does with a side what the product does with a `Platform`, and looks at what comes of
it: what is in a page, whether an event is there.  `LocalSide` is a Platform of this program;
`remote.RemoteSide` is one in another domain, and an agent there does what it is asked.
"""

from __future__ import annotations

import select
import subprocess
import sys
from typing import Any, Final, Protocol, Self

from qemu_vtpm_bridge._shim import ffi, lib
from qemu_vtpm_bridge.xen.platform import Channel, Page, Platform

PAGE_BYTES: Final = 4096
DEADLINE_S: Final = 30.0
"""Of one event, and of what a kernel does after a program's end."""


class SidesPage(Protocol):
    """A page that a side shares or maps."""

    @property
    def ref(self) -> int:
        """The grant reference."""

    @property
    def data(self) -> Any:
        """Its bytes: slices of it are read and written, and bytes() gives all."""

    def close(self) -> None:
        """Unmap it, and end the grant where it is the side's.  Safe to call twice."""


class SidesChannel(Protocol):
    """An event channel that a side made or bound."""

    @property
    def port(self) -> int:
        """The side's port."""

    def notify(self) -> None:
        """Wake the peer; raises XenError where the channel broke."""

    def close(self) -> None:
        """Close the port.  Safe to call twice."""

    def listen(self) -> None:
        """Have `came` tell of events from now on, and of one that is pending."""

    def came(self, deadline_s: float = 0.0) -> bool:
        """Return whether an event comes in time that did not when this was asked before."""

    def take(self) -> None:
        """Take an event; the port stays masked."""

    def arm(self) -> None:
        """Let further events come."""


class Holder(Protocol):
    """A program in a side's domain that holds a page and a port."""

    ref: int
    port: int

    def kill(self) -> None:
        """Kill it and see its end.  Safe to call twice."""


class Side(Protocol):
    """One side: what it shares, maps and binds."""

    def share_page(self, domid: int) -> SidesPage:
        """Share a page of zeros with domain `domid`; raises XenError."""

    def map_page(self, domid: int, ref: int) -> SidesPage:
        """Map what domain `domid` granted; raises XenError."""

    def alloc_unbound(self, domid: int) -> SidesChannel:
        """Make a port that domain `domid` may bind to; raises XenError."""

    def bind_interdomain(self, domid: int, port: int) -> SidesChannel:
        """Bind to a port of domain `domid`; raises XenError."""

    def hold(self, domid: int) -> Holder:
        """Start a program that shares a page with domain `domid` and makes a port for it."""


class LocalPage:
    """A Platform's page."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self.ref = page.ref

    @property
    def data(self) -> Any:
        """What is in the page now."""
        return ffi.buffer(self._page.cdata.shared, PAGE_BYTES)

    def close(self) -> None:
        """Give it back."""
        self._page.close()


class LocalChannel:
    """A Platform's channel, listened to as the pumps do: for edges."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._epoll: select.epoll | None = None
        self.port = channel.port

    def notify(self) -> None:
        """Wake the peer."""
        self._channel.notify()

    def close(self) -> None:
        """Close the port; an event that came stays unseen."""
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        self._channel.close()

    def listen(self) -> None:
        """Begin to look for edges."""
        self._epoll = select.epoll()
        self._epoll.register(self._channel.fileno(), select.EPOLLIN | select.EPOLLET)

    def came(self, deadline_s: float = 0.0) -> bool:
        """Look for an edge."""
        assert self._epoll is not None
        return bool(self._epoll.poll(deadline_s))

    def take(self) -> None:
        """Read the port."""
        lib.xen_take(self._channel.cdata)

    def arm(self) -> None:
        """Write the port."""
        lib.xen_rearm(self._channel.cdata)


class LocalHolder:
    """A child of this program (holder.py)."""

    def __init__(self, where: str, domid: int) -> None:
        module = f"{__package__}.holder"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, where, str(domid)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        with self._process.stdout as printed:
            ref, port = printed.readline().split()
        self.ref, self.port = int(ref), int(port)

    def kill(self) -> None:
        """Kill it and wait for it."""
        self._process.kill()
        self._process.wait()


class LocalSide:
    """This program's Platform."""

    def __init__(self, platform: Platform, where: str) -> None:
        self._platform = platform
        self._where = where
        """How another program of this domain finds the same Xen: "xen", or a socket."""

    @classmethod
    def open(cls, where: str) -> Self:
        """Open the real Xen, named "xen", or the embedded one at a socket; raises XenError."""
        xen = where == "xen"
        return cls(Platform.open_xen() if xen else Platform.open_embedded(where), where)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._platform.close()

    def share_page(self, domid: int) -> LocalPage:
        """Share a page."""
        return LocalPage(self._platform.share_page(domid))

    def map_page(self, domid: int, ref: int) -> LocalPage:
        """Map a page."""
        return LocalPage(self._platform.map_page(domid, ref))

    def alloc_unbound(self, domid: int) -> LocalChannel:
        """Make a port."""
        return LocalChannel(self._platform.alloc_unbound(domid))

    def bind_interdomain(self, domid: int, port: int) -> LocalChannel:
        """Bind to a port."""
        return LocalChannel(self._platform.bind_interdomain(domid, port))

    def hold(self, domid: int) -> LocalHolder:
        """Start a holder."""
        return LocalHolder(self._where, domid)
