"""The configuration file: TOML whose keys are the command's long options.

Theory of operation.  A file's table becomes words of a command line that stand
before the real ones, so an option means the same in both places, is checked by
the same code and is overridden by what is typed.

    [run]
    backend = 2
    socket = "/run/qemu-vtpm-bridge/guest.sock"
    reset = "verified"
"""

from __future__ import annotations

from pathlib import Path

from .errors import ConfigError

Scalar = str | int | float | bool


def words_from_file(path: Path, command: str) -> list[str]:
    """Return the command-line words that the file's table for `command` stands for.

    Raises ConfigError where the file cannot be read, is not TOML, or holds a
    value that no option can have.  A file without such a table gives no words.
    """
    # Imported late: half a MiB in every bridge that is started without a file.
    import tomllib

    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", next_step="check the path given with --config"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}", next_step="mend the TOML at that place") from error
    table = document.get(command, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: `{command}` must be a table: [{command}]")
    words: list[str] = []
    for key, value in table.items():
        words += _words(path, command, key, value)
    return words


def _words(path: Path, command: str, key: str, value: object) -> list[str]:
    match value:
        case True:
            return [f"--{key}"]
        case False:
            return []
        case str() | int() | float():
            return [f"--{key}={value}"]
        case list() if all(isinstance(item, str | int | float) for item in value):
            return [f"--{key}={item}" for item in value]
    raise ConfigError(
        f"{path}: [{command}] {key} holds {value!r}",
        next_step="write a string, a number, true, false or a list of those",
    )
