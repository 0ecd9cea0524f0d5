"""Our commands as processes, on an embedded Xen that is a process too."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.bridge.control import Command

PROGRAM = [sys.executable, "-m", "qemu_vtpm_bridge"]
WAIT_S = 60


class World:
    """An embedded Xen with a vTPM domain, as processes."""

    def __init__(self, stack: ExitStack, place: Path, *domains: str, attached: bool = True) -> None:
        self._stack = stack
        self.place = place
        self.world = place / "w"
        self.log = place / "log"
        given = [f"--domain={domain}" for domain in domains or ("2:vtpm",)]
        self.start("embedded-xen", str(self.world), *given)
        self.until(lambda: all(self._is_there(domain) for domain in domains or ("2:vtpm",)))
        if attached:
            assert self.call("attach", *self.where, "--backend", "vtpm").returncode == 0

    def _is_there(self, domain: str) -> bool:
        return (self.world / "dom" / domain.partition(":")[0] / "xen.sock").exists()

    @property
    def where(self) -> list[str]:
        return ["--embedded", str(self.world)]

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start one of our commands; it ends with the test."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*PROGRAM, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *words], capture_output=True, text=True, timeout=WAIT_S, check=False
        )

    def vtpm(self, domid: int = 2, tpm: str = "2.0") -> subprocess.Popen[bytes]:
        where = [*self.where, "--domid", str(domid), "--tpm", tpm]
        return self.start("vtpm", *where, "--state-dir", str(self.place / f"state{domid}"))

    def bridge(self, spec: str, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        run = ["run", *self.where, "--backend", "vtpm", "--socket", spec]
        return self.start(*run, "--status-socket", str(self.place / "status"), *words, **options)

    def status(self, name: str = "status") -> dict[str, Any]:
        done = self.call("status", str(self.place / name))
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def until_running(self) -> None:
        self.until(lambda: self.status().get("frontend", {}).get("state") == "RUNNING")

    def until(self, fact: Any) -> None:
        """Return once `fact` is true."""
        signal.alarm(WAIT_S)
        try:
            while not fact():
                os.sched_yield()
        finally:
            signal.alarm(0)

    def entries(self) -> list[dict[str, Any]]:
        """Return the vtpm devices in XenStore."""
        return list(json.loads(self.call("list", *self.where, "--json").stdout))

    def state(self) -> str:
        (entry,) = self.entries()
        return str(entry["frontend_state"])


@contextmanager
def client(path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A control connection and the data channel that it gave, powered on."""
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as control, ours:
        control.settimeout(WAIT_S)
        ours.settimeout(WAIT_S)
        control.connect(str(path))
        rights = array.array("i", [theirs.fileno()])
        control.sendmsg(
            [struct.pack(">I", Command.CMD_SET_DATAFD)],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
        )
        assert control.recv(4) == bytes(4)
        theirs.close()
        control.sendall(struct.pack(">II", Command.CMD_INIT, 0))
        assert control.recv(4) == bytes(4)
        yield control, ours


def code(data: socket.socket, command: bytes) -> int:
    data.sendall(command)
    return int.from_bytes(data.recv(4096)[6:10], "big")
