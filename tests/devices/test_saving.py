"""Saving and restoring the devices' state."""

from __future__ import annotations

from typing import Any

import pytest

from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.errors import LocalProtocolError
from tests.devices.test_deviations import answer, fetch, send


def tis(family: Family = Family.TPM_2_0, buffer_bytes: int = 4096) -> TisDevice:
    return TisDevice(family=family, buffer_bytes=buffer_bytes)


def test_a_half_read_response_goes_on_after_a_restore() -> None:
    device, other = tis(), tis()
    device.write(0x0, 1, 2)
    device.write(0x8, 4, 0x80000087)
    send(device, 0)
    device.complete(answer(0xA0))
    assert fetch(device, 0, 12) == answer(0xA0)[:12]
    device.take_outputs()
    other.restore(device.save())
    assert other.irq_level
    assert fetch(other, 0, 9) == answer(0xA0)[12:] + b"\xff"


def test_nothing_is_saved_while_a_command_runs() -> None:
    device = tis()
    send(device, 0)
    with pytest.raises(LocalProtocolError, match="wait for the command"):
        device.save()
    device.take_outputs()
    with pytest.raises(LocalProtocolError):
        device.save()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("device", "crb"),
        ("family", "1.2"),
        ("buffer_bytes", 8192),
        ("buffer_bytes", True),
        ("buffer", "00"),
        ("buffer", "no hex"),
        ("active", 5),
        ("active", "0"),
        ("offset", -1),
        ("response_of", 1),
        ("last_locality", 256),
        ("interface_id", None),
        ("localities", []),
        ("localities", [{}] * 5),
        ("localities", None),
    ],
)
def test_what_is_no_state_of_this_device_changes_nothing(key: str, value: Any) -> None:
    device = tis()
    device.write(0x1000, 1, 2)
    before = device.save()
    with pytest.raises(ValueError, match=r"."):
        device.restore({**before, key: value})
    assert device.save() == before
    del before[key]
    with pytest.raises(ValueError, match="not a state"):
        device.restore(before)


def test_a_state_with_a_running_command_is_refused() -> None:
    state = tis().save()
    state["localities"][2]["state"] = "EXECUTION"
    with pytest.raises(ValueError, match="runs"):
        tis().restore(state)


def test_a_device_with_a_smaller_buffer_refuses_the_state() -> None:
    state = tis(buffer_bytes=1024).save()
    tis(buffer_bytes=4096).restore(state)
    with pytest.raises(ValueError, match="1024"):
        tis(buffer_bytes=512).restore(state)


def test_crb_state_is_checked_too() -> None:
    device = CrbDevice(family=Family.TPM_2_0, buffer_bytes=4096)
    device.write(0x08, 4, 1)
    device.write(0x40, 4, 1)
    device.write(0x80, 8, 0x0102030405060708)
    other = CrbDevice(family=Family.TPM_2_0, buffer_bytes=4096)
    other.restore(device.save())
    assert [other.read(at, 4) for at in range(0, 0x90, 4)] == [
        device.read(at, 4) for at in range(0, 0x90, 4)
    ]
    with pytest.raises(ValueError, match="7"):
        other.restore({**device.save(), "ctrl_sts": 7})
