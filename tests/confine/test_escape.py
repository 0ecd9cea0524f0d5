"""Getting out again: every way is tried in a process that our code confined, and fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vtpm_bridge._shim import lib
from tests.confine.places import open_directory

SCRIPT = Path(__file__).with_name("escape.py")
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
LANDLOCK = pytest.mark.skipif(lib.confine_landlock_abi() < 0, reason="this kernel has no Landlock")
SCOPES = lib.confine_landlock_abi() >= 6
TCP_RULES = lib.confine_landlock_abi() >= 4

FILES = {
    "read /etc/shadow",
    "read /etc/hostname",
    "list /",
    "write elsewhere",
    "write own code",
    "connect tcp",
}
"""Landlock's part: EACCES.  All else is EPERM, but for the exceptions in the tests."""


@pytest.fixture
def place() -> Iterator[Path]:
    with open_directory() as directory:
        directory.chmod(0o777)
        (directory / "state").mkdir()
        (directory / "state").chmod(0o777)
        yield directory / "state"


def outcomes(role: str, place: Path) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), role, str(place)], check=True, stdout=subprocess.PIPE
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def forget_what_this_kernel_cannot(found: dict[str, str]) -> None:
    if not TCP_RULES:
        del found["connect tcp"]
    if not SCOPES:
        del found["connect abstract"], found["signal"]


@ROOT
@LANDLOCK
@pytest.mark.parametrize("role", ["bridge", "device"])
def test_nothing_is_regained_in_a_bridge(place: Path, role: str) -> None:
    found = outcomes(role, place)
    if role == "device":
        # What a guest's device needs of Xen, and no hypercall of its own choice.
        assert found.pop("hypercall of a device model") == "ENOTTY"
        assert found.pop("map foreign memory") == "ENOTTY"
        assert found.pop("bind a domain's port") == "ENOTTY"
    assert found.pop("clone3") == "ENOSYS"  # the answer that sends libraries to clone
    assert found.pop("fork") == "EPERM"
    forget_what_this_kernel_cannot(found)
    assert {name for name, outcome in found.items() if outcome == "EACCES"} == FILES & set(found)
    assert {found[name] for name in found if name not in FILES} == {"EPERM"}
    assert not (place.parent / "escaped").exists()


@ROOT
@LANDLOCK
def test_nothing_is_regained_in_a_broker(place: Path) -> None:
    """It stays root, so that what refuses here is never the lack of a user's rights."""
    found = outcomes("broker", place)
    assert found.pop("restrict privcmd") == "ENOTTY"
    assert found.pop("restrict evtchn") == "ENOTTY"
    assert found.pop("clone3") == "ENOSYS"
    forget_what_this_kernel_cannot(found)
    assert {name for name, outcome in found.items() if outcome == "EACCES"} == FILES & set(found)
    assert {found[name] for name in found if name not in FILES} == {"EPERM"}, found
    assert not (place.parent / "escaped").exists()


@ROOT
@LANDLOCK
def test_nothing_is_regained_in_a_vtpm_domain_and_swtpm_runs(place: Path) -> None:
    found = outcomes("vtpm", place)
    assert found.pop("swtpm") == "done"
    assert found.pop("bind an interrupt of Xen's") == "ENOTTY"
    assert found.pop("bind a domain's port") == "ENOTTY"
    assert found.pop("keep state") == "done"
    assert found.pop("clone3") == "ENOSYS"
    # It may start programs: swtpm, setpriv and their loader, which may read no other program.
    assert found.pop("shell") == "EACCES"
    assert found.pop("shell by the loader") == "EACCES"
    forget_what_this_kernel_cannot(found)
    assert {name for name, outcome in found.items() if outcome == "EACCES"} == FILES & set(found)
    assert {found[name] for name in found if name not in FILES} == {"EPERM"}


@ROOT
def test_the_same_ways_are_open_to_a_process_that_is_not_confined(place: Path) -> None:
    """What the tests above compare with: the ways lead somewhere."""
    found = outcomes("nothing", place)
    for name in (
        *("setuid", "setresuid", "setgroups", "capset", "fork", "shell", "signal", "inet"),
        *("read /etc/shadow", "list /", "write elsewhere", "write own code", "connect abstract"),
        *("memfd_create", "personality", "map writable and runnable", "make runnable"),
        *("raise a limit", "signal by a descriptor"),
    ):
        assert found[name] == "done", name
    # Refused for other reasons than ours: the arguments are wrong on purpose.
    for name in (
        *("mount", "umount2", "pivot_root", "bpf", "userfaultfd", "setns", "clone3"),
        *("hypercall", "hypercall of a device model", "map foreign memory"),
    ):
        assert found[name] not in ("EPERM", "EACCES"), name
    assert found["connect tcp"] == "ECONNREFUSED"
