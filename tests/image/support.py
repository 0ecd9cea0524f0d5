"""What the tests of the vTPM domain's image share."""

from __future__ import annotations

import subprocess
from pathlib import Path

from qemu_vtpm_bridge.image.kernel import Kernel


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
