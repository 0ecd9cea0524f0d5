"""Checks of granted pages.

Two sides, which may be one domain: the one shares, the other maps.  What is expected is
what Linux' gntalloc and gntdev give on Xen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from qemu_vtpm_bridge.errors import XenError

from .holder import OFFSET, TEXT
from .registry import Group, XenPlace, check, expect
from .sides import DEADLINE_S, PAGE_BYTES, Holder, SidesPage

NO_DOMAIN: Final = 32000


def refused(call: Callable[..., Any], *arguments: int) -> bool:
    """Return whether Xen refuses what is asked; what it gives is given back."""
    try:
        call(*arguments).close()
    except XenError:
        return True
    return False


def share(place: XenPlace) -> SidesPage:
    """Share a page of the one with the other."""
    page = place.one.share_page(place.other_domid)
    place.stack.callback(page.close)
    return page


def map_page(place: XenPlace, ref: int) -> SidesPage:
    """Map the one's page at the other."""
    page = place.other.map_page(place.one_domid, ref)
    place.stack.callback(page.close)
    return page


def hold(place: XenPlace) -> Holder:
    """Have a program in the one's domain hold a page and a port until it is killed."""
    program = place.one.hold(place.other_domid)
    place.stack.callback(program.kill)
    return program


def soon_refused(call: Callable[..., Any], *arguments: int) -> bool:
    """Return True once Xen refuses what is asked, and False where it never does.

    A kernel takes back what a killed program held before the program's end is seen; the
    embedded Xen learns of it a moment later.
    """
    end = time.monotonic() + DEADLINE_S
    while not refused(call, *arguments):
        if time.monotonic() > end:
            return False
    return True


@check(Group.GRANTS)
def a_shared_page_is_zeroed(place: XenPlace) -> None:
    """A page is full of zeros when it is shared, also where one was used before."""
    for _ in range(3):
        page = place.one.share_page(place.other_domid)
        expect("page", bytes(page.data), bytes(PAGE_BYTES))
        page.data[:] = b"x" * PAGE_BYTES
        page.close()


@check(Group.GRANTS)
def both_sides_see_the_same_page(place: XenPlace) -> None:
    """What either side writes, the other reads."""
    ours = share(place)
    theirs = map_page(place, ours.ref)
    ours.data[:5] = b"hello"
    expect("the other sees", bytes(theirs.data[:5]), b"hello")
    theirs.data[4090:4096] = b"answer"
    expect("the one sees", bytes(ours.data[4090:4096]), b"answer")


@check(Group.GRANTS)
def references_are_not_shared(place: XenPlace) -> None:
    """Every page that is shared at a time has a reference of its own, none of the first eight."""
    references = [share(place).ref for _ in range(10)]
    expect("different ones", len(set(references)), 10)
    expect("from 8 on", min(references) >= 8, True)


@check(Group.GRANTS)
def a_page_may_be_mapped_twice(place: XenPlace) -> None:
    """A page may be mapped twice, and each mapping lives for itself."""
    ours = share(place)
    first, second = map_page(place, ours.ref), map_page(place, ours.ref)
    first.data[:3] = b"abc"
    expect("the second sees", bytes(second.data[:3]), b"abc")
    first.close()
    ours.data[:3] = b"def"
    expect("when the first is gone", bytes(second.data[:3]), b"def")


@check(Group.GRANTS)
def mappings_end_in_any_order(place: XenPlace) -> None:
    """Mappings may end before or after the grant, and in any order."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        ours = share(place)
        pages = [ours, map_page(place, ours.ref), map_page(place, ours.ref)]
        for number in order:
            pages[number].close()
    ours = share(place)
    ours.data[:1] = b"z"
    expect("the next one", bytes(map_page(place, ours.ref).data[:1]), b"z")


@check(Group.GRANTS)
def a_bad_reference_is_refused(place: XenPlace) -> None:
    """A reference that was never granted cannot be mapped."""
    ours = share(place)
    for ref in (ours.ref + 200, 0x7FFFFFFF):
        expect(f"map {ref - ours.ref} beyond", refused(_map(place), place.one_domid, ref), True)


@check(Group.GRANTS)
def a_domain_that_is_not_there_has_no_pages(place: XenPlace) -> None:
    """No page of a domain that is not there can be mapped."""
    ours = share(place)
    expect("map", refused(_map(place), NO_DOMAIN, ours.ref), True)


@check(Group.GRANTS)
def a_page_of_somebody_else_is_refused(place: XenPlace) -> None:
    """A page that was granted to another domain cannot be mapped."""
    page = place.one.share_page(NO_DOMAIN)
    place.stack.callback(page.close)
    expect("map", refused(_map(place), place.one_domid, page.ref), True)


@check(Group.GRANTS)
def a_grant_that_ended_is_refused(place: XenPlace) -> None:
    """A grant that ended before anybody mapped it cannot be mapped."""
    page = place.one.share_page(place.other_domid)
    ref = page.ref
    page.close()
    expect("map", refused(_map(place), place.one_domid, ref), True)


@check(Group.GRANTS)
def a_mapped_page_outlives_its_grant(place: XenPlace) -> None:
    """A page that is mapped stays as it is when its owner ends the grant."""
    ours = place.one.share_page(place.other_domid)
    theirs = map_page(place, ours.ref)
    ours.data[OFFSET : OFFSET + 4] = b"text"
    ours.close()
    expect("the other sees", bytes(theirs.data[OFFSET : OFFSET + 4]), b"text")
    theirs.data[0:4] = b"more"
    expect("and writes", bytes(theirs.data[0:4]), b"more")


@check(Group.GRANTS)
def a_mapped_page_can_be_mapped_again_after_its_grant_ended(place: XenPlace) -> None:
    """While a page is mapped its grant cannot end, and it may be mapped once more."""
    ours = place.one.share_page(place.other_domid)
    ref = ours.ref
    map_page(place, ref)
    ours.close()
    expect("map refused", refused(_map(place), place.one_domid, ref), False)


@check(Group.GRANTS)
def a_new_page_is_not_the_one_that_is_still_mapped(place: XenPlace) -> None:
    """While an ended grant's page is mapped, a new grant is another page and reference."""
    ours = place.one.share_page(place.other_domid)
    old_ref = ours.ref
    theirs = map_page(place, old_ref)
    theirs.data[0:3] = b"old"
    ours.close()
    new = share(place)
    expect("another reference", new.ref != old_ref, True)
    new.data[0:3] = b"new"
    expect("the old page", bytes(theirs.data[0:3]), b"old")


@check(Group.GRANTS)
def a_killed_owners_page_stays_mapped(place: XenPlace) -> None:
    """A page stays mapped, with what is in it, when the program that shared it is killed."""
    program = hold(place)
    theirs = map_page(place, program.ref)
    program.kill()
    found = bytes(theirs.data[OFFSET : OFFSET + len(TEXT)])
    expect("the other sees", found, TEXT)
    theirs.data[OFFSET : OFFSET + 1] = b"H"


@check(Group.GRANTS)
def a_killed_owners_grants_end(place: XenPlace) -> None:
    """A page that nobody mapped cannot be mapped after its owner was killed."""
    program = hold(place)
    program.kill()
    expect("map", soon_refused(_map(place), place.one_domid, program.ref), True)


def _map(place: XenPlace) -> Callable[[int, int], SidesPage]:
    return place.other.map_page
