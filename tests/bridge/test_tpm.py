"""Headers, refusals and deadlines."""

import pytest

from qemu_vtpm_bridge.bridge import tpm
from qemu_vtpm_bridge.bridge.tpm import Family, Header, Refusal


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("reason", Refusal)
def test_P1_every_refusal_is_a_well_formed_answer_of_its_family(
    family: Family, reason: Refusal
) -> None:
    answer = tpm.refusal(family, reason)
    header = Header.parse(answer)
    assert header.size_bytes == len(answer) == 10
    assert header.code != 0
    assert tpm.response_family(answer) is family


def test_the_answers_of_a_stopped_tpm_are_those_of_swtpm() -> None:
    assert tpm.refusal(Family.TPM_2_0, Refusal.FAILURE).hex() == "80010000000a00000101"
    assert tpm.refusal(Family.TPM_1_2, Refusal.FAILURE).hex() == "00c40000000a00000009"


@pytest.mark.parametrize("family", Family)
def test_the_bridges_own_commands_are_well_formed(family: Family) -> None:
    for command in (tpm.evidence_command(family), tpm.pcr_read_command(family, 9, 0x000B)):
        header = Header.parse(command)
        assert header.size_bytes == len(command)
        assert header.tag in tpm.COMMAND_TAGS


def test_P3_the_tags_of_the_vtpm_manager_are_not_commands() -> None:
    assert not {0x01C1, 0x01C2} & tpm.COMMAND_TAGS


def test_a_short_header_is_refused() -> None:
    with pytest.raises(ValueError, match="10 bytes"):
        Header.parse(bytes(9))
