"""A newer QEMU beside the system's: the one that speaks vfio-user.

Theory of operation.  Debian's backports have it.  An apt root of its own, below `build/`,
downloads it with everything it needs, down to the C library; the packages are unpacked,
not installed, and the program is run by its own dynamic loader.  So it needs no
privileges and touches nothing of the machine's.  About 40 MB are downloaded, once.

    python -m tests.support.qemu11

Source: apt.conf(5), ld.so(8); QEMU has vfio-user-pci since 10.1.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

PLACE: Final = Path("build/qemu11").resolve()
MIRROR: Final = "http://deb.debian.org/debian"
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES: Final = ("trixie", "trixie-backports")
PACKAGE: Final = "qemu-system-x86"
_LIBRARIES: Final = "usr/lib/x86_64-linux-gnu"


class UnavailableError(Exception):
    """The newer QEMU cannot be had here; the text says why."""


def command() -> list[str]:
    """Return the words that start the newer QEMU, fetching it first where it is missing.

    Raises UnavailableError with the reason.
    """
    root = PLACE / "root"
    if not (PLACE / "complete").exists():
        _fetch(root)
    libraries = root / _LIBRARIES
    return [
        str(libraries / "ld-linux-x86-64.so.2"),
        *("--library-path", f"{libraries}"),
        str(root / "usr/bin/qemu-system-x86_64"),
        *("-L", str(root / "usr/share/qemu"), "-L", str(root / "usr/share/seabios")),
    ]


def _fetch(root: Path) -> None:
    if not shutil.which("apt-get") or not Path(KEYRING).exists():
        raise UnavailableError("this machine has no apt-get, or not Debian's keys")
    apt = PLACE / "apt"
    for directory in ("state/lists/partial", "cache/archives/partial", "etc"):
        (apt / directory).mkdir(parents=True, exist_ok=True)
    (apt / "state/status").touch()
    sources = apt / "etc/sources.list"
    sources.write_text(
        "".join(f"deb [signed-by={KEYRING}] {MIRROR} {suite} main\n" for suite in SUITES)
    )
    options = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "state/status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferences": "-",
        "Dir::Etc::preferencesparts": "-",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Debug::NoLocking": "1",
        "APT::Install-Recommends": "0",
        "APT::Keep-Downloaded-Packages": "1",
    }
    words = ["apt-get", "-q", "-y"]
    for name, value in options.items():
        words += ["-o", f"{name}={value}"]
    _run([*words, "update"])
    _run([*words, "-t", SUITES[-1], "install", "--download-only", PACKAGE, "seabios"])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    shutil.rmtree(apt)
    (PLACE / "complete").touch()


def _run(words: list[str]) -> None:
    try:
        subprocess.run(words, capture_output=True, text=True, check=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
        raise UnavailableError(f"`{words[0]} {words[-1]}` failed: {said}") from error


if __name__ == "__main__":
    print(" ".join(command()))
    sys.exit(subprocess.run([*command(), "--version"], check=False).returncode)
