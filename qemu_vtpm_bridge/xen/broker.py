"""A small process that keeps the privileges which a confined bridge needs again later.

Purpose: a bridge in domain 0 that gave its privileges up still needs XenStore, where domain 0
may write everything, and as a guest's device another handle of Xen's for each boot of the
guest.  So it asks a process that stays root, reads nothing of a guest's, QEMU's or a vTPM
domain's, and gives what `StorePolicy` permits.

Theory of operation.  `start` forks the broker while there is one thread and before anything
hostile was read.  The bridge keeps one end of a socket pair (SOCK_SEQPACKET), and sends a
word and a socket on it: `store` has the socket relayed to a new connection to xenstored,
`devices DOMID` has Xen's devices sent back on it, restricted to that one domain for good.
Once it serves, the broker never answers on the common socket, so that nobody waits for a late
answer to another question.  It ends when the bridge does, however that ends, since its end of
the pair is then closed.  It is confined as well: no files but Xen's devices, no programs, no
threads.

Where the broker dies the bridge serves on with the page that it has; `StoreGone` says what
to do.  Keeps P9.  Who may lie: to the broker, the bridge, which may have been taken over.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fcntl import ioctl
from typing import Final, NoReturn

import pyxs
from pyxs.connection import PacketConnection

from ..errors import XenError
from ..process_name import take_name
from .relay import Relay, RelayBroken
from .router import (
    BrokeredConnection,
    EarlyConnection,
    StoreGone,
    cannot_be_reached,
    connection_to,
)
from .store_policy import StorePolicy

log = logging.getLogger(__name__)

RELAYS_MAX: Final = 16
"""More than a bridge has reason to use at a time."""

UNFETCHED_MAX: Final = 2
"""Answers with devices that the bridge has not taken out of their sockets.  Descriptors there count
for all processes of root's that have no privileges together, and so for other guests' brokers."""

ANSWER_TIMEOUT_S: Final = 10.0
START_TIMEOUT_S: Final = 60.0
"""For the broker to confine itself, on a machine that is very busy."""

PRIVCMD: Final = "/dev/xen/privcmd"
EVTCHN: Final = "/dev/xen/evtchn"
_IOCTL_PRIVCMD_RESTRICT: Final = 0x00025006
_IOCTL_EVTCHN_RESTRICT_DOMID: Final = 0x00024506
"""Source: Linux' include/uapi/xen/privcmd.h and evtchn.h; both take a domid_t."""
_SIOCOUTQ: Final = 0x5411
"""Source: unix(7), include/uapi/asm-generic/sockios.h."""

_READY: Final = b"ready"
_STORE: Final = b"store"
_DEVICES: Final = b"devices "
_WORD_MAX_BYTES: Final = 64
_READ_BYTES: Final = 16384


class Broker:
    """The bridge's side.  Any thread may ask."""

    def __init__(self, control: socket.socket, store_path: str) -> None:
        """`store_path` is where XenStore is, for error messages."""
        self._control = control
        self._store_path = store_path
        self._lock = threading.Lock()

    def connection(self) -> PacketConnection:
        """Return a connection to XenStore that can be connected; doing so raises StoreGone."""
        return BrokeredConnection(self._store_path, self._store)

    def devices(self, domid: int) -> tuple[int, int]:
        """Return descriptors of privcmd and evtchn that are of use for one domain only.

        The caller closes them.  Raises XenError where they cannot be had.  Blocks, for some
        seconds at most.
        """
        with self._ask(_DEVICES + b"%d" % domid) as near:
            near.settimeout(ANSWER_TIMEOUT_S)
            try:
                raw, fds, _, _ = socket.recv_fds(near, 256, 2)
            except OSError as error:
                raise XenError(f"the broker did not give Xen's devices: {error}") from error
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            cause = raw.decode(errors="replace") or "it ended"
            raise XenError(
                f"Xen's devices cannot be had for domain {domid}: {cause}",
                next_step="check that the guest still is there, and xen-privcmd loaded",
            )
        return fds[0], fds[1]

    def _store(self) -> socket.socket:
        return self._ask(_STORE)

    def _ask(self, word: bytes) -> socket.socket:
        near, far = socket.socketpair()
        with far:
            try:
                with self._lock:
                    socket.send_fds(self._control, [word], [far.fileno()])
            except OSError as error:
                near.close()
                raise StoreGone(
                    f"the process that carries XenStore's requests has ended: {error.strerror}",
                    next_step="restart the bridge while its guest is down",
                ) from error
        return near

    def close(self) -> None:
        """Let the broker end.  Safe to call twice."""
        self._control.close()


def start(
    policy_with: Callable[[Names], StorePolicy],
    store_path: str,
    confine_self: Callable[[], object],
) -> Broker:
    """Start the broker and return the way to it.

    `policy_with` makes the policy from what tells domains' names.  `confine_self` is called
    in the broker, before its first request.  Must be called while this process has one thread.
    Returns when the broker is confined; raises XenError where it cannot be.
    """
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for it
    gc.freeze()  # collecting in one process would have the kernel copy pages for both
    if os.fork() == 0:
        _be_broker(far, policy_with, store_path, confine_self)
    far.close()
    near.settimeout(START_TIMEOUT_S)
    with suppress(OSError):
        if near.recv(_WORD_MAX_BYTES) == _READY:
            near.settimeout(None)
            return Broker(near, store_path)
    near.close()
    raise XenError(
        "the process that keeps this one's privileges did not start",
        state="it says above why not",
        next_step="mend that, or start the bridge without --run-as, see docs/security.md",
    )


def _be_broker(
    control: socket.socket,
    policy_with: Callable[[Names], StorePolicy],
    store_path: str,
    confine_self: Callable[[], object],
) -> NoReturn:
    status = 1
    try:
        gc.disable()
        # The bridge's end decides; what is sent to a terminal or a service's processes is not
        # for this one.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        with suppress(OSError):
            take_name(f"qemu-vtpm-bridge: broker of {os.getppid()}")
        # A listening socket that stays open here would have QEMU wait for nobody.
        _close_others(control.fileno())
        names = Names(store_path)
        confine_self()
        loop = BrokerLoop(control, policy_with(names), store_path)
        control.send(_READY)
        loop.run()
        status = 0
    except BaseException:
        log.exception("the process that carries XenStore's requests ends")
    finally:
        os._exit(status)


def _close_others(kept: int) -> None:
    os.closerange(3, kept)
    os.closerange(kept + 1, 1 << 16)


class Names:
    """The names of domains, over a connection that only asks for them."""

    def __init__(self, store_path: str) -> None:
        self._path = store_path
        self._connection: EarlyConnection | None = None

    def of(self, domid: int) -> bytes | None:
        """Return a domain's name, None where there is none; raises StoreGone.  Blocks."""
        return self._read(f"/local/domain/{domid}/name")

    def vm(self, domid: int) -> bytes | None:
        """Return which machine a domain is, whatever its name; else as `of`."""
        return self._read(f"/local/domain/{domid}/vm")

    def close(self) -> None:
        """Close the connection.  Safe to call twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _read(self, path: str) -> bytes | None:
        with suppress(StoreGone):
            return self._ask(path)
        # The connection of before is dead; a new one tells whether xenstored is.
        return self._ask(path)

    def _ask(self, path: str) -> bytes | None:
        if self._connection is None:
            self._connection = EarlyConnection(self._path)
        try:
            return self._connection.read(path)
        except StoreGone:
            self.close()
            raise


@dataclass
class _Pair:
    """A bridge's socket, and the connection that it is relayed to."""

    relay: Relay
    near: socket.socket
    far: PacketConnection

    def close(self) -> None:
        self.near.close()
        with suppress(OSError, pyxs.PyXSError):
            self.far.close()


class BrokerLoop:
    """Serves one bridge; a single thread that waits for all of its sockets."""

    def __init__(self, control: socket.socket, policy: StorePolicy, store_path: str) -> None:
        self._control = control
        self._policy = policy
        self._store_path = store_path
        self._pairs: dict[int, _Pair] = {}
        """By both descriptors."""
        self._given: list[socket.socket] = []
        """Where devices were sent and may lie unread."""

    def run(self) -> None:
        """Serve until the bridge's end of the control socket is closed."""
        try:
            self._run()
        finally:
            for pair in self._pairs.values():
                pair.close()
            for given in self._given:
                given.close()

    def _run(self) -> None:
        while True:
            poll = select.poll()
            poll.register(self._control, select.POLLIN)
            for fd, pair in self._pairs.items():
                events = self._events(fd, pair)
                if events:
                    poll.register(fd, events)
            for fd, _ in poll.poll():
                if fd == self._control.fileno():
                    if not self._take_word():
                        return
                elif fd in self._pairs:
                    self._serve(fd, self._pairs[fd])

    def _events(self, fd: int, pair: _Pair) -> int:
        if fd != pair.near.fileno():
            return select.POLLIN
        wanted = select.POLLOUT if pair.relay.to_bridge else 0
        return wanted | (select.POLLIN if pair.relay.wants_requests else 0)

    def _serve(self, fd: int, pair: _Pair) -> None:
        try:
            if fd == pair.near.fileno():
                self._serve_bridge(pair)
            else:
                raw = os.read(fd, _READ_BYTES)
                if not raw:
                    raise RelayBroken("xenstored closed the connection")
                self._pass_on(pair, pair.relay.from_xenstored(raw))
        except (OSError, XenError) as error:
            log.debug("XenStore, relayed: %s", error)
            self._end(pair)

    def _serve_bridge(self, pair: _Pair) -> None:
        # The bridge, which may hold this end too, decides whether the socket blocks.
        with suppress(BlockingIOError):
            if pair.relay.to_bridge:
                sent = pair.near.send(pair.relay.to_bridge, socket.MSG_DONTWAIT)
                del pair.relay.to_bridge[:sent]
        if not pair.relay.wants_requests:
            return
        try:
            raw = pair.near.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not raw:
            raise RelayBroken("the bridge closed the connection")
        self._pass_on(pair, pair.relay.from_bridge(raw))

    @staticmethod
    def _pass_on(pair: _Pair, request: bytes) -> None:
        # A message is small beside a socket's buffer, and there is one at a time: where this
        # blocks, xenstored does not read, and the time that a send may take ends it.
        while request:
            request = request[os.write(pair.far.fileno(), request) :]

    def _end(self, pair: _Pair) -> None:
        self._pairs = {fd: other for fd, other in self._pairs.items() if other is not pair}
        pair.close()

    # What the bridge asks for.

    def _take_word(self) -> bool:
        """Take one word from the control socket; return False at its end."""
        raw, fds, _, _ = socket.recv_fds(self._control, _WORD_MAX_BYTES, 1)
        if not fds:
            return bool(raw)
        near = self._socket_of_the_bridge(fds[0])
        if near is not None:
            with near:
                if raw == _STORE:
                    self._open_pair(near)
                elif raw.startswith(_DEVICES):
                    self._send_devices(near, raw.removeprefix(_DEVICES))
        return True

    def _socket_of_the_bridge(self, fd: int) -> socket.socket | None:
        """Return a socket whose other end the bridge made; close all else and return None.

        A service that the bridge is connected to would take for root's what is written here.
        """
        try:
            near = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            return None
        stream = (near.family, near.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        if stream and _peer(near) == _peer(self._control):
            return near
        near.close()
        return None

    def _open_pair(self, near: socket.socket) -> None:
        if len(self._pairs) >= 2 * RELAYS_MAX:
            log.warning("XenStore: the bridge has %d connections already", RELAYS_MAX)
            return
        far = connection_to(self._store_path)
        try:
            far.connect()
        except pyxs.PyXSError as error:
            log.warning("%s", cannot_be_reached(self._store_path, error).cause)
            return
        pair = _Pair(Relay(self._policy.permits), near.dup(), far)
        self._pairs |= {pair.near.fileno(): pair, far.fileno(): pair}

    def _send_devices(self, near: socket.socket, word: bytes) -> None:
        """Answer with two descriptors, or with the reason why not."""
        with suppress(OSError):
            try:
                domid = _domid(word)
                if not self._policy.is_guest(domid):
                    raise XenError("it is not the guest that this bridge serves")
                if self._unfetched() >= UNFETCHED_MAX:
                    raise XenError("those that were given before were not fetched")
                privcmd = _restricted(PRIVCMD, _IOCTL_PRIVCMD_RESTRICT, domid)
                try:
                    evtchn = _restricted(EVTCHN, _IOCTL_EVTCHN_RESTRICT_DOMID, domid)
                    try:
                        socket.send_fds(near, [b"ok"], [privcmd, evtchn], socket.MSG_DONTWAIT)
                        self._given.append(near.dup())
                    finally:
                        os.close(evtchn)
                finally:
                    os.close(privcmd)
            except (OSError, XenError) as error:
                near.send(str(error).encode()[:256], socket.MSG_DONTWAIT)

    def _unfetched(self) -> int:
        """Return in how many sockets devices lie unread."""
        for given in list(self._given):
            if not _unread_bytes(given):
                self._given.remove(given)
                given.close()
        return len(self._given)


def _peer(sock: socket.socket) -> int:
    """Return the process that made the other end of a socket."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[0])


def _unread_bytes(sock: socket.socket) -> int:
    """Return what the kernel holds of all that was sent; closing the other end frees it too."""
    return int(struct.unpack("i", ioctl(sock, _SIOCOUTQ, bytes(4)))[0])


def _domid(word: bytes) -> int:
    if not word.isdigit() or len(word) > 5:
        raise XenError("that is no domain's id")
    return int(word)


def _restricted(device: str, request: int, domid: int) -> int:
    """Open one of Xen's devices for one domain only, for good."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        ioctl(fd, request, struct.pack("=H", domid))
    except OSError:
        os.close(fd)
        raise
    return fd
