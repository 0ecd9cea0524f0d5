"""Checks of XenStore's nodes: what there is, what is refused, what is inherited."""

from __future__ import annotations

from typing import Final

from qemu_vtpm_bridge.embedded.wire import HEADER, Op

from .client import OK
from .registry import TOP, Group, Need, StorePlace, check, expect

NO_PATHS: Final = ("", "//", f"{TOP}//b", f"{TOP}/", f"{TOP}/a b", f"{TOP}/a:b", f"{TOP}/a.b")
NO_PATHS_EITHER: Final = ("@foo", f"{TOP}/\xe4", f"{TOP}/\x01")


@check(Group.STORE)
def a_missing_node_is_enoent(place: StorePlace) -> None:
    """Reading, listing and changing permissions of a missing node give ENOENT."""
    client = place.client()
    expect("read", client.read(f"{TOP}/none"), "ENOENT")
    expect("list", client.ls(f"{TOP}/none"), "ENOENT")
    expect("permissions", client.perms(f"{TOP}/none"), "ENOENT")
    expect("set permissions", client.chmod(f"{TOP}/none", "n0"), "ENOENT")


@check(Group.STORE)
def writing_makes_parents(place: StorePlace) -> None:
    """Writing a node makes the parents that it lacks, empty and with inherited permissions."""
    client = place.client()
    client.mkdir(TOP)
    client.chmod(TOP, "r0")
    expect("write", client.write(f"{TOP}/a/b/c", b"v"), OK)
    expect("value of a parent", client.read(f"{TOP}/a/b"), b"")
    expect("permissions of a parent", client.perms(f"{TOP}/a"), "r0")
    expect("permissions of the node", client.perms(f"{TOP}/a/b/c"), "r0")


@check(Group.STORE)
def mkdir_makes_parents_and_changes_nothing_that_is_there(place: StorePlace) -> None:
    """MKDIR makes parents; of a node that is there it changes nothing."""
    client = place.client()
    expect("mkdir", client.mkdir(f"{TOP}/a/b"), OK)
    expect("value", client.read(f"{TOP}/a/b"), b"")
    client.write(f"{TOP}/a/b", b"v")
    expect("mkdir again", client.mkdir(f"{TOP}/a/b"), OK)
    expect("value afterwards", client.read(f"{TOP}/a/b"), b"v")


@check(Group.STORE)
def values_are_bytes(place: StorePlace) -> None:
    """A value is any bytes, empty, with NULs or with the eighth bit set."""
    client = place.client()
    for value in (b"", b"\0", b"a\0b\0", b"\xff\xfe\n\t", bytes(range(256))):
        expect("write", client.write(f"{TOP}/v", value), OK)
        expect("read", client.read(f"{TOP}/v"), value)


@check(Group.STORE)
def a_value_fills_the_message(place: StorePlace) -> None:
    """Domain 0 may write as much as fits into a message of 4096 bytes, and reads it back."""
    client = place.client()
    value = b"x" * (4096 - len(TOP) - 3)
    expect("write", client.write(f"{TOP}/v", value), OK)
    expect("read", client.read(f"{TOP}/v"), value)


@check(Group.STORE)
def a_node_keeps_its_children_when_it_is_written(place: StorePlace) -> None:
    """Writing a directory's value leaves its children and its permissions alone."""
    client = place.client()
    client.write(f"{TOP}/d/a", b"1")
    client.chmod(f"{TOP}/d", "b0")
    client.write(f"{TOP}/d", b"v")
    expect("list", client.ls(f"{TOP}/d"), ["a"])
    expect("permissions", client.perms(f"{TOP}/d"), "b0")


@check(Group.STORE)
def children_are_listed_as_they_were_made(place: StorePlace) -> None:
    """A directory lists its children in the order in which they were made."""
    client = place.client()
    for name in ("c", "a", "b"):
        client.mkdir(f"{TOP}/{name}")
    expect("list", client.ls(TOP), ["c", "a", "b"])
    client.rm(f"{TOP}/c")
    client.mkdir(f"{TOP}/c")
    expect("list afterwards", client.ls(TOP), ["a", "b", "c"])


@check(Group.STORE)
def removing_takes_all_that_is_below(place: StorePlace) -> None:
    """RM removes a node with everything below it, and nothing beside it."""
    client = place.client()
    for path in ("a/b/c", "a/d", "ab"):
        client.write(f"{TOP}/{path}", b"1")
    expect("rm", client.rm(f"{TOP}/a"), OK)
    expect("a child", client.read(f"{TOP}/a/b/c"), "ENOENT")
    expect("what is left", client.ls(TOP), ["ab"])


@check(Group.STORE)
def removing_what_is_missing(place: StorePlace) -> None:
    """RM of a missing node succeeds if its parent is there, and gives ENOENT if not."""
    client = place.client()
    client.mkdir(TOP)
    expect("with a parent", client.rm(f"{TOP}/a"), OK)
    expect("without", client.rm(f"{TOP}/a/b"), "ENOENT")


@check(Group.STORE)
def the_root_cannot_be_removed(place: StorePlace) -> None:
    """RM of the root gives EINVAL."""
    client = place.client()
    tx = client.begin()  # where it can be removed, it is not to be for good
    answer = client.rm("/", tx)
    client.end(tx, commit=False)
    expect("rm", answer, "EINVAL")


@check(Group.STORE)
def malformed_paths_are_einval(place: StorePlace) -> None:
    """A path with an empty part, a final slash or a character outside its set gives EINVAL."""
    client = place.client()
    for path in NO_PATHS:
        expect(f"read {path!r}", client.read(path), "EINVAL")
        expect(f"write {path!r}", client.write(path, b"v"), "EINVAL")
        expect(f"mkdir {path!r}", client.mkdir(path), "EINVAL")
        expect(f"list {path!r}", client.ls(path), "EINVAL")
        expect(f"rm {path!r}", client.rm(path), "EINVAL")
        expect(f"permissions {path!r}", client.perms(path), "EINVAL")


@check(Group.STORE)
def special_and_eight_bit_paths_are_einval(place: StorePlace) -> None:
    """A path that begins with @, or has a character above or below ASCII's, gives EINVAL."""
    client = place.client()
    for path in NO_PATHS_EITHER:
        expect(f"read {path!r}", client.read(path), "EINVAL")
        expect(f"write {path!r}", client.write(path, b"v"), "EINVAL")


@check(Group.STORE)
def names_may_have_these_characters(place: StorePlace) -> None:
    """A name may hold letters, digits, and - _ @."""
    client = place.client()
    expect("write", client.write(f"{TOP}/aZ09-_@", b"v"), OK)
    expect("read", client.read(f"{TOP}/aZ09-_@"), b"v")


@check(Group.STORE)
def the_longest_absolute_path(place: StorePlace) -> None:
    """An absolute path has at most 2048 characters; a longer one gives EINVAL."""
    client = place.client()
    longest = TOP + "/" + "x" * (2048 - len(TOP) - 1)
    expect("write", client.write(longest, b"v"), OK)
    expect("read", client.read(longest), b"v")
    expect("one more", client.write(longest + "x", b"v"), "EINVAL")


@check(Group.STORE)
def the_longest_relative_path(place: StorePlace) -> None:
    """A domain's directory does not count to the 2048 characters of a path in it."""
    client = place.client()
    longest = "conformance/" + "x" * (2048 - 12)
    expect("write", client.write(longest, b"v"), OK)
    expect("read", client.read(f"/local/domain/0/{longest}"), b"v")
    expect("one more", client.write(longest + "x", b"v"), "EINVAL")
    expect("absolute", client.write(f"/local/domain/0/{longest}x", b"v"), "EINVAL")
    client.rm("conformance")


@check(Group.STORE)
def relative_paths_are_below_the_domain(place: StorePlace) -> None:
    """A path without a slash before it is one below /local/domain/<own>."""
    client = place.client()
    expect("write", client.write("conformance/a", b"v"), OK)
    expect("read", client.read("/local/domain/0/conformance/a"), b"v")
    client.rm("conformance")


@check(Group.STORE)
def domain_paths(place: StorePlace) -> None:
    """GET_DOMAIN_PATH answers for any id, whether there is such a domain or not."""
    client = place.client()
    expect("of 0", client.ask(Op.GET_DOMAIN_PATH, "0"), b"/local/domain/0\0")
    expect("of 4711", client.ask(Op.GET_DOMAIN_PATH, "4711"), b"/local/domain/4711\0")


@check(Group.STORE)
def domain_ids_are_read_as_atoi_reads_them(place: StorePlace) -> None:
    """A domain's id is the number that a word begins with, and 0 where it begins with none."""
    client = place.client()
    for word, domid in (("", 0), ("x", 0), ("1x", 1), ("12 ", 12)):
        answer = client.ask(Op.GET_DOMAIN_PATH, word)
        expect(f"path of {word!r}", answer, b"/local/domain/%d\0" % domid)
    expect("introduced ''", client.ask(Op.IS_DOMAIN_INTRODUCED, ""), b"T\0")


# Permissions.


@check(Group.STORE)
def domain_0_reads_and_writes_everything(place: StorePlace) -> None:
    """Permissions do not bind domain 0."""
    client = place.client()
    client.write(f"{TOP}/a", b"1")
    peer = place.peers[0] if place.peers else 0
    expect("set permissions", client.chmod(f"{TOP}/a", f"n{peer}"), OK)
    expect("read", client.read(f"{TOP}/a"), b"1")
    expect("write", client.write(f"{TOP}/a", b"2"), OK)


@check(Group.STORE, Need.PEERS)
def permissions_are_shown_as_they_were_set(place: StorePlace) -> None:
    """GET_PERMS shows what SET_PERMS set, in its order, also the same domain twice."""
    client = place.client()
    one, other = place.peers[:2]
    client.mkdir(f"{TOP}/a")
    for permissions in (
        f"n{one} r{other}",
        f"b{one} w0 b{other}",
        f"r{one} r{one} w{one}",
        " ".join(f"r{other}" for _ in range(9)),
    ):
        expect(f"set {permissions}", client.chmod(f"{TOP}/a", permissions), OK)
        expect("shown", client.perms(f"{TOP}/a"), permissions)


@check(Group.STORE, Need.PEERS)
def nodes_made_by_domain_0_belong_to_their_parents_owner(place: StorePlace) -> None:
    """What domain 0 makes below a domain's node is that domain's, with the same permissions."""
    client = place.client()
    one, other = place.peers[:2]
    client.mkdir(f"{TOP}/a")
    client.chmod(f"{TOP}/a", f"n{one} r{other}")
    client.write(f"{TOP}/a/b/c", b"1")
    expect("of the parent", client.perms(f"{TOP}/a/b"), f"n{one} r{other}")
    expect("of the node", client.perms(f"{TOP}/a/b/c"), f"n{one} r{other}")


@check(Group.STORE)
def malformed_permissions_are_einval(place: StorePlace) -> None:
    """Permissions that are none, or none at all, give EINVAL and change nothing."""
    client = place.client()
    client.mkdir(f"{TOP}/a")
    for raw in (b"", b"\0", b"q0\0", b"n\0", b"0\0", b"n0\0q0\0"):
        answer = client.call(Op.SET_PERMS, f"{TOP}/a".encode() + b"\0" + raw)
        expect(f"set {raw!r}", answer, "EINVAL")
    expect("afterwards", client.perms(f"{TOP}/a"), "n0")


@check(Group.STORE)
def a_domain_that_is_not_there_owns_nothing(place: StorePlace) -> None:
    """SET_PERMS with an owner that does not live gives ENOENT."""
    client = place.client()
    client.mkdir(f"{TOP}/a")
    expect("set", client.chmod(f"{TOP}/a", "n32000"), "ENOENT")
    expect("afterwards", client.perms(f"{TOP}/a"), "n0")


@check(Group.STORE)
def a_domain_that_is_not_there_may_be_permitted(place: StorePlace) -> None:
    """SET_PERMS may name a domain that does not live, as long as it is not the owner."""
    client = place.client()
    client.mkdir(f"{TOP}/a")
    expect("set", client.chmod(f"{TOP}/a", "n0 r32000"), OK)
    expect("shown", client.perms(f"{TOP}/a"), "n0 r32000")


# Messages.


@check(Group.STORE)
def requests_without_a_final_nul_are_refused(place: StorePlace) -> None:
    """A request whose strings do not end with NUL is refused, with one error or another."""
    client = place.client()
    client.mkdir(TOP)
    path = f"{TOP}/a".encode()
    for op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.MKDIR, Op.RM, Op.WRITE, Op.WATCH):
        expect(f"{op.name}", isinstance(client.call(op, path), str), True)
    expect("made", client.ls(TOP), [])


@check(Group.STORE)
def requests_without_a_payload_are_answered(place: StorePlace) -> None:
    """A request whose payload is empty is answered as any other."""
    client = place.client()
    client.send(HEADER.pack(Op.READ, 1, 0, 0))
    client.send(HEADER.pack(Op.GET_DOMAIN_PATH, 2, 0, 2) + b"0\0")
    expect("ids", [client.receive().req_id, client.receive().req_id], [1, 2])


@check(Group.STORE)
def unknown_requests_are_enosys(place: StorePlace) -> None:
    """A type of request that there is not gives ENOSYS."""
    client = place.client()
    for op in (20, Op.WATCH_EVENT, Op.ERROR, 100, 0x7FFFFFFF):
        expect(f"type {int(op)}", client.call(op, b"x\0"), "ENOSYS")


@check(Group.STORE)
def answers_name_their_request(place: StorePlace) -> None:
    """An answer has its request's id, type and transaction; an error has the first and last."""
    client = place.client()
    client.mkdir(TOP)
    tx = client.begin()
    for payload, kind in ((f"{TOP}\0", Op.READ), (f"{TOP}/none\0", Op.ERROR)):
        client.send(HEADER.pack(Op.READ, 0xFFFFFFFE, tx, len(payload)) + payload.encode())
        message = client.receive()
        expect("answer", (message.type, message.req_id, message.tx_id), (kind, 0xFFFFFFFE, tx))
    client.end(tx, commit=False)


@check(Group.STORE)
def requests_are_answered_in_their_order(place: StorePlace) -> None:
    """Requests that come in one go are answered in their order."""
    client = place.client()
    client.mkdir(TOP)
    payload = f"{TOP}\0".encode()
    numbers = list(range(1000, 1100))
    raw = b"".join(HEADER.pack(Op.READ, n, 0, len(payload)) + payload for n in numbers)
    for at in range(0, len(raw), 999):
        client.send(raw[at : at + 999])
    expect("ids", [client.receive().req_id for _ in numbers], numbers)


@check(Group.STORE)
def a_message_that_is_too_long_ends_the_connection(place: StorePlace) -> None:
    """A header that announces more than 4096 bytes ends the connection, and no other."""
    client, other = place.client(), place.client()
    client.send(HEADER.pack(Op.READ, 1, 0, 4097) + bytes(4097))
    expect("hung up", client.hung_up(), True)
    expect("another", other.ask(Op.GET_DOMAIN_PATH, "0"), b"/local/domain/0\0")


@check(Group.STORE)
def a_long_directory_comes_in_parts(place: StorePlace) -> None:
    """A list that does not fit into a message gives E2BIG; DIRECTORY_PART gives it in parts."""
    client = place.client()
    names = [f"{number:03d}-{'n' * 40}" for number in range(200)]
    for name in names:
        client.mkdir(f"{TOP}/{name}")
    listed = client.ls(TOP)
    expect("list", listed if isinstance(listed, str) else "a list", "E2BIG")
    collected, generations = b"", set()
    while True:
        part = client.ask(Op.DIRECTORY_PART, TOP, str(len(collected)))
        if isinstance(part, str):
            expect(f"part from {len(collected)}", part, "a part")
            return
        generation, _, rest = part.partition(b"\0")
        generations.add(generation)
        # The last part ends with an empty name.
        if rest == b"\0" or rest.endswith(b"\0\0"):
            collected += rest[:-1]
            break
        collected += rest
    expect("generations", len(generations), 1)
    expect("names", sorted(collected.decode().split("\0")[:-1]), names)
