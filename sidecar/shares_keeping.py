"""A secondary's key shares are its primary's, also after a rekey there.

The primary's rekey commits the new shares' part of the seal record as a replicated entry too, so it arrives like all
else: by stream, sync, or through a chain of clusters, however long this one was away. Here it takes the place of that
part in this cluster's own seal record, beside whatever auto seal this cluster has: one write, before which the old
shares open it and after which the new ones do. It opens the same root key, which never changes by a rekey.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import NoReturn

from consul_backend.errors import NotApplied, Overloaded, Unavailable
from consul_backend.wal import Write
from sidecar.core.keys import SEAL, SEAL_SHARES
from sidecar.core.seal_record import BadSealRecord, SealRecord
from sidecar.core.store_view import SealedStore

log = logging.getLogger("core")

RETRY_S = 5.0


class SharesKeeper:
    """One per tenure. ``follows``: whether this cluster is a secondary now; ``lock`` is held by whoever writes the seal
    record of this tenure."""

    def __init__(self, sealed: SealedStore, follows: Callable[[], bool], lock: asyncio.Lock) -> None:
        self._sealed = sealed
        self._lock = lock
        self._follows = follows
        self._due = asyncio.Event()
        self._due.set()  # what arrived in an earlier tenure may not have been taken over

    def heard(self, keys: Sequence[str]) -> None:
        """Replication changed these logical keys."""
        if SEAL_SHARES in keys:
            self._due.set()

    async def run(self) -> NoReturn:
        """Until cancelled. Raises what ends a tenure."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await self.take()
            except (Overloaded, NotApplied, Unavailable) as error:
                log.warning("the primary's new key shares are not in force here yet: %s", error)
                self._due.set()
                await asyncio.sleep(RETRY_S)

    async def take(self) -> bool:
        """Bring the primary's newest shares into force here; whether that changed anything. Raises BackendError."""
        async with self._lock:
            return await self._take()

    async def _take(self) -> bool:
        if not self._follows():
            return False
        arrived, stored = await self._sealed.get(SEAL_SHARES), await self._sealed.get_raw(SEAL)
        if arrived is None or stored is None:
            return False
        try:
            shares, own = SealRecord.decode(arrived), SealRecord.decode(stored)
        except BadSealRecord as error:
            log.error("the primary's key shares are not taken over, the ones of before stay in force: %s", error)
            return False
        if own.same_shares(shares):
            return False
        await self._sealed.commit([Write(SEAL, shares.with_auto(own.auto).encode())])
        log.warning(
            "the primary was rekeyed: its new key shares open this cluster now (shares=%d threshold=%d)",
            shares.shares,
            shares.threshold,
        )
        return True
