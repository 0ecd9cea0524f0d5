"""Reading the units as systemd does, as far as the tests need it."""

from __future__ import annotations

from pathlib import Path

UNITS = Path(__file__).parents[2] / "packaging" / "systemd"


def settings(unit: str) -> list[tuple[str, str]]:
    """Return a unit's settings in order, continued lines joined."""
    text = (UNITS / unit).read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        (line.partition("=")[0], line.partition("=")[2])
        for line in text.splitlines()
        if line and line[0] not in "#["
    ]


def setting(unit: str, name: str) -> str:
    """Return a setting that stands in the unit once."""
    (value,) = [value for key, value in settings(unit) if key == name]
    return value
