"""The doctor's checks of the programs at both ends: QEMU's device models, and swtpm.

Theory of operation.  A program is asked for what it can do, as `qemu -tpmdev help`; none of
these questions starts a machine or touches a file.  `ask` bounds the answer in time and
size, and ends the program with all that it started, so a wrapper that hangs costs some
seconds and nothing more.  Programs are looked for where distributions put Xen's device
models, and in PATH.

Who may lie: nobody, since these are programs that root runs anyway; they may be broken.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from .device_model import usual_device_models
from .doctor_host import Case, Role, left_behind
from .doctor_report import Finding, Mend, Verdict, shell
from .guests import USER

ASK_DEADLINE_S: Final = 20.0
"""Much more than any needs, also on a machine that is busy; what takes it is hung."""

ANSWER_MAX_BYTES: Final = 1 << 20
END_DEADLINE_S: Final = 2.0

_IN_PATH: Final = ("qemu-system-x86_64", "qemu-system-i386")
_PATH: Final = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
_SYSUSERS: Final = ("/etc", "/usr/local/lib", "/usr/lib")
_FRONT_ENDS: Final = ("tpm-crb", "tpm-tis", "vfio-user-pci")
_DEVICE_NAME: Final = re.compile(r'^name "([a-z0-9-]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program said."""

    text: str
    failure: str = ""
    """Why there is no answer; empty where there is one, whatever its exit status."""


async def ask(*command: str | Path) -> Answer:
    """Run a program; return what it wrote to both its outputs.

    It has ASK_DEADLINE_S and ANSWER_MAX_BYTES; then it is killed with its process group.
    Cancelling kills it too.
    """
    try:
        process = await trio.lowlevel.open_process(
            [os.fspath(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Answer("", f"it cannot be run: {error.strerror}")
    raw = bytearray()
    failure = ""
    assert process.stdout is not None
    try:
        with trio.move_on_after(ASK_DEADLINE_S) as scope:
            while len(raw) < ANSWER_MAX_BYTES and (more := await process.stdout.receive_some()):
                raw += more
        if scope.cancelled_caught:
            failure = f"no answer within {ASK_DEADLINE_S:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with trio.CancelScope(shield=True), trio.move_on_after(END_DEADLINE_S):
            await process.wait()
        await trio.aclose_forcefully(process.stdout)
    return Answer(raw.decode("utf-8", "backslashreplace"), failure)


# QEMU.


@dataclass(slots=True)
class Model:
    """One QEMU."""

    path: str
    failure: str = ""
    version: str = ""
    emulator: bool = False
    """It has `-tpmdev emulator`."""
    front_ends: list[str] = field(default_factory=list)
    xen: bool = False
    """It can run Xen's guests."""

    @property
    def has_tpm(self) -> bool:
        """Whether it can be given the bridge's TPM as its own device."""
        return self.emulator and bool({"tpm-crb", "tpm-tis"} & set(self.front_ends))

    def facts(self) -> dict[str, Any]:
        """Return what is known, for JSON."""
        return {
            "path": self.path,
            "failure": self.failure or None,
            "version": self.version or None,
            "tpmdev-emulator": self.emulator,
            "front-ends": self.front_ends,
            "xen": self.xen,
        }


def device_models(case: Case) -> list[str]:
    """Return the QEMUs of this host, those given first, each once."""
    host = case.host
    names = [f"{directory}/{name}" for name in _IN_PATH for directory in _PATH]
    places = [
        *usual_device_models(host.path("/")),
        *(host.path(name) for name in names if host.exists(name)),
    ]
    found: dict[str, str] = {}
    for path in [*case.qemu, *places]:
        found.setdefault(os.path.realpath(path), str(path))
    return list(found.values())


async def _examine(path: str) -> Model:
    model = Model(path)
    version = await ask(path, "--version")
    model.failure = version.failure
    if model.failure:
        return model
    model.version = version.text.partition("\n")[0].strip()
    if "QEMU" not in model.version:
        model.failure = "it does not say that it is QEMU"
        return model
    said = {}
    for option in ("-tpmdev", "-device", "-accel"):
        answer = await ask(path, option, "help")
        if answer.failure:
            model.failure = answer.failure
            return model
        said[option] = answer.text
    model.emulator = re.search(r"^ *emulator\b", said["-tpmdev"], re.MULTILINE) is not None
    there = set(_DEVICE_NAME.findall(said["-device"]))
    model.front_ends = [name for name in _FRONT_ENDS if name in there]
    model.xen = "xen" in said["-accel"].split()
    return model


async def check_qemu(case: Case) -> list[Finding]:
    """Ask each QEMU for its TPM devices."""
    if case.role is Role.VTPM:
        return [Finding("qemu", Verdict.NOT_APPLICABLE, "a vTPM domain needs no QEMU")]
    models = [await _examine(path) for path in await left_behind(device_models, case)]
    for_xen = case.real_xen
    if not models:
        verdict = Verdict.PROBLEM if for_xen else Verdict.WARNING
        step = Mend("install QEMU (Debian)", "apt-get install qemu-system-x86")
        return [Finding("qemu", verdict, "no QEMU was found", {}, (step,))]
    usable = [model for model in models if model.has_tpm and model.xen]
    if not for_xen:
        usable = [model for model in models if model.has_tpm]
    return [_judge(model, usable, for_xen=for_xen) for model in models]


def _judge(model: Model, usable: list[Model], *, for_xen: bool) -> Finding:
    """Return what is to be said of one QEMU; `usable` are those that would do here."""
    facts = model.facts()
    if model.failure:
        words, verdict = model.failure, Verdict.WARNING
        steps: tuple[Mend, ...] = (
            Mend(f"see what is wrong with {model.path}", shell(model.path, "--version")),
        )
    elif for_xen and not model.xen:
        words, verdict, steps = "cannot run Xen's guests", Verdict.NOT_APPLICABLE, ()
    elif model.has_tpm:
        devices = [name for name in model.front_ends if name.startswith("tpm-")]
        words = f"has {', '.join(devices)} with -tpmdev emulator"
        verdict, steps = Verdict.OK, ()
    else:
        words = "has no TPM code"
        verdict, steps = _without_tpm(usable, for_xen=for_xen)
    if "vfio-user-pci" in model.front_ends:
        words += "; takes a device over vfio-user (`qemu-vtpm-bridge device`)"
    summary = f"{model.path}: {words}"
    return Finding("qemu", verdict, summary, facts, steps, subject=model.path)


def _without_tpm(usable: list[Model], *, for_xen: bool) -> tuple[Verdict, tuple[Mend, ...]]:
    """Return what a QEMU without TPM code means, and what to use instead."""
    if not for_xen:
        step = Mend("install one that has (Debian)", "apt-get install qemu-system-x86")
        return (Verdict.NOT_APPLICABLE, ()) if usable else (Verdict.WARNING, (step,))
    if usable:
        line = f'device_model_override="{usable[0].path}"'
        step = Mend("name the one that has in the xl.cfg of guests with a TPM", line=line)
        return Verdict.WARNING, (step,)
    step = Mend(
        "have the bridge be the guest's TPM (`qemu-vtpm-bridge run --device crb --guest NAME`), "
        "or build QEMU with --enable-tpm"
    )
    return Verdict.WARNING, (step,)


# swtpm.


async def check_swtpm(case: Case) -> list[Finding]:
    """Ask swtpm for the TPM families that it has."""
    if case.role is Role.DOM0 and case.embedded is None:
        return [Finding("swtpm", Verdict.NOT_APPLICABLE, "needed in the vTPM domain only")]
    lacking = Verdict.PROBLEM if case.role is Role.VTPM else Verdict.WARNING
    path = next(
        (name for name in (f"{top}/swtpm" for top in _PATH) if case.host.exists(name)), None
    )
    if path is None:
        step = Mend("install swtpm (Debian)", "apt-get install swtpm")
        return [Finding("swtpm", lacking, "swtpm is not installed", {"path": None}, (step,))]
    answer = await ask(case.host.path(path), "socket", "--print-capabilities")
    features = _features(answer.text)
    families = [name.removeprefix("tpm-") for name in ("tpm-2.0", "tpm-1.2") if name in features]
    facts = {"path": path, "families": families, "failure": answer.failure or None}
    if not families:
        words = answer.failure or "does not say which TPMs it has"
        step = Mend("see what is wrong with it", shell(path, "socket", "--print-capabilities"))
        return [Finding("swtpm", lacking, f"{path}: {words}", facts, (step,))]
    return [Finding("swtpm", Verdict.OK, f"{path} is a TPM {' or '.join(families)}", facts)]


# Whom they become.


def check_user(case: Case) -> list[Finding]:
    """Look for the user that our programs become where nobody names another one."""
    entries = (case.host.read("/etc/passwd") or "").splitlines()
    if any(entry.startswith(f"{USER}:") for entry in entries):
        summary = f"bridges that a toolstack starts become the user {USER}"
        return [Finding("user", Verdict.OK, summary, {"user": USER})]
    summary = f"there is no user {USER}: bridges that a toolstack starts stay root"
    if not case.on_xen:
        return [Finding("user", Verdict.NOT_APPLICABLE, summary, {"user": None})]
    if any(case.host.exists(f"{top}/sysusers.d/{USER}.conf") for top in _SYSUSERS):
        step = Mend("make the user that the package describes", "systemd-sysusers")
    else:
        words = ("useradd", "--system", "--no-create-home", "--shell=/usr/sbin/nologin", USER)
        step = Mend("make the user", shell(*words))
    return [Finding("user", Verdict.WARNING, summary, {"user": None}, (step,))]


def _features(text: str) -> list[str]:
    with suppress(ValueError, KeyError, TypeError):
        return [str(feature) for feature in json.loads(text)["features"]]
    return []
