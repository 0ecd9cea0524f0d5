"""Where the devices differ from QEMU's on purpose: each entry of `Quirk`, as shipped."""

from __future__ import annotations

import pytest

from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.device import (
    CancelCommand,
    RegisterDevice,
    ResetEstablishment,
    SubmitCommand,
)
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family

SHORT_ANSWERS = {Family.TPM_2_0: "80010000000a00000142", Family.TPM_1_2: "00c40000000a00000003"}
ACCESS, INT_ENABLE, INT_STATUS, STS, FIFO = 0x00, 0x08, 0x10, 0x18, 0x24
USE, SEIZE, RELINQUISH = 0x02, 0x08, 0x20
READY, GO, RETRY = 0x40, 0x20, 0x02
COMMAND = HEADER.pack(0x8001, 12, 0x144) + bytes(2)


def tis(**options: bool) -> TisDevice:
    return TisDevice(family=Family.TPM_2_0, buffer_bytes=4096, **options)


def crb() -> CrbDevice:
    return CrbDevice(family=Family.TPM_2_0, buffer_bytes=4096)


def send(device: TisDevice, locality: int, command: bytes = COMMAND) -> None:
    """Take the TPM, write a command and start it."""
    page = locality << 12
    device.write(page | ACCESS, 1, USE)
    device.write(page | STS, 1, READY)
    for byte in command:
        device.write(page | FIFO, 1, byte)
    device.write(page | STS, 1, GO)


def fetch(device: TisDevice, locality: int, count: int) -> bytes:
    return bytes(device.read(locality << 12 | FIFO, 1) for _ in range(count))


def answer(filler: int, size: int = 20) -> bytes:
    return HEADER.pack(0x8001, size, 0) + bytes([filler]) * (size - 10)


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("size", range(10))
def test_P1_tis_answers_a_short_command_itself(family: Family, size: int) -> None:
    device = TisDevice(family=family, buffer_bytes=4096)
    device.write(0x00, 1, 0x02)
    device.write(0x18, 1, 0x40)
    for byte in b"\x80\x01" + size.to_bytes(4, "big") + bytes(max(0, size - 6)):
        device.write(0x24, 1, byte)
    assert not device.read(0x18, 1) & 0x08
    device.write(0x18, 1, 0x20)
    assert device.take_outputs() == []
    assert not device.busy
    assert device.read(0x18, 1) == 0x90
    assert bytes(device.read(0x24, 1) for _ in range(10)).hex() == SHORT_ANSWERS[family]
    assert device.read(0x18, 1) == 0x80


@pytest.mark.parametrize("size", range(10))
def test_P1_crb_refuses_a_short_command_and_recovers(size: int) -> None:
    device = CrbDevice(family=Family.TPM_2_0, buffer_bytes=4096)
    device.write(0x08, 4, 1)
    device.write(0x40, 4, 1)
    device.write(0x80, 2, 0x0180)
    device.write(0x82, 4, int.from_bytes(size.to_bytes(4, "big"), "little"))
    device.write(0x4C, 4, 1)
    assert device.take_outputs() == []
    assert not device.busy
    assert device.read(0x4C, 4) == 0
    assert device.read(0x44, 4) & 1
    answer = b"".join(device.read(0x80 + at, 1).to_bytes() for at in range(10))
    assert answer.hex() == SHORT_ANSWERS[Family.TPM_2_0]
    device.write(0x40, 4, 1)
    assert device.read(0x44, 4) == 0


@pytest.mark.parametrize("kind", [TisDevice, CrbDevice])
def test_a_buffer_without_room_for_a_header_is_refused(kind: type[RegisterDevice]) -> None:
    with pytest.raises(ValueError, match="9 bytes"):
        kind(family=Family.TPM_2_0, buffer_bytes=9)


# Orphans.


def test_P5_an_orphans_answer_reaches_nobody() -> None:
    device = tis()
    send(device, 0)
    [first] = device.take_outputs()
    device.write(ACCESS, 1, RELINQUISH)
    assert device.take_outputs() == [CancelCommand()]
    assert device.busy
    device.write(0x1000 | ACCESS, 1, USE)
    device.write(0x1000 | STS, 1, READY)
    for byte in COMMAND[:5]:
        device.write(0x1000 | FIFO, 1, byte)
    assert isinstance(first, SubmitCommand)
    device.complete(answer(0xA0), ticket=first.ticket)
    for byte in COMMAND[5:]:
        device.write(0x1000 | FIFO, 1, byte)
    device.write(0x1000 | STS, 1, GO)
    [second] = device.take_outputs()
    assert second == SubmitCommand(1, COMMAND, first.ticket + 1)
    device.complete(answer(0xA1), ticket=second.ticket)
    assert fetch(device, 1, 20) == answer(0xA1)
    device.write(0x1000 | ACCESS, 1, RELINQUISH)
    device.write(ACCESS, 1, USE)
    assert device.read(STS, 1) == 0
    assert fetch(device, 0, 20) == b"\xff" * 20


def test_P5_a_command_waits_for_an_orphans_end() -> None:
    device = tis()
    send(device, 0)
    [first] = device.take_outputs()
    device.write(ACCESS, 1, RELINQUISH)
    send(device, 1)
    assert device.take_outputs() == [CancelCommand()]
    assert isinstance(first, SubmitCommand)
    device.complete(answer(0xA0), ticket=first.ticket)
    assert device.read(0x1000 | STS, 1) == 0x80
    assert device.take_outputs() == [SubmitCommand(1, COMMAND, first.ticket + 1)]
    assert device.busy


def test_a_command_that_waits_is_cancelled_here() -> None:
    device = tis()
    send(device, 0)
    device.write(ACCESS, 1, RELINQUISH)
    send(device, 1)
    device.take_outputs()
    device.write(0x1000 | STS, 4, 1 << 24)
    assert device.take_outputs() == []
    assert fetch(device, 1, 10).hex() == "80010000000a00000909"
    assert device.busy


def test_who_waited_for_an_orphans_abort_owns_the_tpm_at_once() -> None:
    device = tis()
    send(device, 0)
    device.write(0x2000 | ACCESS, 1, SEIZE)
    assert device.read(ACCESS, 1) & RELINQUISH
    device.write(ACCESS, 1, RELINQUISH)
    assert device.read(0x2000 | ACCESS, 1) & RELINQUISH
    assert not device.read(ACCESS, 1) & RELINQUISH


# A response in a buffer that another locality writes.


def test_a_response_is_gone_when_another_locality_writes_over_it() -> None:
    device = tis()
    send(device, 0)
    device.complete(answer(0xA0))
    device.write(0x2000 | ACCESS, 1, SEIZE)
    send(device, 2)
    device.complete(answer(0xA2))
    device.write(0x2000 | ACCESS, 1, RELINQUISH)
    device.write(ACCESS, 1, USE)
    assert device.read(STS, 1) == 0x80
    assert fetch(device, 0, 20) == b"\xff" * 20
    device.write(STS, 1, RETRY)
    assert fetch(device, 0, 20) == b"\xff" * 20
    device.write(STS, 1, READY)
    assert device.read(STS, 1) == 0x40


def test_a_response_that_nobody_wrote_over_is_still_there() -> None:
    device = tis()
    send(device, 0)
    device.complete(answer(0xA0))
    device.write(0x2000 | ACCESS, 1, SEIZE)
    device.write(0x2000 | ACCESS, 1, RELINQUISH)
    device.write(ACCESS, 1, USE)
    assert fetch(device, 0, 20) == answer(0xA0)


# Establishment, reset.


def test_the_establishment_is_reset_in_the_name_of_locality_3() -> None:
    device = tis(established=True)
    assert device.read(ACCESS, 1) == 0x80
    device.write(0x3000 | ACCESS, 1, USE)
    device.write(0x3000 | STS, 4, 1 << 25)
    assert device.take_outputs() == [ResetEstablishment(3)]
    assert device.read(ACCESS, 1) == 0x81


def test_a_reset_lowers_the_line_and_clears_the_buffer() -> None:
    device = tis()
    device.write(ACCESS, 1, USE)
    device.write(INT_ENABLE, 4, 0x80000080)
    device.write(STS, 1, READY)
    assert device.irq_level
    for byte in COMMAND[:6]:
        device.write(FIFO, 1, byte)
    device.reset(established=True)
    assert device.take_irq_levels() == [True, False]
    assert device.save()["buffer"].strip("0") == ""
    assert device.read(ACCESS, 1) == 0x80


@pytest.mark.parametrize("make", [tis, crb])
def test_P5_an_answer_that_a_reset_overtook_is_dropped(make: type[RegisterDevice]) -> None:
    device = make()  # type: ignore[call-arg]
    if isinstance(device, TisDevice):
        send(device, 0)
    else:
        device.write(0x08, 4, 1)
        for at, byte in enumerate(COMMAND, 0x80):
            device.write(at, 1, byte)
        device.write(0x4C, 4, 1)
    [command] = device.take_outputs()
    assert isinstance(command, SubmitCommand)
    device.reset()
    fresh = device.save()
    device.complete(answer(0xEE), ticket=command.ticket)
    device.complete(answer(0xEE))
    assert device.save() == fresh


def test_crb_zeroes_what_is_behind_a_response() -> None:
    device = crb()
    device.write(0x08, 4, 1)
    for at in range(0x80, 0x1000, 4):
        device.write(at, 4, 0x55555555)
    for at, byte in enumerate(COMMAND, 0x80):
        device.write(at, 1, byte)
    device.write(0x4C, 4, 1)
    device.complete(answer(0xA0))
    memory = b"".join(device.read(at, 1).to_bytes() for at in range(0x80, 0x1000))
    assert memory == answer(0xA0).ljust(0xF80, b"\0")


# Answers that are no responses.


@pytest.mark.parametrize(
    "junk",
    [b"", b"\x80\x01", answer(0, 20)[:-1], answer(0, 20) + b"x", answer(0, 4096) + b"x"],
    ids=["nothing", "half a header", "too short", "too long", "larger than the buffer"],
)
def test_P2_an_answer_that_is_no_response_becomes_a_failure(junk: bytes) -> None:
    device = tis()
    send(device, 0)
    device.complete(junk)
    assert device.read(STS, 4) == 0x04000A90
    assert fetch(device, 0, 10).hex() == "80010000000a00000101"
