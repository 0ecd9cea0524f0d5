"""What a guest does with its TPM, through Linux' own driver; standard library only.

    python3 guest_tpm.py read PCR | extend PCR | random | time COUNT

Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import Any

SYSFS = Path("/sys/class/tpm/tpm0")
DIGEST = b"\x5a"
TRIES = 5


def family() -> int:
    """Return 1 or 2."""
    return int((SYSFS / "tpm_version_major").read_text())


def transmit(command: bytes) -> bytes:
    """Send a command to /dev/tpm0; a driver's timeout under an emulator is tried again."""
    for attempt in range(TRIES):
        try:
            fd = os.open("/dev/tpm0", os.O_RDWR)
            try:
                os.write(fd, command)
                return os.read(fd, 4096)
            finally:
                os.close(fd)
        except OSError as error:
            if attempt == TRIES - 1:
                return struct.pack(">HII", 0, 10, 0x10000 + (error.errno or 0))
            time.sleep(0.5)
    raise AssertionError


def pcr_read(pcr: int) -> bytes:
    """Return the command that reads a PCR, of SHA-256 or 1.2's."""
    if family() == 1:
        return struct.pack(">HIII", 0xC1, 14, 0x15, pcr)
    selection = bytearray(3)
    selection[pcr // 8] = 1 << pcr % 8
    return struct.pack(">HIIIHB", 0x8001, 20, 0x17E, 1, 0xB, 3) + bytes(selection)


def extend(pcr: int) -> bytes:
    """Return the command that extends a PCR."""
    if family() == 1:
        return struct.pack(">HIII", 0xC1, 34, 0x14, pcr) + DIGEST * 20
    session = struct.pack(">IIHBH", 9, 0x40000009, 0, 0, 0)
    body = struct.pack(">I", pcr) + session + struct.pack(">IH", 1, 0xB) + DIGEST * 32
    return struct.pack(">HII", 0x8002, 10 + len(body), 0x182) + body


def random() -> bytes:
    """Return the command that asks for eight random bytes."""
    if family() == 1:
        return struct.pack(">HIII", 0xC1, 14, 0x46, 8)
    return struct.pack(">HIIH", 0x8001, 12, 0x17B, 8)


def code(response: bytes) -> int:
    """Return a response's code."""
    return int(struct.unpack_from(">I", response, 6)[0])


def value(pcr: int) -> dict[str, Any]:
    """Read a PCR."""
    response = transmit(pcr_read(pcr))
    size = 20 if family() == 1 else 32
    return {"code": code(response), "value": response[-size:].hex()}


def measured(count: int) -> dict[str, Any]:
    """Time so many reads of PCR 7, and the time of one register read beside them."""
    command = pcr_read(7)
    times = []
    for _ in range(count):
        began = time.perf_counter()
        assert code(transmit(command)) == 0
        times.append(1000 * (time.perf_counter() - began))
    return {"count": count, "median_ms": statistics.median(times), "best_ms": min(times)}


def main(words: list[str]) -> None:
    """Do what the words say."""
    what, number = words[0], float(words[1]) if len(words) > 1 else 0
    document: dict[str, Any]
    match what:
        case "read":
            document = value(int(number))
        case "extend":
            document = {"code": code(transmit(extend(int(number))))} | value(int(number))
        case "random":
            response = transmit(random())
            document = {"code": code(response), "bytes": len(response)}
        case _:
            document = measured(int(number))
    driver = SYSFS / "device/driver"
    print(json.dumps(document | {"driver": driver.resolve().name if SYSFS.exists() else ""}))


if __name__ == "__main__":
    main(sys.argv[1:])
