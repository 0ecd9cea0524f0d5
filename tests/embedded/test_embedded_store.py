"""What the embedded XenStore grants and refuses, as xenstored 4.17 does."""

from __future__ import annotations

import pytest

from qemu_vtpm_bridge.embedded import store as store_module
from qemu_vtpm_bridge.embedded.store import Store
from qemu_vtpm_bridge.embedded.wire import Op
from tests.support.xenstore import Caller

OK = b"OK\0"


@pytest.fixture
def store() -> Store:
    """Domains 0, 2 and 3, each with its directory."""
    store = Store()
    dom0 = Caller(store, 0)
    store.living |= {2, 3, 9}
    for domid in (2, 3):
        store.introduce(domid)
        dom0.write(f"/local/domain/{domid}")
        dom0.perms(f"/local/domain/{domid}", f"n0 r{domid}".split()[0], f"r{domid}")
        dom0.write(f"/local/domain/{domid}/data")
        dom0.perms(f"/local/domain/{domid}/data", f"n{domid}")
    store.disconnect(dom0.connection)
    return store


def test_who_may_not_read_a_node_learns_nothing_of_what_is_missing(store: Store) -> None:
    two = Caller(store, 2)
    assert two.read("/local/domain/2/nothing") == "ENOENT"
    assert two.read("/local/domain/3") == "EACCES"
    assert two.read("/local/domain/3/nothing") == "EACCES"
    assert two.read("/nothing") == "EACCES"
    assert two.strings(Op.DIRECTORY, "/local/domain") == "EACCES"
    assert two.write("/local/domain/2/new") == "EACCES"
    assert two.strings(Op.MKDIR, "/local/domain/2/new") == "EACCES"
    assert two.strings(Op.RM, "/local/domain/2") == "EACCES"


def test_new_nodes_belong_to_who_makes_them_and_inherit_the_rest(store: Store) -> None:
    dom0, two = Caller(store, 0), Caller(store, 2)
    assert dom0.perms("/local/domain/2/data", "n2", "b3") == OK
    assert two.write("data/a/b", b"1") == OK
    assert two.strings(Op.GET_PERMS, "data/a") == b"n2\0b3\0"
    three = Caller(store, 3)
    assert three.write("/local/domain/2/data/c", b"1") == OK
    assert dom0.strings(Op.GET_PERMS, "/local/domain/2/data/c") == b"n3\0b3\0"


def test_only_the_owner_changes_permissions_and_never_the_owner(store: Store) -> None:
    dom0, two = Caller(store, 0), Caller(store, 2)
    assert two.perms("data", "n2", "r3") == OK
    assert two.perms("data", "n3") == "EPERM"
    assert dom0.perms("/local/domain/2/data", "n3", "b2") == OK
    assert two.perms("data", "n3", "b2", "r3") == "EACCES"
    assert two.write("data") == OK


@pytest.mark.parametrize("raw", [b"/x", b"/x\0", b"/x\0n0", b"/x\0q0\0", b"/x\0n\0", b"/x\0n-1\0"])
def test_malformed_permissions_are_refused_before_the_node_is_looked_for(
    store: Store, raw: bytes
) -> None:
    assert Caller(store, 0).call(Op.SET_PERMS, raw) == "EINVAL"


@pytest.mark.parametrize(
    "path",
    ["", "//", "/a//b", "/a/", "/a b", "/a:b", "/a.b", "@foo", "/" + "y" * 2048],
)
def test_what_is_no_path_is_refused(store: Store, path: str) -> None:
    dom0 = Caller(store, 0)
    assert dom0.read(path) == "EINVAL"
    assert dom0.write(path, b"x") == "EINVAL"


def test_removing_what_is_missing_succeeds_where_its_parent_is(store: Store) -> None:
    dom0 = Caller(store, 0)
    assert dom0.strings(Op.RM, "/local/domain/9") == OK
    assert dom0.strings(Op.RM, "/local/domain/9/8") == "ENOENT"
    assert dom0.strings(Op.RM, "/") == "EINVAL"


# Transactions.


def test_a_transaction_sees_itself_and_others_see_it_when_it_commits(store: Store) -> None:
    one, other = Caller(store, 0), Caller(store, 0)
    tx = one.begin()
    assert one.write("/a", b"1", tx) == OK
    assert (one.read("/a", tx), other.read("/a")) == (b"1", "ENOENT")
    assert one.end(tx) == OK
    assert other.read("/a") == b"1"
    assert one.read("/a", tx) == "ENOENT"  # the transaction is no more


def test_what_a_transaction_read_may_not_have_changed(store: Store) -> None:
    one, other = Caller(store, 0), Caller(store, 0)
    other.write("/a", b"0")
    tx = one.begin()
    assert one.read("/a", tx) == b"0"
    other.write("/a", b"0")  # the same value is a change too
    one.write("/b", b"1", tx)
    assert one.end(tx) == "EAGAIN"
    assert other.read("/b") == "ENOENT"
    tx = one.begin()
    one.write("/b", b"1", tx)
    other.write("/unrelated/c", b"1")
    # A new child of the root is a change of the root, which a new /b needs as well.
    assert one.end(tx) == "EAGAIN"


def test_a_transaction_that_is_undone_leaves_nothing(store: Store) -> None:
    one = Caller(store, 0)
    tx = one.begin()
    one.write("/a", b"1", tx)
    one.perms("/local", "b0", tx=tx)
    assert one.end(tx, commit=False) == OK
    assert one.read("/a") == "ENOENT"
    assert one.strings(Op.GET_PERMS, "/local") == b"n0\0"
    assert one.end(tx) == "ENOENT"


def test_transactions_of_one_connection_are_not_anothers(store: Store) -> None:
    one, other = Caller(store, 0), Caller(store, 0)
    tx = one.begin()
    assert other.read("/local", tx) == "ENOENT"
    assert one.call(Op.TRANSACTION_START, b"\0", tx) == "EBUSY"


# Watches.


def test_a_watch_fires_once_when_set_and_for_what_is_below(store: Store) -> None:
    dom0 = Caller(store, 0)
    assert dom0.strings(Op.WATCH, "/w", "t") == OK
    assert dom0.events() == [("/w", "t")]
    assert dom0.strings(Op.WATCH, "/w", "t") == "EEXIST"
    dom0.write("/w/a/b", b"1")
    dom0.write("/wide", b"1")
    assert dom0.events() == [("/w/a/b", "t")]  # the parents are made without a word
    dom0.strings(Op.WATCH, "/w/a/b", "below")
    dom0.events()
    dom0.strings(Op.RM, "/w")
    assert sorted(dom0.events()) == [("/w", "t"), ("/w/a/b", "below")]
    assert dom0.strings(Op.UNWATCH, "/w", "t") == OK
    assert dom0.strings(Op.UNWATCH, "/w", "t") == "ENOENT"
    dom0.write("/w", b"1")
    assert dom0.events() == []


def test_a_relative_watch_gives_relative_paths(store: Store) -> None:
    two = Caller(store, 2)
    assert two.strings(Op.WATCH, "data", "t") == OK
    two.write("/local/domain/2/data/x", b"1")
    assert two.events() == [("data", "t"), ("data/x", "t")]


def test_events_reach_only_those_who_may_read_the_node(store: Store) -> None:
    two, three = Caller(store, 2), Caller(store, 3)
    three.strings(Op.WATCH, "/local/domain/2/data", "t")
    assert three.events() == [("/local/domain/2/data", "t")]
    two.write("data/secret", b"1")
    assert three.events() == []
    two.write("data/open", b"1")
    two.perms("data/open", "n2", "r3")
    two.write("data/open", b"2")
    assert ("/local/domain/2/data/open", "t") in three.events()
    two.strings(Op.RM, "data/open")
    assert three.events() == [("/local/domain/2/data/open", "t")]  # it could read it before


def test_who_may_read_a_node_knows_that_it_went_with_all_above_it(store: Store) -> None:
    two, three = Caller(store, 2), Caller(store, 3)
    for remove in (lambda: two.strings(Op.RM, "data/dir"), lambda: store.release(2)):
        two.write("data/dir/key", b"1")
        two.perms("data/dir/key", "n2", "r3")  # but not dir
        three.strings(Op.WATCH, "/local/domain/2/data/dir/key", "t")
        three.events()
        remove()
        assert three.events() == [("/local/domain/2/data/dir/key", "t")]


def test_events_of_a_transaction_come_when_it_commits(store: Store) -> None:
    one, watcher = Caller(store, 0), Caller(store, 0)
    watcher.strings(Op.WATCH, "/w", "t")
    watcher.events()
    tx = one.begin()
    one.write("/w/a", b"1", tx)
    assert watcher.events() == []
    one.end(tx)
    assert watcher.events() == [("/w/a", "t")]
    tx = one.begin()
    one.write("/w/b", b"1", tx)
    one.end(tx, commit=False)
    assert watcher.events() == []


def test_only_domain_0_is_told_of_domains(store: Store) -> None:
    dom0, two = Caller(store, 0), Caller(store, 2)
    for caller in (dom0, two):
        for special in ("@introduceDomain", "@releaseDomain"):
            assert caller.strings(Op.WATCH, special, "t") == OK
        caller.events()
    assert dom0.strings(Op.INTRODUCE, "9", "1", "1") == OK
    assert dom0.events() == [("@introduceDomain", "t")]
    assert dom0.strings(Op.RELEASE, "9") == OK
    assert dom0.events() == [("@releaseDomain", "t")]
    assert two.events() == []
    assert dom0.strings(Op.RELEASE, "9") == "ENOENT"


# Domains.


def test_what_a_domain_owned_goes_with_it_and_its_permissions_too(store: Store) -> None:
    dom0, two, three = Caller(store, 0), Caller(store, 2), Caller(store, 3)
    dom0.write("/keep", b"1")
    dom0.perms("/keep", "n0", "r2", "r3")
    two.write("data/a/b", b"1")
    dom0.strings(Op.WATCH, "/local/domain/2/data/a/b", "t")
    dom0.events()
    store.release(2)
    assert dom0.read("/local/domain/2/data") == "ENOENT"
    assert dom0.events() == [("/local/domain/2/data/a/b", "t")]
    assert dom0.strings(Op.GET_PERMS, "/keep") == b"n0\0r2\0r3\0"
    store.introduce(2)
    assert Caller(store, 2).read("/keep") == "EACCES"  # it is another domain's
    store.release(2)
    assert three.read("/keep") == b"1"
    assert dom0.strings(Op.IS_DOMAIN_INTRODUCED, "2") == b"F\0"


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (Op.INTRODUCE, ("9", "1", "1")),
        (Op.RELEASE, ("3",)),
        (Op.RESUME, ("3",)),
        (Op.SET_TARGET, ("2", "3")),
    ],
)
def test_domains_are_domain_0s_business(store: Store, op: Op, words: tuple[str, ...]) -> None:
    assert Caller(store, 2).strings(op, *words) == "EACCES"
    assert Caller(store, 0).strings(op, *words) == OK


def test_a_stub_domain_may_do_what_its_target_may(store: Store) -> None:
    Caller(store, 2).write("data/of-two", b"1")
    three = Caller(store, 3)
    assert three.read("/local/domain/2/data/of-two") == "EACCES"
    Caller(store, 0).strings(Op.SET_TARGET, "3", "2")
    assert three.read("/local/domain/2/data/of-two") == b"1"


def test_domain_paths_and_numbers_that_are_none(store: Store) -> None:
    dom0 = Caller(store, 0)
    assert dom0.strings(Op.GET_DOMAIN_PATH, "5") == b"/local/domain/5\0"
    for word, number in (("", 0), ("-1", 0), ("abc", 0), ("999999", 999999), ("1 ", 1)):
        shown = b"/local/domain/%d\0" % number
        assert dom0.strings(Op.GET_DOMAIN_PATH, word) == shown
        introduced = b"T\0" if number == 0 else b"F\0"
        assert dom0.strings(Op.IS_DOMAIN_INTRODUCED, word) == introduced


# Quotas and limits.


def test_quotas_bind_guests_and_not_domain_0(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "NODES_MAX", 5)
    monkeypatch.setattr(store_module, "WATCHES_MAX", 2)
    monkeypatch.setattr(store_module, "TRANSACTIONS_MAX", 2)
    two, dom0 = Caller(store, 2), Caller(store, 0)
    made = [two.write(f"data/{number}") for number in range(5)]
    assert made == [OK] * 4 + ["ENOSPC"]
    tx = two.begin()
    assert two.write("data/in-a-transaction", tx=tx) == "ENOSPC"
    assert two.begin() != tx
    assert two.call(Op.TRANSACTION_START, b"\0") == "ENOSPC"
    assert [two.strings(Op.WATCH, "data", t) for t in "abc"] == [OK, OK, "E2BIG"]
    assert two.write("data/0", b"v" * 2049) == "ENOSPC"
    assert two.perms("data/0", "n2", *(f"r{domid}" for domid in range(3, 8))) == "ENOSPC"
    assert all(dom0.write(f"/many/{number}", b"v" * 3000) == OK for number in range(20))
    assert all(dom0.strings(Op.WATCH, "/many", str(number)) == OK for number in range(20))


def test_a_domain_cannot_hide_nodes_from_its_quota_in_transactions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "NODES_MAX", 5)
    two = Caller(store, 2)
    one_tx, other_tx = two.begin(), two.begin()
    assert [two.write(f"data/a{number}", tx=one_tx) for number in range(5)][-1] == "ENOSPC"
    assert two.write("data/b", tx=other_tx) == OK
    assert two.end(one_tx) == OK
    assert two.end(other_tx) == "EAGAIN"


def test_a_directory_too_long_for_a_message_comes_in_parts(store: Store) -> None:
    dom0 = Caller(store, 0)
    names = [f"node-{number:04d}-{'x' * 30}" for number in range(250)]
    for name in names:
        dom0.write(f"/big/{name}")
    assert dom0.strings(Op.DIRECTORY, "/big") == "E2BIG"
    collected: list[str] = []
    offset = 0
    while True:
        raw = dom0.strings(Op.DIRECTORY_PART, "/big", str(offset))
        assert isinstance(raw, bytes)
        assert len(raw) <= 4096
        generation, _, rest = raw.partition(b"\0")
        assert generation.isdigit()
        part = rest.removesuffix(b"\0").split(b"\0")
        if rest.endswith(b"\0\0") or rest == b"\0":
            collected += [name.decode() for name in part if name]
            break
        collected += [name.decode() for name in part]
        offset += len(rest)
    assert collected == names
    for word in ("", "x", "-1"):
        assert dom0.strings(Op.DIRECTORY_PART, "/big", word) == "EINVAL"


def test_unknown_requests_are_refused(store: Store) -> None:
    dom0 = Caller(store, 0)
    for op in (Op.CONTROL, Op.WATCH_EVENT, Op.ERROR, 20, 23, 0xFFFFFFFF):
        assert dom0.call(op, b"x\0") == "ENOSYS"
    for op in (Op.READ, Op.DIRECTORY, Op.WATCH, Op.RM, Op.MKDIR, Op.UNWATCH, Op.WRITE):
        assert dom0.call(op, b"no NUL at the end") == "EINVAL"
