"""Checks of domains that come and go, and of a XenStore that does."""

from __future__ import annotations

from qemu_vtpm_bridge.embedded.wire import Op

from .client import OK
from .registry import TOP, Group, Need, StorePlace, check, expect


def introduced(place: StorePlace, domid: int) -> bool:
    """Return whether XenStore knows a domain."""
    return place.client().ask(Op.IS_DOMAIN_INTRODUCED, str(domid)) == b"T\0"


@check(Group.STORE)
def domain_0_is_introduced(place: StorePlace) -> None:
    """Domain 0 is introduced from the start, and one that there is not is not."""
    expect("domain 0", introduced(place, 0), True)
    expect("domain 32000", introduced(place, 32000), False)


@check(Group.STORE)
def a_domain_that_xen_does_not_know_cannot_be_introduced(place: StorePlace) -> None:
    """INTRODUCE of a domain that Xen does not know fails, and it stays unknown."""
    answer = place.client().ask(Op.INTRODUCE, "32000", "1", "1")
    expect("refused", isinstance(answer, str), True)
    expect("introduced", introduced(place, 32000), False)


@check(Group.STORE)
def what_is_not_introduced_cannot_be_released(place: StorePlace) -> None:
    """RELEASE, RESUME and SET_TARGET of a domain that is not there give ENOENT."""
    client = place.client()
    expect("RELEASE", client.ask(Op.RELEASE, "32000"), "ENOENT")
    expect("RESUME", client.ask(Op.RESUME, "32000"), "ENOENT")
    expect("SET_TARGET", client.ask(Op.SET_TARGET, "32000", "0"), "ENOENT")


@check(Group.STORE, Need.LIFE)
def a_new_domain_is_told_of(place: StorePlace) -> None:
    """@introduceDomain fires when a domain is introduced, @releaseDomain when it is gone."""
    assert place.life is not None
    client = place.client()
    for name in ("@introduceDomain", "@releaseDomain"):
        client.watch(name, name[1:2])
    client.events()
    domid = place.life.create()
    expect("event", client.next_event(), ("@introduceDomain", "i"))
    expect("introduced", introduced(place, domid), True)
    place.life.destroy(domid)
    expect("event", client.next_event(), ("@releaseDomain", "r"))
    expect("introduced afterwards", introduced(place, domid), False)


@check(Group.STORE)
def introducing_takes_an_event_channel(place: StorePlace) -> None:
    """INTRODUCE without an event channel, or with too few words, gives EINVAL."""
    client = place.client()
    for words in (("32000", "1", "0"), ("32000", "1", "x"), ("32000", "1")):
        expect(f"introduce {words}", client.ask(Op.INTRODUCE, *words), "EINVAL")


@check(Group.STORE)
def domain_0_is_not_released(place: StorePlace) -> None:
    """RELEASE and RESUME of domain 0 give EINVAL."""
    client = place.client()
    expect("RELEASE", client.ask(Op.RELEASE, "0"), "EINVAL")
    expect("RESUME", client.ask(Op.RESUME, "0"), "EINVAL")


@check(Group.STORE, Need.LIFE, Need.GUESTS)
def a_guest_is_told_of_domains_if_domain_0_allows_it(place: StorePlace) -> None:
    """@introduceDomain fires for a guest once domain 0 gave it the permission to read it."""
    assert place.life is not None
    client = place.client()
    guest_domid, guest = place.guest()
    guest.watch("@introduceDomain")
    expect("first", guest.paths(), ["@introduceDomain"])
    place.life.destroy(place.life.create())
    expect("without permission", guest.paths(), [])
    client.chmod("@introduceDomain", f"n0 r{guest_domid}")
    place.life.destroy(place.life.create())
    expect("with permission", guest.paths(), ["@introduceDomain"])
    client.chmod("@introduceDomain", "n0")


@check(Group.STORE, Need.LIFE)
def introducing_again_tells_nobody(place: StorePlace) -> None:
    """INTRODUCE of a domain that is introduced succeeds and fires nothing."""
    assert place.life is not None
    domid = place.life.create()
    client = place.client()
    client.watch("@introduceDomain")
    client.events()
    expect("again", client.ask(Op.INTRODUCE, str(domid), "1", "1"), OK)
    expect("events", client.events(), [])
    place.life.destroy(domid)


@check(Group.STORE, Need.LIFE)
def what_a_domain_owned_goes_with_it(place: StorePlace) -> None:
    """Nodes that a domain owns are removed when it is gone, with all below them."""
    assert place.life is not None
    client = place.client()
    domid = place.life.create()
    client.write(f"{TOP}/a/b", b"1")
    client.write(f"{TOP}/a/c", b"1")
    client.write(f"{TOP}/d/e", b"1")
    client.chmod(f"{TOP}/a", f"n{domid}")
    client.chmod(f"{TOP}/d/e", f"n{domid}")
    place.life.destroy(domid)
    expect("its node", client.read(f"{TOP}/a"), "ENOENT")
    expect("another's below it", client.read(f"{TOP}/a/b"), "ENOENT")
    expect("its node below another's", client.ls(f"{TOP}/d"), [])


@check(Group.STORE, Need.LIFE)
def the_end_of_what_a_domain_owned_is_told(place: StorePlace) -> None:
    """Watches fire for the nodes that go with their owner."""
    assert place.life is not None
    client = place.client()
    domid = place.life.create()
    client.write(f"{TOP}/a/b", b"1")
    client.chmod(f"{TOP}/a/b", f"n{domid}")
    client.chmod(f"{TOP}/a", f"n{domid}")
    client.watch(TOP, "above")
    client.watch(f"{TOP}/a/b", "at")
    client.events()
    place.life.destroy(domid)
    found = client.events()
    expect("above", (f"{TOP}/a", "above") in found, True)
    expect("at", (f"{TOP}/a/b", "at") in found, True)


@check(Group.STORE, Need.LIFE)
def the_release_is_told_after_the_nodes_are_gone(place: StorePlace) -> None:
    """When @releaseDomain fires, the events of the domain's nodes have come."""
    assert place.life is not None
    client = place.client()
    domid = place.life.create()
    client.write(f"{TOP}/a", b"1")
    client.chmod(f"{TOP}/a", f"n{domid}")
    client.watch(f"{TOP}/a", "node")
    client.watch("@releaseDomain", "release")
    client.events()
    place.life.destroy(domid)
    tokens = [token for _, token in client.events()]
    expect("tokens", tokens, ["node", "release"])


@check(Group.STORE, Need.LIFE)
def a_dead_domains_permissions_stay_listed(place: StorePlace) -> None:
    """A permission for a domain that is gone is still shown."""
    assert place.life is not None
    client = place.client()
    domid = place.life.create()
    client.mkdir(f"{TOP}/a")
    client.chmod(f"{TOP}/a", f"n0 r{domid} b0")
    place.life.destroy(domid)
    expect("permissions", client.perms(f"{TOP}/a"), f"n0 r{domid} b0")


@check(Group.STORE, Need.DOORS)
def a_new_domain_does_not_inherit_a_dead_ones_rights(place: StorePlace) -> None:
    """A domain with the id of one that is gone has none of its permissions."""
    assert place.life is not None
    assert place.open_guest is not None
    client = place.client()
    domid = place.life.create()
    client.write(f"{TOP}/a", b"1")
    client.chmod(f"{TOP}/a", f"n0 r{domid}")
    place.life.destroy(domid)
    place.life.again(domid)
    guest = place.client(place.open_guest(domid))
    expect("read", guest.read(f"{TOP}/a"), "EACCES")
    client.chmod(f"{TOP}/a", f"n0 r{domid}")
    expect("read when allowed", guest.read(f"{TOP}/a"), b"1")
    place.life.destroy(domid)


@check(Group.STORE, Need.DOORS)
def what_a_dead_domain_watched_and_began_is_gone(place: StorePlace) -> None:
    """A domain that comes with the id of one that is gone finds no watches and transactions."""
    assert place.life is not None
    assert place.open_guest is not None
    domid = place.life.create()
    guest = place.client(place.open_guest(domid))
    guest.watch("data")
    for _ in range(10):
        guest.begin()
    place.life.destroy(domid)
    place.life.again(domid)
    guest = place.client(place.open_guest(domid))
    expect("watch", guest.watch("data"), OK)
    expect("transactions", len({guest.begin() for _ in range(10)}), 10)
    place.life.destroy(domid)


@check(Group.STORE, Need.LIFE)
def releasing_a_domain_that_lives(place: StorePlace) -> None:
    """RELEASE of a domain that lives forgets it, and @releaseDomain fires."""
    assert place.life is not None
    client = place.client()
    domid = place.life.create()
    client.watch("@releaseDomain")
    client.events()
    expect("release", client.ask(Op.RELEASE, str(domid)), OK)
    expect("event", client.next_event(), ("@releaseDomain", "t"))
    expect("introduced", introduced(place, domid), False)
    place.life.destroy(domid)


@check(Group.STORE, Need.RESTART)
def a_xenstore_that_dies_hangs_up(place: StorePlace) -> None:
    """A XenStore that dies hangs up on its clients."""
    assert place.kill is not None
    client = place.client()
    client.watch(TOP)
    place.kill()
    expect("hung up", client.hung_up(), True)


@check(Group.STORE, Need.RESTART)
def a_xenstore_that_died_has_forgotten_all(place: StorePlace) -> None:
    """A XenStore that was killed and started again knows no nodes, watches and domains."""
    assert place.kill is not None
    client = place.client()
    client.write(f"{TOP}/a", b"1")
    place.kill()
    client = place.client()
    expect("read", client.read(f"{TOP}/a"), "ENOENT")
    for domid in place.peers:
        expect(f"domain {domid}", introduced(place, domid), False)
    client.watch(TOP)
    client.events()
    client.write(f"{TOP}/a", b"1")
    expect("events", client.paths(), [f"{TOP}/a"])
