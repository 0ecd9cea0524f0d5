"""What a person is told of a group of errors."""

from __future__ import annotations

import pytest
import trio

from qemu_vtpm_bridge.errors import ConfigError, XenError, first_of, ungrouped

XEN, CONFIG, BUG = XenError("first"), ConfigError("second"), KeyError("a slip")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (XEN, XEN),
        (ExceptionGroup("", [XEN, CONFIG]), XEN),
        (ExceptionGroup("", [XEN, ExceptionGroup("", [CONFIG, BUG])]), BUG),
        (BaseExceptionGroup("", [GeneratorExit(), XEN]), XEN),
    ],
)
def test_the_most_telling_one_is_the_first_on_purpose_unless_there_is_a_slip(
    error: BaseException, told: BaseException
) -> None:
    assert first_of(error) is told


async def test_what_a_nursery_raises_is_caught_by_its_class() -> None:
    async def fail() -> None:
        raise XEN

    async def run() -> None:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fail)
                nursery.start_soon(trio.sleep_forever)

    with pytest.raises(XenError, match="first"):
        await run()


async def test_a_cancelled_task_is_no_error() -> None:
    with trio.CancelScope() as scope, ungrouped():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
    assert scope.cancelled_caught
