"""The bench's arithmetic, and that its commands are what they claim to be."""

from __future__ import annotations

import array

import pytest

from bench.__main__ import judge
from bench.measure import COMMANDS, Samples


def samples(*slices: tuple[list[int], float]) -> Samples:
    found = Samples()
    for round_trips_ns, per_s in slices:
        found.add(array.array("I", round_trips_ns), per_s)
    return found


def test_a_quantile_is_a_sample_and_the_order_does_not_matter() -> None:
    found = samples(([3000, 1000, 2000, 5000, 4000], 1.0))
    assert found.quantile_us(0.5) == 3.0
    assert found.quantile_us(0.99) == 5.0
    assert found.quantile_us(0.0) == 1.0


def test_a_disturbed_round_does_not_move_the_ratio() -> None:
    """Both rows are ten times as slow in the second round, one alone in the third."""
    mine = samples(([1100], 9.0), ([11000], 0.9), ([90000], 0.1))
    theirs = samples(([1000], 10.0), ([10000], 1.0), ([1000], 10.0))
    assert mine.ratio(theirs, "p50_us") == pytest.approx(1.1)
    assert mine.ratio(theirs, "per_s") == pytest.approx(0.9)


def test_rows_of_different_rounds_are_not_compared() -> None:
    with pytest.raises(ValueError, match="zip"):
        samples(([1], 1.0)).ratio(samples(([1], 1.0), ([1], 1.0)), "p50_us")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_announces_its_own_length(name: str) -> None:
    command = COMMANDS[name]
    assert int.from_bytes(command[2:6]) == len(command)


def test_the_large_command_has_two_kib() -> None:
    assert 2048 <= len(COMMANDS["2 KiB request"]) <= 4088


def test_the_verdict_names_what_is_missed() -> None:
    rows = []
    for command in COMMANDS:
        common = {"command": command, "p50_ratio": 1.0, "p99_ratio": 1.0, "per_s_ratio": 1.0}
        rows += [{"name": "bridge", "guests": guests, **common} for guests in (1, 8)]
        rows += [{"name": "bridge, busy Python thread", "guests": 1, **common}]
    for guests in (1, 8):
        memory = {"command": "private memory", "private_mib": 10.0 + guests}
        rows.append({"name": "bridge", "guests": guests, **memory})
    start = {"name": "bridge", "guests": 1, "command": "start to listening", "start_s": 0.2}
    rows.append(start)
    assert all(line.startswith("reached") for line in judge(rows))
    rows[0]["p50_ratio"] = 1.16
    rows[1]["per_s_ratio"] = 0.89
    rows[-2]["private_mib"] = 18.1  # the worst of eight bridges
    start["start_s"] = 0.41
    missed = [line for line in judge(rows) if line.startswith("NOT reached")]
    assert [line.rpartition(": ")[2] for line in missed] == [
        "1.16 (at most 1.15)",
        "0.89 (at least 0.9)",
        "18.10 (at most 18)",
        "0.41 (at most 0.4)",
    ]
