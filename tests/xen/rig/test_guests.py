"""HVM guests under a real Xen: the bridge as the device, and behind QEMU's devices."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside.guests import check as checks
from tests.xen.rig.inside.lab import params
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("check", params(checks))
def test_hvm_guests(guests_boot: Boot, check: str) -> None:
    guests_boot.result(check)
