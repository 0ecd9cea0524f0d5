"""The vTPM domain's first program, booted with a real kernel: what it does with its disk.

The machine is QEMU without Xen, so the disk is a virtio one, and the backend that init starts
has no XenStore to reach: that it says so is the sign that init let it start.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_vtpm_bridge.image.build import build
from qemu_vtpm_bridge.image.init import NEW_MARK
from qemu_vtpm_bridge.image.kernel import Kernel, debian_kernel
from qemu_vtpm_bridge.image.state_disk import make_state_disk
from tests.xen.rig.machine import cache_dir

pytestmark = [
    pytest.mark.skipif(
        shutil.which("qemu-system-x86_64") is None or shutil.which("swtpm") is None,
        reason="QEMU and swtpm are not installed",
    ),
    pytest.mark.timeout(900),
]

CACHE = cache_dir() / "vtpm-image"
BOOT_DEADLINE_S = 400.0
STARTED = "XenStore cannot be reached"
"""What the backend says where there is no Xen."""
REFUSED = "NOT SERVING"


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    """Debian's, downloaded once for the tree."""
    print(f"\nvtpm-image: Debian's kernel goes to {CACHE}, unless it is there", flush=True)
    return debian_kernel(CACHE)


@pytest.fixture(scope="module")
def initramfs(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("boot") / "initramfs.gz"
    image = build(kernel, ("virtio_pci", "virtio_blk"))
    path.write_bytes(image.archive.gzipped(level=1))
    return path


class Machine:
    """A running QEMU and what it writes to its serial line, which is its standard output."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._console = b""

    def console(self) -> str:
        """Return what has been read of the serial line."""
        return self._console.decode("latin-1")

    def wait_for(self, *words: str) -> str:
        """Return the console once a line with one of the words is on it, to its end."""
        assert self.process.stdout is not None
        end = time.monotonic() + BOOT_DEADLINE_S
        while not any(word in self.console().rpartition("\n")[0] for word in words):
            left = max(0, end - time.monotonic())
            assert select.select([self.process.stdout], [], [], left)[0], self.console()
            chunk = os.read(self.process.stdout.fileno(), 65536)
            assert chunk, f"QEMU ended: {self.console()}"
            self._console += chunk
        return self.console()


@contextmanager
def booted(
    kernel: Kernel, initramfs: Path, directory: Path, disk: Path | None, *, options: str = ""
) -> Iterator[Machine]:
    """Boot with this state disk; the machine is killed in the end."""
    # On a loaded machine TCG's timer may come too late for the kernel's check of it.
    command_line = "console=ttyS0 quiet panic=-1 no_timer_check rootfstype=ramfs"
    words = [
        *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "256", "-machine", "q35"),
        *("-nodefaults", "-display", "none", "-nic", "none", "-no-reboot"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
        *("-append", f"{command_line} vtpm.disk=LABEL=vtpm-state"),
        *("-serial", "stdio"),
    ]
    if disk is not None:
        words += ["-drive", f"file={disk},format=raw,if=virtio{options}"]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            yield Machine(process)
        finally:
            process.kill()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A new state disk."""
    path = tmp_path / "state.img"
    make_state_disk(path, 16)
    return path


def debugfs(disk: Path, *commands: str) -> str:
    words = ["debugfs", "-w", "-f", "-", str(disk)]
    done = subprocess.run(
        words, input="\n".join(commands), check=True, capture_output=True, text=True
    )
    return done.stdout


def test_a_new_disk_is_served_from_and_a_killed_domain_finds_it_again(
    kernel: Kernel, initramfs: Path, tmp_path: Path, disk: Path
) -> None:
    with booted(kernel, initramfs, tmp_path, disk) as machine:
        console = machine.wait_for(STARTED, REFUSED)
        assert "a new TPM is made" in console
        assert REFUSED not in console
    with booted(kernel, initramfs, tmp_path, disk) as machine:
        console = machine.wait_for(STARTED, REFUSED)
        assert "recovering journal" in console
        # Without Xen there is no TPM yet, so the mark is still there.
        assert "a new TPM is made" in console
        assert REFUSED not in console


def test_a_disk_with_a_tpm_loses_the_mark(
    kernel: Kernel, initramfs: Path, tmp_path: Path, disk: Path
) -> None:
    state = tmp_path / "tpm2-00.permall"
    state.write_bytes(b"state")
    debugfs(disk, "mkdir /tpm", f"write {state} /tpm/{state.name}")
    with booted(kernel, initramfs, tmp_path, disk) as machine:
        console = machine.wait_for(STARTED, REFUSED)
        assert "a new TPM is made" not in console
        assert REFUSED not in console
    debugfs(disk, "rm /tpm/tpm2-00.permall")
    with booted(kernel, initramfs, tmp_path, disk) as machine:
        assert "holds no TPM and is no new one" in machine.wait_for(STARTED, REFUSED)


def test_a_missing_disk_is_waited_for(
    kernel: Kernel, initramfs: Path, tmp_path: Path, disk: Path
) -> None:
    with booted(kernel, initramfs, tmp_path, None) as machine:
        console = machine.wait_for(STARTED, REFUSED)
        assert "no disk is the state disk, LABEL=vtpm-state" in console
        assert STARTED not in console
        assert "the state disk is" not in console
        assert disk.exists()


def full(disk: Path) -> None:
    filler = disk.with_name("filler")
    filler.write_bytes(b"x" * (11 << 20))
    debugfs(disk, f"write {filler} /filler")


def used_elsewhere(disk: Path) -> None:
    debugfs(disk, f"rm /{NEW_MARK}")


def damaged(disk: Path) -> None:
    # The root directory's inode says that it is none.
    debugfs(disk, "clri <2>")


@pytest.mark.parametrize(
    ("spoil", "options", "complaint"),
    [
        (full, "", "KiB of room"),
        (used_elsewhere, "", "holds no TPM and is no new one"),
        (damaged, "", "is damaged"),
        (None, ",readonly=on", "can only be read"),
    ],
    ids=["full", "foreign", "damaged", "read-only"],
)
def test_a_disk_that_will_not_do_is_said_and_nothing_is_served(
    kernel: Kernel,
    initramfs: Path,
    tmp_path: Path,
    disk: Path,
    spoil: object,
    options: str,
    complaint: str,
) -> None:
    if callable(spoil):
        spoil(disk)
    with booted(kernel, initramfs, tmp_path, disk, options=options) as machine:
        console = machine.wait_for(STARTED, REFUSED)
        refusal = next(line for line in console.splitlines() if REFUSED in line)
        assert complaint in refusal
        console = machine.wait_for("vtpm-domain: next: ")
        assert STARTED not in console
