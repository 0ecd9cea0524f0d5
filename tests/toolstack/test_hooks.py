"""What can be wrong at a guest's start, by every road that a toolstack takes: said, and mended.

The roads are xl's wrapper, with a QEMU that has TPM devices and with one that has none, and
libvirt's hook.  Each is a process that is called as the toolstack calls it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.toolstack import launch
from qemu_vtpm_bridge.toolstack.guests import GUESTS_VARIABLE
from tests.support.full_disk import FILLER, as_root, fill, full_disk
from tests.support.host import Host, running_host, stranger_at
from tests.support.programs import WAIT_S, client, code
from tests.support.qtest import QEMU
from tests.support.swtpm_client import STARTUP
from tests.toolstack.test_device_model import script
from tests.toolstack.test_libvirt_hook import xml
from tests.toolstack.test_xl import libxl_words, stand_in_bridge

pytestmark = pytest.mark.timeout(180)

WEB = 5
GUESTS = '[guest.web]\nbackend = "vtpm"\n'
WRAPPER, REGISTERS, LIBVIRT = "wrapper", "registers", "libvirt"
ROADS = (WRAPPER, REGISTERS, LIBVIRT)
DIE = "lambda *_, **__: os._exit(9)"
IMPORTS = (
    "import os, sys; from qemu_vtpm_bridge import cli; "
    "from qemu_vtpm_bridge.toolstack import bridge_process, launch, libvirt, xl"
)


class Road:
    """A toolstack that starts and ends the guest `web`."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name
        # What becomes QEMU has nothing to do here; asked, it has TPM devices or none.
        ends = '[ "$1" = -xen-domid ] && exit 0'
        answers = "exit 0" if name == REGISTERS else f'exec {QEMU} "$@"'
        qemu = script(host.place / "qemu", f"{ends}\n{answers}")
        self.guests = host.guests_file(GUESTS)
        text = self.guests.read_text().replace("[host]", f'[host]\ndevice-model = "{qemu}"', 1)
        self.guests.write_text(text)
        # A bridge that is the device itself needs a Xen.
        self._bridge = stand_in_bridge(host, WEB) if name == REGISTERS else None

    @property
    def doors(self) -> list[Path]:
        """The sockets of the guest's bridge."""
        return [self.host.run_dir / f"web.{ending}" for ending in ("sock", "status")]

    def start(self, before: str = "pass") -> subprocess.CompletedProcess[str]:
        """Have the guest started by a program that executes this before all else."""
        if self.name == LIBVIRT:
            return self._hook("prepare", "begin", before=before)
        if self._bridge is not None:
            before = f"sys.executable = {str(self._bridge)!r}; {before}"
        return self._run(f"{before}; sys.exit(xl.main())", *libxl_words(WEB, "web"))

    def stop(self, before: str = "pass") -> subprocess.CompletedProcess[str]:
        """Have the guest ended for good."""
        if self.name == LIBVIRT:
            return self._hook("release", "end", before=before)
        return self._run(f"{before}; sys.exit(cli.main())", "guest", "stop", "web")

    def reconnect(self, before: str = "pass") -> subprocess.CompletedProcess[str]:
        """Have libvirtd find the guest after a restart."""
        return self._hook("reconnect", "begin", before=before)

    def _hook(self, *station: str, before: str) -> subprocess.CompletedProcess[str]:
        words = ["libvirt-hook", "--guests", str(self.guests), "--", "web", *station, "-"]
        return self._run(f"{before}; sys.exit(cli.main())", *words)

    def _run(self, text: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", f"{IMPORTS}; {text}", *words],
            env={**os.environ, GUESTS_VARIABLE: str(self.guests)},
            input=xml("web"),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def assert_refused(self, said: str) -> None:
        """The guest does not start: one message, and nothing that was not there before."""
        done = self.start()
        assert done.returncode not in (0, 9), done.stderr
        (line,) = done.stderr.splitlines()
        assert said in line
        assert "next: " in line
        assert self.host.bridges() == []
        assert self.host.world.entries() == []

    def assert_starts(self) -> None:
        """The guest starts, and has its TPM."""
        done = self.start()
        assert (done.returncode, done.stderr) == (0, "")
        assert len(self.host.bridges()) == 1
        assert len(self.host.world.entries()) == 1
        if self.name != REGISTERS:
            with client(self.doors[0]) as (_, data):
                assert code(data, STARTUP[Family.TPM_2_0]) == 0

    def assert_stops(self) -> None:
        """The guest ends, and nothing of its TPM is left on this host."""
        done = self.stop()
        assert (done.returncode, done.stderr) == (0, "")
        assert self.host.bridges() == []
        assert self.host.world.entries() == []
        left = {path.name for path in self.host.run_dir.iterdir()}
        assert left <= {"web.bridge", "web.lock", "qemu-probe.json", FILLER}


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host() as found:
        found.world.vtpm()
        yield found


@pytest.fixture(params=ROADS)
def road(host: Host, request: pytest.FixtureRequest) -> Road:
    return Road(host, request.param)


# A socket that is there already.


def test_a_socket_that_somebody_listens_at_is_refused_and_left(host: Host, road: Road) -> None:
    host.run_dir.mkdir()
    for path in road.doors:
        with stranger_at(path):
            road.assert_refused(f"another program listens on {path}")
            assert path.is_socket()
        # Nobody listens there any more, and it can be taken.
        road.assert_starts()
        road.assert_stops()


def test_a_file_in_a_sockets_place_is_refused_and_left(host: Host, road: Road) -> None:
    host.run_dir.mkdir()
    path = road.doors[1]
    path.write_text("precious")
    road.assert_refused(f"{path} is there and is no socket")
    assert path.read_text() == "precious"
    path.unlink()
    road.assert_starts()


# A full disk.


def test_no_room_for_the_log(host: Host, road: Road) -> None:
    host.log_dir.mkdir()
    log = host.log_dir / "web.log"
    log.symlink_to("/dev/full")
    road.assert_refused("web.log: No space left on device")
    log.unlink()
    road.assert_starts()


@as_root
def test_no_room_in_the_run_directory(host: Host, road: Road) -> None:
    host.run_dir.mkdir()
    with full_disk(host.run_dir) as filler:
        road.assert_refused("No space left on device")
        filler.unlink()
        road.assert_starts()
        road.assert_stops()


# Cut short.


def after(steps: int) -> str:
    return f"launch.STEPS = (*launch.STEPS[:{steps}], {DIE})"


EACH_STEP = [after(steps) for steps in range(len(launch.STEPS) + 1)]
# What comes before the bridge's start, and after it; libvirt's own steps are in test_libvirt_hook.
OF_THE_WRAPPER = [
    *(f"xl.{name} = {DIE}" for name in ("prepare", "tpm_devices", "_tell_hvmloader")),
    f"os.execv = {DIE}",
]
OF_THE_REGISTERS = [f"launch.Launch._until_it_serves = {DIE}", f"os.execv = {DIE}"]


@pytest.mark.parametrize(
    ("name", "death"),
    [
        *((WRAPPER, death) for death in (*EACH_STEP, *OF_THE_WRAPPER)),
        *((REGISTERS, death) for death in (*EACH_STEP, *OF_THE_REGISTERS)),
        (LIBVIRT, f"libvirt._act = {DIE}"),
    ],
)
def test_a_start_that_died_can_be_done_again_and_undone(host: Host, name: str, death: str) -> None:
    road = Road(host, name)
    assert road.start(death).returncode == 9
    road.assert_starts()
    if name != LIBVIRT:
        assert host.read(f"/local/domain/{WEB}/platform/tpm_version") == "2"
    assert road.start(death).returncode == 9, "as it does beside a bridge that is there"
    road.assert_stops()


@pytest.mark.parametrize("name", [WRAPPER, LIBVIRT])
@pytest.mark.parametrize("steps", range(len(launch.STOP_STEPS) + 1))
def test_an_end_that_died_can_be_done_again_and_the_guest_started(
    host: Host, name: str, steps: int
) -> None:
    road = Road(host, name)
    death = f"launch.STOP_STEPS = (*launch.STOP_STEPS[:{steps}], {DIE})"
    road.assert_starts()
    assert road.stop(death).returncode == 9
    road.assert_starts()
    assert road.stop(death).returncode == 9
    road.assert_stops()


@pytest.mark.parametrize("steps", range(len(launch.STOP_STEPS) + 1))
def test_libvirts_end_of_a_guest_taken_out_of_the_file_can_be_done_again(
    host: Host, steps: int
) -> None:
    road = Road(host, LIBVIRT)
    road.assert_starts()
    host.guests_file("")
    death = f"launch.STOP_STEPS = (*launch.STOP_STEPS[:{steps}], {DIE})"
    assert road.stop(death).returncode == 9
    road.assert_stops()


@pytest.mark.parametrize("death", EACH_STEP[::2])
def test_a_reconnect_that_died_can_be_done_again(host: Host, death: str) -> None:
    road = Road(host, LIBVIRT)
    road.assert_starts()
    (bridge,) = host.bridges()
    # While the bridge is there none of its steps is taken.
    assert road.reconnect(death).returncode == 0
    assert host.bridges() == [bridge]
    host.kill(bridge)
    assert road.reconnect(death).returncode == 9
    assert road.reconnect().returncode == 0
    assert len(host.bridges()) == 1
    assert len(host.world.entries()) == 1
    road.assert_stops()


@as_root
def test_a_full_disk_keeps_no_guest_from_its_end(host: Host) -> None:
    road = Road(host, LIBVIRT)
    host.run_dir.mkdir()
    with full_disk(host.run_dir) as filler:
        filler.unlink()
        road.assert_starts()
        fill(host.run_dir)
        road.assert_stops()
