"""Serving pages from the TPM: the Python face of the backend's pump in C.

Theory of operation.  One blocking call in a thread of its own takes one command at a
time from the frontends' pages, in turn, sends it to the TPM's data socket and writes the
response back (c_shim/pump_backend.c).  It returns where a decision is due: before a
command that would change a TPM whose stored state is current, after such commands when
the TPM has been idle for a while, and when the TPM or a channel failed.

Keeps P3 and P4 towards the TPM: size, tag and locality are checked on a private copy.
Who may lie: each frontend, in every byte of its page and with endless events; the TPM,
whose responses are bounded.

Source: Xen's public header io/tpmif.h; swtpm's tpm_ioctl.h for CMD_SET_LOCALITY.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from .._shim import ffi, lib
from ..errors import LocalProtocolError, XenError

if TYPE_CHECKING:
    from ..xen.platform import Channel, Page


_SUBMIT: Final = 1
_PAYLOAD_OFFSET: Final = 8


class BackendExit(enum.Enum):
    """Why the pump returned."""

    STOPPED = lib.BACKEND_STOPPED
    ENGINE_EOF = lib.BACKEND_ENGINE_EOF
    ENGINE_DEADLINE = lib.BACKEND_ENGINE_DEADLINE
    ENGINE_BAD_RESPONSE = lib.BACKEND_ENGINE_BAD_RESPONSE
    MUTATING = lib.BACKEND_MUTATING
    """The next command may change the TPM, and the pump was told that it is clean."""
    SETTLED = lib.BACKEND_SETTLED
    """The TPM was changed and has been idle since."""
    CHANNEL_ERROR = lib.BACKEND_CHANNEL_ERROR

    @property
    def expected(self) -> bool:
        """Whether somebody asked for it."""
        return self is BackendExit.STOPPED


@dataclass(frozen=True, slots=True)
class BackendStats:
    """Counters since the start, over all frontends."""

    commands: int
    mutating: int
    refused: int
    last_ordinal: int
    last_response_code: int
    last_change_ordinal: int
    """Of the last command that may have changed the TPM."""
    last_change_code: int
    in_flight_slot: int | None
    failed_slot: int | None


@dataclass(frozen=True, slots=True)
class SlotStats:
    """Counters of one frontend, since it was added."""

    commands: int
    refused: int
    events: int
    spurious: int
    cancels: int


class BackendPump:
    """The pump of one vTPM domain."""

    def __init__(
        self,
        *,
        command_tags: Iterable[int],
        read_only_ordinals: Iterable[int],
        bad_size: bytes,
        bad_tag: bytes,
        bad_locality: bytes,
        default_deadline_s: float,
        deadlines_s: Mapping[int, float],
        settle_s: float,
    ) -> None:
        raw = lib.backend_pump_new()
        if raw == ffi.NULL:
            raise XenError(f"no pump: {os.strerror(ffi.errno)}")
        self._pump: Any = ffi.gc(raw, lib.backend_pump_free)
        self._limiter = trio.CapacityLimiter(1)
        self._running = False
        self._rings: dict[int, tuple[Page, Channel]] = {}  # kept alive while C uses them
        tags = list(command_tags)
        ordinals = sorted(read_only_ordinals)
        status = lib.backend_pump_set_tables(self._pump, tags, len(tags), ordinals, len(ordinals))
        if status:
            raise LocalProtocolError("the pump's tables are too long")
        for which, header in (
            (lib.BACKEND_ANSWER_BAD_SIZE, bad_size),
            (lib.BACKEND_ANSWER_BAD_TAG, bad_tag),
            (lib.BACKEND_ANSWER_BAD_LOCALITY, bad_locality),
        ):
            lib.backend_pump_set_answer(self._pump, which, _header(header))
        lib.backend_pump_set_times(
            self._pump, round(default_deadline_s * 1000), round(settle_s * 1000)
        )
        slow = sorted(deadlines_s)
        deadlines_ms = [round(deadlines_s[ordinal] * 1000) for ordinal in slow]
        if lib.backend_pump_set_deadlines(self._pump, slow, deadlines_ms, len(slow)):
            raise LocalProtocolError("the pump's tables are too long")

    def _stand_still(self) -> None:
        if self._running:
            raise LocalProtocolError("the pump is running and may not be changed")

    # While it stands still.

    def add_frontend(
        self, page: Page, channel: Channel, *, answer_pending: bytes | None = None
    ) -> int:
        """Serve this page; return its slot.  Raises XenError where all slots are taken.

        With `answer_pending`, a request that is on the page already gets this answer.
        """
        self._stand_still()
        if answer_pending is not None and lib.tpmif_state(page.cdata.shared) == _SUBMIT:
            header = _header(answer_pending)
            lib.tpmif_answer(page.cdata.shared, _PAYLOAD_OFFSET, header, len(header))
            channel.notify()
        slot = int(lib.backend_pump_add_frontend(self._pump, page.cdata, channel.cdata))
        if slot < 0:
            raise XenError(
                f"no more frontends can be served: {os.strerror(-slot)}",
                state=f"{len(self._rings)} are connected",
            )
        self._rings[slot] = (page, channel)
        return slot

    def remove_frontend(self, slot: int) -> None:
        """Serve it no more; an answer that it waits for is dropped."""
        self._stand_still()
        lib.backend_pump_remove_frontend(self._pump, slot)
        self._rings.pop(slot, None)

    def set_engine(self, data_fd: int | None, control_fd: int | None) -> None:
        """Use the TPM behind these sockets, which stay the caller's."""
        self._stand_still()
        status = lib.backend_pump_set_engine(
            self._pump,
            -1 if data_fd is None else data_fd,
            -1 if control_fd is None else control_fd,
        )
        if status:
            raise XenError(f"the TPM's socket cannot be watched: {os.strerror(-status)}")

    def set_clean(self, clean: bool) -> None:
        """Say whether what is on disk is the TPM's current state."""
        self._stand_still()
        lib.backend_pump_set_clean(self._pump, clean)

    def fail_in_flight(self, header: bytes) -> None:
        """Answer the command in hand, if there is one, with this ten-byte header."""
        self._stand_still()
        lib.backend_pump_fail_in_flight(self._pump, _header(header))

    @property
    def busy(self) -> bool:
        """Whether the TPM works on a command: its data socket is not in step then."""
        self._stand_still()
        return bool(lib.backend_pump_busy(self._pump))

    # Running.

    async def run(self) -> BackendExit:
        """Serve until asked to stop or until a decision is due.

        Cancelling stops the pump and returns when its thread has ended; a command
        in flight stays in hand.
        """
        self._stand_still()
        self._running = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_cancelled)
            try:
                code = await trio.to_thread.run_sync(
                    lib.backend_pump_run, self._pump, limiter=self._limiter
                )
            finally:
                self._running = False
                nursery.cancel_scope.cancel()
        return BackendExit(code)

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if self._running:
                self.request_stop(drain=False)

    # At any time.

    def request_stop(self, *, drain: bool) -> None:
        """Have `run` return: after the command in flight, or now, leaving it in hand."""
        stop = lib.PUMP_STOP_DRAIN if drain else lib.PUMP_STOP_NOW
        lib.backend_pump_request_stop(self._pump, stop)

    def reset_stop(self) -> None:
        """Take back what `request_stop` asked for."""
        lib.backend_pump_reset_stop(self._pump)

    def ping(self) -> int:
        """Wake the pump; return how often it has come to its bell so far."""
        return int(lib.backend_pump_ping(self._pump))

    def stats(self) -> BackendStats:
        """Return the counters."""
        stats = ffi.new("struct backend_stats *")
        lib.backend_pump_stats(self._pump, stats)
        return BackendStats(
            commands=stats.commands,
            mutating=stats.mutating,
            refused=stats.refused,
            last_ordinal=stats.last_ordinal,
            last_response_code=stats.last_response_code,
            last_change_ordinal=stats.last_change_ordinal,
            last_change_code=stats.last_change_code,
            in_flight_slot=None if stats.in_flight_slot < 0 else stats.in_flight_slot,
            failed_slot=None if stats.failed_slot < 0 else stats.failed_slot,
        )

    def slot_stats(self, slot: int) -> SlotStats:
        """Return one frontend's counters."""
        stats = ffi.new("struct backend_slot_stats *")
        lib.backend_pump_slot_stats(self._pump, slot, stats)
        return SlotStats(**{name: int(getattr(stats, name)) for name in SlotStats.__slots__})


def _header(raw: bytes) -> bytes:
    if len(raw) != 10:
        raise LocalProtocolError(f"an answer made here has ten bytes, not {len(raw)}")
    return raw
