"""Timing: C clients on the chains' sockets, and what their samples amount to.

Theory of operation.  A slice is a few hundred milliseconds in which one row's clients
send one command again and again.  Slices of all rows take turns, so that whatever else
the machine does hits all rows alike; only ratios within one run mean anything.
"""

from __future__ import annotations

import array
import os
import struct
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_REPORT: Final = struct.Struct("=QQQ")

COMMANDS: Final[dict[str, bytes]] = {
    "GetRandom(16)": bytes.fromhex("80010000000c0000017b0010"),
    "PCR_Extend": bytes.fromhex(
        "80020000004100000182"  # header
        "00000010"  # PCR 16, the debug PCR
        "0000000940000009000000" + "0000"  # one empty password
        "00000001000b" + "5a" * 32  # one SHA-256 digest
    ),
    "GetCapability": bytes.fromhex("8001000000160000017a00000006000001050000" + "0001"),
    # No TPM 2.0 command takes 2 KiB at once, so the TPM refuses this one; the way there
    # and back is what is measured.
    "2 KiB request": bytes.fromhex("8001000008000000017b0010") + bytes(2048 - 12),
}

REFUSED: Final = frozenset({"2 KiB request"})
"""Commands that the TPM answers with an error."""


@dataclass(slots=True)
class Samples:
    """What one row gave for one command, over all its slices."""

    round_trips_ns: array.array[int] = field(default_factory=lambda: array.array("I"))
    rates: list[float] = field(default_factory=list)
    """Commands per second of all clients together, slice by slice."""

    def quantile_us(self, share: float) -> float:
        """Return the round trip that this share of the commands did not exceed."""
        ordered = sorted(self.round_trips_ns)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1000

    def per_s(self) -> float:
        """Return the median slice's commands per second."""
        return sorted(self.rates)[len(self.rates) // 2]


def build_programs(directory: Path) -> None:
    """Compile the client and the forwarder into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("client", "forwarder"):
        source = Path(__file__).with_name(f"{name}.c")
        words = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(directory / name)]
        subprocess.run([*words, str(source)], check=True)


def run_slice(
    client: Path, fds: Sequence[int], command: str, duration_ms: int, samples: Samples
) -> None:
    """Let one client on each descriptor run at the same time; add what they measured."""
    words = [str(client), "", str(duration_ms), COMMANDS[command].hex()]
    # Read once: all clients wait for the end of this one pipe.
    hold_read, hold_write = os.pipe()
    clients = []
    for fd in fds:
        words[1] = str(fd)
        clients.append(
            subprocess.Popen(words, stdin=hold_read, stdout=subprocess.PIPE, pass_fds=[fd])
        )
    os.close(hold_read)
    for process in clients:
        assert process.stdout is not None
        if process.stdout.read(1) != b"R":
            raise SystemExit("a bench client did not get ready")
    os.close(hold_write)
    rate = 0.0
    for process in clients:
        raw, _ = process.communicate()
        elapsed_ns, count, bad = _REPORT.unpack_from(raw)
        if bad != (count if command in REFUSED else 0):
            raise SystemExit(f"{command}: {bad} of {count} answers were not what is expected")
        samples.round_trips_ns.frombytes(raw[_REPORT.size :])
        rate += count / (elapsed_ns / 1e9)
    samples.rates.append(rate)


def private_mib(pid: int) -> float:
    """Return the memory that this process has for itself, in MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kib = [int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")]
    return sum(kib) / 1024


def seconds_until(happened: Path, process: subprocess.Popen[bytes], started: float) -> float:
    """Return the seconds from `started` until a socket was there."""
    while not happened.exists():
        if process.poll() is not None:
            raise SystemExit(f"a process of a chain ended with status {process.returncode}")
        time.sleep(0.001)
    return time.monotonic() - started
