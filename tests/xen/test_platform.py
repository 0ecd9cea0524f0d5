"""Xen's libraries by dlopen: there, not there, lacking something, refusing something."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.xen.platform import Platform

SOURCE = Path(__file__).parent / "fake_libs" / "fake.c"
COMPILER = shutil.which("gcc") or shutil.which("cc")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def build(directory: Path, *, lacks: bool = False) -> Path:
    """Build the stand-ins for both libraries."""
    directory.mkdir(exist_ok=True)
    for name, flags in (("gnttab", ["-DGRANTS"]), ("evtchn", [])):
        if lacks:
            flags = [*flags, "-DLACKS_UNMAP"]
        assert COMPILER is not None
        output = directory / f"libxen{name}.so.1"
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-Wno-unused-function", *flags, "-o", output, SOURCE],
            check=True,
        )
    return directory


def build_all(directory: Path) -> Path:
    """Build these, and stand-ins for what a bridge that is a guest's device loads besides."""
    build(directory)
    assert COMPILER is not None
    for name in ("devicemodel", "foreignmemory"):
        output = directory / f"libxen{name}.so.1"
        subprocess.run(
            [COMPILER, "-shared", "-fPIC", "-o", output, SOURCE.with_name("guest.c")], check=True
        )
    return directory


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("libs"))


def run(script: str, directory: Path, fail: str = "", **more: str) -> str:
    """Run a script with these libraries in front of the machine's; return what it prints."""
    prologue = """
    import select
    from qemu_vtpm_bridge._shim import ffi, lib
    from qemu_vtpm_bridge.errors import XenError
    from qemu_vtpm_bridge.xen.platform import Platform, Role
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": str(directory), "FAKE_FAIL": fail, **more}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prologue) + textwrap.dedent(script)],
        check=True,
        env=environment,
        capture_output=True,
        text=True,
    ).stdout


OPEN = """
try:
    with Platform.open_xen():
        print("opened")
except XenError as error:
    print(error)
"""


def test_pages_and_ports_of_the_libraries(libraries: Path) -> None:
    script = """
    with Platform.open_xen() as platform:
        assert platform.domid is None  # only XenStore can tell
        ours = platform.share_page(2)
        assert ours.ref == 77
        assert bytes(ffi.buffer(ours.cdata.shared, 4096)) == bytes(4096)
        theirs = platform.map_page(3, 78)
        unbound = platform.alloc_unbound(2)
        bound = platform.bind_interdomain(3, 10)
        assert (unbound.port, bound.port) == (42, 13)
        for channel in (unbound, bound):
            assert lib.xen_take(channel.cdata) == 0  # nothing there: it does not block
            channel.notify()
            assert select.select([channel], [], [], 0)[0]
            assert lib.xen_take(channel.cdata) == 0
            assert not select.select([channel], [], [], 0)[0]
            assert lib.xen_rearm(channel.cdata) == 0
        for resource in (ours, theirs, unbound, bound, ours, bound):
            resource.close()
    print("done")
    """
    assert run(script, libraries) == "done\n"


# The event channel device can be opened three times: by Platform.open_xen's look at it, and
# for the two channels that are kept.
KEPT = """
    with Platform.open_xen() as platform:
        platform.keep_open(Role.SHARES, 2)
        for round in range(5):
            first, second = platform.alloc_unbound(2), platform.alloc_unbound(2)
            assert not select.select([first, second], [], [], 0)[0], "an old port's event"
            for channel in (first, second):
                channel.notify()
                assert select.select([channel], [], [], 0)[0]
            first.close()
            second.close()
        held = [platform.alloc_unbound(2), platform.alloc_unbound(2)]
        try:
            platform.alloc_unbound(2)
        except XenError as error:
            print(error)
        for channel in held:
            channel.close()
"""


def test_channels_kept_open_serve_again_and_again(libraries: Path) -> None:
    said = run(KEPT, libraries, FAKE_OPENS="3").splitlines()
    assert said == ["no event channel for domain 2: Permission denied"]


def test_what_cannot_be_kept_open_is_said(libraries: Path) -> None:
    script = """
    for role, channels in ((Role.SHARES, 1), (Role.MAPS, 1), (Role.MAPS, 13)):
        with Platform.open_xen() as platform:
            try:
                platform.keep_open(role, channels)
            except XenError as error:
                print(error)
    """
    denied = run(script, libraries, f"xengntshr_open:{errno.EACCES}").splitlines()
    assert denied[0].endswith("next: run as root, or give this user /dev/xen/gntalloc")
    assert denied[1].endswith("Argument list too long")
    denied = run(script, libraries, f"xengnttab_open:{errno.ENOENT}").splitlines()
    assert "load the module xen-gntdev" in denied[0]


@pytest.mark.parametrize(
    ("function", "number", "says"),
    [
        ("xengntshr_open", errno.ENOENT, "load the module xen-gntalloc"),
        ("xengntshr_open", errno.EACCES, "run as root, or give this user /dev/xen/gntalloc"),
        ("xengntshr_share_page_notify", errno.ENOSPC, "raise /sys/module/xen_gntalloc"),
        ("xengntshr_share_page_notify", 0, "Input/output error"),
        ("xengnttab_open", errno.ENODEV, "load the module xen-gntdev"),
        ("xengnttab_map_grant_ref", errno.EINVAL, "grant 78 of domain 3 cannot be mapped"),
        ("xenevtchn_bind_unbound_port", errno.ENOSPC, "no event channel for domain 2: No space"),
        ("xenevtchn_bind_interdomain", errno.EINVAL, "event channel 10 of domain 3 cannot be"),
        ("xenevtchn_notify", errno.ENODEV, "event channel 42: No such device"),
    ],
)
def test_P10_what_xen_refuses_is_said_with_the_next_step(
    libraries: Path, function: str, number: int, says: str
) -> None:
    script = """
    with Platform.open_xen() as platform:
        for step in (
            lambda: platform.share_page(2),
            lambda: platform.map_page(3, 78),
            lambda: platform.alloc_unbound(2).notify(),
            lambda: platform.bind_interdomain(3, 10),
        ):
            try:
                step()
            except XenError as error:
                print(error)
    """
    said = run(script, libraries, f"{function}:{number}")
    assert says in said
    assert len(said.splitlines()) == 1  # the others go on


def test_P10_a_machine_without_xen_is_told_what_is_missing(libraries: Path, tmp_path: Path) -> None:
    said = run(OPEN, libraries, f"xenevtchn_open:{errno.ENOENT}")
    assert "/dev/xen/evtchn: No such file or directory" in said
    assert "--embedded names the directory" in said
    said = run(OPEN, build(tmp_path / "old", lacks=True))
    assert "xengnttab_unmap: Function not implemented" in said
    assert "next: check Xen's installation" in said
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libxengnttab.so.1").write_text("no library", encoding="ascii")
    said = run(OPEN, broken)
    assert "libxengnttab.so.1: No such file or directory" in said
    assert "install Xen's runtime libraries" in said


def test_the_embedded_xen_that_is_not_there(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "/x" * 200):
        with pytest.raises(XenError, match="next: start one with"):
            Platform.open_embedded(path)
