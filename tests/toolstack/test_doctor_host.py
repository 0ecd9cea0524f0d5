"""The doctor's checks of Xen, its libraries, modules and device nodes, on made-up trees."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qemu_vtpm_bridge.toolstack.doctor_host import Case, Host, Role
from qemu_vtpm_bridge.toolstack.doctor_kernel import (
    check_libraries,
    check_modules,
    check_nodes,
    check_tpmfront,
    check_xen,
    module_state,
)
from qemu_vtpm_bridge.toolstack.doctor_report import Finding, Verdict
from tests.support.doctor import examined, findings, verdicts
from tests.xen.test_platform import build as build_libraries

KERNEL = "6.1.0-xen"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def xen_tree(root: Path, *, capabilities: str | None = "control_d\n", minor: str = "17") -> Path:
    """Make what a Xen 4 domain shows."""
    files = {
        "sys/hypervisor/type": "xen\n",
        "sys/hypervisor/version/major": "4\n",
        "sys/hypervisor/version/minor": f"{minor}\n",
        "sys/hypervisor/version/extra": ".5\n",
        "proc/sys/kernel/osrelease": f"{KERNEL}\n",
        "proc/modules": "xen_evtchn 16384 2 - Live 0x0\nxen_gntalloc 16384 0 - Live 0x0\n",
        f"lib/modules/{KERNEL}/modules.builtin": "kernel/drivers/xen/xenfs/xenfs.ko\n",
        f"lib/modules/{KERNEL}/modules.dep": "kernel/drivers/xen/xen-gntdev.ko.xz: x.ko\n"
        "kernel/drivers/xen/xen-gntalloc.ko.xz:\nkernel/drivers/char/tpm/xen-tpmfront.ko:\n",
    }
    if capabilities is not None:
        files["proc/xen/capabilities"] = capabilities
    return write(root, files)


class NodeHost(Host):
    """Shows device nodes, which a test may not be allowed to make."""

    def __init__(self, root: Path, modes: dict[str, int], *, usable: bool = True) -> None:
        super().__init__(root)
        self.modes = modes
        self.usable = usable

    def stat(self, name: str) -> os.stat_result | None:
        if name not in self.modes:
            return None
        return os.stat_result((self.modes[name], 0, 0, 1, 0, 0, 0, 0, 0, 0))

    def exists(self, name: str) -> bool:
        return name in self.modes or super().exists(name)

    def may_use(self, name: str) -> bool:
        return self.usable


GOOD = stat.S_IFCHR | 0o600
NODES = {"/dev/xen/evtchn": GOOD, "/dev/xen/gntalloc": GOOD}


def dom0(root: Path, **changes: Any) -> Case:
    """Return domain 0, its Xen looked at already."""
    case = Case(**{"host": NodeHost(root, NODES)} | changes)
    check_xen(case)
    return case


def the(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


def commands(finding: Finding) -> list[str]:
    return [step.command for step in finding.mend]


def done_below(tree: Path, command: str) -> None:
    """Do a printed command in a made-up tree."""
    assert "/etc/" in command
    command = command.replace("/etc/", f"{tree}/etc/")
    subprocess.run(["bash", "-c", command], check=True)


# Xen.


def test_xen_and_which_domain(tmp_path: Path) -> None:
    case = Case(Host(xen_tree(tmp_path)))
    finding = the(check_xen(case))
    assert (finding.verdict, finding.summary) == (Verdict.OK, "Xen 4.17.5; this is domain 0")
    assert (case.role, case.xen_version) == (Role.DOM0, (4, 17))
    case = Case(Host(xen_tree(tmp_path, capabilities="\n")))
    assert the(check_xen(case)).verdict is Verdict.OK
    assert case.role is Role.VTPM
    case.wanted = Role.DOM0  # a bridge beside a QEMU in a stub domain
    assert the(check_xen(case)).verdict is Verdict.WARNING


def test_xenfs_that_is_not_mounted(tmp_path: Path) -> None:
    case = Case(Host(xen_tree(tmp_path, capabilities=None)))
    finding = the(check_xen(case))
    assert finding.verdict is Verdict.WARNING
    assert commands(finding) == ["mount -t xenfs xenfs /proc/xen"]
    # XenStore tells it later.
    assert case.role is Role.DOM0
    case.own_domid = 5
    assert case.role is Role.VTPM


def test_P10_what_xen_says_of_itself_may_be_anything(tmp_path: Path) -> None:
    tree = xen_tree(tmp_path, minor="\x1b[31m")
    case = Case(Host(tree))
    assert "\x1b" not in the(check_xen(case)).as_dict()["summary"]
    assert case.xen_version is None


@pytest.mark.parametrize("kind", [None, "kvm\n"])
async def test_a_machine_without_xen(tmp_path: Path, kind: str | None) -> None:
    tree = write(tmp_path, {"proc/x": ""} | ({} if kind is None else {"sys/hypervisor/type": kind}))
    status, document = await examined("--root", tree, "--run-dir", tmp_path / "run")
    (xen,) = findings(document, "xen")
    assert (status, xen["verdict"], document["role"]) == (0, "not-applicable", "any")
    assert "qemu-vtpm-bridge demo" in [step["command"] for step in xen["mend"]]
    for check in ("xen.libraries", "xen.modules", "xen.devices", "xen.tpmfront", "xenstore"):
        assert verdicts(document, check) == ["not-applicable"]
    for role in ("dom0", "vtpm"):
        status, document = await examined("--root", tree, "--role", role)
        assert status == 3
        assert verdicts(document, "xen") == ["problem"]
        assert verdicts(document, "xen.devices") == ["problem"]
        assert verdicts(document, "xenstore") == ["problem"]


# Libraries.


async def test_libraries_are_loaded_as_the_bridge_does(tmp_path: Path) -> None:
    tree = xen_tree(tmp_path / "root")
    whole = build_libraries(tmp_path / "whole")
    lacking = build_libraries(tmp_path / "lacking", lacks=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "libxengnttab.so.1").write_text("no library", encoding="ascii")
    for directory, verdict, says in (
        (whole, "ok", "libxengnttab.so.1, libxenevtchn.so.1 load"),
        (lacking, "problem", "xengnttab_unmap: Function not implemented"),
        (broken, "problem", "cannot be loaded: libxengnttab.so.1"),
    ):
        _, document = await examined("--root", tree, LD_LIBRARY_PATH=str(directory))
        (finding,) = findings(document, "xen.libraries")
        assert finding["verdict"] == verdict
        assert says in finding["summary"]
    assert finding["mend"][0]["command"] == "apt-get install libxengnttab1"


def test_a_c_part_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    monkeypatch.setitem(__import__("sys").modules, "qemu_vtpm_bridge.xen.platform", None)
    finding = the(check_libraries(dom0(xen_tree(tmp_path))))
    assert finding.verdict is Verdict.PROBLEM
    assert "C part cannot be loaded" in finding.summary


# Modules.


def test_modules(tmp_path: Path) -> None:
    tree = xen_tree(tmp_path)
    finding = the(check_modules(dom0(tree)))
    assert finding.verdict is Verdict.OK
    assert finding.facts["modules"] == {
        "xen-evtchn": "loaded",
        "xen-gntalloc": "loaded",
        "xen-gntdev": "not loaded",
        "xenfs": "built in",
    }
    write(tree, {"proc/modules": "xen_evtchn 16384 2 - Live 0x0\n"})
    # The node is there: then the kernel has it, whatever its lists say.
    assert the(check_modules(dom0(tree))).verdict is Verdict.OK
    bare = NodeHost(tree, {"/dev/xen/evtchn": GOOD})
    finding = the(check_modules(dom0(tree, host=bare)))
    assert (finding.verdict, finding.summary) == (Verdict.PROBLEM, "xen-gntalloc not loaded")
    assert commands(finding)[0] == "modprobe xen-gntalloc"
    done_below(tree, commands(finding)[1])
    assert Host(tree).read("/etc/modules-load.d/xen-gntalloc.conf") == "xen-gntalloc\n"
    # A vTPM domain maps grants instead.
    finding = the(check_modules(dom0(tree, host=bare, wanted=Role.VTPM)))
    assert commands(finding)[0] == "modprobe xen-gntdev"


def test_a_kernel_without_the_module(tmp_path: Path) -> None:
    tree = xen_tree(tmp_path)
    write(tree, {"proc/modules": "", f"lib/modules/{KERNEL}/modules.dep": "a/b.ko:\n"})
    finding = the(check_modules(dom0(tree, host=NodeHost(tree, {}))))
    assert finding.verdict is Verdict.PROBLEM
    assert all("boot a kernel" in step.does for step in finding.mend)
    (tree / f"lib/modules/{KERNEL}/modules.dep").unlink()
    assert module_state(Host(tree), "xen-gntdev") == "unknown"


# Device nodes.


@pytest.mark.parametrize(
    ("modes", "usable", "says", "command"),
    [
        (NODES, True, "may be used", None),
        (NODES, False, "may not be opened by this user", ""),
        (NODES | {"/dev/xen/gntalloc": stat.S_IFCHR | 0o666}, True, "by everybody (mode 0666)",
         "chmod o-rw /dev/xen/gntalloc"),
        (NODES | {"/dev/xen/evtchn": stat.S_IFREG | 0o600}, True, "is no device",
         "rm /dev/xen/evtchn"),
        ({"/dev/xen/evtchn": GOOD}, True, "gntalloc is missing", "modprobe xen-gntalloc"),
    ],
)  # fmt: skip
def test_nodes(
    tmp_path: Path, modes: dict[str, int], usable: bool, says: str, command: str | None
) -> None:
    tree = xen_tree(tmp_path)
    finding = the(check_nodes(dom0(tree, host=NodeHost(tree, modes, usable=usable))))
    assert says in finding.summary
    assert finding.verdict is (Verdict.OK if command is None else Verdict.PROBLEM)
    assert commands(finding)[:1] == ([] if command is None else [command])


def test_a_node_that_nobody_made(tmp_path: Path) -> None:
    tree = write(xen_tree(tmp_path), {"sys/class/misc/xen!gntalloc/dev": "10:121\n"})
    finding = the(check_nodes(dom0(tree, host=NodeHost(tree, {"/dev/xen/evtchn": GOOD}))))
    assert commands(finding) == ["mkdir -p /dev/xen && mknod -m 0600 /dev/xen/gntalloc c 10 121"]


def test_a_plain_tree_is_looked_at_as_it_is(tmp_path: Path) -> None:
    """Without the stand-in: a file in the node's place, and none."""
    tree = write(xen_tree(tmp_path), {"dev/xen/evtchn": ""})
    finding = the(check_nodes(dom0(tree, host=Host(tree))))
    assert finding.summary == "/dev/xen/evtchn is no device; /dev/xen/gntalloc is missing"


# The kernel's own frontend.


def test_xen_tpmfront_that_waits_to_be_loaded(tmp_path: Path) -> None:
    tree = xen_tree(tmp_path)
    finding = the(check_tpmfront(dom0(tree)))
    assert finding.verdict is Verdict.WARNING
    (command,) = commands(finding)
    done_below(tree, command)
    finding = the(check_tpmfront(dom0(tree)))
    assert finding.verdict is Verdict.OK
    assert finding.facts["blacklisted-by"] == "/etc/modprobe.d/no-xen-tpmfront.conf"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("usr/lib/modprobe.d/a.conf", "install xen_tpmfront /bin/false\n"),
        ("run/modprobe.d/a.conf", "  blacklist\txen_tpmfront\n"),
        ("proc/cmdline", "root=/dev/sda modprobe.blacklist=foo,xen-tpmfront quiet\n"),
        ("proc/cmdline", "module_blacklist=xen_tpmfront\n"),
    ],
)
def test_ways_to_keep_it_away(tmp_path: Path, name: str, text: str) -> None:
    tree = write(xen_tree(tmp_path), {name: text})
    assert the(check_tpmfront(dom0(tree))).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("etc/modprobe.d/a.conf", "# blacklist xen-tpmfront\nblacklist xen-tpm\n"),
        ("etc/modprobe.d/a.conf.dpkg-old", "blacklist xen-tpmfront\n"),
        ("proc/cmdline", "blacklist=xen-tpmfront\n"),
    ],
)
def test_what_keeps_it_not_away(tmp_path: Path, name: str, text: str) -> None:
    tree = write(xen_tree(tmp_path), {name: text})
    assert the(check_tpmfront(dom0(tree))).verdict is Verdict.WARNING


def test_xen_tpmfront_that_runs(tmp_path: Path) -> None:
    tree = xen_tree(tmp_path)
    (tree / "sys/bus/xen/drivers/vtpm").mkdir(parents=True)
    finding = the(check_tpmfront(dom0(tree)))
    assert finding.verdict is Verdict.WARNING
    assert commands(finding)[-1] == "modprobe -r xen-tpmfront"
    (tree / "sys/bus/xen/devices/vtpm-7/driver").mkdir(parents=True)
    (tree / "sys/bus/xen/devices/vbd-7/driver").mkdir(parents=True)
    finding = the(check_tpmfront(dom0(tree)))
    assert finding.verdict is Verdict.PROBLEM
    assert finding.facts["taken"] == ["vtpm-7"]
    builtin = f"lib/modules/{KERNEL}/modules.builtin"
    write(tree, {builtin: "kernel/drivers/char/tpm/xen-tpmfront.ko\n"})
    finding = the(check_tpmfront(dom0(tree)))
    assert commands(finding) == ["", ""]
    assert "initcall_blacklist=xen_tpmfront_init" in finding.mend[0].does


def test_in_a_guest_it_may_run(tmp_path: Path) -> None:
    tree = xen_tree(tmp_path, capabilities="\n")
    (tree / "sys/bus/xen/drivers/vtpm").mkdir(parents=True)
    assert the(check_tpmfront(dom0(tree))).verdict is Verdict.NOT_APPLICABLE


# Reading.


def test_P10_files_are_bounded_and_pipes_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qemu_vtpm_bridge.toolstack.doctor_host.FILE_MAX_BYTES", 1 << 16)
    host = Host(write(tmp_path, {"long": "x" * 300_000, "etc/modprobe.d/dir.conf/x": ""}))
    assert len(host.read("/long") or "") == 1 << 16
    os.mkfifo(tmp_path / "etc/modprobe.d/pipe.conf")
    assert host.read("/etc/modprobe.d/pipe.conf") is None
    assert host.read("/etc/modprobe.d/dir.conf") is None
    assert host.read("/nothing") is None
    assert host.names("/nothing") == []
    xen_tree(tmp_path)
    assert the(check_tpmfront(dom0(tmp_path))).verdict is Verdict.WARNING


def test_a_root_that_is_none() -> None:
    from qemu_vtpm_bridge.cli import main

    assert main(["doctor", "--root", "/nowhere/at/all"]) == 2
