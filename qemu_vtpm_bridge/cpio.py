"""An initramfs: a cpio archive in the `newc` form, the same bytes for the same contents.

Theory of operation.  Entries are sorted by name, belong to root, are dated 1970 and have
numbers from 1 on, so nothing of the machine or the moment gets in.  Directories above an
entry are added by themselves.  The kernel unpacks the archive as it is, or gzipped.

Source: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import gzip
import stat
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

_TRAILER: Final = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class _Entry:
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Archive:
    """What an initramfs holds; names are relative to its root."""

    _entries: dict[str, _Entry] = field(default_factory=dict)

    def add_directory(self, name: str, permissions: int = 0o755) -> None:
        """Add a directory."""
        self._add(name, _Entry(stat.S_IFDIR | permissions))

    def add_file(self, name: str, content: bytes, permissions: int = 0o644) -> None:
        """Add a file.  Raises ValueError where another content has the name."""
        self._add(name, _Entry(stat.S_IFREG | permissions, content))

    def add_symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, _Entry(stat.S_IFLNK | 0o777, target.encode()))

    def add_character_device(self, name: str, major: int, minor: int) -> None:
        """Add a device file that only root may use."""
        self._add(name, _Entry(stat.S_IFCHR | 0o600, device=(major, minor)))

    def _add(self, name: str, entry: _Entry) -> None:
        for parent in PurePosixPath(name).parents:
            if str(parent) != ".":
                self._entries.setdefault(str(parent), _Entry(stat.S_IFDIR | 0o755))
        known = self._entries.setdefault(name, entry)
        if known != entry:
            raise ValueError(f"two different files would be {name}")

    @property
    def size_bytes(self) -> int:
        """What the contents take once they are unpacked."""
        return sum(len(entry.content) for entry in self._entries.values())

    def names(self) -> list[str]:
        """Return the names in the archive's order."""
        # A directory sorts before what is in it: its name is shorter.
        return sorted(self._entries)

    def packed(self) -> bytes:
        """Return the archive."""
        raw = bytearray()
        for number, name in enumerate(self.names(), start=1):
            _append(raw, name, number, self._entries[name])
        _append(raw, _TRAILER, 0, _Entry(0))
        return bytes(raw)

    def gzipped(self, level: int = 9) -> bytes:
        """Return the archive, compressed."""
        return gzip.compress(self.packed(), compresslevel=level, mtime=0)


def _append(raw: bytearray, name: str, number: int, entry: _Entry) -> None:
    raw_name = name.encode() + b"\0"
    fields = [number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device]
    fields += [len(raw_name), 0]
    raw += b"070701" + "".join(f"{value:08x}" for value in fields).encode() + raw_name
    raw += bytes(-len(raw) % 4) + entry.content
    raw += bytes(-len(raw) % 4)
