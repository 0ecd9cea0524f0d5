"""`qemu-vtpm-bridge vtpm-image` that dies before any of its steps, and on full disks.

The image is a small one: what is tried here is how its files come to their names.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import gzip
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_vtpm_bridge.cli import main
from qemu_vtpm_bridge.cpio import Archive
from qemu_vtpm_bridge.image import build
from qemu_vtpm_bridge.image.kernel import Kernel
from qemu_vtpm_bridge.image.state_disk import make_state_disk
from tests.image.support import deaths, uuid_of, xen_kernel

pytestmark = [
    pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="e2fsprogs are not installed"),
    pytest.mark.timeout(180),
]


def small_build(kernel: Kernel, more_modules: tuple[str, ...] = ()) -> build.Image:
    """An initramfs that can be told from another kernel's."""
    del more_modules
    archive = Archive()
    archive.add_file("kernel", kernel.image.read_bytes())
    # It does not compress: there is a middle that a disk can be full in.
    archive.add_file("noise", random.Random(1).randbytes(100_000))
    return build.Image(archive, {})


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operator builds an image for one guest."""

    root: Path

    @property
    def directory(self) -> Path:
        return self.root / "image"

    @property
    def config(self) -> Path:
        return self.root / "guest.cfg"

    @property
    def disk(self) -> Path:
        return self.root / "guest.img"

    def words(self, *more: str) -> list[str]:
        kernel = next((self.root / "kernel/boot").iterdir())
        modules = next((self.root / "kernel/lib/modules").iterdir())
        return [
            *("vtpm-image", str(self.directory), "--output", str(self.config)),
            *("--kernel", str(kernel), "--modules", str(modules)),
            *("--state-disk", str(self.disk), *more),
        ]

    def make(self) -> list[str]:
        return self.words("--make-state", "--state-size-mib", "16")

    def new_kernel(self, content: bytes) -> None:
        next((self.root / "kernel/boot").iterdir()).write_bytes(content)

    def pair(self) -> tuple[bytes, bytes]:
        """The kernel that is there, and the one that the initramfs is for."""
        packed = gzip.decompress((self.directory / "initramfs.gz").read_bytes())
        found = re.search(rb"kernel [a-z]+", packed)
        assert found is not None
        return (self.directory / "vmlinuz").read_bytes(), found[0]

    def left(self) -> list[str]:
        """What is there beside what was asked for."""
        known = {self.directory, self.config, self.disk, self.root / "kernel", self.root / "tmp"}
        paths = {*self.root.iterdir(), *self.directory.glob("*.part")}
        return sorted(str(path) for path in paths - known)


def furnished(root: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Make a kernel's files; what is temporary goes below `root` too."""
    monkeypatch.setattr(build, "build", small_build)
    (root / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
    xen_kernel(root / "kernel")
    place = Place(root)
    place.new_kernel(b"kernel old")
    return place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return furnished(tmp_path, monkeypatch)


def whole(place: Place) -> bool:
    """Whether the disk is there; it is whole then, and the xl.cfg's."""
    if not place.disk.exists():
        return False
    subprocess.run(["e2fsck", "-fn", place.disk], check=True, capture_output=True)
    assert f"vtpm.disk=UUID={uuid_of(place.disk)}" in place.config.read_text(encoding="utf-8")
    assert place.disk.stat().st_mode & 0o777 == 0o600
    return True


# Crashes.


def test_a_run_that_was_killed_can_be_run_again(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make = functools.partial(main, place.make())
    place.config.write_text("what was there before", encoding="ascii")
    for step in deaths(make, 20):
        if whole(place):
            # It died with everything done: only a disk that may hold a TPM is refused.
            uuid = uuid_of(place.disk)
            assert make() == 2
            assert f"--state-uuid {uuid}" in capsys.readouterr().err
            assert main(place.words("--state-uuid", uuid)) == 0
        else:
            assert make() == 0, (step, capsys.readouterr().err)
        assert whole(place)
        assert place.left() == []
        place.disk.unlink()
        place.config.write_text("what was there before", encoding="ascii")


def test_a_killed_run_leaves_the_old_image_or_the_new_one(place: Place) -> None:
    build_it = functools.partial(main, place.words("--state-uuid", "1234"))
    assert build_it() == 0
    place.new_kernel(b"kernel new")
    seen = []
    for _ in deaths(build_it, 10):
        seen.append(place.pair())
        place.new_kernel(b"kernel old")
        assert build_it() == 0
        assert place.pair() == (b"kernel old", b"kernel old")
        assert place.left() == []
        place.new_kernel(b"kernel new")
    # Nothing lies between the two new names: the guide says what a domain does there.
    assert seen.count((b"kernel new", b"kernel old")) == 1
    assert (b"kernel old", b"kernel new") not in seen
    assert seen[-1] == (b"kernel new", b"kernel new")


# Runs.


def test_the_same_directory_twice(place: Place) -> None:
    assert main(place.make()) == 0
    first = place.config.read_bytes()
    uuid = uuid_of(place.disk)
    place.new_kernel(b"kernel new")
    assert main(place.words("--state-uuid", uuid)) == 0
    assert place.pair() == (b"kernel new", b"kernel new")
    assert place.config.read_bytes() == first
    assert place.left() == []


def test_a_disk_that_is_there_is_refused_before_anything_is_replaced(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(place.make()) == 0
    uuid = uuid_of(place.disk)
    place.new_kernel(b"kernel new")
    place.config.write_text("kept", encoding="ascii")
    assert main(place.make()) == 2
    said = capsys.readouterr().err
    assert "is there already; state: it may hold a TPM" in said
    assert f"leave out --make-state and give --state-uuid {uuid}" in said
    assert place.pair() == (b"kernel old", b"kernel old")
    assert place.config.read_text(encoding="ascii") == "kept"


def test_another_run_that_is_alive_is_left_alone(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(place.words()) == 0
    for path in (place.directory / "vmlinuz", place.config, place.disk):
        part = path.with_name(f"{path.name}.part")
        with part.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert main(place.make()) == 2
            assert f"another vtpm-image writes {path}" in capsys.readouterr().err
            assert place.left() == [str(part)]
            assert not place.disk.exists()
    assert main(place.make()) == 0
    assert place.left() == []


@pytest.mark.parametrize("name", ["image/vmlinuz", "image/initramfs.gz", "guest.cfg"])
def test_a_name_that_is_no_files_is_refused_before_anything_is_replaced(
    place: Place, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (place.root / name).mkdir(parents=True)
    assert main(place.make()) == 2
    assert f"{name} is there and is no file" in capsys.readouterr().err
    assert not [path for path in place.directory.iterdir() if path.is_file()]
    assert not place.disk.exists()
    assert place.left() == []


def test_two_files_under_one_name_are_refused(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (place.disk, place.directory / "../image/vmlinuz"):
        assert main([*place.make(), "--output", str(path)]) == 2
        assert "two files would be" in capsys.readouterr().err
    assert not place.directory.exists()


# Full disks.

SMALL_COMMAND = """
import resource, sys
from qemu_vtpm_bridge.cli import main
from qemu_vtpm_bridge.image import build
from tests.image.test_whole import small_build
build.build = small_build
# After the imports, which may write too.
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(sys.argv[1:]))
"""
ROOT = Path(__file__).parents[2]


def ran(place: Place, words: list[str], *, limit_bytes: int = -1, **streams: Any) -> Any:
    """Run the command as another process, in which no file gets greater than the limit."""
    script = SMALL_COMMAND.format(limit=limit_bytes)
    return subprocess.run(
        [sys.executable, "-B", "-c", script, *words],
        check=False,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(place.root / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
        **streams,
    )


@pytest.mark.parametrize("size_bytes", [4, 4096, 1 << 20])
def test_a_file_without_room_is_said_and_everything_is_as_it_was(
    place: Place, size_bytes: int
) -> None:
    """The kernel has none, the initramfs, the state disk."""
    assert main(place.words("--state-uuid", "1234")) == 0
    before = place.config.read_bytes()
    place.new_kernel(b"kernel new")
    done = ran(place, place.make(), limit_bytes=size_bytes)
    assert done.returncode == 2
    assert "File too large; state: " in done.stderr
    assert "Traceback" not in done.stderr
    assert place.pair() == (b"kernel old", b"kernel old")
    assert place.config.read_bytes() == before
    assert not place.disk.exists()
    assert place.left() == []
    assert main(place.make()) == 0
    assert whole(place)


def test_standard_output_that_is_full_makes_no_disk(place: Place) -> None:
    """The xl.cfg that would name it is lost."""
    words = [word for word in place.make() if word not in ("--output", str(place.config))]
    with Path("/dev/full").open("wb") as full:
        done = ran(place, words, stdout=full)
    assert done.returncode == 2
    assert "standard output: No space left on device" in done.stderr
    assert "no state disk was made" in done.stderr
    assert "Traceback" not in done.stderr
    assert not place.disk.exists()
    assert place.left() == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), subprocess.CalledProcessError(1, "strip")],
)
def test_a_build_that_fails_is_said_and_nothing_is_replaced(
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fails(*_: object) -> None:
        raise error

    assert main(place.words()) == 0
    before = place.config.read_bytes()
    monkeypatch.setattr(build, "build", fails)
    assert main(place.make()) == 2
    said = capsys.readouterr().err
    assert f"the initramfs cannot be built: {error}; state: " in said
    assert place.config.read_bytes() == before
    assert not place.disk.exists()


ON_A_SMALL_FILE_SYSTEM = """
mount -t tmpfs -o size={size_kib}k none {root}
exec {python} -B -c 'from tests.image import test_whole as t; t.fill_and_mend("{root}", {room_kib})'
"""


def fill_and_mend(root: str, room_kib: int) -> None:
    """Run in a small file system with so much room, and then with all of it."""
    with pytest.MonkeyPatch.context() as patch:
        place = furnished(Path(root), patch)
        assert main(place.words("--state-uuid", "1234")) == 0
        before = place.config.read_bytes()
        place.new_kernel(b"kernel new")
        filler = place.root / "tmp/filler"
        room = os.statvfs(root)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - (room_kib << 10))
        assert main(place.make()) == 2
        assert place.pair() == (b"kernel old", b"kernel old")
        assert place.config.read_bytes() == before
        assert not place.disk.exists()
        assert place.left() == []
        filler.unlink()
        assert main(place.make()) == 0
        assert whole(place)
        assert place.pair() == (b"kernel new", b"kernel new")


@pytest.mark.parametrize("room_kib", [0, 40, 200])
def test_a_full_file_system_is_said_and_the_next_run_is_whole(
    tmp_path: Path, room_kib: int
) -> None:
    """There is room for nothing, for the kernel, for all but the state disk."""
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets this user make no mount namespace")
    script = ON_A_SMALL_FILE_SYSTEM.format(
        size_kib=32 << 10, root=tmp_path, python=sys.executable, room_kib=room_kib
    )
    done = subprocess.run(
        [*unshare, "sh", "-ec", script], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("next: ") == 1
    assert "No space left on device" in done.stderr or "mkfs.ext4 failed" in done.stderr


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSPC])
def test_a_disk_where_a_file_has_one_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """No hard links, as on vfat, or no room for another name; the xl.cfg names the disk by now."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "state.img"
    identity = make_state_disk(path, 32)
    assert list(tmp_path.iterdir()) == [path]
    assert uuid_of(path) == identity
