"""`qemu-vtpm-bridge doctor`: goes through this host, and says what mends what it finds.

Theory of operation.  The checks run in the order in which a guest's TPM stands on them:
Xen, its libraries and devices, XenStore, the entries, the programs, the sockets.  Each has
a deadline; one that does not end in time is a finding like any other, and so is an error
that a check did not foresee.  Those that look at files run in a thread that is left behind
if a file system hangs.  Nothing is changed, no command is sent to any TPM, and nobody who
serves a guest notices.

Keeps P10.  Who may lie: everything that is looked at; see the checks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from .. import __version__
from ..errors import BridgeError, ConfigError, XenError, first_of
from ..xen.store import Store, StoreGone, open_store
from .doctor_devices import check_devices
from .doctor_host import RUN_DIR, Case, Host, Role, left_behind
from .doctor_kernel import (
    check_libraries,
    check_modules,
    check_nodes,
    check_tpmfront,
    check_xen,
)
from .doctor_leftovers import check_leftovers
from .doctor_programs import check_qemu, check_swtpm, check_user
from .doctor_report import Finding, Report, Verdict, render
from .doctor_sockets import check_sockets, check_status
from .doctor_xenstore import check_guests, check_xenstore, no_xenstore, unreachable

CHECK_DEADLINE_S: Final = 30.0
PROGRAMS_DEADLINE_S: Final = 120.0
"""Several QEMUs are asked, and a hung one is given up at its first question's deadline."""

DESCRIPTION: Final = """\
Goes through this host step by step, from Xen to each guest's socket, and says for each
step whether a guest's TPM can work, and the exact command that mends it if not. It changes
nothing. Without Xen it says what can be done here and checks the rest."""

EPILOG: Final = """\
Verdicts: ok; warning, there is something to know; problem, a guest has no TPM or somebody
may take it; -, not needed here.

Exit status: 0 no problem (there may be warnings), 2 a wrong option, 3 a problem was found,
130 interrupted."""

PlainCheck = Callable[[Case], list[Finding]]
StoreCheck = Callable[[Case, Store], Awaitable[list[Finding]]]
Check = Callable[[], Awaitable[list[Finding]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the doctor's options."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.add_argument("--guest", metavar="NAME", help="look at this guest's TPM only")
    parser.add_argument(
        "--role",
        choices=[role.value for role in Role],
        default=Role.ANY.value,
        help="what this host is to do: dom0 runs bridges, vtpm is a vTPM domain (default: any, "
        "find out)",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=RUN_DIR,
        metavar="DIR",
        help=f"where the sockets are: NAME.sock, NAME.status (default: {RUN_DIR})",
    )
    parser.add_argument(
        "--qemu",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="look at this QEMU too; may be given again",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--embedded", type=Path, metavar="WORLD", help="look at the embedded Xen of this directory"
    )
    where.add_argument(
        "--domid", type=int, metavar="N", help="the domain that this is (default: ask XenStore)"
    )
    where.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="look for sysfs, /proc, /dev and programs below this directory",
    )


def main(args: argparse.Namespace) -> int:
    """Examine the host and print the report; return the exit status."""
    case = Case(
        host=Host(args.root.absolute()),
        wanted=Role(args.role),
        guest=args.guest,
        run_dir=args.run_dir.absolute(),
        embedded=None if args.embedded is None else args.embedded.absolute(),
        domid=args.domid,
        qemu=tuple(args.qemu),
    )
    if not case.host.root.is_dir():
        raise ConfigError(f"--root {case.host.root}: there is no such directory")
    try:
        report = trio.run(examine, case)
    except BaseExceptionGroup as group:
        raise first_of(group) from None
    if args.json:
        text = json.dumps(report.as_dict(__version__), indent=2)
    else:
        text = render(report, colour=_is_terminal())
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read the lines has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return report.exit_status


def _is_terminal() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


async def examine(case: Case) -> Report:
    """Return the findings of all checks; takes bounded time, whatever it meets."""
    report = Report(role=case.wanted.value)
    plain: tuple[tuple[str, PlainCheck], ...] = (
        ("xen", check_xen),
        ("xen.libraries", check_libraries),
        ("xen.modules", check_modules),
        ("xen.devices", check_nodes),
        ("xen.tpmfront", check_tpmfront),
    )
    for name, check in plain:
        report.findings += await bounded(name, in_thread(check, case))
    await _examine_xenstore(case, report)
    report.findings += await bounded("qemu", lambda: check_qemu(case), PROGRAMS_DEADLINE_S)
    report.findings += await bounded("swtpm", lambda: check_swtpm(case))
    report.findings += await bounded("user", in_thread(check_user, case))
    report.findings += await bounded("socket", in_thread(check_sockets, case))
    report.findings += await bounded("status", lambda: check_status(case), PROGRAMS_DEADLINE_S)
    report.role = case.role.value
    return report


def in_thread(check: PlainCheck, case: Case) -> Check:
    """Return a check that may block, as one that may be left behind."""

    async def run() -> list[Finding]:
        return await left_behind(check, case)

    return run


async def bounded(name: str, check: Check, deadline_s: float = CHECK_DEADLINE_S) -> list[Finding]:
    """Run a check; what goes wrong with it becomes its finding."""
    with trio.move_on_after(deadline_s):
        try:
            return await check()
        except StoreGone:
            raise
        except (BridgeError, OSError) as error:
            said = f"the check could not be done: {error}"
            return [Finding(name, Verdict.PROBLEM, said, {"error": str(error)})]
    said = f"the check did not end within {deadline_s:g} s"
    return [Finding(name, Verdict.PROBLEM, said, {"deadline-s": deadline_s})]


async def _examine_xenstore(case: Case, report: Report) -> None:
    """Do what needs XenStore, over one connection."""
    finding = no_xenstore(case)
    if finding is not None:
        report.findings.append(finding)
        return
    checks: tuple[tuple[str, StoreCheck], ...] = (
        ("xenstore", check_xenstore),
        ("device", check_devices),
        ("device.leftover", check_leftovers),
        ("guest", check_guests),
    )
    try:
        async with open_store(case.door) as store:
            for name, check in checks:

                async def run(check: StoreCheck = check) -> list[Finding]:
                    return await check(case, store)

                report.findings += await bounded(name, run)
    except XenError as error:
        report.findings.append(unreachable(case, error))
