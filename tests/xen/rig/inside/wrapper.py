"""xl's wrapper and the guests file, laid out in dom0 as an installed package has them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from qemu_vtpm_bridge.toolstack.guests import USER
from tests.xen.rig.inside.lab import status

PASSWD = Path("/etc/passwd")
RUN_DIR = Path("/run/qemu-vtpm-bridge")
GUESTS = Path("/etc/qemu-vtpm-bridge/guests.toml")
WRAPPER = Path("/tmp/qemu-vtpm-bridge-dm")
TPM_QEMU = Path("/share/qemu")

WRAPPER_TEXT = f"""#!/bin/sh
export PYTHONPATH={os.environ.get("PYTHONPATH", "")}
exec {sys.executable} -c 'import sys; from qemu_vtpm_bridge.toolstack.xl import main
sys.exit(main())' "$@"
"""
"""What pip makes of the package's console script; here the package is in no usual place."""


def lay_out(guests: str) -> None:
    """Put the wrapper and a guests file where they belong."""
    WRAPPER.write_text(WRAPPER_TEXT)
    WRAPPER.chmod(0o755)
    with PASSWD.open("r+") as users:
        if f"\n{USER}:" not in users.read():
            users.write(f"{USER}:x:998:998::/:/usr/sbin/nologin\n")
    GUESTS.parent.mkdir(parents=True, exist_ok=True)
    GUESTS.write_text(guests)


def served(name: str) -> dict[str, Any]:
    """Return the status of the guest's bridge, empty while it has none.

    It is the package's user.
    """
    document = status(str(RUN_DIR / f"{name}.status"))
    assert not document or document["confinement"]["user"] == USER, document
    return document


def bridge_pid(stem: str) -> str:
    """Return the process id of the guest's bridge."""
    return (RUN_DIR / f"{stem}.bridge").read_text().strip()
