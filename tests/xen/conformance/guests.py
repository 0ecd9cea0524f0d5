"""Checks of what guests may do in XenStore, and how much of it."""

from __future__ import annotations

from typing import Final

from qemu_vtpm_bridge.embedded.wire import Op

from .client import OK, Answer, StoreClient
from .registry import TOP, Group, Need, StorePlace, check, expect

NODES_MAX: Final = 1000
VALUE_MAX_BYTES: Final = 2048


def owns(place: StorePlace, number: int = 0) -> tuple[int, StoreClient, StoreClient, str]:
    """Return a guest's id and connection, domain 0's, and a directory that the guest owns."""
    domid, guest = place.guest(number)
    dom0 = place.client()
    path = f"{TOP}/of-{domid}"
    dom0.mkdir(path)
    dom0.chmod(path, f"n{domid}")
    return domid, guest, dom0, path


@check(Group.STORE, Need.GUESTS)
def a_guest_needs_permission(place: StorePlace) -> None:
    """A guest reads, lists and writes what its permissions say, and gets EACCES for the rest."""
    domid, guest = place.guest()
    dom0 = place.client()
    dom0.write(f"{TOP}/a", b"1")
    for permissions, may_read, may_write in (
        ("n0", False, False),
        (f"n0 r{domid}", True, False),
        (f"n0 w{domid}", False, True),
        (f"n0 b{domid}", True, True),
        ("r0", True, False),
        (f"r0 n{domid}", False, False),
        (f"n{domid}", True, True),
    ):
        dom0.chmod(f"{TOP}/a", permissions)
        read = isinstance(guest.read(f"{TOP}/a"), bytes)
        listed = isinstance(guest.ls(f"{TOP}/a"), list)
        shown = guest.perms(f"{TOP}/a") != "EACCES"
        expect(f"reading with {permissions}", (read, listed, shown), (may_read,) * 3)
        written = guest.write(f"{TOP}/a", b"1") == OK
        expect(f"writing with {permissions}", written, may_write)


@check(Group.STORE, Need.GUESTS)
def the_first_entry_of_a_domain_counts(place: StorePlace) -> None:
    """Of several permissions for the same domain the first one counts."""
    domid, guest = place.guest()
    dom0 = place.client()
    dom0.write(f"{TOP}/a", b"1")
    dom0.chmod(f"{TOP}/a", f"n0 n{domid} r{domid}")
    expect("read", guest.read(f"{TOP}/a"), "EACCES")
    dom0.chmod(f"{TOP}/a", f"n0 r{domid} n{domid}")
    expect("read", guest.read(f"{TOP}/a"), b"1")


@check(Group.STORE, Need.GUESTS)
def who_may_not_read_learns_nothing_of_what_is_missing(place: StorePlace) -> None:
    """A missing node is ENOENT for who may read what is above it, and EACCES for others."""
    domid, guest, dom0, path = owns(place)
    expect("below its own", guest.read(f"{path}/none"), "ENOENT")
    expect("deep below its own", guest.read(f"{path}/none/none"), "ENOENT")
    dom0.mkdir(f"{TOP}/closed")
    expect("below another's", guest.read(f"{TOP}/closed/none"), "EACCES")
    expect("deep below another's", guest.read(f"{TOP}/closed/none/none"), "EACCES")
    dom0.chmod(f"{TOP}/closed", f"n0 r{domid}")
    expect("below what it may read", guest.read(f"{TOP}/closed/none"), "ENOENT")


@check(Group.STORE, Need.GUESTS)
def a_guest_makes_nodes_where_it_may_write(place: StorePlace) -> None:
    """Making a node takes permission to write to its parent; removing one, to the node itself."""
    domid, guest = place.guest()
    dom0 = place.client()
    dom0.write(f"{TOP}/d/a", b"1")
    dom0.chmod(f"{TOP}/d", f"n0 r{domid}")
    expect("write", guest.write(f"{TOP}/d/b", b"1"), "EACCES")
    expect("mkdir", guest.mkdir(f"{TOP}/d/b"), "EACCES")
    dom0.chmod(f"{TOP}/d", f"n0 w{domid}")
    expect("write", guest.write(f"{TOP}/d/b", b"1"), OK)
    expect("mkdir", guest.mkdir(f"{TOP}/d/c"), OK)
    expect("rm of another's", guest.rm(f"{TOP}/d/a"), "EACCES")
    expect("rm of its own", guest.rm(f"{TOP}/d/b"), OK)


@check(Group.STORE, Need.GUESTS)
def removing_a_tree_asks_for_its_top_only(place: StorePlace) -> None:
    """RM of a tree takes permission for its top, whoever owns what is in it."""
    _, guest, dom0, path = owns(place)
    guest.write(f"{path}/d", b"1")
    dom0.write(f"{path}/d/a", b"1")
    dom0.chmod(f"{path}/d/a", "n0")
    expect("rm", guest.rm(f"{path}/d"), OK)
    expect("read", dom0.read(f"{path}/d/a"), "ENOENT")


@check(Group.STORE, Need.GUESTS)
def a_guests_nodes_are_its_own(place: StorePlace) -> None:
    """What a guest makes is its own; the other permissions are the parent's."""
    domid, guest, dom0, path = owns(place)
    other, other_guest = place.guest(1)
    dom0.chmod(path, f"n{domid} b{other}")
    guest.write(f"{path}/a/b", b"1")
    expect("its own", dom0.perms(f"{path}/a"), f"n{domid} b{other}")
    expect("write", other_guest.write(f"{path}/c/d", b"1"), OK)
    expect("another's", dom0.perms(f"{path}/c/d"), f"n{other} b{other}")


@check(Group.STORE, Need.GUESTS)
def only_the_owner_sets_permissions(place: StorePlace) -> None:
    """A guest sets permissions of its own nodes only, and cannot give them away."""
    domid, guest, dom0, path = owns(place)
    other, other_guest = place.guest(1)
    expect("its own", guest.chmod(path, f"n{domid} b{other}"), OK)
    expect("another's", other_guest.chmod(path, f"n{other}"), "EACCES")
    expect("given away", guest.chmod(path, f"n{other}"), "EPERM")
    expect("afterwards", dom0.perms(path), f"n{domid} b{other}")


@check(Group.STORE, Need.GUESTS)
def events_reach_who_may_read(place: StorePlace) -> None:
    """A guest's watch fires for nodes that it may read, and for no others."""
    domid, guest, _, path = owns(place)
    _, watcher = place.guest(1)
    other = sorted(place.guest_sockets)[1]
    expect("watch", watcher.watch(path), OK)
    expect("first", watcher.paths(), [path])
    guest.write(f"{path}/secret", b"1")
    expect("not readable", watcher.paths(), [])
    guest.chmod(f"{path}/secret", f"n{domid} r{other}")
    expect("made readable", watcher.paths(), [f"{path}/secret"])
    guest.write(f"{path}/secret", b"2")
    expect("readable", watcher.paths(), [f"{path}/secret"])
    guest.chmod(f"{path}/secret", f"n{domid}")
    expect("made unreadable", watcher.paths(), [f"{path}/secret"])


@check(Group.STORE, Need.GUESTS)
def the_end_of_what_was_readable_is_told(place: StorePlace) -> None:
    """Who could read a node is told that it was removed."""
    domid, guest, _, path = owns(place)
    _, watcher = place.guest(1)
    other = sorted(place.guest_sockets)[1]
    guest.write(f"{path}/a", b"1")
    guest.chmod(f"{path}/a", f"n{domid} r{other}")
    watcher.watch(f"{path}/a")
    watcher.events()
    guest.rm(f"{path}/a")
    expect("events", watcher.paths(), [f"{path}/a"])


@check(Group.STORE, Need.GUESTS)
def the_end_of_what_was_readable_in_a_removed_tree_is_told(place: StorePlace) -> None:
    """Who could read a node, but not the tree that was removed, is told for a watch on the node."""
    domid, guest, _, path = owns(place)
    _, watcher = place.guest(1)
    other = sorted(place.guest_sockets)[1]
    guest.write(f"{path}/d/a", b"1")
    guest.chmod(f"{path}/d/a", f"n{domid} r{other}")
    watcher.watch(f"{path}/d/a")
    watcher.events()
    guest.rm(f"{path}/d")
    expect("events", watcher.paths(), [f"{path}/d/a"])


@check(Group.STORE, Need.GUESTS)
def a_watch_on_what_may_not_be_read_is_allowed(place: StorePlace) -> None:
    """WATCH asks for no permission, and fires once when it is set."""
    _, guest = place.guest()
    dom0 = place.client()
    dom0.mkdir(f"{TOP}/closed")
    expect("watch", guest.watch(f"{TOP}/closed"), OK)
    expect("event", guest.next_event(), (f"{TOP}/closed", "t"))


@check(Group.STORE, Need.GUESTS)
def a_guests_relative_paths_are_below_its_directory(place: StorePlace) -> None:
    """A guest's relative paths and watches are below /local/domain/<own>."""
    domid, guest = place.guest()
    dom0 = place.client()
    own = f"/local/domain/{domid}/conformance"
    dom0.mkdir(own)
    dom0.chmod(own, f"n{domid}")
    guest.watch("conformance")
    guest.events()
    expect("write", guest.write("conformance/a", b"v"), OK)
    expect("read", dom0.read(f"{own}/a"), b"v")
    expect("event", guest.paths(), ["conformance/a"])
    dom0.rm(own)


@check(Group.STORE, Need.GUESTS)
def domains_are_domain_0s_business(place: StorePlace) -> None:
    """A guest may introduce, release, resume nothing and set no target: EACCES."""
    domid, guest = place.guest()
    word = str(domid)
    expect("INTRODUCE", guest.ask(Op.INTRODUCE, word, "1", "1"), "EACCES")
    expect("RELEASE", guest.ask(Op.RELEASE, word), "EACCES")
    expect("RESUME", guest.ask(Op.RESUME, word), "EACCES")
    expect("SET_TARGET", guest.ask(Op.SET_TARGET, word, "0"), "EACCES")


@check(Group.STORE, Need.GUESTS)
def a_guest_sets_no_permissions_of_special_nodes(place: StorePlace) -> None:
    """SET_PERMS of @introduceDomain and @releaseDomain gives a guest ENOENT."""
    domid, guest = place.guest()
    for name in ("@introduceDomain", "@releaseDomain"):
        expect(f"set permissions of {name}", guest.chmod(name, f"n0 r{domid}"), "ENOENT")


@check(Group.STORE, Need.GUESTS)
def a_stub_domain_acts_for_its_target(place: StorePlace) -> None:
    """A domain that was given a target may do what the target may."""
    domid, guest, dom0, path = owns(place)
    other, stub = place.guest(1)
    guest.write(f"{path}/a", b"1")
    expect("before", stub.read(f"{path}/a"), "EACCES")
    expect("set target", dom0.ask(Op.SET_TARGET, str(other), str(domid)), OK)
    expect("read", stub.read(f"{path}/a"), b"1")
    expect("write", stub.write(f"{path}/a", b"2"), OK)


# Quotas; the numbers are xenstored's without options.


@check(Group.STORE, Need.GUESTS)
def a_guest_owns_so_many_nodes(place: StorePlace) -> None:
    """A guest owns at most 1000 nodes; one more gives ENOSPC, and removing one makes room."""
    _, guest, _, path = owns(place)
    last: Answer = OK
    made = 0
    while made < 2 * NODES_MAX and last == OK:
        last = guest.mkdir(f"{path}/{made // 100}/{made % 100}")
        made += 1
    expect("one more", last, "ENOSPC")
    # Beside these and their directories it owns some that the toolstack gave it.
    expect("nodes", NODES_MAX - 40 <= made < NODES_MAX, True)
    expect("in a transaction", guest.mkdir(f"{path}/one-more", guest.begin()), "ENOSPC")
    expect("changing one", guest.write(f"{path}/0/0", b"1"), OK)
    guest.rm(f"{path}/0/0")
    expect("again", guest.mkdir(f"{path}/one-more"), OK)


@check(Group.STORE, Need.GUESTS)
def a_guests_directory_lists_so_many_names(place: StorePlace) -> None:
    """The names of its children count to the 2048 bytes of a guest's node; ENOSPC."""
    _, guest, _, path = owns(place)
    last: Answer = OK
    made = 0
    while made < 200 and last == OK:
        last = guest.mkdir(f"{path}/{made:019d}")
        made += 1
    expect("last", last, "ENOSPC")
    expect("nodes made", made - 1, 100)


@check(Group.STORE, Need.GUESTS)
def a_guests_node_holds_so_much(place: StorePlace) -> None:
    """A value of more than 2048 bytes gives a guest ENOSPC; one of 1900 is well."""
    _, guest, _, path = owns(place)
    expect("2049 bytes", guest.write(f"{path}/a", b"v" * (VALUE_MAX_BYTES + 1)), "ENOSPC")
    expect("1900 bytes", guest.write(f"{path}/a", b"v" * 1900), OK)


@check(Group.STORE, Need.GUESTS)
def what_counts_to_a_nodes_size(place: StorePlace) -> None:
    """A guest's node is below 2048 bytes: a header of 24, 8 for each permission, the value."""
    _, guest, _, path = owns(place)
    longest = VALUE_MAX_BYTES
    while longest and guest.write(f"{path}/a", b"v" * longest) != OK:
        longest -= 1
    expect("longest value", longest, 2015)


@check(Group.STORE, Need.GUESTS)
def a_guest_sets_so_many_watches(place: StorePlace) -> None:
    """A guest has at most 129 watches, one more than the quota says."""
    _, guest = place.guest()
    answers = [guest.watch(TOP, str(number)) for number in range(200)]
    expect("watches", answers.count(OK), 129)


@check(Group.STORE, Need.GUESTS)
def watches_beyond_the_quota_are_e2big(place: StorePlace) -> None:
    """A watch beyond the quota gives E2BIG; taking one back makes room."""
    _, guest = place.guest()
    answers = [guest.watch(TOP, str(number)) for number in range(200)]
    expect("last", answers[-1], "E2BIG")
    guest.unwatch(TOP, "0")
    expect("again", guest.watch(TOP, "0"), OK)


@check(Group.STORE, Need.GUESTS)
def a_guest_has_so_many_transactions(place: StorePlace) -> None:
    """A guest has at most 11 transactions, one more than the quota says; then ENOSPC."""
    _, guest = place.guest()
    open_ones = [guest.begin() for _ in range(11)]
    expect("one more", guest.call(Op.TRANSACTION_START, b"\0"), "ENOSPC")
    guest.end(open_ones[0], commit=False)
    expect("again", isinstance(guest.call(Op.TRANSACTION_START, b"\0"), bytes), True)


@check(Group.STORE, Need.GUESTS)
def a_guest_sets_so_many_permissions(place: StorePlace) -> None:
    """A guest sets at most 5 permissions on a node; more give ENOSPC."""
    domid, guest, _, path = owns(place)
    other = sorted(place.guest_sockets)[1]
    expect("5", guest.chmod(path, f"n{domid} r0 r{other} r0 r{other}"), OK)
    expect("6", guest.chmod(path, f"n{domid} r0 r{other} r0 r{other} r0"), "ENOSPC")


@check(Group.STORE, Need.GUESTS)
def domain_0_has_no_quota(place: StorePlace) -> None:
    """Quotas do not bind domain 0."""
    client = place.client()
    answers = {client.write(f"{TOP}/{number}", b"v" * 3000) for number in range(1100)}
    expect("writes", answers, {OK})
    expect("watches", {client.watch(TOP, str(number)) for number in range(200)}, {OK})
    transactions = [client.begin() for _ in range(20)]
    for tx in transactions:
        client.end(tx, commit=False)


@check(Group.STORE, Need.GUESTS)
def a_nodes_owner_pays_for_it(place: StorePlace) -> None:
    """Nodes that domain 0 gives a guest count to the guest's quota."""
    _, guest, dom0, path = owns(place)
    for number in range(NODES_MAX + 10):
        dom0.mkdir(f"{path}/{number}")
    expect("mkdir", guest.mkdir(f"{path}/one-more"), "ENOSPC")
