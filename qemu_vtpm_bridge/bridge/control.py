"""swtpm's control protocol: its messages, and cutting a stream into them.

Theory of operation.  Requests carry no length: a command word, then a body whose size
follows from the command.  swtpm takes what one read gives as one command and reads on
only until the least that the command needs is there; clients depend on that, since
some send three bytes of padding and some do not.  `ControlParser` is fed one read at a
time and does the same, except that a body which is announced and refused is drained.
A request that stays incomplete for `INCOMPLETE_S` ends the connection; the driver keeps
that time.  Nothing here does input or output.

Who may lie: whoever connects.  Keeps P1 in that every command has an answer of the size
that all versions of QEMU wait for: those of GET_TPMESTABLISHED, GET_STATEBLOB and
SET_BUFFERSIZE have full size even when they say no.

Source: swtpm's include/swtpm/tpm_ioctl.h and src/swtpm/ctrlchannel.c; everything is
big-endian.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

from construct import Const, Container, Int8ub, Int32ub, Int64ub, Struct

INCOMPLETE_S: Final = 0.5
STATEBLOB_MAX_BYTES: Final = 512 * 1024


class Command(enum.IntEnum):
    """Command words."""

    CMD_GET_CAPABILITY = 0x01
    CMD_INIT = 0x02
    CMD_SHUTDOWN = 0x03
    CMD_GET_TPMESTABLISHED = 0x04
    CMD_SET_LOCALITY = 0x05
    CMD_HASH_START = 0x06
    CMD_HASH_DATA = 0x07
    CMD_HASH_END = 0x08
    CMD_CANCEL_TPM_CMD = 0x09
    CMD_STORE_VOLATILE = 0x0A
    CMD_RESET_TPMESTABLISHED = 0x0B
    CMD_GET_STATEBLOB = 0x0C
    CMD_SET_STATEBLOB = 0x0D
    CMD_STOP = 0x0E
    CMD_GET_CONFIG = 0x0F
    CMD_SET_DATAFD = 0x10
    CMD_SET_BUFFERSIZE = 0x11
    CMD_GET_INFO = 0x12
    CMD_LOCK_STORAGE = 0x13


def command_name(number: int) -> str:
    """Return a command's name; all unknown ones share one, so that a client cannot make many."""
    return Command(number).name if number in Command.__members__.values() else "unknown"


class Capability(enum.IntFlag):
    """Bits of CMD_GET_CAPABILITY."""

    PTM_CAP_INIT = 1 << 0
    PTM_CAP_SHUTDOWN = 1 << 1
    PTM_CAP_GET_TPMESTABLISHED = 1 << 2
    PTM_CAP_SET_LOCALITY = 1 << 3
    PTM_CAP_HASHING = 1 << 4
    PTM_CAP_CANCEL_TPM_CMD = 1 << 5
    PTM_CAP_STORE_VOLATILE = 1 << 6
    PTM_CAP_RESET_TPMESTABLISHED = 1 << 7
    PTM_CAP_GET_STATEBLOB = 1 << 8
    PTM_CAP_SET_STATEBLOB = 1 << 9
    PTM_CAP_STOP = 1 << 10
    PTM_CAP_GET_CONFIG = 1 << 11
    PTM_CAP_SET_DATAFD = 1 << 12
    PTM_CAP_SET_BUFFERSIZE = 1 << 13


CAPABILITIES: Final = (
    Capability.PTM_CAP_INIT
    | Capability.PTM_CAP_SHUTDOWN
    | Capability.PTM_CAP_GET_TPMESTABLISHED
    | Capability.PTM_CAP_SET_LOCALITY
    | Capability.PTM_CAP_CANCEL_TPM_CMD
    | Capability.PTM_CAP_RESET_TPMESTABLISHED
    | Capability.PTM_CAP_STOP
    | Capability.PTM_CAP_GET_CONFIG
    | Capability.PTM_CAP_SET_DATAFD
    | Capability.PTM_CAP_SET_BUFFERSIZE
)
"""What is true of every vTPM.  tpmif has no word for the hash sequence of a dynamic
launch, and the state of the TPM stays in its domain."""

STATEBLOB_CAPABILITIES: Final = Capability.PTM_CAP_GET_STATEBLOB | Capability.PTM_CAP_SET_STATEBLOB


class Result(enum.IntEnum):
    """Result words: TPM 1.2 return codes."""

    TPM_SUCCESS = 0
    TPM_BAD_PARAMETER = 3
    TPM_FAIL = 9
    TPM_BAD_ORDINAL = 0x0A
    TPM_IOERROR = 0x1F
    TPM_BAD_LOCALITY = 0x3D


# Bodies of requests.  What is not here has none.

BODIES: Final = {
    Command.CMD_INIT: Struct("flags" / Int32ub),
    Command.CMD_SET_LOCALITY: Struct("locality" / Int8ub),
    Command.CMD_HASH_DATA: Struct("length" / Int32ub),
    Command.CMD_RESET_TPMESTABLISHED: Struct("locality" / Int8ub),
    Command.CMD_GET_STATEBLOB: Struct("flags" / Int32ub, "type" / Int32ub, "offset" / Int32ub),
    Command.CMD_SET_STATEBLOB: Struct("flags" / Int32ub, "type" / Int32ub, "length" / Int32ub),
    Command.CMD_SET_BUFFERSIZE: Struct("wanted" / Int32ub),
    Command.CMD_GET_INFO: Struct("flags" / Int64ub, "offset" / Int32ub, "pad" / Int32ub),
    Command.CMD_LOCK_STORAGE: Struct("retries" / Int32ub),
}

# Responses.

RESULT: Final = Struct("result" / Int32ub)
CAPABILITY_RESPONSE: Final = Struct("result" / Const(0, Int32ub), "capabilities" / Int32ub)
ESTABLISHED_RESPONSE: Final = Struct(
    "result" / Int32ub, "established" / Int8ub, "pad" / Const(bytes(3))
)
CONFIG_RESPONSE: Final = Struct("result" / Const(0, Int32ub), "flags" / Int32ub)
BUFFERSIZE_RESPONSE: Final = Struct(
    "result" / Const(0, Int32ub), "in_use" / Int32ub, "minimum" / Int32ub, "maximum" / Int32ub
)
STATEBLOB_RESPONSE: Final = Struct(
    "result" / Int32ub, "flags" / Int32ub, "total" / Int32ub, "length" / Const(0, Int32ub)
)

_COMMAND_BYTES: Final = 4
_PADDING_TAKEN: Final = {Command.CMD_SET_LOCALITY, Command.CMD_RESET_TPMESTABLISHED}
"""One byte counts; QEMU sends three more behind it, tcti-swtpm does not."""
_EXTRA_REFUSED: Final = {
    Command.CMD_INIT,
    Command.CMD_SHUTDOWN,
    Command.CMD_GET_TPMESTABLISHED,
    Command.CMD_HASH_START,
    Command.CMD_HASH_END,
    Command.CMD_CANCEL_TPM_CMD,
    Command.CMD_STORE_VOLATILE,
    Command.CMD_STOP,
    Command.CMD_GET_CONFIG,
    Command.CMD_SET_DATAFD,
}
"""Bytes behind these make the request a bad one; behind all others they are ignored."""


@dataclass(frozen=True, slots=True)
class Request:
    """One whole request; `command` is a plain number where it is unknown."""

    command: int
    body: Container = field(default_factory=Container)
    malformed: bool = False
    too_long: bool = False
    """It announces more than is worth draining: answer, then close."""


class ControlParser:
    """Cuts one connection's bytes into requests."""

    def __init__(self) -> None:
        self._buffer = b""
        self._drain_bytes = 0
        self._draining: Request | None = None

    @property
    def incomplete(self) -> bool:
        """Whether a request has begun and not ended."""
        return bool(self._buffer) or self._draining is not None

    def feed(self, raw: bytes) -> Request | None:
        """Take what one read gave; return a request if one is complete now."""
        if self._draining is not None:
            return self._drain(raw)
        self._buffer += raw
        if len(self._buffer) < _COMMAND_BYTES:
            return None
        number = Int32ub.parse(self._buffer)
        form = BODIES.get(number)
        needed = _COMMAND_BYTES + (form.sizeof() if form else 0)
        if len(self._buffer) < needed:
            return None
        body = form.parse(self._buffer[_COMMAND_BYTES:]) if form else Container()
        rest = self._buffer[needed:]
        self._buffer = b""
        if number in (Command.CMD_SET_STATEBLOB, Command.CMD_HASH_DATA):
            return self._begin_drain(Request(number, body), rest)
        extra = len(rest) > (3 if number in _PADDING_TAKEN else 0)
        return Request(number, body, malformed=extra and number in _EXTRA_REFUSED)

    def _begin_drain(self, request: Request, rest: bytes) -> Request | None:
        if request.body.length > STATEBLOB_MAX_BYTES:
            return Request(request.command, request.body, too_long=True)
        self._draining = request
        self._drain_bytes = request.body.length
        return self._drain(rest)

    def _drain(self, raw: bytes) -> Request | None:
        self._drain_bytes -= len(raw)
        if self._drain_bytes > 0:
            return None
        request, self._draining = self._draining, None
        return request


def result(code: int) -> bytes:
    """Return a response that is only a result word."""
    return bytes(RESULT.build({"result": code}))


def refused_stateblob() -> bytes:
    """Return GET_STATEBLOB's refusal, in the full size that every QEMU waits for."""
    return bytes(STATEBLOB_RESPONSE.build({"result": Result.TPM_FAIL, "flags": 0, "total": 0}))


def empty_stateblob() -> bytes:
    """Return an empty blob: the state stays where it is."""
    return bytes(STATEBLOB_RESPONSE.build({"result": 0, "flags": 0, "total": 0}))
