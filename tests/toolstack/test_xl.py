"""xl's wrapper: libxl's words in, and a QEMU with a TPM in the same process.

The QEMU is the distribution's, which has TPM devices and no Xen: a script in front of it
takes out -xen-domid, as it does not know that.  Xen's own QEMU, which has no TPM devices,
is the real one too, on a machine without processors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio

from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.errors import BridgeError, ConfigError
from qemu_vtpm_bridge.toolstack import launch
from qemu_vtpm_bridge.toolstack.guests import GUESTS_VARIABLE, Guest, read
from qemu_vtpm_bridge.toolstack.xl import parse_call, prepare
from tests.support.host import Host, running_host
from tests.support.programs import WAIT_S
from tests.support.qemu import Qemu, running_qemu
from tests.support.qtest import QEMU
from tests.support.swtpm_client import GET_RANDOM, STARTUP
from tests.toolstack.test_device_model import XEN_QEMU, script

pytestmark = pytest.mark.timeout(240)

WRAPPER = Path(sys.executable).parent / "qemu-vtpm-bridge-dm"
START = STARTUP[Family.TPM_2_0]
WEB, MAIL = 5, 6

GUESTS = """
[defaults]
registers = "tis"
[guest.web]
backend = "vtpm"
[guest.mail]
backend = "other-vtpm"
"""


def libxl_words(domid: int, name: str, *more: str) -> list[str]:
    """What libxl's words begin with."""
    return ["-xen-domid", str(domid), "-no-shutdown", "-name", name, *more]


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host() as host:
        yield host


@pytest.fixture
def qemu(host: Host) -> Path:
    """A QEMU that takes libxl's words."""
    return script(host.place / "qemu", f'[ "$1" = -xen-domid ] && shift 2\nexec {QEMU} "$@"')


def file_of(host: Host, qemu: Path, guests: str = GUESTS) -> Path:
    path = host.guests_file(guests)
    path.write_text(path.read_text().replace("[host]", f'[host]\ndevice-model = "{qemu}"', 1))
    return path


def environment(path: Path) -> dict[str, str]:
    return {**os.environ, GUESTS_VARIABLE: str(path)}


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


def ignored(pid: int) -> set[signal.Signals]:
    """Return the signals that a process ignores."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return {each for each in signal.Signals if int(mask, 16) >> (each - 1) & 1}


async def boot(qemu: Qemu) -> None:
    """Do what a guest's firmware does with its TPM."""
    assert await qemu.code(START) == 0
    assert await qemu.code(GET_RANDOM) == 0


# The words.


def test_libxls_words_are_understood() -> None:
    words = libxl_words(7, "a name", "-machine", "xenfv,suppress-vmdesc=on", "-m", "512")
    call = parse_call(words)
    assert (call.domid, call.name, call.machine) == (7, "a name", "xenfv,suppress-vmdesc=on")
    assert call.words == tuple(words)
    assert (call.vtpm, call.has_tpm) == (None, False)


def test_only_our_own_word_is_taken_out() -> None:
    call = parse_call([*libxl_words(7, "-vtpm"), "-vtpm", "backend=x", "-name", "other", "-S"])
    assert (call.name, call.vtpm) == ("-vtpm", "backend=x")
    assert call.words == (*libxl_words(7, "-vtpm"), "-name", "other", "-S")
    assert parse_call(["-xen-domid", "7", "--vtpm", "backend=x"]).vtpm == "backend=x"
    assert parse_call(["-xen-domid", "7", "-tpmdev", "emulator,id=x"]).has_tpm
    assert parse_call(["-name"]).words == ("-name",)


@pytest.mark.parametrize(
    "words",
    [
        ["-xen-domid", "x"],
        ["-xen-domid", "-1"],
        ["-xen-domid", "32752"],
        ["-xen-domid", "²"],
        ["-xen-domid", "7", "-vtpm"],
        ["-xen-domid", "7", "-vtpm", "backend=1", "-vtpm", "backend=1"],
    ],
)
def test_words_that_are_not_libxls_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_call(words)
    assert caught.value.next_step


# With the real QEMU.


async def test_the_guest_gets_a_tpm_and_qemu_is_the_process_that_xl_started(
    host: Host, qemu: Path
) -> None:
    host.world.vtpm()
    path = file_of(host, qemu)
    words = libxl_words(WEB, "web")
    with socket.socket(socket.AF_UNIX) as monitor:
        # As libxl's: bound and listening before, known to QEMU by its number.
        monitor.bind(str(host.place / "monitor"))
        monitor.listen(1)
        fd = monitor.fileno()
        inherited = [
            *("-chardev", f"socket,id=libxl-cmd,fd={fd},server=on,wait=off"),
            *("-mon", "chardev=libxl-cmd,mode=control"),
        ]
        async with running_qemu(
            None,
            [str(WRAPPER), *words, *inherited],
            env=environment(path),
            pass_fds=[fd],
        ) as running:
            line = command_line(running.process.pid)
            assert line[0].endswith(QEMU)
            # The script has taken -xen-domid out; all else is as it was, and more behind it.
            assert line[1 : 1 + len(words + inherited) - 2] == [*words[2:], *inherited]
            assert line[-6:] == [
                *("-chardev", f"socket,id=chrvtpm,path={host.run_dir}/web.sock"),
                *("-tpmdev", "emulator,id=vtpm0,chardev=chrvtpm"),
                *("-device", "tpm-tis,tpmdev=vtpm0"),
            ]
            await boot(running)
            async with await trio.open_unix_socket(str(host.place / "monitor")) as client:
                assert b"QMP" in await client.receive_some()
            # Python ignores it; QEMU does not, and ignores SIGPIPE itself.
            assert signal.SIGXFSZ not in ignored(running.process.pid)


async def test_a_reboot_is_a_new_domain_and_qemu_at_the_same_bridge(host: Host, qemu: Path) -> None:
    host.world.vtpm()
    path = file_of(host, qemu)
    bridges = []
    for domid in (WEB, MAIL):  # any domain there is: a reboot changes the id, not the name
        command = [str(WRAPPER), *libxl_words(domid, "web")]
        async with running_qemu(None, command, env=environment(path)) as running:
            await boot(running)  # TPM2_Startup is right only after a power cycle
            bridges.append(host.bridges())
            running.process.kill()  # as `xl destroy` does
            await running.wait()
    assert bridges[0] == bridges[1]
    assert len(bridges[0]) == 1


async def test_two_guests_at_once(host: Host, qemu: Path) -> None:
    host.world.vtpm(2)
    host.world.vtpm(4)
    variables = environment(file_of(host, qemu))
    async with (
        running_qemu(None, [str(WRAPPER), *libxl_words(WEB, "web")], env=variables) as web,
        running_qemu(None, [str(WRAPPER), *libxl_words(MAIL, "mail")], env=variables) as mail,
    ):
        await boot(web)
        await boot(mail)
        assert len(host.bridges()) == 2


async def test_a_guest_may_be_named_by_the_words_that_xl_hands_through(
    host: Host, qemu: Path
) -> None:
    host.world.vtpm()
    path = file_of(host, qemu, "")
    command = [
        *(str(WRAPPER), *libxl_words(WEB, "new guest / ..")),
        *("-vtpm", "backend=vtpm,registers=tis"),
    ]
    async with running_qemu(None, command, env=environment(path)) as running:
        await boot(running)
        assert "-vtpm" not in command_line(running.process.pid)
    assert (host.run_dir / "new\\x20guest\\x20\\x2f\\x20...sock").is_socket()


# What becomes of other calls.


def prepared(host: Host, path: Path, words: Sequence[str]) -> list[str]:
    return prepare(words, read(path))


def test_what_is_not_ours_stays_as_it_is(host: Host, qemu: Path) -> None:
    path = file_of(host, qemu)
    for words in (
        # Xen 4.20 asks what QEMU can.
        ["-S", "-no-user-config", "-nodefaults", "-machine", "none,accel=xen", "-mon", "x"],
        libxl_words(WEB, "unknown"),
        libxl_words(WEB, "web", "-machine", "xenpv"),
        libxl_words(WEB, "web", "-M", "xenpv"),
        ["-tpmdev", "help"],
        [],
    ):
        assert prepared(host, path, words) == [str(qemu), *words]
    assert host.bridges() == []
    assert host.world.entries() == []
    # Without a file there are no guests.
    nowhere = read(host.place / "none.toml", missing_is_empty=True)
    assert prepare(libxl_words(WEB, "web"), nowhere) == [str(XEN_QEMU), *libxl_words(WEB, "web")]


def test_hvmloader_is_told_which_tpm_there_is(host: Host, qemu: Path) -> None:
    path = file_of(host, qemu, GUESTS.replace('registers = "tis"', ""))
    line = prepared(host, path, libxl_words(WEB, "web"))
    assert line[-1] == "tpm-crb,tpmdev=vtpm0"
    assert host.read("/local/domain/5/platform/tpm_version") == "2"
    line = prepared(host, path, libxl_words(MAIL, "mail", "-vtpm", "tpm=1.2"))
    assert line[-1] == "tpm-tis,tpmdev=vtpm0"
    assert host.read("/local/domain/6/platform/tpm_version") == "1"


def test_a_name_that_libxl_does_not_say_is_xenstores(host: Host, qemu: Path) -> None:
    path = file_of(host, qemu)
    line = prepared(host, path, ["-xen-domid", str(WEB)])
    assert f"path={host.run_dir}/web.sock" in line[-5]


def test_the_wrapper_becomes_xens_own_qemu(host: Host) -> None:
    path = file_of(host, XEN_QEMU)
    words = libxl_words(WEB, "unknown", "-machine", "none", "-accel", "qtest", "-display", "none")
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        monitor = ["-chardev", f"socket,id=m,fd={theirs.fileno()}", "-mon", "m,mode=control"]
        process = subprocess.Popen(
            [WRAPPER, *words, *monitor], env=environment(path), pass_fds=[theirs.fileno()]
        )
        try:
            ours.settimeout(WAIT_S)
            assert b"QMP" in ours.recv(4096)
            assert command_line(process.pid) == [str(XEN_QEMU), *words, *monitor]
        finally:
            process.kill()
            process.wait()


# A QEMU without TPM devices.


def stand_in_bridge(host: Host, served: int) -> Path:
    """A program in the bridge's place that says that it serves this domain.

    The real one needs a Xen for that.
    """
    path = host.place / "bridge"
    path.write_text(
        f"#!{sys.executable} -I\n"
        "import json, os, socket, sys\n"
        "words = dict(w[2:].split('=', 1) for w in sys.argv if '=' in w)\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(words['status-socket'])\n"
        "listener.listen()\n"
        "ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "ready.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n"
        f"document = {{'program': 'qemu-vtpm-bridge', 'guest': {{'domid': {served}}}}}\n"
        "while True:\n"
        "    client, _ = listener.accept()\n"
        "    client.sendall(json.dumps(document).encode())\n"
        "    client.close()\n"
    )
    path.chmod(0o755)
    return path


def test_where_qemu_has_no_tpm_the_bridge_is_the_device(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_of(host, XEN_QEMU)
    monkeypatch.setattr(sys, "executable", str(stand_in_bridge(host, WEB)))
    words = libxl_words(WEB, "web")
    for _ in range(2):
        assert prepared(host, path, words) == [str(XEN_QEMU), *words]
    (bridge,) = host.bridges()
    line = command_line(bridge)
    assert "--device=tis" in line
    assert "--guest=web" in line
    assert not any(word.startswith("--socket") for word in line)
    assert host.read("/local/domain/5/platform/tpm_version") == "1"
    # It follows the guest by its name; xl may go on when it has the new domain.
    monkeypatch.setattr(launch, "READY_DEADLINE_S", 0)
    with pytest.raises(ConfigError, match="does not serve domain 6"):
        prepared(host, path, libxl_words(MAIL, "web"))
    assert host.bridges() == [bridge]


def test_a_guest_out_of_an_image_has_no_tpm_until_it_boots(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its PCRs are not in the image, and a TPM that starts now would take any for them."""
    path = file_of(host, XEN_QEMU)
    monkeypatch.setattr(sys, "executable", str(stand_in_bridge(host, WEB)))
    prepared(host, path, libxl_words(WEB, "web"))
    words = libxl_words(MAIL, "web", "-incoming", "fd:13")
    for _ in range(2):
        assert prepared(host, path, words) == [str(XEN_QEMU), *words]
        assert host.bridges() == []
        assert host.world.entries() == []
    assert "guest 'web' comes out of an image" in caplog.messages[0]
    prepared(host, path, libxl_words(WEB, "web"))
    assert len(host.bridges()) == 1


def test_a_guest_whose_name_is_a_number_is_given_by_its_id(host: Host) -> None:
    where = {"run_dir": host.run_dir, "log_dir": host.log_dir}
    one = launch.Launch(Guest("17", "vtpm"), **where, ioreq=True, domid_of_guest=WEB)
    assert f"--guest={WEB}" in one.words()
    with pytest.raises(ConfigError, match="name is a number"):
        launch.Launch(Guest("17", "vtpm"), **where, ioreq=True).words()


# Bad input.


@pytest.mark.parametrize(
    ("guests", "words", "said"),
    [
        ("[guest.web]\nbackend = 'nobody'", libxl_words(WEB, "web"), "no domain is named nobody"),
        ("[guest.web]\nbackend = 2\nreset = 'x'", libxl_words(WEB, "web"), "reset holds 'x'"),
        ("[guest.web", libxl_words(WEB, "unknown"), "Expected ']'"),
        (GUESTS, libxl_words(99, "web"), "there is no domain 99"),
        (GUESTS, libxl_words(WEB, "web", "-tpmdev", "x"), "-tpmdev of its own"),
        (GUESTS, libxl_words(WEB, "web", "-vtpm", "nonsense=1"), "no key `nonsense`"),
        ("[guest.web]\nbackend = 2\ndevice-model = '/none'", libxl_words(WEB, "web"), "/none"),
        ("[guest.web]\nbackend = 2\nrun-options = ['--x']", libxl_words(WEB, "web"), "--x"),
    ],
)
def test_one_message_for_xls_log_and_nothing_is_left(
    host: Host, qemu: Path, guests: str, words: list[str], said: str
) -> None:
    path = file_of(host, qemu, guests)
    done = subprocess.run(
        [WRAPPER, *words], env=environment(path), capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("qemu-vtpm-bridge-dm: ")
    assert said in line
    assert "next: " in line
    assert host.bridges() == []
    assert host.world.entries() == []


def test_a_qemu_that_cannot_be_executed_is_said(host: Host) -> None:
    broken = host.place / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    done = subprocess.run(
        [WRAPPER, "-S"],
        env=environment(file_of(host, broken)),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stderr) == (
        1,
        f"qemu-vtpm-bridge-dm: {broken}: Exec format error\n",
    )


def test_the_wrapper_does_not_become_itself(host: Host) -> None:
    with pytest.raises(BridgeError, match="no program that can be a device model"):
        prepare(["-S"], read(file_of(host, WRAPPER)), WRAPPER)


# The command.


def call(host: Host, path: Path, *words: str) -> Any:
    return host.world.call("guest", *words, f"--guests={path}")


def test_a_guest_can_be_prepared_without_the_wrapper(host: Host, qemu: Path) -> None:
    path = file_of(host, qemu)
    shown = json.loads(call(host, path, "show", "web", "--json").stdout)
    assert shown["socket"] == f"{host.run_dir}/web.sock"
    assert call(host, path, "show", "web").stdout.startswith('device_model_args_hvm = ["-chardev"')
    for _ in range(2):
        done = call(host, path, "ensure", "web")
        assert (done.returncode, done.stdout) == (0, f"{shown['socket']}\n")
    assert len(host.bridges()) == 1
    assert json.loads(call(host, path, "stop", "web", "--json").stdout)["stopped"] is True
    assert "was not there" in call(host, path, "stop", "web").stdout
    assert host.bridges() == []
    unknown = call(host, path, "ensure", "nobody")
    assert unknown.returncode == 2
    assert "[guest.nobody]" in unknown.stderr


def test_where_qemu_has_no_tpm_there_is_nothing_to_add(host: Host) -> None:
    path = file_of(host, XEN_QEMU)
    assert call(host, path, "show", "web").stdout.startswith("# nothing")
    assert "socket" in call(host, path, "show", "web", "--door=socket").stdout
    # The bridge that would be the device needs a Xen, and says so.
    done = call(host, path, "ensure", "web")
    assert done.returncode == 2
    assert "--embedded does not go with --device" in done.stderr
    assert host.world.entries() == []
