"""Everything of one tenure that ends by itself: tokens, leases, locked users; one schedule, one loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from sidecar.core import lockout, token_ids
from sidecar.core.expiration import Expiration
from sidecar.core.lease_revocation import LeaseRevocation
from sidecar.core.lease_tidy import logged_tidy
from sidecar.core.leases import EngineOf, Leases
from sidecar.core.lockout import Lockout
from sidecar.core.on_demand import OnDemand
from sidecar.core.schedule import Due, Schedule
from sidecar.core.store_view import SealedStore
from sidecar.core.tokens import TokenStore


class Leasing:
    """The parts, wired. ``enabled`` says whether this cluster may expire anything at the moment."""

    def __init__(
        self,
        sealed: SealedStore,
        schedule: Schedule,
        engine_of: EngineOf,
        now: Callable[[], float],
        enabled: Callable[[], bool],
    ) -> None:
        self.schedule = schedule
        self.tokens = TokenStore(sealed, now, schedule=schedule, release=lambda token: self.revocation.release(token))
        self.leases = Leases(sealed, schedule, self.tokens, engine_of, now)
        self.expiration = Expiration(schedule, self._handle, enabled)
        self.revocation = LeaseRevocation(sealed, self.leases, self.tokens, engine_of, now, wake=self.expiration.wake)
        self.lockout = Lockout(sealed, schedule, now)
        self.tidying = OnDemand(lambda: logged_tidy(sealed, self.leases, self.revocation))

    async def load(self) -> None:
        """Read what has to be known from the start: little, whatever the number of leases."""
        await self.tokens.load()
        await self.schedule.load()
        await self.revocation.load()
        await self.lockout.load()

    async def run(self) -> None:
        """Expire, tidy when asked; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.tokens.run(), name="tokens")
            tasks.create_task(self.expiration.run(), name="expiration")
            tasks.create_task(self.tidying.run(), name="lease tidy")

    async def invalidate(self, keys: Sequence[str]) -> None:
        """Replication changed these logical keys."""
        self.tokens.invalidate(keys)
        self.schedule.invalidate(keys)
        await self.revocation.invalidate(keys)
        await self.lockout.invalidate(keys)

    def gauges(self) -> dict[str, float]:
        """Values of this moment, by the names of the telemetry."""
        return {
            "core.locked_users": float(self.lockout.locked_count),
            "expire.job_manager.queue_length": float(self.expiration.queued),
            "expire.num_irrevocable_leases": float(self.revocation.irrevocable_count),
        }

    async def _handle(self, due: Due) -> None:
        if due.group == token_ids.DUE_GROUP:
            await self.tokens.expire(due)
        elif due.group == lockout.DUE_GROUP:
            await self.lockout.expire(due)
        else:
            await self.revocation.expire(due)
