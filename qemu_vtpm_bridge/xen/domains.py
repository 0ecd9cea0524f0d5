"""Domains by number or by name, as XenStore has them.

Who may lie: a domain's name is the toolstack's, and two domains may have the same one;
nothing is guessed then.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from ..errors import ConfigError
from .store import KeptStore, Store, StoreError, Transaction
from .xenbus import names_domain

TPM_VERSION: Final = {"tis": b"1", "crb": b"2"}
"""What hvmloader is told in platform/tpm_version, by register device."""


async def resolve_domain(store: Store, word: str) -> int:
    """Return the id of a domain given by number or by name.

    Raises ConfigError where no domain, or more than one, has the name, or where names
    cannot be looked up.
    """
    if word.isdecimal():
        return int(word)
    try:
        entries = await store.try_ls("/local/domain") or []
    except StoreError as error:
        if error.errno != errno.EACCES:
            raise
        entries = []
    return the_domain_named(
        word,
        {
            int(entry): await store.peek(f"/local/domain/{entry}/name")
            for entry in entries
            if names_domain(entry)
        },
    )


def the_domain_named(word: str, names: Mapping[int, bytes | None]) -> int:
    """Return the one domain with this name, of all whose names can be read.

    Raises ConfigError for none and for several, and where there are no names at all.
    """
    if not names:
        raise ConfigError(
            f"the domain named {word} cannot be looked up here",
            state="only domain 0 may read which domains there are",
            next_step="give the vTPM domain's id; `xl list` in domain 0 shows it",
        )
    found = sorted(domid for domid, name in names.items() if name == word.encode())
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"no domain is named {word}" if not found else f"domains {found} are all named {word}",
        next_step="create the vTPM domain first, or give its id; `xl list` shows what there is",
    )


def guest_named(store: KeptStore, word: str) -> str:
    """Return the name of a guest that is given by name or by domain id.

    Raises ConfigError where there is no domain of that id.
    """
    if not word.isdecimal():
        return word
    raw = store.read(f"/local/domain/{int(word)}/name")
    if raw is None:
        raise ConfigError(
            f"there is no domain {word}", next_step="`xl list` shows them; a name may come later"
        )
    return raw.decode(errors="replace")


async def write_while_there(
    store: Store, domid: int, write: Callable[[Transaction], Awaitable[None]]
) -> bool:
    """Write below a domain's directory in a transaction; return False where it has gone.

    A domain that has gone must not get a directory again: nobody would remove it.
    """

    async def checked(transaction: Transaction) -> bool:
        if await transaction.try_read(f"/local/domain/{domid}/name") is None:
            return False
        await write(transaction)
        return True

    return await store.transact(checked)


async def tell_hvmloader(store: Store, domid: int, registers: str) -> bool:
    """Say which register device hvmloader is to announce, in a guest that does not run yet.

    Returns False where the guest has gone.
    """
    path = f"/local/domain/{domid}/platform/tpm_version"

    async def write(transaction: Transaction) -> None:
        await transaction.write(path, TPM_VERSION[registers])
        await transaction.set_perms(path, ["n0", f"r{domid}"])

    return await write_while_there(store, domid, write)
