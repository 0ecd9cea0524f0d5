"""The real xenstoreds, without Xen, and a world whose XenStore is one of them.

The daemons run in `tests/xen/noxen`, a library that stands between them and Xen; what
that leaves to be done by Xen's other end is done here: a domain's ring is a file, its
event channel a socket for datagrams.  `DaemonWorld` is an embedded world in everything
but XenStore: grants and event channels are the embedded hypervisor's, each domain's
XenStore socket leads to the daemon, domain 0's to the daemon's own socket and another's
to that domain's ring.  So the daemon sees guests as guests, with their permissions and
quotas.
"""

from __future__ import annotations

import enum
import functools
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio

from qemu_vtpm_bridge.embedded.wire import Message, Op, StreamParser
from qemu_vtpm_bridge.embedded.world import World
from tests.support.ring import PAGE_BYTES, VIRQ, SharedRing, send_event
from tests.support.wait import wait_until

SOURCE: Final = Path(__file__).parents[1] / "xen" / "noxen" / "noxen.c"
DEADLINE_S: Final = 30.0


class XenStore(enum.Enum):
    """Which program is XenStore."""

    EMBEDDED = "embedded"
    XENSTORED = "xenstored"
    OXENSTORED = "oxenstored"


@functools.cache
def program(server: XenStore) -> Path:
    """Return where Debian has a daemon; raises FileNotFoundError, which fails the test."""
    found = sorted(Path("/usr/lib").glob(f"xen-*/bin/{server.value}"))
    if not found:
        raise FileNotFoundError(f"no {server.value}: install Debian's xen-utils-4.17")
    return found[-1]


@functools.cache
def noxen() -> Path:
    """Build the library that stands between a daemon and Xen."""
    directory = tempfile.TemporaryDirectory(prefix="noxen")
    _KEPT.append(directory)
    library = Path(directory.name) / "noxen.so"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    command = ["gcc", "-O2", *warnings, "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return library


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


class Daemon:
    """One xenstored in one directory.  A context manager."""

    def __init__(self, server: XenStore, directory: Path) -> None:
        self.server = server
        self.directory = directory
        self.socket = directory / "socket"
        self._process: subprocess.Popen[bytes] | None = None
        self.make_ring(0)
        (directory / "xsd_port").write_text("1", encoding="ascii")

    # Domains, as Xen has them.

    def _ring(self, domid: int) -> Path:
        return self.directory / f"dom-{domid}.ring"

    def make_ring(self, domid: int) -> None:
        """Have a domain live; the daemon is told by an INTRODUCE."""
        self._ring(domid).write_bytes(bytes(PAGE_BYTES))

    def kill_domain(self, domid: int) -> None:
        """Have a domain die, and Xen tell the daemon to look."""
        self._ring(domid).unlink()
        send_event(self.directory / "events.sock", VIRQ)

    # The process.

    def start(self) -> None:
        """Start it, or start it again, and return when it listens."""
        environment = os.environ | {
            "LD_PRELOAD": str(noxen()),
            "NOXEN_DIR": str(self.directory),
            "NOXEN_SOCKET": str(self.socket),
            "XENSTORED_RUNDIR": str(self.directory),
        }
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(self._command(), env=environment, stderr=log)
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError((self.directory / "log").read_text(encoding="utf-8"))
            os.sched_yield()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            return client.connect_ex(str(self.socket)) == 0

    def _command(self) -> list[str]:
        if self.server is XenStore.XENSTORED:
            return [str(program(self.server)), "--no-fork"]
        configuration = self.directory / "oxenstored.conf"
        lines = {
            "pid-file": self.directory / "pid",
            "xenstored-log-file": self.directory / "xenstored.log",
            "access-log-file": self.directory / "access.log",
            "xenstored-kva": self._ring(0),
            "xenstored-port": self.directory / "xsd_port",
            "persistent": "false",
        }
        text = "".join(f"{key} = {value}\n" for key, value in lines.items())
        configuration.write_text(text, encoding="utf-8")
        return [str(program(self.server)), "--no-fork", "--config-file", str(configuration)]

    def stop(self) -> None:
        """Kill it; its clients lose their connections."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
            self.socket.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill it and start it again; domains have to be introduced anew."""
        self.stop()
        self.start()

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def running_daemon(server: XenStore) -> Iterator[Daemon]:
    """Give a daemon in a directory of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="qvbx") as directory,
        Daemon(server, Path(directory)) as daemon,
    ):
        yield daemon


class DaemonWorld(World):
    """A world whose XenStore is a daemon."""

    def __init__(self, directory: Path, daemon: Daemon) -> None:
        super().__init__(directory)
        del self.store  # nobody's: the daemon is XenStore
        self.daemon = daemon
        self._rings: dict[int, SharedRing] = {}
        self._ring_scopes: dict[int, trio.CancelScope] = {}

    def _made(self, domid: int) -> None:
        self.daemon.make_ring(domid)

    async def _introduce(self, domid: int) -> None:
        # Anything for the frame and the port: the library gives what belongs to the domain.
        answer = self._store_request(Op.INTRODUCE, str(domid), "1", "1")
        assert answer.type == Op.INTRODUCE, answer
        self._rings[domid] = ring = SharedRing(self.daemon.directory, domid)
        assert self._nursery is not None
        self._ring_scopes[domid] = await self._nursery.start(_run_ring, ring)

    async def _release(self, domid: int) -> None:
        self._ring_scopes.pop(domid).cancel()
        del self._rings[domid]
        self.daemon.kill_domain(domid)
        await wait_until(lambda: not self._introduced(domid), DEADLINE_S)

    def _introduced(self, domid: int) -> bool:
        return self._store_request(Op.IS_DOMAIN_INTRODUCED, str(domid)).payload == b"T\0"

    def _request(self, op: Op, payload: bytes) -> Message:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.daemon.socket))
            client.settimeout(DEADLINE_S)
            client.sendall(Message(op, 1, 0, payload).pack())
            parser = StreamParser()
            while raw := client.recv(65536):
                for message in parser.feed(raw):
                    return message
        raise ConnectionError("the daemon hung up")

    async def _serve_xenstore_client(self, client: trio.socket.SocketType, domid: int) -> None:
        if domid in self._rings:
            await self._rings[domid].serve(client)
            return
        # In a thread: xenstored's backlog is one connection, and trio takes a full one for
        # a connection that was made.
        with socket.socket(socket.AF_UNIX) as ours:
            await trio.to_thread.run_sync(ours.connect, str(self.daemon.socket))
            server = trio.socket.from_stdlib_socket(ours)
            async with trio.open_nursery() as nursery:
                for pair in ((client, server), (server, client)):
                    nursery.start_soon(_pour, *pair, nursery.cancel_scope)


async def _run_ring(
    ring: SharedRing, *, task_status: trio.TaskStatus[trio.CancelScope] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            await nursery.start(ring.run)
            task_status.started(scope)


async def _pour(
    source: trio.socket.SocketType, drain: trio.socket.SocketType, scope: trio.CancelScope
) -> None:
    try:
        while raw := await source.recv(65536):
            left: Sequence[int] | memoryview = memoryview(raw)
            while left:
                left = left[await drain.send(left) :]
    except OSError:
        pass
    scope.cancel()
