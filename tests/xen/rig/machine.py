"""The rig's side on this machine: what has to be built, kept and booted.

    rig = Rig(BOOKWORM, say=print)
    boot = rig.boot("dom0", memory_mib=2048)

Theory of operation.  Images of a Debian dom0 with Xen, and a QEMU with TPM devices, are
built by the scripts beside this file and kept in a cache folder outside the tree; each is
built anew when its script or its inputs changed.  A boot runs one Python program in dom0
(`tests.xen.rig.inside.NAME`), which prints a line for each check; `Boot` has them, and
what was printed goes on to `say` as it comes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
REQUIREMENTS = ("cffi>=1.17", "construct>=2.10.70", "pyxs>=0.4.1", "trio>=0.27")
CHECK_LINE = re.compile(r"^CHECK (\S+) (begins|ok|FAILED)(?: (\S+) s)?(?: (.*))?$")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Release:
    """A Debian release for dom0."""

    suite: str
    xen: str
    python: str
    packages: str


BOOKWORM = Release("bookworm", "4.17", "3.11", "tpm2-tools libtss2-tcti-swtpm0")
TRIXIE = Release(
    "trixie",
    "4.20",
    "3.13",
    "tpm2-tools libtss2-tcti-swtpm0t64 libvirt-daemon libvirt-daemon-driver-xen libvirt-clients "
    "systemd",
)


@dataclass
class Outcome:
    """What a check said."""

    passed: bool
    seconds: float
    detail: str


@dataclass
class Boot:
    """What a boot of the rig printed, and what its checks said."""

    status: int
    seconds: float
    lines: list[str] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)

    def result(self, check: str) -> Any:
        """Return what a check found; raises AssertionError where it failed or never ran."""
        outcome = self.outcomes.get(check)
        tail = "\n".join(self.lines[-60:])
        if outcome is None:
            word = "did not end" if check in self.begun else "did not run"
            raise AssertionError(
                f"{check} {word}; status {self.status}; the rig's last lines:\n{tail}"
            )
        if not outcome.passed:
            about = "\n".join(self.lines_of(check))
            raise AssertionError(f"{check}: {outcome.detail}\n{about}")
        return json.loads(outcome.detail) if outcome.detail else None

    def lines_of(self, check: str) -> list[str]:
        """Return what was printed while a check ran."""
        lines, inside = [], False
        for line in self.lines:
            match = CHECK_LINE.match(line)
            if match and match[1] == check:
                inside = match[2] == "begins"
            elif inside:
                lines.append(line)
        return lines


def cache_dir() -> Path:
    """Return the folder where built things are kept: $QVB_RIG_CACHE, or the user's cache."""
    chosen = os.environ.get("QVB_RIG_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "qemu-vtpm-bridge"


class Rig:
    """The rig with one release's dom0."""

    def __init__(self, release: Release, *, say: Say) -> None:
        self.release = release
        self.say = say
        self._cache = cache_dir()
        self._cache.mkdir(parents=True, exist_ok=True)

    # What is built.

    def image(self) -> Path:
        """Return the folder of the dom0 image, building it where needed (under a minute)."""
        folder = self._cache / f"xen-{self.release.xen}"
        with self._locked(folder):
            self._build(
                f"dom0 image, Debian {self.release.suite} with Xen {self.release.xen}",
                [str(HERE / "build-image.sh"), str(folder)],
                {
                    "SOURCES": str(self._sources(self.release.suite)),
                    "XENVER": self.release.xen,
                    "EXTRA_PACKAGES": self.release.packages,
                },
            )
        return folder

    def device_model(self) -> Path:
        """Return a QEMU for dom0 that has TPM devices, building it where needed (5 minutes)."""
        return self._made(
            f"qemu-{self.release.suite}",
            f"QEMU with TPM devices for {self.release.suite}, some minutes",
            HERE / "build-dm.sh",
            self._sources(self.release.suite, with_source=True),
        )

    def ovmf(self) -> Path:
        """Return OVMF as it is built for Xen, building it where needed (2 to 3 minutes)."""
        return self._made(
            f"ovmf-{self.release.suite}",
            f"OVMF for Xen from {self.release.suite}'s source, some minutes",
            HERE / "build-ovmf.sh",
            self._sources(self.release.suite, with_source=True),
        )

    def slow_clock(self, folder: Path) -> Path:
        """Build the library in `folder` that makes xl's deadlines longer; return it."""
        library = folder / "slow_clock.so"
        words = ("-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror")
        subprocess.run(["gcc", *words, "-o", str(library), str(HERE / "slow_clock.c")], check=True)
        return library

    def machine(self) -> Path:
        """Return the QEMU that the rig is, unpacking it where needed (10 s)."""
        return self._made(
            "machine",
            "the QEMU that is the machine",
            HERE / "build-qemu.sh",
            self._sources(TRIXIE.suite),
        )

    def _made(self, name: str, what: str, script: Path, sources: Path) -> Path:
        """Return what `script` makes of `sources`, made anew when either has changed."""
        key = hashlib.sha256(script.read_bytes() + sources.read_bytes()).hexdigest()[:16]
        built = self._cache / f"{name}-{key}"
        with self._locked(built):
            if not built.exists():
                with tempfile.TemporaryDirectory(prefix="qvb-made", dir=self._cache) as work:
                    made = Path(work) / "made"
                    self._build(what, [str(script), work, str(sources), str(made)], {})
                    made.rename(built)
        return built

    def _sources(self, suite: str, *, with_source: bool = False) -> Path:
        """Write a sources.list of the suite, from the mirror that this machine uses."""
        found = subprocess.run(
            ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        mirrors = [uri for uri in found if "security" not in uri]
        if not mirrors:
            raise RuntimeError("apt knows no mirror; run `apt-get update` first")
        signed = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
        place = f"{signed} {mirrors[0].rstrip('/')} {suite} main\n"
        path = self._cache / f"{suite}{'-src' if with_source else ''}.list"
        path.write_text(f"deb {place}" + (f"deb-src {place}" if with_source else ""))
        return path

    def _build(self, what: str, command: list[str], environment: dict[str, str]) -> None:
        began = time.monotonic()
        log = self._cache / "build.log"
        with log.open("w") as out:
            status = subprocess.run(
                ["bash", *command],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        seconds = time.monotonic() - began
        if status:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"{what}: {command[0]} failed ({status}), see {log}:\n{tail}")
        if seconds > 3:
            self.say(f"built {what}: {seconds:.0f} s")

    @contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        with folder.with_suffix(folder.suffix + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # What dom0 sees as /share.

    def stage(self, folder: Path) -> None:
        """Lay out this package, its dependencies for dom0's Python, and the tests."""
        site = folder / "site"
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        wheels = folder / "wheel"
        subprocess.run(
            [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(ROOT)],
            check=True,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        (wheel,) = wheels.glob("*.whl")
        subprocess.run(
            [*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True
        )
        if not (dependencies := self._dependencies()).exists():
            raise RuntimeError("no dependencies")
        shutil.copytree(dependencies, site, dirs_exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.gz")
        shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)

    def _dependencies(self) -> Path:
        """Return a folder with what the package needs, for dom0's Python."""
        key = hashlib.sha256(" ".join(REQUIREMENTS).encode()).hexdigest()[:16]
        folder = self._cache / f"python-{self.release.python}-{key}"
        with self._locked(folder):
            if not folder.exists():
                with tempfile.TemporaryDirectory(prefix="qvb-pip", dir=self._cache) as work:
                    platforms = ("manylinux2014_x86_64", "manylinux_2_17_x86_64")
                    subprocess.run(
                        [
                            *(sys.executable, "-m", "pip", "--quiet", "install"),
                            *("--target", f"{work}/site", "--only-binary=:all:"),
                            *("--implementation", "cp", "--python-version", self.release.python),
                            *(word for name in platforms for word in ("--platform", name)),
                            *REQUIREMENTS,
                        ],
                        check=True,
                        stderr=subprocess.DEVNULL,
                    )
                    Path(work, "site").rename(folder)
        return folder

    # Booting.

    def boot(
        self,
        program: str,
        *checks: str,
        memory_mib: int = 2048,
        timeout_s: int = 1200,
        files: dict[str, Path] | None = None,
        keep: Path | None = None,
        options: Sequence[str] = (),
    ) -> Boot:
        """Boot, run `tests.xen.rig.inside.PROGRAM` in dom0, and return what it said.

        `checks` are the ones to run, all if none is named.  `files` are laid into /share
        under their names; `keep` is a folder for the console and what dom0 leaves in /host;
        `options` are more of boot.sh's.
        """
        image = self.image()
        with tempfile.TemporaryDirectory(prefix="qvb-rig") as temporary:
            share = Path(temporary) / "share"
            self.stage(share)
            for name, path in (files or {}).items():
                (share / name).parent.mkdir(exist_ok=True)
                shutil.copy2(path, share / name)
            work = keep or Path(temporary) / "work"
            work.mkdir(parents=True, exist_ok=True)
            self.say(f"Xen {self.release.xen}, {program}: booting")
            return self._run(
                [
                    *("-m", str(memory_mib), "-t", str(timeout_s)),
                    *("-s", str(share), "-w", str(work), *options),
                ],
                image,
                # Compiled once: under an emulator that takes longer than what follows it.
                "cd /share && PYTHONPATH=/share:/share/site PYTHONPYCACHEPREFIX=/tmp/pycache "
                f"exec python3 -u -m tests.xen.rig.inside.{' '.join([program, *checks])}",
            )

    def _run(self, options: list[str], image: Path, job: str) -> Boot:
        began = time.monotonic()
        boot = Boot(-1, 0.0)
        with subprocess.Popen(
            ["bash", str(HERE / "boot.sh"), *options, str(image), job],
            env=os.environ | {"QEMU": str(self.machine() / "qemu")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            assert process.stdout is not None
            for raw in process.stdout:
                self._take(boot, raw.rstrip("\n"), time.monotonic() - began)
        boot.status = process.returncode
        boot.seconds = time.monotonic() - began
        self.say(f"Xen {self.release.xen}: status {boot.status} after {boot.seconds:.0f} s")
        return boot

    def _take(self, boot: Boot, line: str, at_s: float) -> None:
        boot.lines.append(line)
        match = CHECK_LINE.match(line)
        if match is None:
            return
        name, word, seconds, detail = match.groups()
        if word == "begins":
            boot.begun.add(name)
            return
        boot.outcomes[name] = Outcome(word == "ok", float(seconds or 0), detail or "")
        self.say(f"  [{at_s:4.0f} s] {name}: {word}, {seconds} s")
