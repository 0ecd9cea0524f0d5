"""The register devices as a vfio-user server: one PCI function, its windows as BARs.

Theory of operation.  `Session` is one client's connection without the connection: bytes
and descriptors in, replies out.  It parses frames off the stream, and asks what is
behind it, a `Mmio`, for accesses and whoever made it for a reset.  The first frame has
to be VERSION; then each request gets its reply, an errno where it cannot be done.  A
stream that cannot be followed any more raises `QemuProtocolError`, and the connection
ends.  The common frame, a whole access of a register, takes a short way through `feed`,
which does the same as the long one.

Guest memory is not touched: DMA_MAP is acknowledged, its descriptors are closed, nothing
is ever mapped.  INTx goes through an eventfd that the client gives (`Intx`).

The driver is `vfio_user_driver.py`.

Keeps P1 (no access waits for the TPM), P10, P11.  Who may lie: the client in every
byte and descriptor, and the guest behind it in every access.

Source: the vfio-user protocol specification, 0.0; linux/vfio.h for INTx's rules.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from construct import ConstructError

from ..errors import QemuProtocolError
from . import vfio_user_frames as frames
from .device import ACCESS_MAX_BYTES
from .mmio import Mmio
from .pci_config import CONFIG_BYTES, PciConfig
from .vfio_user_frames import Command

_FDS_HELD_MAX: Final = 2 * frames.FDS_MAX

_READ: Final = int(Command.REGION_READ)
_WRITE: Final = int(Command.REGION_WRITE)


class RequestError(Exception):
    """A request that is answered with an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Phase(enum.Enum):
    """How far a connection has come."""

    NEW = enum.auto()
    """Only VERSION is understood."""
    READY = enum.auto()


class IntxState(enum.Enum):
    """Who has to act for the next interrupt."""

    UNARMED = enum.auto()
    """The client gave no eventfd."""
    ARMED = enum.auto()
    """A high line is signalled at once."""
    MASKED = enum.auto()
    """The client was signalled, or masked it, and unmasks when the guest has served it."""


class IntxInput(enum.Enum):
    """What happens to the interrupt."""

    ARM = enum.auto()
    DISARM = enum.auto()
    MASK = enum.auto()
    UNMASK = enum.auto()
    SIGNALLED = enum.auto()


INTX_TRANSITIONS: Final[dict[tuple[IntxState, IntxInput], IntxState]] = {
    (IntxState.UNARMED, IntxInput.ARM): IntxState.ARMED,
    (IntxState.UNARMED, IntxInput.DISARM): IntxState.UNARMED,
    (IntxState.ARMED, IntxInput.ARM): IntxState.ARMED,
    (IntxState.ARMED, IntxInput.DISARM): IntxState.UNARMED,
    (IntxState.ARMED, IntxInput.MASK): IntxState.MASKED,
    (IntxState.ARMED, IntxInput.UNMASK): IntxState.ARMED,
    (IntxState.ARMED, IntxInput.SIGNALLED): IntxState.MASKED,
    (IntxState.MASKED, IntxInput.ARM): IntxState.ARMED,
    (IntxState.MASKED, IntxInput.DISARM): IntxState.UNARMED,
    (IntxState.MASKED, IntxInput.MASK): IntxState.MASKED,
    (IntxState.MASKED, IntxInput.UNMASK): IntxState.ARMED,
}
"""A pair that is not here is refused with EINVAL and changes nothing."""


class Intx:
    """The level-triggered interrupt as vfio has it: each signal masks it until it is unmasked."""

    def __init__(self) -> None:
        self.state = IntxState.UNARMED
        self.eventfd: int | None = None
        self.signals = 0
        """Signals to be written to the eventfd."""

    def take(self, fact: IntxInput) -> None:
        """Go on; raises RequestError where the fact has no place."""
        to = INTX_TRANSITIONS.get((self.state, fact))
        if to is None:
            raise RequestError(errno.EINVAL)
        self.state = to

    def follow(self, level: bool) -> None:
        """Signal a line that is high and armed."""
        if level and self.state is IntxState.ARMED:
            self.take(IntxInput.SIGNALLED)
            self.signals += 1


class Session:
    """One client's connection, without the connection.

    `on_reset` does what a reset of the machine means, and returns once it is done.
    """

    def __init__(self, mmio: Mmio, on_reset: Callable[[], None]) -> None:
        self._mmio = mmio
        self._devices = mmio.devices
        self._on_reset = on_reset
        self._config = PciConfig([device.span_bytes for device in mmio.devices])
        self._sizes = [self._config.bar_size(bar) for bar in range(len(mmio.devices))]
        self._phase = Phase.NEW
        self._input = bytearray()
        self._fds: list[int] = []
        self._level = False
        self.intx = Intx()
        self.unwanted_fds: list[int] = []
        """Descriptors that the driver closes."""

    # Frames off the stream.

    def feed(self, raw: bytes, fds: Sequence[int] = ()) -> bytes:
        """Take bytes and the descriptors that came with them; return the replies.

        Raises QemuProtocolError where the stream cannot be followed any more.
        """
        if not fds and not self._input and len(raw) >= frames.ACCESS_BYTES:
            reply = self._access_at_once(raw)
            if reply is not None:
                return reply
        self._fds += fds
        if len(self._fds) > _FDS_HELD_MAX:
            raise QemuProtocolError("a vfio-user client sent descriptors that nothing asked for")
        self._input += raw
        replies = bytearray()
        while len(self._input) >= frames.HEADER_BYTES:
            message_id, command, size, flags, _error = frames.HEADER_STRUCT.unpack_from(self._input)
            if not frames.HEADER_BYTES <= size <= frames.MESSAGE_MAX_BYTES:
                raise QemuProtocolError(f"a vfio-user message claims to have {size} bytes")
            if flags & frames.TYPE_MASK != frames.TYPE_REQUEST:
                raise QemuProtocolError("a vfio-user client replied to what nobody asked")
            if len(self._input) < size:
                break
            body = bytes(self._input[frames.HEADER_BYTES : size])
            del self._input[:size]
            reply = self._reply(message_id, command, body)
            if not flags & frames.NO_REPLY:
                replies += reply
        if not self._input:
            self.unwanted_fds += self._fds
            self._fds.clear()
        self.follow_interrupt()
        return bytes(replies)

    def _access_at_once(self, raw: bytes) -> bytes | None:
        """Do an access of a register whose frame came whole and alone; None for all others."""
        message_id, command, size, flags, _error, offset, region, count = (
            frames.ACCESS_STRUCT.unpack_from(raw)
        )
        if (
            size != len(raw)
            or flags
            or self._phase is not Phase.READY
            or region >= len(self._sizes)
            or not 0 < count <= ACCESS_MAX_BYTES
            or offset + count > self._sizes[region]
        ):
            return None
        device = self._devices[region]
        if command == _READ and size == frames.ACCESS_BYTES:
            value = self._mmio.read(device, offset, count)
            self.follow_interrupt()
            reply_size = frames.ACCESS_BYTES + count
            return frames.ACCESS_STRUCT.pack(
                message_id, command, reply_size, frames.TYPE_REPLY, 0, offset, region, count
            ) + value.to_bytes(count, "little")
        if command == _WRITE and size == frames.ACCESS_BYTES + count:
            data = int.from_bytes(raw[frames.ACCESS_BYTES :], "little")
            self._mmio.write(device, offset, count, data)
            self.follow_interrupt()
            return frames.ACCESS_STRUCT.pack(
                message_id,
                command,
                frames.ACCESS_BYTES,
                frames.TYPE_REPLY,
                0,
                offset,
                region,
                count,
            )
        return None

    def _reply(self, message_id: int, command: int, body: bytes) -> bytes:
        try:
            if (self._phase is Phase.NEW) != (command == Command.VERSION):
                raise RequestError(errno.EINVAL)
            handler = _HANDLERS.get(command)
            if handler is None:
                raise RequestError(errno.EOPNOTSUPP)
            answer = handler(self, body)
        except RequestError as error:
            flags = frames.TYPE_REPLY | frames.ERROR
            return frames.message(message_id, command, flags=flags, error=error.number)
        return frames.message(message_id, command, answer, flags=frames.TYPE_REPLY)

    # Interrupts.

    def follow_interrupt(self) -> None:
        """Pass a change of the devices' line on; call it when an answer has come, too."""
        level = self._mmio.irq_level
        if level is not self._level:
            self._level = level
            self._config.show_interrupt(level)
        if level:
            self.intx.follow(self._config.interrupts_enabled)

    # Requests.

    def _version(self, body: bytes) -> bytes:
        # The client's capabilities limit descriptors and large transfers to it: there are none.
        if _parse(frames.VERSION, body).major != frames.VERSION_MAJOR:
            raise RequestError(errno.EPROTONOSUPPORT)
        self._phase = Phase.READY
        return frames.version_body(
            max_msg_fds=frames.FDS_MAX, max_data_xfer_size=frames.TRANSFER_MAX_BYTES
        )

    def _dma_map(self, body: bytes) -> bytes:
        _exactly(frames.DMA_MAP, body)
        self.unwanted_fds += self._fds
        self._fds.clear()
        return b""

    def _dma_unmap(self, body: bytes) -> bytes:
        return bytes(frames.DMA_UNMAP.build(_parse(frames.DMA_UNMAP, body)))

    def _device_info(self, body: bytes) -> bytes:
        _parse(frames.DEVICE_INFO, body)
        return bytes(
            frames.DEVICE_INFO.build(
                {
                    "argsz": frames.DEVICE_INFO.sizeof(),
                    "flags": frames.DEVICE_FLAGS_PCI | frames.DEVICE_FLAGS_RESET,
                    "regions": frames.REGION_COUNT,
                    "irqs": frames.IRQ_COUNT,
                }
            )
        )

    def _region_info(self, body: bytes) -> bytes:
        index = _parse(frames.REGION_INFO, body).index
        if index >= frames.REGION_COUNT:
            raise RequestError(errno.EINVAL)
        size = CONFIG_BYTES if index == frames.CONFIG_REGION else self._config.bar_size(index)
        return bytes(
            frames.REGION_INFO.build(
                {
                    "argsz": frames.REGION_INFO.sizeof(),
                    "flags": frames.REGION_FLAG_READ | frames.REGION_FLAG_WRITE if size else 0,
                    "index": index,
                    "capability_offset": 0,
                    "size": size,
                    "offset": 0,
                }
            )
        )

    def _region_io_fds(self, body: bytes) -> bytes:
        index = _parse(frames.REGION_IO_FDS, body).index
        if index >= frames.REGION_COUNT:
            raise RequestError(errno.EINVAL)
        size = frames.REGION_IO_FDS.sizeof()
        return bytes(
            frames.REGION_IO_FDS.build({"argsz": size, "flags": 0, "index": index, "count": 0})
        )

    def _irq_info(self, body: bytes) -> bytes:
        index = _parse(frames.IRQ_INFO, body).index
        if index >= frames.IRQ_COUNT:
            raise RequestError(errno.EINVAL)
        flags = frames.IRQ_INFO_EVENTFD | frames.IRQ_INFO_MASKABLE | frames.IRQ_INFO_AUTOMASKED
        return bytes(
            frames.IRQ_INFO.build(
                {
                    "argsz": frames.IRQ_INFO.sizeof(),
                    "flags": 0 if index else flags,
                    "index": index,
                    "count": 0 if index else 1,
                }
            )
        )

    def _set_irqs(self, body: bytes) -> bytes:
        asked = _parse(frames.IRQ_SET, body)
        kind, action = asked.flags & frames.IRQ_SET_DATA_KINDS, asked.flags & frames.IRQ_SET_ACTIONS
        limit = 0 if asked.index else 1
        if (
            asked.index >= frames.IRQ_COUNT
            or asked.flags & ~(frames.IRQ_SET_DATA_KINDS | frames.IRQ_SET_ACTIONS)
            or asked.start + asked.count > limit
        ):
            raise RequestError(errno.EINVAL)
        fact = _IRQ_ACTIONS.get((kind, action))
        if fact is None:
            raise RequestError(errno.EOPNOTSUPP)
        if kind == frames.IRQ_SET_DATA_BOOL and len(asked.data) != asked.count:
            raise RequestError(errno.EINVAL)
        if asked.index or (kind == frames.IRQ_SET_DATA_BOOL and asked.data != b"\1"):
            return b""
        fact(self, asked.count)
        return b""

    def _mask(self, count: int) -> None:
        if count:
            self.intx.take(IntxInput.MASK)

    def _unmask(self, count: int) -> None:
        if count:
            self.intx.take(IntxInput.UNMASK)

    def _trigger(self, count: int) -> None:
        """Signal once, as a test of the eventfd; with a count of 0, use none any more."""
        if not count:
            self._disarm()
        elif self.intx.state is not IntxState.UNARMED:
            self.intx.signals += 1

    def _arm(self, count: int) -> None:
        if not count or not self._fds:
            self._disarm()
            return
        self._disarm()
        self.intx.eventfd = self._fds.pop(0)
        self.intx.take(IntxInput.ARM)

    def _disarm(self) -> None:
        self.intx.take(IntxInput.DISARM)
        self.intx.signals = 0
        if self.intx.eventfd is not None:
            self.unwanted_fds.append(self.intx.eventfd)
            self.intx.eventfd = None

    def _read(self, body: bytes) -> bytes:
        asked = self._checked_access(body)
        if asked.data:
            raise RequestError(errno.EINVAL)
        if asked.region == frames.CONFIG_REGION:
            data = self._config.read(asked.offset, asked.count)
        else:
            value = self._mmio.read(self._devices[asked.region], asked.offset, asked.count)
            data = value.to_bytes(asked.count, "little")
        return bytes(frames.REGION_ACCESS.build({**asked, "data": data}))

    def _write(self, body: bytes) -> bytes:
        asked = self._checked_access(body)
        if len(asked.data) != asked.count:
            raise RequestError(errno.EINVAL)
        if asked.region == frames.CONFIG_REGION:
            self._config.write(asked.offset, asked.data)
        else:
            value = int.from_bytes(asked.data, "little")
            self._mmio.write(self._devices[asked.region], asked.offset, asked.count, value)
        return bytes(frames.REGION_ACCESS.build({**asked, "data": b""}))

    def _checked_access(self, body: bytes) -> Any:
        asked = _parse(frames.REGION_ACCESS, body)
        if asked.region == frames.CONFIG_REGION:
            size, most = CONFIG_BYTES, CONFIG_BYTES
        elif asked.region < len(self._sizes):
            size, most = self._sizes[asked.region], ACCESS_MAX_BYTES
        else:
            raise RequestError(errno.EINVAL)
        if not 0 < asked.count <= most or asked.offset + asked.count > size:
            raise RequestError(errno.EINVAL)
        return asked

    def _reset(self, body: bytes) -> bytes:
        if body:
            raise RequestError(errno.EINVAL)
        self._on_reset()
        self._config.reset()
        self._level = False
        return b""

    def close(self) -> list[int]:
        """Return all descriptors that the session still holds; it must not be used any more."""
        held = [*self._fds, *self.unwanted_fds]
        if self.intx.eventfd is not None:
            held.append(self.intx.eventfd)
        self._fds, self.unwanted_fds, self.intx.eventfd = [], [], None
        return held


def _parse(form: Any, body: bytes) -> Any:
    try:
        return form.parse(body)
    except ConstructError:
        raise RequestError(errno.EINVAL) from None


def _exactly(form: Any, body: bytes) -> None:
    if len(body) != form.sizeof():
        raise RequestError(errno.EINVAL)


_HANDLERS: Final[dict[int, Callable[[Session, bytes], bytes]]] = {
    Command.VERSION: Session._version,
    Command.DMA_MAP: Session._dma_map,
    Command.DMA_UNMAP: Session._dma_unmap,
    Command.DEVICE_GET_INFO: Session._device_info,
    Command.DEVICE_GET_REGION_INFO: Session._region_info,
    Command.DEVICE_GET_REGION_IO_FDS: Session._region_io_fds,
    Command.DEVICE_GET_IRQ_INFO: Session._irq_info,
    Command.DEVICE_SET_IRQS: Session._set_irqs,
    Command.REGION_READ: Session._read,
    Command.REGION_WRITE: Session._write,
    Command.DEVICE_RESET: Session._reset,
}
"""What is not here, REGION_WRITE_MULTI and DMA by the client among it, is EOPNOTSUPP."""

_IRQ_ACTIONS: Final[dict[tuple[int, int], Callable[[Session, int], None]]] = {
    (frames.IRQ_SET_DATA_NONE, frames.IRQ_SET_ACTION_MASK): Session._mask,
    (frames.IRQ_SET_DATA_BOOL, frames.IRQ_SET_ACTION_MASK): Session._mask,
    (frames.IRQ_SET_DATA_NONE, frames.IRQ_SET_ACTION_UNMASK): Session._unmask,
    (frames.IRQ_SET_DATA_BOOL, frames.IRQ_SET_ACTION_UNMASK): Session._unmask,
    (frames.IRQ_SET_DATA_NONE, frames.IRQ_SET_ACTION_TRIGGER): Session._trigger,
    (frames.IRQ_SET_DATA_BOOL, frames.IRQ_SET_ACTION_TRIGGER): Session._trigger,
    (frames.IRQ_SET_DATA_EVENTFD, frames.IRQ_SET_ACTION_TRIGGER): Session._arm,
}
