"""The frames of vfio-user, the register-level socket protocol.

Theory of operation.  Every message has a header of 16 bytes; a reply has the request's
message id and command.  All formats stand here in construct, which names and checks
them; the two that carry a guest's accesses, and the header, are also `struct.Struct`s,
since construct takes longer for one frame than an access may.  A test holds the two
against each other.

Numbers are in the host's order, which is little-endian wherever this runs.  Nothing here
does input or output.

Source: the vfio-user protocol specification, version 0.0 as QEMU speaks it
(docs/interop/vfio-user.rst); linux/vfio.h for the flags.
"""

from __future__ import annotations

import enum
import json
import struct
from typing import Any, Final

from construct import GreedyBytes, Int16ul, Int32ul, Int64ul
from construct import Struct as Format

VERSION_MAJOR: Final = 0
VERSION_MINOR: Final = 0
"""QEMU refuses a reply with a higher minor number than its own, which is 0."""

TRANSFER_MAX_BYTES: Final = 4096
"""The largest access of a region that is served, said in the capabilities."""
FDS_MAX: Final = 8
"""Descriptors that may come with one message, said in the capabilities."""
MESSAGE_MAX_BYTES: Final = 64 * 1024
"""A longer message is not read to its end: its sender is disconnected."""


class Command(enum.IntEnum):
    """What a client asks for."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14
    REGION_WRITE_MULTI = 15


TYPE_MASK: Final = 0xF
TYPE_REQUEST: Final = 0
TYPE_REPLY: Final = 1
NO_REPLY: Final = 0x10
ERROR: Final = 0x20

DEVICE_FLAGS_RESET: Final = 1 << 0
DEVICE_FLAGS_PCI: Final = 1 << 1
REGION_FLAG_READ: Final = 1 << 0
REGION_FLAG_WRITE: Final = 1 << 1
IRQ_INFO_EVENTFD: Final = 1 << 0
IRQ_INFO_MASKABLE: Final = 1 << 1
IRQ_INFO_AUTOMASKED: Final = 1 << 2
IRQ_SET_DATA_NONE: Final = 1 << 0
IRQ_SET_DATA_BOOL: Final = 1 << 1
IRQ_SET_DATA_EVENTFD: Final = 1 << 2
IRQ_SET_ACTION_MASK: Final = 1 << 3
IRQ_SET_ACTION_UNMASK: Final = 1 << 4
IRQ_SET_ACTION_TRIGGER: Final = 1 << 5
IRQ_SET_DATA_KINDS: Final = 7
IRQ_SET_ACTIONS: Final = 7 << 3

CONFIG_REGION: Final = 7
"""vfio's regions of a PCI device: 0 to 5 are its BARs, 6 its ROM, 8 is VGA."""
REGION_COUNT: Final = 9
IRQ_COUNT: Final = 5
"""INTx, MSI, MSI-X, error, request: only the first is there."""

# Named formats.

HEADER: Final = Format(
    "message_id" / Int16ul,
    "command" / Int16ul,
    "size" / Int32ul,
    "flags" / Int32ul,
    "error" / Int32ul,
)
VERSION: Final = Format("major" / Int16ul, "minor" / Int16ul, "text" / GreedyBytes)
DMA_MAP: Final = Format(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "offset" / Int64ul,
    "address" / Int64ul,
    "size" / Int64ul,
)
DMA_UNMAP: Final = Format(
    "argsz" / Int32ul, "flags" / Int32ul, "address" / Int64ul, "size" / Int64ul
)
DEVICE_INFO: Final = Format(
    "argsz" / Int32ul, "flags" / Int32ul, "regions" / Int32ul, "irqs" / Int32ul
)
REGION_INFO: Final = Format(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "index" / Int32ul,
    "capability_offset" / Int32ul,
    "size" / Int64ul,
    "offset" / Int64ul,
)
REGION_IO_FDS: Final = Format(
    "argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "count" / Int32ul
)
IRQ_INFO: Final = Format("argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "count" / Int32ul)
IRQ_SET: Final = Format(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "index" / Int32ul,
    "start" / Int32ul,
    "count" / Int32ul,
    "data" / GreedyBytes,
)
REGION_ACCESS: Final = Format(
    "offset" / Int64ul, "region" / Int32ul, "count" / Int32ul, "data" / GreedyBytes
)
# The same, for the way of an access.

HEADER_STRUCT: Final = struct.Struct("<HHIII")
ACCESS_STRUCT: Final = struct.Struct("<HHIIIQII")
"""Header and body of REGION_READ and REGION_WRITE, without the data."""
HEADER_BYTES: Final = HEADER_STRUCT.size
ACCESS_BYTES: Final = ACCESS_STRUCT.size


def message(
    message_id: int, command: int, body: bytes = b"", *, flags: int = 0, error: int = 0
) -> bytes:
    """Return a whole message."""
    size = HEADER_BYTES + len(body)
    return HEADER_STRUCT.pack(message_id, command, size, flags, error) + body


def version_body(**capabilities: Any) -> bytes:
    """Return the body of a VERSION message with these capabilities."""
    text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
    fields = {"major": VERSION_MAJOR, "minor": VERSION_MINOR, "text": text}
    return bytes(VERSION.build(fields))
