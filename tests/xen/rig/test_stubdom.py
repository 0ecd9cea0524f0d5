"""QEMU and the bridge in a stub domain of a real Xen; too long for `make test`."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside.lab import params
from tests.xen.rig.inside.stubdom import check as stubdom
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.unproven, pytest.mark.timeout(9000)]


@pytest.mark.parametrize("check", params(stubdom))
def test_stubdom(stubdom_boot: Boot, check: str) -> None:
    stubdom_boot.result(check)
