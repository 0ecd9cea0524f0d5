"""What a service manager hears: from the program itself, and from a pump that is stuck."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qemu_vtpm_bridge.bridge.ring import FrontendPump, PumpMode
from qemu_vtpm_bridge.carrier import STILL_MAX_S, Carrier
from qemu_vtpm_bridge.supervise import Supervisor
from tests.support.wait import wait_until

DEADLINE_S = 60


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The manager's end; the environment names it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as found:
        found.bind(str(tmp_path / "notify"))
        found.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield found


def test_nobody_there_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Supervisor.from_environment().tell("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    Supervisor.from_environment().tell("READY=1")
    assert "NOTIFY_SOCKET" not in os.environ


def test_a_manager_in_the_abstract_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("")
        manager.settimeout(DEADLINE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + manager.getsockname()[1:].decode())
        supervisor = Supervisor.from_environment()
        supervisor.tell("READY=1")
        assert manager.recv(100) == b"READY=1"
        supervisor.close()
        supervisor.tell("STOPPING=1")  # after the end: nothing


@pytest.mark.parametrize(
    ("usec", "pid", "found"),
    [
        ("2000000", "", 2.0),
        ("2000000", "us", 2.0),
        ("2000000", "1", None),
        ("0", "", None),
        ("soon", "", None),
        ("", "", None),
        ("-5", "", None),
    ],
)
def test_whose_watchdog_it_is(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch, usec: str, pid: str, found: float
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "us" else pid)
    supervisor = Supervisor.from_environment()
    assert supervisor.watchdog_s == found
    supervisor.close()
    # Nobody that is started later may speak for us.
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)


async def test_the_watchdog_is_fed_while_the_pump_turns_and_not_after(
    manager: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", str(8_000_000))
    supervisor = Supervisor.from_environment()
    answers = [True, True, False, False, True]
    manager.setblocking(False)
    with trio.move_on_after(9):  # five looks, two seconds apart
        await supervisor.feed_watchdog(lambda: answers.pop(0))
    assert not answers
    heard = []
    while True:
        try:
            heard.append(manager.recv(100))
        except BlockingIOError:
            break
    assert heard == [b"WATCHDOG=1"] * 3
    assert [r.message for r in caplog.records].count(
        "the pump does not turn: the watchdog is not fed"
    ) == 1
    supervisor.close()


async def test_without_a_watchdog_nothing_is_fed() -> None:
    await Supervisor().feed_watchdog(lambda: True)


class StuckPump:
    """A pump whose thread does not come back from where it is."""

    async def run(self) -> Any:
        await trio.sleep_forever()

    def request_stop(self, *, drain: bool) -> None: ...

    def reset_stop(self) -> None: ...

    def ping(self) -> int:
        return 7


async def never(reason: Any) -> None:
    raise AssertionError(reason)


async def test_a_pump_that_is_stuck_is_not_alive() -> None:
    carrier: Carrier[Any, Any] = Carrier(StuckPump(), never)
    assert carrier.alive()  # it has not begun
    async with trio.open_nursery() as nursery:
        nursery.start_soon(carrier.run)
        await trio.testing.wait_all_tasks_blocked()
        assert carrier.alive()  # asked for the first time
        assert not carrier.alive()
        assert not carrier.alive()
        nursery.cancel_scope.cancel()


async def test_the_pump_of_a_bridge_is_alive_while_it_runs() -> None:
    carrier = Carrier(FrontendPump(60, {}, 1, [0x8001]), never)
    async with trio.open_nursery() as nursery:
        async with carrier.paused() as pump:
            pump.set_mode(PumpMode.REFUSE, bytes(10))
            nursery.start_soon(carrier.run)
        for _ in range(3):
            await wait_until(lambda: carrier._still_since is None)
            carrier.alive()  # asks
            before = carrier._pings
            await wait_until(lambda before=before: carrier.pump.ping() > before)
            assert carrier.alive()
        nursery.cancel_scope.cancel()


async def test_standing_still_counts_as_alive_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    carrier: Carrier[Any, Any] = Carrier(StuckPump(), never)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(carrier.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert carrier.alive()
    await trio.sleep(STILL_MAX_S - 1)
    assert carrier.alive()
    await trio.sleep(2)
    assert not carrier.alive()
