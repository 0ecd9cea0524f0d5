"""The ring against a naive model: a backend that answers as it likes, and a QEMU behind it.

The model holds one word for each command: whose answer QEMU must get.  Checked after every
command: one answer to one command, whole, no longer than the buffer that was granted (P1,
P2, P5), nothing on the page that may not be there (P3), and that the pump goes on after all
but the faults after which the connection is to be replaced.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_vtpm_bridge._shim import ffi, lib
from qemu_vtpm_bridge.bridge.ring import FrontendPump, PumpExit, PumpMode
from qemu_vtpm_bridge.bridge.tpm import COMMAND_TAGS, HEADER
from qemu_vtpm_bridge.xen.platform import Channel, Page
from tests.support.world import platform_of, running_world

pytestmark = pytest.mark.timeout(300)

SUBMIT, FINISH, CANCEL = 1, 2, 3
BUFFER_BYTES = 3000
OFFSET = 8
MADE_HERE = {"failure": 0xF01, "bad_size": 0xF02, "bad_tag": 0xF03, "cancelled": 0xF04}
ANSWERS = {name: HEADER.pack(0x8001, 10, code) for name, code in MADE_HERE.items()}


@dataclass(frozen=True)
class Step:
    """One command from QEMU, and what the backend does with it."""

    tag: int
    size: int
    answer_tag: int
    announced: int
    length: int
    code: int
    idle: bool

    @property
    def reaches_the_page(self) -> bool:
        return 10 <= self.size <= BUFFER_BYTES and self.tag in COMMAND_TAGS

    @property
    def malformed(self) -> bool:
        known = self.answer_tag in (0x8001, 0x8002, 0xC4, 0xC5, 0xC6)
        refused = self.answer_tag == 0xC3 and self.code != 0
        whole = 10 <= self.length <= 4088 and self.announced == self.length
        return not (whole and (known or refused))

    def expected_code(self) -> int:
        """The naive model."""
        if not 10 <= self.size <= BUFFER_BYTES:
            return MADE_HERE["bad_size"]
        if self.tag not in COMMAND_TAGS:
            return MADE_HERE["bad_tag"]
        if self.idle:
            return MADE_HERE["cancelled"]
        if self.length == 0 or self.malformed or self.length > BUFFER_BYTES:
            return MADE_HERE["failure"]
        return self.code

    @property
    def ends_the_run(self) -> bool:
        return self.reaches_the_page and not self.idle and self.length != 0 and self.malformed


LENGTHS = st.sampled_from([0, 9, 10, 11, 12, 28, 2999, 3000, 3001, 4088, 4089, 0xFFFFFFFF])
STEPS = st.builds(
    Step,
    tag=st.sampled_from([0x8001, 0x8002, 0xC1, 0xC3, 0x1C1, 0x0, 0xFFFF]),
    size=st.sampled_from([10, 11, 22, 2999, 3000, 3001, 4088, 4089]),
    answer_tag=st.sampled_from([0x8001, 0x8002, 0xC4, 0xC6, 0xC3, 0xC1, 0x0]),
    announced=LENGTHS,
    length=LENGTHS,
    code=st.sampled_from([0, 1, 0x101]),
    idle=st.booleans(),
) | st.builds(  # a well-behaved one, for there are too many ways to be another
    lambda size, length: Step(0x8001, size, 0x8001, length, length, 0, False),
    st.integers(10, BUFFER_BYTES),
    st.integers(10, BUFFER_BYTES),
)


class Backend:
    """Plays the vTPM domain on the page, byte by byte."""

    def __init__(self, page: Page, channel: Channel) -> None:
        self._raw = ffi.buffer(ffi.cast("uint8_t *", page.cdata.shared), 4096)
        self._page = page
        self._channel = channel

    async def take(self) -> tuple[int, bytes]:
        """Wait for a request; return its length and its header."""
        with trio.fail_after(60):
            while lib.tpmif_state(self._page.cdata.shared) != SUBMIT:
                await trio.lowlevel.checkpoint()
        length = int.from_bytes(self._raw[0:4], "little")
        assert self._raw[7] == b"\0"  # nr_extra_pages
        return length, self._raw[OFFSET : OFFSET + 10]

    def answer(self, step: Step) -> None:
        if step.idle:
            self._raw[4] = b"\0"
        else:
            header = HEADER.pack(step.answer_tag, step.announced, step.code)
            self._raw[OFFSET : OFFSET + 10] = header
            self._raw[0:4] = step.length.to_bytes(4, "little")
            self._raw[4] = bytes([FINISH])
        self._channel.notify()


def _pump() -> FrontendPump:
    pump = FrontendPump(60.0, {}, 1.0, COMMAND_TAGS)
    pump.set_answers(**ANSWERS)
    pump.set_buffer_size(BUFFER_BYTES)
    pump.set_mode(PumpMode.FORWARD)
    return pump


async def _answer(qemu: trio.SocketStream) -> tuple[int, int]:
    """Return the length and the code of the one answer that comes."""
    raw = b""
    with trio.fail_after(60):
        while len(raw) < 10 or len(raw) < HEADER.unpack_from(raw)[1]:
            chunk = await qemu.receive_some(8192)
            assert chunk
            raw += chunk
    assert len(raw) == HEADER.unpack_from(raw)[1]
    return len(raw), int(HEADER.unpack_from(raw)[2])


@given(st.lists(STEPS, min_size=1, max_size=8))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_P1_P2_P3_P5_every_command_gets_the_one_answer_that_the_model_says(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Step]
) -> None:
    async with running_world(tmp_path_factory.getbasetemp()) as world:
        await world.create_domain(2, "vtpm")
        async with platform_of(world) as ours, platform_of(world, 2) as theirs:
            in_thread = trio.to_thread.run_sync
            page = await in_thread(ours.share_page, 2)
            channel = await in_thread(ours.alloc_unbound, 2)
            mapped = await in_thread(theirs.map_page, 0, page.ref)
            bound = await in_thread(theirs.bind_interdomain, 0, channel.port)
            pump = _pump()
            for _ in range(2):  # as where the first was cut short by XenStore's end
                pump.attach_ring(page, channel)
            await _play(pump, Backend(mapped, bound), steps)
            pump.detach_ring()
            for resource in (bound, mapped, channel, page):
                await in_thread(resource.close)


async def _play(pump: FrontendPump, backend: Backend, steps: list[Step]) -> None:
    end, other = socket.socketpair()
    pump.set_data_fd(other.detach())
    end.setblocking(False)
    exits: list[PumpExit] = []

    async def run() -> None:
        while not exits or not exits[-1].expected:
            exits.append(await pump.run())

    async with trio.SocketStream(trio.socket.from_stdlib_socket(end)) as qemu:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            for step in steps:
                header = HEADER.pack(step.tag, step.size, 0x17B)
                with trio.fail_after(60):
                    await qemu.send_all(header + bytes(step.size - 10))
                if step.reaches_the_page:
                    assert await backend.take() == (step.size, header)
                    backend.answer(step)
                length, code = await _answer(qemu)
                assert code == step.expected_code()
                assert length <= BUFFER_BYTES
            pump.request_stop(drain=True)
        stats = pump.stats()
    pump.set_data_fd(None)
    assert exits.count(PumpExit.BAD_RESPONSE) == sum(step.ends_the_run for step in steps)
    assert stats.commands == len(steps)
    assert not stats.in_flight
