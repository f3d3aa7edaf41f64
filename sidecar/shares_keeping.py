"""A secondary's key shares are its primary's, also after a rekey there.

The primary's rekey commits the new shares' part of the seal record as a replicated entry too, so it arrives like all
else: by stream, sync, or through a chain of clusters, however long this one was away. A primary that was never rekeyed
publishes its shares' part once, for clusters that come to follow it with others. Here it takes the place of that
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
from plugin_api.errors import ReadOnlyStorage
from sidecar.core.keys import SEAL, SEAL_SHARES
from sidecar.core.seal_record import BadSealRecord, SealRecord
from sidecar.core.store_view import SealedStore

log = logging.getLogger("core")

RETRY_S = 5.0
PASS_S = 60.0
"""How often a primary looks whether its secondaries can know its shares: roles change within a tenure too."""


class SharesKeeper:
    """One per tenure. ``modes`` are those of performance and dr replication, as in ``sys/health``, and ``writable``
    says whether class ``r`` is written here; ``lock`` is held by whoever writes the seal record of this tenure."""

    def __init__(
        self,
        sealed: SealedStore,
        modes: Callable[[], tuple[str, str]],
        writable: Callable[[], bool],
        lock: asyncio.Lock,
    ) -> None:
        self._sealed = sealed
        self._modes = modes
        self._writable = writable
        self._lock = lock
        self._due = asyncio.Event()

    def heard(self, keys: Sequence[str]) -> None:
        """Replication changed these logical keys."""
        if SEAL_SHARES in keys:
            self._due.set()

    async def run(self) -> NoReturn:
        """Until cancelled. Raises what ends a tenure."""
        while True:
            self._due.clear()
            try:
                async with self._lock:
                    await self._once()
                pause_s = PASS_S
            except (Overloaded, NotApplied, Unavailable, ReadOnlyStorage) as error:  # the last: being demoted
                log.warning("the replication set's key shares are not in force everywhere yet: %s", error)
                pause_s = RETRY_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def _once(self) -> None:
        arrived, stored = await self._sealed.get(SEAL_SHARES), await self._sealed.get_raw(SEAL)
        if stored is None:
            return
        if arrived is None:
            await self._publish(stored)
        else:
            await self._take(arrived, stored)

    async def _publish(self, stored: bytes) -> None:
        """A primary that was never rekeyed: who comes to follow it may have been."""
        if not self._writable() or "primary" not in self._modes():
            return
        await self._sealed.commit([Write(SEAL_SHARES, SealRecord.decode(stored).with_auto(None).encode())])

    async def _take(self, arrived: bytes, stored: bytes) -> None:
        """Bring the set's shares into force here. A primary has them in force, unless it was promoted right before it
        had; what is older than its own does not count there."""
        try:
            shares, own = SealRecord.decode(arrived), SealRecord.decode(stored)
        except BadSealRecord as error:
            log.error("the primary's key shares are not taken over, the ones of before stay in force: %s", error)
            return
        if own.same_shares(shares) or (self._writable() and shares.created_s <= own.created_s):
            return
        await self._sealed.commit([Write(SEAL, shares.with_auto(own.auto).encode())])
        log.warning(
            "the primary was rekeyed: its new key shares open this cluster now (shares=%d threshold=%d)",
            shares.shares,
            shares.threshold,
        )
