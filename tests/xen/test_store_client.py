"""The XenStore client: the embedded store, and xenstoreds that die, hang or babble (P9).

Each of the misbehaviours makes plain pyxs hang for ever, spin, or leak.
"""

from __future__ import annotations

import errno
import os
import pty
import resource
import select
import socket
import subprocess
import sys
import textwrap
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qemu_vtpm_bridge.embedded.store import Store as EmbeddedStore
from qemu_vtpm_bridge.embedded.wire import HEADER, Message, Op, StreamParser
from qemu_vtpm_bridge.xen.router import (
    BrokeredConnection,
    EarlyConnection,
    SafeClient,
    SafeRouter,
    connection_to,
)
from qemu_vtpm_bridge.xen.store import (
    KeptStore,
    Store,
    StoreError,
    StoreGone,
    Transaction,
    default_path,
    open_store,
)
from tests.support.bad_xenstored import HUGE, answer, bad_xenstored, event, reply
from tests.support.world import running_world, store_socket
from tests.support.xenstored import XenStore

pytestmark = pytest.mark.timeout(60)
NEVER = float("inf")


# With a xenstored that behaves.


async def test_every_request(tmp_path: Path, xenstore: XenStore) -> None:
    async with running_world(tmp_path, xenstore) as world, open_store(store_socket(world)) as store:
        await store.write("/t/empty", b"")
        await store.write("/t/eight-bit", b"\xff\n\t\0x")
        await store.mkdir("/t/dir")
        assert sorted(await store.ls("/t")) == ["dir", "eight-bit", "empty"]
        assert await store.read("/t/empty") == b""
        assert await store.read("/t/eight-bit") == b"\xff\n\t\0x"
        assert await store.try_read("/t/none") is None
        assert await store.try_ls("/t/none") is None
        await store.set_perms("/t/dir", ["n0", "r5"])
        assert await store.get_perms("/t/dir") == ["n0", "r5"]
        await store.rm("/t")
        await store.rm("/t")
        with pytest.raises(StoreError) as caught:
            await store.read("/t/dir")
        assert caught.value.errno == errno.ENOENT
        for wrong in ("relative//path", "/a b", "", "/" + "x" * 4000):
            with pytest.raises(StoreError):
                await store.read(wrong)
        with pytest.raises(StoreError) as caught:
            await store.write("/t/long", b"v" * 4096)
        assert caught.value.errno == errno.E2BIG


async def test_a_domain_learns_who_it_is(tmp_path: Path, xenstore: XenStore) -> None:
    async with running_world(tmp_path, xenstore) as world:
        await world.create_domain(5, "five")
        async with open_store(store_socket(world, 5)) as store:
            assert await store.own_domid() == 5


async def test_a_large_directory_is_listed(tmp_path: Path, xenstore: XenStore) -> None:
    names = [f"{number:04d}-{'n' * 40}" for number in range(300)]
    async with running_world(tmp_path, xenstore) as world, open_store(store_socket(world)) as store:
        for name in names:
            await store.mkdir(f"/big/{name}")
        assert sorted(await store.ls("/big")) == names


async def test_a_large_directory_that_never_stands_still_is_an_error(tmp_path: Path) -> None:
    generation = 0

    def behave(request: Message) -> bytes:
        nonlocal generation
        if request.type == Op.DIRECTORY:
            return reply(request, b"E2BIG\0", type=Op.ERROR)
        if request.type == 22:
            generation += 1
            return reply(request, b"%d\0name\0" % generation)
        return answer(request)

    async with bad_xenstored(behave) as server, open_store(server.path) as store:
        with pytest.raises(StoreError) as caught:
            await store.ls("/big")
        assert caught.value.errno == errno.EAGAIN
        assert await store.read("/x") == b"value"


async def test_transactions_conflict_and_are_made_again(tmp_path: Path, xenstore: XenStore) -> None:
    async with running_world(tmp_path, xenstore) as world, open_store(store_socket(world)) as store:
        await store.write("/n", b"0")
        tries = 0

        async def add(transaction: Transaction) -> int:
            nonlocal tries
            tries += 1
            number = int(await transaction.read("/n")) + 1
            if tries == 1:
                await store.write("/n", b"10")
            await transaction.write("/n", b"%d" % number)
            return number

        assert await store.transact(add) == 11
        assert (tries, await store.read("/n")) == (2, b"11")

        async def give_up(transaction: Transaction) -> None:
            await transaction.write("/n", b"lost")
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await store.transact(give_up)
        assert await store.read("/n") == b"11"


async def test_a_transaction_that_always_conflicts_is_an_error(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with running_world(tmp_path, xenstore) as world, open_store(store_socket(world)) as store:
        await store.write("/n", b"0")

        async def unlucky(transaction: Transaction) -> None:
            # oxenstored looks whether what was read would be read again, so it has to differ.
            number = int(await transaction.read("/n")) + 1
            await transaction.write("/n", b"x")
            await store.write("/n", b"%d" % number)

        with pytest.raises(StoreError) as caught:
            await store.transact(unlucky)
        assert caught.value.errno == errno.EAGAIN


async def test_many_requests_at_once(tmp_path: Path, xenstore: XenStore) -> None:
    async with running_world(tmp_path, xenstore) as world, open_store(store_socket(world)) as store:

        async def count(own: int) -> None:
            for number in range(10):
                await store.write(f"/t/{own}", b"%d" % number)
                assert await store.read(f"/t/{own}") == b"%d" % number

        async with trio.open_nursery() as nursery:
            for own in range(30):
                nursery.start_soon(count, own)


async def test_watches_tell_paths_and_end_with_their_block(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with running_world(tmp_path, xenstore) as world:
        await world.create_domain(2, "vtpm")
        async with open_store(store_socket(world, 2)) as store:
            async with store.watch("data") as watch, store.watch("/local/domain/2/data") as other:
                assert await watch.wait() == ["data"]
                assert await other.wait() == ["/local/domain/2/data"]
                await store.write("data/x", b"1")
                assert await watch.wait() == ["data/x"]
                assert await other.wait() == ["/local/domain/2/data/x"]
            # Nothing is left of them: the quota of watches of a guest is used up by more.
            for _ in range(130):
                async with store.watch("data"):
                    pass


async def test_a_watch_that_nobody_asks_holds_little(tmp_path: Path, xenstore: XenStore) -> None:
    async with (
        running_world(tmp_path, xenstore) as world,
        open_store(store_socket(world)) as store,
        store.watch("/many") as watch,
        open_store(store_socket(world)) as writer,
    ):
        for number in range(400):
            await writer.write(f"/many/{number}", b"")
        await store.read("/many")  # behind the events
        assert len(await watch.wait()) == 256


# With one that does not.


def hang_up(request: Message) -> None:
    del request


BABBLES: dict[str, Callable[[Message], bytes | None]] = {
    "hangs up": hang_up,
    "answers an unknown request": lambda r: reply(r, b"v", req_id=r.req_id + 77),
    "answers with an unknown op": lambda r: reply(r, b"v", type=4711),
    "answers another op": lambda r: reply(r, b"v", type=Op.GET_PERMS),
    "answers in another transaction": lambda r: reply(r, b"v", tx_id=9),
    "announces 5000 bytes": lambda r: reply(r, b"v" * 5000),
    "announces 2 GiB": lambda r: HUGE,
    "sends half a header and hangs up": lambda r: b"",
}


@pytest.mark.parametrize("babble", BABBLES)
async def test_a_babbling_xenstored_is_an_error(babble: str) -> None:
    async with bad_xenstored(BABBLES[babble]) as server, open_store(server.path) as store:
        async with trio.open_nursery() as nursery:
            if babble.startswith("sends half"):

                async def half() -> None:
                    await server.asked.wait()
                    await server.send(b"\x02\0\0\0\x01")
                    await server.hang_up()

                nursery.start_soon(half)
            with pytest.raises(StoreGone):
                await store.read("/x")
        with pytest.raises(StoreGone):  # and stays one, at once
            await store.read("/x")


@pytest.mark.parametrize(
    ("name", "number"), [(b"EWHATEVER", errno.EIO), (b"", errno.EIO), (b"EACCES", errno.EACCES)]
)
async def test_an_unknown_error_name_is_an_error(name: bytes, number: int) -> None:
    async with (
        bad_xenstored(lambda r: reply(r, name + b"\0", type=Op.ERROR)) as server,
        open_store(server.path) as store,
    ):
        with pytest.raises(StoreError) as caught:
            await store.read("/x")
        assert caught.value.errno == number


@pytest.mark.parametrize("threads", [True, False])
def test_P9_a_request_is_sent_in_one_piece(threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """xenstored waits for the rest of a request that began, and serves nobody meanwhile."""
    # On a socket of this type each send is a message, and stays one.
    ours, xenstored = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(
        "qemu_vtpm_bridge.xen.router.connection_to",
        lambda path: BrokeredConnection(path, lambda: ours),
    )
    taken: list[bytes] = []

    def answer_one() -> None:
        taken.append(xenstored.recv(65536))
        op, req_id, tx_id, _ = HEADER.unpack_from(taken[0])
        xenstored.send(HEADER.pack(op, req_id, tx_id, len(b"value")))
        xenstored.send(b"value")

    client: EarlyConnection | SafeClient = EarlyConnection("/nowhere")
    if threads:
        client = SafeClient(router=SafeRouter(client.hand_on()))
        client.router.start()
    with xenstored:
        thread = threading.Thread(target=answer_one)
        thread.start()
        assert client.execute_command(Op.READ, b"/x\0") == b"value"
        client.close()
        thread.join()
    assert taken[0].endswith(b"/x\0")


async def test_a_silent_xenstored_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = NEVER
    async with (
        bad_xenstored(lambda r: b"") as server,
        open_store(server.path) as store,
        trio.open_nursery() as nursery,
    ):

        async def also_waits() -> None:
            with pytest.raises(StoreGone):
                await store.read("/y")

        nursery.start_soon(also_waits)
        await server.asked.wait()
        autojump_clock.autojump_threshold = 0
        with pytest.raises(StoreGone, match="did not answer within 5 s"):
            await store.read("/x")
        autojump_clock.autojump_threshold = NEVER


def test_a_xenstored_that_accepts_nobody_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_vtpm_bridge.xen.router._SEND_TIMEOUT_S", 1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # an abstract name, chosen by the kernel
        listener.listen(0)
        name = listener.getsockname()
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(name)  # fills the backlog: the next connect blocks
            router = SafeRouter(connection_to("/unused"))
            router.connection.path = name
            with pytest.raises(StoreGone, match="cannot be reached"):
                router.start()
            router.terminate()


async def test_connecting_ends_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """A connect that blocks in the kernel is left behind, and what it makes late is closed."""
    go_on = threading.Event()
    done = threading.Event()
    connect = SafeRouter.start

    def slow_start(self: SafeRouter) -> None:
        go_on.wait()
        try:
            connect(self)
        finally:
            done.set()

    monkeypatch.setattr(SafeRouter, "start", slow_start)
    async with bad_xenstored() as server:
        with pytest.raises(StoreGone, match="no connection within 5 s"):
            async with open_store(server.path):
                pass
        autojump_clock.autojump_threshold = NEVER
        go_on.set()
        await trio.to_thread.run_sync(done.wait)
        assert not server.requests


async def test_no_xenstored_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "/dev/none", str(tmp_path / ("x" * 200)), "/a\0b"):
        with pytest.raises(StoreGone, match="next: is xenstored running"):
            async with open_store(path):
                pass


async def test_watches_learn_of_the_end(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = NEVER
    async with (
        bad_xenstored() as server,
        open_store(server.path) as store,
        store.watch("/w") as watch,
    ):
        await server.hang_up()
        with pytest.raises(StoreGone):
            await watch.wait()
        with pytest.raises(StoreGone):
            await watch.wait()


async def test_watch_events_of_any_shape_are_survived() -> None:
    async with (
        bad_xenstored() as server,
        open_store(server.path) as store,
        store.watch("/w") as watch,
    ):
        token = server.requests[-1].payload.split(b"\0")[1]
        for raw in (
            event(b"/w/a", token, b"3rd"),
            event(b"/unknown", b"no token of ours"),
            event(b"", b""),
            HEADER.pack(Op.WATCH_EVENT, 0, 0, 5) + b"alone",
            event(b"\xff\n", token),
        ):
            await server.send(raw)
        seen: list[str] = []
        while len(seen) < 2:
            seen += await watch.wait()
        assert seen == ["/w/a", "\ufffd\n"]
        assert await store.read("/x") == b"value"


async def test_leaving_the_store_frees_who_waits() -> None:
    async with bad_xenstored(lambda r: b"") as server, trio.open_nursery() as nursery:

        async def wait(store: Store) -> None:
            with pytest.raises(StoreGone):
                await store.read("/x")

        async with open_store(server.path, deadline_s=1e6) as store:
            nursery.start_soon(wait, store)
            await server.asked.wait()


async def test_cancelling_a_request_leaves_the_store_usable() -> None:
    silent = True
    async with (
        bad_xenstored(lambda r: b"" if silent else answer(r)) as server,
        open_store(server.path) as store,
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(store.read, "/x")
            await server.asked.wait()
            nursery.cancel_scope.cancel()
        silent = False
        assert await store.read("/y") == b"value"


async def test_P9_cancelling_leaves_no_watch_and_no_transaction_behind(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world, open_store(store_socket(world)) as store:

        async def nothing(transaction: Transaction) -> None:
            await transaction.write("/x", b"1")

        async def watch() -> None:
            async with store.watch("/w") as watch:
                await watch.wait()

        for cut_after in range(6):
            for start in (watch, lambda: store.transact(nothing)):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(start)
                        for _ in range(cut_after):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
        await store.read("/local/domain/0/domid")
        (connection,) = world.store.connections
        assert (connection.watches, connection.transactions) == ([], {})


async def test_descriptors_above_1024_work(tmp_path: Path, xenstore: XenStore) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    held: list[int] = []
    try:
        async with running_world(tmp_path, xenstore) as world:
            while not held or held[-1] < 1100:
                held.append(os.dup(0))
            async with open_store(store_socket(world)) as store:
                assert store._client.router.connection.fileno() > 1024
                assert await store.read("/local/domain/0/domid") == b"0"
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world, bad_xenstored(hang_up) as server:
        before = None
        for _ in range(3):
            async with open_store(store_socket(world)) as store:
                await store.own_domid()
            with pytest.raises(StoreGone):
                async with open_store(server.path) as store:
                    await store.own_domid()
            with pytest.raises(StoreGone):
                async with open_store(str(tmp_path / "none")):
                    pass
            await trio.testing.wait_all_tasks_blocked(0.01)
            world.store.connections.sort(key=id)
            while world.store.connections:
                await trio.lowlevel.checkpoint()
            found = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
            assert before in (None, found)
            before = found


async def test_a_forked_child_can_neither_use_nor_end_its_parents_connection(
    tmp_path: Path,
    xenstore: XenStore,
) -> None:
    script = textwrap.dedent(
        """
        import os, sys
        from qemu_vtpm_bridge.xen.router import SafeClient, SafeRouter, StoreGone, connection_to
        router = SafeRouter(connection_to(sys.argv[1]))
        router.start()
        client = SafeClient(router=router)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                client.read(b"domid")
            except StoreGone as error:
                status = 0 if "forked" in str(error) else 2
            router.kill("by the child")
            router.terminate()
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert client.read(b"domid") == b"0"
        router.terminate()
        print("both went well")
        """
    )
    async with running_world(tmp_path, xenstore) as world:
        done = await trio.run_process(
            [sys.executable, "-W", "ignore", "-c", script, store_socket(world)],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert done.stdout == b"both went well\n"


# The device.


@contextmanager
def device(overtaken: Callable[[], None] = lambda: None) -> Iterator[str]:
    """A character device that answers as the kernel's xenbus: one end of a pty.

    `overtaken` is called for a request that comes before its predecessor is answered.
    """
    embedded = EmbeddedStore()
    connection = embedded.connect(0)
    ours, theirs = pty.openpty()
    tty.setraw(ours)
    tty.setraw(theirs)

    def serve() -> None:
        parser = StreamParser()
        while True:
            try:
                raw = os.read(ours, 4096)
            except OSError:
                return
            if b"quit" in raw:
                return
            requests = list(parser.feed(raw))
            if len(requests) > 1 or (requests and select.select([ours], [], [], 0)[0]):
                overtaken()
            for request in requests:
                os.write(ours, embedded.request(connection, request).pack())
                for told in connection.events:
                    os.write(ours, told.pack())
                connection.events.clear()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield os.ttyname(theirs)
    finally:
        os.write(theirs, b"quit")
        thread.join()
        os.close(ours)
        os.close(theirs)


async def test_the_device_is_spoken_to_as_the_socket_is() -> None:
    with device() as path:
        assert path.startswith("/dev/")
        async with open_store(path) as store, store.watch("/w") as watch:
            assert await watch.wait() == ["/w"]
            await store.write("/w/x", b"1")
            assert await watch.wait() == ["/w/x"]

            async def write(transaction: Transaction) -> None:
                await transaction.write("/w/y", b"2")

            await store.transact(write)
            assert await store.ls("/w") == ["x", "y"]


async def test_the_device_gets_a_request_only_when_the_one_before_is_answered() -> None:
    """Linux' /dev/xen/xenbus blocks for good otherwise, and all of the domain's XenStore."""
    overtaken = 0

    def count() -> None:
        nonlocal overtaken
        overtaken += 1

    with device(count) as path:
        async with open_store(path) as store, trio.open_nursery() as nursery:

            async def use(node: str) -> None:
                async with store.watch(node) as watch:
                    await watch.wait()
                    await store.write(node, b"1")
                    assert await store.read(node) == b"1"

            for number in range(50):
                nursery.start_soon(use, f"/w/{number}")
    assert overtaken == 0


async def test_a_silent_device_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = NEVER
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    try:
        async with open_store(os.ttyname(theirs)) as store:
            autojump_clock.autojump_threshold = 0
            with pytest.raises(StoreGone, match="did not answer"):
                await store.read("/x")
            autojump_clock.autojump_threshold = NEVER
    finally:
        os.close(ours)
        os.close(theirs)


def test_where_xenstore_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XENSTORED_PATH", "/some/where")
    assert default_path() == "/some/where"
    monkeypatch.delenv("XENSTORED_PATH")
    assert default_path() in ("/run/xenstored/socket", "/dev/xen/xenbus")


# Before there are threads.


@contextmanager
def kept(path: str, count: int = 1) -> Iterator[KeptStore]:
    store = KeptStore(path)
    try:
        store.keep(count)
        yield store
    finally:
        store.close()
        store.close()


async def early(function: Callable[[], Any]) -> Any:
    """Run what blocks, while the server is served in this thread."""
    return await trio.to_thread.run_sync(function)


async def test_what_is_asked_before_there_are_threads(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        path = store_socket(world)
        async with open_store(path) as store:
            await store.write("/t/eight-bit", b"\xff\n\t\0x")
            for number in range(700):
                await store.mkdir(f"/many/{number:010}")

        def ask() -> None:
            with kept(path) as found:
                assert found.read("/t/eight-bit") == b"\xff\n\t\0x"
                assert found.read("/t/none") is None
                assert found.ls("/t") == ["eight-bit"]
                assert found.ls("/t/none") == []
                assert found.ls("/t/eight-bit") == []
                assert len(found.ls("/many")) == 700  # more than one answer holds
                with pytest.raises(StoreError, match="Invalid argument"):
                    found.read("/no path")

        await early(ask)


async def test_kept_connections_are_used_one_after_the_other_and_then_new_ones(
    tmp_path: Path,
) -> None:
    async with running_world(tmp_path) as world:
        path = store_socket(world)
        found = KeptStore(path)
        await early(lambda: found.keep(2))
        await early(lambda: found.read("/"))  # what was asked on it does no harm
        moved = Path(path).rename(f"{path}.away")  # noqa: ASYNC240 - at once
        for _ in range(2):
            async with open_store(found) as store, store.watch("/t") as watch:
                await watch.wait()
                await store.write("/t/x", b"1")
                assert await watch.wait() == ["/t/x"]
        with pytest.raises(StoreGone, match="cannot be reached"):
            async with open_store(found):
                pass
        moved.rename(path)
        async with open_store(found) as store:
            assert await store.read("/t/x") == b"1"


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (lambda request: None, "closed the connection"),
        (lambda request: HUGE, "announced a payload"),
        (lambda request: reply(request, b"x", type=Op.WRITE), "does not fit"),
        (lambda request: reply(request, b"x", req_id=9), "does not fit"),
        (lambda request: reply(request, b"", length=5), "did not answer within"),
        (lambda request: b"", "did not answer within"),
    ],
)
async def test_P9_a_xenstored_that_misbehaves_before_there_are_threads(
    behaviour: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemu_vtpm_bridge.xen.router._SEND_TIMEOUT_S", 1)
    async with bad_xenstored(behaviour) as server:

        def ask() -> None:
            with kept(server.path) as found, pytest.raises(StoreGone, match=says):
                found.read("/x")

        await early(ask)


def test_no_xenstored_before_there_are_threads(tmp_path: Path) -> None:
    with pytest.raises(StoreGone, match="next: is xenstored running"), kept(str(tmp_path / "no")):
        pass
