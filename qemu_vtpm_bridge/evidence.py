"""Asking a TPM whether it was power-cycled: the evidence of the reset contract.

Theory of operation.  A harmless command, and what its answer means, are `bridge/power.py`'s;
here they are sent, some times over where the TPM has just died and another one is coming.
A TPM that wants Startup is clean.  One that is started already may show PCRs at their
reset values instead, where nobody can ask its vTPM domain for a power cycle.

Keeps P7.  Who may lie: the vTPM domain, which harms the guest whose TPM it is, and could
do that anyway.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from .bridge import power, tpm
from .bridge.power import Evidence
from .errors import BridgeError

EVIDENCE_TRIES = 4
EVIDENCE_RETRY_S = 0.5
"""A vTPM domain whose TPM has just died answers with failures until it has another one."""


class EvidenceTaker:
    """Asks one TPM, with `command`, and tells what it finds with `report(cause, next step)`."""

    def __init__(
        self,
        family: tpm.Family,
        command: Callable[[bytes], Awaitable[bytes]],
        report: Callable[[str, str], None],
    ) -> None:
        self._family = family
        self._command = command
        self._report = report

    async def take(self, offers_reset: Callable[[], bool]) -> power.Fact:
        """Ask the TPM whether it was power-cycled; return EVIDENCE_CLEAN, _USED or _FAILED.

        `offers_reset` says of the present connection whether the vTPM domain can be asked for a
        power cycle.  Cancelling leaves no command behind but the one in flight.
        """
        for tries_left in reversed(range(EVIDENCE_TRIES)):
            try:
                fact = await self._once(offers_reset)
            except BridgeError as error:
                self._report(str(error), "")
                fact = None
            if fact is not None:
                return fact
            if tries_left:
                await trio.sleep(EVIDENCE_RETRY_S)
        return power.Fact.EVIDENCE_FAILED

    async def _once(self, offers_reset: Callable[[], bool]) -> power.Fact | None:
        family = self._family
        response = await self._command(tpm.evidence_command(family))
        match power.judge_evidence(family, response):
            case Evidence.CLEAN:
                return power.Fact.EVIDENCE_CLEAN
            case Evidence.STARTED:
                # PCRs at their reset values are for a vTPM domain that starts its TPM
                # itself and cannot be asked; they say nothing of keys and sessions.
                reset = not offers_reset() and await self._pcrs_are_reset()
                return power.Fact.EVIDENCE_CLEAN if reset else power.Fact.EVIDENCE_USED
            case Evidence.OTHER_FAMILY:
                self._report(
                    f"the vTPM domain's TPM is not TPM {family.value}",
                    "set `tpm` to its family, or give the guest another vTPM domain",
                )
                return power.Fact.EVIDENCE_FAILED
        self._report("the TPM answered the evidence command with a failure", "")
        return None

    async def _pcrs_are_reset(self) -> bool:
        """Return whether PCRs 0 to 15 hold zeros in every bank that exists."""
        family = self._family
        banks = power.HASH_BANKS if family is tpm.Family.TPM_2_0 else {0: 20}
        seen = 0
        for algorithm, size in banks.items():
            for pcr in power.PCRS_MEASURED:
                raw = await self._command(tpm.pcr_read_command(family, pcr, algorithm))
                values = power.pcr_values(family, raw)
                if not values:
                    break
                seen += 1
                if values != [bytes(size)]:
                    return False
        return seen > 0 and seen % len(power.PCRS_MEASURED) == 0
