"""The reset extension as a frontend uses it: one power cycle of the TPM, asked for in XenStore.

Theory of operation.  The backend reads `reset-request` when it sees Closed, and
power-cycles the TPM where that is not the `reset-count` of its last power cycle.  A request
that it did not hear, because it vanished or its TPM failed, stands there for the next
Closed to be heard with.  So each Closed says anew what is wanted: `ask` before one that
is to reset, `take_back` before any other.

Keeps P7 and P9.  Who may lie: the vTPM domain, in its count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import XenError
from ..xen.xenbus import HANDLE_MAX, RESET_COUNT, RESET_REQUEST, DevicePaths, parse_number

if TYPE_CHECKING:
    from ..xen.store import Store


class ResetRequest:
    """One power cycle that is wanted; void once the connection is let go that it is of."""

    def __init__(self) -> None:
        self.was_told = False
        """Closed was written with it."""
        self.error: XenError | None = None
        """Why the vTPM domain cannot be asked."""
        self._number: int | None = None

    async def ask(self, store: Store, paths: DevicePaths) -> None:
        """Write the request, or set `error`.  The same one however often it is called."""
        if self._number is None and self.error is None:
            raw = await store.peek(f"{paths.backend}/{RESET_COUNT}")
            try:
                count = 0 if raw is None else parse_number(raw, RESET_COUNT, HANDLE_MAX)
                self._number = (count + 1) % HANDLE_MAX
            except XenError as error:
                self.error = error
        if self._number is None:
            await take_back(store, paths)
        else:
            await store.write(f"{paths.frontend}/{RESET_REQUEST}", b"%d" % self._number)


async def take_back(store: Store, paths: DevicePaths) -> None:
    """Remove a request that was not heard."""
    await store.rm(f"{paths.frontend}/{RESET_REQUEST}")
