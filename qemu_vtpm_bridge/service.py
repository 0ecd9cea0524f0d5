"""A running bridge: the only place that wires its parts together.

Theory of operation.  Three things decide what happens to a command from QEMU:
the reset contract (`bridge/power.py`), the connection to the vTPM domain
(`bridge/frontend.py`) and QEMU's presence (`bridge/chardev.py`).  Each tells this
module what happened; `_apply` turns the three into one of the pump's modes
whenever one of them changed.  The pump itself carries the commands in C.

Keeps P1 (a held data channel has a deadline), P5 (a page that passed a deadline
or broke its protocol is replaced), P7 and P8.
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from .bridge import power, tpm
from .bridge.frontend_driver import Frontend, FrontendTimes
from .bridge.power import ResetPolicy
from .bridge.ring import FrontendPump, PumpExit, PumpMode
from .carrier import Carrier
from .deadlines import DEADLINES_S, DEFAULT_DEADLINE_S
from .errors import BridgeError, XenError, first_of
from .evidence import EvidenceTaker
from .vtpm_follower import EntriesFollower, Follower, VtpmFollower, follow_and_run
from .xen.platform import Platform
from .xen.store import KeptStore, StoreGone, open_store
from .xen.xenbus import DevicePaths

if TYPE_CHECKING:
    from .xen.platform import Channel, Page

log = logging.getLogger(__name__)

INIT_ANSWER_S = 0.4
"""How long CMD_INIT may keep QEMU's main loop waiting; the rest goes on behind the answer."""

BUFFER_MIN_BYTES = 2808
"""The least that swtpm lets a client set for TPM 2.0."""

EVIDENCE_DEADLINE_S = 30.0
"""For one command of the bridge's own; a vTPM domain may be Connected before it serves."""

OFF_AFTER_S = 0.4
"""How long CMD_STOP and CMD_INIT wait for a command in flight: QEMU has waited itself, and
from anybody else they mean that the power goes.  So long do a data channel's end and the
next one's beginning wait too."""

STORE_RETRY_S = 1.0
"""Between attempts to reach a XenStore that went away."""


@dataclass(frozen=True, slots=True)
class BridgeConfig:
    """What one bridge is started with."""

    paths: DevicePaths
    family: tpm.Family = tpm.Family.TPM_2_0
    reset: ResetPolicy = ResetPolicy.VERIFIED
    restart_command: tuple[str, ...] = ()
    stop_guest_on_reset_failure: bool = False
    reset_deadline_s: float = 60.0
    """From CMD_INIT to the evidence; commands are held meanwhile."""
    reconnect_hold_s: float = 10.0
    """How long commands are held while the connection is down, before RETRY is answered."""
    require_feature: bool = True
    vtpm_uuid: str | None = None
    backend_name: str | None = None
    """The vTPM domain's name, by which it is found again when it has been recreated."""
    paths_for: Callable[[int], DevicePaths] | None = None
    """The directories for the id of a vTPM domain that is followed."""
    follows_entries: bool = False
    """The vTPM domain is whichever the entries in the frontend's directory name."""
    writes_entries: bool = False
    """With `backend_name`: write the toolstack's entries where they are missing."""
    sysfs: Path | None = None
    """With `writes_entries`: where this machine's drivers are seen, as for `attach`."""
    store_path: str | KeptStore | None = None
    embedded_socket: str | None = None
    times: FrontendTimes = field(default_factory=FrontendTimes)


_FROM_QEMU = frozenset({power.Fact.INIT_ASKED, power.Fact.INIT_RESUME_ASKED, power.Fact.STOP_ASKED})


class Bridge:
    """One guest's TPM: what the door calls and what the frontend tells."""

    def __init__(self, config: BridgeConfig, platform: Platform) -> None:
        self.config = config
        self.started = time.time()
        self.power = power.PowerMachine(config.reset)
        self.last_error = ""
        pump = FrontendPump(
            DEFAULT_DEADLINE_S,
            DEADLINES_S,
            tpm.CANCEL_GRACE_S,
            tpm.COMMAND_TAGS,
        )
        pump.set_answers(
            failure=self._refusal(tpm.Refusal.FAILURE),
            bad_size=self._refusal(tpm.Refusal.COMMAND_SIZE),
            bad_tag=self._refusal(tpm.Refusal.BAD_TAG),
            cancelled=self._refusal(tpm.Refusal.CANCELLED),
        )
        self._carrier: Carrier[FrontendPump, PumpExit] = Carrier(pump, self._pump_ended)
        self.frontend = Frontend(
            config.paths,
            platform,
            self,
            times=config.times,
            require_feature=config.require_feature,
            vtpm_uuid=config.vtpm_uuid,
        )
        self._follower = self._follower_for(config)
        self._ring_up = False
        self._closing = False
        self._data: socket.socket | None = None
        self._data_gone = trio.Event()
        self._established = False
        self._buffer_size = tpm.COMMAND_MAX_BYTES
        self._hold_until = math.inf
        self._power_deadline = math.inf
        self._timer = trio.Event()
        self._settled = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._step = trio.CancelScope()
        """What the reset contract waits for; cancelled by the next CMD_STOP or CMD_INIT."""

    def _follower_for(self, config: BridgeConfig) -> Follower | None:
        if config.paths_for is None:
            return None
        if config.follows_entries:
            return EntriesFollower(config.paths_for, self.frontend)
        if config.backend_name is None:
            return None
        return VtpmFollower(
            config.backend_name,
            config.paths_for,
            self.frontend,
            writes_entries=config.writes_entries,
            sysfs=config.sysfs,
        )

    # Running.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry commands until `close` was asked for and done.

        Cancelling fails the command in flight and leaves the frontend's published
        state as it is; the next start recovers from that.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                async with self._carrier.paused() as pump:
                    pump.set_mode(PumpMode.REFUSE, self._refusal(tpm.Refusal.FAILURE))
                    nursery.start_soon(self._carrier.run)
                nursery.start_soon(self._keep_time)
                task_status.started()
                await self._follow_xenstore()
                nursery.cancel_scope.cancel()
        finally:
            # The pump's thread has ended with the nursery.
            self._forget_data(self._carrier.pump)

    async def _follow_xenstore(self) -> None:
        """Run the frontend, over as many XenStore connections as it takes."""
        while True:
            try:
                async with open_store(self.config.store_path) as store:
                    await follow_and_run(self._follower, self.frontend, store)
                return
            except* XenError as group:
                error = first_of(group)
                what = f"XenStore: {error.cause}" if isinstance(error, StoreGone) else str(error)
                self._report(what, "the bridge tries again every second")
            if self.frontend.closed or self._closing:
                # Nobody can be told any more; the next start recovers from what is written.
                return
            await trio.sleep(STORE_RETRY_S)

    def close(self) -> None:
        """Have the frontend drain and close; `run` then returns.

        Without XenStore it returns without that, since it might wait for ever.
        """
        self._closing = True
        self.frontend.ask_close()

    # What the door asks for (chardev.TpmBehind).

    async def attach_data(self, data_socket: socket.socket) -> None:
        """Carry commands from this socket; takes ownership."""

        def use(pump: FrontendPump) -> None:
            self._forget_data(pump)
            self._data = data_socket
            self._data_gone = trio.Event()
            pump.set_data_fd(os.dup(data_socket.fileno()))

        # Who asked for what is in flight has gone, and a new QEMU's main loop waits.
        await self._change(use, patience_s=OFF_AFTER_S)

    async def detach_data(self) -> None:
        """Forget QEMU's data channel, after the command in flight or without its answer."""
        if self._data is not None:
            await self._change(self._forget_data, patience_s=OFF_AFTER_S)

    def _forget_data(self, pump: FrontendPump) -> None:
        if self._data is not None:
            pump.set_data_fd(None)
            self._data.close()
            self._data = None
            self._data_gone.set()

    def data_attached(self) -> bool:
        """Return whether a data channel is open and its peer has not hung up.

        The pump may not have noticed yet: a new QEMU can be faster than the news of the
        old one's end.
        """
        if self._data is None:
            return False
        poll = select.poll()
        poll.register(self._data, 0)
        return not poll.poll(0)

    async def data_detached(self) -> None:
        """Return once there is no data channel."""
        while self._data is not None:
            await self._data_gone.wait()

    async def init(self, *, resume: bool) -> int:
        """Begin a boot of the guest; return a TPM 1.2 result code within half a second."""
        self._settled = trio.Event()
        if resume and not self._ring_up and self._hold_until == math.inf:
            # No evidence is waited for, so nothing else ends the guest's waiting.
            self._hold_until = trio.current_time() + self.config.reconnect_hold_s
        await self._feed(power.Fact.INIT_RESUME_ASKED if resume else power.Fact.INIT_ASKED)
        if self.power.state is power.State.WAIT_RING and self._ring_up:
            await self._feed(power.Fact.RING_UP)
        with trio.move_on_after(INIT_ANSWER_S):
            while self.power.state not in (power.State.ON, power.State.FAILED):
                await self._settled.wait()
        failed = self.power.state is power.State.FAILED
        return tpm.TPM_FAIL if failed and self.config.stop_guest_on_reset_failure else 0

    async def settled(self) -> bool:
        """Return, once the last INIT's contract has ended, whether commands flow."""
        while self.power.state not in (power.State.ON, power.State.FAILED):
            await self._settled.wait()
        return self.power.state is power.State.ON

    async def stop(self) -> int:
        """Refuse commands until the next INIT."""
        await self._feed(power.Fact.STOP_ASKED)
        return 0

    def running(self) -> bool:
        """Return whether the guest's TPM was switched on."""
        return self.power.state is not power.State.OFF

    def set_locality(self, locality: int) -> None:
        """Pass this locality with the commands that follow."""
        self._carrier.pump.set_locality(locality)

    def cancel(self) -> None:
        """Ask the vTPM domain to cancel the command in flight."""
        self._carrier.pump.cancel()

    async def set_buffer_size(self, wanted_bytes: int) -> tuple[int, int, int]:
        """Set the largest response, 0 to ask; return the size in use, the least and the most.

        The largest is what the page holds.  QEMU's CRB asks for less than that, and
        copies a longer response over its own state, so what it asks for is a limit (P2).
        """
        most = tpm.COMMAND_MAX_BYTES
        if wanted_bytes:
            self._buffer_size = min(max(wanted_bytes, BUFFER_MIN_BYTES), most)
            async with self._carrier.paused() as pump:
                pump.set_buffer_size(self._buffer_size)
        return self._buffer_size, BUFFER_MIN_BYTES, most

    def established(self) -> bool:
        """Return the tpmEstablished flag: no dynamic launch can happen through QEMU."""
        return self._established

    def reset_established(self, locality: int) -> int:
        """Clear the flag; only localities 3 and 4 may."""
        if locality not in (3, 4):
            return 0x3D
        self._established = False
        return 0

    # What the frontend tells (frontend_driver.RingUser).

    async def ring_up(self, page: Page, channel: Channel) -> None:
        """The vTPM domain is connected."""
        async with self._carrier.paused() as pump:
            pump.attach_ring(page, channel)
            self._ring_up = True
            self._apply(pump)
        await self._feed(power.Fact.RING_UP)

    async def ring_down(self) -> None:
        """The vTPM domain is not to be used: a command in flight is answered now."""
        async with self._carrier.paused(drain=False) as pump:
            self._ring_up = False
            self._hold_until = trio.current_time() + self.config.reconnect_hold_s
            self._apply(pump)
        await self._feed(power.Fact.RING_DOWN)

    async def ring_drained(self) -> None:
        """Return when the vTPM domain has answered what is on the page."""
        await self._carrier.pump.wait_ring_idle()

    async def ring_forget(self) -> None:
        """Let go of the page, which is about to be unmapped."""
        async with self._carrier.paused(drain=False) as pump:
            pump.detach_ring()
            self._ring_up = False
            self._apply(pump)

    async def _pump_ended(self, reason: PumpExit) -> None:
        """The pump stopped by itself; see to what made it."""
        if reason in (PumpExit.DATA_EOF, PumpExit.DATA_ERROR):
            ended = self._data  # another one may be attached before the pump stands still again
            async with self._carrier.paused() as pump:
                if self._data is ended:
                    self._forget_data(pump)
            return
        words = {
            PumpExit.DEADLINE: "the TPM did not answer a command in time",
            PumpExit.BAD_RESPONSE: "the vTPM domain broke the page's protocol",
            PumpExit.CHANNEL_ERROR: "the event channel failed",
        }
        self._report(words[reason], "the connection to the vTPM domain is replaced")
        self.frontend.ask_replace()
        await self.ring_down()

    # The reset contract.

    async def _feed(self, fact: power.Fact) -> None:
        before = self.power.state
        actions = self.power.feed(fact)
        if fact in _FROM_QEMU:
            # An answer about an earlier boot must not open the channel of this one.
            self._step.cancel()
        if self.power.state is not before:
            log.info("power: %s -> %s (%s)", before.name, self.power.state.name, fact.name)
        for action in actions:
            match action:
                case power.Action.HOLD:
                    self._arm_power(self.config.reset_deadline_s)
                case power.Action.ASK_EVIDENCE:
                    self._spawn(self._evidence)
                case power.Action.CYCLE:
                    self._spawn(self._cycle)
                case power.Action.WARN_KEPT:
                    log.warning(
                        "the guest was reset, its TPM was not: PCRs carry over (reset = keep)"
                    )
                case power.Action.REPORT_FAILED:
                    self._report(
                        self.last_error or "the TPM gave no evidence of a power cycle",
                        "every command is refused until the guest is reset again",
                    )
                case power.Action.REFUSE | power.Action.FORWARD:
                    self._arm_power(math.inf)
        if actions:
            patience_s = OFF_AFTER_S if fact in _FROM_QEMU else math.inf
            await self._change(self._apply, patience_s=patience_s)
        if self.power.state in (power.State.ON, power.State.FAILED):
            self._settled.set()

    async def _change(self, change: Callable[[FrontendPump], None], *, patience_s: float) -> None:
        """Change the pump, after the command in flight or once patience has ended.

        A command that is cut short is answered with a failure; the page stays owed (P5).
        """
        with trio.move_on_after(patience_s):
            async with self._carrier.paused() as pump:
                change(pump)
                return
        async with self._carrier.paused(drain=False) as pump:
            change(pump)

    def _spawn(self, step: Callable[[], Awaitable[power.Fact]]) -> None:
        """Begin a step of the reset contract, whose outcome is a fact."""
        assert self._nursery is not None
        self._step.cancel()
        self._step = trio.CancelScope()
        self._nursery.start_soon(self._take, step, self._step)

    async def _take(self, step: Callable[[], Awaitable[power.Fact]], scope: Any) -> None:
        asked_in = self.power.state
        with scope:
            fact = await step()
        if not scope.cancelled_caught and self.power.state is asked_in:
            await self._feed(fact)

    async def _evidence(self) -> power.Fact:
        """Ask the TPM whether it was power-cycled."""
        asking = EvidenceTaker(self.config.family, self._command, self._report)
        return await asking.take(lambda: self.frontend.offers_reset)

    async def _command(self, request: bytes) -> bytes:
        """Send a command of the bridge's own, at locality 0."""
        # A command that was given up may still be on the page.
        with trio.move_on_after(EVIDENCE_DEADLINE_S):
            await self._carrier.pump.wait_ring_idle()
        async with self._carrier.paused() as pump:
            if not self._ring_up:
                raise XenError("the vTPM domain is not connected")
            return await pump.transact(request, 0, EVIDENCE_DEADLINE_S)

    async def _cycle(self) -> power.Fact:
        """Get the TPM power-cycled as the policy says."""
        try:
            if self.config.reset is ResetPolicy.RESTART_DOMAIN:
                connections = self.frontend.connections
                await trio.run_process(self.config.restart_command)
                await self.frontend.wait_running(after_connections=connections)
                done = True
            else:
                done = await self.frontend.request_reset()
                if not done:
                    self._report(
                        "the TPM kept its PCRs over the guest's reset, and this vTPM domain "
                        "does not offer to power-cycle it",
                        "set `reset` to restart-domain with a command that recreates it",
                    )
        except (OSError, subprocess.SubprocessError, BridgeError) as error:
            self._report(f"the TPM could not be power-cycled: {error}", "")
            done = False
        return power.Fact.CYCLED if done else power.Fact.CYCLE_REFUSED

    # The pump's mode.

    def _refusal(self, reason: tpm.Refusal) -> bytes:
        return tpm.refusal(self.config.family, reason)

    def _apply(self, pump: FrontendPump) -> None:
        """Set the mode that power, connection and time call for; the pump stands still."""
        if self.power.state in (power.State.OFF, power.State.FAILED):
            pump.set_mode(PumpMode.REFUSE, self._refusal(tpm.Refusal.FAILURE))
        elif self.power.state is not power.State.ON:
            pump.set_mode(PumpMode.HOLD)
        elif self._ring_up:
            self._hold_until = math.inf
            pump.set_mode(PumpMode.FORWARD)
        elif trio.current_time() < self._hold_until:
            pump.set_mode(PumpMode.HOLD)
        else:
            pump.set_mode(PumpMode.REFUSE, self._refusal(tpm.Refusal.RETRY))
        self._timer.set()

    def _arm_power(self, seconds: float) -> None:
        self._power_deadline = trio.current_time() + seconds
        self._timer.set()

    async def _keep_time(self) -> None:
        """See to the two deadlines: of the reset contract, and of a held data channel."""
        while True:
            self._timer = trio.Event()
            with trio.move_on_at(min(self._power_deadline, self._hold_until)):
                await self._timer.wait()
                continue
            if trio.current_time() >= self._power_deadline:
                self._power_deadline = math.inf
                if self.power.state not in (power.State.OFF, power.State.ON, power.State.FAILED):
                    await self._feed(power.Fact.DEADLINE)
            if trio.current_time() >= self._hold_until:
                async with self._carrier.paused() as pump:
                    self._apply(pump)
                self._hold_until = math.inf

    # Telling.

    def alive(self) -> bool:
        """Return whether commands could be carried, for a watchdog; see `Carrier.alive`."""
        return self._carrier.alive()

    def _report(self, cause: str, next_step: str) -> None:
        self.last_error = cause
        log.warning("%s%s", cause, f"; {next_step}" if next_step else "")

    def status(self) -> dict[str, Any]:
        """Return the status document: states, counters, last error."""
        # Imported late: a bridge that nobody looks at does without the tables.
        from .names import ordinal_name

        frontend = self.frontend
        return {
            "program": "qemu-vtpm-bridge",
            "role": "bridge",
            "started": self.started,
            "tpm": self.config.family.value,
            "power": self.power.state.name,
            "reset": self.config.reset.value,
            "frontend": {
                "path": frontend.paths.frontend,
                "backend": frontend.paths.backend,
                "state": frontend.machine.state.name,
                "backend-state": frontend.backend_state and frontend.backend_state.label,
                "connections": frontend.connections,
                "offers-reset": frontend.offers_reset,
            },
            "qemu": {"data-attached": self._data is not None, "buffer-size": self._buffer_size},
            "pump": self._carrier.pump.stats().as_dict(),
            "ordinals": {
                "other" if ordinal < 0 else ordinal_name(ordinal): count
                for ordinal, count in self._carrier.pump.ordinals().items()
            },
            "last-error": self.last_error or frontend.last_error,
        }
