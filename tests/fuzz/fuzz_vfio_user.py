"""Coverage-guided fuzzing of vfio-user connections with atheris.

    python -m tests.fuzz.fuzz_vfio_user [libFuzzer options] [corpus directory]

The input is a client's life: its first byte chooses what is behind, then it is cut into
steps, each of which sends bytes, a whole frame of any command, descriptors, or lets the
TPM answer.  After each step the replies must be whole frames that answer, and at the
end every descriptor must be accounted for.
"""

from __future__ import annotations

import socket
import sys

import atheris

with atheris.instrument_imports(
    include=[
        f"qemu_vtpm_bridge.bridge.{name}"
        for name in ("vfio_user", "vfio_user_frames", "pci_config", "mmio", "tis", "crb", "device")
    ]
):
    from qemu_vtpm_bridge.bridge import vfio_user_frames as frames
    from qemu_vtpm_bridge.bridge.mmio import Mmio
    from qemu_vtpm_bridge.bridge.tpm import HEADER, Family
    from qemu_vtpm_bridge.bridge.vfio_user import Session
    from qemu_vtpm_bridge.device_service import Registers
    from qemu_vtpm_bridge.errors import QemuProtocolError
    from tests.support.player import Bytes

RESPONSE = HEADER.pack(0x8001, 14, 0) + b"abcd"
KINDS = tuple(Registers)
FAMILIES = tuple(Family)


class Untold:
    """What is beside commands."""

    flag = False

    def set_locality(self, locality: int) -> None:
        """Check it."""
        assert 0 <= locality <= 4

    def cancel(self) -> None:
        """Ignore it."""

    def established(self) -> bool:
        """Return the flag."""
        return self.flag

    def reset_established(self, locality: int) -> int:
        """Clear it; only locality 3 asks."""
        assert locality == 3
        self.flag = False
        return 0


class Client:
    """One connection, made of bytes."""

    def __init__(self, chosen: int) -> None:
        self.near, self.pump = socket.socketpair()
        self.pump.setblocking(False)
        kinds = KINDS[chosen % len(KINDS)].kinds
        family = FAMILIES[chosen // 4 % 2]
        devices = [kind(family=family, buffer_bytes=3968) for kind in kinds]
        self.mmio = Mmio(devices, Untold(), self.near)
        self.session = Session(self.mmio, self.mmio.reset)
        self.frames = 0
        self.given_fds: list[int] = []
        if chosen & 0x80:
            self.send(frames.message(0, frames.Command.VERSION, frames.version_body()), 0)

    def send(self, raw: bytes, fds: int) -> None:
        """Send bytes and so many descriptors; check the replies."""
        numbers = range(len(self.given_fds) + 100, len(self.given_fds) + 100 + fds)
        self.given_fds += numbers
        replies = self.session.feed(raw, tuple(numbers))
        while replies:
            header = frames.HEADER.parse(replies)
            assert header.flags & ~frames.ERROR == frames.TYPE_REPLY
            assert frames.HEADER_BYTES <= header.size <= len(replies)
            assert bool(header.error) == bool(header.flags & frames.ERROR)
            replies = replies[header.size :]
            self.frames += 1
        assert 0 <= self.session.intx.signals <= 1 + self.frames

    def answer(self) -> None:
        """Be the pump: answer a command, which is one, and as long as it says."""
        try:
            command = self.pump.recv(8192)
        except BlockingIOError:
            return
        assert HEADER.unpack_from(command)[1] == len(command)
        self.pump.send(RESPONSE)

    def close(self) -> None:
        """Account for the descriptors."""
        assert sorted(self.session.close()) == self.given_fds
        self.near.close()
        self.pump.close()


def target(data: bytes) -> int:
    """Play one input; return how many frames were answered."""
    source = Bytes(data)
    client = Client(source.number())
    try:
        while source:
            what = source.number()
            size = source.number()
            if what & 3 == 0:
                client.answer()
            elif what & 3 == 1:
                body = source.data[source.at : source.at + size]
                source.at += size
                client.send(body, what >> 6)
            elif what & 3 == 2:
                offset, count = source.number(2), 1 + source.below(8)
                body = frames.REGION_ACCESS.build(
                    {
                        "offset": offset,
                        "region": size % 3,
                        "count": count,
                        "data": source.number(count).to_bytes(count, "little") if what & 4 else b"",
                    }
                )
                command = frames.Command.REGION_WRITE if what & 4 else frames.Command.REGION_READ
                client.send(frames.message(1, command, body), 0)
            else:
                body = source.data[source.at : source.at + size]
                source.at += size
                client.send(frames.message(1, what >> 2 & 15, body), what >> 6)
    except QemuProtocolError:
        pass
    finally:
        client.close()
    return client.frames


class Counter:
    """Counts what a run did; libFuzzer ends a run with _exit, so that it is printed on the way."""

    def __init__(self) -> None:
        self.inputs, self.frames = 0, 0

    def __call__(self, data: bytes) -> None:
        """Play one input."""
        self.inputs += 1
        self.frames += target(data)
        if self.inputs % 1000 == 0:
            print(f"vfio-user: {self.inputs} inputs, {self.frames} frames", flush=True)


def main() -> None:
    """Run libFuzzer; it does not return."""
    atheris.Setup(sys.argv, Counter())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
