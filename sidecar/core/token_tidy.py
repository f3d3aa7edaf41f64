"""``auth/token/tidy``: index entries whose token is gone.

Every change of a token is one commit of all its entries, so there should be none; a tidy is how an operator makes sure.
A token and its index entries appear and vanish together: an entry that was listed and whose token is not there is of a
token that was removed, and may be deleted at any time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from consul_backend.wal import Write
from sidecar.core.barrier import DecryptionFailed
from sidecar.core.keys import CUBBYHOLES, TOKEN_ACCESSORS, TOKEN_IDS, TOKEN_PARENTS
from sidecar.core.store_view import SealedStore, walk
from sidecar.core.token_ids import AccessorEntry

log = logging.getLogger("token")

_BATCH = 48
_WALK_MAX = 4096


@dataclass(slots=True)
class Tidied:
    """What was found and deleted."""

    tokens: int = 0
    accessors: int = 0
    children: int = 0
    cubbyholes: int = 0


async def tidy(sealed: SealedStore) -> Tidied:
    """One pass. Raises what the store raises; another pass goes on where this one ended."""
    done = Tidied()
    alive = {name for name in await sealed.list(TOKEN_IDS) if not name.endswith("/")}
    done.tokens = len(alive)
    gone: list[str] = []
    for name in await sealed.list(TOKEN_ACCESSORS):
        raw = await sealed.get(TOKEN_ACCESSORS + name)
        if raw is None:
            continue
        id_hash = msgspec.msgpack.decode(raw, type=AccessorEntry).id_hash
        if await _is_gone(sealed, id_hash, alive):
            gone.append(TOKEN_ACCESSORS + name)
    done.accessors = await _delete(sealed, gone)
    for parent in await sealed.list(TOKEN_PARENTS):
        children = await sealed.list(TOKEN_PARENTS + parent)
        lost = [TOKEN_PARENTS + parent + child for child in children if await _is_gone(sealed, child, alive)]
        done.children += await _delete(sealed, lost)
    for folder in await sealed.list(CUBBYHOLES):
        if await _is_gone(sealed, folder.rstrip("/"), alive):
            while kept := await walk(sealed, CUBBYHOLES + folder, _WALK_MAX):
                done.cubbyholes += await _delete(sealed, kept)
    return done


async def logged_tidy(sealed: SealedStore) -> None:
    """:func:`tidy`, with its outcome in the log. Raises BackendError."""
    try:
        done = await tidy(sealed)
    except (DecryptionFailed, msgspec.MsgspecError) as error:
        # One unreadable entry is no reason to stop serving; whoever reads it next is told.
        log.error("tidy gave up: %s", type(error).__name__)
        return
    log.info(
        "tidy finished: tokens=%d removed: accessors=%d children=%d cubbyhole entries=%d",
        done.tokens,
        done.accessors,
        done.children,
        done.cubbyholes,
    )


async def _is_gone(sealed: SealedStore, id_hash: str, alive: set[str]) -> bool:
    # Made since the list was read: asked for one by one.
    return id_hash not in alive and await sealed.get(TOKEN_IDS + id_hash) is None


async def _delete(sealed: SealedStore, keys: Sequence[str]) -> int:
    for start in range(0, len(keys), _BATCH):
        await sealed.commit([Write(key, None) for key in keys[start : start + _BATCH]])
    return len(keys)
