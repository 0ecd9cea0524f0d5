"""The doctor's checks of vtpm devices: each one's two directories in XenStore, and leftovers.

Theory of operation.  `attach.list_entries` gives the devices that backend directories name;
each is looked at again for what it does not tell: whether the frontend points back, the
permissions of both directories, whether our own vTPM domain is behind it.  `_STATES` is a
table of what the two states mean together.

What mends an entry is `detach` or `attach` only where both would touch this very device
and nothing else; where a directory names another's, its own path is removed instead: a
domain writes below its own backend directory what it likes, and must not have another's
entries removed.

Keeps P9.  Who may lie: each domain, in its backend and device directories.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import ConfigError, XenError
from ..xen.store import Store
from ..xen.xenbus import (
    FEATURE_RESET,
    DevicePaths,
    PathMode,
    device_paths,
    printable,
)
from .attach import (
    KEY_MAX_CHARS,
    Entry,
    list_entries,
)
from .doctor_host import Case, Role, file_name
from .doctor_report import Finding, Mend, Verdict, worst

DEVICES_MAX: Final = 64
LONG_KEYS_MAX: Final = 3
PATH_SHOWN_CHARS: Final = 80
SETTLED: Final = ("missing", "Unknown", "Initialising", "Closed")
"""Frontend states in which `detach` needs no --force."""
_PERMISSION: Final = re.compile(r"([nrwb])(0|[1-9]\d{0,4})")


@dataclass(slots=True)
class Device:
    """One vtpm device, as looked at."""

    entry: Entry
    guest: str | None = None
    """The name that `attach --guest` noted."""
    points_back: bool = False
    ours: bool = False
    mode: PathMode | None = None
    """The path mode that gives this frontend path; None where none does."""
    deserted: DevicePaths | None = None
    """The device whose frontend points here, though this backend names another one."""
    permissions: dict[str, list[str]] = field(default_factory=dict)
    long_keys: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The device, for people."""
        e = self.entry
        vtpm = f"{e.backend_name or '?'} ({e.backend_domid})"
        of = f", of {printable(self.guest.encode())[1:-1]}" if self.guest is not None else ""
        return f"{vtpm} for {e.frontend_name or '?'} ({e.frontend_domid}), handle {e.handle}{of}"

    def words(self) -> list[str]:
        """Return the options that name this device."""
        e = self.entry
        return device_words(e.backend_domid, e.frontend_domid, e.handle, self.mode)

    def facts(self) -> dict[str, Any]:
        """Return what is known, for JSON."""
        return self.entry.as_dict() | {
            "guest": self.guest,
            "points-back": self.points_back,
            "our-vtpm-domain": self.ours,
            "path-mode": None if self.mode is None else self.mode.value,
            "permissions": self.permissions,
        }


_MODES: Final = (PathMode.SEED, PathMode.DEVICE, PathMode.ZEROS)


def device_words(
    backend_domid: int, frontend_domid: int, handle: int, mode: PathMode | None
) -> list[str]:
    """Return the options by which a command names a device."""
    words = ["--backend", str(backend_domid), "--handle", str(handle)]
    if frontend_domid:
        words += ["--domid", str(frontend_domid)]
    elif mode is not None and mode is not PathMode.SEED:
        words += ["--path-mode", mode.value]
    return words


def mode_of(frontend: str, backend_domid: int, frontend_domid: int, handle: int) -> PathMode | None:
    """Return the path mode in which these numbers give this frontend path."""
    for mode in _MODES:
        with suppress(ConfigError):
            if _paths(mode, backend_domid, frontend_domid, handle).frontend == frontend:
                return mode
    return None


def _paths(mode: PathMode, backend_domid: int, frontend_domid: int, handle: int) -> DevicePaths:
    return device_paths(
        mode, backend_domid=backend_domid, handle=handle, frontend_domid=frontend_domid
    )


# Looking.


async def check_devices(case: Case, store: Store) -> list[Finding]:
    """Look at each device that a backend directory names."""
    vtpm_domid = case.own_domid if case.role is Role.VTPM else None
    if vtpm_domid is None and not case.sees_all:
        return [Finding("device", Verdict.NOT_APPLICABLE, "entries are looked at from domain 0")]
    entries = await list_entries(store, backend_domid=vtpm_domid)
    findings = []
    case.entries = entries
    case.known_frontends = {entry.frontend for entry in entries}
    for entry in entries[:DEVICES_MAX]:
        device = await _look(store, entry)
        case.known_frontends |= {device.deserted.frontend} if device.deserted else set()
        if case.guest is None or device.guest == case.guest or entry.frontend_name == case.guest:
            case.devices.append(device)
            findings.append(judge(case, device))
    if len(entries) > DEVICES_MAX:
        summary = f"{len(entries) - DEVICES_MAX} more devices were not looked at"
        findings.append(Finding("device", Verdict.WARNING, summary))
    return findings or [_none(case)]


def _none(case: Case) -> Finding:
    if case.guest is not None:
        return Finding(
            "device",
            Verdict.PROBLEM,
            f"no vtpm device is attached for {case.guest}",
            mend=(
                Mend(
                    "attach one: the vTPM domain is given by name or number; here it is named "
                    f"vtpm-{case.guest}",
                    case.ours("attach", "--backend", f"vtpm-{case.guest}", *named(case.guest)),
                ),
            ),
        )
    return Finding("device", Verdict.NOT_APPLICABLE, "no vtpm device is attached")


async def _look(store: Store, entry: Entry) -> Device:
    device = Device(entry)
    raw_feature = await store.peek(f"{entry.backend}/{FEATURE_RESET}")
    device.ours = raw_feature is not None
    keys = await store.try_ls(entry.backend) or []
    device.long_keys = [key for key in keys if len(key) > KEY_MAX_CHARS][:LONG_KEYS_MAX]
    directories = [entry.backend]
    if entry.frontend:
        raw_back = await store.peek(f"{entry.frontend}/backend")
        device.points_back = raw_back == entry.backend.encode()
        device.mode = mode_of(
            entry.frontend, entry.backend_domid, entry.frontend_domid, entry.handle
        )
    own = entry.frontend
    if device.points_back:
        directories.append(own)
    else:
        device.deserted = await _deserted(store, entry)
        own = device.deserted.frontend if device.deserted else ""
    if own:
        raw_guest = await store.peek(f"{own}/domain")
        device.guest = None if raw_guest is None else raw_guest.decode("utf-8", "backslashreplace")
    for directory in directories:
        for node in (directory, f"{directory}/state"):
            with suppress(XenError):
                device.permissions[node] = await store.get_perms(node)
    return device


async def _deserted(store: Store, entry: Entry) -> DevicePaths | None:
    """Return the device whose frontend is where one of these numbers is, and points here."""
    numbers = (entry.backend_domid, entry.frontend_domid, entry.handle)
    for mode in _MODES:
        with suppress(ConfigError):
            paths = _paths(mode, *numbers)
            if await store.peek(f"{paths.frontend}/backend") == entry.backend.encode():
                return paths
    return None


# Judging.


def judge(case: Case, device: Device) -> Finding:
    """Return what is to be said of a device."""
    contradiction = _contradiction(case, device)
    told = [contradiction] if contradiction else []  # what is to be removed needs no more
    if not told:
        told = [*_long_keys(case, device), *_permissions(case, device)]
    if not told:
        told = [states(case, device)]
    verdict = worst(verdict for verdict, _, _ in told)
    gravest = next(words for how, words, _ in told if how is verdict)
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    facts = device.facts() | {"found": [words for _, words, _ in told]}
    steps = tuple(step for _, _, steps in told for step in steps)
    return Finding(
        "device",
        verdict,
        f"{device.label}: {gravest}{more}",
        facts,
        steps,
        subject=device.entry.backend,
    )


Told = tuple[Verdict, str, tuple[Mend, ...]]


def _contradiction(case: Case, device: Device) -> Told | None:
    """Tell of two directories that are not one device's."""
    entry = device.entry
    if device.points_back and entry.frontend_state != "missing":
        return None
    remove = Mend(
        "remove the vTPM domain's half; attach the device again if a guest is to have it",
        case.xenstore("rm", entry.backend),
    )
    if not entry.frontend:
        words = "the backend's directory names no frontend"
    elif entry.frontend_state == "missing":
        words = f"the frontend's entries at {_cut(entry.frontend)} are missing"
        if device.mode is not None:
            remove = Mend(remove.does, case.ours("detach", *device.words()))
    else:
        words = f"{_cut(entry.frontend)} is another device's frontend"
    if device.deserted is None:
        return Verdict.PROBLEM, words, (remove,)
    numbers = (entry.backend_domid, entry.frontend_domid, entry.handle)
    options = device_words(*numbers, mode_of(device.deserted.frontend, *numbers))
    again = Mend("write both halves anew", case.ours("attach", *options, *named(device.guest)))
    return Verdict.PROBLEM, words, (Mend("remove the vTPM domain's half", remove.command), again)


def _cut(path: str) -> str:
    return path if len(path) <= PATH_SHOWN_CHARS else f"{path[:PATH_SHOWN_CHARS]}..."


def named(guest: str | None) -> list[str]:
    if guest is None:
        return []
    return [f"--guest={guest}"] if guest.startswith("-") else ["--guest", guest]


def _long_keys(case: Case, device: Device) -> list[Told]:
    return [
        (
            Verdict.PROBLEM,
            f"a key has {len(key)} characters, which crashes a Mini-OS vTPM domain",
            (Mend("remove it", case.xenstore("rm", f"{device.entry.backend}/{key}")),),
        )
        for key in device.long_keys
    ]


def _permissions(case: Case, device: Device) -> list[Told]:
    entry = device.entry
    ends = {
        entry.backend: (entry.backend_domid, entry.frontend_domid),
        entry.frontend: (entry.frontend_domid, entry.backend_domid),
    }
    told: list[Told] = []
    for directory, (owner, peer) in ends.items():
        faults = {
            fault
            for node in (directory, f"{directory}/state")
            if node in device.permissions
            for fault in permission_faults(device.permissions[node], owner, peer)
        }
        if faults:
            mend = Mend(
                "give each end its own directory, and the other's to read",
                case.xenstore("chmod", "-r", directory, f"n{owner}", f"r{peer}"),
            )
            told.append((Verdict.PROBLEM, f"{directory}: {'; '.join(sorted(faults))}", (mend,)))
    return told


def permission_faults(permissions: list[str], owner: int, peer: int) -> list[str]:
    """Return what is wrong with a node's permissions, for these two domains' use."""
    parsed = [_PERMISSION.fullmatch(permission) for permission in permissions]
    if not parsed or None in parsed:
        return ["its permissions cannot be read"]
    (others, holder), *granted = [(m[1], int(m[2])) for m in parsed if m is not None]
    faults = []
    if holder != owner:
        faults.append(f"it is domain {holder}'s, not domain {owner}'s")
    if others in "wb":
        faults.append("every domain may write it")
    elif others == "r":
        faults.append("every domain may read it")
    for letter, domid in granted:
        if letter in "wb" and domid not in (0, owner):
            faults.append(f"domain {domid} may write it")
    if (
        peer != 0
        and others in "nw"
        and not any(domid == peer and letter in "rb" for letter, domid in granted)
    ):
        faults.append(f"domain {peer} may not read it")
    return faults


def states(case: Case, device: Device) -> Told:
    """Return what the two states mean together."""
    entry = device.entry
    both = f"frontend {entry.frontend_state}, vTPM domain {entry.backend_state}"
    for frontends, backends, verdict, words, who in _STATES:
        if _in(entry.frontend_state, frontends) and _in(entry.backend_state, backends):
            shown = words if verdict is Verdict.OK else f"{words} ({both})"
            return verdict, shown, _MENDERS[who](case, device) if who else ()
    return Verdict.WARNING, both, ()


def _in(state: str, names: str) -> bool:
    return names == "any" or state in names.split()


_STATES: Final = (
    # frontend, backend, verdict, what it means, whose work mends it
    ("any", "missing", Verdict.PROBLEM, "the vTPM domain's state is missing", "entries"),
    ("any", "Unknown", Verdict.PROBLEM, "the vTPM domain shows no state there is", "vtpm"),
    ("any", "Initialising", Verdict.PROBLEM, "the vTPM domain has not taken it up", "vtpm"),
    ("any", "Closing Closed", Verdict.PROBLEM, "the vTPM domain has closed it", "vtpm"),
    ("Connected", "Connected", Verdict.OK, "connected", ""),
    ("Initialised Connected", "Initialised Connected", Verdict.OK, "connecting", ""),
    ("Initialised", "InitWait", Verdict.OK, "connecting", ""),
    ("Connected", "InitWait", Verdict.PROBLEM, "the frontend missed a restart of the vTPM domain",
     "bridge"),
    ("Initialising Closed", "InitWait", Verdict.WARNING, "no bridge has connected", "bridge"),
    ("Initialising Closed", "Initialised Connected", Verdict.WARNING,
     "the vTPM domain holds a page of a bridge that is gone", "bridge"),
    ("Unknown", "any", Verdict.PROBLEM, "the frontend shows no state there is", "bridge"),
)  # fmt: skip
"""The first line that fits counts."""


def run_bridge(case: Case, device: Device) -> tuple[Mend, ...]:
    """Return what starts a device's frontend."""
    entry = device.entry
    if entry.frontend_domid and case.role is not Role.VTPM:
        return (Mend(f"look at the TPM driver in domain {entry.frontend_domid}"),)
    name = file_name(device.guest, f"vtpm-{entry.backend_domid}-{entry.handle}")
    socket, status = case.sockets_of(name)
    words = ["--socket", str(socket), "--status-socket", str(status)]
    return (
        Mend(
            "start its bridge, before QEMU, and let it run",
            case.ours("run", *device.words(), *words),
        ),
    )


def run_vtpm(case: Case, device: Device) -> tuple[Mend, ...]:
    """Return what starts the vTPM domain's program."""
    entry = device.entry
    state_dir = "/var/lib/vtpm"
    if case.embedded is not None:
        state_dir = str(case.embedded / "tpm-state")
    where = f"in domain {entry.backend_domid}"
    steps = [
        Mend(
            f"start the vTPM's program {where}, and let it run; where it runs, see its log",
            case.ours("vtpm", "--state-dir", state_dir, domid=entry.backend_domid),
        )
    ]
    if device.mode is PathMode.SEED and not device.ours and entry.frontend_domid == 0:
        steps.append(
            Mend("a Mini-OS vTPM domain does not know this path: attach with --path-mode zeros")
        )
    return tuple(steps)


def _again(case: Case, device: Device) -> tuple[Mend, ...]:
    force = [] if device.entry.frontend_state in SETTLED else ["--force"]
    if device.mode is None:
        return (Mend("remove it", case.xenstore("rm", device.entry.backend)),)
    return (
        Mend("remove its entries", case.ours("detach", *device.words(), *force)),
        Mend("write them anew", case.ours("attach", *device.words(), *named(device.guest))),
    )


_MENDERS: Final[dict[str, Callable[[Case, Device], tuple[Mend, ...]]]] = {
    "bridge": run_bridge,
    "vtpm": run_vtpm,
    "entries": _again,
}
