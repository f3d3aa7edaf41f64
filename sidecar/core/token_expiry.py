"""Finishes revocations of tokens that a crash or a client cut short.

Whether a token is valid never depends on it (a lookup sees the mark); it only tidies up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from consul_backend.errors import BackendError
from sidecar.core.keys import TOKEN_REVOKING
from sidecar.core.store_view import SealedStore

# A request that holds a spent token is over by then (a request may last 90 s).
ABANDONED_S = 180
PAUSE_S = 60.0
RETRY_S = 5.0

_log = logging.getLogger(__name__)


class AbandonedTokens:
    """``revoke`` removes a token with its tree."""

    def __init__(self, sealed: SealedStore, now: Callable[[], float], revoke: Callable[[str], Awaitable[None]]) -> None:
        self._sealed = sealed
        self._now = now
        self._revoke = revoke
        self._recovering: set[str] = set()

    async def load(self) -> None:
        """Read which revocations an earlier tenure left unfinished."""
        self._recovering = set(await self._sealed.list(TOKEN_REVOKING))

    async def run(self) -> None:
        """:meth:`sweep` every minute, until cancelled. A store that cannot write now is tried again."""
        while True:
            try:
                await self.sweep()
                pause_s = PAUSE_S
            except BackendError as error:
                # Whoever runs the store learns of a lost lead by itself; here it is only work for later.
                _log.warning("unfinished revocations are waiting: %s", type(error).__name__)
                pause_s = RETRY_S
            await asyncio.sleep(pause_s)

    async def sweep(self) -> None:
        """Those of an earlier tenure at once, those of this one when no request can hold them any more."""
        for id_hash in sorted(self._recovering):
            await self._revoke(id_hash)
            self._recovering.discard(id_hash)
        for id_hash in await self._sealed.list(TOKEN_REVOKING):
            raw = await self._sealed.get(TOKEN_REVOKING + id_hash)
            if raw is not None and self._now() - int(raw) > ABANDONED_S:
                await self._revoke(id_hash)
