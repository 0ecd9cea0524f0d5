"""`make bench`: measures, prints a table, writes build/bench.json.

    python -m bench [--quick] [--output FILE]

All rows come from one run, in slices that take turns.  What is judged is ratios: the
bridge against two forwarders in a row, since a bridge and a vTPM domain are two
processes.  What is measured is a wheel of this tree in an environment of its own, which
is what users run: an editable install keeps its build helpers in memory.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from .chains import Bench, BridgeChain, bench
from .measure import COMMANDS, Samples, build_programs, private_mib, run_slice

DIRECT: Final = "direct"
ONE: Final = "one forwarder"
TWO: Final = "two forwarders"
BRIDGE: Final = "bridge"
BUSY: Final = "bridge, busy Python thread"
NEIGHBOUR: Final = "bridge, busy other process"
"""What a busy core costs anyway, whoever keeps it busy."""

JUDGED_BY: Final = {BRIDGE: TWO, BUSY: BRIDGE, NEIGHBOUR: BRIDGE}

PARTS: Final = ("devices", "registers")
GUESTS: Final = (1, 8)
STARTS: Final = 10

Row = dict[str, Any]


def main() -> int:
    """Measure everything, print and write it."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    args = parser.parse_args()
    # First: the load is to be that of others.
    about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **machine()}
    programs = Path("build/bench").resolve()
    say("building the client, the forwarder and an installation of the package")
    build_programs(programs)
    python = install(programs / "venv")
    rows: list[Row] = []
    for guests in GUESTS:
        rows += measure_chains(programs, python, guests, quick=args.quick)
    rows += measure_starts(programs, python)
    others = [(part, part.measure(quick=args.quick)) for part in other_parts()]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    everything = rows + [row for _, found in others for row in found]
    args.output.write_text(json.dumps([row | about for row in everything], indent=2) + "\n")
    print_table(rows)
    for line in judge(rows):
        print(line)
    for part, found in others:
        print("", *part.table(found), *part.judge(found), sep="\n")
    load = f"load {about['load_1min']} before the run"
    print(f"\n{about['machine']}; {load}; {about['date']}; written to {args.output}")
    return 0


def say(text: str) -> None:
    """Show progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def other_parts() -> Iterator[ModuleType]:
    """Yield the modules that measure the register devices, each if it is there.

    Each has `measure(quick=)`, which returns rows, and `table` and `judge`, which make
    lines of them.
    """
    for name in PARTS:
        if importlib.util.find_spec(f"bench.{name}"):
            say(f"the register devices: {name}")
            yield importlib.import_module(f"bench.{name}")


def install(directory: Path) -> Path:
    """Install the package as a user would, not editable, and return its interpreter."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    words = [str(python), "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", "."]
    dependencies = [str(python), "-m", "pip", "install", "--quiet", "."]
    subprocess.run(dependencies, check=True)
    subprocess.run(words, check=True)
    return python


def machine() -> dict[str, Any]:
    """Describe the machine."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    swtpm = subprocess.run(["swtpm", "--version"], capture_output=True, text=True, check=True)
    return {
        "machine": f"{os.cpu_count()} x {model}, Linux {platform.release()}",
        "python": platform.python_version(),
        "swtpm": " ".join(swtpm.stdout.split()[:4]),
        "install": "wheel",
        "load_1min": round(os.getloadavg()[0], 2),
    }


# Chains.


def measure_chains(programs: Path, python: Path, guests: int, *, quick: bool) -> list[Row]:
    """Measure every command on every chain, with so many guests at once."""
    rounds, duration_ms = (4, 50) if quick else (25 if guests == 1 else 14, 120)
    with bench(programs, python) as b:
        say(f"starting the chains for {guests} guest(s)")
        bridges = [b.bridge() for _ in range(guests)]
        chains = {
            DIRECT: [b.direct() for _ in range(guests)],
            ONE: [b.forwarders(1) for _ in range(guests)],
            TWO: [b.forwarders(2) for _ in range(guests)],
            BRIDGE: [chain.fd for chain in bridges],
        }
        awake: dict[str, Callable[[], AbstractContextManager[None]]] = {}
        with ExitStack() as stack:
            if guests == 1:
                busy = b.bridge(busy=True)
                stack.enter_context(busy.asleep())
                chains |= {BUSY: [busy.fd], NEIGHBOUR: chains[BRIDGE]}
                awake = {BUSY: busy.awake, NEIGHBOUR: busy_neighbour}
            samples = {(name, command): Samples() for name in chains for command in COMMANDS}
            started = time.monotonic()
            names = list(chains)
            for number in range(rounds):
                say(f"{guests} guest(s): round {number + 1} of {rounds}")
                for command in COMMANDS:
                    for name in names:
                        with awake.get(name, nullcontext)():
                            run_slice(
                                programs / "client",
                                chains[name],
                                command,
                                duration_ms,
                                samples[name, command],
                            )
                names = [*names[1:], names[0]]
            say(f"{guests} guest(s): {time.monotonic() - started:.0f} s")
        rows = [
            {
                "name": name,
                "guests": guests,
                "command": command,
                "p50_us": round(found.quantile_us(0.5), 1),
                "p99_us": round(found.quantile_us(0.99), 1),
                "per_s": round(found.per_s()),
                "samples": len(found.round_trips_ns),
                **_ratios(samples, name, command),
            }
            for (name, command), found in samples.items()
        ]
        return rows + list(_memory(bridges, guests))


def _ratios(samples: dict[tuple[str, str], Samples], name: str, command: str) -> Row:
    """Return the ratios to the row that this one is judged by."""
    if name not in JUDGED_BY:
        return {}
    mine, other = samples[name, command], samples[JUDGED_BY[name], command]
    return {
        f"{key.removesuffix('_us')}_ratio": round(mine.ratio(other, key), 3)
        for key in ("p50_us", "p99_us", "per_s")
    }


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Keep one core busy by another process, within the block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _memory(bridges: list[BridgeChain], guests: int) -> Iterator[Row]:
    for name, processes in (
        ("bridge", [chain.bridge for chain in bridges]),
        ("vTPM domain", [chain.vtpm for chain in bridges]),
    ):
        found = [private_mib(process.pid) for process in processes]
        yield {
            "name": name,
            "guests": guests,
            "command": "private memory",
            # To a page: two digits would take 18.004 for 18.
            "private_mib": round(max(found), 4),
        }


def measure_starts(programs: Path, python: Path) -> list[Row]:
    """Measure from the start of a bridge to the moment when its socket listens."""
    say(f"{STARTS} starts of a bridge")
    found = []
    for _ in range(STARTS):
        with bench(programs, python) as b:
            found.append(_start(b))
    return [
        {
            "name": BRIDGE,
            "guests": 1,
            "command": "start to listening",
            "start_s": round(statistics.median(found), 3),
            "start_max_s": round(max(found), 3),
        }
    ]


def _start(b: Bench) -> float:
    return b.bridge().listening_s


# Telling.


def print_table(rows: list[Row]) -> None:
    """Print the figures, command by command."""
    print(f"\n{'':28} {'guests':>6} {'command':16} {'p50 us':>8} {'p99 us':>8} {'per s':>8}")
    for row in sorted(
        (row for row in rows if "p50_us" in row),
        key=lambda row: (row["guests"], list(COMMANDS).index(row["command"])),
    ):
        print(
            f"{row['name']:28} {row['guests']:6} {row['command']:16} "
            f"{row['p50_us']:8.1f} {row['p99_us']:8.1f} {row['per_s']:8.0f}"
        )
    print()


def judge(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each target: what it is, what was measured, whether it is reached."""

    def value(name: str, guests: int, command: str, key: str) -> float:
        return float(
            next(
                row[key]
                for row in rows
                if (row["name"], row["guests"], row["command"]) == (name, guests, command)
                and key in row
            )
        )

    def line(what: str, found: float, limit: float, *, at_least: bool = False) -> str:
        reached = found >= limit if at_least else found <= limit
        word = "at least" if at_least else "at most"
        mark = "reached" if reached else "NOT reached"
        return f"{mark:12} {what}: {found:.2f} ({word} {limit:g})"

    for command in COMMANDS:
        for key, limit in (("p50", 1.15), ("p99", 1.5)):
            ratio = value(BRIDGE, 1, command, f"{key}_ratio")
            yield line(f"{command}: bridge's {key} over two forwarders'", ratio, limit)
    for command in COMMANDS:
        ratio = value(BRIDGE, 8, command, "per_s_ratio")
        yield line(f"{command}: 8 bridges' throughput over theirs", ratio, 0.9, at_least=True)
    for command in COMMANDS:
        ratio = value(BUSY, 1, command, "p50_ratio")
        yield line(f"{command}: p50 with a busy Python thread over without", ratio, 1.2)
    memory = max(value(BRIDGE, guests, "private memory", "private_mib") for guests in GUESTS)
    yield line("private memory of a bridge, MiB", memory, 18)
    yield line(
        "seconds from start to listening (median)",
        value(BRIDGE, 1, "start to listening", "start_s"),
        0.4,
    )


if __name__ == "__main__":
    sys.exit(main())
