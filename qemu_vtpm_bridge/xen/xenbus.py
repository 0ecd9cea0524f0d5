"""XenBus as tpmif uses it: states, keys, paths, and the parsing of what peers wrote.

No input or output happens here.  Theory of operation: every value read from
XenStore is `raw_...` until one of the `parse_...` functions below has accepted
it; paths are built from numbers that were parsed, never from what a peer wrote
(promise P9).  Who may lie: the vTPM domain owns its backend directory and may
write anything there; a guest owns its own frontend directory.

Sources: xen/include/public/io/xenbus.h (states), Mini-OS tpmback.c and Linux
xen-tpmfront.c (keys), the xen-devel thread of January 2015 (the `seed` paths).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from ..errors import ConfigError, XenError

DOMID_FIRST_RESERVED = 0x7FF0
"""Domain ids from here on name no domain (xen.h)."""

GRANT_REF_MAX = 2**31 - 1
"""tpmback reads `ring-ref` with %d, so a larger one cannot be meant."""

EVENT_CHANNEL_MAX = 2**17 - 1
"""Ports of the FIFO event channel ABI (EVTCHN_FIFO_NR_CHANNELS)."""

HANDLE_MAX = 2**31 - 1
"""Mini-OS keeps a handle in an unsigned int and libxl in an int; both hold this."""

PATH_MAX_BYTES = 2048
"""XENSTORE_REL_PATH_MAX: the longest path that xenstored takes from a guest."""

FEATURE_PROTOCOL_V2 = "feature-protocol-v2"
FEATURE_RESET = "feature-reset"
RESET_REQUEST = "reset-request"
RESET_COUNT = "reset-count"
TRUST_RESET = "trust-reset"
"""In a backend's directory, where only the vTPM domain and domain 0 write: this frontend may have
the TPM power-cycled."""

BACKEND_ID = "backend-id"
RING_REF = "ring-ref"
EVENT_CHANNEL = "event-channel"


class XenbusState(enum.IntEnum):
    """The state that each end of a device publishes (xenbus.h)."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8

    @property
    def label(self) -> str:
        """The name as xenbus.h spells it, for logs: `InitWait`."""
        return "".join(part.capitalize() for part in self.name.split("_"))


class PathMode(enum.Enum):
    """Where the frontend directory lies; the backend directory is the same in all."""

    SEED = "seed"
    DEVICE = "device"
    ZEROS = "zeros"
    EXPLICIT = "explicit"


_DECIMAL = re.compile(rb"(?:0|[1-9][0-9]{0,9})\Z")
_COMPONENT = re.compile(r"[A-Za-z0-9_@-]+\Z")
_DOMAIN = re.compile(r"(?:0|[1-9][0-9]{0,4})\Z")
_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_BACKEND_PATH = re.compile(r"/local/domain/(\d{1,5})/backend/vtpm/(\d{1,5})/(\d{1,10})\Z")


def parse_number(raw: bytes, what: str, maximum: int) -> int:
    """Return the decimal number in `raw`, 0 to `maximum`.

    Only what libxl and the kernel write is accepted: ASCII digits without sign,
    leading zeros or white space.  Raises XenError naming `what`.
    """
    if not _DECIMAL.match(raw) or int(raw) > maximum:
        raise XenError(
            f"{what} holds {printable(raw)}, not a number from 0 to {maximum}",
            next_step="see who wrote it with `xenstore-ls -fp`",
        )
    return int(raw)


def parse_state(raw: bytes | None) -> XenbusState | None:
    """Return the XenbusState in `raw`; None where the node is missing.

    Anything but one digit from 0 to 8 is UNKNOWN: a peer that writes nonsense
    is in no state that a ritual waits for, and the waiting has its deadline.
    """
    if raw is None:
        return None
    if len(raw) == 1 and b"0" <= raw <= b"8":
        return XenbusState(int(raw))
    return XenbusState.UNKNOWN


def parse_domid(raw: bytes, what: str) -> int:
    """Return the domain id in `raw`; raises XenError for a reserved one."""
    return parse_number(raw, what, DOMID_FIRST_RESERVED - 1)


def names_domain(entry: str) -> bool:
    """Return whether an entry of /local/domain is a domain's.

    The path mode `zeros` has one there that is none: 00.
    """
    return _DOMAIN.match(entry) is not None


def parse_uuid(raw: bytes) -> str:
    """Return the UUID in `raw`, 36 characters in lower case as tpmback wants them."""
    if not _UUID.match(raw):
        raise XenError(f"uuid holds {printable(raw)}, not 8-4-4-4-12 lower-case hex digits")
    return raw.decode("ascii")


def printable(raw: bytes, limit: int = 64) -> str:
    """Return `raw` quoted for a log line: ASCII only, cut after `limit` bytes."""
    shown = raw[:limit].decode("latin-1").encode("unicode_escape").decode("ascii")
    return f"'{shown}'" + (f" (and {len(raw) - limit} bytes more)" if len(raw) > limit else "")


@dataclass(frozen=True, slots=True)
class DevicePaths:
    """The two directories of one tpmif device, and the numbers they are made of.

    `frontend_domid` is the domain that the bridge (or another frontend) runs in,
    `backend_domid` the vTPM domain, `handle` the device's number.
    """

    frontend_domid: int
    backend_domid: int
    handle: int
    frontend: str

    @property
    def backend(self) -> str:
        """The backend directory: /local/domain/<vtpm>/backend/vtpm/<frontend>/<handle>."""
        return backend_path(self.backend_domid, self.frontend_domid, self.handle)


def backend_path(backend_domid: int, frontend_domid: int, handle: int) -> str:
    """Return the backend directory for these numbers."""
    return f"/local/domain/{backend_domid}/backend/vtpm/{frontend_domid}/{handle}"


def parse_backend_path(path: str) -> tuple[int, int, int]:
    """Return (backend domid, frontend domid, handle) of a backend directory's path.

    Raises XenError where the path is not spelled as `backend_path` spells it.
    """
    match = _BACKEND_PATH.match(path)
    if match:
        backend_domid, frontend_domid, handle = (int(group) for group in match.groups())
        if path == backend_path(backend_domid, frontend_domid, handle):
            return backend_domid, frontend_domid, handle
    raise XenError(f"{printable(path.encode())} is not the path of a vtpm backend directory")


def check_path(path: str) -> str:
    """Return `path` if it is an absolute XenStore path; raises ConfigError otherwise."""
    components = path.split("/")[1:]
    if (
        not path.startswith("/")
        or len(path.encode()) > PATH_MAX_BYTES
        or not components
        or not all(_COMPONENT.match(component) for component in components)
    ):
        raise ConfigError(
            f"{path!r} is not an absolute XenStore path",
            next_step="give one such as /local/domain/0/frontend/vtpm/2/0",
        )
    return path


def device_paths(
    mode: PathMode,
    *,
    backend_domid: int,
    handle: int,
    frontend_domid: int = 0,
    explicit: str | None = None,
) -> DevicePaths:
    """Return the directories of a device under a path mode.

    `seed` is the form agreed on xen-devel for a frontend in domain 0, with the
    vTPM's domid in it; a frontend elsewhere (QEMU in a stub domain) uses the
    ordinary /local/domain/<own>/device/vtpm/<handle>.  `device` and `zeros` are
    what an unpatched Mini-OS tpmback accepts from domain 0; `zeros` spells the
    domid 00, which dom0's own xenbus does not watch.  `explicit` takes the path
    as given.  Raises ConfigError for numbers out of range or a mode that has no
    meaning for this frontend domain.
    """
    for name, value, limit in (
        ("the vTPM domain's id", backend_domid, DOMID_FIRST_RESERVED - 1),
        ("the frontend's domain id", frontend_domid, DOMID_FIRST_RESERVED - 1),
        ("the handle", handle, HANDLE_MAX),
    ):
        if not 0 <= value <= limit:
            raise ConfigError(f"{name} is {value}; it must be from 0 to {limit}")
    if mode is PathMode.EXPLICIT:
        if explicit is None:
            raise ConfigError("path mode 'explicit' needs a frontend path")
        frontend = check_path(explicit)
    elif explicit is not None:
        raise ConfigError("a frontend path goes only with path mode 'explicit'")
    elif mode is PathMode.ZEROS:
        if frontend_domid != 0:
            raise ConfigError("path mode 'zeros' is for a frontend in domain 0")
        frontend = f"/local/domain/00/device/vtpm/{handle}"
    elif mode is PathMode.DEVICE or frontend_domid != 0:
        frontend = f"/local/domain/{frontend_domid}/device/vtpm/{handle}"
    else:
        frontend = f"/local/domain/0/frontend/vtpm/{backend_domid}/{handle}"
    return DevicePaths(frontend_domid, backend_domid, handle, frontend)
