"""The TPM of a vTPM domain: real swtpm, its state directory, its power."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.vtpm.child import EngineError, EngineRefusal, SwtpmChild
from qemu_vtpm_bridge.vtpm.engine import Resumption, SwtpmEngine
from qemu_vtpm_bridge.vtpm.ordinals import (
    HEADER,
    Complaint,
    TpmFamily,
    error_header,
    mark_command,
    shutdown_command,
    startup_command,
)

pytestmark = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")

FAMILIES = list(TpmFamily)
WANTS_STARTUP = {TpmFamily.TPM_2_0: 0x100, TpmFamily.TPM_1_2: 0x26}
ZERO_PCR = {TpmFamily.TPM_2_0: bytes(32), TpmFamily.TPM_1_2: bytes(20)}


def pcr_read(family: TpmFamily, pcr: int) -> bytes:
    if family is TpmFamily.TPM_1_2:
        return HEADER.pack(0xC1, 14, 0x15) + struct.pack(">I", pcr)
    selection = bytearray(3)
    selection[pcr // 8] = 1 << pcr % 8
    return HEADER.pack(0x8001, 20, 0x17E) + struct.pack(">IHB", 1, 0x0B, 3) + selection


async def exchange(child: SwtpmChild, command: bytes) -> bytes:
    """Run a command on the data channel as the pump would."""
    child.data.send(command)
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(child.data)
    return child.data.recv(4096)


async def pcr_value(engine: SwtpmEngine, family: TpmFamily, pcr: int) -> bytes:
    answer = await exchange(engine.child, pcr_read(family, pcr))
    assert HEADER.unpack_from(answer)[2] == 0
    return answer[-len(ZERO_PCR[family]) :]


async def response_code(engine: SwtpmEngine, command: bytes) -> int:
    return int(HEADER.unpack_from(await exchange(engine.child, command))[2])


@asynccontextmanager
async def opened(
    state_dir: Path, family: TpmFamily, life: list[str], program: str = "swtpm"
) -> AsyncIterator[SwtpmEngine]:
    """An engine with its directory locked; `life` holds the domain's word as XenStore would."""
    engine = SwtpmEngine(state_dir, family, program)
    try:
        await engine.open()
        life[:] = [await engine.enter_life(life)]
        yield engine
    finally:
        await engine.close()


async def used(engine: SwtpmEngine, family: TpmFamily) -> bytes:
    """Start the TPM, change PCR 7, return its value."""
    await engine.about_to_change()
    assert await response_code(engine, startup_command(family)) == 0
    assert await response_code(engine, mark_command(family, 7)) == 0
    value = await pcr_value(engine, family, 7)
    assert value != ZERO_PCR[family]
    return value


@pytest.mark.parametrize("family", FAMILIES)
async def test_an_empty_directory_gives_a_usable_tpm(tmp_path: Path, family: TpmFamily) -> None:
    state_dir = tmp_path / "new" / "state"
    async with opened(state_dir, family, []) as engine:
        assert await engine.start() is Resumption.WAITS_FOR_STARTUP
        assert state_dir.stat().st_mode & 0o777 == 0o700
        assert await response_code(engine, pcr_read(family, 7)) == WANTS_STARTUP[family]
        await used(engine, family)


@pytest.mark.parametrize("family", FAMILIES)
async def test_stored_state_survives_kill_9_of_swtpm(tmp_path: Path, family: TpmFamily) -> None:
    async with opened(tmp_path, family, []) as engine:
        await engine.start()
        value = await used(engine, family)
        await engine.store_volatile()
        os.kill(engine.child.pid, signal.SIGKILL)
        await engine.child.wait()
        await engine.kill()
        assert await engine.start() is Resumption.CONTINUES
        assert await pcr_value(engine, family, 7) == value


@pytest.mark.parametrize("family", FAMILIES)
async def test_P7_lost_state_is_marked_and_never_rolls_back(
    tmp_path: Path, family: TpmFamily
) -> None:
    async with opened(tmp_path, family, []) as engine:
        await engine.start()
        value = await used(engine, family)
        await engine.store_volatile()
        await engine.about_to_change()
        assert await response_code(engine, mark_command(family, 7)) == 0
        newer = await pcr_value(engine, family, 7)
        await engine.kill()
        assert await engine.start() is Resumption.MARKED
        # A guest can neither start this TPM again nor find PCRs to measure a boot into.
        assert await response_code(engine, startup_command(family)) == WANTS_STARTUP[family]
        values = [await pcr_value(engine, family, pcr) for pcr in range(16)]
        assert ZERO_PCR[family] not in values
        assert values[7] not in (value, newer) or len(set(values)) == 1
        assert engine.marked
        await engine.power_cycle(shutdown_first=True)
        assert not engine.marked
        assert await response_code(engine, startup_command(family)) == 0
        assert await pcr_value(engine, family, 7) == ZERO_PCR[family]


@pytest.mark.parametrize("family", FAMILIES)
async def test_P7_a_power_cycle_drops_the_stored_state(tmp_path: Path, family: TpmFamily) -> None:
    async with opened(tmp_path, family, []) as engine:
        await engine.start()
        await used(engine, family)
        await engine.store_volatile()
        await engine.power_cycle(shutdown_first=True)
        assert await response_code(engine, pcr_read(family, 7)) == WANTS_STARTUP[family]
        await engine.kill()
        assert await engine.start() is Resumption.WAITS_FOR_STARTUP


async def test_a_power_cycle_leaves_the_guest_its_own_shutdown_state(tmp_path: Path) -> None:
    family = TpmFamily.TPM_2_0
    async with opened(tmp_path, family, []) as engine:
        await engine.start()
        value = await used(engine, family)
        save_state = HEADER.pack(0x8001, 12, 0x145) + b"\x00\x01"
        assert await response_code(engine, save_state) == 0
        await engine.power_cycle(shutdown_first=False)
        assert await response_code(engine, HEADER.pack(0x8001, 12, 0x144) + b"\x00\x01") == 0
        assert await pcr_value(engine, family, 7) == value


@pytest.mark.parametrize("family", FAMILIES)
async def test_P8_a_new_process_goes_on_within_one_life_of_the_domain(
    tmp_path: Path, family: TpmFamily
) -> None:
    life: list[str] = []
    async with opened(tmp_path, family, life) as engine:
        await engine.start()
        value = await used(engine, family)
        await engine.stop(store=True)
    async with opened(tmp_path, family, life) as engine:
        assert await engine.start() is Resumption.CONTINUES
        assert await pcr_value(engine, family, 7) == value


async def test_P7_a_domain_made_anew_finds_its_tpm_switched_off(tmp_path: Path) -> None:
    family = TpmFamily.TPM_2_0
    async with opened(tmp_path, family, []) as engine:
        await engine.start()
        await used(engine, family)
        await engine.stop(store=True)
    async with opened(tmp_path, family, []) as engine:
        assert await engine.start() is Resumption.WAITS_FOR_STARTUP
        assert await response_code(engine, startup_command(family)) == 0
        assert await pcr_value(engine, family, 7) == ZERO_PCR[family]


async def test_a_snapshot_that_cannot_be_loaded_counts_as_lost(tmp_path: Path) -> None:
    family = TpmFamily.TPM_2_0
    async with opened(tmp_path, family, []) as engine:
        await engine.start()
        await used(engine, family)
        await engine.store_volatile()
        await engine.kill()
        (tmp_path / "tpm2-00.volatilestate").write_bytes(b"not a snapshot")
        assert await engine.start() is Resumption.MARKED


async def test_shutdown_is_sent_before_a_power_cycle(tmp_path: Path) -> None:
    family = TpmFamily.TPM_2_0
    async with opened(tmp_path, family, []) as engine:
        await engine.start()
        await used(engine, family)
        await engine.power_cycle(shutdown_first=True)
        # Startup(STATE) is refused after Shutdown(CLEAR), with TPM_RC_VALUE on parameter 1.
        assert await response_code(engine, HEADER.pack(0x8001, 12, 0x144) + b"\x00\x01") != 0
        assert await response_code(engine, shutdown_command()) == WANTS_STARTUP[family]


async def test_the_tpm_reports_what_a_page_holds_as_its_limit(tmp_path: Path) -> None:
    async with opened(tmp_path, TpmFamily.TPM_2_0, []) as engine:
        await engine.start()
        await used(engine, TpmFamily.TPM_2_0)
        maximum = HEADER.pack(0x8001, 22, 0x17A) + struct.pack(">III", 6, 0x11E, 2)
        answer = await exchange(engine.child, maximum)
        assert struct.unpack_from(">IIII", answer, 19) == (0x11E, 4088, 0x11F, 4088)


async def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path, TpmFamily.TPM_2_0, []):
        with pytest.raises(ConfigError, match="in use by another"):
            await SwtpmEngine(tmp_path, TpmFamily.TPM_2_0).open()


async def test_a_directory_of_the_other_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tpm-00.permall").touch()
    with pytest.raises(ConfigError, match=r"holds a TPM 1\.2, not a TPM 2\.0"):
        await SwtpmEngine(tmp_path, TpmFamily.TPM_2_0).open()


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory"):
        await SwtpmEngine(tmp_path / "file" / "state", TpmFamily.TPM_2_0).open()


async def test_a_missing_program_is_named(tmp_path: Path) -> None:
    async with opened(tmp_path, TpmFamily.TPM_2_0, [], "no-such-swtpm") as engine:
        with pytest.raises(EngineError) as caught:
            await engine.start()
        assert "no-such-swtpm" in str(caught.value)
        assert not engine.running


async def test_broken_permanent_state_gives_swtpms_own_words(tmp_path: Path) -> None:
    async with opened(tmp_path, TpmFamily.TPM_2_0, []) as engine:
        (tmp_path / "tpm2-00.permall").write_bytes(b"garbage")
        with pytest.raises(EngineError, match="next:") as caught:
            await engine.start()
        assert "tpm2" in caught.value.state.lower() or "tpm" in caught.value.state.lower()
        assert not engine.running


async def test_P1_a_stopped_swtpm_is_an_error_in_bounded_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(tmp_path, TpmFamily.TPM_2_0, []) as engine:
        autojump_clock.autojump_threshold = float("inf")
        await engine.start()
        os.kill(engine.child.pid, signal.SIGSTOP)
        autojump_clock.autojump_threshold = 0
        with pytest.raises(EngineError, match="did not answer within 30 s"):
            await engine.store_volatile()


async def test_no_orphan_is_left_when_this_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import trio, sys\n"
        "from pathlib import Path\n"
        "from qemu_vtpm_bridge.vtpm.engine import SwtpmEngine\n"
        "from qemu_vtpm_bridge.vtpm.ordinals import TpmFamily\n"
        "async def main():\n"
        "    engine = SwtpmEngine(Path(sys.argv[1]), TpmFamily.TPM_2_0)\n"
        "    await engine.open(); await engine.enter_life([]); await engine.start()\n"
        "    print(engine.child.pid, flush=True)\n"
        "    await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    with subprocess.Popen(  # noqa: ASYNC220 - killed with its parent's thread, not by trio
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        await trio.lowlevel.wait_readable(process.stdout)
        orphan = os.pidfd_open(int(process.stdout.readline()))
        try:
            signal.pidfd_send_signal(orphan, signal.SIGSTOP)  # it hangs when its parent dies
            process.kill()
            with trio.fail_after(60):
                await trio.lowlevel.wait_readable(orphan)
        finally:
            os.close(orphan)


def test_error_headers_are_ten_bytes_of_their_family() -> None:
    assert error_header(TpmFamily.TPM_2_0, Complaint.FAILURE).hex() == "80010000000a00000101"
    assert error_header(TpmFamily.TPM_1_2, Complaint.FAILURE).hex() == "00c40000000a00000009"


async def test_storing_a_tpm_that_waits_for_startup_keeps_it_so(tmp_path: Path) -> None:
    async with opened(tmp_path, TpmFamily.TPM_2_0, []) as engine:
        await engine.start()
        await engine.about_to_change()
        assert await response_code(engine, pcr_read(TpmFamily.TPM_2_0, 0)) == 0x100
        await engine.store_volatile()
        await engine.kill()
        assert await engine.start() is Resumption.WAITS_FOR_STARTUP


@pytest.mark.parametrize(("error", "runs_on"), [(EngineRefusal, True), (EngineError, False)])
async def test_storing_ends_a_swtpm_that_is_silent_and_keeps_one_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[EngineError], runs_on: bool
) -> None:
    async def fail(self: SwtpmChild, command: int, body: bytes, deadline_s: float) -> None:
        raise error("as told")

    async with opened(tmp_path, TpmFamily.TPM_2_0, []) as engine:
        await engine.start()
        await used(engine, TpmFamily.TPM_2_0)
        monkeypatch.setattr(SwtpmChild, "control_command", fail)
        with pytest.raises(error):
            await engine.store_volatile()
        assert engine.running is runs_on
