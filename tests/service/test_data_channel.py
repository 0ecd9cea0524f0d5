"""Whatever comes on the data channel: P1, P2, P3, P5 and P10 on a living bridge."""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qemu_vtpm_bridge.bridge.ring import PumpExit
from qemu_vtpm_bridge.bridge.tpm import (
    HEADER,
    TPM_RC_BAD_TAG,
    TPM_RC_COMMAND_SIZE,
    TPM_RC_FAILURE,
    TPM_RC_INITIALIZE,
    Family,
)
from tests.support.chain import Chain, running_chain
from tests.support.swtpm_client import GET_RANDOM, PCR_EXTEND_7, STARTUP, SwtpmClient
from tests.support.vtpm import stopped
from tests.support.wait import wait_until

pytestmark = pytest.mark.timeout(120)

BAD_SIZE = {Family.TPM_2_0: TPM_RC_COMMAND_SIZE, Family.TPM_1_2: 25}
BAD_TAG = {Family.TPM_2_0: TPM_RC_BAD_TAG, Family.TPM_1_2: 30}


def submitted(chain: Chain) -> int:
    """How many commands reached the page."""
    assert chain.domain is not None
    return int(chain.domain.status()["pump"]["commands"])


async def test_a_command_may_come_in_pieces_cut_anywhere(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        for cut in range(1, len(GET_RANDOM)):
            await client.write(GET_RANDOM[:cut])
            await client.write(GET_RANDOM[cut:])
            assert HEADER.unpack_from(await client.response())[2] == 0
        for byte in GET_RANDOM:
            await client.write(bytes([byte]))
        assert HEADER.unpack_from(await client.response())[2] == 0
        client.close()


async def test_P5_commands_in_one_piece_get_their_answers_one_after_the_other(
    tmp_path: Path,
) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        await client.write(GET_RANDOM + PCR_EXTEND_7 + GET_RANDOM)
        lengths = [len(await client.response()) for _ in range(3)]
        assert lengths == [28, 19, 28]
        client.close()


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("size", [0, 1, 9])
async def test_P3_a_size_below_a_header_is_refused_here(
    tmp_path: Path, family: Family, size: int
) -> None:
    async with running_chain(tmp_path, family=family) as chain:
        client = await chain.powered_on()
        before = submitted(chain)
        assert await client.code(HEADER.pack(0x8001, size, 0x17B)) == BAD_SIZE[family]
        assert submitted(chain) == before
        assert await client.code(STARTUP[family]) != BAD_SIZE[family]
        client.close()


@pytest.mark.parametrize("size", [4089, 5000, 65536])
async def test_P3_a_command_longer_than_the_page_is_drained_and_refused(
    tmp_path: Path, size: int
) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        before = submitted(chain)
        command = HEADER.pack(0x8001, size, 0x17B) + bytes(size - 10)
        assert await client.code(command) == TPM_RC_COMMAND_SIZE
        assert submitted(chain) == before
        # Not a byte of it is taken for the next command.
        assert await client.code(GET_RANDOM) == 0
        client.close()


@pytest.mark.parametrize(
    ("written", "announced"), [(10, 0xFFFFFFFF), (10, 0x1000A), (6, 6), (12, 9), (10, 4000)]
)
async def test_P1_a_size_that_is_not_what_was_written_is_answered_and_swallows_nothing(
    tmp_path: Path, written: int, announced: int
) -> None:
    """A guest can have QEMU write so; QEMU then waits for one answer, and a reset for it."""
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        raw = HEADER.pack(0x8001, announced, 0x17B) + bytes(2)
        assert await client.code(raw[:written]) == TPM_RC_COMMAND_SIZE
        assert await client.code(GET_RANDOM) == 0
        client.close()


async def test_bytes_that_tis_leaves_behind_a_command_are_no_command(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        for tail in range(4):
            assert await client.code(GET_RANDOM + bytes(tail)) == 0
        client.close()


async def test_P3_the_longest_command_passes(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        before = submitted(chain)
        command = HEADER.pack(0x8001, 4088, 0x17B) + bytes(4078)
        # The TPM finds fault with it, not the bridge.
        assert await client.code(command) not in (0, TPM_RC_COMMAND_SIZE)
        assert submitted(chain) == before + 1
        client.close()


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("tag", [0x0000, 0x01C1, 0x01C2, 0x00C0, 0x00C4, 0x8000, 0x8003, 0xFFFF])
async def test_P3_tags_of_no_tpm_command_never_reach_the_page(
    tmp_path: Path, family: Family, tag: int
) -> None:
    async with running_chain(tmp_path, family=family) as chain:
        client = await chain.powered_on()
        before = submitted(chain)
        assert await client.code(HEADER.pack(tag, 10, 0x17B)) == BAD_TAG[family]
        assert submitted(chain) == before
        client.close()


async def test_the_other_familys_commands_reach_the_tpm_which_is_how_guests_probe(
    tmp_path: Path,
) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        before = submitted(chain)
        assert await client.code(STARTUP[Family.TPM_1_2]) != 0
        assert submitted(chain) == before + 1
        client.close()


async def test_a_client_that_leaves_at_any_byte_costs_nobody_else_anything(
    tmp_path: Path,
) -> None:
    async with running_chain(tmp_path) as chain:
        for cut in range(len(GET_RANDOM) + 1):
            client = await chain.connect()
            assert await client.set_datafd() == 0
            assert await client.init() == 0
            await client.write(GET_RANDOM[:cut])
            client.close()
        client = await chain.powered_on()
        assert await client.code(GET_RANDOM) == 0
        client.close()


async def test_P1_a_tpm_that_dies_in_the_middle_costs_one_error(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        pid = chain.swtpm_pid
        os.kill(pid, signal.SIGSTOP)
        await client.write(GET_RANDOM)
        await wait_until(lambda: chain.bridge._carrier.pump.stats().in_flight)
        os.kill(pid, signal.SIGKILL)
        assert HEADER.unpack_from(await client.response())[2] == TPM_RC_FAILURE
        assert await client.code(GET_RANDOM) == 0
        client.close()


MANY_RUNS = 20
"""A pump that runs so often for one client spins."""


@contextmanager
def counted_runs(chain: Chain) -> Iterator[list[PumpExit]]:
    """Give why the pump's runs ended, from the next one on."""
    pump, ends = chain.bridge._carrier.pump, list[PumpExit]()
    run = pump.run

    async def counted() -> PumpExit:
        ends.append(await run())
        return ends[-1]

    pump.run = counted  # type: ignore[method-assign]
    yield ends
    pump.run = run  # type: ignore[method-assign]


def attached(chain: Chain) -> bool:
    """Whether the bridge has a data channel, hung up or not."""
    return bool(chain.bridge.status()["qemu"]["data-attached"])


async def test_P1_a_client_that_does_not_take_its_answer_is_forgotten(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        with counted_runs(chain) as ends:
            assert client.data is not None
            client.data.socket.shutdown(socket.SHUT_RD)
            await client.write(GET_RANDOM)
            await wait_until(lambda: not attached(chain) or len(ends) > MANY_RUNS)
        assert len(ends) <= MANY_RUNS
        assert not chain.bridge.data_attached()
        # Its control connection is as good as before.
        client.data.socket.close()
        await client.power_on()
        assert await client.code(GET_RANDOM) == TPM_RC_INITIALIZE


async def test_P1_a_client_that_dies_while_its_command_is_held_is_forgotten(
    tmp_path: Path,
) -> None:
    async with running_chain(tmp_path, vtpm=False) as chain:
        client = await chain.connect()
        await client.power_on()
        with counted_runs(chain) as ends:
            await client.write(GET_RANDOM)
            client.close()
            await wait_until(lambda: not attached(chain) or len(ends) > MANY_RUNS)
        assert len(ends) <= MANY_RUNS
        assert not chain.bridge.data_attached()
        await chain.start_vtpm()
        client = await chain.powered_on()
        assert await client.code(GET_RANDOM) == 0


async def test_the_end_of_a_client_does_not_take_the_next_ones_channel(tmp_path: Path) -> None:
    """The next one is attached between the pump's news of the end and what is made of it."""
    async with running_chain(tmp_path) as chain:
        first = await chain.powered_on()
        carrier = chain.bridge._carrier
        run = carrier.pump.run
        ours, theirs = socket.socketpair()

        async def run_and_be_overtaken() -> PumpExit:
            reason = await run()
            if reason is PumpExit.DATA_EOF:
                carrier.pump.run = run  # type: ignore[method-assign]
                chain.nursery.start_soon(chain.bridge.attach_data, theirs)
                await wait_until(lambda: carrier._lock.statistics().tasks_waiting)
            return reason

        carrier.pump.run = run_and_be_overtaken  # type: ignore[method-assign]
        async with carrier.paused():
            pass  # so that the next run is that one
        first.close()
        with ours:
            ours.setblocking(False)
            second = await chain.connect()
            second.data = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            assert await second.code(GET_RANDOM) == 0
            assert await second.code(GET_RANDOM) == 0
            assert attached(chain)


async def test_commands_before_the_end_of_the_sending_side_are_answered(tmp_path: Path) -> None:
    async with running_chain(tmp_path, vtpm=False) as chain:
        client = await chain.connect()
        await client.power_on()
        await client.write(STARTUP[Family.TPM_2_0] + GET_RANDOM)
        assert client.data is not None
        await client.data.send_eof()
        await chain.start_vtpm()
        assert [len(await client.response()) for _ in range(2)] == [10, 28]
        await wait_until(lambda: not attached(chain))


async def test_P1_the_next_qemu_does_not_wait_for_a_dead_ones_command(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        pump = chain.bridge._carrier.pump
        client = await chain.powered_on()
        async with stopped(chain.swtpm_pid):
            await client.write(GET_RANDOM)
            await wait_until(lambda: pump.stats().in_flight)
            client.close()
            following = await chain.connect()
            assert await following.set_datafd() == 0
            # No deadline has passed, and the vTPM domain has not answered.
            assert not pump.stats().timeouts
            assert pump.ring_busy()
            assert await following.stop() == 0
            assert await following.init() == 0
        # The late answer is dropped (P5), and the TPM was cycled (P7).
        assert await following.code(GET_RANDOM) == TPM_RC_INITIALIZE


async def test_P7_evidence_that_a_new_client_cuts_short_is_taken_again(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        pump = chain.bridge._carrier.pump
        client = await chain.connect()
        assert await client.set_datafd() == 0
        async with stopped(chain.swtpm_pid):
            assert await client.init() == 0
            await wait_until(pump.ring_busy)
            client.close()
            following = await chain.connect()
            assert await following.set_datafd() == 0
            assert pump.ring_busy()
        assert await following.code(GET_RANDOM) == TPM_RC_INITIALIZE


async def test_P10_no_payload_is_logged_and_a_guest_cannot_fill_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = b"hunter2-secret-auth-value"
    async with running_chain(tmp_path) as chain:
        client = await chain.powered_on()
        stir = struct.pack(">HIIH", 0x8001, 12 + len(secret), 0x146, len(secret)) + secret
        assert await client.code(stir) == 0
        for _ in range(200):
            await client.code(HEADER.pack(0x1111, 10 + len(secret), 0x146) + secret)
            await client.code(HEADER.pack(0x8001, 5, 0x146))
        client.close()
    for form in (secret.decode(), secret.hex()):
        assert form not in caplog.text
    assert len(caplog.records) < 60


COMMAND_HEADS = st.builds(
    HEADER.pack,
    st.sampled_from([0x8001, 0x8002, 0x00C1, 0x01C1, 0x0000]) | st.integers(0, 0xFFFF),
    st.integers(0, 64) | st.sampled_from([4087, 4088, 4089, 0x7FFFFFFF, 0xFFFFFFFF]),
    st.sampled_from([0x17B, 0x17A, 0x144, 0x182]) | st.integers(0, 0xFFFFFFFF),
)


@given(st.lists(COMMAND_HEADS, max_size=6), st.binary(max_size=200), st.randoms())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
async def test_P1_P2_any_bytes_are_answered_well_formed_and_the_next_client_is_served(
    tmp_path_factory: pytest.TempPathFactory,
    heads: list[bytes],
    tail: bytes,
    chance: random.Random,
) -> None:
    raw = b"".join(heads) + tail
    async with running_chain(tmp_path_factory.mktemp("any")) as chain:
        client = await chain.powered_on()
        at = 0
        while at < len(raw):
            size = chance.randint(1, 40)
            await client.write(raw[at : at + size])
            at += size
        await _read_what_there_is(client)
        client.close()
        following = await chain.connect()
        await following.power_on()
        assert await following.code(STARTUP[Family.TPM_2_0]) in (0, 0x100, 0x101)
        following.close()


async def _read_what_there_is(client: SwtpmClient) -> None:
    """End the sending side; everything that is answered then must be whole responses."""
    assert client.data is not None
    await client.data.send_eof()
    raw = b""
    with trio.fail_after(60):
        while chunk := await client.data.receive_some(65536):
            raw += chunk
    while raw:
        _, size, _ = HEADER.unpack_from(raw)
        assert 10 <= size <= 4088
        assert len(raw) >= size
        raw = raw[size:]
