"""The conformance suite in dom0, and the domains that it needs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.xen.conformance.address import connect
from tests.xen.rig.inside.lab import Lab, Program, run, until

SUITE_DEADLINE_S: Final = 900.0

XENSTORED: Final = "/run/xenstored/socket"

_CREATE: Final = Path(__file__).with_name("create-paused.sh")
STORE: Final = (
    *("--socket", XENSTORED, "--create-command", f"sh {_CREATE}"),
    *("--destroy-command", "xl destroy"),
)
"""What to say for checks of XenStore."""

AGENT_JOB: Final = """
modprobe xen-netfront
until busybox ifconfig eth0 10.77.$(xenstore-read domid).2 netmask 255.255.255.0 up
do sleep 0.2; done
exec python3 -m conformance.agent --xen --sides tcp:0.0.0.0:7001 \
    --store tcp:0.0.0.0:7002=/dev/xen/xenbus
"""

VIF_SCRIPT: Final = Path(__file__).with_name("vif.sh")


def conformance(*words: str) -> dict[str, int]:
    """Run the suite and return its summary; raises AssertionError where a check failed."""
    suite = (sys.executable, "-m", "tests.xen.conformance", "--json")
    printed = run(*suite, *words, check=False, deadline_s=SUITE_DEADLINE_S).splitlines()
    assert printed, words
    *results, last = [json.loads(line) for line in printed]
    assert "summary" in last, last
    summary = dict(last["summary"])
    for result in results:
        if result["verdict"] not in ("passed", "not run"):
            print(f"{result['verdict']}: {result['check']}: {result['detail']}", flush=True)
    assert not summary["failed"], (words, summary)
    assert not summary["a known difference is no more"], (words, summary)
    return {verdict: count for verdict, count in summary.items() if count}


def create_paused() -> int:
    """Create a domain that never runs; return its id."""
    return int(run("sh", str(_CREATE)).split()[-1])


@dataclass
class AgentDomain:
    """A domain with an agent in it."""

    domid: int

    @property
    def sides(self) -> str:
        """Where its agent does what a check of grants and events asks."""
        return f"{self.domid}=tcp:10.77.{self.domid}.2:7001"

    @property
    def store(self) -> str:
        """Where its agent passes on what XenStore is asked."""
        return f"{self.domid}=tcp:10.77.{self.domid}.2:7002"


def start_agent(lab: Lab, name: str) -> AgentDomain:
    """Start a domain with an agent in it, which is reached over a network of its own."""
    run("modprobe", "xen-netback")
    package = Path(__file__).parents[2] / "conformance"
    vif = f"vif=['script={VIF_SCRIPT}']"
    agent = AgentDomain(lab.domain(name, AGENT_JOB, vif, "memory=192", files=(package,)))
    until(lambda: answers(agent.sides), "the agent answers")
    return agent


def answers(where: str) -> bool:
    """Return whether somebody listens there."""
    try:
        connect(where.split("=", 1)[1]).close()
    except OSError:
        return False
    return True


def act_for(lab: Lab, *domids: int) -> tuple[Program, list[str]]:
    """Have a program act as paused domains; return it, and `DOMID=PATH` for each."""
    words = [f"{domid}=/tmp/store-of-{domid}" for domid in domids]
    module = (sys.executable, "-m", "tests.xen.conformance.paused", "--socket", XENSTORED)
    program = lab.program_of("paused", *module, *words)
    until(lambda: program.said("serving"), "the paused domains' connections")
    return program, words


def guests(*words: str) -> tuple[str, ...]:
    """Return what to say for checks with these guests."""
    return (*STORE, "--need", "GUESTS", *(part for word in words for part in ("--guest", word)))


def between_domains(lab: Lab) -> dict[str, Any]:
    """Run what needs a second domain; return the summaries."""
    agent = start_agent(lab, "agent")
    found: dict[str, Any] = {
        "dom0 shares": conformance("--xen", "--other", agent.sides),
        "domU shares": conformance("--xen", "--one", agent.sides),
    }
    paused = create_paused(), create_paused()
    program, (first, second) = act_for(lab, *paused)
    # The driver's guest has the lower id, so that it is the first one.  A check gives the
    # second one a target, for good: it can be the first one only afterwards.
    found["through the guest's kernel"] = conformance(
        *guests(agent.store, first), "--server", "xenbus"
    )
    found["straight from the ring"] = conformance(*guests(first, second))
    program.kill()  # Xen keeps a domain whose pages are mapped
    for domid in paused:
        run("xl", "destroy", str(domid))
    lab.destroy("agent")
    return found
