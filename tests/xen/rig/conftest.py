"""Boots of the rig, one for all tests that look at what it printed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.xen.rig.inside import dom0, domains, guests, libvirt, stubdom, xl
from tests.xen.rig.inside.lab import Checks
from tests.xen.rig.machine import BOOKWORM, ROOT, TRIXIE, Boot, Rig, Say, cache_dir

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


BOOTS_MAX = 4
"""Under TCG a virtual CPU of an HVM guest with two of them triple-faults now and then (QEMU 7.2
and 10.0; Xen 4.20): one whose TPM was ours, one behind QEMU's own, one without any TPM.  What
did it was not found.  A fault of ours is there in each boot."""

SIGNS = {
    "Triple fault": "a virtual CPU triple-faulted, as they do here",
    "tpm0: Operation Timed out": "a guest's driver gave a command up, which was too long under way",
}
"""What Xen's console or a guest's says where the emulated machine has failed.  Linux waits 20 ms
to 2 s for a command, by its ordinal: more than this machine needs, unless others use it too."""

OWN_CPUS = ("-c", "3", "-x", "dom0_max_vcpus=1 dom0_vcpus_pin")
"""Domain 0 and the vTPM domain have the first; guests are not taken off theirs by Xen."""

LIBVIRT_CPU = (
    "-C",
    ",+vme,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec,x-force-features=on",
)
"""libvirt takes a processor only that has all of one of its models, each of which has VME or
SYSENTER.  TCG has no VME, and Xen hides an AMD's SYSENTER; so the machine says that it has VME,
which nothing here uses.  The rest is what QEMU leaves out by itself where it is not forced."""

ALL = bool(os.environ.get("QVB_RIG_ALL"))
"""Run the checks too that have not been seen to pass each time: `make test-xen-hvm`."""


def booted(
    rig: Rig,
    program: str,
    checks: Checks,
    memory_mib: int,
    files: dict[str, Path] | None = None,
    options: Sequence[str] = (),
) -> Boot:
    """Boot, and keep what was printed; again where the emulated processor has failed."""
    keep = KEPT / f"{program.replace(' ', '-')}-{rig.release.xen}"
    wanted = checks.names if ALL else []
    for boots_left in reversed(range(BOOTS_MAX)):
        shutil.rmtree(keep / "logs", ignore_errors=True)
        boot = rig.boot(
            *(program, *wanted),
            memory_mib=memory_mib,
            timeout_s=3000,
            files=files,
            keep=keep,
            options=options,
        )
        (keep / "lines").write_text("\n".join(boot.lines) + "\n")
        consoles = [keep / "console.log", *(keep / "logs").glob("*.serial.log")]
        said = "".join(path.read_text(errors="replace") for path in consoles)
        signs = [meaning for sign, meaning in SIGNS.items() if sign in said]
        if boot.status == 0 or not signs or not boots_left:
            return boot
        rig.say(f"{signs[0]}: everything again")
    raise AssertionError("no boot")


@pytest.fixture(scope="session")
def dom0_boot(say: Say) -> Boot:
    """Both ends in domain 0, Xen 4.17."""
    return booted(Rig(BOOKWORM, say=say), "dom0", dom0.check, 2048)


@pytest.fixture(scope="session")
def vtpm_image(say: Say, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an operator's `vtpm-image` makes: a kernel, an initramfs, a disk and an xl.cfg."""
    folder = tmp_path_factory.mktemp("image")
    kernels = cache_dir() / "vtpm-image"
    say(f"vtpm-image: Debian's kernel goes to {kernels}, unless it is there")
    words = ["--debian", str(kernels), "--make-state", "--output", str(folder / "vtpm.cfg")]
    command = [sys.executable, "-m", "qemu_vtpm_bridge", "vtpm-image", *words, str(folder)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="session")
def domains_boot(say: Say, vtpm_image: Path) -> Boot:
    """A vTPM domain of its own, Xen 4.17."""
    files = {f"image/{path.name}": path for path in vtpm_image.iterdir()}
    return booted(Rig(BOOKWORM, say=say), "domains", domains.check, 2560, files)


@pytest.fixture(scope="session")
def xl_boot(say: Say) -> Boot:
    """xl and its device models, Xen 4.20: the first that asks a QEMU what it can."""
    rig = Rig(TRIXIE, say=say)
    return booted(rig, "xl", xl.check, 2560, {"qemu": rig.device_model()})


@pytest.fixture(scope="session")
def libvirt_boot(say: Say) -> Boot:
    """libvirtd's libxl driver, Xen 4.20."""
    rig = Rig(TRIXIE, say=say)
    files = {"qemu": rig.device_model()}
    return booted(rig, "libvirt", libvirt.check, 3584, files, (*LIBVIRT_CPU, *OWN_CPUS))


@pytest.fixture(scope="session")
def stubdom_boot(say: Say, tmp_path_factory: pytest.TempPathFactory) -> Boot:
    """QEMU and the bridge in a stub domain, Xen 4.20."""
    rig = Rig(TRIXIE, say=say)
    folder = tmp_path_factory.mktemp("clock")
    files = {"qemu": rig.device_model(), "slow_clock.so": rig.slow_clock(folder)}
    return booted(rig, "stubdom", stubdom.check, 3584, files, OWN_CPUS)


def guests_boot(rig: Rig, story: str, files: dict[str, Path]) -> Boot:
    """HVM guests, Xen 4.20: the first whose hvmloader has a TPM 2.0 table is 4.18."""
    return booted(rig, f"guests {story}", guests.STORIES[story], 3584, files, OWN_CPUS)


@pytest.fixture(scope="session")
def crb_boot(say: Say) -> Boot:
    """The bridge is the CRB device of a guest of a stock QEMU."""
    rig = Rig(TRIXIE, say=say)
    return guests_boot(rig, "crb", {"ovmf": rig.ovmf()} if ALL else {})


@pytest.fixture(scope="session")
def qemus_crb_boot(say: Say) -> Boot:
    """A guest of a QEMU that has TPM devices."""
    rig = Rig(TRIXIE, say=say)
    return guests_boot(rig, "qemus-crb", {"qemu": rig.device_model()})


@pytest.fixture(scope="session")
def tis_boot(say: Say) -> Boot:
    """TPM 1.2, either way."""
    rig = Rig(TRIXIE, say=say)
    return guests_boot(rig, "tis", {"qemu": rig.device_model()})
