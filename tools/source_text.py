"""What the sources say of themselves in docstrings, for the pages drawn from them."""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())


def member_texts(kind: type) -> dict[str, str]:
    """Return what the string behind each member of an enumeration, or each field, says.

    Not all have one.
    """
    source = inspect.getsource(sys.modules[kind.__module__])
    [body] = [
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__
    ]
    texts = {}
    for entry, text in itertools.pairwise(body):
        if isinstance(entry, ast.Assign | ast.AnnAssign) and isinstance(text, ast.Expr):
            targets = entry.targets if isinstance(entry, ast.Assign) else [entry.target]
            [name] = [target.id for target in targets if isinstance(target, ast.Name)]
            texts[name] = one_line(ast.literal_eval(text.value))
    return texts
