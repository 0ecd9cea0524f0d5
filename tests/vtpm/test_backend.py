"""The backend's table: every frontend state in every state, and what no table may lack."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.errors import LocalProtocolError
from qemu_vtpm_bridge.vtpm.backend import (
    SHOWN_AS,
    TRANSITIONS,
    Action,
    BackendMachine,
    Fact,
    State,
    frontend_fact,
)
from qemu_vtpm_bridge.xen.xenbus import XenbusState

OURS = {Fact.CONNECT_DONE, Fact.CONNECT_FAILED, Fact.CONNECT_INTERRUPTED}
WRITES = {
    Action.WRITE_INIT_WAIT: XenbusState.INIT_WAIT,
    Action.WRITE_CONNECTED: XenbusState.CONNECTED,
    Action.WRITE_CLOSING: XenbusState.CLOSING,
    Action.WRITE_CLOSED: XenbusState.CLOSED,
}


@pytest.mark.parametrize(("state", "fact"), list(itertools.product(State, Fact)))
def test_every_pair_is_in_the_table_or_raises_and_changes_nothing(state: State, fact: Fact) -> None:
    machine = BackendMachine()
    machine.state = state
    connecting = state is State.CONNECTING
    expected = state is State.GONE or (fact in OURS) == connecting
    assert ((state, fact) in TRANSITIONS) == expected
    if expected:
        machine.feed(fact)
    else:
        with pytest.raises(LocalProtocolError):
            machine.feed(fact)
        assert machine.state is state


@pytest.mark.parametrize("state", list(XenbusState))
@pytest.mark.parametrize("before", [s for s in State if s is not State.CONNECTING])
def test_P9_any_frontend_state_at_any_time_is_taken(before: State, state: XenbusState) -> None:
    machine = BackendMachine()
    machine.state = before
    machine.feed(frontend_fact(state))
    machine = BackendMachine()
    machine.state = before
    machine.feed(frontend_fact(None))
    assert machine.state is State.GONE


@given(st.lists(st.sampled_from([*XenbusState, None, "fails", "breaks"]), max_size=60))
def test_the_page_is_mapped_once_and_let_go_once_and_the_state_shown_is_true(
    story: list[XenbusState | str | None],
) -> None:
    """The naive model: mapped or not, and the state last written."""
    machine = BackendMachine()
    mapped, shown = False, XenbusState.INIT_WAIT
    works = True
    for event in story:
        if event == "fails":
            works = not works
            continue
        if event == "breaks":
            facts = [Fact.CHANNEL_BROKE]
        else:
            assert not isinstance(event, str)
            facts = [frontend_fact(event)]
        while facts:
            for action in machine.feed(facts.pop()):
                if action is Action.CONNECT:
                    assert not mapped
                    mapped = works
                    facts.append(Fact.CONNECT_DONE if works else Fact.CONNECT_FAILED)
                elif action is Action.DISCONNECT:
                    assert mapped
                    mapped = False
                elif action in WRITES:
                    shown = WRITES[action]
        assert machine.state is not State.CONNECTING
        assert mapped == (machine.state in (State.CONNECTED, State.CLOSING))
        if machine.state is not State.GONE:
            assert SHOWN_AS[machine.state] is shown
