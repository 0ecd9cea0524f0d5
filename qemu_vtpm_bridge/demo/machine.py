"""QEMU as the demo uses it: one guest, driven through QMP, read through its serial line."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trio

from ..errors import ConfigError, XenError
from .guest import Boot, read_boots

SEABIOS: Final = "SeaBIOS"
OVMF: Final = "OVMF"
_OVMF_DIRECTORY: Final = Path("/usr/share/OVMF")
_POLL_S: Final = 0.1
KVM_CPU: Final = "qemu64"
"""The least one: under a nested KVM, QEMU may abort on `host` at an MSR that it may not set."""
_QMP_DEADLINE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class GuestSetup:
    """What a guest is made of."""

    firmware: str
    device: str
    tpm_socket: Path
    kernel: Path
    initramfs: Path
    kvm: bool = False

    def words(self, directory: Path) -> list[str]:
        """Return QEMU's command line; the guest's files go below `directory`."""
        accelerator = ["-accel", "kvm", "-cpu", KVM_CPU]
        if not self.kvm:
            accelerator = ["-accel", "tcg,thread=multi", "-cpu", "max"]
        return [
            "qemu-system-x86_64",
            *("-machine", "q35"),
            *accelerator,
            # With two vCPUs, Linux 6.1 under TCG was seen to lose its timer interrupt.
            *("-smp", "1", "-m", "256"),
            *("-nodefaults", "-display", "none", "-nic", "none"),
            *self._firmware_words(directory),
            *("-kernel", str(self.kernel), "-initrd", str(self.initramfs)),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-serial", f"file:{directory / 'console.log'}"),
            *("-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off"),
            *self.tpm_words(),
        ]

    def tpm_words(self) -> list[str]:
        """Return the part that gives the guest its TPM."""
        return [
            *("-chardev", f"socket,id=chrtpm,path={self.tpm_socket}"),
            *("-tpmdev", "emulator,id=tpm0,chardev=chrtpm"),
            *("-device", f"{self.device},tpmdev=tpm0"),
        ]

    def _firmware_words(self, directory: Path) -> list[str]:
        if self.firmware == SEABIOS:
            return []
        variables = directory / "OVMF_VARS.fd"
        try:
            variables.write_bytes((_OVMF_DIRECTORY / "OVMF_VARS_4M.fd").read_bytes())
        except OSError as error:
            raise ConfigError(f"OVMF: {error}", next_step="install the package ovmf") from error
        code = _OVMF_DIRECTORY / "OVMF_CODE_4M.fd"
        return [
            *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
            *("-drive", f"if=pflash,format=raw,file={variables}"),
        ]


class Machine:
    """A running QEMU."""

    def __init__(self, process: trio.Process, directory: Path) -> None:
        self.process = process
        self.directory = directory
        self._qmp: trio.SocketStream | None = None
        self._unread = b""

    @classmethod
    async def start(cls, setup: GuestSetup, directory: Path) -> Machine:
        """Start QEMU; what it prints goes below `directory`, which must exist."""
        for name in ("console.log", "qmp.sock"):
            (directory / name).unlink(missing_ok=True)
        with (directory / "qemu.log").open("wb") as log:
            process = await trio.lowlevel.open_process(
                setup.words(directory),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return cls(process, directory)

    def boots(self) -> list[Boot]:
        """Return what the guest has said so far."""
        path = self.directory / "console.log"
        return read_boots(path.read_text("latin-1") if path.exists() else "")

    def ensure_running(self) -> None:
        """Raise XenError where QEMU has ended."""
        if self.process.poll() is not None:
            said = (self.directory / "qemu.log").read_text("latin-1").strip()
            raise XenError(
                f"QEMU ended with status {self.process.returncode}: {said or 'it said nothing'}",
                next_step=f"see {self.directory}",
            )

    async def command(self, name: str) -> None:
        """Have QEMU carry a QMP command out."""
        with trio.fail_after(_QMP_DEADLINE_S):
            stream = await self._monitor()
            await stream.send_all(json.dumps({"execute": name}).encode() + b"\n")
            while "return" not in await self._message(stream):
                pass

    async def _monitor(self) -> trio.SocketStream:
        if self._qmp is None:
            self._qmp = await self._connect()
            await self._message(self._qmp)
            await self.command("qmp_capabilities")
        return self._qmp

    async def _connect(self) -> trio.SocketStream:
        while True:
            with suppress(OSError):
                return await trio.open_unix_socket(str(self.directory / "qmp.sock"))
            self.ensure_running()
            await trio.sleep(_POLL_S)

    async def _message(self, stream: trio.SocketStream) -> dict[str, Any]:
        while b"\n" not in self._unread:
            chunk = await stream.receive_some()
            if not chunk:
                raise XenError("QEMU closed its monitor")
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return dict(json.loads(line))

    async def quit(self) -> None:
        """End QEMU in order, and otherwise all the same."""
        try:
            with trio.move_on_after(_QMP_DEADLINE_S):
                with suppress(XenError, trio.TooSlowError, trio.BrokenResourceError):
                    await self.command("quit")
                await self.process.wait()
        finally:
            if self.process.returncode is None:
                self.process.kill()
                with trio.CancelScope(shield=True):
                    await self.process.wait()
            if self._qmp is not None:
                await trio.aclose_forcefully(self._qmp)
