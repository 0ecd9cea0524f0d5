"""The parts of an image, one by one: archive, kernel modules, state disk, xl.cfg."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path

import pytest

from qemu_vtpm_bridge.cpio import Archive
from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.image import shared_objects, state_disk
from qemu_vtpm_bridge.image.init import APPLETS, NEW_MARK, STATE_LABEL, init_script
from qemu_vtpm_bridge.image.kernel import installed_kernel, modules_in_order, named_kernel
from qemu_vtpm_bridge.image.python_files import collect
from qemu_vtpm_bridge.image.state_disk import make_state_disk
from qemu_vtpm_bridge.image.xl_config import DomainWords, xl_config
from qemu_vtpm_bridge.opened import LATE_MODULES
from tests.image.support import kernel_of, module, xen_kernel

needs_e2fsprogs = pytest.mark.skipif(
    shutil.which("mkfs.ext4") is None, reason="e2fsprogs are not installed"
)
UUID = "11111111-2222-3333-4444-555555555555"


# The archive.


def small_archive(names: list[str]) -> Archive:
    archive = Archive()
    for name in names:
        archive.add_file(name, name.encode(), 0o755 if name == "init" else 0o644)
    archive.add_symlink("bin", "usr/bin")
    archive.add_character_device("dev/console", 5, 1)
    archive.add_directory("tmp", 0o700)
    return archive


def test_cpio_reads_the_archive(tmp_path: Path) -> None:
    archive = small_archive(["init", "usr/lib/a", "usr/lib/bb"])
    (tmp_path / "archive").write_bytes(archive.packed())
    done = subprocess.run(
        ["cpio", "--quiet", "-itv", "-F", str(tmp_path / "archive")],
        check=True,
        capture_output=True,
        text=True,
        env={"LC_ALL": "C", "TZ": "UTC", "PATH": "/usr/bin:/bin"},
    )
    seen = {words[-1]: words for line in done.stdout.splitlines() if (words := line.split())}
    assert seen["init"][0] == "-rwxr-xr-x"
    assert seen["tmp"][0] == "drwx------"
    assert seen["usr/lib"][0] == "drwxr-xr-x"
    assert seen["usr/lib/bb"][4] == "10"
    assert seen["dev/console"][:6] == ["crw-------", "1", "root", "root", "5,", "1"]
    assert seen["usr/bin"][-3:] == ["bin", "->", "usr/bin"]
    assert "1970" in done.stdout


def test_the_order_of_adding_does_not_matter() -> None:
    names = ["init", "usr/lib/a", "usr/lib/bb"]
    assert small_archive(names).gzipped() == small_archive(names[::-1]).gzipped()


def test_two_contents_under_one_name_are_refused() -> None:
    archive = small_archive(["init"])
    archive.add_file("init", b"init", 0o755)
    with pytest.raises(ValueError, match="two different files would be init"):
        archive.add_file("init", b"another", 0o755)


# The kernel.


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    kernel = kernel_of(
        tmp_path,
        {
            "xen-blkfront.ko": module("xen-bus", soft="crc_generic missing"),
            "xen-bus.ko.xz": lzma.compress(module("deepest")),
            "deepest.ko": module(),
            "crc_generic.ko": module(),
            "xen-evtchn.ko": module(),
            "xen-gntdev.ko": module("xen-bus"),
            "xenfs.ko": module("xen-privcmd"),
            "unrelated.ko": module(),
            "virtio_blk.ko": module(),
        },
    )
    order = list(modules_in_order(kernel, ("virtio-blk",)))
    assert order[:4] == ["deepest", "xen_bus", "crc_generic", "xen_blkfront"]
    assert set(order[4:]) == {"xen_evtchn", "xen_gntdev", "xenfs", "virtio_blk"}
    assert modules_in_order(kernel)["xen_bus"] == module("deepest")


def test_a_kernel_without_xen_is_refused(tmp_path: Path) -> None:
    kernel = kernel_of(tmp_path, {"xen-blkfront.ko": module()})
    with pytest.raises(ConfigError, match="has no module xen_evtchn"):
        modules_in_order(kernel)


def test_the_newest_installed_kernel_that_has_modules_is_taken(tmp_path: Path) -> None:
    for release in ("6.1.0-9", "6.1.0-10", "5.10.0-30"):
        kernel_of(tmp_path, {}, release=release)
    (tmp_path / "boot/vmlinuz-6.99").touch()
    assert installed_kernel(tmp_path).release == "6.1.0-10"


def test_no_installed_kernel(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --debian"):
        installed_kernel(tmp_path)


def test_named_files_are_looked_at(tmp_path: Path) -> None:
    kernel = xen_kernel(tmp_path)
    assert named_kernel(kernel.image, kernel.modules) == kernel
    with pytest.raises(ConfigError, match="is no file"):
        named_kernel(tmp_path / "none", kernel.modules)
    with pytest.raises(ConfigError, match="holds no directory named kernel"):
        named_kernel(kernel.image, tmp_path)


# Libraries.


def test_ldd_and_the_closure_agree() -> None:
    shell = Path("/bin/sh").resolve()
    names = shared_objects.libraries_of([shell])
    said = subprocess.run(["ldd", str(shell)], check=True, capture_output=True, text=True).stdout
    assert "libc.so.6" in names
    assert any(name.startswith("ld-") for name in names)
    assert all(name in said for name in names)


def test_a_static_program_needs_nothing() -> None:
    busybox = shared_objects.program_path("busybox", "busybox-static")
    assert shared_objects.libraries_of([busybox]) == {}


def test_a_missing_program_is_named_with_its_package() -> None:
    with pytest.raises(ConfigError, match="no-such-program is missing; next: install its-package"):
        shared_objects.program_path("no-such-program", "its-package")


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shared_objects.DLOPENED, "libnone.so.7", "libnone7")
    with pytest.raises(ConfigError, match=r"libnone.so.7 is missing.*install libnone7"):
        shared_objects.dlopened()


# The first program.


def test_busybox_takes_the_script_and_has_its_applets() -> None:
    busybox = shared_objects.program_path("busybox", "busybox-static")
    subprocess.run([busybox, "sh", "-n"], input=init_script(), text=True, check=True)
    script = init_script()
    used = {word.split()[0] for word in script.split("$b ")[1:]} - {"$end"}
    assert used | {"poweroff", "reboot"} <= set(APPLETS)
    assert "@" not in script.replace("$@", "")


# The state disk.


def tool(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_what_a_program_imports_by_name_is_in_the_image() -> None:
    """modulefinder sees import statements only; these are imported before privileges are gone."""
    there = collect("/usr/lib/python3").compiled
    for name in (*LATE_MODULES["vtpm"], *LATE_MODULES["run"]):
        path = name.replace(".", "/")
        assert {f"{path}.pyc", f"{path}/__init__.pyc"} & there.keys(), name


@needs_e2fsprogs
def test_a_state_disk_is_an_ext4_with_a_journal_and_the_mark_of_a_new_one(tmp_path: Path) -> None:
    disk = tmp_path / "state.img"
    uuid = make_state_disk(disk, 16)
    assert disk.stat().st_size == 16 << 20
    assert disk.stat().st_mode & 0o777 == 0o600
    said = tool("dumpe2fs", "-h", str(disk))
    assert "has_journal" in said
    assert uuid in said
    assert STATE_LABEL in said
    assert NEW_MARK in tool("debugfs", "-R", "ls -p", str(disk))
    tool("e2fsck", "-fn", str(disk))
    assert make_state_disk(tmp_path / "another", 16) != uuid


@needs_e2fsprogs
def test_a_disk_that_is_there_is_left_alone(tmp_path: Path) -> None:
    disk = tmp_path / "state.img"
    disk.write_bytes(b"a TPM")
    with pytest.raises(ConfigError, match=r"is there already.*left alone"):
        make_state_disk(disk, 16)
    assert disk.read_bytes() == b"a TPM"


@needs_e2fsprogs
def test_a_disk_that_is_too_small_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--state-size-mib 16 or more"):
        make_state_disk(tmp_path / "state.img", 15)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_disk_that_could_not_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "mkfs.ext4"
    failing.write_text("#!/bin/sh\necho No space left on device >&2; exit 1\n", encoding="ascii")
    failing.chmod(0o755)
    monkeypatch.setattr(state_disk, "program_path", lambda name, package: failing)
    with pytest.raises(ConfigError, match="No space left on device"):
        make_state_disk(tmp_path / "state.img", 16)
    assert list(tmp_path.iterdir()) == [failing]


# xl.cfg.


def words(**changes: object) -> DomainWords:
    values: dict[str, object] = {
        "name": "vtpm-of-guest",
        "type": "pv",
        "kernel": Path("/image/vmlinuz"),
        "ramdisk": Path("/image/initramfs.gz"),
        "memory_mib": 128,
        "tpm": "2.0",
        "state_disk": "/dev/vg/state",
        "state_uuid": UUID,
    }
    return DomainWords(**(values | changes))  # type: ignore[arg-type]


def settings(text: str) -> dict[str, object]:
    """Read an xl.cfg: what is used of it is Python, too."""
    found: dict[str, object] = {}
    exec(text, {}, found)
    return found


def test_the_configuration_says_what_was_asked_for() -> None:
    found = settings(xl_config(words(trust_reset=(0, 5))))
    assert found["name"] == "vtpm-of-guest"
    assert found["type"] == "pv"
    assert found["disk"] == ["format=raw, vdev=xvda, access=rw, target=/dev/vg/state"]
    line = str(found["extra"]).split()
    assert f"vtpm.disk=UUID={UUID}" in line
    assert {"vtpm.tpm=2.0", "vtpm.trust-reset=0", "vtpm.trust-reset=5"} <= set(line)
    assert "tsc_mode" not in found


def test_a_pvh_domain_and_a_disk_that_is_known_by_its_label() -> None:
    found = settings(xl_config(words(type="pvh", state_uuid=None)))
    assert (found["type"], found["tsc_mode"]) == ("pvh", "native")
    assert f"vtpm.disk=LABEL={STATE_LABEL}" in str(found["extra"])
