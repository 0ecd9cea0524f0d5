"""Domains by number or by name, as XenStore has them.

Who may lie: a domain's name is the toolstack's, and two domains may have the same one;
nothing is guessed then.
"""

from __future__ import annotations

from ..errors import ConfigError
from .store import Store, domains_named


async def resolve_domain(store: Store, word: str) -> int:
    """Return the id of a domain given by number or by name.

    Raises ConfigError where no domain, or more than one, has the name.
    """
    if word.isdecimal():
        return int(word)
    found = await domains_named(store, word)
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"no domain is named {word}" if not found else f"domains {found} are all named {word}",
        next_step="give the vTPM domain's id; `xl list` shows it",
    )
