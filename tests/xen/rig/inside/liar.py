"""A backend in domain 0 that lies, for the checks in `dom0.py`.

    python3 -m tests.xen.rig.inside.liar LIE

It connects as a vTPM domain does, says that its TPM waits for Startup, and then lies:
`length` and `short` about how long a response is, `state` with states that come and go,
`header` with a response whose header says another size, `nonsense` in XenStore.
"""

from __future__ import annotations

import itertools
import random
import struct
import sys
import time

from qemu_vtpm_bridge._shim import ffi
from qemu_vtpm_bridge.xen.platform import Platform
from tests.xen.rig.inside.lab import run, until, xenstore

BACKEND = "/local/domain/0/backend/vtpm/0/0"
FRONTEND = "/local/domain/0/frontend/vtpm/0/0"
SUBMIT, FINISH = 1, 2
WANTS_STARTUP = bytes.fromhex("80010000000a00000100")
GOOD = bytes.fromhex("80010000000a00000000")
EVIDENCE_COMMANDS = 1


def main(lie: str) -> None:
    """Connect, and lie for ever."""
    with Platform.open_xen() as platform:
        for turn in itertools.count():
            run("xenstore-write", f"{BACKEND}/feature-protocol-v2", "1", f"{BACKEND}/state", "2")
            until(lambda: xenstore(f"{FRONTEND}/state") in ("3", "4"), "the frontend is ready")
            page = platform.map_page(0, int(xenstore(f"{FRONTEND}/ring-ref")))
            channel = platform.bind_interdomain(0, int(xenstore(f"{FRONTEND}/event-channel")))
            run("xenstore-write", f"{BACKEND}/state", "4")
            shared = memoryview(ffi.buffer(page.cdata.shared, 4096)).cast("B")
            serve(lie, shared, channel, turn)
            channel.close()
            del shared
            page.close()


def serve(lie: str, shared: memoryview, channel: object, turn: int) -> None:
    """Answer until the frontend closes."""
    answered = 0
    while xenstore(f"{FRONTEND}/state") in ("3", "4"):
        end = time.monotonic() + 1
        while time.monotonic() < end:
            if shared[4] != SUBMIT:
                time.sleep(0.001)
                continue
            if turn == 0 and answered < EVIDENCE_COMMANDS:
                finish(shared, WANTS_STARTUP, len(WANTS_STARTUP))
            else:
                tell(lie, shared)
            answered += 1
            channel.notify()  # type: ignore[attr-defined]


def tell(lie: str, shared: memoryview) -> None:
    """Answer one command with a lie."""
    if lie == "length":
        finish(shared, GOOD, 0xFFFFFFFF)
    elif lie == "short":
        finish(shared, GOOD, 4)
    elif lie == "header":
        finish(shared, bytes.fromhex("80010000ffff00000000"), 10)
    elif lie == "state":
        for _ in range(1000):
            shared[4] = random.choice((0, 1, 3, 4, 77, 255))
        finish(shared, b"\xff" * 12, 12)
    else:
        for word in ("banana", "-1", "9" * 100, "4\n", ""):
            run("xenstore-write", f"{BACKEND}/state", word)


def finish(shared: memoryview, response: bytes, length: int) -> None:
    """Put a response on the page."""
    shared[8 : 8 + len(response)] = response
    shared[0:4] = struct.pack("<I", length)
    shared[4] = FINISH


if __name__ == "__main__":
    main(sys.argv[1])
