"""The Python that the vTPM domain runs: our package, what it imports, and nothing beside.

Theory of operation.  The standard library's modulefinder follows every import statement from
`ROOTS` on, those inside functions included, without running anything; what a C module imports
it cannot see, so that stands in `ROOTS` too.  Our own package goes in whole, without the rooms
that only a person at a machine with sources uses.  Sources are compiled and left behind: the
domain starts sooner, and is smaller.

The compiler writes the same bytes for the same source only in a process with the same
history, so it runs in one of its own, in a fixed order and with a fixed hash seed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Final

import qemu_vtpm_bridge

ROOTS: Final = (
    # What the interpreter itself and C modules import.
    *("encodings", "encodings.aliases", "encodings.utf_8", "encodings.ascii"),
    *(
        "encodings.latin_1",
        "encodings.idna",
        "encodings.unicode_escape",
        "io",
        "abc",
        "codecs",
        "os",
        "runpy",
    ),
    *("_cffi_backend", "traceback", "linecache", "zipimport", "warnings"),
)

LEFT_OUT: Final = ("demo", "embedded", "image", "domain_xml", "libvirt", "__pycache__")
"""Rooms and modules of our package that a vTPM domain has no use for."""

_NOT_THERE: Final = (
    *("tkinter", "idlelib", "lib2to3", "ensurepip", "distutils", "setuptools", "pip"),
    *("test", "unittest", "doctest", "pydoc", "pydoc_data", "xmlrpc", "sqlite3", "curses"),
    *("numpy", "ruamel", "yaml", "cloudpickle", "lz4", "cryptography", "IPython", "pytest"),
    *(
        "hypothesis",
        "trio.testing",
        "trio._tests",
        "trio._repl",
        "trio._tools",
        "cffi",
        "pycparser",
    ),
    *("multiprocessing", "concurrent", "http", "ftplib", "smtplib", "urllib.request", "webbrowser"),
    *("site", "sysconfig", "_pyrepl", "rlcompleter", "readline", "asyncio", "plistlib"),
    *("_pydecimal", "_strptime", "csv", "statistics"),
)
"""What a debugger, a test or another platform would import: modulefinder is not to follow."""

_COMPILER: Final = """
import json, py_compile, sys
for source, shown, target in json.load(sys.stdin):
    py_compile.compile(source, target, shown, doraise=True,
                       invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
"""


@dataclass(frozen=True, slots=True)
class PythonFiles:
    """What goes into the directory of Python's library."""

    compiled: dict[str, bytes]
    """By name below that directory, ending in .pyc."""
    extensions: dict[str, Path]
    """Extension modules, by name below that directory."""


def collect(shown_directory: str) -> PythonFiles:
    """Return everything that the domain's program imports.

    `shown_directory` is where it will be: tracebacks name it.
    """
    sources, extensions = _imported()
    # With an editable installation it lies somewhere else.
    shim = importlib.util.find_spec("qemu_vtpm_bridge._shim")
    assert shim is not None
    assert shim.origin is not None
    extensions["qemu_vtpm_bridge/_shim.abi3.so"] = Path(shim.origin)
    return PythonFiles(_compiled(sources, shown_directory), extensions)


def _own_modules(package: Path) -> list[str]:
    """Return the names of our modules that the domain has a use for."""
    found = [path.relative_to(package.parent).with_suffix("") for path in package.rglob("*.py")]
    return [".".join(name.parts) for name in sorted(found) if not set(name.parts) & set(LEFT_OUT)]


def _imported() -> tuple[dict[str, Path], dict[str, Path]]:
    """Return sources and extension modules by their names below the library's directory."""
    package = Path(qemu_vtpm_bridge.__file__).parent
    finder = ModuleFinder(
        path=[str(package.parent), *(word for word in sys.path if word)],
        # It looks for what it does not find in a package at the top, too.
        excludes=[*_NOT_THERE, *LEFT_OUT, *(f"{package.name}.{room}" for room in LEFT_OUT)],
    )
    for name in (*ROOTS, *_own_modules(package)):
        finder.import_hook(name.removesuffix(".__init__"))
    sources: dict[str, Path] = {}
    extensions: dict[str, Path] = {}
    for name, module in finder.modules.items():
        file: str | None = getattr(module, "__file__", None)
        if file is None or name == "__main__":
            continue
        path = Path(file)
        stem = name.replace(".", "/")
        if path.suffix == ".py":
            sources[f"{stem}/__init__.py" if path.stem == "__init__" else f"{stem}.py"] = path
        elif path.suffix == ".so":
            extensions[str(Path(stem).with_name(path.name))] = path
    return sources, extensions


def _compiled(sources: dict[str, Path], shown_directory: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        jobs = [
            (str(path), f"{shown_directory}/{name}", f"{directory}/{name}c")
            for name, path in sorted(sources.items())
        ]
        subprocess.run(
            [sys.executable, "-s", "-S", "-P", "-c", _COMPILER],
            input=json.dumps(jobs),
            text=True,
            check=True,
            env={"PYTHONHASHSEED": "0", "PATH": os.defpath},
        )
        return {f"{name}c": Path(directory, f"{name}c").read_bytes() for name in sorted(sources)}
