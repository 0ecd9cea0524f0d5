"""Who uses a TPM in domain 0: a client of a bridge, as QEMU is one, and another guest's beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from tests.support.swtpm_client import GET_RANDOM, SwtpmClient

SOCKET = Path("/tmp/bridge.sock")
PACE_S = 0.5
"""Between another guest's commands: more of them would take the emulated CPUs from this one."""


def with_client(function: Any, path: Path = SOCKET) -> Any:
    """Run an async function with a client of the bridge, as QEMU is one."""

    async def main() -> Any:
        client = await SwtpmClient.connect(path)
        try:
            return await function(client)
        finally:
            client.close()

    return trio.run(main)


def beside_another(job: Callable[[], Any], path: Path = SOCKET) -> int:
    """Do a job while another guest uses its TPM, by the bridge at `path`.

    Return how many commands it sent meanwhile: each was carried out.
    """

    async def use_meanwhile(client: SwtpmClient) -> int:
        await client.power_on()
        await client.startup()
        commands = 0
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def work() -> None:
                await trio.to_thread.run_sync(job)
                done.set()

            nursery.start_soon(work)
            while not done.is_set():
                assert await client.code(GET_RANDOM) == 0
                commands += 1
                with trio.move_on_after(PACE_S):
                    await done.wait()
        return commands

    return int(with_client(use_meanwhile, path))
