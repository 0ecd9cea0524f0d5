"""Runs checks at a place and judges them by the table of known differences."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from . import domains, events, grants, guests, nodes, transactions, watches
from .client import Hungup
from .differences import DIFFERENCES, Difference
from .registry import CHECKS, TOP, Check, Group, Mismatch, Place, StorePlace

MODULES = (nodes, watches, transactions, guests, domains, grants, events)
"""Where the checks are; importing them fills the registry."""


class Verdict(enum.Enum):
    """How a check ended."""

    PASSED = "passed"
    DIFFERS = "differs as known"
    FAILED = "failed"
    VANISHED = "a known difference is no more"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Result:
    """One check's end, and what there is to say about it."""

    check: Check
    verdict: Verdict
    detail: str = ""

    @property
    def good(self) -> bool:
        """Whether nobody needs to look."""
        return self.verdict not in (Verdict.FAILED, Verdict.VANISHED)

    def as_dict(self) -> dict[str, str]:
        """Return the result for JSON."""
        return {
            "check": self.check.name,
            "group": self.check.group.value,
            "verdict": self.verdict.value,
            "text": self.check.text,
            "detail": self.detail,
        }


def of_groups(groups: set[Group]) -> list[Check]:
    """Return the checks of these groups."""
    return [found for found in CHECKS.values() if found.group in groups]


def run(check: Check, place: Place, server: str) -> Result:
    """Run one check; what it opened is closed, and what it wrote is gone."""
    lacking = sorted(need.value for need in check.needs - place.gives())
    if lacking:
        return Result(check, Verdict.NOT_RUN, "needs " + ", ".join(lacking))
    known = DIFFERENCES[server].get(check.name)
    with ExitStack() as stack:
        here = replace(place, stack=stack)
        if isinstance(here, StorePlace):
            here.client().rm(TOP)
        try:
            check.function(here)
        except Mismatch as mismatch:
            return _judge(check, mismatch, known)
        except (Hungup, TimeoutError) as error:
            return Result(check, Verdict.FAILED, f"no answer: {error!r}")
        finally:
            if isinstance(here, StorePlace):
                here.client().rm(TOP)
    if known is not None:
        return Result(check, Verdict.VANISHED, f"{known.what} is as expected")
    return Result(check, Verdict.PASSED)


def _judge(check: Check, mismatch: Mismatch, known: Difference | None) -> Result:
    if known is None:
        return Result(check, Verdict.FAILED, str(mismatch))
    if (known.what, known.found) == (mismatch.what, repr(mismatch.found)):
        return Result(check, Verdict.DIFFERS, known.reason)
    return Result(check, Verdict.FAILED, f"{mismatch}; known was: {known.what}: {known.found}")


def run_all(checks: list[Check], place: Place, server: str) -> Iterator[Result]:
    """Run checks one after the other."""
    for check in checks:
        yield run(check, place, server)
