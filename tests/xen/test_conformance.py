"""What Xen does, asked of the embedded Xen and of both real xenstoreds without Xen."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.embedded.world import World
from tests.support.world import platform_of, running_world, store_socket, xen_socket
from tests.support.xenstored import DaemonWorld, XenStore
from tests.xen.conformance.differences import DIFFERENCES
from tests.xen.conformance.registry import CHECKS, Check, Group, Need, StorePlace, XenPlace
from tests.xen.conformance.runner import Result, Verdict, of_groups, run

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


@asynccontextmanager
async def xen_place(tmp_path: Path) -> AsyncIterator[XenPlace]:
    """A guest and domain 0 of an embedded Xen, as a place for checks of grants and events."""
    async with running_world(tmp_path) as world:
        await world.create_domain(2, "guest")
        async with platform_of(world) as one, platform_of(world, 2) as other:
            command = [sys.executable, "-m", "tests.xen.conformance.holder", xen_socket(world)]
            yield XenPlace(one, other, 0, 2, command)


@pytest.mark.parametrize(
    "check", of_groups({Group.GRANTS, Group.EVENTS}), ids=lambda check: check.name
)
async def test_grants_and_events(tmp_path: Path, check: Check) -> None:
    async with xen_place(tmp_path) as place:
        judge(await trio.to_thread.run_sync(run, check, place, "embedded"))


@pytest.mark.parametrize("check", of_groups({Group.STORE}), ids=lambda check: check.name)
async def test_xenstore(tmp_path: Path, xenstore: XenStore, check: Check) -> None:
    if xenstore is XenStore.EMBEDDED and Need.RESTART in check.needs:
        with embedded_process() as place:
            judge(run(check, place, xenstore.value))
        return
    async with store_place(tmp_path, xenstore) as place:
        judge(await trio.to_thread.run_sync(run, check, place, xenstore.value))


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
