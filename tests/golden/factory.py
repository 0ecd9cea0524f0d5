"""Devices for golden traces: a sequence's header in, a device out.

`make` builds what QEMU is compared with access by access, so all of QEMU's quirks are
shown; `make_as_shipped` builds what a guest gets.  What a trace calls events and interrupt
levels are the device's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qemu_vtpm_bridge.bridge.crb import CrbDevice
from qemu_vtpm_bridge.bridge.device import CancelCommand, Quirk, RegisterDevice, SubmitCommand
from qemu_vtpm_bridge.bridge.tis import TisDevice
from qemu_vtpm_bridge.bridge.tpm import Family

DEVICES: dict[str, type[RegisterDevice]] = {"tis": TisDevice, "crb": CrbDevice}
FAMILIES = {1: Family.TPM_1_2, 2: Family.TPM_2_0}


class TracedDevice:
    """A device with the words of a trace: what a step does, what came of it."""

    def __init__(self, device: RegisterDevice, *, reset_waits: bool) -> None:
        self.device = device
        self.read, self.write = device.read, device.write
        self._reset_waits = reset_waits

    def complete(self, rsp: bytes) -> None:
        """The running command ends."""
        self.device.complete(rsp)

    def reset(self, rsp: bytes = b"") -> None:
        """The machine is reset; QEMU waits for a running command, which `rsp` ends."""
        if self._reset_waits and self.device.busy:
            self.device.complete(rsp)
        self.device.reset(established=self.device.established)

    def take_irq(self) -> list[int]:
        """Return the levels that the interrupt line went through."""
        return [int(level) for level in self.device.take_irq_levels()]

    def take_events(self) -> list[list[Any]]:
        """Return what reached the TPM."""
        events: list[list[Any]] = []
        for output in self.device.take_outputs():
            if isinstance(output, SubmitCommand):
                events.append(["submit", output.locality, output.command.hex()])
            elif isinstance(output, CancelCommand):
                events.append(["cancel"])
            else:
                events.append(["reset_est", output.locality])
        return events


def build(header: Mapping[str, Any], quirks: Quirk) -> TracedDevice:
    """Return the device of a sequence's header: dev, tpm, buf, est."""
    device = DEVICES[header["dev"]](
        family=FAMILIES[header["tpm"]],
        buffer_bytes=header["buf"],
        established=bool(header["est"]),
        quirks=quirks,
    )
    return TracedDevice(device, reset_waits=Quirk.KEEPS_AT_RESET in quirks)


def make(header: Mapping[str, Any]) -> TracedDevice:
    """Return a device that shows all of QEMU's quirks."""
    return build(header, Quirk.ALL)


def make_as_shipped(header: Mapping[str, Any]) -> TracedDevice:
    """Return the device that guests get."""
    return build(header, Quirk.NONE)
