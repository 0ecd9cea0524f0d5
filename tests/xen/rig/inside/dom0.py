"""Both ends in domain 0, on real grants and event channels, one boot.

python3 -m tests.xen.rig.inside.dom0
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from qemu_vtpm_bridge.bridge.tpm import HEADER, TPM_RC_FAILURE, TPM_RC_RETRY, Family
from qemu_vtpm_bridge.errors import XenError
from qemu_vtpm_bridge.xen.ioreq import IoreqServer
from qemu_vtpm_bridge.xen.platform import Platform
from tests.support.page_frontend import create_primary
from tests.support.swtpm_client import GET_RANDOM, PCR_EXTEND_7, ZERO_PCR, SwtpmClient
from tests.xen.rig.inside.clients import SOCKET, with_client
from tests.xen.rig.inside.lab import (
    OURS,
    PROGRAM,
    Checks,
    Lab,
    Program,
    install_program,
    ours,
    refused,
    run,
    running,
    status,
    until,
)
from tests.xen.rig.inside.suite import STORE, conformance, create_paused

check = Checks()

STATUS = "/tmp/bridge.status"
TCP_PORT = 2321
DEVICE = ("--backend", "0", "--handle", "0")
PATHS = {
    "seed": "/local/domain/0/frontend/vtpm/0/0",
    "device": "/local/domain/0/device/vtpm/0",
    "zeros": "/local/domain/00/device/vtpm/0",
    "explicit": "/local/domain/0/elsewhere/tpm",
}


COMMANDS = 50
LIES = ("length", "short", "header", "state", "nonsense")
"""The liar's."""


def start_vtpm(lab: Lab, *words: str) -> Program:
    """Have a vTPM domain's program run here."""
    if "vtpm" in lab.kept:
        lab.kept["vtpm"].kill()
    vtpm = lab.program(
        "vtpm", "vtpm", "--state-dir", "/tmp/vtpm", "--status-socket", "/tmp/v.status", *words
    )
    until(lambda: status("/tmp/v.status").get("engine", {}).get("running"), "the TPM runs")
    lab.kept["vtpm"] = vtpm
    return vtpm


def start_bridge(lab: Lab, *words: str) -> Program:
    """Have a bridge run whose frontend is connected; the one before is killed."""
    if "bridge" in lab.kept:
        lab.kept["bridge"].kill()
    where = () if "--path-mode" in words else DEVICE
    door = () if "--socket" in words else ("--socket", str(SOCKET))
    bridge = lab.program("bridge", "run", *where, *door, "--status-socket", STATUS, *words)
    lab.kept["bridge"] = bridge
    until(lambda: running(STATUS), "the frontend is connected")
    return bridge


async def boots_twice(client: SwtpmClient) -> None:
    """Be a QEMU whose guest is reset: the second boot finds PCR 7 at zero."""
    assert await powered_code(client) == 0
    assert await client.code(PCR_EXTEND_7) == 0
    assert await client.pcr_7() != ZERO_PCR
    assert await client.stop() == 0
    assert await client.init() == 0
    await client.startup()
    assert await client.pcr_7() == ZERO_PCR


async def powered_code(client: SwtpmClient) -> int:
    await client.power_on()
    await client.startup()
    return await client.code(GET_RANDOM)


@check
def what_is_missing_is_named(lab: Lab) -> dict[str, str]:
    """Modules, nodes and rights, each by its name and with what helps."""
    del lab
    found = {}
    with Platform.open_xen() as platform:
        for module, use in (
            ("gntalloc", lambda: platform.share_page(0)),
            ("gntdev", lambda: platform.map_page(0, 8)),
        ):
            found[module] = without(module, use)
            assert f"xen-{module}" in found[module]
    found["evtchn"] = without("evtchn", Platform.open_xen)
    assert "/dev/xen/evtchn" in found["evtchn"]
    done = subprocess.run(
        [sys.executable, "-c", "from qemu_vtpm_bridge.xen.platform import Platform\n"
         "Platform.open_xen()"],
        user=65534, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert "Permission denied" in done.stderr, done.stderr
    assert "/dev/xen/evtchn" in done.stderr, done.stderr
    found["unprivileged"] = done.stderr.strip().splitlines()[-1]
    found["no such guest"] = complaint_of(lambda: IoreqServer(77))
    return found


def without(node: str, use: Callable[[], object]) -> str:
    """Return what is complained while a node of /dev/xen is missing."""
    place = Path(f"/dev/xen/{node}")
    hidden = place.rename(f"/dev/xen/{node}.hidden")
    try:
        return complaint_of(use)
    finally:
        hidden.rename(place)


def complaint_of(use: Callable[[], object]) -> str:
    """Return the text of the XenError that this raises."""
    try:
        use()
    except XenError as error:
        return str(error)
    raise AssertionError("nothing is missed")


@check
def a_command_goes_through(lab: Lab) -> dict[str, float]:
    """QEMU's start, Startup, many commands, over gntalloc, gntdev and evtchn."""
    start_vtpm(lab)
    assert "own vTPM domain" in refused("attach", *DEVICE)
    ours("attach", *DEVICE, "--force")
    start_bridge(lab)

    async def commands(client: SwtpmClient) -> list[float]:
        assert await powered_code(client) == 0
        times = []
        for _ in range(COMMANDS):
            began = time.monotonic()
            assert await client.code(GET_RANDOM) == 0
            times.append(1000 * (time.monotonic() - began))
        return sorted(times)

    times = with_client(commands)
    return {"best_ms": times[0], "median_ms": times[len(times) // 2], "worst_ms": times[-1]}


@check
def tpm2_tools_are_served(lab: Lab) -> dict[str, str]:
    """tpm2-tools over TCP, through the same page."""
    bridge = start_bridge(lab, "--socket", f"tcp={TCP_PORT}")
    run("swtpm_ioctl", "--tcp", f"127.0.0.1:{TCP_PORT + 1}", "-i")
    tcti = f"swtpm:host=127.0.0.1,port={TCP_PORT}"
    run("tpm2_startup", "-T", tcti, "-c")
    random = run("tpm2_getrandom", "-T", tcti, "--hex", "16").strip()
    assert len(random) == 32, random
    digest = "5a" * 32
    run("tpm2_pcrextend", "-T", tcti, f"16:sha256={digest}")
    pcr = run("tpm2_pcrread", "-T", tcti, "sha256:16")
    assert "0x" in pcr, pcr
    assert "0" * 64 not in pcr, pcr
    run("tpm2_createprimary", "-T", tcti, "-G", "ecc", "-c", "/tmp/primary")
    assert bridge.end() == 0
    return {"pcr16": pcr.split("0x")[1][:16]}


@check
def a_reset_is_a_reset(lab: Lab) -> dict[str, int]:
    """CMD_INIT again: the vTPM domain power-cycles the TPM, PCR 7 is back at zero."""
    start_bridge(lab)
    with_client(boots_twice)
    return {"connections": int(status(STATUS)["frontend"]["connections"])}


@check
def a_killed_bridge_comes_back(lab: Lab) -> dict[str, str]:
    """kill -9 of the bridge, idle and with a command in flight: the next one goes on."""
    for moment in ("idle", "in flight"):
        start_bridge(lab)

        async def leave(client: SwtpmClient, moment: str = moment) -> None:
            assert await powered_code(client) == 0
            if moment == "in flight":
                await client.write(create_primary())
                pump = lambda: status("/tmp/v.status")["pump"]["in-flight"]  # noqa: E731
                await trio.to_thread.run_sync(until, pump, "the TPM is at work")
            lab.kept["bridge"].kill()

        with_client(leave)
        start_bridge(lab)
        assert with_client(powered_code) == 0
    return {"grace": "none: our vTPM domain offers resets"}


@check
def a_killed_vtpm_domain_comes_back(lab: Lab) -> dict[str, int]:
    """kill -9 of the vTPM domain's program: a held command, then a TPM that wants Startup."""
    start_bridge(lab)

    async def survive(client: SwtpmClient) -> int:
        assert await powered_code(client) == 0
        await trio.to_thread.run_sync(start_vtpm, lab)
        await trio.to_thread.run_sync(until, lambda: running(STATUS), "connected again")
        # It goes on where it was, wants Startup, or has lost its state: see docs/peers.md.
        code = await client.code(GET_RANDOM)
        assert code in (0, 0x100, 0x101), hex(code)
        assert await client.stop() == 0
        assert await client.init() == 0
        await client.startup()
        assert await client.code(GET_RANDOM) == 0
        return code

    return {"code": hex(with_client(survive))}


def diagnosed() -> tuple[int, dict[str, list[str]]]:
    """Have the doctor look; return its exit status, and the commands that mend what it found.

    Those are by the check that found something.
    """
    done = subprocess.run(
        [*OURS, "doctor", "--json"], check=False, capture_output=True, text=True, timeout=300
    )
    found: dict[str, list[str]] = {}
    for each in json.loads(done.stdout)["findings"]:
        print(f"{each['verdict']:15} {each['check']:15} {each['summary']}")
        if each["verdict"] in ("problem", "warning"):
            mends = [mend["command"] for mend in each["mend"] if mend["command"]]
            found.setdefault(each["check"], []).extend(mends)
    return done.returncode, found


LEFT = "/local/domain/0/frontend/vtpm/7/0"
FAULTS = {
    "xen.modules": "modprobe -r xen-gntalloc",
    "xen.devices": "chmod 666 /dev/xen/evtchn",
    "xen.tpmfront": "modprobe xen-tpmfront",
    "device.leftover": f"xenstore-write {LEFT}/backend /local/domain/7/backend/vtpm/0/0 "
    f"{LEFT}/backend-id 7 {LEFT}/state 1",
}
"""What breaks this host, by the check that has to find it."""
WARNINGS = {"xen.tpmfront"}
"""Those that are no problem yet."""


@check
def the_doctor_mends_a_real_xen(lab: Lab) -> dict[str, Any]:
    """No problem on a host that works; each fault is found, and what is printed mends it."""
    install_program()
    assert diagnosed()[0] == 0
    for name in ("bridge", "vtpm"):
        lab.kept[name].kill()
    found = {}
    for name, fault in FAULTS.items():
        run("sh", "-c", fault)
        code, mends = diagnosed()
        assert code == (0 if name in WARNINGS else 3), (fault, code, mends)
        for command in mends[name]:
            run("sh", "-c", f"PATH={PROGRAM.parent}:$PATH; {command}")
        code, left = diagnosed()
        assert code == 0, (name, left)
        assert name not in left, left
        found[fault] = mends[name]
    start_vtpm(lab)
    start_bridge(lab)
    assert with_client(powered_code) == 0
    return found


@check
def unprivileged_ends_serve(lab: Lab) -> dict[str, Any]:
    """--confine require and --run-as on real devices: a reset, and either end killed."""
    private = ("--confine", "require", "--run-as", "65534:65534")
    start_vtpm(lab, *private)
    bridge = start_bridge(lab, *private)

    with_client(boots_twice)
    bridge.kill()
    bridge = start_bridge(lab, *private)
    with_client(boots_twice)
    lab.kept["vtpm"].kill()
    start_vtpm(lab, *private)
    until(lambda: running(STATUS), "connected to the next one")
    with_client(boots_twice)
    said = Path(f"/proc/{bridge.process.pid}/status").read_text()
    for line in ("Uid:\t65534\t65534\t65534\t65534", "CapEff:\t0000000000000000",
                 "NoNewPrivs:\t1", "Seccomp:\t2"):  # fmt: skip
        assert line in said, said
    found = {"bridge": status(STATUS)["confinement"]}
    found["vtpm"] = status("/tmp/v.status")["confinement"]
    lab.kept["vtpm"].kill()
    run("chown", "-R", "0:0", "/tmp/vtpm")
    start_vtpm(lab)
    start_bridge(lab)
    return found


@check
def every_path_mode_connects(lab: Lab) -> dict[str, str]:
    """Frontend directories in all their places; the kernel's own driver is not let in."""
    assert start_bridge(lab).end() == 0
    ours("detach", *DEVICE)
    for mode, frontend in PATHS.items():
        where = (*DEVICE, "--path-mode", mode)
        if mode == "explicit":
            where = (*where, "--frontend-path", frontend)
        ours("attach", *where, "--force")
        bridge = start_bridge(lab, *where)
        assert status(STATUS)["frontend"]["path"] == frontend
        assert with_client(powered_code) == 0
        assert bridge.end() == 0
        ours("detach", *where)
        assert "vtpm/0/0" not in run("xenstore-ls", "-f", "/local/domain/0/backend", check=False)
    run("modprobe", "xen-tpmfront")
    complaint = refused("attach", *DEVICE, "--path-mode", "device", "--force")
    assert "xen-tpmfront" in complaint, complaint
    run("rmmod", "xen-tpmfront")
    return {"refused": complaint.strip()}


@check
def a_detach_under_load_is_an_error_not_a_hang(lab: Lab) -> dict[str, int]:
    """The toolstack takes the device away while commands run; they end with RETRY."""
    ours("attach", *DEVICE, "--force")
    start_bridge(lab)

    async def load(client: SwtpmClient) -> int:
        assert await powered_code(client) == 0
        assert "frontend" in await trio.to_thread.run_sync(refused, "detach", *DEVICE)
        await trio.to_thread.run_sync(ours, "detach", *DEVICE, "--force")
        answered = 0
        while (code := await client.code(GET_RANDOM)) == 0:
            answered += 1
        assert code == TPM_RC_RETRY, hex(code)
        await trio.to_thread.run_sync(ours, "attach", *DEVICE, "--force")
        await trio.to_thread.run_sync(until, lambda: running(STATUS), "connected again")
        assert await client.code(GET_RANDOM) == 0
        return answered

    return {"answered_before": with_client(load)}


@check
def the_conformance_suite_holds(lab: Lab) -> dict[str, Any]:
    """What the embedded Xen imitates, asked of the real XenStore, grants and event channels."""
    del lab
    peers = [create_paused() for _ in range(2)]
    found = {"store": conformance(*STORE), "grants and events": conformance("--xen")}
    for domid in peers:
        run("xl", "destroy", str(domid))
    assert all(each["passed"] > 20 for each in found.values()), found
    return found


@check
def lying_vtpm_domains_get_errors(lab: Lab) -> dict[str, Any]:
    """A backend of random states, wrong lengths and nonsense in XenStore; then a good one."""
    lab.kept["bridge"].kill()
    ours("detach", *DEVICE, "--force")
    assert lab.kept["vtpm"].end() == 0
    found = {lie: codes_of_a_liar(lab, lie) for lie in LIES}
    start_vtpm(lab)
    ours("attach", *DEVICE, "--force")
    start_bridge(lab)
    assert with_client(powered_code) == 0
    return found


def codes_of_a_liar(lab: Lab, lie: str) -> list[str]:
    """Return what two commands get from a bridge whose vTPM domain lies."""
    ours("attach", *DEVICE, "--force")
    liar = start_liar(lab, lie)
    bridge = start_bridge(lab)
    first, second = with_client(two_codes)
    assert first == TPM_RC_FAILURE, hex(first)
    assert second in (TPM_RC_FAILURE, TPM_RC_RETRY), hex(second)
    if lie != "nonsense":  # it goes on with that
        connections = lambda: status(STATUS)["frontend"]["connections"]  # noqa: E731
        until(lambda: connections() > 1, "the connection is replaced")
    assert bridge.process.poll() is None
    liar.kill()
    ours("detach", *DEVICE, "--force")
    return [hex(first), hex(second)]


def start_liar(lab: Lab, lie: str) -> Program:
    """Have a backend here that lies to the frontend of DEVICE."""
    return lab.program_of("liar", sys.executable, "-m", "tests.xen.rig.inside.liar", lie)


async def two_codes(client: SwtpmClient) -> list[int]:
    """Return the codes that two commands get from who cannot carry them out."""
    await client.power_on()
    responses = [await client.tpm(GET_RANDOM) for _ in range(2)]
    assert {len(each) for each in responses} == {10}, responses
    return [HEADER.unpack_from(each)[2] for each in responses]


@check
def xenstored_may_go_away(lab: Lab) -> dict[str, int]:
    """xenstored dies: commands go on over the page, and the bridge stays."""
    start_bridge(lab)
    return outlive_xenstored(lab, Family.TPM_2_0, GET_RANDOM)


def outlive_xenstored(lab: Lab, family: Family, command: bytes) -> dict[str, int]:
    """Kill xenstored, and have the TPM answer a command many times."""
    pid = int(Path("/run/xen/xenstored.pid").read_text())

    async def go_on(client: SwtpmClient) -> None:
        await client.power_on()
        await client.startup(family)
        os.kill(pid, signal.SIGKILL)
        for _ in range(COMMANDS):
            assert await client.code(command) == 0

    with_client(go_on)
    assert lab.kept["bridge"].process.poll() is None
    return {"commands": COMMANDS}


if __name__ == "__main__":
    sys.exit(check.run())
