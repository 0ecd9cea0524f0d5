"""What a bridge that is a guest's device could reach if it were taken over, tried in domain 0.

    python3 -m tests.xen.rig.inside.reach VTPM-DOMID GUEST-DOMID GUEST-NAME

Starts the broker as `run --device` does, becomes nobody, and tries each door for the guest and
for others, by Linux' own ioctls.  Prints JSON: for each attempt "done", or its errno's name.

Source: Linux' include/uapi/xen/privcmd.h and evtchn.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial

import trio

from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.xen.broker import PRIVCMD, Broker, Names, start
from qemu_vtpm_bridge.xen.store import KeptStore, open_store
from qemu_vtpm_bridge.xen.store_policy import StorePolicy
from qemu_vtpm_bridge.xen.xenbus import PathMode, device_paths

XENSTORED = "/run/xenstored/socket"
NOBODY = 65534
A_FRAME = 0x100
"""Of a guest's ordinary memory."""

DM_OP = 0x00105005
MMAPBATCH_V2 = 0x00205004
HYPERCALL = 0x00305000
BIND_INTERDOMAIN = 0x00084501

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]


def device_model_call(privcmd: int, domid: int) -> None:
    """Make a device model's call of no operations: Linux checks whose it is."""
    fcntl.ioctl(privcmd, DM_OP, struct.pack("=HHxxxxQ", domid, 0, 0))


def map_memory(privcmd: int, domid: int) -> None:
    """Map one of a domain's frames."""
    place = LIBC.mmap(None, mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_SHARED, privcmd, 0)
    if place in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    frames, errors = (ctypes.c_uint64 * 1)(A_FRAME), (ctypes.c_int * 1)()
    words = (1, domid, place, ctypes.addressof(frames), ctypes.addressof(errors))
    fcntl.ioctl(privcmd, MMAPBATCH_V2, struct.pack("=IHxxQQQ", *words))
    if errors[0]:
        raise OSError(-errors[0], "mapping")


def hypercall(privcmd: int, domid: int) -> None:
    """Make a hypercall of one's own choice: xen_version."""
    del domid
    fcntl.ioctl(privcmd, HYPERCALL, struct.pack("=6Q", 17, 0, 0, 0, 0, 0))


def bind_port(evtchn: int, domid: int) -> None:
    """Bind a port that a domain has offered to nobody."""
    fcntl.ioctl(evtchn, BIND_INTERDOMAIN, struct.pack("=II", domid, 1))


def outcome(attempt: Callable[[], object]) -> str:
    """Return "done", the name of the errno, or what the broker said."""
    try:
        attempt()
    except XenError as error:
        return error.cause
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return "done"


def connect_to_xenstored() -> None:
    """Connect as domain 0 does."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(XENSTORED)


async def write(kept: KeptStore, entry: str) -> None:
    """Write one of XenStore's entries through the broker."""
    async with open_store(kept) as store:
        await store.write(entry, b"2")


def started(vtpm: int, guest_name: str) -> Broker:
    """Start the broker of a guest's device, and give up what this process has."""

    def policy_with(names: Names) -> StorePolicy:
        return StorePolicy(
            paths_for=lambda domid: device_paths(PathMode.SEED, backend_domid=domid, handle=0),
            name_of=names.of,
            vm_of=names.vm,
            backend_domid=vtpm,
            guest=guest_name,
        )

    broker = start(policy_with, XENSTORED, lambda: None)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return broker


def main() -> None:
    """Try all of it."""
    vtpm, guest, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    domains = {"guest": guest, "vtpm": vtpm, "domain 0": 0}
    broker = started(vtpm, name)
    found = {
        "xenstored": outcome(connect_to_xenstored),
        "privcmd": outcome(lambda: os.open(PRIVCMD, os.O_RDWR)),
    }
    for who in ("vtpm", "domain 0"):
        found[f"devices for {who}"] = outcome(partial(broker.devices, domains[who]))
    privcmd, evtchn = broker.devices(guest)
    for who, domid in domains.items():
        for what, door, attempt in (
            ("device model", privcmd, device_model_call),
            ("memory", privcmd, map_memory),
            ("port", evtchn, bind_port),
        ):
            found[f"{what} of {who}"] = outcome(partial(attempt, door, domid))
    found["hypercall"] = outcome(lambda: hypercall(privcmd, 0))
    kept = KeptStore(XENSTORED)
    kept.hand_over(broker)
    for who, domid in domains.items():
        entry = f"/local/domain/{domid}/platform/tpm_version"
        found[f"entry of {who}"] = outcome(partial(trio.run, write, kept, entry))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
