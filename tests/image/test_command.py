"""`qemu-vtpm-bridge vtpm-image` as a person uses it, and the image that it builds.

The image is tried in a chroot: its Python, its libraries, our backend and swtpm run from
what is in it and nothing else, against an embedded Xen whose sockets lie inside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.cli import main
from qemu_vtpm_bridge.embedded.world import World
from qemu_vtpm_bridge.toolstack.attach import attach
from qemu_vtpm_bridge.vtpm.domain import LIFE_NODE
from qemu_vtpm_bridge.xen.store import open_store
from tests.image.support import unpack, xen_kernel
from tests.support.chain import PATHS, VTPM
from tests.support.world import store_socket

pytestmark = [
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
    pytest.mark.timeout(600),
]

BACKEND = "export PYTHONHOME=/usr PATH=/usr/bin; exec python3 -s -S -P -m qemu_vtpm_bridge"


def words(directory: Path, kernel_root: Path, *more: str) -> list[str]:
    kernel = next((kernel_root / "boot").iterdir())
    modules = next((kernel_root / "lib/modules").iterdir())
    named = ["--kernel", str(kernel), "--modules", str(modules)]
    return ["vtpm-image", str(directory), *named, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the image that the command built, and what it printed."""
    directory = tmp_path_factory.mktemp("image")
    xen_kernel(directory / "root")
    command = words(directory / "out", directory / "root", "--make-state", "--json")
    done = subprocess.run(
        [sys.executable, "-m", "qemu_vtpm_bridge", *command, "--output", directory / "vtpm.cfg"],
        check=True,
        capture_output=True,
        text=True,
    )
    (directory / "summary.json").write_text(done.stdout, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def chroot() -> list[str]:
    """The words that run a command in another root; DIRECTORY and the command follow."""
    words = ["chroot"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "chroot"]
    done = subprocess.run([*words, "/", "true"], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("this machine lets this user make no user namespace, and chroot needs one")
    return words


@pytest.fixture
def root(place: Path) -> Iterator[Path]:
    """The image, unpacked where paths are short."""
    directory = Path("/tmp") / f"qvi{os.getpid()}"
    try:
        unpack(place / "out/initramfs.gz", directory)
        if not (directory / "dev/null").exists():
            (directory / "dev/null").touch()
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def test_the_summary_and_the_files(place: Path) -> None:
    summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    initramfs = place / "out/initramfs.gz"
    assert summary["initramfs"]["path"] == str(initramfs)
    assert summary["initramfs"]["size-bytes"] == initramfs.stat().st_size
    assert (
        sum(summary["initramfs"]["parts-bytes"].values())
        == (summary["initramfs"]["unpacked-bytes"])
    )
    assert summary["kernel"]["release"] == "6.1.0-9"
    config = (place / "vtpm.cfg").read_text(encoding="utf-8")
    assert str(initramfs) in config
    assert summary["state-disk"]["uuid"] in config
    assert not list((place / "out").glob("*.part"))


def test_it_is_small(place: Path) -> None:
    assert (place / "out/initramfs.gz").stat().st_size < 20e6


def test_another_build_gives_the_same_bytes(place: Path, tmp_path: Path) -> None:
    command = words(tmp_path / "out", place / "root")
    subprocess.run(
        [sys.executable, "-m", "qemu_vtpm_bridge", *command],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
        umask=0o77,
    )
    for name in ("initramfs.gz", "vmlinuz"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "out" / name).read_bytes()


def test_nothing_of_this_machine_is_in_the_compiled_python(place: Path, root: Path) -> None:
    del place
    here = str(Path(__file__).parents[2]).encode()
    compiled = list(root.rglob("*.pyc"))
    assert len(compiled) > 100
    assert not [path for path in compiled if here in path.read_bytes()]


def test_every_module_of_ours_can_be_imported_in_it(root: Path, chroot: list[str]) -> None:
    library = next((root / "usr/lib").glob("python3.*"))
    package = sorted((library / "qemu_vtpm_bridge").rglob("*.pyc"))
    names = [".".join(path.relative_to(library).with_suffix("").parts) for path in package]
    imports = [
        f"import {name.removesuffix('.__init__')}" for name in names if "__main__" not in name
    ]
    assert len(imports) > 50
    script = "\n".join(imports)
    subprocess.run(
        [*chroot, str(root), "/usr/bin/python3", "-s", "-S", "-P", "-c", script],
        check=True,
        env={**os.environ, "PYTHONHOME": "/usr"},
    )


async def test_its_backend_serves_with_its_swtpm(root: Path, chroot: list[str]) -> None:
    # Without /proc it does not see how many threads it has; `tests/xen/rig` has the rest.
    command = (
        f"{BACKEND} vtpm --confine off --embedded /world --domid {VTPM} --state-dir /state/tpm"
    )
    world = World(root / "world")
    (root / "world").mkdir()
    async with trio.open_nursery() as nursery:
        await nursery.start(world.serve)
        await world.create_domain(VTPM, "vtpm")
        process = await trio.lowlevel.open_process([*chroot, str(root), "/bin/sh", "-c", command])
        try:
            async with open_store(store_socket(world)) as store:
                await attach(store, PATHS)
                state = f"{PATHS.backend}/state"
                with trio.fail_after(120):
                    async with store.watch(state) as watch:
                        # InitWait: swtpm runs, and the backend waits for a frontend.
                        while await store.try_read(state) != b"2":
                            await watch.wait()
                assert await store.try_read(f"/local/domain/{VTPM}/{LIFE_NODE}")
            process.terminate()
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
        nursery.cancel_scope.cancel()
    assert (root / "state/tpm/tpm2-00.permall").exists()


def test_e2fsck_and_setpriv_run_in_it(root: Path, chroot: list[str]) -> None:
    for program in ("e2fsck -V", "setpriv --version", "swtpm --version"):
        command = [*chroot, str(root), *f"/usr/bin/{program}".split()]
        subprocess.run(command, check=True, capture_output=True)


# What is wrong with the command line.


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--kernel", "k"], "--kernel and --modules go together"),
        (["--kernel", "k", "--modules", "m", "--debian", "d"], "--kernel names another"),
        (["--kernel", "none", "--modules", "none"], "none is no file"),
        (["--json"], "give --output"),
        (["--name", 'a"b'], "is no name for a domain"),
        (["--name", ""], "is no name for a domain"),
        (["--state-disk", "/dev/a b"], "cannot stand in an xl.cfg"),
        (["--state-disk", "/dev/a,access=rw"], "cannot stand in an xl.cfg"),
    ],
)
def test_a_wrong_option_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], complaint: str
) -> None:
    assert main(["vtpm-image", str(tmp_path / "out"), *more]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))[1:]


def test_a_directory_that_cannot_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["vtpm-image", str(tmp_path / "file")]) == 2
    assert "file: File exists" in capsys.readouterr().err
