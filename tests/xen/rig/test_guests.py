"""HVM guests under a real Xen: the bridge as the device, and behind QEMU's devices."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside.guests import crb, qemus_crb, tis
from tests.xen.rig.inside.lab import params
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.timeout(9000)]


@pytest.mark.parametrize("check", params(crb))
def test_crb(crb_boot: Boot, check: str) -> None:
    crb_boot.result(check)


@pytest.mark.parametrize("check", params(qemus_crb))
def test_qemus_crb(qemus_crb_boot: Boot, check: str) -> None:
    qemus_crb_boot.result(check)


@pytest.mark.parametrize("check", params(tis))
def test_tis(tis_boot: Boot, check: str) -> None:
    tis_boot.result(check)
