"""The tpmif exchange towards the vTPM domain: the Python face of the frontend's pump in C.

Theory of operation.  The pump is one blocking call in a thread of its own, with the GIL
released: it reads commands from QEMU's data socket, puts each on the page under its
ordinal's deadline, and writes the response back (c_shim/pump_frontend.c).  What it may
do is set here while it stands still; stopping, cancelling, the locality and the counters
work at any time.  The pump decides nothing: every deadline, every permitted tag and every
answer that does not come from the TPM is given to it.

Keeps P1 and P2 (bounded in time and size, whatever the page says), P3 (size and tag),
P4 and P5 (a page whose answer is owed carries nothing new).  Who may lie: QEMU on the
socket, the vTPM domain in every byte of the page and on the event channel.

Source: Xen's public header io/tpmif.h.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from .._shim import ffi, lib
from ..errors import BackendProtocolError, LocalProtocolError, XenError

if TYPE_CHECKING:
    from ..xen.platform import Channel, Page

RESPONSE_MAX_BYTES: Final = 4088
_IDLE_POLL_S: Final = 0.02

RESPONSE_TAGS: Final = (0x8001, 0x8002, 0x00C4, 0x00C5, 0x00C6)
"""TPM_ST_NO_SESSIONS, TPM_ST_SESSIONS, TPM_TAG_RSP_COMMAND and its AUTH1 and AUTH2 forms."""

ERROR_ONLY_TAGS: Final = (0x00C3,)
"""vtpm-stubdom answers AUTH commands that it refuses with this request tag."""


class PumpMode(enum.Enum):
    """What happens to commands from QEMU."""

    HOLD = lib.FRONTEND_HOLD
    """Nothing is read: QEMU waits."""
    REFUSE = lib.FRONTEND_REFUSE
    """Each command gets the refusal that came with the mode."""
    FORWARD = lib.FRONTEND_FORWARD
    """Commands go to the vTPM domain; without a ring they wait."""


class PumpExit(enum.Enum):
    """Why the pump returned."""

    STOPPED = lib.FRONTEND_STOPPED
    DATA_EOF = lib.FRONTEND_DATA_EOF
    DATA_ERROR = lib.FRONTEND_DATA_ERROR
    DEADLINE = lib.FRONTEND_DEADLINE
    """QEMU was answered; the page is still the backend's and must be replaced."""
    BAD_RESPONSE = lib.FRONTEND_BAD_RESPONSE
    CHANNEL_ERROR = lib.FRONTEND_CHANNEL_ERROR

    @property
    def expected(self) -> bool:
        """Whether somebody asked for it."""
        return self is PumpExit.STOPPED


@dataclass(frozen=True, slots=True)
class PumpStats:
    """Counters since the start; bytes and commands on QEMU's side."""

    commands: int
    responses: int
    refused: int
    errors: int
    timeouts: int
    cancels: int
    events: int
    spurious: int
    bytes_in: int
    bytes_out: int
    last_ordinal: int
    last_response_code: int
    in_flight: bool

    def as_dict(self) -> dict[str, int]:
        """Return the counters with the status document's names."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}


class FrontendPump:
    """One guest's pump.  Not running, it may be changed; running, only stopped and looked at."""

    def __init__(
        self,
        default_deadline_s: float,
        deadlines_s: Mapping[int, float],
        cancel_grace_s: float,
        command_tags: Iterable[int],
    ) -> None:
        raw = lib.frontend_pump_new()
        if raw == ffi.NULL:
            raise XenError(f"no pump: {os.strerror(ffi.errno)}")
        self._pump: Any = ffi.gc(raw, lib.frontend_pump_free)
        self._limiter = trio.CapacityLimiter(1)
        self._running = False
        self._ring: tuple[Page, Channel] | None = None  # kept alive while C uses them
        ordinals = sorted(deadlines_s)
        tags = list(command_tags)
        _check(
            lib.frontend_pump_set_deadlines(
                self._pump,
                round(default_deadline_s * 1000),
                round(cancel_grace_s * 1000),
                ordinals,
                [round(deadlines_s[ordinal] * 1000) for ordinal in ordinals],
                len(ordinals),
            )
        )
        _check(
            lib.frontend_pump_set_tags(
                self._pump,
                tags,
                len(tags),
                RESPONSE_TAGS,
                len(RESPONSE_TAGS),
                ERROR_ONLY_TAGS,
                len(ERROR_ONLY_TAGS),
            )
        )

    def _stand_still(self) -> None:
        if self._running:
            raise LocalProtocolError("the pump is running and may not be changed")

    # While it stands still.

    def set_answers(
        self, *, failure: bytes, bad_size: bytes, bad_tag: bytes, cancelled: bytes
    ) -> None:
        """Give the ten-byte answers for commands that get none from the TPM."""
        self._stand_still()
        for which, header in (
            (lib.FRONTEND_ANSWER_FAILURE, failure),
            (lib.FRONTEND_ANSWER_BAD_SIZE, bad_size),
            (lib.FRONTEND_ANSWER_BAD_TAG, bad_tag),
            (lib.FRONTEND_ANSWER_CANCELLED, cancelled),
        ):
            self._set_answer(which, header)

    def _set_answer(self, which: int, header: bytes) -> None:
        if len(header) != 10:
            raise LocalProtocolError(f"an answer made here has ten bytes, not {len(header)}")
        lib.frontend_pump_set_answer(self._pump, which, header)

    def set_mode(self, mode: PumpMode, refusal: bytes = b"") -> None:
        """Set what happens to commands; `refusal` is the answer in mode REFUSE."""
        self._stand_still()
        if mode is PumpMode.REFUSE:
            self._set_answer(lib.FRONTEND_ANSWER_REFUSAL, refusal)
        lib.frontend_pump_set_mode(self._pump, mode.value)

    def set_buffer_size(self, size_bytes: int) -> None:
        """Set the longest response that QEMU may get (P2); longer ones become a failure."""
        self._stand_still()
        lib.frontend_pump_set_buffer_size(self._pump, size_bytes)

    def set_data_fd(self, fd: int | None) -> None:
        """Carry commands from this connected socket; takes ownership, closes the previous one."""
        self._stand_still()
        _check(lib.frontend_pump_set_data_fd(self._pump, -1 if fd is None else fd))

    def attach_ring(self, page: Page, channel: Channel) -> None:
        """Use this connection to the vTPM domain; both must stay open until `detach_ring`.

        Safe to call twice: what the vTPM domain owes on it is not forgotten.
        """
        self._stand_still()
        if self._ring == (page, channel):
            return
        _check(lib.frontend_pump_attach_ring(self._pump, page.cdata, channel.cdata))
        self._ring = (page, channel)

    def detach_ring(self) -> None:
        """Let go of the connection."""
        self._stand_still()
        lib.frontend_pump_detach_ring(self._pump)
        self._ring = None

    # Running.

    async def run(self) -> PumpExit:
        """Carry commands until asked to stop or until something needs a decision.

        Cancelling stops the pump, with a failure for the command in flight, and
        returns when its thread has ended.
        """
        return PumpExit(await self._in_thread(lib.frontend_pump_run, self._pump))

    async def transact(self, request: bytes, locality: int, deadline_s: float) -> bytes:
        """Send a command of the bridge's own and return the response, which is well-formed.

        Raises XenError without a ring, after its loss, at the deadline or after
        `request_stop(drain=False)`; BackendProtocolError for a malformed response.
        Cancelling aborts it; the page is then the backend's until it answers.
        """
        response = ffi.new(f"uint8_t[{RESPONSE_MAX_BYTES}]")
        result = await self._in_thread(
            lib.frontend_pump_transact,
            self._pump,
            request,
            len(request),
            locality,
            round(deadline_s * 1000),
            response,
        )
        if result > 0:
            return bytes(ffi.buffer(response, result))
        if result == -errno.ENODATA:
            raise BackendProtocolError("the vTPM domain answered with an empty response")
        if result == -errno.EBADMSG:
            raise BackendProtocolError("the vTPM domain's response is malformed")
        raise XenError(f"a command to the vTPM domain failed: {os.strerror(-result)}")

    async def _in_thread(self, function: Any, *arguments: Any) -> int:
        self._stand_still()
        self._running = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop_when_cancelled)
            try:
                result = await trio.to_thread.run_sync(function, *arguments, limiter=self._limiter)
            finally:
                self._running = False
                nursery.cancel_scope.cancel()
        return int(result)

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            if self._running:
                self.request_stop(drain=False)

    # At any time.

    def request_stop(self, *, drain: bool) -> None:
        """Have `run` return: after the command in flight, or now with a failure for it.

        A request that comes while the pump stands still stops its next run at once,
        unless `reset_stop` takes it back.
        """
        stop = lib.PUMP_STOP_DRAIN if drain else lib.PUMP_STOP_NOW
        lib.frontend_pump_request_stop(self._pump, stop)

    def reset_stop(self) -> None:
        """Take back what `request_stop` asked for."""
        lib.frontend_pump_reset_stop(self._pump)

    def ping(self) -> int:
        """Wake the pump; return how often it has come to its bell so far."""
        return int(lib.frontend_pump_ping(self._pump))

    def set_locality(self, locality: int) -> None:
        """Set the locality of the commands that follow."""
        lib.frontend_pump_set_locality(self._pump, locality)

    def cancel(self) -> None:
        """Ask the vTPM domain to give up the command in flight, if there is one."""
        lib.frontend_pump_cancel(self._pump)

    def ring_busy(self) -> bool:
        """Return whether the vTPM domain owes an answer on the page."""
        return bool(lib.frontend_pump_ring_busy(self._pump))

    async def wait_ring_idle(self) -> None:
        """Return once the vTPM domain owes nothing.  Cancelling changes nothing.

        Asks the page again and again: a peer that dies sends no event.
        """
        while self.ring_busy():  # noqa: ASYNC110 - nobody would set an event
            await trio.sleep(_IDLE_POLL_S)

    def stats(self) -> PumpStats:
        """Return the counters."""
        stats = ffi.new("struct frontend_stats *")
        lib.frontend_pump_stats(self._pump, stats)
        values = {
            name: int(getattr(stats, name)) for name in PumpStats.__slots__ if name != "in_flight"
        }
        return PumpStats(in_flight=bool(stats.in_flight), **values)

    def ordinals(self) -> dict[int, int]:
        """Return how often each ordinal came; -1 stands for those outside both families."""
        counts = ffi.new("uint64_t[]", lib.PUMP_ORDINALS + 1)
        lib.frontend_pump_ordinals(self._pump, counts)
        found = {ordinal: int(counts[ordinal]) for ordinal in range(lib.PUMP_ORDINALS)}
        found[-1] = int(counts[lib.PUMP_ORDINALS])
        return {ordinal: count for ordinal, count in found.items() if count}


def _check(status: int) -> None:
    if status < 0:
        raise XenError(f"the pump cannot be set up: {os.strerror(-status)}")
