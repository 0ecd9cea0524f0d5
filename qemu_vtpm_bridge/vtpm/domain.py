"""The vTPM domain: one TPM, served to several frontends one command at a time.

Theory of operation.  Three parts meet here.  `Device` follows each frontend's entries in
XenStore; the pump carries commands between the pages and the TPM; `SwtpmEngine` is the
TPM.  The pump may be changed, and the engine used, only while the pump stands still
(`carrier.py`), so that lock is also what keeps the engine's own exchanges apart.

The TPM's volatile state is stored once it has been idle for a moment, and given up
before the first command that would make it stale; see `snapshot.py`.  A swtpm that dies
or hangs costs the command in flight a TPM error; the next command starts another.

Keeps P1 (every command is answered, whatever swtpm does), P7 (a reset is counted only
when the TPM was power-cycled) and P8.  Who may lie: every frontend.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from ..carrier import Carrier
from ..deadlines import DEADLINES_S, DEFAULT_DEADLINE_S
from ..errors import first_of
from ..ratelimit import RateLimit
from ..xen.store import KeptStore, StoreError, StoreGone, open_store
from ..xen.xenbus import FEATURE_PROTOCOL_V2
from .child import EngineError
from .device import Device
from .engine import Resumption, SwtpmEngine
from .ordinals import (
    COMMAND_TAGS,
    READ_ONLY,
    TPM_CC_SHUTDOWN,
    TPM_RC_SUCCESS,
    Complaint,
    TpmFamily,
    error_header,
)
from .pump import BackendExit, BackendPump

if TYPE_CHECKING:
    from ..xen.platform import Channel, Page, Platform
    from ..xen.store import Store

log = logging.getLogger(__name__)

DIRECTORY: Final = "backend/vtpm"
LIFE_NODE: Final = "data/vtpm-life"
"""Where the word of this life of the domain is; it vanishes with the domain."""

SETTLE_S: Final = 0.05
"""How long the TPM must be idle before its volatile state is stored."""

STORE_RETRY_S: Final = 1.0
ENGINE_BACK_OFF_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class VtpmConfig:
    """What a vTPM domain is started with."""

    state_dir: Path
    family: TpmFamily = TpmFamily.TPM_2_0
    swtpm: str = "swtpm"
    trusted_reset_domids: frozenset[int] = frozenset({0})
    store_path: str | KeptStore | None = None
    default_deadline_s: float = DEFAULT_DEADLINE_S
    deadlines_s: Mapping[int, float] = field(default_factory=lambda: DEADLINES_S)
    """How long swtpm may take for a command before it counts as hung, by ordinal."""


class VtpmDomain:
    """One vTPM domain; `run` it."""

    def __init__(
        self, config: VtpmConfig, open_platform: Callable[[], AbstractContextManager[Platform]]
    ) -> None:
        self.config = config
        self.started = time.time()
        self.last_error = ""
        self.engine_starts = 0
        self.stores = 0
        self._open_platform = open_platform
        self._engine = SwtpmEngine(config.state_dir, config.family, config.swtpm)
        self._pump = BackendPump(
            command_tags=COMMAND_TAGS,
            read_only_ordinals=READ_ONLY[config.family],
            bad_size=error_header(config.family, Complaint.BAD_SIZE),
            bad_tag=error_header(config.family, Complaint.BAD_TAG),
            bad_locality=error_header(config.family, Complaint.BAD_LOCALITY),
            default_deadline_s=config.default_deadline_s,
            deadlines_s=config.deadlines_s,
            settle_s=SETTLE_S,
        )
        self._carrier: Carrier[BackendPump, BackendExit] = Carrier(self._pump, self._pump_ended)
        self._devices: dict[tuple[int, int], Device] = {}
        self._complaints = RateLimit(log)
        self._engine_not_before = -1.0
        self._closing = trio.Event()
        self._nursery: trio.Nursery | None = None

    # Running.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `close` was asked for and done.

        Raises ConfigError where the state directory or Xen cannot be used.  Cancelling
        ends at once: frontends find out by their deadlines, and what was not stored of
        the TPM's volatile state is lost.
        """
        await self._engine.open()
        platform_context = await trio.to_thread.run_sync(self._open_platform)
        platform = await trio.to_thread.run_sync(platform_context.__enter__)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._follow_xenstore(platform, nursery, task_status)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                for device in self._devices.values():
                    await device.disconnect()
                await self._engine.close()
                await trio.to_thread.run_sync(platform_context.__exit__, None, None, None)

    def close(self) -> None:
        """Tell the frontends, store the TPM and end; `run` then returns."""
        self._closing.set()

    async def _follow_xenstore(
        self, platform: Platform, nursery: trio.Nursery, task_status: trio.TaskStatus[None]
    ) -> None:
        """Serve over as many XenStore connections as it takes."""
        powered = False
        while True:
            try:
                async with open_store(self.config.store_path) as store:
                    if not powered:
                        await self._power_on(store)
                        nursery.start_soon(self._carrier.run)
                        powered = True
                        task_status.started()
                    if await self._serve(store, platform):
                        await self._shut_down(store)
                        return
            except* (StoreGone, StoreError) as group:
                self._report(f"XenStore: {first_of(group)}; trying again every second")
            with trio.move_on_after(STORE_RETRY_S):
                await self._closing.wait()
                # Nobody can be told any more; what the TPM holds is stored all the same.
                await self._stop_engine()
                return

    async def _power_on(self, store: Store) -> None:
        raw = await store.try_read(LIFE_NODE)
        words = [] if raw is None else [raw.decode("ascii", "replace")]
        word = await self._engine.enter_life(words)
        await store.write(LIFE_NODE, word.encode())
        await self._start_engine()

    async def _serve(self, store: Store, platform: Platform) -> bool:
        """Follow all frontends; return True once `close` was asked for."""
        async with store.watch(DIRECTORY) as watch, trio.open_nursery() as nursery:
            nursery.start_soon(self._end_with, nursery.cancel_scope)
            followed: set[Device] = set()
            while True:
                found = await self._find_devices(store, platform)
                for device in [d for d in self._devices.values() if d not in found]:
                    await device.drop()
                    self._forget(device)
                for device in found:
                    if device not in followed:
                        followed.add(device)
                        nursery.start_soon(self._follow, device, store, followed)
                await watch.wait()
        return self._closing.is_set()

    async def _end_with(self, scope: trio.CancelScope) -> None:
        await self._closing.wait()
        scope.cancel()

    async def _find_devices(self, store: Store, platform: Platform) -> list[Device]:
        """Return the devices that the toolstack wrote, old ones and new ones."""
        found = []
        for domid in await store.try_ls(DIRECTORY) or []:
            for handle in await store.try_ls(f"{DIRECTORY}/{domid}") or []:
                if not (domid.isdecimal() and handle.isdecimal()):
                    continue
                directory = f"{DIRECTORY}/{domid}/{handle}"
                if await store.try_read(f"{directory}/frontend") is None:
                    continue
                key = (int(domid), int(handle))
                known = self._devices.get(key)
                if known is not None and known.greeted:
                    if await store.try_read(f"{directory}/{FEATURE_PROTOCOL_V2}") is not None:
                        found.append(known)
                        continue
                    # Our mark is gone: the toolstack removed the entries and wrote others.
                    await known.drop()
                    self._forget(known)
                if key not in self._devices:
                    trusted = key[0] in self.config.trusted_reset_domids
                    self._devices[key] = Device(*key, platform, self, trusted=trusted)
                found.append(self._devices[key])
        return found

    async def _follow(self, device: Device, store: Store, followed: set[Device]) -> None:
        try:
            await device.follow(store)
        except* StoreError as group:
            name = f"frontend {device.frontend_domid}/{device.handle}"
            self._report(f"{name}: {first_of(group)}")
        followed.discard(device)
        if device.gone:
            self._forget(device)

    def _forget(self, device: Device) -> None:
        key = (device.frontend_domid, device.handle)
        if self._devices.get(key) is device:
            del self._devices[key]

    async def _shut_down(self, store: Store) -> None:
        for device in self._devices.values():
            if device.frontend:
                with suppress(StoreError):
                    await device.close(store)
        await self._stop_engine()

    async def _stop_engine(self) -> None:
        if not self._engine.running:
            return
        with trio.CancelScope(shield=True):
            async with self._drained() as pump:
                pump.set_engine(None, None)
                await self._engine.stop(store=True)

    # What the devices ask for (device.TpmServer).

    async def add_frontend(self, page: Page, channel: Channel, *, fail_pending: bool) -> int:
        """Serve a page; return its slot.  With `fail_pending`, what it holds is not run."""
        # The command in flight stays in the pump's hand over a stop "now".
        async with self._carrier.paused(drain=False) as pump:
            return pump.add_frontend(
                page,
                channel,
                answer_pending=error_header(self.config.family, Complaint.FAILURE)
                if fail_pending
                else None,
            )

    async def remove_frontend(self, slot: int, *, drain: bool) -> None:
        """Serve it no more, at once or after the command in flight."""
        async with self._drained() if drain else self._carrier.paused(drain=False) as pump:
            pump.remove_frontend(slot)

    async def power_cycle(self) -> bool:
        """Switch the TPM off and on; return whether it is off, or on anew.

        One whose swtpm fails meanwhile is off, and the next start is its power-on.
        """
        async with self._drained() as pump:
            stats = pump.stats()
            # The bridge has asked for evidence meanwhile, which changes nothing.
            shut_down = (
                stats.last_change_ordinal == TPM_CC_SHUTDOWN
                and stats.last_change_code == TPM_RC_SUCCESS
            )
            # Whatever cuts this short ends swtpm, and its descriptors' numbers are others' then.
            pump.set_engine(None, None)
            try:
                await self._engine.power_cycle(shutdown_first=not shut_down)
                # The locality was the old power's.
                self._hand_over(pump, clean=True)
            except EngineError as error:
                self._report(f"the TPM was not power-cycled in order: {error}")
                await self._restart_engine(pump)
                if not await self._engine.is_fresh():
                    return False
        log.info("the TPM was power-cycled")
        return True

    @asynccontextmanager
    async def _drained(self) -> AsyncIterator[BackendPump]:
        """Give the pump, standing still and with no command in the TPM's hand.

        A frontend that comes or goes may stop it before the command is done.
        """
        while True:
            async with self._carrier.paused() as pump:
                if not pump.busy:
                    yield pump
                    return

    # The engine.  Everything below runs while the pump stands still.

    async def _start_engine(self) -> None:
        """Start swtpm for the first time; raises EngineError."""
        resumption = await self._engine.start()
        self._started(self._pump, resumption)

    def _started(self, pump: BackendPump, resumption: Resumption) -> None:
        self.engine_starts += 1
        assert self._nursery is not None
        self._nursery.start_soon(self._engine.child.relay_log)
        self._hand_over(pump, clean=resumption is not Resumption.MARKED)
        level = logging.WARNING if resumption is Resumption.MARKED else logging.INFO
        log.log(level, "the TPM is up: %s", resumption.value)

    def _hand_over(self, pump: BackendPump, *, clean: bool) -> None:
        child = self._engine.child
        pump.set_engine(child.data.fileno(), child.control.fileno())
        pump.set_clean(clean)

    async def _restart_engine(self, pump: BackendPump) -> bool:
        """Start another swtpm in place of one that failed; return whether it runs."""
        pump.set_engine(None, None)
        complaint = self._engine.child.complaint() if self._engine.running else ""
        await self._engine.kill()
        if trio.current_time() < self._engine_not_before:
            return False
        self._engine_not_before = trio.current_time() + ENGINE_BACK_OFF_S
        if complaint:
            self._complaints.warning("swtpm's last words: %s", complaint)
        try:
            self._started(pump, await self._engine.start())
        except EngineError as error:
            self._report(f"swtpm does not start: {error}")
            return False
        return True

    async def _pump_ended(self, reason: BackendExit) -> None:
        """The pump stopped by itself; see to what made it."""
        async with self._carrier.paused() as pump:
            match reason:
                case BackendExit.MUTATING:
                    await self._about_to_change(pump)
                case BackendExit.SETTLED:
                    await self._store(pump)
                case BackendExit.CHANNEL_ERROR:
                    failed = pump.stats().failed_slot
                    for device in self._devices.values():
                        if failed is not None and device.slot == failed:
                            device.channel_broke()
                            pump.remove_frontend(failed)
                case _:
                    if self._engine.running:
                        self._report(f"swtpm: {_WORDS[reason]}; it is started anew")
                    pump.fail_in_flight(error_header(self.config.family, Complaint.FAILURE))
                    await self._restart_engine(pump)

    async def _about_to_change(self, pump: BackendPump) -> None:
        try:
            await self._engine.about_to_change()
            pump.set_clean(False)
        except EngineError as error:
            # A stored state that cannot be given up would be loaded again one day.
            self._report(f"the stored state cannot be removed: {error}")
            pump.fail_in_flight(error_header(self.config.family, Complaint.FAILURE))

    async def _store(self, pump: BackendPump) -> None:
        try:
            await self._engine.store_volatile()
            self.stores += 1
            pump.set_clean(True)
        except EngineError as error:
            self._report(f"the TPM's volatile state cannot be stored: {error}")
            if not self._engine.running:
                await self._restart_engine(pump)

    # Telling.

    def alive(self) -> bool:
        """Return whether commands could be served, for a watchdog; see `Carrier.alive`."""
        return self._carrier.alive()

    def _report(self, message: str) -> None:
        self.last_error = message
        self._complaints.warning("%s", message)

    def status(self) -> dict[str, Any]:
        """Return the status document."""
        stats = self._pump.stats()
        return {
            "program": "qemu-vtpm-bridge",
            "role": "vtpm",
            "started": self.started,
            "tpm": self.config.family.value,
            "engine": {
                "running": self._engine.running,
                "starts": self.engine_starts,
                "stores": self.stores,
                "lost-state-marked": self._engine.marked,
            },
            "pump": {
                "commands": stats.commands,
                "mutating": stats.mutating,
                "refused": stats.refused,
                "last-ordinal": stats.last_ordinal,
                "last-response-code": stats.last_response_code,
                "in-flight": stats.in_flight_slot is not None,
            },
            "frontends": [device.status() for device in self._devices.values()],
            "last-error": self.last_error,
        }


_WORDS: Final = {
    BackendExit.ENGINE_EOF: "it died",
    BackendExit.ENGINE_DEADLINE: "it did not answer in time",
    BackendExit.ENGINE_BAD_RESPONSE: "its answer is malformed",
}
