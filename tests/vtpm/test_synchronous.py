"""A state directory whose writes are on the disk before swtpm answers."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qemu_vtpm_bridge.vtpm import synchronous
from qemu_vtpm_bridge.vtpm.engine import SwtpmEngine
from qemu_vtpm_bridge.vtpm.ordinals import TpmFamily
from qemu_vtpm_bridge.vtpm.synchronous import FS_DIRSYNC_FL, FS_SYNC_FL, make_synchronous
from tests.support.vtpm import place
from tests.support.wait import wait_until

BOTH = FS_SYNC_FL | FS_DIRSYNC_FL


def attributes(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return synchronous.attributes(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A directory on a file system that has synchronous directories."""
    probe = tmp_path / "probe"
    probe.mkdir()
    if not make_synchronous(probe):
        pytest.skip(f"the file system of {tmp_path} has no synchronous directories")
    return tmp_path


def test_what_is_made_in_the_directory_is_synchronous_too(on_disk: Path) -> None:
    state = on_disk / "state"
    state.mkdir()
    assert attributes(state) & BOTH == 0
    assert make_synchronous(state)
    assert make_synchronous(state)
    assert attributes(state) & BOTH == BOTH
    (state / "aside").write_bytes(b"state")
    (state / "aside").rename(state / "tpm")
    assert attributes(state / "tpm") & FS_SYNC_FL


@pytest.mark.skipif(shutil.which("lsattr") is None, reason="e2fsprogs are not installed")
def test_lsattr_sees_the_same(on_disk: Path) -> None:
    assert make_synchronous(on_disk)
    done = subprocess.run(["lsattr", "-d", on_disk], check=True, capture_output=True, text=True)
    assert {"S", "D"} <= set(done.stdout.split()[0])


@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
@pytest.mark.parametrize("family", list(TpmFamily))
async def test_swtpm_writes_its_state_synchronously(on_disk: Path, family: TpmFamily) -> None:
    engine = SwtpmEngine(on_disk / "state", family)
    try:
        await engine.open()
        await engine.enter_life([])
        await engine.start()
        (permanent,) = (on_disk / "state").glob("*.permall")
        assert attributes(permanent) & FS_SYNC_FL
    finally:
        await engine.close()


@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
async def test_a_file_system_without_is_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, request: int, argument: bytes) -> bytes:
        raise OSError(errno.ENOTTY, "no such attribute")

    monkeypatch.setattr("qemu_vtpm_bridge.vtpm.synchronous.fcntl.ioctl", refuse)
    engine = SwtpmEngine(tmp_path / "state", TpmFamily.TPM_2_0)
    try:
        with caplog.at_level(logging.INFO):
            await engine.open()
    finally:
        await engine.close()
    assert "may lose" in caplog.text


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_synchronous(tmp_path / "none")


def test_a_disk_that_fails_is_not_taken_for_one_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, request: int, argument: bytes) -> bytes:
        raise OSError(errno.EIO, "disk error")

    monkeypatch.setattr("qemu_vtpm_bridge.vtpm.synchronous.fcntl.ioctl", fail)
    with pytest.raises(OSError, match="disk error"):
        make_synchronous(tmp_path)


@pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed")
async def test_the_program_sees_to_it_before_it_is_confined(on_disk: Path) -> None:
    async with place(on_disk) as there:
        there.state_dir.mkdir()
        async with there.process("--confine", "auto"):
            permanent = there.state_dir / "tpm2-00.permall"
            await wait_until(permanent.exists)
            assert attributes(permanent) & FS_SYNC_FL
            assert attributes(there.state_dir) & BOTH == BOTH
