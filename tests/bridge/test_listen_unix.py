"""A unix socket appears at its path only when it can be connected to."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from qemu_vtpm_bridge.bridge.listen import bind_unix
from qemu_vtpm_bridge.errors import ConfigError


def test_the_path_appears_once_the_socket_listens_and_has_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    seen: list[bool] = []
    listen = socket.socket.listen

    def watched(self: socket.socket, backlog: int) -> None:
        seen.append(path.exists())
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", watched)
    with bind_unix(path, 0o620), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o620
    assert seen == [False]
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_dead_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind_unix(path, 0o600).close()
    with bind_unix(path, 0o600):
        with pytest.raises(ConfigError, match="another program listens"):
            bind_unix(path, 0o600)
        assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        bind_unix(path, 0o600)
    assert path.read_text() == "mine"


def test_a_missing_directory_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        bind_unix(tmp_path / "none" / "s", 0o600)
