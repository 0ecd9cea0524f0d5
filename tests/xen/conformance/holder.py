"""A program that holds a granted page and a port until it is killed.

`python -m tests.xen.conformance.holder xen|SOCKET DOMID` grants a page to DOMID with a
known text in it, makes a port for it, prints both numbers and waits.
"""

from __future__ import annotations

import signal
import sys

from qemu_vtpm_bridge._shim import ffi
from qemu_vtpm_bridge.xen.platform import Platform

TEXT = b"held by a program"
OFFSET = 1024
"""Behind what a page shared for tpmif has at its beginning, which is zeroed at a death."""


def main() -> None:
    """Hold them."""
    where, domid = sys.argv[1], int(sys.argv[2])
    with Platform.open_xen() if where == "xen" else Platform.open_embedded(where) as platform:
        page = platform.share_page(domid)
        channel = platform.alloc_unbound(domid)
        ffi.buffer(page.cdata.shared, 4096)[OFFSET : OFFSET + len(TEXT)] = TEXT
        print(page.ref, channel.port, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
