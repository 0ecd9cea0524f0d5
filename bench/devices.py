"""Accesses per second of the register devices, and of QEMU's own through qtest.

    python -m bench.devices [--quick]

Rows: what a device answers when its methods are called, beside what QEMU's tpm-tis and
tpm-crb answer through qtest in the same run, in slices that take turns.  The drivers are
written against `trace.Device`, so that the same accesses can be timed behind any
transport.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from qemu_vtpm_bridge.bridge.tpm import HEADER
from tests.golden.factory import make_as_shipped
from tests.support.qtest import QEMU, QemuDevice
from tests.support.trace import Device

Row = dict[str, Any]

COMMAND: Final = HEADER.pack(0x8001, 100, 0x17B) + bytes(90)
RESPONSE: Final = HEADER.pack(0x8001, 100, 0) + bytes(90)
BUFFER_BYTES: Final = 4096

MODEL: Final = "model, called"
QTEST: Final = "QEMU, qtest"

ACCESS, STS, FIFO = 0x00, 0x18, 0x24
LOC_STATE, LOC_CTRL, CTRL_REQ, CTRL_STS, CTRL_START, BUFFER = 0x00, 0x08, 0x40, 0x44, 0x4C, 0x80


def linux_tis_command(device: Device) -> bytes:
    """Run one command as Linux's tpm_tis does on x86: bytes, and STS around them."""
    device.read(ACCESS, 1)
    device.write(ACCESS, 1, 0x02)
    device.read(ACCESS, 1)
    device.read(STS, 1)
    device.write(STS, 1, 0x40)
    device.read(STS, 1)
    burst = device.read(STS, 4) >> 8 & 0xFFFF
    assert burst >= len(COMMAND)
    for byte in COMMAND[:-1]:
        device.write(FIFO, 1, byte)
    device.read(STS, 1)
    device.read(STS, 1)
    device.write(FIFO, 1, COMMAND[-1])
    device.read(STS, 1)
    device.write(STS, 1, 0x20)
    device.read(STS, 1)
    device.complete(RESPONSE)
    device.read(STS, 1)
    device.read(STS, 4)
    response = bytes(device.read(FIFO, 1) for _ in range(10))
    device.read(STS, 1)
    device.read(STS, 4)
    response += bytes(device.read(FIFO, 1) for _ in range(len(RESPONSE) - 10))
    device.read(STS, 1)
    device.write(STS, 1, 0x40)
    device.write(ACCESS, 1, 0x20)
    return response


def linux_crb_command(device: Device) -> bytes:
    """Run one command as Linux's tpm_crb does: 4-byte copies of the buffer."""
    device.write(LOC_CTRL, 4, 1)
    device.read(LOC_STATE, 4)
    device.write(CTRL_REQ, 4, 1)
    device.read(CTRL_REQ, 4)
    for at in range(0, len(COMMAND), 4):
        device.write(BUFFER + at, 4, int.from_bytes(COMMAND[at : at + 4], "little"))
    device.write(CTRL_START, 4, 1)
    device.read(CTRL_START, 4)
    device.complete(RESPONSE)
    device.read(CTRL_START, 4)
    device.read(CTRL_STS, 4)
    response = b"".join(
        device.read(BUFFER + at, 4).to_bytes(4, "little") for at in range(0, len(RESPONSE), 4)
    )
    device.write(CTRL_REQ, 4, 2)
    device.read(CTRL_REQ, 4)
    device.write(LOC_CTRL, 4, 2)
    device.read(LOC_STATE, 4)
    return response


# Slices: each does `count` of what it measures, or a few more, and returns how many and the time.

Slice = Callable[[Device, int], tuple[int, float]]


def _reads(offset: int, size: int) -> Slice:
    def run(device: Device, count: int) -> tuple[int, float]:
        read = device.read
        started = time.perf_counter()
        for _ in range(count):
            read(offset, size)
        return count, time.perf_counter() - started

    return run


def _fifo(size: int) -> Slice:
    """Write commands into the FIFO: header, then bytes up to a full buffer, then abort."""

    def run(device: Device, count: int) -> tuple[int, float]:
        write = device.write
        done, spent = 0, 0.0
        write(ACCESS, 1, 0x02)
        while done < count:
            write(STS, 1, 0x40)
            write(FIFO, 4, 0x0180)
            write(FIFO, 2, 0x0010)
            part = min(count - done, (BUFFER_BYTES - 6) // size)
            started = time.perf_counter()
            for _ in range(part):
                write(FIFO, size, 0x55)
            spent += time.perf_counter() - started
            done += part
            write(STS, 1, 0x40)
        return done, spent

    return run


def _fifo_reads(device: Device, count: int) -> tuple[int, float]:
    """Read a response as long as the buffer, again and again."""
    device.write(ACCESS, 1, 0x02)
    device.write(STS, 1, 0x40)
    for byte in COMMAND:
        device.write(FIFO, 1, byte)
    device.write(STS, 1, 0x20)
    device.complete(HEADER.pack(0x8001, BUFFER_BYTES, 0) + bytes(BUFFER_BYTES - 10))
    read, done, spent = device.read, 0, 0.0
    while done < count:
        part = min(count - done, BUFFER_BYTES)
        started = time.perf_counter()
        for _ in range(part):
            read(FIFO, 1)
        spent += time.perf_counter() - started
        done += part
        device.write(STS, 1, 0x02)
    device.write(STS, 1, 0x40)
    return done, spent


def _crb_writes(device: Device, count: int) -> tuple[int, float]:
    write = device.write
    started = time.perf_counter()
    for _ in range(count):
        write(BUFFER, 4, 0x55)
    return count, time.perf_counter() - started


def _commands(run_command: Callable[[Device], bytes]) -> Slice:
    def run(device: Device, count: int) -> tuple[int, float]:
        started = time.perf_counter()
        for _ in range(count):
            assert run_command(device) == RESPONSE
            device.take_events()
        return count, time.perf_counter() - started

    return run


TIS_SLICES: Final[dict[str, Slice]] = {
    "STS read": _reads(STS, 4),
    "FIFO byte write": _fifo(1),
    "FIFO dword write": _fifo(4),
    "FIFO byte read": _fifo_reads,
    "Linux command": _commands(linux_tis_command),
}
CRB_SLICES: Final[dict[str, Slice]] = {
    "CTRL_STS read": _reads(CTRL_STS, 4),
    "buffer dword write": _crb_writes,
    "buffer dword read": _reads(BUFFER, 4),
    "Linux command": _commands(linux_crb_command),
}
SLICES: Final = {"tis": TIS_SLICES, "crb": CRB_SLICES}
COUNTS: Final = {MODEL: 100_000, QTEST: 1_000}
COMMAND_SHARE: Final = 200
"""A whole command counts for about so many accesses."""

TARGETS: Final = {
    ("tis", "STS read"): 300_000,
    ("tis", "FIFO byte write"): 200_000,
    ("tis", "FIFO byte read"): 200_000,
}


class _Answering:
    """QEMU's device, whose commands are taken from the TPM before they are answered."""

    def __init__(self, qemu: QemuDevice) -> None:
        self._qemu = qemu
        self.read, self.write = qemu.read, qemu.write
        self.reset, self.take_irq, self.take_events = qemu.reset, qemu.take_irq, qemu.take_events

    def complete(self, rsp: bytes) -> None:
        self._qemu.tpm.command()
        self._qemu.complete(rsp)


def measure(*, quick: bool = False) -> list[Row]:
    """Measure all slices on all devices, in turns; return a row for each."""
    rounds, part = (3, 10) if quick else (7, 1)
    rates: dict[tuple[str, str, str], list[float]] = {}
    for kind, slices in SLICES.items():
        header = {"dev": kind, "tpm": 2, "buf": BUFFER_BYTES, "est": 0}
        with contextlib.ExitStack() as stack:
            devices: dict[str, Device] = {MODEL: make_as_shipped(header)}
            if shutil.which(QEMU):
                devices[QTEST] = _Answering(stack.enter_context(QemuDevice(header)))
            for _ in range(rounds):
                for what, run in slices.items():
                    for name, device in devices.items():
                        count = COUNTS[name] // part
                        if what == "Linux command":
                            count = max(1, count // COMMAND_SHARE)
                        done, spent = run(device, count)
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


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the figures, a line each."""
    yield f"{'':16} {'':4} {'':20} {'per s':>12} {'slowest':>12} {'fastest':>12}"
    for row in rows:
        yield (
            f"{row['name']:16} {row['device']:4} {row['access']:20} {row['per_s']:12,} "
            f"{row['per_s_min']:12,} {row['per_s_max']:12,}"
        )


def judge(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each target."""
    for row in rows:
        limit = TARGETS.get((row["device"], row["access"]))
        if row["name"] == MODEL and limit is not None:
            mark = "reached" if row["per_s"] >= limit else "NOT reached"
            what = f"{row['device']} {row['access']}"
            yield f"{mark:12} {what}: {row['per_s']:,}/s (at least {limit:,})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.devices", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the accesses")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    rows = measure(quick=args.quick)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for line in (*table(rows), "", *judge(rows)):
        print(line)


if __name__ == "__main__":
    main()
