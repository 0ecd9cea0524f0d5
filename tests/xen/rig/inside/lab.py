"""What the checks in dom0 share: a registry, processes, domains, waiting for facts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SITE = Path("/share/site")
LOGS = Path("/tmp/logs")
KEPT = Path("/host")
"""The machine's folder that outlives dom0."""
DEADLINE_S = 300.0
"""Of one fact. Under an emulator on a busy machine a second is nothing."""

Check = Callable[["Lab"], Any]


class Checks:
    """The checks of one program, in order."""

    def __init__(self) -> None:
        self._checks: list[tuple[str, Check]] = []
        self.unproven_names: set[str] = set()

    def __call__(self, check: Check) -> Check:
        """Add a check; it returns what JSON can hold, as what it found."""
        self._checks.append((check.__name__, check))
        return check

    def unproven(self, check: Check) -> Check:
        """Add a check that has not been seen to pass each time; it is run only when named."""
        self.unproven_names.add(check.__name__)
        return self(check)

    @property
    def names(self) -> list[str]:
        """Return the names, in order."""
        return [name for name, _ in self._checks]

    def run(self) -> int:
        """Run all of them, or those that the command line names; return the exit status."""
        proven = [name for name in self.names if name not in self.unproven_names]
        wanted = sys.argv[1:] or proven
        lab = Lab()
        failed = 0
        LOGS.mkdir(exist_ok=True)
        for name, check in self._checks:
            if name not in wanted:
                continue
            print(f"CHECK {name} begins", flush=True)
            began = time.monotonic()
            try:
                found = json.dumps(check(lab))
                word = "ok"
            except Exception as error:
                traceback.print_exc(file=sys.stdout)
                lab.show_logs()
                found, word = repr(error), "FAILED"
                failed += 1
            print(f"CHECK {name} {word} {time.monotonic() - began:.1f} s {found}", flush=True)
            if word == "FAILED" and "Triple fault" in run("xl", "dmesg", check=False):
                print("a virtual CPU triple-faulted: the rest is not tried", flush=True)
                break
        lab.end()
        return 1 if failed else 0


def params(checks: Checks) -> list[Any]:
    """Return pytest's parameters for a program's checks."""
    import pytest  # not in dom0

    unproven = checks.unproven_names
    return [
        pytest.param(name, marks=pytest.mark.unproven) if name in unproven else name
        for name in checks.names
    ]


class Lab:
    """The processes and domains of one run."""

    def __init__(self) -> None:
        self.processes: list[Program] = []
        self.domains: set[str] = set()
        self.kept: dict[str, Any] = {}
        """What one check leaves for the next ones."""

    def program(self, name: str, *words: str, environment: dict[str, str] | None = None) -> Program:
        """Start `qemu-vtpm-bridge WORDS...` in the background."""
        return self.program_of(name, *OURS, *words, environment=environment)

    def program_of(
        self, name: str, *words: str, environment: dict[str, str] | None = None
    ) -> Program:
        """Start a program in the background."""
        program = Program(name, list(words), environment or {})
        self.processes.append(program)
        return program

    def domain(self, name: str, job: str, *config: str, files: tuple[Path, ...] = ()) -> int:
        """Start a Linux guest that runs the shell text `job` beside our package and `files`."""
        folder = Path(f"/tmp/job.{name}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "job").write_text(f"export PYTHONPATH=$PWD:$PWD/site\n{job}\n")
        shutil.copytree(SITE, folder / "site")
        for path in files:
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, folder / path.name)
        domid = int(run("domu", "start", name, str(folder), *config).split()[-1])
        self.domains.add(name)
        return domid

    def destroy(self, name: str) -> None:
        """Destroy a domain, as a power cut does."""
        run("xl", "destroy", name)
        self.domains.discard(name)

    def show_logs(self) -> None:
        """Print the end of every log."""
        others = (
            Path("/tmp").glob("guest-*.log"),
            Path("/var/log/qemu-vtpm-bridge").glob("*.log"),
            Path("/var/log/xen").glob("*.log"),
        )
        for path in [*sorted(LOGS.glob("*.log")), *(path for each in others for path in each)]:
            print(f"--- {path}")
            print("\n".join(path.read_text(errors="replace").splitlines()[-25:]))
        print("--- domains")
        print(run("xl", "list", check=False), run("xl", "vcpu-list", check=False))
        print("--- xenstore")
        print(
            "\n".join(
                line
                for line in run("xenstore-ls", "-fp").splitlines()
                if "vtpm" in line or "/data/log" in line
            )
        )

    def end(self) -> None:
        """End what still runs."""
        for program in self.processes:
            program.kill()
        for name in list(self.domains):
            subprocess.run(["xl", "destroy", name], check=False, capture_output=True)
        if KEPT.is_dir():
            shutil.copytree(LOGS, KEPT / "logs", dirs_exist_ok=True)


OURS = (sys.executable, "-m", "qemu_vtpm_bridge")

PROGRAM = Path("/usr/local/bin/qemu-vtpm-bridge")
PROGRAM_TEXT = f"""#!/bin/sh
export PYTHONPATH={os.environ.get("PYTHONPATH", "")}
export PYTHONPYCACHEPREFIX={sys.pycache_prefix or ""}
exec {sys.executable} -m qemu_vtpm_bridge "$@"
"""
"""What an installation has there; here the package is in no usual place."""


def install_program() -> None:
    """Put the program where shells, libvirtd and systemd look."""
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    PROGRAM.write_text(PROGRAM_TEXT)
    PROGRAM.chmod(0o755)


class Program:
    """One process of ours, its output in a log."""

    def __init__(self, name: str, words: list[str], environment: dict[str, str]) -> None:
        self.name = name
        self.log = LOGS / f"{name}.log"
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End it as nobody wants to be ended, with what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        """Ask it to end; return its status."""
        self.process.terminate()
        return self.process.wait(DEADLINE_S)

    def said(self, text: str) -> bool:
        """Return whether its log has this text; raises AssertionError once it has ended."""
        found = text in self.log.read_text(errors="replace")
        assert found or self.process.poll() is None, f"{self.name} ended: {self.log.read_text()}"
        return found


def run(*words: str, check: bool = True, deadline_s: float = DEADLINE_S) -> str:
    """Run a command and return its standard output; raises AssertionError where it fails."""
    done = subprocess.run(words, check=False, text=True, capture_output=True, timeout=deadline_s)
    if done.returncode and check:
        raise AssertionError(f"{' '.join(words)}: {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def ours(*words: str) -> str:
    """Run `qemu-vtpm-bridge WORDS...` and return its standard output."""
    return run(*OURS, *words)


def refused(*words: str) -> str:
    """Run `qemu-vtpm-bridge WORDS...`, which has to fail, and return what it complained."""
    done = subprocess.run(
        [*OURS, *words], check=False, text=True, capture_output=True, timeout=DEADLINE_S
    )
    assert done.returncode in (1, 2), (words, done)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def until(
    fact: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S, pace_s: float = 0.1
) -> Any:
    """Return what `fact` returns once it is true; looks every `pace_s`.

    A look that starts programs takes much of dom0's processor, which the vTPM domain needs.
    """
    end = time.monotonic() + deadline_s
    while True:
        value = fact()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline_s:.0f} s")
        time.sleep(pace_s)


def status(socket_path: str) -> dict[str, Any]:
    """Return a running program's status document, empty while it has none.

    Asked here and not by `qemu-vtpm-bridge status`: a Python that starts for each look would
    take the emulated CPUs from whom is waited for.
    """
    raw = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE_S)
        try:
            client.connect(socket_path)
            while chunk := client.recv(65536):
                raw += chunk
        except OSError:
            return {}
    return dict(json.loads(raw)) if raw else {}


def running(socket_path: str) -> bool:
    """Return whether a bridge's frontend is connected."""
    return bool(status(socket_path).get("frontend", {}).get("state") == "RUNNING")


def xenstore(path: str) -> str:
    """Return a node's value, empty where there is none."""
    return run("xenstore-read", path, check=False).strip()
