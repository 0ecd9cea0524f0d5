"""What a bridge would load later, loaded before it goes where its files are out of reach.

Theory of operation.  In a directory that was entered by chroot(2) there is no Python and no
library, and if there were they would be somebody else's.  So all of this package that a bridge
may come to use is imported, with what its functions import when they are called, and the
libraries that would be opened by name.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import pkgutil
from typing import Final

_NOT_A_BRIDGES: Final = ("__main__", "demo", "embedded", "vtpm")
"""What of this package a bridge never loads."""

_LATE_MODULES: Final = (
    *("gc", "grp", "importlib", "json", "pwd", "tomllib", "trio", "traceback"),
    "encodings.unicode_escape",
)
"""What functions of this package load when they are called; a test compares."""

_LATE_LIBRARIES: Final = ("xentoollog", "xengnttab", "xenevtchn")


def load_all() -> None:
    """Load all of it."""
    package = importlib.import_module(__package__)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.split(".")[1] not in _NOT_A_BRIDGES:
            importlib.import_module(found.name)
    for name in _LATE_MODULES:
        importlib.import_module(name)
    for name in _LATE_LIBRARIES:
        library = ctypes.util.find_library(name)
        if library is not None:
            ctypes.CDLL(library)
