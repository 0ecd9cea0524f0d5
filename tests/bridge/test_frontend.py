"""The frontend's machine: every pair of state and fact, and a model of tpmback to talk to."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qemu_vtpm_bridge.bridge.frontend import (
    IGNORED,
    TRANSITIONS,
    Action,
    Fact,
    FrontendMachine,
    State,
    backend_fact,
)
from qemu_vtpm_bridge.errors import LocalProtocolError
from qemu_vtpm_bridge.xen.xenbus import XenbusState


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("fact", Fact)
def test_every_pair_is_handled_or_refused_without_effect(state: State, fact: Fact) -> None:
    machine = FrontendMachine()
    machine.state = state
    if (state, fact) in TRANSITIONS:
        next_state, actions = TRANSITIONS[state, fact]
        assert machine.feed(fact) == actions
        assert machine.state is next_state
    elif fact in IGNORED[state]:
        assert machine.feed(fact) == ()
        assert machine.state is state
    else:
        with pytest.raises(LocalProtocolError):
            machine.feed(fact)
        assert machine.state is state


@pytest.mark.parametrize("state", State)
def test_whatever_a_backend_shows_is_taken_in_every_state(state: State) -> None:
    """A hostile vTPM domain must not be able to raise an error in the machine."""
    if state is State.PUBLISHING:
        return  # the driver reads no backend state while it publishes
    for shown in [None, *XenbusState]:
        machine = FrontendMachine()
        machine.state = state
        machine.feed(backend_fact(shown))


def test_P6_closed_is_never_written_from_running_without_a_drain() -> None:
    """While the backend stays Connected, Closed comes only after DRAINED."""
    for (state, fact), (_, actions) in TRANSITIONS.items():
        backend_let_go = fact in {
            Fact.BACKEND_GONE,
            Fact.BACKEND_INIT_WAIT,
            Fact.BACKEND_CLOSED,
        }
        page_in_use = state in {
            State.RUNNING,
            State.LEAVING,
            State.DRAINING,
            State.CLOSE_DRAINING,
        }
        if page_in_use and Action.WRITE_CLOSED in actions:
            assert fact is Fact.DRAINED or backend_let_go, (state, fact)


def test_ring_up_is_ordered_only_on_the_way_into_running() -> None:
    for (state, fact), (next_state, actions) in TRANSITIONS.items():
        assert (Action.RING_UP in actions) == (next_state is State.RUNNING), (state, fact)
        if state is State.RUNNING and next_state is not State.RUNNING:
            assert actions[0] is Action.RING_DOWN, fact


class FrontendAgainstTpmback(RuleBasedStateMachine):
    """The machine and a naive tpmback that crashes when it loses a page in use."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = FrontendMachine()
        self.own = XenbusState.INITIALISING
        self.backend: XenbusState | None = XenbusState.INIT_WAIT
        self.mapped = False
        self.page = False
        self.ring = False
        self.busy = False
        self.draining = False
        self.feed(Fact.ENTRIES_CLEAN)

    def feed(self, fact: Fact) -> None:
        for action in self.machine.feed(fact):
            match action:
                case Action.PUBLISH:
                    assert not self.page, "a second page while the first is held"
                    assert not self.mapped, "tpmback would keep the old page"
                    self.page = True
                    self.feed(Fact.PUBLISHED)
                case Action.WRITE_INITIALISING:
                    self.own = XenbusState.INITIALISING
                case Action.WRITE_INITIALISED:
                    self.own = XenbusState.INITIALISED
                case Action.WRITE_CONNECTED:
                    self.own = XenbusState.CONNECTED
                case Action.WRITE_CLOSING:
                    self.own = XenbusState.CLOSING
                case Action.WRITE_CLOSED:
                    assert not (self.busy and self.mapped), "P6: tpmback loses a page in use"
                    self.own = XenbusState.CLOSED
                case Action.RING_UP:
                    assert self.page
                    assert self.mapped
                    self.ring = True
                case Action.RING_DOWN:
                    self.ring = False
                case Action.AWAIT_DRAINED:
                    self.draining = True
                case Action.RELEASE:
                    self.page = self.ring = False

    @rule()
    def backend_reacts(self) -> None:
        if self.backend is None:
            return
        if self.own in (XenbusState.INITIALISED, XenbusState.CONNECTED):
            if not self.mapped and self.page:
                self.mapped, self.backend = True, XenbusState.CONNECTED
        elif self.own is XenbusState.CLOSED:
            self.mapped, self.backend = False, XenbusState.INIT_WAIT
            self.busy = False

    @rule()
    def frontend_looks(self) -> None:
        self.feed(backend_fact(self.backend))

    @precondition(lambda self: self.ring and not self.busy)
    @rule()
    def command_begins(self) -> None:
        self.busy = True

    @precondition(lambda self: self.busy)
    @rule()
    def command_ends(self) -> None:
        self.busy = False

    @precondition(lambda self: self.draining and not self.busy)
    @rule()
    def drained(self) -> None:
        self.draining = False
        self.feed(Fact.DRAINED)

    @rule()
    def vtpm_domain_dies(self) -> None:
        self.backend, self.mapped, self.busy = None, False, False

    @precondition(lambda self: self.backend is None)
    @rule()
    def vtpm_domain_boots(self) -> None:
        self.backend = XenbusState.INIT_WAIT

    @rule()
    def replace_asked(self) -> None:
        self.feed(Fact.REPLACE_ASKED)

    @precondition(lambda self: self.machine.state is not State.PUBLISHING)
    @rule(state=st.sampled_from([XenbusState.UNKNOWN, XenbusState.RECONFIGURED]))
    def backend_shows_nonsense(self, state: XenbusState) -> None:
        self.feed(backend_fact(state))

    @invariant()
    def commands_flow_only_in_running(self) -> None:
        assert self.ring == (self.machine.state is State.RUNNING)


FrontendAgainstTpmback.TestCase.settings = settings(max_examples=200, deadline=None)
TestFrontendAgainstTpmback = FrontendAgainstTpmback.TestCase
