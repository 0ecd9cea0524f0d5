"""The guides on the embedded Xen, followed line by line: their commands run, their outputs come.

What begins with `$ ` is a command and what stands below it its output; a line `...` stands
for any lines.  An indented block without a command is what the bridge's log says meanwhile;
what depends on the moment stands in fenced blocks, and is not looked for.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import pytest

from tools.source_text import ROOT

GUIDES = ROOT / "docs/guides"
PROGRAM = "qemu-vtpm-bridge"
BACKGROUND = ("embedded-xen", "vtpm", "run")
PROMPT = "(qemu) "
UP = {
    "embedded-xen": ["Ctrl-C ends it."],
    "run": ["WAIT_CONNECTED -> RUNNING (BACKEND_CONNECTED)"],
}
"""What says that a program is up, where the guide shows nothing of it."""
RANDOM = re.compile("[0-9a-f]{16}")
TIME = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ ")
WAIT_S = 120

pytestmark = pytest.mark.timeout(300)


@dataclass
class Step:
    """A command and what the guide shows of its output; no command stands for a log."""

    section: str
    command: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        return self.command.split()

    @property
    def stays(self) -> str:
        """The name of a command of ours that runs on, or ""."""
        words = self.words
        return words[1] if words[:1] == [PROGRAM] and words[1] in BACKGROUND else ""


def steps(text: str) -> Iterator[Step]:
    """Yield what the guide does, in its order.  A blank line ends a step."""
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        section, *lines = part.splitlines()
        step = Step(section)
        for line in [*lines, ""]:
            if step.command.endswith("\\"):
                step.command = step.command[:-1] + line.strip()
            elif line.startswith("    ") and not line.startswith("    $ "):
                step.lines.append(line[4:])
            else:
                if step.command or step.lines:
                    yield step
                step = Step(section, line[6:] if line.startswith("    $ ") else "")


def pattern(lines: list[str]) -> re.Pattern[str]:
    """Return what an output has to look like; blanks and random bytes may be others."""
    parts = []
    for line in lines:
        if line.strip() == "...":
            parts.append(r"(?:.*\n)*?")
        elif RANDOM.fullmatch(line):
            parts.append(RANDOM.pattern + r"\s*")
        else:
            parts.append(r"\s*" + r"\s+".join(map(re.escape, line.split())) + r"\s*?(?:\n|$)")
    return re.compile("".join(parts))


def guide(name: str) -> list[Step]:
    """Return a guide's steps."""
    return list(steps((GUIDES / name).read_text(encoding="utf-8")))


class Terminal:
    """A program that stays; its lines are kept, and can be waited for."""

    def __init__(self, command: str, stack: ExitStack) -> None:
        self.lines: list[str] = []
        self.seen = 0
        self._more = threading.Condition()
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        reader = threading.Thread(target=self._read)
        reader.start()
        stack.enter_context(self.process)
        stack.callback(reader.join)
        stack.callback(self.process.kill)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._more:
                self.lines.append(TIME.sub("", line))
                self._more.notify_all()

    def expect(self, wanted: list[str]) -> None:
        """Return once the lines have come, in their order, after those that came before."""
        for line in wanted:
            with self._more:
                assert self._more.wait_for(lambda line=line: self._find(line), WAIT_S), line

    def _find(self, wanted: str) -> bool:
        for number, line in enumerate(self.lines[self.seen :], self.seen):
            if line.split()[-len(wanted.split()) :] == wanted.split():
                self.seen = number + 1
                return True
        return False

    def stop(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(WAIT_S)


class Follower:
    """Goes through the guide, with a directory and ports of its own."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="qvb"))
        port = two_free_ports()
        self._names = {
            "/tmp/xen": f"{place}/xen",
            "2321": str(port),
            "2322": str(port + 1),
            f"{PROGRAM} ": f"{sys.executable} -m qemu_vtpm_bridge ",
        }
        self._exported: dict[str, str] = {}
        self._terminals: dict[str, Terminal] = {}
        self._vtpm: Step | None = None

    def _here(self, text: str) -> str:
        for name, ours in self._names.items():
            text = text.replace(name, ours)
        return text

    def follow(self, step: Step) -> None:
        """Do one step, and see that what the guide shows comes."""
        if not step.command:
            self._terminals["run"].expect(step.lines)
        elif step.stays:
            self._start(step)
        elif step.command.startswith("qemu-system"):
            self._machine(step)
        elif step.command.startswith("export "):
            name, _, value = step.command.removeprefix("export ").partition("=")
            self._exported[name] = self._here(value)
        else:
            said = self._run(step.command)
            assert pattern(step.lines).search(said), f"{step.command}: {said}"

    def _run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", self._here(command)],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
            env=os.environ | self._exported,
        )
        return (done.stdout + done.stderr).replace(self._names["/tmp/xen"], "/tmp/xen")

    def _start(self, step: Step) -> None:
        if step.stays in self._terminals:
            self._terminals[step.stays].stop()
        terminal = Terminal(self._here(step.command), self._stack)
        self._terminals[step.stays] = terminal
        if step.stays == "vtpm":
            self._vtpm = step
        lines = [self._here(line) for line in step.lines if not line.startswith("...")]
        lines = lines or UP.get(step.stays, [])
        terminal.expect([line for line in lines if PROGRAM not in line])

    def _machine(self, step: Step) -> None:
        """Let the firmware measure itself, then say what the guide says at the monitor."""
        qemu = Terminal(self._here(step.command), self._stack)
        while '"TPM2_PCR_Extend": 14' not in self._run(f"{PROGRAM} status /tmp/xen/status"):
            assert qemu.process.poll() is None, qemu.lines
        assert qemu.process.stdin is not None
        for line in step.lines:
            if line.startswith(PROMPT):
                qemu.process.stdin.write(line.removeprefix(PROMPT) + "\n")
        qemu.process.stdin.flush()
        qemu.expect([line for line in step.lines if not line.startswith(PROMPT)])
        assert qemu.process.wait(WAIT_S) == 0

    def die_while(self, step: Step) -> None:
        """Kill the vTPM domain, do a step that waits for it, and start it again."""
        assert self._vtpm is not None
        dead = self._terminals.pop("vtpm").process
        dead.kill()
        dead.wait(WAIT_S)
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.follow, step)
            while '"in-flight": true' not in self._run(f"{PROGRAM} status /tmp/xen/status"):
                assert not following.done(), following.result()
            self._start(Step(step.section, self._vtpm.command))
            following.result(WAIT_S)

    def stop_bridge(self) -> None:
        """End the bridge with Ctrl-C."""
        self._terminals.pop("run").stop()


def two_free_ports() -> int:
    """Return a port that is free, as is the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


def test_the_guide_without_xen_is_true() -> None:
    done: list[Step] = []
    with ExitStack() as stack:
        follower = Follower(stack)
        for step in guide("without-xen.md"):
            first = not done or done[-1].section != step.section
            if first and step.section in ("Tools in QEMU's place", "The end"):
                follower.stop_bridge()
            if first and step.section == "When the vTPM domain dies":
                follower.die_while(step)
            else:
                follower.follow(step)
            done.append(step)
    assert len(done) > 20


def test_the_guide_to_stub_domains_tells_what_was_tried() -> None:
    tried = [step for step in guide("stub-domain.md") if step.section.startswith("What was tried")]
    assert len(tried) > 15
    with ExitStack() as stack:
        follower = Follower(stack)
        for step in tried:
            follower.follow(step)


def test_a_guide_is_understood() -> None:
    text = """\
## One

    $ list \\
        more
    out  /a
    ...
    last

Words.

    $ first
    $ second

    INFO log

## Two

    0123456789abcdef
"""
    found = list(steps(text))
    assert [(step.section, step.command, step.lines) for step in found] == [
        ("One", "list more", ["out  /a", "...", "last"]),
        ("One", "first", []),
        ("One", "second", []),
        ("One", "", ["INFO log"]),
        ("Two", "", ["0123456789abcdef"]),
    ]
    wanted = pattern(found[0].lines)
    assert wanted.search("out /a\nx\ny\nlast\n")
    assert not wanted.search("out /b\nx\ny\nlast\n")
    assert not wanted.search("out /a\nx\ny\n")
    assert pattern(found[4].lines).search("fedcba9876543210")
