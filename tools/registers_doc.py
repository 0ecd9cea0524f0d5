"""Writes docs/registers.md from the data sheets and the tables of the devices.

    python -m tools.registers_doc

The pictures are the code's: registers come from the sheets, the TIS machine from its
table, and what the CRB device does from trying it.  A test compares the file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

from bench.devices import linux_tis_command
from qemu_vtpm_bridge.bridge import tis_registers
from qemu_vtpm_bridge.bridge.crb import COMMANDS, CrbDevice
from qemu_vtpm_bridge.bridge.crb_registers import CRB
from qemu_vtpm_bridge.bridge.device import Quirk
from qemu_vtpm_bridge.bridge.record import Recorder
from qemu_vtpm_bridge.bridge.recorded import RecordedDevice
from qemu_vtpm_bridge.bridge.registers import Register, RegisterMap
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tis_registers import TIS
from qemu_vtpm_bridge.bridge.tis_states import TRANSITIONS, State
from qemu_vtpm_bridge.bridge.tpm import HEADER, Family
from qemu_vtpm_bridge.decode_record import decode_record
from tools.source_text import ROOT, member_texts

OUTPUT = ROOT / "docs" / "registers.md"

HEAD = """\
<!-- Written by tools/registers_doc.py from the code: `make docs`. -->

# Registers and state machines of the TIS and CRB devices

What a guest finds at the addresses of a TPM when the bridge itself is the device.
`qemu-vtpm-bridge decode` prints the same names for single values and for records.
"""

RESETS_1_2 = {
    "INTF_CAPABILITY": tis_registers.INTF_CAPABILITY_1_2,
    "INTERFACE_ID": tis_registers.INTERFACE_ID_1_2,
    "STS": 0,
}


def address(register: Register) -> str:
    """Return where the register lies: "018", "080..0BF"."""
    if register.last_offset is None:
        return f"{register.offset:03X}"
    return f"{register.offset:03X}..{register.end - 1:03X}"


def picture(device: RegisterMap) -> Iterator[str]:
    """Draw a page: a box for each register, and the gaps between them."""
    yield "```text"
    yield f"        +{'-' * 36}+"
    at = 0
    for register in device:
        if register.offset > at:
            reads = "FFh bytes" if device.unclaimed else "0"
            yield f"   {at:03X}  |{f'reads {reads}':^36}|"
            yield f"        +{'-' * 36}+"
        label = f"{register.name} ({register.access.value})"
        yield f"   {register.offset:03X}  |{label:^36}|"
        yield f"        +{'-' * 36}+"
        at = register.end
    if at < device.page_bytes:
        yield f"   {at:03X}  |{'reads FFh bytes':^36}|"
        yield f"        +{'-' * 36}+"
    yield "```"


def register_table(device: RegisterMap, resets_1_2: dict[str, int]) -> Iterator[str]:
    """One line a register."""
    yield "| offset | register | access | after reset | what it is for |"
    yield "|---|---|---|---|---|"
    for register in device:
        reset = f"{register.reset:08X}"
        if register.name in resets_1_2:
            reset += f" (TPM 1.2: {resets_1_2[register.name]:08X})"
        meaning = register.meaning
        if register.others_read is not None:
            meaning += " Other localities than the active one read FFh bytes."
        access = register.access.value
        yield f"| {address(register)} | {register.name} | {access} | {reset} | {meaning} |"


def field_tables(device: RegisterMap) -> Iterator[str]:
    """The bits of each register."""
    for register in device:
        if not register.fields:
            continue
        yield f"#### {register.name}"
        yield ""
        yield "| bits | field | access | meaning |"
        yield "|---|---|---|---|"
        for field in register.fields:
            values = ", ".join(f"{number}: {name}" for number, name in field.values.items())
            meaning = field.meaning + (f" {values}." if values else "")
            yield f"| {field.bits} | {field.name} | {field.access.value} | {meaning} |"
        yield ""


def tis_machine() -> Iterator[str]:
    """The table of a locality's transitions, as a diagram and as it stands."""
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {State.IDLE.value}"
    for (state, happened), step in TRANSITIONS.items():
        yield f"    {state.value} --> {step.to.value}: {happened.value}"
    yield "```"
    yield ""
    yield "| state | what happens | then | what that means |"
    yield "|---|---|---|---|"
    for (state, happened), step in TRANSITIONS.items():
        yield f"| {state.value} | {happened.value} | {step.to.value} | {step.meaning} |"


# The CRB device has flags, not one state: each is tried.

COMMAND = HEADER.pack(0x8001, 12, 0x144) + bytes(2)
RESPONSE = HEADER.pack(0x8001, 10, 0)
FLAGS: dict[str, tuple[str, int, str, str]] = {
    "The locality": ("LOC_STATE", CRB["LOC_STATE"].mask("locAssigned"), "Assigned", "Free"),
    "Ready and idle": ("CTRL_STS", CRB["CTRL_STS"].mask("tpmIdle"), "Idle", "Ready"),
    "The command": ("CTRL_START", CRB["CTRL_START"].mask("Start"), "Running", "Stopped"),
}


def crb_inputs() -> dict[str, Callable[[CrbDevice], None]]:
    """Return what can happen to the device, by name."""
    inputs: dict[str, Callable[[CrbDevice], None]] = {}
    for register, value in COMMANDS:
        fields = CRB[register].decode(value)
        name = next(field for field, number in fields.items() if number)
        offset = CRB[register].offset

        def write(device: CrbDevice, offset: int = offset, value: int = value) -> None:
            device.write(offset, 4, value)

        inputs[f"{register}.{name} written"] = write
    inputs["the TPM answers"] = lambda device: device.complete(RESPONSE)
    return inputs


def crb_state(device: CrbDevice) -> tuple[str, ...]:
    """Return the name of each flag's state."""
    return tuple(
        on if device.read(CRB[register].offset, 4) & mask else off
        for register, mask, on, off in FLAGS.values()
    )


def crb_transitions() -> dict[str, list[tuple[str, str, str]]]:
    """Try every input in every state that can be reached; return what changes each flag."""
    inputs = crb_inputs()
    found: dict[str, dict[tuple[str, str, str], None]] = {flag: {} for flag in FLAGS}
    paths: dict[tuple[str, ...], tuple[str, ...]] = {}
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        path = waiting.pop(0)
        for name in inputs:
            device = CrbDevice(family=Family.TPM_2_0, buffer_bytes=4096)
            for at, byte in enumerate(COMMAND):
                device.write(CRB["DATA_BUFFER"].offset + at, 1, byte)
            for earlier in path:
                inputs[earlier](device)
            before = crb_state(device)
            paths.setdefault(before, path)
            inputs[name](device)
            after = crb_state(device)
            if after not in paths:
                paths[after] = (*path, name)
                waiting.append(paths[after])
            for flag, old, new in zip(FLAGS, before, after, strict=True):
                if old != new:
                    found[flag][old, new, name] = None
    return {flag: list(edges) for flag, edges in found.items()}


def crb_machines() -> Iterator[str]:
    """A diagram for each flag, found by trying the device."""
    start = crb_state(CrbDevice(family=Family.TPM_2_0, buffer_bytes=4096))
    for (flag, edges), first in zip(crb_transitions().items(), start, strict=True):
        yield f"**{flag}**"
        yield ""
        yield "```mermaid"
        yield "stateDiagram-v2"
        yield f"    [*] --> {first}"
        for old, new, name in edges:
            yield f"    {old} --> {new}: {name}"
        yield "```"
        yield ""
    yield "| register | written, exactly | what happens |"
    yield "|---|---|---|"
    for (register, value), (_method, meaning) in COMMANDS.items():
        yield f"| {register} | {value} | {meaning} |"


def deviations() -> Iterator[str]:
    """What `Quirk` says of each of its members."""
    for name, text in member_texts(Quirk).items():
        yield f"- **{name}**: {text}"


class _Answered:
    """A recorded device whose TPM answers what the driver wants answered."""

    def __init__(self, device: RecordedDevice) -> None:
        self.read, self.write, self.complete = device.read, device.write, device.complete
        self.reset = device.reset


def example() -> Iterator[str]:
    """One command of Linux's tpm_tis, recorded and decoded."""
    out = io.StringIO()
    recorder = Recorder(out, device="tis", family=Family.TPM_2_0, buffer_bytes=4096)
    device = RecordedDevice(TisDevice(family=Family.TPM_2_0, buffer_bytes=4096), recorder)
    linux_tis_command(_Answered(device))  # type: ignore[arg-type]
    recorder.end()
    yield "```text"
    yield from (line for line in decode_record(out.getvalue().splitlines(), "record") if line)
    yield "```"


def document() -> str:
    """Return the whole file."""
    lines = [HEAD]
    for device, resets in ((TIS, RESETS_1_2), (CRB, {})):
        lines += [f"## {device.title}", "", device.meaning, ""]
        lines += [*picture(device), "", *register_table(device, resets), ""]
        if device is TIS:
            lines += ["### A locality's states", "", *tis_machine(), ""]
        else:
            lines += ["### What the device does", "", *crb_machines(), ""]
        lines += ["### Fields", "", *field_tables(device)]
    lines += [
        "## What a record of it looks like",
        "",
        "One command of Linux's tpm_tis, recorded without payloads, as `qemu-vtpm-bridge decode` "
        "shows it:",
        "",
        *example(),
        "",
        "## Where the devices differ from QEMU's",
        "",
        "Each is a member of `Quirk`, and can be switched back to what QEMU does, which the tests "
        "do that compare the devices with QEMU.",
        "",
        *deviations(),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    OUTPUT.write_text(document())
    print(f"wrote {OUTPUT}")
