"""xl's wrapper under a real Xen."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside.lab import params
from tests.xen.rig.inside.xl import check as checks
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("check", params(checks))
def test_xl(xl_boot: Boot, check: str) -> None:
    xl_boot.result(check)
