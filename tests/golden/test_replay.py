"""QEMU's devices, recorded access by access, against ours (P11).

The traces were recorded from QEMU 7.2.22 (Debian), `-machine q35`, by a generator that
mixes what drivers do with what no driver should do.  With all quirks a device does what
QEMU did in every step of every sequence, those included that touch doubtful ground.  As
shipped it differs only where a quirk is left out, and the first difference is of the
kind that this quirk is about.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from qemu_vtpm_bridge.bridge import tis_registers
from qemu_vtpm_bridge.bridge.device import Quirk
from tests.golden import factory
from tests.support.trace import Difference, Sequence, describe, first_difference, load

TRACES = sorted(Path(__file__).parent.glob("*.jsonl.gz"))
SEQUENCES = [sequence for path in TRACES for sequence in load(path)]


def test_the_traces_are_here() -> None:
    steps = sum(len(sequence.steps) for sequence in SEQUENCES)
    assert (len(SEQUENCES), steps) == (60, 10926)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_P11_with_qemus_quirks_nothing_differs(sequence: Sequence) -> None:
    difference = first_difference(sequence, factory.make)
    assert difference is None, describe(sequence, difference)


# What a first difference may be, quirk by quirk.


def _submitted(step: dict[str, object]) -> bytes | None:
    for event in step.get("ev", ()):  # type: ignore[attr-defined]
        if event[0] == "submit":
            return bytes.fromhex(event[2])
    return None


def _short(sequence: Sequence, found: Difference) -> bool:
    command = _submitted(found.want)
    return (
        command is not None
        and len(command) < 10
        and _submitted(found.got) is None
        and bool(sequence.tags & {"short-cmd", "empty-cmd"})
    )


def _orphan(sequence: Sequence, found: Difference) -> bool:
    """The executing owner relinquishes, which QEMU does not tell the TPM."""
    step = found.want
    return (
        "orphan" in sequence.tags
        and step["op"] == "w"
        and step["o"] & 0xFFF == tis_registers.ACCESS.offset
        and bool(step["v"] & tis_registers.ACCESS.mask("activeLocality"))
        and found.got == {**step, "ev": [["cancel"]]}
    )


def _shared(_sequence: Sequence, found: Difference) -> bool:
    """dataAvail, and with it burstCount, or bytes of the FIFO, of a response overwritten."""
    if found.want["op"] != "r":
        return False
    register = tis_registers.TIS.find(found.want["o"])[1]
    if register in (tis_registers.DATA_FIFO, tis_registers.XDATA_FIFO):
        return True
    return register is tis_registers.STS and bool(
        (found.want["v"] ^ found.got["v"]) & tis_registers.STS.mask("dataAvail", "burstCount")
    )


def _stale(_sequence: Sequence, found: Difference) -> bool:
    """Only the locality in whose name the flag is reset."""
    want = [["reset_est", 3] if e[0] == "reset_est" else e for e in found.want.get("ev", ())]
    return want != found.want.get("ev") and found.got == {**found.want, "ev": want}


def _reset(sequence: Sequence, found: Difference) -> bool:
    """The line at a reset, or memory that a reset has zeroed."""
    if found.want["op"] == "reset":
        return found.got.get("irq", ())[-1:] == [0] or "reset-running" in sequence.tags
    return any(step["op"] == "reset" for step in sequence.steps[: found.index])


def _tail(sequence: Sequence, found: Difference) -> bool:
    """Bytes of the buffer that are zero now: read, or sent with an overlong size."""
    command, zeroed = _submitted(found.want), _submitted(found.got)
    if command is not None and zeroed is not None and len(command) == len(zeroed):
        return all(b in (a, 0) for a, b in zip(command, zeroed, strict=True))
    if found.want["op"] != "r" or found.want["o"] + found.want["s"] <= 0x80:
        return False
    size = found.want["s"]
    pairs = zip(found.want["v"].to_bytes(size), found.got["v"].to_bytes(size), strict=True)
    return "crb-tail" in sequence.tags and all(b in (a, 0) for a, b in pairs)


EXPLAINED: dict[Quirk, Callable[[Sequence, Difference], bool]] = {
    Quirk.SHORT_COMMANDS: _short,
    Quirk.ORPHANS: _orphan,
    Quirk.SHARED_RESPONSE: _shared,
    Quirk.STALE_ESTABLISHMENT: _stale,
    Quirk.KEEPS_AT_RESET: _reset,
    Quirk.KEEPS_TAIL: _tail,
}


@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_P11_as_shipped_only_the_listed_deviations_differ(sequence: Sequence) -> None:
    firsts = []
    for quirk, explains in EXPLAINED.items():
        found = first_difference(sequence, partial(factory.build, quirks=Quirk.ALL & ~quirk))
        if found is not None:
            assert explains(sequence, found), f"{quirk}: {describe(sequence, found)}"
            firsts.append(found.index)
    shipped = first_difference(sequence, factory.make_as_shipped)
    assert (shipped and shipped.index) == min(firsts, default=None), "quirks that act together"


def test_every_quirk_has_an_explanation() -> None:
    assert set(EXPLAINED) == set(Quirk)
