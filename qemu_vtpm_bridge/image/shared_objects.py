"""What programs and extension modules load: their shared libraries, found as they find them.

Theory of operation.  ldd(1) has the machine's own loader walk DT_NEEDED through RUNPATH and
the cache, so what it names is what the program runs with here.  A few libraries are loaded
by name while running (dlopen) and stand in no header; those are asked of ldconfig's cache.

ldd may run what it looks at, so only programs that this machine runs anyhow are given to it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..errors import ConfigError

DLOPENED: Final = {
    "libxengnttab.so.1": "libxengnttab1",
    "libxenevtchn.so.1": "libxenevtchn1",
    # glibc loads it when a thread ends by itself.
    "libgcc_s.so.1": "libgcc-s1",
}
"""Libraries that are loaded by name, and Debian's packages that hold them."""

_LINE: Final = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$")
_MISSING: Final = re.compile(r"^\s*(\S+) => not found$", re.MULTILINE)
_CACHE_LINE: Final = re.compile(r"^\s*(\S+) \((.*)\) => (\S+)$", re.MULTILINE)


def libraries_of(programs: Iterable[Path]) -> dict[str, Path]:
    """Return the libraries of these ELF files by their names, the loader's included.

    Raises ConfigError where one is not found.
    """
    found: dict[str, Path] = {}
    for program in programs:
        for path in _ldd(program):
            found.setdefault(path.name, path)
    return found


def _ldd(program: Path) -> list[Path]:
    done = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, check=False, timeout=60
    )
    missing = _MISSING.search(done.stdout)
    if missing:
        raise ConfigError(
            f"{program} needs {missing[1]}, which is not on this machine",
            next_step="install what holds it",
        )
    # A static program ends in "not a dynamic executable": it needs nothing.
    return [Path(match[1]) for line in done.stdout.splitlines() if (match := _LINE.match(line))]


def dlopened() -> list[Path]:
    """Return where the libraries in DLOPENED are; raises ConfigError where one is missing."""
    ldconfig = shutil.which("ldconfig", path="/sbin:/usr/sbin:/bin:/usr/bin")
    if ldconfig is None:
        raise ConfigError("ldconfig is missing", next_step="install libc-bin")
    cache = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=True).stdout
    known: dict[str, str] = {}
    for name, kind, path in _CACHE_LINE.findall(cache):
        # The first is the one that is loaded; 32-bit ones are not for us.
        if "x86-64" in kind or "AArch64" in kind:
            known.setdefault(name, path)
    for name, package in DLOPENED.items():
        if name not in known:
            raise ConfigError(
                f"{name} is missing, which the vTPM domain's program loads",
                next_step=f"install {package}",
            )
    return [Path(known[name]) for name in DLOPENED]


def program_path(name: str, package: str) -> Path:
    """Return where a program is; raises ConfigError where it is not."""
    found = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise ConfigError(f"{name} is missing", next_step=f"install {package}")
    return Path(found)
