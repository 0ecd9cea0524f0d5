"""One bridge for each guest: found, started, replaced and stopped, whoever asks and whenever.

Theory of operation.  `ensure_bridge` goes through STEPS under the guest's lock.  Each step
first looks whether it has been done, so that what was cut short is finished by the next
call; a failure in this process takes back what it did.  `stop_bridge` goes through STOP_STEPS.
Which device a bridge has, it may alone know by then, as the guests file can have changed: that
is written down before it is ended.

A running bridge is a guest's own if its command line is the one that would be started now;
one that somebody else started is taken if its status names the guest's device.  One with
other options is replaced, unless a QEMU uses it.  A vTPM domain that is recreated under its
name is followed by the bridge itself, as is a guest that is rebooted.

Keeps P9 and P10.  Who may lie: see bridge_process.py; the run directory is refused where
others can write it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from ..errors import BridgeError, ConfigError, XenError, first_of
from ..xen.domains import resolve_domain
from ..xen.store import Store, open_store
from ..xen.xenbus import DevicePaths, PathMode, device_paths, parse_backend_path, printable
from .attach import attach, detach, name_in_store
from .bridge_process import READY_DEADLINE_S, BridgeProcess, looks, said
from .guests import LOG_DIR, RUN_DIR, Guest, file_stem

T = TypeVar("T")

ENDING_DEADLINE_S: Final = 1.0
"""A process that is killed may let go of its lock before its sockets fall silent."""

LEAVE_DEADLINE_S: Final = 5.0
"""For the QEMU of a guest that was destroyed to be gone from a bridge that is replaced."""


def ensure_bridge(
    guest: Guest,
    *,
    run_dir: Path = RUN_DIR,
    log_dir: Path = LOG_DIR,
    world: Path | None = None,
    domid: int | None = None,
    ioreq: bool = False,
) -> Path:
    """See to it that a bridge listens for the guest's QEMU; return its socket.

    `world` is the directory of an embedded Xen, `domid` the domain that this program runs
    in, 0 if not given.  With `ioreq` the bridge is the guest's register device itself,
    whenever a guest of this name comes, and the path is its status socket's.

    Raises ConfigError or XenError where it cannot be; then nothing that was not there before
    is left, except empty lock files and a log.  It can be called again at any time.  Not for
    a thread in which trio runs: it runs trio itself.
    """
    return Launch(guest, run_dir, log_dir, world, domid, ioreq=ioreq).ensure()


def ensure_ioreq_bridge(
    guest: Guest,
    domid_of_guest: int,
    *,
    run_dir: Path = RUN_DIR,
    log_dir: Path = LOG_DIR,
    world: Path | None = None,
    domid: int | None = None,
) -> Path:
    """See to it that a bridge is this domain's register device; return its status socket.

    For a QEMU without TPM devices: the bridge answers the guest's accesses itself, which
    Xen brings to it.  It has them when this returns.  Otherwise as `ensure_bridge`.
    """
    launch = Launch(
        guest, run_dir, log_dir, world, domid, ioreq=True, domid_of_guest=domid_of_guest
    )
    return launch.ensure()


def stop_bridge(
    guest: Guest,
    *,
    run_dir: Path = RUN_DIR,
    log_dir: Path = LOG_DIR,
    world: Path | None = None,
    domid: int | None = None,
) -> bool:
    """End the guest's bridge and remove its device's entries; return whether there was one.

    A bridge that does not end is killed; one that was started otherwise is left alone.
    Raises ConfigError or XenError where something is left.  It can be called again at any
    time.  Not for a thread in which trio runs.
    """
    return Launch(guest, run_dir, log_dir, world, domid).stop()


class Launch:
    """One call, with what its steps found and did."""

    def __init__(
        self,
        guest: Guest,
        run_dir: Path,
        log_dir: Path,
        world: Path | None = None,
        domid: int | None = None,
        *,
        ioreq: bool = False,
        domid_of_guest: int | None = None,
    ) -> None:
        run_dir = run_dir.absolute()
        if "," in str(run_dir):
            raise ConfigError(
                f"{run_dir} has a comma in it, which separates options of a socket",
                next_step="use a directory without",
            )
        self.guest = guest
        self.process = BridgeProcess(
            guest.name, run_dir, log_dir.absolute(), file_stem(guest.name, run_dir)
        )
        self.world = None if world is None else world.absolute()
        self.domid = domid or 0
        self.ioreq = ioreq
        self.domid_of_guest = domid_of_guest
        """The domain that an ioreq bridge has to serve by now, if there is one."""
        self.paths: DevicePaths | None = None
        self._last_named: DevicePaths | None = None
        """What the bridge that is being ended said that it has."""
        self.found = False
        """A bridge that will do is there."""
        self.attached = False
        """The entries are this call's."""
        self.started = False
        self.stopped = False
        """There was a bridge, or entries."""

    @property
    def door(self) -> str:
        """The ending of the socket that says that the bridge is there."""
        return "status" if self.ioreq else "sock"

    # The ways through.

    def ensure(self) -> Path:
        """Go through the steps; a failure takes back what was done."""
        self._make_directories()
        with self.process.locked():
            try:
                for step in STEPS:
                    step(self)
            except BaseException:
                self._take_back()
                raise
        return self.process.at(self.door)

    def stop(self) -> bool:
        """End the bridge and detach its device."""
        self._make_directories()
        with self.process.locked():
            for step in STOP_STEPS:
                step(self)
        return self.stopped

    # The steps of `ensure`, in their order.

    def resolve(self) -> None:
        """Find the vTPM domain's id, and so the device's directories."""
        self.paths = self._with_store(self._paths)

    def look(self) -> None:
        """Find a bridge that is there, and end one that is not the right one."""
        if not self.process.alive():
            self.found = self._takes_stranger()
            return
        if self.process.until_it_answers() is None:
            return  # it has just ended
        if self.process.words() == self.words():
            self.found = True
            return
        self._until_unused()
        self._note()
        self.process.end()

    def sweep(self) -> None:
        """Remove what a killed bridge left, and the entries of one that had another device."""
        if not self.found:
            self.process.sweep()
        named = self._named()
        if named is not None and named != self.paths:
            self._with_store(partial(self._remove_named, named))
        self.process.forget()

    def attach(self) -> None:
        """Write the device's entries, where they are not there."""
        self._with_store(self._attach)

    def start(self) -> None:
        """Start the bridge, and wait until it says that it is ready."""
        if not self.found:
            self.started = True
            self.process.start(self.words())
        if self.domid_of_guest is not None:
            self._until_it_serves(self.domid_of_guest)

    # The steps of `stop`.

    def look_for_the_end(self) -> None:
        """Find a bridge that is there, and refuse one that was started otherwise."""
        self.stopped = self.process.alive()
        if self.stopped:
            self._note()
        elif self._takes_stranger():
            raise ConfigError(
                f"the bridge of guest {self.guest.name!r} was not started from here",
                state=f"it listens on {self.process.at('status')}",
                next_step="end it the way it was started, as by systemctl",
            )

    def end(self) -> None:
        """End the bridge."""
        if self.stopped:
            self.process.end()

    def clear(self) -> None:
        """Remove its sockets."""
        self.process.sweep()

    def detach(self) -> None:
        """Remove the entries that the bridge had, or that the guest's would be."""
        named = self._named()
        if named is not None and self._with_store(partial(self._remove_named, named)):
            self.stopped = True
        else:
            # Without such a vTPM domain there are none: they went with it.
            with suppress(ConfigError):
                self.paths = self._with_store(self._paths)
        if self.paths is not None:
            self.stopped |= self._with_store(partial(self._remove, self.paths))
        self.process.forget()

    # What they are made of.

    def _note(self) -> None:
        """Write down which device the living bridge says it has."""
        paths = self._last_named = _paths_in(self.process.status())
        if paths is not None:
            self.process.note({"frontend": {"path": paths.frontend, "backend": paths.backend}})

    def _named(self) -> DevicePaths | None:
        """Return the directories that the ended bridge named, where a device's can be there.

        It may have been taken over, and root is to remove what it named.
        """
        named = self._last_named or _paths_in(self.process.noted())
        if named is None or named.frontend_domid != self.domid:
            return None
        for mode in (PathMode.SEED, PathMode.DEVICE, PathMode.ZEROS):
            with suppress(ConfigError):
                if named == device_paths(
                    mode,
                    backend_domid=named.backend_domid,
                    handle=named.handle,
                    frontend_domid=self.domid,
                ):
                    return named
        return named if named.frontend == self.guest.frontend_path else None

    def _make_directories(self) -> None:
        run_dir = self.process.run_dir
        for directory in (run_dir, self.process.log_dir):
            with said(directory):
                directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with said(run_dir):
            found = run_dir.stat()
        if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise ConfigError(
                f"{run_dir} can be written by others",
                state="any of them could be the guest's TPM",
                next_step=f"chown it to yourself, and chmod go-w {run_dir}",
            )

    def words(self) -> list[str]:
        """Return the words that the bridge is to be started with."""
        guest = self.guest
        words = ["run"]
        if not self.ioreq:
            words += [f"--socket={self.process.at('sock')}", f"--state-blobs={guest.state_blobs}"]
        else:
            words += [f"--device={guest.device}", f"--guest={self._followed()}"]
        words += [
            f"--status-socket={self.process.at('status')}",
            f"--backend={guest.backend}",
            f"--handle={guest.handle}",
            f"--path-mode={guest.path_mode}",
            f"--domid={self.domid}",
            f"--tpm={guest.tpm}",
            f"--reset={guest.reset}",
            f"--on-reset-failure={guest.on_reset_failure}",
            *(f"--restart-command={word}" for word in guest.restart_command),
        ]
        for option, value in (
            ("--frontend-path", guest.frontend_path),
            ("--vtpm-uuid", guest.vtpm_uuid),
            ("--run-as", guest.user),
            ("--embedded", self.world),
        ):
            if value is not None:
                words.append(f"{option}={value}")
        if guest.allow_missing_feature:
            words.append("--allow-missing-feature")
        if not guest.backend.isdecimal():
            words.append("--attach")  # where the vTPM domain has another id one day
        return [*words, *guest.run_options]

    def _followed(self) -> str:
        """Return what `--guest` is given: the name, so that reboots are followed."""
        if not self.guest.name.isdecimal():
            return self.guest.name
        # It would be taken for an id, so an id it has to be.
        if self.domid_of_guest is None:
            raise ConfigError(
                f"a guest whose name is a number, {self.guest.name!r}, cannot be waited for",
                next_step="give the guest another name, or use the wrapper",
            )
        return str(self.domid_of_guest)

    def _takes_stranger(self) -> bool:
        """Return whether a bridge for this device is there that was started otherwise.

        Raises ConfigError where something else listens at the guest's sockets, and goes on.
        """
        paths, listening = self.paths, []
        for _ in looks(ENDING_DEADLINE_S):
            listening = [ending for ending in ("sock", "status") if self.process.listens(ending)]
            if not listening:
                return False
            paths = paths or self._with_store(self._paths)
            is_device = "sock" not in listening
            if _paths_in(self.process.status()) == paths and self.ioreq == is_device:
                return True
        assert paths is not None
        path = self.process.at(listening[0])
        raise ConfigError(
            f"another program listens on {path}",
            state=f"it is no bridge of guest {self.guest.name!r} for {paths.backend}",
            next_step=f"see which it is with `ss -lxp src '{path}'`, and stop it",
        )

    def _until_it_serves(self, domid: int) -> None:
        """Return once the bridge has this domain's registers: hvmloader looks only once."""
        for _ in looks(READY_DEADLINE_S):
            served = (self.process.status() or {}).get("guest")
            if isinstance(served, dict) and served.get("domid") == domid:
                return
        raise ConfigError(
            f"the bridge of guest {self.guest.name!r} does not serve domain {domid}",
            state=f"after {READY_DEADLINE_S:g} s; what it said is in {self.process.log}",
            next_step="see `xl list` for another domain of that name, and destroy it",
        )

    def _until_unused(self) -> None:
        """Return once no QEMU uses a bridge that is to be replaced."""
        for _ in looks(LEAVE_DEADLINE_S):
            qemu = (self.process.status() or {}).get("qemu")
            if not (isinstance(qemu, dict) and qemu.get("data-attached")):
                return
        raise ConfigError(
            f"a QEMU uses the bridge of guest {self.guest.name!r}, which has other options",
            state=f"process {self.process.pid()} serves it",
            next_step="shut the guest down first, or put its options back as they were",
        )

    def _take_back(self) -> None:
        """Undo what this call did, after a failure that is being told."""
        if self.started:
            with suppress(BridgeError, OSError):
                self.process.end()
                self.process.sweep()
        if self.attached:
            assert self.paths is not None
            with suppress(BridgeError, OSError):
                self._with_store(partial(self._remove, self.paths))

    # XenStore.

    def _with_store(self, function: Callable[[Store], Awaitable[T]]) -> T:
        return with_store(function, self.world, self.domid)

    async def _paths(self, store: Store) -> DevicePaths:
        return device_paths(
            PathMode(self.guest.path_mode),
            backend_domid=await resolve_domain(store, self.guest.backend),
            handle=self.guest.handle,
            frontend_domid=self.domid,
            explicit=self.guest.frontend_path,
        )

    async def _attach(self, store: Store) -> None:
        assert self.paths is not None
        ours = name_in_store(self.guest.name)
        noted = await store.try_read(f"{self.paths.frontend}/domain")
        if noted is not None and noted != ours.encode():
            raise ConfigError(
                f"the device {self.paths.backend} is that of guest {printable(noted)}",
                state=f"wanted for guest {self.guest.name!r}",
                next_step="give the guest another handle or vTPM domain, or end the other "
                "with `qemu-vtpm-bridge guest stop`",
            )
        sysfs = None if self.world is not None else Path("/sys")
        self.attached = await attach(store, self.paths, guest=ours, sysfs=sysfs)

    async def _remove(self, paths: DevicePaths, store: Store) -> bool:
        noted = await store.try_read(f"{paths.frontend}/domain")
        if noted is not None and noted != name_in_store(self.guest.name).encode():
            return False  # another guest has the device now
        # The bridge is gone: what it left connected is nobody's.
        return await detach(store, paths, force=True)

    async def _remove_named(self, paths: DevicePaths, store: Store) -> bool:
        """Remove what a bridge named, if the toolstack has noted it as this guest's."""
        noted = await store.try_read(f"{paths.frontend}/domain")
        ours = name_in_store(self.guest.name).encode()
        return noted == ours and await detach(store, paths, force=True)


STEPS: Final[tuple[Callable[[Launch], None], ...]] = (
    Launch.resolve,
    Launch.look,
    Launch.sweep,
    Launch.attach,
    Launch.start,
)
"""What `ensure_bridge` does; a crash between any two is mended by the next call."""

STOP_STEPS: Final[tuple[Callable[[Launch], None], ...]] = (
    Launch.look_for_the_end,
    Launch.end,
    Launch.clear,
    Launch.detach,
)
"""What `stop_bridge` does; a crash between any two is mended by the next call of either."""


def with_store(function: Callable[[Store], Awaitable[T]], world: Path | None, domid: int = 0) -> T:
    """Run an async function with the XenStore of this machine, or of the embedded Xen `world`.

    Not for a thread in which trio runs.
    """
    place = None if world is None else str(world / "dom" / str(domid) / "xenstored.sock")

    async def run() -> T:
        async with open_store(place) as store:
            return await function(store)

    try:
        return trio.run(run)
    except BaseExceptionGroup as group:
        raise first_of(group) from None


def _paths_in(document: dict[str, Any] | None) -> DevicePaths | None:
    """Return the directories that a bridge's status names."""
    frontend = (document or {}).get("frontend")
    if not isinstance(frontend, dict):
        return None
    path, backend = frontend.get("path"), frontend.get("backend")
    if not isinstance(path, str) or not isinstance(backend, str):
        return None
    try:
        backend_domid, frontend_domid, handle = parse_backend_path(backend)
        return device_paths(
            PathMode.EXPLICIT,
            backend_domid=backend_domid,
            handle=handle,
            frontend_domid=frontend_domid,
            explicit=path,
        )
    except (ConfigError, XenError):
        return None
