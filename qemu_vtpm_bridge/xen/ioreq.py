"""A Xen ioreq server: a range of a guest's addresses whose accesses come to this process.

Theory of operation.  Xen stops the virtual CPU that touches the range, puts the access
into a slot of a shared page and sends an event; the CPU goes on when it is answered.
`IoreqServer.next` is one call into C that answers the last access and waits for the
next: the way from one access to the other has no more Python in it than the device.

A server belongs to the guest, not to the process that made it: when the process is killed,
the CPU that waits goes on waiting, and another process can take the server over by its id.

Who may lie: the guest, in everything about an access but its place in the page.  Xen is
believed.  Source: Xen's public headers hvm/ioreq.h and hvm/dm_op.h.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from .._shim import ffi, lib
from ..errors import XenError
from .broker import EVTCHN, PRIVCMD, Broker

ACCESS: Final = int(lib.IOREQ_ACCESS)
READABLE: Final = int(lib.IOREQ_READABLE)
STOPPED: Final = int(lib.IOREQ_STOPPED)

_XEN_DEVICES: Final = "/dev/xen/"

_NEXT_STEPS: Final = {
    "libxendevicemodel.so.1": "install Xen's runtime libraries (Debian: libxendevicemodel1)",
    "libxenforeignmemory.so.1": "install Xen's runtime libraries (Debian: libxenforeignmemory1)",
    "libxenevtchn.so.1": "install Xen's runtime libraries (Debian: libxenevtchn1)",
    "/dev/xen/evtchn": "load the module xen-evtchn, and run this as root in domain 0",
    "xendevicemodel_open": "load the module xen-privcmd, and run this as root in domain 0",
    "xenforeignmemory_open": "load the module xen-privcmd, and run this as root in domain 0",
    "xenevtchn_bind_interdomain": "stop the other bridge that serves this guest",
    "xendevicemodel_create_ioreq_server": "is it an HVM guest? A PV or PVH guest has no such "
    "devices, and a guest has eight servers at most",
}


def _error(domid: int, status: int, missing: Any) -> XenError:
    call = ffi.string(missing[0]).decode() if missing[0] else "its virtual CPUs"
    return XenError(
        f"domain {domid} cannot have its TPM from here: {call}: {os.strerror(-status)}",
        next_step=_NEXT_STEPS.get(call, "check that the guest still is there"),
    )


def open_devices(broker: Broker | None = None) -> GuestDevices | None:
    """Load Xen's libraries and open its devices, which stay open, while one may.

    Servers can be made afterwards by a process that has given its privileges up.  With a
    broker the devices are of no use until what is returned has them serve one domain.
    Raises XenError, which names what is missing.
    """
    before = _open_files()
    missing = ffi.new("const char **")
    status = lib.ioreq_open_devices(missing)
    if status:
        call = ffi.string(missing[0]).decode()
        raise XenError(
            f"no guest can have its TPM from here: {call}: {os.strerror(-status)}",
            next_step=_NEXT_STEPS.get(call, "run this as root in domain 0"),
        )
    if broker is None:
        return None
    opened = {fd: name for fd, name in _open_files().items() if fd not in before}
    return GuestDevices(broker, opened)


class GuestDevices:
    """Xen's devices as its libraries hold them, good for one domain at a time.

    Theory of operation.  The libraries open the devices themselves and keep the descriptors.
    Those are replaced under them: first by /dev/null, and for each boot of the guest by
    descriptors that the kernel has restricted to its domain.  What else the libraries have
    open, for hypercalls of any kind, stays /dev/null.
    """

    def __init__(self, broker: Broker, opened: Mapping[int, str]) -> None:
        """`opened` has what the libraries opened, by descriptor."""
        self._broker = broker
        self._privcmd = [fd for fd, name in opened.items() if name == PRIVCMD]
        self._evtchn = [fd for fd, name in opened.items() if name == EVTCHN]
        with Path(os.devnull).open("rb+", buffering=0) as nothing:
            for fd, name in opened.items():
                if name.startswith(_XEN_DEVICES):
                    os.dup2(nothing.fileno(), fd, inheritable=False)

    def serve(self, domid: int) -> None:
        """Have the devices serve a domain from now on, and the one before no more.

        Raises XenError.  Blocks, for some seconds at most; no server may be open.
        """
        if not self._privcmd:
            return  # stand-ins for Xen's libraries open none
        privcmd, evtchn = self._broker.devices(domid)
        try:
            for fresh, held in ((privcmd, self._privcmd), (evtchn, self._evtchn)):
                for fd in held:
                    os.dup2(fresh, fd, inheritable=False)
        finally:
            os.close(privcmd)
            os.close(evtchn)


def _open_files() -> dict[int, str]:
    """Return what this process has open, by descriptor."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the directory itself, which is closed by now
            found[int(entry.name)] = str(entry.readlink())
    return found


class IoreqServer:
    """One server of one guest.

    `next`, `access` and the guest's memory belong to one thread; `stop` may be called from
    any.  Making, enabling and closing one takes some milliseconds.
    """

    def __init__(self, domid: int, *, adopt: int | None = None) -> None:
        """Make a server for domain `domid`, or take over the one whose id is `adopt`.

        Raises XenError, which names what is missing or refused.
        """
        self.domid = domid
        server = lib.ioreq_server_new()
        if server == ffi.NULL:
            raise XenError("no memory for an ioreq server")
        self._server = ffi.gc(server, lib.ioreq_server_free)
        self._next = lib.ioreq_next
        missing = ffi.new("const char **")
        status = lib.ioreq_server_open(self._server, domid, -1 if adopt is None else adopt, missing)
        if status < 0:
            self._free()
            raise _error(domid, status, missing)
        self.id = int(status)
        """Xen's number for it."""
        self.access: Any = ffi.new("struct ioreq_access *")
        """The access that `next` found; its `data` is what it is answered with."""

    def enable(self, first: int, last: int) -> None:
        """Claim the guest addresses `first` to `last`; accesses come from now on.

        Raises XenError.
        """
        missing = ffi.new("const char **")
        status = lib.ioreq_server_enable(self._server, first, last, missing)
        if status:
            raise _error(self.domid, status, missing)

    @property
    def vcpus(self) -> int:
        """How many virtual CPUs are served."""
        return int(lib.ioreq_vcpus(self._server))

    @property
    def answered(self) -> int:
        """How many accesses were answered so far.  For any thread."""
        return int(lib.ioreq_answered(self._server))

    def next(self, answer: bool, fd: int = -1) -> int:
        """Answer `access` if so told, then wait; return a set of ACCESS, READABLE, STOPPED.

        READABLE is about `fd`.  Raises XenError where the event channels broke.
        """
        found: int = self._next(self._server, self.access, answer, fd)
        if found < 0:
            raise XenError(
                f"the event channels of domain {self.domid} broke: {os.strerror(-found)}"
            )
        return found

    def stop(self) -> None:
        """Have `next` return STOPPED.  For any thread."""
        lib.ioreq_stop(self._server)

    def read_memory(self, address: int, size_bytes: int) -> bytes:
        """Return guest memory; all ones where there is none, as a bus does."""
        data = bytearray(size_bytes)
        status = lib.ioreq_read_memory(self._server, address, ffi.from_buffer(data), size_bytes)
        if status:
            return b"\xff" * size_bytes
        return bytes(data)

    def write_memory(self, address: int, data: bytes) -> None:
        """Write guest memory; where there is none, nothing happens, as on a bus."""
        lib.ioreq_write_memory(self._server, address, data, len(data))

    def forget_memory(self) -> None:
        """Let go of the guest's pages, as its memory has moved."""
        lib.ioreq_forget_memory(self._server)

    def close(self) -> None:
        """Destroy the server: the guest finds nothing at its addresses.  Safe to call twice.

        The thread that calls `next` must have ended.
        """
        if self._server is not None:
            lib.ioreq_server_close(self._server)
            self._free()

    def abandon(self) -> None:
        """Leave the server to the process that takes it over next."""
        if self._server is not None:
            self._free()

    def _free(self) -> None:
        ffi.release(self._server)
        self._server = None
