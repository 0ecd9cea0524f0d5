"""P7, end to end: what CMD_INIT means, with a real swtpm behind a real page."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.bridge.control import Command
from qemu_vtpm_bridge.bridge.power import ResetPolicy
from qemu_vtpm_bridge.bridge.power import State as Power
from qemu_vtpm_bridge.bridge.tpm import TPM_FAIL, TPM_RC_FAILURE, TPM_RC_INITIALIZE, Family
from tests.support.chain import PATHS, VTPM, running_chain
from tests.support.swtpm_client import (
    GET_RANDOM,
    PCR_EXTEND_7,
    PCR_READ_7,
    STARTUP,
    ZERO_PCR,
)
from tests.support.wait import wait_until

pytestmark = pytest.mark.timeout(180)

FAMILIES = list(Family)


@pytest.mark.parametrize("family", FAMILIES)
async def test_P7_a_new_tpm_is_clean_and_serves_after_init(tmp_path: Path, family: Family) -> None:
    async with running_chain(tmp_path, family=family) as chain:
        client = await chain.powered_on()
        assert chain.bridge.power.state is Power.ON
        assert chain.bridge.frontend.connections == 1
        client.close()


async def test_P7_a_reset_guest_gets_a_tpm_that_was_power_cycled(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        assert await client.pcr_7() != ZERO_PCR
        assert await client.stop() == 0
        assert await client.init() == 0
        # The command is held until the evidence is there; the TPM then wants Startup.
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        await client.startup()
        assert await client.pcr_7() == ZERO_PCR
        assert chain.bridge.frontend.connections == 2
        client.close()


@pytest.mark.parametrize("family", FAMILIES)
async def test_P7_reset_of_both_families_brings_the_tpm_back_to_wanting_startup(
    tmp_path: Path, family: Family
) -> None:
    read = {
        Family.TPM_2_0: PCR_READ_7,
        Family.TPM_1_2: bytes.fromhex("00c10000000e0000001500000007"),
    }[family]
    extend = {
        Family.TPM_2_0: PCR_EXTEND_7,
        Family.TPM_1_2: bytes.fromhex("00c1000000220000001400000007" + "5a" * 20),
    }[family]
    wants = {Family.TPM_2_0: TPM_RC_INITIALIZE, Family.TPM_1_2: 0x26}[family]
    async with running_chain(tmp_path, family=family) as chain:
        client = await chain.powered_on()
        assert await client.code(extend) == 0
        assert await client.init() == 0
        assert await client.code(read) == wants
        await client.startup(family)
        assert not (await client.tpm(read))[-20:].strip(b"\0")
        client.close()


async def test_P7_init_twice_in_a_row_as_seabios_does_is_one_clean_tpm(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        for _ in range(2):
            assert await client.stop() == 0
            assert await client.init() == 0
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        client.close()


async def test_P7_a_tpm_that_cannot_be_cycled_fails_closed_until_the_next_init(
    tmp_path: Path,
) -> None:
    # Domain 0 is not among those that may ask, so `feature-reset` is not offered.
    config = {"trusted_reset_domids": frozenset[int]()}
    async with running_chain(tmp_path, vtpm_config=config) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        assert await client.init() == 0
        await chain.until(Power.FAILED)
        for command in (STARTUP[Family.TPM_2_0], PCR_READ_7, GET_RANDOM):
            assert await client.code(command) == TPM_RC_FAILURE
        assert "does not offer to power-cycle" in chain.bridge.last_error
        # The evidence of another power cycle opens it again.
        assert chain.domain is not None
        assert await chain.domain.power_cycle()
        assert await client.init() == 0
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        client.close()


async def test_P7_stop_guest_refuses_init_so_that_qemu_exits(tmp_path: Path) -> None:
    config = {"trusted_reset_domids": frozenset[int]()}
    async with running_chain(
        tmp_path, vtpm_config=config, stop_guest_on_reset_failure=True
    ) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        assert await client.init() == TPM_FAIL
        client.close()


async def test_keep_goes_on_with_the_old_pcrs_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_chain(tmp_path, reset=ResetPolicy.KEEP) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        before = await client.pcr_7()
        assert await client.init() == 0
        assert await client.pcr_7() == before != ZERO_PCR
        assert "PCRs carry over" in caplog.text
        client.close()


async def test_P7_restart_domain_runs_the_command_and_waits_for_the_new_backend(
    tmp_path: Path,
) -> None:
    asked = tmp_path / "asked"
    config = {"trusted_reset_domids": frozenset[int]()}
    async with running_chain(
        tmp_path,
        vtpm_config=config,
        reset=ResetPolicy.RESTART_DOMAIN,
        restart_command=("touch", str(asked)),
    ) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        assert await client.init() == 0
        await wait_until(asked.exists)
        # What a toolstack does: the domain goes, with its entries, and another one comes.
        await _recreate_vtpm_domain(chain)
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        assert chain.bridge.frontend.connections == 2
        client.close()


async def _recreate_vtpm_domain(chain) -> None:  # type: ignore[no-untyped-def]
    from qemu_vtpm_bridge.toolstack.attach import attach
    from qemu_vtpm_bridge.xen.store import open_store
    from tests.support.world import store_socket

    await chain.end_vtpm()
    await chain.world.destroy_domain(VTPM)
    await chain.world.create_domain(VTPM, "vtpm")
    async with open_store(store_socket(chain.world)) as store:
        await attach(store, PATHS)
    await chain.start_vtpm()


async def test_P7_a_tpm_of_the_other_family_is_refused_with_a_clear_error(tmp_path: Path) -> None:
    async with running_chain(tmp_path, vtpm=False) as chain:
        chain.family = Family.TPM_1_2
        await chain.start_vtpm()
        chain.family = Family.TPM_2_0
        client = await chain.connect()
        await client.power_on()
        await chain.until(Power.FAILED)
        assert await client.code(STARTUP[Family.TPM_2_0]) == TPM_RC_FAILURE
        assert "not TPM 2.0" in chain.bridge.last_error
        client.close()


async def test_init_is_answered_while_the_vtpm_domain_has_not_booted(tmp_path: Path) -> None:
    async with running_chain(tmp_path, vtpm=False) as chain:
        client = await chain.connect()
        await client.power_on()
        assert chain.bridge.power.state is Power.WAIT_RING
        await client.write(STARTUP[Family.TPM_2_0])
        await chain.start_vtpm()
        # Held meanwhile, answered by the TPM.
        response = await client.response()
        assert response[6:10] == bytes(4)
        client.close()


async def test_P1_a_held_channel_has_an_end(tmp_path: Path) -> None:
    async with running_chain(tmp_path, vtpm=False, reset_deadline_s=0.5) as chain:
        client = await chain.connect()
        await client.power_on()
        assert await client.code(STARTUP[Family.TPM_2_0]) == TPM_RC_FAILURE
        assert chain.bridge.power.state is Power.FAILED
        # A vTPM domain that comes now does not end the refusal: the firmware has passed.
        await chain.start_vtpm()
        await chain.bridge.frontend.wait_running()
        assert await client.code(GET_RANDOM) == TPM_RC_FAILURE
        client.close()


async def test_P7_late_evidence_is_not_taken_for_a_later_init(tmp_path: Path) -> None:
    """The answer about one boot must not open the channel of the next."""
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        os.kill(chain.swtpm_pid, signal.SIGSTOP)
        try:
            assert await client.init() == 0  # its evidence command waits in swtpm
            await wait_until(lambda: chain.bridge.power.state is Power.EVIDENCE)
            assert await client.stop() == 0
            assert await client.init() == 0
        finally:
            os.kill(chain.swtpm_pid, signal.SIGCONT)
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        client.close()


async def test_P7_resume_goes_on_only_where_empty_blobs_are_configured(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        assert await client.init(flags=1) == 0
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        client.close()


async def test_a_guest_that_shut_its_tpm_down_is_not_given_a_second_shutdown(
    tmp_path: Path,
) -> None:
    """TPM2_Shutdown(STATE) on the way to sleep must stand: Startup(STATE) brings PCRs back."""
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        value = await client.pcr_7()
        assert await client.code(bytes.fromhex("80010000000c000001450001")) == 0
        assert await client.init() == 0
        assert await client.code(bytes.fromhex("80010000000c000001440001")) == 0
        assert await client.pcr_7() == value
        client.close()


async def test_commands_are_refused_before_init_and_after_stop(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.connect()
        assert await client.set_datafd() == 0
        # QEMU's probe: answered here, in the family's words, before anything else.
        assert (await client.tpm(bytes.fromhex("80010000000a00000181"))).hex() == (
            "80010000000a00000101"
        )
        assert await client.init() == 0
        await client.startup()
        assert await client.stop() == 0
        assert await client.code(GET_RANDOM) == TPM_RC_FAILURE
        answer = await client.ask(Command.CMD_GET_TPMESTABLISHED, reply_bytes=8)
        assert answer == struct.pack(">II", 0x0A, 0)
        client.close()


async def test_P7_a_vtpm_domain_that_dies_in_the_middle_of_a_reset_fails_closed_or_recovers(
    tmp_path: Path,
) -> None:
    async with running_chain(tmp_path, reset_deadline_s=30) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        os.kill(chain.swtpm_pid, signal.SIGKILL)
        assert await client.init() == 0
        with trio.fail_after(60):
            code = await client.code(PCR_READ_7)
        # Whichever it was, never the PCR of the earlier boot.
        assert code in (TPM_RC_INITIALIZE, TPM_RC_FAILURE)
        client.close()
