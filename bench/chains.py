"""What stands between a client and a TPM: nothing, forwarders, or the bridge with a vTPM domain.

Every chain has a swtpm of its own, started and with TPM2_Startup done, and gives one
descriptor on which a client sends commands.
"""

from __future__ import annotations

import array
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from .measure import seconds_until

_STARTUP: Final = bytes.fromhex("80010000000c000001440000")
_VTPM_DOMID: Final = 2
_BUSY: Final = (
    "import sys, threading\n"
    "def spin():\n"
    "    while True:\n"
    "        pass\n"
    "threading.Thread(target=spin, daemon=True).start()\n"
    "from qemu_vtpm_bridge.cli import main\n"
    "sys.exit(main())\n"
)


class Bench:
    """Starts processes and ends them all; `python` runs the installed package."""

    def __init__(self, stack: ExitStack, programs: Path, python: Path) -> None:
        self._stack = stack
        self._programs = programs
        self.python = python
        # Unix sockets need short paths.
        self.place = Path(tempfile.mkdtemp(prefix="qvb-bench-"))
        stack.callback(shutil.rmtree, self.place, ignore_errors=True)

    def directory(self) -> Path:
        """Return a new directory."""
        return Path(tempfile.mkdtemp(dir=self.place))

    def start(self, *words: str, fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a process that ends with the bench."""
        log = (self.place / "log").open("ab")
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds
        )
        log.close()
        self._stack.callback(_end, process)
        return process

    # Chains.

    def direct(self) -> int:
        """A client at the TPM itself."""
        ours, theirs = socket.socketpair()
        self.start(
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.directory()}"),
            *("--fd", str(theirs.fileno()), "--flags", "not-need-init"),
            *("--ctrl", f"type=unixio,path={self.directory() / 'ctrl'}"),
            fds=(theirs.fileno(),),
        )
        theirs.close()
        self._stack.callback(ours.close)
        start_tpm(ours)
        return ours.fileno()

    def forwarders(self, count: int) -> int:
        """A client behind so many forwarders."""
        behind = self.direct()
        for _ in range(count):
            ours, theirs = socket.socketpair()
            self.start(
                str(self._programs / "forwarder"),
                *(str(theirs.fileno()), str(behind)),
                fds=(theirs.fileno(), behind),
            )
            theirs.close()
            behind = ours.fileno()
            self._stack.callback(ours.close)
        return behind

    def bridge(self, *, busy: bool = False) -> BridgeChain:
        """A client at a bridge, whose vTPM domain is a process too."""
        chain = BridgeChain(self, busy=busy)
        # Kept: its sockets close with it.
        self._stack.callback(chain.close)
        return chain


class BridgeChain:
    """A bridge and a vTPM domain in an embedded Xen of their own."""

    def __init__(self, bench: Bench, *, busy: bool = False) -> None:
        place = bench.directory()
        world, tpm_socket = place / "w", place / "tpm"
        run = [str(bench.python.with_name("qemu-vtpm-bridge"))]
        xen = bench.start(*run, "embedded-xen", str(world), "--domain", f"{_VTPM_DOMID}:vtpm")
        seconds_until(world / "dom" / str(_VTPM_DOMID) / "xen.sock", xen, time.monotonic())
        where = ["--embedded", str(world)]
        subprocess.run(
            [*run, "attach", *where, "--backend", str(_VTPM_DOMID)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.vtpm = bench.start(
            *run, "vtpm", *where, "--domid", str(_VTPM_DOMID), "--state-dir", str(place / "state")
        )
        if busy:
            # Isolated: what is imported is the installation, not the checkout.
            run = [str(bench.python), "-I", "-c", _BUSY]
        started = time.monotonic()
        self.bridge = bench.start(
            *run, "run", *where, "--backend", str(_VTPM_DOMID), "--socket", str(tpm_socket)
        )
        self.listening_s = seconds_until(tpm_socket, self.bridge, started)
        self.control, self.data = _power_on(tpm_socket)
        start_tpm(self.data)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Have the bridge's process stand still, except in `awake`.

        One that is busy all the time would take a core from the rows it is not in.
        """
        self.bridge.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.bridge.send_signal(signal.SIGCONT)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Have it run within the block, where it is `asleep` otherwise."""
        self.bridge.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.bridge.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """Leave, as a QEMU that was killed does."""
        self.control.close()
        self.data.close()

    @property
    def fd(self) -> int:
        """Where a client sends commands."""
        return self.data.fileno()


def _power_on(path: Path) -> tuple[socket.socket, socket.socket]:
    """Do what QEMU does at its start; return the control connection and the data socket."""
    control = socket.socket(socket.AF_UNIX)
    control.connect(str(path))
    ours, theirs = socket.socketpair()
    rights = array.array("i", [theirs.fileno()])
    control.sendmsg([struct.pack(">I", 0x10)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    _expect_success(control)
    theirs.close()
    control.sendall(struct.pack(">II", 2, 0))
    _expect_success(control)
    return control, ours


def _expect_success(control: socket.socket) -> None:
    if control.recv(4) != bytes(4):
        raise SystemExit("the bridge refused a control command")


def start_tpm(data: socket.socket) -> None:
    """Send TPM2_Startup."""
    data.sendall(_STARTUP)
    answer = data.recv(4096)
    if answer[6:10] not in (bytes(4), b"\0\0\1\0"):
        raise SystemExit(f"TPM2_Startup was answered with {answer.hex()}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def bench(programs: Path, python: Path) -> Iterator[Bench]:
    """Give a bench; its processes end with the block."""
    with ExitStack() as stack:
        yield Bench(stack, programs, python)
