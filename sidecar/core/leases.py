"""The lease store: secrets that engines issued and will be asked to take back, in local storage.

A lease is up to three entries (the lease, when it is due, its place below its token); each change is one commit of all
of them. Nothing is kept in memory but what is due next. Of tokens there is one entry each below the same folder, made
and removed by the token store, so that leases of both kinds are listed and revoked alike.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from consul_backend.wal import Write
from plugin_api.engine import Engine, MountInfo
from plugin_api.errors import InvalidRequest, PermissionDenied, PluginError
from plugin_api.pending import FOLDER
from plugin_api.request import Lease
from sidecar.core.keys import LEASES, local_key
from sidecar.core.lease_entry import (
    ID_LENGTH,
    LeaseEntry,
    change,
    creation,
    first_expiry,
    is_lease_id,
    lease_key,
    removal,
    renewed_expiry,
    token_of,
)
from sidecar.core.locks import KeyedLocks
from sidecar.core.metrics import METRICS
from sidecar.core.schedule import Schedule
from sidecar.core.store_view import SealedStore
from sidecar.core.token_entry import BATCH, TokenEntry
from sidecar.core.token_ids import base62

ONE_USE_LEFT = "Secret cannot be returned; token had one use left, so leased credentials were immediately revoked."
NO_HOLDER = "a leased secret needs a token of this cluster; it was taken back"
NOT_FOUND = "lease not found"
TAKE_BACK_S_MAX = 30.0
_LISTS_AT_ONCE = 32


class Tokens(Protocol):
    """What leases need of the token store."""

    async def attach(self, entry: TokenEntry, writes: Sequence[Write]) -> bool:
        """Commit writes that end with the token; False where it cannot be used any more."""

    async def by_hash(self, id_hash: str) -> TokenEntry | None:
        """The token of a lease id, if it may be used."""


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    """What a lookup shows. Unix seconds; 0 for a renewal that never was."""

    id: str
    issued_s: int
    expires_s: int
    last_renewal_s: int
    renewable: bool


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease after its creation or renewal."""

    entry: LeaseEntry
    warnings: list[str] = field(default_factory=list)


EngineOf = Callable[[str], Engine | None]
"""The engine of a mount, by the mount's uuid; None where nothing (that works) is mounted."""


class Leases:
    """Register, look up and renew. ``now`` returns unix seconds. Revoking: :mod:`sidecar.core.lease_revocation`."""

    def __init__(
        self,
        sealed: SealedStore,
        schedule: Schedule,
        tokens: Tokens,
        engine_of: EngineOf,
        now: Callable[[], float],
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._sealed = sealed
        self._schedule = schedule
        self._tokens = tokens
        self._engine_of = engine_of
        self._now = now
        self._random_bytes = random_bytes
        self._locks = KeyedLocks()

    # -- making

    async def register(self, path: str, mount: MountInfo, lease: Lease, holder: TokenEntry | None) -> Granted:
        """Keep a lease of what the engine at ``mount`` has just issued to ``holder`` at the request path ``path``.
        Where that cannot be, whatever the reason, the secret is taken back before the error is raised. ``holder`` None:
        the caller has no token of this cluster, so that nothing here would end the lease in time."""
        with METRICS.timer("expire.register"):
            now_s = int(self._now())
            batch = holder is not None and holder.type == BATCH
            token_expires_s = holder.expires_s if holder is not None and batch else 0
            ttl_s, max_ttl_s, warnings = first_expiry(lease, mount, now_s, token_expires_s)
            entry = LeaseEntry(
                id=f"{path.rstrip('/')}/{base62(ID_LENGTH, self._random_bytes)}",
                mount=mount.uuid,
                issued_s=now_s,
                expires_s=now_s + ttl_s,
                due_s=now_s + ttl_s,
                ttl_s=ttl_s,
                max_ttl_s=max_ttl_s,
                renewable=lease.renewable,
                internal=lease.internal,
                token="" if holder is None else holder.parent if batch else holder.id_hash,
                token_expires_s=token_expires_s,
            )
            try:
                if holder is None:
                    raise InvalidRequest(NO_HOLDER)
                if ttl_s <= 0 or not await self._tokens.attach(holder, [*creation(entry), *_ended(mount, lease)]):
                    raise InvalidRequest(ONE_USE_LEFT) if holder.spent else PermissionDenied()
            except BaseException:
                await self.take_back(entry, mount.path)
                raise
            self._schedule.add(entry.due_s)
        METRICS.increment("secret.lease.creation", secret_engine=mount.type)
        return Granted(entry, warnings)

    async def take_back(self, entry: LeaseEntry, mount_point: str) -> None:
        """Revoke a secret whose lease could not be kept. A failure is said in the error, so that somebody looks."""
        engine = self._engine_of(entry.mount)
        try:
            if engine is not None:
                async with asyncio.timeout(TAKE_BACK_S_MAX):
                    await engine.revoke(entry.issued(mount_point))
        except Exception as error:  # the edge of an engine: whatever it is, an operator must hear of the secret
            raise PluginError(
                f"a secret was issued below {mount_point}, could not be leased, and could not be taken back "
                f"({type(error).__name__}): revoke it by hand"
            ) from None

    # -- reading

    @asynccontextmanager
    async def held(self, lease_id: str) -> AsyncIterator[LeaseEntry | None]:
        """The lease of a secret as it is stored, and nobody else changes it during the block."""
        async with self._locks.hold(lease_id):
            yield await self.load(lease_id)

    async def load(self, lease_id: str) -> LeaseEntry | None:
        """The lease of a secret; None where there is none, and for a token's."""
        if not is_lease_id(lease_id):
            return None
        raw = await self._sealed.get(lease_key(lease_id))
        return msgspec.msgpack.decode(raw, type=LeaseEntry) if raw else None

    async def token_hash(self, lease_id: str) -> str:
        """The ``id_hash`` of the token whose lease this is; empty for any other id."""
        id_hash = token_of(lease_id)
        if not id_hash or not is_lease_id(lease_id) or await self._sealed.get(lease_key(lease_id)) is None:
            return ""
        return id_hash

    async def lookup(self, lease_id: str) -> LeaseTimes | None:
        """The times of a lease of either kind that has not ended."""
        with METRICS.timer("expire.fetch-lease-times"):
            id_hash = await self.token_hash(lease_id)
            if id_hash:
                token = await self._tokens.by_hash(id_hash)
                if token is None:
                    return None
                last_s = token.last_renewal_s
                return LeaseTimes(lease_id, token.created_s, token.expires_s, last_s, token.renewable)
            entry = await self.load(lease_id)
            if entry is None:
                return None
            return LeaseTimes(entry.id, entry.issued_s, entry.expires_s, entry.last_renewal_s, entry.renewable)

    async def list(self, prefix: str) -> list[str]:
        """Sorted names one level below ``prefix``; folders end in ``/``."""
        folder = prefix.strip("/")
        if folder and not is_lease_id(folder):
            return []
        return await self._sealed.list(f"{LEASES}{folder}/" if folder else LEASES)

    async def everything(self) -> AsyncIterator[str]:
        """Every lease id of both kinds."""
        for name in await self._sealed.list(LEASES):
            if not name.endswith("/"):
                yield name
                continue
            async for lease_id in self.below(name):
                yield lease_id

    async def below(self, prefix: str) -> AsyncIterator[str]:
        """Every lease id below ``prefix``, or the one that it is, of both kinds."""
        folder = prefix.strip("/")
        if not is_lease_id(folder):
            return
        if not prefix.endswith("/") and await self._sealed.get(lease_key(folder)) is not None:
            yield folder
        folders = [folder + "/"]
        while folders:
            # Login paths have a folder for each user: a round trip for one after the other would take minutes.
            some, folders = folders[:_LISTS_AT_ONCE], folders[_LISTS_AT_ONCE:]
            found = await asyncio.gather(*(self._sealed.list(LEASES + each) for each in some))
            for each, names in zip(some, found, strict=True):
                folders.extend(each + name for name in names if name.endswith("/"))
                for name in names:
                    if not name.endswith("/"):
                        yield each + name

    # -- renewing

    async def renew(self, lease_id: str, increment_s: int = 0) -> Granted:
        """Let the secret live longer, within all maxima. Raises InvalidRequest, and what the engine raises."""
        with METRICS.timer("expire.renew"):
            if await self.token_hash(lease_id):
                raise InvalidRequest("tokens cannot be renewed through this endpoint")
            async with self.held(lease_id) as entry:
                if entry is None:
                    raise InvalidRequest(NOT_FOUND)
                if entry.irrevocable or self._now() >= entry.expires_s:
                    raise InvalidRequest("lease expired")
                if not entry.renewable:
                    raise InvalidRequest("lease is not renewable")
                engine = self._engine_of(entry.mount)
                if engine is None:
                    raise PluginError("the engine of this lease is not available")
                return await self._renew(entry, engine, increment_s)

    async def _renew(self, entry: LeaseEntry, engine: Engine, increment_s: int) -> Granted:
        mount = engine.context.mount
        asked = await engine.renew(entry.issued(mount.path), increment_s)
        now_s = int(self._now())
        wanted_s = increment_s if asked is None else asked.ttl_s
        max_ttl_s = entry.max_ttl_s
        if asked is not None and asked.max_ttl_s:
            max_ttl_s = min(max_ttl_s, asked.max_ttl_s)
        limited = msgspec.structs.replace(entry, max_ttl_s=max_ttl_s)
        expires_s, warnings = renewed_expiry(limited, wanted_s, mount.max_lease_ttl_s, now_s)
        renewed = msgspec.structs.replace(
            limited,
            expires_s=expires_s,
            due_s=expires_s,
            last_renewal_s=now_s,
            renewable=entry.renewable if asked is None else asked.renewable,
            internal=entry.internal if asked is None or not asked.internal else asked.internal,
        )
        await self.save(entry, renewed)
        return Granted(renewed, warnings)

    # -- changing

    async def save(self, old: LeaseEntry, new: LeaseEntry) -> None:
        """Commit a change of a lease that the caller holds."""
        await self._sealed.commit(change(old, new))
        if not new.irrevocable:
            self._schedule.add(new.due_s)

    async def restore(self, entry: LeaseEntry) -> bool:
        """Put back index entries of a lease that the caller holds, where they are missing. True if any was."""
        missing = [write for write in creation(entry)[1:] if await self._sealed.get(write.key) is None]
        if missing:
            await self._sealed.commit(missing)
            self._schedule.add(entry.due_s)
        return bool(missing)

    async def remove(self, entry: LeaseEntry) -> None:
        """Commit the end of a lease that the caller holds."""
        await self._sealed.commit(removal(entry))


def _ended(mount: MountInfo, lease: Lease) -> list[Write]:
    """The end of the note that the engine made before it began: from here on the lease sees to it."""
    if not lease.pending:
        return []
    if not lease.pending.isalnum():
        raise ValueError("a lease names no note of plugin_api.pending")
    return [Write(local_key(mount.uuid, FOLDER + lease.pending, local_mount=mount.local), None)]
