"""Finding the vTPM domain again that has been recreated: by its name, or as the entries say.

Theory of operation.  Xen gives a recreated domain another id, and both directories of a
tpmif device have that id in their paths.  So whoever said `--backend NAME` has said who
the vTPM domain is, not where: when the domain is gone and another one bears its name, the
frontend moves to that one's directories.  With `--attach` the entries there are written as
`qemu-vtpm-bridge attach` writes them, and what is left of the old ones is removed; what is
refused is tried again after some seconds.  Without it they are the toolstack's to write, and
the frontend waits for them.

A bridge outside domain 0 cannot look names up, and need not be told at all who its vTPM
domain is: it has one directory, `device/vtpm/<handle>`, and whoever wrote the entries there
has named the domain.  When they name another one, the frontend moves to that.

A name is what the toolstack gave; a domain cannot take another one's.  Who wants more
certainty gives `--vtpm-uuid`.  Keeps P8 and P9.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from .bridge.frontend_driver import Frontend
from .errors import BridgeError, XenError, ungrouped
from .retries import Retries
from .toolstack.attach import attach, remove_stale_frontend
from .xen.store import Store, StoreGone, domains_named
from .xen.xenbus import BACKEND_ID, DevicePaths, parse_domid

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
RETRY_MAX_S: Final = 10.0
"""Between attempts to write entries: what refuses them may pass without another domain's coming."""


class VtpmFollower:
    """Follows the vTPM domain `name` for one frontend."""

    def __init__(
        self,
        name: str,
        paths_for: Callable[[int], DevicePaths],
        frontend: Frontend,
        *,
        writes_entries: bool = False,
        sysfs: Path | None = None,
    ) -> None:
        """`paths_for` gives the directories for a vTPM domain's id; `sysfs` as for `attach`."""
        self.name = name
        self._paths_for = paths_for
        self._frontend = frontend
        self._writes_entries = writes_entries
        self._sysfs = sysfs
        self._retries = Retries(log, RETRY_S, RETRY_MAX_S)

    async def run(self, store: Store) -> None:
        """Follow the domain until cancelled; raises StoreGone with XenStore's end."""
        async with store.watch("@introduceDomain") as introduced:
            while True:
                await self._look(store)
                with trio.move_on_after(self._retries.wait_s):
                    await introduced.wait()

    async def _look(self, store: Store) -> None:
        domids = await domains_named(store, self.name)
        old = self._frontend.target
        if not domids:
            return
        if old.backend_domid in domids:
            if self._writes_entries:
                await self._attach(store, old)
            return
        new = self._paths_for(domids[-1])
        log.info("the vTPM domain %s is domain %d now", self.name, new.backend_domid)
        if self._writes_entries:
            await self._attach(store, new)
            if old.frontend != new.frontend:
                await remove_stale_frontend(store, old)
        self._frontend.retarget(new)

    async def _attach(self, store: Store, paths: DevicePaths) -> None:
        try:
            await attach(store, paths, sysfs=self._sysfs)
        except StoreGone:
            raise
        except BridgeError as error:
            self._retries.refused(error)
        else:
            self._retries.succeeded()


class EntriesFollower:
    """Follows whichever vTPM domain a frontend's entries name."""

    def __init__(self, paths_for: Callable[[int], DevicePaths], frontend: Frontend) -> None:
        self._paths_for = paths_for
        self._frontend = frontend

    async def run(self, store: Store) -> None:
        """Follow the entries until cancelled; raises StoreGone with XenStore's end."""
        path = f"{self._frontend.target.frontend}/{BACKEND_ID}"
        async with store.watch(path) as changed:
            while True:
                raw = await store.peek(path)
                if raw is not None:
                    self._look(raw, path)
                await changed.wait()

    def _look(self, raw: bytes, path: str) -> None:
        try:
            new = self._paths_for(parse_domid(raw, path))
        except XenError as error:
            log.warning("%s", error)
            return
        if new != self._frontend.target:
            log.info("the vTPM domain is domain %d now", new.backend_domid)
            self._frontend.retarget(new)


Follower = VtpmFollower | EntriesFollower


async def follow_and_run(follower: Follower | None, frontend: Frontend, store: Store) -> None:
    """Run the frontend, and the follower beside it if there is one, until it has closed.

    Raises what `Frontend.run` raises.
    """
    with ungrouped():
        async with trio.open_nursery() as nursery:
            if follower is not None:
                nursery.start_soon(follower.run, store)
            await frontend.run(store)
            nursery.cancel_scope.cancel()
