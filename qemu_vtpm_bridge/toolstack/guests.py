"""The guests file: which guest has which vTPM domain, and how.

Theory of operation.  One TOML file holds a table for each guest, `[defaults]` for what
they share, and `[host]` for what is this machine's:

    [defaults]
    tpm = "2.0"

    [guest.web]
    backend = "vtpm-of-web"

    [guest."a name with spaces"]
    backend = "vtpm-of-another"
    tpm = "1.2"

A key that is not known is refused with its place, as a mistyped `reset` would otherwise
leave a guest with the default.  A guest's name is never a path: what is kept for a guest
lies in files whose names are made from it by `file_stem`.  Keeps P9 and P10.  Who may lie:
nobody who cannot write the file; but names come from configurations that others wrote, and
are taken as text only.

Source: systemd-escape(1) for the form of the names of files; unix(7) for their length.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pwd
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from ..errors import BridgeError, ConfigError
from ..xen.xenbus import HANDLE_MAX, PathMode, check_path, parse_uuid

GUESTS_FILE: Final = Path("/etc/qemu-vtpm-bridge/guests.toml")
GUESTS_VARIABLE: Final = "QEMU_VTPM_BRIDGE_GUESTS"
"""Names another file in the environment, for programs that get no options of ours."""

RUN_DIR: Final = Path("/run/qemu-vtpm-bridge")
LOG_DIR: Final = Path("/var/log/qemu-vtpm-bridge")
USER: Final = "qemu-vtpm-bridge"
"""The package's user; packaging/sysusers.d has it made."""

SOCKET_PATH_MAX_BYTES: Final = 107
SUFFIX_MAX_CHARS: Final = len(".status")
"""The longest ending of a file that belongs to a guest; each of them may be a socket."""

_UUID_FORM: Final = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_DIGEST_CHARS: Final = 32
_PLAIN: Final = re.compile(rb"[A-Za-z0-9:_.-]")

CHOICES: Final = {
    "path-mode": tuple(mode.value for mode in PathMode),
    "tpm": ("2.0", "1.2"),
    "registers": ("auto", "tis", "crb"),
    "reset": ("verified", "restart-domain", "keep"),
    "on-reset-failure": ("tpm-failure", "stop-guest"),
    "state-blobs": ("refuse", "empty"),
}


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest's TPM.  The fields mean what the options of `run` with these names mean."""

    name: str
    backend: str
    """The vTPM domain, by id or by name."""
    handle: int = 0
    path_mode: str = PathMode.SEED.value
    frontend_path: str | None = None
    tpm: str = "2.0"
    registers: str = "auto"
    """The device that the guest sees: auto is crb for TPM 2.0 and tis for TPM 1.2."""
    reset: str = "verified"
    restart_command: tuple[str, ...] = ()
    on_reset_failure: str = "tpm-failure"
    state_blobs: str = "refuse"
    vtpm_uuid: str | None = None
    allow_missing_feature: bool = False
    run_as: str | None = None
    """The user that the bridge becomes; if not given, the package's own where there is one, and
    `root` for none."""
    run_options: tuple[str, ...] = ()
    """More words for `qemu-vtpm-bridge run`."""
    device_model: str | None = None
    """The QEMU that the guest's wrapper becomes; one is looked for if not given."""

    @property
    def user(self) -> str | None:
        """The user that the bridge becomes, as `run --run-as` takes it; None: it stays root."""
        if self.run_as is not None:
            return None if self.run_as == "root" else self.run_as
        decided = any(word.startswith(("--run-as", "--confine")) for word in self.run_options)
        # A command of the operator's to restart the vTPM domain needs privileges.
        if decided or self.reset == "restart-domain" or os.geteuid() != 0:
            return None
        try:
            return pwd.getpwnam(USER).pw_name
        except KeyError:
            return None

    @property
    def device(self) -> str:
        """The register device: `tis` or `crb`."""
        if self.registers != "auto":
            return self.registers
        return "crb" if self.tpm == "2.0" else "tis"


@dataclass(frozen=True, slots=True)
class Host:
    """What the file says of this machine."""

    device_model: str | None = None
    run_dir: Path = RUN_DIR
    log_dir: Path = LOG_DIR
    embedded: Path | None = None
    """The directory of an embedded Xen, on a machine without Xen."""
    swtpm_wrapper: Path = Path("/usr/lib64/xen/bin/swtpm-wrapper")
    """xenopsd's own, for guests of xapi that are not in the file."""

    def where(self) -> dict[str, Any]:
        """Return what the functions in launch.py are to know of this machine."""
        return {"run_dir": self.run_dir, "log_dir": self.log_dir, "world": self.embedded}


@dataclass(frozen=True, slots=True)
class GuestsFile:
    """A whole file."""

    path: Path
    guests: Mapping[str, Guest] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    host: Host = field(default_factory=Host)

    def find(self, name: str) -> Guest:
        """Return the guest of this name; raises ConfigError where the file has none."""
        if name in self.guests:
            return self.guests[name]
        raise ConfigError(
            f"{self.path} has no guest {name!r}",
            state=f"its guests are {', '.join(map(repr, self.guests)) or 'none'}",
            next_step=f'add a table [guest.{_quoted(name)}] with backend = "VTPM-DOMAIN"',
        )

    def of_domain(self, uuid: str, name: str) -> Guest | None:
        """Return the guest that a domain is, by its UUID or else its name; None if it is none.

        A name can be given to any domain, so that one which looks like a UUID is none: it
        would be another's.
        """
        if uuid in self.guests:
            return self.guests[uuid]
        return None if _UUID_FORM.fullmatch(name) else self.guests.get(name)

    def with_words(self, name: str, words: str) -> Guest:
        """Return a guest as the file has it, changed by `key=value,key=value`.

        The guest need not be in the file, which gives the defaults.  Raises ConfigError for
        what is no such word, and for a value that the key cannot have.
        """
        place = f"-vtpm {words}"
        table: dict[str, Any] = {}
        for word in words.split(","):
            key, equals, value = word.partition("=")
            if not equals or key in table:
                raise ConfigError(
                    f"{place}: {word!r} is no key=value, or is there twice",
                    next_step="write it as -vtpm backend=VTPM-DOMAIN,tpm=2.0",
                )
            table[key] = _from_word(key, value)
        known = self.guests.get(name)
        base = dict(self.defaults) if known is None else _table_of(known)
        return _guest(place, name, base | _checked_table(place, table))


def read(path: Path = GUESTS_FILE, *, missing_is_empty: bool = False) -> GuestsFile:
    """Return what a guests file says.

    `missing_is_empty` gives a file without guests where there is none.  Raises ConfigError
    where it cannot be read, is not TOML, or holds what no guest can have.
    """
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except FileNotFoundError as error:
        if missing_is_empty:
            return GuestsFile(path)
        raise ConfigError(
            f"{path}: {error.strerror}",
            next_step='make it, with a table [guest.NAME] that says backend = "VTPM-DOMAIN"',
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}", next_step="give the path of a file that can be read"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", next_step="mend the TOML at that place") from error
    _only(str(path), document, ("guest", "defaults", "host"))
    defaults = _checked_table(f"{path}: [defaults]", _table(path, document, "defaults"))
    guests = {}
    for name, entry in _table(path, document, "guest").items():
        place = f"{path}: [guest.{_quoted(name)}]"
        if not isinstance(entry, dict):
            raise ConfigError(f"{place} must be a table", next_step=f"write {place} above the keys")
        guests[name] = _guest(place, name, defaults | _checked_table(place, entry))
    host = _host(f"{path}: [host]", _table(path, document, "host"))
    return GuestsFile(path, guests, defaults, host)


def default_path() -> Path:
    """Return the guests file that is read where none is named."""
    return Path(os.environ.get(GUESTS_VARIABLE) or GUESTS_FILE)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names another guests file than the usual one."""
    parser.add_argument(
        "--guests",
        metavar="FILE",
        type=Path,
        default=default_path(),
        help=f"the guests file (default: {GUESTS_FILE})",
    )


def load(path: Path = GUESTS_FILE) -> dict[str, Guest]:
    """Return the guests in a file by name; raises ConfigError as `read` does."""
    return dict(read(path).guests)


def find(name: str, path: Path = GUESTS_FILE) -> Guest:
    """Return one guest; raises ConfigError where the file does not have it."""
    return read(path).find(name)


# Tables.


def _table(path: Path, document: Mapping[str, Any], key: str) -> dict[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: `{key}` must be a table", next_step=f"write [{key}]")
    return table


def _only(place: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(
                f"{place}: there is no key `{key}`", next_step=f"use {', '.join(known)}"
            )


_KEYS: Final = tuple(item.name.replace("_", "-") for item in fields(Guest) if item.name != "name")
_TEXTS: Final = ("backend", "frontend-path", "vtpm-uuid", "run-as", "device-model")
_LISTS: Final = ("restart-command", "run-options")
_FLAGS: Final = ("allow-missing-feature",)


def _checked_table(place: str, table: Mapping[str, Any]) -> dict[str, Any]:
    _only(place, table, _KEYS)
    return {key: _checked(place, key, value) for key, value in table.items()}


def _checked(place: str, key: str, value: object) -> object:
    """Return a key's value as the guest has it; raises ConfigError where it cannot be."""
    if key in CHOICES:
        # TOML has numbers, and 2.0 looks like one.
        if str(value) in CHOICES[key]:
            return str(value)
        wanted = "one of " + ", ".join(CHOICES[key])
    elif key == "handle":
        if type(value) is int and 0 <= value <= HANDLE_MAX:
            return value
        wanted = f"a number from 0 to {HANDLE_MAX}"
    elif key in _FLAGS:
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif key in _LISTS:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(_text(place, key, item) for item in value)
        wanted = "a list of strings"
    else:
        if key == "backend" and type(value) is int and value >= 0:
            return str(value)
        if isinstance(value, str) and value:
            return _text(place, key, value)
        wanted = "a string"
    raise ConfigError(f"{place}: {key} holds {value!r}", next_step=f"write {wanted}")


def _text(place: str, key: str, value: str) -> str:
    """Return a value that can be a word of a command; none holds a NUL."""
    if "\0" in value:
        raise ConfigError(f"{place}: {key} holds a NUL", next_step="take it out")
    return value


def _from_word(key: str, value: str) -> object:
    """Return what a word's value would be in the file."""
    if key == "handle" and value.isascii() and value.isdecimal():
        return int(value)
    if key in _FLAGS and value in ("on", "off"):
        return value == "on"
    return value


def _guest(place: str, name: str, table: Mapping[str, Any]) -> Guest:
    """Return a guest from a table whose keys were checked one by one."""
    if not name:
        raise ConfigError(f"{place}: a guest has a name", next_step="write [guest.NAME]")
    if "backend" not in table:
        raise ConfigError(
            f"{place} names no vTPM domain", next_step='add backend = "VTPM-DOMAIN", or its id'
        )
    guest = Guest(name=name, **{key.replace("-", "_"): value for key, value in table.items()})
    if guest.reset == "restart-domain" and not guest.restart_command:
        raise ConfigError(
            f"{place}: reset = restart-domain has no command",
            next_step='add restart-command = ["PROGRAM", "WORD"]',
        )
    if guest.tpm == "1.2" and guest.registers == "crb":
        raise ConfigError(
            f"{place}: a TPM 1.2 has no CRB", next_step='write registers = "tis", or leave it out'
        )
    if (guest.path_mode == PathMode.EXPLICIT.value) != (guest.frontend_path is not None):
        raise ConfigError(
            f"{place}: path-mode explicit and frontend-path go together",
            next_step="give both, or neither",
        )
    try:
        if guest.frontend_path is not None:
            check_path(guest.frontend_path)
        if guest.vtpm_uuid is not None:
            parse_uuid(guest.vtpm_uuid.encode())
    except BridgeError as error:
        raise ConfigError(
            f"{place}: {error.cause}", next_step=error.next_step or "mend it there"
        ) from error
    return guest


def _table_of(guest: Guest) -> dict[str, Any]:
    return {key: getattr(guest, key.replace("-", "_")) for key in _KEYS}


def _host(place: str, table: Mapping[str, Any]) -> Host:
    _only(place, table, tuple(item.name.replace("_", "-") for item in fields(Host)))
    values: dict[str, Any] = {}
    for key, value in table.items():
        if not isinstance(value, str) or not Path(value).is_absolute() or "\0" in value:
            raise ConfigError(
                f"{place}: {key} holds {value!r}", next_step="write a path that begins with /"
            )
        values[key.replace("-", "_")] = value if key == "device-model" else Path(value)
    return Host(**values)


def _quoted(name: str) -> str:
    """Return a name as it stands in a table's header."""
    if re.fullmatch(r"[A-Za-z0-9_-]+", name):
        return name
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


# A guest's files.


def file_stem(name: str, run_dir: Path) -> str:
    """Return what the names of a guest's files begin with; no other guest's do.

    Letters, digits and `:_.-` stand for themselves, except a dot at the beginning, and every
    other byte for `\\xHH`, as systemd escapes them; but a slash is no dash, so that a name
    with dashes, which is an ordinary one, stays what it is.  Where that is too long for a
    socket in `run_dir` the end is cut off, and `\\h` and a hash of the whole name follow.
    Raises ConfigError where the directory leaves no room.
    """
    raw = os.fsencode(name)
    escaped = "".join(
        chr(byte)
        if _PLAIN.match(raw, index) and not (index == 0 and byte == ord("."))
        else f"\\x{byte:02x}"
        for index, byte in enumerate(raw)
    )
    room = SOCKET_PATH_MAX_BYTES - len(os.fsencode(run_dir)) - len("/") - SUFFIX_MAX_CHARS
    if len(escaped) <= room:
        return escaped
    # After a backslash comes an x in every name that was not cut, and an h in these alone.
    ending = "\\h" + hashlib.sha256(raw).hexdigest()[:_DIGEST_CHARS]
    if len(ending) > room:
        raise ConfigError(
            f"{run_dir} is too long for the sockets in it",
            next_step="use a directory nearer to the root, as /run/qemu-vtpm-bridge",
        )
    return re.sub(r"\\x?.?$", "", escaped[: room - len(ending)]) + ending


def socket_path(name: str, run_dir: Path = RUN_DIR) -> Path:
    """Return where a guest's QEMU connects; raises ConfigError as `file_stem` does."""
    return run_dir / f"{file_stem(name, run_dir)}.sock"
