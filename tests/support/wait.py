"""Waiting for facts that set no event: of threads, and of other processes."""

from __future__ import annotations

import os
from collections.abc import Callable

import trio


async def wait_until(fact: Callable[[], object], deadline_s: float = 60.0) -> None:
    """Return once `fact` is true.

    Between two looks the other tasks have a turn, and so have this process' other threads: a
    hop through one of them gives the interpreter away.
    """
    with trio.fail_after(deadline_s):
        while not fact():
            await trio.to_thread.run_sync(os.sched_yield)
