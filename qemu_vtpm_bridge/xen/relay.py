"""One of a bridge's connections to XenStore, as it passes through somebody who judges it.

Theory of operation.  `Relay` is sans-IO: what came from either side goes in, what is to go
to either side comes out.  Requests go on one at a time: the next one is looked at when the
answer to the last has come, which /dev/xen/xenbus wants, and which bounds what xenstored is
burdened with.  Watch events pass whenever they come.  A request that is not permitted is
answered here, with EACCES, as xenstored answers a domain that may not.  Domain 0 has no quota,
so watches and transactions have one here, with the errors that a guest gets.

Who may lie: the bridge, which may have been taken over, in every byte.  xenstored is believed
to frame its answers.

Source: Xen's public header io/xs_wire.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pyxs._internal import Op, Packet

from ..errors import XenError
from .router import DIRECTORY_MAX_BYTES, PAYLOAD_MAX_BYTES

_HEADER: Final = Packet._struct

_MESSAGE_MAX_BYTES: Final[int] = _HEADER.size + PAYLOAD_MAX_BYTES

WATCHES_MAX: Final = 64
TRANSACTIONS_MAX: Final = 32
"""Both for a connection, and several times what a bridge needs."""

_NO_END: Final = (b"EINVAL\0", b"ENOENT\0")
"""Answers to TRANSACTION_END after which the transaction goes on.  A conflict, EAGAIN, ends it."""

UNREAD_MAX_BYTES: Final = 4 * DIRECTORY_MAX_BYTES
"""A bridge that lets this much lie is not reading any more."""


class RelayBroken(XenError):
    """The connection cannot go on: what came is no message, or nobody reads."""


class Relay:
    """One connection; `permits` judges a request by its type and its payload."""

    def __init__(self, permits: Callable[[int, bytes], bool]) -> None:
        self._permits = permits
        self._requests = bytearray()
        self._answers = bytearray()
        self._awaited: tuple[int, int] | None = None
        """The type and the transaction of the request that is being answered."""
        self._watches = 0
        self._transactions: set[bytes] = set()
        """By their ids, as xenstored gave them."""
        self.to_bridge = bytearray()
        """To be sent to the bridge; whoever sends takes off what has gone."""
        self.refused = 0
        """Requests that were answered here."""

    @property
    def wants_requests(self) -> bool:
        """Whether there is room for more of the bridge's bytes."""
        return len(self._requests) <= _MESSAGE_MAX_BYTES

    def from_bridge(self, raw: bytes) -> bytes:
        """Take what the bridge sent; return what goes to xenstored.  Raises RelayBroken."""
        self._requests += raw
        return self._next()

    def from_xenstored(self, raw: bytes) -> bytes:
        """Take what xenstored sent; return what goes to xenstored.  Raises RelayBroken."""
        self._answers += raw
        while (message := _cut(self._answers, DIRECTORY_MAX_BYTES)) is not None:
            answer = _HEADER.unpack_from(message)[0]
            if answer != Op.WATCH_EVENT:
                self._count(answer, message[_HEADER.size :])
                self._awaited = None
            self._tell(message)
        return self._next()

    def _next(self) -> bytes:
        """Return the next request that goes on; empty while an answer is awaited, or for none."""
        while self._awaited is None:
            message = _cut(self._requests, PAYLOAD_MAX_BYTES)
            if message is None:
                break
            op, req_id, tx_id, _ = _HEADER.unpack_from(message)
            refusal = self._refusal(op, message[_HEADER.size :])
            if refusal is None:
                self._awaited = (op, tx_id)
                return message
            self.refused += 1
            self._tell(_HEADER.pack(Op.ERROR, req_id, tx_id, len(refusal)) + refusal)
        return b""

    def _refusal(self, op: int, payload: bytes) -> bytes | None:
        """Return the error that a request gets here, None where it goes on."""
        if not self._permits(op, payload):
            return b"EACCES\0"
        if op == Op.WATCH and self._watches >= WATCHES_MAX:
            return b"E2BIG\0"
        if op == Op.TRANSACTION_START and len(self._transactions) >= TRANSACTIONS_MAX:
            return b"ENOSPC\0"
        return None

    def _count(self, answer: int, payload: bytes) -> None:
        """Count what was made and ended, by what xenstored says."""
        if self._awaited is None:
            return
        op, tx_id = self._awaited
        done = answer == op
        if op == Op.WATCH:
            self._watches += done
        elif op == Op.UNWATCH:
            self._watches -= done
        elif op == Op.TRANSACTION_START and done:
            self._transactions.add(payload.rstrip(b"\0"))
        elif op == Op.TRANSACTION_END and (done or payload not in _NO_END):
            self._transactions.discard(b"%d" % tx_id)

    def _tell(self, message: bytes) -> None:
        self.to_bridge += message
        if len(self.to_bridge) > UNREAD_MAX_BYTES:
            raise RelayBroken("the bridge does not read XenStore's answers")


def _cut(buffer: bytearray, payload_max_bytes: int) -> bytes | None:
    """Take the first message off a buffer, None while it is not whole; raises RelayBroken."""
    if len(buffer) < _HEADER.size:
        return None
    size = _HEADER.unpack_from(buffer)[3]
    if size > payload_max_bytes:
        raise RelayBroken(f"a message of {size} bytes")
    end = _HEADER.size + size
    if len(buffer) < end:
        return None
    message = bytes(buffer[:end])
    del buffer[:end]
    return message
