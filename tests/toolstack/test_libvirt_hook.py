"""libvirt's hook, as a process that is called as libvirt calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from qemu_vtpm_bridge.bridge.tpm import Family
from qemu_vtpm_bridge.toolstack import launch
from qemu_vtpm_bridge.toolstack.domain_xml import NAMESPACE
from qemu_vtpm_bridge.toolstack.guests import Guest, socket_path
from tests.support.host import Host, running_host
from tests.support.programs import PROGRAM, WAIT_S, client, code
from tests.support.swtpm_client import STARTUP

pytestmark = pytest.mark.timeout(180)

SCRIPT = Path(__file__).parents[2] / "packaging/libvirt/qemu-vtpm-bridge"
WEB = '[guest.web]\nbackend = "vtpm"\n'
UUID = "5f0d4b5e-7a34-4ee2-8a0d-6e5c54a1b0c7"
OTHER_UUID = UUID.replace("5", "6")
PREPARE, RECONNECT, RELEASE = ("prepare", "begin"), ("reconnect", "begin"), ("release", "end")

CRASH = """\
import os, sys
from qemu_vtpm_bridge import cli
from qemu_vtpm_bridge.toolstack import launch
launch.STEPS = (*launch.STEPS[:int(sys.argv[1])], lambda _: os._exit(9))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host() as found:
        yield found


def xml(name: str, **vtpm: str) -> str:
    """A domain's XML, with our element in its metadata if it has attributes."""
    attributes = " ".join(f"{key}={quoteattr(value)}" for key, value in vtpm.items())
    element = f"<t:vtpm xmlns:t='{NAMESPACE}' {attributes}/>" if vtpm else ""
    return (
        f"<domain type='xen'><name>{escape(name)}</name><uuid>{UUID}</uuid>"
        f"<metadata>{element}</metadata></domain>"
    )


def words(host: Host, station: tuple[str, str], name: str) -> list[str]:
    """The words of one call of the hook."""
    return ["libvirt-hook", "--guests", str(host.place / "guests.toml"), "--", name, *station, "-"]


def call(
    host: Host, station: tuple[str, str], name: str = "web", text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Call the hook; returns when nobody holds its standard output any more, as libvirt does."""
    done = subprocess.run(
        [*PROGRAM, *words(host, station, name)],
        input=xml(name) if text is None else text,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.stdout == "", "libvirt would take this for the domain's XML"
    return done


def assert_done(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")


def assert_nothing_there(host: Host) -> None:
    assert host.bridges() == []
    assert host.world.entries() == []
    assert not list(host.run_dir.glob("*.sock"))


def serves(host: Host, name: str = "web") -> bool:
    """Whether a TPM answers where the guest's QEMU connects."""
    with client(socket_path(name, host.run_dir)) as (_, data):
        return code(data, STARTUP[Family.TPM_2_0]) == 0


def test_a_bridge_is_there_from_prepare_to_release(host: Host) -> None:
    host.guests_file(WEB)
    host.world.vtpm()
    assert_done(call(host, PREPARE))
    assert len(host.bridges()) == 1
    assert serves(host)
    for station in (("start", "begin"), ("started", "begin"), ("stopped", "end")):
        assert_done(call(host, station))
        assert len(host.bridges()) == 1
    assert_done(call(host, RELEASE))
    assert_nothing_there(host)


OTHER_STATIONS = (
    *(("start", "begin"), ("started", "begin"), ("stopped", "end"), ("migrate", "begin")),
    *(("restore", "begin"), ("attach", "begin"), ("prepare", "end"), ("release", "begin")),
    *(("", ""), ("what-libvirt-may-bring", "some-day")),
)


def test_at_other_stations_there_is_nothing_to_do(host: Host) -> None:
    host.guests_file(WEB)
    for number, station in enumerate(OTHER_STATIONS):
        assert_done(call(host, station, text="no XML" if number % 2 else None))
    assert_nothing_there(host)


def test_a_guest_without_a_tpm_from_here_is_let_alone(host: Host) -> None:
    for station in (PREPARE, RECONNECT, RELEASE):
        assert_done(call(host, station, "other"))  # there is no guests file
    host.guests_file(WEB)
    for station in (PREPARE, RECONNECT, RELEASE):
        assert_done(call(host, station, "other"))
    assert_nothing_there(host)


def test_the_hook_called_twice_and_out_of_order(host: Host) -> None:
    host.guests_file(WEB)
    host.world.vtpm()
    assert_done(call(host, RELEASE))
    assert_nothing_there(host)
    assert_done(call(host, PREPARE))
    first = host.bridges()
    assert_done(call(host, PREPARE))
    assert_done(call(host, RECONNECT))
    assert host.bridges() == first
    assert serves(host)
    assert_done(call(host, RELEASE))
    assert_done(call(host, RELEASE))
    assert_nothing_there(host)
    assert_done(call(host, RECONNECT))
    assert serves(host)


def test_reconnect_finds_the_bridge_or_brings_another(host: Host) -> None:
    host.guests_file(WEB)
    assert_done(call(host, PREPARE))
    (pid,) = host.bridges()
    assert_done(call(host, RECONNECT))
    assert host.bridges() == [pid]
    host.kill(pid)
    assert_done(call(host, RECONNECT))
    assert len(host.bridges()) == 1


def test_reconnect_lets_a_running_bridge_be_whatever_the_file_says(host: Host) -> None:
    host.guests_file(WEB)
    assert_done(call(host, PREPARE))
    (pid,) = host.bridges()
    host.guests_file('[guest.web]\nbackend = "other-vtpm"\n')
    assert_done(call(host, RECONNECT))
    assert host.bridges() == [pid]
    assert_done(call(host, PREPARE))
    assert host.bridges() != [pid]


def wrapped(name: str, **vtpm: str) -> str:
    """The XML of a domain whose emulator is the wrapper."""
    emulator = "<devices><emulator>/usr/bin/qemu-vtpm-bridge-dm</emulator></devices></domain>"
    return xml(name, **vtpm).replace("</domain>", emulator)


def test_a_guest_with_the_wrapper_is_started_by_that_and_ended_here(host: Host) -> None:
    host.guests_file(WEB)
    text = wrapped("web")
    assert_done(call(host, PREPARE, text=text))
    assert_done(call(host, RECONNECT, text=text))
    assert_nothing_there(host)
    host.ensure(Guest("web", "vtpm"))
    assert_done(call(host, RELEASE, text=text))
    assert_nothing_there(host)


@pytest.mark.parametrize(
    ("guests", "name", "vtpm"),
    [
        ("", "web", {"backend": "vtpm"}),
        (WEB, "web", {"backend": "other-vtpm"}),
        (f'[guest.{UUID}]\nbackend = "vtpm"\n', "web", {}),
        (f'[guest.{OTHER_UUID}]\nbackend = "vtpm"\n', OTHER_UUID, {}),
    ],
    ids=["in the metadata", "otherwise in the metadata", "by its UUID", "another's UUID as name"],
)
def test_a_guest_that_the_wrapper_would_give_no_or_another_tpm_does_not_start(
    host: Host, guests: str, name: str, vtpm: dict[str, str]
) -> None:
    """The wrapper has the domain's name only, not its XML."""
    host.guests_file(guests)
    text = wrapped(name, **vtpm)
    refused = call(host, PREPARE, name, text=text)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert f"the wrapper knows guest {name!r} by its name only" in line
    assert "next: " in line
    for station in (RECONNECT, RELEASE):
        assert_done(call(host, station, name, text=text))
    assert_nothing_there(host)


def test_metadata_that_say_what_the_file_says_are_the_wrappers_too(host: Host) -> None:
    host.guests_file(WEB)
    assert_done(call(host, PREPARE, text=wrapped("web", backend="vtpm")))


@pytest.mark.parametrize("steps", range(len(launch.STEPS) + 1))
def test_a_hook_that_died_after_any_step_can_be_called_again(host: Host, steps: int) -> None:
    host.guests_file(WEB)
    host.world.vtpm()
    for again in (PREPARE, RELEASE):
        died = subprocess.run(
            [sys.executable, "-c", CRASH, str(steps), *words(host, PREPARE, "web")],
            input=xml("web"),
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert died.returncode == 9
        assert_done(call(host, again))
        if again is PREPARE:
            assert len(host.bridges()) == 1
            assert serves(host)
            assert_done(call(host, RELEASE))
        assert_nothing_there(host)


@pytest.mark.parametrize(
    ("guests", "text", "said"),
    [
        ('[guest.web]\nbackend = "no-such"\n', None, "no domain is named no-such"),
        ("[guest.web]\nbackend = 9\n", None, "there is no domain 9"),
        ('[guest.web]\nbackend = "vtpm"\ncolour = "red"\n', None, "there is no key `colour`"),
        ("[guest.web", None, "guests.toml"),
        (WEB, "", "the domain's XML cannot be used"),
        (WEB, xml("mail"), "libvirt names guest 'web', and its XML 'mail'"),
        (WEB, xml("web", backend="vtpm", colour="red"), "metadata of guest 'web'.*`colour`"),
        (WEB, xml("web", handle="0,tpm=1.2"), "metadata of guest 'web'.*comma"),
        ("", xml("web", handle="1"), "metadata of guest 'web'.*no vTPM domain"),
        (WEB, "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "document type"),
    ],
)
def test_a_guest_that_cannot_have_its_tpm_does_not_start_but_is_not_killed(
    host: Host, guests: str, text: str | None, said: str
) -> None:
    host.guests_file(guests)
    refused = call(host, PREPARE, text=text)
    assert refused.returncode != 0
    (line,) = refused.stderr.splitlines()
    assert pytest.raises(AssertionError, match=said).matches(AssertionError(line))
    assert "next: " in line
    # libvirt kills the guest where this one fails.
    assert call(host, RECONNECT, text=text).returncode == 0
    assert call(host, RELEASE, text=text).returncode == 0
    assert_nothing_there(host)


DEFECT = CRASH.replace("lambda _: os._exit(9)", "lambda _: 1 / 0")


def test_not_even_a_defect_costs_a_running_guest(host: Host) -> None:
    host.guests_file(WEB)
    for station, status in ((PREPARE, 1), (RECONNECT, 0)):
        done = subprocess.run(
            [sys.executable, "-c", DEFECT, "0", *words(host, station, "web")],
            input=xml("web"),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
        assert (done.returncode, done.stdout) == (status, "")
        assert "ZeroDivisionError" in done.stderr
    assert_nothing_there(host)


def test_closed_standard_input_is_no_xml(host: Host) -> None:
    host.guests_file(WEB)
    command = [*PROGRAM, *words(host, PREPARE, "web")]
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "the domain's XML cannot be used" in done.stderr


def test_the_metadata_can_say_it_all_and_go_before_the_file(host: Host) -> None:
    host.guests_file("")
    host.world.vtpm()
    text = xml("web", backend="vtpm", handle="3")
    assert_done(call(host, PREPARE, text=text))
    assert [entry["handle"] for entry in host.world.entries()] == [3]
    assert serves(host)
    assert_done(call(host, RELEASE, text=text))
    assert_nothing_there(host)
    host.guests_file('[guest.web]\nbackend = "no-such"\n')
    assert_done(call(host, PREPARE, text=text))


def test_the_file_can_name_a_guest_by_its_uuid(host: Host) -> None:
    host.guests_file(f'[guest.{UUID}]\nbackend = "vtpm"\n')
    assert_done(call(host, PREPARE, "its name may change"))
    assert len(host.bridges()) == 1
    assert_done(call(host, RELEASE, "as it did"))
    assert_nothing_there(host)


def test_a_guest_cannot_be_another_by_being_named_like_its_uuid(host: Host) -> None:
    host.guests_file(f'[guest.{OTHER_UUID}]\nbackend = "vtpm"\n')
    assert_done(call(host, PREPARE, OTHER_UUID))
    assert_nothing_there(host)


def test_a_guest_taken_out_of_the_file_meanwhile_is_stopped_all_the_same(host: Host) -> None:
    host.guests_file(WEB)
    assert_done(call(host, PREPARE))
    assert len(host.bridges()) == 1
    host.guests_file("")
    assert_done(call(host, RELEASE))
    assert_nothing_there(host)


ODD_NAMES = (
    *("a b", "../../tmp/x", "/", "-rf", "$(reboot)", "a,b", "günther ☃", "%s%n", "x" * 300, "--"),
)


def test_odd_names(host: Host) -> None:
    guests = "".join(f'"{name}" = {{ backend = "vtpm" }}\n' for name in ODD_NAMES)
    host.guests_file(f"[guest]\n{guests}")
    before = set(host.place.iterdir())
    for name in ODD_NAMES:
        assert_done(call(host, PREPARE, name))
        assert len(host.bridges()) == 1
        assert socket_path(name, host.run_dir).is_socket()
        assert_done(call(host, RELEASE, name))
        assert_nothing_there(host)
    assert set(host.place.iterdir()) - before == {host.run_dir, host.log_dir}


def test_two_guests_at_once(host: Host) -> None:
    host.guests_file(WEB + '[guest.mail]\nbackend = "other-vtpm"\n')
    started = [
        subprocess.Popen([*PROGRAM, *words(host, PREPARE, name)], stdin=subprocess.PIPE, text=True)
        for name in ("web", "mail")
    ]
    for process, name in zip(started, ("web", "mail"), strict=True):
        process.communicate(xml(name), timeout=WAIT_S)
        assert process.returncode == 0
    assert len(host.bridges()) == 2
    assert_done(call(host, RELEASE, "web"))
    assert len(host.bridges()) == 1
    assert_done(call(host, RELEASE, "mail"))
    assert_nothing_there(host)


def test_two_stations_of_one_guest_at_the_same_time_give_one_bridge(host: Host) -> None:
    host.guests_file(WEB)
    started = [
        subprocess.Popen([*PROGRAM, *words(host, PREPARE, "web")], stdin=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        process.communicate(xml("web"), timeout=WAIT_S)
        assert process.returncode == 0
    assert len(host.bridges()) == 1


def test_the_snippets_lead_qemu_to_the_socket(host: Host) -> None:
    path = host.guests_file(WEB + '[guest.old]\nbackend = "vtpm"\ntpm = "1.2"\n')
    socket = str(socket_path("web", host.run_dir))
    xen = host.world.call("libvirt-hook", f"--guests={path}", "--snippet=web").stdout
    assert f'<xen:arg value="socket,id=chrvtpm,path={socket}"/>' in xen
    assert '<xen:arg value="tpm-crb,tpmdev=vtpm0"/>' in xen
    qemu = host.world.call(
        "libvirt-hook", f"--guests={path}", "--snippet=old", "--driver=qemu"
    ).stdout
    assert '<tpm model="tpm-tis">' in qemu
    assert f'path="{socket_path("old", host.run_dir)}"' in qemu
    missing = host.world.call("libvirt-hook", f"--guests={path}", "--snippet=no-such")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "has no guest 'no-such'" in missing.stderr


def test_the_wrong_number_of_words_says_who_should_call(host: Host) -> None:
    for few in ([], ["web"], ["web", "prepare", "begin", "-", "more"]):
        done = host.world.call("libvirt-hook", *few)
        assert (done.returncode, done.stdout) == (2, "")
        assert "--snippet NAME" in done.stderr


def call_script(path: str, station: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Call the script as shipped, with this PATH."""
    return subprocess.run(
        [SCRIPT, "-a b", *station, "-"],
        input="<domain/>",
        capture_output=True,
        text=True,
        env={"PATH": path},
        timeout=WAIT_S,
        check=False,
    )


@pytest.mark.parametrize("station", [PREPARE, RECONNECT, RELEASE])
def test_the_script_that_libvirt_calls_hands_everything_through(
    tmp_path: Path, station: tuple[str, str]
) -> None:
    assert os.access(SCRIPT, os.X_OK)
    program = tmp_path / "qemu-vtpm-bridge"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\ncat\nexit 3\n', encoding="ascii")
    program.chmod(0o755)
    done = call_script(f"{tmp_path}:{os.environ['PATH']}", station)
    operation, suboperation = station
    assert done.stdout == f"libvirt-hook\n--\n-a b\n{operation}\n{suboperation}\n-\n<domain/>"
    assert done.returncode == (0 if station == RECONNECT else 3)


def test_the_script_without_the_program_keeps_running_guests(tmp_path: Path) -> None:
    assert call_script(str(tmp_path), PREPARE).returncode != 0
    assert call_script(str(tmp_path), RECONNECT).returncode == 0


@pytest.mark.parametrize("station", [("start", "begin"), ("started", "begin"), ("stopped", "end")])
def test_the_script_starts_nothing_where_there_is_nothing_to_do(
    tmp_path: Path, station: tuple[str, str]
) -> None:
    program = tmp_path / "qemu-vtpm-bridge"
    program.write_text("#!/bin/sh\necho started\n", encoding="ascii")
    program.chmod(0o755)
    done = call_script(f"{tmp_path}:{os.environ['PATH']}", station)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
