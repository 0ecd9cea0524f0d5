"""The reset contract's machine, and the reading of evidence."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge import power
from qemu_vtpm_bridge.bridge.power import (
    IGNORED,
    TRANSITIONS,
    Action,
    Evidence,
    Fact,
    PowerMachine,
    ResetPolicy,
    State,
)
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family, Refusal, refusal
from qemu_vtpm_bridge.errors import LocalProtocolError


@pytest.mark.parametrize("policy", ResetPolicy)
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("fact", Fact)
def test_every_pair_is_handled_or_refused_without_effect(
    policy: ResetPolicy, state: State, fact: Fact
) -> None:
    machine = PowerMachine(policy)
    machine.state = state
    if (state, fact) in TRANSITIONS[policy]:
        next_state, actions = TRANSITIONS[policy][state, fact]
        assert machine.feed(fact) == actions
        assert machine.state is next_state
    elif fact in IGNORED[state]:
        assert machine.feed(fact) == ()
        assert machine.state is state
    else:
        with pytest.raises(LocalProtocolError):
            machine.feed(fact)
        assert machine.state is state


@given(facts=st.lists(st.sampled_from(Fact), max_size=40))
@pytest.mark.parametrize("policy", [ResetPolicy.VERIFIED, ResetPolicy.RESTART_DOMAIN])
def test_P7_nothing_is_forwarded_after_init_without_evidence(
    policy: ResetPolicy, facts: list[Fact]
) -> None:
    machine = PowerMachine(policy)
    evident = False
    for fact in facts:
        try:
            actions = machine.feed(fact)
        except LocalProtocolError:
            continue
        if fact is Fact.INIT_ASKED:
            evident = False
        if fact in (Fact.EVIDENCE_CLEAN, Fact.INIT_RESUME_ASKED):
            evident = True
        if Action.FORWARD in actions:
            assert evident
        assert (machine.state is State.ON) <= evident


def test_P7_a_tpm_that_stays_used_fails_closed() -> None:
    machine = PowerMachine(ResetPolicy.VERIFIED)
    for fact in (Fact.INIT_ASKED, Fact.RING_UP, Fact.EVIDENCE_USED, Fact.CYCLED):
        machine.feed(fact)
    assert machine.feed(Fact.EVIDENCE_USED) == (Action.REFUSE, Action.REPORT_FAILED)
    assert machine.state is State.FAILED
    assert machine.feed(Fact.RING_UP) == ()
    assert machine.state is State.FAILED, "only another INIT leads out"


def test_keep_goes_on_without_evidence_but_warns() -> None:
    machine = PowerMachine(ResetPolicy.KEEP)
    machine.feed(Fact.INIT_ASKED)
    machine.feed(Fact.RING_UP)
    assert machine.feed(Fact.EVIDENCE_USED) == (Action.WARN_KEPT, Action.FORWARD)


@pytest.mark.parametrize(
    ("family", "response", "meaning"),
    [
        (Family.TPM_2_0, HEADER.pack(0x8001, 10, 0x100), Evidence.CLEAN),
        (Family.TPM_2_0, HEADER.pack(0x8001, 27, 0) + bytes(17), Evidence.STARTED),
        (Family.TPM_2_0, HEADER.pack(0x8001, 10, 0x101), Evidence.UNREADABLE),
        (Family.TPM_2_0, HEADER.pack(0x00C4, 10, 0x26), Evidence.OTHER_FAMILY),
        (Family.TPM_1_2, HEADER.pack(0x00C4, 10, 0x26), Evidence.CLEAN),
        (Family.TPM_1_2, HEADER.pack(0x00C4, 30, 0) + bytes(20), Evidence.STARTED),
        (Family.TPM_1_2, HEADER.pack(0x8001, 10, 0x100), Evidence.OTHER_FAMILY),
        (Family.TPM_1_2, b"\x00\xc4", Evidence.UNREADABLE),
    ],
)
def test_evidence_is_read(family: Family, response: bytes, meaning: Evidence) -> None:
    assert power.judge_evidence(family, response) is meaning


def test_pcr_values_of_both_families() -> None:
    digest = bytes(range(32))
    body = struct.pack(">IIHB", 7, 1, 0x000B, 3) + b"\x01\0\0" + struct.pack(">IH", 1, 32) + digest
    response = HEADER.pack(0x8001, 10 + len(body), 0) + body
    assert power.pcr_values(Family.TPM_2_0, response) == [digest]
    assert power.pcr_values(Family.TPM_1_2, HEADER.pack(0xC4, 30, 0) + bytes(20)) == [bytes(20)]
    assert power.pcr_values(Family.TPM_2_0, refusal(Family.TPM_2_0, Refusal.FAILURE)) is None


@given(st.binary(max_size=80), st.sampled_from(Family))
def test_evidence_from_a_hostile_tpm_is_read_without_an_error(raw: bytes, family: Family) -> None:
    power.judge_evidence(family, raw)
    power.pcr_values(family, HEADER.pack(0x8001, 10 + len(raw), 0) + raw)
