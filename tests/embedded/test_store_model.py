"""The embedded XenStore against a naive model, in which a transaction is a list of requests.

Outside transactions every answer must be the model's.  A transaction that commits must
have given the answers that the same requests give when they are made in one go at that
moment; one during which nothing else changed must commit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from qemu_vtpm_bridge.embedded.store import Store
from qemu_vtpm_bridge.embedded.wire import Op
from tests.support.xenstore import Caller

OK = b"OK\0"
GUEST = 2
NAMES = st.sampled_from(["a", "b"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(lambda names: "/g/" + "/".join(names))
DOMIDS = st.sampled_from([0, GUEST])
REQUESTS = st.one_of(
    st.tuples(st.just("write"), PATHS, st.binary(max_size=3)),
    st.tuples(st.just("read"), PATHS, st.none()),
    st.tuples(st.just("ls"), PATHS, st.none()),
    st.tuples(st.just("rm"), PATHS, st.none()),
    st.tuples(st.just("chmod"), PATHS, st.sampled_from(["n0", "r0", "b0", "n2", "w2"])),
)
Request = tuple[str, str, object]
Answer = bytes | str


def ask(caller: Caller, request: Request, tx: int = 0) -> Answer:
    """Make a request of the store under test."""
    what, path, argument = request
    match what:
        case "write":
            assert isinstance(argument, bytes)
            return caller.write(path, argument, tx)
        case "read":
            return caller.read(path, tx)
        case "ls":
            return caller.strings(Op.DIRECTORY, path, tx=tx)
        case "rm":
            return caller.strings(Op.RM, path, tx=tx)
        case _:
            return caller.perms(path, str(argument), tx=tx)


@dataclass
class ModelNode:
    value: bytes
    owner: int
    others: str


@dataclass
class Model:
    """Every node under its path; domain 0 may do everything."""

    nodes: dict[str, ModelNode]
    changes: int = 0

    def ask(self, domid: int, request: Request) -> Answer:
        what, path, argument = request
        error = self._refusal(domid, path, "r" if what in ("read", "ls") else "w")
        if error == "ENOENT" and what == "rm":
            return OK if _parent(path) in self.nodes else "ENOENT"
        if error and not (error == "ENOENT" and what == "write"):
            return error
        match what:
            case "read":
                return self.nodes[path].value
            case "ls":
                return "".join(f"{name}\0" for name in self._children(path)).encode()
            case "rm":
                for gone in [p for p in self.nodes if f"{p}/".startswith(f"{path}/")]:
                    del self.nodes[gone]
            case "write":
                assert isinstance(argument, bytes)
                self._make(domid, path)
                self.nodes[path].value = argument
            case _:
                others, owner = str(argument)[0], int(str(argument)[1:])
                if domid != 0 and domid != self.nodes[path].owner:
                    return "EACCES"
                if domid != 0 and owner != self.nodes[path].owner:
                    return "EPERM"
                self.nodes[path].owner, self.nodes[path].others = owner, others
        self.changes += 1
        return OK

    def _refusal(self, domid: int, path: str, access: str) -> str | None:
        at = path
        while at not in self.nodes:
            at = _parent(at)
        node = self.nodes[at]
        if domid not in (0, node.owner) and node.others not in (access, "b"):
            return "EACCES"
        return None if at == path else "ENOENT"

    def _children(self, path: str) -> list[str]:
        return [p.rpartition("/")[2] for p in self.nodes if _parent(p) == path]

    def _make(self, domid: int, path: str) -> None:
        if path not in self.nodes:
            self._make(domid, _parent(path))
            above = self.nodes[_parent(path)]
            self.nodes[path] = ModelNode(b"", domid or above.owner, above.others)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


@dataclass(eq=False)
class Transaction:
    caller: Caller
    number: int
    changes_before: int
    log: list[tuple[Request, Answer]] = field(default_factory=list)


class StoreMachine(RuleBasedStateMachine):
    """Requests of two domains, inside and outside transactions."""

    transactions = Bundle("transactions")

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.callers = {domid: Caller(self.store, domid) for domid in (0, GUEST)}
        self.model = Model({"/g": ModelNode(b"", GUEST, "r")})
        self.store.introduce(GUEST)
        self.callers[0].write("/g")
        self.callers[0].perms("/g", f"r{GUEST}")

    @rule(domid=DOMIDS, request=REQUESTS)
    def outside(self, domid: int, request: Request) -> None:
        assert ask(self.callers[domid], request) == self.model.ask(domid, request)

    @rule(target=transactions, domid=DOMIDS)
    def begin(self, domid: int) -> Transaction:
        caller = Caller(self.store, domid)
        return Transaction(caller, caller.begin(), self.model.changes)

    @rule(t=transactions, request=REQUESTS)
    def inside(self, t: Transaction, request: Request) -> None:
        t.log.append((request, ask(t.caller, request, t.number)))

    @rule(t=consumes(transactions), commit=st.booleans())
    def end(self, t: Transaction, commit: bool) -> None:
        answer = t.caller.end(t.number, commit=commit)
        self.store.disconnect(t.caller.connection)
        if not commit:
            assert answer == OK
            return
        if answer != OK:
            assert answer == "EAGAIN"
            assert self.model.changes != t.changes_before
            return
        after = copy.deepcopy(self.model)
        for request, given in t.log:
            assert after.ask(t.caller.connection.domid, request) == given
        self.model = after

    @invariant()
    def shows_what_the_model_holds(self) -> None:
        dom0 = self.callers[0]
        for path, node in self.model.nodes.items():
            assert dom0.read(path) == node.value
            shown = dom0.strings(Op.GET_PERMS, path)
            assert shown == f"{node.others}{node.owner}\0".encode()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
