"""The `decode` command: names for what a guest's driver reads and writes.

Who debugs a driver sees numbers at offsets.  This prints what they mean: a value with
the names of its fields, what the data sheet says of a register, response codes and
ordinals, and whole records (`decode_record.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from .bridge.registers import RegisterMap
from .bridge.tpm import Family
from .decode_record import decode_record, open_record, response_name
from .decode_values import MAPS, access_parts, value_text
from .errors import ConfigError
from .names import ordinal_name


def _number(word: str, what: str) -> int:
    try:
        value = int(word, 0)
    except ValueError:
        raise ConfigError(
            f"{what} {word!r} is not a number", next_step="write 24 or 0x18"
        ) from None
    if not 0 <= value < 1 << 64:
        raise ConfigError(f"{what} {word} does not fit 64 bits")
    return value


def _place(device: RegisterMap, word: str) -> int:
    """Return the offset that is meant by a number or by a register's name."""
    for register in device:
        if register.name == word.upper():
            return register.offset
    if not word[:1].isdigit():
        names = ", ".join(register.name for register in device)
        raise ConfigError(f"the {device.title} device has no register {word}", next_step=names)
    return _number(word, "offset")


def _sheet(device: RegisterMap, offset: int) -> list[dict[str, Any]]:
    """Return what the data sheet says about an offset."""
    locality, register = device.find(offset)
    if register is None:
        return [{"locality": locality, "offset": offset, "register": None}]
    return [
        {
            "locality": locality,
            "offset": register.offset,
            "register": register.name,
            "meaning": register.meaning,
            "reset": register.reset,
            "access": register.access.value,
            "fields": [
                {
                    "name": field.name,
                    "bits": field.bits,
                    "access": field.access.value,
                    "meaning": field.meaning,
                }
                for field in register.fields
            ],
        }
    ]


def _sheet_lines(device: RegisterMap, offset: int) -> Iterator[str]:
    [entry] = _sheet(device, offset)
    if entry["register"] is None:
        yield f"{device.title}: no register at {offset:#x}"
        return
    locality = f", locality {entry['locality']}" if device.localities > 1 else ""
    yield (
        f"{entry['register']} at {entry['offset']:#05x}{locality}, {entry['access']}, "
        f"{entry['reset']:08x} after reset"
    )
    yield f"  {entry['meaning']}"
    for field in entry["fields"]:
        yield f"  {field['bits']:>5}  {field['access']:<3}  {field['name']:<24} {field['meaning']}"


def _decoded(device: RegisterMap, offset: int, size: int, value: int) -> list[dict[str, Any]]:
    found = []
    for locality, register, lane, piece, part in access_parts(device, offset, size, value):
        entry: dict[str, Any] = {
            "locality": locality,
            "register": register.name if register else None,
            "byte": lane,
            "size": piece,
            "value": part,
            "text": value_text(register, part, lane, piece) if register else "no register",
        }
        if register is not None:
            entry["fields"] = register.decode(part << 8 * lane)
        found.append(entry)
    return found


def decode_typed(words: list[str], family: Family, size: int | None) -> tuple[list[str], list[Any]]:
    """Return the lines, and the same for JSON, of `tis|crb PLACE [VALUE]`, `rc N`, `ordinal N`.

    Raises ConfigError for words that are none of these.
    """
    kind, *rest = words
    if kind in ("rc", "ordinal"):
        if len(rest) != 1:
            raise ConfigError(f"decode {kind} takes one number")
        number = _number(rest[0], kind)
        name = response_name(number, family) if kind == "rc" else ordinal_name(number)
        return [name], [{kind: number, "name": name}]
    device = MAPS[kind]
    if len(rest) not in (1, 2):
        raise ConfigError(f"decode {kind} takes an offset or a register's name, and a value")
    offset = _place(device, rest[0])
    if len(rest) == 1:
        return list(_sheet_lines(device, offset)), _sheet(device, offset)
    value = _number(rest[1], "value")
    if size is None:
        # As many bytes as reach the word's end, or 8 for a value that needs them.
        size = 4 - offset % 4 if value < 1 << 32 else 8
    if value >> 8 * size:
        raise ConfigError(f"{value:#x} does not fit {size} bytes at {offset:#x}")
    found = _decoded(device, offset, size, value)
    lines = []
    for entry in found:
        place = f"{entry['register']}" + (f"+{entry['byte']}" if entry["byte"] else "")
        locality = f"locality {entry['locality']}  " if device.localities > 1 else ""
        digits = 2 * entry["size"]
        lines.append(f"{locality}{place:<12} {entry['value']:0{digits}x}  {entry['text']}")
    return lines, found


TYPED: Final = ("tis", "crb", "rc", "ordinal")


def show(words: list[str], *, family: Family, size: int | None, as_json: bool) -> None:
    """Print what the words of `qemu-vtpm-bridge decode` ask for."""
    if words[0] in TYPED:
        lines, document = decode_typed(words, family, size)
        print(json.dumps(document, indent=2) if as_json else "\n".join(lines))
        return
    if as_json or size is not None:
        raise ConfigError("--json and --size are for values; a record is JSON already")
    for name in words:
        with open_record(name) as file:
            for line in decode_record(file, name):
                print(line)
