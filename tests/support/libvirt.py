"""A real libvirtd of one's own: nothing of the machine's own libvirt is used or touched.

There are two.  The session daemon of an unprivileged user keeps every file below one
directory; QEMU runs as the same user, so that a bridge's socket has to be given to it.  The
system daemon, which is what calls hooks on a real host, gets directories of its own in a
namespace of its own.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from qemu_vtpm_bridge.demo.guest import Boot, read_boots
from tests.support.wait import wait_until

DAEMON = "/usr/sbin/libvirtd"
# The UUID is measured, by way of SMBIOS: it has to stay the same from start to start.
DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>{more}
  <uuid>5f0d4b5e-7a34-4ee2-8a0d-6e5c54a1b0c7</uuid>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{place}/kernel</kernel>
    <initrd>{place}/initramfs.gz</initrd>
    <cmdline>console=ttyS0 quiet panic=-1</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <memballoon model='none'/>
    <controller type='usb' model='none'/>
    <serial type='file'><source path='{place}/console.log'/><target port='0'/></serial>
    {tpm}
  </devices>
</domain>
"""


HIDDEN = ("/run", "/var/lib", "/var/log", "/var/cache")
"""Where libvirt keeps what is the machine's; the system daemon sees empty ones."""

USER = "libvirt-qemu"
"""Debian's libvirtd does not start without this user, even where it makes no use of it."""

SYSTEM = """\
stdio_handler = "file"
user = "root"
group = "root"
security_driver = "none"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
"""


def missing_parts() -> str:
    """Return what of libvirt is not installed, for a reason to skip."""
    programs = (DAEMON, "virsh", "virt-xml-validate", "xmllint", "setpriv", "qemu-system-x86_64")
    return ", ".join(program for program in programs if shutil.which(program) is None)


@dataclass(slots=True)
class Libvirt:
    """A daemon that can be started and stopped; its guests run on without it."""

    place: Path
    """The daemon's own directory, which its user can reach."""
    owner: str
    """As whom the guests run."""
    prefix: list[str]
    """Before the command of each program that is to see what the daemon sees."""
    environment: dict[str, str]
    door: Path
    """The socket where the daemon listens."""
    process: trio.Process | None = None

    # The daemon.

    async def start(self) -> None:
        """Start the daemon, and return when it listens."""
        log = self.place / "libvirtd.log"
        with log.open("ab") as out:
            self.process = process = await trio.lowlevel.open_process(
                [*self.prefix, DAEMON],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        await wait_until(lambda: self.door.exists() or process.poll() is not None)
        assert process.poll() is None, log.read_text()

    async def stop(self) -> None:
        """End the daemon."""
        if self.process is not None:
            self.process.terminate()
            await self.process.wait()
            self.door.unlink(missing_ok=True)

    async def end(self) -> None:
        """End the guests, and the daemon."""
        if self.process is not None and self.process.poll() is None:
            for name in (await self.virsh("list", "--name")).split():
                await self._virsh(("destroy", name))
            await self.stop()

    # Guests.

    def xml(self, name: str, tpm: str, more: str = "") -> Path:
        """Write a domain's XML, whose TPM element is `tpm`, and return its path."""
        path = self.place / "domain.xml"
        text = DOMAIN.format(name=name, place=self.place, tpm=tpm, more=more)
        path.write_text(text, encoding="utf-8")
        return path

    async def virsh(self, *words: str) -> str:
        """Return what virsh prints; its error ends the test."""
        done = await self._virsh(words)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    async def refused(self, *words: str) -> str:
        """Return what virsh says of what it cannot do."""
        done = await self._virsh(words)
        assert done.returncode != 0
        return done.stderr.decode()

    async def _virsh(self, words: tuple[str, ...]) -> subprocess.CompletedProcess[bytes]:
        return await trio.run_process(
            [*self.prefix, "virsh", "--quiet", *words],
            env=self.environment,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )

    def boots(self) -> list[Boot]:
        """Return what the guest said, boot by boot."""
        console = self.place / "console.log"
        return read_boots(console.read_text("latin-1") if console.exists() else "")

    async def booted(self, count: int) -> Boot:
        """Return the boot of this number, once the guest has come to its end."""
        await wait_until(lambda: len([b for b in self.boots() if b.ended]) >= count, 150)
        return self.boots()[count - 1]


# The session daemon.


@asynccontextmanager
async def running_libvirt() -> AsyncIterator[Libvirt]:
    """Give a session daemon; it ends with the block, and its guests with it."""
    with tempfile.TemporaryDirectory(prefix="qvl") as directory:
        place = Path(directory)
        owner = _furnish_session(place)
        environment = {
            "HOME": str(place),
            "XDG_RUNTIME_DIR": str(place / "run"),
            "XDG_CONFIG_HOME": str(place / "config"),
            "XDG_CACHE_HOME": str(place / "cache"),
        }
        libvirt = Libvirt(
            place,
            owner,
            _as_user(owner),
            _environment("qemu:///session") | environment,
            place / "run/libvirt/libvirt-sock",
        )
        await libvirt.start()
        try:
            yield libvirt
        finally:
            with trio.CancelScope(shield=True):
                await libvirt.end()


def _environment(uri: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LIBVIRT_DEFAULT_URI": uri, "LC_ALL": "C.UTF-8"}


def _as_user(owner: str) -> list[str]:
    if os.geteuid() != 0:
        return []
    group = str(pwd.getpwnam(owner).pw_gid)
    return ["setpriv", f"--reuid={owner}", f"--regid={group}", "--clear-groups"]


def _furnish_session(place: Path) -> str:
    """Make the daemon's directories, and return the user as whom it is to run."""
    owner = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
    configuration = place / "config/libvirt"
    configuration.mkdir(parents=True)
    (place / "run").mkdir()
    # No virtlogd is needed then.
    (configuration / "qemu.conf").write_text('stdio_handler = "file"\n', encoding="utf-8")
    for path in (place, *place.rglob("*")):
        shutil.chown(path, owner)
    return owner


# The system daemon.


def may_have_namespaces() -> bool:
    """Return whether this process may give another one mounts of its own."""
    command = ["unshare", "--mount", "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@asynccontextmanager
async def running_system_libvirt(hook: str) -> AsyncIterator[Libvirt]:
    """Give a system daemon whose guests have this script as their hook."""
    with tempfile.TemporaryDirectory(prefix="qvl") as directory:
        place = Path(directory)
        mounts = _furnish_system(place, hook)
        holder = await trio.lowlevel.open_process(
            ["unshare", "--mount", "sh", "-ec", f"{mounts}\necho ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        try:
            assert holder.stdout is not None
            with trio.fail_after(60):
                assert await holder.stdout.receive_some() == b"ready\n"
            libvirt = Libvirt(
                place,
                "root",
                ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"],
                _environment("qemu:///system") | {"HOME": str(place)},
                Path("/proc", str(holder.pid), "root", "run/libvirt/libvirt-sock"),
            )
            await libvirt.start()
            yield libvirt
        finally:
            with trio.CancelScope(shield=True):
                await libvirt.end()
                holder.kill()
                await holder.wait()


def _furnish_system(place: Path, hook: str) -> str:
    """Make what the daemon reads, and return the shell commands that put it in its place."""
    hooks = place / "etc/hooks/qemu.d"
    hooks.mkdir(parents=True)
    (hooks / "qemu-vtpm-bridge").write_text(hook, encoding="utf-8")
    (hooks / "qemu-vtpm-bridge").chmod(0o755)
    (place / "etc/qemu.conf").write_text(SYSTEM, encoding="utf-8")
    bound = [f"mount --bind {place}/etc /etc/libvirt"]
    for name, line in (
        ("passwd", f"{USER}:x:64055:64055::/:/bin/false\n"),
        ("group", f"{USER}:x:64055:\n"),
    ):
        text = Path(f"/etc/{name}").read_text(encoding="utf-8")
        (place / name).write_text(text if f"{USER}:" in text else text + line, encoding="utf-8")
        bound.append(f"mount --bind {place}/{name} /etc/{name}")
    return "\n".join([*bound, *(f"mount -t tmpfs none {path}" for path in HIDDEN)])
