"""Drives the vTPM domain in the rig's domain 0; the standard library only.

Says what it sees in lines `time: fact`, and ends with status 0 when everything was whole.
"""

from __future__ import annotations

import argparse
import array
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "vtpm"
BEGAN = time.monotonic()
SEED = 7
CMD_SET_DATAFD, CMD_STOP, CMD_INIT = 0x10, 0x0E, 2
DEADLINE_S = 900.0
STEPS_MIN, STEPS_MAX = 5, 30
"""So many steps are answered before `xl destroy` begins; more are, while it works."""


def say(fact: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.1f}: {fact}", flush=True)


def run(*words: str, check: bool = True) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr or done.stdout}")
    return done.stdout.strip()


def wait_for(what: str, fact: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if found := fact():
            return found
        time.sleep(1)  # each look is a process, and the machine is an emulated one
    raise SystemExit(f"it never happened: {what}")


class Client:
    """What QEMU is to the bridge, as far as this needs it."""

    def __init__(self, path: Path) -> None:
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.control.settimeout(DEADLINE_S)
        self.control.connect(str(path))
        self.data, theirs = socket.socketpair()
        self.data.settimeout(DEADLINE_S)
        rights = array.array("i", [theirs.fileno()])
        self.control.sendmsg(
            [struct.pack(">I", CMD_SET_DATAFD)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        self._done()
        theirs.close()
        for request in (struct.pack(">I", CMD_STOP), struct.pack(">II", CMD_INIT, 0)):
            self.control.sendall(request)
            self._done()

    def _done(self) -> None:
        result = self.control.recv(4)
        if result != bytes(4):
            raise SystemExit(f"the bridge answered {result.hex()}")

    def tpm(self, command: bytes) -> bytes:
        self.data.sendall(command)
        return self.response()

    def response(self) -> bytes:
        raw = b""
        while len(raw) < 10 or len(raw) < int.from_bytes(raw[2:6], "big"):
            chunk = self.data.recv(4096)
            if not chunk:
                raise SystemExit("the bridge closed the data channel")
            raw += chunk
        return raw


class Rig:
    """The vTPM domain and its bridge."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.bridge: subprocess.Popen[bytes] | None = None
        self.domid = ""

    def console(self) -> str:
        path = Path(f"/tmp/guest-{NAME}.log")
        return path.read_text("latin-1") if path.exists() else ""

    def create(self, config: str = "vtpm.cfg") -> float:
        """Start the domain; return how long it took until it served."""
        began = time.monotonic()
        run("xl", "create", "-q", str(self.work / config))
        self.domid = run("xl", "domid", NAME)
        life = f"/local/domain/{self.domid}/data/vtpm-life"
        wait_for("the vTPM domain is up", lambda: run("xenstore-read", life, check=False))
        return time.monotonic() - began

    def ours(self, *words: str) -> list[str]:
        clean = ["/bin/busybox", "env", "-i", "PYTHONHOME=/usr", "PATH=/usr/bin", "LC_ALL=C.UTF-8"]
        python = ["/usr/bin/python3", "-s", "-S", "-P", "-m", "qemu_vtpm_bridge"]
        return ["chroot", str(self.work / "root"), *clean, *python, *words]

    def connect(self) -> Client:
        """Attach and start a bridge; return a client that the TPM is powered on for."""
        run(*self.ours("attach", "--backend", NAME, "--force"))
        path = self.work / "root/tmp/bridge.sock"
        path.unlink(missing_ok=True)
        words = self.ours("run", "--backend", NAME, "--socket", "/tmp/bridge.sock")
        with (self.work / "bridge.log").open("ab") as log:
            self.bridge = subprocess.Popen(words, stdout=log, stderr=log)
        wait_for("the bridge listens", path.exists)
        return Client(path)

    def disconnect(self) -> None:
        if self.bridge is not None:
            self.bridge.kill()
            self.bridge.wait()


def booted(client: Client, load: ModuleType) -> None:
    # Until the evidence of a power cycle is there the bridge holds commands.
    for command in (load.STARTUP, load.create_primary()):
        code = load.response_code(client.tpm(command))
        if code:
            raise SystemExit(f"the TPM answered {code:#x} while it was started")


def check(client: Client, shelf: Any, load: ModuleType) -> None:
    shelf.check({name: client.tpm(raw) for name, raw in shelf.questions().items()})
    answer = client.tpm(load.GET_TEST_RESULT)
    assert load.response_code(answer) == 0, "the TPM is in failure mode"
    assert answer[-4:] == bytes(4), "the TPM's self test failed"


def load_and_destroy(client: Client, shelf: Any, load: ModuleType, rng: random.Random) -> None:
    """Work the TPM and destroy the domain while it works on."""
    steps = shelf.steps(rng)
    ends = shelf.answered + rng.randrange(STEPS_MIN, STEPS_MAX)
    killer = None
    while True:
        if killer is None and shelf.answered >= ends:
            killer = subprocess.Popen(["xl", "destroy", NAME])
        step = next(steps)
        shelf.sent(step)
        response = client.tpm(step.command)
        if load.response_code(response) and killer is not None:
            break
        shelf.done(response)
    assert killer is not None
    killer.wait()
    gone()


def gone() -> None:
    """Return once the name is free for another domain."""
    wait_for("the domain is gone", lambda: not run("xl", "domid", NAME, check=False))


def without_its_disk(rig: Rig) -> None:
    """See that the domain serves nothing when its disk is missing, and goes on when it comes."""
    lines = (rig.work / "vtpm.cfg").read_text().splitlines()
    disk = next(line for line in lines if line.startswith("disk = "))
    bare = [line for line in lines if not line.startswith("disk = ")]
    (rig.work / "bare.cfg").write_text("\n".join(bare) + "\n")
    run("xl", "create", "-q", str(rig.work / "bare.cfg"))
    rig.domid = run("xl", "domid", NAME)
    wait_for("the domain misses its disk", lambda: "NOT SERVING" in rig.console())
    nodes = run("xenstore-ls", f"/local/domain/{rig.domid}/data", check=False)
    assert "vtpm-life" not in nodes, "it serves without its disk"
    say("without its disk: " + next(x for x in rig.console().splitlines() if "NOT SERVING" in x))
    run("xl", "block-attach", NAME, disk.split('"')[1])
    life = f"/local/domain/{rig.domid}/data/vtpm-life"
    wait_for("it goes on with its disk", lambda: run("xenstore-read", life, check=False))
    say("its disk was attached, and it serves")
    run("xl", "shutdown", "-w", NAME)
    gone()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=3)
    args = parser.parse_args()
    sys.path.insert(0, str(args.tests / "support"))
    import nv_load as load

    rig, rng, shelf = Rig(args.work), random.Random(SEED), load.Shelf()
    try:
        for kills in range(args.kills + 1):
            say(f"the domain serves {rig.create():.1f} s after xl create")
            client = rig.connect()
            booted(client, load)
            if kills == 0:
                for command in shelf.set_up():
                    assert load.response_code(client.tpm(command)) == 0
                shelf.counter_is(load.counter_value(client.tpm(shelf.questions()["counter"])))
            else:
                check(client, shelf, load)
                say(f"whole after kill {kills}: {shelf.as_dict()}")
            if kills < args.kills:
                load_and_destroy(client, shelf, load, rng)
                say(f"destroyed under load after {shelf.answered} commands")
            rig.disconnect()
        run("xl", "shutdown", "-w", NAME)
        gone()
        say("xl shutdown: it ended in order")
        without_its_disk(rig)
    finally:
        rig.disconnect()
        lines = [line for line in rig.console().splitlines() if line.strip()]
        print("--- the domain's console, its end ---", *lines[-40:], sep="\n")
        log = args.work / "bridge.log"
        if log.exists():
            print("--- the bridge, its end ---", *log.read_text().splitlines()[-30:], sep="\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("LC_ALL", "C")
    sys.exit(main())
