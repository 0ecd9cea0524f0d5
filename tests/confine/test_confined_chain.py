"""The whole chain, every process of it unprivileged and confined, with a real swtpm."""

from __future__ import annotations

import json
import os
import pwd
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from qemu_vtpm_bridge._shim import lib
from qemu_vtpm_bridge.bridge.tpm import TPM_RC_INITIALIZE
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.confine.places import open_directory
from tests.support.swtpm_client import (
    GET_RANDOM,
    PCR_EXTEND_7,
    PCR_READ_7,
    ZERO_PCR,
    SwtpmClient,
)
from tests.support.vtpm import QEMU, VTPM, Place, place
from tests.support.wait import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else"),
    pytest.mark.skipif(lib.confine_landlock_abi() < 0, reason="this kernel has no Landlock"),
]

CONFINED = ["--run-as", "nobody", "--confine", "require"]
NOBODY = pwd.getpwnam("nobody")


@dataclass
class Confined:
    """A world, and a bridge in it as a process of nobody's."""

    place: Place
    directory: Path
    bridge: trio.Process
    clients: list[SwtpmClient] = field(default_factory=list)

    @property
    def socket_path(self) -> Path:
        return self.directory / "tpm"

    async def status(self) -> dict[str, Any]:
        """Return the bridge's status document."""
        raw = b""
        async with await trio.open_unix_socket(str(self.directory / "status")) as stream:
            while chunk := await stream.receive_some():
                raw += chunk
        return dict(json.loads(raw))

    async def until_running(self, connections: int) -> None:
        """Return once the frontend has connected so many times, and is connected."""
        with trio.fail_after(120):
            while True:
                frontend = (await self.status())["frontend"]
                if frontend["state"] == "RUNNING" and frontend["connections"] >= connections:
                    return

    async def client(self) -> SwtpmClient:
        """Return a client that has switched the TPM on and started it."""
        client = await SwtpmClient.connect(self.socket_path)
        self.clients.append(client)
        await client.power_on()
        await client.startup()
        return client

    def followers(self) -> set[Any]:
        """Return the connections to XenStore by which something is watched."""
        return {c for c in self.place.world._senders if c.domid == 0 and c.watches}

    def cut_xenstore(self) -> None:
        """End the bridge's connection to XenStore that is in use."""
        for connection in self.followers():
            self.place.world._senders[connection].scope.cancel()

    def broker_pid(self) -> int:
        """Return the process that the bridge has left its privileges to."""
        children = Path(f"/proc/{self.bridge.pid}/task/{self.bridge.pid}/children")
        (pid,) = children.read_text(encoding="ascii").split()
        return int(pid)


@asynccontextmanager
async def confined_bridge(
    tmp_path: Path, *words: str, backend: str = str(VTPM), device: DevicePaths = QEMU
) -> AsyncIterator[Confined]:
    with open_directory() as directory:
        async with place(tmp_path) as found:
            await found.attach(device)
            found.state_dir = directory / "state"
            command = [sys.executable, "-m", "qemu_vtpm_bridge", "run", *CONFINED, *words]
            command += ["--embedded", str(found.world.directory), "--backend", backend]
            command += ["--socket", str(directory / "tpm")]
            command += ["--status-socket", str(directory / "status")]
            process = await trio.lowlevel.open_process(command)
            try:
                await wait_until((directory / "status").exists)
                confined = Confined(found, directory, process)
                try:
                    yield confined
                finally:
                    for client in confined.clients:
                        client.close()
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


def facts(pid: int) -> list[dict[str, str]]:
    """Return what the kernel says of each thread of a process."""
    return [
        dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
        for path in Path(f"/proc/{pid}/task").glob("*/status")
    ]


def assert_confined(pid: int, *, filters: int) -> None:
    threads = facts(pid)
    assert threads
    for thread in threads:
        assert set(thread["Uid"].split()) == {str(NOBODY.pw_uid)}
        assert set(thread["Gid"].split()) == {str(NOBODY.pw_gid)}
        assert set(thread["Groups"].split()) <= {str(NOBODY.pw_gid)}
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(thread[kind], 16) == 0, kind
        assert thread["NoNewPrivs"] == "1"
        assert thread["Seccomp"] == "2"
        assert int(thread["Seccomp_filters"]) >= filters
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max core file size        1                    1 " in limits


async def test_every_thread_of_every_process_is_confined(tmp_path: Path) -> None:
    async with confined_bridge(tmp_path) as confined, confined.place.process(*CONFINED) as vtpm:
        await confined.until_running(1)
        client = await confined.client()
        assert await client.code(GET_RANDOM) == 0
        assert len(facts(confined.bridge.pid)) > 2  # the pump and XenStore's threads among them
        assert_confined(confined.bridge.pid, filters=1)
        assert_confined(vtpm.process.pid, filters=1)
        # swtpm's own filter is on top of ours.
        assert_confined(vtpm.swtpm_pid(), filters=2)
        document = await confined.status()
        assert document["confinement"] == {
            "user": "nobody",
            "uid": NOBODY.pw_uid,
            "landlock-abi": lib.confine_landlock_abi(),
            "seccomp": True,
        }
        confined.bridge.send_signal(signal.SIGTERM)
        assert await confined.bridge.wait() == 0
        assert await vtpm.terminate() == 0
        # The directory is root's, so nobody may not remove the socket; the next start does.
        assert confined.socket_path.exists()


async def test_P7_the_reset_contract_holds(tmp_path: Path) -> None:
    async with confined_bridge(tmp_path) as confined, confined.place.process(*CONFINED):
        await confined.until_running(1)
        client = await confined.client()
        assert await client.code(PCR_EXTEND_7) == 0
        assert await client.pcr_7() != ZERO_PCR
        assert await client.stop() == 0
        assert await client.init() == 0
        # For the power cycle a new page and a new event channel were made.
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        await client.startup()
        assert await client.pcr_7() == ZERO_PCR
        assert (await confined.status())["frontend"]["connections"] == 2


async def served_again(client: SwtpmClient) -> None:
    """Return once commands succeed; until then the TPM gives errors, never nothing."""
    with trio.fail_after(120):
        while await client.code(GET_RANDOM) != 0:
            pass


async def test_P8_a_swtpm_that_dies_is_started_again_inside_the_confinement(
    tmp_path: Path,
) -> None:
    async with confined_bridge(tmp_path) as confined, confined.place.process(*CONFINED) as vtpm:
        await confined.until_running(1)
        client = await confined.client()
        first = vtpm.swtpm_pid()
        os.kill(first, signal.SIGKILL)
        await served_again(client)
        assert vtpm.swtpm_pid() != first
        assert_confined(vtpm.swtpm_pid(), filters=2)


async def test_P8_a_vtpm_domain_that_is_killed_and_comes_back_is_served_again(
    tmp_path: Path,
) -> None:
    async with confined_bridge(tmp_path) as confined:
        async with confined.place.process(*CONFINED) as vtpm:
            await confined.until_running(1)
            client = await confined.client()
            await vtpm.kill()
        async with confined.place.process(*CONFINED):
            await served_again(client)
            assert (await confined.status())["frontend"]["connections"] == 2


@pytest.mark.parametrize("mode", [PathMode.SEED, PathMode.DEVICE, PathMode.ZEROS])
async def test_the_broker_carries_what_each_path_mode_needs(tmp_path: Path, mode: PathMode) -> None:
    """With entries of the toolstack's, and the vTPM domain given by its name."""
    device = device_paths(mode, backend_domid=VTPM, handle=0)
    words = ["--path-mode", mode.value]
    async with (
        confined_bridge(tmp_path, *words, backend="vtpm", device=device) as confined,
        confined.place.process(*CONFINED),
    ):
        await confined.until_running(1)
        client = await confined.client()
        assert await client.code(GET_RANDOM) == 0


async def test_P8_xenstore_is_found_again_as_often_as_it_goes(tmp_path: Path) -> None:
    """By a bridge whose user may not connect to it: its broker does."""
    async with confined_bridge(tmp_path) as confined, confined.place.process(*CONFINED):
        await confined.until_running(1)
        client = await confined.client()
        for _ in range(5):
            before = confined.followers()
            confined.cut_xenstore()
            await wait_until(lambda before=before: confined.followers() - before)
            assert await client.code(GET_RANDOM) == 0


async def test_P8_the_bridge_serves_on_without_its_broker(tmp_path: Path) -> None:
    async with confined_bridge(tmp_path) as confined, confined.place.process(*CONFINED):
        await confined.until_running(1)
        client = await confined.client()
        os.kill(confined.broker_pid(), signal.SIGKILL)
        with trio.fail_after(60):
            while (
                "carries XenStore's requests has ended"
                not in ((await confined.status())["last-error"])
            ):
                pass
        # Without XenStore the page and the event channel still work.
        assert await client.code(GET_RANDOM) == 0
        # Nor does the end wait for it.
        confined.bridge.send_signal(signal.SIGTERM)
        with trio.fail_after(60):
            assert await confined.bridge.wait() == 0


async def test_the_broker_is_root_without_capabilities_and_ends_with_the_bridge(
    tmp_path: Path,
) -> None:
    async with confined_bridge(tmp_path) as confined:
        assert (await confined.status())["confinement"]["user"] == "nobody"
        pid = confined.broker_pid()
        (thread,) = facts(pid)
        assert set(thread["Uid"].split()) == {"0"}
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(thread[kind], 16) == 0, kind
        assert (thread["NoNewPrivs"], thread["Seccomp"]) == ("1", "2")
        # Nor does a signal to all of a service's processes end it before the bridge.
        os.kill(pid, signal.SIGTERM)
        with trio.fail_after(60):
            while (await confined.status())["last-error"]:
                pass
        confined.bridge.send_signal(signal.SIGKILL)
        await wait_until(lambda: not Path(f"/proc/{pid}").exists())


async def test_a_bridge_imports_nothing_once_another_user_may_not_read_it(tmp_path: Path) -> None:
    """Python says what it imports, and when; for another user its files may be out of reach."""
    for role, words in (
        ("run", ["--backend", str(VTPM), "--socket", "tpm", "--record", "record"]),
        ("device", ["--backend", str(VTPM), "--socket", "tpm", "--registers", "tis"]),
        ("vtpm", ["--domid", str(VTPM), "--state-dir", "state"]),
    ):
        with open_directory() as directory:
            async with place(tmp_path) as found:
                await found.attach(QEMU)
                log = directory / "log"
                command = [sys.executable, "-X", "importtime", "-m", "qemu_vtpm_bridge", role]
                command += [*CONFINED, "--embedded", str(found.world.directory), *words]
                command += ["--status-socket", "status"]
                with log.open("wb") as out:
                    process = await trio.lowlevel.open_process(command, cwd=directory, stderr=out)
                await wait_until((directory / "status").exists)
                await wait_until(lambda log=log: "confined: uid" in log.read_text())
                async with await trio.open_unix_socket(str(directory / "status")) as stream:
                    while await stream.receive_some():
                        pass
                process.terminate()
                assert await process.wait() == 0
                _, _, after = log.read_text().partition("confined: uid")
                assert after
                assert "import time:" not in after, role
