"""`python -m qemu_vtpm_bridge.embedded WORLD [ID:NAME ...]`: an embedded Xen as a process."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from .world import run_embedded_xen


def parse_domain(word: str) -> tuple[int, str]:
    """Return the id and name in `ID:NAME`; raises ValueError."""
    domid, _, name = word.partition(":")
    return int(domid), name or f"dom{domid}"


if __name__ == "__main__":
    trio.run(run_embedded_xen, Path(sys.argv[1]), [parse_domain(word) for word in sys.argv[2:]])
