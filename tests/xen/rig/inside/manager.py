"""A real systemd in dom0, whose own init is a script: the package's units, as pip puts them.

Theory of operation.  systemd runs as it does in a container: the first process of a PID
namespace, with mounts and a cgroup of its own, on the same kernel, devices and /run.  It has
the few targets that every unit asks for and nothing else to start, so that it is up within
seconds under an emulator.  A drop-in has what is different here, and why; it switches off
none of the shipped units' rules.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path
from typing import Any

from tests.xen.rig.inside.lab import Lab, install_program, run, until

PREFIX = Path("/usr/local")
UNITS = PREFIX / "lib/systemd/system"
CONFIG_DIR = Path("/etc/qemu-vtpm-bridge")
OURS_HERE = Path("/run/systemd/rig")
"""What the rig adds to the units."""

STARTED_BY_ALL = ("sysinit.target", "basic.target", "shutdown.target")

DROP_IN = """
[Service]
# No journal runs here.
StandardOutput=append:{log}
StandardError=inherit
# Python's compiled files, as the package is on a disk that cannot be written to.  They are in
# /tmp, of which PrivateTmp= makes another one, and compiling all anew takes longer than all else.
BindPaths={compiled}
# An emulated processor that others use too.
TimeoutStartSec=infinity
"""

START = """
set -e
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo +memory +pids > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/systemd
exec unshare --pid --mount --mount-proc --fork --kill-child sh -ec '
    echo 0 > /sys/fs/cgroup/systemd/cgroup.procs
    exec unshare --cgroup sh -ec "
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
        mount -t tmpfs none /usr/lib/systemd/system-generators
        exec env -i container=rig PATH=$PATH SYSTEMD_UNIT_PATH={path} \
            /usr/lib/systemd/systemd --system --unit=rig.target --show-status=no"'
"""


class Manager:
    """systemd, and what systemctl does with it."""

    def __init__(self, lab: Lab) -> None:
        """Lay out what pip would have, and start systemd; it ends with the lab."""
        self._lay_out()
        self._unshared = lab.program_of(
            "systemd", "sh", "-c", START.format(path=f"{OURS_HERE}:{UNITS}")
        )
        until(Path("/run/systemd/private").is_socket, "systemd listens")
        children = Path(f"/proc/{self._unshared.process.pid}/task/{self._unshared.process.pid}")
        self._pid = (children / "children").read_text().split()[0]

    @staticmethod
    def _lay_out() -> None:
        (wheel,) = Path("/share/wheel").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                _, found, place = name.partition(".data/data/lib/")
                if found:
                    (PREFIX / "lib" / place).parent.mkdir(parents=True, exist_ok=True)
                    (PREFIX / "lib" / place).write_bytes(archive.read(name))
        install_program()
        run("systemd-sysusers", *map(str, (PREFIX / "lib/sysusers.d").iterdir()))
        Path("/etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
        OURS_HERE.mkdir(parents=True)
        for name in STARTED_BY_ALL:
            shutil.copy2(Path("/usr/lib/systemd/system", name), OURS_HERE)
        (OURS_HERE / "rig.target").write_text("[Unit]\nDefaultDependencies=no\n")

    def ctl(self, *words: str, check: bool = True) -> str:
        """Return what `systemctl WORDS...` prints."""
        return run(
            *("nsenter", "--target", self._pid, "--mount", "--pid", "--root", "--"),
            *("systemctl", *words),
            check=check,
        )

    def start(self, template: str, guest: str, config: str, log: Path) -> Unit:
        """Start a guest's instance of a template as an operator does; does not wait for it."""
        CONFIG_DIR.mkdir(parents=True, exist_ok=True)
        instance = run("systemd-escape", guest).strip()
        (CONFIG_DIR / f"{instance}.toml").write_text(config)
        place = OURS_HERE / f"{template}@.service.d"
        place.mkdir(exist_ok=True)
        (place / "rig.conf").write_text(DROP_IN.format(log=log, compiled=sys.pycache_prefix))
        self.ctl("daemon-reload")
        unit = Unit(self, f"{template}@{instance}.service")
        self.ctl("start", "--no-block", unit.name)
        return unit


class Unit:
    """A unit, in place of a `Program`."""

    def __init__(self, manager: Manager, name: str) -> None:
        self.name = name
        self._manager = manager

    def show(self, *names: str) -> dict[str, str]:
        """Return properties of it."""
        lines = self._manager.ctl("show", "--property", ",".join(names), self.name).splitlines()
        return {key: value for key, _, value in (line.partition("=") for line in lines)}

    @property
    def cgroup(self) -> Path:
        """Its control group."""
        return Path(f"/sys/fs/cgroup/systemd{self.show('ControlGroup')['ControlGroup']}")

    def processes(self) -> list[str]:
        """Return the ids of its processes, as they are outside the namespace."""
        return (self.cgroup / "cgroup.procs").read_text().split()

    def in_force(self) -> dict[str, Any]:
        """Return what the kernel says about its rules, from outside and without believing systemd.

        That is for each process, and for one that joins them to open devices.
        """
        opened = []
        for device in ("/dev/xen/privcmd", "/dev/xen/gntdev", "/dev/vda"):
            join = 'echo $$ > "$1/cgroup.procs" && : <> "$2"'
            words = ["sh", "-c", join, "sh", str(self.cgroup), device]
            done = subprocess.run(words, check=False, capture_output=True, text=True)
            assert done.returncode == 0 or "not permitted" in done.stderr, done
            opened += [device] if done.returncode == 0 else []
        found = [facts(pid) for pid in self.processes()]
        return {
            "opens": opened,
            "memory": int((self.cgroup / "memory.max").read_text()),
            "filters": min(each["filters"] for each in found),
            "read-only": all(each["read-only"] for each in found),
            "own-network": all(each["own-network"] for each in found),
        }

    def kill(self) -> None:
        """Kill its main process as nobody wants to be ended."""
        self._manager.ctl("kill", "--kill-whom=main", "--signal=KILL", self.name)

    def end(self) -> int:
        """Stop it; return its status."""
        self._manager.ctl("stop", self.name)
        return int(self.show("ExecMainStatus")["ExecMainStatus"])


def facts(pid: str) -> dict[str, Any]:
    """Return what /proc says about a process that concerns a unit's rules."""
    place = Path("/proc", pid)
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    mounts = [line.split() for line in (place / "mountinfo").read_text().splitlines()]
    (root,) = (words[5] for words in mounts if words[4] == "/")
    return {
        "filters": int(status["Seccomp_filters"]),
        "read-only": root.split(",")[0] == "ro",
        "own-network": not (place / "ns/net").samefile("/proc/self/ns/net"),
    }
