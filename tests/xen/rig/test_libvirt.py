"""libvirt's libxl driver and our hook under a real Xen."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside.lab import params
from tests.xen.rig.inside.libvirt import check as checks
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("check", params(checks))
def test_libvirt(libvirt_boot: Boot, check: str) -> None:
    libvirt_boot.result(check)
