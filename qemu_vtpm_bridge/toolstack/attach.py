"""The XenStore entries that join a frontend and a vTPM domain: written, removed, listed.

Theory of operation.  All entries of a device appear in one transaction, with libxl's
permissions: each side owns its directory and may read the other's.  Mini-OS' tpmback
looks at a new backend directory once, when the directory node itself is written, so the
entries must be whole by then, and the node is made explicitly.  Entries that are there
and agree are left alone: writing over a live device would confuse its backend for good.

What is known to break peers is refused, with the reason.  Keeps P9.  Who may lie: each
domain writes below its own backend and device directories what it likes, so `list` reads
them as it would a stranger's letter.

Source: libxl's libxl_vtpm.c and libxl_device.c; Mini-OS' tpmback.c, as observed.
"""

from __future__ import annotations

import errno
import os
import re
import uuid as uuid_module
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import trio

from ..errors import ConfigError, XenError
from ..xen.store import Store, StoreError, Transaction
from ..xen.xenbus import (
    FEATURE_RESET,
    TRUST_RESET,
    DevicePaths,
    XenbusState,
    check_path,
    parse_backend_path,
    parse_state,
    parse_uuid,
    printable,
)

FRONTENDS_OF_MINI_OS_MAX: Final = 2
"""tpmback's table of interfaces is too small by a factor; a third entry overwrites what
is behind it.  Our own vTPM domain, known by `feature-reset`, takes eight."""

FRONTENDS_MAX: Final = 8
KEY_MAX_CHARS: Final = 39
"""tpmback puts a key's name behind its directory's into a buffer that a longer one overruns."""

NAME_MAX_BYTES: Final = 1024
"""A message to XenStore has 4096 bytes, of which a path may take 3072."""

REMOVE_TRIES: Final = 5
REMOVE_RETRY_S: Final = 0.2

_XENBUS_DRIVER: Final = "bus/xen/drivers/vtpm"
_PATH_OF_DEVICE: Final = re.compile(r"/local/domain/(\d+)/device/vtpm/(\d+)")
_PATH_OF_SEED: Final = re.compile(r"/local/domain/0/frontend/vtpm/(\d+)/(\d+)")
_OF_THE_DOMAIN: Final = re.compile(
    r"/local/domain/(?:0|[1-9]\d*)(?:/device|/backend)?|/local/domain"
)
_SETTLED: Final = (None, XenbusState.UNKNOWN, XenbusState.INITIALISING, XenbusState.CLOSED)


@dataclass(frozen=True, slots=True)
class Entry:
    """One device as XenStore shows it."""

    backend: str
    frontend: str
    backend_domid: int
    frontend_domid: int
    handle: int
    backend_name: str
    frontend_name: str
    backend_state: str
    frontend_state: str
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the entry for JSON."""
        return asdict(self)


async def attach(
    store: Store,
    paths: DevicePaths,
    *,
    uuid: str | None = None,
    guest: str | None = None,
    trust_reset: bool = False,
    force: bool = False,
    sysfs: Path | None = None,
) -> bool:
    """Write a device's entries; return False where they are there already.

    `uuid` is the device's, random if not given; `guest` is noted beside the frontend.
    `trust_reset` lets the frontend have the TPM power-cycled: never for the guest itself.
    `force` goes on where a vTPM domain has as many frontends as it survives, where it
    still holds a device whose frontend's entries are gone, and within one domain.  `sysfs`
    is looked at for a driver of this machine's that would take the frontend; None where
    XenStore is not this machine's.
    Raises ConfigError where the entries cannot be or contradict others.  Cancelling
    leaves all entries or none.
    """
    chosen = parse_uuid((uuid or str(uuid_module.uuid4())).encode())
    noted = None if guest is None else name_in_store(guest)
    _check_path(paths)
    if sysfs is not None:
        _check_driver(paths, sysfs)

    async def write(transaction: Transaction) -> bool:
        if await _present(transaction, paths):
            await _check_trust(transaction, paths, trust_reset)
            return False
        await _check(transaction, paths, force=force)
        await _write(transaction, paths, chosen, noted, trust_reset=trust_reset)
        return True

    return await store.transact(write)


def name_in_store(guest: str) -> str:
    """Return a guest's name as it is noted beside its device; raises ConfigError for one too long.

    What is no text in it, as a program's words may have, becomes a mark.
    """
    name = os.fsencode(guest).decode("utf-8", "replace")
    if len(name.encode()) > NAME_MAX_BYTES:
        raise ConfigError(
            f"the guest's name {printable(name.encode())} is too long for XenStore",
            state=f"it has {len(name.encode())} bytes, of {NAME_MAX_BYTES} that are possible",
            next_step="give the guest a shorter name",
        )
    return name


async def _present(transaction: Transaction, paths: DevicePaths) -> bool:
    """Return whether the entries are there; raises ConfigError where others are."""
    raw_backend = await transaction.try_read(f"{paths.frontend}/backend")
    raw_frontend = await transaction.try_read(f"{paths.backend}/frontend")
    if raw_backend is None and raw_frontend is None:
        return False
    for path, raw, wanted in (
        (f"{paths.frontend}/backend", raw_backend, paths.backend),
        (f"{paths.backend}/frontend", raw_frontend, paths.frontend),
    ):
        if raw is not None and raw != wanted.encode():
            raise ConfigError(
                f"{path} is {printable(raw)}: the handle is another device's",
                state=f"wanted was '{wanted}'",
                next_step="give another --handle, or detach that device first",
            )
    # One half alone is what a removed or dead domain leaves; both are written again.
    return raw_backend is not None and raw_frontend is not None


async def _check_trust(transaction: Transaction, paths: DevicePaths, trust_reset: bool) -> None:
    """Refuse to call entries the same that lack a right: the vTPM domain has read them."""
    said = await transaction.try_read(f"{paths.backend}/{TRUST_RESET}")
    if trust_reset and said != b"1":
        raise ConfigError(
            f"{paths.backend} is attached without the right to reset the TPM",
            state=f"{paths.backend}/{TRUST_RESET} is not 1",
            next_step="detach it first, and attach it again with --trust-reset",
        )


def _check_path(paths: DevicePaths) -> None:
    """Refuse a frontend path whose numbers are not the backend's: tpmback ignores it."""
    match = _PATH_OF_DEVICE.fullmatch(paths.frontend)
    said = match and (int(match[1]), int(match[2]))
    wanted = (paths.frontend_domid, paths.handle)
    if match is None and (match := _PATH_OF_SEED.fullmatch(paths.frontend)):
        said, wanted = (int(match[1]), int(match[2])), (paths.backend_domid, paths.handle)
    if said is not None and said != wanted:
        raise ConfigError(
            f"the frontend path {paths.frontend} does not go with the backend {paths.backend}",
            state="a vTPM domain compares the domain and the handle in both, "
            "and ignores a frontend where they differ",
            next_step="give the --handle and --domid that the path names",
        )
    if not re.match(rf"/local/domain/0*{paths.frontend_domid}/", paths.frontend):
        raise ConfigError(
            f"the frontend path {paths.frontend} is not below domain {paths.frontend_domid}",
            next_step=f"give one below /local/domain/{paths.frontend_domid}/",
        )


def _check_driver(paths: DevicePaths, sysfs: Path) -> None:
    """Refuse a path that this domain's own kernel watches, where it has a driver for it."""
    watched = f"/local/domain/{paths.frontend_domid}/device/vtpm/"
    if paths.frontend_domid != 0 or not paths.frontend.startswith(watched):
        return
    bound = sysfs / "bus/xen/devices" / f"vtpm-{paths.handle}" / "driver"
    if bound.exists() or (sysfs / _XENBUS_DRIVER).exists():
        raise ConfigError(
            "this kernel's xen-tpmfront would take the frontend, and make it this domain's TPM",
            state=f"{bound} or {sysfs / _XENBUS_DRIVER} exists",
            next_step="unload and blacklist the module xen-tpmfront, or use --path-mode zeros "
            "or seed",
        )


async def _check(transaction: Transaction, paths: DevicePaths, *, force: bool) -> None:
    vtpm = f"/local/domain/{paths.backend_domid}"
    if await transaction.try_read(f"{vtpm}/domid") is None:
        raise ConfigError(
            f"there is no domain {paths.backend_domid}",
            next_step="create the vTPM domain first; its entries vanish with it",
        )
    if paths.backend_domid == paths.frontend_domid and not force:
        raise ConfigError(
            "a domain cannot be its own vTPM domain",
            state="whoever takes over one end has the other too",
            next_step="give the vTPM domain's name or id as the backend; --force is for trying "
            "things out within one domain",
        )
    own = f"/local/domain/{paths.frontend_domid}"
    # Domain 0 is there, also where nobody wrote its entries.
    if paths.frontend_domid != 0 and await transaction.try_read(f"{own}/domid") is None:
        raise ConfigError(
            f"there is no domain {paths.frontend_domid}",
            next_step="create the frontend's domain first",
        )
    held = parse_state(await transaction.try_read(f"{paths.backend}/state"))
    if await transaction.try_read(f"{paths.backend}/frontend") is None:
        held = None  # nobody's: a state alone is what a backend wrote too late
    if held not in (None, XenbusState.INITIALISING) and not force:
        raise ConfigError(
            f"the vTPM domain still holds this device, in state {held.label}",
            state="its frontend's entries are gone; entries that are written over it now "
            "would not be looked at by every vTPM domain",
            next_step="try again in a moment; where it stays so, detach with --force",
        )
    others = 0
    ours = False
    for domid in await transaction.try_ls(f"{vtpm}/backend/vtpm") or []:
        for handle in await transaction.try_ls(f"{vtpm}/backend/vtpm/{domid}") or []:
            if f"{vtpm}/backend/vtpm/{domid}/{handle}" == paths.backend:
                continue
            others += 1
            feature = f"{vtpm}/backend/vtpm/{domid}/{handle}/{FEATURE_RESET}"
            ours |= await transaction.try_read(feature) is not None
    most = FRONTENDS_MAX if ours else FRONTENDS_OF_MINI_OS_MAX
    if others >= most and not (force and others < FRONTENDS_MAX):
        raise ConfigError(
            f"the vTPM domain {paths.backend_domid} has {others} frontends already",
            state=""
            if ours
            else "a Mini-OS vTPM domain survives two; this one is not known to be another",
            next_step="detach one, or use --force where the vTPM domain is not Mini-OS",
        )


async def _write(
    transaction: Transaction,
    paths: DevicePaths,
    uuid: str,
    guest: str | None,
    *,
    trust_reset: bool,
) -> None:
    owner, peer = paths.frontend_domid, paths.backend_domid
    frontend = {
        "backend": paths.backend,
        "backend-id": str(peer),
        "state": str(int(XenbusState.INITIALISING)),
        "handle": str(paths.handle),
    }
    if guest is not None:
        frontend["domain"] = guest
    backend = {
        "frontend": paths.frontend,
        "frontend-id": str(owner),
        "online": "1",
        "state": str(int(XenbusState.INITIALISING)),
        "handle": str(paths.handle),
        "uuid": uuid,
        "resume": "False",
    }
    if trust_reset:
        backend[TRUST_RESET] = "1"
    await _make(transaction, paths.frontend, [f"n{owner}", f"r{peer}"], frontend)
    # The backend's directory last: it is what tpmback waits for.
    await _make(transaction, paths.backend, [f"n{peer}", f"r{owner}"], backend)


async def _make(
    transaction: Transaction, directory: str, permissions: list[str], values: dict[str, str]
) -> None:
    await transaction.rm(directory)
    await transaction.mkdir(directory)
    await transaction.set_perms(directory, permissions)
    for key, value in values.items():
        await transaction.write(f"{directory}/{key}", value.encode())
        await transaction.set_perms(f"{directory}/{key}", permissions)


async def detach(store: Store, paths: DevicePaths, *, force: bool = False) -> bool:
    """Remove a device's entries; return False where there are none.

    Refuses while the frontend is connected, unless `force`: a backend whose page goes
    away under a command does not survive it everywhere.  The frontend's directory goes
    first, which tells the backend to let go.
    """

    async def remove_frontend(transaction: Transaction) -> bool:
        raw_state = await transaction.try_read(f"{paths.frontend}/state")
        state = parse_state(raw_state)
        if state not in _SETTLED and not force:
            raise ConfigError(
                f"the frontend at {paths.frontend} is {state.label}",
                state="a bridge or a guest uses this TPM, or was killed while it did",
                next_step="stop the bridge first, or use --force",
            )
        present = raw_state is not None or await transaction.try_ls(paths.frontend) is not None
        await _remove(transaction, paths.frontend)
        return present

    async def remove_backend(transaction: Transaction) -> bool:
        present = await transaction.try_ls(paths.backend) is not None
        await _remove(transaction, paths.backend)
        return present

    removed = await store.transact(remove_frontend)
    for tries_left in reversed(range(REMOVE_TRIES)):
        try:
            return await store.transact(remove_backend) or removed
        except StoreError as error:
            # What a real xenstored says while the vTPM domain removes the same directory.
            if error.errno != errno.EIO or not tries_left:
                raise
            await trio.sleep(REMOVE_RETRY_S)
    return removed


async def remove_stale_frontend(store: Store, paths: DevicePaths) -> None:
    """Remove a frontend's directory whose vTPM domain is gone; its own went with it."""

    async def remove(transaction: Transaction) -> None:
        if await transaction.try_read(f"/local/domain/{paths.backend_domid}/domid") is None:
            await _remove(transaction, paths.frontend)

    await store.transact(remove)


async def _remove(transaction: Transaction, directory: str) -> None:
    """Remove a device's directory, and those above that it leaves empty, as far as one may.

    What a toolstack makes with the domain stays: `device`, `backend`, and the domain's.
    """
    await transaction.rm(directory)
    above = directory.rpartition("/")[0]
    while not _OF_THE_DOMAIN.fullmatch(above) and await transaction.try_ls(above) == []:
        try:
            await transaction.rm(above)
        except StoreError as error:
            # The broker's word for what is not the device's own.
            if error.errno != errno.EACCES:
                raise
            return
        above = above.rpartition("/")[0]


async def list_entries(store: Store, *, backend_domid: int | None = None) -> list[Entry]:
    """Return every vtpm device that any domain's backend directory names.

    With `backend_domid` only that domain's: all that a vTPM domain may look at itself.
    """
    domains = [str(backend_domid)]
    if backend_domid is None:
        domains = await store.try_ls("/local/domain") or []
    entries = []
    for domid in domains:
        top = f"/local/domain/{domid}/backend/vtpm"
        for frontend_domid in await store.try_ls(top) or []:
            for handle in await store.try_ls(f"{top}/{frontend_domid}") or []:
                try:
                    entry = await _entry(store, f"{top}/{frontend_domid}/{handle}")
                except XenError:
                    continue  # no numbers, or gone meanwhile: no toolstack wrote that
                entries.append(entry)
    return entries


async def _name(store: Store, domid: int) -> str:
    raw = await store.peek(f"/local/domain/{domid}/name")  # a vTPM domain may not see others'
    return "" if raw is None else printable(raw)[1:-1]


async def _entry(store: Store, backend: str) -> Entry:
    """Return what XenStore shows of a device; raises XenError where the path is none."""
    backend_domid, frontend_domid, handle = parse_backend_path(backend)
    problems = []
    frontend, frontend_state = "", None
    raw_frontend = await store.try_read(f"{backend}/frontend")
    if raw_frontend is None:
        problems.append("the backend's entries name no frontend")
    else:
        try:
            frontend = check_path(raw_frontend.decode("ascii", "replace"))
            frontend_state = parse_state(await store.try_read(f"{frontend}/state"))
            back = await store.try_read(f"{frontend}/backend")
            if frontend_state is None:
                problems.append("the frontend's entries are missing")
            elif back != backend.encode():
                problems.append("the frontend's entries name another backend")
        except ConfigError:
            problems.append(f"the frontend {printable(raw_frontend)} is no path")
    if any(len(key) > KEY_MAX_CHARS for key in await store.try_ls(backend) or []):
        problems.append(f"a key has more than {KEY_MAX_CHARS} characters, which crashes Mini-OS")
    return Entry(
        backend,
        frontend,
        backend_domid,
        frontend_domid,
        handle,
        await _name(store, backend_domid),
        await _name(store, frontend_domid),
        _label(parse_state(await store.try_read(f"{backend}/state"))),
        _label(frontend_state),
        tuple(problems),
    )


def _label(state: XenbusState | None) -> str:
    return "missing" if state is None else state.label
