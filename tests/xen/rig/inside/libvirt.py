"""libvirt's libxl driver and our hook under a real Xen, one boot.

    python3 -m tests.xen.rig.inside.libvirt

The guide is followed line by line with a real libvirtd, whose libxl driver calls the hook for
HVM guests that stay paused.  Another script beside ours notes how libvirtd called.  What a
guest sees of its TPM is in guests.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.xen.rig.inside.lab import DEADLINE_S, LOGS, SITE, Checks, Lab, ours, run, until, xenstore
from tests.xen.rig.inside.wrapper import RUN_DIR, TPM_QEMU, WRAPPER, bridge_pid, lay_out, served

check = Checks()

VIRSH = ("virsh", "-q", "-c", "xen:///system")
HOOKS = Path("/etc/libvirt/hooks/libxl.d")
HOOK = SITE / "share/qemu-vtpm-bridge/libvirt/qemu-vtpm-bridge"
CALLS = LOGS / "hook-calls.log"
STARTED = ["prepare begin -", "start begin -", "started begin -"]
ENDED = ["stopped end -", "release end -"]

PROGRAM = Path("/usr/local/bin/qemu-vtpm-bridge")
PROGRAM_TEXT = f"""#!/bin/sh
export PYTHONPATH={os.environ.get("PYTHONPATH", "")}
export PYTHONPYCACHEPREFIX={os.environ.get("PYTHONPYCACHEPREFIX", "")}
exec {sys.executable} -m qemu_vtpm_bridge "$@"
"""
"""What pip makes of the package's console script; libvirtd hands no environment through."""

CONF = """
unix_sock_group = "root"
"""

GUESTS_TEXT = """
[guest.guest]
backend = "vtpm-of-guest"
registers = "tis"
[guest.stock]
backend = "vtpm-of-guest"
handle = 1
registers = "tis"
[guest.lost]
backend = "nobody"
"""

XML = """<domain type="xen">
  <name>{name}</name>
  <metadata>{metadata}</metadata>
  <memory unit="MiB">64</memory>
  <os><type arch="x86_64" machine="xenfv">hvm</type></os>
  <features><acpi/><apic/><pae/></features>
  <devices>{emulator}</devices>
  {commandline}
</domain>
"""


def virsh(*words: str) -> str:
    return run(*VIRSH, *words).strip()


def virsh_refused(*words: str) -> str:
    """Have virsh do what has to fail; return what it says."""
    done = subprocess.run(
        [*VIRSH, *words], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode, done
    return done.stderr


def define(
    name: str, emulator: Path | None = None, commandline: str = "", metadata: str = ""
) -> None:
    """Define a guest; without an emulator it has Debian's QEMU for Xen."""
    program = f"<emulator>{emulator}</emulator>" if emulator else ""
    path = Path(f"/tmp/{name}.xml")
    path.write_text(
        XML.format(name=name, emulator=program, commandline=commandline, metadata=metadata)
    )
    virsh("define", str(path))


def start(lab: Lab, name: str) -> int:
    """Start a guest, which stays paused; return its domain id."""
    lab.domains.add(name)
    virsh("start", "--paused", name)
    return int(virsh("domid", name))


def destroy(lab: Lab, name: str) -> None:
    """Destroy a guest; libvirtd has called `release` when virsh returns."""
    virsh("destroy", name)
    lab.domains.discard(name)


def calls(name: str) -> list[str]:
    """Return how libvirtd called its hooks for this guest since the last look."""
    lines = CALLS.read_text().splitlines()
    CALLS.write_text("")
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def start_libvirtd(lab: Lab) -> None:
    """Start libvirtd, and wait until it answers."""
    environment = {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    libvirtd = lab.program_of("libvirtd", "libvirtd", environment=environment)
    lab.kept["libvirtd"] = libvirtd

    def answers() -> bool:
        assert libvirtd.process.poll() is None, libvirtd.log.read_text()
        return not subprocess.run([*VIRSH, "list"], check=False, capture_output=True).returncode

    until(answers, "libvirtd answers")


def install(path: Path, text: str) -> None:
    """Write a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def nothing_left(name: str) -> None:
    """No socket and no entry of this guest's bridge is there."""
    assert not list(RUN_DIR.glob(f"{name}.s*")), list(RUN_DIR.iterdir())
    entries = run("xenstore-ls", "-fp", "/local/domain/0", check=False)
    assert "frontend/vtpm/" not in entries, entries


@check
def libvirtd_runs_with_its_libxl_driver(lab: Lab) -> dict[str, Any]:
    """Debian's libvirtd, our hook as it is shipped, and one that notes the calls."""
    lay_out(GUESTS_TEXT)
    install(PROGRAM, PROGRAM_TEXT)
    install(HOOKS / HOOK.name, HOOK.read_text())
    install(HOOKS / "noting", f'#!/bin/sh\necho "$@" >>{CALLS}\n')
    CALLS.touch()
    Path("/etc/libvirt/libvirtd.conf").write_text(CONF)
    start_libvirtd(lab)
    return {"version": virsh("version").splitlines()}


@check
def a_guest_without_an_entry_is_left_alone(lab: Lab) -> None:
    """It is the vTPM domain of what follows: a domain of the name is all that a bridge needs."""
    define("vtpm-of-guest")
    start(lab, "vtpm-of-guest")
    assert calls("vtpm-of-guest") == STARTED
    assert not RUN_DIR.exists()


@check
def prepare_starts_the_bridge_and_qemu_finds_it(lab: Lab) -> dict[str, Any]:
    """A QEMU with TPM devices, and the words for it as --snippet prints them."""
    define("guest", TPM_QEMU, ours("libvirt-hook", "--snippet", "guest"))
    start(lab, "guest")
    assert calls("guest") == STARTED
    until(lambda: served("guest").get("qemu", {}).get("data-attached"), "QEMU is attached")
    return {"list": ours("list").splitlines()}


@check
def reconnect_keeps_the_bridge(lab: Lab) -> None:
    """libvirtd ends and comes back under the running guest."""
    bridge = bridge_pid("guest")
    assert lab.kept["libvirtd"].end() == 0
    start_libvirtd(lab)
    until(lambda: calls("guest") == ["reconnect begin -"], "libvirtd has called")
    assert virsh("domstate", "guest") == "paused"
    assert bridge_pid("guest") == bridge
    assert served("guest")["qemu"]["data-attached"]


@check
def release_ends_the_bridge_and_removes_its_entries(lab: Lab) -> None:
    process = Path("/proc", bridge_pid("guest"))
    assert process.exists()
    destroy(lab, "guest")
    assert calls("guest") == ENDED
    until(lambda: not process.exists(), "the bridge has ended")
    nothing_left("guest")


@check
def a_guest_of_a_stock_qemu_has_the_wrapper_for_its_emulator(lab: Lab) -> None:
    """The bridge is the device; libvirtd calls for it too, and the hook ends it."""
    define("stock", WRAPPER)
    domid = start(lab, "stock")
    assert served("stock")["guest"]["domid"] == domid
    assert xenstore(f"/local/domain/{domid}/platform/tpm_version") == "1"
    process = Path("/proc", bridge_pid("stock"))
    destroy(lab, "stock")
    until(lambda: not process.exists(), "the bridge has ended")
    assert calls("stock") == [*STARTED, *ENDED]
    nothing_left("stock")


@check
def a_missing_vtpm_domain_stops_the_start(lab: Lab) -> dict[str, Any]:
    """virsh shows the hook's message."""
    define("lost", TPM_QEMU, ours("libvirt-hook", "--snippet", "lost"))
    said = virsh_refused("start", "lost")
    assert "qemu-vtpm-bridge: no domain is named nobody; next: " in said, said
    assert calls("lost") == STARTED[:1]
    assert virsh("domstate", "lost") == "shut off"
    nothing_left("lost")
    return {"virsh": said.splitlines()}


@check
def metadata_are_nothing_for_the_wrapper(lab: Lab) -> dict[str, Any]:
    """A guest that would have started without its TPM does not start."""
    vtpm = '<t:vtpm xmlns:t="urn:qemu-vtpm-bridge:domain:1" backend="vtpm-of-guest"/>'
    define("told", WRAPPER, metadata=vtpm)
    said = virsh_refused("start", "told")
    assert "the wrapper knows guest 'told' by its name only" in said, said
    return {"virsh": said.splitlines()}


if __name__ == "__main__":
    raise SystemExit(check.run())
