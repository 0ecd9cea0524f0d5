"""The demo, whole and interrupted, with real firmware, kernel and QEMU."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_vtpm_bridge.bridge import power
from qemu_vtpm_bridge.demo.doors import Look, Passed, on_its_way, power_story
from qemu_vtpm_bridge.demo.guest import build_initramfs, read_boots, unpacked_kernel
from qemu_vtpm_bridge.demo.screen import Screen

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or shutil.which("busybox") is None,
    reason="QEMU or busybox is not installed",
)

# Between runs the kernel stays where `make demo` keeps it.
DIRECTORY = Path("build/demo")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory with a short path, where the demo makes its sockets."""
    with tempfile.TemporaryDirectory(prefix="qvb") as directory:
        yield Path(directory)


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    # What a shell runs in the background ignores SIGINT, and this run may be such.
    heard = ["env", "--default-signal=INT"]
    demo = [sys.executable, "-m", "qemu_vtpm_bridge", "demo", "--directory", str(DIRECTORY)]
    return subprocess.Popen(
        [*heard, *demo, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
    )


def processes_of(place: Path) -> list[str]:
    """Return the command lines of processes that name the demo's sockets."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if str(place) in words:
            found.append(words)
    return found


@pytest.mark.timeout(900)
def test_the_whole_demo_holds_what_it_shows(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = place / "outcome.json"
    with start(place, "--json", str(outcome)) as demo:
        assert demo.stdout is not None
        with capsys.disabled():
            print("\nthe demo, with SeaBIOS, OVMF and Linux under TCG:", flush=True)
            for line in demo.stdout:
                if re.match(r"\[.*s\]", line):
                    print(f"  {line}", end="", flush=True)
    summary = json.loads(outcome.read_text())
    assert demo.returncode == 0, summary
    assert summary["ok"]
    stages = {check["stage"] for check in summary["checks"]}
    assert {"SeaBIOS with tpm-tis", "OVMF with tpm-crb"} <= stages
    assert all(check["ok"] for check in summary["checks"])
    assert len(summary["checks"]) == 23
    assert not processes_of(place)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(place: Path, number: signal.Signals) -> None:
    with start(place) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "SeaBIOS with tpm-tis" in line:
                break
        demo.send_signal(number)
        rest = demo.stdout.read()
    assert demo.returncode != 0, rest
    assert not processes_of(place)
    assert not list(place.iterdir())


def test_the_initramfs_is_an_archive_that_cpio_reads(tmp_path: Path) -> None:
    path = build_initramfs(tmp_path)
    listed = subprocess.run(
        f"gzip -dc {path} | busybox cpio -t",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(listed.stdout.split()) >= {"init", "bin/busybox", "dev", "proc", "sys"}


def test_boots_are_told_apart_on_the_serial_line() -> None:
    console = (
        "noise\r\nDEMO kernel 6.1, up 2 s\r\nDEMO pcr 0 AB\r\nDEMO end\r\n"
        "DEMO kernel 6.1, up 2 s\r\nDEMO pcr 0 CD\r\nDEMO random 8001\r\n"
    )
    first, second = read_boots(console)
    assert (first.pcrs, first.ended) == ({0: "AB"}, True)
    assert (second.pcrs, second.ended) == ({0: "CD"}, False)
    assert second.facts["random"] == "8001"
    assert not read_boots("DEMO pcr 0 AB\n")


def test_a_line_that_the_guest_is_still_writing_is_left_for_later() -> None:
    console = "DEMO kernel 6.1\r\nDEMO pcr 0 AB\r\nDEMO pcr 1"
    for length in range(len(console) + 1):
        read_boots(console[:length])
    [boot] = read_boots(console)
    assert boot.pcrs == {0: "AB"}


def test_a_failure_names_its_stage_its_cause_and_the_logs(place: Path) -> None:
    boot = place / "demo/kernel/boot"
    boot.mkdir(parents=True)
    (boot / "vmlinuz-none").write_bytes(b"no kernel")
    outcome = place / "outcome.json"
    with start(place, "--directory", str(place / "demo"), "--json", str(outcome)) as demo:
        said, _ = demo.communicate()
    assert demo.returncode == 1, said
    failure = json.loads(outcome.read_text())["failure"]
    assert failure["stage"] == "SeaBIOS with tpm-tis"
    assert "QEMU ended with status 1" in failure["why"]
    assert "The demo failed at stage 6, SeaBIOS with tpm-tis." in said
    assert f"Logs: {place / 'demo'}" in said
    assert not processes_of(place)


def test_what_an_interrupted_download_left_is_no_kernel(tmp_path: Path) -> None:
    for name in ("kernel.part", "kernel"):
        (tmp_path / name / "boot").mkdir(parents=True)
    (tmp_path / "kernel.part/boot/vmlinuz-6.1").touch()
    assert unpacked_kernel(tmp_path) is None
    (tmp_path / "kernel/boot/vmlinuz-6.1").touch()
    assert unpacked_kernel(tmp_path) == tmp_path / "kernel/boot/vmlinuz-6.1"


def look(commands: int, refused: int, served: int, requests: dict[str, int]) -> Look:
    pump = dict.fromkeys(("responses", "events", "bytes-in", "bytes-out"), 0)
    return Look(
        {
            "control": {"requests": requests},
            "ordinals": {"TPM2_PCR_Read": commands},
            "pump": pump | {"commands": commands, "refused": refused, "last-ordinal": 0x17E},
        },
        {"pump": {"commands": served}, "frontends": [{"resets": 0}]},
    )


def test_doors_count_what_passed_between_two_looks() -> None:
    before = look(1, 1, 1, {"CMD_INIT": 1, "CMD_STOP": 1})
    after = look(7, 2, 8, {"CMD_INIT": 2, "CMD_STOP": 1})
    passed = Passed.between(before, after)
    assert (passed.control, passed.ordinals) == ({"CMD_INIT": 1}, {"TPM2_PCR_Read": 6})
    assert (passed.forwarded, passed.served) == (5, 7)
    rows = dict(passed.rows())
    assert rows["vTPM domain"].startswith("7 commands to swtpm; 2 the bridge's own")
    assert on_its_way(before, after) == "QEMU 6 > page 5 > swtpm 7   TPM2_PCR_Read"
    assert on_its_way(after, after) == "no TPM command yet"


@pytest.mark.parametrize(
    "fact",
    [
        power.Fact.STOP_ASKED,
        power.Fact.INIT_ASKED,
        power.Fact.RING_UP,
        power.Fact.EVIDENCE_USED,
        power.Fact.CYCLED,
        power.Fact.EVIDENCE_CLEAN,
    ],
)
def test_each_step_of_a_power_cycle_is_told_in_words(fact: power.Fact) -> None:
    (line,) = power_story([f"power: ON -> OFF ({fact.name})", "something else"])
    assert line.startswith("OFF ")
    assert fact.name not in line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "painted"), [(None, True), ("1", False)])
def test_a_terminal_of_60_columns_gets_lines_that_fit_and_one_live_line(
    monkeypatch: pytest.MonkeyPatch, no_color: str | None, painted: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    out = Terminal()
    screen = Screen(out)
    screen.stage("A stage", "word " * 40)
    screen.live("first " * 30)
    screen.row("label", "some words, " * 20)
    screen.check("this holds " * 12, True)
    assert ("\033[1" in out.getvalue()) is painted
    assert "...\r\033[K" in re.sub(r"\033\[\d+m", "", out.getvalue())
    shown = re.sub(r"\033\[[\d;]*[mK]", "", out.getvalue())
    assert max(len(line.split("\r")[-1]) for line in shown.splitlines()) < 60
    assert screen.ok


def test_a_pipe_gets_a_live_line_only_when_it_says_something_new() -> None:
    out = io.StringIO()
    screen = Screen(out)
    for _ in range(3):
        screen.live("the same")
    screen.fail("a cause", "/logs")
    assert out.getvalue().count("the same") == 1
    assert "\033" not in out.getvalue()
    assert "\r" not in out.getvalue()
    screen.check("something else", True)
    assert not screen.ok
