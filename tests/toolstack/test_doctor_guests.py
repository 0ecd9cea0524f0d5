"""The doctor's check of what hvmloader is told of a guest's TPM."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qemu_vtpm_bridge.toolstack import doctor
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.toolstack.doctor_devices import check_devices
from qemu_vtpm_bridge.toolstack.doctor_host import Case, Host
from qemu_vtpm_bridge.toolstack.doctor_report import Verdict
from qemu_vtpm_bridge.toolstack.doctor_xenstore import check_guests
from qemu_vtpm_bridge.xen.store import Store, open_store
from qemu_vtpm_bridge.xen.xenbus import PathMode, device_paths
from tests.support.doctor import mend
from tests.support.world import running_world, store_socket

CRB = ["-chardev", "socket,id=c,path=/run/x/guest.sock", "-tpmdev", "emulator,id=t,chardev=c"]
CRB += ["-device", "tpm-crb,tpmdev=t"]
TIS = [*CRB[:-1], "tpm-tis,tpmdev=t"]
NONE = ["-m", "512", "-device", "rtl8139"]


@asynccontextmanager
async def hvm_guest(tmp_path: Path, words: list[str] | None) -> AsyncIterator[tuple[Case, Store]]:
    """An HVM guest, number 3, whose QEMU was started with these words."""
    async with running_world(tmp_path) as world:
        for domid, name in ((2, "vtpm"), (3, "guest"), (4, "pv")):
            await world.create_domain(domid, name)
        root = tmp_path / "root"
        async with open_store(store_socket(world)) as store:
            await store.write("/libxl/3/type", b"hvm")
            await store.write("/libxl/4/type", b"pv")
            case = Case(Host(root), embedded=world.directory, xen_version=(4, 18))
            if words is not None:
                (root / "proc/77").mkdir(parents=True)
                raw = "\0".join(["/usr/bin/qemu", "-xen-domid", "3", *words, ""]).encode()
                (root / "proc/77/cmdline").write_bytes(raw)
                await store.write("/local/domain/3/image/device-model-pid", b"77")
            yield case, store


async def test_a_stub_domain_has_to_be_joined(tmp_path: Path) -> None:
    async with hvm_guest(tmp_path, None) as (case, store):
        await store.write("/local/domain/3/platform/tpm_version", b"2")
        await store.write("/local/domain/3/image/device-model-domid", b"4")
        vm = (await store.read("/local/domain/3/vm")).decode()
        for number, word in enumerate(["-m", "512", *CRB], 1):
            await store.write(f"{vm}/image/dm-argv/{number:03d}", word.encode())
        (finding,) = await check_guests(case, store)
        assert finding.verdict is Verdict.PROBLEM
        assert "its QEMU is in stub domain 4, which has no vTPM domain" in finding.summary
        assert "qemu-vtpm-bridge-stub-domains" in str(finding.mend[0].command)
        paths = device_paths(PathMode.DEVICE, backend_domid=2, handle=0, frontend_domid=4)
        await attach(store, paths, trust_reset=True)
        await check_devices(case, store)
        (finding,) = await check_guests(case, store)
        assert (finding.verdict, finding.facts["stub-domid"]) == (Verdict.OK, 4)
        assert "tpm-crb, platform/tpm_version is 2" in finding.summary


@pytest.mark.parametrize(
    ("words", "version", "verdict", "says"),
    [
        (CRB, b"2", "ok", "tpm-crb, platform/tpm_version is 2"),
        (CRB, None, "problem", "tpm-crb, platform/tpm_version is not there"),
        (CRB, b"1", "problem", "tpm-crb, platform/tpm_version is 1"),
        (TIS, None, "ok", "tpm-tis, platform/tpm_version is not there"),
        (TIS, b"1", "ok", "tpm-tis, platform/tpm_version is 1"),
        (TIS, b"2", "problem", "tpm-tis, platform/tpm_version is 2"),
        (TIS, b"", "problem", "tpm-tis, platform/tpm_version is"),
        (TIS, b"\x1b[31m", "problem", "tpm-tis, platform/tpm_version is"),
    ],
)
async def test_what_hvmloader_is_told_goes_with_qemus_device(
    tmp_path: Path, words: list[str], version: bytes | None, verdict: str, says: str
) -> None:
    async with hvm_guest(tmp_path, words) as (case, store):
        if version is not None:
            await store.write("/local/domain/3/platform/tpm_version", version)
        (finding,) = await check_guests(case, store)
        document = finding.as_dict()
        assert document["verdict"] == verdict
        assert says in document["summary"]
        assert document["facts"]["qemu-socket"] == "/run/x/guest.sock"
        if verdict == "problem":
            await mend(document)
            (finding,) = await check_guests(case, store)
            assert finding.verdict is Verdict.OK


async def test_a_xen_whose_hvmloader_knows_no_crb(tmp_path: Path) -> None:
    async with hvm_guest(tmp_path, CRB) as (case, store):
        case.xen_version = (4, 17)
        await store.write("/local/domain/3/platform/tpm_version", b"2")
        (finding,) = await check_guests(case, store)
        assert finding.verdict is Verdict.WARNING
        assert "since Xen 4.18 only" in finding.summary


async def test_a_qemu_that_was_started_without_a_tpm(tmp_path: Path) -> None:
    async with hvm_guest(tmp_path, NONE) as (case, store):
        (finding,) = await check_guests(case, store)
        assert finding.verdict is Verdict.NOT_APPLICABLE  # no guest of ours
        case.guest = "guest"
        (finding,) = await check_guests(case, store)
        assert finding.verdict is Verdict.PROBLEM
        assert f"path={case.run_dir}/guest.sock" in finding.mend[0].line


@pytest.mark.parametrize(
    ("version", "verdict", "says"),
    [
        (None, Verdict.OK, "TPM 1.2 at TIS"),
        (b"2", Verdict.OK, "TPM 2.0 at CRB"),
        (b"0", Verdict.PROBLEM, "announces no TPM"),
    ],
)
async def test_a_guest_without_a_qemu_yet(
    tmp_path: Path, version: bytes | None, verdict: Verdict, says: str
) -> None:
    async with hvm_guest(tmp_path, None) as (case, store):
        await store.write("/local/domain/3/image/device-model-pid", b"-1; reboot")
        paths = device_paths(PathMode.SEED, backend_domid=2, handle=0)
        await attach(store, paths, guest="guest")
        if version is not None:
            await store.write("/local/domain/3/platform/tpm_version", version)
        await doctor.check_devices(case, store)
        (finding,) = await check_guests(case, store)
        assert (finding.verdict, says in finding.summary) == (verdict, True)
