"""XenBus names, and the parsing of what peers wrote (P9)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_vtpm_bridge.errors import ConfigError, XenError
from qemu_vtpm_bridge.xen import xenbus
from qemu_vtpm_bridge.xen.xenbus import PathMode, XenbusState


@pytest.mark.parametrize(
    ("mode", "own", "explicit", "frontend", "backend"),
    [
        (PathMode.SEED, 0, None, "/local/domain/0/frontend/vtpm/2/1", "2/backend/vtpm/0/1"),
        (PathMode.DEVICE, 0, None, "/local/domain/0/device/vtpm/1", "2/backend/vtpm/0/1"),
        (PathMode.ZEROS, 0, None, "/local/domain/00/device/vtpm/1", "2/backend/vtpm/0/1"),
        (PathMode.SEED, 5, None, "/local/domain/5/device/vtpm/1", "2/backend/vtpm/5/1"),
        (PathMode.EXPLICIT, 0, "/local/x", "/local/x", "2/backend/vtpm/0/1"),
    ],
)
def test_the_directories_of_each_path_mode(
    mode: PathMode, own: int, explicit: str | None, frontend: str, backend: str
) -> None:
    paths = xenbus.device_paths(
        mode, backend_domid=2, handle=1, frontend_domid=own, explicit=explicit
    )
    assert (paths.frontend, paths.backend) == (frontend, f"/local/domain/{backend}")
    assert xenbus.parse_backend_path(paths.backend) == (2, own, 1)


@pytest.mark.parametrize(
    ("mode", "numbers"),
    [
        (PathMode.SEED, {"backend_domid": 0x7FF0, "handle": 0}),
        (PathMode.SEED, {"backend_domid": 2, "handle": -1}),
        (PathMode.ZEROS, {"backend_domid": 2, "handle": 0, "frontend_domid": 3}),
        (PathMode.EXPLICIT, {"backend_domid": 2, "handle": 0}),
        (PathMode.SEED, {"backend_domid": 2, "handle": 0, "explicit": "/x"}),
        (PathMode.EXPLICIT, {"backend_domid": 2, "handle": 0, "explicit": "/x//y"}),
        (PathMode.EXPLICIT, {"backend_domid": 2, "handle": 0, "explicit": "relative"}),
        (PathMode.EXPLICIT, {"backend_domid": 2, "handle": 0, "explicit": "/x/../y"}),
        (PathMode.EXPLICIT, {"backend_domid": 2, "handle": 0, "explicit": "/x:y"}),
    ],
)
def test_paths_that_make_no_sense_are_refused(mode: PathMode, numbers: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        xenbus.device_paths(mode, **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [b"", b"-1", b"+1", b"01", b" 1", b"1\n", b"1x", b"99999999999"])
def test_P9_numbers_are_parsed_strictly(raw: bytes) -> None:
    with pytest.raises(XenError, match="not a number"):
        xenbus.parse_number(raw, "ring-ref", 2**31 - 1)


@given(st.integers(0, 2**31 - 1))
def test_P9_every_number_in_bounds_is_parsed(number: int) -> None:
    assert xenbus.parse_number(str(number).encode(), "handle", 2**31 - 1) == number


def test_P9_bounds_hold() -> None:
    with pytest.raises(XenError):
        xenbus.parse_number(b"8", "state", 7)


@given(st.binary(max_size=12))
def test_P9_any_state_is_one_of_the_known_ones(raw: bytes) -> None:
    state = xenbus.parse_state(raw)
    assert state is not None
    assert (state is not XenbusState.UNKNOWN) == (raw in [b"%d" % n for n in range(1, 9)])


def test_a_missing_state_is_none() -> None:
    assert xenbus.parse_state(None) is None


@pytest.mark.parametrize(
    "path",
    [
        "/local/domain/02/backend/vtpm/0/0",
        "/local/domain/2/backend/vtpm/0",
        "/local/domain/2/backend/vtpm/0/0/state",
        "/local/domain/2/backend/vbd/0/0",
    ],
)
def test_only_backend_directories_are_backend_paths(path: str) -> None:
    with pytest.raises(XenError):
        xenbus.parse_backend_path(path)


@given(st.binary(max_size=200))
def test_what_a_peer_wrote_is_printed_as_short_ascii(raw: bytes) -> None:
    shown = xenbus.printable(raw)
    assert shown.isascii()
    assert shown.isprintable()
    assert len(shown) < 300
