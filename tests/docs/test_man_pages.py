"""The man pages: current, complete, and clean to the programs that show them."""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest

from qemu_vtpm_bridge import cli
from tools import man_pages, roff
from tools.source_text import ROOT

PAGES = man_pages.pages()
FILES = sorted(man_pages.DIRECTORY.glob("man?/*"))


def shown(path: Path) -> str:
    """Return a page as a person reads it, in one line."""
    done = subprocess.run(
        ["mandoc", "-T", "ascii", str(path)], check=True, capture_output=True, text=True
    )
    return " ".join(re.sub(r".\x08", "", done.stdout).split())


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in parser._actions:
        if action.help is argparse.SUPPRESS:
            continue
        found.update(word for word in action.option_strings if word.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                found |= options_of(inner)
    return found - {"--help"}


def test_the_pages_are_those_of_the_parsers() -> None:
    stored = {
        str(path.relative_to(man_pages.DIRECTORY)): path.read_text(encoding="utf-8")
        for path in FILES
    }
    assert stored == PAGES, "run `make docs`"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_reader_complains(path: Path) -> None:
    for command in (["mandoc", "-T", "lint"], ["groff", "-man", "-ww", "-z", "-Tutf8"]):
        done = subprocess.run([*command, str(path)], check=False, capture_output=True, text=True)
        assert done.stdout + done.stderr == ""


def test_a_page_with_a_fault_would_be_complained_of(tmp_path: Path) -> None:
    page = tmp_path / "page.1"
    page.write_text(PAGES["man1/qemu-vtpm-bridge.1"] + ".TQQ\n.SH\n")
    done = subprocess.run(["mandoc", "-T", "lint", page], check=False, capture_output=True)
    assert done.stdout


@pytest.mark.parametrize("command", man_pages.command_parsers())
def test_a_command_s_page_has_its_name_and_options(command: str) -> None:
    page = shown(man_pages.DIRECTORY / f"man1/qemu-vtpm-bridge-{command}.1")
    assert f"NAME qemu-vtpm-bridge-{command} - " in page
    assert f"SYNOPSIS qemu-vtpm-bridge {command}" in page
    options = options_of(man_pages.command_parsers()[command])
    assert options
    words = set(page.split())
    assert options <= words
    overview = shown(man_pages.DIRECTORY / "man1/qemu-vtpm-bridge.1")
    assert f"qemu-vtpm-bridge-{command}(1)" in overview


def test_the_configuration_file_s_page_has_each_key_below_its_table() -> None:
    text = PAGES["man5/qemu-vtpm-bridge.toml.5"]
    for command, parser in man_pages.command_parsers().items():
        options = options_of(parser)
        head = f'.SS "[{roff.literal(command)}]"'
        if "--config" not in options:
            assert head not in text
            continue
        part = text.split(head)[1].split("\n.SS ")[0]
        for option in options - {"--config"}:
            assert f"{roff.bold(option[2:])} = " in part, option
        assert roff.bold("config") not in part


def test_a_new_command_has_its_page_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("qemu_vtpm_bridge.for_a_test")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.description = "Takes care of everything.\n\n    like this"
        parser.epilog = "    care --colour red"
        parser.add_argument("--colour", choices=["red", "blue"], default="red", help="the paint")
        parser.add_argument(
            "--part-of", type=int, default=7, metavar="N", help="%(default)s %% or N"
        )
        parser.add_argument("--hidden", help=argparse.SUPPRESS)
        parser.add_argument_group('the "last"').add_argument("--count", type=int, default=0)
        parts = parser.add_subparsers(dest="part", required=True)
        inner = parts.add_parser("wash", help="clean it")
        inner.add_argument("name", metavar="NAME", help="whom")
        inner.add_argument("--soap", action="store_true", help="with soap")

    vars(module)["add_arguments"] = add_arguments
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.OPERATOR_COMMANDS, "care", ("take care", ".for_a_test"))
    pages = man_pages.pages()
    page = pages["man1/qemu-vtpm-bridge-care.1"]
    assert "qemu\\-vtpm\\-bridge\\-care \\- take care" in page
    assert (
        subprocess.run(["mandoc", "-T", "lint"], input=page.encode(), check=False).returncode == 0
    )
    for words in (
        ".SH DESCRIPTION\nTakes care of everything.\n.PP\n.RS 4\n.nf\nlike this",
        "\\fB\\-\\-colour\\fR \\fIred|blue\\fR\nThe paint.\nDefault: red.",
        '.SS "wash"\n.B qemu\\-vtpm\\-bridge care wash\n[\\fIoptions\\fR]\n\\fINAME\\fR',
        "\\fB\\-\\-soap\\fR\nWith soap.",
        "\\fB\\-\\-part\\-of\\fR \\fIN\\fR\n7 % or N.\nDefault: 7.",
        '.SS "The \\(dqlast\\(dq"\n.TP\n\\fB\\-\\-count\\fR \\fICOUNT\\fR\nDefault: 0.',
        "\\fB\\-\\-log\\-level\\fR",
    ):
        assert words in page
    assert "hidden" not in page
    assert ".BR qemu\\-vtpm\\-bridge\\-care (1)" in pages["man1/qemu-vtpm-bridge.1"]
    assert '.SS "[care]"' in pages["man5/qemu-vtpm-bridge.toml.5"]


def test_a_note_about_an_option_that_is_gone_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = man_pages.NOTES.read_text()
    for changed in (
        f'{text}\n[demo.options]\nno-such-option = "X."\n',
        f'{text}\n[statuses]\nabout = "X."\n',
        text.replace("[demo]\n", '[demo]\ncalls = ["--no-such-option"]\n'),
    ):
        notes = tmp_path / "notes.toml"
        notes.write_text(changed)
        monkeypatch.setattr(man_pages, "NOTES", notes)
        with pytest.raises(man_pages.StaleNote, match=r"no-such-option|statuses"):
            man_pages.pages()


def test_a_command_with_two_ways_to_call_it_says_both() -> None:
    page = shown(man_pages.DIRECTORY / "man1/qemu-vtpm-bridge-run.1")
    for call in ("--socket SPEC [options]", "--device tis|crb --guest NAME|DOMID [options]"):
        assert f"qemu-vtpm-bridge run --backend DOMID|NAME {call}" in page


def test_a_program_of_its_own_has_a_page_that_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(man_pages, "scripts", lambda: ["qemu-vtpm-bridge-dm"])
    pages = man_pages.pages()
    page = pages["man1/qemu-vtpm-bridge-dm.1"]
    assert ".B qemu\\-vtpm\\-bridge\\-dm\n\\fIQEMU\\-WORD\\fR" in page
    assert ".BR qemu\\-vtpm\\-bridge\\-dm (1)" in pages["man1/qemu-vtpm-bridge.1"]
    monkeypatch.setattr(man_pages, "scripts", lambda: ["qemu-vtpm-bridge-new"])
    with pytest.raises(man_pages.StaleNote, match="qemu-vtpm-bridge-new"):
        man_pages.pages()


def test_each_program_that_is_installed_has_a_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(f"man1/{name}.1" in PAGES for name in project["scripts"])


@dataclasses.dataclass
class Guest:
    """A guest's table."""

    name: str
    backend: str
    """Who serves it."""
    handle: int = 0
    tpm: str = "2.0"
    words: tuple[str, ...] = ()


@dataclasses.dataclass
class Host:
    """The machine's table."""

    run_dir: Path = Path("/run/x")


def test_a_guests_file_s_page_is_made_of_its_classes() -> None:
    module: Any = types.SimpleNamespace(Guest=Guest, Host=Host, CHOICES={"tpm": ("2.0", "1.2")})
    notes = {"date": "2026-01-01", "guests": {"name": "which", "about": "A file.", "sections": []}}
    page = man_pages.guests_page(module, notes)
    for words in (
        "\\fBbackend\\fR = \\fITEXT\\fR\nWho serves it.\nRequired.",
        "\\fBhandle\\fR = \\fINUMBER\\fR\nAs \\fB\\-\\-handle\\fR of \\fBrun\\fR.\nDefault: 0.",
        "\\fBtpm\\fR = \\fI2.0|1.2\\fR\n",
        "\\fBwords\\fR = \\fI[TEXT, ...]\\fR\n",
        "\\fBrun\\-dir\\fR = \\fIPATH\\fR\nDefault: /run/x.",
    ):
        assert words in page
    assert "\\fBname\\fR" not in page


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One. Two.", ["One.", "Two."]),
        (".hidden request", ["\\&.hidden request"]),
        ("'quoted", ["\\&'quoted"]),
        ("a\\b", ["a\\eb"]),
        ("see --reset now", ["see \\fB\\-\\-reset\\fR now"]),
        ("`a-b 'c'`", ["\\fBa\\-b \\(aqc\\(aq\\fR"]),
        ("one\n\ntwo", ["one", ".PP", "two"]),
        ("    typed\n\nread", [".RS 4", ".nf", "typed", ".fi", ".RE", ".PP", "read"]),
        (
            "so:\n\n    .x\n\n      y\n\nend",
            ["so:", ".PP", ".RS 4", ".nf", "\\&.x", "", "  y", ".fi", ".RE", ".PP", "end"],
        ),
    ],
)
def test_text_becomes_roff(text: str, lines: list[str]) -> None:
    assert list(roff.body(text)) == lines
