"""The command line, as processes: sockets in all forms, signals, configuration, errors."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qemu_vtpm_bridge import cli
from qemu_vtpm_bridge.bridge.control import Command
from qemu_vtpm_bridge.bridge.tpm import Family
from tests.support.programs import PROGRAM, WAIT_S, World, client, code
from tests.support.swtpm_client import GET_RANDOM, STARTUP

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvb")))
        yield World(stack, place)


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
        ([*RUN, "--chroot", "/"], 2, "next: give --run-as USER too"),
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


def test_help_teaches() -> None:
    done = subprocess.run([*PROGRAM, "run", "--help"], capture_output=True, text=True, check=True)
    for word in ("-chardev", "device_model_args_hvm", "attach", "Exit status"):
        assert word in done.stdout


def test_a_reader_that_leaves_early_is_no_error_to_speak_of(world: World) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        done = subprocess.run(
            [*PROGRAM, "list", *world.where], check=False, stdout=output,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_cannot_be_looked_up_outside_domain_0(world: World) -> None:
    """A stub domain may not read other domains' names: the id is asked for."""
    path = str(world.place / "tpm")
    done = world.call("run", *world.where, "--domid", "2", "--backend", "vtpm", "--socket", path)
    assert done.returncode == 2, done
    assert "the domain named vtpm cannot be looked up here" in done.stderr, done
    assert "give the vTPM domain's id" in done.stderr, done


def test_another_broken_pipe_is_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_main", broken)
    with Path(os.devnull).open("w") as output:
        monkeypatch.setattr("sys.stdout", output)
        with pytest.raises(BrokenPipeError):
            cli.main(["run"])
