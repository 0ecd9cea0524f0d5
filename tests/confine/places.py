"""Directories that another user can reach: pytest's own are root's alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def open_directory() -> Iterator[Path]:
    """Give a short-named directory that everybody may enter."""
    with tempfile.TemporaryDirectory(prefix="qvb") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
