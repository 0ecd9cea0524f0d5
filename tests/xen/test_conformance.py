"""What Xen does, asked of the embedded Xen and of both real xenstoreds without Xen."""

from __future__ import annotations

import enum
import mmap
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.embedded.wire import Op
from qemu_vtpm_bridge.embedded.world import World
from tests.support.world import running_world, store_socket, xen_socket
from tests.support.xenstored import Daemon, DaemonWorld, XenStore
from tests.xen.conformance import paused
from tests.xen.conformance.address import listen
from tests.xen.conformance.client import OK, StoreClient
from tests.xen.conformance.differences import DIFFERENCES
from tests.xen.conformance.registry import CHECKS, Check, Group, Need, StorePlace, XenPlace
from tests.xen.conformance.remote import RemoteSide
from tests.xen.conformance.runner import Result, Verdict, of_groups, run
from tests.xen.conformance.sides import LocalSide

GUESTS = (2, 3)


class WorldsLife:
    """Creates and destroys domains of a world, from a check's thread."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._next = 10

    def create(self) -> int:
        self._next += 1
        self.again(self._next)
        return self._next

    def again(self, domid: int) -> None:
        trio.from_thread.run(self._world.create_domain, domid, "new")

    def destroy(self, domid: int) -> None:
        trio.from_thread.run(self._world.destroy_domain, domid)


@asynccontextmanager
async def store_place(tmp_path: Path, server: XenStore) -> AsyncIterator[StorePlace]:
    """A world with two guests, as a place for checks of XenStore."""
    async with running_world(tmp_path, server) as world:
        for domid in GUESTS:
            await world.create_domain(domid, f"guest-{domid}")
        yield StorePlace(
            socket=store_socket(world),
            guest_sockets={domid: store_socket(world, domid) for domid in GUESTS},
            peers=list(GUESTS),
            life=WorldsLife(world),
            kill=world.daemon.restart if isinstance(world, DaemonWorld) else None,
            open_guest=lambda domid: store_socket(world, domid),
        )


@contextmanager
def embedded_process() -> Iterator[StorePlace]:
    """An embedded Xen as a process, which can be killed."""
    with tempfile.TemporaryDirectory(prefix="qvb") as directory:
        command = [sys.executable, "-m", "qemu_vtpm_bridge.embedded", directory]
        processes: list[subprocess.Popen[bytes]] = []

        def start(*domains: str) -> None:
            process = subprocess.Popen([*command, *domains], stdout=subprocess.PIPE)
            processes.append(process)
            assert process.stdout is not None
            while b"Ctrl-C ends it." not in process.stdout.readline():
                assert process.poll() is None

        def stop() -> None:
            process = processes.pop()
            process.kill()
            process.communicate()

        def kill() -> None:
            stop()
            start()

        start(*(f"{domid}:guest" for domid in GUESTS))
        try:
            yield StorePlace(f"{directory}/dom/0/xenstored.sock", peers=list(GUESTS), kill=kill)
        finally:
            stop()


@contextmanager
def agent(tmp_path: Path, domid: int, xen: str, store: str) -> Iterator[dict[str, str]]:
    """An agent in a guest, as there is one on a real Xen; gives where it listens for what."""
    addresses = {name: str(tmp_path / f"{name}-{domid}") for name in ("sides", "store")}
    command = [
        *(sys.executable, "-m", "tests.xen.conformance.agent"),
        *("--embedded", xen, "--sides", addresses["sides"]),
        *("--store", f"{addresses['store']}={store}"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"serving\n"
        yield addresses
        process.kill()


class Where(enum.Enum):
    """Which sides are another program's, which an agent stands for."""

    HERE = "both here"
    OTHER_AWAY = "the other away"
    ONE_AWAY = "the one away"


def check_sides(tmp_path: Path, world: World, check: Check, where: Where) -> Result:
    """Run a check of grants and events between domain 0 and a guest."""
    with ExitStack() as stack:
        here = stack.enter_context(LocalSide.open(xen_socket(world)))
        if where is Where.HERE:
            guest = stack.enter_context(LocalSide.open(xen_socket(world, 2)))
            return run(check, XenPlace(here, guest, 0, 2), "embedded")
        sockets = xen_socket(world, 2), store_socket(world, 2)
        addresses = stack.enter_context(agent(tmp_path, 2, *sockets))
        away = stack.enter_context(RemoteSide(addresses["sides"]))
        if where is Where.OTHER_AWAY:
            return run(check, XenPlace(here, away, 0, 2), "embedded")
        return run(check, XenPlace(away, here, 2, 0), "embedded")


@pytest.mark.parametrize("where", Where, ids=lambda where: where.value)
@pytest.mark.parametrize(
    "check", of_groups({Group.GRANTS, Group.EVENTS}), ids=lambda check: check.name
)
async def test_grants_and_events(tmp_path: Path, check: Check, where: Where) -> None:
    async with running_world(tmp_path) as world:
        await world.create_domain(2, "guest")
        judge(await trio.to_thread.run_sync(check_sides, tmp_path, world, check, where))


@pytest.mark.parametrize("check", of_groups({Group.STORE}), ids=lambda check: check.name)
async def test_xenstore(tmp_path: Path, xenstore: XenStore, check: Check) -> None:
    if xenstore is XenStore.EMBEDDED and Need.RESTART in check.needs:
        with embedded_process() as place:
            judge(run(check, place, xenstore.value))
        return
    async with store_place(tmp_path, xenstore) as place:
        judge(await trio.to_thread.run_sync(run, check, place, xenstore.value))


of_guests = pytest.mark.parametrize(
    "check",
    [check for check in of_groups({Group.STORE}) if check.needs == {Need.GUESTS}],
    ids=lambda check: check.name,
)


@of_guests
async def test_xenstore_through_agents(tmp_path: Path, check: Check) -> None:
    async with store_place(tmp_path, XenStore.EMBEDDED) as place:
        judge(await trio.to_thread.run_sync(check_through_agents, tmp_path, place, check))


def check_through_agents(tmp_path: Path, place: StorePlace, check: Check) -> Result:
    """Run a check of XenStore whose guests' connections are agents'."""
    with ExitStack() as stack:
        sockets = {
            domid: stack.enter_context(agent(tmp_path, domid, f"{path}.xen", path))["store"]
            for domid, path in place.guest_sockets.items()
        }
        as_guests = replace(place, guest_sockets=sockets, guests_in_order=False)
        return run(check, as_guests, "embedded")


@of_guests
def test_xenstore_through_rings(tmp_path: Path, check: Check) -> None:
    """As domains that are paused are acted for on a real Xen."""
    daemon = Daemon(XenStore.XENSTORED, tmp_path)
    with ExitStack() as stack:
        stack.callback(daemon.stop)
        daemon.start()
        sockets = {domid: stack.enter_context(acted_for(daemon, domid)) for domid in GUESTS}
        judge(run(check, StorePlace(str(daemon.socket), sockets), "xenstored"))


@contextmanager
def acted_for(daemon: Daemon, domid: int) -> Iterator[str]:
    """A domain that never runs, and a thread that acts as it at a socket."""
    daemon.make_ring(domid)
    with StoreClient(str(daemon.socket)) as client:
        assert client.ask(Op.INTRODUCE, str(domid), "1", "1") == OK
    path = str(daemon.directory / f"store-of-{domid}")
    with (daemon.directory / f"dom-{domid}.ring").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    with mapped, listen(path) as server:
        arguments = (memoryview(mapped), server, str(daemon.socket))
        thread = threading.Thread(target=paused.act, args=arguments)
        thread.start()
        try:
            yield path
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def judge(result: Result) -> None:
    assert result.verdict in (Verdict.PASSED, Verdict.DIFFERS), result.detail


def test_the_table_of_differences_names_checks_that_there_are() -> None:
    for server, known in DIFFERENCES.items():
        for name, difference in known.items():
            assert name in CHECKS, f"{server}: {name}"
            assert difference.reason


def test_the_document_holds_the_table_of_differences() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = {line for line in text.splitlines() if line.startswith("| ") and "_" in line}
    wanted = {
        f"| {name} | {difference.reason} |"
        for known in DIFFERENCES.values()
        for name, difference in known.items()
    }
    assert rows == wanted
