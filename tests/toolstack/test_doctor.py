"""The doctor at an embedded Xen: what is broken, what it says, and that this mends it."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.xen.store import Store, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.support.doctor import (
    Clinic,
    Document,
    examined,
    findings,
    grave,
    mend,
    started,
    verdicts,
)
from tests.support.wait import wait_until
from tests.support.world import running_world, store_socket

VTPM, GUEST, STRANGER = 2, 3, 4
SEED = device_paths(PathMode.SEED, backend_domid=VTPM, handle=0)
ZEROS = device_paths(PathMode.ZEROS, backend_domid=VTPM, handle=0)
DEVICE = device_paths(PathMode.DEVICE, backend_domid=VTPM, handle=0)
OF_GUEST = device_paths(PathMode.SEED, backend_domid=VTPM, handle=0, frontend_domid=GUEST)
PROGRAMS = ("qemu", "swtpm")
NOT_YET = "has not taken it up"
"""What is left to say of a device whose entries are right and whose vTPM does not run."""


@asynccontextmanager
async def clinic(tmp_path: Path) -> AsyncIterator[tuple[Clinic, Store]]:
    """A vTPM domain, a guest and a stranger; nothing is attached."""
    async with running_world(tmp_path) as world:
        for domid, name in ((VTPM, "vtpm"), (GUEST, "guest"), (STRANGER, "stranger")):
            await world.create_domain(domid, name)
        run_dir = world.directory / "run"
        run_dir.mkdir(mode=0o700)
        async with open_store(store_socket(world)) as store:
            yield Clinic(world, run_dir), store


async def connected(store: Store, paths: DevicePaths = SEED) -> None:
    """Write a device's entries, and the states of two ends that have found each other."""
    await attach(store, paths, guest="guest", force=True)
    for directory in (paths.frontend, paths.backend):
        await store.write(f"{directory}/state", b"4")


async def test_a_fresh_host_has_no_problem(tmp_path: Path) -> None:
    async with clinic(tmp_path) as (here, store):
        status, document = await here.doctor()
        assert (status, document["verdict"], grave(document)) == (0, "ok", [])
        assert verdicts(document, "device") == ["not-applicable"]
        await connected(store)
        status, document = await here.doctor()
        assert (status, verdicts(document, "device")) == (0, ["ok"])
        (device,) = findings(document, "device")
        assert device["subject"] == SEED.backend
        assert device["facts"]["guest"] == "guest"


def wrong(document: Document) -> list[Document]:
    """Return what is said to be wrong, except with this machine's own programs."""
    return [
        finding
        for finding in document["findings"]
        if finding["verdict"] in ("problem", "warning") and finding["check"] not in PROGRAMS
    ]


# What can be wrong with entries, and is mended by what is printed.


@dataclass
class Fault:
    """One way to break a device that is connected."""

    check: str
    says: str
    breaks: Callable[[World, Store], Awaitable[None]]
    left: str = ""
    """What may still be said when it is mended; nothing may be, where it is empty."""
    paths: DevicePaths = SEED
    verdict: str = "problem"


def writes(path: str, value: bytes) -> Callable[[World, Store], Awaitable[None]]:
    async def breaks(_: World, store: Store) -> None:
        await store.write(path, value)

    return breaks


def removes(*paths: str) -> Callable[[World, Store], Awaitable[None]]:
    async def breaks(_: World, store: Store) -> None:
        for path in paths:
            await store.rm(path)

    return breaks


def permits(path: str, *permissions: str) -> Callable[[World, Store], Awaitable[None]]:
    async def breaks(_: World, store: Store) -> None:
        await store.set_perms(path, permissions)

    return breaks


def dies(state: bytes) -> Callable[[World, Store], Awaitable[None]]:
    async def breaks(world: World, store: Store) -> None:
        for paths in (SEED, ZEROS, DEVICE):
            if await store.try_ls(paths.frontend) is not None:
                await store.write(f"{paths.frontend}/state", state)
        await world.destroy_domain(VTPM)

    return breaks


async def _a_third_frontend(_: World, store: Store) -> None:
    for handle in (1, 2):
        paths = device_paths(PathMode.SEED, backend_domid=VTPM, handle=handle)
        await attach(store, paths, force=True)
        await store.write(f"{paths.backend}/state", b"2")


LONG = "k" * 40
OTHER = "/local/domain/0/frontend/vtpm/2/9"
FAULTS = {
    "no frontend named": Fault(
        "device", "names no frontend", removes(f"{SEED.backend}/frontend", SEED.frontend)
    ),
    "no path": Fault(
        "device", "names no frontend", writes(f"{SEED.backend}/frontend", b"x y"), NOT_YET
    ),
    "frontend removed": Fault("device", "are missing", removes(SEED.frontend)),
    "zeros frontend removed": Fault("device", "are missing", removes(ZEROS.frontend), paths=ZEROS),
    "odd frontend missing": Fault(
        "device", "are missing", writes(f"{SEED.backend}/frontend", OTHER.encode()), NOT_YET
    ),
    "long key": Fault("device", "crashes a Mini-OS", writes(f"{SEED.backend}/{LONG}", b"")),
    "backend for all": Fault("device", "every domain may write", permits(SEED.backend, "b2")),
    "backend's state for all": Fault(
        "device", "every domain may read", permits(f"{SEED.backend}/state", "r2")
    ),
    "backend is domain 0's": Fault("device", "domain 0's, not", permits(SEED.backend, "n0")),
    "frontend unreadable": Fault("device", "domain 2 may not read", permits(SEED.frontend, "n0")),
    "frontend open": Fault(
        "device", "domain 3 may write it", permits(SEED.frontend, "n0", "r2", "w3")
    ),
    "state missing": Fault("device", "state is missing", removes(f"{SEED.backend}/state"), NOT_YET),
    "three frontends": Fault("device.frontends", "has 3 frontends", _a_third_frontend, "no bridge"),
    "vTPM domain gone": Fault("device.leftover", "vTPM domain 2 is gone", dies(b"6")),
    "gone under a bridge": Fault("device.leftover", "vTPM domain 2 is gone", dies(b"4")),
    "gone, zeros": Fault("device.leftover", "vTPM domain 2 is gone", dies(b"4"), paths=ZEROS),
    "gone, device": Fault("device.leftover", "vTPM domain 2 is gone", dies(b"1"), paths=DEVICE),
    "backend removed": Fault(
        "device.leftover", "has no entries for it", removes(SEED.backend), NOT_YET
    ),
    "names none": Fault(
        "device.leftover", "names no vTPM", removes(SEED.backend, f"{SEED.frontend}/backend")
    ),
    "names nonsense": Fault(
        "device.leftover", "names no vTPM domain", writes(f"{OTHER}/backend", b"\xff\x00")
    ),
    "guest's leftover": Fault(
        "device.leftover", "is gone", dies(b"1"), paths=OF_GUEST, verdict="warning"
    ),
    "no domid": Fault(
        "xenstore", "does not say which domain", removes("/local/domain/0/domid")
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_what_is_printed_mends_it(tmp_path: Path, fault: Fault) -> None:
    async with clinic(tmp_path) as (here, store):
        await connected(store, fault.paths)
        await fault.breaks(here.world, store)
        finding = await here.finding(fault.check)
        assert finding["verdict"] == fault.verdict
        assert fault.says in finding["summary"]
        assert finding["summary"].isascii()
        await mend(finding)
        _, document = await here.doctor()
        left = [
            found
            for found in wrong(document)
            if not (fault.left and fault.left in found["summary"])
        ]
        assert left == []


async def test_without_what_it_says_nothing_is_mended(tmp_path: Path) -> None:
    """The doctor itself changes nothing: it says the same again, and XenStore is the same."""
    async with clinic(tmp_path) as (here, store):
        await connected(store)
        await store.rm(SEED.frontend)
        await store.write(f"{OTHER}/backend", b"/local/domain/9/backend/vtpm/0/9")
        events: list[str] = []
        async with store.watch("/local") as watch:
            await watch.wait()
            first = await here.doctor()
            with trio.move_on_after(0):
                events += await watch.wait()
            assert await here.doctor() == first
        assert first[0] == 3
        assert events == []


# States.


@pytest.mark.parametrize(
    ("frontend", "backend", "verdict", "says"),
    [
        (b"4", b"4", "ok", "connected"),
        (b"3", b"2", "ok", "connecting"),
        (b"3", b"4", "ok", "connecting"),
        (b"1", b"1", "problem", NOT_YET),
        (b"1", b"2", "warning", "no bridge has connected"),
        (b"6", b"2", "warning", "no bridge has connected"),
        (b"1", b"4", "warning", "of a bridge that is gone"),
        (b"4", b"2", "problem", "missed a restart"),
        (b"4", b"6", "problem", "has closed it"),
        (b"4", b"5", "problem", "has closed it"),
        (b"4", b"99", "problem", "shows no state there is"),
        (b"x", b"2", "problem", "shows no state there is"),
        (b"4", b"7", "warning", "Reconfiguring"),
    ],
)
async def test_states_have_a_meaning_together(
    tmp_path: Path, frontend: bytes, backend: bytes, verdict: str, says: str
) -> None:
    async with clinic(tmp_path) as (here, store):
        await attach(store, SEED)
        await store.write(f"{SEED.frontend}/state", frontend)
        await store.write(f"{SEED.backend}/state", backend)
        _, document = await here.doctor()
        (finding,) = findings(document, "device")
        assert finding["verdict"] == verdict
        assert says in finding["summary"]


async def test_the_whole_chain_is_started_by_what_it_prints(tmp_path: Path) -> None:
    """From an attached device to a connected bridge, and back after kill -9."""
    async with clinic(tmp_path) as (here, store):
        await attach(store, SEED, guest="guest")
        here.run_dir.rmdir()
        status, document = await here.doctor()
        assert status == 3
        await mend(next(f for f in findings(document, "socket") if f["verdict"] == "warning"))
        assert here.run_dir.stat().st_mode & 0o777 == 0o700
        (device,) = findings(document, "device")
        async with started(device["mend"][0]["command"]):
            await until_read(store, f"{SEED.backend}/state", b"2")
            device = await here.finding("device")
            assert "no bridge has connected" in device["summary"]
            async with started(device["mend"][0]["command"]) as bridge:
                await until_read(store, f"{SEED.backend}/state", b"4")
                await until_read(store, f"{SEED.frontend}/state", b"4")
                document = await fine(here)
                (socket,) = findings(document, "socket")
                assert socket["summary"].endswith("guest.sock is listened at")
                (answer,) = findings(document, "status")
                assert answer["summary"].endswith("connected, without a QEMU")
                bridge.send_signal(signal.SIGKILL)
                await bridge.wait()
            (socket,) = await here_problems(here, "socket")
            assert "is listened at by nobody" in socket["summary"]
            (answer,) = await here_problems(here, "status")
            async with started(socket["mend"][0]["command"]):
                await wait_until(lambda: is_answered(here.run_dir / "guest.status"))
                await fine(here)


async def fine(here: Clinic) -> Document:
    """Look until the chain is connected, and return the document that says so.

    The doctor's look at the socket is no QEMU's: the bridge has counted none.
    """
    with trio.fail_after(60):
        while True:
            status, document = await here.doctor()
            if status == 0:
                break
    assert verdicts(document, "device") == ["ok"]
    path = here.run_dir / "guest.status"
    async with await trio.open_unix_socket(path) as stream:
        raw = b"".join([chunk async for chunk in stream])
    assert json.loads(raw)["control"]["clients"] == 0
    return document


async def here_problems(here: Clinic, check: str) -> list[Document]:
    _, document = await here.doctor()
    return [finding for finding in grave(document) if finding["check"] == check]


def is_answered(path: Path) -> bool:
    from qemu_vtpm_bridge.toolstack.doctor_sockets import is_held

    return is_held(path) is True


async def until_read(store: Store, path: str, wanted: bytes) -> None:
    with trio.fail_after(60):
        async with store.watch(path) as watch:
            while await store.try_read(path) != wanted:
                await watch.wait()


# One guest.


async def test_a_guest_that_is_named(tmp_path: Path) -> None:
    async with clinic(tmp_path) as (here, store):
        status, document = await here.doctor("--guest", "guest")
        assert status == 3
        (device,) = findings(document, "device")
        assert "no vtpm device is attached for guest" in device["summary"]
        assert "attach" in device["mend"][0]["command"]
        (socket,) = findings(document, "socket")
        assert "QEMU would not start" in socket["summary"]
        await connected(store)
        # Another guest's fault is not this one's.
        await attach(store, device_paths(PathMode.SEED, backend_domid=VTPM, handle=1), guest="b")
        _, document = await here.doctor("--guest", "guest")
        assert verdicts(document, "device") == ["ok"]
        (socket,) = findings(document, "socket")
        assert f"--socket {here.run_dir}/guest.sock" in socket["mend"][0]["command"]


async def test_a_vtpm_domain_looks_at_itself(tmp_path: Path) -> None:
    async with clinic(tmp_path) as (here, store):
        await connected(store)
        status, document = await here.doctor("--domid", str(VTPM))
        assert (status, document["role"]) == (0, "vtpm")
        (device,) = findings(document, "device")
        assert device["verdict"] == "ok"
        assert device["subject"] == SEED.backend
        await store.write(f"{SEED.backend}/state", b"1")
        finding = await here.finding("device", "--domid", str(VTPM))
        assert NOT_YET in finding["summary"]


async def test_a_bridge_beside_a_qemu_in_a_stub_domain(tmp_path: Path) -> None:
    async with clinic(tmp_path) as (here, store):
        await connected(store, OF_GUEST)
        status, document = await here.doctor("--domid", str(GUEST), "--role", "dom0")
        assert (status, document["role"]) == (0, "dom0")
        assert verdicts(document, "device") == ["not-applicable"]
        assert verdicts(document, "xenstore") == ["ok"]
        # Named falsely, it is told so.
        status, document = await examined(
            *here.place[2:], "--domid", "7", XENSTORED_PATH=store_socket(here.world, GUEST)
        )
        (xenstore,) = findings(document, "xenstore")
        assert (status, xenstore["summary"]) == (3, f"this is domain {GUEST}, not 7")


async def test_a_world_that_is_not_there(tmp_path: Path) -> None:
    async with clinic(tmp_path) as (here, _):
        place = here.place[1]
    gone = Clinic(World(Path(str(place))), tmp_path)
    status, document = await gone.doctor()
    (finding,) = findings(document, "xenstore")
    assert (status, finding["verdict"]) == (3, "problem")
    assert finding["mend"][0]["command"] == f"qemu-vtpm-bridge embedded-xen {place}"
    assert findings(document, "device") == []


# Strangers.


async def test_P9_P10_what_a_stranger_writes_harms_nobody(tmp_path: Path) -> None:
    """A domain names other domains' frontends; nothing that is printed touches those."""
    async with clinic(tmp_path) as (here, store):
        await connected(store)
        await connected(store, OF_GUEST)
        async with open_store(store_socket(here.world, STRANGER)) as stranger:
            for path, value in {
                "backend/vtpm/0/0/frontend": SEED.frontend.encode(),
                "backend/vtpm/3/0/frontend": OF_GUEST.frontend.encode(),
                "backend/vtpm/0/1/frontend": b"\x1b[31m\n\xff",
                "backend/vtpm/0/2/frontend": b"/" + b"y" * 2000,
                "backend/vtpm/0/3/state": b"\x1b]0;pwned\x07",
                "backend/vtpm/0/99999999999/frontend": b"/x",
                "backend/vtpm/x/y/frontend": b"/x",
                "device/vtpm/0/backend": b"/local/domain/99/backend/vtpm/4/0",
                "device/vtpm/1/backend": b"`reboot`",
            }.items():
                await stranger.write(path, value)
        await store.write(f"/local/domain/{STRANGER}/name", b"\x1b[2J$(reboot)")
        status, document = await here.doctor()
        assert status == 3
        theirs = wrong(document)
        assert len(theirs) == 8
        for finding in theirs:
            assert all(part not in json.dumps(finding) for part in ("\\u001b", "\\u0007"))
            assert len(finding["summary"]) < 250
            if finding["check"] != "device.frontends":
                await mend(finding)
        for paths in (SEED, OF_GUEST):
            assert await store.read(f"{paths.frontend}/state") == b"4"
            assert await store.read(f"{paths.backend}/state") == b"4"
        _, document = await here.doctor()
        assert grave(document) == []


async def test_P9_a_crowd_is_thinned_by_its_own_devices_only(tmp_path: Path) -> None:
    """A frontend that a stranger names, and that is not connected, is not detached for it."""
    async with clinic(tmp_path) as (here, store):
        await attach(store, OF_GUEST)
        async with open_store(store_socket(here.world, STRANGER)) as stranger:
            await stranger.write("backend/vtpm/3/0/frontend", OF_GUEST.frontend.encode())
            for handle in range(2):
                await stranger.write(f"backend/vtpm/0/{handle}/state", b"2")
        crowd = await here.finding("device.frontends")
        assert "has 3 frontends" in crowd["summary"]
        assert crowd["mend"][0]["command"] == ""


async def test_P9_a_frontend_of_another_device_is_left_alone(tmp_path: Path) -> None:
    """Also where its state is missing just now, so that it looks like half a device."""
    async with clinic(tmp_path) as (here, store):
        await attach(store, OF_GUEST)
        await store.rm(f"{OF_GUEST.frontend}/state")
        async with open_store(store_socket(here.world, STRANGER)) as stranger:
            await stranger.write("backend/vtpm/3/0/frontend", OF_GUEST.frontend.encode())
        _, document = await here.doctor()
        (theirs,) = [f for f in grave(document) if f["subject"].startswith("/local/domain/4")]
        await mend(theirs)
        assert await store.read(f"{OF_GUEST.frontend}/backend") == OF_GUEST.backend.encode()
        assert await store.try_ls("/local/domain/4/backend/vtpm/3/0") is None


async def test_P10_a_crowd_of_entries_is_cut(tmp_path: Path) -> None:
    async with clinic(tmp_path) as (here, _):
        async with open_store(store_socket(here.world, STRANGER)) as stranger:
            for handle in range(70):
                await stranger.write(f"backend/vtpm/0/{handle}/state", b"1")
        _, document = await here.doctor()
        told = findings(document, "device")
        assert len(told) == 65
        assert told[-1]["summary"] == "6 more devices were not looked at"
