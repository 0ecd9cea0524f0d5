"""docs/states.md: current, and with every machine of the package."""

from __future__ import annotations

import ast
import enum

import pytest

from qemu_vtpm_bridge.bridge import frontend, power, tis_states, vfio_user
from qemu_vtpm_bridge.vtpm import backend
from tools import state_diagrams
from tools.source_text import ROOT, member_texts

KNOWN: list[type[enum.Enum]] = [
    frontend.State,
    power.State,
    tis_states.State,
    vfio_user.IntxState,
    backend.State,
]


def test_the_document_is_that_of_the_code() -> None:
    assert state_diagrams.OUTPUT.read_text() == state_diagrams.document(), "run `make docs`"


def test_every_table_is_found() -> None:
    found = {machine.states for machine in state_diagrams.machines()}
    assert found >= set(KNOWN)
    # Found by another road: a global whose name ends so is a transition table.
    names = {machine.name for machine in state_diagrams.machines()}
    for path in (ROOT / "qemu_vtpm_bridge").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "qemu_vtpm_bridge").with_suffix("").parts)
        for entry in ast.parse(path.read_text()).body:
            targets = entry.targets if isinstance(entry, ast.Assign) else []
            targets = [entry.target] if isinstance(entry, ast.AnnAssign) else targets
            for target in targets:
                if isinstance(target, ast.Name) and target.id.endswith("TRANSITIONS"):
                    assert f"{module}.{target.id}" in names


@pytest.mark.parametrize("machine", [*state_diagrams.machines()], ids=lambda machine: machine.name)
def test_each_state_is_drawn_and_each_pair_told(machine: state_diagrams.Machine) -> None:
    lines = list(state_diagrams.section(machine))
    picture = lines[lines.index("```mermaid") : lines.index("```")]
    for state in machine.states:
        name = state_diagrams.node(state_diagrams.shown(state))
        assert any(name in line.split() or f"{name}:" in line.split() for line in picture), name
    told = 0
    for edge in machine.edges:
        if not edge.quiet:
            assert f"| {edge.state} | {edge.label} | {edge.to} | {edge.does} |" in lines
            assert any(
                edge.label in line and state_diagrams.node(edge.to) in line for line in picture
            )
            told += 1
    assert told > len(machine.states)


def test_a_policy_that_differs_is_named() -> None:
    (machine,) = (found for found in state_diagrams.machines() if found.states is power.State)
    labels = {edge.label for edge in machine.edges if edge.state == "EVIDENCE"}
    assert "EVIDENCE_USED (keep)" in labels
    assert "EVIDENCE_USED (verified, restart-domain)" in labels
    assert "EVIDENCE_CLEAN" in labels


def test_what_leads_to_one_place_from_most_states_is_drawn_once() -> None:
    (machine,) = (found for found in state_diagrams.machines() if found.states is power.State)
    froms = {state for state, to in state_diagrams.drawn_edges(machine) if to == "OFF"}
    assert froms == {"any state"}


def test_the_strings_behind_members_are_theirs() -> None:
    texts = member_texts(power.State)
    assert texts["ON"] == "Commands flow."
    assert "INIT_ASKED" not in member_texts(power.Fact)
