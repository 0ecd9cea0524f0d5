"""A world: one embedded Xen in one directory, its domains and their sockets.

Theory of operation.  The directory holds

    control.sock                   JSON, one request and one answer a line: create, destroy, list
    dom/<domid>/xenstored.sock     XenStore's wire protocol, acting as that domain
    dom/<domid>/xen.sock           grants and event channels, acting as that domain

Domain 0 is there from the start; the others are created with the XenStore entries that a
toolstack writes, and destroyed as Xen destroys them: connections, grants, ports and owned
nodes go, then @releaseDomain fires.  A lock on the directory keeps a second world out.

Who may lie: every client.  One that sends what is no protocol, or does not read what it
is sent, loses its connection; nobody waits for it.
"""

from __future__ import annotations

import array
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import trio

from ..errors import ConfigError
from . import tree
from .hypervisor import Hypervisor
from .store import Connection, Store
from .wire import MalformedStream, Message, Op, StreamParser, pack_strings

log = logging.getLogger(__name__)

OUTPUT_MAX_BYTES: Final = 1 << 20
"""What a XenStore client may leave unread before it is disconnected."""

DOMID_MAX: Final = 0x7FEF
_SOCKET_PATH_MAX: Final = 107
_LINE_MAX_BYTES: Final = 4096
_LOCK_FILE: Final = "lock"
_ACCEPT_ERRORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_ACCEPT_RETRY_S: Final = 0.1


class World:
    """One embedded Xen.  Run `serve`; the other methods may be called once it has started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.store = Store()
        self.hypervisor = Hypervisor()
        self._scopes: dict[int, trio.CancelScope] = {}
        self._ended: dict[int, trio.Event] = {}
        self._nursery: trio.Nursery | None = None
        self._senders: dict[Connection, _Sender] = {}

    # Running.

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; every socket is then gone.

        Raises ConfigError where the directory cannot be used or another world has it.
        """
        lock_fd = self._lock()
        try:
            shutil.rmtree(self.directory / "dom", ignore_errors=True)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._toolstack_entries(0, "Domain-0")
                await nursery.start(self._serve_domain, 0)
                await nursery.start(self._serve_control)
                task_status.started()
        finally:
            shutil.rmtree(self.directory / "dom", ignore_errors=True)
            os.close(lock_fd)

    def _lock(self) -> int:
        longest = str(self.directory / "dom" / str(DOMID_MAX) / "xenstored.sock")
        if len(os.fsencode(longest)) > _SOCKET_PATH_MAX:
            raise ConfigError(
                f"{self.directory}: the path is too long for the sockets in it",
                next_step="use a directory nearer to the root, as /run or /tmp",
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock_fd = os.open(self.directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"{self.directory}: {error.strerror}") from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            raise ConfigError(
                f"another embedded Xen runs in {self.directory}",
                next_step="use that one, or give another directory",
            ) from None
        return lock_fd

    # Domains.

    async def create_domain(self, domid: int, name: str) -> None:
        """Create a domain with its XenStore entries and sockets; raises ConfigError."""
        if not 0 < domid <= DOMID_MAX:
            raise ConfigError(f"{domid} is no domain id (1 to {DOMID_MAX})")
        if domid in self._scopes:
            raise ConfigError(f"domain {domid} exists already")
        assert self._nursery is not None
        self._made(domid)
        self._toolstack_entries(domid, name)
        await self._introduce(domid)
        await self._nursery.start(self._serve_domain, domid)
        self._flush()

    async def destroy_domain(self, domid: int) -> None:
        """Destroy a domain as Xen does; raises ConfigError where there is none."""
        if domid == 0 or domid not in self._scopes:
            raise ConfigError(f"there is no domain {domid} that could be destroyed")
        ended = self._ended[domid]
        self._scopes[domid].cancel()
        await ended.wait()
        await self._release(domid)
        for path in (tree.domain_path(domid), f"/vm/{self._vm_uuid(domid)}"):
            self._store_request(Op.RM, path)
        self._flush()

    def domains(self) -> dict[int, str]:
        """Return the domains by id, with their names."""
        found = {}
        for domid in sorted(self._scopes):
            answer = self._store_request(Op.READ, f"{tree.domain_path(domid)}/name")
            named = answer.type == Op.READ
            found[domid] = answer.payload.decode("ascii", "replace") if named else ""
        return found

    def _made(self, domid: int) -> None:
        """Have XenStore find that Xen has this domain."""
        self.store.living.add(domid)

    async def _introduce(self, domid: int) -> None:
        """Tell XenStore of a domain, whose toolstack entries are there."""
        self.store.introduce(domid)

    async def _release(self, domid: int) -> None:
        """Tell XenStore that a domain is gone."""
        self.store.living.discard(domid)
        if domid in self.store.introduced:
            self.store.release(domid)

    def _vm_uuid(self, domid: int) -> uuid.UUID:
        return uuid.uuid5(uuid.NAMESPACE_URL, f"{self.directory}#{domid}")

    def _toolstack_entries(self, domid: int, name: str) -> None:
        """Write what libxl writes for a domain, with its permissions."""
        own, vm = tree.domain_path(domid), f"/vm/{self._vm_uuid(domid)}"
        for path, value, permissions in (
            (own, "", f"n0 r{domid}"),
            (vm, "", f"n0 r{domid}"),
            (f"{vm}/name", name, ""),
            (f"{vm}/uuid", str(self._vm_uuid(domid)), ""),
            (f"{own}/vm", vm, ""),
            (f"{own}/name", name, ""),
            (f"{own}/domid", str(domid), ""),
            *((f"{own}/{part}", "", f"n{domid}") for part in ("device", "backend", "data")),
        ):
            self._request(Op.WRITE, path.encode() + b"\0" + value.encode())
            if permissions:
                self._store_request(Op.SET_PERMS, path, *permissions.split())

    def _store_request(self, op: Op, *strings: str) -> Message:
        return self._request(op, pack_strings([string.encode() for string in strings]))

    def _request(self, op: Op, payload: bytes) -> Message:
        """Do one thing as the toolstack in domain 0, by the same code that clients reach."""
        return self.store.request(Connection(0), Message(op, 0, 0, payload))

    async def _serve_domain(
        self, domid: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        place = self.directory / "dom" / str(domid)
        place.mkdir(parents=True)
        self._ended[domid] = ended = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                self._scopes[domid] = nursery.cancel_scope
                for name, kind, serve in (
                    ("xenstored.sock", socket.SOCK_STREAM, self._serve_xenstore_client),
                    ("xen.sock", socket.SOCK_SEQPACKET, self._serve_hypervisor_client),
                ):
                    await nursery.start(_listen, place / name, kind, serve, domid)
                task_status.started()
        finally:
            del self._scopes[domid], self._ended[domid]
            shutil.rmtree(place, ignore_errors=True)
            ended.set()

    # XenStore.

    async def _serve_xenstore_client(self, client: trio.socket.SocketType, domid: int) -> None:
        connection = self.store.connect(domid)
        parser = StreamParser()
        sender = self._senders[connection] = _Sender(client)
        try:
            async with trio.open_nursery() as nursery:
                sender.scope = nursery.cancel_scope
                nursery.start_soon(sender.run)
                while raw := await client.recv(65536):
                    for message in parser.feed(raw):
                        reply = self.store.request(connection, message)
                        # A client finds its own change's event before the answer, and a
                        # new watch's behind it.
                        if message.type != Op.WATCH:
                            self._flush()
                        sender.put(reply.pack())
                        self._flush()
                nursery.cancel_scope.cancel()
        except* (OSError, MalformedStream) as group:
            log.info("a XenStore client of domain %d was disconnected: %s", domid, group.exceptions)
        finally:
            del self._senders[connection]
            self.store.disconnect(connection)

    def _flush(self) -> None:
        """Send the watch events that the last change caused."""
        for connection, sender in self._senders.items():
            for event in connection.events:
                sender.put(event.pack())
            connection.events.clear()

    # Grants and event channels.

    async def _serve_hypervisor_client(self, client: trio.socket.SocketType, domid: int) -> None:
        connection = self.hypervisor.connect(domid)
        try:
            while raw := await client.recv(64):
                await _answer(client, *self.hypervisor.request(connection, raw))
        except (OSError, ValueError) as error:
            log.info("a hypervisor client of domain %d was disconnected: %s", domid, error)
        finally:
            self.hypervisor.disconnect(connection)

    # The control socket.

    async def _serve_control(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        path = self.directory / "control.sock"
        path.unlink(missing_ok=True)
        try:
            await _listen(
                path, socket.SOCK_STREAM, self._serve_control_client, 0, task_status=task_status
            )
        finally:
            path.unlink(missing_ok=True)

    async def _serve_control_client(self, client: trio.socket.SocketType, _: int) -> None:
        raw = b""
        with suppress(OSError):
            while chunk := await client.recv(_LINE_MAX_BYTES):
                raw += chunk
                while b"\n" in raw:
                    line, raw = raw.split(b"\n", 1)
                    answer = await self._control(line)
                    await client.send(json.dumps(answer).encode() + b"\n")
                if len(raw) > _LINE_MAX_BYTES:
                    return

    async def _control(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            match request["op"]:
                case "create":
                    await self.create_domain(int(request["domid"]), str(request.get("name", "")))
                case "destroy":
                    await self.destroy_domain(int(request["domid"]))
                case "list":
                    return {"ok": True, "domains": self.domains()}
                case other:
                    return {"ok": False, "error": f"unknown op {other!r}: create, destroy, list"}
        except ConfigError as error:
            return {"ok": False, "error": str(error)}
        except (ValueError, KeyError, TypeError) as error:
            return {"ok": False, "error": f"not a request: {error!r}"}
        return {"ok": True}


class _Sender:
    """Sends to one client without making anybody wait for it."""

    def __init__(self, client: trio.socket.SocketType) -> None:
        self._client = client
        self._buffer = bytearray()
        self._ready = trio.Event()
        self.scope = trio.CancelScope()

    def put(self, raw: bytes) -> None:
        """Queue bytes; a client that leaves too many unread is disconnected."""
        self._buffer += raw
        self._ready.set()
        if len(self._buffer) > OUTPUT_MAX_BYTES:
            log.warning("a XenStore client does not read its events: disconnected")
            self.scope.cancel()

    async def run(self) -> None:
        """Send what is queued until cancelled."""
        while True:
            await self._ready.wait()
            self._ready = trio.Event()
            while self._buffer:
                sent = await self._client.send(self._buffer[:65536])
                del self._buffer[:sent]


async def _answer(client: trio.socket.SocketType, reply: bytes, fds: list[int]) -> None:
    """Send a reply with descriptors along."""
    # Copies: while a client does not read, the originals may be closed and their numbers
    # become another domain's page.
    copies = [os.dup(fd) for fd in fds]
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", copies))]
    try:
        await client.sendmsg([reply], rights if fds else [])
    finally:
        for fd in copies:
            os.close(fd)


async def _accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """Return the next client; while descriptors are used up, clients wait."""
    while True:
        try:
            client, _ = await listener.accept()
            return client
        except OSError as error:
            if error.errno not in _ACCEPT_ERRORS:
                raise
            log.warning("a client has to wait: %s", error.strerror)
            await trio.sleep(_ACCEPT_RETRY_S)


async def _listen(
    path: Path,
    kind: socket.SocketKind,
    serve: Callable[[trio.socket.SocketType, int], Awaitable[None]],
    domid: int,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    async def client_task(client: trio.socket.SocketType) -> None:
        with client:
            await serve(client, domid)

    listener = trio.socket.socket(socket.AF_UNIX, kind)
    with listener:
        await listener.bind(str(path))
        listener.listen(64)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                nursery.start_soon(client_task, await _accept(listener))


async def run_embedded_xen(directory: Path, domains: list[tuple[int, str]]) -> None:
    """Serve a world until cancelled, and tell a person how to play with it."""
    world = World(directory)
    async with trio.open_nursery() as nursery:
        await nursery.start(world.serve)
        for domid, name in domains:
            await world.create_domain(domid, name)
        print(_how_to_play(world), flush=True)


def _how_to_play(world: World) -> str:
    place = world.directory
    shown = ", ".join(f"{domid} ({name})" for domid, name in world.domains().items())
    other = next((domid for domid in world.domains() if domid), 2)
    return f"""\
An embedded Xen runs in {place}, with domains {shown}.  Look into its XenStore with
    XENSTORED_PATH={place}/dom/0/xenstored.sock xenstore-ls -p
Create a domain, here number 5:
    echo '{{"op": "create", "domid": 5, "name": "guest"}}' | socat - UNIX:{place}/control.sock
Run a vTPM domain in domain {other}, and a bridge to it in domain 0:
    qemu-vtpm-bridge attach --embedded {place} --backend {other}
    qemu-vtpm-bridge vtpm --embedded {place} --domid {other} --state-dir {place}/tpm-state
    qemu-vtpm-bridge run --embedded {place} --domid 0 --backend {other} --socket {place}/tpm.sock
Ctrl-C ends it."""
