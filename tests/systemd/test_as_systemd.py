"""A service manager's part, played with what the units say: sockets, messages, capabilities."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.confine.places import open_directory
from tests.systemd.units import setting
from tests.test_cli import GET_RANDOM, PROGRAM, START, WAIT_S, World, client, code
from tests.xen.test_platform import COMPILER, build_all

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="the units start as root"),
]

BRIDGE, VTPM = "qemu-vtpm-bridge@.service", "vtpm@.service"
DEVICE = "qemu-vtpm-bridge-device@.service"


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, stack.enter_context(open_directory()))


class Service:
    """A unit's program, and the manager's end of its notifications."""

    def __init__(self, process: subprocess.Popen[bytes], manager: socket.socket) -> None:
        self.process = process
        self._manager = manager

    def until(self, wanted: bytes) -> None:
        """Return once the program has said this."""
        while self._manager.recv(1000) != wanted:
            pass

    def stop(self) -> None:
        """Do what `systemctl stop` does."""
        self.process.send_signal(signal.SIGTERM)
        self.until(b"STOPPING=1")
        assert self.process.wait(WAIT_S) == 0


@contextmanager
def service(
    unit: str, world: World, listener: socket.socket | None = None, *more: str
) -> Iterator[Service]:
    """Start what the unit starts, with its capabilities and what systemd passes along.

    Its directories are below the world's, and its user is nobody: the machine of a test has
    no other one.
    """
    words = setting(unit, "ExecStart").replace("%i", "guest").replace("%I", "guest").split()[1:]
    for directory in ("/etc/qemu-vtpm-bridge", "/run/qemu-vtpm-bridge", "/run/vtpm"):
        words = [word.replace(directory, str(world.place)) for word in words]
    words = [word.replace("/var/lib/vtpm", str(world.place / "state")) for word in words]
    words[words.index("--run-as") + 1] = "nobody"
    capabilities = setting(unit, "CapabilityBoundingSet").lower().replace("cap_", "+").split()
    setpriv = ["setpriv", f"--bounding-set=-all,{','.join(capabilities)}", "--no-new-privs"]
    setpriv += ["--inh-caps=-all", "--"]
    # Between fork and exec, in a shell: the descriptor is 3, and LISTEN_PID is the process
    # that becomes the program.
    shell = 'export LISTEN_PID=$$ WATCHDOG_PID=$$; exec "$@"'
    environment = os.environ | {"NOTIFY_SOCKET": str(world.place / "notify")}
    environment["WATCHDOG_USEC"] = "200000"
    passed = []
    if listener is not None:
        shell = f"exec 3<&{listener.fileno()}; export LISTEN_FDS=1; {shell}"
        passed = [listener.fileno()]
    (world.place / "notify").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, world.log.open("ab") as log:
        manager.bind(str(world.place / "notify"))
        manager.settimeout(WAIT_S)
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *setpriv, *PROGRAM, *words, *more],
            pass_fds=passed,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            yield Service(process, manager)
        finally:
            process.kill()
            process.wait()


def configure(world: World, table: str) -> None:
    text = f'[run]\nbackend = "vtpm"\n{table}'
    (world.place / "guest.toml").write_text(text, encoding="ascii")


def test_the_units_serve_a_guest_and_tell_systemd_how_they_are(world: World) -> None:
    configure(world, f'embedded = "{world.world}"')
    state = world.place / "state" / "guest"
    words = ["--embedded", str(world.world), "--domid", "2"]
    path = world.place / "guest.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.set_inheritable(True)
        with service(BRIDGE, world, listener) as bridge:
            bridge.until(b"READY=1")
            vtpm = world.start("vtpm", *words, "--state-dir", str(state), "--run-as", "nobody")
            # QEMU connected before anybody served.
            with client(path) as (_, data):
                assert code(data, START) == 0
                for _ in range(3):
                    bridge.until(b"WATCHDOG=1")
                assert code(data, GET_RANDOM) == 0
                bridge.stop()
            assert path.exists()  # the socket is systemd's
            vtpm.terminate()
            assert vtpm.wait(WAIT_S) == 0


def test_the_vtpm_unit_starts_twice_on_a_directory_that_is_not_roots_any_more(world: World) -> None:
    """The second time root may not look into it: the unit leaves it no CAP_DAC_OVERRIDE."""
    for _ in range(2):
        more = ["--embedded", str(world.world), "--domid", "2"]
        with service(VTPM, world, None, *more) as vtpm:
            vtpm.until(b"READY=1")
            vtpm.until(b"WATCHDOG=1")
            vtpm.stop()
        owner = (world.place / "state" / "guest").stat()
        assert owner.st_uid != 0


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_the_device_unit_waits_for_its_guest_and_is_started_again_once_killed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stand-ins for Xen's libraries; the guest is in tests/xen/rig, which has a real Xen."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(build_all(tmp_path / "libraries")))
    monkeypatch.setenv("XENSTORED_PATH", str(world.world / "dom" / "0" / "xenstored.sock"))
    configure(world, 'device = "crb"')
    for killed in (True, False):
        with service(DEVICE, world) as bridge:
            bridge.until(b"READY=1")
            bridge.until(b"WATCHDOG=1")
            found = world.status("guest.status")
            assert found["guest"]["name"] == "guest"
            assert found["confinement"]["user"] == "nobody"
            broker = broker_of(bridge.process.pid)
            assert "broker of" in (broker / "cmdline").read_text()
            if killed:
                bridge.process.kill()
            else:
                bridge.stop()
            world.until(lambda broker=broker: not broker.exists())


def broker_of(pid: int) -> Path:
    """Return the place in /proc of a bridge's broker."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return Path("/proc", child)
