"""Trying again: when, and with how many words."""

from __future__ import annotations

import logging
import math

import pytest

from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.retries import Retries

log = logging.getLogger(__name__)


def test_the_waits_grow_up_to_a_bound_and_begin_anew_after_a_success() -> None:
    retries = Retries(log, 1.0, 10.0)
    assert retries.wait_s == math.inf
    waits = []
    for _ in range(6):
        retries.later()
        waits.append(retries.wait_s)
    assert waits == [1, 2, 4, 8, 10, 10]
    retries.succeeded()
    assert retries.wait_s == math.inf
    retries.refused(XenError("again"))
    assert retries.wait_s == 1


def test_P10_each_new_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    retries = Retries(log, 1.0, 10.0)
    for reason in ("held", "held", "full", "full", "held"):
        retries.refused(XenError(reason))
    retries.succeeded()
    retries.refused(XenError("held"))
    assert [record.getMessage() for record in caplog.records] == ["held", "full", "held", "held"]
