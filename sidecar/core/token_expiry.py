"""The sweep: removes expired tokens from storage, and finishes revocations that a crash or a client cut short.

Whether a token is valid never depends on it (a lookup compares times); it only tidies up. It reads one folder per
elapsed minute, never all tokens.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Awaitable, Callable

from consul_backend.errors import BackendError
from consul_backend.wal import Write
from sidecar.core.keys import TOKEN_EXPIRY, TOKEN_REVOKING
from sidecar.core.store_view import SealedStore
from sidecar.core.token_ids import BUCKET_S, expiry_folder

# A request that holds a spent token is over by then (a request may last 90 s).
ABANDONED_S = 180
RETRY_S = 5.0

_log = logging.getLogger(__name__)


class ExpirySweep:
    """``expire`` removes a token that expired in the given minute and answers False for a stale index entry;
    ``revoke`` removes one with its tree."""

    def __init__(
        self,
        sealed: SealedStore,
        now: Callable[[], float],
        expire: Callable[[str, int], Awaitable[bool]],
        revoke: Callable[[str], Awaitable[None]],
    ) -> None:
        self._sealed = sealed
        self._now = now
        self._expire = expire
        self._revoke = revoke
        self._heap: list[int] = []
        self._buckets: set[int] = set()
        self._recovering: set[str] = set()

    def add(self, bucket: int) -> None:
        """Some token expires in this minute."""
        if bucket not in self._buckets:
            self._buckets.add(bucket)
            heapq.heappush(self._heap, bucket)

    async def load(self) -> None:
        """Read which minutes have tokens, and which revocations an earlier tenure left unfinished."""
        for name in await self._sealed.list(TOKEN_EXPIRY):
            self.add(int(name.rstrip("/")))
        self._recovering = set(await self._sealed.list(TOKEN_REVOKING))

    async def run(self) -> None:
        """:meth:`sweep` every minute, until cancelled. A store that cannot write now is tried again."""
        while True:
            try:
                await self.sweep()
                pause_s = float(BUCKET_S)
            except BackendError as error:
                # Whoever runs the store learns of a lost lead by itself; here it is only work for later.
                _log.warning("token expiry is waiting: %s", type(error).__name__)
                pause_s = RETRY_S
            await asyncio.sleep(pause_s)

    async def sweep(self) -> None:
        """One pass over everything that is due."""
        for id_hash in sorted(self._recovering):
            await self._revoke(id_hash)
            self._recovering.discard(id_hash)
        await self._sweep_abandoned()
        while self._heap and (self._heap[0] + 1) * BUCKET_S <= self._now():
            bucket = self._heap[0]
            await self._sweep_bucket(bucket)
            heapq.heappop(self._heap)
            self._buckets.discard(bucket)

    async def _sweep_bucket(self, bucket: int) -> None:
        folder = expiry_folder(bucket)
        for id_hash in await self._sealed.list(folder):
            if not await self._expire(id_hash, bucket):
                await self._sealed.commit([Write(folder + id_hash, None)])

    async def _sweep_abandoned(self) -> None:
        for id_hash in await self._sealed.list(TOKEN_REVOKING):
            raw = await self._sealed.get(TOKEN_REVOKING + id_hash)
            if raw is not None and self._now() - int(raw) > ABANDONED_S:
                await self._revoke(id_hash)
