"""What a bridge may ask of XenStore through its broker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyxs._internal import Op

from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack.attach import attach, remove_stale_frontend
from qemu_vtpm_bridge.xen.relay import Relay
from qemu_vtpm_bridge.xen.router import OP_DIRECTORY_PART
from qemu_vtpm_bridge.xen.store import open_store
from qemu_vtpm_bridge.xen.store_policy import StorePolicy
from qemu_vtpm_bridge.xen.xenbus import DevicePaths, PathMode, device_paths
from tests.support.world import running_world, store_socket

FRONTEND = "/local/domain/0/frontend/vtpm/2/0"
BACKEND = "/local/domain/2/backend/vtpm/0/0"
READS = (Op.READ, Op.DIRECTORY, Op.GET_PERMS, OP_DIRECTORY_PART)
WRITES = (Op.WRITE, Op.MKDIR, Op.RM, Op.SET_PERMS)
REST = {
    Op.WRITE: b"value",
    Op.SET_PERMS: b"n0\0r2\0",
    Op.WATCH: b"1\0",
    Op.UNWATCH: b"1\0",
    OP_DIRECTORY_PART: b"0\0",
}
"""By type, what stands behind a path."""


def paths_for(domid: int) -> DevicePaths:
    return device_paths(PathMode.SEED, backend_domid=domid, handle=0)


@dataclass
class Domains:
    """Names that a test changes."""

    names: dict[int, bytes] = field(
        default_factory=lambda: {0: b"Domain-0", 2: b"vtpm", 3: b"guest", 4: b"other"}
    )

    vms: dict[int, bytes] = field(default_factory=lambda: {2: b"/vm/ours", 7: b"/vm/ours"})

    def policy(
        self,
        *,
        mode: PathMode = PathMode.SEED,
        explicit: str | None = None,
        backend_name: str | None = "vtpm",
        **more: object,
    ) -> StorePolicy:
        def paths(domid: int) -> DevicePaths:
            return device_paths(mode, backend_domid=domid, handle=0, explicit=explicit)

        return StorePolicy(
            paths_for=paths,
            name_of=self.names.get,
            vm_of=self.vms.get,
            backend_domid=2,
            backend_name=backend_name,
            **more,  # type: ignore[arg-type]
        )


def allowed(policy: StorePolicy, op: int, path: str) -> bool:
    return policy.permits(op, path.encode() + b"\0" + REST.get(op, b""))


@pytest.mark.parametrize(
    "path",
    [
        "domid",
        "/local/domain",
        "/local/domain/0/name",
        "/local/domain/4/name",
        "/local/domain/2/domid",
        "/local/domain/2/vm",
        "/local/domain/2/backend/vtpm",
        f"{BACKEND}/state",
        FRONTEND,
        f"{FRONTEND}/backend",
        "/local/domain/0/frontend/vtpm",
    ],
)
def test_what_every_bridge_reads_and_writes_not(path: str) -> None:
    policy = Domains().policy()
    assert all(allowed(policy, op, path) for op in READS)
    assert not any(allowed(policy, op, path) for op in WRITES)


@pytest.mark.parametrize(
    "key", ["state", "ring-ref", "event-channel", "feature-protocol-v2", "reset-request"]
)
def test_what_every_frontend_writes(key: str) -> None:
    policy = Domains().policy()
    assert all(allowed(policy, op, f"{FRONTEND}/{key}") for op in (*READS, *WRITES))
    for path in (f"{FRONTEND}/{key}/{key}", f"{FRONTEND}/{key}2", f"{FRONTEND}/backend", FRONTEND):
        assert not any(allowed(policy, op, path) for op in WRITES), path


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/tool",
        "/vm",
        "/local/domain/0",
        "/local/domain/0/backend/vfb/3/0/vncpasswd",
        "/local/domain/0/device-model/3/state",
        "/local/domain/3",
        "/local/domain/3/console/tty",
        "/local/domain/3/qemu-vtpm-bridge/ioreq-server",
        "/local/domain/3/platform/tpm_version",
        "/local/domain/02/name",
        "/local/domain/2/name/x",
        "/local/domain/99999/backendx",
        f"{FRONTEND}0/state",
        "/local/domain/0/frontend/vtpm/4/0/state",
        f"{FRONTEND}//state",
        "local/domain/2/name",
        "",
        "@introduceDomain",
    ],
)
def test_what_no_bridge_behind_qemu_reads_or_writes(path: str) -> None:
    policy = Domains().policy()
    refused = [op for op in (*READS, *WRITES) if not allowed(policy, op, path)]
    assert refused == [*READS, *WRITES]


def test_requests_of_other_kinds() -> None:
    policy = Domains().policy(writes_entries=True, guest="guest")
    known = (*READS, *WRITES, Op.WATCH, Op.UNWATCH)
    for op in {*range(32), 128} - {*known, Op.TRANSACTION_START, Op.TRANSACTION_END}:
        assert not allowed(policy, op, FRONTEND), op
        assert not allowed(policy, op, "3"), op
    assert policy.permits(Op.TRANSACTION_START, b"\0")
    assert policy.permits(Op.TRANSACTION_END, b"T\0")
    assert not policy.permits(Op.READ, FRONTEND.encode())  # no end
    assert not policy.permits(Op.WRITE, b"")


@pytest.mark.parametrize(
    ("op", "rests"),
    [
        *(
            (op, [b"\0", b"value", b"1\0", b"1\0\0"])
            for op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS)
        ),
        *((op, [b"\0", b"value", b"1\0"]) for op in (Op.MKDIR, Op.RM)),
        (OP_DIRECTORY_PART, [b"", b"0", b"x\0", b"0\0\0", b"-1\0", b"1" * 11 + b"\0"]),
        (Op.SET_PERMS, [b"", b"n0", b"0\0", b"x0\0", b"n\0", b"n0\0\0", b"n0\0" * 9, b"n-1\0"]),
        *(
            (op, [b"", b"1", b"\0", b"1\0\0", b"1\0002\0", b"1" * 65 + b"\0", b"\n\0"])
            for op in (Op.WATCH, Op.UNWATCH)
        ),
    ],
)
def test_P9_only_what_has_its_form_goes_on(op: int, rests: list[bytes]) -> None:
    policy = Domains().policy(writes_entries=True)
    place = f"{FRONTEND}/state"
    assert allowed(policy, op, place)
    for rest in rests:
        assert not policy.permits(op, place.encode() + b"\0" + rest), rest


def test_P9_transactions_have_their_form_too() -> None:
    policy = Domains().policy()
    for op, payloads in (
        (Op.TRANSACTION_START, [b"", b"\0\0", b"T\0"]),
        (Op.TRANSACTION_END, [b"", b"\0", b"T", b"X\0", b"T\0\0"]),
    ):
        assert not any(policy.permits(op, payload) for payload in payloads)


def test_P9_a_path_is_no_longer_than_xenstored_takes() -> None:
    policy = Domains().policy()
    assert allowed(policy, Op.READ, f"{FRONTEND}/{'x' * 1000}")
    assert not allowed(policy, Op.READ, f"{FRONTEND}/{'x' * 2048}")


def test_watches() -> None:
    policy = Domains().policy()
    for path in (
        *("@introduceDomain", "@releaseDomain", FRONTEND, BACKEND),
        *(f"{FRONTEND}/state", f"{BACKEND}/state", "/local/domain/4/name"),
    ):
        assert allowed(policy, Op.WATCH, path), path
        assert allowed(policy, Op.UNWATCH, path), path
    for path in (
        *("/", "/local", "@other", "/local/domain/3/data"),
        # What may be read there is less than a watch tells.
        *("/local/domain", "/local/domain/0/frontend", "/local/domain/0/frontend/vtpm"),
        *("/local/domain/2/backend/vtpm", "/local/domain/4/backend/vtpm/0/0"),
    ):
        assert not allowed(policy, Op.WATCH, path), path


def test_only_with_attach_the_backends_entries_are_written() -> None:
    assert not any(allowed(Domains().policy(), op, f"{BACKEND}/frontend") for op in WRITES)
    policy = Domains().policy(writes_entries=True)
    assert all(allowed(policy, op, f"{BACKEND}/frontend") for op in WRITES)
    assert all(allowed(policy, op, BACKEND) for op in WRITES)
    for path in (
        f"{FRONTEND}/anything",
        f"{BACKEND}/anything",
        f"{BACKEND}/frontend/x",
        "/local/domain/2/backend/vtpm/0",
        "/local/domain/2/backend/vtpm/0/1/state",
        "/local/domain/2/backend/vbd/0/0/state",
        "/local/domain/4/backend/vtpm/0/0/state",
    ):
        assert not any(allowed(policy, op, path) for op in WRITES), path


def test_a_vtpm_domain_is_followed_by_its_name() -> None:
    domains = Domains()
    policy = domains.policy(writes_entries=True)
    new = paths_for(7)
    assert not allowed(policy, Op.WRITE, f"{new.frontend}/state")
    assert not allowed(policy, Op.WRITE, f"{new.backend}/state")
    domains.names[7] = domains.names.pop(2)
    assert allowed(policy, Op.WRITE, f"{new.frontend}/state")
    assert allowed(policy, Op.WRITE, f"{new.backend}/state")
    # The old directory of our own goes.
    assert allowed(policy, Op.RM, FRONTEND)
    assert allowed(policy, Op.RM, "/local/domain/0/frontend/vtpm/2")
    assert not allowed(policy, Op.WRITE, f"{BACKEND}/state")
    # Others' devices are below these.
    assert not allowed(policy, Op.RM, "/local/domain/0/frontend/vtpm")
    assert not allowed(policy, Op.RM, "/local/domain/0/frontend")


def test_an_id_that_was_the_vtpm_domains_may_be_anothers() -> None:
    domains = Domains()
    policy = domains.policy(writes_entries=True)
    ours = [(Op.WRITE, f"{FRONTEND}/state"), (Op.RM, FRONTEND), (Op.RM, FRONTEND[:-2])]
    assert all(allowed(policy, op, path) for op, path in ours)
    domains.names[2], domains.vms[2] = b"another guest's vtpm", b"/vm/other"
    assert not any(allowed(policy, op, path) for op, path in ours)
    domains.vms.pop(2)
    assert not any(allowed(policy, op, path) for op, path in ours)


def test_a_vtpm_domain_that_gets_another_name_stays_ours() -> None:
    domains = Domains()
    policy = domains.policy(writes_entries=True)
    domains.names[2] = b"renamed"
    assert allowed(policy, Op.WRITE, f"{FRONTEND}/state")


def test_no_path_makes_a_domains_directory_ours() -> None:
    policy = Domains().policy(
        mode=PathMode.EXPLICIT, explicit="/local/domain/2/vtpm", writes_entries=True
    )
    assert allowed(policy, Op.RM, "/local/domain/2/vtpm")
    assert not allowed(policy, Op.RM, "/local/domain/2")


def test_a_vtpm_domain_that_was_given_by_its_id_is_that_one_only() -> None:
    policy = Domains().policy(backend_name=None, writes_entries=True)
    assert allowed(policy, Op.WRITE, f"{BACKEND}/state")
    assert not allowed(policy, Op.WRITE, f"{paths_for(4).backend}/state")
    assert not allowed(policy, Op.WRITE, f"{paths_for(4).frontend}/state")


def test_a_stub_domains_bridge_goes_where_its_entries_say() -> None:
    def paths(domid: int) -> DevicePaths:
        return device_paths(PathMode.DEVICE, backend_domid=domid, handle=0, frontend_domid=5)

    policy = StorePolicy(paths, lambda _: None, 2, follows_entries=True)
    assert allowed(policy, Op.WATCH, "/local/domain/9/backend/vtpm/5/0")
    assert allowed(policy, Op.WRITE, "/local/domain/5/device/vtpm/0/state")
    assert not allowed(policy, Op.WATCH, "/local/domain/9/backend/vtpm/6/0")
    assert not allowed(policy, Op.WRITE, "/local/domain/9/backend/vtpm/5/0/state")
    assert not allowed(policy, Op.WRITE, "/local/domain/6/device/vtpm/0/state")
    told = StorePolicy(paths, lambda _: None, 2)
    assert not allowed(told, Op.WATCH, "/local/domain/9/backend/vtpm/5/0")


def test_path_modes_without_the_vtpm_domains_id() -> None:
    for mode, frontend in (
        (PathMode.DEVICE, "/local/domain/0/device/vtpm/0"),
        (PathMode.ZEROS, "/local/domain/00/device/vtpm/0"),
    ):
        policy = Domains().policy(mode=mode)
        assert allowed(policy, Op.WRITE, f"{frontend}/state")
        assert not allowed(policy, Op.WRITE, frontend[:-1] + "1/state")
        assert not allowed(policy, Op.RM, frontend[:-2])
        for path in (frontend, f"{frontend}/backend"):
            assert allowed(policy, Op.READ, path)
            assert allowed(policy, Op.WATCH, path)


def test_a_path_of_the_operators_own() -> None:
    policy = Domains().policy(mode=PathMode.EXPLICIT, explicit="/tpms/of/2")
    for path in ("/tpms/of/2", "/tpms/of/2/backend"):
        assert allowed(policy, Op.READ, path)
        assert allowed(policy, Op.WATCH, path)
    assert allowed(policy, Op.WRITE, "/tpms/of/2/state")
    for path in ("/tpms", "/tpms/of", "/tpms/of/3/state"):
        assert not any(allowed(policy, op, path) for op in (*READS, *WRITES)), path


def test_a_guests_device_has_the_guests_entries() -> None:
    domains = Domains()
    policy = domains.policy(guest="guest")
    notes = ("qemu-vtpm-bridge/powered", "qemu-vtpm-bridge/ioreq-server")
    ours = ("qemu-vtpm-bridge", *notes, "platform/tpm_version")
    for entry in ours:
        assert all(allowed(policy, op, f"/local/domain/3/{entry}") for op in (*READS, *WRITES))
        assert not any(allowed(policy, op, f"/local/domain/4/{entry}") for op in (*READS, *WRITES))
    for entry in (
        "platform",
        "name",
        "qemu-vtpm-bridges",
        "qemu-vtpm-bridge/x",
        "platform/acpi",
        "data",
    ):
        assert not allowed(policy, Op.WRITE, f"/local/domain/3/{entry}")
    assert policy.is_guest(3)
    assert not policy.is_guest(4)
    assert not policy.is_guest(9)
    domains.names[9] = b"guest"  # the next boot
    assert policy.is_guest(9)
    assert not Domains().policy().is_guest(3)


PARTS = """
    local domain 0 2 3 4 7 00 name frontend backend vtpm device platform tpm_version
    qemu-vtpm-bridge state . .. vm tool
"""
WORDS = st.sampled_from(PARTS.split())


@given(st.lists(WORDS, max_size=9), st.sampled_from(WRITES))
def test_P9_nothing_but_our_own_is_written(words: list[str], op: int) -> None:
    path = "/" + "/".join(words)
    policy = Domains().policy(writes_entries=True, guest="guest")
    if allowed(policy, op, path):
        ours = (FRONTEND, BACKEND, "/local/domain/3/qemu-vtpm-bridge")
        assert (
            any(f"{path}/".startswith(f"{tree}/") for tree in ours)
            or path == "/local/domain/3/platform/tpm_version"
            or (op == Op.RM and path == "/local/domain/0/frontend/vtpm/2")
        )


@given(st.integers(0, 40), st.binary(max_size=200))
def test_P9_any_bytes_are_judged(op: int, payload: bytes) -> None:
    policy = Domains().policy(writes_entries=True, guest="guest")
    assert policy.permits(op, payload) in (True, False)
    assert Relay(policy.permits).from_bridge(payload[:15]) == b""


async def test_what_attach_asks_is_permitted(tmp_path: Path) -> None:
    """attach and the removal of stale entries, their requests held against the policy."""
    asked: list[tuple[int, bytes]] = []
    async with running_world(tmp_path) as world:
        for domid in (2, 7):
            await world.create_domain(domid, "vtpm")
        async with open_store(store_socket(world)) as store:
            original = store._client.router.send

            def send(packet: object) -> object:
                op, _, _, _, payload = packet  # type: ignore[misc]
                asked.append((op, bytes(payload)))
                return original(packet)

            store._client.router.send = send
            await attach(store, paths_for(2))
            await attach(store, paths_for(7))
            with pytest.raises(ConfigError):
                await attach(store, paths_for(9))
            domains = Domains()
            policy = domains.policy(writes_entries=True)
            assert len(asked) > 50
            for op, payload in asked:
                if b"/9/" not in payload:
                    domains.names[7] = b"vtpm"
                    assert policy.permits(op, payload), (op, payload)
            asked.clear()
            await world.destroy_domain(2)
            await remove_stale_frontend(store, paths_for(2))
            domains.names.pop(2)
            assert (Op.RM, f"{FRONTEND}\0".encode()) in asked
            for op, payload in asked:
                assert policy.permits(op, payload), (op, payload)
