"""Bridge and vTPM domain together, on every program that can be XenStore.

Domain 2's XenStore socket leads a real xenstored's ring, so that the vTPM domain's and a
guest's permissions are the daemon's; grants and event channels are the embedded Xen's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qemu_vtpm_bridge.bridge.tpm import TPM_RC_INITIALIZE
from qemu_vtpm_bridge.toolstack.attach import attach, detach
from qemu_vtpm_bridge.vtpm.ordinals import TpmFamily
from qemu_vtpm_bridge.xen.store import open_store
from tests.support.chain import PATHS, VTPM, running_chain
from tests.support.page_frontend import get_random, page_frontend, startup
from tests.support.swtpm_client import GET_RANDOM, PCR_EXTEND_7, PCR_READ_7, ZERO_PCR
from tests.support.vtpm import GUEST, QEMU, place
from tests.support.wait import wait_until
from tests.support.world import store_socket
from tests.support.xenstored import DaemonWorld, XenStore

pytestmark = [
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
    pytest.mark.timeout(180),
]

TPM2 = TpmFamily.TPM_2_0


async def test_they_meet_and_commands_go_through(tmp_path: Path, xenstore: XenStore) -> None:
    async with running_chain(tmp_path, server=xenstore) as chain:
        client = await chain.powered_on()
        for _ in range(20):
            assert await client.code(GET_RANDOM) == 0
        async with open_store(store_socket(chain.world)) as store:
            assert await store.read(f"{PATHS.frontend}/state") == b"4"
            assert await store.read(f"{PATHS.backend}/state") == b"4"
            assert await store.get_perms(f"{PATHS.backend}/feature-protocol-v2") == ["n2", "r0"]


async def test_P7_a_reset_is_asked_for_and_confirmed(tmp_path: Path, xenstore: XenStore) -> None:
    async with running_chain(tmp_path, server=xenstore) as chain:
        client = await chain.powered_on()
        assert await client.code(PCR_EXTEND_7) == 0
        assert await client.stop() == 0
        assert await client.init() == 0
        assert await client.code(PCR_READ_7) == TPM_RC_INITIALIZE
        await client.startup()
        assert await client.pcr_7() == ZERO_PCR
        assert chain.bridge.frontend.connections == 2


async def test_P8_a_vtpm_domain_that_dies_is_followed_by_another(
    tmp_path: Path, xenstore: XenStore
) -> None:
    async with running_chain(tmp_path, server=xenstore) as chain:
        client = await chain.powered_on()
        await chain.end_vtpm()
        await chain.world.destroy_domain(VTPM)
        await chain.world.create_domain(VTPM, "vtpm")
        async with open_store(store_socket(chain.world)) as store:
            await attach(store, PATHS)
        await chain.start_vtpm()
        await wait_until(lambda: chain.bridge.frontend.connections == 2)
        assert await client.init() == 0
        await client.startup()
        assert await client.code(GET_RANDOM) == 0


async def test_a_guests_own_frontend_beside_qemus(tmp_path: Path, xenstore: XenStore) -> None:
    async with place(tmp_path, TPM2, xenstore) as p, p.domain() as domain:
        await p.attach(GUEST, QEMU)
        async with (
            page_frontend(p.world, GUEST) as guest,
            page_frontend(p.world, QEMU) as qemu,
        ):
            await guest.connect()
            await qemu.connect()
            assert await guest.code(startup(TPM2)) == 0
            for frontend in (guest, qemu, guest):
                assert await frontend.code(get_random(TPM2)) == 0
            await guest.close()
            await guest.connect()
            assert await guest.code(get_random(TPM2)) == 0
            assert len(domain._devices) == 2


async def test_a_guest_that_dies_is_let_go(tmp_path: Path, xenstore: XenStore) -> None:
    async with place(tmp_path, TPM2, xenstore) as p, p.domain() as domain:
        await p.attach(GUEST, QEMU)
        async with page_frontend(p.world, QEMU) as qemu:
            async with page_frontend(p.world, GUEST) as guest:
                await guest.connect()
                await qemu.connect()
                assert await guest.code(startup(TPM2)) == 0
                await p.world.destroy_domain(GUEST.frontend_domid)
            # oxenstored tells nobody of nodes that go with their owner, so it is the
            # toolstack's removal of the backend's entries that ends the device.
            async with open_store(store_socket(p.world)) as store:
                await detach(store, GUEST, force=True)
            await wait_until(lambda: len(domain._devices) == 1)
            assert await qemu.code(get_random(TPM2)) == 0


@pytest.mark.parametrize("server", [XenStore.XENSTORED, XenStore.OXENSTORED])
async def test_P1_commands_go_on_while_xenstore_is_dead(tmp_path: Path, server: XenStore) -> None:
    async with running_chain(tmp_path, server=server) as chain:
        client = await chain.powered_on()
        assert isinstance(chain.world, DaemonWorld)
        chain.world.daemon.stop()
        # The vTPM domain's ring just falls silent; the bridge's socket is closed.
        await wait_until(lambda: "XenStore" in chain.bridge.last_error)
        for _ in range(20):
            assert await client.code(GET_RANDOM) == 0
