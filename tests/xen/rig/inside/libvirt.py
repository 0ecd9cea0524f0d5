"""libvirt's libxl driver and our hook under a real Xen, one boot.

    python3 -m tests.xen.rig.inside.libvirt

The guide is followed line by line with a real libvirtd, whose libxl driver calls the hook for
HVM guests: first such that stay paused, then Linux, which uses its TPM.  Another script beside
ours notes how libvirtd called.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.xen.rig.inside.domains import start_vtpm_domain
from tests.xen.rig.inside.hvm import CMDLINE, Guest, uses
from tests.xen.rig.inside.lab import (
    DEADLINE_S,
    LOGS,
    PROGRAM,
    SITE,
    Checks,
    Lab,
    install_program,
    ours,
    run,
    until,
    xenstore,
)
from tests.xen.rig.inside.wrapper import RUN_DIR, TPM_QEMU, WRAPPER, bridge_pid, lay_out, served

check = Checks()

VIRSH = ("virsh", "-q", "-c", "xen:///system")
HOOKS = Path("/etc/libvirt/hooks/libxl.d")
HOOK = SITE / "share/qemu-vtpm-bridge/libvirt/qemu-vtpm-bridge"
CALLS = LOGS / "hook-calls.log"
VTPMS_CPU = 'cpus="2"'
"""Domain 0 is busy with what libvirtd starts, and Linux has the other one."""
STARTED = ["prepare begin -", "start begin -", "started begin -"]
ENDED = ["stopped end -", "release end -"]

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
[guest.linux]
backend = "vtpm"
[guest.qlinux]
backend = "vtpm"
handle = 1
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

LINUX_XML = """<domain type="xen">
  <name>{name}</name>
  <memory unit="MiB">256</memory>
  <vcpu>{vcpus}</vcpu>
  <cputune>{pins}</cputune>
  <os>
    <type arch="x86_64" machine="xenfv">hvm</type>
    <kernel>/boot/vmlinuz</kernel>
    <initrd>/boot/initrd</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/><apic/><pae/></features>
  <clock offset="utc"><timer name="tsc" mode="native"/></clock>
  <on_reboot>restart</on_reboot>
  <on_crash>preserve</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    <disk type="block">
      <driver name="phy"/><source dev="/dev/vda"/><target dev="sda"/><readonly/>
    </disk>
    <disk type="block">
      <driver name="phy"/><source dev="{loop}"/><target dev="sdb"/><readonly/>
    </disk>
    <serial type="file"><source path="{log}"/></serial>
  </devices>
  {more}
</domain>
"""

SUSPENDED = "---ss-"
"""In xl's list: shut down for what Xen calls a suspend, and not running."""

REBOOT = "rm -f /sbin/reboot; printf '#!/bin/sh\\nexec busybox reboot -f' >/sbin/reboot; "
REBOOT += "chmod 755 /sbin/reboot"
"""What the kernel runs when Xen's toolstack asks for a reboot; busybox' asks an init for it."""


class LibvirtGuest(Guest):
    """A Linux guest that libvirt starts; `more` is for its XML."""

    def __init__(self, lab: Lab, name: str, emulator: Path, more: str = "") -> None:
        self._emulator = emulator
        super().__init__(lab, name, more)

    def configure(self, loop: str, more: str, cpus: Sequence[int]) -> None:
        """Define it."""
        pins = (f'<vcpupin vcpu="{vcpu}" cpuset="{cpu}"/>' for vcpu, cpu in enumerate(cpus))
        text = LINUX_XML.format(
            name=self.name,
            vcpus=len(cpus),
            pins="".join(pins),
            cmdline=CMDLINE,
            emulator=self._emulator,
            loop=loop,
            log=LOGS / f"{self.name}.serial.log",
            more=more,
        )
        path = Path(f"/tmp/{self.name}.xml")
        path.write_text(text)
        virsh("define", str(path))

    def create(self) -> None:
        """Start it, paused."""
        virsh("start", "--paused", self.name)

    def unpause(self) -> None:
        """Let it run, and wait for its job."""
        virsh("resume", self.name)
        self.wait_up()

    def start(self) -> None:
        """Start it, and wait for its job."""
        virsh("start", self.name)
        self.wait_up()

    def reboot(self) -> int:
        """Have virsh reboot it; return the new domain's id once its job runs."""
        old = self.domid
        self.ask(REBOOT)
        virsh("reboot", self.name)
        self.wait_rebuilt(old)
        return self.domid


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


def restart_libvirtd(lab: Lab) -> None:
    """End libvirtd, and start it again."""
    assert lab.kept["libvirtd"].end() == 0
    start_libvirtd(lab)


def install(path: Path, text: str) -> None:
    """Write a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def start_linuxs_tpm(lab: Lab) -> None:
    """Start the vTPM domain of the guests that run Linux, where it does not run."""
    if "vtpm" not in lab.domains:
        start_vtpm_domain(lab, "vtpm", "2.0", VTPMS_CPU)


def nothing_left(name: str) -> None:
    """No socket and no entry of this guest's bridge is there, nor of its vTPM domain."""
    assert not list(RUN_DIR.glob(f"{name}.s*")), list(RUN_DIR.iterdir())
    entries = run("xenstore-ls", "-fp", "/local/domain")
    assert "/vtpm/" not in entries, entries


@check
def libvirtd_runs_with_its_libxl_driver(lab: Lab) -> dict[str, Any]:
    """Debian's libvirtd, our hook as it is shipped, and one that notes the calls."""
    lay_out(GUESTS_TEXT)
    install_program()
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
    restart_libvirtd(lab)
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


@check.unproven
def linux_uses_the_tpm_of_its_registers(lab: Lab) -> dict[str, Any]:
    """`virsh start` with the wrapper and a stock QEMU: the bridge is the CRB device."""
    start_linuxs_tpm(lab)
    guest = lab.kept["linux"] = LibvirtGuest(lab, "linux", WRAPPER)
    guest.start()
    assert calls("linux") == STARTED
    found = uses(guest, "tpm_crb", "TPM2", "00" * 32)
    assert served("linux")["guest"]["domid"] == guest.domid
    lab.kept["pcr7"] = found["pcr7"]
    return found


@check.unproven
def linux_goes_on_while_libvirtd_is_away(lab: Lab) -> None:
    """libvirtd ends and comes back: the same bridge serves, and the TPM is as it was."""
    guest: LibvirtGuest = lab.kept["linux"]
    bridge = bridge_pid("linux")
    assert lab.kept["libvirtd"].end() == 0
    assert guest.tpm("read", "7")["value"] == lab.kept["pcr7"]
    start_libvirtd(lab)
    until(lambda: calls("linux") == ["reconnect begin -"], "libvirtd has called")
    assert virsh("domstate", "linux") == "running"
    assert bridge_pid("linux") == bridge
    assert guest.tpm("read", "7")["value"] == lab.kept["pcr7"]


@check.unproven
def virsh_reboot_resets_the_pcrs(lab: Lab) -> dict[str, Any]:
    """Another domain id and another bridge, by `release` and `prepare`."""
    guest: LibvirtGuest = lab.kept["linux"]
    old, bridge = guest.domid, bridge_pid("linux")
    new = guest.reboot()
    assert new != old
    called = calls("linux")
    assert called == [*ENDED, *STARTED], called
    assert bridge_pid("linux") != bridge
    assert served("linux")["guest"]["domid"] == new
    assert guest.tpm("read", "7")["value"] == "00" * 32
    return {"old": old, "new": new}


@check.unproven
def virsh_destroy_leaves_nothing_of_linux(lab: Lab) -> None:
    process = Path("/proc", bridge_pid("linux"))
    destroy(lab, "linux")
    assert calls("linux") == ENDED
    until(lambda: not process.exists(), "the bridge has ended")
    nothing_left("linux")


@check.unproven
def linux_uses_the_tpm_of_its_qemu(lab: Lab) -> dict[str, Any]:
    """A QEMU with TPM devices, the snippet, and hvmloader told by hand."""
    start_linuxs_tpm(lab)
    snippet = ours("libvirt-hook", "--snippet", "qlinux")
    guest = lab.kept["qlinux"] = LibvirtGuest(lab, "qlinux", TPM_QEMU, snippet)
    guest.create()
    run("xenstore-write", f"/local/domain/{guest.domid}/platform/tpm_version", "2")
    guest.unpause()
    found = uses(guest, "tpm_crb", "TPM2", "00" * 32)
    lab.kept["pcr7"] = found["pcr7"]
    return found


@check.unproven
def a_save_that_is_refused_suspends_linux(lab: Lab) -> dict[str, Any]:
    """libvirt leaves the guest suspended, and one that comes back can resume it, TPM and all."""
    guest: LibvirtGuest = lab.kept["qlinux"]
    said = virsh_refused("save", "qlinux", "/tmp/saved")
    assert virsh("domstate", "qlinux") == "running"
    assert run("xl", "list", "qlinux").split()[-2] == SUSPENDED
    restart_libvirtd(lab)
    assert virsh("domstate", "qlinux") == "pmsuspended"
    virsh("dompmwakeup", "qlinux")
    assert guest.tpm("read", "7")["value"] == lab.kept["pcr7"]
    destroy(lab, "qlinux")
    nothing_left("qlinux")
    return {"virsh": said.splitlines()}


if __name__ == "__main__":
    raise SystemExit(check.run())
