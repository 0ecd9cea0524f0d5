"""libvirt's hook: a bridge is there before a guest's QEMU, and goes after it.

Theory of operation.  libvirtd calls `libvirt-hook NAME OPERATION SUBOPERATION EXTRA` at the
stations of a guest's life, waits for it, and gives it the domain's XML on standard input.
Three stations matter (`ACTIONS`); at all others there is nothing to do.  Which vTPM domain a
guest has stands in its XML's metadata, or else in the guests file; a guest in neither has no
TPM from here, and its hook says and does nothing.

What libvirt does with a hook's end decides how ours ends:

* `prepare` that fails stops the guest's start, which is right: QEMU would not find its
  socket.  Nothing is left half done (`launch.ensure_bridge`).
* `reconnect` that fails makes libvirt give the running guest up, and some versions kill it.
  A TPM is not worth that: what went wrong is said, and the exit status is 0.
* What a hook prints, libvirt takes for the domain's XML in its next script, so that nothing
  of ours goes to standard output.

A guest whose emulator is the wrapper `qemu-vtpm-bridge-dm` has its bridge started by that; its
hook refuses a start in which the wrapper, which has no XML, would find another TPM or none, and
ends the bridge.  A bridge that runs is never replaced at `reconnect`, whatever the guests file
says by then, for the guest's QEMU may be on it.

A hook must not call libvirt, which waits for it; this one calls nobody but XenStore.

Keeps P8 and P10.  Who may lie: the XML, see domain_xml.py.

Source: libvirt's docs/hooks.rst; libxl_domain.c and libxl_driver.c of libvirt 9 and 11.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys
from enum import Enum, auto
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import BridgeError, ConfigError
from . import guests
from .device_model import DEVICES, qemu_words
from .domain_xml import XML_MAX_BYTES, Domain, kvm_snippet, parse_domain, xen_snippet
from .guests import Guest, GuestsFile
from .launch import Launch

log = logging.getLogger(__name__)

WRAPPER: Final = "qemu-vtpm-bridge-dm"

_HELP: Final = """\
Called by libvirt: install packaging/libvirt/qemu-vtpm-bridge as
/etc/libvirt/hooks/libxl.d/qemu-vtpm-bridge, and restart libvirtd.  It starts a guest's
bridge before the guest and stops it afterwards.

By hand, --snippet prints what goes into a guest's XML so that its QEMU finds the bridge."""


class Action(Enum):
    """What is to be done at a station of a guest's life."""

    START = auto()
    FIND = auto()
    STOP = auto()


ACTIONS: Final = {
    ("prepare", "begin"): Action.START,
    ("reconnect", "begin"): Action.FIND,
    ("release", "end"): Action.STOP,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.description = _HELP
    parser.add_argument(
        "words",
        nargs="*",
        metavar="NAME OPERATION SUBOPERATION EXTRA",
        help="as libvirt gives them",
    )
    parser.add_argument(
        "--guests",
        type=Path,
        default=guests.GUESTS_FILE,
        metavar="FILE",
        help=f"the guests file (default: {guests.GUESTS_FILE})",
    )
    parser.add_argument("--snippet", metavar="NAME", help="print what goes into this guest's XML")
    parser.add_argument(
        "--driver",
        choices=["xen", "qemu"],
        default="xen",
        help="the libvirt driver that the snippet is for (default: xen)",
    )


def main(args: argparse.Namespace) -> int:
    """Run the hook, or print a snippet; return the exit status."""
    if args.snippet is not None:
        print(snippet(guests.read(args.guests), args.snippet, args.driver))
        return 0
    if len(args.words) != 4:
        raise ConfigError(
            f"libvirt-hook needs four words, not {len(args.words)}",
            next_step="have libvirt call it, or print a guest's XML with --snippet NAME",
        )
    name, operation, suboperation, _ = args.words
    # Who closes standard input has nothing to say.
    xml: BinaryIO = io.BytesIO() if sys.stdin is None else sys.stdin.buffer
    return run_hook(name, operation, suboperation, args.guests, xml)


def run_hook(name: str, operation: str, suboperation: str, guests_path: Path, xml: BinaryIO) -> int:
    """Do what is to be done for the guest at this station; return the exit status.

    Raises BridgeError where a guest must not start.
    """
    # Read to its end in any case: libvirt is writing it.
    raw = xml.read(XML_MAX_BYTES + 1)
    action = ACTIONS.get((operation, suboperation))
    if action is None:
        return 0
    try:
        _act(action, name, guests_path, raw)
    except Exception as error:
        # A defect of ours must not cost a running guest either.
        if action is Action.START:
            raise
        log.error("%s", error, exc_info=not isinstance(error, BridgeError))
    return 0


def _act(action: Action, name: str, guests_path: Path, raw: bytes) -> None:
    known = guests.read(guests_path, missing_is_empty=True)
    domain = _domain(name, raw)
    guest = guest_of(known, domain)
    wrapped = Path(domain.emulator).name == WRAPPER
    if wrapped and action is Action.START:
        _check_wrapper(known, domain.name, guest)
    if guest is None and action is Action.STOP:
        guest = _taken_out(known, name)
    if guest is None:
        return
    host = known.host
    launch = Launch(guest, host.run_dir, host.log_dir, host.embedded)
    if action is Action.STOP:
        launch.stop()
    elif not wrapped and not (
        action is Action.FIND and host.run_dir.is_dir() and launch.process.alive()
    ):
        launch.ensure()


def _check_wrapper(known: GuestsFile, name: str, guest: Guest | None) -> None:
    """See to it that the wrapper finds the same guest; it has no XML, and looks for the name.

    Raises ConfigError where the domain would start with another TPM, or with none.
    """
    if known.guests.get(name) == guest:
        return
    raise ConfigError(
        f"the wrapper knows guest {name!r} by its name only",
        state="its TPM is given by its UUID or its metadata, or its name is another's UUID",
        next_step=f"write it into {known.path} under the guest's name, and take the rest away, "
        "or write -vtpm and its value as two <xen:arg> for the wrapper",
    )


def _domain(name: str, raw: bytes) -> Domain:
    """Return what the XML says, which has to be about the guest that libvirt names."""
    domain = parse_domain(raw)
    if domain.name != name:
        raise ConfigError(
            f"libvirt names guest {name!r}, and its XML {domain.name!r}",
            next_step="see which program calls this hook, and with which words",
        )
    return domain


def guest_of(known: GuestsFile, domain: Domain) -> Guest | None:
    """Return a domain's guest; None where it has no TPM from here.

    Raises ConfigError where its metadata hold what no guest can have.
    """
    if domain.vtpm is not None:
        return _from_metadata(known, domain)
    return known.of_domain(domain.uuid, domain.name)


def _from_metadata(known: GuestsFile, domain: Domain) -> Guest:
    attributes = domain.vtpm or {}
    words = ",".join(f"{key}={value}" for key, value in attributes.items())
    try:
        if any("," in value for value in attributes.values()):
            raise ConfigError("an attribute of <vtpm> has a comma in it")
        return known.with_words(domain.name, words)
    except ConfigError as error:
        raise ConfigError(
            f"the metadata of guest {domain.name!r}: {error.cause}",
            state=error.state,
            next_step="give <vtpm> attributes named as the keys of the guests file, "
            "and backend among them",
        ) from error


def _taken_out(known: GuestsFile, name: str) -> Guest | None:
    """Return a guest that had a bridge and is in the file no longer."""
    stem = guests.file_stem(name, known.host.run_dir)
    if not (known.host.run_dir / f"{stem}.bridge").exists():
        return None
    # The running bridge says which vTPM domain it is for.
    return Guest(name=name, backend="")


def snippet(known: GuestsFile, name: str, driver: str) -> str:
    """Return what goes into a guest's XML; raises ConfigError where there is no such guest."""
    guest = known.find(name)
    socket = guests.socket_path(name, known.host.run_dir)
    if driver == "qemu":
        return kvm_snippet(str(socket), DEVICES[guest.device])
    return xen_snippet(qemu_words(socket, guest.device))
