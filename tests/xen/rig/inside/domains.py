"""A vTPM domain in a domain of its own, frontends in domain 0, one boot.

python3 -m tests.xen.rig.inside.domains
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import trio

from qemu_vtpm_bridge.bridge.tpm import (
    HEADER,
    TPM_RC_FAILURE,
    TPM_RC_INITIALIZE,
    TPM_RC_RETRY,
    Family,
)
from tests.support.page_frontend import create_primary
from tests.support.swtpm_client import GET_RANDOM, SwtpmClient
from tests.xen.rig.inside.clients import SOCKET, beside_another, with_client
from tests.xen.rig.inside.dom0 import (
    DEVICE,
    STATUS,
    boots_twice,
    outlive_xenstored,
    start_liar,
    two_codes,
)
from tests.xen.rig.inside.lab import Checks, Lab, ours, run, running, status, until, xenstore
from tests.xen.rig.inside.suite import between_domains

check = Checks()

JOB_DEADLINE_S = 1200.0

VTPM_JOB = """
python3 -m qemu_vtpm_bridge vtpm --tpm {family} --state-dir /tmp/state &
until [ "$(xenstore-read data/examine 2>/dev/null)" ]; do sleep 1; kill -0 $! || exit; done
xenstore-write data/examined "$(python3 -m qemu_vtpm_bridge doctor --json |
    python3 -c 'import json, sys; report = json.load(sys.stdin); print(report["role"],
    *(f["check"] + "=" + f["verdict"] for f in report["findings"]))')"
wait
"""
"""Besides serving, the domain has the doctor look at it when domain 0 asks."""

LIES_BESIDE = ("length", "nonsense")
"""Two of the liar's; dom0.py has all of them."""

GET_RANDOM_1_2 = bytes.fromhex("00c10000000e0000004600000010")


def start_vtpm_domain(lab: Lab, name: str, family: str = "2.0", *config: str) -> int:
    """Start a vTPM domain; returns its id once its TPM is up."""
    domid = lab.domain(
        name,
        VTPM_JOB.format(family=family),
        "memory=384",
        *config,
    )
    until(
        lambda: xenstore(f"/local/domain/{domid}/data/vtpm-life"), f"the vTPM domain {name} is up"
    )
    return domid


def start_bridge(lab: Lab, backend: str, *words: str) -> None:
    """Have a bridge run whose frontend is connected; the one before is killed."""
    if "bridge" in lab.kept:
        lab.kept["bridge"].kill()
    lab.kept["bridge"] = lab.program(
        "bridge", "run", "--backend", backend, "--attach", "--socket", str(SOCKET),
        "--status-socket", STATUS, *words,
    )  # fmt: skip
    until(lambda: running(STATUS), "the frontend is connected")


@check
def a_vtpm_domain_serves_a_bridge(lab: Lab) -> dict[str, Any]:
    """Commands and a reset between two domains; each owns its own directory."""
    domid = start_vtpm_domain(lab, "vtpm")
    start_bridge(lab, "vtpm")

    with_client(boots_twice)
    data = f"/local/domain/{domid}/data"
    run("xenstore-write", f"{data}/examine", "1")
    role, *verdicts = until(lambda: xenstore(f"{data}/examined"), "the doctor's word").split()
    assert role == "vtpm", role
    assert not [each for each in verdicts if each.endswith("=problem")], verdicts
    backend = f"/local/domain/{domid}/backend/vtpm/0/0"
    listing = run("xenstore-ls", "-fp", f"/local/domain/{domid}/backend")
    assert f'{backend} = ""   (n{domid},r0)' in listing, listing
    return {"domid": domid, "backend": backend, "doctor": verdicts}


@check
def a_lying_vtpm_domain_harms_no_other_guest(lab: Lab) -> dict[str, int]:
    """Another bridge beside this one meets liars, and each time its device is taken away."""
    socket, status_socket = Path("/tmp/liars.sock"), "/tmp/liars.status"
    doors = ("--socket", str(socket), "--status-socket", status_socket)

    def meet_liars() -> None:
        for lie in LIES_BESIDE:
            ours("attach", *DEVICE, "--force")
            liar = start_liar(lab, lie)
            bridge = lab.program("liars-bridge", "run", *DEVICE, *doors)
            until(lambda: running(status_socket), "the liar is connected")
            assert 0 not in with_client(two_codes, socket)
            ours("detach", *DEVICE, "--force")
            assert bridge.end() == 0
            liar.kill()

    return {"commands_meanwhile": beside_another(meet_liars)}


@check
def a_vtpm_domain_destroyed_in_a_command_is_an_error(lab: Lab) -> dict[str, Any]:
    """xl destroy while the TPM makes a key: an answer, and then the next vTPM domain's."""
    old = int(status(STATUS)["frontend"]["backend"].split("/")[3])

    async def lose(client: SwtpmClient) -> dict[str, Any]:
        await client.power_on()
        await client.startup()
        await client.write(create_primary())
        in_flight = lambda: status(STATUS)["pump"]["in-flight"]  # noqa: E731
        await trio.to_thread.run_sync(until, in_flight, "the TPM is at work")
        await trio.to_thread.run_sync(lab.destroy, "vtpm")
        answer = await client.response()
        assert len(answer) == 10, answer.hex()
        lost = answer.hex()
        assert HEADER.unpack(answer)[2] in (TPM_RC_FAILURE, TPM_RC_RETRY), lost
        new = await trio.to_thread.run_sync(start_vtpm_domain, lab, "vtpm")
        assert new != old
        await trio.to_thread.run_sync(until, lambda: running(STATUS), "connected to the new one")
        # The frontend is connected a moment before commands flow again.
        while (code := await client.code(GET_RANDOM)) == TPM_RC_RETRY:
            pass
        assert code == TPM_RC_INITIALIZE, hex(code)
        await client.startup()
        assert await client.code(GET_RANDOM) == 0
        return {"answer": lost, "old": old, "new": new}

    found = with_client(lose)
    until(lambda: not xenstore(f"/local/domain/0/frontend/vtpm/{old}/0/state"), "nothing is left")
    lab.kept["bridge"].kill()
    lab.destroy("vtpm")
    return dict(found)


@check
def the_conformance_suite_holds_between_domains(lab: Lab) -> dict[str, Any]:
    """Grants and events between dom0 and a guest, and XenStore as guests see it."""
    return between_domains(lab)


@check
def the_built_domain_keeps_its_tpm_over_kills(lab: Lab) -> dict[str, Any]:
    """What vtpm-image built: destroyed three times under load, its NV is whole each time."""
    del lab
    job = Path(__file__).parents[1] / "jobs" / "vtpm_image.sh"
    done = subprocess.run(
        ["bash", str(job), "/share/image", "3", "pv"],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=JOB_DEADLINE_S,
    )
    print(done.stdout, flush=True)
    assert done.returncode == 0, done.returncode
    facts = [line for line in done.stdout.splitlines() if " whole after kill " in line]
    assert len(facts) == 3, facts
    assert "its disk was attached, and it serves" in done.stdout
    confined = re.findall(r"(uid [1-9]\d*, no capabilities, Landlock \d, seccomp on)", done.stdout)
    assert len(confined) >= 3, "the domain's program has kept what it was started with"
    serves = re.findall(r"serves (\S+) s after xl create", done.stdout)
    return {
        "kills": 3,
        "served_after_s": [float(each) for each in serves],
        "confined": confined[0],
    }


@check
def the_kernels_frontend_shares_a_vtpm_domain(lab: Lab) -> dict[str, Any]:
    """xen-tpmfront beside the bridge, both served by one vTPM domain of TPM 1.2."""
    start_vtpm_domain(lab, "vtpm12", "1.2")
    start_bridge(lab, "vtpm12", "--tpm", "1.2")
    found = with_client(beside_the_kernel)
    listing = ours("list")
    assert listing.count("Connected") == 4, listing
    return dict(found)


async def beside_the_kernel(client: SwtpmClient) -> dict[str, Any]:
    """Be QEMU, and have the kernel's frontend come to the TPM that is in use."""
    await client.power_on()
    await client.startup(Family.TPM_1_2)
    foreign = ("--backend", "vtpm12", "--path-mode", "device", "--handle", "1")
    await trio.to_thread.run_sync(ours, "attach", *foreign)
    await trio.to_thread.run_sync(run, "modprobe", "xen-tpmfront")
    node, pcrs = Path("/dev/tpm0"), Path("/sys/class/tpm/tpm0/pcrs")
    await trio.to_thread.run_sync(until, node.exists, "the kernel's TPM is there")
    for _ in range(10):
        values = await trio.to_thread.run_sync(pcrs.read_text)
        assert values.startswith("PCR-00:"), values
        assert await client.code(GET_RANDOM_1_2) == 0
    return {"rounds": 10, "pcr0": values.splitlines()[0]}


@check
def xenstored_may_go_away_under_a_vtpm_domain(lab: Lab) -> dict[str, int]:
    """The vTPM domain's ring to XenStore is dead: commands go on over the page."""
    found = outlive_xenstored(lab, Family.TPM_1_2, GET_RANDOM_1_2)
    lab.domains.clear()  # xl cannot end them any more
    return found


if __name__ == "__main__":
    sys.exit(check.run())
