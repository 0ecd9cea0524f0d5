"""The guests file: what it says, what it refuses and where, and the names of a guest's files."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.errors import ConfigError
from qemu_vtpm_bridge.toolstack.guests import (
    SOCKET_PATH_MAX_BYTES,
    Guest,
    file_stem,
    find,
    load,
    read,
    socket_path,
)

RUN = Path("/run/qemu-vtpm-bridge")
LONG = Path("/" + "r" * 60)

GOOD = """
[defaults]
tpm = 1.2
reset = "keep"

[guest.web]
backend = "vtpm-of-web"

[guest."a name / with \\"odd\\" characters"]
backend = 7
handle = 3
tpm = "2.0"
path-mode = "zeros"
registers = "tis"
reset = "restart-domain"
restart-command = ["/usr/sbin/recreate", "vtpm"]
on-reset-failure = "stop-guest"
state-blobs = "empty"
allow-missing-feature = true
run-options = ["--log-level=debug"]
vtpm-uuid = "01234567-89ab-cdef-0123-456789abcdef"

[host]
device-model = "/usr/libexec/qemu"
run-dir = "/run/elsewhere"
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "guests.toml"
    path.write_text(text)
    return path


def test_defaults_hold_where_a_guest_says_nothing(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    assert load(path)["web"] == Guest("web", "vtpm-of-web", tpm="1.2", reset="keep")
    assert find('a name / with "odd" characters', path) == Guest(
        name='a name / with "odd" characters',
        backend="7",
        handle=3,
        path_mode="zeros",
        registers="tis",
        reset="restart-domain",
        restart_command=("/usr/sbin/recreate", "vtpm"),
        on_reset_failure="stop-guest",
        state_blobs="empty",
        vtpm_uuid="01234567-89ab-cdef-0123-456789abcdef",
        allow_missing_feature=True,
        run_options=("--log-level=debug",),
    )
    host = read(path).host
    assert (host.device_model, host.run_dir) == ("/usr/libexec/qemu", Path("/run/elsewhere"))


@pytest.mark.parametrize(
    ("text", "place", "cause"),
    [
        ("[guest.web]\nbackend = 1\nrest = 'keep'", "[guest.web]", "no key `rest`"),
        ("[defaults]\nname = 'x'", "[defaults]", "no key `name`"),
        ("[guests.web]\nbackend = 1", "", "no key `guests`"),
        ("[host]\nembeded = '/x'", "[host]", "no key `embeded`"),
        ("[host]\nrun-dir = 'x'", "[host]", "run-dir holds 'x'"),
        ("[guest.'a b']\nhandle = 1", '[guest."a b"]', "names no vTPM domain"),
        ("[guest.web]\nbackend = ''", "[guest.web]", "backend holds ''"),
        ("[guest.web]\nbackend = -1", "[guest.web]", "backend holds -1"),
        ("[guest.web]\nbackend = true", "[guest.web]", "backend holds True"),
        ('[guest.web]\nbackend = "a\\u0000"', "[guest.web]", "backend holds a NUL"),
        ("[guest.web]\nbackend = 1\nhandle = true", "[guest.web]", "handle holds True"),
        ("[guest.web]\nbackend = 1\nhandle = -1", "[guest.web]", "handle holds -1"),
        ("[guest.web]\nbackend = 1\ntpm = '3'", "[guest.web]", "tpm holds '3'"),
        ("[guest.web]\nbackend = 1\ntpm = '1.2'\nregisters = 'crb'", "[guest.web]", "no CRB"),
        ("[guest.web]\nbackend = 1\nreset = 'restart-domain'", "[guest.web]", "has no command"),
        ("[guest.web]\nbackend = 1\nrestart-command = 'x'", "[guest.web]", "restart-command holds"),
        ("[guest.web]\nbackend = 1\nfrontend-path = '/x'", "[guest.web]", "go together"),
        (
            "[guest.web]\nbackend = 1\npath-mode = 'explicit'\nfrontend-path = 'x y'",
            "[guest.web]",
            "not an absolute XenStore path",
        ),
        ("[guest.web]\nbackend = 1\nvtpm-uuid = 'x'", "[guest.web]", "lower-case hex"),
        ("[guest.web]\nbackend = 1\nallow-missing-feature = 1", "[guest.web]", "holds 1"),
        ("[guest]\nweb = 1", "[guest.web]", "must be a table"),
        ("guest = 1", "", "must be a table"),
        ("[guest.'']\nbackend = 1", '[guest.""]', "a guest has a name"),
        ("[guest.web", "", "Expected ']'"),
        ("\udcff", "", "utf-8"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(
    tmp_path: Path, text: str, place: str, cause: str
) -> None:
    path = tmp_path / "guests.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in caught.value.cause
    assert place in caught.value.cause
    assert cause in caught.value.cause
    assert caught.value.next_step


def test_a_guest_that_is_not_there_is_said_with_those_that_are(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    with pytest.raises(ConfigError) as caught:
        find("wob", path)
    assert "'web'" in caught.value.state
    assert "[guest.wob]" in caught.value.next_step
    with pytest.raises(ConfigError) as caught:
        find("web", tmp_path / "nowhere.toml")
    assert "No such file" in caught.value.cause
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    assert not read(tmp_path / "nowhere.toml", missing_is_empty=True).guests


def test_words_change_what_the_file_says(tmp_path: Path) -> None:
    file = read(written(tmp_path, GOOD))
    assert file.with_words("web", "handle=4,tpm=2.0,allow-missing-feature=on") == Guest(
        "web", "vtpm-of-web", handle=4, tpm="2.0", reset="keep", allow_missing_feature=True
    )
    assert file.with_words("new", "backend=5") == Guest("new", "5", tpm="1.2", reset="keep")
    for words in ("", "backend", "backend=1,backend=2", "no-key=1", "handle=x", "tpm=2.0"):
        with pytest.raises(ConfigError) as caught:
            file.with_words("new", words)
        assert caught.value.cause.startswith(f"-vtpm {words}")


# The names of files.

NAMES = st.one_of(
    st.text(st.characters(exclude_categories=()), min_size=1, max_size=200),
    st.binary(min_size=1, max_size=200).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    st.text("\\xh/.-a0", min_size=1, max_size=80),
)


def is_utf8_or_escaped(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


@given(NAMES.filter(is_utf8_or_escaped), st.sampled_from([RUN, LONG, Path("/r")]))
def test_a_name_never_leaves_the_directory_and_always_fits(name: str, run_dir: Path) -> None:
    path = socket_path(name, run_dir)
    assert path.parent == run_dir
    assert path.name not in (".sock", "..sock")
    assert not path.name.startswith(".")
    assert path.name.isascii()
    assert path.name.isprintable()
    assert not set(path.name) & set("/ ,'\"$`;&|")
    assert len(str(path.with_suffix(".status"))) <= SOCKET_PATH_MAX_BYTES


@given(st.lists(NAMES.filter(is_utf8_or_escaped), min_size=2, max_size=20))
def test_no_two_names_have_the_same_files(names: list[str]) -> None:
    for run_dir in (RUN, LONG):
        raw = {name.encode("utf-8", "surrogateescape") for name in names}
        assert len({file_stem(name, run_dir) for name in names}) == len(raw)


def test_ordinary_names_stay_and_odd_ones_are_systemds() -> None:
    assert file_stem("web-1.example_a:b", RUN) == "web-1.example_a:b"
    assert file_stem("..", RUN) == "\\x2e."
    assert file_stem("a b/c\\é", RUN) == "a\\x20b\\x2fc\\x5c\\xc3\\xa9"
    # A long name's, and the name that is spelled as the long one's file.
    cut = file_stem("a" * 200, RUN)
    assert cut.startswith("aaaa")
    assert file_stem(cut, RUN) != cut
    assert file_stem("a" * 201, RUN) != cut


def test_names_that_differ_behind_the_cut_differ() -> None:
    for odd in ("/", "é", "a"):
        for length in range(20, 120):
            stems = {file_stem(odd * length + end, RUN) for end in ("", "x", "y", odd)}
            assert len(stems) == 4


def test_a_directory_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="too long"):
        socket_path("n" * 100, Path("/" + "r" * 80))


def test_the_longest_path_can_be_a_sockets() -> None:
    path = socket_path("é" * 100, LONG)
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
        client.connect(str(path))  # not "AF_UNIX path too long"
