"""The systemd units: well-formed, hardened, and enough for the programs that they start."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vtpm_bridge.cli import build_parser
from qemu_vtpm_bridge.confine_policy import bridge_policy, broker_policy, vtpm_policy
from tests.systemd.units import UNITS, setting, settings

PROGRAM = Path(sys.executable).parent / "qemu-vtpm-bridge"
DOOR, DEVICE = "qemu-vtpm-bridge@.service", "qemu-vtpm-bridge-device@.service"
CONFINED = [DOOR, DEVICE, "vtpm@.service"]
"""Whose programs become another user and confine themselves."""
STUB_DOMAINS = "qemu-vtpm-bridge-stub-domains.service"
SERVICES = [*CONFINED, STUB_DOMAINS]
EXPOSURE_MAX = 18
"""A tenth each, of systemd-analyze's 0 to 10; docs/security.md says what is in it."""

ANALYZE = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)

STARTS_WITH = """
    execve clone clone3 setresuid setresgid setgroups capset prctl seccomp bind listen socket
    landlock_create_ruleset landlock_add_rule landlock_restrict_self prlimit64 renameat fchmodat
    umask mkdir fchown fchownat lchown vfork wait4
"""
"""What the programs do before they are confined, beyond what they do later."""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, with the program where this tree has it."""
    for unit in UNITS.iterdir():
        text = unit.read_text(encoding="utf-8")
        text = text.replace("ExecStart=qemu-vtpm-bridge", f"ExecStart={PROGRAM}")
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    return tmp_path


def analyze(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *words],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
    )


@ANALYZE
def test_systemd_finds_nothing_wrong_with_the_units(installed: Path) -> None:
    names = ["qemu-vtpm-bridge@web.service", "qemu-vtpm-bridge@web.socket", "vtpm@a.service"]
    names += ["qemu-vtpm-bridge-device@web.service", STUB_DOMAINS]
    done = analyze(installed, "verify", "--man=no", *(f"./{name}" for name in names))
    ours = [line for line in done.stderr.splitlines() if "vtpm" in line]
    assert not ours
    assert done.returncode == 0, done.stderr
    broken = installed / "vtpm@.service"
    broken.write_text(broken.read_text().replace("PrivateNetwork=yes", "PrivateNetwork=perhaps"))
    done = analyze(installed, "verify", "--man=no", "./vtpm@a.service")
    assert "Failed to parse boolean value" in done.stderr  # it does look


@ANALYZE
@pytest.mark.parametrize("unit", SERVICES)
def test_the_units_leave_little_open(installed: Path, unit: str) -> None:
    words = ["security", "--offline=true", f"--threshold={EXPOSURE_MAX}", f"./{unit}"]
    done = analyze(installed, *words)
    print(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout
    # The bound counts: a unit without its rules is far above it.
    loose = installed / unit
    loose.write_text(
        re.sub(r"(?m)^(Protect|Private|Restrict|System|Cap).*\n", "", loose.read_text())
    )
    assert analyze(installed, *words).returncode != 0


def members(group: str) -> set[str]:
    """Return the calls of one of systemd's sets, and of the sets in it."""
    done = subprocess.run(
        ["systemd-analyze", "syscall-filter", "--no-pager", group],
        check=True,
        capture_output=True,
        text=True,
    )
    found: set[str] = set()
    for line in done.stdout.splitlines()[1:]:
        word = line.strip()
        if word.startswith("@"):
            found |= members(word)
        elif word and not word.startswith("#"):
            found.add(word)
    return found


def allowed_by(unit: str) -> set[str]:
    """Return what the unit's SystemCallFilter= lines leave, read as systemd reads them."""
    allowed = members("@default")
    for key, value in settings(unit):
        if key != "SystemCallFilter":
            continue
        calls: set[str] = set()
        for word in value.removeprefix("~").split():
            calls |= members(word) if word.startswith("@") else {word}
        allowed = allowed - calls if value.startswith("~") else allowed | calls
    return allowed


@ANALYZE
@pytest.mark.parametrize("unit", CONFINED)
def test_the_units_allow_every_call_that_the_programs_need(tmp_path: Path, unit: str) -> None:
    device = unit == DEVICE
    policies = (
        [bridge_policy(sockets=[], device_model=device), broker_policy(device_model=device)]
        if unit.startswith("qemu")
        else [vtpm_policy(state_dir=tmp_path, swtpm="swtpm", sockets=[])]
    )
    needed = {call.name for policy in policies for call in policy.calls} | set(STARTS_WITH.split())
    assert not needed - allowed_by(unit)


@ANALYZE
def test_who_follows_stub_domains_may_do_what_trio_and_xenstore_need() -> None:
    """A confined bridge does that too, and more."""
    assert not {call.name for call in bridge_policy(sockets=[]).calls} - allowed_by(STUB_DOMAINS)
    assert setting(STUB_DOMAINS, "ExecStart").split()[:2] == ["qemu-vtpm-bridge", "stub-domains"]


@pytest.mark.parametrize("unit", CONFINED)
def test_what_the_units_start_is_a_command_line_that_works(unit: str) -> None:
    words = setting(unit, "ExecStart").replace("%i", "guest").replace("%I", "guest").split()
    assert words[0] == "qemu-vtpm-bridge"
    if "--config" in words:
        words += ["--backend", "vtpm"]  # from the guest's file
    if unit == DEVICE:
        words += ["--device", "crb"]
    args = build_parser().parse_args(words[1:])
    assert args.run_as == "qemu-vtpm-bridge"
    assert args.confine == "auto"


def test_the_units_agree_with_each_other() -> None:
    socket, service = "qemu-vtpm-bridge@.socket", "qemu-vtpm-bridge@.service"
    assert setting(socket, "ListenStream") == "/run/qemu-vtpm-bridge/%i.sock"
    assert setting(service, "Requires") == socket.replace("@", "@%i")
    assert "--socket systemd" in setting(service, "ExecStart")
    for unit in SERVICES:
        assert setting(unit, "Type") == "notify"
        assert int(setting(unit, "WatchdogSec")) >= 60  # a busy host is no dead one
    users = (UNITS.parent / "sysusers.d" / "qemu-vtpm-bridge.conf").read_text(encoding="utf-8")
    assert re.search(r"^u qemu-vtpm-bridge ", users, re.MULTILINE)


def test_the_two_bridges_units_differ_in_what_a_device_needs_and_in_nothing_else() -> None:
    door, device = set(settings(DOOR)), set(settings(DEVICE))
    assert {value for key, value in device - door if key == "DeviceAllow"} == {
        "/dev/xen/privcmd rw",
        "/dev/xen/hypercall rw",
    }
    # A directory of its own making in place of its socket unit's; and it is tried without end.
    named = {"Description", "After", "ExecStart"}
    assert {key for key, _ in door - device} == {*named, "Requires", "ReadWritePaths"}
    assert {key for key, _ in device - door} - named == {
        *("ConditionPathExists", "Before", "StartLimitIntervalSec"),
        *("RuntimeDirectory", "RuntimeDirectoryPreserve", "DeviceAllow"),
    }
    assert setting(DEVICE, "StartLimitIntervalSec") == "0"
    for unit in (DOOR, DEVICE):
        assert setting(unit, "KillMode") == "mixed"  # a broker that hangs is in nobody's way
