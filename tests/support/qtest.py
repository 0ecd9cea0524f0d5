"""QEMU's own TPM devices, driven access by access through qtest.

QEMU runs no processor (`-S`) and has a `HeldTpm` behind it.  Nothing sleeps: an access
is done when qtest says OK; that a command ended is seen in QEMU's trace (TIS) or in
CTRL_START (CRB), and one more round trip then brings the interrupt messages.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.bridge.tpm import Family
from tests.support.heldtpm import WAIT_S, HeldTpm

QEMU = "qemu-system-x86_64"
BASE = 0xFED40000
IRQ_PIN = 5
LETTERS = {1: "b", 2: "w", 4: "l", 8: "q"}
CRB_START = 0x4C


class _Lines:
    """Lines of text over a unix socket that QEMU connects to."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(WAIT_S)

    def accept(self) -> None:
        self._socket, _ = self._listener.accept()
        self._socket.settimeout(WAIT_S)
        self._file = self._socket.makefile("r", encoding="utf-8")

    def send(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def line(self) -> str:
        if not (text := self._file.readline()):
            raise EOFError("QEMU is gone")
        return text.rstrip("\n")

    def close(self) -> None:
        self._listener.close()
        if hasattr(self, "_socket"):
            self._file.close()
            self._socket.close()


class QemuDevice:
    """A TPM device in a QEMU of its own; a context manager, and a `trace.Device`."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        """Start QEMU with the device of a trace's header: dev, tpm, buf, est."""
        self._tis = header["dev"] == "tis"
        self._directory = Path(tempfile.mkdtemp(prefix="qtest-"))
        self.tpm = HeldTpm(
            self._directory / "tpm",
            family=Family.TPM_2_0 if header["tpm"] == 2 else Family.TPM_1_2,
            buffer_bytes=header["buf"],
            established=bool(header["est"]),
        )
        self._qtest = _Lines(self._directory / "qtest")
        self._qmp = _Lines(self._directory / "qmp")
        self._levels: list[int] = []
        self._ended = 0
        self._log = threading.Condition()
        self._process = subprocess.Popen(
            [
                *(QEMU, "-nodefaults", "-no-user-config", "-display", "none"),
                *("-machine", "q35", "-accel", "tcg", "-S", "-m", "16"),
                *("-qtest", f"unix:{self._directory / 'qtest'}", "-qtest-log", "/dev/null"),
                *("-chardev", f"socket,id=mon,path={self._directory / 'qmp'}"),
                *("-mon", "chardev=mon,mode=control"),
                *("-chardev", f"socket,id=chr,path={self._directory / 'tpm'}"),
                *("-tpmdev", "emulator,id=tpm0,chardev=chr"),
                *("-device", f"tpm-{header['dev']},tpmdev=tpm0"),
                *("-trace", "tpm_util_show_buffer"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._watcher = threading.Thread(target=self._watch_log, daemon=True)
        self._watcher.start()
        try:
            self._qtest.accept()
            self._qmp.accept()
            self._qmp.line()
            self._qmp.send('{"execute": "qmp_capabilities"}')
            self._qmp.line()
            self._ask("irq_intercept_in ioapic")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> QemuDevice:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU, even one that waits for its TPM."""
        self._process.kill()
        self._process.wait()
        self.tpm.close()
        self._watcher.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        self._qtest.close()
        self._qmp.close()
        shutil.rmtree(self._directory)

    def _watch_log(self) -> None:
        """Count the commands that ended, as QEMU's trace has them."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "direction: From TPM" in line:
                with self._log:
                    self._ended += 1
                    self._log.notify_all()

    def _ask(self, words: str) -> str:
        self._qtest.send(words)
        while True:
            kind, _, rest = self._qtest.line().partition(" ")
            if kind == "IRQ":
                what, pin = rest.split()
                if int(pin) == IRQ_PIN:
                    self._levels.append(int(what == "raise"))
            elif kind == "OK":
                return rest
            else:
                raise RuntimeError(f"qtest answers {kind} {rest} to {words}")

    # trace.Device

    def read(self, offset: int, size: int) -> int:
        """Read as the processor would."""
        at = BASE + offset
        if size in LETTERS:
            return int(self._ask(f"read{LETTERS[size]} {at:#x}"), 16) & (1 << 8 * size) - 1
        return int.from_bytes(bytes.fromhex(self._ask(f"read {at:#x} {size:#x}")[2:]), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write as the processor would."""
        at = BASE + offset
        if size in LETTERS:
            self._ask(f"write{LETTERS[size]} {at:#x} {value:#x}")
        else:
            self._ask(f"write {at:#x} {size:#x} 0x{value.to_bytes(size, 'little').hex()}")

    def complete(self, rsp: bytes) -> None:
        """Let the TPM answer, and wait until the device has seen it."""
        before = self._ended
        self.tpm.answer(rsp)
        if self._tis:
            with self._log:
                seen = self._log.wait_for(lambda: self._ended > before, WAIT_S)
            assert seen, "QEMU did not take the answer"
        else:
            while self.read(CRB_START, 4) & 1:
                pass
        # Interrupts of the completion come before this one's answer.
        self._ask("readb 0x0")

    def reset(self, rsp: bytes = b"") -> None:
        """Reset the machine; no command may run."""
        self._qmp.send('{"execute": "system_reset"}')
        while json.loads(self._qmp.line()).get("event") != "RESET":
            pass
        self._ask("readb 0x0")

    def take_irq(self) -> list[int]:
        """Return the levels that the interrupt line went through."""
        levels, self._levels = self._levels, []
        return levels

    def take_events(self) -> list[list[Any]]:
        """Return what reached the TPM, commands apart."""
        return self.tpm.events()
