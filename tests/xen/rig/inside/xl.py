"""xl's wrapper under a real xl and a real QEMU for Xen, guests that stay paused, one boot.

    python3 -m tests.xen.rig.inside.xl

What a guest sees of its TPM is in guests.py; here it is what xl, the wrapper and the bridge
make of each other.  dom0's QEMU has no TPM devices; /share/qemu has them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from tests.xen.rig.inside.dom0 import what_is_missing_is_named
from tests.xen.rig.inside.lab import Checks, Lab, ours, run, until, xenstore
from tests.xen.rig.inside.wrapper import RUN_DIR, TPM_QEMU, WRAPPER, bridge_pid, lay_out, served

check = Checks()
check(what_is_missing_is_named)  # the other Xen and the other Linux than dom0.py's

XEN_QEMU = "/usr/libexec/xen-qemu-system-i386"

GUESTS_TEXT = f"""
[guest.web]
backend = "vtpm"
registers = "tis"
[guest."mail server"]
backend = "vtpm"
handle = 1
registers = "tis"
[guest.lost]
backend = "nobody"
[guest.shown]
backend = "vtpm"
handle = 2
registers = "tis"
device-model = "{TPM_QEMU}"
"""

CONFIG = """
name="{name}"
type="hvm"
memory=64
vcpus=1
vnc=0
vga="none"
device_model_version="qemu-xen"
device_model_override="{device_model}"
{more}
"""


def create(
    lab: Lab, name: str, more: str = "", device_model: Path = WRAPPER
) -> subprocess.CompletedProcess[str]:
    """Have xl build a guest, which stays paused."""
    config = Path(f"/tmp/{name.replace(' ', '_')}.cfg")
    config.write_text(CONFIG.format(name=name, device_model=device_model, more=more))
    lab.domains.add(name)
    return subprocess.run(
        ["xl", "create", "-p", "-q", str(config)], check=False, capture_output=True, text=True
    )


def domid_of(name: str) -> int:
    return int(run("xl", "domid", name))


def device_model(domid: int) -> list[str]:
    """The words of the process that libxl takes for the guest's device model."""
    pid = xenstore(f"/local/domain/{domid}/image/device-model-pid")
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


@check
def a_guest_of_a_qemu_without_tpm_gets_the_bridge_as_its_device(lab: Lab) -> dict[str, Any]:
    """The wrapper becomes Debian's QEMU for Xen; the bridge has the guest's registers."""
    lay_out(GUESTS_TEXT)
    # A bridge waits for its vTPM domain's program; a domain of the name is all that it needs.
    for name in ("vtpm", "web"):
        done = create(lab, name)
        assert done.returncode == 0, done
    domid = domid_of("web")
    assert served("web")["guest"]["domid"] == domid
    words = device_model(domid)
    assert words[0] == XEN_QEMU, words
    assert "-tpmdev" not in words, words
    assert xenstore(f"/local/domain/{domid}/platform/tpm_version") == "1"
    return {"words": words}


@check
def a_guest_that_is_destroyed_and_created_finds_the_same_bridge(lab: Lab) -> dict[str, Any]:
    """Another domain of the same name: a reboot, as far as the wrapper can tell."""
    before, bridge = domid_of("web"), bridge_pid("web")
    run("xl", "destroy", "web")
    done = create(lab, "web")
    assert done.returncode == 0, done
    assert domid_of("web") != before
    assert served("web")["guest"]["domid"] == domid_of("web")
    assert bridge_pid("web") == bridge
    return {"domids": [before, domid_of("web")]}


@check
def two_guests_at_once_one_with_an_odd_name(lab: Lab) -> None:
    """Each has its own bridge, at its own device."""
    done = create(lab, "mail server")
    assert done.returncode == 0, done
    assert served("mail\\x20server")["guest"]["domid"] == domid_of("mail server")
    assert served("web")["guest"]["domid"] == domid_of("web")


@check
def a_guest_without_an_entry_is_left_alone(lab: Lab) -> None:
    """QEMU, and no bridge."""
    done = create(lab, "plain")
    assert done.returncode == 0, done
    assert device_model(domid_of("plain"))[0] == XEN_QEMU
    assert not (RUN_DIR / "plain.lock").exists()


@check
def a_wrong_vtpm_domain_is_one_message_in_xls_log(lab: Lab) -> dict[str, Any]:
    """xl gives up, and the reason is the log's last line."""
    done = create(lab, "lost")
    assert done.returncode != 0, done
    lines = Path("/var/log/xen/qemu-dm-lost.log").read_text().splitlines()
    assert lines[-1].startswith("qemu-vtpm-bridge-dm: no domain is named nobody"), lines
    assert not (RUN_DIR / "lost.sock").exists()
    return {"log": lines[-1], "xl": done.stderr.splitlines()[:3]}


@check
def words_in_the_configuration_reach_a_qemu_with_tpm_devices(lab: Lab) -> dict[str, Any]:
    """The wrapper gives QEMU a TIS whose TPM is the bridge; -vtpm is gone from its words."""
    run("xl", "destroy", "mail server")
    ours("guest", "stop", "mail server")
    value = f"backend=vtpm,handle=1,registers=tis,device-model={TPM_QEMU}"
    done = create(lab, "worded", f'device_model_args_hvm=["-vtpm", "{value}"]')
    assert done.returncode == 0, done
    words = device_model(domid_of("worded"))
    assert "-vtpm" not in words, words
    assert words[-1] == "tpm-tis,tpmdev=vtpm0", words
    until(lambda: served("worded").get("qemu", {}).get("data-attached"), "QEMU is attached")
    return {"words": words}


@check
def stopping_leaves_nothing(lab: Lab) -> None:
    """No bridge and no entries; again is no error."""
    for name in ("web", "mail server"):
        subprocess.run(["xl", "destroy", name], check=False, capture_output=True)
        for _ in range(2):
            ours("guest", "stop", name)
    assert not list(RUN_DIR.glob("web.s*")), list(RUN_DIR.iterdir())
    assert "(web" not in ours("list")


@check
def without_the_wrapper_the_configuration_has_the_socket(lab: Lab) -> dict[str, Any]:
    """`guest ensure`, and in the xl.cfg the line that `guest show` prints; a start, and another.

    Two frontends are the most for what may be Mini-OS': it comes after the others have gone.
    """
    ours("guest", "ensure", "shown")
    bridge = bridge_pid("shown")
    line = ours("guest", "show", "shown").strip()
    for _ in range(2):
        done = create(lab, "shown", line, TPM_QEMU)
        assert done.returncode == 0, done
        until(lambda: served("shown")["qemu"]["data-attached"], "QEMU is attached")
        run("xl", "destroy", "shown")
        until(lambda: not served("shown")["qemu"]["data-attached"], "QEMU has gone")
    assert bridge_pid("shown") == bridge
    ours("guest", "stop", "shown")
    assert not list(RUN_DIR.glob("shown.s*")), list(RUN_DIR.iterdir())
    return {"line": line}


if __name__ == "__main__":
    raise SystemExit(check.run())
