"""The differences that are known, each with what is found and why it stays.

A check that a server is listed for must fail as it is said here: one that passes, or fails
otherwise, is an error, so that nothing stays in this table that is no longer true.
docs/conformance.md holds the same table; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Difference:
    """Where a server is known to differ from what a check says."""

    what: str
    """Which of the check's statements fails."""
    found: str
    """What is found there, as repr() shows it."""
    reason: str


_SILENT = "oxenstored removes what a dead domain owned without telling anybody"
_MERGES = (
    "oxenstored makes a transaction's requests again at its end, on what is there by then, and "
    "commits if they get the same answers"
)
_REPLAYS = "oxenstored fires for every request of a transaction, in their order, at its end"
_QUOTA = "oxenstored has an error of its own for quotas, which C programs do not know"
_SIZE = "oxenstored counts a value's bytes only, for domain 0 too, and its error is another"
_ERRNO = "oxenstored chose another error"
_ORDER = "oxenstored keeps children sorted"
_ATOI = "oxenstored wants a whole number where it looks a domain up"
_UNKNOWN = "oxenstored does not ask Xen whether a domain lives"

OXENSTORED: Final[dict[str, Difference]] = {
    # Nodes and messages.
    "children_are_listed_as_they_were_made": Difference("list", "['a', 'b', 'c']", _ORDER),
    "a_value_fills_the_message": Difference("write", "'E2BIG'", _SIZE),
    "the_root_cannot_be_removed": Difference(
        "rm", "b'OK\\x00'", "oxenstored lets domain 0 remove the whole tree"
    ),
    "special_and_eight_bit_paths_are_einval": Difference(
        "read '@foo'", "'ENOENT'", "oxenstored keeps the special names as nodes of its tree"
    ),
    "domain_ids_are_read_as_atoi_reads_them": Difference("introduced ''", "'EINVAL'", _ATOI),
    "a_domain_that_is_not_there_owns_nothing": Difference("set", "b'OK\\x00'", _UNKNOWN),
    "a_message_that_is_too_long_ends_the_connection": Difference(
        "hung up", "False", "oxenstored takes messages of any length at its socket"
    ),
    "a_long_directory_comes_in_parts": Difference(
        "list",
        "'a list'",
        "oxenstored sends a list of any length in one message, and knows no DIRECTORY_PART",
    ),
    # Transactions.
    "writing_the_same_value_is_a_change": Difference("commit", "b'OK\\x00'", _MERGES),
    "a_transaction_that_only_read_conflicts_as_well": Difference(
        "commit", "b'OK\\x00'", "in oxenstored a transaction without changes has no conflicts"
    ),
    "two_who_write_the_same_node_conflict": Difference("commit", "b'OK\\x00'", _MERGES),
    "making_two_nodes_in_a_directory_conflicts": Difference("commit", "b'OK\\x00'", _MERGES),
    "a_node_that_was_missing_and_was_made_conflicts": Difference(
        "commit", "b'OK\\x00'", "in oxenstored a transaction without changes has no conflicts"
    ),
    "a_listed_directory_that_changed_conflicts": Difference(
        "commit", "b'OK\\x00'", "in oxenstored a transaction without changes has no conflicts"
    ),
    "permissions_that_changed_conflict": Difference(
        "commit", "b'OK\\x00'", "in oxenstored a transaction without changes has no conflicts"
    ),
    "a_removed_node_conflicts_with_who_wrote_it": Difference("commit", "b'OK\\x00'", _MERGES),
    "a_snapshot_is_taken_when_a_node_is_first_read": Difference(
        "read", "b'1'", "oxenstored takes the snapshot when the transaction starts"
    ),
    "a_commit_fires_in_the_order_of_the_changes": Difference(
        "events", str([f"/conformance/{name}" for name in "bcad"]), _REPLAYS
    ),
    "a_commit_fires_once_for_each_node": Difference(
        "events", str(["/conformance/a"] * 3), _REPLAYS
    ),
    "a_node_made_and_removed_in_a_transaction_fires_nothing": Difference(
        "events", str(["/conformance/a"] * 2), _REPLAYS
    ),
    "transactions_belong_to_their_connection": Difference("of another", "'EIO'", _ERRNO),
    # Watches.
    "a_watch_in_a_removed_tree_on_what_is_not_there_is_silent": Difference(
        "events",
        "[('/conformance/a/none', 't')]",
        "oxenstored fires every watch in a removed tree, on nodes or not",
    ),
    "watches_below_are_told_before_the_one_above": Difference(
        "tokens", str(["a", "a/b", "a/b/a", "a/b/c", "a/d"]), "oxenstored goes from the top down"
    ),
    "watches_fire_oldest_first": Difference(
        "tokens", str(["three", "two", "one"]), "oxenstored keeps the newest watch in front"
    ),
    "ones_own_event_comes_before_the_answer": Difference(
        "events that were there", "0", "oxenstored answers before it fires"
    ),
    "permissions_of_special_nodes_can_be_set_and_not_read": Difference(
        "permissions of @introduceDomain",
        "'n0'",
        "oxenstored keeps the special names as nodes of its tree",
    ),
    "resetting_watches": Difference("transaction", "'EIO'", _ERRNO),
    # Guests.
    "who_may_not_read_learns_nothing_of_what_is_missing": Difference(
        "below another's",
        "'ENOENT'",
        "oxenstored tells everybody that a node is missing",
    ),
    "a_guests_nodes_are_its_own": Difference(
        "another's",
        "'n2 b3'",
        "in oxenstored a node that another guest makes belongs to the owner of its parent",
    ),
    "a_guest_sets_no_permissions_of_special_nodes": Difference(
        "set permissions of @introduceDomain", "'EACCES'", _ERRNO
    ),
    "only_the_owner_sets_permissions": Difference("given away", "'EACCES'", _ERRNO),
    "a_guest_owns_so_many_nodes": Difference("one more", "'EQUOTA'", _QUOTA),
    "a_guests_directory_lists_so_many_names": Difference("last", "b'OK\\x00'", _SIZE),
    "a_guests_node_holds_so_much": Difference("2049 bytes", "'E2BIG'", _SIZE),
    "what_counts_to_a_nodes_size": Difference("longest value", "2048", _SIZE),
    "a_guest_sets_so_many_watches": Difference(
        "watches", "101", "oxenstored's quota is 100 without a configuration, and it gives one more"
    ),
    "watches_beyond_the_quota_are_e2big": Difference("last", "'EQUOTA'", _QUOTA),
    "a_guest_has_so_many_transactions": Difference("one more", "'EQUOTA'", _QUOTA),
    "a_guest_sets_so_many_permissions": Difference(
        "6", "b'OK\\x00'", "oxenstored has no quota of permissions"
    ),
    "domain_0_has_no_quota": Difference("writes", "{'E2BIG'}", _SIZE),
    "a_nodes_owner_pays_for_it": Difference("mkdir", "'EQUOTA'", _QUOTA),
    # Domains.
    "what_is_not_introduced_cannot_be_released": Difference("RELEASE", "'EINVAL'", _ERRNO),
    "domain_0_is_not_released": Difference("RELEASE", "'ENOENT'", _ERRNO),
    "the_end_of_what_a_domain_owned_is_told": Difference("above", "False", _SILENT),
    "the_release_is_told_after_the_nodes_are_gone": Difference("tokens", "['release']", _SILENT),
    "a_dead_domains_permissions_stay_listed": Difference(
        "permissions", "'n0 b0'", "oxenstored takes a dead domain out of all permissions"
    ),
}
EMBEDDED: Final[dict[str, Difference]] = {
    "no_event_comes_before_the_port_is_armed": Difference(
        "events while masked",
        "True",
        "an eventfd has no mask; who takes events must bear more of them than the peer "
        "was allowed to cause, as a hostile peer can always cause more",
    ),
}
XENSTORED: Final[dict[str, Difference]] = {}
XENBUS: Final[dict[str, Difference]] = {
    "a_guest_owns_so_many_nodes": Difference(
        "nodes", "False", "a guest with a disk and a network owns its devices' nodes as well"
    ),
    "a_guest_sets_so_many_watches": Difference(
        "watches", "120", "Linux has nine watches of its own, on what its drivers wait for"
    ),
}
"""Of xenstored as programs of a guest see it, whose kernel stands between."""

DIFFERENCES: Final[dict[str, dict[str, Difference]]] = {
    "embedded": EMBEDDED,
    "xenstored": XENSTORED,
    "oxenstored": OXENSTORED,
    "xenbus": XENBUS,
    "xen": {},
}
