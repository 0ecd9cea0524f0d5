"""The state disk, and the download of Debian's kernel, that die before any of their steps."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.image import kernel, state_disk
from qemu_vtpm_bridge.image.state_disk import make_state_disk
from tests.image.support import deaths, uuid_of, xen_kernel

pytestmark = pytest.mark.timeout(180)

needs_e2fsprogs = pytest.mark.skipif(
    shutil.which("mkfs.ext4") is None, reason="e2fsprogs are not installed"
)


# The state disk.


@needs_e2fsprogs
def test_a_disk_that_was_being_made_can_be_made(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    disk = tmp_path / "state.img"

    def make() -> int:
        make_state_disk(disk, 16)
        return 0

    for _ in deaths(make, 10):
        if disk.exists():
            with pytest.raises(ConfigError, match="is there already"):
                make()
            uuid_of(disk)
        else:
            make()
        assert [path.name for path in tmp_path.iterdir()] == ["state.img"]
        disk.unlink()


@needs_e2fsprogs
def test_what_a_killed_run_left_is_never_written_to(tmp_path: Path) -> None:
    """Killed before it took the passing name away, a run leaves a TPM's disk with two."""
    moved = tmp_path / "moved.img"
    moved.write_bytes(b"a TPM")
    os.link(moved, tmp_path / "state.img.part")
    make_state_disk(tmp_path / "state.img", 16)
    assert moved.read_bytes() == b"a TPM"
    assert {path.name for path in tmp_path.iterdir()} == {"moved.img", "state.img"}


def test_mkfs_that_outlives_its_run_is_not_written_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, disk = tmp_path / "held", tmp_path / "state.img"
    os.mkfifo(held)
    slow = tmp_path / "mkfs.ext4"
    slow.write_text(f"#!/bin/sh\ncat {held}\n", encoding="ascii")
    slow.chmod(0o755)
    monkeypatch.setattr(state_disk, "program_path", lambda name, package: slow)
    run = multiprocessing.get_context("fork").Process(target=make_state_disk, args=(disk, 16))
    run.start()
    with held.open("w"):
        assert run.pid is not None
        os.kill(run.pid, signal.SIGKILL)
        run.join()
        with pytest.raises(ConfigError, match=r"another vtpm-image writes .*state.img;.*again"):
            make_state_disk(disk, 16)
    with disk.with_name("state.img.part").open() as left:
        fcntl.flock(left, fcntl.LOCK_EX)
    slow.write_text("#!/bin/sh\n", encoding="ascii")
    make_state_disk(disk, 16)
    assert not list(tmp_path.glob("*.part"))


# Debian's kernel.


def test_a_download_that_was_killed_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloaded(private: Path, directory: Path) -> Path:
        del private
        package = directory / "linux-image.deb"
        package.touch()
        return package

    def run(words: list[str], directory: Path) -> str:
        del words
        xen_kernel(directory)
        return ""

    monkeypatch.setattr(kernel, "_downloaded", downloaded)
    monkeypatch.setattr(kernel, "_run", run)
    directory = tmp_path / "cache/of kernels"

    def find() -> int:
        return 0 if kernel.debian_kernel(directory).image.read_bytes() == b"kernel" else 1

    for _ in deaths(find, 10):
        assert find() == 0
        assert [path.name for path in directory.iterdir()] == ["kernel"]
        shutil.rmtree(directory)


def test_a_download_that_fails_leaves_no_part_of_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloaded(private: Path, directory: Path) -> Path:
        del private
        (directory / "half.deb").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kernel, "_downloaded", downloaded)
    with pytest.raises(ConfigError, match=r"No space left on device.*next: make room.*: df "):
        kernel.debian_kernel(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file: File exists"):
        kernel.debian_kernel(tmp_path / "file")
