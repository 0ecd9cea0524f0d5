"""The options of all commands.

Theory of operation.  One parser knows every command; those of OPERATOR_COMMANDS bring
their options with their modules, which are imported only for the command that is asked
for.  The configuration file's keys are these options (`config.py`), and the man pages are
written from them.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from . import __version__

OPERATOR_COMMANDS: dict[str, tuple[str, str]] = {
    "libvirt-hook": ("start and stop a guest's bridge as libvirt asks", ".toolstack.libvirt"),
    "guest": ("start, stop or show the bridge of a guest", ".toolstack.guest_command"),
    "stub-domains": (
        "join guests' stub domains to their vTPM domains",
        ".toolstack.stub_domains",
    ),
    "doctor": (
        "say what keeps this host's guests from a TPM, and what mends it",
        ".toolstack.doctor",
    ),
    "vtpm-image": ("build a small bootable vTPM domain", ".image.command"),
}
"""What prepares and looks after a host: each command's text for --help and its module.

Such a module has `add_arguments(parser)` and `main(args)`, which returns the exit status,
and is imported when its command is asked for.
"""


def _add_place(parser: argparse.ArgumentParser, *, own_domid: bool = True) -> None:
    group = parser.add_argument_group("where")
    group.add_argument(
        "--embedded",
        metavar="WORLD",
        help="use the embedded Xen whose directory this is, instead of the real one",
    )
    if own_domid:
        group.add_argument(
            "--domid",
            type=int,
            default=None,
            metavar="N",
            help="the domain this program runs in (asked from XenStore if not given)",
        )


def _add_device(parser: argparse.ArgumentParser, *, entries_may_say: bool = False) -> None:
    group = parser.add_argument_group("the device")
    group.add_argument(
        "--backend",
        required=not entries_may_say,
        metavar="DOMID|NAME",
        help="the vTPM domain, by id or by name"
        + ("; outside domain 0 the one that the entries name" if entries_may_say else ""),
    )
    group.add_argument("--handle", type=int, default=0, help="the device's number (default: 0)")
    group.add_argument(
        "--path-mode",
        choices=["seed", "device", "zeros", "explicit"],
        default="seed",
        help="where the frontend directory lies: seed is "
        "/local/domain/0/frontend/vtpm/VTPM/HANDLE; device and zeros are for an unpatched "
        "Mini-OS vTPM domain (default: seed)",
    )
    group.add_argument("--frontend-path", metavar="PATH", help="with --path-mode explicit")


def _add_tpm(parser: argparse.ArgumentParser, *, stops_guest: bool) -> None:
    tpm = parser.add_argument_group("the TPM")
    tpm.add_argument(
        "--tpm", choices=["2.0", "1.2"], default="2.0", help="the family (default: 2.0)"
    )
    tpm.add_argument(
        "--reset",
        choices=["verified", "restart-domain", "keep"],
        default="verified",
        help="how a TPM is power-cycled when the guest is reset (default: verified)",
    )
    tpm.add_argument(
        "--restart-command",
        action="append",
        default=[],
        metavar="WORD",
        help="with --reset restart-domain; once for each word",
    )
    if stops_guest:
        tpm.add_argument(
            "--on-reset-failure",
            choices=["tpm-failure", "stop-guest"],
            default="tpm-failure",
            help="without evidence of a reset: refuse TPM commands, or have QEMU exit",
        )
    tpm.add_argument("--vtpm-uuid", metavar="UUID", help="serve from this domain only")
    tpm.add_argument(
        "--attach",
        action="store_true",
        help="write the XenStore entries as the attach command does, also for a vTPM domain that "
        "is recreated under the name that --backend gives",
    )
    tpm.add_argument(
        "--allow-missing-feature",
        action="store_true",
        help="use a backend that does not say feature-protocol-v2, as Mini-OS' after a detach and "
        "attach under a running vTPM domain",
    )


def _add_record(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--record",
        metavar="FILE",
        help="write down what is asked, for the decode command: of commands and responses the "
        "headers and lengths only",
    )
    group.add_argument(
        "--record-payloads",
        action="store_true",
        help="keep whole commands and responses in the record; they hold the guest's secrets",
    )


def _add_privileges(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("privileges")
    group.add_argument(
        "--run-as",
        metavar="USER[:GROUP]",
        help="become this user once everything is open; names or numbers",
    )
    group.add_argument(
        "--confine",
        choices=["auto", "require", "off"],
        default="auto",
        help="give up what is not needed any more: what this kernel can do (auto, the default), "
        "all of it or do not start (require; as root it needs --run-as), or nothing (off)",
    )


def _add_common(parser: argparse.ArgumentParser, command: str) -> None:
    group = parser.add_argument_group("general")
    group.add_argument(
        "--config", metavar="FILE", help=f"TOML; options stand in its table [{command}]"
    )
    group.add_argument("--log-format", choices=["text", "json"], default="text")
    group.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")


_RUN = """\
Serves one guest: the frontend of a vTPM domain on one side, on the other what QEMU
expects of swtpm. Start it before QEMU, which connects once and does not try again; the
vTPM domain may boot later. When QEMU leaves, it waits for the next one."""

_QEMU = """\
Write the XenStore entries first:

    qemu-vtpm-bridge attach --backend vtpm-of-guest
    qemu-vtpm-bridge run --backend vtpm-of-guest --socket /run/qemu-vtpm-bridge/guest.sock

QEMU's part, by hand:

    -chardev socket,id=chrtpm,path=/run/qemu-vtpm-bridge/guest.sock
    -tpmdev emulator,id=tpm0,chardev=chrtpm -device tpm-crb,tpmdev=tpm0

and in an xl.cfg (one line):

    device_model_args_hvm = ["-chardev",
        "socket,id=chrtpm,path=/run/qemu-vtpm-bridge/guest.sock",
        "-tpmdev", "emulator,id=tpm0,chardev=chrtpm", "-device", "tpm-crb,tpmdev=tpm0"]

Exit status: 0 done, 1 failed while running, 2 a wrong option, file or entry,
130 interrupted."""

_VTPM = """\
Is a vTPM domain's program: a tpmif backend with swtpm as its TPM, for several frontends
at once, one command at a time. Run it in a domain of its own; what the TPM keeps is in
the state directory."""

_ENTRIES = """\
The entries join a frontend's directory and a backend's in one transaction, with libxl's
permissions. Entries that are there and agree are left alone; what is known to break a
vTPM domain is refused."""


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    *,
    description: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    With `command`, of the commands in OPERATOR_COMMANDS only this one has its options: the
    others' modules are not imported.
    """
    parser = argparse.ArgumentParser(
        prog="qemu-vtpm-bridge",
        description="Gives an unmodified QEMU the TPM of a Xen vTPM domain.",
        epilog="Each command has its own --help; `qemu-vtpm-bridge demo` shows the whole chain.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _add_command(
        commands, "run", "serve one guest's QEMU from a vTPM domain", description=_RUN, epilog=_QEMU
    )
    _add_device(run, entries_may_say=True)
    _add_place(run)
    door = run.add_argument_group("QEMU's door, for a QEMU that has TPM devices")
    door.add_argument(
        "--socket",
        metavar="SPEC",
        help="PATH[,mode=0600][,owner=USER[:GROUP]] | fd=N | systemd | tcp=PORT[,bind=ADDR]",
    )
    own = run.add_argument_group("the guest's registers, where QEMU has no TPM devices (Xen only)")
    own.add_argument(
        "--device",
        choices=["tis", "crb"],
        help="be the guest's TPM at 0xFED40000: tis for TPM 1.2, and for 2.0 where Xen is older "
        "than 4.18; crb for 2.0",
    )
    own.add_argument(
        "--guest",
        metavar="NAME|DOMID",
        help="the guest, which may come later and is followed over its reboots",
    )
    door.add_argument(
        "--status-socket", metavar="PATH", help="answers one JSON document per connection"
    )
    door.add_argument("--terminate", action="store_true", help="end when QEMU or the guest leaves")
    door.add_argument(
        "--state-blobs",
        choices=["refuse", "empty"],
        default="refuse",
        help="what QEMU gets that wants to save the TPM with the guest: an error, or nothing "
        "because the state stays in the vTPM domain",
    )
    _add_record(door)
    _add_tpm(run, stops_guest=True)
    _add_privileges(run)
    run.add_argument(
        "--chroot",
        metavar="DIR",
        help="with --run-as: have this directory for the root of the file system from then on",
    )
    _add_common(run, "run")

    device = commands.add_parser(
        "device", help="be a guest's TPM at register level, from a vTPM domain, over vfio-user"
    )
    _add_device(device)
    _add_place(device)
    registers = device.add_argument_group("the register devices")
    registers.add_argument(
        "--socket",
        metavar="SPEC",
        required=True,
        help="PATH[,mode=0600][,owner=USER[:GROUP]] | fd=N | systemd",
    )
    registers.add_argument(
        "--registers",
        choices=["tis", "crb", "both"],
        default="tis",
        help="the devices, in the order of their BARs (default: tis)",
    )
    registers.add_argument(
        "--status-socket", metavar="PATH", help="answers one JSON document per connection"
    )
    registers.add_argument("--terminate", action="store_true", help="end when the client leaves")
    _add_record(registers)
    _add_tpm(device, stops_guest=False)
    _add_privileges(device)
    _add_common(device, "device")

    vtpm = _add_command(
        commands, "vtpm", "be a vTPM domain: serve frontends from swtpm", description=_VTPM
    )
    _add_place(vtpm)
    vtpm.add_argument("--state-dir", required=True, metavar="DIR", help="where the TPM is kept")
    vtpm.add_argument("--tpm", choices=["2.0", "1.2"], default="2.0")
    vtpm.add_argument("--swtpm", default="swtpm", metavar="PROGRAM")
    vtpm.add_argument(
        "--trust-reset",
        type=int,
        action="append",
        metavar="DOMID",
        help="a frontend in this domain may power-cycle the TPM (default: 0); one whose entries "
        "were written with `attach --trust-reset` may too",
    )
    vtpm.add_argument("--status-socket", metavar="PATH")
    _add_privileges(vtpm)
    _add_common(vtpm, "vtpm")

    for name, text in (("attach", "write a device's XenStore entries"), ("detach", "remove them")):
        entry = _add_command(commands, name, text, description=_ENTRIES)
        _add_device(entry)
        _add_place(entry, own_domid=False)
        entry.add_argument(
            "--domid",
            metavar="DOMID|NAME",
            help="the frontend's domain, by id or by name (default: 0)",
        )
        if name == "attach":
            entry.add_argument("--uuid", help="the device's uuid (default: a random one)")
            entry.add_argument("--guest", metavar="NAME", help="noted beside the entries")
            entry.add_argument(
                "--trust-reset",
                action="store_true",
                help="the frontend may have the TPM power-cycled, as one in domain 0 may: for a "
                "stub domain that runs a guest's QEMU, never for the guest itself",
            )
        entry.add_argument("--force", action="store_true")
        entry.add_argument("--json", action="store_true", help="print JSON")
        _add_common(entry, name)

    listing = commands.add_parser("list", help="list the vtpm devices in XenStore")
    _add_place(listing, own_domid=False)
    listing.add_argument("--json", action="store_true", help="print JSON")
    _add_common(listing, "list")

    status = commands.add_parser("status", help="print a running bridge's or vTPM domain's status")
    status.add_argument("status_socket", metavar="SOCKET")
    _add_common(status, "status")

    decode = commands.add_parser(
        "decode",
        help="name what a guest's driver reads and writes",
        description="Turns register accesses into names: a value (tis STS 0x90), what the data "
        "sheet says (crb 0x4c), a response code (rc 0x9a2), an ordinal (ordinal 0x144), or records "
        "that --record wrote (FILE ..., - for standard input).",
    )
    decode.add_argument(
        "words",
        nargs="+",
        metavar="WORD",
        help="tis|crb PLACE [VALUE] | rc N | ordinal N | FILE...",
    )
    decode.add_argument("--tpm", choices=["2.0", "1.2"], default="2.0", help="whose names")
    decode.add_argument(
        "--size", type=int, choices=range(1, 9), metavar="BYTES", help="how wide the access was"
    )
    decode.add_argument("--json", action="store_true", help="print JSON")
    _add_common(decode, "decode")

    embedded = commands.add_parser("embedded-xen", help="a Xen to play with, on a machine without")
    embedded.add_argument("world", metavar="WORLD", help="a directory; it is made if missing")
    embedded.add_argument(
        "--domain", action="append", default=[], metavar="ID:NAME", help="create this domain too"
    )
    _add_common(embedded, "embedded-xen")

    commands.add_parser("demo", help="show the whole chain with QEMU and a guest", add_help=False)
    for name, (text, module) in OPERATOR_COMMANDS.items():
        operator = commands.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if command in (None, name):
            operator_module(module).add_arguments(operator)
            _add_common(operator, name)
    return parser


def operator_module(name: str) -> Any:
    """Return the module of an operator's command."""
    return importlib.import_module(name, __package__)
