"""A vfio-user connection, without sockets: replies, errnos, interrupts, hostile bytes."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge import vfio_user_frames as frames
from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.mmio import Mmio
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.bridge.vfio_user import IntxInput, IntxState, Session
from qemu_vtpm_bridge.bridge.vfio_user_frames import Command
from qemu_vtpm_bridge.errors import QemuProtocolError
from tests.support.registers_rig import Behind

TIS_BAR, CRB_BAR = 0, 1


class Rig:
    """A session of both devices, whose fds are only numbers."""

    def __init__(self) -> None:
        self.near, self.pump = socket.socketpair()
        kinds = (TisDevice, CrbDevice)
        devices = [kind(family=Family.TPM_2_0, buffer_bytes=3968) for kind in kinds]
        self.resets = 0
        self.mmio = Mmio(devices, Behind(), self.near)
        self.session = Session(self.mmio, self._reset)

    def _reset(self) -> None:
        self.resets += 1
        self.mmio.reset()

    def close(self) -> None:
        self.near.close()
        self.pump.close()

    def ask(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """Return the reply's body; an errno is raised."""
        reply = self.session.feed(frames.message(7, command, body), fds)
        header = frames.HEADER.parse(reply)
        assert (header.message_id, header.command, header.size) == (7, command, len(reply))
        assert header.flags & frames.TYPE_MASK == frames.TYPE_REPLY
        if header.flags & frames.ERROR:
            assert header.size == frames.HEADER_BYTES
            raise OSError(header.error, "reply")
        return reply[frames.HEADER_BYTES :]

    def access(
        self, command: int, region: int, offset: int, count: int, data: bytes = b""
    ) -> bytes:
        fields = {"offset": offset, "region": region, "count": count, "data": data}
        reply = frames.REGION_ACCESS.parse(self.ask(command, frames.REGION_ACCESS.build(fields)))
        assert (reply.offset, reply.region, reply.count) == (offset, region, count)
        return bytes(reply.data)

    def read(self, region: int, offset: int, count: int) -> int:
        data = self.access(Command.REGION_READ, region, offset, count)
        assert len(data) == count
        return int.from_bytes(data, "little")

    def write(self, region: int, offset: int, count: int, value: int) -> None:
        data = value.to_bytes(count, "little")
        assert self.access(Command.REGION_WRITE, region, offset, count, data) == b""

    def set_irqs(
        self, flags: int, index: int = 0, count: int = 1, fds: tuple[int, ...] = ()
    ) -> None:
        fields = {
            "argsz": 20,
            "flags": flags,
            "index": index,
            "start": 0,
            "count": count,
            "data": b"",
        }
        assert self.ask(Command.DEVICE_SET_IRQS, frames.IRQ_SET.build(fields), fds) == b""

    def take_signals(self) -> int:
        signals, self.session.intx.signals = self.session.intx.signals, 0
        return signals


@pytest.fixture
def new() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def rig(new: Rig) -> Rig:
    new.ask(Command.VERSION, frames.version_body())
    return new


def errno_of(call: object, *args: object) -> int:
    with pytest.raises(OSError, match="reply") as caught:
        call(*args)  # type: ignore[operator]
    assert caught.value.errno is not None
    return caught.value.errno


def test_the_version_comes_first_and_once(new: Rig) -> None:
    assert errno_of(new.ask, Command.DEVICE_RESET) == errno.EINVAL
    assert errno_of(new.read, TIS_BAR, 0, 1) == errno.EINVAL
    other = frames.VERSION.build({"major": 1, "minor": 0, "text": b""})
    assert errno_of(new.ask, Command.VERSION, other) == errno.EPROTONOSUPPORT
    reply = frames.VERSION.parse(new.ask(Command.VERSION, frames.version_body()))
    assert (reply.major, reply.minor) == (0, 0), "QEMU refuses a higher minor number"
    assert reply.text.endswith(b"\0")
    assert json.loads(reply.text[:-1])["capabilities"]["max_msg_fds"] >= 1
    assert errno_of(new.ask, Command.VERSION, frames.version_body()) == errno.EINVAL
    assert new.resets == 0


def test_a_pci_function_whose_bars_are_the_windows(rig: Rig) -> None:
    body = frames.DEVICE_INFO.build({"argsz": 16, "flags": 0, "regions": 0, "irqs": 0})
    info = frames.DEVICE_INFO.parse(rig.ask(Command.DEVICE_GET_INFO, body))
    assert info.flags == frames.DEVICE_FLAGS_PCI | frames.DEVICE_FLAGS_RESET
    sizes = []
    for index in range(info.regions):
        fields = dict.fromkeys(("flags", "capability_offset", "size", "offset"), 0)
        asked = frames.REGION_INFO.build({"argsz": 32, "index": index, **fields})
        sizes.append(frames.REGION_INFO.parse(rig.ask(Command.DEVICE_GET_REGION_INFO, asked)).size)
    assert sizes == [0x8000, 0x1000, 0, 0, 0, 0, 0, 256, 0]
    irqs = []
    for index in range(info.irqs):
        asked = frames.IRQ_INFO.build({"argsz": 16, "flags": 0, "index": index, "count": 0})
        irqs.append(frames.IRQ_INFO.parse(rig.ask(Command.DEVICE_GET_IRQ_INFO, asked)).count)
    assert irqs == [1, 0, 0, 0, 0]
    asked = frames.REGION_IO_FDS.build({"argsz": 16, "flags": 0, "index": 0, "count": 0})
    fds = frames.REGION_IO_FDS.parse(rig.ask(Command.DEVICE_GET_REGION_IO_FDS, asked))
    assert (fds.index, fds.count) == (0, 0)


def test_configuration_space_tells_the_bars_sizes(rig: Rig) -> None:
    config = frames.CONFIG_REGION
    assert rig.read(config, 0x0A, 2) == 0x1080
    for bar, size in ((0x10, 0x8000), (0x14, 0x1000), (0x18, 0)):
        rig.write(config, bar, 4, 0xFFFFFFFF)
        assert rig.read(config, bar, 4) == (-size & 0xFFFFFFFF)
    rig.write(config, 0x10, 4, 0xFEBF0000)
    rig.write(config, 0x04, 2, 0xFFFF)
    assert rig.read(config, 0x04, 2) & 0x0003 == 0x0002, "memory, but no I/O"
    rig.write(config, 0x00, 4, 0)
    assert rig.read(config, 0x00, 4) == 0x74701234
    assert len(rig.access(Command.REGION_READ, config, 0, 256)) == 256
    rig.ask(Command.DEVICE_RESET)
    assert rig.resets == 1
    assert (rig.read(config, 0x10, 4), rig.read(config, 0x04, 2)) == (0, 0)


def test_accesses_reach_the_registers_of_both_devices(rig: Rig) -> None:
    assert rig.read(TIS_BAR, 0xF00, 4) == 0x00011014
    assert rig.read(CRB_BAR, 0x34, 4) == 0x00001014
    rig.write(TIS_BAR, 0x2000, 1, 0x02)
    assert rig.read(TIS_BAR, 0x2000, 1) & 0x20
    rig.write(CRB_BAR, 0x80, 8, 0x1122334455667788)
    assert rig.read(CRB_BAR, 0x80, 8) == 0x1122334455667788
    assert rig.read(CRB_BAR, 0x83, 3) == 0x334455
    rig.ask(Command.DEVICE_RESET)
    assert rig.read(TIS_BAR, 0x2000, 1) & 0x20 == 0


@given(
    st.sampled_from([Command.REGION_READ, Command.REGION_WRITE]),
    st.one_of(st.integers(0, 9), st.integers(0, 0xFFFFFFFF)),
    st.one_of(st.integers(0, 0x8010), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 16), st.integers(0, 0xFFFFFFFF)),
)
@settings(max_examples=400)
def test_an_access_is_within_its_region_or_an_errno(
    command: int, region: int, offset: int, count: int
) -> None:
    rig = Rig()
    rig.ask(Command.VERSION, frames.version_body())
    sizes = {0: 0x8000, 1: 0x1000, frames.CONFIG_REGION: 256}
    most = 256 if region == frames.CONFIG_REGION else 8
    fits = 0 < count <= most and offset + count <= sizes.get(region, 0)
    data = b"" if command == Command.REGION_READ else bytes(min(count, 300))
    if fits:
        rig.access(command, region, offset, count, data)
    else:
        assert errno_of(rig.access, command, region, offset, count, data) == errno.EINVAL
    rig.close()


def test_the_fast_way_and_the_long_one_answer_alike(rig: Rig) -> None:
    other = Rig()
    other.ask(Command.VERSION, frames.version_body())
    accesses = [
        (Command.REGION_WRITE, 0, 0x00, b"\2"),
        (Command.REGION_READ, 0, 0x00, 1),
        (Command.REGION_READ, 0, 0xF00, 4),
        (Command.REGION_WRITE, 1, 0x80, b"abcdefgh"),
        (Command.REGION_READ, 1, 0x7E, 8),
        (Command.REGION_READ, 0, 0x7FFD, 3),
    ]
    for command, region, offset, what in accesses:
        data = what if isinstance(what, bytes) else b""
        count = len(what) if isinstance(what, bytes) else what
        fields = {"offset": offset, "region": region, "count": count, "data": data}
        raw = frames.message(9, command, frames.REGION_ACCESS.build(fields))
        at_once = rig.session.feed(raw)
        # In two pieces, a frame cannot take the fast way.
        assert other.session.feed(raw[:20]) == b""
        assert other.session.feed(raw[20:]) == at_once
    other.close()


def test_many_frames_in_one_piece_get_their_replies_in_order(rig: Rig) -> None:
    fields = {"offset": 0xF00, "region": 0, "count": 4, "data": b""}
    body = frames.REGION_ACCESS.build(fields)
    raw = b"".join(frames.message(n, Command.REGION_READ, body) for n in range(20))
    silent = frames.message(99, Command.REGION_READ, body, flags=frames.NO_REPLY)
    replies = rig.session.feed(silent + raw + silent[:5])
    size = frames.ACCESS_BYTES + 4
    ids = [
        frames.HEADER.parse(replies[at : at + 16]).message_id for at in range(0, len(replies), size)
    ]
    assert ids == list(range(20))


def test_guest_memory_is_never_mapped(rig: Rig) -> None:
    fields = {"argsz": 32, "flags": 3, "offset": 0, "address": 0, "size": 1 << 28}
    assert rig.ask(Command.DMA_MAP, frames.DMA_MAP.build(fields), (101,)) == b""
    assert rig.session.unwanted_fds == [101]
    fields = {"argsz": 24, "flags": 0, "address": 0, "size": 1 << 28}
    body = frames.DMA_UNMAP.build(fields)
    assert rig.ask(Command.DMA_UNMAP, body) == body
    assert errno_of(rig.ask, Command.DMA_MAP, b"short", (102,)) == errno.EINVAL
    assert rig.session.unwanted_fds == [101, 102]


@pytest.mark.parametrize(
    "command", [Command.DMA_READ, Command.DMA_WRITE, Command.DIRTY_PAGES, 15, 16, 0, 0xFFFF]
)
def test_what_is_not_served_gets_an_errno(rig: Rig, command: int) -> None:
    assert errno_of(rig.ask, command, bytes(40)) == errno.EOPNOTSUPP


@pytest.mark.parametrize(
    "raw",
    [
        frames.HEADER_STRUCT.pack(1, Command.VERSION, 15, 0, 0),
        frames.HEADER_STRUCT.pack(1, Command.VERSION, 0xFFFFFFFF, 0, 0),
        frames.HEADER_STRUCT.pack(1, Command.DMA_READ, 16, frames.TYPE_REPLY, 0),
    ],
)
def test_a_stream_that_cannot_be_followed_ends(rig: Rig, raw: bytes) -> None:
    with pytest.raises(QemuProtocolError):
        rig.session.feed(raw)


def test_descriptors_that_nothing_asked_for_do_not_pile_up(rig: Rig) -> None:
    rig.session.feed(b"\0", (1, 2, 3, 4, 5, 6, 7, 8))
    rig.session.feed(b"\0", (9, 10, 11, 12, 13, 14, 15, 16))
    with pytest.raises(QemuProtocolError):
        rig.session.feed(b"\0", (17,))
    assert len(rig.session.close()) == 17


# Interrupts: a locality change of TIS raises the line, writing INT_STATUS lowers it.

EVENTFD = frames.IRQ_SET_DATA_EVENTFD | frames.IRQ_SET_ACTION_TRIGGER
UNMASK = frames.IRQ_SET_DATA_NONE | frames.IRQ_SET_ACTION_UNMASK
MASK = frames.IRQ_SET_DATA_NONE | frames.IRQ_SET_ACTION_MASK
DISABLE = frames.IRQ_SET_DATA_NONE | frames.IRQ_SET_ACTION_TRIGGER


def enable_commands_irq(rig: Rig) -> None:
    rig.write(TIS_BAR, 0x00, 1, 0x02)
    rig.write(TIS_BAR, 0x08, 4, 0x80000080)


def raise_line(rig: Rig) -> None:
    rig.write(TIS_BAR, 0x18, 1, 0x40)


def lower_line(rig: Rig) -> None:
    rig.write(TIS_BAR, 0x10, 4, 0x80)


def test_a_level_is_signalled_once_until_it_is_unmasked(rig: Rig) -> None:
    enable_commands_irq(rig)
    rig.set_irqs(EVENTFD, fds=(50,))
    assert rig.session.intx.eventfd == 50
    assert rig.take_signals() == 0
    raise_line(rig)
    assert rig.read(frames.CONFIG_REGION, 0x06, 1) & 0x08
    rig.read(TIS_BAR, 0x18, 4)
    assert rig.take_signals() == 1
    rig.set_irqs(UNMASK)
    assert rig.take_signals() == 1, "the line is still high"
    lower_line(rig)
    rig.set_irqs(UNMASK)
    assert rig.take_signals() == 0
    assert rig.read(frames.CONFIG_REGION, 0x06, 1) & 0x08 == 0


def test_a_masked_or_disabled_interrupt_is_kept_for_later(rig: Rig) -> None:
    enable_commands_irq(rig)
    rig.set_irqs(EVENTFD, fds=(50,))
    rig.set_irqs(MASK)
    raise_line(rig)
    assert rig.take_signals() == 0
    rig.write(frames.CONFIG_REGION, 0x04, 2, 0x0400)
    rig.set_irqs(UNMASK)
    assert rig.take_signals() == 0, "the guest's Interrupt Disable holds it"
    rig.write(frames.CONFIG_REGION, 0x04, 2, 0)
    assert rig.take_signals() == 1


def test_an_eventfd_is_given_back_when_it_is_replaced_or_disabled(rig: Rig) -> None:
    rig.set_irqs(EVENTFD, fds=(50,))
    rig.set_irqs(EVENTFD, fds=(51,))
    assert rig.session.unwanted_fds == [50]
    rig.set_irqs(DISABLE)
    assert rig.take_signals() == 1, "one that is not asked to end is a test of the eventfd"
    rig.set_irqs(DISABLE, count=0)
    assert rig.session.unwanted_fds == [50, 51]
    assert rig.session.intx.state is IntxState.UNARMED
    for index in range(1, frames.IRQ_COUNT):
        rig.set_irqs(DISABLE, index=index, count=0)
    assert rig.session.close() == [50, 51]


@pytest.mark.parametrize(
    ("flags", "index", "count", "number"),
    [
        (MASK, 0, 1, errno.EINVAL),
        (EVENTFD, 0, 2, errno.EINVAL),
        (EVENTFD, 1, 1, errno.EINVAL),
        (EVENTFD, 5, 0, errno.EINVAL),
        (frames.IRQ_SET_DATA_EVENTFD | frames.IRQ_SET_ACTION_UNMASK, 0, 1, errno.EOPNOTSUPP),
        (EVENTFD | frames.IRQ_SET_ACTION_MASK, 0, 1, errno.EOPNOTSUPP),
        (1 << 9, 0, 1, errno.EINVAL),
        (0, 0, 1, errno.EOPNOTSUPP),
    ],
)
def test_other_wishes_about_interrupts_get_an_errno(
    rig: Rig, flags: int, index: int, count: int, number: int
) -> None:
    assert errno_of(rig.set_irqs, flags, index, count, (60,)) == number
    assert rig.session.unwanted_fds == [60]


def test_every_pair_of_the_interrupt_s_table_leads_to_a_state() -> None:
    from qemu_vtpm_bridge.bridge.vfio_user import INTX_TRANSITIONS

    missing = {(state, fact) for state in IntxState for fact in IntxInput} - set(INTX_TRANSITIONS)
    assert missing == {
        (IntxState.UNARMED, IntxInput.MASK),
        (IntxState.UNARMED, IntxInput.UNMASK),
        (IntxState.UNARMED, IntxInput.SIGNALLED),
        (IntxState.MASKED, IntxInput.SIGNALLED),
    }


@given(st.lists(st.tuples(st.binary(max_size=64), st.integers(0, 2)), max_size=8), st.booleans())
@settings(max_examples=300)
def test_any_bytes_bring_replies_or_the_end(pieces: list[tuple[bytes, int]], greeted: bool) -> None:
    rig = Rig()
    if greeted:
        rig.ask(Command.VERSION, frames.version_body())
    given_fds, number = [], 100
    try:
        for raw, count in pieces:
            fds = tuple(range(number, number + count))
            number += count
            given_fds += fds
            replies = rig.session.feed(raw, fds)
            while replies:
                header = frames.HEADER.parse(replies)
                assert header.flags & frames.TYPE_MASK == frames.TYPE_REPLY
                replies = replies[header.size :]
    except QemuProtocolError:
        pass
    finally:
        assert sorted(rig.session.close()) == given_fds, "no descriptor is lost"
        rig.close()
