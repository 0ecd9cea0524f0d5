"""A Linux guest drives the TPM through its stock tpm_tis driver and a vfio-user PCI function.

QEMU has no TPM of its own here; everything between the guest and swtpm are this project's
commands, each in a process of its own.  The guest's whole boot log is kept in
`build/vfio-guest/console.log`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.demo.chain import VTPM_NAME, Chain, running_chain
from qemu_vtpm_bridge.demo.guest import (
    MARKED_PCR,
    Boot,
    build_initramfs,
    find_kernel,
    read_boots,
)
from qemu_vtpm_bridge.errors import ConfigError
from tests.support import qemu11
from tests.support.wait import wait_until

LOGS = Path("build/vfio-guest").resolve()
# Where `make demo` keeps it, so that it is downloaded once.
KERNEL = Path("build/demo").resolve()
TABLES = Path("packaging/acpi")
BOOT_DEADLINE_S = 300.0
ZEROS = "0" * 64


def compiled_tables() -> list[Path]:
    """Compile the ACPI tables; return where they are."""
    if not shutil.which("iasl"):
        pytest.skip("iasl is missing: install acpica-tools")
    tables = []
    for source in sorted(TABLES.glob("*.asl")):
        stem = LOGS / source.stem
        subprocess.run(["iasl", "-p", str(stem), str(source)], check=True, capture_output=True)
        tables.append(stem.with_suffix(".aml"))
    return tables


@asynccontextmanager
async def qemu(socket_path: Path, kernel: Path, initramfs: Path) -> AsyncIterator[trio.Process]:
    """Run the newer QEMU with a guest whose only TPM is behind the socket."""
    device = {
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": str(socket_path)},
        "addr": "4",
    }
    words = [
        *qemu11.command(),
        *("-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "max", "-smp", "1"),
        *("-object", "memory-backend-memfd,id=ram,size=256M,share=on", "-m", "256"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"),
        *("-kernel", str(kernel), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1"),
        *("-serial", f"file:{LOGS / 'console.log'}"),
        *("-qmp", f"unix:{socket_path.with_name('qmp.sock')},server=on,wait=off"),
        *("-device", json.dumps(device)),
    ]
    for table in compiled_tables():
        words += ["-acpitable", f"file={table}"]
    (LOGS / "console.log").unlink(missing_ok=True)
    with (LOGS / "qemu.log").open("wb") as log:
        process = await trio.lowlevel.open_process(words, stdin=subprocess.DEVNULL, stderr=log)
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()


def console() -> str:
    """Return what the guest has said."""
    path = LOGS / "console.log"
    return path.read_text("utf-8", "replace") if path.exists() else ""


async def booted(process: trio.Process, number: int) -> Boot:
    """Return what the guest found in a boot, once that has come to its end."""

    def ended() -> bool:
        assert process.poll() is None, (LOGS / "qemu.log").read_text()
        boots = read_boots(console())
        return len(boots) > number and boots[number].ended

    await wait_until(ended, BOOT_DEADLINE_S)
    return read_boots(console())[number]


async def reset_machine(qmp_path: Path) -> None:
    """Have QEMU reset the guest."""
    async with await trio.open_unix_socket(str(qmp_path)) as qmp:
        for command in ("qmp_capabilities", "system_reset"):
            await qmp.send_all(json.dumps({"execute": command}).encode() + b"\n")
        said = b""
        with trio.fail_after(60):
            while b'"RESET"' not in said:
                chunk = await qmp.receive_some()
                assert chunk, "QEMU is gone"
                said += chunk


async def start_everything(chain: Chain, socket_path: Path) -> None:
    """Start the embedded Xen, the vTPM domain and the register devices."""
    await chain.start_xen()
    await chain.attach()
    await chain.start_vtpm()
    await chain.start(
        "device",
        *("device", "--embedded", str(chain.world), "--backend", VTPM_NAME),
        *("--socket", str(socket_path), "--registers", "tis"),
        ready=socket_path,
    )


@pytest.mark.timeout(2 * BOOT_DEADLINE_S + 120)
async def test_P7_linux_drives_the_tpm_through_its_stock_driver_over_a_reset(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for directory in (LOGS, KERNEL):
        directory.mkdir(parents=True, exist_ok=True)
    with capsys.disabled():
        print("\nvfio-user guest: fetching QEMU 11 and a kernel, unless they are there", flush=True)
    try:
        await trio.to_thread.run_sync(qemu11.command)
        kernel = await trio.to_thread.run_sync(find_kernel, KERNEL)
        initramfs = build_initramfs(LOGS)
    except (qemu11.UnavailableError, ConfigError) as error:
        pytest.skip(str(error))
    with capsys.disabled():
        print("vfio-user guest: booting it twice", flush=True)
    with tempfile.TemporaryDirectory(prefix="qvb") as directory:
        place = Path(directory)
        socket_path = place / "vfio.sock"
        async with running_chain(place, LOGS) as chain:
            await start_everything(chain, socket_path)
            async with qemu(socket_path, kernel, initramfs) as process:
                first = await booted(process, 0)
                await reset_machine(socket_path.with_name("qmp.sock"))
                second = await booted(process, 1)
    shown = [
        line.rstrip()
        for line in console().splitlines()
        if re.search(r"tpm|0000:00:04\.0|MSFT0101|^DEMO", line, re.IGNORECASE)
    ]
    with capsys.disabled():
        print("\nthe guest's log (whole: build/vfio-guest/console.log):")
        print("\n".join(f"    {line}" for line in shown))
    for boot in (first, second):
        assert boot.facts["driver"] == "tpm_tis"
        assert boot.facts["version"] == "2"
        assert boot.pcrs[0] == ZEROS, "nothing measures into PCR 0: SeaBIOS sees no TPM"
        assert boot.pcrs[MARKED_PCR] == ZEROS, "a machine's reset reset the TPM"
        assert re.fullmatch(r"80010000001c000000000010[0-9a-f]{32}", boot.facts["random"])
        assert boot.facts["extend"].startswith("8002000000")
        assert boot.facts["marked"] not in ("", ZEROS)
    assert first.facts["random"] != second.facts["random"]
