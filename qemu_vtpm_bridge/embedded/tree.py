"""XenStore's nodes: names, permissions, and views of the tree inside and outside transactions.

Theory of operation.  A node never changes; changing one puts another in its place, with
a new generation.  A transaction is a `View` over the tree that remembers, for each node
it touched, which generation it saw, and keeps its own changes; it commits if all those
generations are still current, and conflicts otherwise.

Source: docs/misc/xenstore.txt; xenstored's behaviour for what that leaves open.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

_NAME: Final = re.compile(r"/|(/[A-Za-z0-9_@-]+)+")
_DOMAIN_PREFIX: Final = re.compile(r"/local/domain/\d{1,5}/")
PATH_MAX: Final = 2048
"""What a path may have in characters; a domain's directory before it is not counted."""

READ: Final = 1
WRITE: Final = 2
_LETTERS: Final = {"n": 0, "r": READ, "w": WRITE, "b": READ | WRITE}
_NAMES_OF: Final = {bits: letter for letter, bits in _LETTERS.items()}


class XenStoreError(Exception):
    """A request fails; the name of the errno is what the client gets."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Permission:
    """What one domain may do; in the first place of a list, the owner and everybody else."""

    domid: int
    access: int
    dead: bool = False
    """The domain that it was for is gone; another one with its id has nothing of it."""

    @classmethod
    def parse(cls, raw: bytes) -> Permission:
        """Return the permission written as a letter and a domid; raises XenStoreError."""
        text = raw.decode("ascii", "replace")
        if not re.fullmatch(r"[nrwb]\d{1,5}", text):
            raise XenStoreError("EINVAL")
        return cls(int(text[1:]), _LETTERS[text[0]])

    def __str__(self) -> str:
        return f"{_NAMES_OF[self.access]}{self.domid}"


@dataclass(frozen=True, slots=True)
class Node:
    """One node; `generation` differs after every change of it."""

    value: bytes
    permissions: tuple[Permission, ...]
    children: tuple[str, ...]
    """In the order in which they were made."""
    generation: int

    @property
    def owner(self) -> int:
        """The domain that owns it."""
        return self.permissions[0].domid

    @property
    def size_bytes(self) -> int:
        """What a quota counts: xenstored's record of it in its database."""
        names = sum(len(child) + 1 for child in self.children)
        return 24 + 8 * len(self.permissions) + len(self.value) + names

    def access(self, domids: tuple[int, ...]) -> int:
        """Return what a connection that acts for these domains may do."""
        granted = 0
        for domid in domids:
            if domid in (0, self.owner):
                return READ | WRITE
            for permission in self.permissions[1:]:
                if permission.domid == domid and not permission.dead:
                    granted |= permission.access
                    break
            else:
                granted |= self.permissions[0].access
        return granted


def canonical(raw: bytes, domid: int) -> str:
    """Return the absolute path that `raw` names for a domain; raises XenStoreError."""
    try:
        text = raw.decode("ascii")
    except UnicodeDecodeError:
        raise XenStoreError("EINVAL") from None
    path = text if text.startswith("/") else f"{domain_path(domid)}/{text}"
    if text.startswith("@") or not _NAME.fullmatch(path):
        raise XenStoreError("EINVAL")
    if len(_DOMAIN_PREFIX.sub("", path, count=1)) > PATH_MAX:
        raise XenStoreError("EINVAL")
    return path


def domain_path(domid: int) -> str:
    """Return a domain's directory."""
    return f"/local/domain/{domid}"


def parent_of(path: str) -> str:
    """Return the path one level up; the root's is the root."""
    return path.rpartition("/")[0] or "/"


def is_below(path: str, directory: str) -> bool:
    """Return whether `path` is `directory` or lies in it."""
    return path == directory or directory == "/" or path.startswith(directory + "/")


def _generation(node: Node | None) -> int | None:
    return None if node is None else node.generation


class View:
    """The tree itself, where `base` is None; a transaction over another view, where not."""

    def __init__(self, base: View | None = None) -> None:
        self._base = base
        self._nodes: dict[str, Node | None] = {}
        self._seen: dict[str, int | None] = {}
        self._generation = 0
        if base is None:
            self._nodes["/"] = Node(b"", (Permission(0, 0),), (), 0)

    def get(self, path: str) -> Node | None:
        """Return the node at `path`, or None."""
        if self._base is None:
            return self._nodes.get(path)
        if path not in self._seen:
            node = self._base.get(path)
            self._seen[path] = _generation(node)
            self._nodes[path] = node
        return self._nodes[path]

    def put(self, path: str, node: Node | None) -> None:
        """Put a node in place, or take it away; the parent's list of children follows."""
        existed = self.get(path) is not None
        self._nodes[path] = node and replace(node, generation=self._next_generation())
        if self._base is None and node is None:
            del self._nodes[path]
        if path == "/" or existed == (node is not None):
            return
        parent = parent_of(path)
        above = self.get(parent)
        if above is not None:
            name = path.rpartition("/")[2]
            children = tuple(child for child in above.children if child != name)
            if node:
                children += (name,)
            self.put(parent, replace(above, children=children))

    def _next_generation(self) -> int:
        root = self
        while root._base is not None:
            root = root._base
        root._generation += 1
        return root._generation

    def commit(self) -> bool:
        """Make a transaction's changes the base's; False, and no change, on a conflict."""
        base = self._base
        assert base is not None
        for path, generation in self._seen.items():
            node = base.get(path)
            if _generation(node) != generation:
                return False
        for path, node in self._nodes.items():
            if _generation(node) == self._seen[path]:
                continue
            if node is None:
                base._nodes.pop(path, None)
            else:
                base._nodes[path] = node
        return True

    def owned_by(self, domid: int) -> int:
        """Return how many nodes a domain owns."""
        return sum(1 for node in self._nodes.values() if node and node.owner == domid)

    def pending_of(self, domid: int) -> int:
        """Return how many nodes of a domain a transaction would add; 0 outside one."""
        if self._base is None:
            return 0
        return sum(
            1
            for path, node in self._nodes.items()
            if node and node.owner == domid and self._seen[path] is None
        )

    def subtree(self, path: str) -> list[str]:
        """Return `path` and everything below it, children first."""
        node = self.get(path)
        if node is None:
            return []
        found = []
        for child in node.children:
            found += self.subtree(f"{path.rstrip('/')}/{child}")
        return [*found, path]

    def touched(self) -> list[str]:
        """Return what a transaction touched and changed, or found and left, in that order."""
        return [
            path
            for path, node in self._nodes.items()
            if node is not None or self._seen[path] is not None
        ]
