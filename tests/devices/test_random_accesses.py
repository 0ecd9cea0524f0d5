"""Random accesses against both devices, with what `Player` checks after each.

Any access, at any offset, size and time, leaves a device in a defined state:

1.  A read fits its size; no access raises.
2.  A command that leaves has 10 bytes at least and the buffer at most.
3.  At most one command is in flight, and `busy` says whether there is one.
4.  A cancel leaves only while a command is in flight.
5.  At most one locality is active; the others read FFh from STS and FIFO.
6.  burstCount never exceeds what the FIFO takes or gives.
7.  A FIFO read returns FFh, or the next byte of this locality's own response; never one of
    another's response, nor of a command.
8.  The interrupt line changes with every level reported, and is high only while an
    INT_STATUS is not 0.
9.  An answer with an old ticket, and one that nobody waits for, changes nothing.
10. A reset brings reset values: registers, zeroed buffer, line low, nothing in flight.
11. What `save` returns goes through JSON, and a device restored from it saves the same.
12. CRB: Start is 1 exactly while a command is in flight, and what is behind a response
    reads 0.
13. tpmEstablishment is only reset in the name of locality 3.

hypothesis mixes short scripts, which it can shrink, with storms of a few hundred accesses,
which bring the number up.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from qemu_vtpm_bridge.bridge.device import Quirk
from qemu_vtpm_bridge.bridge.tpm import Family
from tests.support.player import BUFFER_SIZES, Player

STORM_BYTES = 1200
WANTED_ACCESSES = 100_000
done: Counter[str] = Counter()
left: Counter[str] = Counter()


class Guest(RuleBasedStateMachine):
    """A guest that does what hypothesis says."""

    kind = ""

    @initialize(family=st.sampled_from(Family), buffer_bytes=st.sampled_from(BUFFER_SIZES))
    def build(self, family: Family, buffer_bytes: int) -> None:
        self.player = Player(self.kind, family, buffer_bytes)

    @rule(script=st.binary(max_size=48))
    def script(self, script: bytes) -> None:
        self.player.play(script)

    @rule(seed=st.integers(0, 2**32 - 1))
    def storm(self, seed: int) -> None:
        self.player.play(random.Random(seed).randbytes(STORM_BYTES))

    def teardown(self) -> None:
        if hasattr(self, "player"):
            done[self.kind] += self.player.accesses
            left[self.kind] += self.player.submitted


class TisGuest(Guest):
    kind = "tis"


class CrbGuest(Guest):
    kind = "crb"


@pytest.mark.parametrize("guest", [TisGuest, CrbGuest])
def test_P11_no_access_breaks_what_a_device_promises(guest: type[Guest]) -> None:
    run_state_machine_as_test(
        guest,
        settings=settings(
            max_examples=40,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    # What hypothesis did not reach is played from the bytes of a generator.
    rng = random.Random(guest.kind)
    while done[guest.kind] < WANTED_ACCESSES:
        player = Player(guest.kind, rng.choice(list(Family)), rng.choice(BUFFER_SIZES))
        player.play(rng.randbytes(8 * STORM_BYTES))
        done[guest.kind] += player.accesses
        left[guest.kind] += player.submitted
    assert left[guest.kind] > 300, "most accesses were to no avail"


@pytest.mark.parametrize(
    ("kind", "quirk", "broken"),
    [
        ("tis", Quirk.SHORT_COMMANDS, "2"),
        ("tis", Quirk.ORPHANS, "6|7|runs"),
        ("tis", Quirk.SHARED_RESPONSE, "6|7"),
        ("tis", Quirk.STALE_ESTABLISHMENT, "13"),
        ("tis", Quirk.KEEPS_AT_RESET, "8|10"),
        ("crb", Quirk.SHORT_COMMANDS, "2"),
        ("crb", Quirk.KEEPS_AT_RESET, "10"),
        ("crb", Quirk.KEEPS_TAIL, "12"),
    ],
)
def test_the_checks_find_what_qemu_does_wrong(kind: str, quirk: Quirk, broken: str) -> None:
    rng = random.Random(1)

    def play_until_it_breaks() -> None:
        for _ in range(400):
            player = Player(kind, Family.TPM_2_0, rng.choice(BUFFER_SIZES), quirk)
            player.play(rng.randbytes(STORM_BYTES))

    with pytest.raises((AssertionError, ValueError), match=broken):
        play_until_it_breaks()
