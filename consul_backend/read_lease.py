"""The read lease: fencing protects writes, this protects reads.

A successor can hold the lock no earlier than ``lease_s`` (the lock-delay) after this node's session ended. A server
round trip that proved the session alive, *sent* at time t, therefore proves that no successor writes before
t + lease_s. Reads are served until 0.8 of that, by this node's clock that counts through suspend; the rest is margin
for clock drift.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from consul_backend.clock import Clock
from consul_backend.errors import FenceLost

SAFE_FRACTION = 0.8


class ReadLease:
    """``renew`` makes one server round trip and returns whether the session lives; it may raise Unavailable."""

    def __init__(self, clock: Clock, lease_s: float, renew: Callable[[], Awaitable[bool]]) -> None:
        self._clock = clock
        self._window_s = lease_s * SAFE_FRACTION
        self._renew = renew
        self._proved_at = float("-inf")
        self._renewing: asyncio.Task[None] | None = None
        self._lost = False

    def now(self) -> float:
        """The time to stamp *before* sending what may become a proof."""
        return self._clock.monotonic()

    def proved(self, sent_at: float) -> None:
        """A round trip sent at ``sent_at`` proved the session alive (an acknowledged fenced transaction, a renewal)."""
        self._proved_at = max(self._proved_at, sent_at)

    def unproved_s(self) -> float:
        """Seconds since the newest proof was sent."""
        return self._clock.monotonic() - self._proved_at

    def lost(self) -> None:
        """The session is known to be gone: nothing is served from here on."""
        self._lost = True

    def valid(self) -> bool:
        """Whether a read may be answered at this instant."""
        return not self._lost and self._clock.monotonic() - self._proved_at < self._window_s

    async def ensure(self) -> None:
        """Return while the lease is valid, renewing it first if needed; concurrent callers share one renewal.

        Raises FenceLost when the session is gone, Unavailable when that cannot be told.
        """
        while not self.valid():
            if self._lost:
                raise FenceLost("this node's session ended: it no longer serves reads")
            if self._renewing is None or self._renewing.done():
                self._renewing = asyncio.create_task(self._renew_once(), name="renew read lease")
            await asyncio.shield(self._renewing)

    async def _renew_once(self) -> None:
        sent_at = self._clock.monotonic()
        if not await self._renew():
            self.lost()
            raise FenceLost("this node's session ended: it no longer serves reads")
        self.proved(sent_at)
