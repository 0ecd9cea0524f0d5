"""An HVM guest of the rig: Debian with stock drivers, which does what it is asked over XenStore."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.bridge.tpm import TPM_RC_FAILURE, TPM_RC_RETRY
from tests.xen.rig.inside.domains import start_vtpm_domain
from tests.xen.rig.inside.lab import DEADLINE_S, Lab, run, until, xenstore

BESIDE_DOM0 = 'cpus="0"'
LOOK_S = 1.0
"""Between two looks at a guest, whose TPM may be at work."""

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

CMDLINE = "console=ttyS0 loglevel=4 ima_policy= rig.hvm=1 iomem=relaxed"

CONFIG = """
name="{name}"
type="hvm"
memory=256
vcpus={vcpus}
cpus={cpus}
vnc=0
vga="none"
tsc_mode="native"
serial="file:/tmp/logs/{name}.serial.log"
on_crash="preserve"
on_reboot="restart"
kernel="/boot/vmlinuz"
ramdisk="/boot/initrd"
extra="{cmdline}"
disk=['phy:/dev/vda,sda,r','phy:{loop},sdb,r']
{more}
"""


class Guest:
    """One HVM guest, over its reboots; xl's."""

    def __init__(
        self,
        lab: Lab,
        name: str,
        more: str = "",
        cpus: Sequence[int] = (1,),
        files: Sequence[Path] = (),
        job: str = JOB,
    ) -> None:
        """`cpus`: for each virtual CPU the one that it runs on; `files` go beside its job."""
        self.name = name
        self.xl: Sequence[str] = ("xl",)
        """What creates it, and creates it anew when it reboots."""
        self.deadline_s = DEADLINE_S
        """For it to be created."""
        self._asked = 0
        folder = Path(f"/tmp/job.{name}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "job").write_text(job)
        for path in (Path(__file__).with_name("guest_tpm.py"), *files):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, folder / path.name)
        archive = Path(f"/tmp/{name}.tar")
        run("tar", "-C", str(folder), "-cf", str(archive), ".")
        run("truncate", "-s", "%4096", str(archive))
        loop = run("losetup", "-f", "--show", "-r", str(archive)).strip()
        self.configure(loop, more, cpus)
        lab.domains.add(name)

    def configure(self, loop: str, more: str, cpus: Sequence[int]) -> None:
        """Write what the toolstack is to know of it; its job is on the device `loop`."""
        values = {"vcpus": len(cpus), "cpus": [*map(str, cpus)], "cmdline": CMDLINE}
        self._config = Path(f"/tmp/{self.name}.cfg")
        self._config.write_text(CONFIG.format(name=self.name, loop=loop, more=more, **values))

    @property
    def domid(self) -> int:
        """Its domain now; 0 while it has none."""
        return int(run("xl", "domid", self.name, check=False).strip() or 0)

    def create(self) -> None:
        """Create it, paused."""
        run(*self.xl, "create", "-p", "-q", str(self._config), deadline_s=self.deadline_s)

    def unpause(self) -> None:
        """Let it run, and wait for its job."""
        run("xl", "unpause", self.name)
        self.wait_up()

    def wait_up(self) -> None:
        """Wait until its job looks for something to do."""
        self._asked = 0
        up = lambda: xenstore(f"/local/domain/{self.domid}/data/tpm")  # noqa: E731
        until(up, f"{self.name} is up", 600, LOOK_S)

    def ask(self, command: str, deadline_s: float = 600) -> tuple[int, str]:
        """Have it run a shell command; return the status and what was printed."""
        domain = f"/local/domain/{self.domid}"
        data = f"{domain}/data"
        self._asked += 1
        asked = self._asked
        run("xenstore-write", f"{data}/do", f"{asked}:{command}")

        def answered() -> bool:
            assert xenstore(f"{domain}/name"), f"{self.name} is {domain} no longer"
            return xenstore(f"{data}/result").startswith(f"{asked}:")

        until(answered, f"{self.name} answers '{command}'", deadline_s, LOOK_S)
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
        self.wait_rebuilt(old)
        return self.domid

    def wait_rebuilt(self, old: int) -> None:
        """Wait until it is another domain than `old`, whose job runs."""
        until(lambda: self.domid not in (0, old), f"{self.name} is built anew", 600, LOOK_S)
        self.wait_up()

    def destroy(self) -> None:
        """Destroy it."""
        run("xl", "destroy", self.name)


def uses(guest: Guest, driver: str, table: str, zero: str) -> dict[str, Any]:
    """Read, extend, draw random bytes: what each combination has to be able to do."""
    assert xenstore(f"/local/domain/{guest.domid}/data/tpm") == table
    before = guest.tpm("read", "7")
    assert before == {"code": 0, "value": zero, "driver": driver}, before
    after = guest.tpm("extend", "7")
    assert after["code"] == 0, after
    assert after["value"] != zero, after
    assert guest.tpm("random")["code"] == 0
    _, log = guest.ask("dmesg | grep -i -E 'tpm|TCPA'")
    return {"pcr7": after["value"], "boot": log.split("\\n")}  # as xenstore-read writes it


def lose_and_replace_vtpm(lab: Lab, guest: Guest) -> dict[str, Any]:
    """Destroy the vTPM domain under a guest and make another; return the guest's error."""
    lab.destroy("vtpm")
    without = guest.tpm("read", "7")
    # The TPM's word, and not that of a driver which gave up.
    assert without["code"] in (TPM_RC_RETRY, TPM_RC_FAILURE), without
    start_vtpm_domain(lab, "vtpm", "2.0", BESIDE_DOM0)
    until(lambda: guest.tpm("read", "7")["code"] == 0x100, "the new TPM wants Startup")
    return {"code": hex(without["code"])}
