"""What xenopsd and swtpm's wrapper say to the program that is to be a guest's TPM.

Theory of operation.  There are two ways to be called, and this program stands in for either:

* as xenopsd's `swtpm-wrapper`: `DOMID DIRECTORY STATE-URI [NEEDS-INIT] [--priv]`.  The
  wrapper makes the socket `swtpm-sock` in the directory, and becomes the TPM;
* as the swtpm that this wrapper executes: `socket --tpm2 ... --ctrl type=unixio,fd=N
  --pid file=FILE -t [--chroot DIRECTORY] [--runas USER]`, with the socket inherited.

Both are parsed here into a `Call`; nothing is opened.  Words of swtpm that say where and how
it keeps its state are taken and mean nothing, as the state is in the vTPM domain; a word that
is not known is refused, since it may ask for something that would then not be done.

Keeps P10.  Who may lie: nobody; xenopsd is domain 0's.

Source: xen-api, ocaml/xenopsd/scripts/swtpm-wrapper and ocaml/xenopsd/xc/service.ml of 2022
to 2024; swtpm(8).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from ..errors import ConfigError
from .guests import GUESTS_FILE

SOCKET_NAME: Final = "swtpm-sock"
STATE_NAME: Final = "tpm2-00.permall"
"""What xenopsd reads, and keeps in xapi's database, after it had the TPM made."""

STATUS_NAME: Final = "bridge.status"
"""Ours, beside the pid file: `qemu-vtpm-bridge status` reads it."""

DOMID_MAX: Final = 0x7FEF
_DOMID_IN_NAME: Final = re.compile(r"(?:.*/)?swtpm-(\d{1,5})(?:\.pid)?")


@dataclass(frozen=True, slots=True)
class Call:
    """One call, whichever way it came."""

    domid: int
    """The guest's domain."""
    root: Path | None
    """The directory that xenopsd made for this TPM; as swtpm, the one to go into."""
    control_fd: int | None = None
    """The inherited socket; None where it is to be made."""
    pid_file: Path | None = None
    """As swtpm only; inside the root where there is one."""
    needs_init: bool = False
    """The TPM is to be made, not run."""
    keeps_file: bool = False
    """xenopsd reads the state's file when the guest ends."""
    terminate: bool = True
    """End when QEMU leaves."""
    confine: bool = True
    """Go into the root, and become another user."""
    user: str | None = None
    """As whom to run; None is the user that xenopsd's wrapper takes."""
    guests_path: Path = GUESTS_FILE
    delegate: tuple[str, ...] = ()
    """The words that the program we stand in for would have got."""

    @property
    def name(self) -> str:
        """By this name in the command line xenopsd knows the process again."""
        return f"swtpm-{self.domid}"


def parse(words: Sequence[str], name: str = "") -> Call:
    """Return what a call asks for; `name` is the program's own, by which swtpm is called.

    Raises ConfigError where the words are neither a wrapper's nor a swtpm's.
    """
    if words[:1] == ["socket"]:
        return _as_swtpm(words, name)
    return _as_wrapper(words)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong by an exception, like the rest of the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(
            f"this is not how xenopsd calls {self.prog}: {message}",
            state=self.format_usage().strip(),
            next_step="compare with docs/guides/xapi.md; xenopsd may have changed",
        )


def _domid(word: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", word) or not 0 < int(word) <= DOMID_MAX:
        raise ConfigError(
            f"{word!r} is no guest's domain id", next_step=f"give a number from 1 to {DOMID_MAX}"
        )
    return int(word)


def _as_wrapper(words: Sequence[str]) -> Call:
    parser = _Parser(prog="swtpm-wrapper", add_help=False, allow_abbrev=False)
    parser.add_argument("domid")
    parser.add_argument("root", type=Path)
    parser.add_argument("state")
    parser.add_argument("needs_init", nargs="?", choices=["true", "false"], default="false")
    parser.add_argument("--priv", action="store_true")
    # Our own, for a two-line script that xenopsd calls instead.
    parser.add_argument("--guests", type=Path, default=GUESTS_FILE)
    parser.add_argument("--runas")
    args = parser.parse_args(words)
    if not args.root.is_absolute():
        raise ConfigError(
            f"the directory {str(args.root)!r} is no path that begins with /",
            next_step="give the directory that xenopsd made for this TPM",
        )
    domid = _domid(args.domid)
    return Call(
        domid=domid,
        root=args.root,
        needs_init=args.needs_init == "true",
        keeps_file=args.state.startswith("file:"),
        confine=not args.priv,
        user=args.runas,
        guests_path=args.guests,
        delegate=tuple(_without_own(words)),
    )


def _without_own(words: Sequence[str]) -> list[str]:
    """Return the words without those options that only we know."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        option = word.partition("=")[0]
        if option not in ("--guests", "--runas"):
            kept.append(word)
        elif "=" not in word:
            next(rest, None)
    return kept


def _as_swtpm(words: Sequence[str], name: str) -> Call:
    parser = _Parser(prog="swtpm", add_help=False, allow_abbrev=False)
    parser.add_argument("kind", choices=["socket"])
    parser.add_argument("--tpm2", action="store_true")
    parser.add_argument("--tpmstate")
    parser.add_argument("--ctrl", required=True)
    parser.add_argument("--log")
    parser.add_argument("--pid", required=True)
    parser.add_argument("-t", "--terminate", action="store_true")
    parser.add_argument("-R", "--chroot", type=Path)
    parser.add_argument("-r", "--runas")
    parser.add_argument("--seccomp")
    args = parser.parse_args(words)
    control = re.fullmatch(r"type=unixio,fd=(\d{1,9})", args.ctrl)
    if control is None:
        parser.error(f"--ctrl {args.ctrl} is not type=unixio,fd=N")
    pid = re.fullmatch(r"file=(.+)", args.pid)
    if pid is None:
        parser.error(f"--pid {args.pid} is not file=FILE")
    named = _DOMID_IN_NAME.fullmatch(pid[1]) or _DOMID_IN_NAME.fullmatch(name)
    if named is None:
        parser.error(f"neither --pid {args.pid} nor the program's name says swtpm-DOMID")
    return Call(
        domid=_domid(named[1]),
        root=args.chroot,
        control_fd=int(control[1]),
        pid_file=Path(pid[1]),
        terminate=args.terminate,
        confine=args.chroot is not None or args.runas is not None,
        user=args.runas,
        delegate=tuple(words),
    )
