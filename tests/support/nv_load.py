"""What a TPM keeps, as its user knows it: a load to cut the power under, and a check after.

No input or output, and nothing but the standard library: the same file drives a TPM on the
embedded Xen and one in a domain of a real Xen.

Each step changes one thing.  Until it is answered, both its old and its new value may be
what a power cut leaves; once it is answered, only the new one.  `Shelf.check` takes what the
TPM says it has and raises where it is anything else.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ST_NO_SESSIONS, ST_SESSIONS = 0x8001, 0x8002
OWNER = 0x40000001
CC_EVICT_CONTROL, CC_NV_UNDEFINE, CC_NV_DEFINE, CC_CREATE_PRIMARY = 0x120, 0x122, 0x12A, 0x131
CC_NV_INCREMENT, CC_NV_WRITE, CC_NV_READ, CC_NV_READ_PUBLIC = 0x134, 0x137, 0x14E, 0x169
CC_READ_PUBLIC, CC_GET_TEST_RESULT, CC_STARTUP = 0x173, 0x17C, 0x144
RC_HANDLE_1 = 0x18B
"""There is nothing with this handle (TPM_RC_HANDLE, first handle)."""

DATA, COUNTER, EXTRA = 0x01500000, 0x01500001, (0x01500002, 0x01500003)
DATA_BYTES = 512
"""More than a disk's sector, so that a torn write would show."""
PERSISTENT = 0x81000100
TRANSIENT = 0x80000000
STARTUP = struct.pack(">HIIH", ST_NO_SESSIONS, 12, CC_STARTUP, 0)
GET_TEST_RESULT = struct.pack(">HII", ST_NO_SESSIONS, 10, CC_GET_TEST_RESULT)

_ATTRIBUTES = 1 << 2 | 1 << 18 | 1 << 25  # AUTHWRITE, AUTHREAD, NO_DA
_COUNTER_TYPE = 1 << 4
_NO_PASSWORD = struct.pack(">IHBH", 0x40000009, 0, 0, 0)

Value = int | bool


def _plain(code: int, body: bytes) -> bytes:
    return struct.pack(">HII", ST_NO_SESSIONS, 10 + len(body), code) + body


def _authorised(code: int, handles: tuple[int, ...], parameters: bytes) -> bytes:
    body = b"".join(handle.to_bytes(4, "big") for handle in handles)
    body += struct.pack(">I", len(_NO_PASSWORD)) + _NO_PASSWORD + parameters
    return struct.pack(">HII", ST_SESSIONS, 10 + len(body), code) + body


def _sized(raw: bytes) -> bytes:
    return len(raw).to_bytes(2, "big") + raw


def define(index: int, size_bytes: int, more_attributes: int = 0) -> bytes:
    attributes = _ATTRIBUTES | more_attributes
    public = struct.pack(">IHIHH", index, 0x000B, attributes, 0, size_bytes)
    return _authorised(CC_NV_DEFINE, (OWNER,), _sized(b"") + _sized(public))


def write(serial: int) -> bytes:
    data = serial.to_bytes(4, "big") * (DATA_BYTES // 4)
    return _authorised(CC_NV_WRITE, (DATA, DATA), _sized(data) + b"\0\0")


def read(index: int, size_bytes: int) -> bytes:
    return _authorised(CC_NV_READ, (index, index), struct.pack(">HH", size_bytes, 0))


def evict_control(handle: int) -> bytes:
    return _authorised(CC_EVICT_CONTROL, (OWNER, handle), PERSISTENT.to_bytes(4, "big"))


def create_primary() -> bytes:
    """A storage key on P-256, the same each time."""
    public = struct.pack(">HHIH", 0x0023, 0x000B, 0x00030472, 0)
    public += struct.pack(">HHHHHHHH", 0x0006, 128, 0x0043, 0x0010, 0x0003, 0x0010, 0, 0)
    sensitive = _sized(_sized(b"") + _sized(b""))
    parameters = sensitive + _sized(public) + _sized(b"") + bytes(4)
    return _authorised(CC_CREATE_PRIMARY, (OWNER,), parameters)


def response_code(response: bytes) -> int:
    return int.from_bytes(response[6:10], "big")


@dataclass
class Step:
    """One command, and the value that it gives to one thing."""

    command: bytes
    name: str
    value: Value


@dataclass
class Shelf:
    """What the TPM was told to keep."""

    acknowledged: dict[str, Value] = field(default_factory=dict)
    pending: Step | None = None
    answered: int = 0

    # What to send.

    def set_up(self) -> list[bytes]:
        """Return the commands that fill an empty TPM; all must succeed."""
        self.acknowledged = {"data": 0, "counter": 0, "key": False} | dict.fromkeys(
            [f"index {index:#x}" for index in EXTRA], False
        )
        return [
            define(DATA, DATA_BYTES),
            write(0),
            define(COUNTER, 8, _COUNTER_TYPE),
            _authorised(CC_NV_INCREMENT, (COUNTER, COUNTER), b""),
        ]

    def counter_is(self, value: int) -> None:
        """Take the counter's first value: a TPM chooses it."""
        self.acknowledged["counter"] = value

    def steps(self, rng: random.Random) -> Iterator[Step]:
        """Yield steps without end; each must be `sent` and `done` before the next."""
        while True:
            kind = rng.choice(["data", "data", "counter", "counter", "key", "index"])
            if kind == "data":
                serial = int(self.acknowledged["data"]) + 1
                yield Step(write(serial), "data", serial)
            elif kind == "counter":
                command = _authorised(CC_NV_INCREMENT, (COUNTER, COUNTER), b"")
                yield Step(command, "counter", int(self.acknowledged["counter"]) + 1)
            elif kind == "key":
                there = bool(self.acknowledged["key"])
                command = evict_control(PERSISTENT if there else TRANSIENT)
                yield Step(command, "key", not there)
            else:
                index = rng.choice(EXTRA)
                name = f"index {index:#x}"
                there = bool(self.acknowledged[name])
                undefine = _authorised(CC_NV_UNDEFINE, (OWNER, index), b"")
                yield Step(undefine if there else define(index, 64), name, not there)

    def sent(self, step: Step) -> None:
        """The step may have happened from now on."""
        self.pending = step

    def done(self, response: bytes) -> None:
        """The TPM answered the step; raises AssertionError where it did not succeed."""
        step = self.pending
        assert step is not None
        code = response_code(response)
        assert code == 0, f"{step.name}: the TPM answered {code:#x}"
        self.acknowledged[step.name] = step.value
        self.pending = None
        self.answered += 1

    # What to ask after a power cut.

    def questions(self) -> dict[str, bytes]:
        """Return what to ask of a TPM that was started."""
        return {
            "data": read(DATA, DATA_BYTES),
            "counter": read(COUNTER, 8),
            "key": _plain(CC_READ_PUBLIC, PERSISTENT.to_bytes(4, "big")),
        } | {
            f"index {index:#x}": _plain(CC_NV_READ_PUBLIC, index.to_bytes(4, "big"))
            for index in EXTRA
        }

    def check(self, answers: dict[str, bytes]) -> None:
        """Compare with what was acknowledged; what is found is then the truth.

        Raises AssertionError where something is lost, torn or made up.
        """
        found = {name: _value(name, raw) for name, raw in answers.items()}
        assert found.keys() == self.acknowledged.keys()
        for name, value in found.items():
            allowed = [self.acknowledged[name]]
            if self.pending is not None and self.pending.name == name:
                allowed.append(self.pending.value)
            assert value in allowed, f"{name} is {value}, not one of {allowed}"
        self.acknowledged, self.pending = found, None

    def as_dict(self) -> dict[str, Any]:
        return {"kept": self.acknowledged, "answered": self.answered}


def _value(name: str, response: bytes) -> Value:
    code = response_code(response)
    if name == "key" or name.startswith("index"):
        assert code in (0, RC_HANDLE_1), f"{name}: the TPM answered {code:#x}"
        return code == 0
    assert code == 0, f"{name}: the TPM answered {code:#x}"
    data = response[16 : 16 + int.from_bytes(response[14:16], "big")]
    if name == "counter":
        return int.from_bytes(data, "big")
    assert len(data) == DATA_BYTES
    assert data == data[:4] * (DATA_BYTES // 4), f"torn: {data.hex()}"
    return int.from_bytes(data[:4], "big")


def counter_value(response: bytes) -> int:
    """Return the counter out of the answer to its question."""
    return int(_value("counter", response))
