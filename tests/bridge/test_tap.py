"""Recording the chardev service: what is passed on, what is written down."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path
from typing import TextIO

import pytest
import trio

from qemu_vtpm_bridge import commands
from qemu_vtpm_bridge.bridge.record import Recorder, close_record, create_record
from qemu_vtpm_bridge.bridge.tap import Cutter, TappedTpm
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family
from qemu_vtpm_bridge.cli import build_parser
from qemu_vtpm_bridge.decode_record import decode_record
from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.service import Bridge, BridgeConfig
from qemu_vtpm_bridge.xen.xenbus import PathMode, device_paths
from tests.support.chain import running_chain
from tests.support.swtpm_client import GET_RANDOM
from tests.support.wait import wait_until


def message(size: int) -> bytes:
    return HEADER.pack(0x8001, size, 0x17B) + bytes(size - 10)


@pytest.mark.parametrize("chunk", [1, 3, 10, 11, 500])
def test_messages_are_found_however_they_come(chunk: int) -> None:
    sizes = [10, 12, 300, 10]
    stream = b"".join(map(message, sizes))
    cutter = Cutter()
    found = [
        part for at in range(0, len(stream), chunk) for part in cutter.feed(stream[at : at + chunk])
    ]
    assert found == [message(size) for size in sizes]


@pytest.mark.parametrize("size", [0, 9, 0x10001, 0xFFFFFFFF])
def test_a_size_that_cannot_be_takes_what_has_come(size: int) -> None:
    raw = HEADER.pack(0x8001, size, 0) + b"more"
    cutter = Cutter()
    assert cutter.feed(raw) == [raw]
    assert cutter.feed(message(10)) == [message(10)]


async def test_P10_a_served_guest_is_recorded_without_payloads(tmp_path: Path) -> None:
    out = io.StringIO()
    recorder = Recorder(out, device="chardev", family=Family.TPM_2_0, buffer_bytes=4088)

    def tap(bridge: Bridge, nursery: trio.Nursery) -> TappedTpm:
        return TappedTpm(bridge, recorder, nursery)

    async with running_chain(tmp_path, tap=tap) as chain:
        client = await chain.powered_on()
        response = await client.tpm(GET_RANDOM)
        client.close()
        await wait_until(lambda: not chain.bridge.data_attached())
        # The next QEMU is served, through a tap of its own.
        second = await chain.connect()
        await second.power_on()
        assert await second.code(GET_RANDOM) == 0x100
        second.close()
    recorder.end()
    random_bytes = response[12:]
    assert len(random_bytes) == 16
    assert random_bytes.hex() not in out.getvalue()
    shown = "\n".join(decode_record(out.getvalue().splitlines(), "record"))
    for words in (
        "control: CMD_SET_DATAFD",
        "control: CMD_INIT",
        "TPM runs: TPM2_Startup, 12 bytes",
        "TPM runs: TPM2_GetRandom, 12 bytes",
        "TPM answers: TPM_RC_SUCCESS, 28 bytes",
        "TPM answers: TPM_RC_INITIALIZE, 10 bytes",
    ):
        assert words in shown
    steps = [json.loads(line)["op"] for line in out.getvalue().splitlines()]
    assert steps.count("cmd") == steps.count("done") == 3


def full_disk() -> TextIO:
    return Path("/dev/full").open("w", encoding="utf-8")


async def test_a_full_disk_ends_the_record_not_the_guests_tpm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = full_disk()
    recorder = Recorder(out, device="chardev", family=Family.TPM_2_0, buffer_bytes=4088)

    def tap(bridge: Bridge, nursery: trio.Nursery) -> TappedTpm:
        return TappedTpm(bridge, recorder, nursery)

    async with running_chain(tmp_path, tap=tap) as chain:
        client = await chain.powered_on()
        for _ in range(3):
            assert await client.code(GET_RANDOM) == 0
    recorder.end()
    close_record(out)
    assert out.closed
    told = [record.getMessage() for record in caplog.records if "record" in record.getMessage()]
    assert told == ["the record ends here: No space left on device; nothing else changes"]


def test_a_record_that_ends_on_a_full_disk_is_told_of_too(caplog: pytest.LogCaptureFixture) -> None:
    out = full_disk()
    Recorder(out, device="tis", family=Family.TPM_2_0, buffer_bytes=4088).end()
    close_record(out)
    assert "No space left" in caplog.text


def test_P10_a_record_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_text("left over")
    path.chmod(0o644)
    with create_record(str(path)) as out:
        out.write("x")
    assert path.read_text() == "x"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="--record"):
        create_record(str(tmp_path / "no" / "directory"))


async def test_the_run_command_writes_a_record(tmp_path: Path) -> None:
    args = build_parser().parse_args(
        ["run", "--backend", "2", "--socket", "s", "--record", str(tmp_path / "record")]
    )

    class Behind:
        locality = 0

        def set_locality(self, locality: int) -> None:
            self.locality = locality

    behind = Behind()
    config = BridgeConfig(device_paths(PathMode.SEED, backend_domid=2, handle=0))
    with create_record(args.record) as out:
        async with commands._recorded(args, config, behind, out) as tapped:  # type: ignore[arg-type]
            tapped.set_locality(3)
    assert behind.locality == 3
    lines = (tmp_path / "record").read_text().splitlines()
    assert [json.loads(line)["op"] for line in lines] == ["seq", "ctl", "end"]
    async with commands._recorded(args, config, behind, None) as untapped:  # type: ignore[arg-type]
        assert untapped is behind  # type: ignore[comparison-overlap]
