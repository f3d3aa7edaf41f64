"""Revoking leases: at their end, with their token, by id, by prefix, by force.

A lease that must go is first made *due now* in the store: from then on it counts for nothing, cannot be renewed, and
will be revoked whatever happens to this node. The attempt that follows calls the engine; only its success removes the
lease. A failure moves it to a later time; after :data:`ATTEMPTS_MAX` it is *irrevocable*: kept, listed with its error,
and not tried again until an operator asks. A call that a crash cut short is repeated: engines expect that.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from consul_backend.errors import BackendError
from consul_backend.wal import Write
from plugin_api.errors import InvalidRequest, Irrevocable, PluginError
from sidecar.core.keys import LEASES_BY_TOKEN, LEASES_IRREVOCABLE
from sidecar.core.lease_entry import LeaseEntry
from sidecar.core.leases import EngineOf, Leases
from sidecar.core.locks import KeyedLocks
from sidecar.core.metrics import METRICS
from sidecar.core.schedule import Due
from sidecar.core.store_view import SealedStore, read_many

ATTEMPTS_MAX = 6
BACKOFF_S = 10.0
BACKOFF_S_MAX = 300.0
ATTEMPT_S_MAX = 60.0
FORCED_ATTEMPT_S_MAX = 10.0
AT_ONCE = 32
ERROR_CHARACTERS_MAX = 500

_log = logging.getLogger("expiration")


class TokenRevoker(Protocol):
    """What is needed of the token store."""

    async def revoke_hash(self, id_hash: str) -> None:
        """Revoke a token with everything that ends with it."""


@dataclass(frozen=True, slots=True)
class IrrevocableLease:
    """One lease that could not be revoked, and why."""

    id: str
    mount: str
    error: str
    expires_s: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed; ``final`` where another one has no use."""

    text: str
    final: bool = False


class LeaseRevocation:
    """``wake`` is called when something became due now."""

    def __init__(
        self,
        sealed: SealedStore,
        leases: Leases,
        tokens: TokenRevoker,
        engine_of: EngineOf,
        now: Callable[[], float],
        *,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._sealed = sealed
        self._leases = leases
        self._tokens = tokens
        self._engine_of = engine_of
        self._now = now
        self._wake = wake
        # One attempt at a time for a lease, apart from the lock of its entry: an engine may hang.
        self._attempts = KeyedLocks()
        self._irrevocable: set[str] = set()

    async def load(self) -> None:
        """Read which leases are irrevocable, for :attr:`irrevocable_count`."""
        self._irrevocable = set(await self._sealed.list(LEASES_IRREVOCABLE))

    async def invalidate(self, keys: Iterable[str]) -> None:
        """Replication changed these logical keys."""
        for key in keys:
            if key.startswith(LEASES_IRREVOCABLE):
                name = key.removeprefix(LEASES_IRREVOCABLE)
                known = await self._sealed.get_raw(key) is not None
                (self._irrevocable.add if known else self._irrevocable.discard)(name)

    # -- at its end

    async def expire(self, due: Due) -> None:
        """What is due for a lease: try to revoke it."""
        raw = await self._sealed.get(due.key)
        lease_id = raw.decode() if raw is not None else ""
        entry = await self._leases.load(lease_id) if lease_id else None
        if entry is None or entry.due_s != due.at_s or entry.irrevocable:
            await self._sealed.delete(due.key)
            return
        METRICS.increment("expire.lease_expiration")
        METRICS.sample("expire.time_in_queue", max(self._now() - due.at_s, 0.0) * 1000)
        await self._attempt(lease_id, ATTEMPT_S_MAX, due_s=due.at_s)

    # -- when somebody asks

    async def revoke(self, lease_id: str, *, sync: bool = True) -> None:
        """Revoke one lease of either kind; an id that names none is no failure. With ``sync`` it has gone when this
        returns, or InvalidRequest says why not, and further attempts follow in the background."""
        with METRICS.timer("expire.revoke"):
            failure = None
            if await self._end(lease_id):
                if sync:
                    failure = await self._attempt(lease_id, ATTEMPT_S_MAX)
                else:
                    self._wake()
        if failure is not None:
            raise InvalidRequest(f'failed to revoke "{lease_id}": {failure.text}')

    async def revoke_prefix(self, prefix: str, *, sync: bool = True, force: bool = False) -> int:
        """Revoke every lease below ``prefix``, or the one that it names; returns how many there were. ``force`` forgets
        those that cannot be revoked. All are tried before InvalidRequest names the first that failed."""
        with METRICS.timer("expire.revoke-force" if force else "expire.revoke-prefix"):
            ids = [each async for each in self._leases.below(prefix)]
            ended: list[str] = []
            failed: list[tuple[str, Failure]] = []

            async def end(lease_id: str) -> None:
                if await self._end(lease_id):
                    ended.append(lease_id)

            async def attempt(lease_id: str) -> None:
                limit_s = FORCED_ATTEMPT_S_MAX if force else ATTEMPT_S_MAX
                failure = await self._attempt(lease_id, limit_s, force=force)
                if failure is not None:
                    failed.append((lease_id, failure))

            # All of them end first: what this request has no time for is revoked in the background.
            await each_of(ids, end)
            if sync or force:
                await each_of(ended, attempt)
            else:
                self._wake()
        if failed:
            lease_id, failure = min(failed, key=lambda found: found[0])
            raise InvalidRequest(
                f'failed to revoke {len(failed)} of {len(ids)} leases below "{prefix}"; "{lease_id}": {failure.text}'
            )
        return len(ids)

    async def release(self, id_hash: str) -> None:
        """All leases of a token become due now, and its no more."""
        with METRICS.timer("expire.revoke-by-token"):
            folder = f"{LEASES_BY_TOKEN}{id_hash}/"
            names = await self._sealed.list(folder)

            async def one(name: str) -> None:
                raw = await self._sealed.get(folder + name)
                if raw is not None and not await self.make_due(raw.decode(), of_token=id_hash):
                    await self._sealed.commit([Write(folder + name, None)])

            await each_of(names, one)
        if names:
            self._wake()

    async def _end(self, lease_id: str) -> bool:
        """Revoke a token, or have a secret's lease end now. True for a secret: its engine has still to be called."""
        id_hash = await self._leases.token_hash(lease_id)
        if id_hash:
            await self._tokens.revoke_hash(id_hash)
            return False
        return await self.make_due(lease_id)

    async def make_due(self, lease_id: str, *, of_token: str = "") -> bool:
        """Have a lease end now; its revocation follows. False where there is no such lease, or it is not (any more)
        one of the token ``of_token``."""
        async with self._leases.held(lease_id) as entry:
            if entry is None or (of_token and entry.token != of_token):
                return False
            now_s = int(self._now())
            if max(entry.due_s, entry.expires_s) <= now_s and not (entry.token or entry.attempts or entry.irrevocable):
                return True  # of thousands that were asked for twice, each is written once
            changed = msgspec.structs.replace(
                entry,
                expires_s=min(now_s, entry.expires_s),
                due_s=now_s,
                token="",
                attempts=0,
                error="",
                irrevocable=False,
            )
            await self._leases.save(entry, changed)
            self._irrevocable.discard(entry.due_name)
            return True

    # -- one attempt

    async def _attempt(
        self, lease_id: str, limit_s: float, *, force: bool = False, due_s: int | None = None
    ) -> Failure | None:
        """Ask the engine, and commit what came of it. None: the lease has gone, or (with ``due_s``) what was due then
        has been done by another attempt."""
        async with self._attempts.hold(lease_id):
            entry = await self._leases.load(lease_id)
            if entry is None or (due_s is not None and entry.due_s != due_s):
                return None
            # Where somebody else has tried since the caller made it due, that failure is the answer.
            asks = due_s is not None or not entry.attempts
            failure = await self._ask(entry, limit_s) if asks else Failure(entry.error)
            async with self._leases.held(lease_id) as current:
                if current is None:
                    return None
                if failure is None or force:
                    if failure is not None:
                        _log.warning("lease forgotten by force: lease=%s error=%s", lease_id, failure.text)
                    await self._leases.remove(current)
                    self._irrevocable.discard(current.due_name)
                    return None
                if asks:
                    await self._postpone(current, failure)
                return failure

    async def _ask(self, entry: LeaseEntry, limit_s: float) -> Failure | None:
        engine = self._engine_of(entry.mount)
        if engine is None:
            return Failure("the mount that issued it is gone or not available", final=True)
        try:
            async with asyncio.timeout(limit_s):
                await engine.revoke(entry.issued(engine.context.mount.path))
        except TimeoutError:
            return Failure(f"the engine did not finish within {limit_s:g} s")
        except Irrevocable as error:
            return Failure(str(error), final=True)
        except PluginError as error:
            return Failure(str(error) or type(error).__name__)
        except BackendError:
            raise
        except Exception as error:  # the edge of an engine: whatever it raises, the lease stays and is tried again
            _log.exception("an engine failed to revoke: lease=%s", entry.id)
            return Failure(f"internal error ({type(error).__name__})")
        return None

    async def _postpone(self, entry: LeaseEntry, failure: Failure) -> None:
        attempts = entry.attempts + 1
        final = failure.final or attempts >= ATTEMPTS_MAX
        jitter = random.uniform(0.8, 1.2)  # noqa: S311 - spreads retries
        delay_s = min(BACKOFF_S * 2 ** (attempts - 1), BACKOFF_S_MAX) * jitter
        METRICS.increment("expire.lease_expiration.error")
        _log.warning(
            "lease not revoked: lease=%s attempt=%d of %d %s error=%s",
            entry.id,
            attempts,
            ATTEMPTS_MAX,
            "irrevocable: an operator must act" if final else f"next in {delay_s:.0f} s",
            failure.text,
        )
        postponed = msgspec.structs.replace(
            entry,
            due_s=entry.due_s if final else int(self._now() + delay_s),
            attempts=attempts,
            error=failure.text[:ERROR_CHARACTERS_MAX],
            irrevocable=final,
        )
        await self._leases.save(entry, postponed)
        if final:
            self._irrevocable.add(entry.due_name)

    # -- what could not be revoked

    @property
    def irrevocable_count(self) -> int:
        """How many leases are irrevocable."""
        return len(self._irrevocable)

    def irrevocable_by_mount(self) -> dict[str, int]:
        """How many leases are irrevocable, by the uuid of the mount that issued them."""
        counts: dict[str, int] = {}
        for name in self._irrevocable:
            mount = name.rpartition("-")[0]
            counts[mount] = counts.get(mount, 0) + 1
        return counts

    async def irrevocable(self, limit: int | None) -> list[IrrevocableLease]:
        """At most ``limit`` of them, the oldest expiry first."""
        names = sorted(self._irrevocable)[:limit]
        ids = await read_many(self._sealed, [LEASES_IRREVOCABLE + name for name in names])
        entries = [await self._leases.load(raw.decode()) for raw in ids]
        found = [
            IrrevocableLease(entry.id, entry.mount, entry.error, entry.expires_s)
            for entry in entries
            if entry is not None and entry.irrevocable
        ]
        return sorted(found, key=lambda lease: (lease.expires_s, lease.id))


async def each_of(names: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
    """``work`` for every name, a bounded number at a time; the first error stops the rest."""
    waiting = iter(names)

    async def worker() -> None:
        for name in waiting:
            await work(name)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(worker())
    except* Exception as group:
        raise group.exceptions[0] from None
