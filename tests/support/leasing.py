"""Leases over an in-memory store, with an engine whose revocation a test can make fail or hang."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from plugin_api.engine import MountInfo
from plugin_api.request import Lease
from plugin_api.testing import make_context
from sidecar.core.leases import Granted
from sidecar.core.leasing import Leasing
from sidecar.core.schedule import Schedule
from sidecar.core.store_view import SealedStore
from sidecar.core.token_entry import CreateToken, IssuedToken, TokenEntry
from tests.support.leasing_engine import Credentials, Outside, credentials_engine
from tests.support.logical_store import FakeTime, MemoryLogicalStore, make_sealed

MOUNT = "00000000-0000-4000-8000-000000000000"


@dataclass
class Setup:
    """One node after another over one store. ``mounted`` maps mount uuids to engines."""

    store: MemoryLogicalStore
    sealed: SealedStore
    now: FakeTime
    outside: Outside
    mounted: dict[str, Credentials]
    enabled: bool = True
    leasing: Leasing = field(init=False)
    _running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """A node takes over: nothing is known but what is stored."""
        schedule = Schedule(self.sealed, self.now)
        self.leasing = Leasing(self.sealed, schedule, self.mounted.get, self.now, lambda: self.enabled)
        await self.leasing.load()

    async def token(self, **fields: object) -> IssuedToken:
        return await self.leasing.tokens.create(CreateToken(policies=["a"], **{"ttl_s": 3600, **fields}))

    def mount(self, uuid: str = MOUNT) -> MountInfo:
        return self.mounted[uuid].context.mount

    async def lease(
        self, holder: TokenEntry | None, role: str = "app", mount: str = MOUNT, path: str = "", **fields: object
    ) -> Granted:
        """A credential that exists outside, and its lease."""
        credential = f"{role}-{len(self.outside.valid)}"
        self.outside.valid.add(credential)
        lease = Lease(**{"ttl_s": 100, "internal": {"credential": credential}, **fields})
        return await self.leasing.leases.register(path or f"db/creds/{role}", self.mount(mount), lease, holder)

    async def expire(self, seconds: float = 0.0) -> None:
        """Let time pass, and do everything that is due then."""
        self.now.advance(seconds)
        await self.leasing.expiration.sweep()

    async def expire_in_background(self, seconds: float) -> None:
        """Let time pass for a node whose loop runs until :meth:`stop`."""
        self.now.advance(seconds)
        self._running = asyncio.create_task(self.leasing.expiration.run())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def left(self) -> list[str]:
        """What is stored of leases and their indexes."""
        return [key for key in self.store.below("") if key.startswith(("l/lease/", "l/expire/"))]


async def make_setup(mounts: int = 1) -> Setup:
    """A started node with engines mounted."""
    store, sealed = make_sealed()
    outside, engine = credentials_engine()
    mounted: dict[str, Credentials] = {}
    for number in range(mounts):
        context = make_context(path=f"db{number or ''}/")
        uuid = MOUNT[:-1] + str(number)
        context = type(context)(
            MountInfo(path=context.mount.path, type="credentials", uuid=uuid, accessor=f"credentials_{number}"),
            context.storage,
            context.local_storage,
            context.now,
        )
        mounted[uuid] = engine(context)
    it = Setup(store, sealed, FakeTime(), outside, mounted)
    await it.start()
    return it
