"""Checks of XenStore's transactions: what they see, when they conflict, what they fire."""

from __future__ import annotations

from qemu_vtpm_bridge.embedded.wire import Op

from .client import OK
from .registry import TOP, Group, StorePlace, check, expect


@check(Group.STORE)
def a_transaction_sees_its_own_changes_and_others_do_not(place: StorePlace) -> None:
    """Changes in a transaction are seen in it, and by others once it was committed."""
    client, other = place.client(), place.client()
    tx = client.begin()
    expect("write", client.write(f"{TOP}/a", b"1", tx), OK)
    expect("inside", client.read(f"{TOP}/a", tx), b"1")
    expect("outside", client.read(f"{TOP}/a"), "ENOENT")
    expect("of another", other.read(f"{TOP}/a"), "ENOENT")
    expect("commit", client.end(tx), OK)
    expect("afterwards", other.read(f"{TOP}/a"), b"1")


@check(Group.STORE)
def a_transaction_that_is_undone_changes_nothing(place: StorePlace) -> None:
    """TRANSACTION_END with F leaves everything as it was."""
    client = place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    client.write(f"{TOP}/a", b"2", tx)
    client.chmod(f"{TOP}/a", "b0", tx)
    client.write(f"{TOP}/b", b"1", tx)
    client.rm(f"{TOP}/a", tx)
    expect("undo", client.end(tx, commit=False), OK)
    expect("value", client.read(f"{TOP}/a"), b"1")
    expect("permissions", client.perms(f"{TOP}/a"), "n0")
    expect("list", client.ls(TOP), ["a"])


@check(Group.STORE)
def what_was_read_may_not_have_changed(place: StorePlace) -> None:
    """A transaction that read a node that was then written gives EAGAIN and changes nothing."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    expect("read", client.read(f"{TOP}/a", tx), b"1")
    other.write(f"{TOP}/a", b"2")
    client.write(f"{TOP}/a", b"3", tx)
    expect("commit", client.end(tx), "EAGAIN")
    expect("value", client.read(f"{TOP}/a"), b"2")


@check(Group.STORE)
def writing_the_same_value_is_a_change(place: StorePlace) -> None:
    """A write of the value that is there already conflicts with who read the node."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    client.read(f"{TOP}/a", tx)
    other.write(f"{TOP}/a", b"1")
    client.write(f"{TOP}/b", b"1", tx)
    expect("commit", client.end(tx), "EAGAIN")


@check(Group.STORE)
def a_transaction_that_only_read_conflicts_as_well(place: StorePlace) -> None:
    """A transaction that only read, of which something changed, gives EAGAIN."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    client.read(f"{TOP}/a", tx)
    other.write(f"{TOP}/a", b"2")
    expect("commit", client.end(tx), "EAGAIN")


@check(Group.STORE)
def two_who_write_the_same_node_conflict(place: StorePlace) -> None:
    """A write outside conflicts with a transaction that wrote the same node without reading it."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    client.write(f"{TOP}/a", b"2", tx)
    other.write(f"{TOP}/a", b"3")
    expect("commit", client.end(tx), "EAGAIN")
    expect("value", client.read(f"{TOP}/a"), b"3")


@check(Group.STORE)
def two_who_write_different_nodes_do_not_conflict(place: StorePlace) -> None:
    """Changes of nodes that a transaction did not touch leave it alone."""
    client, other = place.client(), place.client()
    for name in "abc":
        client.write(f"{TOP}/{name}/x", b"1")
    tx = client.begin()
    client.read(f"{TOP}/a/x", tx)
    client.write(f"{TOP}/b/x", b"2", tx)
    other.write(f"{TOP}/c/x", b"3")
    other.write(f"{TOP}/c/y", b"3")
    expect("commit", client.end(tx), OK)


@check(Group.STORE)
def making_two_nodes_in_a_directory_conflicts(place: StorePlace) -> None:
    """A node that others make in a directory conflicts with one that a transaction makes in it."""
    client, other = place.client(), place.client()
    client.mkdir(TOP)
    tx = client.begin()
    client.write(f"{TOP}/a", b"1", tx)
    other.write(f"{TOP}/b", b"1")
    expect("commit", client.end(tx), "EAGAIN")


@check(Group.STORE)
def a_node_that_was_missing_and_was_made_conflicts(place: StorePlace) -> None:
    """A transaction that saw that a node is missing conflicts with who makes it."""
    client, other = place.client(), place.client()
    client.mkdir(TOP)
    tx = client.begin()
    expect("read", client.read(f"{TOP}/a", tx), "ENOENT")
    other.write(f"{TOP}/a", b"1")
    expect("commit", client.end(tx), "EAGAIN")


@check(Group.STORE)
def a_listed_directory_that_changed_conflicts(place: StorePlace) -> None:
    """A transaction that listed a directory conflicts with who makes a node in it."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/d/a", b"1")
    tx = client.begin()
    client.ls(f"{TOP}/d", tx)
    other.write(f"{TOP}/d/b", b"1")
    expect("commit", client.end(tx), "EAGAIN")


@check(Group.STORE)
def permissions_that_changed_conflict(place: StorePlace) -> None:
    """A transaction that read a node conflicts with who changes its permissions."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    client.read(f"{TOP}/a", tx)
    other.chmod(f"{TOP}/a", "r0")
    expect("commit", client.end(tx), "EAGAIN")


@check(Group.STORE)
def a_removed_node_conflicts_with_who_wrote_it(place: StorePlace) -> None:
    """A node removed outside conflicts with a transaction that wrote it."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    client.write(f"{TOP}/a", b"2", tx)
    other.rm(f"{TOP}/a")
    expect("commit", client.end(tx), "EAGAIN")
    expect("value", client.read(f"{TOP}/a"), "ENOENT")


@check(Group.STORE)
def a_snapshot_is_taken_when_a_node_is_first_read(place: StorePlace) -> None:
    """What a transaction has not touched it sees as it is when it touches it."""
    client, other = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    tx = client.begin()
    other.write(f"{TOP}/a", b"2")
    expect("read", client.read(f"{TOP}/a", tx), b"2")
    other.write(f"{TOP}/a", b"3")
    expect("read again", client.read(f"{TOP}/a", tx), b"2")
    client.end(tx, commit=False)


@check(Group.STORE)
def events_of_a_transaction_come_with_its_commit(place: StorePlace) -> None:
    """Watches fire when a transaction commits, and not at all when it is undone."""
    client, watcher = place.client(), place.client()
    client.mkdir(TOP)
    watcher.watch(TOP)
    watcher.events()
    tx = client.begin()
    client.write(f"{TOP}/a", b"1", tx)
    expect("before", watcher.paths(), [])
    client.end(tx)
    expect("after", watcher.paths(), [f"{TOP}/a"])
    tx = client.begin()
    client.write(f"{TOP}/b", b"1", tx)
    client.end(tx, commit=False)
    expect("undone", watcher.paths(), [])


@check(Group.STORE)
def a_commit_fires_in_the_order_of_the_changes(place: StorePlace) -> None:
    """A commit fires for its changes in the order in which their nodes were first touched."""
    client, watcher = place.client(), place.client()
    for name in "cabd":
        client.write(f"{TOP}/{name}", b"1")
    watcher.watch(TOP)
    watcher.events()
    tx = client.begin()
    client.read(f"{TOP}/d", tx)
    for name in "bcad":
        client.write(f"{TOP}/{name}", b"2", tx)
    client.end(tx)
    expect("events", watcher.paths(), [f"{TOP}/{name}" for name in "dbca"])


@check(Group.STORE)
def a_commit_fires_once_for_each_node(place: StorePlace) -> None:
    """A node that a transaction changed twice fires once."""
    client, watcher = place.client(), place.client()
    client.write(f"{TOP}/a", b"1")
    watcher.watch(TOP)
    watcher.events()
    tx = client.begin()
    client.write(f"{TOP}/a", b"2", tx)
    client.chmod(f"{TOP}/a", "r0", tx)
    client.write(f"{TOP}/a", b"3", tx)
    client.end(tx)
    expect("events", watcher.paths(), [f"{TOP}/a"])


@check(Group.STORE)
def removing_and_making_again_in_a_transaction_fires(place: StorePlace) -> None:
    """A directory that is removed and made again in a transaction fires, and so does what is in it.

    This is how entries of a device are written.
    """
    client, watcher = place.client(), place.client()
    client.write(f"{TOP}/d/a", b"1")
    watcher.watch(TOP)
    watcher.events()
    tx = client.begin()
    client.rm(f"{TOP}/d", tx)
    client.mkdir(f"{TOP}/d", tx)
    client.write(f"{TOP}/d/a", b"2", tx)
    expect("commit", client.end(tx), OK)
    expect("events", sorted(set(watcher.paths())), [f"{TOP}/d", f"{TOP}/d/a"])


@check(Group.STORE)
def making_a_directory_in_a_transaction_fires_for_it(place: StorePlace) -> None:
    """A directory made in a transaction by MKDIR fires, though nodes are made in it as well."""
    client, watcher = place.client(), place.client()
    client.mkdir(TOP)
    watcher.watch(TOP)
    watcher.events()
    tx = client.begin()
    client.mkdir(f"{TOP}/d", tx)
    client.write(f"{TOP}/d/a", b"1", tx)
    client.end(tx)
    expect("events", watcher.paths(), [f"{TOP}/d", f"{TOP}/d/a"])


@check(Group.STORE)
def a_node_made_and_removed_in_a_transaction_fires_nothing(place: StorePlace) -> None:
    """A node that a transaction makes and removes is no change."""
    client, watcher = place.client(), place.client()
    client.mkdir(TOP)
    watcher.watch(TOP)
    watcher.events()
    tx = client.begin()
    client.write(f"{TOP}/a", b"1", tx)
    client.rm(f"{TOP}/a", tx)
    client.end(tx)
    expect("events", watcher.paths(), [])


@check(Group.STORE)
def transactions_do_not_nest(place: StorePlace) -> None:
    """TRANSACTION_START in a transaction gives EBUSY."""
    client = place.client()
    tx = client.begin()
    expect("start", client.call(Op.TRANSACTION_START, b"\0", tx), "EBUSY")
    client.end(tx, commit=False)


@check(Group.STORE)
def transactions_belong_to_their_connection(place: StorePlace) -> None:
    """Another connection's transaction, or one that ended, gives ENOENT."""
    client, other = place.client(), place.client()
    tx = client.begin()
    expect("of another", other.read("/", tx), "ENOENT")
    expect("end by another", other.end(tx), "ENOENT")
    client.end(tx)
    expect("ended", client.read("/", tx), "ENOENT")
    expect("end again", client.end(tx), "ENOENT")
    expect("none", client.call(Op.TRANSACTION_END, b"T\0"), "ENOENT")


@check(Group.STORE)
def an_end_is_t_or_f(place: StorePlace) -> None:
    """TRANSACTION_END with anything but T or F gives EINVAL, and the transaction goes on."""
    client = place.client()
    tx = client.begin()
    for word in ("", "X", "TT"):
        expect(f"end {word!r}", client.ask(Op.TRANSACTION_END, word, tx=tx), "EINVAL")
    expect("end", client.end(tx), OK)


@check(Group.STORE)
def several_transactions_of_a_connection(place: StorePlace) -> None:
    """A connection may have several transactions at once, each with its own view."""
    client = place.client()
    client.write(f"{TOP}/a/x", b"1")
    client.write(f"{TOP}/b/x", b"1")
    one, other = client.begin(), client.begin()
    client.write(f"{TOP}/a/x", b"2", one)
    client.write(f"{TOP}/b/x", b"2", other)
    expect("in the other", client.read(f"{TOP}/a/x", other), b"1")
    client.end(other)
    expect("commit of one", client.end(one), OK)
    expect("value", client.read(f"{TOP}/a/x"), b"2")


@check(Group.STORE)
def a_connection_that_ends_undoes_its_transactions(place: StorePlace) -> None:
    """A transaction whose connection ends leaves nothing."""
    other = place.client()
    other.mkdir(TOP)
    with place.client() as client:
        client.write(f"{TOP}/a", b"1", client.begin())
    expect("read", other.read(f"{TOP}/a"), "ENOENT")
