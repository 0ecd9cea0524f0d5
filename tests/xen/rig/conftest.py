"""Boots of the rig, one for all tests that look at what it printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.xen.rig.inside import dom0, domains, guests, xl
from tests.xen.rig.inside.lab import Checks
from tests.xen.rig.machine import BOOKWORM, ROOT, TRIXIE, Boot, Rig, Say

KEPT = ROOT / "build" / "xen-rig"
"""Consoles and the lines of every boot, for people."""


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Say:
    """Write a line to the terminal now, whatever pytest captures: a boot takes minutes."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    return write


ALL = bool(os.environ.get("QVB_RIG_ALL"))
"""Run the checks too that have not been seen to pass: `make test-xen-hvm`."""


def booted(
    rig: Rig, program: str, checks: Checks, memory_mib: int, files: dict[str, Path] | None = None
) -> Boot:
    """Boot, and keep what was printed."""
    keep = KEPT / f"{program}-{rig.release.xen}"
    wanted = checks.names if ALL else []
    boot = rig.boot(program, *wanted, memory_mib=memory_mib, timeout_s=3000, files=files, keep=keep)
    (keep / "lines").write_text("\n".join(boot.lines) + "\n")
    return boot


@pytest.fixture(scope="session")
def dom0_boot(say: Say) -> Boot:
    """Both ends in domain 0, Xen 4.17."""
    return booted(Rig(BOOKWORM, say=say), "dom0", dom0.check, 2048)


@pytest.fixture(scope="session")
def domains_boot(say: Say) -> Boot:
    """A vTPM domain of its own, Xen 4.17."""
    return booted(Rig(BOOKWORM, say=say), "domains", domains.check, 2560)


@pytest.fixture(scope="session")
def xl_boot(say: Say) -> Boot:
    """xl and its device models, Xen 4.20: the first that asks a QEMU what it can."""
    rig = Rig(TRIXIE, say=say)
    return booted(rig, "xl", xl.check, 2560, {"qemu": rig.device_model()})


@pytest.fixture(scope="session")
def guests_boot(say: Say) -> Boot:
    """HVM guests, Xen 4.20: the first whose hvmloader has a TPM 2.0 table is 4.18."""
    rig = Rig(TRIXIE, say=say)
    files = {"qemu": rig.device_model()} if ALL else None  # which takes minutes to build
    return booted(rig, "guests", guests.check, 3584, files)
