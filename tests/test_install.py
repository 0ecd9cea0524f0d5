"""`make install`: what a host has of the program, with nothing but this tree."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import qemu_vtpm_bridge

ROOT = Path(__file__).parent.parent
PROGRAMS = ("qemu-vtpm-bridge", "qemu-vtpm-bridge-dm", "qemu-vtpm-bridge-xapi")
DEADLINE_S = 600


def make(goal: str, prefix: Path) -> str:
    """Have make do it as from a shell that knows nothing of this tree's environment."""
    environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    environment["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return subprocess.run(
        ["make", "--no-print-directory", "-C", str(ROOT), goal, f"PREFIX={prefix}"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=DEADLINE_S,
    ).stdout


def files(below: Path, *, beside: Path) -> set[str]:
    """Return the files below a directory, without those of a directory in it."""
    return {
        str(path.relative_to(below))
        for path in below.rglob("*")
        if not path.is_dir() and not path.is_relative_to(beside)
    }


def have_had(prefix: Path, name: str) -> None:
    """Make the installation one of a version that had one file more in its `lib`."""
    home = prefix / "lib/qemu-vtpm-bridge"
    for lib in (home / "lib", prefix / "lib"):
        (lib / name).touch()
    (record,) = home.glob("lib/python3*/site-packages/qemu_vtpm_bridge-*.dist-info/RECORD")
    record.write_text(f"{record.read_text()}../../{name},,\n")


@pytest.mark.timeout(2 * DEADLINE_S)
def test_it_is_where_each_looks_and_goes_away_again(tmp_path: Path) -> None:
    prefix = tmp_path / "a prefix"
    make("install", prefix)
    have_had(prefix, "systemd/system/of-another-version.service")
    said = make("install", prefix)  # it upgrades
    assert said.splitlines()[-1].endswith("next: systemd-sysusers && systemctl daemon-reload")
    installed = files(prefix, beside=prefix / "lib/qemu-vtpm-bridge")
    units = {f"lib/systemd/system/{path.name}" for path in (ROOT / "packaging/systemd").iterdir()}
    pages = {
        f"share/man/{path.relative_to(ROOT / 'docs/man')}"
        for path in (ROOT / "docs/man").rglob("*.[15]")
    }
    assert installed == {
        *(f"bin/{name}" for name in PROGRAMS),
        *units,
        *pages,
        "lib/sysusers.d/qemu-vtpm-bridge.conf",
        "share/qemu-vtpm-bridge/libvirt/qemu-vtpm-bridge",
    }
    for name in units:  # to systemd a link would be another place's unit
        unit = prefix / name
        assert not unit.is_symlink()
        assert unit.read_bytes() == (ROOT / "packaging/systemd" / unit.name).read_bytes()

    program = prefix / "bin/qemu-vtpm-bridge"
    version = subprocess.check_output([program, "--version"], text=True, cwd="/")
    assert version.strip() == f"qemu-vtpm-bridge {qemu_vtpm_bridge.__version__}"

    make("uninstall", prefix)
    assert not files(prefix, beside=prefix / "none")
    make("uninstall", prefix)
