"""The tables of names: anchors that a slip in one line would move."""

from __future__ import annotations

import pytest

from qemu_vtpm_bridge.names import (
    TPM_CC,
    TPM_ORD,
    TPM_RC_1_2,
    ordinal_name,
    response_code_name,
)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0, "TPM_SUCCESS"),
        (9, "TPM_FAIL"),
        (0x1E, "TPM_BADTAG"),
        (0x26, "TPM_INVALID_POSTINIT"),
        (0x3D, "TPM_BAD_LOCALITY"),
        (0x4F, "TPM_OWNER_CONTROL"),
        (0x5F, "TPM_MA_AUTHORITY"),
        (0x800, "TPM_RETRY"),
        (0x60, "0x60"),
    ],
)
def test_return_codes_of_tpm_1_2(code: int, name: str) -> None:
    assert response_code_name(code, tpm_1_2=True) == name


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0, "TPM_RC_SUCCESS"),
        (0x100, "TPM_RC_INITIALIZE"),
        (0x101, "TPM_RC_FAILURE"),
        (0x142, "TPM_RC_COMMAND_SIZE"),
        (0x922, "TPM_RC_RETRY"),
        (0x98E, "TPM_RC_AUTH_FAIL (session 1)"),
        (0x18B, "TPM_RC_HANDLE (handle 1)"),
        (0x1C4, "TPM_RC_VALUE (parameter 1)"),
        (0x12345678, "0x12345678"),
    ],
)
def test_response_codes_of_tpm_2_0(code: int, name: str) -> None:
    assert response_code_name(code) == name


def test_ordinals_of_both_families() -> None:
    assert ordinal_name(0x182) == "TPM2_PCR_Extend"
    assert ordinal_name(0x14) == "TPM_Extend"
    assert ordinal_name(0x4000000A) == "TSC_PhysicalPresence"
    assert ordinal_name(0xABCDEF) == "0x00abcdef"
    assert not set(TPM_CC) & set(TPM_ORD)
    for table in (TPM_CC, TPM_ORD, TPM_RC_1_2):
        assert len(set(table.values())) == len(table)


@pytest.mark.parametrize(
    ("ordinal", "name"),
    [
        (0x1B, "TPM_CMK_CreateBlob"),
        (0x24, "TPM_CMK_ConvertMigration"),
        (0xDB, "TPM_Delegate_ReadTable"),
        (0xF1, "TPM_GetTicks"),
        (0xF2, "TPM_TickStampBlob"),
    ],
)
def test_ordinals_of_tpm_1_2_that_are_easily_mixed_up(ordinal: int, name: str) -> None:
    assert ordinal_name(ordinal) == name
