"""The programs between QEMU and the TPM, each a process, started as a person would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import trio

from ..errors import XenError

VTPM_DOMID: Final = 2
VTPM_NAME: Final = "vtpm"
FRONTEND: Final = f"/local/domain/0/frontend/vtpm/{VTPM_DOMID}/0"
BACKEND: Final = f"/local/domain/{VTPM_DOMID}/backend/vtpm/0/0"

_POLL_S: Final = 0.05
_START_DEADLINE_S: Final = 60.0
_END_DEADLINE_S: Final = 20.0


class Chain:
    """The demo's processes.  Sockets lie in `place`, which has a short path; logs in `logs`."""

    def __init__(self, place: Path, logs: Path) -> None:
        self.world = place / "world"
        self.tpm_socket = place / "tpm.sock"
        self._place = place
        self._logs = logs
        self._processes: dict[str, trio.Process] = {}

    # Processes.

    def words(self, *words: str) -> list[str]:
        """Return the command line of one of our commands."""
        return [sys.executable, "-m", "qemu_vtpm_bridge", *words]

    async def start(self, name: str, *words: str, ready: Path) -> None:
        """Start one of our commands and wait for a socket of its."""
        with (self._logs / f"{name}.log").open("wb") as log:
            self._processes[name] = await trio.lowlevel.open_process(
                self.words(*words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the demo, which ends these in order.
                start_new_session=True,
            )
        with trio.move_on_after(_START_DEADLINE_S):
            while not ready.exists():  # noqa: ASYNC240 - another process makes it
                self._ensure_running(name)
                await trio.sleep(_POLL_S)
            return
        raise self._failure(name, f"did not come up within {_START_DEADLINE_S:g} s")

    def ensure_running(self) -> None:
        """Raise XenError where one of the processes has ended."""
        for name in self._processes:
            self._ensure_running(name)

    def _ensure_running(self, name: str) -> None:
        status = self._processes[name].poll()
        if status is not None:
            raise self._failure(name, f"ended with status {status}")

    def _failure(self, name: str, what: str) -> XenError:
        log = self._logs / f"{name}.log"
        last = log.read_text("utf-8", "replace").strip().splitlines()[-1:]
        return XenError(
            f"the process `{name}` {what}: {''.join(last) or 'it said nothing'}",
            next_step=f"see {log}",
        )

    async def stop(self) -> None:
        """End all of them, the last one first."""
        for process in reversed(self._processes.values()):
            with suppress(ProcessLookupError):
                process.terminate()
            with trio.move_on_after(_END_DEADLINE_S):
                await process.wait()
            if process.returncode is None:
                process.kill()
                await process.wait()

    # The parts.

    async def start_xen(self) -> None:
        """Start the embedded Xen with a domain for the vTPM."""
        await self.start(
            "embedded-xen",
            *("embedded-xen", str(self.world), "--domain", f"{VTPM_DOMID}:{VTPM_NAME}"),
            ready=self.world / "dom" / str(VTPM_DOMID) / "xen.sock",
        )

    async def attach(self) -> str:
        """Write the device's XenStore entries; return what the command said."""
        done = await trio.run_process(
            self.words("attach", "--embedded", str(self.world), "--backend", VTPM_NAME),
            capture_stdout=True,
            capture_stderr=True,
        )
        return done.stdout.decode()

    async def start_vtpm(self) -> None:
        """Start the vTPM domain's program, in domain 2, with a new TPM."""
        await self.start(
            "vtpm",
            *("vtpm", "--embedded", str(self.world), "--domid", str(VTPM_DOMID)),
            *("--state-dir", str(self._place / "tpm-state")),
            *("--status-socket", str(self._place / "vtpm.status")),
            ready=self._place / "vtpm.status",
        )

    async def start_bridge(self) -> None:
        """Start the bridge, in domain 0."""
        await self.start(
            "bridge",
            *("run", "--embedded", str(self.world), "--backend", VTPM_NAME),
            *("--socket", str(self.tpm_socket)),
            *("--status-socket", str(self._place / "bridge.status")),
            ready=self._place / "bridge.status",
        )

    # Looking.

    async def bridge_status(self) -> dict[str, Any]:
        """Return the bridge's status document."""
        return await self._status("bridge")

    async def vtpm_status(self) -> dict[str, Any]:
        """Return the vTPM domain's status document."""
        return await self._status("vtpm")

    async def _status(self, name: str) -> dict[str, Any]:
        self.ensure_running()
        raw = b""
        async with await trio.open_unix_socket(str(self._place / f"{name}.status")) as stream:
            while chunk := await stream.receive_some():
                raw += chunk
        return dict(json.loads(raw))

    def said(self, name: str, about: str) -> list[str]:
        """Return the lines about something that a process has logged, without their times."""
        log = (self._logs / f"{name}.log").read_text("utf-8", "replace")
        return [line[line.index(about) :] for line in log.splitlines() if about in line]

    async def xenstore(self, *paths: str) -> str:
        """Return what the stock xenstore-ls shows of these directories, as domain 0."""
        socket = self.world / "dom" / "0" / "xenstored.sock"
        shown = []
        for path in paths:
            done = await trio.run_process(
                ["env", f"XENSTORED_PATH={socket}", "xenstore-ls", path], capture_stdout=True
            )
            shown.append(path)
            shown += [f"  {line}" for line in done.stdout.decode().splitlines()]
        return "\n".join(shown)


@asynccontextmanager
async def running_chain(place: Path, logs: Path) -> AsyncIterator[Chain]:
    """Give a chain with nothing started yet; what was started ends with the block."""
    chain = Chain(place, logs)
    try:
        yield chain
    finally:
        with trio.CancelScope(shield=True):
            await chain.stop()
