"""HVM guests with a TPM: the bridge as the device, and QEMU's devices, one boot.

    python3 -m tests.xen.rig.inside.guests

/share/qemu is a QEMU for Xen that has TPM devices; dom0's own has none.  A guest is the
same Debian as dom0, with stock drivers; it does what is asked of it over XenStore.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.xen.rig.inside.domains import start_vtpm_domain
from tests.xen.rig.inside.lab import Checks, Lab, Program, ours, run, status, until, xenstore

check = Checks()

STATUS = "/tmp/bridge.status"
SOCKET = "/tmp/qemu.sock"
QEMU = "/share/qemu"
TIMED_READS = 40

HAMMER = (
    "for n in $(seq 300); do busybox devmem $((0xFED40000 + n * 28 % 0x5000)) 32; "
    "busybox devmem $((0xFED40000 + n * 52 % 0x5000)) 32 $n; done"
)
"""Plain 32-bit accesses: what a C library's vector copies do to such addresses is not ours."""

JOB = """
modprobe tpm_crb; modprobe tpm_tis
echo "ACPI: $(ls /sys/firmware/acpi/tables | tr '\\n' ' ')"; dmesg | grep -i tpm
xenstore-write data/tpm "$(ls /sys/firmware/acpi/tables | grep -E 'TPM2|TCPA')"
n=0
while :; do
    line=$(xenstore-read data/do 2>/dev/null); s=${line%%:*}
    if [ -n "$s" ] && [ "$s" != "$n" ]; then
        n=$s; out=$(bash -c "${line#*:}" 2>&1); rc=$?
        xenstore-write data/result "$n:$rc:$(printf %s "$out" | tail -c 1500)"
    fi
    sleep 0.3
done
"""

CONFIG = """
name="{name}"
type="hvm"
memory=256
vcpus=2
vnc=0
vga="none"
tsc_mode="native"
serial="file:/tmp/logs/{name}.serial.log"
on_crash="preserve"
on_reboot="restart"
kernel="/boot/vmlinuz"
ramdisk="/boot/initrd"
extra="console=ttyS0 loglevel=4 ima_policy= rig.hvm=1 iomem=relaxed"
disk=['phy:/dev/vda,sda,r','phy:{loop},sdb,r']
{more}
"""


class Guest:
    """One HVM guest, over its reboots."""

    def __init__(self, lab: Lab, name: str, more: str = "") -> None:
        self.name = name
        self._asked = 0
        folder = Path(f"/tmp/job.{name}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "job").write_text(JOB)
        shutil.copy2(Path(__file__).with_name("guest_tpm.py"), folder)
        archive = Path(f"/tmp/{name}.tar")
        run("tar", "-C", str(folder), "-cf", str(archive), ".")
        run("truncate", "-s", "%4096", str(archive))
        loop = run("losetup", "-f", "--show", "-r", str(archive)).strip()
        self._config = Path(f"/tmp/{name}.cfg")
        self._config.write_text(CONFIG.format(name=name, loop=loop, more=more))
        lab.domains.add(name)

    @property
    def domid(self) -> int:
        """Its domain now; 0 while it has none."""
        return int(run("xl", "domid", self.name, check=False).strip() or 0)

    def create(self) -> None:
        """Create it, paused."""
        run("xl", "create", "-p", "-q", str(self._config))

    def unpause(self) -> None:
        """Let it run, and wait for its job."""
        run("xl", "unpause", self.name)
        self.wait_up()

    def wait_up(self) -> None:
        """Wait until its job looks for something to do."""
        self._asked = 0
        up = lambda: xenstore(f"/local/domain/{self.domid}/data/tpm")  # noqa: E731
        until(up, f"{self.name} is up", 600)

    def ask(self, command: str, deadline_s: float = 600) -> tuple[int, str]:
        """Have it run a shell command; return the status and what was printed."""
        data = f"/local/domain/{self.domid}/data"
        self._asked += 1
        asked = self._asked
        run("xenstore-write", f"{data}/do", f"{asked}:{command}")
        begun = f"{asked}:"
        answered = lambda: xenstore(f"{data}/result").startswith(begun)  # noqa: E731
        until(answered, f"{self.name} answers '{command}'", deadline_s)
        _, rc, text = xenstore(f"{data}/result").split(":", 2)
        return int(rc), text

    def tpm(self, *words: str) -> dict[str, Any]:
        """Have it do something with its TPM."""
        rc, text = self.ask(f"python3 /mnt/guest_tpm.py {' '.join(words)}")
        assert rc == 0, text
        return dict(json.loads(text.splitlines()[-1]))

    def reboot(self) -> int:
        """Reboot it; return the new domain's id once its job runs."""
        old = self.domid
        run(
            "xenstore-write", f"/local/domain/{old}/data/do", f"{self._asked + 1}:busybox reboot -f"
        )
        until(lambda: self.domid not in (0, old), f"{self.name} is built anew", 600)
        self.wait_up()
        return self.domid

    def destroy(self) -> None:
        """Destroy it."""
        run("xl", "destroy", self.name)


def bridge(lab: Lab, backend: str, *words: str) -> Program:
    """Start a bridge; the one before is ended."""
    if "bridge" in lab.kept:
        lab.kept["bridge"].end()
    program = lab.program(
        "bridge", "run", "--backend", backend, "--attach", "--status-socket", STATUS, *words
    )
    lab.kept["bridge"] = program
    until(lambda: status(STATUS), "the bridge is up")
    return program


def uses(guest: Guest, driver: str, table: str, zero: str) -> dict[str, Any]:
    """Read, extend, draw random bytes: what each combination has to be able to do."""
    assert xenstore(f"/local/domain/{guest.domid}/data/tpm") == table
    before = guest.tpm("read", "7")
    assert before == {"code": 0, "value": zero, "driver": driver}, before
    after = guest.tpm("extend", "7")
    assert after["code"] == 0, after
    assert after["value"] != zero, after
    assert guest.tpm("random")["code"] == 0
    time_of = guest.tpm("time", str(TIMED_READS))
    return {"pcr7": after["value"], "pcr_read_ms": round(time_of["median_ms"], 2)}


def ioreq_words(kind: str, guest: str) -> tuple[str, ...]:
    """Return the options for a bridge that is the device."""
    return ("--device", kind, "--guest", guest)


# Item 1: the bridge is the device.  CRB, TPM 2.0.


@check
def crb_registers_are_served_to_a_stock_qemu(lab: Lab) -> dict[str, Any]:
    """hvmloader's TPM2 table, tpm_crb, two virtual CPUs; dom0's QEMU has no TPM."""
    xen_qemu = "/usr/libexec/xen-qemu-system-i386"
    done = subprocess.run([xen_qemu, "-tpmdev", "help"], check=False, capture_output=True)
    assert b"emulator" not in done.stdout, done
    lab.kept["vtpm"] = start_vtpm_domain(lab, "vtpm")
    bridge(lab, "vtpm", *ioreq_words("crb", "guest"))
    guest = lab.kept["guest"] = Guest(lab, "guest")
    guest.create()
    until(lambda: status(STATUS)["guest"]["domid"] == guest.domid, "the guest is served")
    assert status(STATUS)["guest"]["vcpus"] == 2
    guest.unpause()
    found = uses(guest, "tpm_crb", "TPM2", "00" * 32)
    lab.kept["pcr7"] = found["pcr7"]
    return found


@check
def a_killed_bridge_is_taken_over_from(lab: Lab) -> dict[str, Any]:
    """kill -9 while the guest hammers the registers; the next bridge answers its CPUs."""
    guest: Guest = lab.kept["guest"]
    server = status(STATUS)["guest"]["ioreq-server"]
    guest.ask(f"({HAMMER} & {HAMMER}) >/dev/null 2>&1 &")
    lab.kept["bridge"].kill()
    lab.kept.pop("bridge")
    bridge(lab, "vtpm", *ioreq_words("crb", "guest"))
    told = until(lambda: status(STATUS)["guest"]["domid"] and status(STATUS)["guest"], "taken over")
    assert (told["ioreq-server"], told["adopted"]) == (server, 1), told
    guest.ask("wait; sleep 6")
    after = guest.tpm("read", "7")
    assert after["value"] == lab.kept["pcr7"], after
    return {"server": server}


@check
def a_reboot_resets_the_pcrs(lab: Lab) -> dict[str, Any]:
    """A new domain id, the same name: another server, a TPM that was power-cycled."""
    guest: Guest = lab.kept["guest"]
    old = guest.domid
    new = guest.reboot()
    assert new != old
    assert status(STATUS)["guest"]["domid"] == new
    assert guest.tpm("read", "7")["value"] == "00" * 32
    return {"old": old, "new": new}


@check.unproven
def registers_are_hammered_from_two_cpus(lab: Lab) -> dict[str, Any]:
    """Both CPUs read and write all over the range; the TPM answers afterwards."""
    guest: Guest = lab.kept["guest"]
    rc, text = guest.ask(f"({HAMMER} & {HAMMER}; wait) | sort | uniq -c | sort -rn | head -5")
    assert rc == 0, text
    until(lambda: guest.tpm("random")["code"] == 0, "the TPM answers again")
    return {"most_read": text.split()[:4]}


@check
def a_destroyed_vtpm_domain_is_errors_for_the_guest(lab: Lab) -> dict[str, Any]:
    """Errors, no hang; then a new vTPM domain is picked up."""
    guest: Guest = lab.kept["guest"]
    lab.destroy("vtpm")
    without = guest.tpm("read", "7")
    assert without["code"] != 0, without
    lab.kept["vtpm"] = start_vtpm_domain(lab, "vtpm")
    until(lambda: guest.tpm("read", "7")["code"] == 0x100, "the new TPM wants Startup")
    return {"code": hex(without["code"])}


@check
def a_bridge_that_ends_gives_the_range_up(lab: Lab) -> dict[str, Any]:
    """SIGTERM: the guest finds no TPM and goes on, without waiting for anybody."""
    guest: Guest = lab.kept["guest"]
    assert lab.kept.pop("bridge").end() == 0
    rc, text = guest.ask("busybox devmem 0xFED40000 32")
    assert text.strip() == "0xFFFFFFFF", (rc, text)
    guest.destroy()
    return {"read": text.strip()}


# Item 2: QEMU's own CRB device, the bridge behind its socket.


def qemu_config(device: str) -> str:
    """Return the lines of a guest whose QEMU has TPM devices."""
    words = [
        "-chardev", f"socket,id=c,path={SOCKET}", "-tpmdev", "emulator,id=t,chardev=c",
        "-device", f"{device},tpmdev=t",
    ]  # fmt: skip
    return f'device_model_override="{QEMU}"\ndevice_model_args_hvm={json.dumps(words)}'


def boot_with_qemu(lab: Lab, name: str, device: str, version: str) -> Guest:
    """Boot a guest whose TPM is QEMU's device; hvmloader is told what to look for."""
    guest = lab.kept["guest"] = Guest(lab, name, qemu_config(device))
    guest.create()
    run("xenstore-write", f"/local/domain/{guest.domid}/platform/tpm_version", version)
    guest.unpause()
    return guest


@check.unproven
def qemus_crb_is_served(lab: Lab) -> dict[str, Any]:
    """QEMU's tpm-crb with the bridge behind it, in the same boot of Xen."""
    bridge(lab, "vtpm", "--socket", SOCKET, "--state-blobs", "refuse")
    guest = boot_with_qemu(lab, "qguest", "tpm-crb", "2")
    return uses(guest, "tpm_crb", "TPM2", "00" * 32)


@check.unproven
def saving_is_refused_and_does_not_hang(lab: Lab) -> dict[str, Any]:
    """xl save of a guest with a TPM: an error, and the guest runs on."""
    guest: Guest = lab.kept["guest"]
    began = time.monotonic()
    done = subprocess.run(
        ["xl", "save", guest.name, "/tmp/saved"], check=False, capture_output=True, text=True
    )
    assert done.returncode != 0, done
    assert guest.domid, "the guest is gone"
    guest.tpm("read", "7")
    return {"seconds": round(time.monotonic() - began), "said": done.stderr.strip()[-300:]}


@check.unproven
def a_reboot_through_qemu_resets_the_pcrs(lab: Lab) -> dict[str, Any]:
    """A new QEMU finds the same socket served, and PCRs at zero."""
    guest: Guest = lab.kept["guest"]
    old = guest.domid
    run("xenstore-write", f"/local/domain/{old}/data/do", f"{guest._asked + 1}:busybox reboot -f")
    new = until(lambda: guest.domid not in (0, old) and guest.domid, "built anew", 600)
    run("xenstore-write", f"/local/domain/{new}/platform/tpm_version", "2")
    guest.wait_up()
    assert guest.tpm("read", "7")["value"] == "00" * 32
    lab.destroy("vtpm")
    code = guest.tpm("read", "7")["code"]
    assert code != 0
    guest.destroy()
    return {"old": old, "new": new, "without_vtpm_domain": hex(code)}


# TPM 1.2: TIS, once each way.


@check.unproven
def tis_registers_are_served_to_a_stock_qemu(lab: Lab) -> dict[str, Any]:
    """TPM 1.2 behind the bridge's TIS device: hvmloader's TCPA table, tpm_tis."""
    start_vtpm_domain(lab, "vtpm12", "1.2")
    bridge(lab, "vtpm12", "--tpm", "1.2", *ioreq_words("tis", "tguest"))
    guest = Guest(lab, "tguest")
    guest.create()
    until(lambda: status(STATUS)["guest"]["domid"] == guest.domid, "the guest is served")
    guest.unpause()
    found = uses(guest, "tpm_tis", "TCPA", "00" * 20)
    guest.destroy()
    return found


@check.unproven
def qemus_tis_is_served(lab: Lab) -> dict[str, Any]:
    """QEMU's tpm-tis with the bridge and TPM 1.2 behind it."""
    bridge(lab, "vtpm12", "--tpm", "1.2", "--socket", SOCKET)
    guest = boot_with_qemu(lab, "tqguest", "tpm-tis", "1")
    found = uses(guest, "tpm_tis", "TCPA", "00" * 20)
    guest.destroy()
    ours("list")
    return found


if __name__ == "__main__":
    sys.exit(check.run())
