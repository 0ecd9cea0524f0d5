"""Packs the vTPM domain's initramfs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..cpio import Archive
from ..errors import ConfigError
from . import shared_objects
from .init import APPLETS, POWER_SCRIPT, USER, init_script
from .kernel import Kernel, modules_in_order
from .python_files import PythonFiles, collect

_PYTHON_LIBRARY: Final = f"usr/lib/python{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARIES: Final = "usr/lib"
_ACCOUNTS: Final = f"root:x:0:0:root:/:/bin/sh\n{USER}:x:100:100:{USER}:/:/bin/false\n"
_GROUPS: Final = f"root:x:0:\n{USER}:x:100:\n"


@dataclass(frozen=True, slots=True)
class Image:
    """An initramfs, and what it is made of (sizes before compression)."""

    archive: Archive
    sizes_bytes: dict[str, int]


def build(kernel: Kernel, more_modules: tuple[str, ...] = ()) -> Image:
    """Return the initramfs; raises ConfigError where this machine lacks a part of it."""
    archive = Archive()
    sizes = {}
    for part, add in (
        ("system", _add_system),
        ("python", _add_python),
        ("programs", _add_programs),
    ):
        before = archive.size_bytes
        add(archive)
        sizes[part] = archive.size_bytes - before
    before = archive.size_bytes
    modules = modules_in_order(kernel, more_modules)
    for name, raw in modules.items():
        archive.add_file(f"usr/lib/modules/{name}.ko", raw)
    archive.add_file("usr/lib/modules/order", "".join(f"{n}\n" for n in modules).encode())
    sizes["modules"] = archive.size_bytes - before
    return Image(archive, sizes)


def _add_system(archive: Archive) -> None:
    busybox = shared_objects.program_path("busybox", "busybox-static")
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    missing = sorted(set(APPLETS) - set(listed.stdout.split()))
    if missing:
        raise ConfigError(
            f"{busybox} has no {', '.join(missing)}", next_step="install busybox-static"
        )
    for name in ("dev", "proc", "sys", "run", "tmp", "state", "sbin", "usr/bin", _LIBRARIES):
        archive.add_directory(name)
    for link, target in (("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib")):
        archive.add_symlink(link, target)
    archive.add_symlink("usr/lib64", "lib")
    # The kernel opens it for the first program, before that one has mounted anything.
    archive.add_character_device("dev/console", 5, 1)
    archive.add_character_device("dev/null", 1, 3)
    archive.add_file("etc/passwd", _ACCOUNTS.encode())
    archive.add_file("etc/group", _GROUPS.encode())
    archive.add_file("usr/bin/busybox", busybox.read_bytes(), 0o755)
    archive.add_symlink("usr/bin/sh", "busybox")
    archive.add_file("init", init_script().encode(), 0o755)
    for name, signal in (("poweroff", "USR2"), ("reboot", "TERM")):
        script = POWER_SCRIPT.format(signal=signal)
        archive.add_file(f"sbin/{name}", script.encode(), 0o755)


def _add_python(archive: Archive) -> None:
    files: PythonFiles = collect(f"/{_PYTHON_LIBRARY}")
    for name, raw in files.compiled.items():
        archive.add_file(f"{_PYTHON_LIBRARY}/{name}", raw)
    for name, path in files.extensions.items():
        archive.add_file(f"{_PYTHON_LIBRARY}/{name}", _stripped(path), 0o755)
    # The interpreter takes it as a sign of where its library is.
    archive.add_directory(f"{_PYTHON_LIBRARY}/lib-dynload")
    python = Path(sys.executable).resolve()
    archive.add_file("usr/bin/python3", _stripped(python), 0o755)
    _add_libraries(archive, [python, *files.extensions.values()])


def _add_programs(archive: Archive) -> None:
    programs = [
        shared_objects.program_path("swtpm", "swtpm"),
        # swtpm dies with the backend by its help.
        shared_objects.program_path("setpriv", "util-linux"),
        shared_objects.program_path("e2fsck", "e2fsprogs"),
    ]
    for path in programs:
        archive.add_file(f"usr/bin/{path.name}", _stripped(path.resolve()), 0o755)
    libraries = shared_objects.dlopened()
    for path in libraries:
        archive.add_file(f"{_LIBRARIES}/{path.name}", _stripped(path), 0o755)
    _add_libraries(archive, [*programs, *libraries])


def _add_libraries(archive: Archive, programs: list[Path]) -> None:
    for name, path in sorted(shared_objects.libraries_of(programs).items()):
        archive.add_file(f"{_LIBRARIES}/{name}", _stripped(path), 0o755)


def _stripped(path: Path) -> bytes:
    """Return a program or library, without its symbols where binutils are installed."""
    strip = shutil.which("strip")
    if strip is None:
        return path.read_bytes()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "out")
        subprocess.run([strip, "--strip-unneeded", "-o", str(out), str(path)], check=True)
        return out.read_bytes()
