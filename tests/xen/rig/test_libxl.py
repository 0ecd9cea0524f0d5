"""libvirt's libxl driver with our hook, under a real Xen."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside import libxl
from tests.xen.rig.inside.lab import params
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("check", params(libxl.check))
def test_libxl(libxl_boot: Boot, check: str) -> None:
    libxl_boot.result(check)
