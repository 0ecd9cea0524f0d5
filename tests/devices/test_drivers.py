"""The bench's drivers do what Linux's do, so that its figures mean something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from bench.devices import COMMAND, RESPONSE, linux_crb_command, linux_tis_command
from tests.golden.factory import TracedDevice, make_as_shipped
from tests.support.trace import Device


class Counting:
    """Counts accesses by what they are."""

    def __init__(self, inner: TracedDevice) -> None:
        self.inner, self.found = inner, Counter[str]()
        self.complete, self.reset = inner.complete, inner.reset
        self.take_irq, self.take_events = inner.take_irq, inner.take_events

    def read(self, offset: int, size: int) -> int:
        self._count(offset)
        return self.inner.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._count(offset)
        self.inner.write(offset, size, value)

    def _count(self, offset: int) -> None:
        self.found["data" if self.inner.device.is_data(offset) else "other"] += 1


@pytest.mark.parametrize(
    ("kind", "run", "data", "other"),
    [("tis", linux_tis_command, 200, 19), ("crb", linux_crb_command, 50, 12)],
)
def test_a_command_takes_as_many_accesses_as_linux_makes(
    kind: str, run: Callable[[Device], bytes], data: int, other: int
) -> None:
    device = Counting(make_as_shipped({"dev": kind, "tpm": 2, "buf": 4096, "est": 0}))
    assert run(device) == RESPONSE
    assert device.take_events() == [["submit", 0, COMMAND.hex()]]
    assert device.found == {"data": data, "other": other}
