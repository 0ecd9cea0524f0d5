"""What passed each door between the guest and its TPM, counted from outside.

Theory of operation.  A `Look` is what the status sockets of bridge and vTPM domain say at
one moment; two of them subtracted are what happened between.  The words here are the
chain's own, in the order in which a command passes: QEMU's two channels, the page with its
event channel, the vTPM domain.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from ..names import ordinal_name
from .chain import Chain

_POWER_WORDS: Final = {
    "STOP_ASKED": "QEMU said CMD_STOP: commands are refused from here on",
    "INIT_ASKED": "QEMU said CMD_INIT: a new boot begins, its commands are held",
    "RING_UP": "asks the TPM whether it was power-cycled",
    "EVIDENCE_USED": "it was not, it holds an earlier boot: has the vTPM domain cycle its power",
    "CYCLED": "it says that it did; asks the TPM again",
    "EVIDENCE_CLEAN": "the TPM is as after power-on: commands flow",
}


@dataclass(frozen=True, slots=True)
class Look:
    """What the two ends of the page said at one moment."""

    bridge: dict[str, Any]
    vtpm: dict[str, Any]

    @classmethod
    async def take(cls, chain: Chain) -> Look:
        """Ask both status sockets.  Raises XenError where a process has ended."""
        return cls(await chain.bridge_status(), await chain.vtpm_status())

    @property
    def resets(self) -> int:
        """How often the vTPM domain has cycled the TPM's power for this frontend."""
        return int(self.vtpm["frontends"][0]["resets"])

    @property
    def served(self) -> int:
        """Commands that the vTPM domain has taken from the page."""
        return int(self.vtpm["pump"]["commands"])


@dataclass(frozen=True, slots=True)
class Passed:
    """What happened between two looks."""

    control: dict[str, int]
    """Requests on the control channel, by name."""
    ordinals: dict[str, int]
    """The guest's commands, by name."""
    pump: dict[str, int]
    """The bridge's counters."""
    served: int
    """Commands that the vTPM domain took from the page."""

    @classmethod
    def between(cls, before: Look, after: Look) -> Passed:
        """Return the difference of two looks at the same processes."""
        return cls(
            _difference(before.bridge["control"]["requests"], after.bridge["control"]["requests"]),
            _difference(before.bridge["ordinals"], after.bridge["ordinals"]),
            {
                name: count - before.bridge["pump"][name]
                for name, count in after.bridge["pump"].items()
            },
            after.served - before.served,
        )

    @property
    def forwarded(self) -> int:
        """The guest's commands that went onto the page."""
        return self.pump["commands"] - self.pump["refused"]

    def rows(self) -> list[tuple[str, str]]:
        """Return a label and words for each door, in a command's order."""
        pump = self.pump
        refused = f", {pump['refused']} refused: not yet CMD_INIT" if pump["refused"] else ""
        own = self.served - self.forwarded
        return [
            ("control channel", counted(self.control)),
            (
                "data socket",
                f"{pump['commands']} commands ({pump['bytes-in']} bytes{refused}), "
                f"answers of {pump['bytes-out']} bytes",
            ),
            ("", counted(self.ordinals)),
            (
                "page and channel",
                f"{self.forwarded} commands put, {pump['responses']} answers taken, "
                f"{pump['events']} events",
            ),
            (
                "vTPM domain",
                f"{self.served} commands to swtpm; {own} the bridge's own: were you power-cycled?",
            ),
        ]


def on_its_way(before: Look, now: Look) -> str:
    """Return one line: how much has passed each door by now."""
    passed = Passed.between(before, now)
    if not passed.pump["commands"]:
        return "no TPM command yet"
    last = ordinal_name(now.bridge["pump"]["last-ordinal"])
    return (
        f"QEMU {passed.pump['commands']} > page {passed.forwarded} > swtpm {passed.served}   {last}"
    )


def power_story(lines: Iterable[str]) -> list[str]:
    """Return the bridge's log lines on power, each with what it means."""
    told = []
    for line in lines:
        match = re.match(r"power: \w+ -> (\w+) \((\w+)\)", line)
        if match:
            state, fact = match.groups()
            told.append(f"{state:<14} {_POWER_WORDS.get(fact, fact)}")
    return told


def counted(counts: dict[str, int]) -> str:
    """Return counters as words, the largest first; no line is to break inside one."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(
        f"{name.removeprefix('TPM2_').removeprefix('CMD_')}\u00a0{count}" for name, count in ordered
    )


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    counts = {name: count - before.get(name, 0) for name, count in after.items()}
    return {name: count for name, count in counts.items() if count}
