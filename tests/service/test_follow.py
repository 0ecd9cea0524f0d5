"""A vTPM domain that is recreated under its name, with another id, as xl does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from qemu_vtpm_bridge import vtpm_follower
from qemu_vtpm_bridge.bridge.frontend import State
from qemu_vtpm_bridge.bridge.power import State as Power
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.xen.store import Store, open_store
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.support.chain import VTPM, Chain, running_chain
from tests.support.swtpm_client import GET_RANDOM
from tests.support.wait import wait_until
from tests.support.world import store_socket

NEW = 9
TPM_RC_INITIALIZE = 0x100
TPM_RC_RETRY = 0x922


def paths_for(domid: int) -> DevicePaths:
    return device_paths(PathMode.SEED, backend_domid=domid, handle=0)


async def recreate(chain: Chain) -> None:
    """Destroy the vTPM domain, and have another one of its name, on the same state."""
    assert chain.domain is not None
    await chain.world.destroy_domain(VTPM)
    chain.domain.close()
    await wait_until(lambda: chain.bridge.frontend.machine.state is State.WAIT_BACKEND)
    await chain.world.create_domain(NEW, "vtpm")
    await chain.start_vtpm(NEW, state_dir=chain.state_dir.with_name("new-state"))


async def test_P8_a_recreated_vtpm_domain_is_found_by_its_name(tmp_path: Path) -> None:
    config = {"backend_name": "vtpm", "paths_for": paths_for, "writes_entries": True}
    async with running_chain(tmp_path, **config) as chain:
        client = await chain.powered_on()
        await recreate(chain)
        with trio.fail_after(60):
            await chain.bridge.frontend.wait_running(after_connections=1)
        assert chain.bridge.frontend.paths == paths_for(NEW)
        assert chain.bridge.status()["frontend"]["backend"].startswith(f"/local/domain/{NEW}/")
        assert await client.code(GET_RANDOM) == TPM_RC_INITIALIZE
        await client.startup()
        assert await client.code(GET_RANDOM) == 0
        # What was the old domain's in this one's tree is gone.
        async with open_store(store_socket(chain.world)) as store:
            assert await store.try_ls("/local/domain/0/frontend/vtpm") == [str(NEW)]


async def test_P8_entries_that_are_refused_for_a_while_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusals = 5

    async def refuse(store: Store, paths: DevicePaths, **more: Any) -> bool:
        nonlocal refusals
        if refusals and paths == paths_for(NEW):
            refusals -= 1
            raise XenError("the vTPM domain still holds this device")
        return await attach(store, paths, **more)

    monkeypatch.setattr(vtpm_follower, "RETRY_S", 0.01)
    monkeypatch.setattr(vtpm_follower, "attach", refuse)
    config = {"backend_name": "vtpm", "paths_for": paths_for, "writes_entries": True}
    async with running_chain(tmp_path, **config) as chain:
        client = await chain.powered_on()
        await recreate(chain)
        with trio.fail_after(60):
            await chain.bridge.frontend.wait_running(after_connections=1)
        assert await client.code(GET_RANDOM) == TPM_RC_INITIALIZE
    assert refusals == 0
    assert caplog.text.count("still holds this device") == 1


async def test_without_attach_the_toolstack_writes_the_entries(tmp_path: Path) -> None:
    config = {"backend_name": "vtpm", "paths_for": paths_for}
    async with running_chain(tmp_path, **config) as chain:
        client = await chain.powered_on()
        await recreate(chain)
        await wait_until(lambda: chain.bridge.frontend.paths == paths_for(NEW))
        assert chain.bridge.frontend.machine.state is State.WAIT_ENTRIES
        async with open_store(store_socket(chain.world)) as store:
            await attach(store, paths_for(NEW))
        with trio.fail_after(60):
            await chain.bridge.frontend.wait_running(after_connections=1)
        assert await client.code(GET_RANDOM) == TPM_RC_INITIALIZE


async def test_another_domains_coming_changes_nothing(tmp_path: Path) -> None:
    config = {"backend_name": "vtpm", "paths_for": paths_for, "writes_entries": True}
    async with running_chain(tmp_path, **config) as chain:
        client = await chain.powered_on()
        await chain.world.create_domain(NEW, "vtpm-of-another")
        await chain.world.create_domain(NEW + 1, "vtpm")  # twice: the one in use stays
        assert await client.code(GET_RANDOM) == 0
        assert chain.bridge.frontend.paths == paths_for(VTPM)
        assert chain.bridge.frontend.connections == 1


async def test_P1_a_resumed_boot_without_a_vtpm_domain_is_answered(tmp_path: Path) -> None:
    async with running_chain(tmp_path, vtpm=False, reconnect_hold_s=0.2) as chain:
        client = await chain.connect()
        assert await client.set_datafd() == 0
        await chain.bridge.init(resume=True)
        await chain.until(Power.ON)
        assert await client.code(GET_RANDOM) == TPM_RC_RETRY
