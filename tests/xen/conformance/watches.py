"""Checks of XenStore's watches: what fires, in which order, with which path."""

from __future__ import annotations

from qemu_vtpm_bridge.embedded.wire import Op

from .client import OK
from .registry import TOP, Group, StorePlace, check, expect


@check(Group.STORE)
def a_watch_fires_once_when_it_is_set(place: StorePlace) -> None:
    """A watch fires when it is set, with its own path, whether there is such a node or not."""
    client = place.client()
    expect("watch", client.watch(f"{TOP}/none"), OK)
    expect("events", client.events(), [(f"{TOP}/none", "t")])


@check(Group.STORE)
def a_watch_is_known_by_its_path_and_token(place: StorePlace) -> None:
    """The same path and token again give EEXIST; one that is not set cannot be taken back."""
    client = place.client()
    expect("watch", client.watch(f"{TOP}/a", "t"), OK)
    expect("again", client.watch(f"{TOP}/a", "t"), "EEXIST")
    expect("other token", client.watch(f"{TOP}/a", "u"), OK)
    expect("unwatch", client.unwatch(f"{TOP}/a", "t"), OK)
    expect("unwatch again", client.unwatch(f"{TOP}/a", "t"), "ENOENT")
    expect("other path", client.unwatch(f"{TOP}/b", "u"), "ENOENT")


@check(Group.STORE)
def no_event_comes_after_unwatch(place: StorePlace) -> None:
    """Once UNWATCH is answered, the watch fires no more."""
    client, writer = place.client(), place.client()
    client.watch(TOP)
    client.events()
    client.unwatch(TOP)
    writer.write(f"{TOP}/a", b"1")
    expect("events", client.events(), [])


@check(Group.STORE)
def a_watch_sees_the_node_and_all_below(place: StorePlace) -> None:
    """A watch fires for its node and for all below, and for nothing that looks alike."""
    client, writer = place.client(), place.client()
    client.watch(f"{TOP}/w")
    client.events()
    for path in ("w", "w/a", "w/a/b", "wide", "v"):
        writer.write(f"{TOP}/{path}", b"1")
    expect("events", client.paths(), [f"{TOP}/w", f"{TOP}/w/a", f"{TOP}/w/a/b"])


@check(Group.STORE)
def parents_are_made_silently(place: StorePlace) -> None:
    """A write that makes parents fires for the node that was written, not for the parents."""
    client, writer = place.client(), place.client()
    client.watch(TOP)
    client.events()
    writer.write(f"{TOP}/a/b/c", b"1")
    expect("events", client.paths(), [f"{TOP}/a/b/c"])
    client.watch(f"{TOP}/d", "d")
    client.events()
    writer.write(f"{TOP}/d/e", b"1")
    expect("of a parent", client.events(), [(f"{TOP}/d/e", "t"), (f"{TOP}/d/e", "d")])


@check(Group.STORE)
def each_change_fires_once(place: StorePlace) -> None:
    """WRITE of the same value, SET_PERMS, MKDIR and RM each fire once."""
    client, writer = place.client(), place.client()
    client.watch(TOP)
    client.events()
    for make in (
        lambda: writer.write(f"{TOP}/a", b"1"),
        lambda: writer.write(f"{TOP}/a", b"1"),
        lambda: writer.chmod(f"{TOP}/a", "r0"),
        lambda: writer.chmod(f"{TOP}/a", "r0"),
        lambda: writer.rm(f"{TOP}/a"),
        lambda: writer.mkdir(f"{TOP}/a"),
    ):
        make()
        expect("events", client.paths(), [f"{TOP}/a"])


@check(Group.STORE)
def what_changes_nothing_fires_nothing(place: StorePlace) -> None:
    """MKDIR of a node that is there, RM of one that is not, and requests refused fire nothing."""
    client, writer = place.client(), place.client()
    writer.write(f"{TOP}/a", b"1")
    client.watch(TOP)
    client.events()
    writer.mkdir(f"{TOP}/a")
    writer.rm(f"{TOP}/b")
    writer.write(f"{TOP}/a/", b"1")
    writer.read(f"{TOP}/a")
    expect("events", client.paths(), [])


@check(Group.STORE)
def removing_a_tree_fires_for_its_top(place: StorePlace) -> None:
    """RM of a tree fires, for a watch above it, once, with the path that was removed."""
    client, writer = place.client(), place.client()
    writer.write(f"{TOP}/a/b/c", b"1")
    client.watch(TOP)
    client.events()
    writer.rm(f"{TOP}/a")
    expect("events", client.paths(), [f"{TOP}/a"])


@check(Group.STORE)
def removing_a_tree_fires_for_watches_in_it(place: StorePlace) -> None:
    """RM of a tree fires watches on nodes in it, each with its node's path."""
    client, writer = place.client(), place.client()
    for path in ("a/b/c", "a/d"):
        writer.write(f"{TOP}/{path}", b"1")
    for path in ("a/b", "a/b/c", "a/d"):
        client.watch(f"{TOP}/{path}", path)
    client.events()
    writer.rm(f"{TOP}/a")
    wanted = [(f"{TOP}/{path}", path) for path in ("a/b", "a/b/c", "a/d")]
    expect("events", sorted(client.events()), wanted)


@check(Group.STORE)
def a_watch_in_a_removed_tree_on_what_is_not_there_is_silent(place: StorePlace) -> None:
    """RM of a tree does not fire a watch on a node in it that was not there."""
    client, writer = place.client(), place.client()
    writer.write(f"{TOP}/a/b", b"1")
    client.watch(f"{TOP}/a/none")
    client.events()
    writer.rm(f"{TOP}/a")
    expect("events", client.events(), [])


@check(Group.STORE)
def watches_below_are_told_before_the_one_above(place: StorePlace) -> None:
    """RM of a tree tells watches in it from the leaves up, in the order of its nodes."""
    client, writer = place.client(), place.client()
    for path in ("a/b/c", "a/b/a", "a/d"):
        writer.write(f"{TOP}/{path}", b"1")
    for path in ("a", "a/d", "a/b/a", "a/b", "a/b/c"):
        client.watch(f"{TOP}/{path}", path)
    client.events()
    writer.rm(f"{TOP}/a")
    tokens = [token for _, token in client.events()]
    expect("tokens", tokens, ["a/b/c", "a/b/a", "a/b", "a/d", "a"])


@check(Group.STORE)
def events_come_in_the_order_of_the_changes(place: StorePlace) -> None:
    """Events of one connection come in the order of the changes, from whomever they are."""
    client, one, other = place.client(), place.client(), place.client()
    client.watch(TOP)
    client.events()
    wanted = []
    for number in range(50):
        path = f"{TOP}/{number % 7}/{number}"
        (one if number % 2 else other).write(path, b"1")
        wanted.append(path)
    expect("events", client.paths(), wanted)


@check(Group.STORE)
def watches_fire_oldest_first(place: StorePlace) -> None:
    """Of several watches of one connection that a change concerns, the oldest fires first."""
    client, writer = place.client(), place.client()
    for token in ("one", "two", "three"):
        client.watch(TOP, token)
    client.events()
    writer.write(f"{TOP}/a", b"1")
    expect("tokens", [token for _, token in client.events()], ["one", "two", "three"])


@check(Group.STORE)
def who_changes_a_node_is_told_of_it_too(place: StorePlace) -> None:
    """A connection's own changes fire its own watches."""
    client = place.client()
    client.watch(TOP)
    client.events()
    client.write(f"{TOP}/a", b"1")
    expect("events", client.paths(), [f"{TOP}/a"])


@check(Group.STORE)
def ones_own_event_comes_before_the_answer(place: StorePlace) -> None:
    """The event of a change comes before the answer to the request that made it."""
    client = place.client()
    client.watch(TOP)
    client.events()
    client.write(f"{TOP}/a", b"1")
    expect("events that were there", len(client._events), 1)


@check(Group.STORE)
def the_first_event_comes_after_the_answer(place: StorePlace) -> None:
    """A new watch's first event comes after the answer to WATCH."""
    client = place.client()
    client.watch(TOP)
    expect("events that were there", len(client._events), 0)
    expect("event", client.next_event(), (TOP, "t"))


@check(Group.STORE)
def relative_watches_give_relative_paths(place: StorePlace) -> None:
    """A watch on a relative path fires with relative paths, and is another than the absolute."""
    client, writer = place.client(), place.client()
    absolute = "/local/domain/0/conformance"
    client.watch("conformance", "relative")
    client.watch(absolute, "absolute")
    found = client.events()
    expect("first", found, [("conformance", "relative"), (absolute, "absolute")])
    writer.write(f"{absolute}/a", b"1")
    wanted = [("conformance/a", "relative"), (f"{absolute}/a", "absolute")]
    expect("events", sorted(client.events(), reverse=True), wanted)
    writer.rm(absolute)


@check(Group.STORE)
def the_absolute_and_the_relative_path_are_the_same_watch(place: StorePlace) -> None:
    """A watch set with a relative path is the one of the absolute path, for EEXIST and UNWATCH."""
    client = place.client()
    client.watch("conformance", "t")
    expect("again", client.watch("/local/domain/0/conformance", "t"), "EEXIST")
    expect("unwatch", client.unwatch("/local/domain/0/conformance", "t"), OK)


@check(Group.STORE)
def the_root_can_be_watched(place: StorePlace) -> None:
    """A watch on the root sees everything."""
    client, writer = place.client(), place.client()
    client.watch("/")
    expect("first", client.events(), [("/", "t")])
    writer.write(f"{TOP}/a", b"1")
    expect("event", f"{TOP}/a" in client.paths(), True)


@check(Group.STORE)
def tokens_are_any_bytes(place: StorePlace) -> None:
    """A token may be empty, long, or have any bytes but NUL."""
    client = place.client()
    for token in ("", "x" * 1000, "a b/\xff\n"):
        expect(f"watch with {token[:8]!r}", client.watch(TOP, token), OK)
        expect("event", client.next_event(), (TOP, token))


@check(Group.STORE)
def malformed_watches_are_einval(place: StorePlace) -> None:
    """A path that is none, or a request without a token, gives EINVAL."""
    client = place.client()
    for path in ("", f"{TOP}/", f"{TOP}//a", f"{TOP}/a b"):
        expect(f"watch {path!r}", client.watch(path), "EINVAL")
    expect("without a token", client.ask(Op.WATCH, TOP), "EINVAL")


@check(Group.STORE)
def any_name_with_an_at_can_be_watched(place: StorePlace) -> None:
    """@introduceDomain and @releaseDomain can be watched, and other names with an @ as well."""
    client = place.client()
    for name in ("@introduceDomain", "@releaseDomain", "@conformance"):
        expect(f"watch {name}", client.watch(name), OK)
        expect("event", client.next_event(), (name, "t"))


@check(Group.STORE)
def permissions_of_special_nodes_can_be_set_and_not_read(place: StorePlace) -> None:
    """SET_PERMS takes @introduceDomain and @releaseDomain, GET_PERMS and READ give EINVAL."""
    client = place.client()
    for name in ("@introduceDomain", "@releaseDomain"):
        expect(f"set permissions of {name}", client.chmod(name, "n0"), OK)
        expect(f"permissions of {name}", client.perms(name), "EINVAL")
        expect(f"read {name}", client.read(name), "EINVAL")


@check(Group.STORE)
def resetting_watches(place: StorePlace) -> None:
    """RESET_WATCHES takes back a connection's watches and ends its transactions."""
    client, writer = place.client(), place.client()
    client.watch(TOP)
    tx = client.begin()
    expect("reset", client.call(Op.RESET_WATCHES, b"\0"), OK)
    client.events()
    writer.write(f"{TOP}/a", b"1")
    expect("events", client.events(), [])
    expect("transaction", client.end(tx), "ENOENT")
