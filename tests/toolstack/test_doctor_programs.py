"""The doctor's checks of QEMU, swtpm, sockets and status; and that nothing hangs it."""

from __future__ import annotations

import json
import math
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from qemu_vtpm_bridge.toolstack import doctor, doctor_programs, doctor_sockets
from qemu_vtpm_bridge.toolstack.doctor_host import Case, Host
from qemu_vtpm_bridge.toolstack.doctor_report import Finding, Report, Verdict
from qemu_vtpm_bridge.toolstack.doctor_sockets import check_sockets, check_status, is_held
from tests.support.bad_xenstored import bad_xenstored
from tests.support.doctor import examined, findings, mend

REAL_QEMU = "/usr/bin/qemu-system-x86_64"
NEVER = 1e9

TPM_BACKENDS = "Supported TPM types (choose only one):\n passthrough   x\n    emulator   y"
TPM_DEVICES = 'name "tpm-crb"\nname "tpm-tis", bus ISA'
XEN = "Accelerators supported in QEMU binary:\ntcg\nxen"


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def stand_in(path: Path, *, tpm: bool = True, xen: bool = True, devices: str = "") -> Path:
    """Make a QEMU that says what another one would."""
    return program(
        path,
        f"""\
case "$*" in
--version) echo 'QEMU emulator version 10.0.2 (stand-in)';;
'-tpmdev help') {f"echo '{TPM_BACKENDS}'" if tpm else "echo -tpmdev: invalid option >&2"}; exit 1;;
'-device help') echo '{TPM_DEVICES if tpm else ""}
{devices}';;
'-accel help') echo '{XEN if xen else "tcg"}';;
esac""",
    )


async def qemus(root: Path, *extra: Path, real_xen: bool = True) -> list[Finding]:
    """Return what is said of the QEMUs below a root, on a Xen host or not."""
    case = Case(Host(root), qemu=extra)
    case.on_xen, case.control_domain = real_xen, True
    return await doctor_programs.check_qemu(case)


# Whom they become.


def test_the_user(tmp_path: Path) -> None:
    case = Case(Host(tmp_path))

    def finding() -> Finding:
        (found,) = doctor_programs.check_user(case)
        return found

    assert finding().verdict is Verdict.NOT_APPLICABLE
    case.on_xen = True
    assert finding().verdict is Verdict.WARNING
    assert finding().mend[0].command.endswith("/usr/sbin/nologin qemu-vtpm-bridge")
    described = tmp_path / "usr/local/lib/sysusers.d/qemu-vtpm-bridge.conf"
    described.parent.mkdir(parents=True)
    described.write_text("u qemu-vtpm-bridge -")
    assert finding().mend[0].command == "systemd-sysusers"
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\nqemu-vtpm-bridge-2:x:9:9\n")
    assert finding().verdict is Verdict.WARNING
    with (tmp_path / "etc/passwd").open("a") as out:
        out.write("qemu-vtpm-bridge:x:998:998::/:/usr/sbin/nologin\n")
    assert finding().verdict is Verdict.OK


# QEMU.


async def test_the_installed_qemu_has_a_tpm(tmp_path: Path) -> None:
    (finding,) = await qemus(tmp_path, Path(REAL_QEMU), real_xen=False)
    assert finding.verdict is Verdict.OK
    assert finding.facts["tpmdev-emulator"]
    assert finding.facts["front-ends"][:2] == ["tpm-crb", "tpm-tis"]
    assert "QEMU emulator version" in finding.facts["version"]


async def test_a_device_model_without_tpm_code(tmp_path: Path) -> None:
    path = "usr/lib/xen-4.17/bin/qemu-system-i386"
    stand_in(tmp_path / path, tpm=False)
    (finding,) = await qemus(tmp_path)
    assert (finding.verdict, finding.summary[-15:]) == (Verdict.WARNING, "has no TPM code")
    assert "--device crb" in finding.mend[0].does
    # Another one that has is the way out; one that cannot run guests of Xen is not.
    no_xen = stand_in(tmp_path / "no-xen", xen=False)
    assert [f.verdict for f in await qemus(tmp_path, no_xen)] == [
        Verdict.NOT_APPLICABLE,
        Verdict.WARNING,
    ]
    good = stand_in(tmp_path / "good")
    named, lacking = await qemus(tmp_path, good)
    assert (named.verdict, lacking.verdict) == (Verdict.OK, Verdict.WARNING)
    assert lacking.mend[0].line == f'device_model_override="{good}"'


async def test_a_qemu_that_takes_devices_over_vfio_user(tmp_path: Path) -> None:
    devices = 'name "vfio-user-pci", bus PCI, desc "VFIO over socket PCI device assignment"'
    stand_in(tmp_path / "usr/bin/qemu-system-x86_64", devices=devices)
    (finding,) = await qemus(tmp_path)
    assert "vfio-user" in finding.summary
    assert finding.facts["front-ends"] == ["tpm-crb", "tpm-tis", "vfio-user-pci"]


async def test_one_qemu_by_two_names_is_looked_at_once(tmp_path: Path) -> None:
    path = stand_in(tmp_path / "usr/bin/qemu-system-x86_64")
    (tmp_path / "usr/bin/qemu-system-i386").symlink_to(path)
    assert len(await qemus(tmp_path, path)) == 1


async def test_what_is_no_qemu(tmp_path: Path) -> None:
    for script, says in (("echo hello", "does not say that it is QEMU"), ("exit 1", "not say")):
        (finding,) = await qemus(tmp_path, program(tmp_path / "x", script))
        assert finding.verdict is Verdict.WARNING
        assert says in finding.summary
    (tmp_path / "y").write_text("", encoding="ascii")
    (finding,) = await qemus(tmp_path, tmp_path / "y")
    assert "it cannot be run: Permission denied" in finding.summary
    (finding,) = await qemus(tmp_path)
    assert (finding.verdict, finding.summary) == (Verdict.PROBLEM, "no QEMU was found")


@pytest.mark.parametrize("then", ["wait", "exit"], ids=["hangs", "leaves a child"])
async def test_P1_a_qemu_that_hangs_is_ended_with_its_children(
    tmp_path: Path,
    then: str,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one that is gone itself, while what it started holds its output."""
    autojump_clock.autojump_threshold = NEVER
    monkeypatch.setattr(doctor_programs, "END_DEADLINE_S", math.inf)
    os.mkfifo(tmp_path / "alive")
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    script = f"exec 9>{tmp_path}/alive; echo started >&9; sleep 10000 & {then}"

    async def let_time_pass() -> None:
        await trio.lowlevel.wait_readable(reader)
        assert os.read(reader, 100) == b"started\n"
        autojump_clock.autojump_threshold = 0

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(let_time_pass)
            (finding,) = await qemus(tmp_path, program(tmp_path / "hangs", script))
        assert "no answer within 20 s" in finding.summary
        assert finding.verdict is Verdict.WARNING
        await trio.lowlevel.wait_readable(reader)
        assert os.read(reader, 100) == b""  # nobody is left that could write
    finally:
        os.close(reader)


async def test_a_program_that_talks_for_ever_is_cut_off(tmp_path: Path) -> None:
    answer = await doctor_programs.ask(program(tmp_path / "talks", "yes QEMU"))
    assert 1 << 20 <= len(answer.text) < 1 << 21


# swtpm.


async def test_swtpm(tmp_path: Path) -> None:
    for says, verdict, families in (
        ('{"features": ["tpm-1.2", "tpm-2.0"]}', Verdict.OK, ["2.0", "1.2"]),
        ('{"features": ["tpm-2.0"]}', Verdict.OK, ["2.0"]),
        ('{"features": 7}', Verdict.WARNING, []),
        ("[[[", Verdict.WARNING, []),
    ):
        program(tmp_path / "usr/bin/swtpm", f"echo '{says}'")
        (finding,) = await doctor_programs.check_swtpm(Case(Host(tmp_path)))
        assert finding.verdict is verdict
        assert finding.facts["families"] == families
    (finding,) = await doctor_programs.check_swtpm(Case(Host()))
    assert (finding.verdict, finding.facts["families"]) == (Verdict.OK, ["2.0", "1.2"])
    (finding,) = await doctor_programs.check_swtpm(Case(Host(tmp_path / "none")))
    assert [step.command for step in finding.mend] == ["apt-get install swtpm"]


# Sockets.


@pytest.fixture
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("r")
    path.chmod(0o700)
    return path


def listen(path: Path, mode: int = 0o600) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    path.chmod(mode)
    return listener


def open_to_all(directory: Path) -> None:
    directory.chmod(0o777)


def sockets(run_dir: Path, **options: Any) -> list[Finding]:
    return check_sockets(Case(Host(), run_dir=run_dir, **options))


def test_who_listens_is_not_disturbed(run_dir: Path) -> None:
    path = run_dir / "guest.sock"
    with listen(path) as listener:
        assert is_held(path) is True
        (finding,) = sockets(run_dir)
        assert finding.verdict is Verdict.OK
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert is_held(path) is False
    assert is_held(run_dir / ("x" * 200)) is None


async def test_what_is_wrong_with_sockets_is_mended(run_dir: Path) -> None:
    with listen(run_dir / "open.sock", 0o666), listen(run_dir / "dead.sock"):
        pass
    (run_dir / "file.sock").write_text("", encoding="ascii")
    odd = run_dir / "o\x1b[31m'\n.sock"
    listen(odd).close()
    with listen(run_dir / "wide.sock", 0o602):
        open_to_all(run_dir)
        status, document = await examined("--run-dir", run_dir)
        told = {Path(f["subject"]).name: f for f in findings(document, "socket")}
        assert status == 3
        assert len(told) == 6
        assert "may be written by others (mode 0777)" in told[run_dir.name]["summary"]
        assert "is no socket" in told["file.sock"]["summary"]
        assert "by everybody (mode 0602)" in told["wide.sock"]["summary"]
        assert sum("listened at by nobody" in f["summary"] for f in told.values()) == 3
        assert "\x1b" not in json.dumps(document, ensure_ascii=False)
        for finding in told.values():
            await mend(finding)
        status, document = await examined("--run-dir", run_dir)
        assert status == 0
        assert [f["summary"][-14:] for f in findings(document, "socket")] == ["is listened at"]
    assert not odd.exists()


def test_a_run_directory_that_is_not_there(tmp_path: Path) -> None:
    (finding,) = sockets(tmp_path / "none")
    assert finding.verdict is Verdict.NOT_APPLICABLE
    (finding,) = sockets(tmp_path / "none", guest="guest")
    assert finding.mend[0].command == f"install -d -m 0700 {tmp_path}/none"


def test_P10_a_crowd_of_sockets_is_cut(run_dir: Path) -> None:
    for number in range(70):
        (run_dir / f"{number}.sock").touch()
    assert len(sockets(run_dir)) == 65


# Status.


@asynccontextmanager
async def answering(path: Path, raw: bytes | None) -> AsyncIterator[None]:
    """Serve a status socket that says this to everybody, or nothing and stays."""

    async def serve(stream: trio.SocketStream) -> None:
        if raw is None:
            await trio.sleep_forever()
        with suppress(trio.BrokenResourceError):
            async with stream:
                await stream.send_all(raw or b"")

    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield
        nursery.cancel_scope.cancel()


def bridge(state: object, **more: object) -> bytes:
    document = {
        "program": "qemu-vtpm-bridge",
        "frontend": {"state": state, "path": "/x", "backend": "/local/domain/2/backend/vtpm/0/0"},
    }
    return json.dumps(document | more).encode()


@pytest.mark.parametrize(
    ("raw", "verdict", "says"),
    [
        (bridge("RUNNING", power="ON"), "ok", "connected, without a QEMU"),
        (bridge("RUNNING", qemu={"data-attached": True}), "ok", "connected, with a QEMU"),
        (bridge("RUNNING", power="FAILED"), "problem", "did not show that it was power-cycled"),
        (bridge("WAIT_BACKEND"), "problem", "the vTPM domain is not up"),
        (bridge("WAIT_ENTRIES"), "problem", "entries are not there"),
        (bridge("\x1b[31m"), "problem", "not connected: \\x1b[31m"),
        (bridge(7), "problem", "it does not say why"),
        (b'{"program": "qemu-vtpm-bridge", "frontend": []}', "problem", "does not say why"),
        (b'{"program": "qemu-vtpm-bridge", "role": "vtpm", "engine": {"running": true}, '
         b'"frontends": [1, 2]}', "ok", "a vTPM domain with 2 frontends"),
        (b'{"program": "qemu-vtpm-bridge", "role": "vtpm", "engine": 1, "frontends": [1]}',
         "warning", "whose swtpm does not run"),
        (b'{"program": "another"}', "problem", "no bridge and no vTPM domain"),
        (b"", "problem", "no bridge and no vTPM domain"),
        (b"[" * 100_000, "problem", "no bridge and no vTPM domain"),
        (b"\xff\xfe\x00", "problem", "no bridge and no vTPM domain"),
        (b" " * (3 << 20), "problem", "more than a status is"),
        (None, "problem", "no answer within 6 s"),
    ],
)  # fmt: skip
async def test_what_a_status_socket_may_say(
    run_dir: Path,
    raw: bytes | None,
    verdict: str,
    says: str,
    autojump_clock: trio.testing.MockClock,
) -> None:
    if raw is not None:
        autojump_clock.autojump_threshold = NEVER
    async with answering(run_dir / "guest.status", raw):
        (finding,) = await check_status(Case(Host(), run_dir=run_dir))
        document = finding.as_dict()
        assert (document["verdict"], says in document["summary"]) == (verdict, True), document
        assert document["summary"].isprintable()


async def test_a_status_socket_without_a_bridge(run_dir: Path) -> None:
    listen(run_dir / "guest.status").close()
    (finding,) = await check_status(Case(Host(), run_dir=run_dir))
    assert "Connection refused" in finding.summary
    assert finding.mend[0].command == f"rm {run_dir}/guest.status"


# Time.


async def test_P1_a_silent_xenstored_is_a_finding(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    autojump_clock.autojump_threshold = NEVER
    async with bad_xenstored(lambda request: b"") as server, trio.open_nursery() as nursery:
        monkeypatch.setenv("XENSTORED_PATH", server.path)

        async def let_time_pass() -> None:
            await server.asked.wait()
            autojump_clock.autojump_threshold = 0

        nursery.start_soon(let_time_pass)
        report = Report("any")
        await doctor._examine_xenstore(Case(Host()), report)
        autojump_clock.autojump_threshold = NEVER
    (finding,) = report.findings
    assert (finding.check, finding.verdict) == ("xenstore", Verdict.PROBLEM)
    assert "did not answer within 5 s" in finding.summary


@pytest.mark.parametrize("says", [b"\xff" * 5000, b""])
async def test_P9_a_xenstored_that_babbles_is_a_finding(
    says: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour: Callable[[Any], bytes | None] = lambda request: says or None  # noqa: E731
    async with bad_xenstored(behaviour) as server:
        monkeypatch.setenv("XENSTORED_PATH", server.path)
        report = Report("any")
        await doctor._examine_xenstore(Case(Host()), report)
    (finding,) = report.findings
    assert (finding.check, finding.verdict) == ("xenstore", Verdict.PROBLEM)


async def test_P1_a_check_that_blocks_in_the_kernel_is_left_behind(
    autojump_clock: trio.testing.MockClock,
) -> None:
    del autojump_clock
    go_on = threading.Event()

    def blocks(_: Case) -> list[Finding]:
        go_on.wait()
        return []

    try:
        (finding,) = await doctor.bounded("x", doctor.in_thread(blocks, Case(Host())))
    finally:
        go_on.set()
    assert finding.summary == "the check did not end within 30 s"
    assert (finding.check, finding.verdict) == ("x", Verdict.PROBLEM)


@pytest.mark.parametrize(
    ("module", "name", "check"),
    [
        (doctor_sockets, "names_in", check_status),
        (doctor_programs, "device_models", doctor_programs.check_qemu),
    ],
)
async def test_P1_so_is_a_directory_that_cannot_be_listed(
    module: Any,
    name: str,
    check: Callable[[Case], Awaitable[list[Finding]]],
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del autojump_clock
    go_on = threading.Event()
    monkeypatch.setattr(module, name, lambda *_: go_on.wait())
    try:
        (finding,) = await doctor.bounded("x", lambda: check(Case(Host())))
    finally:
        go_on.set()
    assert finding.summary == "the check did not end within 30 s"


async def test_an_error_that_nobody_foresaw_is_a_finding() -> None:
    async def fails() -> list[Finding]:
        raise PermissionError(13, "Permission denied", "/x")

    (finding,) = await doctor.bounded("x", fails)
    assert "could not be done: [Errno 13]" in finding.summary


def test_the_deadlines_leave_room_for_each_other() -> None:
    """A check's deadline is longer than those within it."""
    assert doctor.CHECK_DEADLINE_S > doctor_programs.ASK_DEADLINE_S
    assert doctor.PROGRAMS_DEADLINE_S > 4 * doctor_programs.ASK_DEADLINE_S
    assert doctor.CHECK_DEADLINE_S > doctor_sockets.ANSWER_DEADLINE_S
