"""Stock programs at a running bridge: swtpm_ioctl, and tpm2-tools over the TCP pair."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.bridge.chardev import Door
from qemu_vtpm_bridge.bridge.listen import open_listener
from qemu_vtpm_bridge.bridge.power import State as Power
from tests.support.chain import Chain, running_chain

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        shutil.which("swtpm_ioctl") is None or shutil.which("tpm2_getrandom") is None,
        reason="swtpm-tools or tpm2-tools is not installed",
    ),
]


async def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end."""
    with trio.fail_after(100):
        done = await trio.run_process(
            list(words), capture_stdout=True, capture_stderr=True, check=False
        )
    if check:
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done


async def ioctl(chain: Chain, *words: str, check: bool = True) -> str:
    done = await run("swtpm_ioctl", "--unix", str(chain.socket_path), *words, check=check)
    return (done.stdout + done.stderr).decode()


async def test_swtpm_ioctl_drives_the_control_channel(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        assert "0x3caf" in (await ioctl(chain, "-c")).lower()
        await ioctl(chain, "-i")
        assert chain.bridge.power.state is Power.ON
        assert "is not" in await ioctl(chain, "-e") or "0" in await ioctl(chain, "-e")
        await ioctl(chain, "-l", "2")
        await ioctl(chain, "-r", "3")
        await ioctl(chain, "-C")
        assert "4088" in await ioctl(chain, "-b", "0")
        await ioctl(chain, "--stop")
        assert chain.bridge.power.state is Power.OFF
        # What is not offered fails in the tool, and the door is still open.
        await ioctl(chain, "-v", check=False)
        await ioctl(chain, "-h", "data", check=False)
        assert "0x3caf" in (await ioctl(chain, "-c")).lower()
        await ioctl(chain, "-s")
        assert "0x3caf" in (await ioctl(chain, "-c")).lower()


async def test_swtpm_ioctl_before_init_is_told_that_the_tpm_has_no_power(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        done = await run("swtpm_ioctl", "--unix", str(chain.socket_path), "-e", check=False)
        assert done.returncode != 0


async def test_swtpm_ioctl_saves_no_state(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        await ioctl(chain, "-i")
        blob = tmp_path / "blob"
        said = await ioctl(chain, "--save", "permanent", str(blob), check=False)
        assert "0x9" in said
        assert not blob.exists() or not blob.read_bytes()


def free_port_pair() -> int:
    """Return a port that is free, and so is the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@asynccontextmanager
async def tcp_door(chain: Chain) -> AsyncIterator[str]:
    """Another door to the same bridge, on TCP; gives the TCTI's name for it."""
    port = free_port_pair()
    listener = open_listener(f"tcp={port}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Door(chain.bridge).serve, listener)
        yield f"swtpm:host=127.0.0.1,port={port}"
        nursery.cancel_scope.cancel()
    listener.close()


async def test_tpm2_tools_use_the_tpm_over_the_tcp_pair(tmp_path: Path) -> None:
    async with running_chain(tmp_path) as chain:
        await ioctl(chain, "-i")
        async with tcp_door(chain) as tcti:
            await run("tpm2_startup", "-T", tcti, "-c")
            random = await run("tpm2_getrandom", "-T", tcti, "--hex", "16")
            assert len(bytes.fromhex(random.stdout.decode())) == 16
            read = ("tpm2_pcrread", "-T", tcti, "sha256:16")
            before = (await run(*read)).stdout
            assert b"0x" + b"0" * 64 in before
            digest = "5a" * 32
            await run("tpm2_pcrextend", "-T", tcti, f"16:sha256={digest}")
            assert (await run(*read)).stdout != before
            with tempfile.TemporaryDirectory() as directory:
                context = str(Path(directory) / "primary")
                await run("tpm2_createprimary", "-T", tcti, "-G", "ecc", "-c", context)
        assert chain.bridge._carrier.pump.stats().errors == 0
