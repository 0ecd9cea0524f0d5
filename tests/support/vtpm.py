"""A vTPM domain in a world, in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio

from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.vtpm.domain import VtpmConfig, VtpmDomain
from qemu_vtpm_bridge.vtpm.ordinals import TpmFamily
from qemu_vtpm_bridge.xen.platform import Platform
from qemu_vtpm_bridge.xen.store import open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.support.world import running_world, store_socket, xen_socket
from tests.support.xenstored import XenStore

VTPM = 2
QEMU = device_paths(PathMode.SEED, backend_domid=VTPM, handle=0)
GUEST = device_paths(PathMode.DEVICE, backend_domid=VTPM, handle=0, frontend_domid=3)
STUB = device_paths(PathMode.SEED, backend_domid=VTPM, handle=0, frontend_domid=5)


@dataclass
class Place:
    """A world with domains 2 (the vTPM), 3 (a guest) and 5 (a stub domain)."""

    world: World
    state_dir: Path
    family: TpmFamily

    async def attach(self, *devices: DevicePaths) -> None:
        async with open_store(store_socket(self.world)) as store:
            for paths in devices:
                await attach(store, paths, force=True)

    @asynccontextmanager
    async def domain(self, **changes: Any) -> AsyncIterator[VtpmDomain]:
        """Run the vTPM domain in this process; it is cancelled in the end."""
        config = VtpmConfig(
            state_dir=self.state_dir,
            family=self.family,
            store_path=store_socket(self.world, VTPM),
        )
        domain = VtpmDomain(
            replace(config, **changes),
            lambda: Platform.open_embedded(xen_socket(self.world, VTPM)),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(domain.run)
            yield domain
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def process(self, *words: str) -> AsyncIterator[VtpmProcess]:
        """Run the vTPM domain as the program; it is killed in the end."""
        status = self.world.directory / "status.sock"
        command = [sys.executable, "-m", "qemu_vtpm_bridge", "vtpm"]
        command += ["--embedded", str(self.world.directory), "--domid", str(VTPM)]
        command += ["--state-dir", str(self.state_dir), "--tpm", self.family.value]
        command += ["--status-socket", str(status), *words]
        process = await trio.lowlevel.open_process(command, stderr=subprocess.DEVNULL)
        try:
            yield VtpmProcess(process)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@dataclass
class VtpmProcess:
    process: trio.Process

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()

    def swtpm_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = children.read_text(encoding="ascii").split()
        return int(pid)


@asynccontextmanager
async def place(
    tmp_path: Path,
    family: TpmFamily = TpmFamily.TPM_2_0,
    server: XenStore = XenStore.EMBEDDED,
) -> AsyncIterator[Place]:
    async with running_world(tmp_path, server) as world:
        for domid, name in ((VTPM, "vtpm"), (3, "guest"), (5, "stubdom")):
            await world.create_domain(domid, name)
        yield Place(world, tmp_path / "state", family)


@asynccontextmanager
async def stopped(pid: int) -> AsyncIterator[None]:
    """Hold a process with SIGSTOP."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
