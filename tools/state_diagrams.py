"""Writes docs/states.md from the transition tables of the package.

    python -m tools.state_diagrams

A transition table is a dict in a module of the package whose keys are pairs of two
enumerations' members, a state and what happened; or a dict of such dicts, one for each
variant.  All that are found are drawn, so a new machine needs nothing here but, if it has
a better name than its states' docstring, an entry in TITLES.  A test compares the file.

The diagrams are Mermaid's, which forges draw; for the site `tools/site_hooks.py` draws
them.  What leads to one place from most states is drawn once, and what changes nothing is
left to the text, or nobody could read the picture.
"""

from __future__ import annotations

import enum
import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import qemu_vtpm_bridge
from tools.source_text import ROOT, member_texts, one_line

OUTPUT = ROOT / "docs" / "states.md"

HEAD = """\
<!-- Written by tools/state_diagrams.py from the code: `make docs`. -->

# State machines

Every machine of the package with a transition table, drawn from it. What happened goes in,
actions come out; a machine does no input or output itself. A pair of a state and a fact
that stands nowhere below cannot happen, and is refused without changing anything.
"""

TITLES = {
    "bridge.frontend.TRANSITIONS": "The frontend towards the vTPM domain",
    "bridge.power.TRANSITIONS": "The reset contract",
    "bridge.tis_states.TRANSITIONS": "A locality of the TIS device",
    "bridge.vfio_user.INTX_TRANSITIONS": "The interrupt of a vfio-user device",
    "vtpm.backend.TRANSITIONS": "The vTPM domain's backend towards one frontend",
}

Table = dict[tuple[enum.Enum, enum.Enum], Any]


@dataclass(frozen=True, slots=True)
class Edge:
    """One pair of a table; `variants` is empty where it holds in all of them."""

    state: str
    fact: str
    to: str
    does: str
    variants: tuple[str, ...] = ()

    @property
    def quiet(self) -> bool:
        """Whether nothing changes and nothing is done."""
        return self.state == self.to and not self.does

    @property
    def label(self) -> str:
        """The fact, with the variants that it is for."""
        return self.fact + (f" ({', '.join(self.variants)})" if self.variants else "")


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine as its table tells it."""

    name: str
    """Module and table, below the package: bridge.frontend.TRANSITIONS."""
    states: type[enum.Enum]
    facts: type[enum.Enum]
    actions: type[enum.Enum] | None
    edges: tuple[Edge, ...]
    ignored: dict[str, list[str]]

    @property
    def title(self) -> str:
        """The heading of its section."""
        return TITLES.get(self.name, one_line(self.states.__doc__ or self.name).rstrip("."))

    @property
    def source(self) -> str:
        """The file that the table stands in."""
        return "/".join(["qemu_vtpm_bridge", *self.name.split(".")[:-1]]) + ".py"


def shown(member: enum.Enum) -> str:
    """Return a state's or a fact's name: its value where that is words."""
    return str(member.value) if isinstance(member.value, str) else member.name


def is_table(thing: object) -> bool:
    """Whether a module's global is a transition table."""
    return (
        isinstance(thing, dict)
        and bool(thing)
        and all(
            isinstance(key, tuple)
            and len(key) == 2
            and all(isinstance(part, enum.Enum) for part in key)
            for key in thing
        )
    )


def variants_of(thing: object) -> dict[str, Table] | None:
    """Return the tables of a global by variant, or None if it is no table."""
    if is_table(thing):
        return {"": thing}  # type: ignore[dict-item]
    if isinstance(thing, dict) and thing and all(is_table(inner) for inner in thing.values()):
        return {shown(variant): table for variant, table in thing.items()}
    return None


def step(entry: Any) -> tuple[str, str]:
    """Return where an entry of a table leads, and what is done."""
    if isinstance(entry, enum.Enum):
        return shown(entry), ""
    if isinstance(entry, tuple):
        to, actions = entry
        return shown(to), ", ".join(action.name for action in actions)
    return shown(entry.to), entry.meaning


def edges_of(variants: dict[str, Table]) -> tuple[Edge, ...]:
    """Return the pairs of all variants; one that is the same in all stands once."""
    found: dict[Edge, list[str]] = {}
    for variant, table in variants.items():
        for (state, fact), entry in table.items():
            to, does = step(entry)
            found.setdefault(Edge(shown(state), shown(fact), to, does), []).append(variant)
    return tuple(
        edge
        if len(names) == len(variants)
        else Edge(edge.state, edge.fact, edge.to, edge.does, tuple(names))
        for edge, names in found.items()
    )


def actions_of(table: Table) -> type[enum.Enum] | None:
    """Return the enumeration that a table's actions are of, if it has one."""
    for entry in table.values():
        if isinstance(entry, tuple) and entry[1]:
            return type(entry[1][0])
    return None


def in_order(kind: type[enum.Enum], facts: set[str]) -> list[str]:
    """Return the facts in the order that their enumeration has."""
    return [name for name in map(shown, kind) if name in facts]


def machines() -> Iterator[Machine]:
    """Find every table of the package."""
    prefix = qemu_vtpm_bridge.__name__ + "."
    for info in pkgutil.walk_packages(qemu_vtpm_bridge.__path__, prefix):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            variants = None if name.startswith("_") else variants_of(thing)
            if variants is None:
                continue
            table = next(iter(variants.values()))
            state, fact = (type(part) for part in next(iter(table)))
            if state.__module__ != info.name:
                continue  # imported from where it is drawn
            edges = edges_of(variants)
            ignored = {shown(member): set[str]() for member in state}
            for member, facts in getattr(module, "IGNORED", {}).items():
                ignored[shown(member)] |= {
                    shown(one)
                    for one in facts
                    if not any((member, one) in table for table in variants.values())
                }
            for edge in edges:
                if edge.quiet:
                    ignored[edge.state].add(edge.fact)
            yield Machine(
                f"{info.name.removeprefix(prefix)}.{name}",
                state,
                fact,
                actions_of(table),
                edges,
                {key: in_order(fact, facts) for key, facts in ignored.items() if facts},
            )


def drawn_edges(machine: Machine) -> dict[tuple[str, str], list[str]]:
    """Return the labels by (from, to).

    What leads to one place from most states comes from a node of its own, whose name
    says from where.
    """
    states = [shown(state) for state in machine.states]
    sources: dict[tuple[str, str], list[str]] = {}
    for edge in machine.edges:
        if not edge.quiet:
            sources.setdefault((edge.label, edge.to), []).append(edge.state)
    drawn: dict[tuple[str, str], list[str]] = {}
    for (label, to), froms in sources.items():
        rest = [state for state in states if state not in froms and state != to]
        if len(froms) > len(states) / 2:
            froms = ["any state but " + ", ".join(rest) if rest else "any state"]
        for state in froms:
            drawn.setdefault((state, to), []).append(label)
    return drawn


def node(state: str) -> str:
    """Return a state's name as Mermaid takes it."""
    return "".join(char if char.isalnum() else "_" for char in state)


def diagram(machine: Machine) -> Iterator[str]:
    """Draw the machine."""
    edges = drawn_edges(machine)
    yield "```mermaid"
    yield "stateDiagram-v2"
    for state in dict.fromkeys(name for pair in edges for name in pair):
        if node(state) != state:
            yield f'    state "{state}" as {node(state)}'
    yield f"    [*] --> {node(shown(next(iter(machine.states))))}"
    for (state, to), labels in edges.items():
        yield f"    {node(state)} --> {node(to)}: {'<br/>'.join(dict.fromkeys(labels))}"
    yield "```"


def meanings(kind: type[enum.Enum], heading: str) -> Iterator[str]:
    """What the docstrings say of an enumeration's members; all that have none in one line."""
    texts = member_texts(kind)
    if not texts:
        return
    yield f"| {heading} | what it means |"
    yield "|---|---|"
    for member in kind:
        if member.name in texts:
            yield f"| {shown(member)} | {texts[member.name]} |"
    yield ""


def section(machine: Machine) -> Iterator[str]:
    """Everything about one machine."""
    yield f"## {machine.title}"
    yield ""
    yield f"`{machine.name.rpartition('.')[2]}` in `{machine.source}`."
    yield ""
    yield from diagram(machine)
    yield ""
    yield from meanings(machine.states, "state")
    yield from meanings(machine.facts, "fact")
    if machine.actions is not None:
        yield from meanings(machine.actions, "action")
    yield "| state | what happened | next state | what is done |"
    yield "|---|---|---|---|"
    for edge in machine.edges:
        if not edge.quiet:
            yield f"| {edge.state} | {edge.label} | {edge.to} | {edge.does} |"
    yield ""
    if machine.ignored:
        yield "What changes nothing, and is no mistake:"
        yield ""
        for state, facts in machine.ignored.items():
            yield f"- {state}: {', '.join(facts)}"
        yield ""


def document() -> str:
    """Return the whole file."""
    lines = [HEAD]
    for machine in machines():
        lines += section(machine)
    return "\n".join(lines)


if __name__ == "__main__":
    OUTPUT.write_text(document(), encoding="utf-8")
    print(f"wrote {OUTPUT}")
