"""The embedded XenStore: what each request does, for whom, and whom it wakes.

Theory of operation.  `Store.request` takes one message of one connection and returns the
reply; watch events are appended to the connections that they concern, for the driver
(`world.py`) to send.  A connection acts as one domain, and as the domain it was made the
target of as well.  Domain 0 is privileged: permissions and quotas do not bind it.  What
a domain owns vanishes with it.  Nothing here does input or output.

Who may lie: every client but domain 0's.  Behaves as xenstored (C) does; the reference
is docs/misc/xenstore.txt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from . import tree
from .tree import READ, WRITE, Node, Permission, View, XenStoreError, canonical
from .wire import PAYLOAD_MAX_BYTES, Message, Op, pack_strings, unpack_strings

NODES_MAX: Final = 1000
NODE_MAX_BYTES: Final = 2048
"""A guest's node stays below this, its permissions and its children's names counted."""

WATCHES_MAX: Final = 129
TRANSACTIONS_MAX: Final = 11
"""xenstored lets guests have one more of each than its quota says."""

PERMISSIONS_MAX: Final = 5

INTRODUCE_DOMAIN: Final = "@introduceDomain"
RELEASE_DOMAIN: Final = "@releaseDomain"
_NUMBER: Final = re.compile(rb"\s*\+?(\d{0,10})")


@dataclass(frozen=True, slots=True)
class Watch:
    """One registered watch; `cut` bytes of a path are left out in its events."""

    path: str
    token: bytes
    cut: int = field(compare=False)

    def matches(self, path: str) -> bool:
        """Return whether a change at `path` concerns it."""
        return tree.is_below(path, self.path)


@dataclass(slots=True)
class Change:
    """One node's change in a transaction, to be told when it commits."""

    exact: bool
    readers: set[Connection]
    """Who could read the node before."""


@dataclass(slots=True)
class Transaction:
    """One transaction: its view, and the changes in it by path."""

    view: View
    changes: dict[str, Change] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Connection:
    """One client.  The driver sends what is in `events` and empties it."""

    domid: int
    watches: list[Watch] = field(default_factory=list)
    transactions: dict[int, Transaction] = field(default_factory=dict)
    events: list[Message] = field(default_factory=list)
    next_transaction: int = 1


class Store:
    """The whole XenStore."""

    def __init__(self) -> None:
        self.tree = View()
        self.connections: list[Connection] = []
        self.introduced: set[int] = {0}
        self.living: set[int] = {0}
        """The domains that Xen has; who drives this keeps it."""
        self._targets: dict[int, int] = {}
        nobody = Node(b"", (Permission(0, 0),), (), 0)
        self._special = {INTRODUCE_DOMAIN: nobody, RELEASE_DOMAIN: nobody}

    # Connections.

    def connect(self, domid: int) -> Connection:
        """Return a new connection that acts as `domid`."""
        connection = Connection(domid)
        self.connections.append(connection)
        return connection

    def disconnect(self, connection: Connection) -> None:
        """Forget a connection with its watches and transactions."""
        if connection in self.connections:
            self.connections.remove(connection)

    def request(self, connection: Connection, message: Message) -> Message:
        """Carry one request out and return the reply to it."""
        try:
            handler = _HANDLERS.get(message.type)
            if handler is None:
                raise XenStoreError("ENOSYS")
            view = self._view(connection, message.tx_id)
            payload = handler(self, connection, view, message)
            kind = message.type
            if len(payload) > PAYLOAD_MAX_BYTES:
                raise XenStoreError("E2BIG")
        except ValueError:
            kind, payload = Op.ERROR, b"EINVAL\0"
        except XenStoreError as error:
            kind, payload = Op.ERROR, error.name.encode() + b"\0"
        return Message(kind, message.req_id, message.tx_id, payload)

    def _view(self, connection: Connection, tx_id: int) -> View:
        if tx_id == 0:
            return self.tree
        if tx_id not in connection.transactions:
            raise XenStoreError("ENOENT")
        return connection.transactions[tx_id].view

    def _domids(self, connection: Connection) -> tuple[int, ...]:
        target = self._targets.get(connection.domid)
        return (connection.domid,) if target is None else (connection.domid, target)

    # Nodes.

    def _node(self, connection: Connection, view: View, path: str, access: int) -> Node:
        """Return a node that the connection has access to; raises ENOENT or EACCES.

        Where the node is missing, only who would have access to it is told so.
        """
        node = view.get(path)
        nearest, at = node, path
        while nearest is None:
            at = tree.parent_of(at)
            nearest = view.get(at)
        if nearest.access(self._domids(connection)) & access != access:
            raise XenStoreError("EACCES")
        if node is None:
            raise XenStoreError("ENOENT")
        return node

    def _read(self, connection: Connection, view: View, message: Message) -> bytes:
        (raw,) = unpack_strings(message.payload, 1)
        return self._node(connection, view, canonical(raw, connection.domid), READ).value

    def _directory(self, connection: Connection, view: View, message: Message) -> bytes:
        (raw,) = unpack_strings(message.payload, 1)
        node = self._node(connection, view, canonical(raw, connection.domid), READ)
        return pack_strings([name.encode() for name in node.children])

    def _directory_part(self, connection: Connection, view: View, message: Message) -> bytes:
        raw, raw_offset = unpack_strings(message.payload, 2)
        node = self._node(connection, view, canonical(raw, connection.domid), READ)
        names = pack_strings([name.encode() for name in node.children])
        generation = b"%d\0" % node.generation
        if not raw_offset.isdigit():
            raise XenStoreError("EINVAL")
        rest = names[int(raw_offset) :]
        room = PAYLOAD_MAX_BYTES - len(generation) - 1
        if len(rest) <= room:
            return generation + rest + b"\0"
        return generation + rest[: rest.rindex(b"\0", 0, room) + 1]

    def _get_perms(self, connection: Connection, view: View, message: Message) -> bytes:
        (raw,) = unpack_strings(message.payload, 1)
        node = self._node(connection, view, canonical(raw, connection.domid), READ)
        return pack_strings([str(permission).encode() for permission in node.permissions])

    def _write(self, connection: Connection, view: View, message: Message) -> bytes:
        raw, separator, value = message.payload.partition(b"\0")
        if not separator:
            raise XenStoreError("EINVAL")
        path = canonical(raw, connection.domid)
        try:
            node = replace(self._node(connection, view, path, WRITE), value=value)
        except XenStoreError as error:
            if error.name != "ENOENT":
                raise
            self._create(connection, view, path, value)
        else:
            self._check_size(connection, node)
            view.put(path, node)
        self._changed(connection, message.tx_id, path)
        return b"OK\0"

    def _mkdir(self, connection: Connection, view: View, message: Message) -> bytes:
        (raw,) = unpack_strings(message.payload, 1)
        path = canonical(raw, connection.domid)
        try:
            self._node(connection, view, path, WRITE)
        except XenStoreError as error:
            if error.name != "ENOENT":
                raise
            self._create(connection, view, path, b"")
            self._changed(connection, message.tx_id, path)
        return b"OK\0"

    def _create(self, connection: Connection, view: View, path: str, value: bytes) -> None:
        """Make a node and, without a word to anybody, the parents that it lacks."""
        lacking = [path]
        while (above := view.get(tree.parent_of(lacking[-1]))) is None:
            lacking.append(tree.parent_of(lacking[-1]))
        permissions = above.permissions
        if connection.domid != 0:
            self._count(view, connection.domid, len(lacking))
            permissions = (replace(permissions[0], domid=connection.domid), *permissions[1:])
        name = lacking[-1].rpartition("/")[2]
        self._check_size(connection, replace(above, children=(*above.children, name)))
        self._check_size(connection, Node(value, permissions, (), 0))
        for made in reversed(lacking):
            if made != path:
                below = path[len(made) + 1 :].partition("/")[0]
                self._check_size(connection, Node(b"", permissions, (below,), 0))
            view.put(made, Node(value if made == path else b"", permissions, (), 0))

    @staticmethod
    def _check_size(connection: Connection, node: Node) -> None:
        """Raise ENOSPC where a guest makes a node too large."""
        if connection.domid != 0 and node.size_bytes >= NODE_MAX_BYTES:
            raise XenStoreError("ENOSPC")

    def _count(self, view: View, domid: int, more: int) -> None:
        """Charge a domain for more nodes; raises ENOSPC at the quota."""
        if self.tree.owned_by(domid) + view.pending_of(domid) + more > NODES_MAX:
            raise XenStoreError("ENOSPC")

    def _rm(self, connection: Connection, view: View, message: Message) -> bytes:
        (raw,) = unpack_strings(message.payload, 1)
        path = canonical(raw, connection.domid)
        if path == "/":
            raise XenStoreError("EINVAL")
        try:
            self._node(connection, view, path, WRITE)
        except XenStoreError as error:
            # Removing what is not there succeeds, if its parent is.
            if error.name == "ENOENT" and view.get(tree.parent_of(path)) is not None:
                return b"OK\0"
            raise
        self._remove(connection, message.tx_id, view, path)
        return b"OK\0"

    def _remove(self, connection: Connection | None, tx_id: int, view: View, path: str) -> None:
        removed = view.subtree(path)
        # Who could read each of them is to know that it is gone, whoever may read its top.
        readers = {gone: self._readers(view, gone) for gone in removed}
        for gone in removed:
            view.put(gone, None)
        for gone in removed:
            exact = gone != path
            self._changed(connection, tx_id, gone, exact=exact, readers=readers[gone])

    def _set_perms(self, connection: Connection, view: View, message: Message) -> bytes:
        raw, *raw_permissions, rest = message.payload.split(b"\0")
        permissions = tuple(Permission.parse(raw) for raw in raw_permissions)
        if not permissions or rest:
            raise XenStoreError("EINVAL")
        special = raw.decode("latin-1")
        if special in self._special:
            if connection.domid != 0:
                raise XenStoreError("ENOENT")
            node = self._special[special]
            self._special[special] = replace(node, permissions=permissions)
            return b"OK\0"
        path = canonical(raw, connection.domid)
        node = self._node(connection, view, path, WRITE)
        self._check_permissions(connection, node, permissions)
        readers = self._readers(view, path)
        view.put(path, replace(node, permissions=permissions))
        self._changed(connection, message.tx_id, path, readers=readers)
        return b"OK\0"

    def _check_permissions(
        self, connection: Connection, node: Node, permissions: tuple[Permission, ...]
    ) -> None:
        """Raise XenStoreError where the connection may not give a node these."""
        if connection.domid != 0:
            if len(permissions) > PERMISSIONS_MAX:
                raise XenStoreError("ENOSPC")
            if node.owner not in self._domids(connection):
                raise XenStoreError("EACCES")
            if permissions[0].domid != node.owner:
                raise XenStoreError("EPERM")
        if permissions[0].domid not in self.living:
            raise XenStoreError("ENOENT")
        self._check_size(connection, replace(node, permissions=permissions))

    # Watches.

    def _watch(self, connection: Connection, view: View, message: Message) -> bytes:
        del view
        raw, token = unpack_strings(message.payload, 2)
        watch = self._parse_watch(connection, raw, token)
        if watch in connection.watches:
            raise XenStoreError("EEXIST")
        if connection.domid != 0 and len(connection.watches) >= WATCHES_MAX:
            raise XenStoreError("E2BIG")
        connection.watches.append(watch)
        # Every watch fires once when it is set.
        self._send_event(connection, watch, watch.path)
        return b"OK\0"

    def _unwatch(self, connection: Connection, view: View, message: Message) -> bytes:
        del view
        raw, token = unpack_strings(message.payload, 2)
        watch = self._parse_watch(connection, raw, token)
        if watch not in connection.watches:
            raise XenStoreError("ENOENT")
        connection.watches.remove(watch)
        return b"OK\0"

    def _reset_watches(self, connection: Connection, view: View, message: Message) -> bytes:
        del view, message
        connection.watches.clear()
        connection.transactions.clear()
        return b"OK\0"

    @staticmethod
    def _parse_watch(connection: Connection, raw: bytes, token: bytes) -> Watch:
        if raw.startswith(b"@"):
            if len(raw) > tree.PATH_MAX:
                raise XenStoreError("EINVAL")
            return Watch(raw.decode("latin-1"), token, 0)
        path = canonical(raw, connection.domid)
        cut = 0 if raw.startswith(b"/") else len(tree.domain_path(connection.domid)) + 1
        return Watch(path, token, cut)

    @staticmethod
    def _send_event(connection: Connection, watch: Watch, path: str) -> None:
        strings = [path[watch.cut :].encode(), watch.token]
        connection.events.append(Message(Op.WATCH_EVENT, 0, 0, pack_strings(strings)))

    def _readers(self, view: View, path: str) -> set[Connection]:
        """Return the connections that may know of changes at `path`: who may read it or above."""
        nodes = [view.get(path), view.get(tree.parent_of(path))]
        return {
            connection
            for connection in self.connections
            if any(node and node.access(self._domids(connection)) & READ for node in nodes)
        }

    def _changed(
        self,
        connection: Connection | None,
        tx_id: int,
        path: str,
        *,
        exact: bool = False,
        readers: set[Connection] | None = None,
    ) -> None:
        """Fire the watches on a node, now or when the transaction commits.

        Removing a tree concerns, below its top, only who watches just there (`exact`);
        `readers` are those that could read the node before.
        """
        if tx_id and connection is not None:
            changes = connection.transactions[tx_id].changes
            before = changes[path].readers if path in changes else set()
            changes[path] = Change(exact, before | (readers or set()))
        else:
            self._fire(path, exact, (readers or set()) | self._readers(self.tree, path))

    def _fire(self, path: str, exact: bool, allowed: set[Connection]) -> None:
        for connection in self.connections:
            if connection not in allowed:
                continue
            for watch in connection.watches:
                if watch.path == path if exact else watch.matches(path):
                    self._send_event(connection, watch, path)

    def _fire_special(self, event: str) -> None:
        """Fire @introduceDomain or @releaseDomain, for domain 0 and who it allows to see them."""
        node = self._special[event]
        allowed = {c for c in self.connections if node.access(self._domids(c)) & READ}
        self._fire(event, True, allowed)

    # Transactions.

    def _transaction_start(self, connection: Connection, view: View, message: Message) -> bytes:
        del view
        if message.tx_id:
            raise XenStoreError("EBUSY")
        if connection.domid != 0 and len(connection.transactions) >= TRANSACTIONS_MAX:
            raise XenStoreError("ENOSPC")
        while connection.next_transaction in connection.transactions:
            connection.next_transaction += 1
        tx_id = connection.next_transaction
        connection.next_transaction = tx_id % 0xFFFFFFFF + 1
        connection.transactions[tx_id] = Transaction(View(self.tree))
        return b"%d\0" % tx_id

    def _transaction_end(self, connection: Connection, view: View, message: Message) -> bytes:
        (commit,) = unpack_strings(message.payload, 1)
        if message.tx_id == 0:
            raise XenStoreError("ENOENT")
        if commit not in (b"T", b"F"):
            raise XenStoreError("EINVAL")
        changes = connection.transactions.pop(message.tx_id).changes
        if commit == b"T":
            if not view.commit():
                raise XenStoreError("EAGAIN")
            # Once for each node; what was made and removed again was never there.
            for path in view.touched():
                if path in changes:
                    change = changes[path]
                    allowed = change.readers | self._readers(self.tree, path)
                    self._fire(path, change.exact, allowed)
        return b"OK\0"

    # Domains.

    @staticmethod
    def _privileged(connection: Connection) -> None:
        if connection.domid != 0:
            raise XenStoreError("EACCES")

    def _introduce(self, connection: Connection, view: View, message: Message) -> bytes:
        del view
        raw_domid, _, raw_port = unpack_strings(message.payload, 3)
        self._privileged(connection)
        if _number(raw_port) == 0:
            raise XenStoreError("EINVAL")
        domid = _number(raw_domid)
        if domid not in self.living:
            raise XenStoreError("ENOENT")
        self.introduce(domid)
        return b"OK\0"

    def _release(self, connection: Connection, view: View, message: Message) -> bytes:
        del view
        (raw_domid,) = unpack_strings(message.payload, 1)
        self._privileged(connection)
        self.release(self._guest(raw_domid))
        return b"OK\0"

    def _guest(self, raw_domid: bytes) -> int:
        """Return the id of an introduced domain other than 0; raises XenStoreError."""
        domid = _number(raw_domid)
        if domid not in self.introduced:
            raise XenStoreError("ENOENT")
        if domid == 0:
            raise XenStoreError("EINVAL")
        return domid

    def _get_domain_path(self, connection: Connection, view: View, message: Message) -> bytes:
        del connection, view
        (raw_domid,) = unpack_strings(message.payload, 1)
        return tree.domain_path(_number(raw_domid)).encode() + b"\0"

    def _is_introduced(self, connection: Connection, view: View, message: Message) -> bytes:
        del connection, view
        (raw_domid,) = unpack_strings(message.payload, 1)
        return b"T\0" if _number(raw_domid) in self.introduced else b"F\0"

    def _resume(self, connection: Connection, view: View, message: Message) -> bytes:
        del view
        (raw_domid,) = unpack_strings(message.payload, 1)
        self._privileged(connection)
        self._guest(raw_domid)
        return b"OK\0"

    def _set_target(self, connection: Connection, view: View, message: Message) -> bytes:
        del view
        raw_domid, raw_target = unpack_strings(message.payload, 2)
        self._privileged(connection)
        domid, target = _number(raw_domid), _number(raw_target)
        if not {domid, target} <= self.introduced:
            raise XenStoreError("ENOENT")
        self._targets[domid] = target
        return b"OK\0"

    def introduce(self, domid: int) -> None:
        """A domain was made known."""
        if domid not in self.introduced:
            self.introduced.add(domid)
            self.living.add(domid)
            self._fire_special(INTRODUCE_DOMAIN)

    def release(self, domid: int) -> None:
        """A domain is gone: so are the nodes that it owns and its place in permissions."""
        self.introduced.discard(domid)
        self._targets.pop(domid, None)
        for path in reversed(self.tree.subtree("/")):  # parents first
            node = self.tree.get(path)
            if node is None:
                continue
            if node.owner == domid:
                self._remove(None, 0, self.tree, path)
            elif any(permission.domid == domid for permission in node.permissions):
                self.tree.put(path, _without(node, domid))
        for name, node in self._special.items():
            self._special[name] = _without(node, domid)
        self._fire_special(RELEASE_DOMAIN)


def _without(node: Node, domid: int) -> Node:
    """Return a node on which a domain's permissions hold no more, though they are shown."""
    return replace(
        node,
        permissions=tuple(
            replace(permission, dead=permission.dead or permission.domid == domid)
            for permission in node.permissions
        ),
    )


def _number(raw: bytes) -> int:
    """Return the number that C's atoi finds in `raw`: what is none is 0."""
    match = _NUMBER.match(raw)
    return int(match[1] or 0) if match else 0


_HANDLERS: Final[dict[int, Callable[[Store, Connection, View, Message], bytes]]] = {
    Op.DIRECTORY: Store._directory,
    Op.READ: Store._read,
    Op.GET_PERMS: Store._get_perms,
    Op.WATCH: Store._watch,
    Op.UNWATCH: Store._unwatch,
    Op.TRANSACTION_START: Store._transaction_start,
    Op.TRANSACTION_END: Store._transaction_end,
    Op.INTRODUCE: Store._introduce,
    Op.RELEASE: Store._release,
    Op.GET_DOMAIN_PATH: Store._get_domain_path,
    Op.WRITE: Store._write,
    Op.MKDIR: Store._mkdir,
    Op.RM: Store._rm,
    Op.SET_PERMS: Store._set_perms,
    Op.IS_DOMAIN_INTRODUCED: Store._is_introduced,
    Op.RESUME: Store._resume,
    Op.SET_TARGET: Store._set_target,
    Op.RESET_WATCHES: Store._reset_watches,
    Op.DIRECTORY_PART: Store._directory_part,
}
