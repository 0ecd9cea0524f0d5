"""A world as a whole: its sockets, clients that misbehave, domains, other worlds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.embedded import world as world_module
from qemu_vtpm_bridge.embedded.wire import HEADER, HEADER_FORMAT, Op
from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.xen.store import open_store
from tests.support.world import running_world, store_socket
from tests.support.xenstore import message, raw_exchange


async def still_served(world: World) -> bool:
    async with open_store(store_socket(world)) as store:
        return await store.read("/local/domain/0/name") == b"Domain-0"


@pytest.mark.parametrize(
    "raw",
    [
        HEADER.pack(Op.READ, 1, 0, 4097),
        HEADER.pack(Op.READ, 1, 0, 0xFFFFFFFF),
        message(Op.READ, b"/\0") + b"\xff" * 16,
    ],
    ids=["one-too-many", "4-GiB", "after-a-good-one"],
)
async def test_a_length_beyond_the_limit_ends_that_connection(tmp_path: Path, raw: bytes) -> None:
    async with running_world(tmp_path) as world:
        answers = await raw_exchange(store_socket(world), raw)  # returns when it is closed
        assert len(answers) <= 1
        assert await still_served(world)


async def test_requests_in_pieces_and_in_heaps_are_answered_in_order(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        heap = b"".join(message(Op.MKDIR, b"/n%d\0" % number, number) for number in range(200))
        stream = await trio.open_unix_socket(store_socket(world))
        async with stream:
            for at in range(0, len(heap), 7):
                await stream.send_all(heap[at : at + 7])
            raw = b""
            while len(raw) < 200 * (HEADER.size + 3):
                raw += await stream.receive_some()
        ids = [HEADER.unpack_from(raw, at)[1] for at in range(0, len(raw), HEADER.size + 3)]
        assert ids == list(range(200))


async def test_a_client_that_reads_nothing_is_disconnected_and_delays_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_module, "OUTPUT_MAX_BYTES", 65536)
    async with running_world(tmp_path) as world:
        lazy = await trio.open_unix_socket(store_socket(world))
        async with lazy, open_store(store_socket(world)) as store:
            await lazy.send_all(message(Op.WATCH, b"/w\0t\0"))
            await lazy.receive_some(16)
            connections = len(world.store.connections)
            while len(world.store.connections) == connections:
                await store.write("/w/" + "x" * 1000, b"")
        assert await still_served(world)


async def test_one_world_in_a_directory(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        with pytest.raises(ExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                await nursery.start(World(world.directory).serve)
        assert caught.group_contains(ConfigError, match="another embedded Xen runs")
        assert await still_served(world)


async def test_a_path_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long"):
        await World(tmp_path / ("x" * 100)).serve()


async def test_domains_are_made_and_destroyed_over_the_control_socket(tmp_path: Path) -> None:
    async with running_world(tmp_path) as world:
        stream = await trio.open_unix_socket(str(world.directory / "control.sock"))

        async def ask(request: object) -> dict[str, object]:
            raw = request if isinstance(request, bytes) else json.dumps(request).encode()
            await stream.send_all(raw + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                answer += await stream.receive_some()
            parsed = json.loads(answer)
            assert isinstance(parsed, dict)
            return parsed

        async with stream:
            assert await ask({"op": "create", "domid": 4, "name": "four"}) == {"ok": True}
            domains = (await ask({"op": "list"}))["domains"]
            assert domains == {"0": "Domain-0", "4": "four"}
            for wrong in (
                {"op": "create", "domid": 4},
                {"op": "create", "domid": 0},
                {"op": "create", "domid": 0x7FF0},
                {"op": "create", "domid": "x"},
                {"op": "destroy", "domid": 0},
                {"op": "destroy", "domid": 9},
                {"op": "dance"},
                {},
                [],
                b"not JSON",
                b"\xff",
            ):
                assert (await ask(wrong))["ok"] is False
            assert await ask({"op": "destroy", "domid": 4}) == {"ok": True}
        async with open_store(store_socket(world)) as store:
            assert await store.try_read("/local/domain/4/name") is None


def test_the_header_is_what_construct_says() -> None:
    parsed = HEADER_FORMAT.parse(HEADER.pack(1, 2, 3, 4))
    assert (parsed.type, parsed.req_id, parsed.tx_id, parsed.len) == (1, 2, 3, 4)
    assert HEADER_FORMAT.build(parsed) == HEADER.pack(1, 2, 3, 4)
