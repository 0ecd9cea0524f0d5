"""The doctor's report: its document for programs, its text for people, its commands."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_vtpm_bridge.toolstack.doctor_report import (
    LIST_MAX,
    Finding,
    Mend,
    Report,
    Verdict,
    render,
    shell,
    tidy,
)
from tests.support.doctor import environment, examined, run_doctor

ROOT = Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs/guides/doctor.md"


def report(*findings: Finding) -> Report:
    return Report("dom0", list(findings))


OK = Finding("xen", Verdict.OK, "Xen 4.17")
BAD = Finding("xen.modules", Verdict.PROBLEM, "xen-gntalloc", mend=(Mend("load it", "modprobe x"),))
ODD = Finding("qemu", Verdict.WARNING, "no TPM", mend=(Mend("build one"), Mend("load it", "y")))
NONE = Finding("guest", Verdict.NOT_APPLICABLE, "none runs")


# The document.


async def test_the_document_keeps_its_form(tmp_path: Path) -> None:
    """Programs rely on these names; what changes here changes `schema`."""
    status, document = await examined("--run-dir", tmp_path)
    assert list(document) == [
        "program",
        "version",
        "schema",
        "role",
        "verdict",
        "counts",
        "findings",
    ]
    assert document["schema"] == 1
    assert status == (3 if document["verdict"] == "problem" else 0)
    assert list(document["counts"]) == ["ok", "warning", "problem", "not-applicable"]
    assert sum(document["counts"].values()) == len(document["findings"])
    for finding in document["findings"]:
        assert list(finding) == ["check", "subject", "verdict", "summary", "facts", "mend"]
        assert finding["verdict"] in document["counts"]
        for step in finding["mend"]:
            assert list(step) == ["does", "command", "line"]
    checks = [finding["check"] for finding in document["findings"]]
    assert list(dict.fromkeys(checks)) == [
        *("xen", "xen.libraries", "xen.modules", "xen.devices", "xen.tpmfront"),
        *("xenstore", "qemu", "swtpm", "user", "socket", "status"),
    ]


def test_each_check_and_each_status_is_in_the_guide() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    sources = (ROOT / "qemu_vtpm_bridge/toolstack").glob("doctor*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    checks = set(re.findall(r'(?:Finding\(\s*|check = )"([a-z.]+)"', text))
    assert len(checks) == 15
    for check in checks:
        assert f"### `{check}`" in guide
    assert set(re.findall(r"### `([a-z.]+)`", guide)) == checks


@pytest.mark.parametrize(
    ("findings", "verdict", "status"),
    [((), "ok", 0), ((OK, NONE), "ok", 0), ((OK, ODD), "warning", 0), ((BAD, ODD), "problem", 3)],
)
def test_the_gravest_verdict_counts(
    findings: tuple[Finding, ...], verdict: str, status: int
) -> None:
    told = report(*findings)
    assert (told.verdict.value, told.exit_status) == (verdict, status)


# The text.


def test_the_text_is_aligned_and_says_what_to_do_in_order() -> None:
    assert render(report(OK, ODD, BAD, NONE)) == (
        "ok       xen          Xen 4.17\n"
        "warning  qemu         no TPM\n"
        "problem  xen.modules  xen-gntalloc\n"
        "-        guest        none runs\n"
        "\n"
        "What to do, in this order:\n"
        "  1. load it:\n"
        "       modprobe x\n"
        "\n"
        "What to think about:\n"
        "  1. build one\n"
        "  2. load it:\n"
        "       y\n"
        "\n"
        "1 problem, 1 warning."
    )
    assert render(report(OK)).endswith("\n\nNo problem was found.")


def test_a_step_is_told_once() -> None:
    assert render(report(BAD, BAD)).count("modprobe x") == 1


async def test_colour_is_for_terminals(tmp_path: Path) -> None:
    words = ("--root", tmp_path, "--run-dir", tmp_path)
    _, plain = await run_doctor(*words)
    assert "\x1b" not in plain
    assert "\x1b[33mwarning\x1b[0m  qemu" in on_a_terminal(*words)
    assert "\x1b" not in on_a_terminal(*words, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(*words, TERM="dumb")


def on_a_terminal(*words: str | Path, **changes: str) -> str:
    ours, theirs = pty.openpty()
    changes = {"TERM": "xterm", "NO_COLOR": ""} | changes
    with subprocess.Popen(
        [sys.executable, "-m", "qemu_vtpm_bridge", "doctor", *words],
        env=environment(**changes),
        stdout=theirs,
    ):
        os.close(theirs)
        raw = b""
        try:
            while chunk := os.read(ours, 65536):
                raw += chunk
        except OSError:  # what a terminal says when the last writer is gone
            pass
        finally:
            os.close(ours)
    return raw.decode()


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "qemu_vtpm_bridge", "doctor", "--json"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode in (0, 3)


def test_a_wrong_option_is_a_usage_error() -> None:
    command = [sys.executable, "-m", "qemu_vtpm_bridge", "doctor", "--role", "king"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


# Hostile strings.

ODD_WORDS = [
    "a",
    "",
    "a b",
    "$(reboot)",
    "`x`",
    "it's",
    "\x1b[31m",
    "a\nb",
    "\\n",
    "é",
    "\udcff",
    "'\x07",
]


def test_P10_strings_are_escaped_and_bounded() -> None:
    finding = Finding(
        "x",
        Verdict.PROBLEM,
        "\x1b[31m\u202e\x00" + "y" * 1000,
        {"\x1b": ["\x07"] * (LIST_MAX + 5), "n": {"z": (1, None, True, "\ud800")}},
        (Mend("\x1b]0;x\x07"),),
        subject="\x9b",
    )
    told = report(finding)
    for text in (json.dumps(told.as_dict("0"), ensure_ascii=False), render(told)):
        assert all(c.isprintable() or c == "\n" for c in text)
        assert len(text) < 3000
    assert tidy(["x"] * (LIST_MAX + 5))[-1] == "and 5 more"


@pytest.mark.parametrize("word", ODD_WORDS)
def test_P10_a_printed_command_does_what_its_words_say(word: str) -> None:
    line = shell("printf", "%s", word, word)
    assert line.isascii()
    assert line.isprintable()
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word) * 2
