"""The toolstack's entries: libxl's to the letter, and nothing that breaks a peer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.embedded.store import NODES_MAX
from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.errors import ConfigError, XenError
from qemu_vtpm_bridge.toolstack.attach import attach, detach, list_entries
from qemu_vtpm_bridge.xen.store import Store, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.support.world import running_world, store_socket
from tests.support.xenstored import XenStore

UUID = "01234567-89ab-cdef-0123-456789abcdef"
VTPM, OTHER_VTPM, GUEST = 2, 4, 3
SEED = device_paths(PathMode.SEED, backend_domid=VTPM, handle=0)


def device(mode: PathMode = PathMode.SEED, **numbers: int) -> DevicePaths:
    return device_paths(mode, **{"backend_domid": VTPM, "handle": 0, **numbers})


@asynccontextmanager
async def dom0(tmp_path: Path, server: XenStore) -> AsyncIterator[tuple[World, Store]]:
    """Two vTPM domains, 2 and 4, a guest, 3, and domain 0's XenStore."""
    async with running_world(tmp_path, server) as world:
        for domid, name in ((VTPM, "vtpm"), (OTHER_VTPM, "other-vtpm"), (GUEST, "guest")):
            await world.create_domain(domid, name)
        async with open_store(store_socket(world)) as store:
            yield world, store


async def tree(store: Store, path: str) -> dict[str, tuple[str, list[str]]]:
    """Return everything at and below a node: value and permissions by relative path."""
    found = {"": ((await store.read(path)).decode(), await store.get_perms(path))}
    for name in await store.ls(path):
        for below, entry in (await tree(store, f"{path}/{name}")).items():
            found[f"{name}/{below}".rstrip("/")] = entry
    return found


@pytest.mark.parametrize(
    "paths",
    [SEED, device(PathMode.DEVICE), device(PathMode.ZEROS), device(frontend_domid=GUEST)],
    ids=["seed", "device", "zeros", "guest"],
)
async def test_the_entries_are_libxls(
    tmp_path: Path, xenstore: XenStore, paths: DevicePaths
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        assert await attach(store, paths, uuid=UUID) is True
        owner, peer = str(paths.frontend_domid), str(VTPM)
        ours, theirs = [f"n{owner}", f"r{peer}"], [f"n{peer}", f"r{owner}"]
        assert await tree(store, paths.frontend) == {
            "": ("", ours),
            "backend": (paths.backend, ours),
            "backend-id": (peer, ours),
            "state": ("1", ours),
            "handle": ("0", ours),
        }
        assert await tree(store, paths.backend) == {
            "": ("", theirs),
            "frontend": (paths.frontend, theirs),
            "frontend-id": (owner, theirs),
            "online": ("1", theirs),
            "state": ("1", theirs),
            "handle": ("0", theirs),
            "uuid": (UUID, theirs),
            "resume": ("False", theirs),
        }


async def test_they_appear_at_once_and_name_the_backend_directory(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with (
        dom0(tmp_path, xenstore) as (world, store),
        open_store(store_socket(world, VTPM)) as vtpm,
        vtpm.watch("backend/vtpm") as watch,
    ):
        assert await watch.wait() == ["backend/vtpm"]
        await attach(store, SEED, guest="hvm")
        # tpmback looks at a directory once: when this event comes, all must be there.
        with trio.fail_after(60):
            while "backend/vtpm/0/0" not in await watch.wait():
                pass
        assert await vtpm.read("backend/vtpm/0/0/uuid")
        assert await vtpm.read(f"{SEED.frontend}/state") == b"1"
        assert await vtpm.read(f"{SEED.frontend}/domain") == b"hvm"


async def test_attaching_twice_changes_nothing(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await attach(store, SEED, uuid=UUID)
        await store.write(f"{SEED.frontend}/state", b"4")
        await store.write(f"{SEED.backend}/state", b"4")
        async with store.watch(SEED.backend) as watch:
            await watch.wait()
            assert await attach(store, SEED) is False
            assert await store.read(f"{SEED.backend}/uuid") == UUID.encode()
            assert await store.read(f"{SEED.frontend}/state") == b"4"
            with trio.move_on_after(0):
                pytest.fail(f"{await watch.wait()} changed")


async def refused(store: Store, paths: DevicePaths, match: str, **options: object) -> None:
    before = await tree(store, "/local")
    with pytest.raises((ConfigError, XenError), match=match):
        await attach(store, paths, **options)  # type: ignore[arg-type]
    assert await tree(store, "/local") == before


async def test_P7_the_right_to_reset_is_an_entry_of_the_backends(
    tmp_path: Path, xenstore: XenStore
) -> None:
    paths = device(frontend_domid=GUEST)
    async with dom0(tmp_path, xenstore) as (world, store):
        await attach(store, paths)
        match = "attached without the right to reset the TPM"
        await refused(store, paths, match, trust_reset=True)
        await detach(store, paths)
        assert await attach(store, paths, trust_reset=True) is True
        assert await attach(store, paths, trust_reset=True) is False
        right = f"{paths.backend}/trust-reset"
        assert await store.read(right) == b"1"
        async with open_store(store_socket(world, GUEST)) as frontends:
            with pytest.raises(XenError):
                await frontends.write(right, b"1")


@pytest.mark.parametrize("mode", [PathMode.DEVICE, PathMode.ZEROS])
async def test_a_handle_is_one_vtpms_where_the_path_does_not_name_it(
    tmp_path: Path, xenstore: XenStore, mode: PathMode
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await attach(store, device(mode))
        other = device(mode, backend_domid=OTHER_VTPM)
        await refused(store, other, "the handle is another device's")
        await attach(store, device(mode, backend_domid=OTHER_VTPM, handle=1))
        # and the same backend directory has one frontend
        both = PathMode.ZEROS if mode is PathMode.DEVICE else PathMode.DEVICE
        await refused(store, device(both), "the handle is another device's")


async def test_what_cannot_be_is_refused(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await refused(store, device(backend_domid=9), "no domain 9")
        await refused(store, device(frontend_domid=8), "no domain 8")
        await refused(store, device(frontend_domid=VTPM), "its own vTPM")
        for uuid in ("", "x", UUID.upper(), UUID[:-1]):
            if uuid:
                await refused(store, SEED, "uuid holds", uuid=uuid)


@pytest.mark.parametrize(
    "path",
    [
        "/local/domain/0/frontend/vtpm/4/0",
        "/local/domain/0/frontend/vtpm/2/1",
        "/local/domain/0/device/vtpm/7",
        "/local/domain/00/device/vtpm/1",
        "/local/domain/3/device/vtpm/0",
        "/local/domain/5/anything",
        "/elsewhere/vtpm/0",
    ],
)
async def test_an_explicit_path_with_other_numbers_is_refused(
    tmp_path: Path, xenstore: XenStore, path: str
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        paths = device_paths(PathMode.EXPLICIT, backend_domid=VTPM, handle=0, explicit=path)
        await refused(store, paths, "does not go with|is not below")


async def test_a_third_frontend_would_crash_mini_os_and_not_ours(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        for handle in (0, 1):
            await attach(store, device(handle=handle))
        await refused(store, device(handle=2), "has 2 frontends already")
        await store.write(f"{SEED.backend}/feature-reset", b"1")
        for handle in range(2, 8):
            await attach(store, device(handle=handle))
        await refused(store, device(handle=8), "has 8 frontends", force=True)


async def test_force_goes_past_the_limit_of_mini_os(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        for handle in range(8):
            await attach(store, device(handle=handle), force=True)
        await refused(store, device(handle=8), "has 8 frontends", force=True)


async def test_a_device_that_its_backend_still_holds_is_not_written_over(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await attach(store, SEED)
        await store.write(f"{SEED.backend}/state", b"4")
        await store.rm(SEED.frontend)
        await refused(store, SEED, "still holds this device, in state Connected")
        assert await attach(store, SEED, force=True)


async def test_domain_0_needs_no_entries_of_its_own(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await store.rm("/local/domain/0")
        assert await attach(store, SEED) is True


async def test_a_state_that_a_backend_wrote_too_late_is_nobodys(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await store.write(f"{SEED.backend}/state", b"6")
        assert await attach(store, SEED) is True


async def test_half_of_the_entries_is_made_whole(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await attach(store, SEED)
        await store.rm(SEED.backend)  # the vTPM domain was destroyed and made anew
        await store.write(f"{SEED.frontend}/ring-ref", b"9")
        assert await attach(store, SEED) is True
        assert await store.try_read(f"{SEED.frontend}/ring-ref") is None
        await store.rm(SEED.frontend)
        assert await attach(store, SEED) is True


@pytest.mark.parametrize("exists", ["bus/xen/drivers/vtpm", "bus/xen/devices/vtpm-0/driver"])
async def test_mode_device_is_refused_where_xen_tpmfront_would_bind(
    tmp_path: Path, xenstore: XenStore, exists: str
) -> None:
    sysfs = tmp_path / "sys"
    (sysfs / exists).mkdir(parents=True)
    async with dom0(tmp_path, xenstore) as (_, store):
        await refused(store, device(PathMode.DEVICE), "xen-tpmfront", sysfs=sysfs)
        assert await attach(store, device(PathMode.ZEROS), sysfs=sysfs)
        assert await attach(store, device(handle=1), sysfs=sysfs)
        # A guest's own driver is meant to bind.
        assert await attach(store, device(frontend_domid=GUEST), sysfs=sysfs, force=True)


# Detaching.


@pytest.mark.parametrize(
    "paths",
    [SEED, device(PathMode.DEVICE), device(PathMode.ZEROS), device(frontend_domid=GUEST)],
    ids=["seed", "device", "zeros", "guest"],
)
async def test_detaching_leaves_the_tree_as_it_was(
    tmp_path: Path, xenstore: XenStore, paths: DevicePaths
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        before = await tree(store, "/local")
        assert await detach(store, paths) is False
        await attach(store, paths)
        assert await detach(store, paths) is True
        after = await tree(store, "/local")
        assert {k: v for k, v in after.items() if not k.endswith("backend/vtpm")} == before
        assert await detach(store, paths) is False


async def test_the_frontends_directory_goes_first(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await attach(store, SEED)
        async with store.watch(SEED.frontend) as one, store.watch(SEED.backend) as other:
            await one.wait()
            await other.wait()
            gone: list[str] = []

            async def note(name: str, path: str, watch: object) -> None:
                while await store.try_ls(path) is not None:
                    await watch.wait()  # type: ignore[attr-defined]
                gone.append(name)
                if name == "backend":
                    assert await store.try_ls(SEED.frontend) is None

            async with trio.open_nursery() as nursery:
                nursery.start_soon(note, "frontend", SEED.frontend, one)
                nursery.start_soon(note, "backend", SEED.backend, other)
                await detach(store, SEED)
            assert sorted(gone) == ["backend", "frontend"]


@pytest.mark.parametrize("state", [b"2", b"3", b"4", b"5", b"7", b"8"])
async def test_a_live_connection_is_not_cut(
    tmp_path: Path, xenstore: XenStore, state: bytes
) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await attach(store, SEED)
        await store.write(f"{SEED.frontend}/state", state)
        with pytest.raises(ConfigError, match="stop the bridge first"):
            await detach(store, SEED)
        assert await store.read(f"{SEED.backend}/state") == b"1"
        assert await detach(store, SEED, force=True) is True


# Listing.


async def test_the_list_shows_states_names_and_problems(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (_, store):
        await attach(store, SEED)
        await attach(store, device(frontend_domid=GUEST))
        await store.write(f"{SEED.frontend}/state", b"4")
        await store.write(f"{SEED.backend}/{'k' * 40}", b"")
        await store.rm(device(frontend_domid=GUEST).frontend)
        seed, guest = await list_entries(store)
        assert (seed.frontend_state, seed.backend_state) == ("Connected", "Initialising")
        assert (seed.frontend_name, seed.backend_name) == ("Domain-0", "vtpm")
        assert len(seed.problems) == 1
        assert "40" not in seed.backend_state
        assert (guest.frontend_name, guest.frontend_state) == ("guest", "missing")
        assert guest.problems == ("the frontend's entries are missing",)


async def test_P9_what_a_domain_writes_below_its_own_backend_spoils_no_list(
    tmp_path: Path,
    xenstore: XenStore,
) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        await attach(store, SEED)
        async with open_store(store_socket(world, GUEST)) as guest:
            for path, value in {
                "backend/vtpm/x/y": b"",
                "backend/vtpm/0/99999999999": b"",
                "backend/vtpm/00/0/frontend": b"/local/domain/0/x",
                "backend/vtpm/0/1/frontend": b"\x1b[31m\n\xff",
                "backend/vtpm/0/2/frontend": b"/" + b"y" * 2000,
                "backend/vtpm/0/3/frontend": b"",
                "backend/vtpm/0/4/frontend": b"/local/domain/0/../0",
                "backend/vtpm/0/5/frontend": b"/local/domain/0/frontend/vtpm/2/0",
                "backend/vtpm/0/6/state": b"\x00\x01",
            }.items():
                await guest.write(path, value)
        entries = await list_entries(store)
        assert entries[0].backend == SEED.backend
        assert not entries[0].problems
        assert all(entry.problems for entry in entries[1:])
        assert len(entries) == 7
        shown = json.dumps([entry.as_dict() for entry in entries])
        assert "\\u001b" not in shown
        assert "\x1b" not in shown


# The commands.


MODULE = ("-m", "qemu_vtpm_bridge")


async def run(world: World, *words: str, program: tuple[str, str] = MODULE) -> tuple[int, str, str]:
    command = [sys.executable, *program, words[0]]
    command += ["--embedded", str(world.directory), *words[1:]]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_the_commands_speak_to_people_and_to_programs(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        status, out, _ = await run(world, "attach", "--backend", "vtpm", "--json")
        written = {"frontend": SEED.frontend, "backend": SEED.backend, "written": True}
        assert (status, json.loads(out)) == (0, written)
        status, out, _ = await run(world, "attach", "--backend", "2")
        assert status == 0
        assert "was attached" in out
        status, out, _ = await run(world, "list", "--json")
        (entry,) = json.loads(out)
        assert (status, entry["backend"], entry["backend_name"]) == (0, SEED.backend, "vtpm")
        status, out, _ = await run(world, "list")
        assert SEED.frontend in out
        assert "vtpm: Initialising" in out
        await store.write(f"{SEED.frontend}/state", b"4")
        status, out, err = await run(world, "detach", "--backend", "vtpm")
        assert status == 2
        assert "is Connected" in err
        assert "next:" in err
        status, out, _ = await run(world, "detach", "--backend", "vtpm", "--force", "--json")
        assert (status, json.loads(out)["removed"]) == (0, True)
        status, out, _ = await run(world, "list")
        assert out == "no vtpm device is attached\n"


async def test_a_domains_name_must_mean_one_domain(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (world, _):
        await world.create_domain(6, "vtpm")
        for name in ("vtpm", "nobody"):
            status, _, err = await run(world, "attach", "--backend", name)
            assert status == 2
            assert f"named {name}" in err


ODD_NAMES = ("../../x", "a b", "-rf", "$(reboot)", "%s%n", "two\nlines", "günther ☃", "")


async def test_a_guest_may_have_an_odd_name(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        before = await tree(store, "/local/domain/0")
        for name in (*ODD_NAMES, os.fsdecode(b"\xff no text")):
            status, _, err = await run(world, "attach", "--backend=vtpm", f"--guest={name}")
            assert (status, err) == (0, "")
            noted = os.fsencode(name).decode("utf-8", "replace")
            assert await store.read(f"{SEED.frontend}/domain") == noted.encode()
            status, out, _ = await run(world, "list")
            assert (status, len(out.splitlines())) == (0, 1)
            status, _, err = await run(world, "detach", "--backend=vtpm")
            assert (status, err) == (0, "")
            assert await tree(store, "/local/domain/0") == before


async def test_a_name_that_xenstore_does_not_take_leaves_nothing(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        before = await tree(store, "/local")
        status, _, err = await run(world, "attach", "--backend=vtpm", f"--guest={'x' * 5000}")
        assert status in (1, 2)
        (line,) = err.splitlines()
        assert "next: " in line
        assert await tree(store, "/local") == before


DEAD_BETWEEN = """\
import os, sys
from qemu_vtpm_bridge import cli
from qemu_vtpm_bridge.xen.store import Store
transact = Store.transact
async def once(store, function):
    Store.transact = lambda *_: os._exit(9)
    return await transact(store, function)
Store.transact = once
sys.exit(cli.main())
"""


@pytest.mark.parametrize("state", [b"1", b"4"], ids=["unused", "held"])
async def test_a_detach_that_died_between_its_transactions_can_be_done_again(
    tmp_path: Path, xenstore: XenStore, state: bytes
) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        before = await tree(store, "/local/domain/0")
        await attach(store, SEED)
        await store.write(f"{SEED.backend}/state", state)
        status, _, _ = await run(world, "detach", "--backend=vtpm", program=("-c", DEAD_BETWEEN))
        assert status == 9
        assert await store.try_ls(SEED.frontend) is None
        assert await store.try_ls(SEED.backend) is not None
        status, out, err = await run(world, "detach", "--backend=vtpm", "--json")
        assert (status, json.loads(out)["removed"], err) == (0, True, "")
        assert await store.try_ls(SEED.backend) is None
        assert await tree(store, "/local/domain/0") == before
        assert (await run(world, "attach", "--backend=vtpm"))[0] == 0


async def use_up_nodes(store: Store) -> None:
    for number in range(NODES_MAX + 1):
        await store.write(f"data/{number}", b"")


async def test_the_quota_of_a_vtpm_domain_does_not_bind_the_toolstack(
    tmp_path: Path, xenstore: XenStore
) -> None:
    """Domain 0 has none, and nobody else may write these entries."""
    async with dom0(tmp_path, xenstore) as (world, _):
        async with open_store(store_socket(world, VTPM)) as vtpm:
            with pytest.raises(XenError, match=r"writing data/\d+"):
                await use_up_nodes(vtpm)
        assert (await run(world, "attach", "--backend=vtpm"))[0] == 0
        assert (await run(world, "detach", "--backend=vtpm"))[0] == 0
