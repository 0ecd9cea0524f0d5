"""Timing: C clients on the chains' sockets, and what their samples amount to.

Theory of operation.  A slice is a few hundred milliseconds in which one row's clients
send one command again and again.  Slices of all rows take turns, so that whatever else
the machine does hits all rows alike; only ratios within one run mean anything, and those
are taken round by round: one disturbed slice spoils one ratio of many.
"""

from __future__ import annotations

import array
import os
import statistics
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
    # TPM2_SetCommandCodeAuditStatus with two full lists, 2069 bytes, which the TPM does: all
    # 508 entries name the one command whose audit cannot be changed, so nothing is written.
    "2 KiB request": bytes.fromhex("80020000081500000140")
    + bytes.fromhex("40000001" + "0000000940000009000000" + "0000" + "0010")
    + 2 * (bytes.fromhex("000000fe") + 254 * bytes.fromhex("00000140")),
}


@dataclass(slots=True)
class Samples:
    """What one row gave for one command, over all its slices."""

    round_trips_ns: array.array[int] = field(default_factory=lambda: array.array("I"))
    slices: list[dict[str, float]] = field(default_factory=list)
    """p50_us, p99_us and per_s (of all clients together) of each slice."""

    def quantile_us(self, share: float) -> float:
        """Return the round trip that this share of the commands did not exceed."""
        return _quantile_us(self.round_trips_ns, share)

    def per_s(self) -> float:
        """Return the median slice's commands per second."""
        return statistics.median(part["per_s"] for part in self.slices)

    def add(self, round_trips_ns: array.array[int], per_s: float) -> None:
        """Add a slice."""
        self.round_trips_ns.extend(round_trips_ns)
        self.slices.append(
            {
                "p50_us": _quantile_us(round_trips_ns, 0.5),
                "p99_us": _quantile_us(round_trips_ns, 0.99),
                "per_s": per_s,
            }
        )

    def ratio(self, other: Samples, key: str) -> float:
        """Return how many times another row's figure this row's is.

        The median over the rounds, of the two slices that were measured in one round.
        """
        pairs = zip(self.slices, other.slices, strict=True)
        return statistics.median(mine[key] / theirs[key] for mine, theirs in pairs)


def _quantile_us(round_trips_ns: array.array[int], share: float) -> float:
    ordered = sorted(round_trips_ns)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] / 1000


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
    round_trips_ns = array.array("I")
    for process in clients:
        raw, _ = process.communicate()
        elapsed_ns, count, bad = _REPORT.unpack_from(raw)
        if bad:
            raise SystemExit(f"{command}: {bad} of {count} answers were errors")
        round_trips_ns.frombytes(raw[_REPORT.size :])
        rate += count / (elapsed_ns / 1e9)
    samples.add(round_trips_ns, rate)


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
