"""The status socket: whoever connects gets one JSON document and the end of the file.

It takes no requests, so that looking at a bridge changes nothing and no tool has to
fight QEMU for the control connection.  A reader that does not read is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import trio

from .listen import Listener, bind_unix

READER_DEADLINE_S: Final = 5.0


def bind_status(path: str, mode: int = 0o600) -> Listener:
    """Return the socket for `serve_status`; raises ConfigError where it cannot be bound."""
    place = Path(path)
    return Listener(bind_unix(place, mode), path=place)


async def serve_status(
    bound: Listener,
    document: Callable[[], dict[str, Any]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; `document` is asked anew for each reader.  Closes `bound`."""
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(bound.control))

    async def answer(stream: trio.SocketStream) -> None:
        raw = json.dumps(document()).encode() + b"\n"
        with suppress(trio.BrokenResourceError), trio.move_on_after(READER_DEADLINE_S):
            async with stream:
                await stream.send_all(raw)

    try:
        async with listener:
            await trio.serve_listeners(answer, [listener], task_status=_Started(task_status))
    finally:
        bound.close()


class _Started:
    """Tells that the listener is up without handing it out."""

    def __init__(self, outer: trio.TaskStatus[None]) -> None:
        self._outer = outer

    def started(self, value: Any = None) -> None:
        del value
        self._outer.started()
