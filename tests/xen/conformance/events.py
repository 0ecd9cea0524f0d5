"""Checks of event channels.

The one makes a port, the other binds to it.  What is expected is what Linux' evtchn device
gives on Xen: an event is masked from when it is taken until the port is armed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from qemu_vtpm_bridge.errors import XenError

from .grants import NO_DOMAIN, hold, map_page, refused, share, soon_refused
from .registry import Group, Mismatch, XenPlace, check, expect
from .sides import DEADLINE_S, SidesChannel


class Listener:
    """Waits for a channel's events as the pumps do: for edges."""

    def __init__(self, channel: SidesChannel) -> None:
        self.channel = channel
        channel.listen()

    def there(self) -> bool:
        """Return whether an event has come since this was asked."""
        return self.channel.came()

    def take(self) -> None:
        """Wait for an event and take it; the port stays masked."""
        if not self.channel.came(DEADLINE_S):
            raise Mismatch("an event", "none", "one")
        self.channel.take()

    def arm(self) -> None:
        """Let further events come."""
        self.channel.arm()

    def wait(self) -> None:
        """Wait for an event, take it and let further ones come."""
        self.take()
        self.arm()


@dataclass
class Pair:
    """A channel between the two sides, with the event of its beginning taken."""

    one: Listener
    other: Listener

    def settle(self) -> None:
        """Return when every event that was caused before this has come.

        Events are handled in the order in which they were caused, so one more on a channel
        of its own is behind them.
        """
        self.one.channel.notify()
        self.other.wait()
        self.other.channel.notify()
        self.one.wait()


def unbound(place: XenPlace) -> SidesChannel:
    """Make a port at the one, for the other."""
    channel = place.one.alloc_unbound(place.other_domid)
    place.stack.callback(channel.close)
    return channel


def bind(place: XenPlace, port: int) -> SidesChannel:
    """Bind the other to a port of the one."""
    channel = place.other.bind_interdomain(place.one_domid, port)
    place.stack.callback(channel.close)
    return channel


def pair(place: XenPlace) -> Pair:
    """Make a channel, and take the first event, which comes to who binds."""
    ours = unbound(place)
    one = Listener(ours)
    other = Listener(bind(place, ours.port))
    other.wait()
    return Pair(one, other)


@check(Group.EVENTS)
def who_binds_finds_an_event(place: XenPlace) -> None:
    """A port that was just bound has an event pending at who bound it, and none at the other."""
    settled = pair(place)
    ours = unbound(place)
    one = Listener(ours)
    other = Listener(bind(place, ours.port))
    other.wait()
    settled.settle()
    expect("at who made the port", one.there(), False)


@check(Group.EVENTS)
def events_go_both_ways(place: XenPlace) -> None:
    """Each side's notify is the other side's event."""
    channel = pair(place)
    for _ in range(20):
        channel.one.channel.notify()
        channel.other.wait()
        channel.other.channel.notify()
        channel.one.wait()


@check(Group.EVENTS)
def an_event_is_for_its_port_only(place: XenPlace) -> None:
    """An event comes to its own port and to no other."""
    first, second, settled = pair(place), pair(place), pair(place)
    first.one.channel.notify()
    first.other.wait()
    settled.settle()
    expect("at another port", second.other.there(), False)
    expect("at the sender", first.one.there(), False)


@check(Group.EVENTS)
def events_are_coalesced(place: XenPlace) -> None:
    """Many notifies are at least one event, and no more than one for each."""
    channel, settled = pair(place), pair(place)
    for _ in range(10):
        channel.one.channel.notify()
    events = 0
    settled.settle()
    while channel.other.there():
        events += 1
        channel.other.channel.take()
        channel.other.arm()
        settled.settle()
    expect("from 1 to 10", 1 <= events <= 10, True)


@check(Group.EVENTS)
def an_event_that_comes_while_masked_is_not_lost(place: XenPlace) -> None:
    """An event that is caused after another was taken comes, at the latest when armed again."""
    channel = pair(place)
    channel.one.channel.notify()
    channel.other.take()
    channel.one.channel.notify()
    channel.other.arm()
    channel.other.wait()


@check(Group.EVENTS)
def no_event_comes_before_the_port_is_armed(place: XenPlace) -> None:
    """Between taking an event and arming the port no other event comes."""
    channel, settled = pair(place), pair(place)
    channel.one.channel.notify()
    channel.other.take()
    channel.one.channel.notify()
    settled.settle()
    expect("events while masked", channel.other.there(), False)


@check(Group.EVENTS)
def what_was_written_before_an_event_is_there(place: XenPlace) -> None:
    """What is written to a page before a notify is read by who got the event."""
    channel = pair(place)
    ours = share(place)
    theirs = map_page(place, ours.ref)
    for number in range(50):
        ours.data[:1] = bytes([number])
        channel.one.channel.notify()
        channel.other.wait()
        expect("read", bytes(theirs.data[:1]), bytes([number]))


@check(Group.EVENTS)
def a_port_is_bound_once(place: XenPlace) -> None:
    """A port that is bound cannot be bound again."""
    ours = unbound(place)
    bind(place, ours.port)
    answer = refused(place.other.bind_interdomain, place.one_domid, ours.port)
    expect("bind again", answer, True)


@check(Group.EVENTS)
def a_port_that_is_not_there_is_refused(place: XenPlace) -> None:
    """A port that was never made, or of a domain that is not there, cannot be bound."""
    ours = unbound(place)
    for domid, port in (
        (place.one_domid, ours.port + 500),
        (place.one_domid, 0x7FFFFFFF),
        (NO_DOMAIN, ours.port),
    ):
        answer = refused(place.other.bind_interdomain, domid, port)
        expect(f"bind {port - ours.port} beyond at {domid}", answer, True)


@check(Group.EVENTS)
def a_port_for_somebody_else_is_refused(place: XenPlace) -> None:
    """A port that waits for another domain cannot be bound."""
    channel = place.one.alloc_unbound(NO_DOMAIN)
    place.stack.callback(channel.close)
    answer = refused(place.other.bind_interdomain, place.one_domid, channel.port)
    expect("bind", answer, True)


@check(Group.EVENTS)
def notifying_a_port_that_nobody_bound_is_no_error(place: XenPlace) -> None:
    """A notify on a port that nobody bound is dropped without an error."""
    ours = unbound(place)
    expect("notify fails", _fails(ours), False)
    theirs = Listener(bind(place, ours.port))
    theirs.wait()


@check(Group.EVENTS)
def notifying_a_closed_peer_is_no_error(place: XenPlace) -> None:
    """A notify to a side that was closed is dropped, whichever side it was, and nothing comes."""
    settled = pair(place)
    for closes_first in (True, False):
        channel = pair(place)
        closed, left = channel.one, channel.other
        if not closes_first:
            closed, left = left, closed
        closed.channel.close()
        expect("notify fails", _fails(left.channel), False)
        settled.settle()
        expect("an event of the end", left.there(), False)


@check(Group.EVENTS)
def a_port_can_be_bound_again_when_its_peer_closed(place: XenPlace) -> None:
    """When who bound a port closes, the port waits for the same domain again."""
    channel = pair(place)
    channel.other.channel.close()
    again = Listener(bind(place, channel.one.channel.port))
    again.wait()
    channel.one.channel.notify()
    again.wait()
    again.channel.notify()
    channel.one.wait()


@check(Group.EVENTS)
def a_closed_port_is_refused(place: XenPlace) -> None:
    """A port that was closed cannot be bound."""
    ours = place.one.alloc_unbound(place.other_domid)
    port = ours.port
    ours.close()
    expect("bind", refused(place.other.bind_interdomain, place.one_domid, port), True)


@check(Group.EVENTS)
def a_killed_programs_ports_are_closed(place: XenPlace) -> None:
    """Ports of a killed program are closed: nobody binds them, notifies are dropped."""
    program = hold(place)
    theirs = bind(place, program.port)
    program.kill()
    expect("notify fails", _fails(theirs), False)
    program = hold(place)
    program.kill()
    answer = soon_refused(place.other.bind_interdomain, place.one_domid, program.port)
    expect("bind", answer, True)


def _fails(channel: SidesChannel) -> bool:
    try:
        channel.notify()
    except XenError:
        return True
    return False
