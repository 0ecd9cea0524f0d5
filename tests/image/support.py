"""What the tests of the vTPM domain's image share."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.image.kernel import Kernel

STEPS = {
    *("open", "os.mkdir", "os.rmdir", "os.rename", "os.link", "os.remove", "os.truncate"),
    *("os.chmod", "fcntl.flock", "subprocess.Popen", "tempfile.mkdtemp", "shutil.rmtree"),
}
"""What Python says to an audit hook before it changes a file."""
DIED = 9


def module(*depends: str, soft: str = "") -> bytes:
    """Return what a kernel module says of what it depends on."""
    raw = b"\x7fELF...\0license=GPL\0depends=" + ",".join(depends).encode() + b"\0"
    if soft:
        raw += b"softdep=pre: " + soft.encode() + b"\0"
    return raw + b"name=x\0"


def kernel_of(root: Path, modules: dict[str, bytes], *, release: str = "6.1.0-9") -> Kernel:
    """Make a kernel's files; modules are named with their suffix."""
    directory = root / "lib/modules" / release
    (directory / "kernel/drivers").mkdir(parents=True)
    for name, raw in modules.items():
        (directory / "kernel/drivers" / name).write_bytes(raw)
    builtin = "kernel/fs/ext4/ext4.ko\nkernel/drivers/xen/xen-privcmd.ko\n"
    (directory / "modules.builtin").write_text(builtin, encoding="ascii")
    image = root / "boot" / f"vmlinuz-{release}"
    image.parent.mkdir(exist_ok=True)
    image.write_bytes(b"kernel")
    return Kernel(image, directory)


def xen_kernel(root: Path) -> Kernel:
    """A kernel with every module that a vTPM domain needs, as far as files go."""
    names = ("xen-blkfront", "xen-evtchn", "xen-gntdev", "xenfs")
    return kernel_of(root, {f"{name}.ko": module() for name in names})


def unpack(initramfs: Path, root: Path) -> None:
    """Unpack an initramfs; without root, its device files are left out."""
    root.mkdir()
    subprocess.run(
        f"gzip -dc {initramfs} | (cd {root} && cpio --quiet -id --no-absolute-filenames)",
        shell=True,
        check=False,
        capture_output=True,
    )
    assert (root / "init").exists()


def uuid_of(disk: Path) -> str:
    done = subprocess.run(["dumpe2fs", "-h", disk], check=True, capture_output=True, text=True)
    found = re.search(r"^Filesystem UUID: +(\S+)$", done.stdout, re.MULTILINE)
    assert found is not None
    return found[1]


# Crashes.


def die_before(step: int, function: Any) -> None:
    """Call a function, and die without any clean-up before this step of it."""
    count = itertools.count()

    def hook(event: str, _: tuple[Any, ...]) -> None:
        if event in STEPS and next(count) == step:
            os._exit(DIED)

    sys.addaudithook(hook)
    sys.exit(function())


def dies(step: int, function: Any) -> bool:
    """Whether a function had a step of this number: it died before it."""
    process = multiprocessing.get_context("fork").Process(
        target=functools.partial(die_before, step, function)
    )
    process.start()
    process.join()
    assert process.exitcode in (0, DIED)
    return process.exitcode == DIED


def deaths(function: Any, steps_min: int) -> Iterator[int]:
    """Die before each step in turn; the last time it lives."""
    for step in itertools.count():
        died = dies(step, function)
        yield step
        if not died:
            assert step >= steps_min
            return
