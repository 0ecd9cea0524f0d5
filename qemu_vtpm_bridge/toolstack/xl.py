"""`qemu-vtpm-bridge-dm`: what xl starts in QEMU's place, and what becomes QEMU.

    device_model_override = "/usr/local/bin/qemu-vtpm-bridge-dm"

Theory of operation.  libxl starts the program with QEMU's whole command line, gives it
descriptors, keeps its process id and kills that one later; so this looks at the words, sees
to the guest's bridge, adds what is missing and becomes QEMU by exec: same process, same
descriptors, same words otherwise.  A guest's TPM is known by its name in the guests file, or
by words that xl hands through, which are taken out again:

    device_model_args_hvm = ["-vtpm", "backend=vtpm-of-web"]

Where the QEMU has TPM devices it is given one; where it has none, the bridge is the device.
Left alone are: a call without -xen-domid, by which Xen 4.20 asks QEMU what it can; a guest
that is not in the file; a PV guest, whose QEMU has no board for a TPM.

A guest that comes out of an image of `xl save` goes on without its TPM until it boots again
where the bridge is the device: QEMU could not refuse the save, the image has no TPM, and a TPM
that is reset under a running guest would take any measurements from it for those of its boot.

What can be refused is refused before QEMU runs: the message goes to xl's log for the guest,
/var/log/xen/qemu-dm-NAME.log, and xl says that the device model did not start.

Source: libxl's libxl_dm.c; hvmloader's acpi code for platform/tpm_version.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import BridgeError, ConfigError
from ..xen.domains import tell_hvmloader
from ..xen.store import Store
from ..xen.xenbus import DOMID_FIRST_RESERVED
from . import guests
from .device_model import find_device_model, qemu_words, tpm_devices
from .guests import Guest, GuestsFile
from .launch import ensure_bridge, ensure_ioreq_bridge, stop_bridge, with_store

log = logging.getLogger(__name__)

EXIT_FAILED: Final = 1
VTPM_OPTION: Final = "-vtpm"
_OPTIONS_WITH_A_NAME: Final = (
    *("-name", "-xen-domid", "-M", "-machine", "-tpmdev", "-incoming"),
    VTPM_OPTION,
)


@dataclass(frozen=True, slots=True)
class DmCall:
    """What libxl's words for a device model say."""

    domid: int | None
    """None where Xen only asks what this QEMU can."""
    name: str | None
    machine: str
    vtpm: str | None
    """The value of -vtpm."""
    has_tpm: bool
    """The words give QEMU a TPM already."""
    incoming: bool
    """The guest does not boot; it comes out of an image, or from another host."""
    words: tuple[str, ...]
    """All but -vtpm and its value."""


def parse_call(words: Sequence[str]) -> DmCall:
    """Return what the words say; raises ConfigError where they cannot be libxl's.

    Where libxl and the guest's configuration both say a thing, libxl said it first.
    """
    found: dict[str, list[str]] = {option: [] for option in _OPTIONS_WITH_A_NAME}
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        # QEMU takes two dashes for one.
        option = word[1:] if word.startswith("--") else word
        if option not in found:
            kept.append(word)
            continue
        value = next(rest, None)
        if value is not None:
            found[option].append(value)
        elif option == VTPM_OPTION:
            raise _wrong_vtpm("has no value")
        if option != VTPM_OPTION:
            kept += [word] if value is None else [word, value]
    if len(found[VTPM_OPTION]) > 1:
        raise _wrong_vtpm("is there twice")
    return DmCall(
        domid=_domid(found["-xen-domid"]),
        name=next(iter(found["-name"]), None),
        machine=next(iter(found["-machine"] or found["-M"]), ""),
        vtpm=next(iter(found[VTPM_OPTION]), None),
        has_tpm=bool(found["-tpmdev"]),
        incoming=bool(found["-incoming"]),
        words=tuple(kept),
    )


def _wrong_vtpm(what: str) -> ConfigError:
    return ConfigError(
        f"{VTPM_OPTION} {what}",
        state="it stands in the guest's device_model_args",
        next_step=f'write device_model_args_hvm = ["{VTPM_OPTION}", "backend=VTPM-DOMAIN"]',
    )


def _domid(values: list[str]) -> int | None:
    if not values:
        return None
    if values[0].isascii() and values[0].isdecimal() and int(values[0]) < DOMID_FIRST_RESERVED:
        return int(values[0])
    raise ConfigError(
        f"-xen-domid {values[0]!r} is no domain", next_step="start this through xl, not by hand"
    )


def prepare(words: Sequence[str], file: GuestsFile, wrapper: Path | None = None) -> list[str]:
    """See to the guest's TPM; return the command line to become.

    Raises BridgeError; no QEMU may run then.
    """
    call = parse_call(words)
    host = file.host
    if call.domid is None or call.machine.startswith("xenpv"):
        return [str(find_device_model(host.device_model, not_this=wrapper)), *words]
    name = call.name or _name(file, call.domid)
    guest = _guest(file, name, call.vtpm)
    if guest is None:
        return [str(find_device_model(host.device_model, not_this=wrapper)), *words]
    if call.has_tpm:
        raise ConfigError(
            f"guest {name!r} has a -tpmdev of its own, and an entry in {file.path} or a -vtpm",
            next_step="take the -tpmdev out of the guest's device_model_args, or the entry away",
        )
    qemu = find_device_model(guest.device_model or host.device_model, not_this=wrapper)
    of_qemu = guest.device in tpm_devices(qemu, host.run_dir)
    if call.incoming and not of_qemu:
        log.warning(
            "guest %r comes out of an image, which has no TPM in it: it has none until it boots",
            name,
        )
        # One that was left from before the save serves every domain of this name.
        stop_bridge(guest, **host.where())
        return [str(qemu), *call.words]
    # First, as it goes away with the domain, whatever happens next.
    _tell_hvmloader(file, call.domid, guest.device)
    if of_qemu:
        socket = ensure_bridge(guest, **host.where())
        return [str(qemu), *call.words, *qemu_words(socket, guest.device)]
    ensure_ioreq_bridge(guest, call.domid, **host.where())
    return [str(qemu), *call.words]


def _guest(file: GuestsFile, name: str, vtpm: str | None) -> Guest | None:
    if vtpm is not None:
        return file.with_words(name, vtpm)
    return file.guests.get(name)


# XenStore.


def _name(file: GuestsFile, domid: int) -> str:
    async def read(store: Store) -> str:
        raw = await store.read(f"/local/domain/{domid}/name")
        return raw.decode("utf-8", "surrogateescape")

    return with_store(read, file.host.embedded)


def _tell_hvmloader(file: GuestsFile, domid: int, registers: str) -> None:
    """Say which TPM hvmloader is to look for; the guest does not run yet."""

    async def write(store: Store) -> None:
        if not await tell_hvmloader(store, domid, registers):
            raise ConfigError(
                f"there is no domain {domid}", next_step="start this through xl, not by hand"
            )

    with_store(write, file.host.embedded)


def main() -> int:
    """Become QEMU; return an exit status where that cannot be."""
    try:
        file = guests.read(guests.default_path(), missing_is_empty=True)
        command = prepare(sys.argv[1:], file, Path(sys.argv[0]))
    except BridgeError as error:
        print(f"qemu-vtpm-bridge-dm: {error}", file=sys.stderr)
        return EXIT_FAILED
    # Python ignores these two, and what is ignored stays so over exec.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execv(command[0], command)
    except OSError as error:
        print(f"qemu-vtpm-bridge-dm: {command[0]}: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
