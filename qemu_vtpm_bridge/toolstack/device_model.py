"""The QEMU that is a Xen guest's device model: where it is, what it can, what it is told.

Theory of operation.  Not every QEMU has TPM devices: Debian's build for Xen has none, and
says that `-tpmdev` is an invalid option.  So the program itself is asked, by `-tpmdev help`
and `-device help`, which touch no Xen; the answer is kept until the program changes.

Source: QEMU's qemu-options.hx and qdev-monitor.c; libxl's libxl_dm.c and libxlu_cfg.c for
where a QEMU lies and how a string is written in an xl.cfg.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError

PLACES: Final = (
    "/usr/libexec/xen-qemu-system-i386",
    "/usr/lib/xen-*/bin/qemu-system-i386",
    "/usr/libexec/xen/bin/qemu-system-i386",
    "/usr/lib/xen/bin/qemu-system-i386",
    "/usr/lib64/xen/bin/qemu-system-i386",
    "/usr/local/lib/xen/bin/qemu-system-i386",
    "/usr/local/libexec/xen/bin/qemu-system-i386",
    "/usr/bin/qemu-system-i386",
)
"""Where distributions and Xen's own `make install` put it."""

DEVICES: Final = {"tis": "tpm-tis", "crb": "tpm-crb"}

_CACHE: Final = "qemu-probe.json"
_PROBE_DEADLINE_S: Final = 20.0


def find_device_model(configured: str | None, *, not_this: Path | None = None) -> Path:
    """Return the QEMU to run; raises ConfigError where there is none.

    `not_this` is the wrapper, which must not become itself for ever.
    """
    candidates = [Path(configured)] if configured else usual_device_models()
    for path in candidates:
        if not (path.is_file() and os.access(path, os.X_OK)):
            continue
        if not_this is not None and not_this.exists() and path.samefile(not_this):
            continue
        return path
    raise ConfigError(
        f"{configured} is no program that can be a device model"
        if configured
        else "no QEMU for Xen is where one usually lies",
        state=f"looked at {', '.join(map(str, candidates)) or ', '.join(PLACES)}",
        next_step='write device-model = "/path/of/qemu-system-i386" in [host] of the guests file',
    )


def usual_device_models(root: Path = Path("/")) -> list[Path]:
    """Return what there is at PLACES, the first choice first; `root` is the host's."""
    return [path for place in PLACES for path in sorted(root.glob(place[1:]))]


def tpm_devices(qemu: Path, cache_dir: Path) -> frozenset[str]:
    """Return which of `tis` and `crb` this QEMU can have with a TPM behind a socket.

    Raises ConfigError where it cannot be asked.
    """
    found = qemu.stat()
    key = [str(qemu), found.st_mtime_ns, found.st_size]
    cache = cache_dir / _CACHE
    with suppress(OSError, ValueError):
        document = json.loads(cache.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("qemu") == key:
            return frozenset(DEVICES) & frozenset(map(str, document.get("devices", [])))
    devices = _ask(qemu)
    with suppress(OSError):  # without a cache it is asked each time
        _write(cache, {"qemu": key, "devices": sorted(devices)})
    return devices


def _ask(qemu: Path) -> frozenset[str]:
    if not re.search(r"^\s*emulator\b", _said(qemu, "-tpmdev", "help"), re.MULTILINE):
        return frozenset()
    listed = set(re.findall(r'^name "([^"]+)"', _said(qemu, "-device", "help"), re.MULTILINE))
    return frozenset(kind for kind, name in DEVICES.items() if name in listed)


def _said(qemu: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            [str(qemu), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # QEMU lists TPM backends there, and devices on the other
            timeout=_PROBE_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"{qemu} {' '.join(words)}: {error}",
            state="it is asked whether it has TPM devices",
            next_step="run that by hand, and mend what it says",
        ) from error
    return done.stdout.decode("utf-8", "replace")


def _write(cache: Path, document: Any) -> None:
    cache.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    passing = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        passing.write_text(json.dumps(document), encoding="utf-8")
        passing.replace(cache)
    finally:
        passing.unlink(missing_ok=True)


def qemu_words(socket: Path, device: str) -> list[str]:
    """Return the words that give a QEMU a TPM whose other end listens at the socket."""
    path = str(socket).replace(",", ",,")  # as QEMU wants a comma in a value
    return [
        *("-chardev", f"socket,id=chrvtpm,path={path}"),
        *("-tpmdev", "emulator,id=vtpm0,chardev=chrvtpm"),
        *("-device", f"{DEVICES[device]},tpmdev=vtpm0"),
    ]


def xl_cfg_list(key: str, words: Sequence[str]) -> str:
    """Return a line for an xl.cfg whose value is a list of words."""
    quoted = (word.replace("\\", "\\\\").replace('"', '\\"') for word in words)
    return f"{key} = [" + ", ".join(f'"{word}"' for word in quoted) + "]"
