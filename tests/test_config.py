"""The configuration file becomes words of the command line."""

from pathlib import Path

import pytest

from qemu_vtpm_bridge.config import words_from_file
from qemu_vtpm_bridge.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "bridge.toml"
    path.write_text(text)
    return path


def test_each_kind_of_value_becomes_an_option(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '[run]\nbackend = 2\nsocket = "/run/a b.sock"\nterminate = true\nforce = false\n'
        'restart-command = ["xl", "create"]\n[vtpm]\ntpm = "1.2"\n',
    )
    assert words_from_file(path, "run") == [
        "--backend=2",
        "--socket=/run/a b.sock",
        "--terminate",
        "--restart-command=xl",
        "--restart-command=create",
    ]
    assert words_from_file(path, "vtpm") == ["--tpm=1.2"]
    assert words_from_file(path, "attach") == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[run\n", "bridge.toml"),
        ("run = 3\n", "must be a table"),
        ("[run]\nbackend = {a = 1}\n", "backend holds"),
        ("[run]\nbackend = [[1]]\n", "backend holds"),
    ],
)
def test_what_no_option_can_have_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        words_from_file(write(tmp_path, text), "run")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        words_from_file(tmp_path / "none.toml", "run")
