"""The process that keeps a bridge's privileges: what it carries, gives, and refuses."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from pyxs._internal import Op, Packet

from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.opened import find_domain
from qemu_vtpm_bridge.toolstack.attach import attach, remove_stale_frontend
from qemu_vtpm_bridge.xen import broker as broker_module
from qemu_vtpm_bridge.xen.broker import RELAYS_MAX, UNFETCHED_MAX, Broker, BrokerLoop, Names
from qemu_vtpm_bridge.xen.domains import resolve_domain
from qemu_vtpm_bridge.xen.ioreq import GuestDevices
from qemu_vtpm_bridge.xen.relay import (
    TRANSACTIONS_MAX,
    UNREAD_MAX_BYTES,
    WATCHES_MAX,
    Relay,
    RelayBroken,
)
from qemu_vtpm_bridge.xen.router import StoreError, StoreGone
from qemu_vtpm_bridge.xen.store import KeptStore, Transaction, domains_named, open_store
from qemu_vtpm_bridge.xen.store_policy import StorePolicy
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.support.wait import wait_until
from tests.support.world import running_world, store_socket
from tests.support.xenstored import XenStore
from tests.xen.test_store_policy import Domains

HEADER = Packet._struct

HANG_S = 30.0
"""What waits so long waits for ever."""


def paths_for(domid: int) -> DevicePaths:
    return device_paths(PathMode.SEED, backend_domid=domid, handle=0)


PATHS = paths_for(2)


# One connection.


def message(op: int, payload: bytes, number: int = 1) -> bytes:
    return bytes(HEADER.pack(op, number, 0, len(payload))) + payload


def test_requests_go_on_one_at_a_time_and_events_pass() -> None:
    relay = Relay(lambda op, payload: True)
    first, second = message(Op.READ, b"/a\0", 1), message(Op.READ, b"/b\0", 2)
    assert relay.from_bridge(first[:10]) == b""
    assert relay.from_bridge(first[10:] + second) == first
    event = message(Op.WATCH_EVENT, b"/a\0t\0", 0)
    assert relay.from_xenstored(event) == b""
    assert relay.from_xenstored(message(Op.READ, b"1", 1)) == second
    assert relay.from_xenstored(message(Op.ERROR, b"ENOENT\0", 2)) == b""
    assert relay.to_bridge == (
        event + message(Op.READ, b"1", 1) + message(Op.ERROR, b"ENOENT\0", 2)
    )


def test_what_is_not_permitted_is_answered_in_its_turn() -> None:
    relay = Relay(lambda op, payload: payload != b"/secret\0")
    wanted = message(Op.READ, b"/a\0", 1)
    both = wanted + message(Op.WRITE, b"/secret\0", 2)
    assert relay.from_bridge(both) == wanted
    assert relay.to_bridge == b""
    relay.from_xenstored(message(Op.READ, b"1", 1))
    assert relay.to_bridge == message(Op.READ, b"1", 1) + message(Op.ERROR, b"EACCES\0", 2)
    assert relay.refused == 1


def test_P9_a_bridge_that_sends_no_messages_or_reads_none() -> None:
    with pytest.raises(RelayBroken, match="a message of 4097 bytes"):
        Relay(lambda op, payload: True).from_bridge(bytes(HEADER.pack(Op.READ, 1, 0, 4097)))
    relay = Relay(lambda op, payload: True)
    assert relay.wants_requests
    relay.from_bridge(message(Op.READ, b"/a\0") + message(Op.WRITE, bytes(4096)) + b"xx")
    assert not relay.wants_requests  # until the first is answered
    event = message(Op.WATCH_EVENT, bytes(4000))
    for _ in range(UNREAD_MAX_BYTES // len(event)):
        relay.from_xenstored(event)
    with pytest.raises(RelayBroken, match="does not read"):
        relay.from_xenstored(event)


def test_P9_watches_have_a_quota_that_domain_0_has_not() -> None:
    relay = Relay(lambda op, payload: True)

    def asked(op: int, answer: int | None = None) -> bool:
        if not relay.from_bridge(message(op, b"\0")):
            return False
        relay.from_xenstored(message(op if answer is None else answer, b"\0"))
        return True

    assert asked(Op.WATCH, Op.ERROR)  # what xenstored refuses does not count
    assert all(asked(Op.WATCH) for _ in range(WATCHES_MAX))
    relay.to_bridge.clear()
    assert not asked(Op.WATCH)
    assert relay.to_bridge == message(Op.ERROR, b"E2BIG\0")
    assert asked(Op.UNWATCH, Op.ERROR)
    assert not asked(Op.WATCH)
    assert asked(Op.UNWATCH)
    assert asked(Op.WATCH)
    assert not asked(Op.WATCH)


def test_P9_transactions_have_a_quota_that_domain_0_has_not() -> None:
    relay = Relay(lambda op, payload: True)
    ids = iter(range(1, 1000))

    def started() -> bool:
        if not relay.from_bridge(message(Op.TRANSACTION_START, b"\0")):
            return False
        relay.from_xenstored(message(Op.TRANSACTION_START, b"%d\0" % next(ids)))
        return True

    def end(transaction: int, op: int, answer: bytes) -> None:
        request = HEADER.pack(Op.TRANSACTION_END, 1, transaction, 2) + b"T\0"
        assert relay.from_bridge(request) == request
        relay.from_xenstored(HEADER.pack(op, 1, transaction, len(answer)) + answer)

    assert all(started() for _ in range(TRANSACTIONS_MAX))
    relay.to_bridge.clear()
    assert not started()
    assert relay.to_bridge == message(Op.ERROR, b"ENOSPC\0")
    # These end nothing: the request is none, or what it is about; oxenstored says EIO then.
    end(1, Op.ERROR, b"EINVAL\0")
    end(777, Op.ERROR, b"ENOENT\0")
    end(778, Op.ERROR, b"EIO\0")
    end(779, Op.TRANSACTION_END, b"OK\0")
    assert not started()
    # And these do.
    end(1, Op.TRANSACTION_END, b"OK\0")
    end(2, Op.ERROR, b"EAGAIN\0")
    assert started()
    assert started()
    assert not started()


PERMITTED = message(Op.READ, b"/ours\0", 7)
PIECES = st.one_of(
    st.just(PERMITTED),
    st.just(message(Op.READ, b"/others\0")),
    st.just(message(Op.WRITE, b"/ours\0x")),
    st.binary(max_size=40),
)


@given(st.lists(PIECES, max_size=8), st.integers(1, 50))
def test_P9_nothing_but_permitted_requests_goes_on(pieces: list[bytes], step: int) -> None:
    relay = Relay(lambda op, payload: (op, payload) == (Op.READ, b"/ours\0"))
    stream = b"".join(pieces)
    with suppress(RelayBroken):
        for at in range(0, len(stream), step):
            gone = relay.from_bridge(stream[at : at + step])
            while gone:
                op, number, transaction, _ = HEADER.unpack_from(gone)
                assert (op, gone[HEADER.size :]) == (Op.READ, b"/ours\0")
                gone = relay.from_xenstored(HEADER.pack(op, number, transaction, 0))
    assert size_of_answers(relay.to_bridge) == len(relay.to_bridge)


def size_of_answers(raw: bytes) -> int:
    """Return how many bytes whole messages are."""
    at = 0
    while at + HEADER.size <= len(raw):
        at += HEADER.size + int(HEADER.unpack_from(raw, at)[3])
    return at


# The broker, in a thread.


@contextmanager
def brokered(store_path: str, *, guest: str | None = None) -> Iterator[Broker]:
    """Give a broker that follows the vTPM domain `vtpm`, its loop in a thread."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    names = Names(store_path)

    def run() -> None:
        policy = StorePolicy(
            paths_for=paths_for,
            name_of=names.of,
            vm_of=names.vm,
            backend_domid=2,
            backend_name="vtpm",
            writes_entries=True,
            guest=guest,
        )
        BrokerLoop(far, policy, store_path).run()

    thread = threading.Thread(target=run)
    thread.start()
    broker = Broker(near, store_path)
    try:
        yield broker
    finally:
        broker.close()
        thread.join()
        far.close()
        names.close()


@asynccontextmanager
async def brokered_world(
    tmp_path: Path, server: XenStore = XenStore.EMBEDDED, guest: str | None = None
) -> AsyncIterator[tuple[World, Broker, KeptStore]]:
    async with running_world(tmp_path, server) as world:
        for domid, name in ((2, "vtpm"), (3, "guest"), (4, "other")):
            await world.create_domain(domid, name)
        with brokered(store_socket(world), guest=guest) as broker:
            kept = KeptStore(store_socket(world))
            kept.hand_over(broker)
            yield world, broker, kept


async def test_the_entries_are_written_and_watched_through_it(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with (
        brokered_world(tmp_path, xenstore) as (world, _, kept),
        open_store(kept) as store,
        open_store(store_socket(world)) as root,
    ):
        assert await store.own_domid() == 0
        assert await attach(store, PATHS)
        assert await root.read(f"{PATHS.backend}/frontend") == PATHS.frontend.encode()
        async with store.watch(PATHS.backend) as watch:
            await watch.wait()
            await root.write(f"{PATHS.backend}/state", b"2")
            assert await watch.wait() == [f"{PATHS.backend}/state"]
        assert await store.read(f"{PATHS.backend}/state") == b"2"


async def test_transactions_that_conflict_use_nothing_up(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with (
        brokered_world(tmp_path, xenstore) as (world, _, kept),
        open_store(kept) as store,
        open_store(store_socket(world)) as root,
    ):
        await attach(store, PATHS)
        place = f"{PATHS.frontend}/state"
        tries = 0

        async def conflict(transaction: Transaction) -> None:
            nonlocal tries
            tries += 1
            await transaction.write(place, b"1")
            if tries <= TRANSACTIONS_MAX + 1:
                await root.write(place, b"%d" % tries)

        await store.transact(conflict)
        assert await store.read(place) == b"1"


async def test_what_is_left_of_a_vtpm_domain_goes(tmp_path: Path, xenstore: XenStore) -> None:
    """The last device's directory leaves the one above empty, which is not the bridge's."""
    async with (
        brokered_world(tmp_path, xenstore) as (world, _, kept),
        open_store(kept) as store,
        open_store(store_socket(world)) as root,
    ):
        await attach(store, PATHS)
        await world.destroy_domain(2)
        await remove_stale_frontend(store, PATHS)
        assert await root.try_ls("/local/domain/0/frontend/vtpm") in (None, [])


async def test_domains_are_found_where_a_bridge_uses_the_path_mode_zeros(
    tmp_path: Path, xenstore: XenStore
) -> None:
    """Its directory stands in the list of domains, for every bridge."""
    async with (
        brokered_world(tmp_path, xenstore) as (world, _, kept),
        open_store(kept) as store,
        open_store(store_socket(world)) as root,
    ):
        await root.mkdir("/local/domain/00/device/vtpm/0")
        await root.write("/local/domain/0/name", b"Domain-0")
        assert await domains_named(store, "vtpm") == [2]
        assert await resolve_domain(store, "Domain-0") == 0
        direct = KeptStore(store_socket(world))
        assert await trio.to_thread.run_sync(find_domain, direct, "Domain-0") == 0
        direct.close()


async def test_nothing_else_is(tmp_path: Path, xenstore: XenStore) -> None:
    async with (
        brokered_world(tmp_path, xenstore) as (world, _, kept),
        open_store(kept) as store,
        open_store(store_socket(world)) as root,
    ):
        await root.write("/local/domain/4/console/vnc-password", b"secret")
        for refused in (
            store.read("/local/domain/4/console/vnc-password"),
            store.ls("/local/domain/4"),
            store.write("/local/domain/4/name", b"vtpm"),
            store.write(f"{paths_for(4).backend}/state", b"1"),
            store.rm("/local/domain/0/frontend"),
            store.rm("/tool"),
            store.set_perms("/local/domain/0", ["n4"]),
        ):
            with pytest.raises(StoreError) as caught:
                await refused
            assert caught.value.errno == errno.EACCES
        with pytest.raises(StoreError):
            async with store.watch("/"):
                pass
        # The connection is as good as before.
        assert await store.read("/local/domain/2/name") == b"vtpm"


async def test_a_vtpm_domain_that_comes_back_as_another_domain(tmp_path: Path) -> None:
    async with (
        brokered_world(tmp_path) as (world, _, kept),
        open_store(kept) as store,
    ):
        await attach(store, PATHS)
        await world.destroy_domain(2)
        await world.create_domain(9, "vtpm")
        assert await attach(store, paths_for(9))
        with pytest.raises(StoreError):
            await store.write(f"{PATHS.backend}/state", b"1")


async def test_connections_come_and_go_up_to_a_bound(tmp_path: Path) -> None:
    async with brokered_world(tmp_path) as (_, _, kept):
        for _ in range(2 * RELAYS_MAX):
            async with open_store(kept) as store:
                await store.read("domid")
        async with trio.open_nursery() as nursery:

            async def hold(*, task_status: trio.TaskStatus[None]) -> None:
                async with open_store(kept) as store:
                    await store.read("domid")
                    task_status.started()
                    await trio.sleep_forever()

            for _ in range(RELAYS_MAX):
                await nursery.start(hold)
            async with open_store(kept) as store:
                with pytest.raises(StoreGone):
                    await store.read("domid")
            nursery.cancel_scope.cancel()
        async with open_store(kept) as store:
            await store.read("domid")


async def test_a_xenstore_that_goes_and_comes_back(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        path = store_socket(world)
        with brokered(f"{path}.moved") as broker:
            kept = KeptStore(f"{path}.moved")
            kept.hand_over(broker)
            async with open_store(kept) as store:
                with pytest.raises(StoreGone):
                    await store.read("domid")
            Path(path).rename(f"{path}.moved")  # noqa: ASYNC240 - at once
            async with open_store(kept) as store:
                assert await store.read("domid") == b"0"
                senders = world._senders
                for sender in list(senders.values()):
                    sender.scope.cancel()
                await wait_until(lambda: not senders)
                with pytest.raises(StoreGone):
                    await store.read("domid")
            async with open_store(kept) as store:
                # Names are asked for over another connection, which was cut as well.
                with pytest.raises(StoreError):
                    await store.write(f"{PATHS.backend}/state", b"1")


async def test_a_broker_that_has_ended(tmp_path: Path) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.close()
    broker = Broker(near, str(tmp_path / "no"))
    kept = KeptStore(str(tmp_path / "no"))
    kept.hand_over(broker)
    with pytest.raises(StoreGone, match="next: restart the bridge"):
        async with open_store(kept):
            pass
    with pytest.raises(StoreGone):
        broker.devices(3)
    kept.close()
    kept.close()


async def test_P9_words_that_mean_nothing(tmp_path: Path) -> None:
    async with brokered_world(tmp_path) as (_, broker, kept):
        near, far = socket.socketpair()
        for word in (b"stor", b"store ", b"\0", b"x" * 64, b"devices", b"y" * 200):
            socket.send_fds(broker._control, [word], [far.fileno()])
        broker._control.send(b"store")  # without a socket
        socket.send_fds(broker._control, [b"store"], [near.fileno(), far.fileno()])
        far.close()
        near.close()
        async with open_store(kept) as store:
            assert await store.read("domid") == b"0"


# A bridge that was taken over, and does with its sockets what ours does not.


def asked_for(broker: Broker, word: bytes = b"store") -> tuple[socket.socket, socket.socket]:
    """Return both ends of a socket that the broker was given."""
    near, far = socket.socketpair()
    near.settimeout(HANG_S)
    socket.send_fds(broker._control, [word], [far.fileno()])
    return near, far


async def serves(kept: KeptStore) -> bool:
    """Return whether the broker does what it is there for."""
    async with open_store(kept, deadline_s=HANG_S) as store:
        return await store.read("domid") == b"0"


async def test_P9_descriptors_that_are_no_stream(tmp_path: Path) -> None:
    async with brokered_world(tmp_path) as (_, broker, kept):
        reader, writer = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
            for fd in (reader, writer, datagrams.fileno(), broker._control.fileno()):
                for word in (b"store", b"devices 3"):
                    socket.send_fds(broker._control, [word], [fd])
        os.close(reader)
        os.close(writer)
        assert await serves(kept)


SERVICE = """
import socket, struct, sys
from pyxs._internal import Op
with socket.socket(socket.AF_UNIX) as listening:
    listening.bind(sys.argv[1])
    listening.listen()
    print(flush=True)
    client, _ = listening.accept()
    client.sendall(struct.pack("IIII", Op.READ, 1, 0, 6) + b"domid\\0")
    print(client.recv(100), flush=True)
"""


@pytest.mark.parametrize("word", [b"store", b"devices 3"])
async def test_P9_nobody_elses_socket_is_written_to(tmp_path: Path, word: bytes) -> None:
    """Who reads there would see that it is root who writes."""
    async with brokered_world(tmp_path, guest="guest") as (world, broker, _):
        path = str(world.directory / "service")
        command = [sys.executable, "-c", SERVICE, path]
        await trio.to_thread.run_sync(ask_a_service, broker, command, path, word)


def ask_a_service(broker: Broker, command: list[str], path: str, word: bytes) -> None:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == b"\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            socket.send_fds(broker._control, [word], [client.fileno()])
        # It was closed before the service's request, or after that.
        assert service.stdout.readline() in (b"", b"b''\n")


@contextmanager
def pair_alone() -> Iterator[tuple[BrokerLoop, broker_module._Pair, socket.socket, socket.socket]]:
    """Give a loop that nobody runs, its only pair, and the pair's other ends."""
    control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near, bridge = socket.socketpair()
    far, xenstored = socket.socketpair()
    with control, other, near, bridge, far, xenstored:
        loop = BrokerLoop(control, Domains().policy(), "no")
        pair = broker_module._Pair(Relay(lambda op, payload: True), near, far)
        loop._pairs = {near.fileno(): pair, far.fileno(): pair}
        yield loop, pair, bridge, xenstored


def test_P9_a_socket_that_was_made_to_block() -> None:
    """Whether a socket blocks is the same for all who hold it, so the bridge can change it."""
    with pair_alone() as (loop, pair, bridge, _):
        bridge.setblocking(True)
        pair.near.setblocking(True)
        pair.relay.to_bridge += bytes(1 << 20)
        loop._serve(pair.near.fileno(), pair)
        assert 0 < len(pair.relay.to_bridge) < 1 << 20
        loop._serve(pair.near.fileno(), pair)
        assert loop._pairs


async def test_P9_a_request_that_xenstored_does_not_survive(
    tmp_path: Path, xenstore: XenStore
) -> None:
    """Xen 4.17's ends with a READ of two strings after a WATCH: an error without a number."""
    async with brokered_world(tmp_path, xenstore) as (_, broker, kept):
        near, far = asked_for(broker)
        far.close()
        place = b"/local/domain/2/name\0"
        near.sendall(message(Op.WATCH, place + b"1\0") + message(Op.READ, place + b"x"))
        expected = message(Op.WATCH, b"OK\0") + message(Op.WATCH_EVENT, place + b"1\0", 0)
        expected += message(Op.ERROR, b"EACCES\0")
        with near:
            raw = b""
            while len(raw) < len(expected):
                raw += await trio.to_thread.run_sync(near.recv, 1000) or b"the end of it all"
        # The watch's first event may come before that, or after it.
        assert message(Op.ERROR, b"EACCES\0") in raw
        assert await serves(kept)


def test_a_connection_whose_request_did_not_go_out_whole_is_ended() -> None:
    with pair_alone() as (loop, pair, bridge, _):
        pair.far.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                pair.far.send(bytes(65536))
        bridge.sendall(message(Op.READ, b"domid\0"))
        loop._serve(pair.near.fileno(), pair)
        assert not loop._pairs
        assert bridge.recv(1) == b""


# Xen's devices.


async def test_devices_are_given_for_the_guest_only(tmp_path: Path) -> None:
    def ask(broker: Broker, domid: int) -> str:
        with pytest.raises(XenError) as caught:
            broker.devices(domid)
        return caught.value.cause

    async with brokered_world(tmp_path, guest="guest") as (_, broker, _):
        for domid in (0, 2, 4, 99, 123456):
            cause = await trio.to_thread.run_sync(ask, broker, domid)
            assert "not the guest" in cause or "no domain's id" in cause, cause
        if not Path(broker_module.PRIVCMD).exists():  # noqa: ASYNC240 - at once
            assert "No such file" in await trio.to_thread.run_sync(ask, broker, 3)
    async with brokered_world(tmp_path) as (_, broker, _):
        assert "not the guest" in await trio.to_thread.run_sync(ask, broker, 3)


async def test_each_boots_devices_replace_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []

    def restricted(device: str, request: int, domid: int) -> int:
        made.append((device, domid))
        path = tmp_path / f"{Path(device).name}.{domid}"
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)

    monkeypatch.setattr(broker_module, "_restricted", restricted)
    with held(4) as (first, second, events, calls):
        names = {first: "/dev/xen/privcmd", second: "/dev/xen/privcmd"}
        names |= {events: "/dev/xen/evtchn", calls: "/dev/xen/hypercall"}
        async with brokered_world(tmp_path, guest="guest") as (world, broker, _):
            devices = GuestDevices(broker, names)
            assert {target(fd) for fd in names} == {"/dev/null"}
            await trio.to_thread.run_sync(devices.serve, 3)
            assert [target(fd) for fd in names] == [
                str(tmp_path / "privcmd.3"),
                str(tmp_path / "privcmd.3"),
                str(tmp_path / "evtchn.3"),
                "/dev/null",
            ]
            assert not any(os.get_inheritable(fd) for fd in names)
            await world.destroy_domain(3)
            await world.create_domain(8, "guest")
            await trio.to_thread.run_sync(devices.serve, 8)
            assert target(second) == str(tmp_path / "privcmd.8")
            assert target(events) == str(tmp_path / "evtchn.8")
    assert made == [
        (broker_module.PRIVCMD, 3),
        (broker_module.EVTCHN, 3),
        (broker_module.PRIVCMD, 8),
        (broker_module.EVTCHN, 8),
    ]


async def test_P9_devices_that_nobody_fetches_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in sockets counts for all of root's processes without privileges together."""
    monkeypatch.setattr(
        broker_module, "_restricted", lambda *_: os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    )

    def fetched(near: socket.socket) -> int:
        raw, fds, _, _ = socket.recv_fds(near, 256, 2)
        for fd in fds:
            os.close(fd)
        assert len(fds) == 2 or b"were not fetched" in raw
        return len(fds)

    async with brokered_world(tmp_path, guest="guest") as (_, broker, _):
        pairs = [asked_for(broker, b"devices 3") for _ in range(UNFETCHED_MAX + 1)]
        last, *others = [near for near, _ in reversed(pairs)]
        assert await trio.to_thread.run_sync(fetched, last) == 0
        assert await trio.to_thread.run_sync(fetched, others[0]) == 2
        pairs.append(asked_for(broker, b"devices 3"))
        assert await trio.to_thread.run_sync(fetched, pairs[-1][0]) == 2
        for pair in pairs:
            for end in pair:
                end.close()
        for fd in await trio.to_thread.run_sync(broker.devices, 3):
            os.close(fd)


@contextmanager
def held(count: int) -> Iterator[list[int]]:
    """Give descriptors of a file."""
    fds = [os.open(os.devnull, os.O_RDWR) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def target(fd: int) -> str:
    return str(Path(f"/proc/self/fd/{fd}").readlink())


# The process.


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


PROGRAM = """
import os, signal, sys
from qemu_vtpm_bridge.xen.broker import start
listening = os.open('/', os.O_RDONLY)
broker = start(lambda names: None, sys.argv[1], lambda: None)
print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)
signal.pause()
"""


def test_a_broker_that_cannot_be_confined_is_an_error(tmp_path: Path) -> None:
    program = PROGRAM.replace("lambda: None)", "lambda: 1 / 0)")
    command = [sys.executable, "-c", program, str(tmp_path / "no")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "did not start; state: it says above why not; next: " in done.stderr


def test_the_process_holds_nothing_else_and_ends_with_the_bridge(tmp_path: Path) -> None:
    """A program that starts a broker and tells its process id is killed."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "no")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        broker_pid = int(process.stdout.readline())
        trio.run(
            wait_until, lambda: name_of(broker_pid) == f"qemu-vtpm-bridge: broker of {process.pid}"
        )
        trio.run(wait_until, lambda: "/" not in open_files(broker_pid))
        process.kill()
        trio.run(wait_until, lambda: not alive(broker_pid))


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")


def open_files(pid: int) -> set[str]:
    return {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
