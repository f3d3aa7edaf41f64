"""What ends with a token: everything below it, and its leases."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from sidecar.core.keys import TOKEN_PARENTS
from sidecar.core.store_view import SealedStore

# Their commits wait for the one in flight and go together in the next.
_AT_ONCE = 32

Release = Callable[[str], Awaitable[None]]
"""Takes all leases of a token (by its hash) away from it and has them revoked."""

_Result = TypeVar("_Result")


async def nothing_leased(id_hash: str) -> None:
    """The :data:`Release` of a store without leases."""


async def side_by_side(call: Callable[[str], Awaitable[_Result]], names: Sequence[str]) -> list[_Result]:
    """What ``call`` gives for each name, a bounded number at a time. Raises what the first of them raised, once those
    begun with it have ended."""
    done: list[_Result] = []
    for start in range(0, len(names), _AT_ONCE):
        ended = await asyncio.gather(*(call(name) for name in names[start : start + _AT_ONCE]), return_exceptions=True)
        for one in ended:
            if isinstance(one, BaseException):
                raise one
            done.append(one)
    return done


async def descendants(sealed: SealedStore, children: Iterable[str]) -> list[str]:
    """Hashes of ``children`` and of everything below them, nearer ones first."""
    found: dict[str, None] = {}
    level = list(children)
    while level:
        found.update(dict.fromkeys(level))
        lists = await side_by_side(lambda name: sealed.list(f"{TOKEN_PARENTS}{name}/"), level)
        level = [name for names in lists for name in names if name not in found]
    return list(found)
