"""Stub domains are joined to their guests' vTPM domains, on every program that can be XenStore."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack import stub_domains
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.toolstack.guests import Guest
from qemu_vtpm_bridge.toolstack.stub_domains import StubDomains
from qemu_vtpm_bridge.xen.store import Store, StoreError, open_store
from qemu_vtpm_bridge.xen.xenbus import PathMode, device_paths
from tests.support.programs import WAIT_S, client, code
from tests.support.programs import World as Programs
from tests.support.swtpm_client import PCR_EXTEND_7, PCR_READ_7, STARTUP
from tests.support.world import running_world, store_socket
from tests.support.xenstored import XenStore

VTPM, STUB, GUEST = 4, 5, 6
FRONTEND = f"/local/domain/{STUB}/device/vtpm/0"
BACKEND = f"/local/domain/{VTPM}/backend/vtpm/{STUB}/0"

GUESTS_TEXT = """
[guest.guest]
backend = "vtpm"
"""


@asynccontextmanager
async def dom0(
    tmp_path: Path, server: XenStore = XenStore.EMBEDDED, text: str = GUESTS_TEXT
) -> AsyncIterator[tuple[World, Store]]:
    """Domain 0 of a host where stub domains are followed; the guests file is guests.toml."""
    guests = tmp_path / "guests.toml"
    guests.write_text(text)
    async with (
        running_world(tmp_path, server) as world,
        open_store(store_socket(world)) as store,
        open_store(store_socket(world)) as followers,
        trio.open_nursery() as nursery,
    ):
        ready = trio.Event()
        nursery.start_soon(StubDomains(guests, ready.set).run, followers)
        await ready.wait()
        yield world, store
        nursery.cancel_scope.cancel()


async def create_guest(world: World, store: Store, stub: int = STUB, name: str = "guest") -> None:
    """Make a guest and its stub domain in libxl's order; the guest is the domain after it."""
    await world.create_domain(stub + 1, name)
    await world.create_domain(stub, f"{name}-dm")
    await store.write(f"/local/domain/{stub}/target", str(stub + 1).encode())


async def until_node(store: Store, path: str, value: str | None) -> None:
    """Return once a node has this value."""
    wanted = None if value is None else value.encode()
    with trio.fail_after(60):
        async with store.watch(path) as watch:
            while await store.try_read(path) != wanted:
                await watch.wait()


async def until_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    with trio.fail_after(60):
        while text not in caplog.text:
            await trio.lowlevel.checkpoint()


async def test_it_is_joined_with_the_right_to_reset(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await create_guest(world, store)
        await until_node(store, f"{BACKEND}/trust-reset", "1")
        assert await store.read(f"{FRONTEND}/backend") == BACKEND.encode()
        assert await store.read(f"{FRONTEND}/domain") == b"guest"
        assert await store.get_perms(f"{BACKEND}/trust-reset") == [f"n{VTPM}", f"r{STUB}"]
        # QEMU waits for the entries, so what hvmloader reads stands there before them.
        version = f"/local/domain/{GUEST}/platform/tpm_version"
        assert await store.read(version) == b"2"
        assert await store.get_perms(version) == ["n0", f"r{GUEST}"]


async def test_those_that_are_there_at_the_start_are_joined(tmp_path: Path) -> None:
    guests = tmp_path / "guests.toml"
    async with running_world(tmp_path) as world, open_store(store_socket(world)) as store:
        await world.create_domain(VTPM, "vtpm")
        await create_guest(world, store)
        uuid = (await store.read(f"/local/domain/{GUEST}/vm")).decode().removeprefix("/vm/")
        guests.write_text(f'[guest."{uuid}"]\nbackend = {VTPM}\ntpm = "1.2"\n')
        async with trio.open_nursery() as nursery:
            nursery.start_soon(StubDomains(guests).run, store)
            await until_node(store, f"{FRONTEND}/backend", BACKEND)
            assert await store.read(f"/local/domain/{GUEST}/platform/tpm_version") == b"1"
            nursery.cancel_scope.cancel()


async def test_other_domains_are_left_alone(tmp_path: Path) -> None:
    async with dom0(tmp_path) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await world.create_domain(20, "guest")  # of that name, and no stub domain
        await create_guest(world, store, stub=30, name="unlisted")
        await create_guest(world, store)
        await until_node(store, f"{FRONTEND}/backend", BACKEND)
        assert await store.try_ls(f"/local/domain/{VTPM}/backend/vtpm") == [str(STUB)]
        for domid in (20, 30):
            assert await store.try_read(f"/local/domain/{domid}/device/vtpm/0/backend") is None
        assert await store.try_read("/local/domain/31/platform/tpm_version") is None


async def test_P8_a_vtpm_domain_may_come_late_and_come_back(
    tmp_path: Path, xenstore: XenStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        await create_guest(world, store)
        await until_logged(caplog, "there is no vTPM domain vtpm for guest 'guest'")
        await world.create_domain(VTPM, "vtpm")
        await until_node(store, f"{FRONTEND}/backend", BACKEND)
        await world.destroy_domain(VTPM)
        await world.create_domain(9, "vtpm")
        await until_node(store, f"{FRONTEND}/backend-id", "9")
        assert await store.read(f"/local/domain/9/backend/vtpm/{STUB}/0/trust-reset") == b"1"


async def test_a_reboot_is_another_stub_domain(tmp_path: Path, xenstore: XenStore) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await create_guest(world, store)
        await until_node(store, f"{FRONTEND}/backend", BACKEND)
        await world.destroy_domain(STUB)
        await world.destroy_domain(GUEST)
        await create_guest(world, store, stub=7)
        await until_node(store, "/local/domain/7/device/vtpm/0/backend-id", str(VTPM))
        assert await store.read(f"/local/domain/{VTPM}/backend/vtpm/7/0/trust-reset") == b"1"


@pytest.mark.parametrize("target", ["", "six", "-1", "99999"])
async def test_P9_a_target_that_is_none_is_said_and_harms_nobody(
    tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with dom0(tmp_path) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await world.create_domain(30, "odd")
        await store.write("/local/domain/30/target", target.encode())
        await until_logged(caplog, "/local/domain/30/target holds")
        await create_guest(world, store)
        await until_node(store, f"{FRONTEND}/backend", BACKEND)


async def test_a_guests_file_is_read_for_each_and_a_broken_one_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with dom0(tmp_path, text="[guest") as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await create_guest(world, store, stub=30)
        await until_logged(caplog, "mend the TOML at that place")
        (tmp_path / "guests.toml").write_text(GUESTS_TEXT)
        await create_guest(world, store)
        await until_node(store, f"{FRONTEND}/backend", BACKEND)


async def test_entries_of_another_toolstack_are_said_to_lack_the_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with dom0(tmp_path) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await world.create_domain(GUEST, "guest")
        await world.create_domain(STUB, "guest-dm")
        paths = device_paths(PathMode.DEVICE, backend_domid=VTPM, handle=0, frontend_domid=STUB)
        await attach(store, paths)  # as `xl vtpm-attach` does
        await store.write(f"/local/domain/{STUB}/target", str(GUEST).encode())
        await until_logged(caplog, "is attached without the right to reset the TPM")


async def test_P9_a_guest_that_goes_meanwhile_gets_no_directory_again(
    tmp_path: Path,
    xenstore: XenStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with dom0(tmp_path, xenstore) as (world, store):
        find_guest = StubDomains._guest

        async def find_and_destroy(self: StubDomains, store: Store, domid: int) -> Guest | None:
            found = await find_guest(self, store, domid)
            if domid == GUEST and await store.try_read(f"/local/domain/{GUEST}/name") is not None:
                await world.destroy_domain(GUEST)
            return found

        monkeypatch.setattr(StubDomains, "_guest", find_and_destroy)
        await world.create_domain(VTPM, "vtpm")
        await create_guest(world, store)
        await until_logged(caplog, f"domain {GUEST} has gone")
        assert str(GUEST) not in await store.ls("/local/domain")
        # It is nobody else's end.
        await world.destroy_domain(STUB)
        await create_guest(world, store, stub=8)
        await until_node(store, "/local/domain/8/device/vtpm/0/backend-id", str(VTPM))
        assert str(GUEST) not in await store.ls("/local/domain")


def refusing(
    real: Callable[..., Awaitable[bool]], error: Exception, domid: int, times: int
) -> Callable[..., Awaitable[bool]]:
    """Return a function that a domain's first calls find refused."""
    left = times

    async def refuse(store: Store, asked: int | object, *words: object, **more: object) -> bool:
        nonlocal left
        if left and domid in (asked, getattr(asked, "frontend_domid", None)):
            left -= 1
            raise error
        return await real(store, asked, *words, **more)

    return refuse


TIMES = 5


@pytest.mark.parametrize(
    ("name", "domid", "error"),
    [
        ("tell_hvmloader", 31, StoreError(errno.ENOSPC, "writing")),
        ("attach", 30, StoreError(errno.EAGAIN, "a transaction")),
        ("attach", 30, ConfigError("the vTPM domain still holds this device")),
    ],
)
async def test_P8_what_is_refused_for_a_while_is_tried_again_and_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    domid: int,
    error: Exception,
) -> None:
    monkeypatch.setattr(stub_domains, "RETRY_S", 0.01)
    refuse = refusing(getattr(stub_domains, name), error, domid, TIMES)
    monkeypatch.setattr(stub_domains, name, refuse)
    async with dom0(tmp_path) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await create_guest(world, store, stub=30)
        await until_node(store, "/local/domain/30/device/vtpm/0/backend-id", str(VTPM))
        # One guest's refusal is no other's.
        assert "trying again every second" not in caplog.text
    assert caplog.text.count(str(error)) == 1


@pytest.mark.parametrize("half", ["[guest", ""])
async def test_P8_a_guests_file_that_is_being_saved_is_read_again(
    tmp_path: Path, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stub_domains, "RETRY_S", 0.01)
    read: list[Path] = []
    real = stub_domains.guests.read
    monkeypatch.setattr(stub_domains.guests, "read", lambda path: read.append(path) or real(path))
    async with dom0(tmp_path, text=half) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        await create_guest(world, store)
        with trio.fail_after(60):
            while len(read) < TIMES:
                await trio.lowlevel.checkpoint()
        (tmp_path / "guests.toml").write_text(GUESTS_TEXT)
        await until_node(store, f"{FRONTEND}/backend", BACKEND)


async def test_P8_a_place_that_another_frontend_leaves_is_taken_at_once(
    tmp_path: Path,
    xenstore: XenStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stub_domains, "RETRY_S", math.inf)
    monkeypatch.setattr(stub_domains, "RETRY_MAX_S", math.inf)
    async with dom0(tmp_path, xenstore) as (world, store):
        await world.create_domain(VTPM, "vtpm")
        for domid in (20, 21):
            await world.create_domain(domid, f"other-{domid}")
            await attach(
                store,
                device_paths(PathMode.DEVICE, backend_domid=VTPM, handle=0, frontend_domid=domid),
            )
        await create_guest(world, store)
        await until_logged(caplog, "has 2 frontends already")
        await store.rm(f"/local/domain/{VTPM}/backend/vtpm/20")
        await world.destroy_domain(20)
        await until_node(store, f"{FRONTEND}/backend", BACKEND)


@pytest.mark.parametrize("user", [None, "nobody"])
def test_P7_the_bridge_needs_no_word_of_its_vtpm_domain(user: str | None) -> None:
    """As processes: a stub domain's bridge finds its vTPM domain, and may reset its TPM."""
    if user is not None and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvb")))
        domains = (f"{VTPM}:vtpm", "9:another", f"{STUB}:guest-dm", f"{GUEST}:guest")
        programs = Programs(stack, place, *domains, attached=False)
        guests, path = place / "guests.toml", place / "tpm"
        guests.write_text(f'{GUESTS_TEXT}\n[host]\nembedded = "{programs.world}"\n')
        where = [*programs.where, "--domid", str(STUB)]
        status = ["--status-socket", str(place / "status")]
        become = [] if user is None else ["--run-as", user]
        programs.start("run", *where, "--socket", str(path), *status, *become)
        programs.until(lambda: "waiting for" in programs.log.read_text())
        assert "which `attach` in domain 0 writes" in programs.log.read_text()
        programs.vtpm(VTPM)
        follower = programs.start("stub-domains", "--guests", str(guests))
        store = programs.world / "dom/0/xenstored.sock"
        trio.run(write_node, str(store), f"/local/domain/{STUB}/target", str(GUEST))
        programs.until_running()
        for _ in range(2):
            with client(path) as (_control, data):
                assert code(data, STARTUP[Family.TPM_2_0]) == 0
                data.sendall(PCR_READ_7)
                assert data.recv(4096)[-32:] == bytes(32)
                assert code(data, PCR_EXTEND_7) == 0
        # Domain 0 joins it to another.
        follower.terminate()
        assert follower.wait(WAIT_S) == 0
        device = [*programs.where, "--domid", "guest-dm"]
        done = programs.call("detach", *device, "--backend", "vtpm", "--force")
        assert done.returncode == 0, done
        done = programs.call("attach", *device, "--backend", "another", "--trust-reset")
        assert done.returncode == 0, done
        programs.vtpm(9)
        backend = lambda: programs.status().get("frontend", {}).get("backend", "")  # noqa: E731
        programs.until(lambda: backend().startswith("/local/domain/9/"))
        programs.until_running()
        with client(path) as (_control, data):
            assert code(data, STARTUP[Family.TPM_2_0]) == 0


async def write_node(socket_path: str, path: str, value: str) -> None:
    async with open_store(socket_path) as store:
        await store.write(path, value.encode())


def test_in_domain_0_a_bridge_is_told_its_vtpm_domain() -> None:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvb")))
        programs = Programs(stack, place)
        done = programs.call("run", *programs.where, "--socket", str(place / "tpm"))
        assert (done.returncode, "--backend is missing" in done.stderr) == (2, True), done
        done = programs.call(
            "run", *programs.where, "--domid", "2", "--attach", "--socket", str(place / "tpm")
        )
        assert (done.returncode, "--backend is missing" in done.stderr) == (2, True), done
