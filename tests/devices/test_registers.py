"""The notation, the data sheets, and the document made of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.crb_registers import CRB
from qemu_vtpm_bridge.bridge.device import RegisterDevice
from qemu_vtpm_bridge.bridge.registers import Access, Field, Register, RegisterMap, bit
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tis_registers import TIS
from qemu_vtpm_bridge.bridge.tis_states import TRANSITIONS, State
from qemu_vtpm_bridge.bridge.tpm import Family
from tools import registers_doc

RO = Access.READ_ONLY


def test_the_document_is_that_of_the_code() -> None:
    assert registers_doc.OUTPUT.read_text() == registers_doc.document(), "run `make docs`"


@pytest.mark.parametrize(("kind", "sheet"), [(TisDevice, TIS), (CrbDevice, CRB)])
def test_the_devices_show_the_reset_values_of_their_sheets(
    kind: type[RegisterDevice], sheet: RegisterMap
) -> None:
    device = kind(family=Family.TPM_2_0, buffer_bytes=4096)
    for locality in range(sheet.localities):
        for register in sheet:
            offset = locality * sheet.page_bytes + register.offset
            want = register.reset if register.others_read is None else register.others_read
            # ACCESS is one byte wide; its other lanes read 0.
            assert device.read(offset, 4) == want, register.name


@pytest.mark.parametrize(("kind", "sheet"), [(TisDevice, TIS), (CrbDevice, CRB)])
def test_a_register_that_is_read_only_is(kind: type[RegisterDevice], sheet: RegisterMap) -> None:
    device = kind(family=Family.TPM_2_0, buffer_bytes=4096)
    for register in sheet:
        if register.access is RO:
            before = device.read(register.offset, 4)
            for value in (0, 1, 2, 0xFFFFFFFF, 0x5A5A5A5A):
                device.write(register.offset, 4, value)
                assert device.read(register.offset, 4) == before, register.name


def test_every_register_and_field_says_what_it_means() -> None:
    for sheet in (TIS, CRB):
        for register in sheet:
            assert register.meaning.endswith("."), register.name
            assert all(field.meaning.endswith(".") for field in register.fields), register.name


def test_fields_that_overlap_are_refused() -> None:
    with pytest.raises(ValueError, match=r"X\.b"):
        Register("X", 0, RO, "Two fields.", (bit("a", 3, RO, "One."), Field("b", 4, 3, RO, "Two.")))
    with pytest.raises(ValueError, match="word"):
        Register("X", 2, RO, "Nowhere.")
    a, b = Register("A", 0, RO, "One.", last_offset=4), Register("B", 4, RO, "Two.")
    with pytest.raises(ValueError, match="B lies"):
        RegisterMap("x", "X", "Two registers.", (a, b))


def test_values_are_made_of_fields() -> None:
    sts = TIS["STS"]
    assert sts.value(burstCount=10, dataAvail=1, stsValid=1) == 0xA90
    assert sts.mask("dataAvail", "stsValid") == 0x90
    with pytest.raises(ValueError, match="16 bits"):
        sts.value(burstCount=0x10000)
    with pytest.raises(KeyError):
        sts.mask("nothing")
    assert sts.decode(0x01) == {
        **dict.fromkeys((field.name for field in sts.fields), 0),
        "reserved_0": 1,
    }


def test_every_state_can_be_left_and_reached() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State)
    assert {step.to for step in TRANSITIONS.values()} == set(State)


def test_a_bridge_that_serves_qemu_loads_no_device() -> None:
    """Memory: what only carries commands does not pay for registers."""
    program = (
        "import sys, qemu_vtpm_bridge.service, qemu_vtpm_bridge.commands;"
        "import qemu_vtpm_bridge.bridge.chardev as _;"
        "print([m for m in sys.modules if 'registers' in m or m.endswith(('.tis', '.crb'))])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
