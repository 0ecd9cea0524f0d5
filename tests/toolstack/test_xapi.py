"""The stand-in for swtpm under xapi, driven step by step by one that does what xenopsd does."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_vtpm_bridge.bridge.control import Command
from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack.xapi_contract import DOMID_MAX, Call, parse
from tests.support.full_disk import FILLER, as_root, full_disk
from tests.support.host import Host, running_host, stranger_at
from tests.support.programs import PROGRAM, WAIT_S, client, code
from tests.support.qemu import running_qemu
from tests.support.swtpm_client import (
    GET_RANDOM,
    PCR_EXTEND_7,
    PCR_READ_7,
    STARTUP,
    ZERO_PCR,
)

pytestmark = pytest.mark.timeout(180)

DOMID = 5  # `web` in Host
UID = 61005
START = STARTUP[Family.TPM_2_0]
GUEST = '[guest.web]\nbackend = "vtpm"\n'
ENTRY = "import sys; from qemu_vtpm_bridge.cli import main_xapi; sys.exit(main_xapi())"


AS_SWTPM = """\
import sys
from dataclasses import replace
from pathlib import Path
from qemu_vtpm_bridge.cli import main_xapi
from qemu_vtpm_bridge.toolstack import xapi
parse = xapi.parse
xapi.parse = lambda *words: replace(parse(*words), guests_path=Path({guests!r}))
sys.exit(main_xapi())
"""


# What a call asks for.


def test_a_wrappers_words() -> None:
    call = parse(["5", "/run/tpm", "unix+http://xapi-depriv-socket", "false"])
    assert call.name == "swtpm-5"
    assert (call.root, call.needs_init, call.keeps_file) == (Path("/run/tpm"), False, False)
    assert (call.confine, call.terminate, call.control_fd) == (True, True, None)
    assert parse(["5", "/run/tpm", "dir://.", "true"]).needs_init
    assert not parse(["5", "/run/tpm", "dir://.", "true", "--priv"]).confine
    old = parse(["5", "/run/tpm", "file:///tpm2-00.permall"])
    assert (old.needs_init, old.keeps_file) == (False, True)


def test_our_own_words_are_not_passed_on() -> None:
    words = ["5", "/d", "dir://.", "--priv", "--guests", "/g", "--runas=nobody"]
    call = parse(words)
    assert (call.guests_path, call.user) == (Path("/g"), "nobody")
    assert call.delegate == ("5", "/d", "dir://.", "--priv")


SWTPM = "socket --tpm2 --tpmstate dir=/ --ctrl type=unixio,fd=7 --log level=1 --pid file=/{} -t"


def test_swtpms_words() -> None:
    words = [*SWTPM.format("swtpm-5.pid").split(), "--chroot", "/run/tpm", "--runas", "61005"]
    call = parse(words, "swtpm-5")
    assert (call.domid, call.control_fd, call.root) == (5, 7, Path("/run/tpm"))
    assert (call.pid_file, call.user, call.confine) == (Path("/swtpm-5.pid"), "61005", True)
    assert call.terminate
    assert parse(SWTPM.format("pid").split(), "swtpm-6") == Call(
        domid=6,
        root=None,
        control_fd=7,
        pid_file=Path("/pid"),
        confine=False,
        delegate=tuple(SWTPM.format("pid").split()),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "required"),
        ("5", "required"),
        ("5 /d", "required"),
        ("web /d dir://.", "'web' is no guest's domain id"),
        ("0 /d dir://.", "'0' is no guest's"),
        (f"{DOMID_MAX + 1} /d dir://.", "is no guest's"),
        ("5 d dir://.", "no path that begins with /"),
        ("5 /d dir://. maybe", "invalid choice"),
        ("5 /d dir://. true --what", "unrecognized"),
        ("socket --tpm2", "required"),
        (SWTPM.format("x"), "neither --pid"),
        (SWTPM.format("swtpm-5.pid").replace("fd=7", "path=/s"), "is not type=unixio,fd=N"),
        (SWTPM.format("swtpm-5.pid") + " --daemon", "unrecognized"),
    ],
)
def test_other_words_are_refused(line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse(line.split())
    assert caught.value.next_step


# xenopsd, as far as a TPM sees it.


class Watch:
    """inotify on a directory, as xenopsd's `start_and_wait_for_readyness` has it."""

    CREATE, DELETE, DELETE_SELF, ONLY_DIRECTORY = 0x100, 0x200, 0x400, 0x1000000

    def __init__(self, directory: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init()
        mask = self.CREATE | self.DELETE | self.DELETE_SELF | self.ONLY_DIRECTORY
        assert libc.inotify_add_watch(self.fd, os.fsencode(directory), mask) >= 0

    def events(self, timeout_s: float) -> Iterator[tuple[int, str]]:
        """Yield what happens within so many seconds."""
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return
        raw = os.read(self.fd, 65536)
        while raw:
            _, mask, _, length = struct.unpack_from("iIII", raw)
            yield mask, raw[16 : 16 + length].rstrip(b"\0").decode()
            raw = raw[16 + length :]


class Xenopsd:
    """Starts a TPM for a domain, waits for its pid file, and stops it."""

    def __init__(self, host: Host, domid: int = DOMID) -> None:
        self.host = host
        self.domid = domid
        # As xenopsd makes it: 0750, root's, and in the group of the TPM's user.
        self.root = host.place / f"swtpm-root-{domid}"
        self.root.mkdir(mode=0o750)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = host.place / "wrapper.log"

    @property
    def socket(self) -> Path:
        return self.root / "swtpm-sock"

    @property
    def pid_file(self) -> Path:
        return self.root / f"swtpm-{self.domid}.pid"

    def words(self, uri: str, *more: str) -> list[str]:
        """The wrapper's command line."""
        guests = f"--guests={self.host.place / 'guests.toml'}"
        own = [guests, *([] if "--priv" in more else [f"--runas={UID}"])]
        return [sys.executable, "-c", ENTRY, str(self.domid), str(self.root), uri, *more, *own]

    def make(self) -> bytes:
        """Have the TPM made; return what xapi's database would keep."""
        subprocess.run(self.words("dir://.", "true"), check=True, timeout=WAIT_S)
        state = self.root / "tpm2-00.permall"
        contents = state.read_bytes()
        state.unlink()
        return contents

    def start(self, *more: str) -> str:
        """Start the TPM; return `ready`, or why xenopsd would give it up."""
        return self.start_words(self.words("unix+http://xapi-depriv-socket", "false", *more))

    def start_words(self, words: list[str], **options: Any) -> str:
        """Start this command as a service, and wait for it as xenopsd does."""
        watch = Watch(self.root)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )
        try:
            while True:
                alive = self.process.poll() is None
                for mask, name in watch.events(0.1):
                    if mask & Watch.DELETE_SELF:
                        return "cancelled: the directory is gone"
                    if name == self.pid_file.name:
                        return "ready" if mask & Watch.CREATE else "cancelled: pid file removed"
                if not alive:
                    return "exited"
        finally:
            os.close(watch.fd)

    def stop(self) -> int:
        """Stop the service, and remove what was the TPM's."""
        assert self.process is not None
        self.process.terminate()
        status = self.process.wait(WAIT_S)
        shutil.rmtree(self.root)
        return status

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host() as found:
        found.guests_file(GUEST)
        yield found


@pytest.fixture
def xenopsd(host: Host) -> Iterator[Xenopsd]:
    found = Xenopsd(host)
    yield found
    found.end()


def is_known_as(process: subprocess.Popen[bytes], name: str) -> bool:
    """xenopsd's `is_cmdline_valid`; the name has to be the first word here."""
    raw = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    return raw.split(b"\0")[0] == name.encode()


def quit_qemu(control: socket.socket) -> None:
    """Say CMD_SHUTDOWN, as a QEMU that quits."""
    control.sendall(struct.pack(">I", Command.CMD_SHUTDOWN))
    assert control.recv(4) == bytes(4)


@as_root
def test_the_contract_from_the_first_start_to_the_last(host: Host, xenopsd: Xenopsd) -> None:
    host.world.vtpm()
    assert b"vTPM domain" in xenopsd.make()
    assert sorted(path.name for path in xenopsd.root.iterdir()) == []

    assert xenopsd.start() == "ready", xenopsd.said()
    process = xenopsd.process
    assert process is not None
    assert xenopsd.pid_file.read_text() == f"{process.pid}\n"
    assert is_known_as(process, f"swtpm-{DOMID}")

    # Shut in, as another user, for good.
    place = Path(f"/proc/{process.pid}")
    assert (place / "root").readlink() == xenopsd.root
    status = (place / "status").read_text()
    for line in (f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}", f"Gid:\t{UID}\t{UID}\t{UID}\t{UID}"):
        assert line in status
    assert f"Groups:\t{UID} \n" in status
    assert "CapEff:\t0000000000000000" in status
    tasks = list((place / "task").iterdir())
    assert len(tasks) > 1
    for task in tasks:
        assert (task / "root").readlink() == xenopsd.root, "a thread was left outside"
    assert "Seccomp:\t2\n" in status
    assert (place / "ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    # No door to Xen is in there.
    assert sorted(path.name for path in xenopsd.root.iterdir()) == [
        *("bridge.status", f"swtpm-{DOMID}.pid", "swtpm-sock"),
    ]

    with client(xenopsd.socket) as (control, data):
        assert code(data, START) == 0
        assert code(data, GET_RANDOM) == 0
        quit_qemu(control)
    assert process.wait(WAIT_S) == 0, "swtpm's -t: it ends when QEMU does"
    assert not xenopsd.pid_file.exists()
    assert host.world.state() == "Initialising"


@as_root
def test_in_its_directory_the_bridge_still_finds_a_vtpm_domain_again(
    host: Host, xenopsd: Xenopsd
) -> None:
    vtpm = host.world.vtpm()
    assert xenopsd.start() == "ready", xenopsd.said()
    with client(xenopsd.socket) as (_, data):
        assert code(data, START) == 0
        vtpm.kill()
        vtpm.wait()
        host.world.vtpm()
        # What was on its way gets an error; the new connection then serves.
        host.world.until(lambda: code(data, GET_RANDOM) == 0)
        shown = host.world.call("status", str(xenopsd.root / "bridge.status"))
        assert '"RUNNING"' in shown.stdout


@as_root
def test_stopped_by_xenopsd(host: Host, xenopsd: Xenopsd) -> None:
    host.world.vtpm()
    assert xenopsd.start() == "ready", xenopsd.said()
    assert xenopsd.stop() == 0
    assert host.world.state() == "Initialising"


def test_with_priv_it_stays_outside(host: Host, xenopsd: Xenopsd) -> None:
    host.world.vtpm()
    assert xenopsd.start("--priv") == "ready", xenopsd.said()
    assert xenopsd.process is not None
    assert Path(f"/proc/{xenopsd.process.pid}/root").readlink() == Path("/")
    with client(xenopsd.socket) as (_, data):
        assert code(data, START) == 0


def test_its_user_is_xenopsds_to_say(host: Host, xenopsd: Xenopsd) -> None:
    host.guests_file(f'{GUEST}run-as = "nobody"\n')
    host.world.vtpm()
    assert xenopsd.start("--priv") == "ready", xenopsd.said()


def test_a_killed_one_is_followed_by_another(host: Host, xenopsd: Xenopsd) -> None:
    """Its pid file and socket are still there: the file must not be removed, see Watch."""
    host.world.vtpm()
    assert xenopsd.start("--priv") == "ready", xenopsd.said()
    xenopsd.end()
    assert xenopsd.pid_file.exists()
    assert xenopsd.start("--priv") == "ready", xenopsd.said()
    with client(xenopsd.socket) as (_, data):
        assert code(data, START) == 0


def test_the_guest_may_stand_in_the_file_by_its_uuid(host: Host, xenopsd: Xenopsd) -> None:
    store = host.world.world / "dom/0/xenstored.sock"
    found = subprocess.run(
        ["xenstore-read", f"/local/domain/{DOMID}/vm"],
        env=os.environ | {"XENSTORED_PATH": str(store)},
        capture_output=True,
        text=True,
        check=True,
    )
    uuid = found.stdout.strip().removeprefix("/vm/")
    host.guests_file(f'[guest.web]\nbackend = "no-such"\n[guest.{uuid}]\nbackend = "vtpm"\n')
    assert xenopsd.start("--priv") == "ready", xenopsd.said()


def test_a_vtpm_domain_that_boots_later_is_waited_for(host: Host, xenopsd: Xenopsd) -> None:
    assert xenopsd.start("--priv") == "ready", xenopsd.said()
    with client(xenopsd.socket) as (_, data):
        data.sendall(START)
        host.world.vtpm()
        assert data.recv(4096)[6:10] == bytes(4)


def as_swtpm(host: Host, listener: socket.socket, pid_file: str, *more: str) -> list[str]:
    """The words by which xenopsd's own wrapper calls swtpm."""
    listener.set_inheritable(True)
    line = SWTPM.replace("fd=7", f"fd={listener.fileno()}").replace("/{}", "{}")
    # A swtpm has no option for the guests file, so that the usual one's place is moved.
    entry = AS_SWTPM.format(guests=str(host.place / "guests.toml"))
    return [sys.executable, "-c", entry, *line.format(pid_file).split(), *more]


@pytest.mark.parametrize("shut_in", [pytest.param(True, marks=as_root), False])
def test_the_socket_inherited_as_swtpm(host: Host, xenopsd: Xenopsd, shut_in: bool) -> None:
    """As xenopsd's own wrapper calls swtpm: argv[0], fd=, pid file."""
    host.world.vtpm()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(xenopsd.socket))
        listener.listen(1)
        # Named as it is in the directory that the process goes into.
        words = as_swtpm(host, listener, str(xenopsd.pid_file))
        if shut_in:
            os.chown(xenopsd.root, 0, UID)
            confine = ["--chroot", str(xenopsd.root), "--runas", str(UID)]
            words = as_swtpm(host, listener, f"/{xenopsd.pid_file.name}", *confine)
        assert xenopsd.start_words(words, pass_fds=[listener.fileno()]) == "ready", xenopsd.said()
    process = xenopsd.process
    assert process is not None
    assert is_known_as(process, f"swtpm-{DOMID}")
    root = Path(f"/proc/{process.pid}/root").readlink()
    assert root == (xenopsd.root if shut_in else Path("/"))
    assert xenopsd.pid_file.read_text() == f"{process.pid}\n"
    with client(xenopsd.socket) as (control, data):
        assert code(data, START) == 0
        quit_qemu(control)
    assert process.wait(WAIT_S) == 0
    assert not xenopsd.pid_file.exists()


@as_root
async def test_the_installed_qemu_has_its_tpm_from_the_directory(
    host: Host, xenopsd: Xenopsd
) -> None:
    host.world.vtpm()
    assert xenopsd.make()
    assert xenopsd.start() == "ready", xenopsd.said()
    assert xenopsd.process is not None
    async with running_qemu(xenopsd.socket) as qemu:
        assert await qemu.code(START) == 0
        assert await qemu.code(PCR_EXTEND_7) == 0
        await qemu.reset()
        assert await qemu.code(START) == 0
        assert (await qemu.tpm(PCR_READ_7))[-32:] == ZERO_PCR
        await qemu.qmp("quit")
        assert await qemu.wait() == 0
    assert xenopsd.process.wait(WAIT_S) == 0


# Guests that are not ours.


def test_a_guest_that_is_not_in_the_file_gets_xenopsds_own_wrapper(
    host: Host, xenopsd: Xenopsd
) -> None:
    real = host.place / "swtpm-wrapper"
    real.write_text(f'#!/bin/sh\necho "$0" "$@" >{host.place}/real\n', encoding="ascii")
    real.chmod(0o755)
    path = host.guests_file("")
    text = path.read_text().replace("[host]", f'[host]\nswtpm-wrapper = "{real}"')
    path.write_text(text, encoding="utf-8")
    assert xenopsd.start("--priv") == "exited"
    said = (host.place / "real").read_text()
    uri = "unix+http://xapi-depriv-socket"
    assert said == f"{real} {DOMID} {xenopsd.root} {uri} false --priv\n"
    assert list(xenopsd.root.iterdir()) == []


# Bad input: one clear message, no pid file, nothing half done.


@pytest.mark.parametrize(
    ("guests", "said"),
    [
        ('[guest.web]\nbackend = "no-such"\n', "no domain is named no-such"),
        ("[guest.web]\nbackend = 9\n", "there is no domain 9"),
        ("[guest.web", "guests.toml"),
        ("", "swtpm-wrapper: No such file or directory"),
    ],
)
def test_what_cannot_be_is_said_and_not_ready(
    host: Host, xenopsd: Xenopsd, guests: str, said: str
) -> None:
    host.guests_file(guests)
    assert xenopsd.start("--priv") == "exited"
    (line,) = xenopsd.said().splitlines()
    assert said in line
    assert "next: " in line
    assert list(xenopsd.root.iterdir()) == []
    assert host.world.entries() == []


def test_a_domain_that_is_not_there(host: Host) -> None:
    xenopsd = Xenopsd(host, 77)
    assert xenopsd.start("--priv") == "exited"
    assert "XenStore has no domain 77" in xenopsd.said()
    assert list(xenopsd.root.iterdir()) == []


def test_a_socket_that_is_somebody_elses(host: Host, xenopsd: Xenopsd) -> None:
    with stranger_at(xenopsd.socket):
        assert xenopsd.start("--priv") == "exited"
    assert f"another program listens on {xenopsd.socket}" in xenopsd.said()
    assert not xenopsd.pid_file.exists()


@as_root
def test_a_directory_that_is_missing(host: Host, xenopsd: Xenopsd) -> None:
    xenopsd.root.rmdir()
    done = subprocess.run(
        xenopsd.words("dir://.", "true"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr
    without = subprocess.run(
        [*xenopsd.words("dir://.", "false")[:-1]], capture_output=True, text=True, check=False
    )
    assert without.returncode == 1


# The pid file: without it xenopsd waits in vain, so that nothing may run on.


def dying(words: list[str], what: str) -> list[str]:
    """The call of a program that dies where it comes to a function of xapi.py's."""
    assert words[2] == ENTRY
    die = f"xapi.{what} = lambda *_, **__: os._exit(9)"
    entry = f"import os; from qemu_vtpm_bridge.toolstack import xapi; {die}; {ENTRY}"
    return [*words[:2], entry, *words[3:]]


def assert_ended_for_want_of_a_pid_file(xenopsd: Xenopsd, said: str) -> None:
    (line,) = [line for line in xenopsd.said().splitlines() if "next: " in line]
    assert line.startswith(f"qemu-vtpm-bridge-xapi: {xenopsd.pid_file}: {said}; ")
    assert "Traceback" not in xenopsd.said()
    assert xenopsd.process is not None
    assert xenopsd.process.wait(WAIT_S) == 1


@as_root
@pytest.mark.parametrize("more", [(), ("--priv",)], ids=["shut in", "--priv"])
def test_a_full_disk_gives_one_message_and_no_tpm(
    host: Host, xenopsd: Xenopsd, more: tuple[str, ...]
) -> None:
    host.world.vtpm()
    with full_disk(xenopsd.root) as filler:
        assert xenopsd.start(*more) == "exited"
        assert_ended_for_want_of_a_pid_file(xenopsd, "No space left on device")
        assert [path.name for path in xenopsd.root.iterdir()] == [FILLER]
        filler.unlink()
        assert xenopsd.start(*more) == "ready", xenopsd.said()
        with client(xenopsd.socket) as (_, data):
            assert code(data, START) == 0
        xenopsd.end()


@as_root
def test_a_full_disk_when_the_tpm_is_made(host: Host, xenopsd: Xenopsd) -> None:
    with full_disk(xenopsd.root) as filler:
        done = subprocess.run(
            xenopsd.words("dir://.", "true"), capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "No space left on device" in line
        assert "next: " in line
        assert [path.name for path in xenopsd.root.iterdir()] == [FILLER]
        filler.unlink()
        assert b"vTPM domain" in xenopsd.make()


@pytest.mark.parametrize("more", [pytest.param((), marks=as_root), ("--priv",)])
def test_a_pid_file_that_cannot_have_its_name_ends_the_bridge(
    host: Host, xenopsd: Xenopsd, more: tuple[str, ...]
) -> None:
    host.world.vtpm()
    xenopsd.pid_file.write_text("1\n")
    in_the_way = xenopsd.pid_file.with_name(f"{xenopsd.pid_file.name}.old")
    in_the_way.mkdir()
    assert xenopsd.start(*more) == "exited"
    assert_ended_for_want_of_a_pid_file(xenopsd, "Is a directory")
    assert sorted(xenopsd.root.iterdir()) == [xenopsd.pid_file, in_the_way]
    assert host.world.state() == "Initialising", "it ended in order"
    in_the_way.rmdir()
    assert xenopsd.start(*more) == "ready", xenopsd.said()


@pytest.mark.parametrize("more", [pytest.param((), marks=as_root), ("--priv",)])
@pytest.mark.parametrize("step", ["_become_user", "_write", "_give_name"])
def test_the_death_of_what_writes_the_pid_file_ends_the_bridge(
    host: Host, xenopsd: Xenopsd, more: tuple[str, ...], step: str
) -> None:
    host.world.vtpm()
    words = xenopsd.words("unix+http://xapi-depriv-socket", "false", *more)
    assert xenopsd.start_words(dying(words, f"PidFile.{step}")) == "exited"
    assert_ended_for_want_of_a_pid_file(xenopsd, "the process that writes it was killed")
    assert list(xenopsd.root.iterdir()) == []
    assert xenopsd.start(*more) == "ready", xenopsd.said()
    with client(xenopsd.socket) as (_, data):
        assert code(data, START) == 0


# Called twice, and cut short.


@pytest.mark.parametrize("more", [pytest.param((), marks=as_root), ("--priv",)])
def test_a_second_start_beside_a_tpm_that_runs_is_refused_and_spoils_nothing(
    host: Host, xenopsd: Xenopsd, more: tuple[str, ...]
) -> None:
    host.world.vtpm()
    assert xenopsd.start(*more) == "ready", xenopsd.said()
    first = xenopsd.process
    assert first is not None
    try:
        there = sorted(xenopsd.root.iterdir())
        pid_file = xenopsd.pid_file.read_text()
        assert xenopsd.start(*more) == "exited"
        (line,) = [line for line in xenopsd.said().splitlines() if "next: " in line]
        assert "another program listens on" in line
        assert sorted(xenopsd.root.iterdir()) == there
        assert xenopsd.pid_file.read_text() == pid_file == f"{first.pid}\n"
        with client(xenopsd.socket) as (_, data):
            assert code(data, START) == 0
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert xenopsd.start(*more) == "ready", xenopsd.said()


def test_made_twice_and_in_between_it_is_one_tpm(host: Host, xenopsd: Xenopsd) -> None:
    host.world.vtpm()
    assert xenopsd.make() == xenopsd.make()
    make = xenopsd.words("dir://.", "true")
    for _ in range(2):  # and the second over what the first left
        subprocess.run(make, check=True, timeout=WAIT_S)
    assert xenopsd.start("--priv") == "ready", xenopsd.said()
    # Out of order: nothing happens to one that runs.
    subprocess.run(make, check=True, timeout=WAIT_S)
    with client(xenopsd.socket) as (_, data):
        assert code(data, START) == 0
    assert xenopsd.pid_file.exists()


STEPS = (
    *("parse", "_find", "aside", "take_name", "PidFile.when_ready", "PidFile._listen"),
    *("_run_words", "PidFile._look"),
)
STEPS_SHUT_IN = ("give_directory", "leave_namespaces", "PidFile.when_ready", "PidFile._listen")


@pytest.mark.parametrize(
    ("step", "more"),
    [
        *((step, ("--priv",)) for step in STEPS),
        *(pytest.param(step, (), marks=as_root) for step in STEPS_SHUT_IN),
    ],
)
def test_dead_before_any_step_of_its_start_it_can_be_started_again(
    host: Host, xenopsd: Xenopsd, step: str, more: tuple[str, ...]
) -> None:
    host.world.vtpm()
    words = xenopsd.words("unix+http://xapi-depriv-socket", "false", *more)
    assert xenopsd.start_words(dying(words, step)) == "exited"
    assert xenopsd.start(*more) == "ready", xenopsd.said()
    with client(xenopsd.socket) as (_, data):
        assert code(data, START) == 0
    assert len(host.world.entries()) == 1


@as_root
@pytest.mark.parametrize("step", ["opened._start_broker", "opened.confine"])
def test_dead_on_its_way_into_its_directory_it_can_be_started_again(
    host: Host, xenopsd: Xenopsd, step: str
) -> None:
    host.world.vtpm()
    words = xenopsd.words("unix+http://xapi-depriv-socket", "false")
    die = f"import os; from qemu_vtpm_bridge import opened; {step} = lambda *_: os._exit(9)"
    words[2] = f"{die}; {ENTRY}"
    assert xenopsd.start_words(words) == "exited"
    assert xenopsd.start() == "ready", xenopsd.said()
    with client(xenopsd.socket) as (_, data):
        assert code(data, START) == 0


@pytest.mark.parametrize("step", ["parse", "_find", "_note_state", "_write_whole"])
def test_dead_before_any_step_of_its_making_it_can_be_made_again(
    host: Host, xenopsd: Xenopsd, step: str
) -> None:
    words = dying(xenopsd.words("dir://.", "true"), step)
    assert subprocess.run(words, check=False, timeout=WAIT_S).returncode == 9
    assert list(xenopsd.root.iterdir()) == []
    assert b"vTPM domain" in xenopsd.make()


def test_dead_amid_its_making_it_leaves_no_half_of_a_state(host: Host, xenopsd: Xenopsd) -> None:
    words = dying(xenopsd.words("dir://.", "true"), "Path.replace")
    assert subprocess.run(words, check=False, timeout=WAIT_S).returncode == 9
    assert not (xenopsd.root / "tpm2-00.permall").exists()
    assert b"vTPM domain" in xenopsd.make()
    assert list(xenopsd.root.iterdir()) == []


ODD_NAMES = ("../../tmp/x", "a b,c=d", "-rf $(reboot)", "günther ☃ %s%n", "x" * 300)


def test_odd_names(host: Host, xenopsd: Xenopsd) -> None:
    guests = "".join(f"'{name}' = {{ backend = \"vtpm\" }}\n" for name in ODD_NAMES)
    host.guests_file(f"[guest]\n{guests}")
    host.world.vtpm()
    before = set(host.place.iterdir())
    for name in ODD_NAMES:
        host.write(f"/local/domain/{DOMID}/name", name)
        assert xenopsd.start("--priv") == "ready", xenopsd.said()
        with client(xenopsd.socket) as (control, data):
            assert code(data, START) == 0
            quit_qemu(control)
        assert xenopsd.process is not None
        assert xenopsd.process.wait(WAIT_S) == 0
        assert list(xenopsd.root.iterdir()) == []
        (entry,) = host.world.entries()
        assert host.read(f"{entry['frontend']}/domain") == name
        detached = host.world.call("detach", *host.world.where, "--backend=vtpm")
        assert detached.returncode == 0, detached.stderr
    assert set(host.place.iterdir()) - before == {xenopsd.log, host.place / "state2"}


def test_the_console_script_is_there() -> None:
    script = Path(sys.executable).with_name("qemu-vtpm-bridge-xapi")
    done = subprocess.run([script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this is not how xenopsd calls" in done.stderr
    assert PROGRAM[0] == sys.executable
