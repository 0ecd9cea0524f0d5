"""Running register devices: wires a bridge, a guest's TIS and CRB devices and a vfio-user socket.

Theory of operation.  `service.Bridge` is the TPM behind the devices, as it is behind QEMU's
door: what the door does for QEMU's CMD_STOP and CMD_INIT happens here when a client
connects (its machine was switched on) and when it sends DEVICE_RESET (its machine was
reset).  So the reset contract is the same one: without evidence of a power cycle the
commands are refused.

One client is served at a time, in a blocking thread of its own; others wait in the
backlog.  trio supervises: however the serving ends, the client's socket is shut down,
which ends the thread, and only then the connection to the pump is given up.  A client
that breaks the protocol is disconnected, and the next one is served.

Keeps P1, P7 and P10.  Who may lie: whoever may connect.
"""

from __future__ import annotations

import enum
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from .bridge import tpm
from .bridge.crb import CrbDevice
from .bridge.device import RegisterDevice
from .bridge.listen import Listener
from .bridge.mmio import Mmio
from .bridge.tis import TisDevice
from .bridge.vfio_user_driver import serve
from .errors import QemuProtocolError
from .ratelimit import RateLimit
from .service import Bridge

if TYPE_CHECKING:
    from .bridge.recorded import DeviceRecords

log = logging.getLogger(__name__)


class Registers(enum.Enum):
    """Which devices a guest has, in the order of their BARs."""

    TIS = "tis"
    CRB = "crb"
    BOTH = "both"

    @property
    def kinds(self) -> tuple[type[RegisterDevice], ...]:
        """The devices' classes."""
        return _KINDS[self]


_KINDS: Final[dict[Registers, tuple[type[RegisterDevice], ...]]] = {
    Registers.TIS: (TisDevice,),
    Registers.CRB: (CrbDevice,),
    Registers.BOTH: (TisDevice, CrbDevice),
}


async def devices_for(
    bridge: Bridge, kinds: Sequence[type[RegisterDevice]]
) -> list[RegisterDevice]:
    """Return devices of these kinds, with the largest buffer that they and the TPM have in common.

    The bridge answers no more than that from now on.
    """
    least = min(tpm.COMMAND_MAX_BYTES, *(kind.buffer_max_bytes for kind in kinds))
    in_use, _least, _most = await bridge.set_buffer_size(least)
    return [kind(family=bridge.config.family, buffer_bytes=in_use) for kind in kinds]


class RegisterService:
    """Serves register devices with the TPM of `bridge`, which runs elsewhere."""

    def __init__(
        self,
        bridge: Bridge,
        registers: Registers,
        *,
        terminate: bool = False,
        records: DeviceRecords | None = None,
    ) -> None:
        self._bridge = bridge
        self._records = records
        self._registers = registers
        self._terminate = terminate
        self._complaints = RateLimit(log)
        self._limiter = trio.CapacityLimiter(1)
        self._mmio: Mmio | None = None
        self.clients = 0
        """Connections so far."""
        self.resets = 0
        """Machines that were switched on or reset so far."""

    async def serve(self, listener: Listener) -> None:
        """Serve until cancelled or, where so asked, until the first client has left.

        Cancelling disconnects the client and returns when its thread has ended.
        """
        listener.control.setblocking(False)
        source = trio.socket.from_stdlib_socket(listener.control)
        while True:
            if listener.connected:
                client = listener.control.dup()
            else:
                accepted, _ = await source.accept()
                with accepted:
                    client = socket.socket(fileno=socket.dup(accepted.fileno()))
            self.clients += 1
            with client:
                client.setblocking(True)
                await self._serve_client(client)
            if listener.connected or self._terminate:
                return

    async def _serve_client(self, client: socket.socket) -> None:
        near, far = socket.socketpair()
        with near:
            try:
                await self._bridge.attach_data(far)
                mmio = await self._devices(near)
                await self._switch_on()
                mmio.reset()
                self._mmio = mmio
                await self._in_thread(client, mmio)
            finally:
                self._mmio = None
                with trio.CancelScope(shield=True):
                    # What the guest left running is answered within this step's patience.
                    await self._bridge.stop()
                    await self._bridge.detach_data()

    async def _devices(self, near: socket.socket) -> Mmio:
        devices = await devices_for(self._bridge, self._registers.kinds)
        if self._records is not None:
            (device,) = devices
            devices = [cast(RegisterDevice, self._records.wrap(device))]
        return Mmio(devices, self._bridge, near)

    async def _switch_on(self) -> None:
        """Do what QEMU's CMD_STOP and CMD_INIT do; returns within a second or so."""
        self.resets += 1
        await self._bridge.stop()
        await self._bridge.init(resume=False)

    async def _in_thread(self, client: socket.socket, mmio: Mmio) -> None:
        def on_reset() -> None:
            trio.from_thread.run(self._switch_on)
            mmio.reset()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_shut_down_at_the_end, client)
            try:
                await trio.to_thread.run_sync(serve, client, mmio, on_reset, limiter=self._limiter)
            except QemuProtocolError as error:
                self._complaints.warning("%s: disconnected", error)
            finally:
                nursery.cancel_scope.cancel()

    def status(self) -> dict[str, Any]:
        """Return the part of the status document that is about the devices."""
        mmio = self._mmio
        return {
            "registers": self._registers.value,
            "clients": self.clients,
            "connected": mmio is not None,
            "resets": self.resets,
            "commands": mmio.commands if mmio else 0,
        }


async def _shut_down_at_the_end(client: socket.socket) -> None:
    """Wake the thread that serves this client when it is to end."""
    try:
        await trio.sleep_forever()
    finally:
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
