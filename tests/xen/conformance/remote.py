"""A side of a check that is in another domain, where an agent (agent.py) does what is asked.

A connection to the agent carries a JSON object a line: a request, then its answer, and so on.
    {"do": "share_page", "arguments": [0]}           {"object": 1, "ref": 9}
    {"do": "write", "on": 1, "arguments": [0, "2a"]} {}
    {"do": "map_page", "arguments": [0, 99]}         {"xen_error": "grant 99 ..."}
What was made over a connection is given back when it ends.
"""

from __future__ import annotations

import json
from typing import Any, Self

from qemu_vtpm_bridge.errors import XenError

from .address import connect
from .sides import DEADLINE_S, PAGE_BYTES


class Agent:
    """The connection."""

    def __init__(self, address: str) -> None:
        self._socket = connect(address)
        self._socket.settimeout(2 * DEADLINE_S)
        self._lines = self._socket.makefile("rb")

    def close(self) -> None:
        """End it, and with it all that the agent made."""
        self._lines.close()
        self._socket.close()

    def ask(self, do: str, *arguments: Any, on: int | None = None) -> dict[str, Any]:
        """Return the answer.  Raises XenError where the agent did, and OSError where it is gone."""
        request = {"do": do, "on": on, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise ConnectionError(f"the agent hung up when it was asked to {do}")
        answer = dict(json.loads(line))
        if "xen_error" in answer:
            raise XenError(answer["xen_error"])
        return answer


class RemoteData:
    """A page's bytes: each look at them and each change is a request."""

    def __init__(self, page: RemotePage) -> None:
        self._page = page

    def __bytes__(self) -> bytes:
        return self[:]

    def __getitem__(self, part: slice) -> bytes:
        first, end, _ = part.indices(PAGE_BYTES)
        return bytes.fromhex(self._page.ask("read", first, end - first)["hex"])

    def __setitem__(self, part: slice, value: bytes) -> None:
        first, end, _ = part.indices(PAGE_BYTES)
        if end - first != len(value):
            raise ValueError(f"{len(value)} bytes for {end - first}")
        self._page.ask("write", first, value.hex())


class RemoteObject:
    """What the agent made for us."""

    def __init__(self, agent: Agent, answer: dict[str, Any]) -> None:
        self._agent = agent
        self._number = answer["object"]

    def ask(self, do: str, *arguments: Any) -> dict[str, Any]:
        """Have the agent do something with it."""
        return self._agent.ask(do, *arguments, on=self._number)


class RemotePage(RemoteObject):
    """A page that the agent shares or maps."""

    def __init__(self, agent: Agent, answer: dict[str, Any]) -> None:
        super().__init__(agent, answer)
        self.ref = int(answer["ref"])
        self.data = RemoteData(self)

    def close(self) -> None:
        """Have it given back."""
        self.ask("close")


class RemoteChannel(RemoteObject):
    """A port of the agent's."""

    def __init__(self, agent: Agent, answer: dict[str, Any]) -> None:
        super().__init__(agent, answer)
        self.port = int(answer["port"])

    def notify(self) -> None:
        """Have the peer woken; raises XenError."""
        self.ask("notify")

    def close(self) -> None:
        """Have it closed."""
        self.ask("close")

    def listen(self) -> None:
        """Have the agent look for events."""
        self.ask("listen")

    def came(self, deadline_s: float = 0.0) -> bool:
        """Ask whether an event has come, or comes in time."""
        return bool(self.ask("came", deadline_s)["came"])

    def take(self) -> None:
        """Have an event taken."""
        self.ask("take")

    def arm(self) -> None:
        """Have further events let come."""
        self.ask("arm")


class RemoteHolder(RemoteObject):
    """A child of the agent."""

    def __init__(self, agent: Agent, answer: dict[str, Any]) -> None:
        super().__init__(agent, answer)
        self.ref = int(answer["ref"])
        self.port = int(answer["port"])

    def kill(self) -> None:
        """Have it killed, and its end seen."""
        self.ask("kill")


class RemoteSide:
    """The Platform of an agent's domain."""

    def __init__(self, address: str) -> None:
        self._agent = Agent(address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._agent.close()

    def share_page(self, domid: int) -> RemotePage:
        """Have a page shared; raises XenError."""
        return RemotePage(self._agent, self._agent.ask("share_page", domid))

    def map_page(self, domid: int, ref: int) -> RemotePage:
        """Have a page mapped; raises XenError."""
        return RemotePage(self._agent, self._agent.ask("map_page", domid, ref))

    def alloc_unbound(self, domid: int) -> RemoteChannel:
        """Have a port made; raises XenError."""
        return RemoteChannel(self._agent, self._agent.ask("alloc_unbound", domid))

    def bind_interdomain(self, domid: int, port: int) -> RemoteChannel:
        """Have a port bound; raises XenError."""
        return RemoteChannel(self._agent, self._agent.ask("bind_interdomain", domid, port))

    def hold(self, domid: int) -> RemoteHolder:
        """Have a holder started."""
        return RemoteHolder(self._agent, self._agent.ask("hold", domid))
