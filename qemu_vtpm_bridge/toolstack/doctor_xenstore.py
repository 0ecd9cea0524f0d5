"""The doctor's checks of XenStore itself, and of what hvmloader is told of each guest's TPM.

Theory of operation.  One connection is opened and kept for all that is read from XenStore;
each request has its deadline (`xen/store.py`), and the caller bounds the whole.  Of each
HVM guest two things are compared: `platform/tpm_version`, which hvmloader reads when the
guest boots, and the TPM device that its QEMU was started with.  hvmloader announces a TPM
only where both agree.

Keeps P9.  Who may lie: xenstored in every byte; a domain in what it may write, which of all
that is read here is nothing but its name on some toolstacks.  A process id from XenStore
leads to reading one command line, and to nothing else.

Source: hvmloader's util.c and libacpi's build.c; libxl_dm.c.
"""

from __future__ import annotations

import itertools
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import XenError
from ..xen.store import Store, StoreError
from ..xen.xenbus import printable
from .doctor_host import Case, Host, Role, file_name, is_decimal, left_behind
from .doctor_report import Finding, Mend, Verdict, shell

GUESTS_MAX: Final = 256
CRB_SINCE: Final = (4, 18)
"""The Xen release whose hvmloader reads `platform/tpm_version`; an earlier one behaves as 1."""

_VERSION_FOR: Final = {"tpm-crb": "2", "tpm-tis": "1"}
_ANNOUNCES: Final = {None: "TPM 1.2 at TIS", "1": "TPM 1.2 at TIS", "2": "TPM 2.0 at CRB"}
_PID: Final = re.compile(rb"[1-9]\d{0,9}")
_VM: Final = re.compile(r"/vm/[0-9a-f-]{36}")
WORDS_MAX: Final = 1000
"""libxl numbers a QEMU's words with three digits."""


# XenStore itself.


def no_xenstore(case: Case) -> Finding | None:
    """Return the finding for a machine that has and needs no XenStore, else None."""
    if case.embedded or case.real_xen or Path(case.door).exists():
        return None
    return Finding(
        "xenstore", Verdict.NOT_APPLICABLE, "no XenStore here, and without Xen none is needed"
    )


def unreachable(case: Case, error: XenError) -> Finding:
    """Return the finding for a XenStore that cannot be reached or does not answer."""
    facts = _door(case) | {"answers": False, "error": str(error)}
    if case.embedded is not None:
        steps = (
            Mend(
                "start the embedded Xen, and create the domains in it",
                shell("qemu-vtpm-bridge", "embedded-xen", case.embedded),
            ),
        )
    elif case.role is Role.VTPM:
        steps = (Mend("run this in the vTPM domain, as root: it needs /dev/xen/xenbus"),)
    else:
        steps = (
            Mend("start xenstored", "systemctl restart xenstored.service || service xen restart"),
        )
    return Finding("xenstore", Verdict.PROBLEM, error.cause, facts, steps)


def _door(case: Case) -> dict[str, Any]:
    try:
        mode = Path(case.door).stat().st_mode
        kind = "socket" if stat.S_ISSOCK(mode) else "device" if stat.S_ISCHR(mode) else "file"
    except OSError:
        kind = "missing"
    return {"door": case.door, "kind": kind}


async def check_xenstore(case: Case, store: Store) -> list[Finding]:
    """Ask XenStore which domain this is.  Raises XenError where it does not answer."""
    facts = _door(case) | {"answers": True, "domid": None}
    try:
        case.own_domid = await store.own_domid()
    except StoreError:
        # It is known by now that something answers: anything else raises StoreGone.
        return [_no_domid(case, facts)]
    finally:
        case.store_answers = True
    facts["domid"] = case.own_domid
    if case.domid is not None and case.domid != case.own_domid:
        return [
            Finding(
                "xenstore",
                Verdict.PROBLEM,
                f"this is domain {case.own_domid}, not {case.domid}",
                facts,
                (Mend(f"leave out --domid, or give {case.own_domid}"),),
            )
        ]
    summary = f"answers at {case.door}, as domain {case.own_domid}"
    return [Finding("xenstore", Verdict.OK, summary, facts)]


def _no_domid(case: Case, facts: dict[str, Any]) -> Finding:
    summary = f"answers at {case.door}, but does not say which domain this is"
    steps: tuple[Mend, ...] = (Mend("look at who made this domain: its XenStore entries lack"),)
    if case.role is not Role.VTPM:
        entries = ("/local/domain/0/domid", "0", "/local/domain/0/name", "Domain-0")
        steps = (
            Mend(
                "write domain 0's own entries, as xen-init-dom0 does",
                case.xenstore("write", *entries),
            ),
        )
    return Finding("xenstore", Verdict.PROBLEM, summary, facts, steps)


# What hvmloader is told.


@dataclass(frozen=True, slots=True)
class Guest:
    """An HVM guest, as far as its TPM goes."""

    domid: int
    name: str
    tpm_version: str | None
    qemu_pid: int | None = None
    qemu_device: str | None = None
    """tpm-crb, tpm-tis, another front-end of QEMU's, or none."""
    qemu_socket: str | None = None
    """Where its `-tpmdev emulator` connects."""
    attached: bool = False
    """A vtpm device bears its name, or is its stub domain's."""
    stub_domid: int | None = None
    """The domain that its QEMU runs in, where that is not domain 0."""

    def facts(self) -> dict[str, Any]:
        """Return what is known, for JSON."""
        return {
            "domid": self.domid,
            "name": self.name,
            "tpm-version": self.tpm_version,
            "qemu-pid": self.qemu_pid,
            "qemu-device": self.qemu_device,
            "qemu-socket": self.qemu_socket,
            "attached": self.attached,
            "stub-domid": self.stub_domid,
        }


async def check_guests(case: Case, store: Store) -> list[Finding]:
    """Compare what hvmloader is told with the TPM that each HVM guest has."""
    if not case.sees_all:
        return [Finding("guest", Verdict.NOT_APPLICABLE, "guests are looked at from domain 0")]
    guests = []
    for word in (await store.try_ls("/local/domain") or [])[:GUESTS_MAX]:
        if is_decimal(word) and word != "0":
            guest = await _look(case, store, int(word))
            if guest is not None:
                guests.append(guest)
    findings = []
    for guest in guests:
        named = case.guest is not None and guest.name == case.guest
        has_tpm = guest.attached or guest.qemu_device is not None
        if named or (case.guest is None and has_tpm):
            findings.append(judge_guest(case, guest))
    if not findings:
        who = f"HVM guest named {case.guest}" if case.guest else "HVM guest with a TPM"
        findings.append(Finding("guest", Verdict.NOT_APPLICABLE, f"no {who} runs"))
    return findings


async def _look(case: Case, store: Store, domid: int) -> Guest | None:
    own = f"/local/domain/{domid}"
    raw_type = await store.peek(f"/libxl/{domid}/type")
    if raw_type not in (None, b"hvm"):
        return None
    if raw_type is None and await store.peek(f"{own}/hvmloader") is None:
        return None
    raw_name = await store.peek(f"{own}/name") or b""
    name = raw_name.decode("utf-8", "backslashreplace")
    raw_version = await store.peek(f"{own}/platform/tpm_version")
    raw_pid = await store.peek(f"{own}/image/device-model-pid") or b""
    pid = int(raw_pid) if _PID.fullmatch(raw_pid) else None
    stub_domid = await _stub_domain(store, own)
    if stub_domid is not None:
        device, socket = tpm_among(await _stub_words(store, own))
    else:
        device, socket = (await left_behind(qemu_tpm, case.host, pid)) if pid else (None, None)
    return Guest(
        domid,
        name,
        None if raw_version is None else printable(raw_version)[1:-1],
        pid if pid and case.host.exists(f"/proc/{pid}") else None,
        device,
        socket,
        any(
            one.entry.frontend_domid == stub_domid if stub_domid is not None else one.guest == name
            for one in case.devices
        ),
        stub_domid,
    )


async def _stub_domain(store: Store, own: str) -> int | None:
    raw = await store.peek(f"{own}/image/device-model-domid")
    word = "" if raw is None else raw.decode("ascii", "replace")
    return int(word) if is_decimal(word) and word != "0" else None


async def _stub_words(store: Store, own: str) -> list[str]:
    """Return the words that libxl left for a QEMU in a Linux stub domain."""
    vm = (await store.peek(f"{own}/vm") or b"").decode("ascii", "replace")
    if _VM.fullmatch(vm) is None:
        return []
    top = f"{vm}/image/dm-argv"
    keys = sorted(await store.try_ls(top) or [])[:WORDS_MAX]
    raw = [await store.peek(f"{top}/{key}") or b"" for key in keys]
    return [word.decode("utf-8", "backslashreplace") for word in raw]


def qemu_tpm(host: Host, pid: int) -> tuple[str | None, str | None]:
    """Return the TPM device that a running QEMU has, and the socket that it is served from."""
    raw = host.read_bytes(f"/proc/{pid}/cmdline") or b""
    return tpm_among(raw.decode("utf-8", "backslashreplace").split("\0"))


def tpm_among(words: list[str]) -> tuple[str | None, str | None]:
    """Return the TPM device that QEMU has by these words, and the socket that serves it."""
    options = list(itertools.pairwise(words))
    device = next(
        (
            value.split(",")[0]
            for option, value in options
            if option in ("-device", "--device") and value.startswith("tpm-")
        ),
        None,
    )
    chardevs = {
        _option(value, "id"): _option(value, "path")
        for option, value in options
        if option in ("-chardev", "--chardev") and value.startswith("socket,")
    }
    for option, value in options:
        if option in ("-tpmdev", "--tpmdev") and value.startswith("emulator,"):
            return device, chardevs.get(_option(value, "chardev"))
    return device, None


def _option(words: str, name: str) -> str | None:
    return next(
        (
            value
            for word in words.split(",")
            for key, _, value in [word.partition("=")]
            if key == name
        ),
        None,
    )


def judge_guest(case: Case, guest: Guest) -> Finding:
    """Return what is to be said of a guest's TPM."""
    label = f"{printable(guest.name.encode())[1:-1] or 'without a name'} ({guest.domid})"
    key = f"/local/domain/{guest.domid}/platform/tpm_version"
    said = "not there" if guest.tpm_version is None else guest.tpm_version
    verdict = Verdict.OK
    steps: tuple[Mend, ...] = ()
    knows_qemu = guest.qemu_pid is not None or guest.stub_domid is not None
    if knows_qemu and guest.qemu_device is None:
        verdict = Verdict.PROBLEM
        summary = f"{label}: its QEMU has no TPM device"
        steps = (_arguments(case, guest),)
    elif guest.stub_domid is not None and not guest.attached:
        verdict = Verdict.PROBLEM
        summary = (
            f"{label}: its QEMU is in stub domain {guest.stub_domid}, which has no vTPM domain"
        )
        steps = (_follow_stub_domains(guest),)
    elif (wanted := _VERSION_FOR.get(guest.qemu_device or "")) is not None:
        summary = f"{label}: {guest.qemu_device}, platform/tpm_version is {said}"
        if wanted != ("1" if guest.tpm_version is None else guest.tpm_version):
            verdict = Verdict.PROBLEM
            steps = (_write(case, key, wanted),)
        elif wanted == "2" and case.xen_version is not None and case.xen_version < CRB_SINCE:
            verdict = Verdict.WARNING
            summary += ", which hvmloader reads since Xen 4.18 only"
            steps = (
                Mend("the guest's firmware gets no TPM2 table: use Xen 4.18, or tpm-tis and 1.2"),
            )
    elif guest.tpm_version in _ANNOUNCES:
        summary = f"{label}: hvmloader looks for {_ANNOUNCES[guest.tpm_version]}"
    else:
        verdict = Verdict.PROBLEM
        summary = f"{label}: platform/tpm_version is '{said}': hvmloader announces no TPM"
        steps = (_write(case, key, "2"),)
    return Finding(
        "guest", verdict, summary, guest.facts(), steps, subject=f"/local/domain/{guest.domid}"
    )


def _write(case: Case, key: str, version: str) -> Mend:
    kind = "TPM 2.0 (tpm-crb)" if version == "2" else "TPM 1.2 (tpm-tis)"
    return Mend(
        f"have hvmloader announce {kind}; it reads this when the guest boots: write it between "
        "`xl create -p` and `xl unpause`, for each boot",
        case.xenstore("write", key, version),
    )


def _follow_stub_domains(guest: Guest) -> Mend:
    return Mend(
        f"have stub domains joined to vTPM domains, with [guest.{guest.name}] in the guests file",
        shell("systemctl", "enable", "--now", "qemu-vtpm-bridge-stub-domains"),
    )


def _arguments(case: Case, guest: Guest) -> Mend:
    socket, _ = case.sockets_of(file_name(guest.name, f"domain-{guest.domid}"))
    return Mend(
        "have QEMU connect to the bridge, in the guest's xl.cfg",
        line=f'device_model_args_hvm=["-chardev", "socket,id=chrtpm,path={socket}", '
        '"-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-crb,tpmdev=tpm0"]',
    )
