"""`qemu-vtpm-bridge guest`: a guest's bridge by the guest's name, for people and for hooks.

    qemu-vtpm-bridge guest show web       # what goes into the guest's xl.cfg
    qemu-vtpm-bridge guest ensure web     # before `xl create`
    qemu-vtpm-bridge guest stop web       # when the guest is gone for good

Theory of operation.  The guests file says which vTPM domain a guest has; launch.py does the
rest, and can be asked again at any time.  A bridge stays when its guest ends, since the
guest's next QEMU finds the same socket.  Where this host's QEMU has no TPM devices the bridge
is the device itself, and follows the guest by its name.

Keeps P10.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, Final

from ..errors import ConfigError
from . import guests
from .device_model import find_device_model, qemu_words, tpm_devices, xl_cfg_list
from .guests import Guest, GuestsFile, socket_path
from .launch import ensure_bridge, stop_bridge

DOORS: Final = ("auto", "socket", "registers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = (
        "Starts, stops or shows the bridge of a guest that the guests file names. Each can be "
        "run again at any time, and finishes what was cut short."
    )
    parser.add_argument("action", choices=list(_ACTIONS), help="what to do")
    parser.add_argument("name", metavar="NAME", help="the guest, as the guests file names it")
    guests.add_option(parser)
    parser.add_argument(
        "--door",
        choices=DOORS,
        default="auto",
        help="how the guest's QEMU gets to the TPM: through a socket, or not at all, where the "
        "bridge has the registers itself (default: the socket where this host's QEMU has TPM "
        "devices)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Do it; return the exit status.  Raises ConfigError or XenError."""
    file = guests.read(args.guests)
    document, text = _ACTIONS[args.action](file, file.find(args.name), args.door)
    print(json.dumps(document) if args.json else text)
    return 0


def _has_registers(file: GuestsFile, guest: Guest, door: str) -> bool:
    """Return whether the bridge is to be the device itself."""
    if door != "auto":
        return door == "registers"
    try:
        qemu = find_device_model(guest.device_model or file.host.device_model)
    except ConfigError:
        return False  # the QEMU lies elsewhere, and whoever starts it knows what it can
    return guest.device not in tpm_devices(qemu, file.host.run_dir)


def _ensure(file: GuestsFile, guest: Guest, door: str) -> tuple[dict[str, Any], str]:
    registers = _has_registers(file, guest, door)
    path = ensure_bridge(guest, **file.host.where(), ioreq=registers)
    key = "status-socket" if registers else "socket"
    return {"guest": guest.name, key: str(path)}, str(path)


def _stop(file: GuestsFile, guest: Guest, door: str) -> tuple[dict[str, Any], str]:
    del door
    stopped = stop_bridge(guest, **file.host.where())
    text = f"the bridge of {guest.name} was {'stopped' if stopped else 'not there'}"
    return {"guest": guest.name, "stopped": stopped}, text


def _show(file: GuestsFile, guest: Guest, door: str) -> tuple[dict[str, Any], str]:
    document: dict[str, Any] = {"guest": guest.name, "backend": guest.backend}
    document["device"] = guest.device
    if _has_registers(file, guest, door):
        document["qemu"] = []
        return document, "# nothing: the bridge has the TPM's registers itself"
    socket = socket_path(guest.name, file.host.run_dir)
    words = qemu_words(socket, guest.device)
    document |= {"socket": str(socket), "qemu": words}
    return document, xl_cfg_list("device_model_args_hvm", words)


_ACTIONS: Final = {"ensure": _ensure, "stop": _stop, "show": _show}
