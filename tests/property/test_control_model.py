"""The control channel against a naive model of swtpm: every command in every state."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge.control import BODIES, Command, Result
from tests.support.chain import running_chain
from tests.support.swtpm_client import SwtpmClient

pytestmark = pytest.mark.timeout(300)

Call = tuple[int, bytes]


class Model:
    """What swtpm would say, as far as a bridge can say it; the state is two flags."""

    def __init__(self) -> None:
        self.powered = False
        self.data = False

    def answer(self, command: int, body: bytes) -> bytes:
        handler = getattr(self, f"on_{command:02x}", None)
        if handler is None:
            return struct.pack(">I", Result.TPM_BAD_ORDINAL)
        return bytes(handler(body))

    def _done(self, result: int = 0) -> bytes:
        return struct.pack(">I", result)

    def on_01(self, _: bytes) -> bytes:
        return struct.pack(">II", 0, 0x3CAF)

    def on_02(self, _: bytes) -> bytes:
        self.powered = True
        return self._done()

    def on_04(self, _: bytes) -> bytes:
        return struct.pack(">II", 0 if self.powered else Result.TPM_BAD_ORDINAL, 0)

    def on_05(self, body: bytes) -> bytes:
        return self._done(0 if body[0] <= 4 else Result.TPM_BAD_LOCALITY)

    def on_09(self, _: bytes) -> bytes:
        return self._done(0 if self.powered else Result.TPM_BAD_ORDINAL)

    def on_0b(self, body: bytes) -> bytes:
        if not self.powered:
            return self._done(Result.TPM_BAD_ORDINAL)
        return self._done(0 if body[0] in (3, 4) else Result.TPM_BAD_LOCALITY)

    def on_0c(self, _: bytes) -> bytes:
        return struct.pack(">IIII", Result.TPM_FAIL, 0, 0, 0)

    def on_0d(self, body: bytes) -> bytes:
        return self._done(Result.TPM_FAIL if len(body) > 12 else 0)

    def on_0e(self, _: bytes) -> bytes:
        self.powered = False
        return self._done()

    def on_0f(self, _: bytes) -> bytes:
        return struct.pack(">II", 0, 0)

    def on_10(self, _: bytes) -> bytes:
        return self._done(Result.TPM_BAD_PARAMETER)

    def on_11(self, body: bytes) -> bytes:
        (wanted,) = struct.unpack(">I", body)
        if wanted:
            self.size = min(max(wanted, 2808), 4088)
        return struct.pack(">IIII", 0, self.size, 2808, 4088)

    size = 4088


def body_of(command: int, draw: st.DrawFn) -> bytes:
    if command in (Command.CMD_SET_LOCALITY, Command.CMD_RESET_TPMESTABLISHED):
        return bytes([draw(st.integers(0, 6))]) + bytes(draw(st.sampled_from([0, 3])))
    if command == Command.CMD_SET_STATEBLOB:
        length = draw(st.integers(0, 40))
        return struct.pack(">III", 0, 1, length) + bytes(length)
    if command == Command.CMD_HASH_DATA:
        return struct.pack(">I", 5) + bytes(5)
    if command == Command.CMD_INIT:
        return bytes(4)
    if command == Command.CMD_SET_BUFFERSIZE:
        return struct.pack(">I", draw(st.sampled_from([0, 1, 2808, 3968, 4088, 0xFFFFFFFF])))
    form = BODIES.get(Command(command)) if command in Command.__members__.values() else None
    return bytes(form.sizeof() if form else 0)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    # CMD_SHUTDOWN ends the connection; it has tests of its own.
    command = draw(
        st.sampled_from([c for c in Command if c is not Command.CMD_SHUTDOWN])
        | st.integers(0x14, 0xFFFFFFFF)
    )
    return int(command), body_of(int(command), draw)


async def _same(client: SwtpmClient, model: Model, call: Call) -> None:
    command, body = call
    expected = model.answer(command, body)
    answer = await client.ask(command, body, len(expected))
    assert answer == expected, (hex(command), body.hex())


@given(st.lists(st.lists(calls(), max_size=12), max_size=3))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_any_requests_get_the_answers_of_the_model(
    tmp_path_factory: pytest.TempPathFactory, sessions: list[list[Call]]
) -> None:
    """What one client did, the next one finds: power outlives a connection."""
    async with running_chain(tmp_path_factory.mktemp("model")) as chain:
        model = Model()
        for session in sessions:
            client = await chain.connect()
            for call in session:
                await _same(client, model, call)
            client.close()


@pytest.mark.parametrize("powered", [False, True])
async def test_every_command_in_every_state(tmp_path: Path, powered: bool) -> None:
    bodies = {
        Command.CMD_SET_LOCALITY: [b"\0", b"\4", b"\5"],
        Command.CMD_RESET_TPMESTABLISHED: [bytes([n]) for n in range(6)],
        Command.CMD_INIT: [bytes(4)],
        Command.CMD_SET_STATEBLOB: [bytes(12), struct.pack(">III", 0, 1, 3) + b"abc"],
        Command.CMD_HASH_DATA: [struct.pack(">I", 3) + b"abc"],
    }
    async with running_chain(tmp_path) as chain:
        for command in Command:
            if command is Command.CMD_SHUTDOWN:
                continue
            form = BODIES.get(command)
            for body in bodies.get(command, [bytes(form.sizeof() if form else 0)]):
                client = await chain.connect()
                model = Model()
                await _same(client, model, (Command.CMD_STOP, b""))
                if powered:
                    await _same(client, model, (Command.CMD_INIT, bytes(4)))
                await _same(client, model, (command, body))
                client.close()
