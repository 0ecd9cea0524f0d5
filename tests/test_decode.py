"""Names for registers, values, records, commands and response codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge.device import RegisterDevice
from qemu_vtpm_bridge.bridge.record import Recorder
from qemu_vtpm_bridge.bridge.recorded import RecordedDevice
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family
from qemu_vtpm_bridge.cli import main
from qemu_vtpm_bridge.decode_record import decode_record
from qemu_vtpm_bridge.decode_values import MAPS
from qemu_vtpm_bridge.errors import ConfigError
from tests.golden import factory
from tests.support.trace import first_difference, load

GOLDEN = Path(__file__).parent / "golden"
SECRET = b"a secret of the guest"
COMMAND = HEADER.pack(0x8001, 10 + len(SECRET), 0x144) + SECRET
RESPONSE = HEADER.pack(0x8001, 10 + len(SECRET), 0) + SECRET


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "tis 0x18 0x04000a90",
            "STS 04000a90 tpmFamily=1 (TPM 2.0) burstCount=10 stsValid dataAvail",
        ),
        ("tis STS 0x90 --size 1", "STS 90 stsValid dataAvail"),
        ("tis 0x2019 0x0a --size 1", "STS+1 0a burstCount[7:0]=0xa"),
        ("tis sts 0x21", "STS 00000021 tpmFamily=0 (TPM 1.2) burstCount=0 tpmGo reserved_0"),
        ("crb 0x4c 1", "CTRL_START 00000001 Start"),
        ("crb 0x48 0x0000000100000001", "CTRL_START 00000001 Start"),
        ("crb 0x04 0", "None 00000000 no register"),
        ("rc 0", "TPM_RC_SUCCESS"),
        ("rc 0x142", "TPM_RC_COMMAND_SIZE"),
        ("rc 0x1c4", "TPM_RC_VALUE (parameter 1)"),
        ("rc 0x98e", "TPM_RC_AUTH_FAIL (session 1)"),
        ("rc 0x18b", "TPM_RC_HANDLE (handle 1)"),
        ("rc 0x922", "TPM_RC_RETRY"),
        ("rc 0x1e", "TPM_RC_BAD_TAG"),
        ("rc 0x12345678", "0x12345678"),
        ("rc 38 --tpm 1.2", "TPM_INVALID_POSTINIT"),
        ("ordinal 0x17b", "TPM2_GetRandom"),
        ("ordinal 0x53 --tpm 1.2", "TPM_ContinueSelfTest"),
        ("ordinal 0x4000000a --tpm 1.2", "TSC_PhysicalPresence"),
        ("ordinal 0x0badf00d", "0x0badf00d"),
    ],
)
def test_a_value_gets_its_names(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", *words.split()]) == 0
    assert line in " ".join(capsys.readouterr().out.split())


def test_a_register_without_a_value_shows_its_data_sheet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["decode", "tis", "0x1000"]) == 0
    out = capsys.readouterr().out
    assert "ACCESS at 0x000, locality 1, W1, 00000081 after reset" in out
    assert "activeLocality" in out


def test_values_come_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "--json", "crb", "0x30", "0x25811"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["register"] == "INTF_ID"
    assert entry["fields"]["CapCRB"] == 1
    assert entry["fields"]["InterfaceVersion"] == 1


@pytest.mark.parametrize(
    "words",
    [
        "tis",
        "tis NOTHING",
        "tis 0x18 much",
        "tis 0x18 0x100 --size 1",
        "tis -- -1",
        "rc",
        "rc 1 2",
        "ordinal x",
        "/nonexistent/record",
        "--json /nonexistent/record",
    ],
)
def test_what_cannot_be_decoded_is_said(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", *words.split()]) == 2
    assert "qemu-vtpm-bridge:" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.gz")), ids=lambda path: path.name)
def test_the_golden_traces_become_readable(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = sum(len(sequence.steps) for sequence in load(path))
    # Runs of FIFO bytes and polls are folded.
    assert len(lines) < steps
    assert sum(line.startswith("# sequence") for line in lines) == 30
    text = "\n".join(lines)
    for word in ("TPM runs: TPM2_GetRandom", "TPM answers: TPM_RC_SUCCESS", "in 10 accesses"):
        assert word in text


def test_every_register_value_goes_through_its_format_and_back() -> None:
    for device in MAPS.values():
        for register in device:
            for value in (register.reset, 0, 0xFFFFFFFF, 0xA5A5A5A5):
                fields = register.decode(value)
                assert register.encode(fields) == value


@pytest.mark.parametrize(
    ("device", "offset", "size", "value", "words"),
    [
        ("tis", 0x4000, 1, 0x02, "ignored: locality 4"),
        ("tis", 0xF00, 4, 1, "ignored: read-only"),
        ("tis", 0x18, 1, 0x60, "ignored: one of commandReady"),
        ("tis", 0x18, 1, 0x40, ""),
        ("crb", 0x4C, 4, 0x101, "ignored: exactly one bit acts"),
        ("crb", 0x4D, 1, 1, "ignored: not from the first byte on"),
        ("crb", 0x4C, 1, 1, ""),
        ("crb", 0x58, 4, 0xF80, "ignored: read-only"),
    ],
)
def test_a_write_that_does_nothing_says_why(
    device: str, offset: int, size: int, value: int, words: str
) -> None:
    """And the device agrees: nothing that can be read has changed."""
    header = json.dumps({"op": "seq", "dev": device, "tpm": 2, "buf": 4096, "est": 0})
    step = json.dumps({"op": "w", "o": offset, "s": size, "v": value})
    shown = "\n".join(decode_record([header, step, '{"op":"end"}'], "record"))
    assert words in shown
    assert ("ignored" in shown) == bool(words)
    traced = factory.make_as_shipped(json.loads(header))
    traced.write(0x08 if device == "crb" else 0x00, 1, 1 if device == "crb" else 2)
    if device == "crb":
        for at, byte in enumerate(COMMAND, 0x80):
            traced.write(at, 1, byte)
    before = traced.device.save()
    traced.write(offset, size, value)
    unchanged = not traced.device.busy and traced.device.save() == before
    assert unchanged == bool(words)


def decode_hostile(device: str, line: str) -> None:
    """Decode a line; it gives lines, or a ConfigError that names it."""
    header = json.dumps({"op": "seq", "dev": device, "tpm": 2, "buf": 4096, "est": 0})
    refused = ""
    try:
        assert list(decode_record([header, line], "record"))
    except ConfigError as error:
        refused = str(error)
    assert not refused or "line 2" in refused


@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda raw: raw.decode("latin-1")))
def test_no_line_breaks_the_decoder(line: str) -> None:
    decode_hostile("tis", line)


SCALARS = st.none() | st.integers(-1, 1 << 40) | st.sampled_from(["done", "submit", "00"])
STEPS = st.fixed_dictionaries(
    {"op": st.sampled_from(["r", "w", "done", "reset", "ctl", "cmd", "end", "seq"])},
    optional={
        "o": SCALARS,
        "s": st.integers(1, 8) | SCALARS,
        "v": SCALARS,
        "rsp": SCALARS,
        "len": SCALARS,
        "name": SCALARS,
        "ev": st.lists(st.lists(SCALARS, max_size=4), max_size=3) | SCALARS,
        "irq": st.lists(SCALARS, max_size=3) | SCALARS,
    },
)


@given(st.sampled_from(["tis", "crb", "chardev"]), STEPS)
def test_no_step_breaks_the_decoder(device: str, step: object) -> None:
    decode_hostile(device, json.dumps(step))


# Recording.


def drive(device: RegisterDevice | RecordedDevice) -> None:
    device.write(0x0, 1, 0x02)
    device.write(0x18, 1, 0x40)
    for byte in COMMAND:
        device.write(0x24, 1, byte)
    device.read(0x18, 4)
    device.write(0x18, 1, 0x20)
    [command] = device.take_outputs()
    assert command.command == COMMAND  # type: ignore[union-attr]
    device.complete(RESPONSE, ticket=command.ticket)  # type: ignore[union-attr]
    for _ in RESPONSE:
        device.read(0x24, 1)
    device.read(0x18, 4)
    device.reset()


def recorded(*, payloads: bool, limit_bytes: int = 1 << 20) -> str:
    out = io.StringIO()
    recorder = Recorder(
        out,
        device="tis",
        family=Family.TPM_2_0,
        buffer_bytes=4096,
        payloads=payloads,
        limit_bytes=limit_bytes,
    )
    drive(RecordedDevice(TisDevice(family=Family.TPM_2_0, buffer_bytes=4096), recorder))
    recorder.end()
    return out.getvalue()


def test_P10_a_record_holds_no_payload() -> None:
    text = recorded(payloads=False)
    assert SECRET.hex() not in text
    values = [json.loads(line).get("v") for line in text.splitlines()]
    assert not set(SECRET) & {value for value in values if value not in (None, 0x20, 0x40)}
    shown = "\n".join(decode_record(text.splitlines(), "record"))
    assert f"TPM runs: TPM2_Startup, {len(COMMAND)} bytes" in shown
    assert f"TPM answers: TPM_RC_SUCCESS, {len(RESPONSE)} bytes" in shown
    assert f"{len(COMMAND)} bytes     (not recorded)  in {len(COMMAND)} accesses" in shown


def test_a_record_with_payloads_can_be_played_again(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(recorded(payloads=True))
    assert SECRET.hex() in path.read_text()
    [sequence] = load(path)
    assert first_difference(sequence, factory.make_as_shipped) is None


def test_a_record_stops_growing() -> None:
    text = recorded(payloads=False, limit_bytes=400)
    assert len(text) < 500
    assert json.loads(text.splitlines()[-1]) == {"op": "end", "n": 0, "tags": ["cut"]}


def test_a_record_of_the_chardev_service_is_readable() -> None:
    out = io.StringIO()
    recorder = Recorder(out, device="chardev", family=Family.TPM_2_0, buffer_bytes=4088)
    recorder.control("CMD_INIT")
    recorder.command(0, COMMAND)
    recorder.done(RESPONSE)
    recorder.end()
    assert SECRET.hex() not in out.getvalue()
    shown = "\n".join(decode_record(out.getvalue().splitlines(), "record"))
    for words in ("control: CMD_INIT", "TPM runs: TPM2_Startup", "TPM answers: TPM_RC_SUCCESS"):
        assert words in shown
