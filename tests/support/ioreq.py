"""An ioreq server whose guest is the test: it has one virtual CPU, and touches registers."""

from __future__ import annotations

import os
import queue
import select
from typing import Any

from qemu_vtpm_bridge.bridge.ioreq import TPM_BASE
from qemu_vtpm_bridge.xen.ioreq import ACCESS, READABLE, STOPPED
from tests.devices.test_ioreq import Memory, Request

WAIT_S = 60.0


class TouchedServer(Memory):
    """Stands in for `xen.ioreq.IoreqServer`."""

    id = 1
    vcpus = 1

    def __init__(self, domid: int, *, adopt: int | None = None) -> None:
        super().__init__()
        self.domid = domid
        self.answered = 0
        self.enabled = False
        self.closed = False
        self.access: Any = Request()
        self._asked: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stopped = False
        self._wake = os.eventfd(0)

    # What the test does.

    def read(self, offset: int, size_bytes: int = 4) -> int:
        """Do what a CPU does that reads a register: wait for the answer."""
        self._asked.put(Request(TPM_BASE + offset, size_bytes=size_bytes))
        os.eventfd_write(self._wake, 1)
        return self._answers.get(timeout=WAIT_S)

    # What the service does.

    def enable(self, first: int, last: int) -> None:
        self.enabled = True

    def next(self, answer: bool, fd: int = -1) -> int:
        if answer:
            self.answered += 1
            self._answers.put(self.access.data)
        ends = [self._wake] if fd < 0 else [self._wake, fd]
        ready = [] if self._stopped or not self._asked.empty() else select.select(ends, [], [])[0]
        if self._wake in ready:
            os.eventfd_read(self._wake)
        found = READABLE if fd in ready else 0
        if not self._asked.empty():
            vars(self.access).update(vars(self._asked.get()))
            found |= ACCESS
        return found | STOPPED if self._stopped else found

    def stop(self) -> None:
        self._stopped = True
        os.eventfd_write(self._wake, 1)

    def forget_memory(self) -> None:
        pass

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self._wake)
