"""`qemu-vtpm-bridge-xapi`: a guest's bridge in the place of swtpm, under xapi's xenopsd.

Theory of operation.  xenopsd starts a TPM for a guest by calling its wrapper, and knows three
things about it, which this program keeps (xapi_contract.py has the words):

* its command line begins with `swtpm-DOMID`;
* it listens at `swtpm-sock` in the directory it was given;
* once `swtpm-DOMID.pid` appears in that directory it is ready.  xenopsd watches for the
  file to be made, and takes its removal for a failure (xapi_pid_file.py).

Before a TPM's first start the wrapper is called to make the TPM, and xenopsd keeps the file
that comes of it.  Here the TPM is in the vTPM domain, and the file says so.  A guest that is
not in the guests file is none of ours: xenopsd's own wrapper is executed for it.

XenStore is asked in a child process (`aside`): asking starts threads, and a thread that was
there before would stay outside of the directory that the process goes into, with privileges.

The process is the bridge itself, `qemu-vtpm-bridge run --run-as --chroot`, with all that comes
of it: what fails before the bridge listens ends with a message and no pid file.

Keeps P10.  Who may lie: nobody before QEMU connects.

Source: as xapi_contract.py.
"""

from __future__ import annotations

import logging
import os
import pickle
import pwd
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn, TypeVar, cast

import trio

from ..errors import BridgeError, ConfigError, XenError, first_of
from ..process_name import take_name
from ..xen.store import Store, open_store
from ..xen.xenbus import DevicePaths, printable
from . import guests
from .guests import Guest, GuestsFile
from .launch import Launch
from .xapi_contract import SOCKET_NAME, STATE_NAME, STATUS_NAME, Call, parse
from .xapi_pid_file import PidFile
from .xapi_root import give_directory, leave_namespaces

log = logging.getLogger(__name__)

BASE_USER: Final = "swtpm_base"
"""xapi's: a TPM's user has this one's number plus the domain's."""

EXIT_FAILED: Final = 1
_STATE_NOTE: Final = b"qemu-vtpm-bridge: this TPM and its state are in a vTPM domain\n"
_VM_PATH: Final = re.compile(rb"/vm/([0-9a-f-]{36})")

T = TypeVar("T")
RunCommand = Callable[[list[str]], int]


def main(argv: Sequence[str], command: RunCommand) -> int:
    """Be what xenopsd calls; return the exit status.

    `command` runs `qemu-vtpm-bridge` with these words.
    """
    logging.basicConfig(level="INFO", format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        call = parse(argv[1:], argv[0])
        known = guests.read(call.guests_path)
        guest = _find(known, call.domid)
        if guest is None:
            return _delegate(known, call)
        if call.needs_init:
            _note_state(call, overwrite=True)
            return 0
        return _serve(known, guest, call, command)
    except BridgeError as error:
        print(f"qemu-vtpm-bridge-xapi: {error}", file=sys.stderr)
        return EXIT_FAILED


# Which guest.


def _find(known: GuestsFile, domid: int) -> Guest | None:
    """Return the guest in this domain; None where the file has none for it."""
    world = known.host.embedded
    place = None if world is None else str(world / "dom/0/xenstored.sock")

    async def names() -> tuple[str, str]:
        async with open_store(place) as store:
            return await _names(store, domid)

    def ask() -> tuple[str, str]:
        try:
            return trio.run(names)
        except BaseExceptionGroup as group:
            raise first_of(group) from None

    return known.of_domain(*aside(ask))


async def _names(store: Store, domid: int) -> tuple[str, str]:
    """Return the domain's UUID and its name."""
    raw_name = await store.try_read(f"/local/domain/{domid}/name")
    raw_vm = await store.try_read(f"/local/domain/{domid}/vm")
    if raw_name is None or raw_vm is None:
        raise ConfigError(
            f"XenStore has no domain {domid}",
            next_step="xenopsd makes the domain before it starts its TPM: see its log",
        )
    uuid = _VM_PATH.fullmatch(raw_vm)
    if uuid is None:
        raise ConfigError(f"/local/domain/{domid}/vm is {printable(raw_vm)}, not /vm/UUID")
    return uuid[1].decode(), raw_name.decode("utf-8", "replace")


def _delegate(known: GuestsFile, call: Call) -> int:
    """Become xenopsd's own wrapper."""
    if call.control_fd is not None:
        raise ConfigError(
            f"{known.path} has no guest for domain {call.domid}",
            state="called as swtpm itself, this program cannot pass the call on",
            next_step="add the guest, or set swtpm-wrapper in xenopsd.conf instead",
        )
    wrapper = known.host.swtpm_wrapper
    try:
        os.execv(wrapper, [str(wrapper), *call.delegate])
    except OSError as error:
        raise ConfigError(
            f"{wrapper}: {error.strerror}",
            state=f"{known.path} has no guest for domain {call.domid}, so its TPM is a swtpm",
            next_step="add the guest, or set swtpm-wrapper in [host] to xenopsd's own wrapper",
        ) from error


# What is in the directory.


def _note_state(call: Call, *, overwrite: bool = False) -> None:
    """Write the file that xenopsd wants to keep as this TPM's state: all of it, or none."""
    if call.root is None:
        return
    path = call.root / STATE_NAME
    try:
        if overwrite or not path.exists():
            _write_whole(path, _STATE_NOTE)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", next_step=f"is {call.root} there, and is there room?"
        ) from error


def _write_whole(path: Path, contents: bytes) -> None:
    """Write a file that nobody sees half of; raises OSError, and then leaves what was there."""
    passing = path.with_name(f"{path.name}.new")
    passing.unlink(missing_ok=True)
    # Made anew: the directory may be the TPM's user's by now, whose links root must not follow.
    with passing.open("xb") as file:
        try:
            file.write(contents)
            file.flush()
            passing.replace(path)
        except OSError:
            passing.unlink()
            raise


def _user(call: Call) -> int:
    """Return the number of the user as whom to run."""
    try:
        if call.user is None:
            return pwd.getpwnam(BASE_USER).pw_uid + call.domid
        if call.user.isascii() and call.user.isdecimal():
            return int(call.user)
        return pwd.getpwnam(call.user).pw_uid
    except KeyError:
        raise ConfigError(
            f"there is no user '{call.user or BASE_USER}'",
            next_step=f"xapi makes {BASE_USER}; elsewhere give --runas USER, or --priv",
        ) from None


def _pid_file(call: Call) -> Path:
    """Return the pid file's path, as it is before the root is entered."""
    if call.pid_file is None:
        assert call.root is not None
        return call.root / f"{call.name}.pid"
    if call.confine and call.root is not None:
        return call.root / call.pid_file.relative_to("/")
    return call.pid_file


# Serving.


def _serve(known: GuestsFile, guest: Guest, call: Call, command: RunCommand) -> int:
    """Be the guest's bridge until its QEMU leaves."""
    host = known.host
    uid = _user(call) if call.confine else None
    # Which user it becomes, xenopsd says.
    guest = replace(guest, run_as="root")
    launch = Launch(guest, host.run_dir, host.log_dir, host.embedded)

    def attach() -> DevicePaths | None:
        launch.resolve()
        launch.attach()
        return launch.paths

    launch.paths = aside(attach)
    if call.keeps_file:
        _note_state(call)
    take_name(call.name, "qemu-vtpm-bridge")
    if uid is not None:
        if call.root is not None:
            give_directory(call.root, uid)
        leave_namespaces()
    pid_file = PidFile(_pid_file(call), uid)
    try:
        pid_file.when_ready()
        status = command(_run_words(launch, call, pid_file.path, uid))
        return EXIT_FAILED if pid_file.failed else status
    except KeyboardInterrupt:
        if not pid_file.failed:
            raise
        return EXIT_FAILED
    finally:
        pid_file.remove()


def _run_words(launch: Launch, call: Call, pid_file: Path, uid: int | None) -> list[str]:
    """Return the bridge's words: a guest's ordinary ones, with xenopsd's sockets."""
    ordinary = [
        word for word in launch.words() if not word.startswith(("--socket=", "--status-socket="))
    ]
    owner = "" if uid is None else f",owner={uid}:{uid}"
    listen = f"{pid_file.with_name(SOCKET_NAME)}{owner}"
    if call.control_fd is not None:
        listen = f"fd={call.control_fd}"
    return [
        *ordinary,
        f"--socket={listen}",
        f"--status-socket={pid_file.with_name(STATUS_NAME)}",
        *(["--terminate"] if call.terminate else []),
        *([] if uid is None else [f"--run-as={uid}:{uid}"]),
        *([] if uid is None or call.root is None else [f"--chroot={call.root}"]),
    ]


def aside(function: Callable[[], T]) -> T:
    """Return what a function returns in a child process, with whom its threads end.

    Raises the BridgeError that the function raises.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _answer(function, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        raw = file.read()
    os.waitpid(pid, 0)
    if not raw:
        raise XenError("the process that asks XenStore died", next_step="see what it said above")
    result, error = pickle.loads(raw)
    if error is not None:
        raise error
    return cast(T, result)


def _answer(function: Callable[[], object], writing: int) -> NoReturn:
    """Write what a function returns or raises, and end this process."""
    status = EXIT_FAILED
    try:
        try:
            outcome: tuple[object, BridgeError | None] = (function(), None)
        except BridgeError as error:
            outcome = (None, error)
        with os.fdopen(writing, "wb") as file:
            pickle.dump(outcome, file)
        status = 0
    except Exception:
        log.exception("asking XenStore failed")
    finally:
        os._exit(status)
