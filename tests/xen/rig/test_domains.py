"""A vTPM domain of its own under a real Xen, and the kernel's frontend beside the bridge."""

from __future__ import annotations

import pytest

from tests.xen.rig.inside.domains import check as checks
from tests.xen.rig.inside.lab import params
from tests.xen.rig.machine import Boot

pytestmark = [pytest.mark.rig, pytest.mark.timeout(5400)]


@pytest.mark.parametrize("check", params(checks))
def test_two_domains(domains_boot: Boot, check: str) -> None:
    domains_boot.result(check)
