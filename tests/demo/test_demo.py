"""The demo, whole and interrupted, with real firmware, kernel and QEMU."""

from __future__ import annotations

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

from qemu_vtpm_bridge.demo.guest import build_initramfs, read_boots

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
    return subprocess.Popen(
        [sys.executable, "-m", "qemu_vtpm_bridge", "demo", "--directory", str(DIRECTORY), *words],
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
    assert len(summary["checks"]) == 19
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
