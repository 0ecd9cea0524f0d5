"""The devices against the installed QEMU's, with accesses that no run has seen before (P11).

Each run draws a seed, prints it, and plays the same accesses on a device of ours that
shows all of QEMU's quirks and on QEMU's own, step by step.  A difference names the seed:

    DIFFERENTIAL_SEED=... python -m pytest tests/devices/test_differential.py

plays it again.  DIFFERENTIAL_SEQUENCES sets how many sequences there are of each device.
"""

from __future__ import annotations

import abc
import os
import random
import secrets
import shutil
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from qemu_vtpm_bridge.bridge.tpm import HEADER
from tests.golden import factory
from tests.support.qtest import QEMU, QemuDevice
from tests.support.trace import Step, play

pytestmark = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")

ACCESSES = 160
SEQUENCES = int(os.environ.get("DIFFERENTIAL_SEQUENCES", "80"))

ACCESS, INT_ENABLE, INT_STATUS, STS, FIFO, XFIFO = 0x00, 0x08, 0x10, 0x18, 0x24, 0x80
LOC_CTRL, CTRL_REQ, CTRL_CANCEL, CTRL_START, BUFFER = 0x08, 0x40, 0x48, 0x4C, 0x80


class Pair:
    """Our device and QEMU's; every step goes to both."""

    def __init__(self, header: dict[str, Any], qemu: QemuDevice) -> None:
        self.ours, self.qemu = factory.make(header), qemu
        self.accesses = 0
        self.history: deque[Step] = deque(maxlen=30)

    @property
    def busy(self) -> bool:
        return self.ours.device.busy

    def do(self, step: Step) -> Step:
        """Do a step on both and compare all that came of it."""
        self.accesses += 1
        want = play(self.qemu, step)
        got = play(self.ours, step)
        for event in got.get("ev", ()):
            # QEMU waits for an answer to a command of no bytes, and sends nothing.
            if event[0] == "submit" and event[2]:
                locality, command = self.qemu.tpm.command()
                want.setdefault("ev", []).append(["submit", locality, command.hex()])
            elif event[0] == "submit":
                want.setdefault("ev", []).append(event)
        history = "\n".join(map(str, self.history))
        assert sorted(got.pop("ev", [])) == sorted(want.pop("ev", [])), history + f"\n{step}"
        assert got == want, f"{history}\nQEMU {want}\nours {got}"
        assert not self.qemu.tpm.unexpected_command(), f"{history}\n{step} started a command"
        self.history.append(got)
        return got

    def read(self, offset: int, size: int) -> int:
        return int(self.do({"op": "r", "o": offset, "s": size})["v"])

    def write(self, offset: int, size: int, value: int) -> None:
        self.do({"op": "w", "o": offset, "s": size, "v": value & (1 << 8 * size) - 1})

    def end(self, response: bytes) -> None:
        self.do({"op": "done", "rsp": response.hex()})

    def reset(self) -> None:
        self.do({"op": "reset"})


class Guest(abc.ABC):
    """What a guest of any manners may do, drawn from a generator of random numbers."""

    weights: ClassVar[dict[str, int]]

    def __init__(self, pair: Pair, header: dict[str, Any], rng: random.Random) -> None:
        self.pair, self.header, self.rng = pair, header, rng
        self.room = min(header["buf"], 4096 if header["dev"] == "tis" else 0xF80)

    def run(self) -> None:
        actions: list[Callable[[], None]] = [getattr(self, name) for name in self.weights]
        while self.pair.accesses < ACCESSES:
            self.rng.choices(actions, list(self.weights.values()))[0]()
        self.end()
        self.survey()

    def command(self) -> bytes:
        """A command; one in four says another size than it has."""
        rng = self.rng
        body = rng.randbytes(rng.choice((0, 0, 1, 2, 3, 12, 30)))
        size = 10 + len(body)
        if rng.random() < 0.25:
            wrong = (0, 5, 6, 9, size - 1, size + 1, size + 4, self.room + 1, 0x1000A, 0xFFFFFFFF)
            size = rng.choice(wrong)
        tag = rng.choice((0x8001, 0x8002, 0x00C1, rng.getrandbits(16)))
        ordinal = rng.choice((0x53, 0x53, 0x144, 0x17A, rng.getrandbits(32)))
        return HEADER.pack(tag, size, ordinal) + body

    def end(self) -> None:
        """The TPM answers, if it was asked."""
        if not self.pair.busy:
            return
        rng = self.rng
        size = min(self.room, rng.choice((10, 10, 11, 13, 24, 60, 255, 256, 257, self.room)))
        tag = 0x8001 if self.header["tpm"] == 2 else 0x00C4
        head = HEADER.pack(tag, size, rng.choice((0, 0, 0, 0x101, 0x922)))
        self.pair.end(head + rng.randbytes(size - 10))

    def reset(self) -> None:
        """A reset while a command runs makes QEMU wait, so that it is ended before."""
        self.end()
        self.pair.reset()

    def odd_read(self) -> None:
        size = self.rng.randint(1, 8)
        self.pair.read(self._odd_offset(size), size)

    def odd_write(self) -> None:
        size = self.rng.randint(1, 8)
        value = self.rng.choice((0, 1, 2, (1 << 64) - 1, self.rng.getrandbits(64)))
        self.pair.write(self._odd_offset(size), size, value)

    def _odd_offset(self, size: int) -> int:
        return min(
            self.rng.choice((self.rng.randrange(0xC4), self.rng.randrange(0x5000))), 0x5000 - size
        )

    @abc.abstractmethod
    def survey(self) -> None:
        """Read all that can be read without changing it."""


class TisGuest(Guest):
    weights: ClassVar[dict[str, int]] = {
        "own": 6,
        "status": 8,
        "send": 5,
        "go": 6,
        "fetch": 6,
        "end": 6,
        "look": 8,
        "interrupts": 4,
        "odd_read": 2,
        "odd_write": 2,
        "survey": 1,
        "reset": 1,
    }

    def locality(self) -> int:
        return self.rng.choices(range(5), (8, 3, 3, 3, 1))[0]

    def owner(self) -> int:
        """The locality that is active, mostly."""
        device = self.pair.ours.device
        active = [n for n in range(5) if device.read(n << 12 | ACCESS, 1) & 0x20]
        return active[0] if active and self.rng.random() < 0.9 else self.locality()

    def own(self) -> None:
        value = self.rng.choice((0x02, 0x02, 0x02, 0x08, 0x10, 0x20, self.rng.getrandbits(8)))
        self.pair.write(self.locality() << 12 | ACCESS, self.rng.choice((1, 1, 4)), value)
        self.pair.read(self.locality() << 12 | ACCESS, 1)

    def status(self) -> None:
        value = self.rng.choice(
            (0x40, 0x40, 0x40, 0x20, 0x02, 0x60, 1 << 24, 1 << 25, self.rng.getrandbits(32))
        )
        self.pair.write(self.owner() << 12 | STS, 4 if value > 0xFF else 1, value)

    def send(self) -> None:
        page, command = self.owner() << 12, self.command()
        self.pair.write(page | STS, 1, 0x40)
        if self.rng.random() < 0.15:
            command = command[: self.rng.randrange(len(command))]
        at = 0
        while at < len(command):
            size = self.rng.choice((1, 2, 4, 4))
            register = self.rng.choice((FIFO, FIFO, XFIFO + 4 * self.rng.randrange(16)))
            chunk = command[at : at + size]
            self.pair.write(page | register, size, int.from_bytes(chunk, "little"))
            at += size
        self.pair.read(page | STS, self.rng.choice((1, 4)))
        if self.rng.random() < 0.7:
            self.pair.write(page | STS, 1, 0x20)

    def go(self) -> None:
        self.pair.write(self.owner() << 12 | STS, 1, 0x20)

    def fetch(self) -> None:
        page = self.owner() << 12
        for _ in range(self.rng.randrange(1, 12)):
            size = self.rng.choice((1, 2, 4))
            self.pair.read(page | self.rng.choice((FIFO, XFIFO)), size)
        self.pair.read(page | STS, self.rng.choice((1, 2, 4)))

    def look(self) -> None:
        register = self.rng.choice((ACCESS, STS, STS, INT_ENABLE, INT_STATUS, 0x14, 0x30, 0xF00))
        size = self.rng.choice((1, 2, 4))
        lane = self.rng.randrange(0, 4, size)
        self.pair.read(self.locality() << 12 | register | lane, size)

    def interrupts(self) -> None:
        page = self.owner() << 12
        if self.rng.random() < 0.6:
            value = self.rng.choice(
                (0x80000087, 0x80000087, 0x80000081, 0x87, self.rng.getrandbits(32))
            )
            self.pair.write(page | INT_ENABLE, 4, value)
        else:
            pending = self.pair.read(page | INT_STATUS, 4)
            self.pair.write(page | INT_STATUS, 4, self.rng.choice((pending, 0xFF, 1, 4)))

    def survey(self) -> None:
        for page in range(0, 0x5000, 0x1000):
            for register in (ACCESS, INT_ENABLE, INT_STATUS, STS, 0x30):
                self.pair.read(page | register, 4)


class CrbGuest(Guest):
    weights: ClassVar[dict[str, int]] = {
        "control": 8,
        "send": 6,
        "fetch": 5,
        "end": 6,
        "look": 8,
        "odd_read": 3,
        "odd_write": 3,
        "survey": 1,
        "reset": 1,
    }

    def control(self) -> None:
        at = self.rng.choice((LOC_CTRL, LOC_CTRL, CTRL_REQ, CTRL_CANCEL, CTRL_START))
        value = self.rng.choice((1, 1, 1, 2, 2, 0, 3, 4, 8, 0x101, self.rng.getrandbits(32)))
        self.pair.write(at, self.rng.choice((1, 4, 4, 8)), value)

    def send(self) -> None:
        command = self.command()
        for at in range(0, len(command), 4):
            chunk = command[at : at + 4]
            self.pair.write(BUFFER + at, 4, int.from_bytes(chunk, "little"))
        self.pair.write(LOC_CTRL, 4, 1)
        self.pair.write(CTRL_START, 4, 1)

    def fetch(self) -> None:
        at = BUFFER
        for _ in range(self.rng.randrange(1, 12)):
            size = self.rng.choice((1, 2, 4, 8))
            self.pair.read(at, size)
            at += size

    def look(self) -> None:
        self.pair.read(self.rng.randrange(0, BUFFER, 4), 4)

    def survey(self) -> None:
        for at in range(0, BUFFER + 16, 8):
            self.pair.read(at, 8)


def seeds() -> list[str]:
    given = os.environ.get("DIFFERENTIAL_SEED")
    return [given] if given else [secrets.token_hex(4)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "guest"), [("tis", TisGuest), ("crb", CrbGuest)])
def test_P11_qemu_does_the_same(
    kind: str, guest: type[Guest], capsys: pytest.CaptureFixture[str]
) -> None:
    [seed] = seeds()
    with capsys.disabled():
        print(f"\n{kind}: {SEQUENCES} sequences with DIFFERENTIAL_SEED={seed}")
    steps = 0
    for number in range(SEQUENCES):
        rng = random.Random(f"{seed}/{kind}/{number}")
        header = {
            "dev": kind,
            "tpm": rng.choice((2, 2, 1)) if kind == "tis" else 2,
            "buf": rng.choice((128, 160, 255, 256, 257, 1024, 4096)),
            "est": rng.randrange(2),
        }
        with QemuDevice(header) as qemu:
            pair = Pair(header, qemu)
            try:
                guest(pair, header, rng).run()
            except AssertionError as error:
                pytest.fail(f"DIFFERENTIAL_SEED={seed}, sequence {number}, {header}: {error}")
            steps += pair.accesses
    with capsys.disabled():
        print(f"{kind}: {steps} steps without a difference")
