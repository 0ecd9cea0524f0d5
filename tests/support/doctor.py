"""The doctor as people run it, and its patients."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from qemu_vtpm_bridge.embedded.world import World

DEADLINE_S = 110
PROGRAMS = Path(sys.executable).parent

Document = dict[str, Any]


def environment(**changes: str) -> dict[str, str]:
    """Return an environment in which this package's command is found, and no XenStore."""
    inherited = {name: value for name, value in os.environ.items() if name != "XENSTORED_PATH"}
    return inherited | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"} | changes


async def run_doctor(*words: str | Path, **changes: str) -> tuple[int, str]:
    """Run the program; return its exit status and what it printed."""
    with trio.fail_after(DEADLINE_S):
        done = await trio.run_process(
            [sys.executable, "-m", "qemu_vtpm_bridge", "doctor", *words],
            env=environment(**changes),
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    assert done.stderr == b"", done.stderr.decode()
    return done.returncode, done.stdout.decode()


async def examined(*words: str | Path, **changes: str) -> tuple[int, Document]:
    """Run the program; return its exit status and its document."""
    status, out = await run_doctor("--json", *words, **changes)
    return status, json.loads(out)


def findings(document: Document, check: str) -> list[Document]:
    """Return a check's findings."""
    return [finding for finding in document["findings"] if finding["check"] == check]


def verdicts(document: Document, check: str) -> list[str]:
    return [finding["verdict"] for finding in findings(document, check)]


def grave(document: Document) -> list[Document]:
    """Return the problems."""
    return [finding for finding in document["findings"] if finding["verdict"] == "problem"]


async def mend(finding: Document) -> None:
    """Do what the doctor printed, all of it, by a shell."""
    commands = [step["command"] for step in finding["mend"] if step["command"]]
    assert commands, finding
    for command in commands:
        with trio.fail_after(DEADLINE_S):
            await trio.run_process(
                ["bash", "-c", command], env=environment(), capture_stdout=True, check=True
            )


@asynccontextmanager
async def started(command: str) -> AsyncIterator[trio.Process]:
    """Run a printed command that goes on running; it is killed in the end."""
    words: Sequence[str] = shlex.split(command)
    process = await trio.lowlevel.open_process(words, env=environment(), stderr=-3)
    try:
        yield process
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


class Clinic:
    """An embedded Xen and a run directory, at which the doctor looks."""

    def __init__(self, world: World, run_dir: Path) -> None:
        self.world = world
        self.run_dir = run_dir

    @property
    def place(self) -> list[str | Path]:
        return ["--embedded", self.world.directory, "--run-dir", self.run_dir]

    async def doctor(self, *words: str | Path) -> tuple[int, Document]:
        return await examined(*self.place, *words)

    async def finding(self, check: str, *words: str | Path) -> Document:
        """Return the one finding of a check that is not fine; the gravest comes first."""
        _, document = await self.doctor(*words)
        found = [f for f in findings(document, check) if f["verdict"] in ("problem", "warning")]
        assert len(found) == 1, found
        return found[0]
