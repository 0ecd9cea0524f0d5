"""XenStore for trio: pyxs in threads, with a deadline round every call.

Theory of operation.  Every request runs pyxs' client in a worker thread; the router
(`router.py`) sees to it that none waits longer than the connection lives, and this
module that the connection does not outlive a request without an answer.  Watches do not
use pyxs.Monitor: the router's thread notes the changed paths and wakes the trio task,
once for however many events.  After StoreGone the store is of no use; opening another
one is the caller's business.

Keeps P9.  Values are bytes as XenStore holds them; who uses one checks it
(`xenbus.parse_...`).

Source: docs/misc/xenstore.txt of Xen.
"""

from __future__ import annotations

import copy
import errno
import itertools
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pyxs
import trio
from pyxs._internal import Op
from pyxs.connection import PacketConnection

from ..errors import ungrouped
from .router import (
    OP_DIRECTORY_PART,
    EarlyConnection,
    SafeClient,
    SafeRouter,
    StoreError,
    StoreGone,
    connection_to,
)
from .xenbus import names_domain, parse_domid

if TYPE_CHECKING:
    from .broker import Broker

__all__ = [
    "KeptStore",
    "Store",
    "StoreError",
    "StoreGone",
    "Transaction",
    "Watch",
    "domains_named",
    "open_store",
]

T = TypeVar("T")

DEADLINE_S: Final = 5.0
COMMIT_TRIES: Final = 50
LISTING_TRIES: Final = 10
"""A directory that changes all the time while it is listed in parts is its owner's doing."""

_PATHS_NOTED_MAX: Final = 256
_THREADS_MAX: Final = 20
_SOCKET: Final = "/run/xenstored/socket"
_DEVICE: Final = "/dev/xen/xenbus"


class _Requests:
    """What can be asked of XenStore, inside and outside transactions.

    Every method raises StoreError where XenStore refuses and StoreGone where it does
    not answer.  Cancelling one leaves open whether the request was carried out.
    """

    def __init__(self, client: SafeClient, deadline_s: float, limiter: trio.CapacityLimiter):
        self._client = client
        self._deadline_s = deadline_s
        self._limiter = limiter

    async def _call(self, what: str, function: Callable[..., T], *args: Any) -> T:
        try:
            with trio.fail_after(self._deadline_s):
                return await trio.to_thread.run_sync(
                    function, *args, abandon_on_cancel=True, limiter=self._limiter
                )
        except trio.TooSlowError:
            self._client.router.kill("no answer in time")
            raise StoreGone(
                f"xenstored did not answer within {self._deadline_s:g} s ({what})"
            ) from None
        except ValueError as error:  # pyxs found the path or a permission malformed
            raise StoreError(errno.EINVAL, what) from error
        except pyxs.PyXSError as error:
            number = error.args[0] if error.args and isinstance(error.args[0], int) else errno.EIO
            raise StoreError(number, what) from error

    async def read(self, path: str) -> bytes:
        """Return a node's value, without trailing NULs."""
        return bytes(await self._call(f"reading {path}", self._client.read, path.encode()))

    async def try_read(self, path: str) -> bytes | None:
        """Return a node's value, or None where there is no node."""
        return await _or_none(self.read(path))

    async def peek(self, path: str) -> bytes | None:
        """Return a node's value, or None where it is missing or may not be read.

        For what a peer's domain owns: once a directory is removed, xenstored tells who may
        not read its parent that access is denied, not that there is no node.
        """
        try:
            return await self.try_read(path)
        except StoreError as error:
            if error.errno == errno.EACCES:
                return None
            raise

    async def write(self, path: str, value: bytes) -> None:
        """Write a node, creating it and its parents where missing."""
        await self._call(f"writing {path}", self._client.write, path.encode(), value)

    async def mkdir(self, path: str) -> None:
        """Create an empty node where it is missing."""
        await self._call(f"creating {path}", self._client.mkdir, path.encode())

    async def rm(self, path: str) -> None:
        """Remove a node and all below it; one that is missing is no error."""
        await _or_none(self._call(f"removing {path}", self._client.delete, path.encode()))

    async def ls(self, path: str) -> list[str]:
        """Return the names of a node's children."""
        names = await self._call(f"listing {path}", _list, self._client, path.encode())
        return [name.decode("ascii", "replace") for name in names]

    async def try_ls(self, path: str) -> list[str] | None:
        """Return the names of a node's children, or None where there is no node."""
        return await _or_none(self.ls(path))

    async def get_perms(self, path: str) -> list[str]:
        """Return a node's permissions, the owner's first, as letter and domid."""
        perms = await self._call(f"permissions of {path}", self._client.get_perms, path.encode())
        return [perm.decode("ascii", "replace") for perm in perms]

    async def set_perms(self, path: str, perms: Sequence[str]) -> None:
        """Set a node's permissions, as for example ["n0", "r5"]."""
        raw = [perm.encode() for perm in perms]
        await self._call(
            f"setting permissions of {path}", self._client.set_perms, path.encode(), raw
        )


class Transaction(_Requests):
    """Requests that take effect together, or not at all."""


class Store(_Requests):
    """A connection to XenStore.  Made by `open_store`."""

    def __init__(self, client: SafeClient, deadline_s: float) -> None:
        super().__init__(client, deadline_s, trio.CapacityLimiter(_THREADS_MAX))
        self._tokens = itertools.count(1)
        self._watches: set[Watch] = set()

    async def own_domid(self) -> int:
        """Return the domain that this connection acts as."""
        return parse_domid(await self.read("domid"), "domid")

    async def transact(self, function: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `function` in a transaction, again and again while it conflicts.

        What it raises undoes the transaction.  Raises StoreError(EAGAIN) where it
        conflicts all the time.
        """
        for _ in range(COMMIT_TRIES):
            client = copy.copy(self._client)
            with trio.CancelScope(shield=True):  # one that nobody ends counts towards a quota
                await self._call("starting a transaction", client.transaction)
            transaction = Transaction(client, self._deadline_s, self._limiter)
            try:
                result = await function(transaction)
            except BaseException:
                with suppress(StoreError, StoreGone), trio.CancelScope(shield=True):
                    await self._call("undoing a transaction", client.rollback)
                raise
            if await self._call("committing a transaction", client.commit):
                return result
        raise StoreError(errno.EAGAIN, "a transaction that conflicts again and again")

    @asynccontextmanager
    async def watch(self, path: str) -> AsyncIterator[Watch]:
        """Watch a node and all below it, or @introduceDomain or @releaseDomain.

        Gives a `Watch`, whose first `wait` returns at once.
        """
        token = b"%d" % next(self._tokens)
        watch = Watch(trio.lowlevel.current_trio_token())
        router: SafeRouter = self._client.router
        router.set_sink(token, watch.note)
        self._watches.add(watch)
        what = f"watching {path}"
        arguments = (path.encode() + b"\0", token + b"\0")
        try:
            with trio.CancelScope(shield=True):  # or it might be set after it was taken back
                await self._call(what, self._client.execute_command, Op.WATCH, *arguments)
            try:
                yield watch
            finally:
                with suppress(StoreError, StoreGone), trio.CancelScope(shield=True):
                    await self._call(what, self._client.execute_command, Op.UNWATCH, *arguments)
        finally:
            self._watches.discard(watch)
            router.set_sink(token, None)

    def _died(self) -> None:
        for watch in self._watches:
            watch.die(self._client.router.death or "closed")


class Watch:
    """One watch: tells which paths changed since it was last asked."""

    def __init__(self, trio_token: trio.lowlevel.TrioToken) -> None:
        self._trio_token = trio_token
        self._lock = threading.Lock()
        self._paths: dict[bytes, None] = {}
        self._told = False
        self._changed = trio.Event()
        self._death: str | None = None

    async def wait(self) -> list[str]:
        """Return the paths that changed, at least one; some are left out of very many.

        Raises StoreGone when the connection died.  Cancelling loses nothing.
        """
        await self._changed.wait()
        if self._death is not None:
            raise StoreGone(f"the XenStore connection died: {self._death}")
        self._changed = trio.Event()
        with self._lock:
            paths, self._paths, self._told = self._paths, {}, False
        return [path.decode("ascii", "replace") for path in paths]

    def note(self, path: bytes) -> None:
        """Note a change; called in the router's thread."""
        with self._lock:
            if len(self._paths) < _PATHS_NOTED_MAX:
                self._paths[path] = None
            if self._told:
                return
            self._told = True
        with suppress(trio.RunFinishedError):
            self._trio_token.run_sync_soon(self._wake)

    def _wake(self) -> None:
        self._changed.set()

    def die(self, reason: str) -> None:
        """Have `wait` raise StoreGone."""
        self._death = reason
        self._changed.set()


@asynccontextmanager
async def open_store(
    path: str | KeptStore | None = None, *, deadline_s: float = DEADLINE_S
) -> AsyncIterator[Store]:
    """Connect to XenStore at a unix socket or a device; by default, this machine's.

    Of a `KeptStore` a connection is used that is open already, as long as it has one.

    `deadline_s` bounds every single request.  Raises StoreGone where the connection
    cannot be made.  Leaving closes it; no thread stays behind.
    """
    trio_token = trio.lowlevel.current_trio_token()
    stores: list[Store] = []

    def tell_death() -> None:
        for store in stores:
            store._died()

    def on_death() -> None:
        with suppress(trio.RunFinishedError):
            trio_token.run_sync_soon(tell_death)

    connection = path.connection() if isinstance(path, KeptStore) else None
    router = SafeRouter(connection or connection_to(_place(path)), on_death)
    store = Store(SafeClient(router=router), deadline_s)
    stores.append(store)
    try:
        try:
            with trio.fail_after(deadline_s):
                await trio.to_thread.run_sync(router.start, abandon_on_cancel=True)
        except trio.TooSlowError:
            raise StoreGone(
                f"XenStore cannot be reached at {router.connection.path}: "
                f"no connection within {deadline_s:g} s",
                next_step="is xenstored running, and does it answer `xenstore-ls`?",
            ) from None
        yield store
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(router.terminate)


async def first_to_return(*functions: Callable[[], Awaitable[object]]) -> None:
    """Return when the first of these has, as of several watches; the others are cancelled.

    Raises what one of them raises, as that raised it.
    """
    with ungrouped():
        async with trio.open_nursery() as nursery:

            async def run(function: Callable[[], Awaitable[object]]) -> None:
                await function()
                nursery.cancel_scope.cancel()

            for function in functions:
                nursery.start_soon(run, function)


async def domains_named(store: Store, name: str) -> list[int]:
    """Return the ids of the domains of this name, ascending."""
    return sorted(
        [
            int(entry)
            for entry in await store.try_ls("/local/domain") or []
            if names_domain(entry)
            and await store.try_read(f"/local/domain/{entry}/name") == name.encode()
        ]
    )


class KeptStore:
    """XenStore, asked before there are threads, and reached after privileges are gone.

    Connections are made in advance.  One that xenstored has closed meanwhile is found out
    when it is used, and the next one is taken.  When none is left a new one is made, if this
    user may.  With a broker, each one is made when it is needed, by that.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path or default_path()
        self._kept: list[EarlyConnection] = []
        self._broker: Broker | None = None

    def keep(self, count: int) -> None:
        """Have this many connections in store.  Raises StoreGone."""
        while len(self._kept) < count:
            self._kept.append(EarlyConnection(self.path))

    def hand_over(self, broker: Broker) -> None:
        """Have all connections made by a broker from now on; close what is open."""
        self.close()
        self._broker = broker

    def read(self, path: str) -> bytes | None:
        """Return a node's value, or None where there is none to be read.

        Raises StoreError and StoreGone.  Blocks, for some seconds at most.
        """
        return self._first().read(path)

    def ls(self, path: str) -> list[str]:
        """Return the names of a node's children, none where it is missing; else as `read`."""
        names = self._first().ask(path, lambda raw: _list(self._first(), raw)) or []
        return [name.decode("ascii", "replace") for name in names if name]

    def _first(self) -> EarlyConnection:
        self.keep(1)
        return self._kept[0]

    def connection(self) -> PacketConnection | None:
        """Give away a connection that is open, or None where there is none left."""
        if self._broker is not None:
            return self._broker.connection()
        return self._kept.pop(0).hand_on() if self._kept else None

    def close(self) -> None:
        """Close what is left.  Safe to call twice."""
        while self._kept:
            self._kept.pop().close()
        if self._broker is not None:
            self._broker.close()


def _place(path: str | KeptStore | None) -> str:
    return path.path if isinstance(path, KeptStore) else path or default_path()


def default_path() -> str:
    """Return where this machine's XenStore is reached."""
    path = os.environ.get("XENSTORED_PATH")
    if path:
        return path
    return _SOCKET if Path(_SOCKET).exists() else _DEVICE


def _list(client: SafeClient | EarlyConnection, path: bytes) -> list[bytes]:
    """List a directory, in parts where it does not fit into one answer."""
    try:
        if isinstance(client, EarlyConnection):
            return client.execute_command(Op.DIRECTORY, path + b"\0").split(b"\0")
        return list(client.list(path))
    except pyxs.PyXSError as error:
        if error.args[0] != errno.E2BIG:
            raise
    for _ in range(LISTING_TRIES):
        generation, names = _list_in_parts(client, path)
        if generation is not None:
            return names
    raise pyxs.PyXSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _list_in_parts(
    client: SafeClient | EarlyConnection, path: bytes
) -> tuple[bytes | None, list[bytes]]:
    """Collect a directory's parts; no generation where it changed meanwhile."""
    collected = b""
    first = None
    while True:
        offset = b"%d\0" % len(collected)
        packet = client.execute_command(OP_DIRECTORY_PART, path + b"\0", offset)
        generation, _, part = packet.partition(b"\0")
        if first is None:
            first = generation
        if generation != first:
            return None, []
        if not part:
            return first, collected.split(b"\0")[:-1]
        collected += part + b"\0"


async def _or_none(request: Awaitable[T]) -> T | None:
    try:
        return await request
    except StoreError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
