"""`python -m tests.xen.conformance`: one JSON line a check, and a summary as the last line.

    python -m tests.xen.conformance --socket /run/xenstored/socket --json
    python -m tests.xen.conformance --xen --json
    python -m tests.xen.conformance --xen --other 3=tcp:10.0.3.2:7001 --json
    python -m tests.xen.conformance --embedded WORLD --domids 0 2 --json

Exit status: 0 where every check that was run ended as it is known to, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .client import StoreClient
from .differences import DIFFERENCES
from .registry import Check, Group, Need, Place, StorePlace, XenPlace
from .remote import RemoteSide
from .runner import Result, Verdict, of_groups, run_all
from .sides import LocalSide, Side


@dataclass
class CommandLife:
    """Domains that two commands create and destroy, such as scripts round xl."""

    create_command: str
    destroy_command: str

    def create(self) -> int:
        """Run the command; the last word that it prints is the domain's id."""
        command = shlex.split(self.create_command)
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout.split()[-1])

    def destroy(self, domid: int) -> None:
        """Run the command with the id as its last word."""
        subprocess.run([*shlex.split(self.destroy_command), str(domid)], check=True)

    def again(self, domid: int) -> None:
        """Nobody can make Xen give an id again; checks that need it need guests too."""
        raise NotImplementedError(f"domain {domid} again")


def word_of_agent(word: str) -> tuple[int, str]:
    """Return the domain and the address that DOMID=ADDRESS names; raises ValueError."""
    domid, address = word.split("=", 1)
    return int(domid), address


def build_parser() -> argparse.ArgumentParser:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.xen.conformance", description="What Xen does, as checks."
    )
    store = parser.add_argument_group("XenStore")
    store.add_argument(
        "--socket", metavar="PATH", help="check XenStore at this socket, as domain 0"
    )
    store.add_argument(
        "--server",
        choices=sorted(DIFFERENCES),
        default="xenstored",
        help="whose known differences hold (default: xenstored)",
    )
    store.add_argument(
        "--guest",
        action="append",
        default=[],
        metavar="DOMID=PATH",
        help="a socket, or tcp:HOST:PORT of an agent's --store, that acts as this domain; "
        "twice, for the checks of guests",
    )
    store.add_argument(
        "--create-command", metavar="COMMAND", help="creates a domain, prints its id"
    )
    store.add_argument(
        "--destroy-command", metavar="COMMAND", help="destroys the domain whose id follows"
    )
    xen = parser.add_argument_group("grants and event channels")
    xen.add_argument("--xen", action="store_true", help="check the real Xen's")
    xen.add_argument("--embedded", metavar="WORLD", help="check an embedded Xen's")
    xen.add_argument(
        "--domids",
        type=int,
        nargs=2,
        default=[0, 0],
        metavar="N",
        help="the domains of both sides; with --xen both are this one (default: 0 0)",
    )
    for side, does in (("one", "shares pages and makes ports"), ("other", "maps and binds")):
        xen.add_argument(
            f"--{side}",
            type=word_of_agent,
            metavar="DOMID=ADDRESS",
            help=f"the side that {does} is this domain, where an agent (agent.py) listens there",
        )
    parser.add_argument(
        "--check", action="append", default=[], metavar="NAME", help="only this one"
    )
    parser.add_argument(
        "--need", choices=[need.name for need in Need], help="only checks that need this"
    )
    parser.add_argument("--list", action="store_true", help="list the checks")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


@contextmanager
def store_place(args: argparse.Namespace) -> Iterator[StorePlace]:
    """Give the XenStore that the options name."""
    guests = dict(word.split("=", 1) for word in args.guest)
    life = None
    if args.create_command and args.destroy_command:
        life = CommandLife(args.create_command, args.destroy_command)
    with StoreClient(args.socket) as client:
        listed = client.ls("/local/domain")
    peers = [int(name) for name in listed if name.isdecimal() and name != "0"]
    yield StorePlace(
        socket=args.socket,
        guest_sockets={int(domid): path for domid, path in guests.items()},
        peers=sorted(peers),
        life=life,
        guests_in_order=args.server != "xenbus",
    )


@contextmanager
def xen_place(args: argparse.Namespace) -> Iterator[XenPlace]:
    """Give the two sides that the options name."""
    with ExitStack() as stack:
        sides: list[tuple[int, Side]] = []
        for domid, agent in zip(args.domids, (args.one, args.other), strict=True):
            if agent:
                sides.append((agent[0], stack.enter_context(RemoteSide(agent[1]))))
            else:
                local = LocalSide.open(where(args, domid))
                sides.append((domid, stack.enter_context(local)))
        (one_domid, one), (other_domid, other) = sides
        yield XenPlace(one, other, one_domid, other_domid)


def where(args: argparse.Namespace, domid: int) -> str:
    """Return how a domain's programs find Xen."""
    return "xen" if args.xen else str(Path(args.embedded, "dom", str(domid), "xen.sock"))


def wanted(args: argparse.Namespace, check: Check) -> bool:
    """Return whether the options ask for a check."""
    if args.need and Need[args.need] not in check.needs:
        return False
    return not args.check or check.name in args.check


def show(result: Result, *, as_json: bool) -> None:
    """Print one result."""
    if as_json:
        print(json.dumps(result.as_dict()), flush=True)
    else:
        print(f"{result.verdict.value:24} {result.check.name} {result.detail}".rstrip(), flush=True)


def main() -> int:
    """Run the checks that the options ask for."""
    parser = build_parser()
    args = parser.parse_args()
    places: list[tuple[set[Group], str]] = []
    if args.list:
        for check in of_groups(set(Group)):
            print(f"{check.group.value:7} {check.name}: {check.text}")
        return 0
    if args.socket:
        places.append(({Group.STORE}, args.server))
    if args.xen or args.embedded:
        places.append(({Group.GRANTS, Group.EVENTS}, "xen" if args.xen else "embedded"))
    if not places:
        parser.error("give --socket, --xen or --embedded")
    counts = dict.fromkeys(Verdict, 0)
    for groups, server in places:
        checks = [check for check in of_groups(groups) if wanted(args, check)]
        make = store_place if groups == {Group.STORE} else xen_place
        with make(args) as place:
            here: Place = place
            for result in run_all(checks, here, server):
                counts[result.verdict] += 1
                show(result, as_json=args.json)
    summary = {verdict.value: count for verdict, count in counts.items()}
    print(json.dumps({"summary": summary}) if args.json else summary)
    return 1 if counts[Verdict.FAILED] or counts[Verdict.VANISHED] else 0


if __name__ == "__main__":
    sys.exit(main())
