"""libvirt's QEMU driver with its TPM element pointing at a bridge: the real libvirt."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from qemu_vtpm_bridge.demo.guest import MARKED_PCR, build_initramfs, find_kernel
from qemu_vtpm_bridge.toolstack.domain_xml import NAMESPACE
from qemu_vtpm_bridge.toolstack.guests import socket_path
from tests.support.chain import Chain, running_chain
from tests.support.host import Host, running_host
from tests.support.libvirt import (
    Libvirt,
    may_have_namespaces,
    missing_parts,
    running_libvirt,
    running_system_libvirt,
)
from tests.support.programs import PROGRAM
from tests.support.wait import wait_until

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(missing_parts()), reason=f"not installed: {missing_parts()}"),
]

# Between runs the kernel stays where `make demo` keeps it.
KERNELS = Path("build/demo")
ZERO = "0" * 64


def tpm_element(path: Path, model: str = "tpm-crb") -> str:
    """What docs/guides/libvirt.md tells to write."""
    return f"""<tpm model='{model}'>
      <backend type='external'>
        <source type='unix' mode='connect' path='{path}'/>
      </backend>
    </tpm>"""


def let_in(chain: Chain, libvirt: Libvirt) -> None:
    """Give the socket to QEMU's user, as --socket PATH,owner=USER does."""
    chain.socket_path.parent.chmod(0o755)
    shutil.chown(chain.socket_path, libvirt.owner)


def give_guest(libvirt: Libvirt) -> None:
    """Put the demo's Linux where QEMU's user can read it."""
    KERNELS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(find_kernel(KERNELS.resolve()), libvirt.place / "kernel")
    build_initramfs(libvirt.place)
    for name in ("kernel", "initramfs.gz"):
        (libvirt.place / name).chmod(0o644)


async def test_the_element_is_valid_and_becomes_the_words_that_qemu_needs() -> None:
    async with running_libvirt() as libvirt:
        for model in ("tpm-crb", "tpm-tis"):
            xml = libvirt.xml("guest", tpm_element(Path("/run/bridge/guest.sock"), model))
            await trio.run_process(["virt-xml-validate", str(xml), "domain"], capture_stdout=True)
            words = shlex.split(await libvirt.virsh("domxml-to-native", "qemu-argv", str(xml)))
            assert "socket,id=chrtpm,path=/run/bridge/guest.sock" in words
            (tpmdev,) = (word for word in words if word.startswith("emulator,"))
            assert tpmdev.endswith(",chardev=chrtpm")
            assert any(f'"driver":"{model}"' in word for word in words)


async def test_a_guest_that_libvirt_starts_resets_and_destroys_has_a_tpm(tmp_path: Path) -> None:
    async with running_libvirt() as libvirt, running_chain(tmp_path) as chain:
        give_guest(libvirt)
        let_in(chain, libvirt)
        xml = str(libvirt.xml("guest", tpm_element(chain.socket_path)))

        await libvirt.virsh("create", xml)
        first = await libvirt.booted(1)
        assert first.facts["driver"] == "tpm_crb"
        assert first.facts["version"] == "2"
        assert first.pcrs[MARKED_PCR] == ZERO != first.facts["marked"].lower()
        assert first.pcrs[0] != ZERO  # SeaBIOS measured

        await libvirt.virsh("reset", "guest")
        second = await libvirt.booted(2)
        assert second.pcrs == first.pcrs, "the reset guest found a TPM that was not power-cycled"

        await libvirt.virsh("destroy", "guest")
        await wait_until(lambda: chain.door.requests["CMD_SHUTDOWN"] == 1)
        (libvirt.place / "console.log").unlink()
        await libvirt.virsh("create", xml)
        third = await libvirt.booted(1)
        assert third.pcrs == first.pcrs
        await libvirt.virsh("destroy", "guest")


async def test_without_a_bridge_the_start_fails_and_says_which_socket() -> None:
    async with running_libvirt() as libvirt:
        missing = libvirt.place / "nobody.sock"
        said = await libvirt.refused("create", str(libvirt.xml("guest", tpm_element(missing))))
        assert f"Failed to connect to '{missing}': No such file or directory" in said
        assert not await libvirt.virsh("list", "--all", "--name")


# The hook, called by libvirt itself.  Its QEMU driver calls hooks as the Xen driver does.


@pytest.fixture
def host() -> Iterator[Host]:
    with running_host() as found:
        found.guests_file("")
        yield found


def hook_of(host: Host) -> str:
    """A hook script for this host that also notes how it was called."""
    command = shlex.join([*PROGRAM, "libvirt-hook", "--guests", str(host.place / "guests.toml")])
    return f'#!/bin/sh\necho "$@" >>{host.place}/calls\nexec {command} -- "$@"\n'


def vtpm_element(backend: str) -> str:
    return f"""
  <metadata><tpm:vtpm xmlns:tpm='{NAMESPACE}' backend='{backend}'/></metadata>"""


@pytest.mark.skipif(not may_have_namespaces(), reason="mount namespaces are not allowed here")
async def test_the_hook_under_a_real_libvirtd(host: Host) -> None:
    host.world.vtpm()
    async with running_system_libvirt(hook_of(host)) as libvirt:
        give_guest(libvirt)
        calls = host.place / "calls"
        tpm = tpm_element(socket_path("web", host.run_dir))
        xml = str(libvirt.xml("web", tpm, more=vtpm_element("vtpm")))

        await libvirt.virsh("create", xml)
        (bridge,) = host.bridges()
        first = await libvirt.booted(1)
        assert first.pcrs[MARKED_PCR] == ZERO != first.facts["marked"]
        assert calls.read_text().split("\n")[:3] == [
            *("web prepare begin -", "web start begin -", "web started begin -")
        ]

        # libvirtd is restarted under the running guest.
        await libvirt.stop()
        await libvirt.start()
        assert await libvirt.virsh("list", "--name") == "web"
        await wait_until(lambda: "web reconnect begin -" in calls.read_text())
        assert host.bridges() == [bridge]

        await libvirt.virsh("destroy", "web")
        await wait_until(lambda: "web release end" in calls.read_text())
        await wait_until(lambda: host.bridges() == [])
        assert host.world.entries() == []

        # A second start.
        (libvirt.place / "console.log").unlink()
        await libvirt.virsh("create", xml)
        assert (await libvirt.booted(1)).pcrs == first.pcrs
        await libvirt.virsh("destroy", "web")
        await wait_until(lambda: host.bridges() == [])


@pytest.mark.skipif(not may_have_namespaces(), reason="mount namespaces are not allowed here")
async def test_a_hook_that_refuses_stops_the_start_and_is_quoted(host: Host) -> None:
    async with running_system_libvirt(hook_of(host)) as libvirt:
        tpm = tpm_element(socket_path("web", host.run_dir))
        xml = str(libvirt.xml("web", tpm, more=vtpm_element("no-such-domain")))
        said = await libvirt.refused("create", xml)
        assert "no domain is named no-such-domain" in said
        # libvirt has it cleaned up, although nothing was begun.
        assert (host.place / "calls").read_text().splitlines() == [
            *("web prepare begin -", "web stopped end -", "web release end -")
        ]
        assert await libvirt.virsh("list", "--all", "--name") == ""
        assert host.bridges() == []
        assert host.world.entries() == []
