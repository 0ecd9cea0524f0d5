"""Fixtures that several rooms' tests use."""

from __future__ import annotations

import pytest

from tests.support.xenstored import XenStore


@pytest.fixture(params=list(XenStore), ids=lambda server: server.value)
def xenstore(request: pytest.FixtureRequest) -> XenStore:
    """Each program that can be XenStore: the embedded one, and Xen's two without Xen."""
    server = request.param
    assert isinstance(server, XenStore)
    return server
