"""The directory that a TPM's process is shut into, and what is done before it goes in."""

from __future__ import annotations

import ast
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

import qemu_vtpm_bridge
from qemu_vtpm_bridge.errors import ConfigError, LocalProtocolError, XenError
from qemu_vtpm_bridge.toolstack.xapi import aside
from qemu_vtpm_bridge.toolstack.xapi_root import give_directory, leave_namespaces

PACKAGE = Path(qemu_vtpm_bridge.__file__).parent
UID = 61005
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")


@as_root
def test_the_directory_is_given_to_the_user(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o750)
    for _ in range(2):
        give_directory(root, UID)
        assert root.stat().st_uid == UID
        assert stat.S_IMODE(root.stat().st_mode) == 0o750
        assert list(root.iterdir()) == []


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/none: No such file"):
        give_directory(tmp_path / "none", UID)


def test_nobody_is_left_outside_unnoticed() -> None:
    """A thread that was there before would keep the old namespaces."""
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        with pytest.raises(LocalProtocolError, match="a thread was started"):
            leave_namespaces()
    finally:
        end.set()
        other.join()


# Asking XenStore in a process of its own.


def refuse() -> NoReturn:
    raise ConfigError("no", state="so it is", next_step="do that")


def die() -> NoReturn:
    os._exit(9)


def test_the_answer_and_the_error_of_a_child_come_back() -> None:
    assert aside(lambda: ["some", "names"]) == ["some", "names"]
    with pytest.raises(ConfigError) as caught:
        aside(refuse)
    assert str(caught.value) == "no; state: so it is; next: do that"
    with pytest.raises(XenError, match="died"):
        aside(die)


# What is loaded before.


def late_imports() -> set[str]:
    """Return the modules from elsewhere that a bridge's functions import when called."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("demo", "embedded", "vtpm", "toolstack"):
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    found.add(str(node.module))
    return found


def test_nothing_is_left_to_be_loaded_in_the_directory() -> None:
    show = (
        "import sys; from qemu_vtpm_bridge.preload import load_all; load_all(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert late_imports() >= {"grp", "json"}
    assert late_imports() - loaded == set()
    assert "encodings.unicode_escape" in loaded  # for what is shown of others' bytes
    ours = {
        ".".join(("qemu_vtpm_bridge", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in (*PACKAGE.glob("bridge/[a-z]*.py"), *PACKAGE.glob("xen/[a-z]*.py"))
    }
    assert len(ours) > 20
    assert ours - loaded == set()
