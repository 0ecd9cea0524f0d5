"""HVM guests with a TPM: the bridge as the device, and QEMU's devices; each story is a boot.

    python3 -m tests.xen.rig.inside.guests crb|qemus-crb|tis [CHECK...]

/share/qemu is a QEMU for Xen that has TPM devices; dom0's own has none.  /share/ovmf is OVMF
as it is built for Xen.  A guest is the same Debian as dom0, with stock drivers; it does what
is asked of it over XenStore.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.bridge.tpm import TPM_RC_RETRY
from qemu_vtpm_bridge.toolstack.guests import USER
from tests.xen.rig.inside.clients import beside_another
from tests.xen.rig.inside.domains import start_vtpm_domain
from tests.xen.rig.inside.hvm import BESIDE_DOM0, Guest, lose_and_replace_vtpm, uses
from tests.xen.rig.inside.lab import (
    DEADLINE_S,
    LOGS,
    Checks,
    Lab,
    Program,
    ours,
    run,
    running,
    status,
    until,
    xenstore,
)
from tests.xen.rig.inside.manager import Manager, Unit
from tests.xen.rig.inside.wrapper import TPM_QEMU, WRAPPER, bridge_pid, lay_out, served

crb, qemus_crb, tis = Checks(), Checks(), Checks()
STORIES = {"crb": crb, "qemus-crb": qemus_crb, "tis": tis}

STOCK_QEMU = "/usr/libexec/xen-qemu-system-i386"
"""Debian's for Xen, which has no TPM devices."""
STATUS = "/run/qemu-vtpm-bridge/guest.status"
OTHERS_SOCKET, OTHERS_STATUS = Path("/tmp/others.sock"), "/tmp/others.status"
TIMED_READS = 20
ROUNDS = 6
HAMMER = (
    "for n in $(seq 300); do busybox devmem $((0xFED40000 + n * 28 % 0x5000)) 32; "
    "busybox devmem $((0xFED40000 + n * 52 % 0x5000)) 32 $n; done"
)
HAMMER_ON = f"while :; do {HAMMER}; done"
"""Plain 32-bit accesses: what a C library's vector copies do to such addresses is not ours."""


def bridge(lab: Lab, backend: str, *words: str) -> Program:
    """Start a bridge; the one before is ended."""
    if "bridge" in lab.kept:
        lab.kept["bridge"].end()
    Path(STATUS).parent.mkdir(exist_ok=True)
    program = lab.program(
        "bridge", "run", "--backend", backend, "--attach", "--status-socket", STATUS, *words
    )
    lab.kept["bridge"] = program
    until(lambda: status(STATUS), "the bridge is up")
    return program


def supervised_bridge(lab: Lab, config: str) -> Unit:
    """Have systemd start the bridge that is the device of the guest `guest`."""
    manager = lab.kept["manager"] = Manager(lab)
    unit = manager.start("qemu-vtpm-bridge-device", "guest", config, LOGS / "bridge.log")
    lab.kept["bridge"] = unit
    until(lambda: status(STATUS), "the bridge is up")
    return unit


def side_by_side(ours_: Guest, qemus: Guest) -> dict[str, float]:
    """Time one PCR read in either guest, in turns; the ratio is the median of the rounds'."""
    rounds = []
    for _ in range(ROUNDS):
        pair = [each.tpm("time", str(TIMED_READS))["median_ms"] for each in (ours_, qemus)]
        rounds.append((pair[0] / pair[1], *pair))
    ratio, ours_ms, qemus_ms = (statistics.median(column) for column in zip(*rounds, strict=True))
    return {
        "ours_ms": round(ours_ms, 2),
        "qemus_ms": round(qemus_ms, 2),
        "ratio": round(ratio, 3),
        "lowest": round(min(each[0] for each in rounds), 3),
        "highest": round(max(each[0] for each in rounds), 3),
    }


def ioreq_words(kind: str, guest: str) -> tuple[str, ...]:
    """Return the options for an unprivileged bridge that is the device."""
    return (
        *("--device", kind, "--guest", guest),
        *("--run-as", "65534:65534", "--confine", "require"),
    )


def served_by_registers(lab: Lab, name: str, cpus: Sequence[int] = (1,), more: str = "") -> Guest:
    """Boot a guest whose TPM is the bridge that waits for it."""
    guest = lab.kept[name] = Guest(lab, name, more, cpus)
    guest.create()
    until(lambda: status(STATUS)["guest"]["domid"] == guest.domid, "the guest is served")
    guest.unpause()
    return guest


# Item 1: the bridge is the device.  CRB, TPM 2.0.


UNIT_CONFIG = """
[run]
backend = "vtpm"
attach = true
device = "crb"
confine = "require"
"""


@crb
def crb_registers_are_served_to_a_stock_qemu(lab: Lab) -> dict[str, Any]:
    """hvmloader's TPM2 table, tpm_crb, two virtual CPUs; systemd has the bridge run."""
    done = subprocess.run([STOCK_QEMU, "-tpmdev", "help"], check=False, capture_output=True)
    assert b"emulator" not in done.stdout, done
    start_vtpm_domain(lab, "vtpm", "2.0", BESIDE_DOM0)
    unit = supervised_bridge(lab, UNIT_CONFIG)
    assert status(STATUS)["confinement"]["user"] == USER
    rules = unit.in_force()
    assert (rules["opens"], rules["memory"]) == (["/dev/xen/privcmd"], 256 << 20), rules
    assert rules["filters"] > 1, rules  # systemd's, besides the bridge's own
    assert rules["read-only"], rules
    assert rules["own-network"], rules
    guest = served_by_registers(lab, "guest", cpus=(1, 2))
    assert status(STATUS)["guest"]["vcpus"] == 2
    found = uses(guest, "tpm_crb", "TPM2", "00" * 32)
    lab.kept["pcr7"] = found["pcr7"]
    return found | {"rules": rules}


@crb
def no_other_domain_is_in_the_devices_reach(lab: Lab) -> dict[str, str]:
    """With what such a bridge is left: its own guest's memory, and no other domain's."""
    guest: Guest = lab.kept["guest"]
    vtpm = status(STATUS)["frontend"]["backend"].split("/")[3]
    reach = ("-m", "tests.xen.rig.inside.reach", vtpm, str(guest.domid), guest.name)
    found = dict(json.loads(run(sys.executable, *reach)))
    assert {what for what, outcome in found.items() if outcome == "done"} == {
        "device model of guest",
        "memory of guest",
        "entry of guest",
    }, found
    for who in ("vtpm", "domain 0"):
        assert found[f"device model of {who}"] == found[f"memory of {who}"] == "EPERM", found
        assert found[f"port of {who}"] == "EACCES", found
    assert found["hypercall"] == "EPERM", found
    return found


@crb
def a_killed_bridge_is_taken_over_from(lab: Lab) -> dict[str, Any]:
    """kill -9 while both CPUs hammer the registers; systemd's next bridge answers them."""
    guest: Guest = lab.kept["guest"]
    unit: Unit = lab.kept["bridge"]
    told = lambda: status(STATUS).get("guest", {})  # noqa: E731
    server, before = told()["ioreq-server"], told()["accesses"]
    guest.ask(f"({HAMMER} & {HAMMER}; wait; touch /tmp/hammered) >/dev/null 2>&1 &")
    until(lambda: told()["accesses"] > before + 20, "the registers are hammered")
    unit.kill()
    served = lambda: (found := told()).get("adopted") and found["vcpus"] and found  # noqa: E731
    after = until(served, "systemd's next bridge took over")
    assert (after["ioreq-server"], after["adopted"]) == (server, 1), after
    until(lambda: unit.show("ActiveState") == {"ActiveState": "active"}, "systemd was told so")
    assert unit.show("NRestarts") == {"NRestarts": "1"}
    assert len(unit.processes()) == 2, "the broker of the killed one is left, or another's"
    until(lambda: told()["accesses"] > 20, "the guest's CPUs go on")
    guest.ask("until [ -e /tmp/hammered ]; do sleep 0.3; done")
    pcr = guest.tpm("read", "7")
    assert pcr["value"] == lab.kept["pcr7"], pcr
    return {"server": server, "unit": unit.name, "accesses": told()["accesses"]}


@crb
def a_reboot_resets_the_pcrs(lab: Lab) -> dict[str, Any]:
    """A new domain id, the same name: another server, a TPM that was power-cycled."""
    guest: Guest = lab.kept["guest"]
    old = guest.domid
    new = guest.reboot()
    assert new != old
    assert status(STATUS)["guest"]["domid"] == new
    assert guest.tpm("read", "7")["value"] == "00" * 32
    return {"old": old, "new": new}


@crb
def registers_are_hammered_through_a_reset(lab: Lab) -> dict[str, Any]:
    """Both CPUs read and write all over until the guest resets; another guest is served on."""
    guest: Guest = lab.kept["guest"]
    assert guest.tpm("extend", "7")["value"] != "00" * 32
    guest.ask(f"(({HAMMER_ON}) & ({HAMMER_ON})) >/dev/null 2>&1 &")
    accesses = lambda: status(STATUS)["guest"]["accesses"]  # noqa: E731
    before = accesses()
    until(lambda: accesses() > before + 100, "the registers are hammered")
    start_others_tpm(lab)
    commands = beside_another(guest.reboot, OTHERS_SOCKET)
    for name in ("others-bridge", "others-vtpm"):
        lab.kept.pop(name).end()
    after = guest.tpm("read", "7")
    assert (after["code"], after["value"]) == (0, "00" * 32), after
    assert guest.tpm("random")["code"] == 0
    return {"anothers_commands_meanwhile": commands}


def start_others_tpm(lab: Lab) -> None:
    """Have another guest's TPM and bridge run, both in domain 0."""
    where = ("--backend", "0", "--handle", "0")
    ours("attach", *where, "--force")
    lab.kept["others-vtpm"] = lab.program("others-vtpm", "vtpm", "--state-dir", "/tmp/others")
    lab.kept["others-bridge"] = lab.program(
        "others-bridge", "run", *where, "--socket", str(OTHERS_SOCKET),
        "--status-socket", OTHERS_STATUS,
    )  # fmt: skip
    until(lambda: running(OTHERS_STATUS), "the other frontend is connected")


@crb
def a_destroyed_vtpm_domain_is_errors_for_the_guest(lab: Lab) -> dict[str, Any]:
    """Errors, no hang; then a new vTPM domain is picked up."""
    return lose_and_replace_vtpm(lab, lab.kept["guest"])


@crb
def a_bridge_that_ends_gives_the_range_up(lab: Lab) -> dict[str, Any]:
    """SIGTERM: the guest finds no TPM and goes on, without waiting for anybody."""
    guest: Guest = lab.kept["guest"]
    assert lab.kept.pop("bridge").end() == 0
    rc, text = guest.ask("busybox devmem 0xFED40000 32")
    assert text.strip() == "0xFFFFFFFF", (rc, text)
    guest.destroy()
    return {"read": text.strip()}


WITH_OVMF = """
bios="ovmf"
bios_path_override="/share/ovmf"
"""


@crb.unproven
def ovmf_hands_the_tpm_on(lab: Lab) -> dict[str, Any]:
    """OVMF as built for Xen: hvmloader's TPM2 table reaches tpm_crb, a reboot resets the PCRs."""
    if "vtpm" not in lab.domains:  # as where this check is run alone
        start_vtpm_domain(lab, "vtpm", "2.0", BESIDE_DOM0)
    bridge(lab, "vtpm", *ioreq_words("crb", "oguest"))
    guest = served_by_registers(lab, "oguest", more=WITH_OVMF)
    found = uses(guest, "tpm_crb", "TPM2", "00" * 32)
    _, firmware = guest.ask("dmesg | grep -E 'efi: |DMI: '")
    assert "EFI v2" in firmware, firmware
    old = guest.domid
    assert guest.reboot() != old
    assert guest.tpm("read", "7")["value"] == "00" * 32
    return found | {"firmware": firmware.split("\\n")}


# Item 2: QEMU's own CRB device, the bridge behind its socket.


GUESTS_TEXT = f"""
[host]
device-model = "{TPM_QEMU}"
[guest.qguest]
backend = "vtpm"
handle = 1
[guest.tguest]
backend = "vtpm12"
tpm = "1.2"
device-model = "{STOCK_QEMU}"
[guest.tqguest]
backend = "vtpm12"
handle = 1
tpm = "1.2"
state-blobs = "empty"
"""

WRAPPED = f"""
device_model_version="qemu-xen"
device_model_override="{WRAPPER}"
"""


def qemu_answers(guest: Guest) -> bool:
    """Ask the guest's QEMU for a word on its monitor, which its main loop has to give."""
    return "running" in run("xl", "qemu-monitor-command", guest.name, "info status")


def boot_wrapped(lab: Lab, name: str, cpu: int) -> Guest:
    """Boot a guest whose TPM xl's wrapper sees to."""
    lay_out(GUESTS_TEXT)
    guest = lab.kept[name] = Guest(lab, name, WRAPPED, cpus=(cpu,))
    guest.create()
    guest.unpause()
    assert served(name)["frontend"]["state"] == "RUNNING"
    return guest


@qemus_crb
def qemus_crb_is_served(lab: Lab) -> dict[str, Any]:
    """QEMU's tpm-crb with the bridge behind it, in the same boot of Xen."""
    start_vtpm_domain(lab, "vtpm", "2.0", BESIDE_DOM0)
    return uses(boot_wrapped(lab, "qguest", 2), "tpm_crb", "TPM2", "00" * 32)


@qemus_crb
def a_pcr_read_is_timed_beside_qemus(lab: Lab) -> dict[str, float]:
    """Two guests of one vTPM domain: the bridge is the one's device, QEMU the other's."""
    bridge(lab, "vtpm", *ioreq_words("crb", "guest"))
    guest = served_by_registers(lab, "guest")
    found = side_by_side(guest, lab.kept["qguest"])
    lab.kept.pop("bridge").end()
    guest.destroy()
    return found


@qemus_crb
def saving_is_refused_and_does_not_hang(lab: Lab) -> dict[str, Any]:
    """xl save of a guest with a TPM: an error, and the guest runs on."""
    guest: Guest = lab.kept["qguest"]
    before = guest.tpm("extend", "7")["value"]
    began = time.monotonic()
    done = subprocess.run(
        ["xl", "save", guest.name, "/tmp/saved"],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    took_s = time.monotonic() - began
    assert done.returncode != 0, done
    assert qemu_answers(guest), "QEMU hangs"
    after = guest.tpm("read", "7")
    assert (after["code"], after["value"]) == (0, before), after
    log = Path("/var/log/qemu-vtpm-bridge/qguest.log").read_text()
    assert "--state-blobs empty lets it save without" in log, log
    return {"seconds": round(took_s), "said": done.stderr.strip()[-300:]}


@qemus_crb
def a_reboot_through_qemu_resets_the_pcrs(lab: Lab) -> dict[str, Any]:
    """A new QEMU finds the same bridge, hvmloader its word, and the guest PCRs at zero."""
    guest: Guest = lab.kept["qguest"]
    assert guest.tpm("extend", "7")["value"] != "00" * 32
    old, pid = guest.domid, bridge_pid("qguest")
    left = lambda: served("qguest")["control"]["requests"].get("CMD_SHUTDOWN", 0)  # noqa: E731
    before = left()
    new = guest.reboot()
    assert new != old
    assert bridge_pid("qguest") == pid
    assert left() == before + 1, "the old QEMU did not say that it leaves"
    assert xenstore(f"/local/domain/{new}/platform/tpm_version") == "2"
    assert guest.tpm("read", "7")["value"] == "00" * 32
    return {"old": old, "new": new}


@qemus_crb
def a_detach_behind_qemu_is_errors(lab: Lab) -> dict[str, Any]:
    """The toolstack takes the device away under the guest: TPM errors, until it is attached."""
    guest: Guest = lab.kept["qguest"]
    where = ("--backend", "vtpm", "--handle", "1")
    before = guest.tpm("extend", "7")["value"]
    ours("detach", *where, "--force")
    without = guest.tpm("read", "7")
    assert without["code"] == TPM_RC_RETRY, without
    assert qemu_answers(guest), "QEMU hangs"
    ours("attach", *where, "--guest", guest.name)
    until(lambda: guest.tpm("read", "7")["code"] == 0, "the TPM answers again")
    assert guest.tpm("read", "7")["value"] == before
    return {"code": hex(without["code"])}


@qemus_crb
def a_destroyed_vtpm_domain_is_errors_behind_qemu(lab: Lab) -> dict[str, Any]:
    """Errors, no hang of QEMU; then a new vTPM domain is picked up."""
    guest: Guest = lab.kept["qguest"]
    found = lose_and_replace_vtpm(lab, guest)
    assert qemu_answers(guest), "QEMU hangs"
    return found


# TPM 1.2: TIS, once each way.


@tis
def tis_registers_are_served_to_a_stock_qemu(lab: Lab) -> dict[str, Any]:
    """TPM 1.2: the wrapper makes the bridge the TIS device; hvmloader's TCPA table, tpm_tis."""
    start_vtpm_domain(lab, "vtpm12", "1.2", BESIDE_DOM0)
    guest = boot_wrapped(lab, "tguest", 1)
    assert served("tguest")["guest"]["domid"] == guest.domid
    return uses(guest, "tpm_tis", "TCPA", "00" * 20)


@tis
def qemus_tis_is_served(lab: Lab) -> dict[str, Any]:
    """QEMU's tpm-tis with the bridge and TPM 1.2 behind it."""
    return uses(boot_wrapped(lab, "tqguest", 2), "tpm_tis", "TCPA", "00" * 20)


@tis
def a_pcr_read_of_1_2_is_timed_beside_qemus(lab: Lab) -> dict[str, float]:
    """The same for TIS."""
    return side_by_side(lab.kept["tguest"], lab.kept["tqguest"])


@tis
def a_restored_guest_has_no_tpm_until_it_boots(lab: Lab) -> dict[str, Any]:
    """The bridge is the device, of which QEMU's state knows nothing: PCRs cannot be forged.

    Then xl's reboot behind the wrapper: another domain and a bridge for it, a TPM power-cycled.
    """
    guest: Guest = lab.kept["tguest"]
    assert guest.tpm("extend", "8")["value"] != "00" * 20
    run("xl", "save", guest.name, "/tmp/saved")
    run("xl", "restore", "/tmp/saved")
    rc, text = guest.ask("busybox devmem 0xFED40000 32")
    assert text.strip() == "0xFFFFFFFF", (rc, text)
    assert not served("tguest")
    old = guest.domid
    new = guest.reboot()
    assert new != old
    assert served("tguest")["guest"]["domid"] == new
    after = guest.tpm("read", "8")
    assert (after["code"], after["value"], after["driver"]) == (0, "00" * 20, "tpm_tis"), after
    guest.destroy()
    ours("guest", "stop", guest.name)
    return {"read": text.strip(), "old": old, "new": new}


@tis
def a_saved_guest_finds_its_tpm_again(lab: Lab) -> dict[str, Any]:
    """state-blobs = "empty": xl save and xl restore on this host, the TPM stays where it is.

    The other guest of this TPM, which would have it power-cycled with a reboot, is gone.
    """
    guest: Guest = lab.kept["tqguest"]
    before, old = guest.tpm("extend", "8")["value"], guest.domid
    run("xl", "save", guest.name, "/tmp/saved")
    run("xl", "restore", "/tmp/saved")
    after = guest.tpm("read", "8")
    assert (after["code"], after["value"]) == (0, before), after
    assert guest.domid != old
    return {"old": old, "new": guest.domid}


if __name__ == "__main__":
    sys.exit(STORIES[sys.argv.pop(1)].run())
