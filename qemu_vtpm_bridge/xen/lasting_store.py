"""XenStore for tasks that outlive a connection to it.

    async with LastingStore(path) as lasting:
        value = await lasting.use(lambda store: store.read("domid"))

Theory of operation.  Several tasks share one connection.  Whoever finds it broken drops it;
the next one who needs XenStore makes another, every second until there is one.  So what is
given to `use` must bear to be done again from its beginning.

Keeps P9.  Who may lie: nobody here; what XenStore says is checked by who asks.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Final, Self, TypeVar

import trio

from ..ratelimit import RateLimit
from .store import KeptStore, Store, StoreGone, open_store

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S: Final = 1.0


class LastingStore:
    """A connection to XenStore that is made anew when it breaks; an async context manager."""

    def __init__(self, path: str | KeptStore | None) -> None:
        """`path` is what `open_store` takes."""
        self._path = path
        self._making = trio.Lock()
        self._store: Store | None = None
        self._open = AsyncExitStack()
        self._complaints = RateLimit(log)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._drop()

    async def use(self, function: Callable[[Store], Awaitable[T]]) -> T:
        """Do something with XenStore, as often as it takes for XenStore to stay.

        Raises what `function` raises, but for StoreGone.  Cancelling leaves open what of it
        was done.
        """
        while True:
            store: Store | None = None
            try:
                store = await self._connected()
                return await function(store)
            except StoreGone as error:
                self._complaints.warning("XenStore: %s; trying again every second", error.cause)
                async with self._making:
                    if store is self._store:
                        await self._drop()
            await trio.sleep(RETRY_S)

    async def _connected(self) -> Store:
        async with self._making:
            if self._store is None:
                self._store = await self._open.enter_async_context(open_store(self._path))
            return self._store

    async def _drop(self) -> None:
        self._store, leaving = None, self._open
        self._open = AsyncExitStack()
        await leaving.aclose()
