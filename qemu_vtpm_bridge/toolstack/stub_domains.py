"""`qemu-vtpm-bridge stub-domains`: the TPMs of guests whose QEMU is in a stub domain.

    qemu-vtpm-bridge stub-domains        # in domain 0, for as long as guests run

Theory of operation.  xl makes a stub domain with each start of its guest, and waits for the
QEMU in it before the guest runs.  No hook is called meanwhile, and nobody knows the stub
domain's number before.  So this program follows XenStore: a domain that has a `target` is a
stub domain, the target is its guest, and the guests file says by the guest's name or UUID
which vTPM domain that has.  It tells hvmloader which TPM to look for, and writes the entries
that join the stub domain to the vTPM domain, with the right to reset the TPM, which QEMU's
place needs and the guest must not have.  The bridge in the stub domain waits for them.

A vTPM domain that comes later, or comes back with another id, is joined when it is there.  What
is refused is tried again when domains come and go, and after some seconds: the guests file may
be half saved, or the vTPM domain still hold a device that it is about to let go.  The guests
file is read anew until the stub domain is joined.  Ending the program changes nothing for those
that are joined.  Keeps P8, P9 and P10.

Who may lie: nobody about a `target`, a name or a `vm`, as domain 0 owns a domain's directory;
a stub domain owns what is below its own `device/vtpm`, and can harm its own TPM with it.

Source: libxl's libxl_dm.c (libxl__spawn_stub_dm) for `target` and for what xl waits for.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from ..errors import BridgeError, ConfigError, XenError, first_of
from ..retries import Retries
from ..supervise import Supervisor, stop_on_signals
from ..xen.domains import tell_hvmloader
from ..xen.store import Store, StoreGone, domains_named, first_to_return, open_store
from ..xen.xenbus import (
    BACKEND_ID,
    DevicePaths,
    PathMode,
    device_paths,
    names_domain,
    parse_domid,
)
from . import guests
from .attach import attach, remove_stale_frontend
from .guests import Guest

log = logging.getLogger(__name__)

STORE_RETRY_S: Final = 1.0
"""Between attempts to reach a XenStore that went away."""

RETRY_S: Final = 1.0
RETRY_MAX_S: Final = 10.0
"""Between attempts to join a stub domain; xl gives the QEMU in it 30 s."""

_DOMAINS: Final = "/local/domain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Joins each stub domain whose guest the guests file names to the guest's vTPM domain, "
        "as soon as xl has made it. Runs in domain 0 until it is told to stop."
    )
    guests.add_option(parser)


def main(args: argparse.Namespace) -> int:
    """Follow stub domains until a signal; return the exit status.  Raises ConfigError."""
    file = guests.read(args.guests)  # what is wrong with it is better told now
    supervisor = Supervisor.from_environment()
    try:
        trio.run(_serve, args.guests, file.host.embedded, supervisor)
    except BaseExceptionGroup as group:
        raise first_of(group) from None
    finally:
        supervisor.close()
    return 0


async def _serve(path: Path, world: Path | None, supervisor: Supervisor) -> None:
    place = None if world is None else str(world / "dom" / "0" / "xenstored.sock")
    follower = StubDomains(path, lambda: supervisor.tell("READY=1"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals, nursery.cancel_scope.cancel, supervisor)
        nursery.start_soon(supervisor.feed_watchdog, lambda: True)
        while True:
            try:
                async with open_store(place) as store:
                    await follower.run(store)
            except* XenError as group:
                log.warning("%s; trying again every second", first_of(group))
            await trio.sleep(STORE_RETRY_S)


class StubDomains:
    """Follows the stub domains of one host."""

    def __init__(self, guests_file: Path, ready: Callable[[], object] = lambda: None) -> None:
        """`ready` is called when the domains that are there have been looked at."""
        self._guests_file = guests_file
        self._ready = ready
        self._followed: dict[int, trio.CancelScope] = {}
        self._retries: dict[int, Retries] = {}
        """By domain; over XenStore's end, too, as what was said is not said again."""
        self._changed = trio.Event()
        """Domains have come or gone; another one takes its place each time."""

    async def run(self, store: Store) -> None:
        """Follow them until cancelled; raises StoreGone with XenStore's end."""
        self._followed.clear()
        async with (
            store.watch("@introduceDomain") as introduced,
            store.watch("@releaseDomain") as released,
            trio.open_nursery() as nursery,
        ):
            while True:
                await self._look(store, nursery)
                self._ready()
                await first_to_return(introduced.wait, released.wait)
                self._changed.set()
                self._changed = trio.Event()

    async def _look(self, store: Store, nursery: trio.Nursery) -> None:
        entries = await store.try_ls(_DOMAINS) or []
        there = {int(entry) for entry in entries if names_domain(entry)} - {0}
        for domid in self._followed.keys() - there:
            self._followed.pop(domid).cancel()
        for domid in self._retries.keys() - there:
            del self._retries[domid]
        for domid in sorted(there - self._followed.keys()):
            scope = self._followed[domid] = trio.CancelScope()
            nursery.start_soon(self._follow, store, domid, scope)

    async def _follow(self, store: Store, domid: int, scope: trio.CancelScope) -> None:
        """See to one domain, which turns out to be a stub domain or none, for its life."""
        target = f"{_DOMAINS}/{domid}/target"
        with scope:
            async with store.watch(target) as changed:
                while await store.peek(target) is None:
                    await changed.wait()
            await self._keep_joined(store, domid)

    async def _keep_joined(self, store: Store, domid: int) -> None:
        """Join a stub domain, and again where its vTPM domain comes back."""
        retries = self._retries.setdefault(domid, Retries(log, RETRY_S, RETRY_MAX_S))
        joined: Guest | None = None
        while True:
            changed = self._changed
            try:
                guest = joined or await self._prepared(store, domid)
                if guest is None:
                    retries.later()  # a file that is being saved may lack its end
                else:
                    await self._join_now(store, domid, guest)
                    joined = guest
                    retries.succeeded()
            except StoreGone:
                raise
            except BridgeError as error:
                retries.refused(error)
            with trio.move_on_after(retries.wait_s):
                await changed.wait()

    async def _prepared(self, store: Store, domid: int) -> Guest | None:
        """Tell hvmloader of the TPM; return the guest, None where it has no TPM."""
        target = f"{_DOMAINS}/{domid}/target"
        guest_domid = parse_domid(await store.read(target), target)
        guest = await self._guest(store, guest_domid)
        if guest is not None and not await tell_hvmloader(store, guest_domid, guest.device):
            raise XenError(
                f"guest {guest.name!r}, domain {guest_domid} has gone",
                state=f"its stub domain {domid} is still there",
            )
        return guest

    async def _guest(self, store: Store, domid: int) -> Guest | None:
        """Return the guest that a domain is; None for one that the guests file does not name."""
        file = guests.read(self._guests_file)
        name = await store.peek(f"{_DOMAINS}/{domid}/name") or b""
        uuid = (await store.peek(f"{_DOMAINS}/{domid}/vm") or b"").removeprefix(b"/vm/")
        return file.of_domain(
            uuid.decode("ascii", "replace"), name.decode("utf-8", "surrogateescape")
        )

    async def _join_now(self, store: Store, domid: int, guest: Guest) -> None:
        backends = [int(guest.backend)] if guest.backend.isdecimal() else []
        backends = backends or await domains_named(store, guest.backend)
        if not backends:
            raise ConfigError(
                f"there is no vTPM domain {guest.backend} for guest {guest.name!r}",
                state=f"its stub domain {domid} waits for it",
                next_step="create it",
            )
        paths = _paths(domid, backends[-1], guest)
        await _leave_another(store, paths, guest)
        if await attach(store, paths, guest=guest.name, trust_reset=True):
            log.info("guest %r: %s -> %s: attached", guest.name, paths.frontend, paths.backend)


def _paths(domid: int, backend_domid: int, guest: Guest) -> DevicePaths:
    return device_paths(
        PathMode.DEVICE, backend_domid=backend_domid, handle=guest.handle, frontend_domid=domid
    )


async def _leave_another(store: Store, paths: DevicePaths, guest: Guest) -> None:
    """Remove the frontend's entries where they name a vTPM domain that is gone."""
    path = f"{paths.frontend}/{BACKEND_ID}"
    raw = await store.peek(path)
    if raw is not None and (old := parse_domid(raw, path)) != paths.backend_domid:
        await remove_stale_frontend(store, _paths(paths.frontend_domid, old, guest))
