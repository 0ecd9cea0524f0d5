"""Both ends in domain 0 of a real Xen: libraries, tpm2-tools, kill -9, path modes, liars."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside.dom0 import check as checks
from tests.xen.rig.inside.lab import params
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("check", params(checks))
def test_a_real_dom0(dom0_boot: Boot, check: str) -> None:
    dom0_boot.result(check)
