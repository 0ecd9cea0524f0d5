"""What joins devices and pump, with this test as the pump at the socketpair's far end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qemu_vtpm_bridge.bridge.tpm import HEADER
from qemu_vtpm_bridge.errors import XenError
from tests.support.registers_rig import (
    ACCESS,
    BUFFER,
    COMMAND,
    FIFO,
    OTHER_RESPONSE,
    RESPONSE,
    START,
    STS,
    Rig,
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.near.close()
    made.pump.close()


def test_P1_no_access_waits_for_the_answer(rig: Rig) -> None:
    rig.tis_go(locality=2)
    assert rig.behind.locality == 2
    assert rig.sent() == COMMAND
    assert rig.mmio.waiting
    for _ in range(3):
        assert rig.mmio.read(rig.tis, 2 << 12 | STS, 1) & 0x10 == 0
    rig.pump.send(RESPONSE)
    assert rig.tis_response(2) == RESPONSE
    assert not rig.mmio.waiting


def test_an_answer_in_pieces_is_put_together(rig: Rig) -> None:
    rig.tis_go()
    for at in range(len(RESPONSE) - 1):
        rig.pump.send(RESPONSE[at : at + 1])
        assert rig.mmio.read(rig.tis, STS, 1) & 0x10 == 0
    rig.pump.send(RESPONSE[-1:])
    assert rig.tis_response() == RESPONSE


def test_both_devices_share_one_command_at_a_time(rig: Rig) -> None:
    rig.tis_go(locality=3)
    rig.crb_go()
    assert rig.sent() == COMMAND, "the second one waits for the first one's end"
    assert rig.behind.locality == 3
    rig.pump.send(RESPONSE)
    assert rig.mmio.read(rig.crb, START, 4) == 1
    assert rig.sent() == COMMAND
    assert rig.behind.locality == 0
    rig.pump.send(OTHER_RESPONSE)
    assert rig.mmio.read(rig.crb, START, 4) == 0
    assert bytes(rig.mmio.read(rig.crb, BUFFER + at, 1) for at in range(14)) == OTHER_RESPONSE
    assert rig.tis_response(3) == RESPONSE


def test_P5_an_answer_that_a_reset_overtook_reaches_nobody(rig: Rig) -> None:
    rig.tis_go()
    assert rig.sent() == COMMAND
    rig.mmio.reset()
    rig.tis_go()
    assert rig.sent() == b"", "the pump still owes the first answer"
    rig.pump.send(RESPONSE)
    assert rig.mmio.read(rig.tis, STS, 1) & 0x10 == 0
    assert rig.sent() == COMMAND
    rig.pump.send(OTHER_RESPONSE)
    assert rig.tis_response() == OTHER_RESPONSE


def test_a_cancel_reaches_the_command_that_its_device_submitted(rig: Rig) -> None:
    rig.crb_go()
    rig.tis_go()
    rig.mmio.write(rig.tis, STS, 4, 1 << 24)
    assert rig.behind.cancels == 0, "the command in flight is the other device's"
    assert rig.tis_response() == HEADER.pack(0x8001, 10, 0x909)
    rig.mmio.write(rig.crb, 0x48, 4, 1)
    assert rig.behind.cancels == 1


@pytest.mark.parametrize("claimed", [10, 11, 0x7000, 0x1000C])
def test_P3_a_command_whose_size_is_not_its_header_s_never_reaches_the_pump(
    rig: Rig, claimed: int
) -> None:
    command = HEADER.pack(0x8001, claimed, 0x17B) + b"\0\x10"
    if claimed < len(command):
        # Written in words, the last one brings a byte too many.
        rig.mmio.write(rig.tis, ACCESS, 1, 0x02)
        rig.mmio.write(rig.tis, STS, 1, 0x40)
        for at in range(0, 12, 4):
            word = int.from_bytes(command[at : at + 4], "little")
            rig.mmio.write(rig.tis, FIFO, 4, word)
    else:
        rig.tis_go(command + bytes(4096))
    rig.mmio.write(rig.tis, STS, 1, 0x20)
    assert rig.sent() == b""
    assert rig.tis_response() == HEADER.pack(0x8001, 10, 0x142)
    rig.mmio.write(rig.tis, STS, 1, 0x40)
    rig.tis_go()
    assert rig.sent() == COMMAND, "the next one goes through"


def test_the_establishment_flag_is_one_for_all_devices(rig: Rig) -> None:
    rig.mmio.reset()
    assert rig.mmio.read(rig.crb, 0, 1) & 1 == 0
    page = 3 << 12
    rig.mmio.write(rig.tis, page | ACCESS, 1, 0x02)
    rig.mmio.write(rig.tis, page | STS, 4, 1 << 25)
    assert rig.mmio.read(rig.crb, 0, 1) & 1 == 1


def test_a_pump_that_has_gone_is_an_error_and_no_hang(rig: Rig) -> None:
    rig.tis_go()
    rig.pump.close()
    with pytest.raises(XenError):
        rig.mmio.read(rig.tis, STS, 1)


def test_an_answer_nobody_asked_for_is_an_error(rig: Rig) -> None:
    rig.tis_go()
    rig.pump.send(RESPONSE + RESPONSE)
    with pytest.raises(XenError):
        rig.mmio.read(rig.tis, STS, 1)
