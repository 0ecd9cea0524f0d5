"""Accesses per second over the vfio-user socket, beside QEMU's own devices through qtest.

    python -m bench.registers [--quick]

The server is a process of its own, as it is in use, with a TPM that answers at once; QEMU's
device is one too, and its TPM answers as fast as it is asked.  Both clients are in
Python, and both wait for each access's end.  The slices and drivers are those of
`bench.devices`, which measures the devices without a transport; they take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench.devices import BUFFER_BYTES, CTRL_START, QTEST, RESPONSE, SLICES, STS, Row, table
from qemu_vtpm_bridge.bridge.listen import open_listener
from qemu_vtpm_bridge.bridge.mmio import Mmio
from qemu_vtpm_bridge.bridge.tpm import HEADER, HEADER_SIZE, Family
from qemu_vtpm_bridge.bridge.vfio_user_driver import serve
from qemu_vtpm_bridge.device_service import Registers
from tests.support.qtest import QEMU, QemuDevice
from tests.support.trace import Device
from tests.support.vfio_client import VfioClient, VfioDevice

VFIO: Final = "vfio-user socket"
COUNT: Final = 2_000
COMMAND_COUNT: Final = 24
DATA_AVAIL: Final = 0x10

SOCKET_TARGET_PER_S: Final = 25_000
COMMAND_TARGET: Final = 1.0
"""A whole command over the socket takes at most so many times QEMU's time through qtest."""


# The server's process.


class Untold:
    """What is beside commands; nobody asks for it here."""

    def set_locality(self, locality: int) -> None:
        """Ignore it."""

    def cancel(self) -> None:
        """Ignore it."""

    def established(self) -> bool:
        """There was no D-RTM sequence."""
        return False

    def reset_established(self, locality: int) -> int:
        """Ignore it."""
        return 0


def answer_commands(end: socket.socket) -> None:
    """Be a pump and a TPM that answers at once."""
    held = b""
    while raw := end.recv(65536):
        held += raw
        while len(held) >= HEADER_SIZE and len(held) >= (size := HEADER.unpack_from(held)[1]):
            held = held[size:]
            end.sendall(RESPONSE)


def serve_devices(listening_fd: int) -> None:
    """Serve one client with both devices."""
    with socket.socket(fileno=listening_fd) as listener:
        client, _ = listener.accept()
    near, far = socket.socketpair()
    threading.Thread(target=answer_commands, args=(far,), daemon=True).start()
    kinds = Registers.BOTH.kinds
    devices = [kind(family=Family.TPM_2_0, buffer_bytes=BUFFER_BYTES) for kind in kinds]
    with client:
        serve(client, Mmio(devices, Untold(), near), lambda: None)


# The measuring one.


class Polled:
    """A `trace.Device` whose commands' ends are seen in its registers, as a driver does."""

    def __init__(self, kind: str, device: VfioDevice | QemuDevice) -> None:
        self._tis = kind == "tis"
        self._qemu = device if isinstance(device, QemuDevice) else None
        self.read, self.write = device.read, device.write

    def complete(self, rsp: bytes) -> None:
        """Have the TPM answer, where it does not by itself, and wait for the answer."""
        if self._qemu is not None:
            self._qemu.tpm.command()
            self._qemu.tpm.answer(rsp)
        if self._tis:
            while not self.read(STS, 1) & DATA_AVAIL:
                pass
        else:
            while self.read(CTRL_START, 4):
                pass

    def reset(self, rsp: bytes = b"") -> None:
        """Nothing is reset."""

    def take_irq(self) -> list[int]:
        """Nothing is looked at."""
        return []

    def take_events(self) -> list[list[Any]]:
        """Forget them."""
        if self._qemu is not None:
            self._qemu.take_events()
        return []


@contextlib.contextmanager
def connected_client() -> Iterator[VfioClient]:
    """Start a server and give a client of it."""
    with tempfile.TemporaryDirectory(prefix="qvb") as directory:
        path = Path(directory) / "vfio.sock"
        listener = open_listener(str(path))
        fd = listener.control.fileno()
        words = [sys.executable, "-m", "bench.registers", "--serve", str(fd)]
        server = subprocess.Popen(words, pass_fds=[fd])
        listener.control.close()
        client = VfioClient.connect(path)
        try:
            yield client
        finally:
            client.close()
            server.wait(60)


def measure(*, quick: bool = False) -> list[Row]:
    """Measure the slices of both devices over the socket and through qtest, in turns."""
    rounds, part = (3, 4) if quick else (9, 1)
    rates: dict[tuple[str, str, str], list[float]] = {}
    with connected_client() as client:
        for region, (kind, slices) in enumerate(SLICES.items()):
            header = {"dev": kind, "tpm": 2, "buf": BUFFER_BYTES, "est": 0}
            with contextlib.ExitStack() as stack:
                devices: dict[str, Device] = {VFIO: Polled(kind, VfioDevice(client, region))}
                if shutil.which(QEMU):
                    qemu = stack.enter_context(QemuDevice(header))
                    devices[QTEST] = Polled(kind, qemu)
                for _ in range(rounds):
                    for what, run in slices.items():
                        if what == "FIFO byte read":
                            continue  # its response is longer than this TPM's
                        count = (COMMAND_COUNT if what == "Linux command" else COUNT) // part
                        for name, device in devices.items():
                            done, spent = run(device, max(1, count))
                            rates.setdefault((name, kind, what), []).append(done / spent)
    return [
        {
            "name": name,
            "device": kind,
            "access": what,
            "per_s": round(statistics.median(found)),
            "per_s_min": round(min(found)),
            "per_s_max": round(max(found)),
        }
        for (name, kind, what), found in rates.items()
    ]


def judge(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each target."""
    found = {(row["name"], row["device"], row["access"]): row["per_s"] for row in rows}
    for device, access in (
        ("tis", "STS read"),
        ("tis", "FIFO byte write"),
        ("crb", "CTRL_STS read"),
    ):
        per_s = found[VFIO, device, access]
        mark = "reached" if per_s >= SOCKET_TARGET_PER_S else "NOT reached"
        what = f"{device} {access} over the socket"
        yield f"{mark:12} {what}: {per_s:,}/s (at least {SOCKET_TARGET_PER_S:,})"
    for device in SLICES:
        ours, qemus = (found.get((name, device, "Linux command")) for name in (VFIO, QTEST))
        if ours and qemus:
            ratio = qemus / ours
            mark = "reached" if ratio <= COMMAND_TARGET else "NOT reached"
            yield (
                f"{mark:12} {device} Linux command over the socket: {ratio:.2f}x the time of "
                f"QEMU's device through qtest (at most {COMMAND_TARGET:g}x)"
            )


def main() -> None:
    """Measure and print, or be the server."""
    parser = argparse.ArgumentParser(prog="bench.registers", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the accesses")
    parser.add_argument("--serve", type=int, metavar="FD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve_devices(args.serve)
        return
    rows = measure(quick=args.quick)
    for line in (*table(rows), "", *judge(rows)):
        print(line)


if __name__ == "__main__":
    main()
