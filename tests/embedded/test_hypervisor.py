"""The hypervisor stand-in: what Xen would refuse, whose death ends what, hostile clients."""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.embedded.hypervisor import REPLY, REQUEST, Op
from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.xen.platform import Channel, Page, Platform
from tests.support.world import platform_of, running_world, xen_socket


@asynccontextmanager
async def three_domains(
    tmp_path: Path,
) -> AsyncIterator[tuple[World, Platform, Platform, Platform]]:
    """A world, and the platforms of domains 0, 2 and 3."""
    async with running_world(tmp_path) as world:
        for domid in (2, 3):
            await world.create_domain(domid, f"d{domid}")
        async with (
            platform_of(world) as zero,
            platform_of(world, 2) as two,
            platform_of(world, 3) as three,
        ):
            yield world, zero, two, three


async def share(platform: Platform, domid: int) -> Page:
    return await trio.to_thread.run_sync(platform.share_page, domid)


async def map_page(platform: Platform, domid: int, ref: int) -> Page:
    return await trio.to_thread.run_sync(platform.map_page, domid, ref)


async def alloc(platform: Platform, domid: int) -> Channel:
    return await trio.to_thread.run_sync(platform.alloc_unbound, domid)


async def bind(platform: Platform, domid: int, port: int) -> Channel:
    return await trio.to_thread.run_sync(platform.bind_interdomain, domid, port)


async def close(*resources: Page | Channel) -> None:
    for resource in resources:
        await trio.to_thread.run_sync(resource.close)


def has_event(channel: Channel) -> bool:
    return bool(select.select([channel], [], [], 0)[0])


async def test_a_page_is_for_the_domain_it_was_granted_to(tmp_path: Path) -> None:
    async with three_domains(tmp_path) as (_, zero, two, three):
        page = await share(zero, 2)
        with pytest.raises(XenError, match="Invalid argument"):
            await map_page(three, 0, page.ref)
        with pytest.raises(XenError):
            await map_page(two, 3, page.ref)  # no grant of that domain
        mapped = await map_page(two, 0, page.ref)
        await close(page)
        # As under Xen: while somebody maps it, the grant cannot end.
        await close(mapped, await map_page(two, 0, page.ref))
        with pytest.raises(XenError):
            await map_page(two, 0, page.ref)


async def test_a_port_is_for_the_domain_it_was_made_for_and_bound_once(tmp_path: Path) -> None:
    async with three_domains(tmp_path) as (_, zero, two, three):
        port = await alloc(zero, 2)
        with pytest.raises(XenError):
            await bind(three, 0, port.port)
        with pytest.raises(XenError):
            await bind(two, 3, port.port)
        with pytest.raises(XenError):
            await bind(two, 0, port.port + 1000)
        bound = await bind(two, 0, port.port)
        with pytest.raises(XenError):
            await bind(two, 0, port.port)
        assert has_event(bound)  # as Xen does, the binder finds one pending
        assert not has_event(port)
        bound.notify()
        assert has_event(port)
        await close(port, bound)


async def test_a_dead_domains_ends_close(tmp_path: Path) -> None:
    async with three_domains(tmp_path) as (world, zero, _, three):
        async with platform_of(world, 2) as dying:
            page = await share(dying, 0)
            kept = await share(dying, 0)
            port = await alloc(dying, 0)
            ours = await alloc(zero, 2)
            mapped = await map_page(zero, 2, page.ref)
            theirs = await bind(dying, 0, ours.port)
            await world.destroy_domain(2)
            with pytest.raises(XenError):
                await map_page(zero, 2, kept.ref)
            with pytest.raises(XenError):
                await bind(zero, 2, port.port)
            ours.notify()  # dropped, as Xen drops it
            with pytest.raises(XenError):
                await share(dying, 0)
            await close(page, kept, port, theirs)
        await close(mapped, ours)
        await world.create_domain(2, "again")
        async with platform_of(world, 2) as another:
            with pytest.raises(XenError):
                await bind(another, 0, ours.port)  # it was closed
        assert three.domid == 3


async def test_a_client_that_goes_takes_its_grants_along(tmp_path: Path) -> None:
    async with three_domains(tmp_path) as (world, _, two, _):
        async with platform_of(world) as killed:
            page = await share(killed, 2)
            ref = page.ref
            port = (await alloc(killed, 2)).port
        with pytest.raises(XenError):
            await map_page(two, 0, ref)
        with pytest.raises(XenError):
            await bind(two, 0, port)


class RawClient:
    """A client of the hypervisor's socket without the C shim's manners."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(path)
        self.socket.settimeout(30)

    def send(self, op: int, domid: int = 0, argument: int = 0) -> None:
        self.socket.send(REQUEST.pack(op, domid, argument))

    def receive(self) -> tuple[int, int, list[int]]:
        raw, fds, _, _ = socket.recv_fds(self.socket, REPLY.size, 8)
        return (*REPLY.unpack(raw), fds)

    def call(self, op: int, domid: int = 0, argument: int = 0) -> tuple[int, int, list[int]]:
        self.send(op, domid, argument)
        return self.receive()

    def closed(self) -> bool:
        try:
            return self.socket.recv(64) == b""
        except ConnectionResetError:
            return True


@contextmanager
def raw_client(path: str) -> Iterator[RawClient]:
    client = RawClient(path)
    with client.socket:
        yield client


async def in_thread(function: object, *arguments: object) -> object:
    return await trio.to_thread.run_sync(function, *arguments)  # type: ignore[arg-type]


async def test_pages_are_sealed_memfds(tmp_path: Path) -> None:
    def look(path: str) -> None:
        with raw_client(path) as client:
            status, _, (fd,) = client.call(Op.GRANT_SHARE, 2)
            assert status == 0
            assert os.fstat(fd).st_size == 4096
            wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & wanted == wanted
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)
            with mmap.mmap(fd, 4096) as page:
                assert page[:] == bytes(4096)
            os.close(fd)

    async with running_world(tmp_path) as world:
        await in_thread(look, xen_socket(world))


async def test_requests_that_are_none_are_refused_or_end_the_connection(tmp_path: Path) -> None:
    def try_all(path: str) -> None:
        with raw_client(path) as client:
            for op in (0, 9, 0xFFFFFFFF):
                assert client.call(op) == (-errno.ENOSYS, 0, [])
            for op in (Op.GRANT_END, Op.GRANT_UNMAP, Op.GRANT_MAP, Op.EVTCHN_CLOSE, Op.EVTCHN_BIND):
                assert client.call(op, 0xFFFFFFFF, 0xFFFFFFFF) == (-errno.EINVAL, 0, [])
            assert client.call(Op.HELLO)[0] == 0
        for raw in (b"x", b"x" * 11, b"x" * 13, b"x" * 64, b"x" * 5000):
            with raw_client(path) as client:
                client.socket.send(raw)
                assert client.closed()
        with raw_client(path) as client:  # descriptors are not wanted and not kept
            socket.send_fds(client.socket, [REQUEST.pack(Op.HELLO, 0, 0)], [0, 1, 2])
            assert client.receive()[0] == 0

    async with running_world(tmp_path) as world:
        await in_thread(try_all, xen_socket(world))
        async with platform_of(world) as platform:  # and everybody else is served on
            assert platform.domid == 0


async def test_a_client_that_does_not_read_never_gets_anothers_page(tmp_path: Path) -> None:
    def play(dom0: str, dom2: str, dom3: str) -> None:
        with raw_client(dom0) as owner, raw_client(dom2) as lazy, raw_client(dom3) as other:
            _, ref, (granted,) = owner.call(Op.GRANT_SHARE, 2)
            inode = os.fstat(granted).st_ino
            lazy.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            lazy.socket.settimeout(0.2)
            asked = 0
            try:
                while asked < 4000:  # until the other side waits for this one to read
                    lazy.send(Op.GRANT_MAP, 0, ref)
                    asked += 1
            except (BlockingIOError, TimeoutError):
                pass
            assert asked < 4000
            lazy.socket.settimeout(30)
            os.close(granted)
            assert owner.call(Op.GRANT_END, 0, ref)[0] == 0
            for _ in range(20):  # takes over the numbers of what was closed
                os.close(other.call(Op.GRANT_SHARE, 0)[2][0])
            for _ in range(asked):
                status, _, fds = lazy.receive()
                for fd in fds:
                    assert os.fstat(fd).st_ino == inode
                    os.close(fd)
                assert status in (0, -errno.EINVAL)

    async with running_world(tmp_path) as world:
        for domid in (2, 3):
            await world.create_domain(domid, f"d{domid}")
        await in_thread(play, *(xen_socket(world, domid) for domid in (0, 2, 3)))


async def test_what_one_client_may_hold_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemu_vtpm_bridge.embedded.hypervisor.GRANTS_MAX", 2)
    monkeypatch.setattr("qemu_vtpm_bridge.embedded.hypervisor.PORTS_MAX", 2)
    async with three_domains(tmp_path) as (_, zero, two, _):
        held: list[Page | Channel] = [await share(zero, 2), await share(zero, 2)]
        with pytest.raises(XenError, match="No space left"):
            await share(zero, 2)
        held += [await alloc(zero, 2), await alloc(zero, 2)]
        with pytest.raises(XenError, match="No space left"):
            await alloc(zero, 2)
        theirs = await bind(two, 0, held[2].port)  # type: ignore[union-attr]
        await close(*held, theirs)


async def test_running_out_of_descriptors_makes_clients_wait_and_ends_no_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = trio.Event()
    with trio.socket.socket() as some_socket:
        listener_class = type(some_socket)
    accept = listener_class.accept

    async def accept_or_fail(self: trio.socket.SocketType) -> object:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.EMFILE, "Too many open files")
        return await accept(self)

    async with running_world(tmp_path) as world:
        monkeypatch.setattr(listener_class, "accept", accept_or_fail)
        await world.create_domain(2, "vtpm")
        await failed.wait()
        async with platform_of(world, 2) as platform:
            assert platform.domid == 2


def test_the_protocols_words_have_no_padding() -> None:
    assert (REQUEST.size, REPLY.size) == (12, 8)
    assert struct.calcsize("=III") == 12
    assert array.array("i").itemsize == 4
