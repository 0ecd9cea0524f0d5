"""A real libvirtd of one's own: nothing of the machine's own libvirt is used or touched.

It is a session daemon of an unprivileged user, so that every file of its lies below one
directory.  QEMU runs as the same user, which is what a libvirt host looks like to a bridge:
its socket has to be given to another user.
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
from tests.support.chain import wait_until

DAEMON = "/usr/sbin/libvirtd"
SERIAL = """
    <serial type='file'><source path='{place}/console.log'/><target port='0'/></serial>"""
# The UUID is measured, by way of SMBIOS: it has to stay the same from start to start.
DOMAIN = """\
<domain type='qemu'>
  <name>{name}</name>
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
    <controller type='usb' model='none'/>{serial}
    {tpm}
  </devices>
</domain>
"""


def missing_parts() -> str:
    """Return what of libvirt is not installed, for a reason to skip."""
    programs = (DAEMON, "virsh", "virt-xml-validate", "xmllint", "setpriv", "qemu-system-x86_64")
    return ", ".join(program for program in programs if shutil.which(program) is None)


@dataclass(frozen=True, slots=True)
class Libvirt:
    """A running session daemon."""

    place: Path
    """Belongs to the daemon's user, who can reach it."""

    @property
    def owner(self) -> str:
        """The user as whom the daemon and its guests run."""
        return pwd.getpwuid(self.place.stat().st_uid).pw_name

    def xml(self, name: str, tpm: str) -> Path:
        """Write a domain's XML, whose TPM element is `tpm`, and return its path."""
        path = self.place / f"{name}.xml"
        serial = SERIAL.format(place=self.place)
        path.write_text(
            DOMAIN.format(name=name, place=self.place, serial=serial, tpm=tpm), encoding="utf-8"
        )
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
            [*_as_user(self.owner), "virsh", "--quiet", *words],
            env=_environment(self.place),
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


def _environment(place: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(place),
        "XDG_RUNTIME_DIR": str(place / "run"),
        "XDG_CONFIG_HOME": str(place / "config"),
        "XDG_CACHE_HOME": str(place / "cache"),
        "LIBVIRT_DEFAULT_URI": "qemu:///session",
        "LC_ALL": "C.UTF-8",
    }


def _as_user(owner: str) -> list[str]:
    if os.geteuid() != 0:
        return []
    group = str(pwd.getpwnam(owner).pw_gid)
    return ["setpriv", f"--reuid={owner}", f"--regid={group}", "--clear-groups"]


def _furnish(place: Path) -> str:
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


@asynccontextmanager
async def running_libvirt() -> AsyncIterator[Libvirt]:
    """Give a libvirtd; it ends with the block, and its guests with it."""
    with tempfile.TemporaryDirectory(prefix="qvl") as directory:
        place = Path(directory)
        owner = _furnish(place)
        log = place / "libvirtd.log"
        with log.open("wb") as out:
            process = await trio.lowlevel.open_process(
                [*_as_user(owner), DAEMON],
                env=_environment(place),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        libvirt = Libvirt(place)
        try:
            door = place / "run/libvirt/libvirt-sock"
            await wait_until(lambda: door.exists() or process.poll() is not None)
            assert process.poll() is None, log.read_text()
            yield libvirt
        finally:
            with trio.CancelScope(shield=True):
                if process.poll() is None:
                    for name in (await libvirt.virsh("list", "--name")).split():
                        await libvirt.virsh("destroy", name)
                process.terminate()
                await process.wait()
