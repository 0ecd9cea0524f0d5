"""A program that acts as its domain for checks that run in another one.

    python -m tests.xen.conformance.agent --xen --sides tcp:0.0.0.0:7001 \\
        --store tcp:0.0.0.0:7002=/dev/xen/xenbus

At --sides it does what a check asks of one side of grants and event channels (remote.py).
At --store it passes messages on to the domain's XenStore and back, a connection there for each
here.  It believes whoever connects: it is for test machines.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from qemu_vtpm_bridge.embedded.wire import HEADER, Message, Op
from qemu_vtpm_bridge.errors import XenError

from .address import connect, listen
from .sides import Holder, LocalSide, SidesChannel, SidesPage

Made = SidesPage | SidesChannel | Holder


class Session:
    """What one connection to --sides has made."""

    MAKES: Final = ("share_page", "map_page", "alloc_unbound", "bind_interdomain", "hold")
    DOES: Final = ("close", "notify", "listen", "take", "arm", "kill")

    def __init__(self, side: LocalSide, stack: ExitStack) -> None:
        self._side = side
        self._stack = stack
        self._made: list[Any] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked and return the answer."""
        do, arguments = request["do"], request["arguments"]
        try:
            if do in self.MAKES:
                return self._keep(getattr(self._side, do)(*arguments))
            return self._use(self._made[request["on"]], do, arguments)
        except XenError as error:
            return {"xen_error": str(error)}

    def _keep(self, made: Made) -> dict[str, Any]:
        self._stack.callback(made.kill if hasattr(made, "kill") else made.close)
        self._made.append(made)
        numbers = {name: getattr(made, name) for name in ("ref", "port") if hasattr(made, name)}
        return {"object": len(self._made) - 1, **numbers}

    def _use(self, made: Any, do: str, arguments: list[Any]) -> dict[str, Any]:
        match do:
            case "read":
                first, size = arguments
                return {"hex": bytes(made.data[first : first + size]).hex()}
            case "write":
                raw = bytes.fromhex(arguments[1])
                made.data[arguments[0] : arguments[0] + len(raw)] = raw
            case "came":
                return {"came": made.came(*arguments)}
            case _ if do in self.DOES:
                getattr(made, do)(*arguments)
            case _:
                raise ValueError(f"asked to {do}")
        return {}


def serve_side(connection: socket.socket, where: str) -> None:
    """Answer one connection's requests until it ends, and give all back."""
    with connection, connection.makefile("rb") as lines, ExitStack() as stack:
        side = stack.enter_context(LocalSide.open(where))
        session = Session(side, stack)
        for line in lines:
            connection.sendall(json.dumps(session.answer(json.loads(line))).encode() + b"\n")


class Relay:
    """One connection to --store, and the domain's own to XenStore."""

    def __init__(self, connection: socket.socket, path: str) -> None:
        self._connection = connection
        self._path = path
        self._unsent = bytearray()

    def run(self) -> None:
        """Pass messages on until either side has enough."""
        with self._connection, ExitStack() as stack:
            store = self._open_store(stack)
            poll = select.poll()
            for each in (self._connection.fileno(), store):
                poll.register(each, select.POLLIN)
            # XenStore or its driver may refuse a message, and the check may be over.
            with suppress(OSError):
                while self._carry(store, {ready for ready, _ in poll.poll()}):
                    pass

    def _open_store(self, stack: ExitStack) -> int:
        if Path(self._path).is_socket():
            return stack.enter_context(connect(self._path)).fileno()
        store = os.open(self._path, os.O_RDWR)
        stack.callback(os.close, store)
        return store

    def _carry(self, store: int, ready: set[int]) -> bool:
        """Carry what is there; return whether there can be more."""
        if store in ready:
            raw = os.read(store, 65536)
            if not raw:
                return False
            self._connection.sendall(raw)
        if self._connection.fileno() in ready:
            raw = self._connection.recv(65536)
            if not raw:
                return False
            self._unsent += raw
            self._send_whole_messages(store)
        return True

    def _send_whole_messages(self, store: int) -> None:
        """Linux' driver takes no more than one message at a time."""
        while len(self._unsent) >= HEADER.size:
            size = HEADER.size + HEADER.unpack_from(self._unsent)[3]
            if len(self._unsent) < size:
                return
            message = bytes(self._unsent[:size])
            del self._unsent[:size]
            self._send(store, message)

    def _send(self, store: int, message: bytes) -> None:
        """Some of what is refused makes the driver's write fail: that is an answer as well."""
        left = message
        try:
            while left:
                left = left[os.write(store, left) :]
        except OSError as error:
            _, request, transaction, _ = HEADER.unpack_from(message)
            name = errno.errorcode[error.errno or 0].encode() + b"\0"
            self._connection.sendall(Message(Op.ERROR, request, transaction, name).pack())


def accept(address: str, serve: Callable[[socket.socket], None]) -> threading.Thread:
    """Serve all who connect, each in a thread; return the one that accepts them."""
    server = listen(address)

    def run() -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.xen.conformance.agent")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--xen", action="store_const", const="xen", dest="where")
    where.add_argument("--embedded", metavar="SOCKET", dest="where", help="an embedded Xen's")
    parser.add_argument("--sides", metavar="ADDRESS", required=True, help="for grants and events")
    parser.add_argument("--store", metavar="ADDRESS=PATH", help="for XenStore")
    args = parser.parse_args()
    threads = [accept(args.sides, lambda connection: serve_side(connection, args.where))]
    if args.store:
        address, path = args.store.split("=", 1)
        threads.append(accept(address, lambda connection: Relay(connection, path).run()))
    print("serving", flush=True)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
