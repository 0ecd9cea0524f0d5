"""libvirt's libxl driver, our hook and a real Xen: guests that stay paused, one boot.

    python3 -m tests.xen.rig.inside.libxl

/share/hook is packaging/libvirt/qemu-vtpm-bridge.  dom0's QEMU has no TPM devices.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.xen.rig.inside.lab import Checks, Lab, Program, ours, run, until, xenstore
from tests.xen.rig.inside.wrapper import RUN_DIR, WRAPPER, bridge_pid, lay_out, served
from tests.xen.rig.inside.xl import XEN_QEMU, create, device_model

check = Checks()

HOOK = Path("/etc/libvirt/hooks/libxl.d/qemu-vtpm-bridge")
COMMAND = Path("/usr/bin/qemu-vtpm-bridge")
CONFIG = Path("/tmp/libvirtd.conf")
XML = """
<domain type="xen">
  <name>{name}</name>
  <metadata>{metadata}</metadata>
  <memory unit="MiB">64</memory>
  <vcpu>1</vcpu>
  <os><type arch="x86_64" machine="xenfv">hvm</type></os>
  <features><acpi/><apic/></features>
  <devices><emulator>{emulator}</emulator></devices>
</domain>
"""
METADATA = '<tpm:vtpm xmlns:tpm="urn:qemu-vtpm-bridge:domain:1" backend="{}" registers="tis"/>'

GUESTS_TEXT = """
[guest.listed]
backend = "vtpm"
registers = "tis"
"""


def virsh(*words: str) -> subprocess.CompletedProcess[str]:
    """Ask libvirt for something."""
    return subprocess.run(
        ["virsh", "-q", "-c", "xen:///system", *words],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def start(lab: Lab, name: str, metadata: str = "", emulator: str = XEN_QEMU) -> str:
    """Define a guest and start it paused; return what virsh complained."""
    path = Path(f"/tmp/{name}.xml")
    path.write_text(XML.format(name=name, metadata=metadata, emulator=emulator))
    lab.domains.add(name)
    defined = virsh("define", str(path))
    assert defined.returncode == 0, defined
    return virsh("start", "--paused", name).stderr


def start_libvirtd(lab: Lab) -> Program:
    """Have libvirtd run, with our hook."""
    program = lab.program_of("libvirtd", "libvirtd", "-f", str(CONFIG))
    until(lambda: virsh("list").returncode == 0, "libvirtd answers")
    return program


def in_hand(name: str) -> dict[str, Any]:
    """Return the guest's part of its bridge's status once the bridge has its registers."""
    domid = int(virsh("domid", name).stdout)
    until(lambda: served(name).get("guest", {}).get("domid") == domid, f"{name} is served")
    return dict(served(name)["guest"])


@check.unproven
def a_guest_in_the_guests_file_gets_its_bridge(lab: Lab) -> dict[str, Any]:
    """prepare starts the bridge, which has the guest's registers before it runs."""
    lay_out(GUESTS_TEXT)
    HOOK.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2("/share/hook", HOOK)
    HOOK.chmod(0o755)
    COMMAND.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={os.environ['PYTHONPATH']}\n"
        f'exec {sys.executable} -m qemu_vtpm_bridge "$@"\n'
    )
    COMMAND.chmod(0o755)
    CONFIG.write_text('unix_sock_group = "root"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n')
    lab.kept["libvirtd"] = start_libvirtd(lab)
    # A bridge waits for its vTPM domain's program; a domain of the name is all that it needs.
    done = create(lab, "vtpm")
    assert done.returncode == 0, done
    complaint = start(lab, "listed")
    assert not complaint, complaint
    found = in_hand("listed")
    assert xenstore(f"/local/domain/{found['domid']}/platform/tpm_version") == "1"
    return found


@check.unproven
def libvirtd_may_come_back(lab: Lab) -> dict[str, str]:
    """reconnect finds the bridge that runs, and the guest runs on."""
    pid, domid = bridge_pid("listed"), virsh("domid", "listed").stdout
    assert lab.kept["libvirtd"].end() == 0
    lab.kept["libvirtd"] = start_libvirtd(lab)
    assert virsh("domid", "listed").stdout == domid
    assert bridge_pid("listed") == pid
    assert in_hand("listed")["domid"] == int(domid)
    return {"bridge": pid}


@check.unproven
def its_end_ends_the_bridge(lab: Lab) -> None:
    """release stops the bridge and takes the entries away."""
    done = virsh("destroy", "listed")
    assert done.returncode == 0, done
    until(lambda: not served("listed"), "the bridge is gone")
    lab.domains.discard("listed")
    assert not list(RUN_DIR.glob("listed.s*")), list(RUN_DIR.iterdir())
    assert "(listed" not in ours("list")


@check.unproven
def a_guest_may_say_it_in_its_xml(lab: Lab) -> dict[str, Any]:
    """The metadata's element; the wrapper as the emulator beside it."""
    complaint = start(lab, "inxml", METADATA.format("vtpm"), str(WRAPPER))
    assert not complaint, complaint
    found = in_hand("inxml")
    words = device_model(found["domid"])
    assert words[0] == XEN_QEMU, words
    assert virsh("destroy", "inxml").returncode == 0
    until(lambda: not served("inxml"), "the bridge is gone")
    lab.domains.discard("inxml")
    return found


@check.unproven
def a_wrong_vtpm_domain_stops_the_start(lab: Lab) -> dict[str, str]:
    """virsh says what is wrong, and nothing is left."""
    complaint = start(lab, "lost", METADATA.format("nobody"))
    assert "no domain is named nobody" in complaint, complaint
    assert not virsh("domid", "lost").stdout.strip("- \n")
    assert not list(RUN_DIR.glob("lost.s*")), list(RUN_DIR.iterdir())
    lab.domains.discard("lost")
    run("xl", "list")
    return {"virsh": complaint.strip()}


if __name__ == "__main__":
    sys.exit(check.run())
