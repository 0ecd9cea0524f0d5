"""XenStore's wire protocol: message types, the header, and cutting a stream into messages.

Theory of operation.  A message is a header of four 32-bit words in the machine's byte
order and at most 4096 bytes of payload.  The header is declared in construct, for tests
and for decoding; the server packs it with struct, which is the same bytes at a tenth of
the price.  Nothing here does input or output.

Who may lie: every client.  A header that announces more than the limit ends the
connection, since nothing after it can be trusted to be a header.

Source: Xen's public header io/xs_wire.h and docs/misc/xenstore.txt.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import construct

PAYLOAD_MAX_BYTES: Final = 4096

HEADER_FORMAT: Final = construct.Struct(
    "type" / construct.Int32un,
    "req_id" / construct.Int32un,
    "tx_id" / construct.Int32un,
    "len" / construct.Int32un,
)
HEADER: Final = struct.Struct("=IIII")


class Op(enum.IntEnum):
    """Message types."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


class MalformedStream(Exception):
    """The peer's bytes are no messages; the connection must be closed."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message in either direction."""

    type: int
    req_id: int
    tx_id: int
    payload: bytes

    def pack(self) -> bytes:
        """Return the message's bytes."""
        return HEADER.pack(self.type, self.req_id, self.tx_id, len(self.payload)) + self.payload


class StreamParser:
    """Cuts what a client sends into messages, each with no more payload than allowed."""

    def __init__(self, payload_max_bytes: int = PAYLOAD_MAX_BYTES) -> None:
        self._buffer = bytearray()
        self._payload_max_bytes = payload_max_bytes

    def feed(self, raw: bytes) -> Iterator[Message]:
        """Yield the messages that are complete with `raw`; raises MalformedStream."""
        self._buffer += raw
        while len(self._buffer) >= HEADER.size:
            kind, req_id, tx_id, length = HEADER.unpack_from(self._buffer)
            if length > self._payload_max_bytes:
                raise MalformedStream(f"a message announces {length} bytes of payload")
            end = HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield Message(kind, req_id, tx_id, payload)


def pack_strings(strings: list[bytes]) -> bytes:
    """Return the strings as a payload carries them, each ended by NUL."""
    return b"".join(string + b"\0" for string in strings)


def unpack_strings(payload: bytes, count: int) -> list[bytes]:
    """Return exactly `count` NUL-ended strings; raises ValueError where there are others."""
    strings = payload.split(b"\0")
    if strings.pop() != b"" or len(strings) != count:
        raise ValueError(f"expected {count} strings")
    return strings
