"""The doctor's checks of what is too much in XenStore: crowds of frontends, and leftovers.

Theory of operation.  A vTPM domain's own directory vanishes with it; the frontends' in
domain 0 stay, and a later vTPM domain with another id knows nothing of them.  So frontend
directories are searched in the places that the path modes give, and each is held against
the domains that live.  What mends one is `detach` or `attach` where its path is the one
that its own numbers give, and its removal alone where it is not.

Keeps P9.  Who may lie: a domain, in its own device directory; what is left there is a
warning, since it harms nobody else.
"""

from __future__ import annotations

from typing import Any, Final

from ..errors import XenError
from ..xen.store import Store
from ..xen.xenbus import XenbusState, parse_backend_path, parse_state, printable
from .attach import FRONTENDS_MAX, FRONTENDS_OF_MINI_OS_MAX
from .doctor_devices import SETTLED, Device, device_words, mode_of, named
from .doctor_host import Case, is_decimal
from .doctor_report import Finding, Mend, Verdict

LEFTOVERS_MAX: Final = 64
DOMAINS_MAX: Final = 1024


async def check_leftovers(case: Case, store: Store) -> list[Finding]:
    """Look for vTPM domains with too many frontends, and for what was left behind."""
    if not case.sees_all:
        return _crowds(case)
    return _crowds(case) + await _leftovers(case, store)


def _crowds(case: Case) -> list[Finding]:
    """Tell of vTPM domains with more frontends than they survive."""
    by_backend: dict[int, list[Device]] = {}
    for device in case.devices:
        by_backend.setdefault(device.entry.backend_domid, []).append(device)
    findings = []
    for domid, devices in by_backend.items():
        ours = any(device.ours for device in devices)
        most = FRONTENDS_MAX if ours else FRONTENDS_OF_MINI_OS_MAX
        count = sum(entry.backend_domid == domid for entry in case.entries)
        if count <= most:
            continue
        unused = [
            one
            for one in devices
            if one.points_back and one.mode and one.entry.frontend_state in SETTLED
        ]
        command = case.ours("detach", *unused[-1].words()) if unused else ""
        what = "which serves eight" if ours else "and a Mini-OS one survives two"
        findings.append(
            Finding(
                "device.frontends",
                Verdict.PROBLEM,
                f"the vTPM domain {domid} has {count} frontends, {what}",
                {"domid": domid, "frontends": count, "most": most},
                (Mend("detach those that no guest uses; the last such", command),),
                subject=f"/local/domain/{domid}",
            )
        )
    return findings


# What was left behind.


async def _leftovers(case: Case, store: Store) -> list[Finding]:
    """Tell of frontend directories whose vTPM domain, or whose half there, is gone."""
    alive = set(await store.try_ls("/local/domain") or [])
    findings: list[Finding] = []
    for frontend, domid in await _frontends(store, alive):
        if frontend in case.known_frontends or len(findings) >= LEFTOVERS_MAX:
            continue
        raw_backend = await store.peek(f"{frontend}/backend")
        raw_guest = await store.peek(f"{frontend}/domain")
        guest = None if raw_guest is None else raw_guest.decode("utf-8", "backslashreplace")
        if case.guest is not None and guest != case.guest:
            continue
        raw_state = await store.peek(f"{frontend}/state")
        findings.append(_leftover(case, frontend, domid, raw_backend, raw_state, guest, alive))
    return findings


async def _frontends(store: Store, alive: set[str]) -> list[tuple[str, int]]:
    """Return the frontend directories that may be there, each with its domain."""
    found = []
    seed = "/local/domain/0/frontend/vtpm"
    tops = [(f"{seed}/{name}", 0) for name in await _numbers(store, seed)]
    domains = sorted((name for name in alive if is_decimal(name)), key=int)[:DOMAINS_MAX]
    tops += [(f"/local/domain/{name}/device/vtpm", int(name)) for name in [*domains, "00"]]
    for top, domid in tops:
        found += [(f"{top}/{handle}", domid) for handle in await _numbers(store, top)]
    return found


async def _numbers(store: Store, directory: str) -> list[str]:
    """Return the numbers that a directory holds; whoever wrote another name made no device."""
    return [name for name in await store.try_ls(directory) or [] if is_decimal(name)]


def _leftover(
    case: Case,
    frontend: str,
    domid: int,
    raw_backend: bytes | None,
    raw_state: bytes | None,
    guest: str | None,
    alive: set[str],
) -> Finding:
    state = parse_state(raw_state)
    facts: dict[str, Any] = {
        "frontend": frontend,
        "frontend_domid": domid,
        "frontend_state": "missing" if state is None else state.label,
        "backend": None if raw_backend is None else printable(raw_backend, 200)[1:-1],
        "guest": guest,
    }
    verdict = Verdict.PROBLEM if domid == 0 else Verdict.WARNING
    remove = Mend("remove it", case.xenstore("rm", frontend))
    try:
        numbers = parse_backend_path((raw_backend or b"").decode("ascii", "replace"))
    except XenError:
        summary = f"{frontend}: names no vTPM domain"
        return Finding("device.leftover", verdict, summary, facts, (remove,), subject=frontend)
    backend_domid = numbers[0]
    mode = mode_of(frontend, *numbers)
    words = device_words(*numbers, mode)
    if str(backend_domid) not in alive:
        force = state not in (None, XenbusState.INITIALISING, XenbusState.CLOSED)
        if mode is not None:
            options = [*words, *(["--force"] if force else [])]
            remove = Mend(
                "remove what it left; attach to the new vTPM domain if there is one",
                case.ours("detach", *options),
            )
        summary = f"{frontend}: its vTPM domain {backend_domid} is gone"
        return Finding("device.leftover", verdict, summary, facts, (remove,), subject=frontend)
    summary = f"{frontend}: the vTPM domain {backend_domid} has no entries for it"
    if mode is not None:
        remove = Mend("write both halves anew", case.ours("attach", *words, *named(guest)))
    return Finding("device.leftover", verdict, summary, facts, (remove,), subject=frontend)
