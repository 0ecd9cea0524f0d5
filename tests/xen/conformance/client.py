"""A XenStore client without any manners: it sends what it is told to and keeps all that comes.

It blocks, and needs nothing but the standard library and the embedded Xen's wire format.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Self

from qemu_vtpm_bridge.embedded.wire import HEADER, Message, Op, StreamParser, pack_strings

from .address import connect

DEADLINE_S: Final = 30.0

Answer = bytes | str
"""A reply's payload, or the name of the error."""

OK: Final = b"OK\0"

_MARK: Final = ("conformance/mark", "until now")
"""A path that is nobody's, and the token of the watch on it."""


class Hungup(Exception):
    """XenStore closed the connection."""


class StoreClient:
    """One connection.  A context manager."""

    def __init__(self, address: str, *, in_order: bool = True) -> None:
        self._in_order = in_order
        """Whether events that came before an answer are before it here as well."""
        self._socket = connect(address)
        self._socket.settimeout(DEADLINE_S)
        self._parser = StreamParser(payload_max_bytes=1 << 20)
        self._events: deque[tuple[str, str]] = deque()
        self._received: deque[Message] = deque()
        self._ids = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    # Messages.

    def send(self, raw: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(raw)

    def receive(self) -> Message:
        """Return the next message; raises Hungup."""
        while not self._received:
            try:
                raw = self._socket.recv(65536)
            except ConnectionResetError:
                raw = b""
            if not raw:
                raise Hungup
            self._received += self._parser.feed(raw)
        return self._received.popleft()

    def exchange(self, op: int, payload: bytes, tx: int = 0) -> Message:
        """Return the reply to one request; events that come before it are kept."""
        self._ids += 1
        self.send(HEADER.pack(op, self._ids, tx, len(payload)) + payload)
        while True:
            message = self.receive()
            if message.type != Op.WATCH_EVENT:
                return message
            self._keep(message)

    def _keep(self, message: Message) -> None:
        path, token, *_ = message.payload.split(b"\0")
        self._events.append((path.decode("latin-1"), token.decode("latin-1")))

    def hung_up(self) -> bool:
        """Return whether the connection ends before anything but events comes."""
        try:
            while self.receive().type == Op.WATCH_EVENT:
                pass
        except Hungup:
            return True
        return False

    # Requests.

    def call(self, op: int, payload: bytes, tx: int = 0) -> Answer:
        """Return what a request with this payload is answered."""
        message = self.exchange(op, payload, tx)
        if message.type == Op.ERROR:
            return message.payload.rstrip(b"\0").decode("latin-1")
        return message.payload

    def ask(self, op: int, *strings: str, tx: int = 0) -> Answer:
        """Make a request whose payload are these strings."""
        return self.call(op, pack_strings([string.encode("latin-1") for string in strings]), tx)

    def read(self, path: str, tx: int = 0) -> Answer:
        return self.ask(Op.READ, path, tx=tx)

    def write(self, path: str, value: bytes = b"", tx: int = 0) -> Answer:
        return self.call(Op.WRITE, path.encode("latin-1") + b"\0" + value, tx)

    def mkdir(self, path: str, tx: int = 0) -> Answer:
        return self.ask(Op.MKDIR, path, tx=tx)

    def rm(self, path: str, tx: int = 0) -> Answer:
        return self.ask(Op.RM, path, tx=tx)

    def ls(self, path: str, tx: int = 0) -> list[str] | str:
        """Return the names of a node's children, as they are ordered."""
        answer = self.ask(Op.DIRECTORY, path, tx=tx)
        return answer if isinstance(answer, str) else answer.decode("latin-1").split("\0")[:-1]

    def perms(self, path: str, tx: int = 0) -> str:
        """Return a node's permissions, as `n0 r2`, or an error."""
        answer = self.ask(Op.GET_PERMS, path, tx=tx)
        if isinstance(answer, str):
            return answer
        return " ".join(answer.decode("latin-1").split("\0")[:-1])

    def chmod(self, path: str, permissions: str, tx: int = 0) -> Answer:
        return self.ask(Op.SET_PERMS, path, *permissions.split(), tx=tx)

    def watch(self, path: str, token: str = "t") -> Answer:
        return self.ask(Op.WATCH, path, token)

    def unwatch(self, path: str, token: str = "t") -> Answer:
        return self.ask(Op.UNWATCH, path, token)

    def begin(self) -> int:
        answer = self.call(Op.TRANSACTION_START, b"\0")
        if isinstance(answer, str):
            raise AssertionError(f"no transaction: {answer}")
        return int(answer.rstrip(b"\0"))

    def end(self, tx: int, *, commit: bool = True) -> Answer:
        return self.ask(Op.TRANSACTION_END, "T" if commit else "F", tx=tx)

    # Events.

    def next_event(self) -> tuple[str, str]:
        """Wait for an event and return it, as (path, token)."""
        while not self._events:
            message = self.receive()
            if message.type == Op.WATCH_EVENT:
                self._keep(message)
        return self._events.popleft()

    def events(self) -> list[tuple[str, str]]:
        """Return the events that came until now, in their order.

        xenstored puts a change's events into a connection's queue before it does what is
        asked next, so they are before the answer to a request that is made now.  Where a
        kernel lets answers overtake events, they are before the event of a new watch.
        """
        if self._in_order:
            self.ask(Op.GET_DOMAIN_PATH, "0")
        else:
            self.watch(*_MARK)
            while _MARK not in self._events:
                self._keep(self.receive())
            self.unwatch(*_MARK)
            self._events.remove(_MARK)
        found = list(self._events)
        self._events.clear()
        return found

    def paths(self) -> list[str]:
        """Return the events' paths only."""
        return [path for path, _ in self.events()]
