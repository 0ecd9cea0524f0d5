"""A host on the embedded Xen: a guests file, directories, and bridges that end with the test."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.toolstack import launch
from qemu_vtpm_bridge.toolstack.guests import Guest
from tests.support.programs import World

DOMAINS = ("2:vtpm", "4:other-vtpm", "5:web", "6:mail")


class Host:
    """Two vTPM domains, two guests, and what a toolstack's programs need."""

    def __init__(self, stack: ExitStack, place: Path) -> None:
        self.place = place
        self.world = World(stack, place, *DOMAINS, attached=False)
        self.run_dir = place / "run"
        self.log_dir = place / "log.d"
        stack.callback(self._kill_bridges)

    @property
    def where(self) -> dict[str, Any]:
        return {"run_dir": self.run_dir, "log_dir": self.log_dir, "world": self.world.world}

    def guests_file(self, text: str) -> Path:
        """Write the guests file, whose [host] is this one; return its path."""
        path = self.place / "guests.toml"
        path.write_text(
            f'[host]\nrun-dir = "{self.run_dir}"\nlog-dir = "{self.log_dir}"\n'
            f'embedded = "{self.world.world}"\n{text}'
        )
        return path

    def read(self, path: str) -> str:
        """Return a value in XenStore; for a test that is not async."""
        return launch.with_store(lambda store: store.read(path), self.world.world).decode()

    def write(self, path: str, value: str) -> None:
        """Write a value in XenStore; for a test that is not async."""
        launch.with_store(lambda store: store.write(path, value.encode()), self.world.world)

    def ensure(self, guest: Guest) -> Path:
        return launch.ensure_bridge(guest, **self.where)

    def stop(self, guest: Guest) -> bool:
        return launch.stop_bridge(guest, **self.where)

    def process(self, guest: Guest) -> Any:
        """The guest's bridge, as the launcher sees it."""
        return launch.Launch(guest, **self.where).process

    def bridges(self) -> list[int]:
        """The processes that are bridges of this host's, whoever counts them."""
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal() and self._is_bridge(entry)
        ]

    def _is_bridge(self, process: Path) -> bool:
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        wanted = os.fsencode(f"{self.run_dir}/")
        return b"qemu_vtpm_bridge" in words and any(wanted in word for word in words)

    def kill(self, pid: int) -> None:
        """Kill a process of this host's, and return when it is gone."""
        os.kill(pid, signal.SIGKILL)
        self.world.until(lambda: pid not in self.bridges())

    def _kill_bridges(self) -> None:
        for pid in self.bridges():
            self.kill(pid)


@contextmanager
def running_host() -> Iterator[Host]:
    """Give a host whose directory is a short one."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvh")))
        yield Host(stack, place)


@contextmanager
def stranger_at(path: Path) -> Iterator[socket.socket]:
    """Listen at a path as something that is no bridge."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener
