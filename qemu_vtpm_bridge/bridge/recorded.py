"""A register device that is recorded: `record.py` says how a record looks.

It stands in the device's place, with the same interface, and writes each access down
with what came of it.  Nothing else changes, but for the time it takes.
"""

from __future__ import annotations

from typing import Any, TextIO

from .device import CancelCommand, Output, RegisterDevice, ResetEstablishment, SubmitCommand
from .record import Recorder
from .tpm import Family


class DeviceRecords:
    """Writes a sequence for each device that is wrapped, one after the other, into one file."""

    def __init__(self, out: TextIO, family: Family, *, payloads: bool) -> None:
        self._out = out
        self._family = family
        self._payloads = payloads
        self._recorder: Recorder | None = None

    def wrap(self, device: RegisterDevice) -> RecordedDevice:
        """Return the device, recorded from now on; the sequence before it ends."""
        self.end()
        self._recorder = Recorder(
            self._out,
            device=device.name,
            family=self._family,
            buffer_bytes=device.buffer_bytes,
            payloads=self._payloads,
        )
        return RecordedDevice(device, self._recorder)

    def end(self) -> None:
        """End the sequence that is being written."""
        if self._recorder is not None:
            self._recorder.end()
            self._recorder = None


class RecordedDevice:
    """A register device that writes down what is done to it; used in its place."""

    def __init__(self, device: RegisterDevice, recorder: Recorder) -> None:
        self.device = device
        self._recorder = recorder
        self._outputs: list[Output] = []
        self._irq_levels: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.device, name)

    def read(self, offset: int, size: int) -> int:
        """Read, and record it."""
        value = self.device.read(offset, size)
        self._record("r", offset, size, value)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Write, and record it."""
        self.device.write(offset, size, value)
        self._record("w", offset, size, value)

    def complete(self, response: bytes, *, ticket: int | None = None) -> None:
        """End the running command, and record it if there is one."""
        was_busy = self.device.busy
        self.device.complete(response, ticket=ticket)
        levels, events = self._collect()
        if was_busy and (levels or events or not self.device.busy):
            self._recorder.done(response, irq=levels, ev=events)

    def reset(self, *, established: bool = False) -> None:
        """Reset the machine, and record it."""
        self.device.reset(established=established)
        self._outputs = []
        levels, events = self._collect()
        self._recorder.reset(irq=levels, ev=events)

    @property
    def has_outputs(self) -> bool:
        """Whether `take_outputs` has something to give."""
        return bool(self._outputs) or self.device.has_outputs

    def take_outputs(self) -> list[Output]:
        """Return what the device asked for since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_irq_levels(self) -> list[bool]:
        """Return the levels that the line went through since the last call, in order."""
        levels, self._irq_levels = self._irq_levels, []
        return levels

    def _record(self, op: str, offset: int, size: int, value: int) -> None:
        data = any(self.device.is_data(at) for at in range(offset, offset + size))
        levels, events = self._collect()
        self._recorder.access(op, offset, size, value, data=data, irq=levels, ev=events)

    def _collect(self) -> tuple[list[bool], list[list[Any]]]:
        """Take the device's outputs over and return them as a record has them."""
        levels, outputs = self.device.take_irq_levels(), self.device.take_outputs()
        self._irq_levels += levels
        self._outputs += outputs
        events: list[list[Any]] = []
        for output in outputs:
            match output:
                case SubmitCommand(locality, command, _):
                    events.append(self._recorder.submit_event(locality, command))
                case CancelCommand():
                    events.append(["cancel"])
                case ResetEstablishment(locality):
                    events.append(["reset_est", locality])
        return levels, events
