"""Acts as domains that are paused, at sockets, for checks of XenStore on a real Xen.

    python -m tests.xen.conformance.paused --socket /run/xenstored/socket 5=/tmp/store-of-5

A domain that never runs has a ring to XenStore all the same.  Its page is granted to domain 0,
where this program maps it and does what the domain's kernel would do, with nothing added: all
of the domain's quota is the check's.  Only the domain's event channel is out of reach.  To have
xenstored look at the rings a request is made at its socket, as it looks at all its connections
for each; what it writes into a ring is found by looking.

One client at a time is served for each domain, and XenStore forgets it when it ends.
"""

from __future__ import annotations

import argparse
import select
import socket
import threading
from contextlib import closing, suppress
from typing import Final

from qemu_vtpm_bridge._shim import ffi
from qemu_vtpm_bridge.embedded.wire import Message, Op, StreamParser
from qemu_vtpm_bridge.xen.platform import Platform
from tests.support.ring import Ring

from .address import listen
from .client import StoreClient
from .sides import PAGE_BYTES

GRANT: Final = 1
"""GNTTAB_RESERVED_XENSTORE in Xen's public header grant_table.h."""
LOOK_MS: Final = 20


class Client:
    """One client, and the ring."""

    def __init__(self, connection: socket.socket, ring: Ring, xenstored: StoreClient) -> None:
        self._connection = connection
        self._ring = ring
        self._xenstored = xenstored
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._requests, self._answers = StreamParser(), StreamParser()
        self._unanswered = 0
        self._unsent = bytearray()

    def serve(self) -> None:
        """Carry messages until the client has enough, and have XenStore forget it."""
        with suppress(OSError):
            while self._from_client():
                self._connection.sendall(self._exchange())
        self._put(Message(Op.RESET_WATCHES, 0, 0, b"\0").pack())
        while self._unanswered:
            self._exchange()

    def _from_client(self) -> bool:
        """Take what the client sends; return whether more can come."""
        if not self._poll.poll(0 if self._unanswered else LOOK_MS):
            return True
        raw = self._connection.recv(65536)
        self._put(raw)
        return bool(raw)

    def _put(self, raw: bytes) -> None:
        self._unanswered += len(list(self._requests.feed(raw)))
        self._unsent += raw

    def _exchange(self) -> bytes:
        """Write to the ring and return what was in it."""
        del self._unsent[: self._ring.write(self._unsent)]
        raw = self._ring.read()
        messages = self._answers.feed(raw)
        self._unanswered -= sum(message.type != Op.WATCH_EVENT for message in messages)
        if raw or self._unanswered:
            self._xenstored.ask(Op.GET_DOMAIN_PATH, "0")
        return raw


def act(page: memoryview, server: socket.socket, xenstored: str) -> None:
    """Serve the clients of the domain whose ring this is until `server` is shut down."""
    with server, closing(Ring(page)) as ring, StoreClient(xenstored) as client:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                Client(connection, ring, client).serve()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.xen.conformance.paused")
    parser.add_argument("--socket", metavar="PATH", required=True, help="xenstored's")
    parser.add_argument("domains", metavar="DOMID=ADDRESS", nargs="+")
    args = parser.parse_args()
    with Platform.open_xen() as platform:
        pages, threads = [], []
        for word in args.domains:
            domid, address = word.split("=", 1)
            pages.append(platform.map_page(int(domid), GRANT))
            raw = memoryview(ffi.buffer(pages[-1].cdata.shared, PAGE_BYTES))
            arguments = (raw, listen(address), args.socket)
            threads.append(threading.Thread(target=act, args=arguments, daemon=True))
            threads[-1].start()
        print("serving", flush=True)
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
