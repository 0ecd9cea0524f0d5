"""A guest's accesses as Xen's ioreq protocol tells them, on the real devices."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge.ioreq import (
    ALL_ONES,
    IOREQ_TYPE_COPY,
    IOREQ_TYPE_INVALIDATE,
    TPM_BASE,
    Window,
    perform,
    serve,
)
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.xen.ioreq import ACCESS as ACCESS_FOUND
from qemu_vtpm_bridge.xen.ioreq import READABLE, STOPPED
from tests.support.registers_rig import BUFFER, COMMAND, LOC_CTRL, RESPONSE, START, Rig

GUEST_PAGE = 0x123000


@dataclass
class Request:
    """A request as Xen's slot has it."""

    address: int = TPM_BASE
    data: int = 0
    count: int = 1
    size_bytes: int = 4
    type: int = IOREQ_TYPE_COPY
    read: bool = True
    data_is_ptr: bool = False
    backwards: bool = False


class Memory:
    """Guest memory: one page."""

    def __init__(self) -> None:
        self.page = bytearray(4096)

    def read_memory(self, address: int, size_bytes: int) -> bytes:
        at = address - GUEST_PAGE
        return bytes(self.page[at : at + size_bytes])

    def write_memory(self, address: int, data: bytes) -> None:
        at = address - GUEST_PAGE
        self.page[at : at + len(data)] = data


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Give both devices and the pump's end."""
    with_pump = Rig()
    yield with_pump
    with_pump.near.close()
    with_pump.pump.close()


def crb_window(rig: Rig) -> Window:
    rig.mmio.write(rig.crb, LOC_CTRL, 4, 1)
    return Window(rig.mmio, rig.crb)


def tis_window(rig: Rig) -> Window:
    return Window(rig.mmio, rig.tis)


def test_plain_accesses_reach_the_device(rig: Rig) -> None:
    window, memory = tis_window(rig), Memory()
    assert perform(Request(TPM_BASE + 0xF00, size_bytes=2), window, memory) == 0x1014
    assert perform(Request(TPM_BASE + 0xF02, size_bytes=2), window, memory) == 0x0001
    # hvmloader's and the drivers' first steps: ask for locality 0, look whether it is given.
    perform(Request(data=0x02, size_bytes=1, read=False), window, memory)
    assert perform(Request(size_bytes=1), window, memory) == 0xA1


def test_only_the_size_of_a_write_counts(rig: Rig) -> None:
    window, memory = crb_window(rig), Memory()
    request = Request(TPM_BASE + BUFFER, data=0x1122334455667788, size_bytes=2, read=False)
    perform(request, window, memory)
    assert perform(Request(TPM_BASE + BUFFER, size_bytes=4), window, memory) == 0x7788


@pytest.mark.parametrize("offset", [0x1000, 0x4FFC, 0xFFE, -4])
def test_where_the_crb_device_has_nothing_there_are_ones(rig: Rig, offset: int) -> None:
    window, memory = crb_window(rig), Memory()
    assert perform(Request(TPM_BASE + offset), window, memory) == 0xFFFFFFFF
    perform(Request(TPM_BASE + offset, data=5, read=False), window, memory)
    assert perform(Request(TPM_BASE + offset), window, memory) == 0xFFFFFFFF


@given(
    size=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(1, 60),
    backwards=st.booleans(),
    data=st.data(),
)
def test_a_repeated_copy_is_its_items(
    size: int, count: int, backwards: bool, data: st.DataObject
) -> None:
    rig = Rig()
    window, memory = crb_window(rig), Memory()
    raw = data.draw(st.binary(min_size=size * count, max_size=size * count))
    last = (count - 1) * size if backwards else 0
    place, page = TPM_BASE + BUFFER + last, GUEST_PAGE + 8 + last
    memory.write_memory(GUEST_PAGE + 8, raw)
    to_device = Request(place, page, count, size, read=False, data_is_ptr=True, backwards=backwards)
    assert perform(to_device, window, memory) == page
    assert bytes(window.read(TPM_BASE + BUFFER + at, 1) for at in range(len(raw))) == raw
    memory.page[:] = bytes(4096)
    back = Request(place, page, count, size, data_is_ptr=True, backwards=backwards)
    assert perform(back, window, memory) == page
    assert memory.read_memory(GUEST_PAGE + 8, len(raw)) == raw
    assert not any(memory.page[8 + len(raw) :])
    rig.near.close()
    rig.pump.close()


def test_a_repeat_without_memory_advances_too(rig: Rig) -> None:
    window, memory = crb_window(rig), Memory()
    stored = Request(TPM_BASE + BUFFER, data=0xAB, count=5, size_bytes=1, read=False)
    assert perform(stored, window, memory) == 0xAB
    assert window.read(TPM_BASE + BUFFER, 8) == 0xABABABABAB
    perform(Request(TPM_BASE + BUFFER + 4, 0xCD, 1, 1, read=False), window, memory)
    loaded = Request(TPM_BASE + BUFFER, count=5, size_bytes=1)
    assert perform(loaded, window, memory) == 0xCD


class NotedMemory(Memory):
    """Guest memory that notes where it is used; all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.used: list[int] = []

    def read_memory(self, address: int, size_bytes: int) -> bytes:
        self.used.append(address)
        return bytes(size_bytes)

    def write_memory(self, address: int, data: bytes) -> None:
        self.used.append(address)


@pytest.mark.parametrize("read", [True, False])
def test_P1_a_copy_that_would_go_below_the_first_address_touches_nothing(
    rig: Rig, read: bool
) -> None:
    window, memory = crb_window(rig), NotedMemory()
    window.write(TPM_BASE + BUFFER, 4, 7)
    last = Request(
        TPM_BASE + BUFFER + 8, data=4, count=3, read=read, data_is_ptr=True, backwards=True
    )
    assert perform(last, window, memory) == ALL_ONES
    assert memory.used == []
    assert window.read(TPM_BASE + BUFFER, 4) == 7
    last.data = 8
    assert perform(last, window, memory) == 8
    assert memory.used == [0]


@pytest.mark.parametrize(
    "request_",
    [
        Request(size_bytes=0),
        Request(size_bytes=9),
        Request(count=0),
        Request(count=1025),
        Request(count=0xFFFFFFFF, size_bytes=1, data_is_ptr=True, read=False),
        Request(count=2, size_bytes=0xFFFFFFFF),
    ],
)
def test_P1_what_makes_no_sense_is_answered_with_ones(rig: Rig, request_: Request) -> None:
    assert perform(request_, crb_window(rig), Memory()) == ALL_ONES


class Script(Memory):
    """An ioreq server that has one request after another, and notes the answers."""

    def __init__(self, rig: Rig, steps: list[Request | Callable[[Rig], None]]) -> None:
        super().__init__()
        self.access = Request()
        self.answers: list[int] = []
        self.forgotten = 0
        self._rig = rig
        self._steps = list(steps)

    def next(self, answer: bool, fd: int = -1) -> int:
        if answer:
            self.answers.append(self.access.data)
        if not self._steps:
            return STOPPED
        step = self._steps.pop(0)
        if isinstance(step, Request):
            vars(self.access).update(vars(step))
            return ACCESS_FOUND
        assert fd == self._rig.mmio.fileno(), "an answer is owed, so the pump is listened to"
        step(self._rig)
        return READABLE

    def forget_memory(self) -> None:
        self.forgotten += 1


def write(offset: int, value: int, size: int = 4) -> Request:
    return Request(TPM_BASE + offset, value, 1, size, read=False)


def test_a_command_runs_while_the_guest_polls(rig: Rig) -> None:
    def answer(rig: Rig) -> None:
        assert rig.pump.recv(4096) == COMMAND
        rig.pump.sendall(RESPONSE)

    commands = [write(BUFFER + at, byte, 1) for at, byte in enumerate(COMMAND)]
    poll = Request(TPM_BASE + START)
    server = Script(
        rig,
        [write(LOC_CTRL, 1), *commands, write(START, 1), poll, answer, Request(TPM_BASE + START)],
    )
    serve(server, rig.mmio, rig.crb)
    assert server.answers[-2:] == [1, 0]
    assert rig.mmio.commands == 1


def test_other_types_are_answered_and_leave_the_device_alone(rig: Rig) -> None:
    invalidate = Request(type=IOREQ_TYPE_INVALIDATE, data=7)
    server = Script(rig, [invalidate, Request(type=0, read=False), Request(TPM_BASE + 0xF00)])
    serve(server, rig.mmio, rig.tis)
    assert server.forgotten == 1
    assert server.answers == [7, ALL_ONES, 0x00011014]


def test_a_pump_that_has_gone_ends_the_service(rig: Rig) -> None:
    def hang_up(rig: Rig) -> None:
        rig.pump.shutdown(socket.SHUT_RDWR)

    commands = [write(BUFFER + at, byte, 1) for at, byte in enumerate(COMMAND)]
    server = Script(rig, [write(LOC_CTRL, 1), *commands, write(START, 1), hang_up])
    with pytest.raises(XenError, match="pump"):
        serve(server, rig.mmio, rig.crb)
