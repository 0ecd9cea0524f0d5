"""One bridge for each guest: found, started, replaced and stopped, after every kind of crash."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pwd
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack import bridge_process, launch
from qemu_vtpm_bridge.toolstack.guests import Guest
from tests.support.host import Host, running_host, stranger_at
from tests.support.programs import WAIT_S, client, code
from tests.support.swtpm_client import GET_RANDOM, STARTUP

pytestmark = pytest.mark.timeout(180)

WEB = Guest("web", "vtpm")
MAIL = Guest("mail server / no. 1", "other-vtpm")
START = STARTUP[Family.TPM_2_0]


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host() as host:
        yield host


def serves(path: Path) -> bool:
    with client(path) as (_, data):
        return code(data, START) == 0 and code(data, GET_RANDOM) == 0


def test_a_bridge_is_started_serves_and_is_stopped(host: Host) -> None:
    host.world.vtpm()
    path = host.ensure(WEB)
    assert path == host.run_dir / "web.sock"
    assert serves(path)
    (pid,) = host.bridges()
    assert host.process(WEB).pid() == pid
    # It is nobody's child here, in a session of its own, and its directory is no guest's.
    assert os.getsid(pid) != os.getsid(0)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    assert "the bridge of guest 'web' starts" in host.process(WEB).log.read_text()
    (entry,) = host.world.entries()
    assert entry["frontend"] == "/local/domain/0/frontend/vtpm/2/0"
    assert host.stop(WEB) is True
    assert host.bridges() == []
    assert host.world.entries() == []
    assert sorted(file.name for file in host.run_dir.iterdir()) == ["web.bridge", "web.lock"]


def user_of(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    (uid,) = set(status.partition("Uid:")[2].partition("\n")[0].split())
    return pwd.getpwuid(int(uid)).pw_name


def test_a_bridge_becomes_another_user(host: Host) -> None:
    host.world.vtpm()
    guest = replace(WEB, run_as="nobody")
    path = host.ensure(guest)
    assert serves(path)
    (pid,) = host.bridges()
    assert user_of(pid) == "nobody"
    assert host.ensure(guest) == path
    assert host.bridges() == [pid]
    assert host.stop(guest) is True
    assert host.world.entries() == []
    assert sorted(file.name for file in host.run_dir.iterdir()) == ["web.bridge", "web.lock"]


def test_which_user_a_bridge_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    present = pwd.getpwnam("nobody")

    def package_user(name: str) -> pwd.struct_passwd:
        assert name == "qemu-vtpm-bridge"
        return present

    def no_user(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", package_user)
    assert WEB.user == "nobody"
    assert replace(WEB, run_as="root").user is None
    assert replace(WEB, run_as="tss:tss").user == "tss:tss"
    assert replace(WEB, run_options=("--run-as=x",)).user is None
    assert replace(WEB, run_options=("--confine", "off")).user is None
    assert replace(WEB, reset="restart-domain", restart_command=("/bin/true",)).user is None
    monkeypatch.setattr(pwd, "getpwnam", no_user)
    assert WEB.user is None
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert WEB.user is None


def test_twice_is_one_bridge_and_stopping_twice_is_no_error(host: Host) -> None:
    assert host.ensure(WEB) == host.ensure(WEB)
    assert len(host.bridges()) == 1
    assert [host.stop(WEB), host.stop(WEB)] == [True, False]
    assert host.stop(MAIL) is False


def test_four_at_once_is_one_bridge(host: Host) -> None:
    path = host.guests_file('[guest.web]\nbackend = "vtpm"\n')
    words = ["guest", "ensure", "web", f"--guests={path}", "--door=socket"]
    callers = [host.world.start(*words) for _ in range(4)]
    assert [caller.wait(WAIT_S) for caller in callers] == [0, 0, 0, 0]
    assert len(host.bridges()) == 1
    assert len(host.world.entries()) == 1


def test_two_guests_at_once(host: Host) -> None:
    host.world.vtpm(2)
    host.world.vtpm(4)
    paths = [host.ensure(WEB), host.ensure(MAIL)]
    assert paths[1] == host.run_dir / "mail\\x20server\\x20\\x2f\\x20no.\\x201.sock"
    assert len(host.bridges()) == 2
    assert all(serves(path) for path in paths)
    assert host.stop(WEB) is True
    assert serves(paths[1])


def test_the_descriptors_of_the_caller_stay_with_the_caller(host: Host) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.set_inheritable(True)
        host.ensure(WEB)
        theirs.close()
        # Were the bridge to hold it, this would block.
        ours.settimeout(WAIT_S)
        assert ours.recv(1) == b""


def test_the_notify_and_listen_variables_are_not_handed_on(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent")
    host.ensure(WEB)
    (pid,) = host.bridges()
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"LISTEN_FDS" not in environment
    assert b"/nonexistent" not in environment


# Crashes.


def in_a_process(function: Any) -> int:
    """Run a function in a process that may die; return its exit status."""
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join(WAIT_S)
    assert process.exitcode is not None
    return process.exitcode


def crash_after(steps: int, guest: Guest, where: dict[str, Any]) -> None:
    """Die without any clean-up after so many steps."""
    launch.STEPS = (*launch.STEPS[:steps], lambda _: os._exit(9))  # type: ignore[misc]
    launch.ensure_bridge(guest, **where)


def crash_before_ready(guest: Guest, where: dict[str, Any]) -> None:
    """Die as soon as the bridge's process is there, before it has said anything."""
    bridge_process.BridgeProcess._until_ready = lambda *_: os._exit(9)  # type: ignore
    launch.ensure_bridge(guest, **where)


@pytest.mark.parametrize("steps", range(len(launch.STEPS) + 1))
def test_a_crash_after_any_step_is_mended_by_the_next_call(host: Host, steps: int) -> None:
    host.world.vtpm()
    assert in_a_process(functools.partial(crash_after, steps, WEB, host.where)) == 9
    assert serves(host.ensure(WEB))
    assert len(host.bridges()) == 1
    assert len(host.world.entries()) == 1


@pytest.mark.parametrize("steps", range(len(launch.STEPS) + 1))
def test_a_crash_after_any_step_can_be_stopped(host: Host, steps: int) -> None:
    assert in_a_process(functools.partial(crash_after, steps, WEB, host.where)) == 9
    host.stop(WEB)
    assert host.bridges() == []
    assert host.world.entries() == []


def crash_in_stop(steps: int, guest: Guest, where: dict[str, Any]) -> None:
    """Die without any clean-up after so many steps of the end."""
    launch.STOP_STEPS = (*launch.STOP_STEPS[:steps], lambda _: os._exit(9))  # type: ignore[misc]
    launch.stop_bridge(guest, **where)


STOP_STEPS = range(len(launch.STOP_STEPS) + 1)
LEFT_AT_MOST = {"web.bridge", "web.lock"}


@pytest.mark.parametrize("steps", STOP_STEPS)
def test_a_crash_after_any_step_of_the_end_is_mended_by_the_next_call(
    host: Host, steps: int
) -> None:
    host.world.vtpm()
    for again in (host.stop, host.ensure):
        host.ensure(WEB)
        assert in_a_process(functools.partial(crash_in_stop, steps, WEB, host.where)) == 9
        again(WEB)
        if again == host.ensure:
            assert serves(host.ensure(WEB))
            assert len(host.bridges()) == 1
            assert len(host.world.entries()) == 1
            host.stop(WEB)
        assert host.bridges() == []
        assert host.world.entries() == []
        assert {path.name for path in host.run_dir.iterdir()} <= LEFT_AT_MOST


@pytest.mark.parametrize("steps", STOP_STEPS)
@pytest.mark.parametrize("backend", ["", "other-vtpm"], ids=["taken out", "another vTPM domain"])
def test_what_the_guests_file_says_no_longer_is_removed_all_the_same(
    host: Host, steps: int, backend: str
) -> None:
    host.ensure(WEB)
    assert in_a_process(functools.partial(crash_in_stop, steps, WEB, host.where)) == 9
    changed = replace(WEB, backend=backend)
    if backend:
        host.ensure(changed)
        assert [entry["backend_name"] for entry in host.world.entries()] == [backend]
    host.stop(changed)
    assert host.bridges() == []
    assert host.world.entries() == []
    assert {path.name for path in host.run_dir.iterdir()} <= LEFT_AT_MOST


def test_a_bridge_that_is_replaced_for_another_vtpm_domain_leaves_no_entries(host: Host) -> None:
    host.ensure(WEB)
    host.ensure(replace(WEB, backend="other-vtpm"))
    (entry,) = host.world.entries()
    assert entry["backend_name"] == "other-vtpm"


def test_a_name_that_is_no_text_finds_its_entries_again(host: Host) -> None:
    odd = Guest(os.fsdecode(b"\xff web"), "vtpm")
    host.ensure(odd)
    assert host.stop(odd) is True
    assert host.world.entries() == []


def test_a_bridge_that_is_about_to_listen_is_waited_for_and_not_doubled(host: Host) -> None:
    host.world.vtpm()
    assert in_a_process(functools.partial(crash_before_ready, WEB, host.where)) == 9
    assert serves(host.ensure(WEB))
    assert len(host.bridges()) == 1


def test_a_bridge_that_was_killed_is_replaced(host: Host) -> None:
    host.world.vtpm()
    path = host.ensure(WEB)
    (killed,) = host.bridges()
    host.kill(killed)
    assert path.is_socket()
    assert serves(host.ensure(WEB))
    assert killed not in host.bridges()


def test_what_a_killed_bridge_left_can_be_stopped(host: Host) -> None:
    host.world.vtpm()
    path = host.ensure(WEB)
    host.world.until(lambda: host.world.state() == "Connected")
    host.kill(host.bridges()[0])
    host.stop(WEB)
    assert not path.exists()
    assert host.world.entries() == []


def test_a_bridge_in_its_last_moments_is_no_stranger(host: Host) -> None:
    """The kernel closes a killed bridge's files one by one, its lock before its socket."""
    host.run_dir.mkdir()
    path = host.run_dir / "web.sock"
    with stranger_at(path) as listener:
        # The first look still finds it listening, and ends it.
        last = threading.Thread(target=lambda: (listener.accept()[0].close(), listener.close()))
        last.start()
        host.stop(WEB)
        last.join()
    assert not path.exists()


# What else may be there.


def test_a_socket_of_somebody_elses_is_refused_and_left(host: Host) -> None:
    host.run_dir.mkdir()
    for ending in ("sock", "status"):
        path = host.run_dir / f"web.{ending}"
        with stranger_at(path):
            with pytest.raises(ConfigError, match="another program listens on"):
                host.ensure(WEB)
            with pytest.raises(ConfigError, match="another program listens on"):
                host.stop(WEB)
            assert path.is_socket()
        path.unlink()
    assert host.world.entries() == []
    assert host.bridges() == []


def test_a_file_that_is_no_socket_is_refused_and_left(host: Host) -> None:
    host.run_dir.mkdir()
    (host.run_dir / "web.sock").write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        host.ensure(WEB)
    assert (host.run_dir / "web.sock").read_text() == "precious"
    assert host.world.entries() == []


def test_a_bridge_that_was_started_by_hand_is_taken(host: Host) -> None:
    host.world.vtpm()
    host.run_dir.mkdir()
    path, status = host.run_dir / "web.sock", host.run_dir / "web.status"
    assert host.world.call("attach", *host.world.where, "--backend=vtpm").returncode == 0
    run = ["run", *host.world.where, "--backend=vtpm", f"--socket={path}"]
    byhand = host.world.start(*run, f"--status-socket={status}")
    host.world.until(lambda: host.process(WEB).status())
    assert host.ensure(WEB) == path
    assert host.bridges() == [byhand.pid]
    assert serves(path)
    with pytest.raises(ConfigError, match="was not started from here"):
        host.stop(WEB)
    # Another guest of that name, with another vTPM domain, is not served by it.
    with pytest.raises(ConfigError, match="another program listens"):
        host.ensure(replace(WEB, backend="other-vtpm"))


def test_other_options_replace_a_bridge_unless_a_qemu_uses_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.world.vtpm()
    path = host.ensure(WEB)
    first = host.bridges()
    changed = replace(WEB, reset="keep")
    assert host.ensure(changed) == path
    assert host.bridges() != first
    monkeypatch.setattr(launch, "LEAVE_DEADLINE_S", 0)
    with client(path):
        with pytest.raises(ConfigError, match="a QEMU uses the bridge"):
            host.ensure(WEB)
        assert host.ensure(changed) == path
    assert len(host.bridges()) == 1


def test_a_vtpm_domain_that_came_back_with_another_id_is_followed(host: Host) -> None:
    host.ensure(WEB)
    first = host.bridges()
    world = str(host.world.world / "control.sock")
    control(world, {"op": "destroy", "domid": 2})
    with pytest.raises(ConfigError, match="no domain is named vtpm"):
        host.ensure(WEB)
    control(world, {"op": "create", "domid": 9, "name": "vtpm"})
    host.world.vtpm(9)
    assert serves(host.ensure(WEB))
    assert host.bridges() == first
    assert host.stop(WEB) is True
    assert host.world.entries() == []


def control(path: str, request: dict[str, Any]) -> None:
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as lines:
        connection.settimeout(WAIT_S)
        connection.connect(path)
        lines.write(json.dumps(request) + "\n")
        lines.flush()
        assert "error" not in json.loads(lines.readline())


# Bad input.


@pytest.mark.parametrize(
    ("guest", "said"),
    [
        (replace(WEB, backend="nobody"), "no domain is named nobody"),
        (replace(WEB, backend="77"), "there is no domain 77"),
        (replace(WEB, backend="0"), "own vTPM domain"),
        (replace(WEB, run_options=("--nonsense",)), "--nonsense"),
        (replace(WEB, run_options=("--log-level=loud",)), "loud"),
    ],
)
def test_what_cannot_be_is_said_once_and_nothing_is_left(
    host: Host, guest: Guest, said: str
) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            host.ensure(guest)
        assert said in str(caught.value)
        assert caught.value.next_step
        assert host.bridges() == []
        assert host.world.entries() == []
        assert sorted(file.suffix for file in host.run_dir.iterdir()) in (
            [".lock"],
            [".bridge", ".lock"],
        )
    host.ensure(WEB)


def test_the_device_of_another_guest_is_refused(host: Host) -> None:
    host.ensure(WEB)
    thief = replace(MAIL, backend="vtpm")
    with pytest.raises(ConfigError, match="is that of guest 'web'"):
        host.ensure(thief)
    assert host.stop(thief) is False
    assert len(host.world.entries()) == 1
    assert len(host.bridges()) == 1


def test_a_full_disk_gives_one_message_and_nothing_is_left(host: Host) -> None:
    host.log_dir.mkdir()
    (host.log_dir / "web.log").symlink_to("/dev/full")
    with pytest.raises(ConfigError) as caught:
        host.ensure(WEB)
    assert "No space left on device" in caught.value.cause
    assert "df " in caught.value.next_step
    assert host.bridges() == []
    assert host.world.entries() == []
    (host.log_dir / "web.log").unlink()
    host.ensure(WEB)


def test_directories_that_cannot_be_or_are_others(host: Host, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for changes in ({"run_dir": tmp_path / "file"}, {"log_dir": tmp_path / "file" / "deeper"}):
        with pytest.raises(ConfigError, match=r"exists|Not a directory"):
            launch.ensure_bridge(WEB, **{**host.where, **changes})
    open_to_all = host.place / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written by others"):
        launch.ensure_bridge(WEB, **{**host.where, "run_dir": open_to_all})
    with pytest.raises(ConfigError, match="comma"):
        launch.ensure_bridge(WEB, **{**host.where, "run_dir": host.place / "a,b"})
    assert host.world.entries() == []


def test_a_start_that_is_under_way_is_waited_for(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run_dir.mkdir()
    monkeypatch.setattr(bridge_process, "LOCK_DEADLINE_S", 0)
    with host.process(WEB).locked(), pytest.raises(ConfigError, match="another process starts"):
        host.ensure(WEB)
    host.ensure(WEB)


MINE, OTHERS, NOBODYS = (f"/local/domain/0/frontend/vtpm/{at}" for at in ("2/0", "4/0", "2/7"))
LIES = {
    "a guest's directory": ("/local/domain/5", "/local/domain/2/backend/vtpm/0/0"),
    "all of domain 0's": ("/local/domain/0", "/local/domain/2/backend/vtpm/0/0"),
    "another guest's device": (OTHERS, "/local/domain/4/backend/vtpm/0/0"),
    "another guest's half": (MINE, "/local/domain/4/backend/vtpm/0/0"),
    "a device that nobody noted": (NOBODYS, "/local/domain/2/backend/vtpm/0/7"),
}


@pytest.mark.parametrize("lie", LIES)
def test_P9_a_bridge_that_was_taken_over_has_nothing_removed_that_is_not_its(
    host: Host, lie: str
) -> None:
    """Root removes the entries of a bridge that is replaced or ended, which says where they are."""
    host.world.vtpm()
    where = [*host.world.where, "--backend"]
    assert host.world.call("attach", *where, "4", "--guest", "mail").returncode == 0
    assert host.world.call("attach", *where, "2", "--handle", "7").returncode == 0
    host.run_dir.mkdir()
    path, backend = LIES[lie]
    for again in (host.stop, host.ensure):
        host.process(WEB).note({"frontend": {"path": path, "backend": backend}})
        again(WEB)
        assert host.read("/local/domain/5/name") == "web"
        assert host.read("/local/domain/0/name") == "Domain-0"
        for frontend in (OTHERS, NOBODYS):
            assert host.read(host.read(f"{frontend}/backend") + "/frontend") == frontend


def test_entries_of_a_bridge_that_had_another_device_are_removed_by_its_word(host: Host) -> None:
    host.world.vtpm()
    attached = host.world.call(
        *("attach", *host.world.where, "--backend", "4", "--handle", "3", "--guest", "web")
    )
    assert attached.returncode == 0
    host.run_dir.mkdir()
    frontend = "/local/domain/0/frontend/vtpm/4/3"
    host.process(WEB).note(
        {"frontend": {"path": frontend, "backend": "/local/domain/4/backend/vtpm/0/3"}}
    )
    host.ensure(WEB)
    (entry,) = host.world.entries()
    assert entry["frontend"] == MINE
