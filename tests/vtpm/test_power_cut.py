"""The vTPM domain killed at any moment, 50 times under load: what the TPM keeps is whole.

The program and its swtpm are killed with SIGKILL, both of them, at a moment that a seed
chooses; half of the time Xen's domain goes with them and is made anew, as `xl destroy` and
`xl create` do it, and half of the time only the processes are started again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.bridge.power import State as Power
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.vtpm.ordinals import TpmFamily
from qemu_vtpm_bridge.xen.store import open_store
from tests.support import nv_load
from tests.support.chain import PATHS, VTPM, Chain, running_chain
from tests.support.nv_load import Shelf, Step, response_code
from tests.support.swtpm_client import SwtpmClient
from tests.support.vtpm import Place, VtpmProcess
from tests.support.world import store_socket

pytestmark = pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")

KILLS = 50
SEED = 20260
STEPS_MAX = 40
"""So many steps are answered before a kill, at most."""
MOMENT_MAX_S = 0.004
"""A kill comes so long after the next step was sent, at most: the TPM answers in about 1 ms."""


async def set_up(client: SwtpmClient, shelf: Shelf) -> None:
    for command in shelf.set_up():
        assert await client.code(command) == 0
    shelf.counter_is(nv_load.counter_value(await client.tpm(shelf.questions()["counter"])))


async def check(client: SwtpmClient, shelf: Shelf) -> None:
    """Have the TPM say what it keeps, and that it is not in failure mode."""
    shelf.check({name: await client.tpm(raw) for name, raw in shelf.questions().items()})
    answer = await client.tpm(nv_load.GET_TEST_RESULT)
    assert response_code(answer) == 0
    assert answer[-4:] == bytes(4), f"the TPM's self test says {answer[-4:].hex()}"


async def boot(chain: Chain) -> SwtpmClient:
    """Do what QEMU and firmware do when a guest starts."""
    client = await chain.connect()
    await client.power_on()
    await chain.until(Power.ON)
    await client.startup()
    assert await client.code(nv_load.create_primary()) == 0
    return client


async def load_until_killed(
    client: SwtpmClient, shelf: Shelf, process: VtpmProcess, rng: random.Random
) -> None:
    """Work the TPM, and kill the domain some time after a step was sent."""
    steps = shelf.steps(rng)
    for _ in range(rng.randrange(STEPS_MAX)):
        step = next(steps)
        shelf.sent(step)
        shelf.done(await client.tpm(step.command))
    step = next(steps)
    shelf.sent(step)
    await client.write(step.command)
    # Not to wait for anything: this is the moment that chance chose.
    await trio.sleep(rng.choice([0, rng.uniform(0, MOMENT_MAX_S)]))
    victims = [process.process.pid, process.swtpm_pid()]
    rng.shuffle(victims)
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await process.process.wait()


async def last_answer(client: SwtpmClient, shelf: Shelf) -> bool:
    """Take the answer to the step that the kill fell into; return whether it succeeded.

    An error comes once the domain is back, or gone for good.
    """
    answer = await client.response()
    client.close()
    if response_code(answer):
        return False
    shelf.done(answer)
    return True


async def destroyed_and_made_anew(chain: Chain) -> None:
    await chain.world.destroy_domain(VTPM)
    await chain.world.create_domain(VTPM, "vtpm")
    async with open_store(store_socket(chain.world)) as store:
        await attach(store, PATHS, force=True)


@pytest.mark.timeout(900)
async def test_P8_what_the_tpm_keeps_is_whole_after_50_kills(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    shelf = Shelf()
    ends = Counter[str]()
    async with running_chain(tmp_path, vtpm=False) as chain:
        place = Place(chain.world, chain.state_dir, TpmFamily.TPM_2_0)
        async with place.process() as process:
            client = await boot(chain)
            await set_up(client, shelf)
            await load_until_killed(client, shelf, process, rng)
        for kills in range(1, KILLS + 1):
            if rng.random() < 0.5:
                await destroyed_and_made_anew(chain)
            async with place.process() as process:
                answered = await last_answer(client, shelf)
                cut_short = shelf.pending
                client = await boot(chain)
                await check(client, shelf)
                ends[_end(shelf, cut_short, answered=answered)] += 1
                if kills < KILLS:
                    await load_until_killed(client, shelf, process, rng)
    assert shelf.answered > KILLS
    # Some kills fell between a command and its answer.
    assert ends["answered"] < KILLS, ends


def _end(shelf: Shelf, cut_short: Step | None, *, answered: bool) -> str:
    if answered or cut_short is None:
        return "answered"
    happened = shelf.acknowledged[cut_short.name] == cut_short.value
    return "happened" if happened else "did not happen"


def kept(serials: bytes, counter: int, *, key: bool) -> dict[str, bytes]:
    """Return answers as a TPM gives them."""

    def data(raw: bytes) -> bytes:
        head = struct.pack(">HIII", nv_load.ST_SESSIONS, 0, 0, 2 + len(raw))
        return head + len(raw).to_bytes(2, "big") + raw

    there, gone = (struct.pack(">HII", 0x8001, 10, rc) for rc in (0, nv_load.RC_HANDLE_1))
    answers = {"data": data(serials), "counter": data(counter.to_bytes(8, "big"))}
    return answers | {
        name: there if name == "key" and key else gone
        for name in Shelf().questions().keys() - answers
    }


DATA_7 = (7).to_bytes(4, "big") * (nv_load.DATA_BYTES // 4)
DATA_8 = (8).to_bytes(4, "big") * (nv_load.DATA_BYTES // 4)


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [
        (kept(DATA_7, 3, key=True), None),
        (kept(DATA_8, 3, key=True), None),
        (kept(DATA_8[:256] + DATA_7[256:], 3, key=True), "torn"),
        (kept(DATA_8, 2, key=True), "counter is 2"),
        (kept(DATA_8, 4, key=True), "counter is 4"),
        (kept(DATA_7, 3, key=False), "key is False"),
        (kept((6).to_bytes(4, "big") * 128, 3, key=True), "data is 6"),
    ],
)
def test_the_check_sees_what_is_lost_torn_or_made_up(
    answers: dict[str, bytes], complaint: str | None
) -> None:
    shelf = Shelf()
    shelf.set_up()
    shelf.acknowledged |= {"data": 7, "counter": 3, "key": True}
    shelf.sent(Step(nv_load.write(8), "data", 8))
    with pytest.raises(AssertionError, match=complaint) if complaint else nullcontext():
        shelf.check(answers)
