"""Recorded register traces: one JSON object a line.

A sequence is a `seq` line (dev "tis" or "crb", tpm 1 or 2, buf the TPM's buffer size in
bytes, est whether a D-RTM sequence has happened), its steps, and an `end` line with tags.
Steps: `r` and `w` are accesses (o offset, s size, v value), `done` ends the running
command with the response `rsp`, `reset` resets the machine. A step carries what came of
it: `irq`, the levels the interrupt line went through, and `ev`, what reached the TPM.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

Step = dict[str, Any]


class Device(Protocol):
    """What a sequence is played on."""

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...
    def complete(self, rsp: bytes) -> None: ...
    def reset(self, rsp: bytes = b"") -> None: ...
    def take_irq(self) -> list[int]: ...
    def take_events(self) -> list[list[Any]]: ...


@dataclass(frozen=True)
class Sequence:
    """One recorded run of a freshly built device."""

    header: Mapping[str, Any]
    steps: list[Step]
    tags: frozenset[str]

    def __str__(self) -> str:
        return f"{self.header['dev']}-{self.header['n']}"


@dataclass(frozen=True)
class Difference:
    """The first step at which a device did something else than the record says."""

    index: int
    want: Step
    got: Step


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt"))
    return path.open()


def load(path: Path) -> Iterator[Sequence]:
    """Yield the sequences of a trace file, which may be compressed."""
    header: Mapping[str, Any] = {}
    steps: list[Step] = []
    with _open(path) as lines:
        for line in lines:
            entry = json.loads(line)
            if entry["op"] == "seq":
                header, steps = entry, []
            elif entry["op"] == "end":
                yield Sequence(header, steps, frozenset(entry.get("tags", ())))
            else:
                steps.append(entry)


def play(device: Device, step: Step) -> Step:
    """Do one step on a device and return it as the device did it."""
    did = {key: value for key, value in step.items() if key not in ("irq", "ev")}
    match step["op"]:
        case "r":
            did["v"] = device.read(step["o"], step["s"])
        case "w":
            device.write(step["o"], step["s"], step["v"])
        case "done":
            device.complete(bytes.fromhex(step["rsp"]))
        case "reset":
            device.reset(bytes.fromhex(step.get("rsp", "")))
        case other:
            raise ValueError(f"no such step: {other}")
    if levels := device.take_irq():
        did["irq"] = levels
    if events := device.take_events():
        did["ev"] = events
    return did


def first_difference(
    sequence: Sequence, make: Callable[[Mapping[str, Any]], Device]
) -> Difference | None:
    """Play a sequence on the device that `make` builds for it, until it differs."""
    device = make(sequence.header)
    for index, step in enumerate(sequence.steps):
        did = play(device, step)
        if did != step:
            return Difference(index, step, did)
    return None


def describe(sequence: Sequence, difference: Difference, context: int = 8) -> str:
    """Return the steps before a difference and both sides of it."""
    first = max(0, difference.index - context)
    lines = [f"sequence {sequence} {dict(sequence.header)} tags {sorted(sequence.tags)}"]
    lines += [f"  {n:5} {s}" for n, s in enumerate(sequence.steps[first : difference.index], first)]
    lines += [f"  {difference.index:5} {difference.want}   <- recorded"]
    lines += [f"        {difference.got}   <- device"]
    return "\n".join(lines)
