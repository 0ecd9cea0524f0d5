"""What `run`, `device` and `vtpm` open while they may, and then give up their privileges.

Theory of operation.  All of this happens before trio runs, in the only thread there is,
because `confine` covers that one alone and threads inherit from it.  So XenStore is asked
here by a blocking client, for the two or three things that must be known: this domain's id
and the vTPM domain's.  In this order: what can be wrong with the options; the sockets and
files; XenStore and Xen; `confine`.

What is needed again later stays open.  A page and an event channel are made anew with each
connection to the other end, from devices that are open.  A bridge that becomes another user
leaves XenStore, and Xen's devices where it is a guest's device, to a broker, which stays root
and gives what the bridge is there for.  For others a connection to XenStore that breaks is
replaced by one that was made in advance; once those are used up a new one needs the right
to connect to xenstored's socket, which is root's, and without it the program serves on with
the pages that it has, and says in its log and its status that it must be restarted.

Who may lie: XenStore (P9): what it answers is parsed with bounds.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from .bridge.listen import Listener
from .confine import Confinement, Mode, Policy, User, check, confine, find_user
from .confine_policy import bridge_policy, broker_policy, vtpm_policy
from .errors import ConfigError
from .supervise import Supervisor
from .xen.broker import Broker, Names
from .xen.broker import start as start_broker
from .xen.domains import guest_named, the_domain_named
from .xen.ioreq import GuestDevices, open_devices
from .xen.platform import Platform, Role
from .xen.store import KeptStore, StoreGone
from .xen.store_policy import StorePolicy
from .xen.xenbus import (
    BACKEND_ID,
    DevicePaths,
    PathMode,
    device_paths,
    names_domain,
    parse_domid,
)

log = logging.getLogger(__name__)

STORE_CONNECTIONS: Final = 3
"""One to use and two for when xenstored was too slow for our patience, or a link broke."""

GUEST_STORE_CONNECTIONS: Final = 3
"""Besides, to be a guest's device: one for entries at the start, one to follow the guest by,
and another one for that."""

ENTRIES_LOOK_S: Final = 0.2
"""Between two looks whether entries are there that name the vTPM domain."""

BRIDGE_CHANNELS: Final = 2
"""The one in use, and one for a connection that comes before the last one is gone."""

VTPM_CHANNELS: Final = 10
"""The pump's eight frontends, and some that come before others are gone."""

_LATE: Final = (
    *("encodings.ascii", "encodings.unicode_escape", "json", "traceback"),
    "qemu_vtpm_bridge.bridge.status",
)
LATE_MODULES: Final = {
    "run": (
        *_LATE,
        "qemu_vtpm_bridge.bridge.chardev",
        "qemu_vtpm_bridge.bridge.tap",
        "qemu_vtpm_bridge.names",
        "qemu_vtpm_bridge.service",
    ),
    "device": (
        *_LATE,
        "qemu_vtpm_bridge.bridge.recorded",
        "qemu_vtpm_bridge.device_service",
        "qemu_vtpm_bridge.names",
    ),
    "run --device": (
        *_LATE,
        "qemu_vtpm_bridge.guest_service",
        "qemu_vtpm_bridge.names",
    ),
    "vtpm": (*_LATE, "qemu_vtpm_bridge.vtpm.domain"),
}
"""By command, modules that are otherwise imported where they are needed; another user may not
be able to read them any more."""


@dataclass
class Opened:
    """What a command goes on with.  Close it at the end."""

    domid: int
    store: KeptStore
    platform: Platform
    supervisor: Supervisor
    status: Listener | None = None
    record: TextIO | None = None
    backend_domid: int = -1
    guest: str = ""
    """The name of the guest whose device the bridge is."""
    guest_devices: GuestDevices | None = None
    confinement: Confinement | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def status_part(self) -> dict[str, Any]:
        """Return the part of the status document that is about privileges."""
        return {"confinement": self.confinement and self.confinement.as_dict()}

    def close(self) -> None:
        """Release what is still open.  Safe to call twice."""
        self._stack.close()


def open_for_bridge(args: argparse.Namespace, listener: Listener | None) -> Opened:
    """Open what serves one guest, and give up privileges.  Raises BridgeError."""
    with ExitStack() as stack:
        root = _root(args)
        mode, user = _who(args)
        if args.reset == "restart-domain":
            mode = _for_restart_command(args, mode)
        opened = _open_xen(args, stack)
        if args.record is not None:
            from .bridge.record import close_record, create_record

            opened.record = create_record(args.record)
            stack.callback(close_record, opened.record)
        opened.backend_domid = _find_backend(args, opened)
        registers = _is_device(args)
        opened.guest = guest_named(opened.store, args.guest) if registers else ""
        broker = None
        if user is None:
            opened.store.keep(STORE_CONNECTIONS + (GUEST_STORE_CONNECTIONS if registers else 0))
        else:
            broker = _start_broker(args, opened)
        if registers:
            opened.guest_devices = open_devices(broker)
        # Not restricted to the vTPM domain: Linux then refuses every unbound port, and that is
        # what a frontend offers.
        opened.platform.keep_open(Role.SHARES, BRIDGE_CHANNELS)
        listeners = [each for each in (listener, opened.status) if each is not None]
        policy = bridge_policy(sockets=_paths_of(*listeners), device_model=registers)
        done = _confined(args, opened, policy, mode, user, stack, root)
        if root is not None:
            for each in listeners:
                each.path = _inside(root, each.path)
        return done


def open_for_vtpm(args: argparse.Namespace) -> Opened:
    """Open what a vTPM domain needs, and give up privileges.  Raises BridgeError."""
    from .vtpm.engine import make_state_dir

    with ExitStack() as stack:
        mode, user = _who(args)
        state_dir = Path(args.state_dir).resolve()
        make_state_dir(state_dir, user)
        opened = _open_xen(args, stack)
        try:
            opened.store.keep(STORE_CONNECTIONS)
        except StoreGone as error:
            log.warning("%s; trying again every second", error.cause)
        opened.platform.keep_open(Role.MAPS, VTPM_CHANNELS)
        policy = vtpm_policy(
            state_dir=state_dir, swtpm=args.swtpm, sockets=_paths_of(opened.status)
        )
        return _confined(args, opened, policy, mode, user, stack)


def _start_broker(args: argparse.Namespace, opened: Opened) -> Broker:
    """Have another process keep what this one is about to give up."""
    paths_for = paths_of(args, opened.domid)

    def policy_with(names: Names) -> StorePolicy:
        return StorePolicy(
            paths_for=paths_for,
            name_of=names.of,
            vm_of=names.vm,
            backend_domid=opened.backend_domid,
            backend_name=backend_name(args),
            follows_entries=args.backend is None,
            writes_entries=args.attach,
            guest=opened.guest or None,
        )

    def confine_broker() -> None:
        # What is said there is about the bridge, for those who look at its log.
        logging.getLogger(confine.__module__).setLevel(logging.WARNING)
        confine(broker_policy(device_model=bool(opened.guest)), Mode.AUTO, None)

    broker = start_broker(policy_with, opened.store.path, confine_broker)
    opened.store.hand_over(broker)
    return broker


def _who(args: argparse.Namespace) -> tuple[Mode, User | None]:
    mode = Mode(args.confine)
    user = find_user(args.run_as) if args.run_as else None
    check(mode, user)
    return mode, user


def _for_restart_command(args: argparse.Namespace, mode: Mode) -> Mode:
    """Return how far a bridge is confined that has to run a command of the operator's."""
    if not args.restart_command:
        raise ConfigError("--reset restart-domain needs --restart-command")
    if mode is Mode.OFF:
        return mode
    if mode is Mode.REQUIRE or args.run_as:
        raise ConfigError(
            "--reset restart-domain runs a command with this process' privileges",
            state="a confined process has none",
            next_step="give --confine off, or use a vTPM domain that can be asked for a reset",
        )
    log.warning("not confined: --reset restart-domain runs a command that needs privileges")
    return Mode.OFF


def _open_xen(args: argparse.Namespace, stack: ExitStack) -> Opened:
    supervisor = Supervisor.from_environment()
    stack.callback(supervisor.close)
    status = None
    if args.status_socket:
        from .bridge.status import bind_status

        status = bind_status(args.status_socket)
        stack.callback(status.close)
    domid = own_domid(args)
    store = KeptStore(store_path(args, domid))
    stack.callback(store.close)
    platform = stack.enter_context(open_platform(platform_path(args, domid)))
    return Opened(domid, store, platform, supervisor, status)


def _confined(
    args: argparse.Namespace,
    opened: Opened,
    policy: Policy,
    mode: Mode,
    user: User | None,
    stack: ExitStack,
    root: Path | None = None,
) -> Opened:
    if root is not None:
        from .preload import load_all

        load_all()
    elif user is not None:
        for name in LATE_MODULES["run --device" if _is_device(args) else args.command]:
            importlib.import_module(name)
    opened.confinement = confine(policy, mode, user, root)
    opened._stack = stack.pop_all()
    return opened


def _root(args: argparse.Namespace) -> Path | None:
    """Return the directory that the process goes into; raises ConfigError."""
    if args.command != "run" or args.chroot is None:
        return None
    if not args.run_as:
        raise ConfigError(
            "--chroot without --run-as is of no use: root finds its way out",
            next_step="give --run-as USER too",
        )
    return Path(args.chroot).resolve()


def _inside(root: Path, path: Path | None) -> Path | None:
    """Return a path as it is once `root` was entered, None for what lies outside."""
    if path is None or not path.absolute().is_relative_to(root):
        return None
    return Path("/") / path.absolute().relative_to(root)


def _is_device(args: argparse.Namespace) -> bool:
    """Whether this is a bridge that is the guest's device itself."""
    return args.command == "run" and args.device is not None


def _paths_of(*listeners: Listener | None) -> Iterable[Path]:
    for listener in listeners:
        if listener is not None and listener.path is not None:
            yield listener.path.absolute()


# Where Xen is, and who we are there.


def paths_of(args: argparse.Namespace, own_domid: int) -> Callable[[int], DevicePaths]:
    """Return what gives the device's directories for a vTPM domain's id."""

    def paths_for(backend_domid: int) -> DevicePaths:
        return device_paths(
            PathMode(args.path_mode),
            backend_domid=backend_domid,
            handle=args.handle,
            frontend_domid=own_domid,
            explicit=args.frontend_path,
        )

    return paths_for


def store_path(args: argparse.Namespace, domid: int) -> str | None:
    """Return the XenStore socket to use; None stands for the machine's own."""
    return _in_world(args, domid, "xenstored.sock")


def platform_path(args: argparse.Namespace, domid: int) -> str | None:
    """Return the embedded hypervisor's socket; None stands for a real Xen."""
    return _in_world(args, domid, "xen.sock")


def _in_world(args: argparse.Namespace, domid: int, name: str) -> str | None:
    if args.embedded is None:
        return None
    return str(Path(args.embedded) / "dom" / str(domid) / name)


def open_platform(path: str | None) -> Platform:
    """Open the grants and event channels of a real or the embedded Xen."""
    return Platform.open_xen() if path is None else Platform.open_embedded(path)


def own_domid(args: argparse.Namespace) -> int:
    """Return the domain that this program runs in: as given, or as XenStore says."""
    if args.domid is not None:
        return int(args.domid)
    if args.embedded is not None:
        return 0
    store = KeptStore()
    try:
        return parse_domid(store.read("domid") or b"", "domid")
    finally:
        store.close()


def backend_name(args: argparse.Namespace) -> str | None:
    """Return the name by which the vTPM domain is followed; None where it is followed by none."""
    word: str | None = args.backend
    return None if word is None or word.isdecimal() else word


def _find_backend(args: argparse.Namespace, opened: Opened) -> int:
    """Return the vTPM domain's id: as given, or as the entries say, which are waited for."""
    if args.backend is not None:
        return find_domain(opened.store, args.backend)
    if opened.domid == 0 or args.attach:
        raise ConfigError(
            "--backend is missing",
            state="only outside domain 0, and without --attach, do the entries say which vTPM "
            "domain it is",
            next_step="give the vTPM domain's name or id",
        )
    path = f"{paths_of(args, opened.domid)(0).frontend}/{BACKEND_ID}"
    told = False
    # Looked at and not watched: where privileges are given up there must be no thread yet.
    while (raw := opened.store.read(path)) is None:
        if not told:
            log.info("waiting for %s, which `attach` in domain 0 writes", path)
            told = True
        time.sleep(ENTRIES_LOOK_S)
    return parse_domid(raw, path)


def find_domain(store: KeptStore, word: str) -> int:
    """Return the id of a domain given by number or by name; raises ConfigError."""
    if word.isdecimal():
        return int(word)
    return the_domain_named(
        word,
        {
            int(entry): store.read(f"/local/domain/{entry}/name")
            for entry in store.ls("/local/domain")
            if names_domain(entry)
        },
    )
