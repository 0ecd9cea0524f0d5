"""Commands without a whole header never leave a device (deviation from QEMU)."""

from __future__ import annotations

import pytest

from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.device import RegisterDevice
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import Family

SHORT_ANSWERS = {Family.TPM_2_0: "80010000000a00000142", Family.TPM_1_2: "00c40000000a00000003"}


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
