"""The demo's Linux guest: Debian's kernel, and an initramfs that is built on the spot.

Theory of operation.  The kernel package is downloaded and unpacked, not installed.  The
initramfs holds a static busybox and one script, which reads the PCRs through the
kernel's own driver, sends two commands through /dev/tpm0 and says what it found on the
serial line, each finding a line that begins with `DEMO`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..cpio import Archive
from ..errors import ConfigError

PCRS: Final = (*range(11), 12)
"""What the firmware and the kernel measure, and one that nobody does."""

MARKED_PCR: Final = 12
"""The guest extends this one at the end of each boot."""

_META_PACKAGE: Final = "linux-image-cloud-amd64"
"""The kernel for virtual machines: 27 MB instead of 71, and both TPM drivers are built in."""

_INIT: Final = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
exec >/dev/ttyS0 2>&1 </dev/ttyS0
tpm=/sys/class/tpm/tpm0
pcr() { cat $tpm/pcr-sha256/$1; }
# The driver takes one write as one command, and gives a response to one read.
bytes() { printf "$(printf '\\x%s' $1)"; }
command() { exec 3<>/dev/tpm0; bytes "$1" >&3; dd bs=4096 count=1 <&3 2>/dev/null |
    od -An -v -tx1 | tr -d ' \n'; exec 3>&-; }
echo
echo "DEMO kernel $(uname -r), up $(cut -d' ' -f1 /proc/uptime) s"
[ -e /dev/tpm0 ] || { echo "DEMO no TPM"; dmesg | grep -i tpm; }
echo "DEMO driver $(basename $(readlink $tpm/device/driver))"
echo "DEMO version $(cat $tpm/tpm_version_major)"
for n in PCRS; do echo "DEMO pcr $n $(pcr $n)"; done
echo "DEMO random $(command '80 01 00 00 00 0c 00 00 01 7b 00 10')"
echo "DEMO extend $(command '80 02 00 00 00 41 00 00 01 82 00 00 00 MARK 00 00 00 09
    40 00 00 09 00 00 00 00 00 00 00 00 01 00 0b DIGEST')"
echo "DEMO marked $(pcr MARKED)"
echo "DEMO end"
while :; do sleep 1000; done
"""


@dataclass(slots=True)
class Boot:
    """What a guest said in one boot."""

    facts: dict[str, str] = field(default_factory=dict)
    pcrs: dict[int, str] = field(default_factory=dict)
    ended: bool = False


def read_boots(console: str) -> list[Boot]:
    """Return what the guest found, boot by boot, from its serial line."""
    boots: list[Boot] = []
    for match in re.finditer(r"^DEMO (\S+) ?(.*?)\r*\n", console, re.MULTILINE):
        word, rest = match.groups()
        if word == "kernel":
            boots.append(Boot())
        if not boots:
            continue
        boot = boots[-1]
        if word == "pcr":
            number, _, value = rest.partition(" ")
            boot.pcrs[int(number)] = value
        elif word == "end":
            boot.ended = True
        else:
            boot.facts[word] = rest
    return boots


def init_script() -> str:
    """Return the guest's only program."""
    return (
        _INIT.replace("PCRS", " ".join(str(n) for n in PCRS))
        .replace("MARKED", str(MARKED_PCR))
        .replace("MARK", f"{MARKED_PCR:02x}")
        .replace("DIGEST", " ".join(["5a"] * 32))
    )


def build_initramfs(directory: Path) -> Path:
    """Write the guest's initramfs below `directory` and return its path."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise ConfigError("busybox is missing", next_step="install busybox-static")
    archive = Archive()
    for name in ("bin", "dev", "proc", "sys"):
        archive.add_directory(name)
    archive.add_file("bin/busybox", Path(busybox).read_bytes(), 0o755)
    archive.add_file("init", init_script().encode(), 0o755)
    path = directory / "initramfs.gz"
    path.write_bytes(archive.gzipped(level=1))
    return path


def unpacked_kernel(directory: Path) -> Path | None:
    """Return the kernel that an earlier run left below `directory`."""
    found = sorted(directory.glob("kernel/boot/vmlinuz-*"))
    return found[-1] if found else None


def find_kernel(directory: Path) -> Path:
    """Return Debian's kernel, which is downloaded below `directory` once.

    Raises ConfigError where apt cannot deliver it.
    """
    found = unpacked_kernel(directory)
    if found is not None:
        return found
    # Aside first: what an interrupted download leaves must not be taken for a kernel.
    aside = directory / "kernel.part"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        package = _download(aside)
    except ConfigError:
        # Lists that are missing, or older than what the archive still holds.
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        _run([*root, "apt-get", "-o", "DPkg::Lock::Timeout=300", "update", "-qq"], aside)
        package = _download(aside)
    _run(["dpkg-deb", "--extract", str(package), "."], aside)
    package.unlink()
    # Only the image is needed; the modules are most of it.
    shutil.rmtree(aside / "lib", ignore_errors=True)
    shutil.rmtree(directory / "kernel", ignore_errors=True)
    aside.rename(directory / "kernel")
    found = unpacked_kernel(directory)
    if found is None:
        raise ConfigError(f"{package.name} holds no /boot/vmlinuz", next_step="see its file list")
    return found


def _download(directory: Path) -> Path:
    depends = _run(["apt-cache", "depends", _META_PACKAGE], directory)
    match = re.search(r"Depends: (linux-image-[0-9]\S*)", depends)
    if match is None:
        raise ConfigError(
            f"apt knows no kernel behind {_META_PACKAGE}", next_step="run `apt-get update`"
        )
    _run(["apt-get", "download", "-q", match[1]], directory)
    return next(directory.glob("linux-image-*.deb"))


def _run(words: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(
            words, cwd=directory, capture_output=True, text=True, check=True, timeout=300
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip() or str(error)
        raise ConfigError(
            f"`{' '.join(words)}` failed: {said.splitlines()[-1]}",
            state="the demo's guest needs Debian's kernel",
            next_step="see that this machine reaches Debian's packages",
        ) from error
    return done.stdout
