"""swtpm's control protocol, cut out of a stream: against a naive model of swtpm's reader."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge import control
from qemu_vtpm_bridge.bridge.control import BODIES, Command, ControlParser, Request

EMPTY = [command for command in Command if command not in BODIES]
DRAINED = (Command.CMD_SET_STATEBLOB, Command.CMD_HASH_DATA)
FIXED = [command for command in BODIES if command not in DRAINED]


def body_bytes(command: int) -> int:
    form = BODIES.get(Command(command)) if command in Command.__members__.values() else None
    return form.sizeof() if form else 0


def feed_all(parser: ControlParser, pieces: list[bytes]) -> list[Request]:
    return [request for piece in pieces if (request := parser.feed(piece)) is not None]


@pytest.mark.parametrize("command", list(Command))
def test_a_request_is_whole_at_its_last_byte_wherever_it_is_cut(command: Command) -> None:
    raw = struct.pack(">I", command) + bytes(body_bytes(command))
    for cut in range(1, len(raw)):
        parser = ControlParser()
        assert parser.feed(raw[:cut]) is None
        assert parser.incomplete
        request = parser.feed(raw[cut:])
        assert request is not None
        assert (request.command, request.malformed) == (command, False)
        assert not parser.incomplete


@pytest.mark.parametrize("command", EMPTY)
def test_extra_bytes_spoil_a_request_without_a_body(command: Command) -> None:
    request = ControlParser().feed(struct.pack(">I", command) + b"x")
    assert request is not None
    assert request.malformed is (command is not Command.CMD_GET_CAPABILITY)


@pytest.mark.parametrize("command", [Command.CMD_SET_LOCALITY, Command.CMD_RESET_TPMESTABLISHED])
@pytest.mark.parametrize("padding", [0, 3])
def test_one_byte_of_locality_counts_with_or_without_padding(
    command: Command, padding: int
) -> None:
    parser = ControlParser()
    # QEMU does not clear the padding.
    request = parser.feed(struct.pack(">IB", command, 3) + b"\xaa" * padding)
    assert request is not None
    assert request.body.locality == 3
    assert not request.malformed
    assert not parser.incomplete


@pytest.mark.parametrize("number", [0, 0x14, 0x7FFFFFFF, 0xFFFFFFFF])
def test_unknown_commands_are_whole_at_once_and_their_extras_ignored(number: int) -> None:
    request = ControlParser().feed(struct.pack(">I", number) + b"extra")
    assert request == Request(number)


@pytest.mark.parametrize("command", DRAINED)
def test_a_body_that_is_refused_is_drained_first(command: Command) -> None:
    parser = ControlParser()
    fields = (0, 1) if command is Command.CMD_SET_STATEBLOB else ()
    head = struct.pack(f">I{len(fields)}II", command, *fields, 1000)
    assert parser.feed(head) is None
    assert parser.feed(bytes(999)) is None
    assert parser.incomplete
    request = parser.feed(b"x")
    assert request is not None
    assert request.body.length == 1000
    following = parser.feed(struct.pack(">I", Command.CMD_STOP))
    assert following == Request(Command.CMD_STOP)


@pytest.mark.parametrize("command", DRAINED)
def test_a_body_of_gigabytes_is_not_waited_for(command: Command) -> None:
    fields = (0, 1) if command is Command.CMD_SET_STATEBLOB else ()
    head = struct.pack(f">I{len(fields)}II", command, *fields, 0xFFFFFFFF)
    request = ControlParser().feed(head)
    assert request is not None
    assert request.too_long


@given(st.lists(st.sampled_from([*EMPTY, *FIXED]), max_size=8), st.data())
def test_requests_in_any_pieces_come_out_as_they_went_in(
    commands: list[Command], data: st.DataObject
) -> None:
    """Clients wait for each answer, so a piece never holds bytes of two requests."""
    parser = ControlParser()
    for command in commands:
        raw = struct.pack(">I", command) + data.draw(
            st.binary(min_size=body_bytes(command), max_size=body_bytes(command))
        )
        cuts = sorted(data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=4)))
        edges = [0, *cuts, len(raw)]
        pieces = [raw[start:end] for start, end in itertools.pairwise(edges)]
        (request,) = feed_all(parser, pieces)
        assert request.command == command
        assert not request.malformed
        form = BODIES.get(command)
        assert form is None or form.build(request.body) == raw[4 : 4 + form.sizeof()]


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=20))
def test_no_bytes_break_the_parser(pieces: list[bytes]) -> None:
    parser = ControlParser()
    taken = 0
    for piece in pieces:
        request = parser.feed(piece)
        taken += len(piece)
        # What is not a whole request yet is at most the longest head there is.
        assert request is None or not parser.incomplete
        assert len(parser._buffer) <= 20 or request is not None
    assert taken == sum(map(len, pieces))


def test_capabilities_are_what_qemu_needs_and_no_more_than_is_true() -> None:
    assert control.CAPABILITIES == 0x3CAF
    for least in (0x348F, 0x340F):
        assert control.CAPABILITIES & least == least
    assert control.STATEBLOB_CAPABILITIES == 0x300


def test_answers_have_the_size_that_every_qemu_waits_for() -> None:
    assert len(control.refused_stateblob()) == 16
    assert len(control.empty_stateblob()) == 16
    assert control.ESTABLISHED_RESPONSE.sizeof() == 8
    assert control.BUFFERSIZE_RESPONSE.sizeof() == 16
    assert control.CAPABILITY_RESPONSE.sizeof() == 8
