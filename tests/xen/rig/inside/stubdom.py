"""A guest whose QEMU, and the bridge before it, run in a stub domain; one boot.

    python3 -m tests.xen.rig.inside.stubdom

xl makes a Linux stub domain with each start of the guest; what the guide says is in it is what
runs here.  /share/qemu is a QEMU for Xen that has TPM devices.  The stub domain and the guest
share their disks, as libxl has it, and so the job on them begins with the stub domain's part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.xen.rig.inside.domains import start_vtpm_domain
from tests.xen.rig.inside.hvm import (
    BESIDE_DOM0,
    JOB,
    Guest,
    lose_and_replace_vtpm,
    uses,
)
from tests.xen.rig.inside.lab import OURS, SITE, Checks, Lab, ours, run, until, xenstore
from tests.xen.rig.inside.wrapper import lay_out

check = Checks()

GUESTS_TEXT = """
[guest.guest]
backend = "vtpm"
"""

STUB_JOB = r"""
if target=$(xenstore-read target 2>/dev/null); then
    export PYTHONPATH=/mnt/site
    exec >/run/stub.log 2>&1
    echo 1 >/proc/sys/vm/overcommit_memory
    python3 -m qemu_vtpm_bridge run --socket /run/tpm.sock &
    vm=$(xenstore-read /local/domain/$target/vm)
    words=()
    for key in $(xenstore-list $vm/image/dm-argv | sort); do
        words+=("$(xenstore-read $vm/image/dm-argv/$key)")
    done
    until [ -S /run/tpm.sock ]; do sleep 0.2; done
    echo "the bridge listens at $(cut -d' ' -f1 /proc/uptime)"
    while sleep 5; do xenstore-write data/log "$(tail -c 1500 /run/stub.log)"; done &
    words+=(-chardev socket,id=qmp,path=/run/qmp.sock,server=on,wait=off)
    words+=(-mon chardev=qmp,mode=control)
    (
        until [ -S /run/qmp.sock ]; do sleep 0.2; done
        exec /usr/lib/xen-*/bin/vchan-socket-proxy --mode=server \
            0 device-model/$target/qmp-vchan /run/qmp.sock
    ) &
    /mnt/qemu "${words[@]}"
    echo "QEMU ended: $?"
    sleep 10
    exit 1
fi
for again in 1 2 3; do
    [ ! -e /sys/class/tpm/tpm0/tpm_version_major ] || break
    echo MSFT0101:00 >/sys/bus/acpi/drivers/tpm_crb/bind
done
"""
"""The stub domain's start script, the guide's.  It is silent: QEMU 10.0 in domain 0 does not read a
stub domain's first console, and Linux waits for ever once that holds 2 KiB.

The guest comes here too, and has its driver try again: Linux gives a TPM up that takes over
0.75 s for Startup, as one may that four domains of an emulated machine have part in."""

CONFIG = """
device_model_version="qemu-xen"
device_model_stubdomain_override=1
stubdomain_kernel="/boot/vmlinux"
stubdomain_ramdisk="/boot/initrd"
stubdomain_cmdline="console=hvc0 loglevel=3 quiet xen_privcmd.unrestricted"
stubdomain_memory=384
device_model_args_hvm=["-chardev", "socket,id=chrtpm,path=/run/tpm.sock",
    "-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-crb,tpmdev=tpm0"]
"""

XL = ("env", "LD_PRELOAD=/share/slow_clock.so", "xl")

START_DEADLINE_S = 600.0
"""For xl to have made a stub domain and its guest."""

GUEST_CPUS = (1,)


def stub_domid(guest: Guest) -> int:
    """Return the id of the domain that a guest's QEMU runs in."""
    return int(xenstore(f"/local/domain/{guest.domid}/image/device-model-domid"))


@check
def a_bridge_in_a_stub_domain_serves_its_guest(lab: Lab) -> dict[str, Any]:
    """xl create, with nothing but `stub-domains` running in domain 0."""
    lay_out(GUESTS_TEXT)
    vtpm = start_vtpm_domain(lab, "vtpm", "2.0", BESIDE_DOM0)
    follower = lab.kept["follower"] = lab.program("stub-domains", "stub-domains")
    qemu = Path("/share/qemu")
    guest = lab.kept["guest"] = Guest(
        lab, "guest", CONFIG, GUEST_CPUS, files=(qemu, SITE), job=STUB_JOB + JOB
    )
    guest.xl, guest.deadline_s = XL, START_DEADLINE_S
    guest.create()
    stub = stub_domid(guest)
    text = f"/local/domain/{stub}/device/vtpm/0 -> /local/domain/{vtpm}/backend/vtpm/{stub}/0"
    assert follower.said(f"{text}: attached")
    guest.unpause()
    found = uses(guest, "tpm_crb", "TPM2", "00" * 32)
    report = json.loads(run(*OURS, "doctor", "--json", check=False))
    told = {
        each["check"]: (each["verdict"], each["summary"])
        for each in report["findings"]
        if each["check"] in ("guest", "device")
    }
    assert {verdict for verdict, _ in told.values()} == {"ok"}, told
    return {**found, "stub": stub, "list": ours("list"), "doctor": told}


@check
def a_reboot_is_another_stub_domain_and_resets_the_pcrs(lab: Lab) -> dict[str, Any]:
    """Domain 0 names no number: the new stub domain has the right that the old one had."""
    guest: Guest = lab.kept["guest"]
    old = stub_domid(guest)
    guest.reboot()
    new = stub_domid(guest)
    assert new != old
    assert guest.tpm("read", "7")["value"] == "00" * 32
    return {"old": old, "new": new}


@check
def a_lost_vtpm_domain_is_errors_and_another_is_joined(lab: Lab) -> dict[str, Any]:
    return lose_and_replace_vtpm(lab, lab.kept["guest"])


@check
def xl_destroy_leaves_nothing(lab: Lab) -> dict[str, Any]:
    """Neither end's entries, and the program in domain 0 goes on."""
    guest: Guest = lab.kept["guest"]
    guest.destroy()
    until(lambda: ours("list").strip() == "no vtpm device is attached", "the entries are gone")
    assert lab.kept["follower"].process.poll() is None
    return {}


if __name__ == "__main__":
    sys.exit(check.run())
