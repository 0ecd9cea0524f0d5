"""The doctor's checks of the sockets in the run directory, and of who answers there.

Theory of operation.  QEMU's socket must not be connected to: a bridge would take the
connection for QEMU's, and its end for QEMU's end.  Whether somebody holds it is learned by
connecting with a socket of another type, which the kernel refuses with EPROTOTYPE where
somebody does and with ECONNREFUSED where nobody does; the holder notices nothing.  A status
socket is made to be connected to; what it says is bounded in time and size and checked.

Which is which is told by the name's end: `.sock` and `.status`, as the guides have it.

Who may lie: whoever may write the directory, by names, links and answers.

Source: unix_find_other() in Linux' net/unix/af_unix.c.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import trio

from ..errors import XenError
from ..xen.xenbus import parse_backend_path
from .doctor_devices import device_words, mode_of, run_bridge, run_vtpm
from .doctor_host import Case, Role, left_behind, names_in
from .doctor_report import Finding, Mend, Verdict, shell

SOCKETS_MAX: Final = 64
ANSWER_DEADLINE_S: Final = 6.0
"""A little more than a bridge gives a reader."""
ANSWER_MAX_BYTES: Final = 1 << 20

_WAITING: Final = {
    "WAIT_ENTRIES": "the device's XenStore entries are not there, or do not fit together",
    "GRACE": "an earlier bridge was killed; waits until its page is safe to leave",
    "RESETTING": "waits for the vTPM domain to let go of an earlier page",
    "WAIT_BACKEND": "the vTPM domain is not up",
    "WAIT_CONNECTED": "the vTPM domain does not connect",
    "LEAVING": "the vTPM domain is closing",
    "CLOSED": "it has closed",
}


def check_sockets(case: Case) -> list[Finding]:
    """Look at the run directory and QEMU's sockets in it, without connecting to any."""
    found = _directory(case)
    try:
        names = names_in(case.run_dir)
    except OSError:
        return found or [_missing_directory(case)]
    wanted = [name for name in names if name.endswith(".sock") and _is_meant(case, name)]
    for name in wanted[:SOCKETS_MAX]:
        found.append(_socket(case, case.run_dir / name))
    if len(wanted) > SOCKETS_MAX:
        summary = f"{len(wanted) - SOCKETS_MAX} more sockets were not looked at"
        found.append(Finding("socket", Verdict.WARNING, summary))
    if case.guest is not None and not wanted:
        path, _ = case.sockets_of(case.guest)
        summary = f"{path} is missing: QEMU would not start"
        found.append(
            Finding("socket", Verdict.PROBLEM, summary, {}, _start(case, path), subject=str(path))
        )
    return found or [Finding("socket", Verdict.NOT_APPLICABLE, f"no socket in {case.run_dir}")]


def _is_meant(case: Case, name: str) -> bool:
    return case.guest is None or name.rpartition(".")[0] == case.guest


def _missing_directory(case: Case) -> Finding:
    steps: tuple[Mend, ...] = (
        Mend(
            f"make {case.run_dir}, for root alone",
            shell("install", "-d", "-m", "0700", case.run_dir),
        ),
    )
    there = case.run_dir.exists()
    summary = f"{case.run_dir} {'cannot be read' if there else 'is not there'}"
    needed = case.role is not Role.VTPM and (case.devices or case.guest is not None)
    if there:
        steps = (Mend("be root"),)
    elif not needed:
        return Finding("socket", Verdict.NOT_APPLICABLE, f"{summary}: no bridge has run here")
    return Finding("socket", Verdict.WARNING, summary, {"directory": str(case.run_dir)}, steps)


def _directory(case: Case) -> list[Finding]:
    """Return what is wrong with the run directory: who may write it may stand in for bridges."""
    try:
        mode = stat.S_IMODE(case.run_dir.stat().st_mode)
    except OSError:
        return []
    facts = {"directory": str(case.run_dir), "mode": f"{mode:04o}"}
    if not mode & 0o022 or mode & stat.S_ISVTX:
        return []
    steps = (Mend(f"keep others from {case.run_dir}", shell("chmod", "go-w", case.run_dir)),)
    summary = f"{case.run_dir} may be written by others (mode {mode:04o})"
    return [Finding("socket", Verdict.PROBLEM, summary, facts, steps, subject=str(case.run_dir))]


def _socket(case: Case, path: Path) -> Finding:
    facts: dict[str, Any] = {"path": str(path)}

    def say(verdict: Verdict, words: str, *steps: Mend) -> Finding:
        return Finding("socket", verdict, f"{path} {words}", facts, steps, subject=str(path))

    try:
        found = path.lstat()
    except OSError as error:
        return say(Verdict.WARNING, f"cannot be looked at: {error.strerror}")
    mode = stat.S_IMODE(found.st_mode)
    facts |= {"mode": f"{mode:04o}", "uid": found.st_uid, "gid": found.st_gid, "held": None}
    remove = Mend(f"remove {path}", shell("rm", path))
    if not stat.S_ISSOCK(found.st_mode):
        return say(Verdict.PROBLEM, "is no socket, and keeps a bridge from making one", remove)
    facts["held"] = held = is_held(path)
    if held is False:
        steps = _start(case, path) or (remove,)
        return say(Verdict.PROBLEM, "is listened at by nobody: QEMU would not start", *steps)
    if mode & 0o002:
        step = Mend("keep the TPM for its guest's QEMU", shell("chmod", "o-rwx", path))
        words = f"may be connected to by everybody (mode {mode:04o})"
        return say(Verdict.PROBLEM, words, step)
    if held is None:
        return say(Verdict.WARNING, "does not show this user who listens", Mend("be root"))
    return say(Verdict.OK, "is listened at")


def is_held(path: Path) -> bool | None:
    """Return whether a process holds the stream socket at a path; None where that is hidden.

    The holder sees nothing of the question.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other_type:
        other_type.setblocking(False)
        try:
            result = other_type.connect_ex(os.fspath(path))
        except OSError:  # a path too long for a socket address
            return None
    return {errno.EPROTOTYPE: True, 0: True, errno.ECONNREFUSED: False}.get(result)


def _start(case: Case, path: Path) -> tuple[Mend, ...]:
    """Return what starts the bridge of a socket, where a device says which that is."""
    name = path.name.rpartition(".")[0]
    for device in case.devices:
        if name in (device.guest, f"vtpm-{device.entry.backend_domid}-{device.entry.handle}"):
            return run_bridge(case, device)
    return ()


# Status.


async def check_status(case: Case) -> list[Finding]:
    """Ask each status socket how its bridge or vTPM domain is."""
    try:
        names = await left_behind(names_in, case.run_dir)
    except OSError:
        names = []
    wanted = [name for name in names if name.endswith(".status") and _is_meant(case, name)]
    found = []
    for name in wanted[:SOCKETS_MAX]:
        found.append(await _status(case, case.run_dir / name))
    return found or [
        Finding("status", Verdict.NOT_APPLICABLE, f"no status socket in {case.run_dir}")
    ]


async def _status(case: Case, path: Path) -> Finding:
    subject = str(path)
    raw, failure = await read_status(path)
    if failure:
        dead = failure == os.strerror(errno.ECONNREFUSED)
        steps = _start(case, path) or (Mend(f"remove {path}", shell("rm", path)),)
        if not dead:
            # Somebody holds it: to remove it under a bridge would only hide that bridge.
            steps = (Mend(f"look at the bridge of {path}, its log and what it waits for"),)
        summary = f"{path}: {failure}"
        return Finding("status", Verdict.PROBLEM, summary, {}, steps, subject=subject)
    document: Any = None
    with suppress(ValueError, RecursionError):
        document = json.loads(raw)
    if not isinstance(document, dict) or document.get("program") != "qemu-vtpm-bridge":
        summary = f"{path}: what answers is no bridge and no vTPM domain"
        return Finding("status", Verdict.PROBLEM, summary, {}, subject=subject)
    judge = _vtpm if document.get("role") == "vtpm" else _bridge
    verdict, words, facts, steps = judge(case, document)
    return Finding("status", verdict, f"{path}: {words}", facts, steps, subject=subject)


async def read_status(path: Path) -> tuple[bytes, str]:
    """Return what a status socket says, and why it does not where it does not."""
    raw = bytearray()
    with trio.move_on_after(ANSWER_DEADLINE_S):
        try:
            async with await trio.open_unix_socket(path) as stream:
                while more := await stream.receive_some():
                    raw += more
                    if len(raw) > ANSWER_MAX_BYTES:
                        return b"", "it says more than a status is"
            return bytes(raw), ""
        except OSError as error:
            return b"", error.strerror or str(error)
        except trio.BrokenResourceError:
            return b"", "it closes the connection"
    return b"", f"no answer within {ANSWER_DEADLINE_S:g} s"


Judged = tuple[Verdict, str, dict[str, Any], tuple[Mend, ...]]


def _word(document: dict[str, Any], *keys: str) -> str:
    """Return a string deep in a document, empty where there is none."""
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def _bridge(case: Case, document: dict[str, Any]) -> Judged:
    state, power = _word(document, "frontend", "state"), _word(document, "power")
    error = _word(document, "last-error")
    qemu = document.get("qemu")
    attached = isinstance(qemu, dict) and qemu.get("data-attached") is True
    facts = {
        "role": "bridge",
        "frontend": _word(document, "frontend", "path"),
        "backend": _word(document, "frontend", "backend"),
        "frontend-state": state,
        "power": power,
        "qemu-attached": attached,
        "last-error": error or None,
    }
    if state != "RUNNING":
        words = f"not connected: {_WAITING.get(state, state or 'it does not say why')}"
        return Verdict.PROBLEM, words, facts, _connect(case, state, facts)
    if power == "FAILED":
        words = "connected, but the TPM did not show that it was power-cycled: no command passes"
        step = Mend(f"its last error: {error}" if error else "see the bridge's log")
        return Verdict.PROBLEM, words, facts, (step,)
    return Verdict.OK, f"connected, {'with' if attached else 'without'} a QEMU", facts, ()


def _connect(case: Case, state: str, facts: dict[str, Any]) -> tuple[Mend, ...]:
    """Return what lets a bridge connect, from the device that it names."""
    try:
        numbers = parse_backend_path(str(facts["backend"]))
    except XenError:
        return ()
    if state == "WAIT_ENTRIES":
        mode = mode_of(str(facts["frontend"]), *numbers)
        if mode is None:
            return ()
        words = device_words(*numbers, mode)
        return (Mend("write the device's entries", case.ours("attach", *words)),)
    device = next((one for one in case.devices if one.entry.backend == facts["backend"]), None)
    if state in ("WAIT_BACKEND", "WAIT_CONNECTED") and device is not None:
        return run_vtpm(case, device)
    return ()


def _vtpm(case: Case, document: dict[str, Any]) -> Judged:
    del case
    engine = document.get("engine")
    running = isinstance(engine, dict) and engine.get("running") is True
    frontends = document.get("frontends")
    count = len(frontends) if isinstance(frontends, list) else 0
    error = _word(document, "last-error")
    facts = {
        "role": "vtpm",
        "tpm": _word(document, "tpm"),
        "engine-running": running,
        "frontends": count,
        "last-error": error or None,
    }
    words = f"a vTPM domain with {count} frontend{'s' * (count != 1)}"
    if not running and count:
        step = Mend(f"its last error: {error}" if error else "see its log")
        return Verdict.WARNING, f"{words}, whose swtpm does not run", facts, (step,)
    return Verdict.OK, words, facts, ()
