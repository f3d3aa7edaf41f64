"""``sys/leases/tidy``: leases whose token is gone, and index entries whose lease is gone.

Every change of a lease is one commit of all its entries, so there should be none; a tidy is how an operator makes sure.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from consul_backend.errors import BackendError
from consul_backend.wal import Write
from sidecar.core.barrier import DecryptionFailed
from sidecar.core.keys import LEASES_BY_TOKEN, LEASES_IRREVOCABLE, TOKEN_IDS
from sidecar.core.lease_entry import lease_key
from sidecar.core.lease_revocation import LeaseRevocation
from sidecar.core.leases import Leases
from sidecar.core.store_view import SealedStore

log = logging.getLogger("expiration")

_BATCH = 48


@dataclass(slots=True)
class Tidied:
    """What was found and put right."""

    leases: int = 0
    revoked: int = 0
    restored: int = 0
    deleted: int = 0


async def tidy(sealed: SealedStore, leases: Leases, revocation: LeaseRevocation) -> Tidied:
    """One pass. Raises what the store raises; another pass goes on where this one ended."""
    done = Tidied()
    gone: list[str] = []
    async for lease_id in leases.everything():
        done.leases += 1
        id_hash = await leases.token_hash(lease_id)
        if id_hash:
            if await sealed.get(TOKEN_IDS + id_hash) is None:
                gone.append(lease_key(lease_id))
            continue
        async with leases.held(lease_id) as entry:
            lost = entry is not None and bool(entry.token) and await sealed.get(TOKEN_IDS + entry.token) is None
            if entry is not None and not lost:
                done.restored += await leases.restore(entry)
        if lost:
            done.revoked += await revocation.make_due(lease_id)
    for folder in await sealed.list(LEASES_BY_TOKEN):
        gone += await _dangling(sealed, leases, LEASES_BY_TOKEN + folder)
    gone += await _dangling(sealed, leases, LEASES_IRREVOCABLE)
    done.deleted = await _delete(sealed, gone)
    return done


async def logged_tidy(sealed: SealedStore, leases: Leases, revocation: LeaseRevocation) -> None:
    """:func:`tidy`, with its outcome in the log, whatever it is."""
    try:
        done = await tidy(sealed, leases, revocation)
    except (BackendError, DecryptionFailed, msgspec.MsgspecError) as error:
        # One unreadable entry is no reason to stop serving; whoever reads it next is told.
        log.error("lease tidy gave up: %s", type(error).__name__)
        return
    log.info(
        "lease tidy finished: leases=%d without a token, being revoked: %d put back into the schedule: %d "
        "index entries deleted: %d",
        done.leases,
        done.revoked,
        done.restored,
        done.deleted,
    )


async def _dangling(sealed: SealedStore, leases: Leases, folder: str) -> list[str]:
    """Index entries in ``folder`` whose lease is gone."""
    found = []
    for name in await sealed.list(folder):
        raw = await sealed.get(folder + name)
        if raw is not None and await leases.load(raw.decode()) is None:
            found.append(folder + name)
    return found


async def _delete(sealed: SealedStore, keys: Sequence[str]) -> int:
    for start in range(0, len(keys), _BATCH):
        await sealed.commit([Write(key, None) for key in keys[start : start + _BATCH]])
    return len(keys)
