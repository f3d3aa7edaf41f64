"""Failed logins, counted by identity, and the identities that are locked out for a while.

An identity is (mount accessor, what the auth method says a login claims to be), whether or not there is any such user:
known and unknown ones are counted, locked and answered alike. Of the tries that one identity has left, each is given to
one login at a time, so that any number of simultaneous logins has as many tries as one after the other. A lock is
stored, and survives the node; counts below the threshold do not.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from consul_backend.wal import Write
from plugin_api.errors import InvalidCredentials, PermissionDenied, Unavailable
from sidecar.core.keys import LOCKED_USERS
from sidecar.core.lockout_rules import LockoutRules
from sidecar.core.schedule import Due, Schedule, due_delete, due_name, due_write
from sidecar.core.store_view import SealedStore, read_many

DUE_GROUP = "lockout"
COUNTED_MAX = 100_000
"""Identities in memory. Whoever fails to log in as more of them makes the oldest be forgotten."""
STORED_MAX = 10_000
"""Locks in the store; further ones are kept in memory only."""
TURN_S_MAX = 30.0
_SHOWN_CHARACTERS_MAX = 512
_FORGET_TRIES = 64

log = logging.getLogger("core")


class StoredLock(msgspec.Struct, frozen=True):
    """A lock as stored. ``until_s`` in unix seconds."""

    accessor: str
    identity: str
    until_s: int


@dataclass(slots=True)
class _Count:
    accessor: str
    identity: str
    failures: int = 0
    last_failure_s: float = 0.0
    until_s: int = 0
    stored: bool = False
    running: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def forget_old(self, rules: LockoutRules, now_s: float) -> None:
        if self.until_s and now_s >= self.until_s:
            self.until_s, self.failures = 0, 0
        if now_s - self.last_failure_s > rules.counter_reset_s:
            self.failures = 0

    def locked(self, now_s: float) -> bool:
        return now_s < self.until_s


class Lockout:
    """Counts and locks. ``now`` returns unix seconds."""

    def __init__(self, sealed: SealedStore, schedule: Schedule, now: Callable[[], float]) -> None:
        self._sealed = sealed
        self._schedule = schedule
        self._now = now
        self._counts: OrderedDict[str, _Count] = OrderedDict()

    async def load(self) -> None:
        """Read the locks of an earlier tenure."""
        for accessor in await self._sealed.list(LOCKED_USERS):
            folder = LOCKED_USERS + accessor
            for raw in await read_many(self._sealed, [folder + name for name in await self._sealed.list(folder)]):
                self._know(raw)

    async def invalidate(self, keys: Iterable[str]) -> None:
        """Replication changed these logical keys."""
        for key in keys:
            if key.startswith(LOCKED_USERS):
                await self._read(key)

    async def _read(self, key: str) -> None:
        raw = await self._sealed.get(key)
        if raw is None:
            self._counts.pop(key, None)
            return
        self._know(raw)

    def _know(self, raw: bytes) -> None:
        lock = msgspec.msgpack.decode(raw, type=StoredLock)
        count = _Count(lock.accessor, lock.identity, until_s=lock.until_s, stored=True)
        self._counts[_key(lock.accessor, lock.identity)] = count

    @asynccontextmanager
    async def attempt(self, accessor: str, identity: str, rules: LockoutRules) -> AsyncIterator[_Count]:
        """One login. Raises PermissionDenied for an identity that is locked out. InvalidCredentials from the block is
        counted; :meth:`succeeded` starts anew."""
        count = self._counted(accessor, identity)
        await self._turn(count, rules)
        count.running += 1
        try:
            yield count
        except InvalidCredentials:
            await self._failed(count, rules)
            raise
        finally:
            count.running -= 1
            count.changed.set()

    async def _turn(self, count: _Count, rules: LockoutRules) -> None:
        """Wait until one of the tries that are left is free."""
        try:
            async with asyncio.timeout(TURN_S_MAX):
                while True:
                    count.forget_old(rules, self._now())
                    if count.locked(self._now()):
                        raise PermissionDenied
                    if count.running < max(rules.threshold - count.failures, 1):
                        return
                    count.changed.clear()
                    await count.changed.wait()
        except TimeoutError:
            raise Unavailable("too many logins of one identity are under way; try again") from None

    async def _failed(self, count: _Count, rules: LockoutRules) -> None:
        now_s = self._now()
        count.forget_old(rules, now_s)
        count.failures += 1
        count.last_failure_s = now_s
        if count.failures < rules.threshold or count.locked(now_s):
            return
        # In memory before the store is waited for: no login gets a turn meanwhile.
        count.until_s = int(now_s) + rules.duration_s
        log.warning("user locked out: mount=%s failures=%d for %d s", count.accessor, count.failures, rules.duration_s)
        await self._store(count)

    async def _store(self, count: _Count) -> None:
        if sum(each.stored for each in self._counts.values()) >= STORED_MAX:
            log.error("more than %d users are locked out: further locks end with this node's lead", STORED_MAX)
            return
        key, name = _key(count.accessor, count.identity), _due_name(count)
        lock = StoredLock(count.accessor, count.identity, count.until_s)
        count.stored = True
        await self._sealed.commit(
            [Write(key, msgspec.msgpack.encode(lock)), due_write(count.until_s, name, key.encode())]
        )
        self._schedule.add(count.until_s)

    def succeeded(self, count: _Count) -> None:
        """The login was right: the identity has all its tries again."""
        count.failures = 0

    def locked(self) -> dict[str, list[str]]:
        """Locked identities by mount accessor, sorted."""
        now_s = self._now()
        found: dict[str, list[str]] = {}
        for count in self._counts.values():
            if count.locked(now_s):
                found.setdefault(count.accessor, []).append(count.identity)
        return {accessor: sorted(identities) for accessor, identities in found.items()}

    @property
    def locked_count(self) -> int:
        """How many identities are locked out now."""
        return sum(len(identities) for identities in self.locked().values())

    async def unlock(self, accessor: str, identity: str) -> None:
        """Let an identity, in any case of letters, try again. One that is not locked is no failure."""
        wanted = _shown(identity).casefold()
        for key, count in list(self._counts.items()):
            if count.accessor != accessor or count.identity.casefold() != wanted:
                continue
            if count.stored:
                await self._sealed.commit([Write(key, None), due_delete(count.until_s, _due_name(count))])
            count.until_s, count.failures, count.stored = 0, 0, False
            count.changed.set()

    async def expire(self, due: Due) -> None:
        """What is due for a lock: it ends."""
        raw = await self._sealed.get(due.key)
        key = raw.decode() if raw is not None else ""
        writes = [Write(due.key, None)]
        stored = await self._sealed.get(key) if key else None
        if stored is not None and msgspec.msgpack.decode(stored, type=StoredLock).until_s == due.at_s:
            writes.append(Write(key, None))
            count = self._counts.get(key)
            if count is not None:
                count.stored = False
        await self._sealed.commit(writes)

    def _counted(self, accessor: str, identity: str) -> _Count:
        key = _key(accessor, identity)
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = _Count(accessor, _shown(identity))
            while len(self._counts) > COUNTED_MAX:
                self._forget_one()
        self._counts.move_to_end(key)
        return count

    def _forget_one(self) -> None:
        """The one that was longest ago, if possible one that nothing depends on."""
        now_s = self._now()
        for key, count in list(islice(self._counts.items(), _FORGET_TRIES)):
            if not count.running and not count.locked(now_s):
                del self._counts[key]
                return
        self._counts.popitem(last=False)


def _shown(identity: str) -> str:
    return identity[:_SHOWN_CHARACTERS_MAX]


def _digest(identity: str) -> str:
    return hashlib.sha256(_shown(identity).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def _key(accessor: str, identity: str) -> str:
    return f"{LOCKED_USERS}{accessor}/{_digest(identity)}"


def _due_name(count: _Count) -> str:
    accessor = hashlib.sha256(count.accessor.encode()).hexdigest()[:8]
    return due_name(DUE_GROUP, accessor + _digest(count.identity))
