"""The command line, as processes: sockets in all forms, signals, configuration, errors."""

from __future__ import annotations

import argparse
import array
import json
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qemu_vtpm_bridge.bridge.control import Command
from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.cli import build_parser
from tests.support.swtpm_client import GET_RANDOM, STARTUP

pytestmark = pytest.mark.timeout(180)

PROGRAM = [sys.executable, "-m", "qemu_vtpm_bridge"]
MAN_PAGE = Path(__file__).parents[1] / "docs/man/qemu-vtpm-bridge.1"
WAIT_S = 60


class World:
    """An embedded Xen with a vTPM domain, as processes."""

    def __init__(self, stack: ExitStack, place: Path) -> None:
        self._stack = stack
        self.place = place
        self.world = place / "w"
        self.log = place / "log"
        self.start("embedded-xen", str(self.world), "--domain", "2:vtpm")
        self.until(lambda: (self.world / "dom/2/xen.sock").exists())
        assert self.call("attach", *self.where, "--backend", "vtpm").returncode == 0

    @property
    def where(self) -> list[str]:
        return ["--embedded", str(self.world)]

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start one of our commands; it ends with the test."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*PROGRAM, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *words], capture_output=True, text=True, timeout=WAIT_S, check=False
        )

    def vtpm(self) -> subprocess.Popen[bytes]:
        state = str(self.place / "state")
        return self.start("vtpm", *self.where, "--domid", "2", "--state-dir", state)

    def bridge(self, spec: str, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        run = ["run", *self.where, "--backend", "vtpm", "--socket", spec]
        return self.start(*run, "--status-socket", str(self.place / "status"), *words, **options)

    def status(self) -> dict[str, Any]:
        done = self.call("status", str(self.place / "status"))
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def until_running(self) -> None:
        self.until(lambda: self.status().get("frontend", {}).get("state") == "RUNNING")

    def until(self, fact: Any) -> None:
        """Return once `fact` is true."""
        signal.alarm(WAIT_S)
        try:
            while not fact():
                os.sched_yield()
        finally:
            signal.alarm(0)

    def state(self) -> str:
        done = self.call("list", *self.where, "--json")
        (entry,) = json.loads(done.stdout)
        return str(entry["frontend_state"])


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvb")))
        yield World(stack, place)


@contextmanager
def client(path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A control connection and the data channel that it gave, powered on."""
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as control, ours:
        control.settimeout(WAIT_S)
        ours.settimeout(WAIT_S)
        control.connect(str(path))
        rights = array.array("i", [theirs.fileno()])
        control.sendmsg(
            [struct.pack(">I", Command.CMD_SET_DATAFD)],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)],
        )
        assert control.recv(4) == bytes(4)
        theirs.close()
        control.sendall(struct.pack(">II", Command.CMD_INIT, 0))
        assert control.recv(4) == bytes(4)
        yield control, ours


def code(data: socket.socket, command: bytes) -> int:
    data.sendall(command)
    return int.from_bytes(data.recv(4096)[6:10], "big")


START = STARTUP[Family.TPM_2_0]


def test_run_serves_closes_in_order_and_leaves_clean_entries(world: World) -> None:
    world.vtpm()
    path = world.place / "tpm"
    bridge = world.bridge(f"{path},mode=0620")
    world.until_running()
    assert stat.S_IMODE(path.stat().st_mode) == 0o620
    with client(path) as (_, data):
        assert code(data, START) == 0
        assert code(data, GET_RANDOM) == 0
        bridge.send_signal(signal.SIGTERM)
        assert bridge.wait(WAIT_S) == 0
    assert not path.exists()
    assert not (world.place / "status").exists()
    assert world.state() == "Initialising"


def test_P8_a_bridge_that_was_killed_is_followed_by_one_that_recovers(world: World) -> None:
    world.vtpm()
    path = world.place / "tpm"
    bridge = world.bridge(str(path))
    world.until_running()
    bridge.kill()
    bridge.wait()
    assert world.state() == "Connected"
    world.bridge(str(path))
    world.until_running()
    with client(path) as (_, data):
        assert code(data, START) == 0


def test_terminate_ends_the_bridge_when_qemu_leaves(world: World) -> None:
    world.vtpm()
    path = world.place / "tpm"
    bridge = world.bridge(str(path), "--terminate")
    world.until_running()
    with client(path) as (control, _):
        control.sendall(struct.pack(">I", Command.CMD_SHUTDOWN))
        assert control.recv(4) == bytes(4)
    assert bridge.wait(WAIT_S) == 0
    assert world.state() == "Initialising"


def test_an_inherited_socket_serves(world: World) -> None:
    world.vtpm()
    path = world.place / "tpm"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        bridge = world.bridge(f"fd={fd}", pass_fds=[fd])
        with client(path) as (_, data):
            assert code(data, START) == 0
    assert bridge.poll() is None


def test_systemd_passes_a_socket_and_hears_that_the_bridge_is_ready(world: World) -> None:
    world.vtpm()
    path, notify = world.place / "tpm", world.place / "notify"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        listener.bind(str(path))
        listener.listen()
        manager.bind(str(notify))
        manager.settimeout(WAIT_S)
        listener.set_inheritable(True)
        # What systemd does between fork and exec, in a shell: the descriptor is 3, and
        # LISTEN_PID is the process that becomes the bridge.
        run = ["run", *world.where, "--backend", "vtpm", "--socket", "systemd"]
        fd = listener.fileno()
        shell = f'exec 3<&{fd}; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'
        with world.log.open("ab") as log:
            bridge = subprocess.Popen(
                ["bash", "-c", shell, "bash", *PROGRAM, *run],
                pass_fds=[fd],
                env=os.environ | {"NOTIFY_SOCKET": str(notify)},
                stdout=log,
                stderr=log,
            )
        try:
            assert manager.recv(100) == b"READY=1"
            with client(path) as (_, data):
                assert code(data, START) == 0
        finally:
            bridge.terminate()
            assert bridge.wait(WAIT_S) == 0


def test_a_command_that_restarts_the_domain_leaves_the_bridge_its_privileges(
    world: World,
) -> None:
    words = ["--reset", "restart-domain", "--restart-command", "true"]
    world.bridge(str(world.place / "tpm"), *words)
    world.until(lambda: world.status().get("frontend"))
    assert world.status()["confinement"] is None
    assert "not confined: --reset restart-domain" in world.log.read_text()


def test_tcp_serves_from_a_confined_bridge(world: World) -> None:
    """Its sockets are open before; afterwards it could make none."""
    world.vtpm()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    world.bridge(f"tcp={port}")
    world.until_running()
    assert world.status()["confinement"]["seccomp"]
    with (
        socket.create_connection(("127.0.0.1", port + 1), WAIT_S) as control,
        socket.create_connection(("127.0.0.1", port), WAIT_S) as data,
    ):
        control.sendall(struct.pack(">II", Command.CMD_INIT, 0))
        assert control.recv(4) == bytes(4)
        assert code(data, START) == 0


def test_the_status_socket_answers_everybody(world: World) -> None:
    world.bridge(str(world.place / "tpm"))
    world.until(lambda: world.status().get("frontend"))
    for _ in range(3):
        document = world.status()
        assert document["role"] == "bridge"
        assert document["power"] == "OFF"
        assert document["frontend"]["state"] == "WAIT_BACKEND"
        assert document["pump"]["commands"] == 0


def test_options_come_from_toml_and_what_is_typed_wins(world: World) -> None:
    config = world.place / "config.toml"
    config.write_text(
        "[run]\n"
        f'embedded = "{world.world}"\n'
        'backend = "vtpm"\n'
        f'socket = "{world.place / "tpm"}"\n'
        f'status-socket = "{world.place / "status"}"\n'
        'reset = "keep"\n'
        'log-format = "json"\n'
    )
    world.start("run", "--config", str(config), "--tpm", "1.2")
    world.until(lambda: world.status().get("frontend"))
    document = world.status()
    assert (document["tpm"], document["reset"]) == ("1.2", "keep")
    lines = [line for line in world.log.read_text().splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set(json.loads(lines[0]))


RUN = ["run", "--backend", "2", "--socket", f"/tmp/qvb-{os.getpid()}", "--embedded", "/none"]
RESTART = ["--reset", "restart-domain", "--restart-command", "true"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["run", "--backend", "2"], 2, "--socket"),
        (["run", "--backend", "2", "--socket", ""], 2, "names no socket"),
        (["run", "--backend", "2", "--socket", "/nonexistent/dir/s"], 2, "No such file"),
        (["run", "--backend", "2", "--socket", "systemd"], 2, "LISTEN_FDS"),
        (["run", "--backend", "2", "--socket", "fd=77"], 2, "descriptor 77"),
        (["run", "--config", "/nonexistent.toml"], 2, "No such file"),
        (["list", "--embedded", "/nonexistent"], 1, "next: "),
        (["vtpm", "--state-dir", "/proc/none", "--embedded", "/nonexistent"], 2, "state: "),
        (["status", "/nonexistent"], 1, "is the bridge running?"),
        (["nonsense"], 2, "invalid choice"),
        ([*RUN, "--run-as", "no-such-user"], 2, "there is no user"),
        ([*RUN, "--run-as", "nobody", "--confine", "off"], 2, "leave one of the two out"),
        ([*RUN, "--reset", "restart-domain"], 2, "needs --restart-command"),
        (
            [*RUN, *RESTART, "--run-as", "nobody"],
            2,
            "state: a confined process has none",
        ),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(words: list[str], status: int, said: str) -> None:
    done = subprocess.run(
        [*PROGRAM, *words], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_name_that_no_domain_has_is_said_so(world: World) -> None:
    done = world.call(
        "run", *world.where, "--backend", "nobody", "--socket", str(world.place / "tpm")
    )
    assert done.returncode == 2
    assert "no domain is named nobody" in done.stderr
    assert "xl list" in done.stderr


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        found.update(word for word in action.option_strings if word.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= options_of(inner)
    return found - {"--help"}


def test_the_man_page_knows_every_command_and_option() -> None:
    page = MAN_PAGE.read_text().replace("\\-", "-").replace("\\", "")
    missing = {option for option in options_of(build_parser()) if option not in page}
    assert not missing
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    assert not {name for name in commands.choices if name not in page}


def test_help_teaches() -> None:
    done = subprocess.run([*PROGRAM, "run", "--help"], capture_output=True, text=True, check=True)
    for word in ("-chardev", "device_model_args_hvm", "attach", "Exit status"):
        assert word in done.stdout
